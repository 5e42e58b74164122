use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;
use crate::virtio::testing::{Driver, MEMORY, Piece};

fn open(path: impl AsRef<Path>) -> Result<RngDevice, OpenRngError> {
    RngDevice::open(RngSpec {
        id: "rng".to_owned(),
        src: path.as_ref().to_owned(),
    })
}

fn counter(device: &RngDevice, name: &str) -> u64 {
    let counters = device.counters();
    counters.iter().find(|(n, _)| *n == name).unwrap().1
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

fn fifo(dir: &tempfile::TempDir) -> std::path::PathBuf {
    let path = dir.path().join("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    path
}

#[test]
fn buffers_of_any_shape_are_filled() {
    let device = open("/dev/urandom").unwrap();
    let mut driver = Driver::new(&device);
    let early = driver.offer(0, &[Piece::Writable(64)]);
    driver.start(&device, 0).unwrap();
    assert_eq!(driver.used(0), (early.head, 64));
    let sent = driver.send(0, &[Piece::Writable(32), Piece::Writable(4096)]);
    assert_eq!(driver.used(0), (sent.head, 4128));
    for buffer in sent.buffers {
        assert!(driver.bytes(buffer).iter().any(|byte| *byte != 0));
    }
    assert!(driver.interrupts(0) >= 1);
    assert_eq!(counter(&device, "bytes"), 64 + 4128);
}

#[test]
fn one_chain_gets_a_bounded_amount() {
    let device = open("/dev/urandom").unwrap();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let sent = driver.send(0, &[Piece::Writable(1 << 20)]);
    assert_eq!(driver.used(0), (sent.head, 64 << 10));
}

#[test]
fn more_chains_than_a_share_are_all_served() {
    let device = open("/dev/urandom").unwrap();
    let mut driver = Driver::new(&device);
    let sent: Vec<_> = (0..QUEUE_SIZE)
        .map(|_| driver.offer(0, &[Piece::Writable(8)]).head)
        .collect();
    driver.start(&device, 0).unwrap();
    let used: Vec<_> = sent.iter().map(|_| driver.used(0).0).collect();
    assert_eq!(used, sent);
}

#[test]
fn a_slow_source_is_waited_for_and_writers_may_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir);
    let device = open(&path).unwrap();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    for round in ["first", "second", "third"] {
        let sent = driver.send(0, &[Piece::Writable(64)]);
        let mut writer = File::options().write(true).open(&path).unwrap();
        writer.write_all(round.as_bytes()).unwrap();
        let len = u32::try_from(round.len()).unwrap();
        assert_eq!(driver.used(0), (sent.head, len));
        let bytes = driver.bytes(sent.buffers[0]);
        assert_eq!(&bytes[..round.len()], round.as_bytes());
    }
}

#[test]
fn stop_does_not_wait_for_a_slow_source() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir);
    let device = open(&path).unwrap();
    // With a writer that says nothing, and with none.
    let _silent = File::options().read(true).write(true).open(&path).unwrap();
    for _ in 0..2 {
        let mut driver = Driver::new(&device);
        driver.start(&device, 0).unwrap();
        driver.send(0, &[Piece::Writable(64)]);
        driver.stop();
        assert!(driver.used_now(0).is_none());
    }
}

#[test]
fn a_source_that_ends_gives_nothing_made_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("seed");
    fs::write(&path, b"four").unwrap();
    let device = open(&path).unwrap();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let sent = driver.send(0, &[Piece::Writable(64)]);
    assert_eq!(driver.used(0), (sent.head, 4));
    driver.send(0, &[Piece::Writable(64)]);
    // A bad chain behind it is not reached: the one before it keeps its place.
    driver.send(0, &[Piece::Writable(0)]);
    driver.stop();
    assert!(driver.used_now(0).is_none());
    // It has more, and the driver asks again.
    let mut more = File::options().append(true).open(&path).unwrap();
    more.write_all(b"and more").unwrap();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let again = driver.send(0, &[Piece::Writable(64)]);
    assert_eq!(driver.used(0), (again.head, 8));
}

#[test]
fn a_source_that_fails_is_asked_again_and_can_be_stopped() {
    // Reading address 0 of a process is EIO, and this file can't be waited on.
    let device = open("/proc/self/mem").unwrap();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    driver.send(0, &[Piece::Writable(64)]);
    until("a second try", || counter(&device, "source_errors") >= 2);
    driver.stop();
    assert!(driver.used_now(0).is_none());
}

#[test]
fn wrong_sources_are_refused_with_words_that_help() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no/such");
    let error = open(&missing).unwrap_err();
    assert!(matches!(error, OpenRngError::Missing { .. }));
    let words = error.to_string();
    assert!(words.contains(missing.to_str().unwrap()) && words.contains("src=/dev/urandom"));

    let error = open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("is a directory"), "{error}");

    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = open(&socket).unwrap_err();
    assert!(error.to_string().contains("a socket"), "{error}");

    let file = dir.path().join("file");
    fs::write(&file, b"x").unwrap();
    let error = open(file.join("below")).unwrap_err();
    assert!(matches!(error, OpenRngError::Open { .. }), "{error}");

    // Root may read everything.
    if !rustix::process::geteuid().is_root() {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o200)).unwrap();
        let error = open(&file).unwrap_err();
        assert!(matches!(error, OpenRngError::Forbidden { .. }), "{error}");
    }
}

#[test]
fn a_missing_queue_is_named() {
    let device = open("/dev/urandom").unwrap();
    let driver = Driver::new(&device);
    let mut activation = driver.activation(0);
    activation.queues[0] = None;
    let error = device.activate(activation).map(drop).unwrap_err();
    assert!(matches!(error, ActivateError::MissingQueue { index: 0 }));
}

#[test]
fn bad_chains_come_back_empty_and_the_next_is_served() {
    let device = open("/dev/urandom").unwrap();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    for wrong in [
        Piece::Raw(MEMORY - 4, 64, 2, 0),
        Piece::Raw(u64::MAX - 8, 64, 2, 0),
        Piece::Readable(b"what is this".to_vec()),
        Piece::Writable(0),
    ] {
        let sent = driver.send(0, &[wrong]);
        assert_eq!(driver.used(0), (sent.head, 0));
    }
    let sent = driver.send(0, &[Piece::Writable(8)]);
    assert_eq!(driver.used(0), (sent.head, 8));
    assert_eq!(counter(&device, "bad_chains"), 4);
}

#[test]
fn an_impossible_ring_needs_a_reset_and_then_works_again() {
    let device = open("/dev/urandom").unwrap();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    driver.set_available_index(0, 30_000);
    driver.ring(0);
    let said = Arc::clone(&driver.said);
    until("the device wants a reset", || {
        said.resets_needed.load(Ordering::SeqCst) == 1
    });
    driver.ring(0);
    driver.stop();
    assert_eq!(said.resets_needed.load(Ordering::SeqCst), 1);
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    driver.send(0, &[Piece::Writable(8)]);
    assert_eq!(driver.used(0).1, 8);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    /// Whatever descriptors say: the worker lives and its thread ends.
    #[test]
    fn hostile_descriptors_harm_nobody(
        chains in prop::collection::vec(
            prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()), 1..5), 1..20,
        ),
    ) {
        let device = open("/dev/urandom").unwrap();
        let mut driver = Driver::new(&device);
        driver.start(&device, 0).unwrap();
        for pieces in chains {
            let pieces: Vec<_> = pieces
                .into_iter()
                .map(|(address, len, flags, next)| {
                    Piece::Raw(address % (2 * MEMORY), len, flags % 8, next % 64)
                })
                .collect();
            driver.send(0, &pieces);
        }
        driver.stop();
    }
}
