use std::sync::Mutex;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::memory::discard::{DiscardTable, Discarded};
use crate::memory::layout::Gpa;
use crate::memory::mapping::{HostMapping, Source};
use crate::memory::ram::Ram;
use crate::memory::region::{Mapping, Region};
use crate::virtio::testing::{Driver, MEMORY, Piece};

const IN: usize = INFLATE as usize;
const OUT: usize = DEFLATE as usize;
const FREE: usize = REPORTING as usize;

/// Notes what is to be discarded: all there is below `MEMORY`.
#[derive(Default)]
struct Noted(Mutex<Vec<(u64, u64)>>);

impl Discard for Noted {
    fn discard(&self, gpa: u64, len: u64) -> Discarded {
        self.0.lock().unwrap().push((gpa, len));
        let inside = gpa.saturating_add(len).min(MEMORY).saturating_sub(gpa);
        Discarded {
            done: inside,
            kept: 0,
            outside: len - inside,
        }
    }
}

fn spec() -> BalloonSpec {
    BalloonSpec {
        id: "balloon".to_owned(),
        size: 0,
        deflate_on_oom: true,
        free_page_reporting: true,
    }
}

fn bench() -> (BalloonDevice, Arc<Noted>) {
    let noted = Arc::<Noted>::default();
    let device = BalloonDevice::new(spec(), Arc::clone(&noted) as Arc<_>).unwrap();
    (device, noted)
}

fn start(device: &BalloonDevice) -> Driver {
    let mut driver = Driver::new(device);
    driver.start(device, device.features()).unwrap();
    driver
}

fn list(pages: impl IntoIterator<Item = u32>) -> Piece {
    Piece::Readable(pages.into_iter().flat_map(u32::to_le_bytes).collect())
}

fn counter(device: &BalloonDevice, name: &str) -> u64 {
    let counters = device.counters();
    counters.iter().find(|(n, _)| *n == name).unwrap().1
}

fn config(device: &BalloonDevice) -> (u32, u32) {
    let mut space = [0; 8];
    device.config_read(0, &mut space);
    let [target, actual] = [0, 4].map(|at| space[at..at + 4].try_into().unwrap());
    (u32::from_le_bytes(target), u32::from_le_bytes(actual))
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn pages_given_up_are_discarded_before_the_driver_is_told() {
    let (device, noted) = bench();
    let mut driver = start(&device);
    let sent = driver.send(IN, &[list([10, 11, 12]), list([20, 19, 5])]);
    assert_eq!(driver.used(IN), (sent.head, 0));
    let pages = |page, pages| (page * PAGE, pages * PAGE);
    assert_eq!(
        *noted.0.lock().unwrap(),
        [pages(10, 3), pages(19, 2), pages(5, 1)]
    );
    assert_eq!(counter(&device, "inflated_bytes"), 6 * PAGE);
    assert_eq!(counter(&device, "discarded_bytes"), 6 * PAGE);
    assert!(driver.interrupts(IN) >= 1);

    let sent = driver.send(OUT, &[list([5, 10])]);
    assert_eq!(driver.used(OUT), (sent.head, 0));
    assert_eq!(counter(&device, "deflated_bytes"), 2 * PAGE);
    assert_eq!(noted.0.lock().unwrap().len(), 3, "nothing to do for these");
}

#[test]
fn what_was_in_the_rings_before_the_first_doorbell_is_served() {
    let (device, _) = bench();
    let mut driver = Driver::new(&device);
    let sent = driver.offer(IN, &[list([1])]);
    driver.start(&device, 0).unwrap();
    assert_eq!(driver.used(IN), (sent.head, 0));
}

#[test]
fn real_memory_is_given_back() {
    let table = DiscardTable::new();
    let mut ram = Ram::new(vec![table.consumer()]);
    let source = Source::Anonymous {
        huge_bytes: None,
        thp: false,
    };
    let mapping = Mapping::Host(HostMapping::new(source, 1 << 20, PAGE).unwrap());
    let region = Region::new("z0", Gpa(0), mapping).map_err(|(_, e)| e);
    ram.attach(region.unwrap()).unwrap();
    let device = BalloonDevice::new(spec(), table).unwrap();
    let mut driver = start(&device);
    driver.send(IN, &[list([0, 1, 255, 256])]);
    driver.used(IN);
    assert_eq!(counter(&device, "discarded_bytes"), 3 * PAGE);
    assert_eq!(counter(&device, "outside_bytes"), PAGE);
    assert_eq!(counter(&device, "kept_bytes"), 0);
}

#[test]
fn free_ranges_are_discarded_when_it_was_agreed() {
    let (device, noted) = bench();
    let mut driver = start(&device);
    let range = Piece::Raw(0x20_0000, 0x20_0000, 2 | 1, 1);
    let sent = driver.send(FREE, &[range, Piece::Raw(0x80_0000, 0x1000, 2, 0)]);
    assert_eq!(driver.used(FREE), (sent.head, 0));
    assert_eq!(
        *noted.0.lock().unwrap(),
        [(0x20_0000, 0x20_0000), (0x80_0000, 0x1000)]
    );
    assert_eq!(counter(&device, "reported_bytes"), 0x20_1000);
    driver.stop();

    // Without the feature, the queue is not served.
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    driver.send(FREE, &[Piece::Writable(4096)]);
    driver.send(IN, &[list([1])]);
    driver.used(IN);
    driver.stop();
    assert!(driver.used_now(FREE).is_none());
}

#[test]
fn features_and_queues_are_as_asked_for() {
    let device = |deflate_on_oom, free_page_reporting| {
        let spec = BalloonSpec {
            deflate_on_oom,
            free_page_reporting,
            ..spec()
        };
        let device = BalloonDevice::new(spec, Arc::<Noted>::default()).unwrap();
        (device.features(), device.queue_sizes().len())
    };
    assert_eq!(device(false, false), (0, 2));
    assert_eq!(device(true, false), (1 << 2, 2));
    assert_eq!(device(false, true), (1 << 5, 3));
}

#[test]
fn a_new_size_is_told_and_the_driver_says_how_far_it_came() {
    let (device, _) = bench();
    device.resize(8 * PAGE).unwrap();
    assert_eq!(config(&device), (8, 0));
    let driver = start(&device);
    assert_eq!(
        driver.said.config_changes.load(Ordering::SeqCst),
        0,
        "the driver looks by itself when it begins"
    );
    device.resize(1 << 20).unwrap();
    assert_eq!(driver.said.config_changes.load(Ordering::SeqCst), 1);
    assert_eq!(device.target_bytes(), 1 << 20);
    device.config_write(4, &0xc8u32.to_le_bytes());
    assert_eq!(config(&device), (256, 0xc8));
    assert_eq!(device.actual_bytes(), 0xc8 * PAGE);
    // In parts, and where nothing is to be written.
    device.config_write(5, &[1]);
    device.config_write(0, &[0xff; 4]);
    device.config_write(8, &[0xff; 4]);
    device.config_write(u64::MAX - 1, &[0xff; 4]);
    assert_eq!(config(&device), (256, 0x1c8));
    device.config_write(2, &[0xff; 4]);
    assert_eq!(config(&device), (256, 0xffff));
    // A driver that begins anew holds nothing.
    drop(driver);
    let _driver = start(&device);
    assert_eq!(config(&device), (256, 0));
}

#[test]
fn sizes_that_no_balloon_has_are_refused() {
    let (device, _) = bench();
    let error = device.resize(4097).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a balloon of 4097 bytes is not whole pages of 4096 bytes; 4096 is the next smaller size"
    );
    let error = device.resize(1 << 44).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a balloon of 17592186044416 bytes is too large: it can hold at most 17592186040320 bytes"
    );
    device.resize(BalloonSizeError::MOST).unwrap();
    assert_eq!(device.target_bytes(), BalloonSizeError::MOST);
    let spec = BalloonSpec { size: 1, ..spec() };
    assert!(BalloonDevice::new(spec, Arc::<Noted>::default()).is_err());
}

#[test]
fn a_missing_queue_is_named() {
    let (device, _) = bench();
    let driver = Driver::new(&device);
    for index in [INFLATE, DEFLATE] {
        let mut activation = driver.activation(device.features());
        activation.queues[usize::from(index)] = None;
        let error = device.activate(activation).map(drop).unwrap_err();
        assert!(matches!(error, ActivateError::MissingQueue { index: i } if i == index));
    }
    // It works without reports.
    let mut activation = driver.activation(device.features());
    activation.queues[FREE] = None;
    assert_eq!(device.activate(activation).unwrap().len(), 1);
}

#[test]
fn bad_chains_are_answered_and_the_next_is_served() {
    let (device, noted) = bench();
    let mut driver = start(&device);
    for (queue, wrong) in [
        (IN, Piece::Raw(MEMORY - 2, 8, 0, 0)),
        (IN, Piece::Readable(vec![1, 2, 3])),
        (IN, Piece::Writable(8)),
        (OUT, Piece::Raw(u64::MAX - 2, 8, 0, 0)),
        (FREE, Piece::Readable(vec![0; 8])),
    ] {
        let sent = driver.send(queue, &[wrong]);
        assert_eq!(driver.used(queue), (sent.head, 0));
    }
    assert_eq!(counter(&device, "bad_chains"), 5);
    assert!(noted.0.lock().unwrap().is_empty());
    // Pages anywhere, and a range that ends behind the last address.
    driver.send(IN, &[list([u32::MAX, 3])]);
    driver.used(IN);
    driver.send(FREE, &[Piece::Raw(u64::MAX - 10, 100, 2, 0)]);
    driver.used(FREE);
    assert_eq!(counter(&device, "outside_bytes"), PAGE + 100);
    assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 0);
}

#[test]
fn a_list_without_end_is_cut_and_counted() {
    let (device, noted) = bench();
    let mut driver = start(&device);
    // One page of numbers, listed by as many descriptors as the ring has.
    let numbers = driver.room(1 << 12);
    driver.send(IN, &[Piece::Raw(numbers, 1 << 12, 1, 0)]);
    driver.used(IN);
    let all = u64::from(QUEUE_SIZE) << 10;
    let taken = counter(&device, "inflated_bytes") / PAGE;
    assert_eq!(taken, 16384);
    assert_eq!(counter(&device, "ignored_pieces"), all - taken);
    assert_eq!(noted.0.lock().unwrap().len(), 16384);
    // More than a share, and still served.
    driver.send(IN, &[list([1])]);
    driver.used(IN);
}

#[test]
fn an_impossible_ring_needs_a_reset_and_then_works_again() {
    let (device, _) = bench();
    let mut driver = start(&device);
    driver.set_available_index(FREE, 1000);
    driver.ring(FREE);
    let said = Arc::clone(&driver.said);
    until("the device wants a reset", || {
        said.resets_needed.load(Ordering::SeqCst) == 1
    });
    driver.ring(FREE);
    driver.ring(IN);
    driver.stop();
    assert_eq!(said.resets_needed.load(Ordering::SeqCst), 1);
    let mut driver = start(&device);
    driver.send(IN, &[list([1])]);
    driver.used(IN);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    /// Whatever descriptors say: the worker lives and its thread ends.
    #[test]
    fn hostile_descriptors_harm_nobody(
        chains in prop::collection::vec(
            (0usize..3, prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()), 1..5)),
            1..20,
        ),
    ) {
        let (device, _) = bench();
        let mut driver = start(&device);
        for (queue, pieces) in chains {
            let pieces: Vec<_> = pieces
                .into_iter()
                .map(|(address, len, flags, next)| {
                    Piece::Raw(address % (2 * MEMORY), len, flags % 8, next % 128)
                })
                .collect();
            driver.send(queue, &pieces);
        }
        driver.stop();
    }
}
