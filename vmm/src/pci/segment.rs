//! One PCI segment: bus 0 with its 32 slots, its two apertures, and the ways into configuration space.
//!
//! ```text
//!   vCPU: ECAM, ports ─▶ config_write ─[config]─▶ Function::config_write ─▶ apertures change ─▶ Function::bar_moved
//!                      ─▶ config_read  ─[slots, shared]─▶ Function::config_read
//!   vCPU: MMIO        ─▶ Aperture     ─[bars, shared]──▶ Function::bar_read, bar_write
//! ```
//!
//! Invariants:
//! - A function sits in a slot with function number 0; nothing else exists on bus 0, and there is no other bus.
//! - Where BARs answer changes under the `config` lock only, so it is what the configuration spaces said last, except for
//!   a BAR that the guest put where it can't be: that one does not answer, until it is moved.
//! - When [`Segment::remove`] has returned, no vCPU is in the function, and the segment holds no reference to it.
//!
//! Lock order: `config`, then one of `slots` or an aperture's, then the function's own. A function never calls the
//! segment.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;
use tracing::debug;

use super::aperture::{Aperture, BarId, Refused};
use super::config_space::{
    BAR_64, BAR_FLAGS, BAR_IO, BARS, COMMAND, COMMAND_MEMORY, FIRST_BAR, ROM, ROM_ADDRESS, ROM_BAR,
};
use super::host_bridge::HostBridge;
use super::slots::{HOST_BRIDGE_SLOT, SLOTS};
use super::{Allocator, BarChange, CONFIG_SPACE, ConfigAddress, Function, Window};
use crate::bus::BusDevice;

/// What a segment is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentWindows {
    /// Segment number.
    pub number: u16,
    /// For 32-bit BARs.
    pub mmio32: Window,
    /// For 64-bit BARs.
    pub mmio64: Window,
}

/// A function can't be put into a slot.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InsertError {
    /// A bus has 32.
    #[error("PCI segment {segment} has no slot {slot}: there are 0 to 31")]
    NoSuchSlot {
        /// The segment.
        segment: u16,
        /// Asked for.
        slot: u8,
    },
    /// Another function sits there.
    #[error("slot {slot} of PCI segment {segment} has a function already; remove it first")]
    Taken {
        /// The segment.
        segment: u16,
        /// The slot.
        slot: u8,
    },
    /// The aperture is full.
    #[error(
        "BAR {bar} ({size:#x} bytes) finds no room in {window} of PCI segment {segment}; use another pci_segment="
    )]
    NoRoom {
        /// The segment.
        segment: u16,
        /// Which BAR.
        bar: u8,
        /// Its length.
        size: u64,
        /// Where it has to be.
        window: Window,
    },
}

type Occupants = [Option<Arc<dyn Function>>; SLOTS as usize];

/// Addresses that were handed out as firmware does. The guest may move BARs without asking.
struct Placement {
    low: Allocator,
    high: Allocator,
    /// First addresses.
    by_slot: [Vec<u64>; SLOTS as usize],
}

/// One segment. Shared by the buses of the machine and its owner.
pub struct Segment {
    number: u16,
    /// Serialises everything that changes where BARs answer.
    config: Mutex<Placement>,
    slots: RwLock<Occupants>,
    low: Arc<Aperture>,
    high: Arc<Aperture>,
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("number", &self.number)
            .field("low", &self.low)
            .field("high", &self.high)
            .finish_non_exhaustive()
    }
}

/// For the machine's owner.
impl Segment {
    /// A segment with a host bridge in slot 0.
    pub fn new(windows: SegmentWindows) -> Self {
        let mut occupants = Occupants::default();
        occupants[usize::from(HOST_BRIDGE_SLOT)] = Some(Arc::new(HostBridge::new()));
        Self {
            number: windows.number,
            config: Mutex::new(Placement {
                low: Allocator::new(windows.mmio32),
                high: Allocator::new(windows.mmio64),
                by_slot: Default::default(),
            }),
            slots: RwLock::new(occupants),
            low: Arc::new(Aperture::new(windows.mmio32)),
            high: Arc::new(Aperture::new(windows.mmio64)),
        }
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// What answers in its 32-bit and its 64-bit window, for the MMIO bus.
    pub fn apertures(&self) -> [Arc<Aperture>; 2] {
        [Arc::clone(&self.low), Arc::clone(&self.high)]
    }

    /// Puts a function into a slot. Does what firmware would: switches its decode off, finds the size of each BAR through
    /// the function's own registers, and gives each an address. Decode is left to the guest. On an error the function has
    /// no address of the segment and is not in the slot.
    pub fn insert(&self, slot: u8, function: Arc<dyn Function>) -> Result<(), InsertError> {
        let segment = self.number;
        let mut placement = self.lock();
        match self.slots().get(usize::from(slot)) {
            None => return Err(InsertError::NoSuchSlot { segment, slot }),
            Some(Some(_)) => return Err(InsertError::Taken { segment, slot }),
            Some(None) => {}
        }
        if let Err(error) = self.place_bars(&mut placement, slot, function.as_ref()) {
            placement.free(slot);
            return Err(error);
        }
        self.set_slot(slot, Some(function));
        Ok(())
    }

    /// Takes a function out: first its BARs stop answering, then its configuration space reads as all ones. The host
    /// bridge stays. `None`: there is no such function.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn Function>> {
        let mut placement = self.lock();
        let function = self.function(slot).filter(|_| slot != HOST_BRIDGE_SLOT)?;
        for change in function.bars() {
            let old = self.release(BarId {
                slot,
                bar: change.bar,
            });
            if old.is_some() {
                function.bar_moved(BarChange {
                    old,
                    new: None,
                    ..change
                });
            }
        }
        self.set_slot(slot, None);
        placement.free(slot);
        Some(function)
    }

    fn place_bars(
        &self,
        placement: &mut Placement,
        slot: u8,
        function: &dyn Function,
    ) -> Result<(), InsertError> {
        let [low, high, ..] = read_u32(function, COMMAND).to_le_bytes();
        let command = u16::from_le_bytes([low, high]) & !COMMAND_MEMORY;
        function.config_write(COMMAND, &command.to_le_bytes());
        let mut bar = 0;
        while bar < BARS {
            let register = FIRST_BAR + 4 * u16::from(bar);
            let flags = read_u32(function, register) & BAR_FLAGS;
            let wide = flags & BAR_IO == 0 && flags & BAR_64 != 0;
            if flags & BAR_IO == 0
                && let Some(size) = probe_size(function, register, wide)
            {
                let base = self.allocate(placement, slot, bar, size, wide)?;
                write_bar(function, register, wide, base);
            }
            bar += if wide { 2 } else { 1 };
        }
        if let Some(size) = probe_rom(function) {
            let base = self.allocate(placement, slot, ROM_BAR, size, false)?;
            // Its enable bit is left to the guest.
            write_bar(function, ROM, false, base);
        }
        Ok(())
    }

    /// A 64-bit BAR goes below 4 GiB only when there is no room above.
    fn allocate(
        &self,
        placement: &mut Placement,
        slot: u8,
        bar: u8,
        size: u64,
        wide: bool,
    ) -> Result<u64, InsertError> {
        let mut found = None;
        if wide {
            found = placement.high.allocate(size, size, &self.high.answering());
        }
        let found = found.or_else(|| placement.low.allocate(size, size, &self.low.answering()));
        let window = if wide { &self.high } else { &self.low }.window();
        let found = found.ok_or(InsertError::NoRoom {
            segment: self.number,
            bar,
            size,
            window,
        })?;
        placement.by_slot[usize::from(slot)].push(found.base());
        Ok(found.base())
    }

    fn lock(&self) -> MutexGuard<'_, Placement> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self) -> impl Deref<Target = Occupants> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the readers in the slot.
    fn set_slot(&self, slot: u8, function: Option<Arc<dyn Function>>) {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots[usize::from(slot)] = function;
    }

    fn function(&self, slot: u8) -> Option<Arc<dyn Function>> {
        self.slots().get(usize::from(slot))?.clone()
    }
}

impl Placement {
    fn free(&mut self, slot: u8) {
        for base in std::mem::take(&mut self.by_slot[usize::from(slot)]) {
            // The windows of a segment do not overlap, so it is in one of them.
            let _ = self.low.free(base).or_else(|| self.high.free(base));
        }
    }
}

fn read_u32(function: &dyn Function, register: u16) -> u32 {
    let mut bytes = [0; 4];
    function.config_read(register, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn write_bar(function: &dyn Function, register: u16, wide: bool, address: u64) {
    let bytes = address.to_le_bytes();
    function.config_write(register, &bytes[..4]);
    if wide {
        function.config_write(register + 4, &bytes[4..]);
    }
}

/// Writes all ones and sees which bits stick. `None`: there is no BAR.
fn probe_size(function: &dyn Function, register: u16, wide: bool) -> Option<u64> {
    write_bar(function, register, wide, u64::MAX);
    let low = u64::from(read_u32(function, register) & !BAR_FLAGS);
    let high = if wide {
        read_u32(function, register + 4)
    } else {
        u32::MAX
    };
    let sticks = u64::from(high) << 32 | low;
    (low != 0 || (wide && high != 0)).then(|| 1 << sticks.trailing_zeros())
}

/// Length of the expansion ROM; `None`: there is none.
fn probe_rom(function: &dyn Function) -> Option<u64> {
    write_bar(function, ROM, false, ROM_ADDRESS.into());
    let sticks = read_u32(function, ROM) & ROM_ADDRESS;
    (sticks != 0).then(|| 1 << sticks.trailing_zeros())
}

/// For the guest.
impl Segment {
    /// Reads configuration space. What is not there reads as all ones.
    pub fn config_read(&self, address: ConfigAddress, data: &mut [u8]) {
        data.fill(0xff);
        let Some(slot) = target(address, data.len()) else {
            return;
        };
        let slots = self.slots();
        let Some(Some(function)) = slots.get(usize::from(slot)) else {
            return;
        };
        for (register, part) in parts(address.register, data.len()) {
            function.config_read(register, &mut data[part]);
        }
    }

    /// Writes configuration space and lets BARs answer where it says.
    pub fn config_write(&self, address: ConfigAddress, data: &[u8]) {
        let Some(slot) = target(address, data.len()) else {
            return;
        };
        // Declared first: the function is let go before the lock is.
        let _serialised = self.lock();
        let Some(function) = self.function(slot) else {
            return;
        };
        for (register, part) in parts(address.register, data.len()) {
            for change in function.config_write(register, &data[part]) {
                self.move_bar(slot, &function, change);
            }
        }
    }

    /// Under the `config` lock.
    fn move_bar(&self, slot: u8, function: &Arc<dyn Function>, change: BarChange) {
        let BarChange { bar, size, .. } = change;
        let id = BarId { slot, bar };
        // Where it really answered; the function only knows where it was told to.
        let old = self.release(id);
        let new = change.new.filter(|base| {
            let claimed = match self.low.claim(*base, size, id, function) {
                Err(Refused::Outside) => self.high.claim(*base, size, id, function),
                other => other,
            };
            if let Err(why) = claimed {
                debug!(
                    segment = self.number,
                    slot,
                    bar,
                    base = format_args!("{base:#x}"),
                    %why,
                    "a BAR does not answer where the guest put it"
                );
            }
            claimed.is_ok()
        });
        function.bar_moved(BarChange { old, new, ..change });
    }

    fn release(&self, id: BarId) -> Option<u64> {
        self.low.release(id).or_else(|| self.high.release(id))
    }
}

/// The slot an access is for. `None`: it is not in one function.
fn target(address: ConfigAddress, len: usize) -> Option<u8> {
    let (slot, function) = (address.devfn >> 3, address.devfn & 0b111);
    let end = usize::from(address.register).saturating_add(len);
    let ours = address.bus == 0 && function == 0 && end <= CONFIG_SPACE;
    ours.then_some(slot)
}

/// The accesses of 4, 2 or 1 bytes that one of any length from a register is made of: register, and which bytes.
fn parts(register: u16, len: usize) -> impl Iterator<Item = (u16, Range<usize>)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let size = match len - from {
            0 => return None,
            1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        let part = from..from + size;
        from += size;
        // It ends within configuration space.
        let register = register + u16::try_from(part.start).ok()?;
        Some((register, part))
    })
}

/// Memory-mapped configuration space of a segment.
#[derive(Debug)]
pub struct Ecam {
    segment: Arc<Segment>,
}

impl Ecam {
    /// Into this segment.
    pub fn new(segment: Arc<Segment>) -> Self {
        Self { segment }
    }
}

/// Register in 11:0, function in 14:12, device in 19:15, bus in 27:20.
fn ecam_address(offset: u64) -> ConfigAddress {
    let [low, devfn_low, devfn_high, bus_high, ..] = offset.to_le_bytes();
    ConfigAddress {
        bus: (devfn_high >> 4) | (bus_high << 4),
        devfn: (devfn_low >> 4) | (devfn_high << 4),
        register: u16::from_le_bytes([low, devfn_low & 0xf]),
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.segment.config_read(ecam_address(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.segment.config_write(ecam_address(offset), data);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::testing::{FakeFunction, Told, bar32, bar64, windows};
    use crate::pci::{Bar, Window};

    const LOW: u64 = 0xc000_0000;
    const HIGH: u64 = 256 << 30;

    fn segment() -> Segment {
        Segment::new(windows())
    }

    fn at(slot: u8, register: u16) -> ConfigAddress {
        ConfigAddress {
            bus: 0,
            devfn: slot << 3,
            register,
        }
    }

    fn read(segment: &Segment, slot: u8, register: u16) -> u32 {
        let mut data = [0; 4];
        segment.config_read(at(slot, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(segment: &Segment, slot: u8, register: u16, value: u32) {
        segment.config_write(at(slot, register), &value.to_le_bytes());
    }

    /// What a load at an address of one of the windows reads.
    fn load(segment: &Segment, address: u64) -> u8 {
        for aperture in segment.apertures() {
            let window = aperture.window();
            if window.base() <= address && address < window.end() {
                let mut data = [0xff];
                aperture.read(address - window.base(), &mut data);
                return data[0];
            }
        }
        0xff
    }

    fn moved(bar: u8, size: u64, old: Option<u64>, new: Option<u64>) -> Told {
        Told::Moved(BarChange {
            bar,
            size,
            old,
            new,
        })
    }

    #[test]
    fn there_is_a_host_bridge_and_nothing_else() {
        let segment = segment();
        assert_eq!(read(&segment, 0, 0), 0x0d57_8086);
        assert_eq!(read(&segment, 0, 8), 0x0600_0000);
        assert_eq!(read(&segment, 0, 0x100), 0, "no extended capability");
        write(&segment, 0, 4, !0);
        assert_eq!(read(&segment, 0, 4), 0, "nothing of it can be written");
        assert!(segment.remove(0).is_none());
        let ecam = Ecam::new(Arc::new(segment));
        for elsewhere in [1 << 12, 1 << 15, 1 << 20, 0xff << 20, 0xffe] {
            let mut data = [0xa5; 4];
            ecam.read(elsewhere, &mut data);
            assert_eq!(data, [0xff; 4], "{elsewhere:#x}");
        }
        let mut eight = [0; 8];
        ecam.read(4, &mut eight);
        assert_eq!(eight, [0, 0, 0, 0, 0, 0, 0, 6]);
    }

    #[test]
    fn a_function_gets_addresses_and_answers_when_the_guest_says_so() {
        let segment = segment();
        let function = FakeFunction::new(&[bar32(0, 0x1000), bar64(2, 0x4000), bar32(4, 0x2000)]);
        segment.insert(3, Arc::clone(&function) as _).unwrap();
        assert_eq!(read(&segment, 3, 0), 0x1042_1af4);
        assert_eq!(read(&segment, 3, 0x10), 0xc000_0000);
        assert_eq!(read(&segment, 3, 0x18), 0xc);
        assert_eq!(read(&segment, 3, 0x1c), 64);
        assert_eq!(read(&segment, 3, 0x20), 0xc000_2000);
        assert_eq!(load(&segment, HIGH), 0xff, "decode is off");
        write(&segment, 3, 4, 2);
        assert_eq!(
            function.told(),
            [
                moved(0, 0x1000, None, Some(LOW)),
                moved(2, 0x4000, None, Some(HIGH)),
                moved(4, 0x2000, None, Some(LOW + 0x2000)),
            ]
        );
        let reads = [0, 0x1000, 0x2000, 0x3fff, 0x4000].map(|offset| load(&segment, LOW + offset));
        assert_eq!(reads, [0, 0xff, 4, 4, 0xff]);
        assert_eq!(load(&segment, HIGH + 0x3fff), 2);
        let [low, _] = segment.apertures();
        low.write(0x2ffe, &[1, 2, 3, 4]);
        low.write(0xffe, &[1, 2, 3, 4]);
        let stored = Told::Stored(4, 0xffe, vec![1, 2, 3, 4]);
        assert_eq!(function.told(), [stored], "no access runs over an end");
    }

    #[test]
    fn removing_takes_everything_back() {
        let segment = segment();
        let function = FakeFunction::new(&[bar32(0, 0x1000)]);
        segment.insert(3, Arc::clone(&function) as _).unwrap();
        write(&segment, 3, 4, 2);
        function.told();
        drop(segment.remove(3).unwrap());
        assert_eq!(function.told(), [moved(0, 0x1000, Some(LOW), None)]);
        assert_eq!(Arc::strong_count(&function), 1, "one holder is left");
        assert_eq!(load(&segment, LOW), 0xff);
        assert_eq!(read(&segment, 3, 0), !0);
        write(&segment, 3, 4, 2);
        assert!(segment.remove(3).is_none());
        let next = FakeFunction::new(&[bar32(0, 0x1000)]);
        segment.insert(3, next).unwrap();
        assert_eq!(read(&segment, 3, 0x10), 0xc000_0000);
    }

    #[test]
    fn who_comes_second_to_an_address_does_not_answer() {
        let segment = segment();
        let functions = [1, 2].map(|bar| FakeFunction::new(&[bar32(bar, 0x1000)]));
        for (slot, function) in (1..).zip(&functions) {
            segment.insert(slot, Arc::clone(function) as _).unwrap();
            write(&segment, slot, 4, 2);
        }
        functions[1].told();
        write(&segment, 2, 0x18, 0xc000_0000);
        let (old, here) = (Some(LOW + 0x1000), Some(LOW));
        assert_eq!(functions[1].told(), [moved(2, 0x1000, old, None)]);
        assert_eq!(load(&segment, LOW), 1);
        assert_eq!(load(&segment, LOW + 0x1000), 0xff);
        // When the first goes away nothing happens; when the second is told again, it gets it.
        write(&segment, 1, 0x14, 0xc010_0000);
        assert_eq!(load(&segment, LOW), 0xff);
        write(&segment, 2, 4, 0);
        write(&segment, 2, 4, 2);
        let told = [moved(2, 0x1000, None, None), moved(2, 0x1000, None, here)];
        assert_eq!(functions[1].told(), told);
        assert_eq!(load(&segment, LOW), 2);
    }

    #[test]
    fn outside_of_the_windows_nobody_answers_and_a_wide_bar_may_be_in_either() {
        let segment = segment();
        let function = FakeFunction::new(&[bar64(0, 0x10_0000)]);
        segment.insert(1, Arc::clone(&function) as _).unwrap();
        write(&segment, 1, 4, 2);
        function.told();
        write(&segment, 1, 0x14, 0);
        write(&segment, 1, 0x10, 0xc000_0000);
        write(&segment, 1, 0x10, !0);
        write(&segment, 1, 0x14, !0);
        let size = 0x10_0000;
        assert_eq!(
            function.told(),
            [
                moved(0, size, Some(HIGH), None),
                moved(0, size, None, Some(LOW)),
                moved(0, size, Some(LOW), None),
                moved(0, size, None, None),
            ]
        );
    }

    #[test]
    fn a_full_window_and_a_taken_slot_are_errors_that_leave_nothing() {
        let segment = segment();
        let large = FakeFunction::new(&[bar32(0, 0x1000), bar32(1, 32 << 20)]);
        let error = segment.insert(1, large).unwrap_err();
        assert!(
            matches!(error, InsertError::NoRoom { bar: 1, .. }),
            "{error}"
        );
        assert_eq!(read(&segment, 1, 0), !0);
        segment
            .insert(1, FakeFunction::new(&[bar32(0, 16 << 20)]))
            .unwrap();
        for (slot, words) in [
            (1, "has a function"),
            (0, "has a function"),
            (32, "no slot 32"),
        ] {
            let error = segment.insert(slot, FakeFunction::new(&[])).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        // 64 GiB above 4 GiB are full: the next goes below, where it has to fit.
        segment.remove(1).unwrap();
        segment
            .insert(1, FakeFunction::new(&[bar64(0, 64 << 30)]))
            .unwrap();
        segment
            .insert(2, FakeFunction::new(&[bar64(0, 1 << 20)]))
            .unwrap();
        assert_eq!(read(&segment, 2, 0x10), 0xc000_000c);
    }

    #[test]
    fn nobody_is_put_where_another_answers() {
        let segment = segment();
        segment
            .insert(1, FakeFunction::new(&[bar32(0, 0x1000)]))
            .unwrap();
        write(&segment, 1, 0x10, 0xc000_1000);
        write(&segment, 1, 4, 2);
        for slot in 2..4 {
            segment
                .insert(slot, FakeFunction::new(&[bar32(0, 0x1000)]))
                .unwrap();
        }
        assert_eq!(read(&segment, 2, 0x10), 0xc000_2000);
        assert_eq!(read(&segment, 3, 0x10), 0xc000_3000);
    }

    proptest! {
        /// BARs of 4 KiB to 16 KiB in a window of 64 KiB, thrown about.
        #[test]
        fn at_most_one_bar_answers_and_only_where_it_was_told_to(
            steps in prop::collection::vec((1u8..4, 0u8..8, 0u32..20, any::<bool>()), 0..120)
        ) {
            let small = Window::new(LOW, 0x1_0000).unwrap();
            let segment = Segment::new(SegmentWindows { mmio32: small, ..windows() });
            let bars: [&[Bar]; 3] = [
                &[bar32(0, 0x1000), bar32(1, 0x4000)],
                &[bar32(2, 0x2000)],
                &[bar64(4, 0x4000)],
            ];
            let make = |slot: u8| FakeFunction::new(bars[usize::from(slot) - 1]);
            let mut functions = [1, 2, 3].map(make);
            let mut answering = [[None; 6]; 3];
            for (slot, what, where_to, on) in steps {
                let index = usize::from(slot) - 1;
                match what {
                    0 => {
                        if segment.remove(slot).is_none() {
                            functions[index] = make(slot);
                            let _ = segment.insert(slot, Arc::clone(&functions[index]) as _);
                        }
                    }
                    1 | 2 => write(&segment, slot, 4, if on { 2 } else { 0 }),
                    bar => write(&segment, slot, 0x10 + 4 * u16::from(bar - 3), 0xc000_0000 - 0x2000 + where_to * 0x1000),
                }
                for (function, answering) in functions.iter().zip(&mut answering) {
                    for told in function.told() {
                        if let Told::Moved(change) = told {
                            let now = &mut answering[usize::from(change.bar)];
                            prop_assert_eq!(*now, change.old);
                            *now = change.new;
                        }
                    }
                    for bar in function.space().bars() {
                        if let Some(at) = answering[usize::from(bar.bar)] {
                            prop_assert_eq!(bar.new, Some(at));
                        }
                    }
                }
                for page in (LOW..LOW + 0x1_0000).step_by(0x1000) {
                    let here: Vec<u8> = functions.iter().zip(&answering).flat_map(|(function, answering)| {
                        function.space().bars().into_iter().filter(|bar| {
                            answering[usize::from(bar.bar)].is_some_and(|at| at <= page && page < at + bar.size)
                        }).map(|bar| bar.bar).collect::<Vec<_>>()
                    }).collect();
                    prop_assert!(here.len() <= 1);
                    prop_assert_eq!(load(&segment, page), here.first().copied().unwrap_or(0xff));
                }
            }
        }
    }
}
