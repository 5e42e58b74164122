//! Memory goes away under running workers: real SIGBUS and real `EFAULT`, by a file that is cut off.
//!
//! The rings are in memory that stays, data is in memory that goes. All of that is the byte [`GENUINE`], so a byte that
//! is another and comes out on the host's side is scratch.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

use crate::devices::console::{Console, ConsoleInput, ConsoleOutput};
use crate::memory::discard::{Discard, Discarded};
use crate::memory::layout::Gpa;
use crate::memory::mapping::{HostMapping, Source, memfd};
use crate::memory::pmem::Flush;
use crate::memory::region::{Mapping, Region};
use crate::memory::snapshot::Snapshot;
use crate::virtio::Device;
use crate::virtio::balloon::{BalloonDevice, BalloonSpec};
use crate::virtio::blk::{Disk, DiskSpec, EngineChoice};
use crate::virtio::console::ConsoleDevice;
use crate::virtio::net::{NetDevice, NetSpec};
use crate::virtio::pmem::PmemDevice;
use crate::virtio::rng::{RngDevice, RngSpec};
use crate::virtio::testing::{Driver, MEMORY, Piece};
use crate::virtio::vsock::{VsockDevice, VsockSpec};

/// Where the memory is that goes.
const AT: u64 = 1 << 32;
const SIZE: u64 = 4 << 20;
const GENUINE: u8 = 0x5a;
/// How often memory is taken away under a worker that is busy.
const ROUNDS: usize = 24;
/// Requests of a round.
const REQUESTS: usize = 32;
const LEN: u32 = 16 << 10;
const DEADLINE: Duration = Duration::from_secs(20);

/// Memory that goes.
struct Lossy {
    file: Arc<File>,
    region: Region,
}

impl Lossy {
    fn at(gpa: u64, size: u64) -> Self {
        let file = Arc::new(memfd(size, None).unwrap());
        let source = Source::File {
            file: Arc::clone(&file),
            offset: 0,
            shared: true,
        };
        let mapping = Mapping::Host(HostMapping::new(source, size, 4096).unwrap());
        let region = Region::new("lossy", Gpa(gpa), mapping).unwrap();
        Self { file, region }
    }

    /// Genuine bytes, and memory that stays.
    fn new() -> (Self, Snapshot) {
        let lossy = Self::at(AT, SIZE);
        let bytes = vec![GENUINE; usize::try_from(SIZE).unwrap()];
        lossy.file.write_all_at(&bytes, 0).unwrap();
        let size = usize::try_from(MEMORY).unwrap();
        let stays = Snapshot::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let memory = stays.with(lossy.region.guest_region()).unwrap();
        (lossy, memory)
    }

    /// For the device to read: `len` bytes of the `n`th request.
    fn readable(n: usize, len: u32) -> (u64, u32, u16, u16) {
        (AT + (n as u64 * u64::from(LEN)) % (SIZE / 2), len, 0, 0)
    }

    fn lose(&self) {
        self.file.set_len(0).unwrap();
    }

    /// Nobody has it any more.
    fn release(self, driver: Driver) {
        drop(driver);
        self.region.release().unwrap();
    }
}

/// The piece of a chain of `of`, of which it is number `place` and the chain's first is at `head`.
fn piece(raw: (u64, u32, u16, u16), head: usize, place: usize, of: usize) -> Piece {
    let more = u16::from(place + 1 < of);
    let next = u16::try_from((head + place + 1) % 256).unwrap();
    Piece::Raw(raw.0, raw.1, raw.2 | more, next)
}

/// Sends `REQUESTS` chains by `send`, and takes the memory away in the middle of that.
fn lose_in_the_middle(lossy: &Lossy, mut send: impl FnMut(usize)) {
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            start.wait();
            // Somebody else touches it too, so that scratch is there at once.
            let guest = lossy.region.guest_region();
            let other = guest.as_volatile_slice().unwrap();
            lossy.lose();
            let _: u8 = other.read_obj(0).unwrap();
        });
        for n in 0..REQUESTS {
            if n == REQUESTS / 4 {
                start.wait();
            }
            send(n);
        }
    });
}

fn is_genuine(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == GENUINE)
}

#[derive(Clone, Copy, Debug)]
struct Way {
    engine: EngineChoice,
    /// Data that the image's alignment does not suit, so that it goes through a buffer.
    skew: u64,
}

#[test]
fn a_disk_gets_no_scratch_and_the_guest_an_error() {
    for (engine, skew) in [
        (EngineChoice::Sync, 0),
        (EngineChoice::IoUring, 0),
        (EngineChoice::Sync, 8),
        (EngineChoice::IoUring, 8),
    ] {
        let way = Way { engine, skew };
        for _ in 0..ROUNDS {
            write_to_disk(way);
        }
    }
}

fn write_to_disk(way: Way) {
    const OLD: u8 = 0xff;
    let image = NamedTempFile::new().unwrap();
    let bytes = usize::try_from(LEN).unwrap() * REQUESTS;
    image.as_file().write_all_at(&vec![OLD; bytes], 0).unwrap();
    let spec = DiskSpec {
        engine: way.engine,
        direct: way.skew != 0,
        ..DiskSpec::new("_disk0", image.path())
    };
    let disk = Disk::open(&spec).unwrap();
    let (lossy, memory) = Lossy::new();
    let mut driver = Driver::with_memory(&disk, memory);
    driver.start(&disk, 1 << 9).unwrap();
    let mut sent = Vec::new();
    let mut head = 0;
    lose_in_the_middle(&lossy, |n| {
        let sector = (n * LEN as usize / 512) as u64;
        let (at, len, flags, next) = Lossy::readable(n, LEN);
        let data = piece((at + way.skew, len, flags, next), head, 1, 3);
        sent.push(driver.send(0, &[header(1, sector), data, Piece::Writable(1)]));
        head += 3;
    });
    for _ in 0..REQUESTS {
        driver.used(0);
    }
    let mut on_disk = vec![0; bytes];
    image.as_file().read_exact_at(&mut on_disk, 0).unwrap();
    for (n, request) in on_disk.chunks(LEN as usize).enumerate() {
        let status = driver.bytes(sent[n].buffers[2])[0];
        // A request that failed may have been done in part, as on any disk.
        let sound = |byte: &u8| *byte == GENUINE || (status == 1 && *byte == OLD);
        assert!(
            request.iter().all(sound),
            "{way:?} request {n} status {status}"
        );
    }
    // Whatever happened before, it is gone now; memory that stays is not.
    let (at, len, ..) = Lossy::readable(0, LEN);
    for (kind, flags) in [(0, 2), (1, 0)] {
        let data = piece((at, len, flags, 0), head, 1, 3);
        let sent = driver.send(0, &[header(kind, 0), data, Piece::Writable(1)]);
        head += 3;
        driver.used(0);
        assert_eq!(driver.bytes(sent.buffers[2]), [1], "{way:?} kind {kind}");
    }
    let good = Piece::Readable(vec![GENUINE; 512]);
    let sent = driver.send(0, &[header(1, 0), good, Piece::Writable(1)]);
    driver.used(0);
    assert_eq!(driver.bytes(sent.buffers[2]), [0]);
    assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 0);
    lossy.release(driver);
}

fn header(kind: u32, sector: u64) -> Piece {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    Piece::Readable(bytes)
}

/// Zeroes would be a request to read sector 0.
#[test]
fn a_disk_takes_no_orders_from_scratch() {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let disk = Disk::open(&DiskSpec::new("_disk0", image.path())).unwrap();
    let (lossy, memory) = Lossy::new();
    let mut driver = Driver::with_memory(&disk, memory);
    driver.start(&disk, 1 << 9).unwrap();
    lossy.lose();
    for n in 0..2 {
        let order = piece(Lossy::readable(0, 16), n * 3, 0, 3);
        let sent = driver.send(0, &[order, Piece::Writable(512), Piece::Writable(1)]);
        driver.used(0);
        assert_eq!(driver.bytes(sent.buffers[2]), [1]);
        assert!(lossy.region.mark().is_lost());
    }
    lossy.release(driver);
}

#[test]
fn a_network_gets_whole_frames_or_none() {
    for _ in 0..ROUNDS {
        let spec = NetSpec {
            id: "net0".into(),
            ..NetSpec::default()
        };
        let (device, wire) = NetDevice::on_sockets(spec);
        let (lossy, memory) = Lossy::new();
        let mut driver = Driver::with_memory(&device, memory);
        driver.start(&device, 1 << 32).unwrap();
        let mut frames = Vec::new();
        lose_in_the_middle(&lossy, |n| {
            driver.send(1, &[piece(Lossy::readable(n, 4000), n, 0, 1)]);
            frames.extend(std::iter::from_fn(|| wire.take(0)));
        });
        let end = Instant::now() + DEADLINE;
        for _ in 0..REQUESTS {
            // The wire has less room than that.
            while driver.used_now(1).is_none() {
                frames.extend(std::iter::from_fn(|| wire.take(0)));
                assert!(Instant::now() < end, "nothing came back");
            }
        }
        frames.extend(std::iter::from_fn(|| wire.take(0)));
        for frame in frames {
            assert!(frame.len() == 4000 && is_genuine(&frame));
        }
        driver.send(1, &[piece(Lossy::readable(0, 4000), REQUESTS, 0, 1)]);
        driver.used(1);
        assert!(wire.take(0).is_none());
        assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 0);
        lossy.release(driver);
    }
}

#[test]
fn a_console_s_reader_gets_no_scratch() {
    for _ in 0..ROUNDS {
        let (mut read, write) = io::pipe().unwrap();
        let console = Console {
            output: ConsoleOutput::File(File::from(std::os::fd::OwnedFd::from(write))),
            input: ConsoleInput::None,
        };
        let device = ConsoleDevice::new("console0", console);
        let (lossy, memory) = Lossy::new();
        let mut driver = Driver::with_memory(&device, memory);
        driver.start(&device, 0).unwrap();
        let heard = std::thread::spawn(move || {
            let mut heard = Vec::new();
            read.read_to_end(&mut heard).map(|_| heard)
        });
        lose_in_the_middle(&lossy, |n| {
            driver.send(1, &[piece(Lossy::readable(n, LEN), n, 0, 1)]);
        });
        // One more, for which it is gone whatever happened before.
        driver.send(1, &[piece(Lossy::readable(0, LEN), REQUESTS, 0, 1)]);
        for _ in 0..=REQUESTS {
            driver.used(1);
        }
        assert!(lossy.region.mark().is_lost());
        assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 0);
        driver.stop();
        lossy.release(driver);
        drop(device);
        let heard = heard.join().unwrap().unwrap();
        assert!(is_genuine(&heard));
    }
}

#[test]
fn a_vsock_s_peer_gets_no_scratch() {
    for _ in 0..ROUNDS {
        let dir = tempfile::tempdir().unwrap();
        let device = VsockDevice::open(VsockSpec {
            id: "vsock0".into(),
            cid: 3,
            socket: dir.path().join("v"),
        })
        .unwrap();
        let listener = UnixListener::bind(dir.path().join("v_52")).unwrap();
        let (lossy, memory) = Lossy::new();
        let mut driver = Driver::with_memory(&device, memory);
        driver.start(&device, device.features()).unwrap();
        for _ in 0..16 {
            driver.send(0, &[Piece::Writable(44), Piece::Writable(4096)]);
        }
        driver.send(1, &[Piece::Readable(packet(1, 0))]);
        driver.used(1);
        let mut peer = listener.accept().unwrap().0;
        peer.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut head = 1;
        lose_in_the_middle(&lossy, |n| {
            let data = piece(Lossy::readable(n, 1500), head, 1, 2);
            driver.send(1, &[Piece::Readable(packet(5, 1500)), data]);
            head += 2;
        });
        for _ in 0..REQUESTS {
            driver.used(1);
        }
        // Whatever came of it, one more that is wholly gone ends it.
        let data = piece(Lossy::readable(0, 1500), head, 1, 2);
        driver.send(1, &[Piece::Readable(packet(5, 1500)), data]);
        driver.used(1);
        assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 0);
        driver.stop();
        lossy.release(driver);
        let mut received = Vec::new();
        // Reset or ended: both are an end.
        let _ = peer.read_to_end(&mut received);
        assert!(is_genuine(&received));
    }
}

/// A header of virtio-vsock, of guest port 1000 and host port 52.
fn packet(op: u16, len: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(1000u32.to_le_bytes());
    bytes.extend(52u32.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend((256u32 << 10).to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes
}

#[test]
fn random_numbers_for_memory_that_is_gone_harm_nobody() {
    let device = RngDevice::open(RngSpec {
        id: "rng".to_owned(),
        src: "/dev/urandom".into(),
    })
    .unwrap();
    for _ in 0..ROUNDS {
        let (lossy, memory) = Lossy::new();
        let mut driver = Driver::with_memory(&device, memory);
        driver.start(&device, 0).unwrap();
        lose_in_the_middle(&lossy, |n| {
            let (at, len, ..) = Lossy::readable(n, LEN);
            driver.send(0, &[piece((at, len, 2, 0), n, 0, 1)]);
        });
        // One more, for which it is gone whatever happened before.
        let (at, len, ..) = Lossy::readable(0, LEN);
        driver.send(0, &[piece((at, len, 2, 0), REQUESTS, 0, 1)]);
        for _ in 0..=REQUESTS {
            driver.used(0);
        }
        assert!(lossy.region.mark().is_lost());
        let sent = driver.send(0, &[Piece::Writable(64)]);
        assert_eq!(driver.used(0), (sent.head, 64));
        lossy.release(driver);
    }
}

/// Notes what is to be discarded.
#[derive(Default)]
struct Noted(Mutex<Vec<u64>>);

impl Discard for Noted {
    fn discard(&self, gpa: u64, len: u64) -> Discarded {
        self.0.lock().unwrap().push(gpa);
        Discarded {
            done: 0,
            kept: 0,
            outside: len,
        }
    }
}

/// Zeroes would be page 0.
#[test]
fn a_balloon_gives_nothing_up_because_of_scratch() {
    for _ in 0..ROUNDS {
        let noted = Arc::<Noted>::default();
        let spec = BalloonSpec {
            id: "balloon".to_owned(),
            size: 0,
            deflate_on_oom: true,
            free_page_reporting: false,
        };
        let device = BalloonDevice::new(spec, Arc::clone(&noted) as Arc<_>).unwrap();
        let (lossy, memory) = Lossy::new();
        let mut driver = Driver::with_memory(&device, memory);
        driver.start(&device, device.features()).unwrap();
        lose_in_the_middle(&lossy, |n| {
            driver.send(0, &[piece(Lossy::readable(n, 256), n, 0, 1)]);
        });
        // One more, for which it is gone whatever happened before.
        driver.send(0, &[piece(Lossy::readable(0, 256), REQUESTS, 0, 1)]);
        for _ in 0..=REQUESTS {
            driver.used(0);
        }
        assert!(lossy.region.mark().is_lost());
        lossy.release(driver);
        let genuine = u64::from(u32::from_le_bytes([GENUINE; 4])) << 12;
        assert!(noted.0.lock().unwrap().iter().all(|gpa| *gpa == genuine));
    }
}

#[derive(Default)]
struct Counting(AtomicUsize);

impl Flush for Counting {
    fn flush(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Zeroes would be a flush that is done.
#[test]
fn a_flush_that_nobody_asked_for_is_not_answered_with_done() {
    for _ in 0..ROUNDS {
        let flush = Arc::<Counting>::default();
        let device = PmemDevice::new("p0", Gpa(AT), SIZE, Arc::clone(&flush) as Arc<_>);
        let (lossy, memory) = Lossy::new();
        let mut driver = Driver::with_memory(&device, memory);
        driver.start(&device, 0).unwrap();
        let mut sent = Vec::new();
        lose_in_the_middle(&lossy, |n| {
            let order = piece(Lossy::readable(n, 4), n * 2, 0, 2);
            sent.push(driver.send(0, &[order, Piece::Writable(4)]));
        });
        for _ in 0..REQUESTS {
            driver.used(0);
        }
        for sent in sent {
            assert_eq!(driver.bytes(sent.buffers[1]), [1, 0, 0, 0]);
        }
        assert_eq!(flush.0.load(Ordering::SeqCst), 0);
        lossy.release(driver);
    }
}

/// Its rings are in it: nothing is served any more, and the driver is told.
#[test]
fn a_queue_in_memory_that_is_gone_stops() {
    let (mut read, write) = io::pipe().unwrap();
    let console = Console {
        output: ConsoleOutput::File(File::from(std::os::fd::OwnedFd::from(write))),
        input: ConsoleInput::None,
    };
    let device = ConsoleDevice::new("console0", console);
    let lossy = Lossy::at(0, MEMORY);
    let memory = Snapshot::of(vec![lossy.region.guest_region()]).unwrap();
    let mut driver = Driver::with_memory(&device, memory);
    driver.start(&device, 0).unwrap();
    driver.send(1, &[Piece::Readable(vec![GENUINE; 100])]);
    driver.used(1);
    driver.offer(1, &[Piece::Readable(vec![GENUINE; 100])]);
    lossy.lose();
    driver.ring(1);
    let end = Instant::now() + DEADLINE;
    while driver.said.resets_needed.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < end, "the driver is not told");
        std::thread::yield_now();
    }
    assert!(lossy.region.mark().is_lost());
    lossy.release(driver);
    drop(device);
    let mut heard = Vec::new();
    read.read_to_end(&mut heard).unwrap();
    assert!(heard.len() == 100 && is_genuine(&heard));
}

/// What is stored where nothing is any more is stored nowhere.
#[test]
fn a_snapshot_says_what_is_lost() {
    let (lossy, memory) = Lossy::new();
    let byte: u8 = memory.read_obj(GuestAddress(AT)).unwrap();
    assert_eq!(byte, GENUINE);
    lossy.lose();
    assert!(memory.read_obj::<u8>(GuestAddress(AT)).is_err());
    assert!(memory.write_obj(1u8, GuestAddress(AT)).is_err());
    memory.check(GuestAddress(0), 1 << 20).unwrap();
    memory.check(GuestAddress(AT - 1), 2).unwrap_err();
    memory.check(GuestAddress(AT + SIZE), 1).unwrap();
    assert!(
        memory
            .system_slices(GuestAddress(AT), 8)
            .next()
            .unwrap()
            .is_err()
    );
    drop(memory);
    lossy.region.release().unwrap();
}
