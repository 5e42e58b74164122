//! The registers through which a guest's ACPI learns of devices that come and go, for all segments.
//!
//! They are apart from their owner: a vCPU takes their small lock, changes a few bits, posts an event and returns.
//!
//! Each slot:
//! ```text
//!             announce                   guest acknowledges the check
//!   Empty ─────────────────▶ Announced ──────────────────────────────▶ Present ◀── request_eject: request pending
//!    ▲ │                         │                                      │  │
//!    │ │ set_present             │ withdraw                    withdraw │  │ guest ejects
//!    │ └─────────────────────────┼──────────────────▶ Present           │  │
//!    │                           ▼                                      │  │
//!    │                       Withdrawn: request pending ◀───────────────┘  │
//!    │      guest ejects         │                                         │
//!    ├───────────────────────────┘                                         │
//!    └─────────────── Ejected is posted, once ─────────────────────────────┘
//!   any of them ── clear ──▶ Empty
//! ```
//! `_STA` is live: present while Announced or Present. It goes with the eject, before the owner has done anything, since
//! Linux asks right after `_EJ0` whether it worked.
//!
//! Invariants:
//! - An event is pending until the guest writes its bit back. The guest does that *before* it acts on it, so what
//!   happens later is seen by that action or by the next.
//! - An eject counts once, and only for a device that the guest knows of: while a device is Announced, an eject can only
//!   mean the one that had the slot before, and is ignored. What is posted has the generation, so that an eject which the
//!   owner hears of late can't hit a newcomer.
//! - The callbacks are called without the lock.
//!
//! Registers are those of [`crate::devices::places`]: segment n has block n, and bit m there is slot m. One more is beside
//! PENDING:
//! ```text
//!   0x04  BUTTON         r w1c  bit 0: the power button was pressed
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::layout::MAX_SEGMENTS;
use super::slots::{SLOTS, Slot};
use crate::bus::BusDevice;
use crate::devices::places::{
    self, BLOCK, CHECK, EJECT, EJECT_REQUEST, Interrupt, MOST_BLOCKS, PENDING, PRESENT,
};

/// The register beside PENDING.
pub(crate) const BUTTON: u64 = 0x4;
/// The only button.
pub(crate) const POWER_BUTTON: u32 = 1;

const _: () = assert!(MAX_SEGMENTS as u64 <= MOST_BLOCKS);

/// The guest has let go of a device and ejected it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ejected {
    /// Segment.
    pub segment: u16,
    /// The slot with the generation of the device that the guest knew.
    pub slot: Slot,
}

/// Hears of ejects, on the vCPU thread: posts an event and returns.
pub type OnEjected = Arc<dyn Fn(Ejected) + Send + Sync>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Empty,
    Announced(Slot),
    Present(Slot),
    Withdrawn(Slot),
}

impl State {
    fn occupant(self) -> Option<Slot> {
        match self {
            Self::Empty => None,
            Self::Announced(slot) | Self::Present(slot) | Self::Withdrawn(slot) => Some(slot),
        }
    }
}

#[derive(Debug)]
struct Block {
    slots: [State; SLOTS as usize],
    eject_requests: u32,
}

impl Block {
    const EMPTY: Self = Self {
        slots: [State::Empty; SLOTS as usize],
        eject_requests: 0,
    };

    /// The slots for which this holds.
    fn bitmap(&self, holds: impl Fn(State) -> bool) -> u32 {
        (0..)
            .zip(self.slots)
            .filter(|(_, state)| holds(*state))
            .fold(0, |bits, (number, _): (u32, _)| bits | 1 << number)
    }

    fn checks(&self) -> u32 {
        self.bitmap(|state| matches!(state, State::Announced(_)))
    }

    fn present(&self) -> u32 {
        self.bitmap(|state| matches!(state, State::Announced(_) | State::Present(_)))
    }

    fn read(&self, register: u64) -> u32 {
        match register {
            CHECK => self.checks(),
            EJECT_REQUEST => self.eject_requests,
            PRESENT => self.present(),
            // Nothing to read in EJECT and beyond.
            _ => 0,
        }
    }

    /// The states of the slots whose bits are set.
    fn selected(&mut self, bits: u32) -> impl Iterator<Item = &mut State> {
        let selected = move |(number, _): &(u32, _)| bits & 1 << number != 0;
        (0..)
            .zip(&mut self.slots)
            .filter(selected)
            .map(|(_, state)| state)
    }

    /// The guest has seen these checks.
    fn acknowledge(&mut self, bits: u32) {
        for state in self.selected(bits) {
            if let State::Announced(slot) = *state {
                *state = State::Present(slot);
            }
        }
    }

    fn eject(&mut self, bits: u32) -> Vec<Slot> {
        let mut ejected = Vec::new();
        for state in self.selected(bits) {
            if let State::Present(slot) | State::Withdrawn(slot) = *state {
                *state = State::Empty;
                ejected.push(slot);
            }
        }
        for slot in &ejected {
            self.eject_requests &= !bit(*slot);
        }
        ejected
    }

    /// Puts a slot into a state, with nothing asked of it yet.
    fn set(&mut self, slot: Slot, state: State) {
        self.slots[usize::from(slot.number())] = state;
        self.eject_requests &= !bit(slot);
    }

    fn state_of(&self, slot: Slot) -> State {
        let state = self.slots[usize::from(slot.number())];
        if state.occupant() == Some(slot) {
            state
        } else {
            State::Empty
        }
    }
}

fn bit(slot: Slot) -> u32 {
    1 << slot.number()
}

#[derive(Debug)]
struct Registers {
    blocks: Vec<Block>,
    button: u32,
}

/// The registers; for the MMIO bus, [`places::WINDOW`] bytes.
pub struct Hotplug {
    registers: Mutex<Registers>,
    on_ejected: OnEjected,
    interrupt: Interrupt,
}

impl fmt::Debug for Hotplug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registers = self.lock();
        let blocks = registers.blocks.iter().map(|block| {
            let (present, checks) = (block.present(), block.checks());
            format!(
                "present {present:#010x} checks {checks:#010x} eject requests {:#010x}",
                block.eject_requests
            )
        });
        f.debug_list().entries(blocks).finish()
    }
}

/// For the machine's owner. A segment that does not exist has no slots: nothing happens, and the answer is false.
impl Hotplug {
    /// For `segments` segments, up to [`MAX_SEGMENTS`], all slots empty.
    pub fn new(segments: u16, on_ejected: OnEjected, interrupt: Interrupt) -> Self {
        let blocks = (0..segments.min(MAX_SEGMENTS)).map(|_| Block::EMPTY);
        Self {
            registers: Mutex::new(Registers {
                blocks: blocks.collect(),
                button: 0,
            }),
            on_ejected,
            interrupt,
        }
    }

    /// A device that is there before the guest runs: nothing to tell.
    pub fn set_present(&self, segment: u16, slot: Slot) -> bool {
        self.change(segment, |block| {
            block.set(slot, State::Present(slot));
            true
        })
    }

    /// A device has come; it answers in its slot already.
    pub fn announce(&self, segment: u16, slot: Slot) -> bool {
        let known = self.change(segment, |block| {
            block.set(slot, State::Announced(slot));
            true
        });
        self.interrupt_if(known)
    }

    /// Asks the guest to let go of a device. May be asked again. False: the guest does not have this device.
    pub fn request_eject(&self, segment: u16, slot: Slot) -> bool {
        let asked = self.change(segment, |block| {
            let there = !matches!(block.state_of(slot), State::Empty);
            if there {
                block.eject_requests |= bit(slot);
            }
            there
        });
        self.interrupt_if(asked)
    }

    /// A device has vanished: it is not present any more, and the guest is asked to let go of what it knows of it. Its
    /// slot is the newcomer's when the guest has ejected it, or [`Hotplug::clear`] gave up on that.
    pub fn withdraw(&self, segment: u16, slot: Slot) -> bool {
        let there = self.change(segment, |block| {
            let there = !matches!(block.state_of(slot), State::Empty);
            if there {
                block.set(slot, State::Withdrawn(slot));
                block.eject_requests |= bit(slot);
            }
            there
        });
        self.interrupt_if(there)
    }

    /// Forgets a device: the undo of [`Hotplug::announce`] and [`Hotplug::set_present`] when the guest is not to be waited
    /// for.
    pub fn clear(&self, segment: u16, slot: Slot) -> bool {
        self.change(segment, |block| {
            let there = !matches!(block.state_of(slot), State::Empty);
            if there {
                block.set(slot, State::Empty);
            }
            there
        })
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.lock().button |= POWER_BUTTON;
        self.interrupt_if(true);
    }

    /// Raises the interrupt again if something is pending: an edge that came before the guest had a driver is lost.
    pub fn remind(&self) -> bool {
        let registers = self.lock();
        let pending = registers.pending() != 0 || registers.button != 0;
        drop(registers);
        self.interrupt_if(pending)
    }

    fn change(&self, segment: u16, change: impl FnOnce(&mut Block) -> bool) -> bool {
        let mut registers = self.lock();
        let block = registers.blocks.get_mut(usize::from(segment));
        block.is_some_and(change)
    }

    fn interrupt_if(&self, needed: bool) -> bool {
        if needed {
            (self.interrupt)();
        }
        needed
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn pending(&self) -> u32 {
        let blocks = self.blocks.iter();
        places::pending(blocks.map(|block| block.checks() != 0 || block.eject_requests != 0))
    }

    fn read(&self, offset: u64) -> u32 {
        match offset {
            PENDING => self.pending(),
            BUTTON => self.button,
            _ => places::block_at(offset)
                .and_then(|segment| self.blocks.get(segment))
                .map_or(0, |block| block.read(offset % BLOCK)),
        }
    }
}

/// For the guest.
impl BusDevice for Hotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        places::read(offset, data, || self.lock().read(offset));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(bits) = places::written(data) else {
            return;
        };
        let mut registers = self.lock();
        if offset == BUTTON {
            registers.button &= !bits;
        }
        let segment = places::block_at(offset).and_then(|number| u16::try_from(number).ok());
        let Some(segment) = segment else {
            return;
        };
        let Some(block) = registers.blocks.get_mut(usize::from(segment)) else {
            return;
        };
        let ejected = match offset % BLOCK {
            CHECK => {
                block.acknowledge(bits);
                Vec::new()
            }
            EJECT_REQUEST => {
                block.eject_requests &= !bits;
                Vec::new()
            }
            EJECT => block.eject(bits),
            _ => Vec::new(),
        };
        drop(registers);
        for slot in ejected {
            (self.on_ejected)(Ejected { segment, slot });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::devices::places::block;
    use crate::pci::Slots;

    struct Machine {
        hotplug: Arc<Hotplug>,
        ejected: Arc<Mutex<Vec<Ejected>>>,
        interrupts: Arc<AtomicUsize>,
        slots: Slots,
    }

    impl Machine {
        fn new() -> Self {
            let ejected = Arc::<Mutex<Vec<_>>>::default();
            let interrupts = Arc::<AtomicUsize>::default();
            let on_ejected: OnEjected = {
                let ejected = Arc::clone(&ejected);
                Arc::new(move |event| ejected.lock().unwrap().push(event))
            };
            let interrupt: Interrupt = {
                let interrupts = Arc::clone(&interrupts);
                Arc::new(move || {
                    interrupts.fetch_add(1, Ordering::Relaxed);
                })
            };
            Self {
                hotplug: Arc::new(Hotplug::new(2, on_ejected, interrupt)),
                ejected,
                interrupts,
                slots: Slots::new(1),
            }
        }

        fn slot(&mut self, number: u8) -> Slot {
            self.slots.reserve(Some(number), "device").unwrap()
        }

        fn read(&self, offset: u64) -> u32 {
            let mut data = [0xff; 4];
            self.hotplug.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        /// A register of segment 1.
        fn block(&self, register: u64) -> u32 {
            self.read(block(1) + register)
        }

        fn write(&self, register: u64, bits: u32) {
            self.hotplug.write(block(1) + register, &bits.to_le_bytes());
        }

        fn ejected(&self) -> Vec<Slot> {
            let events = std::mem::take(&mut *self.ejected.lock().unwrap());
            assert!(events.iter().all(|event| event.segment == 1));
            events.into_iter().map(|event| event.slot).collect()
        }

        fn interrupts(&self) -> usize {
            self.interrupts.swap(0, Ordering::Relaxed)
        }
    }

    #[test]
    fn a_device_comes_and_goes() {
        let mut machine = Machine::new();
        let slot = machine.slot(5);
        assert!(machine.hotplug.announce(1, slot));
        assert_eq!(machine.interrupts(), 1);
        assert_eq!(machine.read(PENDING), 0b10);
        assert_eq!((machine.block(CHECK), machine.block(PRESENT)), (32, 32));
        machine.write(EJECT, 32);
        assert_eq!(machine.ejected(), [], "the guest does not know it yet");
        machine.write(CHECK, 32);
        assert_eq!((machine.block(CHECK), machine.block(PRESENT)), (0, 32));
        assert_eq!(machine.read(PENDING), 0);
        assert!(machine.hotplug.request_eject(1, slot));
        assert!(machine.hotplug.request_eject(1, slot), "asked again");
        assert_eq!(machine.interrupts(), 2);
        assert_eq!(machine.block(EJECT_REQUEST), 32);
        machine.write(EJECT_REQUEST, 32);
        assert_eq!(machine.read(PENDING), 0);
        machine.write(EJECT, !0);
        assert_eq!(machine.block(PRESENT), 0, "_STA is live");
        machine.write(EJECT, !0);
        assert_eq!(machine.ejected(), [slot], "once");
        assert!(!machine.hotplug.request_eject(1, slot));
        assert!(!machine.hotplug.withdraw(1, slot));
        assert_eq!(machine.interrupts(), 0);
    }

    #[test]
    fn a_guest_may_eject_on_its_own() {
        let mut machine = Machine::new();
        let slot = machine.slot(1);
        assert!(machine.hotplug.set_present(1, slot));
        assert_eq!(machine.interrupts(), 0);
        assert_eq!((machine.block(CHECK), machine.block(PRESENT)), (0, 2));
        machine.write(EJECT, 2);
        assert_eq!(machine.ejected(), [slot]);
    }

    #[test]
    fn a_device_that_vanished_is_ejected_too_but_no_newcomer() {
        let mut machine = Machine::new();
        let old = machine.slot(1);
        machine.hotplug.set_present(1, old);
        assert!(machine.hotplug.withdraw(1, old));
        assert_eq!(machine.interrupts(), 1);
        assert_eq!(
            (machine.block(PRESENT), machine.block(EJECT_REQUEST)),
            (0, 2)
        );
        machine.write(EJECT, 2);
        assert_eq!(machine.ejected(), [old]);
        assert_eq!(machine.block(EJECT_REQUEST), 0);

        machine.hotplug.set_present(1, old);
        machine.hotplug.withdraw(1, old);
        assert!(machine.hotplug.clear(1, old));
        machine.slots.free(old);
        let newcomer = machine.slot(1);
        machine.hotplug.announce(1, newcomer);
        assert_eq!(machine.block(EJECT_REQUEST), 0);
        machine.write(EJECT, 2);
        assert_eq!(machine.ejected(), [], "that was for the old one");
        for stale in [
            machine.hotplug.request_eject(1, old),
            machine.hotplug.withdraw(1, old),
            machine.hotplug.clear(1, old),
        ] {
            assert!(!stale);
        }
        machine.write(CHECK, 2);
        machine.write(EJECT, 2);
        assert_eq!(machine.ejected(), [newcomer]);
    }

    #[test]
    fn the_power_button_is_pending_until_it_is_seen() {
        let machine = Machine::new();
        assert!(!machine.hotplug.remind());
        machine.hotplug.press_power_button();
        assert_eq!((machine.interrupts(), machine.read(BUTTON)), (1, 1));
        assert!(machine.hotplug.remind());
        assert_eq!(machine.interrupts(), 1);
        machine.hotplug.write(BUTTON, &1u32.to_le_bytes());
        assert_eq!((machine.read(BUTTON), machine.hotplug.remind()), (0, false));
    }

    #[test]
    fn what_does_not_exist_does_nothing() {
        let mut machine = Machine::new();
        let slot = machine.slot(1);
        assert!(!machine.hotplug.announce(2, slot));
        assert_eq!(machine.interrupts(), 0);
        assert_eq!(machine.read(block(2)), 0);
        machine.hotplug.announce(1, slot);
        for (offset, data) in [
            (block(1), &[2u8, 0][..]),
            (block(1), &[2, 0, 0, 0, 0, 0, 0, 0]),
            (block(1) + 1, &[2, 0, 0, 0]),
            (block(2), &[2, 0, 0, 0]),
            (0xffc, &[0xff; 4]),
        ] {
            machine.hotplug.write(offset, data);
            assert_eq!(machine.block(CHECK), 2);
        }
        let mut byte = [0xff];
        machine.hotplug.read(block(1), &mut byte);
        assert_eq!(byte, [0xff]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Come {
            quietly: bool,
        },
        Request,
        Withdraw,
        Clear,
        /// Acts on what it reads: acknowledges, then ejects what it is asked to.
        Scan,
        Write(u64, u32),
    }

    fn step() -> impl Strategy<Value = (u8, Step)> {
        let step = prop_oneof![
            any::<bool>().prop_map(|quietly| Step::Come { quietly }),
            Just(Step::Request),
            Just(Step::Withdraw),
            Just(Step::Clear),
            Just(Step::Scan),
            (0u64..6, 0u32..32).prop_map(|(register, bits)| Step::Write(register * 4, bits)),
        ];
        (1u8..4, step)
    }

    proptest! {
        #[test]
        fn no_event_is_lost_and_no_eject_counts_twice(steps in prop::collection::vec(step(), 0..150)) {
            let mut machine = Machine::new();
            // What the owner thinks is there, and of those, which the guest was told of.
            let mut there: BTreeMap<u8, Slot> = BTreeMap::new();
            let mut told: Vec<Slot> = Vec::new();
            let mut gone: Vec<Slot> = Vec::new();
            let mut unseen: Vec<Slot> = Vec::new();
            for (number, step) in steps {
                let slot = there.get(&number).copied();
                match (step, slot) {
                    (Step::Come { quietly }, None) => {
                        let slot = machine.slot(number);
                        there.insert(number, slot);
                        if quietly {
                            machine.hotplug.set_present(1, slot);
                            told.push(slot);
                        } else {
                            machine.hotplug.announce(1, slot);
                            unseen.push(slot);
                        }
                    }
                    (Step::Request, Some(slot)) => prop_assert!(machine.hotplug.request_eject(1, slot)),
                    (Step::Withdraw, Some(slot)) => {
                        prop_assert!(machine.hotplug.withdraw(1, slot));
                        unseen.retain(|other| *other != slot);
                        told.push(slot);
                    }
                    (Step::Clear, Some(slot)) => {
                        prop_assert!(machine.hotplug.clear(1, slot));
                        machine.slots.free(slot);
                        unseen.retain(|other| *other != slot);
                        there.remove(&number);
                        gone.push(slot);
                    }
                    (Step::Scan, _) => {
                        let checks = machine.block(CHECK);
                        machine.write(CHECK, checks);
                        let requests = machine.block(EJECT_REQUEST);
                        machine.write(EJECT_REQUEST, requests);
                        // Every device that came was seen.
                        for slot in unseen.drain(..) {
                            prop_assert_ne!(checks & bit(slot), 0);
                            told.push(slot);
                        }
                        machine.write(EJECT, requests);
                        prop_assert_eq!(machine.read(PENDING), 0);
                    }
                    (Step::Write(register, bits), _) => {
                        machine.write(register, bits << 1);
                        if register == CHECK {
                            let (seen, rest) = unseen.iter().partition(|slot| bits << 1 & bit(**slot) != 0);
                            unseen = rest;
                            let seen: Vec<Slot> = seen;
                            told.extend(seen);
                        }
                    }
                    _ => {}
                }
                for slot in machine.ejected() {
                    prop_assert!(told.contains(&slot) && !gone.contains(&slot));
                    prop_assert_eq!(there.remove(&slot.number()), Some(slot));
                    prop_assert!(machine.slots.free(slot));
                    gone.push(slot);
                }
                for slot in &gone {
                    prop_assert!(!machine.hotplug.request_eject(1, *slot));
                }
                let pending = unseen.iter().fold(0, |bits, slot| bits | bit(*slot));
                prop_assert_eq!(machine.block(CHECK), pending);
                let known = there.values().fold(0, |bits, slot| bits | bit(*slot));
                prop_assert_eq!(machine.block(PRESENT) & !known, 0);
                prop_assert_eq!(machine.block(EJECT_REQUEST) & !known, 0);
            }
        }
    }
}
