//! The disk driven as a guest drives it, and as no guest should, through each engine.

mod opening;

use std::fs::File;
use std::os::unix::fs::FileExt;

use tempfile::NamedTempFile;

use super::*;
use crate::virtio::testing::{Driver, MEMORY, Piece, Sent};

const MIB: u64 = 1 << 20;
const FLUSH: u64 = 1 << spec::VIRTIO_BLK_F_FLUSH;
const CONFIG_WCE: u64 = 1 << spec::VIRTIO_BLK_F_CONFIG_WCE;
const ENGINES: [EngineChoice; 3] = [
    EngineChoice::Sync,
    EngineChoice::IoUring,
    EngineChoice::Auto,
];
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// 4 MiB in which each sector tells its number.
fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fill(file.as_file());
    file
}

fn fill(file: &File) {
    let mut bytes = vec![0; usize::try_from(4 * MIB).unwrap()];
    for (n, sector) in (0u64..).zip(bytes.chunks_mut(512)) {
        sector[..8].copy_from_slice(&n.to_le_bytes());
        sector[8..].fill(n.to_le_bytes()[0] | 1);
    }
    file.write_all_at(&bytes, 0).unwrap();
}

fn spec(file: &NamedTempFile) -> DiskSpec {
    DiskSpec::new("_disk0", file.path())
}

fn with_engine(file: &NamedTempFile, engine: EngineChoice) -> DiskSpec {
    DiskSpec {
        engine,
        ..spec(file)
    }
}

/// A disk that runs.
struct Running {
    disk: Disk,
    driver: Driver,
}

impl Running {
    fn new(disk: Disk) -> Self {
        Self::with_features(disk, FLUSH)
    }

    fn with_features(disk: Disk, features: u64) -> Self {
        let mut driver = Driver::new(&disk);
        driver.start(&disk, features).unwrap();
        Self { disk, driver }
    }

    fn open(spec: &DiskSpec) -> Self {
        Self::new(Disk::open(spec).unwrap())
    }

    /// Sends a chain whose last byte is the status; returns it, the written length and the buffers.
    fn request(&mut self, pieces: &[Piece]) -> (u8, u32, Sent) {
        let sent = self.driver.send(0, pieces);
        let (head, written) = self.driver.used(0);
        assert_eq!(head, sent.head);
        let last = *sent.buffers.last().unwrap();
        let status = *self.driver.bytes(last).last().unwrap();
        (status, written, sent)
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, u32, Vec<u8>) {
        let pieces = [header(0, sector), Piece::Writable(len), status()];
        let (status, written, sent) = self.request(&pieces);
        (status, written, self.driver.bytes(sent.buffers[1]))
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.request(&[header(1, sector), readable(bytes), status()])
            .0
    }

    fn flush(&mut self) -> u8 {
        self.request(&[header(4, 0), status()]).0
    }

    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.request(&[header(kind, 0), readable(&range), status()])
            .0
    }

    fn counter(&mut self, name: &str) -> u64 {
        // Counted when a pass ends, which may be after its answers were seen.
        self.driver.stop();
        let counters = self.disk.counters();
        counters.iter().find(|it| it.0 == name).unwrap().1
    }
}

fn readable(bytes: &[u8]) -> Piece {
    Piece::Readable(bytes.to_vec())
}

fn header_bytes(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn header(kind: u32, sector: u64) -> Piece {
    readable(&header_bytes(kind, sector))
}

/// One byte that no answer has, so that no answer is seen as none.
fn status() -> Piece {
    Piece::Writable(1)
}

fn sector_number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

fn file_bytes(file: &NamedTempFile, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.as_file().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn what_is_written_is_read_and_is_in_the_image() {
    for engine in ENGINES {
        let file = image();
        let mut running = Running::open(&with_engine(&file, engine));
        let (status, written, bytes) = running.read(16, 4096);
        assert_eq!((status, written), (OK, 4097), "{engine:?}");
        for (n, sector) in (16..).zip(bytes.chunks(512)) {
            assert_eq!(sector_number(sector), n);
        }
        assert_eq!(running.write(100, &[0xa5; 1024]), OK);
        assert_eq!(running.flush(), OK);
        assert_eq!(running.read(101, 512), (OK, 513, vec![0xa5; 512]));
        assert_eq!(file_bytes(&file, 51200, 1024), [0xa5; 1024]);
        assert_eq!(sector_number(&file_bytes(&file, 51200 + 1024, 512)), 102);
        assert_eq!(running.counter("requests"), 4);
        assert_eq!(running.counter("read_bytes"), 4096 + 512);
        assert_eq!(running.counter("write_bytes"), 1024);
        assert_eq!(running.counter("errors"), 0);
    }
}

#[test]
fn the_last_sector_is_the_last() {
    for engine in ENGINES {
        let file = image();
        let mut running = Running::open(&with_engine(&file, engine));
        let last = 4 * MIB / 512 - 1;
        let (status, _, bytes) = running.read(last, 512);
        assert_eq!((status, sector_number(&bytes)), (OK, last));
        assert_eq!(running.write(last, &[1; 512]), OK);
        for (sector, len) in [
            (last, 1024),
            (last + 1, 512),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (u64::MAX / 512 + 1, 512),
        ] {
            assert_eq!(running.read(sector, len).0, IO_ERROR, "{sector:#x}");
            let bytes = vec![2; len as usize];
            assert_eq!(running.write(sector, &bytes), IO_ERROR, "{sector:#x}");
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), 4 * MIB);
        assert_eq!(file_bytes(&file, last * 512, 512), [1; 512]);
    }
}

#[test]
fn a_disk_grows_under_its_driver() {
    for engine in ENGINES {
        let file = image();
        let mut running = Running::open(&with_engine(&file, engine));
        let first_new = 4 * MIB / 512;
        assert_eq!(running.read(first_new, 512).0, IO_ERROR);
        running.disk.resize(6 * MIB).unwrap();
        assert_eq!(running.driver.said.config_changes.load(Ordering::SeqCst), 1);
        let mut capacity = [0; 8];
        running.disk.config_read(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 6 * MIB / 512);
        let (status, _, bytes) = running.read(first_new, 512);
        assert_eq!((status, bytes), (OK, vec![0; 512]));
        assert_eq!(running.write(6 * MIB / 512 - 1, &[1; 512]), OK);
        assert_eq!(running.read(6 * MIB / 512, 512).0, IO_ERROR);
        assert_eq!(sector_number(&file_bytes(&file, 512, 512)), 1);
    }
}

#[test]
fn a_size_that_can_not_be_leaves_the_disk_as_it_is() {
    let file = image();
    let disk = Disk::open(&spec(&file)).unwrap();
    let refused = |disk: &Disk, bytes| disk.resize(bytes).unwrap_err().to_string();
    assert!(refused(&disk, 2 * MIB).contains("shrink its image"));
    assert!(refused(&disk, 4 * MIB + 1).contains("4194304 is the next smaller"));
    // More than a file can have.
    assert!(refused(&disk, u64::MAX - 511).contains("can't be made larger"));
    assert_eq!(disk.size(), 4 * MIB);
    drop(disk);
    let readonly = Disk::open(&DiskSpec {
        readonly: true,
        ..spec(&file)
    });
    let readonly = readonly.unwrap();
    assert!(refused(&readonly, 8 * MIB).contains("has 4194304 bytes"));
    assert_eq!(file.as_file().metadata().unwrap().len(), 4 * MIB);
    // Somebody else has made it larger.
    file.as_file().set_len(8 * MIB).unwrap();
    readonly.resize(8 * MIB).unwrap();
    assert_eq!(readonly.size(), 8 * MIB);
}

#[test]
fn many_requests_at_a_time_all_come_back() {
    for engine in ENGINES {
        let file = image();
        let mut running = Running::open(&with_engine(&file, engine));
        for round in 0..20 {
            let sent: Vec<_> = (0..40)
                .map(|n| {
                    let pieces = [header(0, n * 8 + round), Piece::Writable(4096), status()];
                    running.driver.offer(0, &pieces)
                })
                .collect();
            running.driver.ring(0);
            let mut heads: Vec<u16> = (0..40).map(|_| running.driver.used(0).0).collect();
            heads.sort_unstable();
            let mut expected: Vec<u16> = sent.iter().map(|sent| sent.head).collect();
            expected.sort_unstable();
            assert_eq!(heads, expected);
            for (n, sent) in (0..).zip(&sent) {
                let bytes = running.driver.bytes(sent.buffers[1]);
                assert_eq!(sector_number(&bytes), n * 8 + round, "{engine:?}");
                assert_eq!(running.driver.bytes(sent.buffers[2]), [OK]);
            }
        }
        assert_eq!(running.counter("read_ops"), 800);
        // Far fewer than requests: a pass has one.
        assert!(running.counter("interrupts") <= 800 / 2, "{engine:?}");
        assert!(running.counter("kicks") <= 20);
    }
}

#[test]
fn descriptors_may_be_split_and_joined_as_the_driver_likes() {
    for engine in ENGINES {
        let file = image();
        let mut running = Running::open(&with_engine(&file, engine));
        // A header in three parts, data in odd parts, the status at the end of the last.
        let bytes = header_bytes(0, 8);
        let pieces = [
            readable(&bytes[..3]),
            readable(&bytes[3..15]),
            readable(&bytes[15..]),
            Piece::Writable(1),
            Piece::Writable(700),
            Piece::Writable(323 + 1),
        ];
        let (status_byte, written, sent) = running.request(&pieces);
        assert_eq!((status_byte, written), (OK, 1025));
        let found: Vec<u8> = sent.buffers[3..]
            .iter()
            .flat_map(|buffer| running.driver.bytes(*buffer))
            .collect();
        assert_eq!(found[..1024], file_bytes(&file, 8 * 512, 1024));
        // Header and data in one descriptor.
        let mut joined = header_bytes(1, 3);
        joined.extend([0x77; 512]);
        assert_eq!(running.request(&[readable(&joined), status()]).0, OK);
        assert_eq!(file_bytes(&file, 3 * 512, 512), [0x77; 512]);
    }
}

#[test]
fn a_request_that_makes_no_sense_is_an_error_and_the_next_is_served() {
    let file = image();
    let before = file_bytes(&file, 0, 4096);
    let long = 1 << 20;
    for engine in ENGINES {
        for pieces in [
            // Lengths that are no sectors.
            vec![header(0, 0), Piece::Writable(511), status()],
            vec![header(0, 0), Piece::Writable(513), status()],
            vec![header(1, 0), readable(&[1; 100]), status()],
            // A header that is too short, or is not there.
            vec![readable(&[0; 15]), status()],
            vec![status()],
            // What can be read after what can be written.
            vec![Piece::Writable(512), header(0, 0), status()],
            // Data that is not guest memory, in part or in full; MMIO would be.
            vec![header(0, 0), Piece::Raw(MEMORY, 512, 3, 2), status()],
            vec![header(0, 0), Piece::Raw(MEMORY - 256, 512, 3, 2), status()],
            vec![header(0, 0), Piece::Raw(0xfee0_0000, 512, 3, 2), status()],
            vec![
                header(0, 0),
                Piece::Raw(u64::MAX - 255, 512, 3, 2),
                status(),
            ],
            vec![header(1, 0), Piece::Raw(MEMORY, 512, 1, 2), status()],
            // A header that is not.
            vec![Piece::Raw(MEMORY, 16, 1, 1), status()],
            // Ranges that are none.
            vec![header(11, 0), readable(&[0; 15]), status()],
            vec![header(11, 0), readable(&[0; 32]), status()],
            vec![header(13, 0), status()],
            vec![header(13, 0), Piece::Raw(MEMORY - 8, 16, 1, 2), status()],
        ] {
            let mut running = Running::open(&with_engine(&file, engine));
            let (status, ..) = running.request(&pieces);
            assert_eq!(status, IO_ERROR, "{engine:?} {pieces:?}");
            assert_eq!(running.read(0, 512).0, OK);
            assert_eq!(running.counter("errors"), 1);
        }
        // More data than any driver sends: the same memory again and again.
        let mut running = Running::open(&with_engine(&file, engine));
        let mut pieces = vec![header(0, 0)];
        pieces.extend((1..=65).map(|n| Piece::Raw(32 * MIB, long, 3, n + 1)));
        pieces.push(status());
        assert_eq!(running.request(&pieces).0, IO_ERROR);
    }
    assert_eq!(file_bytes(&file, 0, 4096), before);
}

#[test]
fn a_request_without_room_for_an_answer_is_given_back_and_not_done() {
    let file = image();
    for pieces in [
        vec![header(1, 0), readable(&[9; 512])],
        vec![header(1, 0), Piece::Raw(MEMORY, 1, 2, 0)],
        vec![header(1, 0), Piece::Raw(u64::MAX, 2, 2, 0)],
        vec![header(1, 0), Piece::Raw(0x200_0000, 0, 2, 0)],
        // To itself, to a descriptor that is not there, and indirect tables that are none.
        vec![Piece::Raw(0x200_0000, 16, 1, 0)],
        vec![Piece::Raw(0x200_0000, 16, 1, 60_000)],
        vec![Piece::Raw(MEMORY, 32, 4, 0)],
        vec![Piece::Raw(0x200_0000, 7, 4, 0)],
    ] {
        let mut running = Running::open(&spec(&file));
        let sent = running.driver.send(0, &pieces);
        assert_eq!(running.driver.used(0), (sent.head, 0), "{pieces:?}");
        assert_eq!(running.read(0, 512).0, OK);
    }
    assert_eq!(sector_number(&file_bytes(&file, 512, 512)), 1);
    assert_ne!(file_bytes(&file, 0, 512), [9; 512]);
}

#[test]
fn a_chain_that_loops_is_an_error() {
    let file = image();
    let mut running = Running::open(&spec(&file));
    let pieces = [header(0, 0), Piece::Raw(0x200_0000, 512, 3, 1)];
    let (status, ..) = running.request(&pieces);
    assert_eq!(status, IO_ERROR);
    assert_eq!(running.read(0, 512).0, OK);
}

#[test]
fn unknown_types_are_unsupported() {
    let file = image();
    let mut running = Running::open(&spec(&file));
    for kind in [2, 3, 7, 14, 15, 16, 26, 0x8000_0000, u32::MAX] {
        let pieces = [header(kind, 0), Piece::Writable(512), status()];
        assert_eq!(running.request(&pieces).0, UNSUPPORTED, "{kind}");
    }
}

#[test]
fn nothing_to_move_is_done() {
    let file = image();
    let mut running = Running::open(&spec(&file));
    assert_eq!(running.request(&[header(0, 0), status()]).0, OK);
    assert_eq!(running.request(&[header(1, 8192), status()]).0, OK);
    assert_eq!(running.request(&[header(1, 8193), status()]).0, IO_ERROR);
    assert_eq!(running.range(11, 0, 0, 0), OK);
    assert_eq!(running.range(13, 0, 0, 0), OK);
}

#[test]
fn the_serial_number_is_told() {
    let file = image();
    let disk = DiskSpec {
        serial: Some("scratch-7".into()),
        ..spec(&file)
    };
    let mut running = Running::open(&disk);
    let (status_byte, written, sent) =
        running.request(&[header(8, 0), Piece::Writable(20), status()]);
    assert_eq!((status_byte, written), (OK, 21));
    let mut expected = b"scratch-7".to_vec();
    expected.resize(20, 0);
    assert_eq!(running.driver.bytes(sent.buffers[1]), expected);
    // More room, or less, than it takes.
    let (status_byte, written, _) = running.request(&[header(8, 0), Piece::Writable(64), status()]);
    assert_eq!((status_byte, written), (OK, 20));
    let (status_byte, _, sent) = running.request(&[header(8, 0), Piece::Writable(4), status()]);
    assert_eq!(status_byte, OK);
    assert_eq!(running.driver.bytes(sent.buffers[1]), b"scra");
    let wrong = [header(8, 0), Piece::Raw(MEMORY - 4, 20, 3, 2), status()];
    let mut running = Running::new(running.disk);
    assert_eq!(running.request(&wrong).0, IO_ERROR);
}

#[test]
fn discarded_blocks_are_given_back_and_zeroed_ones_read_as_zeroes() {
    use std::os::unix::fs::MetadataExt;
    for engine in ENGINES {
        let file = image();
        file.as_file().sync_all().unwrap();
        let blocks = file.as_file().metadata().unwrap().blocks();
        let mut running = Running::open(&with_engine(&file, engine));
        assert_eq!(running.range(11, 0, 2048, 0), OK, "{engine:?}");
        let left = file.as_file().metadata().unwrap().blocks();
        assert!(left <= blocks - 2000, "{engine:?}: {blocks} then {left}");
        assert_eq!(running.read(0, 512).2, [0; 512]);
        // Zeroes, with and without giving back, to the sector.
        assert_eq!(running.range(13, 2049, 3, 0), OK);
        assert_eq!(running.range(13, 4097, 1000, 1), OK);
        for (first, zeroes) in [(2048, 1..4), (4096, 1..1001)] {
            let len = 512 * (zeroes.end + 1);
            let bytes = file_bytes(&file, first * 512, len);
            for (n, sector) in bytes.chunks(512).enumerate() {
                let is_zero = sector.iter().all(|byte| *byte == 0);
                assert_eq!(is_zero, zeroes.contains(&n), "{engine:?} {first}+{n}");
            }
        }
        assert_eq!(file.as_file().metadata().unwrap().len(), 4 * MIB);
    }
}

#[test]
fn ranges_that_can_not_be_are_errors() {
    let file = image();
    let mut running = Running::open(&spec(&file));
    for kind in [11, 13] {
        assert_eq!(running.range(kind, 8191, 2, 0), IO_ERROR);
        assert_eq!(running.range(kind, u64::MAX, 1, 0), IO_ERROR);
        assert_eq!(running.range(kind, 0, u32::MAX, 0), IO_ERROR);
        assert_eq!(running.range(kind, 0, 1, 2), UNSUPPORTED);
    }
    // A discard can't be told to unmap.
    assert_eq!(running.range(11, 0, 1, 1), UNSUPPORTED);
    assert_eq!(sector_number(&file_bytes(&file, 512, 512)), 1);
}

#[test]
fn an_image_that_is_not_to_have_holes_gets_none() {
    use std::os::unix::fs::MetadataExt;
    let file = image();
    file.as_file().sync_all().unwrap();
    let blocks = file.as_file().metadata().unwrap().blocks();
    let disk = Disk::open(&DiskSpec {
        sparse: false,
        ..spec(&file)
    })
    .unwrap();
    assert_eq!(disk.features() >> spec::VIRTIO_BLK_F_DISCARD & 1, 0);
    let mut running = Running::new(disk);
    assert_eq!(running.range(11, 0, 2048, 0), UNSUPPORTED);
    assert_eq!(running.range(13, 0, 2048, 1), OK);
    assert_eq!(running.read(2047, 512).2, [0; 512]);
    let left = file.as_file().metadata().unwrap().blocks();
    assert!(left >= blocks - 8, "{blocks} then {left}");
}

#[test]
fn the_driver_turns_the_write_cache_on_and_off() {
    let file = image();
    let disk = Disk::open(&spec(&file)).unwrap();
    let cache = |disk: &Disk| {
        let mut on = [0];
        disk.config_read(32, &mut on);
        on[0]
    };
    assert_eq!(cache(&disk), 1);
    let mut running = Running::with_features(disk, FLUSH | CONFIG_WCE);
    for (written, found) in [(0, 0), (1, 1), (0, 0), (7, 1)] {
        running.disk.config_write(32, &[written]);
        assert_eq!(cache(&running.disk), found);
        assert_eq!(running.write(1, &[written; 512]), OK);
        assert_eq!(running.range(13, 2, 1, 0), OK);
    }
    // Nothing else can be written.
    running.disk.config_write(0, &[0xff; 8]);
    running.disk.config_write(u64::MAX, &[0]);
    running.disk.config_write(32, &[]);
    assert_eq!((running.disk.size(), cache(&running.disk)), (4 * MIB, 1));
}

/// A disk whose storage is always full, and has no sync.
fn failing(file: &NamedTempFile, engine: EngineChoice) -> Disk {
    let mut disk = Disk::open(&with_engine(file, engine)).unwrap();
    let full = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let image = Arc::into_inner(disk.image).unwrap();
    disk.image = Arc::new(image.with_file(full));
    disk
}

#[test]
fn errors_of_the_storage_are_errors_of_the_request() {
    for engine in ENGINES {
        let file = image();
        let mut running = Running::new(failing(&file, engine));
        assert_eq!(running.write(0, &[1; 512]), IO_ERROR, "{engine:?}");
        assert_eq!(running.range(13, 0, 8, 0), IO_ERROR);
        assert_eq!(running.range(11, 0, 8, 0), IO_ERROR);
        assert_eq!(running.read(0, 512).0, OK);
        assert_eq!(running.flush(), IO_ERROR);
        assert_eq!(running.counter("errors"), 4);
    }
}

#[test]
fn a_flush_that_failed_is_not_made_good_by_one_that_did_not() {
    let file = image();
    let disk = failing(&file, EngineChoice::Auto);
    let mut running = Running::new(disk);
    assert_eq!(running.flush(), IO_ERROR);
    running.driver.stop();
    let mut disk = running.disk;
    let image = Arc::into_inner(disk.image).unwrap();
    disk.image = Arc::new(image.with_file(file.reopen().unwrap()));
    let mut running = Running::new(disk);
    assert_eq!(running.flush(), IO_ERROR);
    assert_eq!(running.write(0, &[1; 512]), OK);
}

#[test]
fn an_image_that_became_shorter_is_an_error_where_it_ends() {
    for engine in ENGINES {
        let file = image();
        let mut running = Running::open(&with_engine(&file, engine));
        file.as_file().set_len(MIB).unwrap();
        assert_eq!(running.read(2047, 512).0, OK);
        assert_eq!(running.read(2047, 1024).0, IO_ERROR, "{engine:?}");
        assert_eq!(running.read(4096, 512).0, IO_ERROR);
    }
}

#[test]
fn direct_requests_work_from_any_memory() {
    for engine in ENGINES {
        let file = image();
        file.as_file().sync_all().unwrap();
        let mut running = Running::open(&DiskSpec {
            direct: true,
            ..with_engine(&file, engine)
        });
        let block = running.disk.image.block();
        let sectors = u64::from(block / 512);
        // Aligned, and as crooked as can be; longer than the buffer between.
        for (address, len) in [
            (32 * MIB, 64 << 10),
            (32 * MIB + 1, block),
            (32 * MIB + 4, 1 << 20),
            (32 * MIB - 3, (1 << 20) + block),
        ] {
            let pieces = [
                header(0, 8 * sectors),
                Piece::Raw(address, len, 3, 2),
                status(),
            ];
            running = Running::new(running.disk);
            let (status_byte, written, sent) = running.request(&pieces);
            assert_eq!((status_byte, written), (OK, len + 1), "{engine:?}");
            let expected = file_bytes(&file, 8 * u64::from(block), len as usize);
            assert_eq!(running.driver.bytes(sent.buffers[1]), expected);
        }
        let pieces = [
            header(1, 0),
            Piece::Raw(32 * MIB + 5, block, 1, 2),
            status(),
        ];
        running = Running::new(running.disk);
        let bytes = vec![0x3c; block as usize];
        let at = vm_memory::GuestAddress(32 * MIB + 5);
        vm_memory::Bytes::write_slice(running.driver.memory(), &bytes, at).unwrap();
        assert_eq!(running.request(&pieces).0, OK);
        assert_eq!(file_bytes(&file, 0, bytes.len()), bytes);
        assert_eq!(running.flush(), OK);
    }
}

#[test]
fn an_image_in_memory_is_served_at_once() {
    let memfd = crate::memory::mapping::memfd(4 * MIB, None).unwrap();
    fill(&memfd);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd));
    let mut running = Running::open(&DiskSpec::new("d", path));
    assert_eq!(running.write(9, &[4; 512]), OK);
    assert_eq!(running.read(9, 512).2, [4; 512]);
    assert_eq!(running.range(11, 0, 8, 0), OK);
    assert_eq!(running.flush(), OK);
    assert_eq!(running.counter("done_at_once"), 4);
}

#[test]
fn reads_of_what_is_cached_need_no_ring() {
    let file = image();
    let mut running = Running::open(&spec(&file));
    for sector in 0..64 {
        assert_eq!(running.read(sector * 8, 4096).0, OK);
    }
    assert_eq!(running.counter("done_at_once"), 64);
}

#[test]
fn each_queue_is_served() {
    let file = image();
    let disk = Disk::open(&DiskSpec {
        num_queues: 4,
        ..spec(&file)
    })
    .unwrap();
    let mut driver = Driver::new(&disk);
    driver.start(&disk, FLUSH).unwrap();
    for (queue, sector) in (0..4).zip(10..) {
        let pieces = [header(0, sector), Piece::Writable(512), status()];
        let sent = driver.send(queue, &pieces);
        assert_eq!(driver.used(queue), (sent.head, 513));
        assert_eq!(sector_number(&driver.bytes(sent.buffers[1])), sector);
    }
}

#[test]
fn a_reset_waits_for_what_is_in_flight_and_the_disk_serves_again() {
    for engine in ENGINES {
        let file = image();
        let mut disk = Disk::open(&with_engine(&file, engine)).unwrap();
        for round in 0..30 {
            let mut running = Running::new(disk);
            let sent: Vec<_> = (0..30)
                .map(|n| {
                    let bytes = vec![round; 4096];
                    let pieces = [header(1, n * 8), readable(&bytes), status()];
                    running.driver.send(0, &pieces)
                })
                .collect();
            running.driver.stop();
            // Whatever was taken was answered, and nothing comes after the reset.
            let answered = std::iter::from_fn(|| running.driver.used_now(0)).count();
            let done = sent.iter().take(answered);
            for sent in done {
                assert_eq!(running.driver.bytes(sent.buffers[2]), [OK]);
            }
            disk = running.disk;
        }
        let counters = disk.counters();
        let writes = counters.iter().find(|it| it.0 == "write_ops").unwrap().1;
        assert!(writes <= 900);
    }
}

#[test]
fn everything_available_is_served_without_threads() {
    let file = image();
    let disk = Disk::open(&with_engine(&file, EngineChoice::Sync)).unwrap();
    let mut driver = Driver::new(&disk);
    let mut worker = disk.workers(driver.activation(FLUSH)).unwrap().remove(0);
    for n in 0..30 {
        driver.offer(0, &[header(0, n), Piece::Writable(512), status()]);
    }
    assert!(!worker.process_queue());
    assert_eq!(std::iter::from_fn(|| driver.used_now(0)).count(), 30);
    assert_eq!(driver.interrupts(0), 1);
}

#[test]
fn a_ring_that_makes_no_sense_asks_for_a_reset_once() {
    let file = image();
    let disk = Disk::open(&spec(&file)).unwrap();
    let driver = Driver::new(&disk);
    let mut worker = disk.workers(driver.activation(FLUSH)).unwrap().remove(0);
    driver.set_available_index(0, 0x4000);
    assert!(!worker.process_queue());
    assert!(!worker.process_queue());
    assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 1);
}

#[test]
fn a_driver_that_turns_the_ring_for_ever_does_not_keep_the_thread() {
    let file = image();
    let disk = Disk::open(&with_engine(&file, EngineChoice::Sync)).unwrap();
    let mut driver = Driver::new(&disk);
    let sent = driver.offer(0, &[header(0, 0), Piece::Writable(512), status()]);
    let mut worker = disk.workers(driver.activation(FLUSH)).unwrap().remove(0);
    let mut available = 1u16;
    // The same chain again and again, as many as the ring can say.
    for _ in 0..10 {
        worker.process_queue();
        available = available.wrapping_add(64);
        driver.set_available_index(0, available);
    }
    worker.process_queue();
    assert_eq!(driver.said.resets_needed.load(Ordering::SeqCst), 0);
    assert!(driver.used_now(0).is_some_and(|used| used.0 == sent.head));
}
