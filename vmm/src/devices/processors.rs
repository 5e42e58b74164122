//! The registers through which a guest's ACPI learns of processors that come and go.
//!
//! They are apart from their owner, as those of PCI slots are ([`crate::pci::Hotplug`]): a vCPU takes their small lock,
//! changes a few bits, posts an event and returns.
//!
//! Each processor:
//! ```text
//!            announce                guest acknowledges the check
//!   Absent ────────────▶ Announced ──────────────────────────────▶ Present
//!     ▲                                                            │     ▲
//!     │                                                    request │     │ keep
//!     │            guest ejects: told of, once                     ▼     │
//!     └─────────────────────────────────────────────────────────── Asked ┘
//! ```
//! `_STA` is live: present while Announced, Present or Asked. It goes with the eject, since Linux asks right after `_EJ0`
//! whether it worked.
//!
//! Invariants:
//! - An event is pending until the guest writes its bit back. The guest does that *before* it acts on it, so what
//!   happens later is seen by that action or by the next.
//! - Only a processor that is asked for can be ejected, and once: the guest decides when, never which. While a check is
//!   pending, an eject can only mean the one that was there before, and is ignored.
//! - The callbacks are called without the lock.
//!
//! Registers are those of [`super::places`]: every 32 processors have a block, and bit m of block n is processor 32 n + m.
//! Source: ACPI 6.5, 8.4.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::places::{
    self, BLOCK, CHECK, EJECT, EJECT_REQUEST, Interrupt, MOST_BLOCKS, PENDING, PRESENT,
};
use crate::bus::BusDevice;

/// Processors of a block.
pub(crate) const BLOCK_PROCESSORS: u8 = 32;
const BLOCKS: usize = 256 / BLOCK_PROCESSORS as usize;

const _: () = assert!(BLOCKS as u64 <= MOST_BLOCKS);

/// Hears that a processor was ejected, on the vCPU thread: posts an event and returns.
pub type OnEjected = Arc<dyn Fn(u8) + Send + Sync>;

/// 32 processors, a bit each.
#[derive(Clone, Copy, Default)]
struct Block {
    present: u32,
    /// Of those present: the guest has not seen them come.
    checks: u32,
    /// Of those present: the guest is to let go of them.
    asked: u32,
    /// Of those asked for: the guest has not seen that they are.
    requests: u32,
}

impl Block {
    fn is_pending(&self) -> bool {
        self.checks | self.requests != 0
    }

    /// Those of `bits` that go.
    fn eject(&mut self, bits: u32) -> u32 {
        let gone = bits & self.present & self.asked & !self.checks;
        self.present &= !gone;
        self.asked &= !gone;
        self.requests &= !gone;
        gone
    }

    fn read(&self, register: u64) -> u32 {
        match register {
            CHECK => self.checks,
            EJECT_REQUEST => self.requests,
            PRESENT => self.present,
            // Nothing to read in EJECT and beyond.
            _ => 0,
        }
    }
}

/// Its block, and its bit there.
fn place(processor: u8) -> (usize, u32) {
    (
        usize::from(processor / BLOCK_PROCESSORS),
        1 << (processor % BLOCK_PROCESSORS),
    )
}

/// Which processors have their bits set in block `number`.
fn of_block(number: usize, bits: u32) -> impl Iterator<Item = u8> {
    (u8::MIN..=u8::MAX).filter(move |processor| {
        let (block, bit) = place(*processor);
        block == number && bits & bit != 0
    })
}

/// The registers; for the MMIO bus, [`places::WINDOW`] bytes.
pub struct Processors {
    blocks: Mutex<[Block; BLOCKS]>,
    on_ejected: OnEjected,
    interrupt: Interrupt,
}

impl fmt::Debug for Processors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Processors")
            .field("present", &self.present())
            .finish_non_exhaustive()
    }
}

/// For the machine's owner.
impl Processors {
    /// The first `count` processors are there.
    pub fn new(count: u8, on_ejected: OnEjected, interrupt: Interrupt) -> Self {
        let mut blocks = [Block::default(); BLOCKS];
        for (block, bit) in (0..count).map(place) {
            blocks[block].present |= bit;
        }
        Self {
            blocks: Mutex::new(blocks),
            on_ejected,
            interrupt,
        }
    }

    /// Those that the guest has, or is told of.
    pub fn present(&self) -> BTreeSet<u8> {
        let blocks = self.lock();
        (0..)
            .zip(blocks.iter())
            .flat_map(|(number, block)| of_block(number, block.present))
            .collect()
    }

    /// Processors have come; they wait for the guest to start them.
    pub fn announce(&self, processors: &[u8]) {
        self.change(processors, |block, bit| {
            *block = Block {
                present: block.present | bit,
                checks: block.checks | bit,
                asked: block.asked & !bit,
                requests: block.requests & !bit,
            };
        });
        (self.interrupt)();
    }

    /// Asks the guest to let go of processors. May be asked again. One that is not there is nothing to ask for.
    pub fn request_eject(&self, processors: &[u8]) {
        self.change(processors, |block, bit| {
            block.asked |= bit & block.present;
            block.requests |= bit & block.present;
        });
        (self.interrupt)();
    }

    /// The guest may keep all that it has: the undo of [`Processors::request_eject`].
    pub fn keep_all(&self) {
        for block in self.lock().iter_mut() {
            (block.asked, block.requests) = (0, 0);
        }
    }

    fn change(&self, processors: &[u8], change: impl Fn(&mut Block, u32)) {
        let mut blocks = self.lock();
        for (block, bit) in processors.iter().copied().map(place) {
            change(&mut blocks[block], bit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, [Block; BLOCKS]> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For the guest.
impl BusDevice for Processors {
    fn read(&self, offset: u64, data: &mut [u8]) {
        places::read(offset, data, || {
            let blocks = self.lock();
            if offset == PENDING {
                return places::pending(blocks.iter().map(Block::is_pending));
            }
            let block = places::block_at(offset).and_then(|number| blocks.get(number));
            block.map_or(0, |block| block.read(offset % BLOCK))
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(bits) = places::written(data) else {
            return;
        };
        let Some(number) = places::block_at(offset) else {
            return;
        };
        let mut blocks = self.lock();
        let Some(block) = blocks.get_mut(number) else {
            return;
        };
        let mut gone = 0;
        match offset % BLOCK {
            CHECK => block.checks &= !bits,
            EJECT_REQUEST => block.requests &= !bits,
            EJECT => gone = block.eject(bits),
            _ => {}
        }
        drop(blocks);
        for processor in of_block(number, gone) {
            (self.on_ejected)(processor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::devices::places::{WINDOW, block};

    struct Board {
        processors: Processors,
        ejected: Arc<Mutex<Vec<u8>>>,
        interrupts: Arc<AtomicUsize>,
    }

    impl Board {
        fn new(count: u8) -> Self {
            let ejected = Arc::<Mutex<Vec<_>>>::default();
            let interrupts = Arc::<AtomicUsize>::default();
            let (events, edges) = (Arc::clone(&ejected), Arc::clone(&interrupts));
            let processors = Processors::new(
                count,
                Arc::new(move |processor| events.lock().unwrap().push(processor)),
                Arc::new(move || {
                    edges.fetch_add(1, Ordering::Relaxed);
                }),
            );
            Self {
                processors,
                ejected,
                interrupts,
            }
        }

        fn read(&self, offset: u64) -> u32 {
            let mut data = [0xff; 4];
            self.processors.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&self, offset: u64, bits: u32) {
            self.processors.write(offset, &bits.to_le_bytes());
        }

        fn ejected(&self) -> Vec<u8> {
            std::mem::take(&mut *self.ejected.lock().unwrap())
        }

        fn interrupts(&self) -> usize {
            self.interrupts.swap(0, Ordering::Relaxed)
        }

        /// What the AML does about an interrupt; then the guest lets go of what it is asked for.
        fn obey(&self) {
            for number in 0..8 {
                if self.read(PENDING) & 1 << number != 0 {
                    let base = block(number);
                    let requests = self.read(base + EJECT_REQUEST);
                    self.write(base + CHECK, self.read(base + CHECK));
                    self.write(base + EJECT_REQUEST, requests);
                    self.write(base + EJECT, requests);
                }
            }
        }
    }

    fn set(processors: impl IntoIterator<Item = u8>) -> BTreeSet<u8> {
        processors.into_iter().collect()
    }

    #[test]
    fn processors_come_and_go() {
        let board = Board::new(1);
        assert_eq!(
            (board.read(block(0) + PRESENT), board.read(PENDING)),
            (1, 0)
        );
        board.processors.announce(&[1, 2, 40]);
        assert_eq!(board.interrupts(), 1);
        assert_eq!(board.read(PENDING), 0b11);
        assert_eq!(board.read(block(0) + CHECK), 0b110);
        assert_eq!(board.read(block(1) + CHECK), 1 << 8);
        board.obey();
        assert_eq!((board.read(PENDING), board.ejected()), (0, vec![]));
        assert_eq!(board.processors.present(), set([0, 1, 2, 40]));

        board.processors.request_eject(&[2, 40, 41]);
        assert_eq!(board.interrupts(), 1);
        assert_eq!(
            board.read(block(1) + EJECT_REQUEST),
            1 << 8,
            "41 is not there"
        );
        board.obey();
        assert_eq!(board.ejected(), [2, 40]);
        assert_eq!(board.read(block(1) + PRESENT), 0, "_STA is live");
        assert_eq!(board.processors.present(), set([0, 1]));
        assert_eq!(board.read(PENDING), 0);
    }

    #[test]
    fn only_what_is_asked_for_goes_and_once() {
        let board = Board::new(3);
        board.write(block(0) + EJECT, !0);
        assert!(board.ejected().is_empty());
        board.processors.request_eject(&[1, 2]);
        board.processors.keep_all();
        assert_eq!(board.read(PENDING), 0);
        board.write(block(0) + EJECT, !0);
        assert!(board.ejected().is_empty(), "the guest may keep them");
        board.processors.request_eject(&[2]);
        board.write(block(0) + EJECT, !0);
        board.write(block(0) + EJECT, !0);
        assert_eq!(board.ejected(), [2]);
        // It is there again, and an eject that comes late is not its own.
        board.processors.announce(&[2]);
        board.processors.request_eject(&[2]);
        board.write(block(0) + EJECT, !0);
        assert!(board.ejected().is_empty());
        board.obey();
        assert_eq!(board.ejected(), [2]);
    }

    #[test]
    fn the_last_processor_has_a_bit_and_nothing_is_beyond() {
        let board = Board::new(254);
        assert_eq!(board.processors.present(), set(0..254));
        assert_eq!(board.read(block(7) + PRESENT), u32::MAX >> 2);
        assert_eq!(board.read(block(8) + PRESENT), 0);
        board.processors.request_eject(&[253]);
        assert_eq!(board.read(PENDING), 1 << 7);
        for (offset, data) in [
            (block(7) + EJECT, &[0xff; 2][..]),
            (block(7) + EJECT, &[0xff; 8]),
            (block(7) + EJECT + 1, &[0xff; 4]),
            (block(8) + EJECT, &[0xff; 4]),
            (PENDING, &[0xff; 4]),
            (WINDOW - 4, &[0xff; 4]),
        ] {
            board.processors.write(offset, data);
            assert!(board.ejected().is_empty());
        }
        let mut byte = [0xff];
        board.processors.read(block(0) + PRESENT, &mut byte);
        assert_eq!(byte, [0xff]);
        board.obey();
        assert_eq!(board.ejected(), [253]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Announce(u8),
        Request(u8),
        KeepAll,
        Obey,
        Write(u64, Vec<u8>),
    }

    fn step() -> impl Strategy<Value = Step> {
        // On both sides of a border between blocks.
        let processor = || 30u8..35;
        let aligned = (0u64..20).prop_map(|register| register * 4);
        let any_write = (0..WINDOW, prop::collection::vec(any::<u8>(), 0..9));
        let word =
            prop_oneof![Just(u32::MAX), any::<u32>()].prop_map(|bits| bits.to_le_bytes().to_vec());
        prop_oneof![
            processor().prop_map(Step::Announce),
            processor().prop_map(Step::Request),
            Just(Step::KeepAll),
            Just(Step::Obey),
            (aligned, word).prop_map(|(offset, data)| Step::Write(offset, data)),
            any_write.prop_map(|(offset, data)| Step::Write(offset, data)),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_written_goes_only_what_was_asked_for(steps in prop::collection::vec(step(), 0..150)) {
            let board = Board::new(31);
            let mut there = set(0..31);
            let mut asked = BTreeSet::new();
            for step in steps {
                let obeys = matches!(step, Step::Obey);
                match step {
                    // The owner announces what is not there.
                    Step::Announce(processor) if there.insert(processor) => board.processors.announce(&[processor]),
                    Step::Announce(_) => {}
                    Step::Request(processor) => {
                        board.processors.request_eject(&[processor]);
                        if there.contains(&processor) {
                            asked.insert(processor);
                        }
                    }
                    Step::KeepAll => {
                        board.processors.keep_all();
                        asked.clear();
                    }
                    Step::Obey => board.obey(),
                    Step::Write(offset, data) => board.processors.write(offset, &data),
                }
                for gone in board.ejected() {
                    prop_assert!(asked.remove(&gone) && there.remove(&gone));
                }
                prop_assert_eq!(&board.processors.present(), &there);
                if obeys {
                    prop_assert_eq!(board.read(PENDING), 0);
                }
                for number in 0..8 {
                    let base = block(number);
                    let (checks, requests) = (board.read(base + CHECK), board.read(base + EJECT_REQUEST));
                    prop_assert_eq!((checks | requests) & !board.read(base + PRESENT), 0);
                    prop_assert_eq!(board.read(PENDING) & 1 << number != 0, checks | requests != 0);
                }
            }
        }
    }
}
