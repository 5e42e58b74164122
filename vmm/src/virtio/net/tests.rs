//! The device end to end: a driver's queues on one side, sockets instead of a tap on the other.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4};
use vm_memory::{Bytes, GuestAddress};

use super::testing::{Asked, Wire};
use super::*;
use crate::virtio::testing::{Driver, Piece, Sent};

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
const DEADLINE: Duration = Duration::from_secs(20);
const NEXT: u16 = 1;
const WRITE: u16 = 2;

fn spec() -> NetSpec {
    NetSpec {
        id: "net0".into(),
        mac: Some("12:34:56:78:90:ab".parse().unwrap()),
        ..NetSpec::default()
    }
}

/// A driver that took all features but those in `without`, and whose device runs.
fn started(spec: NetSpec, without: &[u32]) -> (Driver, NetDevice, Wire) {
    let (device, wire) = NetDevice::on_sockets(spec);
    let mut driver = Driver::new(&device);
    let without = without.iter().fold(0, |bits, bit| bits | 1u64 << bit);
    driver.start(&device, device.features() & !without).unwrap();
    (driver, device, wire)
}

/// A frame with its header, whose bytes tell where they are.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend((0..len).map(|i| u8::try_from(i % 251).unwrap()));
    frame
}

impl Wire {
    fn wait(&self, queue: usize, flags: PollFlags) {
        let mut fds = [PollFd::new(&self.ends[queue], flags)];
        let at_most = Timespec::try_from(DEADLINE).unwrap();
        assert_ne!(poll(&mut fds, Some(&at_most)).unwrap(), 0, "nothing came");
    }

    fn recv(&self, queue: usize) -> Vec<u8> {
        self.wait(queue, PollFlags::IN);
        self.take(queue).unwrap()
    }

    fn send(&self, queue: usize, frame: &[u8]) {
        self.wait(queue, PollFlags::OUT);
        assert!(self.try_send(queue, frame));
    }
}

fn counter(device: &NetDevice, name: &str) -> u64 {
    let counters = device.counters();
    counters.iter().find(|(n, _)| *n == name).unwrap().1
}

/// A counter has no event to wait for.
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

fn control(driver: &mut Driver, queue: usize, request: &[u8]) -> u8 {
    let sent = driver.send(
        queue,
        &[Piece::Readable(request.to_vec()), Piece::Writable(1)],
    );
    assert_eq!(driver.used(queue), (sent.head, 1));
    driver.bytes(sent.buffers[1])[0]
}

/// The frame that the driver received in these chains.
fn received(driver: &mut Driver, chains: &[Sent]) -> Vec<u8> {
    let (head, len) = driver.used(RX);
    assert_eq!(head, chains[0].head);
    let first = chain_bytes(driver, &chains[0], len);
    let count = u16::from_le_bytes(first[10..12].try_into().unwrap());
    let mut frame = first;
    for chain in &chains[1..usize::from(count)] {
        let (head, len) = driver.used_now(RX).expect("all at once");
        assert_eq!(head, chain.head);
        frame.extend(chain_bytes(driver, chain, len));
    }
    frame
}

fn chain_bytes(driver: &Driver, chain: &Sent, len: u32) -> Vec<u8> {
    let mut bytes: Vec<u8> = chain
        .buffers
        .iter()
        .flat_map(|b| driver.bytes(*b))
        .collect();
    bytes.truncate(len as usize);
    bytes
}

#[test]
fn frames_are_sent_from_any_number_of_pieces() {
    let (mut driver, device, wire) = started(spec(), &[]);
    let whole = frame(1500);
    for cuts in [vec![], vec![12], vec![5, 12, 13, 700]] {
        let mut pieces = Vec::new();
        let mut from = 0;
        for to in cuts.into_iter().chain([whole.len()]) {
            pieces.push(Piece::Readable(whole[from..to].to_vec()));
            from = to;
        }
        let sent = driver.send(TX, &pieces);
        assert_eq!(wire.recv(0), whole);
        assert_eq!(driver.used(TX), (sent.head, 0));
    }
    assert_eq!(counter(&device, "tx_frames"), 3);
    assert_eq!(counter(&device, "tx_bytes"), 4500);
    assert_eq!(counter(&device, "tx_drops"), 0);
}

#[test]
fn a_frame_is_received_in_one_buffer() {
    let (mut driver, device, wire) = started(spec(), &[VIRTIO_NET_F_MRG_RXBUF]);
    let chain = driver.send(RX, &[Piece::Writable(12), Piece::Writable(1514)]);
    wire.send(0, &frame(1000));
    let mut got = received(&mut driver, &[chain]);
    assert_eq!(got[10..12], [1, 0], "num_buffers");
    got[10] = 0;
    assert_eq!(got, frame(1000));
    assert_eq!(counter(&device, "rx_frames"), 1);
    assert_eq!(counter(&device, "rx_bytes"), 1000);
}

#[test]
fn a_large_frame_is_spread_over_mergeable_buffers() {
    let (mut driver, device, wire) = started(spec(), &[]);
    // As many as Linux would have: more than the largest frame needs. The header of the first is in pieces.
    let mut chains = vec![driver.offer(RX, &[Piece::Writable(11), Piece::Writable(1525)])];
    chains.extend((0..100).map(|_| driver.offer(RX, &[Piece::Writable(1536)])));
    driver.ring(RX);
    let large = frame(LARGEST_FRAME - HEADER_BYTES);
    wire.send(0, &large);
    let mut got = received(&mut driver, &chains);
    let count = LARGEST_FRAME.div_ceil(1536);
    assert_eq!(usize::from(got[10]), count);
    got[10] = 0;
    assert_eq!(got, large);
    // The next one begins in the buffer after it.
    wire.send(0, &frame(60));
    let mut got = received(&mut driver, &chains[count..]);
    got[10] = 0;
    assert_eq!(got, frame(60));
    assert_eq!(counter(&device, "rx_drops"), 0);
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_the_buffer_kept() {
    let (mut driver, device, wire) = started(spec(), &[VIRTIO_NET_F_MRG_RXBUF]);
    let chain = driver.send(RX, &[Piece::Writable(100)]);
    wire.send(0, &frame(89));
    wire.send(0, &frame(88));
    assert_eq!(received(&mut driver, &[chain]).len(), 100);
    assert_eq!(counter(&device, "rx_drops"), 1);
    assert_eq!(counter(&device, "rx_frames"), 1);
}

#[test]
fn without_buffers_frames_wait_on_the_link() {
    let (mut driver, device, wire) = started(spec(), &[VIRTIO_NET_F_MRG_RXBUF]);
    for len in 1..=5 {
        wire.send(0, &frame(len));
    }
    for len in 1..=5 {
        let chain = driver.send(RX, &[Piece::Writable(1526)]);
        assert_eq!(received(&mut driver, &[chain]).len(), HEADER_BYTES + len);
    }
    assert_eq!(counter(&device, "rx_drops"), 0);
}

#[test]
fn a_link_that_is_full_is_waited_for() {
    let (mut driver, device, wire) = started(spec(), &[]);
    let frames = 200;
    for _ in 0..frames {
        driver.offer(TX, &[Piece::Readable(frame(20_000))]);
    }
    driver.ring(TX);
    for _ in 0..frames {
        assert_eq!(wire.recv(0), frame(20_000));
    }
    for _ in 0..frames {
        driver.used(TX);
    }
    assert_eq!(counter(&device, "tx_frames"), frames);
    assert_eq!(counter(&device, "tx_drops"), 0);
}

#[test]
fn hostile_transmit_chains_come_back_and_no_frame_leaves() {
    let (mut driver, device, wire) = started(spec(), &[]);
    let outside = crate::virtio::testing::MEMORY;
    let hostile = [
        vec![Piece::Readable(vec![0; 11])],
        vec![Piece::Writable(1000)],
        vec![Piece::Raw(outside, 100, 0, 0)],
        vec![Piece::Raw(outside - 50, 100, 0, 0)],
        vec![Piece::Raw(u64::MAX - 10, 100, 0, 0)],
        vec![Piece::Raw(0, u32::MAX, 0, 0)],
        vec![Piece::Readable(vec![0; LARGEST_FRAME + 1])],
        vec![
            Piece::Readable(vec![0; 60_000]),
            Piece::Readable(vec![0; 6_000]),
        ],
        // It goes on with itself for ever.
        vec![Piece::Raw(0, 1000, NEXT, 7 + 3)],
        vec![Piece::Raw(0, 100, NEXT, 60_000)],
    ];
    let mut heads = Vec::new();
    for pieces in &hostile[..8] {
        heads.push(driver.send(TX, pieces).head);
    }
    let own = heads.last().unwrap() + 2;
    heads.push(driver.send(TX, &[Piece::Raw(0, 1000, NEXT, own)]).head);
    for head in &heads {
        assert_eq!(driver.used(TX), (*head, 0));
    }
    assert_eq!(counter(&device, "tx_drops"), heads.len() as u64);
    // A chain that ends in nowhere is as long as it goes, and the device lives on.
    let sent = driver.send(TX, &hostile[9]);
    assert_eq!(wire.recv(0).len(), 100);
    assert_eq!(driver.used(TX).0, sent.head);
    let sent = driver.send(TX, &[Piece::Readable(frame(64))]);
    assert_eq!(wire.recv(0), frame(64));
    assert_eq!(driver.used(TX).0, sent.head);
}

#[test]
fn hostile_receive_chains_come_back_and_the_next_one_is_filled() {
    let (mut driver, device, wire) = started(spec(), &[VIRTIO_NET_F_MRG_RXBUF]);
    let outside = crate::virtio::testing::MEMORY;
    let hostile = [
        vec![Piece::Writable(11)],
        vec![Piece::Readable(vec![0; 1000])],
        vec![Piece::Raw(outside, 1526, WRITE, 0)],
        vec![Piece::Raw(u64::MAX, 1526, WRITE, 0)],
    ];
    for pieces in &hostile {
        let sent = driver.send(RX, pieces);
        assert_eq!(driver.used(RX), (sent.head, 0));
    }
    let chain = driver.send(RX, &[Piece::Writable(1526)]);
    wire.send(0, &frame(64));
    assert_eq!(received(&mut driver, &[chain]).len(), HEADER_BYTES + 64);
    assert_eq!(counter(&device, "rx_drops"), 0);
}

#[test]
fn a_broken_ring_is_an_error_of_the_device_once() {
    let (mut driver, _device, _wire) = started(spec(), &[]);
    driver.set_available_index(TX, 5000);
    driver.ring(TX);
    let said = Arc::clone(&driver.said);
    wait_until("needs reset", || {
        said.resets_needed.load(Ordering::SeqCst) > 0
    });
    driver.ring(TX);
    driver.ring(RX);
    driver.stop();
    assert_eq!(said.resets_needed.load(Ordering::SeqCst), 1);
}

#[test]
fn control_commands_are_acknowledged_honestly() {
    let (mut driver, _device, wire) = started(spec(), &[]);
    let mut ask = |request: &[u8]| control(&mut driver, CONTROL, request);
    // Offloads: none, those that were agreed on, one that does not exist, too few bytes.
    assert_eq!(ask(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(ask(&[5, 0, 0b1000_0010, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(ask(&[5, 0, 1, 0, 0, 0, 0, 0, 0, 0]), 1);
    assert_eq!(ask(&[5, 0, 0]), 1);
    // Promiscuous mode, a MAC table, a MAC address, VLANs, an announcement, queue pairs without MQ: not here.
    for request in [
        &[0, 0, 1][..],
        &[1, 0, 0, 0, 0, 0],
        &[1, 1, 2, 0, 0, 0, 0, 1],
        &[2, 0, 1, 0],
        &[3, 0],
        &[4, 0, 1, 0],
        &[255, 255],
        &[0],
        &[],
    ] {
        assert_eq!(ask(request), 1, "{request:?}");
    }
    let asked = wire.asked.lock().unwrap();
    let bits: Vec<_> = asked
        .iter()
        .map(|a| match a {
            Asked::Offloads(offloads) => offloads.bits(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(bits, [0b1_1111, 0, 0b11]);
}

#[test]
fn hostile_control_chains_come_back() {
    let (mut driver, _device, _wire) = started(spec(), &[]);
    let outside = crate::virtio::testing::MEMORY;
    for pieces in [
        vec![Piece::Readable(vec![5, 0])],
        vec![Piece::Raw(outside, 10, NEXT, 2), Piece::Writable(0)],
        vec![
            Piece::Readable(vec![0, 0]),
            Piece::Raw(outside, 1, WRITE, 0),
        ],
    ] {
        let sent = driver.send(CONTROL, &pieces);
        assert_eq!(driver.used(CONTROL), (sent.head, 0));
    }
    assert_eq!(control(&mut driver, CONTROL, &[9, 9]), 1);
}

#[test]
fn queue_pairs_are_used_when_the_driver_asks_for_them() {
    let four = NetSpec {
        num_queues: 8,
        ..spec()
    };
    let (mut driver, device, wire) = started(four, &[VIRTIO_NET_F_MRG_RXBUF]);
    let mut space = [0; 2];
    device.config_read(8, &mut space);
    assert_eq!(u16::from_le_bytes(space), 4, "max_virtqueue_pairs");
    let control_queue = 8;
    {
        let mut asked = wire.asked.lock().unwrap();
        let detached = (1..4).map(Asked::Detach).collect::<Vec<_>>();
        assert_eq!(asked[1..], detached, "one pair at first");
        asked.clear();
    }
    for (wanted, ack) in [(0u16, 1), (5, 1), (3, 0), (2, 0)] {
        let [low, high] = wanted.to_le_bytes();
        assert_eq!(
            control(&mut driver, control_queue, &[4, 0, low, high]),
            ack,
            "{wanted}"
        );
    }
    assert_eq!(
        *wire.asked.lock().unwrap(),
        [Asked::Attach(1), Asked::Attach(2), Asked::Detach(2)]
    );
    // The second pair works, from its own queues to its own end.
    let chain = driver.send(2, &[Piece::Writable(1526)]);
    wire.send(1, &frame(33));
    let (head, len) = driver.used(2);
    assert_eq!((head, len), (chain.head, 45));
    driver.send(3, &[Piece::Readable(frame(44))]);
    assert_eq!(wire.recv(1), frame(44));
}

#[test]
fn without_multiqueue_the_control_queue_is_the_third() {
    let four = NetSpec {
        num_queues: 8,
        ..spec()
    };
    let (mut driver, _device, _wire) = started(four, &[VIRTIO_NET_F_MQ]);
    assert_eq!(control(&mut driver, 2, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
}

#[test]
fn a_link_that_goes_away_is_told_and_frames_are_dropped() {
    let (mut driver, device, wire) = started(spec(), &[]);
    let status = || {
        let mut status = [0; 2];
        device.config_read(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!(status(), 1);
    for _ in 0..200 {
        driver.offer(RX, &[Piece::Writable(1526)]);
    }
    driver.ring(RX);
    drop(wire);
    wait_until("link down", || status() == 0);
    let said = Arc::clone(&driver.said);
    wait_until("told", || said.config_changes.load(Ordering::SeqCst) == 1);
    let sent = driver.send(TX, &[Piece::Readable(frame(64))]);
    assert_eq!(driver.used(TX), (sent.head, 0));
    assert_eq!(counter(&device, "tx_drops"), 1);
}

#[test]
fn a_reset_gives_the_device_to_the_next_driver() {
    let (mut driver, device, wire) = started(spec(), &[]);
    driver.send(RX, &[Piece::Writable(1526)]);
    driver.stop();
    let mut driver = Driver::new(&device);
    driver.start(&device, 0).unwrap();
    let chain = driver.send(RX, &[Piece::Writable(1526)]);
    wire.send(0, &frame(64));
    let (head, len) = driver.used(RX);
    assert_eq!((head, len), (chain.head, 76));
    let asked = wire.asked.lock().unwrap();
    assert_eq!(asked.last(), Some(&Asked::Offloads(Offloads::default())));
}

#[test]
fn the_first_pair_can_not_be_left_out() {
    let (device, _wire) = NetDevice::on_sockets(spec());
    let driver = Driver::new(&device);
    for index in 0..2u16 {
        let mut activation = driver.activation(0);
        activation.queues[usize::from(index)] = None;
        let error = device.activate(activation).err().unwrap();
        assert!(
            matches!(error, ActivateError::MissingQueue { index: i } if i == index),
            "{error}"
        );
    }
}

#[test]
fn configuration_and_features_follow_the_spec() {
    let (device, _) = NetDevice::on_sockets(NetSpec {
        mtu: Some(9000),
        ..spec()
    });
    let mut space = [0xff; 16];
    device.config_read(0, &mut space[..12]);
    assert_eq!(
        space[..12],
        [0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 1, 0, 1, 0, 0x28, 0x23]
    );
    let mut beyond = [7; 4];
    device.config_read(u64::MAX, &mut beyond);
    assert_eq!(beyond, [7; 4]);
    let has = |device: &NetDevice, bit: u32| device.features() & (1 << bit) != 0;
    assert!(has(&device, VIRTIO_NET_F_MTU));
    assert!(!has(&device, VIRTIO_NET_F_MQ));
    let (bare, _) = NetDevice::on_sockets(NetSpec {
        offload_csum: false,
        ..spec()
    });
    for bit in [
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_GUEST_UFO,
        VIRTIO_NET_F_MTU,
    ] {
        assert!(!has(&bare, bit), "{bit}");
    }
    assert_eq!(bare.queue_sizes(), [256, 256, CONTROL_SIZE]);
}

#[test]
fn a_threads_name_tells_device_and_pair() {
    for (id, pair, name) in [
        ("net0", 0, "_net0_qp0"),
        ("_net1", 3, "_net1_qp3"),
        ("a-rather-long-name", 12, "_a-rather-_qp12"),
    ] {
        let (device, _) = NetDevice::on_sockets(NetSpec {
            id: id.into(),
            ..spec()
        });
        assert_eq!(device.thread_name(pair), name);
    }
}

#[test]
fn what_makes_no_sense_is_refused_before_the_host_is_asked() {
    let two = || {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        vec![OwnedFd::from(a), OwnedFd::from(b)]
    };
    let ip = |text: &str| Some(text.parse().unwrap());
    let table = [
        (
            NetSpec {
                num_queues: 0,
                ..spec()
            },
            "num_queues=0",
        ),
        (
            NetSpec {
                num_queues: 3,
                ..spec()
            },
            "num_queues=3",
        ),
        (
            NetSpec {
                num_queues: 514,
                ..spec()
            },
            "from 2 to 512",
        ),
        (
            NetSpec {
                queue_size: 0,
                ..spec()
            },
            "queue_size=0",
        ),
        (
            NetSpec {
                queue_size: 1,
                ..spec()
            },
            "queue_size=1",
        ),
        (
            NetSpec {
                queue_size: 300,
                ..spec()
            },
            "power of two",
        ),
        (
            NetSpec {
                queue_size: 32769,
                ..spec()
            },
            "32768",
        ),
        (
            NetSpec {
                fds: two(),
                ..spec()
            },
            "2 file descriptors",
        ),
        (
            NetSpec {
                fds: two(),
                tap: Some("t0".into()),
                num_queues: 4,
                ..spec()
            },
            "leave out one",
        ),
        (
            NetSpec {
                mtu: Some(67),
                ..spec()
            },
            "mtu=67",
        ),
        (
            NetSpec {
                mask: ip("255.0.0.0"),
                ..spec()
            },
            "without ip=",
        ),
        (
            NetSpec {
                ip: ip("10.0.0.1"),
                mask: ip("255.0.255.0"),
                ..spec()
            },
            "no network mask",
        ),
        (
            NetSpec {
                ip: ip("10.0.0.1"),
                mask: ip("ffff::"),
                ..spec()
            },
            "same version",
        ),
        (
            NetSpec {
                host_mac: spec().mac,
                ..spec()
            },
            "12:34:56:78:90:ab",
        ),
    ];
    for (spec, words) in table {
        let error = NetDevice::open(spec).err().unwrap().to_string();
        assert!(error.contains(words), "{error:?} lacks {words:?}");
        assert!(error.contains("network device net0"), "{error}");
    }
}

#[test]
fn names_that_no_interface_has_are_refused() {
    for name in [
        "",
        "a-name-of-16-byt",
        "a/b",
        "a b",
        "a:b",
        ".",
        "..",
        "a%s",
        "%d%d",
    ] {
        let spec = NetSpec {
            tap: Some(name.into()),
            ..spec()
        };
        let error = NetDevice::open(spec).err().unwrap();
        assert!(
            matches!(
                &error,
                NetOpenError::Tap {
                    source: TapError::BadName { .. },
                    ..
                }
            ),
            "{name:?}: {error}"
        );
    }
}

#[test]
fn descriptors_that_are_no_taps_are_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    for fd in [OwnedFd::from(null), OwnedFd::from(socket)] {
        let error = NetDevice::open(NetSpec {
            fds: vec![fd],
            ..spec()
        });
        let error = error.err().unwrap();
        assert!(
            matches!(
                &error,
                NetOpenError::Tap {
                    source: TapError::FdNotATap { .. },
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn memory_stays_what_it_was_where_no_frame_is() {
    let (mut driver, _device, wire) = started(spec(), &[VIRTIO_NET_F_MRG_RXBUF]);
    let at = driver.room(4096);
    driver
        .memory()
        .write_slice(&[0x5a; 4096], GuestAddress(at))
        .unwrap();
    let chain = driver.send(RX, &[Piece::Raw(at, 2048, WRITE, 0)]);
    wire.send(0, &frame(64));
    assert_eq!(received(&mut driver, &[chain]).len(), 76);
    assert_eq!(driver.bytes((at + 76, 4096 - 76)), vec![0x5a; 4096 - 76]);
}
