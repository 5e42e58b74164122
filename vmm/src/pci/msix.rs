//! MSI-X: a table of messages in a BAR, a capability that switches it, and the routes that follow both.
//!
//! Invariants:
//! - A vector's route is its table entry exactly while MSI-X is enabled and neither the function nor the vector is
//!   masked; otherwise it has none. The routes are told of changes only.
//! - The route of a vector is set under the lock of the table, so the last one set is what the table says.
//!   Lock order: the table, then whatever [`MsiRoutes`] locks.
//! - What was signalled while masked is kept by [`MsiRoutes`], which is why the pending bits are read from there.
//!
//! Sources: PCI Express Base 5.0, 6.1.4 and 7.7.2.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use super::{BARS, CapabilityError, ConfigSpace, MsiMessage, MsiRoutes};

/// Capability id.
pub const MSIX_CAPABILITY: u8 = 0x11;
/// Most vectors a function can have.
pub const MSIX_VECTORS: u16 = 2048;

const ENTRY: u64 = 16;
const ENTRY_ADDRESS_LOW: usize = 0;
const ENTRY_ADDRESS_HIGH: usize = 1;
const ENTRY_DATA: usize = 2;
const ENTRY_CONTROL: usize = 3;
/// The only bit of vector control.
const ENTRY_MASKED: u32 = 1;
/// The table takes addresses that are a multiple of 4.
const ADDRESS_LOW: u32 = !0b11;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Offset of message control in the capability.
const CONTROL: u16 = 2;
/// Offsets in a BAR share a register with its index.
const OFFSET_ALIGN: u32 = 8;

/// A place in a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarOffset {
    /// Which BAR.
    pub bar: u8,
    /// Bytes from its start, a multiple of 8.
    pub offset: u32,
}

/// How many vectors there are and where their registers lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLayout {
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// The table, [`MsixLayout::table_size`] bytes.
    pub table: BarOffset,
    /// The pending bits, [`MsixLayout::pending_size`] bytes.
    pub pending: BarOffset,
}

impl MsixLayout {
    /// Bytes of a table.
    pub fn table_size(vectors: u16) -> u64 {
        u64::from(vectors) * ENTRY
    }

    /// Bytes of the pending bits: whole quadwords.
    pub fn pending_size(vectors: u16) -> u64 {
        u64::from(vectors).div_ceil(64) * 8
    }

    fn check(&self) -> Result<(), MsixError> {
        let Self {
            vectors,
            table,
            pending,
        } = *self;
        if vectors == 0 || vectors > MSIX_VECTORS {
            return Err(MsixError::Vectors { vectors });
        }
        for place in [table, pending] {
            if place.bar >= BARS || !place.offset.is_multiple_of(OFFSET_ALIGN) {
                return Err(MsixError::Place(place));
            }
        }
        let (first, second) = (u64::from(table.offset), u64::from(pending.offset));
        let apart = table.bar != pending.bar
            || first + Self::table_size(vectors) <= second
            || second + Self::pending_size(vectors) <= first;
        if apart {
            Ok(())
        } else {
            Err(MsixError::Overlap { table, pending })
        }
    }
}

/// Vectors that can't be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MsixError {
    /// None, or too many.
    #[error("{vectors} MSI-X vectors: a function has 1 to {MSIX_VECTORS}")]
    Vectors {
        /// Asked for.
        vectors: u16,
    },
    /// Not a place in a BAR.
    #[error("MSI-X registers at {:#x} of BAR {}: the offset has to be a multiple of 8, the BAR 0 to 5", .0.offset, .0.bar)]
    Place(BarOffset),
    /// The table runs into the pending bits.
    #[error("the MSI-X table at {:#x} and the pending bits at {:#x} of BAR {} overlap; move one of them", table.offset, pending.offset, table.bar)]
    Overlap {
        /// The table.
        table: BarOffset,
        /// The pending bits.
        pending: BarOffset,
    },
}

#[derive(Clone, Copy)]
struct Entry {
    registers: [u32; 4],
    /// What the routes were told last.
    route: Option<MsiMessage>,
}

impl Entry {
    /// As after a reset: masked.
    const RESET: Self = Self {
        registers: [0, 0, 0, ENTRY_MASKED],
        route: None,
    };

    fn message(&self) -> MsiMessage {
        let low = self.registers[ENTRY_ADDRESS_LOW];
        let high = self.registers[ENTRY_ADDRESS_HIGH];
        MsiMessage {
            address: u64::from(high) << 32 | u64::from(low),
            data: self.registers[ENTRY_DATA],
        }
    }

    fn masked(&self) -> bool {
        self.registers[ENTRY_CONTROL] & ENTRY_MASKED != 0
    }
}

struct Table {
    control: u16,
    entries: Vec<Entry>,
}

/// The MSI-X state of one function. Guards itself.
pub struct Msix {
    layout: MsixLayout,
    table: Mutex<Table>,
    routes: Arc<dyn MsiRoutes>,
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix")
            .field("layout", &self.layout)
            .field("control", &self.lock().control)
            .finish_non_exhaustive()
    }
}

impl Msix {
    /// Disabled, all vectors masked. `routes` has no route yet, and belongs to this function only.
    pub fn new(layout: MsixLayout, routes: Arc<dyn MsiRoutes>) -> Result<Self, MsixError> {
        layout.check()?;
        let entries = vec![Entry::RESET; usize::from(layout.vectors)];
        Ok(Self {
            layout,
            table: Mutex::new(Table {
                control: 0,
                entries,
            }),
            routes,
        })
    }

    /// Adds the capability and returns its offset. After each write to the space, its owner calls
    /// [`Msix::config_written`].
    pub fn add_capability(&self, space: &mut ConfigSpace) -> Result<u8, CapabilityError> {
        let MsixLayout {
            vectors,
            table,
            pending,
        } = self.layout;
        let place = |at: BarOffset| (at.offset | u32::from(at.bar)).to_le_bytes();
        let mut body = (vectors - 1).to_le_bytes().to_vec();
        body.extend(place(table));
        body.extend(place(pending));
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        space.add_capability(MSIX_CAPABILITY, &body, &writable)
    }

    /// Takes message control from the capability at `offset`. Cheap when it did not change.
    pub fn config_written(&self, space: &ConfigSpace, offset: u8) {
        self.set_control(space.read_u16(u16::from(offset) + CONTROL));
    }

    /// Message control is now `control`.
    pub fn set_control(&self, control: u16) {
        let control = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        let mut table = self.lock();
        if table.control != control {
            table.control = control;
            self.follow_all(&mut table);
        }
    }

    /// Whether the guest has switched MSI-X on.
    pub fn is_enabled(&self) -> bool {
        self.lock().control & CONTROL_ENABLE != 0
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.layout.vectors
    }

    /// As after power-on. The owner resets the message control in configuration space itself.
    pub fn reset(&self) {
        let mut table = self.lock();
        table.control = 0;
        for entry in &mut table.entries {
            entry.registers = Entry::RESET.registers;
        }
        self.follow_all(&mut table);
    }

    /// Answers a load if it begins in the table or the pending bits; tells whether it did. Loads must be of 4 or 8
    /// bytes and aligned; others read as they came, all ones.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        match self.registers(bar, offset, data.len()) {
            None => return false,
            Some(Registers::Undefined) => {}
            Some(Registers::Table(first)) => {
                let table = self.lock();
                for (number, part) in (first..).zip(data.chunks_exact_mut(4)) {
                    let entry = &table.entries[number / 4];
                    part.copy_from_slice(&entry.registers[number % 4].to_le_bytes());
                }
            }
            Some(Registers::Pending(first)) => {
                for (number, part) in (first..).zip(data.chunks_exact_mut(4)) {
                    part.copy_from_slice(&self.pending(number).to_le_bytes());
                }
            }
        }
        true
    }

    /// The counterpart of [`Msix::bar_read`]. Pending bits are read-only.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        let Some(registers) = self.registers(bar, offset, data.len()) else {
            return false;
        };
        if let Registers::Table(first) = registers {
            let mut table = self.lock();
            for (number, part) in (first..).zip(data.chunks_exact(4)) {
                let value = u32::from_le_bytes([part[0], part[1], part[2], part[3]]);
                table.entries[number / 4].registers[number % 4] = match number % 4 {
                    ENTRY_ADDRESS_LOW => value & ADDRESS_LOW,
                    ENTRY_CONTROL => value & ENTRY_MASKED,
                    _ => value,
                };
            }
            self.follow(&mut table, first / 4);
        }
        true
    }

    /// Which registers an access means; `None`: it is not for us.
    fn registers(&self, bar: u8, offset: u64, len: usize) -> Option<Registers> {
        let MsixLayout {
            vectors,
            table,
            pending,
        } = self.layout;
        let within = |place: BarOffset, size: u64| {
            let offset = offset.checked_sub(place.offset.into())?;
            (bar == place.bar && offset < size).then_some(offset)
        };
        let table = within(table, MsixLayout::table_size(vectors));
        let offset = table.or_else(|| within(pending, MsixLayout::pending_size(vectors)))?;
        let defined = matches!(len, 4 | 8) && offset.is_multiple_of(len as u64);
        // At most 2048 entries of 16 bytes.
        let Ok(number) = usize::try_from(offset / 4) else {
            return None;
        };
        Some(match table {
            _ if !defined => Registers::Undefined,
            Some(_) => Registers::Table(number),
            None => Registers::Pending(number),
        })
    }

    /// 32 pending bits.
    fn pending(&self, number: usize) -> u32 {
        let vector = |bit: u32| {
            let vector = u16::try_from(number * 32)
                .ok()?
                .checked_add(u16::try_from(bit).ok()?)?;
            (vector < self.layout.vectors).then_some(vector)
        };
        (0..32)
            .filter(|bit| vector(*bit).is_some_and(|vector| self.routes.is_pending(vector)))
            .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn follow_all(&self, table: &mut Table) {
        for index in 0..table.entries.len() {
            self.follow(table, index);
        }
    }

    /// Tells the routes if the vector's route is another one now.
    fn follow(&self, table: &mut Table, index: usize) {
        let on = table.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        let entry = &mut table.entries[index];
        let route = (on && !entry.masked()).then(|| entry.message());
        if route != entry.route {
            entry.route = route;
            let vector = u16::try_from(index).expect("at most 2048 vectors");
            self.routes.set(vector, route);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Doublewords, counted from the start of table or pending bits.
enum Registers {
    Table(usize),
    Pending(usize),
    Undefined,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::testing::{FakeRoutes, IDENTITY};

    const TABLE: u32 = 0x1000;
    const PENDING: u32 = 0x3000;

    fn layout(vectors: u16) -> MsixLayout {
        MsixLayout {
            vectors,
            table: BarOffset {
                bar: 1,
                offset: TABLE,
            },
            pending: BarOffset {
                bar: 1,
                offset: PENDING,
            },
        }
    }

    fn msix(vectors: u16) -> (Msix, Arc<FakeRoutes>) {
        let routes = Arc::new(FakeRoutes::default());
        let msix = Msix::new(layout(vectors), Arc::clone(&routes) as _).unwrap();
        (msix, routes)
    }

    fn store(msix: &Msix, offset: u32, value: u32) {
        assert!(msix.bar_write(1, u64::from(TABLE + offset), &value.to_le_bytes()));
    }

    fn load<const N: usize>(msix: &Msix, offset: u32) -> [u8; N] {
        let mut data = [0xff; N];
        assert!(msix.bar_read(1, u64::from(offset), &mut data));
        data
    }

    #[test]
    fn the_capability_says_where_the_table_is() {
        let mut space = ConfigSpace::new(&IDENTITY);
        let (msix, _) = msix(3);
        let at = msix.add_capability(&mut space).unwrap();
        let at = u16::from(at);
        assert_eq!(space.read_u32(at), 0x0002_0011);
        assert_eq!(space.read_u32(at + 4), TABLE | 1);
        assert_eq!(space.read_u32(at + 8), PENDING | 1);
        space.write(at, &[0xff; 12]);
        assert_eq!(space.read_u32(at), 0xc002_0011);
    }

    #[test]
    fn a_route_follows_every_mask() {
        let (msix, routes) = msix(2);
        let message = MsiMessage {
            address: 0x1_fee0_1004,
            data: 0x31,
        };
        store(&msix, 16, 0xfee0_1007);
        store(&msix, 20, 1);
        store(&msix, 24, 0x31);
        store(&msix, 28, 0);
        assert_eq!(routes.sets(), 0, "MSI-X is off");
        msix.set_control(CONTROL_ENABLE);
        assert!(msix.is_enabled());
        assert_eq!((routes.get(0), routes.get(1)), (None, Some(message)));
        assert_eq!(routes.sets(), 1, "vector 0 is masked and was");
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        assert_eq!(routes.get(1), None);
        msix.set_control(CONTROL_ENABLE);
        store(&msix, 28, 1);
        assert_eq!(routes.get(1), None);
        store(&msix, 28, 0);
        assert_eq!(routes.get(1), Some(message));
        let sets = routes.sets();
        msix.set_control(CONTROL_ENABLE | 1);
        store(&msix, 28, 0);
        assert_eq!(routes.sets(), sets, "nothing has changed");
        msix.reset();
        assert!(!msix.is_enabled());
        assert_eq!(routes.get(1), None);
        assert_eq!(load::<4>(&msix, TABLE + 28), [1, 0, 0, 0]);
        assert_eq!(load::<4>(&msix, TABLE + 16), [0; 4]);
    }

    #[test]
    fn eight_bytes_are_two_registers_and_nothing_else_is_defined() {
        let (msix, routes) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        assert!(msix.bar_write(1, u64::from(TABLE), &0x2_fee0_0000u64.to_le_bytes()));
        assert!(msix.bar_write(1, u64::from(TABLE) + 8, &[0x55, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(routes.sets(), 1, "data and mask were written at once");
        let message = MsiMessage {
            address: 0x2_fee0_0000,
            data: 0x55,
        };
        assert_eq!(routes.get(0), Some(message));
        for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (0, 16)] {
            assert!(msix.bar_write(1, u64::from(TABLE) + offset, &vec![0xee; len]));
            let mut data = vec![0xff; len];
            assert!(msix.bar_read(1, u64::from(TABLE) + offset, &mut data));
            assert_eq!(data, vec![0xff; len]);
        }
        assert_eq!(routes.get(0), Some(message));
        for (bar, offset) in [(0, 0x1000), (1, 0xfff), (1, 0x1010), (1, 0x3008)] {
            assert!(!msix.bar_write(bar, offset, &[0; 4]));
            assert!(!msix.bar_read(bar, offset, &mut [0; 4]));
        }
    }

    #[test]
    fn pending_bits_are_what_the_routes_keep() {
        let (msix, routes) = msix(70);
        for vector in [0, 33, 69] {
            routes.signal(vector);
        }
        assert_eq!(load::<8>(&msix, PENDING), (1u64 | 1 << 33).to_le_bytes());
        assert_eq!(load::<4>(&msix, PENDING + 8), (1u32 << 5).to_le_bytes());
        assert_eq!(load::<4>(&msix, PENDING + 12), [0; 4]);
        assert!(msix.bar_write(1, u64::from(PENDING), &[0xff; 8]));
        assert_eq!(load::<4>(&msix, PENDING), 1u32.to_le_bytes());
    }

    #[test]
    fn layouts_are_checked() {
        let new = |layout| Msix::new(layout, Arc::new(FakeRoutes::default()) as _).map(|_| ());
        for vectors in [0, 2049] {
            assert_eq!(new(layout(vectors)), Err(MsixError::Vectors { vectors }));
        }
        assert!(matches!(new(layout(2048)), Err(MsixError::Overlap { .. })));
        let mut apart = layout(2048);
        apart.pending.bar = 2;
        assert_eq!(new(apart), Ok(()));
        let mut odd = layout(1);
        odd.table.offset = 0x1004;
        assert_eq!(new(odd), Err(MsixError::Place(odd.table)));
        let mut beyond = layout(1);
        beyond.pending.bar = 6;
        assert_eq!(new(beyond), Err(MsixError::Place(beyond.pending)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Control(u16),
        Store(u64, Vec<u8>),
        Signal(u16),
        Reset,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => any::<u16>().prop_map(Step::Control),
            12 => (0u64..20, prop_oneof![prop::array::uniform4(any::<u8>()).prop_map(|b| b.to_vec()),
                prop::collection::vec(any::<u8>(), 0..10)])
                .prop_map(|(at, data)| Step::Store(u64::from(TABLE) + at * 4, data)),
            2 => (0u16..4).prop_map(Step::Signal),
            1 => Just(Step::Reset),
        ]
    }

    proptest! {
        #[test]
        fn routes_are_what_the_table_says(steps in prop::collection::vec(step(), 0..80)) {
            let (msix, routes) = msix(4);
            let mut control = 0;
            for step in steps {
                match step {
                    Step::Control(value) => {
                        control = value;
                        msix.set_control(value);
                    }
                    Step::Store(at, data) => {
                        msix.bar_write(1, at, &data);
                    }
                    Step::Signal(vector) => routes.signal(vector),
                    Step::Reset => {
                        control = 0;
                        msix.reset();
                    }
                }
                for vector in 0..4 {
                    let register = |number: u32| {
                        let at = TABLE + u32::from(vector) * 16 + number * 4;
                        u32::from_le_bytes(load(&msix, at))
                    };
                    let masked = register(3) & 1 == 1;
                    let message = MsiMessage {
                        address: u64::from(register(1)) << 32 | u64::from(register(0)),
                        data: register(2),
                    };
                    let open = control >> 14 == 0b10 && !masked;
                    prop_assert_eq!(routes.get(vector), open.then_some(message));
                }
            }
        }
    }
}
