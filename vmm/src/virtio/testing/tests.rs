//! What the queues and the threads that serve them keep to, whatever the driver does.

use std::collections::BTreeSet;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use proptest::prelude::*;

use super::*;
use crate::virtio::device::Kind;
use crate::virtio::queue::QueueError;

/// Gives every chain back, with the length of its head descriptor, as a device is to do it.
struct Echo;

struct EchoWorker {
    queue: Queue,
    memory: GuestView,
    signals: Arc<dyn Signals>,
    share: usize,
    broken: bool,
}

impl Device for Echo {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }

    fn activate(&self, mut activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        Ok(vec![Box::new(EchoWorker {
            queue: activation.queues.remove(0).unwrap(),
            memory: activation.memory,
            signals: activation.signals,
            share: 3,
            broken: false,
        })])
    }
}

impl EchoWorker {
    fn serve(&mut self) -> Result<(), QueueError> {
        let memory = self.memory.memory();
        self.queue.disable_kick(&*memory)?;
        for _ in 0..self.share {
            if let Some(mut chain) = self.queue.pop(memory.clone())? {
                let head = chain.head_index();
                let len = chain.next().map_or(0, |descriptor| descriptor.len());
                self.queue.push(&*memory, head, len)?;
                self.queue.notify(&*memory)?;
            } else if !self.queue.enable_kick(&*memory)? {
                return Ok(());
            }
        }
        self.queue.kick_again();
        Ok(())
    }
}

impl MutEventSubscriber for EchoWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new_raw(self.queue.kick_fd(), EventSet::IN))
            .unwrap();
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.queue.acknowledge_kick();
        if self.broken {
            return;
        }
        if let Err(error) = self.serve() {
            self.broken = true;
            self.signals.needs_reset(&error);
        }
    }
}

impl Worker for EchoWorker {
    fn name(&self) -> String {
        "_echo".to_owned()
    }
}

/// A queue without a device.
fn queue(driver: &Driver, features: u64) -> Queue {
    driver.activation(features).queues.remove(0).unwrap()
}

#[test]
fn no_doorbell_and_no_interrupt_is_lost_over_the_index_wrap() {
    let mut driver = Driver::new(&Echo);
    driver.start(&Echo, EVENT_IDX).unwrap();
    let place = driver.room(64);
    let mut rings = 0;
    for n in 0..70_000u32 {
        let sent = driver.offer(0, &[Piece::Raw(place, n, 0, 0)]);
        rings += u32::from(driver.ring_if_asked(0));
        // Up to as many in flight as the ring has room for.
        if n % 16 == 15 {
            for _ in 0..15 {
                driver.used(0);
            }
            assert_eq!(driver.used(0), (sent.head, n));
        }
    }
    // How many is up to how soon the worker sleeps: what it finds before that needs none.
    assert!(rings > 0);
    assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 0);
}

#[test]
fn without_the_event_index_every_chain_comes_back_too() {
    let mut driver = Driver::new(&Echo);
    driver.start(&Echo, 0).unwrap();
    for n in 0..1000 {
        let sent = driver.send(0, &[Piece::Raw(0, n, 0, 0)]);
        assert_eq!(driver.used(0), (sent.head, n));
        assert!(driver.interrupts(0) <= 2);
    }
}

#[test]
fn the_event_index_keeps_interrupts_away_that_nobody_asked_for() {
    let mut driver = Driver::new(&Echo);
    let mut queue = queue(&driver, EVENT_IDX);
    let memory = driver.memory().clone();
    // The driver asks at its first entry only, which is where the field starts.
    for expected in [1, 0, 0] {
        driver.offer(0, &[Piece::Writable(8)]);
        let head = queue.pop(&memory).unwrap().unwrap().head_index();
        queue.push(&memory, head, 0).unwrap();
        queue.notify(&memory).unwrap();
        assert_eq!(driver.interrupts(0), expected);
    }
}

#[test]
fn a_chain_put_back_is_the_next_one_also_at_the_wrap() {
    let mut driver = Driver::new(&Echo);
    let mut queue = queue(&driver, 0);
    let memory = driver.memory().clone();
    assert!(queue.pop(&memory).unwrap().is_none());
    for _ in 0..=u32::from(u16::MAX) + 2 {
        let sent = driver.offer(0, &[Piece::Raw(0, 1, 0, 0)]);
        for _ in 0..2 {
            let head = queue.pop(&memory).unwrap().unwrap().head_index();
            assert_eq!(head, sent.head);
            assert!(queue.pop(&memory).unwrap().is_none());
            queue.unpop();
        }
        // What is put back is still available.
        assert!(queue.enable_kick(&memory).unwrap());
        let head = queue.pop(&memory).unwrap().unwrap().head_index();
        assert!(!queue.enable_kick(&memory).unwrap());
        queue.push(&memory, head, 0).unwrap();
        driver.used_now(0).unwrap();
    }
}

#[test]
fn a_ring_that_can_not_be_read_is_an_error_and_not_an_empty_one() {
    // The index of the available ring is the last thing in memory, its entries are behind the end.
    let mut rings = virtio_queue::Queue::new(16).unwrap();
    rings
        .try_set_avail_ring_address(GuestAddress(MEMORY - 4))
        .unwrap();
    rings.set_ready(true);
    let driver = Driver::new(&Echo);
    let memory = driver.memory().clone();
    memory.write_obj(1u16, GuestAddress(MEMORY - 2)).unwrap();
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupt = Arc::clone(&driver.rings[0].interrupt) as Arc<_>;
    let mut queue = Queue::new(5, rings, kick, interrupt);
    let error = queue.pop(&memory).map(drop).unwrap_err();
    assert_eq!(error.index, 5);
    assert!(error.to_string().starts_with("queue 5: "), "{error}");
}

#[test]
fn an_index_that_no_driver_can_have_is_an_error() {
    let driver = Driver::new(&Echo);
    let mut queue = queue(&driver, 0);
    let memory = driver.memory().clone();
    driver.set_available_index(0, 17);
    assert!(queue.pop(&memory).is_err());
    driver.set_available_index(0, u16::MAX);
    assert!(queue.pop(&memory).is_err());
    // A head that is no descriptor has no pieces and can't be given back.
    driver.set_available_index(0, 1);
    memory
        .write_obj(16u16, GuestAddress(QUEUES + 0x8000 + 4))
        .unwrap();
    let mut chain = queue.pop(&memory).unwrap().unwrap();
    assert!(chain.next().is_none());
    assert!(queue.push(&memory, chain.head_index(), 0).is_err());
}

#[test]
fn a_device_without_threads_does_everything_in_its_turn() {
    let mut driver = Driver::new(&Echo);
    driver.start_here(&Echo, 0).unwrap();
    let sent: BTreeSet<_> = (0..10)
        .map(|n| driver.send(0, &[Piece::Raw(0, n, 0, 0)]).head)
        .collect();
    assert!(driver.used_now(0).is_none());
    // A share and no more: others have their turn too.
    driver.turn(1);
    let mut used = BTreeSet::new();
    while let Some((head, _)) = driver.used_now(0) {
        used.insert(head);
    }
    assert_eq!(used.len(), 3);
    driver.turn(100);
    while let Some((head, _)) = driver.used_now(0) {
        used.insert(head);
    }
    assert_eq!(used, sent);
    driver.stop();
}

proptest! {
    /// Whatever a driver writes as index, heads and descriptors: an error or chains of bounded length, never a panic
    /// and never a queue that is served for ever.
    #[test]
    fn hostile_rings_end(
        index in any::<u16>(),
        heads in prop::collection::vec(any::<u16>(), 16),
        descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), 0u16..20), 16),
        event_index in any::<bool>(),
    ) {
        let driver = Driver::new(&Echo);
        let memory = driver.memory().clone();
        let mut queue = queue(&driver, if event_index { EVENT_IDX } else { 0 });
        for (at, (address, len, flags, next)) in (0u64..).zip(descriptors) {
            let place = QUEUES + at * 16;
            // Sometimes a table of descriptors, here of all places.
            let address = if flags & 4 != 0 { QUEUES + address % 256 } else { address };
            memory.write_obj(address, GuestAddress(place)).unwrap();
            memory.write_obj(len % 512, GuestAddress(place + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(place + 12)).unwrap();
            memory.write_obj(next, GuestAddress(place + 14)).unwrap();
        }
        for (at, head) in (0u64..).zip(heads) {
            memory.write_obj(head % 20, GuestAddress(QUEUES + 0x8004 + at * 2)).unwrap();
        }
        driver.set_available_index(0, index);
        let mut chains = 0;
        while let Ok(Some(chain)) = queue.pop(&memory) {
            let head = chain.head_index();
            prop_assert!(chain.count() <= 32);
            let _ = queue.push(&memory, head, 1);
            let _ = queue.notify(&memory);
            chains += 1;
            prop_assert!(chains <= 16);
        }
    }
}
