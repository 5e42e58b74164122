//! The device driven as a guest drives it, and as no guest should.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use vm_memory::GuestAddressSpace;

use super::*;
use crate::virtio::testing::{Driver, MEMORY, Piece};

const GPA: Gpa = Gpa(0x1_4000_0000);
const SIZE: u64 = 2 << 30;
const DONE: [u8; 4] = [0, 0, 0, 0];
const FAILED: [u8; 4] = [1, 0, 0, 0];

fn readable(bytes: &[u8]) -> Piece {
    Piece::Readable(bytes.to_vec())
}

fn flush() -> [Piece; 2] {
    [readable(&[0; 4]), Piece::Writable(4)]
}

/// Counts, and fails when told to.
#[derive(Default)]
struct Counting {
    flushes: AtomicUsize,
    fails: AtomicBool,
}

impl Flush for Counting {
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        if self.fails.load(Ordering::SeqCst) {
            Err(io::Error::from_raw_os_error(libc::EIO))
        } else {
            Ok(())
        }
    }
}

fn device() -> (PmemDevice, Arc<Counting>) {
    let flush = Arc::new(Counting::default());
    let device = PmemDevice::new("p0", GPA, SIZE, Arc::clone(&flush) as Arc<_>);
    (device, flush)
}

/// Sends one chain to a device that runs; returns the written length and the bytes of its last buffer.
fn answer(driver: &mut Driver, pieces: &[Piece]) -> (u32, Vec<u8>) {
    let sent = driver.send(0, pieces);
    let (head, len) = driver.used(0);
    assert_eq!(head, sent.head);
    (len, driver.bytes(*sent.buffers.last().unwrap()))
}

fn counter(device: &PmemDevice, name: &str) -> u64 {
    let counters = device.counters();
    counters.iter().find(|it| it.0 == name).unwrap().1
}

#[test]
fn the_driver_is_told_where_the_memory_is() {
    let (device, _) = device();
    assert_eq!(device.kind().id(), 27);
    assert_eq!(device.features(), 0);
    assert_eq!(device.queue_sizes(), [64]);
    let mut number = [0; 8];
    device.config_read(0, &mut number);
    assert_eq!(u64::from_le_bytes(number), GPA.0);
    device.config_read(8, &mut number);
    assert_eq!(u64::from_le_bytes(number), SIZE);
    let mut past = [0; 4];
    for offset in [16, 14, u64::MAX] {
        device.config_read(offset, &mut past);
    }
    device.config_write(0, &[0xff; 16]);
    device.config_read(0, &mut number);
    assert_eq!(u64::from_le_bytes(number), GPA.0);
}

#[test]
fn a_flush_flushes_and_interrupts_once() {
    let (device, counting) = device();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    assert_eq!(answer(&mut driver, &flush()), (4, DONE.to_vec()));
    assert_eq!(counting.flushes.load(Ordering::SeqCst), 1);
    driver.stop();
    assert_eq!(driver.interrupts(0), 1);
    assert_eq!(counter(&device, "requests"), 1);
    assert_eq!(counter(&device, "errors"), 0);
}

#[test]
fn an_error_of_the_host_reaches_the_guest_and_the_next_flush_is_tried() {
    let (device, counting) = device();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    counting.fails.store(true, Ordering::SeqCst);
    assert_eq!(answer(&mut driver, &flush()), (4, FAILED.to_vec()));
    counting.fails.store(false, Ordering::SeqCst);
    assert_eq!(answer(&mut driver, &flush()), (4, DONE.to_vec()));
    assert_eq!(counter(&device, "errors"), 1);
}

/// Lets a test hold a flush of the host.
struct Held {
    begun: SyncSender<()>,
    end: Mutex<Receiver<()>>,
}

impl Flush for Held {
    fn flush(&self) -> io::Result<()> {
        self.begun.send(()).unwrap();
        self.end.lock().unwrap().recv().unwrap();
        Ok(())
    }
}

fn held() -> (PmemDevice, Receiver<()>, SyncSender<()>) {
    let (begun, is_begun) = sync_channel(8);
    let (end, may_end) = sync_channel(8);
    let held = Held {
        begun,
        end: Mutex::new(may_end),
    };
    let device = PmemDevice::new("p0", GPA, SIZE, Arc::new(held));
    (device, is_begun, end)
}

#[test]
fn requests_that_wait_share_one_flush_which_begins_after_them() {
    let (device, begun, end) = held();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    driver.send(0, &flush());
    begun.recv().unwrap();
    // These come while a flush runs that may have missed their stores.
    let late: Vec<_> = (0..3).map(|_| driver.send(0, &flush()).head).collect();
    assert_eq!(driver.used_now(0), None);
    end.send(()).unwrap();
    begun.recv().unwrap();
    driver.used(0);
    assert_eq!(driver.used_now(0), None, "answered by the earlier flush");
    end.send(()).unwrap();
    let answered: Vec<_> = (0..3).map(|_| driver.used(0).0).collect();
    assert_eq!(answered, late, "in order");
    driver.stop();
    assert_eq!(counter(&device, "host_flushes"), 2);
    assert_eq!(counter(&device, "requests"), 4);
}

#[test]
fn guest_memory_is_let_go_of_while_the_host_flushes() {
    let (device, begun, end) = held();
    let mut driver = Driver::new(&device);
    let activation = driver.activation(0);
    let view = activation.memory.clone();
    driver.start(&device, 0).unwrap();
    driver.send(0, &flush());
    begun.recv().unwrap();
    let snapshot = view.memory().into_inner();
    // The view's own, and this one.
    assert_eq!(Arc::strong_count(&snapshot), 2);
    end.send(()).unwrap();
    driver.used(0);
}

#[test]
fn lost_memory_is_answered_with_errors_without_asking_the_host() {
    let (device, counting) = device();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    device.mark_lost();
    assert_eq!(answer(&mut driver, &flush()), (4, FAILED.to_vec()));
    assert_eq!(counting.flushes.load(Ordering::SeqCst), 0);
}

#[test]
fn whoever_finds_out_first_is_believed() {
    let (device, counting) = device();
    let mark = LossMark::new();
    let device = device.with_mark(mark.clone());
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    assert_eq!(answer(&mut driver, &flush()).1, DONE);
    mark.lose();
    assert_eq!(answer(&mut driver, &flush()).1, FAILED);
    assert_eq!(counting.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn memory_lost_during_a_flush_is_an_error() {
    let (device, begun, end) = held();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let sent = driver.send(0, &flush());
    begun.recv().unwrap();
    device.mark_lost();
    end.send(()).unwrap();
    assert_eq!(driver.used(0), (sent.head, 4));
    assert_eq!(driver.bytes(sent.buffers[1]), FAILED);
}

#[test]
fn descriptors_may_be_split_as_the_driver_likes() {
    let (device, counting) = device();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let sent = driver.send(
        0,
        &[
            readable(&[0, 0]),
            readable(&[0]),
            readable(&[0, 0xff, 0xff]),
            Piece::Writable(1),
            Piece::Writable(3),
        ],
    );
    assert_eq!(driver.used(0), (sent.head, 4));
    assert_eq!(driver.bytes(sent.buffers[3]), [0]);
    assert_eq!(driver.bytes(sent.buffers[4]), [0; 3]);
    assert_eq!(counting.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn what_is_not_a_flush_is_an_error_to_the_guest() {
    let (device, counting) = device();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    for pieces in [
        vec![readable(&[1, 0, 0, 0]), Piece::Writable(4)],
        vec![readable(&[0, 0, 0]), Piece::Writable(4)],
        vec![Piece::Writable(4)],
        // The type outside of guest memory, and at the end of it.
        vec![Piece::Raw(MEMORY, 4, 1, 1), Piece::Writable(4)],
    ] {
        driver.stop();
        driver = Driver::new(&device);
        driver.start(&device, 0).unwrap();
        assert_eq!(
            answer(&mut driver, &pieces),
            (4, FAILED.to_vec()),
            "{pieces:?}"
        );
    }
    driver.stop();
    assert_eq!(counting.flushes.load(Ordering::SeqCst), 0);
}

#[test]
fn a_response_that_has_no_room_does_not_hurt() {
    let (device, _) = device();
    for (pieces, written) in [
        (vec![readable(&[0; 4])], 0),
        (vec![readable(&[0; 4]), Piece::Writable(3)], 0),
        (vec![readable(&[0; 4]), Piece::Raw(MEMORY, 4, 2, 0)], 0),
        (vec![readable(&[0; 4]), Piece::Raw(MEMORY - 2, 4, 2, 0)], 2),
        (
            vec![readable(&[0; 4]), Piece::Raw(u64::MAX - 1, 4, 2, 0)],
            0,
        ),
        (vec![Piece::Raw(0, 0, 0, 0)], 0),
    ] {
        let mut driver = Driver::new(&device);
        driver.start(&device, 0).unwrap();
        let sent = driver.send(0, &pieces);
        assert_eq!(driver.used(0), (sent.head, written), "{pieces:?}");
    }
}

#[test]
fn chains_that_loop_or_lead_nowhere_are_given_back() {
    let (device, counting) = device();
    // To itself, to a descriptor that is not there, and an indirect table that is none.
    for bad in [
        Piece::Raw(0x200_0000, 4, 1, 0),
        Piece::Raw(0x200_0000, 4, 1, 60_000),
        Piece::Raw(MEMORY, 32, 4, 0),
        Piece::Raw(0x200_0000, 7, 4, 0),
    ] {
        let mut driver = Driver::new(&device);
        driver.start(&device, 0).unwrap();
        let sent = driver.send(0, &[bad]);
        assert_eq!(driver.used(0), (sent.head, 0));
        assert_eq!(answer(&mut driver, &flush()), (4, DONE.to_vec()));
    }
    assert_eq!(counting.flushes.load(Ordering::SeqCst), 4);
}

#[test]
fn a_ring_that_makes_no_sense_asks_for_a_reset_and_serves_again_after_it() {
    let (device, _) = device();
    let mut driver = Driver::new(&device);
    let mut worker = device.worker(driver.activation(0)).unwrap();
    driver.set_available_index(0, 0x4000);
    assert!(!worker.process_queue());
    assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 1);
    // Said once; nothing is served any more.
    driver.offer(0, &flush());
    assert!(!worker.process_queue());
    assert_eq!(driver.used_now(0), None);
    assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 1);

    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    assert_eq!(answer(&mut driver, &flush()), (4, DONE.to_vec()));
}

#[test]
fn everything_available_is_served_without_threads() {
    let (device, counting) = device();
    let mut driver = Driver::new(&device);
    let mut worker = device.worker(driver.activation(0)).unwrap();
    for _ in 0..20 {
        driver.offer(0, &flush());
    }
    assert!(!worker.process_queue());
    let served = std::iter::from_fn(|| driver.used_now(0)).count();
    assert_eq!(served, 20);
    assert_eq!(counting.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(driver.interrupts(0), 1);
}

#[test]
fn a_missing_queue_is_refused() {
    let (device, _) = device();
    let driver = Driver::new(&device);
    let mut activation = driver.activation(0);
    activation.queues[0] = None;
    let refused = device.activate(activation).err().unwrap();
    assert!(matches!(refused, ActivateError::MissingQueue { index: 0 }));
}

#[test]
fn threads_are_named_after_their_device() {
    assert_eq!(thread_name("p0"), "_pmem_p0");
    assert_eq!(thread_name("_pmem0"), "_pmem0");
    assert_eq!(thread_name("a-very-long-name"), "_pmem_a-very-lo");
    assert_eq!(thread_name("12345678\u{e9}x").len(), 14);
}
