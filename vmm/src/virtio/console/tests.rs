use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::termios::{Winsize, tcsetwinsize};

use super::*;
use crate::config::ConsoleConfig;
use crate::devices::console::{ConsoleInput, ConsoleOutput};
use crate::virtio::testing::{Driver, MEMORY, Piece};

const RX: usize = RECEIVE as usize;
const TX: usize = TRANSMIT as usize;

fn bytes(text: &str) -> Piece {
    Piece::Readable(text.as_bytes().to_vec())
}

/// Waits for what another thread does, without a time of its own.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

struct SocketBench {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    device: ConsoleDevice,
}

fn on_socket() -> SocketBench {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hvc0");
    let console = Console::open(&ConsoleConfig::Socket(path.clone())).unwrap();
    SocketBench {
        _dir: dir,
        path,
        device: ConsoleDevice::new("console0", console),
    }
}

impl SocketBench {
    /// A client whom the guest knows: what it sends has arrived.
    fn client(&self, driver: &mut Driver) -> UnixStream {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.write_all(b"!").unwrap();
        let buffer = driver.send(RX, &[Piece::Writable(8)]);
        assert_eq!(driver.used(RX), (buffer.head, 1));
        client
    }
}

fn on_file(output: impl Into<OwnedFd>) -> ConsoleDevice {
    let output = ConsoleOutput::File(File::from(output.into()));
    let input = ConsoleInput::None;
    ConsoleDevice::new("console0", Console { output, input })
}

fn counter(device: &ConsoleDevice, name: &str) -> u64 {
    let counters = device.counters();
    counters.iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn output_of_any_shape_reaches_the_host_in_order() {
    let (mut read, write) = std::io::pipe().unwrap();
    let device = on_file(write);
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let sent = driver.send(TX, &[bytes("Hello, "), bytes(""), bytes("world\n")]);
    assert_eq!(driver.used(TX), (sent.head, 0));
    let mut heard = [0; 13];
    read.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"Hello, world\n");
    // Larger than one piece of work, and than what a pipe holds.
    let page: Vec<u8> = (0..=255).cycle().take(600_000).collect();
    driver.send(TX, &[Piece::Readable(page.clone()), bytes("end")]);
    let mut heard = vec![0; page.len()];
    read.read_exact(&mut heard).unwrap();
    assert!(heard == page);
    driver.used(TX);
    assert!(driver.interrupts(TX) >= 1);
    assert_eq!(counter(&device, "output_bytes"), 13 + page.len() as u64 + 3);
    assert_eq!(counter(&device, "lost_bytes"), 0);
}

#[test]
fn what_was_in_the_rings_before_the_first_doorbell_is_served() {
    let bench = on_socket();
    let mut driver = Driver::new(&bench.device);
    let rx = driver.offer(RX, &[Piece::Writable(8)]);
    let tx = driver.offer(TX, &[bytes("x")]);
    driver.start(&bench.device, 0).unwrap();
    assert_eq!(driver.used(TX), (tx.head, 0));
    let mut client = UnixStream::connect(&bench.path).unwrap();
    client.write_all(b"ok").unwrap();
    assert_eq!(driver.used(RX), (rx.head, 2));
    assert_eq!(&driver.bytes(rx.buffers[0])[..2], b"ok");
}

#[test]
fn input_waits_for_buffers_and_fills_what_it_gets() {
    let bench = on_socket();
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    let mut client = bench.client(&mut driver);
    client.write_all(b"abcdefghij").unwrap();
    // In one chain of two pieces, then in one of its own.
    let first = driver.send(RX, &[Piece::Writable(3), Piece::Writable(4)]);
    assert_eq!(driver.used(RX), (first.head, 7));
    assert_eq!(driver.bytes(first.buffers[0]), b"abc");
    assert_eq!(driver.bytes(first.buffers[1]), b"defg");
    let second = driver.send(RX, &[Piece::Writable(64)]);
    assert_eq!(driver.used(RX), (second.head, 3));
    assert_eq!(&driver.bytes(second.buffers[0])[..3], b"hij");
    assert_eq!(counter(&bench.device, "input_bytes"), 11);
}

#[test]
fn clients_come_and_go_and_come_again() {
    let bench = on_socket();
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    for round in 0..3 {
        let mut client = bench.client(&mut driver);
        let sent = driver.send(TX, &[bytes("hello")]);
        assert_eq!(driver.used(TX), (sent.head, 0));
        let mut heard = [0; 5];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello", "round {round}");
        drop(client);
        // Nobody is there, or somebody who has left: the guest does not wait for that.
        driver.send(TX, &[bytes("lost")]);
        driver.used(TX);
    }
}

#[test]
fn one_who_left_while_there_were_no_buffers_makes_room() {
    let bench = on_socket();
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    let mut first = bench.client(&mut driver);
    first.write_all(b"never read").unwrap();
    drop(first);
    let mut second = UnixStream::connect(&bench.path).unwrap();
    // Output reaches the second one without the driver having given a single buffer for input.
    second.set_nonblocking(true).unwrap();
    let mut heard = [0; 64];
    until("the second client hears something", || {
        driver.send(TX, &[bytes("x")]);
        driver.used(TX);
        matches!(second.read(&mut heard), Ok(n) if n > 0)
    });
}

#[test]
fn last_words_are_read_when_buffers_come() {
    let bench = on_socket();
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    let mut client = bench.client(&mut driver);
    client.write_all(b"halt\n").unwrap();
    drop(client);
    // The worker may have seen by now that it left, and what it said must not be lost by that.
    driver.send(TX, &[bytes("x")]);
    driver.used(TX);
    let buffer = driver.send(RX, &[Piece::Writable(16)]);
    assert_eq!(driver.used(RX), (buffer.head, 5));
    assert_eq!(&driver.bytes(buffer.buffers[0])[..5], b"halt\n");
}

#[test]
fn the_host_side_outlives_a_reset_and_a_machine() {
    let bench = on_socket();
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    let mut client = bench.client(&mut driver);
    assert!(bench.device.take().is_none(), "a worker has it");
    driver.stop();

    // The device is reset: the same client, a new driver.
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    client.write_all(b"still here").unwrap();
    driver.send(RX, &[Piece::Writable(64)]);
    assert_eq!(driver.used(RX).1, 10);
    driver.stop();

    // The machine is built again: the same client, another device.
    let device = ConsoleDevice::new("console0", bench.device.take().unwrap());
    assert!(bench.device.take().is_none(), "it was taken");
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    driver.send(TX, &[bytes("again")]);
    driver.used(TX);
    let mut heard = [0; 5];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"again");
}

#[test]
fn a_device_without_its_console_does_not_start() {
    let device = ConsoleDevice::new("console0", Console::nowhere());
    let taken = device.take();
    assert!(taken.is_some());
    let mut driver = Driver::new(&device);
    let error = driver.start(&device, 0).unwrap_err();
    assert!(
        error.to_string().contains("still with an earlier worker"),
        "{error}"
    );
}

#[test]
fn a_missing_queue_is_named_and_the_console_stays() {
    let device = ConsoleDevice::new("console0", Console::nowhere());
    let driver = Driver::new(&device);
    for index in [RECEIVE, TRANSMIT] {
        let mut activation = driver.activation(0);
        activation.queues[usize::from(index)] = None;
        let error = device.activate(activation).map(drop).unwrap_err();
        assert!(matches!(error, ActivateError::MissingQueue { index: i } if i == index));
    }
    let mut activation = driver.activation(0);
    activation.queues.clear();
    assert!(device.activate(activation).is_err());
    assert!(device.take().is_some());
}

#[test]
fn a_stopped_reader_holds_the_guest_for_a_while_and_not_for_ever() {
    let (mut read, write) = std::io::pipe().unwrap();
    let device = on_file(write);
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    // More than a pipe holds, and nobody reads.
    let page = vec![b'x'; 1 << 20];
    let sent = driver.send(TX, &[Piece::Readable(page.clone())]);
    assert_eq!(driver.used(TX), (sent.head, 0));
    let (taken, lost) = (
        counter(&device, "output_bytes"),
        counter(&device, "lost_bytes"),
    );
    assert!(taken > 0 && lost > 0);
    assert_eq!(taken + lost, page.len() as u64);
    // While it is so, the guest is not held again.
    driver.send(TX, &[bytes("lost too")]);
    driver.used(TX);
    assert_eq!(counter(&device, "lost_bytes"), lost + 8);
    // Read again, it flows again.
    let mut heard = vec![0; usize::try_from(taken).unwrap()];
    read.read_exact(&mut heard).unwrap();
    until("output flows again", || {
        let before = counter(&device, "output_bytes");
        driver.send(TX, &[bytes("x")]);
        driver.used(TX);
        counter(&device, "output_bytes") > before
    });
}

#[test]
fn stop_does_not_wait_for_a_stopped_reader() {
    let (_read, write) = std::io::pipe().unwrap();
    let device = on_file(write);
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    driver.send(TX, &[Piece::Readable(vec![b'x'; 1 << 20])]);
    until("the pipe fills", || counter(&device, "output_bytes") > 0);
    driver.stop();
    assert!(driver.used_now(TX).is_none());
    assert!(device.take().is_some());
}

#[test]
fn a_reader_that_is_gone_is_no_error() {
    let (read, write) = std::io::pipe().unwrap();
    drop(read);
    let device = on_file(write);
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let sent = driver.send(TX, &[bytes("into the void")]);
    assert_eq!(driver.used(TX), (sent.head, 0));
}

#[test]
fn the_size_is_the_terminals() {
    let console = Console::open(&ConsoleConfig::Pty).unwrap();
    let name = console.input.pty_name().unwrap().to_owned();
    let device = ConsoleDevice::new("console0", console);
    assert_eq!(device.features(), 1 << F_SIZE);
    let user = File::options().read(true).write(true).open(name).unwrap();
    let size = Winsize {
        ws_col: 132,
        ws_row: 50,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&user, size).unwrap();
    let mut space = [0xff; 16];
    device.config_read(0, &mut space);
    assert_eq!(&space[..4], [132, 0, 50, 0]);
    let mut rows = [0; 2];
    device.config_read(2, &mut rows);
    assert_eq!(rows, [50, 0]);
    device.config_read(u64::MAX, &mut rows);
    // Nothing of it can be written.
    device.config_write(0, &[1, 2, 3, 4]);

    let plain = ConsoleDevice::new("console0", Console::nowhere());
    assert_eq!(plain.features(), 0);
    let mut space = [0xff; 4];
    plain.config_read(0, &mut space);
    assert_eq!(space, [0; 4]);
}

#[test]
fn a_resized_window_is_a_configuration_change() {
    let console = Console::open(&ConsoleConfig::Pty).unwrap();
    let device = ConsoleDevice::new("console0", console);
    let mut driver = Driver::new(&device);
    driver.start(&device, 1 << F_SIZE).unwrap();
    signal_hook::low_level::raise(libc::SIGWINCH).unwrap();
    let said = Arc::clone(&driver.said);
    until("the driver is told", || {
        said.config_changes.load(Ordering::SeqCst) > 0
    });
}

#[test]
fn a_pty_carries_both_ways() {
    let console = Console::open(&ConsoleConfig::Pty).unwrap();
    let name = console.input.pty_name().unwrap().to_owned();
    let device = ConsoleDevice::new("console0", console);
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let mut user = File::options().read(true).write(true).open(name).unwrap();
    driver.send(TX, &[bytes("login: ")]);
    driver.used(TX);
    let mut heard = [0; 7];
    user.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"login: ");
    user.write_all(b"root\n").unwrap();
    let buffer = driver.send(RX, &[Piece::Writable(16)]);
    assert_eq!(driver.used(RX), (buffer.head, 5));
    assert_eq!(&driver.bytes(buffer.buffers[0])[..5], b"root\n");
}

#[test]
fn bad_chains_come_back_empty_and_the_next_is_served() {
    let bench = on_socket();
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    let mut client = bench.client(&mut driver);
    let outside = Piece::Raw(MEMORY - 4, 64, 0, 0);
    let sent = driver.send(TX, &[outside]);
    assert_eq!(driver.used(TX), (sent.head, 0));
    client.write_all(b"abc").unwrap();
    let outside = Piece::Raw(u64::MAX - 8, 64, 2, 0);
    let sent = driver.send(RX, &[outside]);
    assert_eq!(driver.used(RX), (sent.head, 0));
    // Readable where it should be writable, and empty.
    for wrong in [bytes("xyz"), Piece::Writable(0)] {
        let sent = driver.send(RX, &[wrong]);
        assert_eq!(driver.used(RX), (sent.head, 0));
    }
    let sent = driver.send(RX, &[Piece::Writable(8)]);
    assert_eq!(driver.used(RX), (sent.head, 3));
    assert_eq!(counter(&bench.device, "bad_chains"), 4);
    assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 0);
}

#[test]
fn a_chain_that_loops_ends() {
    let (mut read, write) = std::io::pipe().unwrap();
    let device = on_file(write);
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let at = driver.room(16);
    let next = 1;
    let sent = driver.send(TX, &[Piece::Raw(at, 1, next, 0)]);
    assert_eq!(driver.used(TX), (sent.head, 0));
    let mut heard = [0; QUEUE_SIZE as usize];
    read.read_exact(&mut heard).unwrap();
    assert_eq!(
        counter(&device, "output_bytes"),
        u64::from(QUEUE_SIZE),
        "one byte for each descriptor of the queue, not more"
    );
}

#[test]
fn an_impossible_ring_needs_a_reset_and_then_works_again() {
    let bench = on_socket();
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    driver.set_available_index(TX, 40_000);
    driver.ring(TX);
    let said = Arc::clone(&driver.said);
    until("the device wants a reset", || {
        said.resets_needed.load(Ordering::SeqCst) == 1
    });
    // It serves nothing any more, and says so once.
    driver.ring(TX);
    driver.ring(RX);
    driver.stop();
    assert_eq!(said.resets_needed.load(Ordering::SeqCst), 1);
    let mut driver = Driver::new(&bench.device);
    driver.start(&bench.device, 0).unwrap();
    bench.client(&mut driver);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Whatever descriptors say: the worker lives, its thread ends, the console comes home.
    #[test]
    fn hostile_descriptors_harm_nobody(
        chains in prop::collection::vec(
            (0usize..2, prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()), 1..5)),
            1..20,
        ),
    ) {
        let device = ConsoleDevice::new("console0", Console::nowhere());
        let mut driver = Driver::new(&device);
        driver.start(&device, 0).unwrap();
        for (queue, pieces) in chains {
            let pieces: Vec<_> = pieces
                .into_iter()
                .map(|(address, len, flags, next)| {
                    Piece::Raw(address % (2 * MEMORY), len, flags % 8, next % 256)
                })
                .collect();
            driver.send(queue, &pieces);
        }
        driver.stop();
        prop_assert!(device.take().is_some());
    }
}
