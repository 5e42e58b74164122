//! A driver that writes rings by itself, good and hostile, and the workers' entry as the vhost crate calls it.

use virtio_bindings::virtio_blk as spec;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::disk::testing::MemoryDisk;

const MEMORY: usize = 1 << 20;
const SIZE: u16 = 64;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const DATA: u64 = 0x10000;
const DISK: usize = 64 << 10;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Driver {
    disk: Arc<MemoryDisk>,
    backend: Backend,
    memory: GuestMemoryMmap,
    vring: VringMutex,
    asked: u16,
}

/// Address, length, flags without NEXT.
type Piece = (u64, u32, u16);

impl Driver {
    fn new(disk: MemoryDisk) -> Self {
        let disk = Arc::new(disk);
        let backend = Backend::new(disk.clone(), 1, Arc::default());
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let shared = GuestMemoryAtomic::new(memory.clone());
        backend.update_memory(shared.clone()).unwrap();
        backend.acked_features(u64::MAX);
        let vring = VringMutex::new(shared, space::MOST_QUEUE_SIZE).unwrap();
        vring.set_queue_size(SIZE);
        vring.set_queue_info(TABLE, AVAILABLE, USED).unwrap();
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        Self {
            disk,
            backend,
            memory,
            vring,
            asked: 0,
        }
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn header(&self, kind: u32, sector: u64) -> Piece {
        self.put(HEADER, kind);
        self.put(HEADER + 4, 0u32);
        self.put(HEADER + 8, sector);
        (HEADER, 16, 0)
    }

    /// Makes a chain available, from descriptor 0 on.
    fn offer(&mut self, pieces: &[Piece]) {
        for (place, (address, len, flags)) in (0u16..).zip(pieces) {
            let at = TABLE + 16 * u64::from(place);
            let more = if usize::from(place) + 1 < pieces.len() {
                NEXT
            } else {
                0
            };
            self.put(at, *address);
            self.put(at + 8, *len);
            self.put(at + 12, flags | more);
            self.put(at + 14, place + 1);
        }
        self.offer_head(0);
    }

    fn offer_head(&mut self, head: u16) {
        let place = u64::from(self.asked % SIZE);
        self.put(AVAILABLE + 4 + 2 * place, head);
        self.asked = self.asked.wrapping_add(1);
        self.put(AVAILABLE + 2, self.asked);
    }

    fn kick(&self) {
        self.put(STATUS, 0xffu8);
        let vrings = [self.vring.clone()];
        let handled = self.backend.handle_event(0, EventSet::IN, &vrings, 0);
        handled.unwrap();
    }

    /// How many chains have come back, and what the last one says was written.
    fn used(&self) -> (u16, u32) {
        let index: u16 = self.get(USED + 2);
        let place = u64::from(index.wrapping_sub(1) % SIZE);
        (index, self.get(USED + 4 + 8 * place + 4))
    }

    /// One chain, which comes back: status and length.
    fn serve(&mut self, pieces: &[Piece]) -> (u8, u32) {
        self.offer(pieces);
        self.kick();
        let (index, len) = self.used();
        assert_eq!(index, self.asked, "it comes back");
        (self.get(STATUS), len)
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        let header = self.header(spec::VIRTIO_BLK_T_OUT, sector);
        let len = u32::try_from(bytes.len()).unwrap();
        let (status, _) = self.serve(&[header, (DATA, len, 0), STATUS_PIECE]);
        status
    }

    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.put(DATA, sector);
        self.put(DATA + 8, sectors);
        self.put(DATA + 12, flags);
        let header = self.header(kind, 0);
        self.serve(&[header, (DATA, 16, 0), STATUS_PIECE]).0
    }

    fn log(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.disk.log.lock().unwrap())
    }

    fn is_untouched(&self) -> bool {
        self.disk
            .bytes
            .lock()
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    }
}

const STATUS_PIECE: Piece = (STATUS, 1, WRITE);
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

#[test]
fn what_is_written_is_read_back() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    let bytes: Vec<u8> = (0..3072u32).map(|n| n.to_le_bytes()[0] | 1).collect();
    assert_eq!(driver.write(3, &bytes), OK);
    assert_eq!(driver.disk.bytes.lock().unwrap()[1536..4608], bytes);
    let header = driver.header(spec::VIRTIO_BLK_T_IN, 3);
    // In pieces that no boundary suits, and the status at the end of one.
    let pieces = [
        header,
        (DATA + 0x8000, 3, WRITE),
        (DATA + 0x8003, 1021, WRITE),
        (DATA + 0x8400, 2049, WRITE),
    ];
    driver.put(DATA + 0x8c00, 0xffu8);
    driver.offer(&pieces);
    driver.kick();
    assert_eq!(driver.used(), (2, 3073));
    let mut read = vec![0; 3072];
    let at = GuestAddress(DATA + 0x8000);
    driver.memory.read_slice(&mut read, at).unwrap();
    assert_eq!(read, bytes);
    assert_eq!(driver.get::<u8>(DATA + 0x8c00), OK);
    assert_eq!(driver.log(), ["write", "write", "write"], "by the chunk");
}

#[test]
fn a_header_may_come_in_pieces_and_with_the_data() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    driver.header(spec::VIRTIO_BLK_T_OUT, 1);
    driver.put(HEADER + 16, [7u8; 16]);
    driver
        .memory
        .write_slice(&[7; 496], GuestAddress(DATA))
        .unwrap();
    let pieces = [
        (HEADER, 5, 0),
        (HEADER + 5, 27, 0),
        (DATA, 496, 0),
        STATUS_PIECE,
    ];
    assert_eq!(driver.serve(&pieces), (OK, 1));
    assert_eq!(driver.disk.bytes.lock().unwrap()[512..1024], [7; 512]);
}

#[test]
fn the_rest_of_what_a_disk_does() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    assert_eq!(driver.write(8, &[5; 1024]), OK);
    let header = driver.header(spec::VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(driver.serve(&[header, STATUS_PIECE]), (OK, 1));
    assert_eq!(driver.range(spec::VIRTIO_BLK_T_DISCARD, 8, 1, 0), OK);
    assert_eq!(driver.range(spec::VIRTIO_BLK_T_WRITE_ZEROES, 9, 1, 1), OK);
    assert_eq!(driver.log(), ["write", "flush", "discard", "zero"]);
    let bytes = driver.disk.bytes.lock().unwrap()[4096..5120].to_vec();
    assert_eq!(bytes, [[5; 512], [0; 512]].concat());

    let header = driver.header(spec::VIRTIO_BLK_T_GET_ID, 0);
    assert_eq!(
        driver.serve(&[header, (DATA, 20, WRITE), STATUS_PIECE]),
        (OK, 21)
    );
    let mut id = [0; 20];
    driver
        .memory
        .read_slice(&mut id, GuestAddress(DATA))
        .unwrap();
    assert!(id.starts_with(b"in memory\0"));
    // No data is no error.
    let header = driver.header(spec::VIRTIO_BLK_T_IN, 3);
    assert_eq!(driver.serve(&[header, STATUS_PIECE]), (OK, 1));
}

#[test]
fn without_flushes_every_change_is_durable() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    driver.backend.acked_features(0);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    assert_eq!(driver.range(spec::VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), OK);
    assert_eq!(driver.log(), ["write", "flush", "zero", "flush"]);
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let last = DISK as u64 / 512 - 1;
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    assert_eq!(driver.write(last, &[1; 512]), OK);
    driver.disk.bytes.lock().unwrap().fill(0);
    driver.log();
    for sector in [last, last + 1, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
        assert_eq!(driver.write(sector, &[1; 1024]), IO_ERROR, "{sector:#x}");
        let header = driver.header(spec::VIRTIO_BLK_T_IN, sector);
        let read = driver.serve(&[header, (DATA, 1024, WRITE), STATUS_PIECE]);
        assert_eq!(read, (IO_ERROR, 0), "{sector:#x}");
        for kind in [spec::VIRTIO_BLK_T_DISCARD, spec::VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(driver.range(kind, sector, 2, 0), IO_ERROR, "{sector:#x}");
        }
    }
    assert_eq!(driver.write(0, &[1; 511]), IO_ERROR, "no whole sector");
    for (sectors, flags, expected) in [
        (u32::MAX, 0, IO_ERROR),
        (crate::request::MOST_RANGE_SECTORS + 1, 0, IO_ERROR),
        (1, 2, UNSUPPORTED),
        (1, u32::MAX, UNSUPPORTED),
    ] {
        let kind = spec::VIRTIO_BLK_T_WRITE_ZEROES;
        assert_eq!(driver.range(kind, 0, sectors, flags), expected);
    }
    assert_eq!(
        driver.range(spec::VIRTIO_BLK_T_DISCARD, 0, 1, 1),
        UNSUPPORTED
    );
    for kind in [spec::VIRTIO_BLK_T_SCSI_CMD, 12, u32::MAX] {
        let header = driver.header(kind, 0);
        assert_eq!(driver.serve(&[header, STATUS_PIECE]), (UNSUPPORTED, 1));
    }
    assert!(driver.is_untouched() && driver.log().is_empty());
}

#[test]
fn a_disk_that_is_only_read_is_not_changed() {
    let mut driver = Driver::new(MemoryDisk::new(DISK).read_only());
    assert_eq!(driver.write(0, &[1; 512]), IO_ERROR);
    for kind in [spec::VIRTIO_BLK_T_DISCARD, spec::VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(driver.range(kind, 0, 1, 0), IO_ERROR);
    }
    let header = driver.header(spec::VIRTIO_BLK_T_IN, 0);
    assert_eq!(
        driver.serve(&[header, (DATA, 512, WRITE), STATUS_PIECE]),
        (OK, 513)
    );
    assert!(driver.is_untouched() && driver.log().is_empty());
}

#[test]
fn a_disk_that_fails_is_an_error_to_the_guest() {
    let mut disk = MemoryDisk::new(DISK);
    disk.fails = true;
    let mut driver = Driver::new(disk);
    assert_eq!(driver.write(0, &[1; 512]), IO_ERROR);
    let header = driver.header(spec::VIRTIO_BLK_T_IN, 0);
    let read = driver.serve(&[header, (DATA, 512, WRITE), STATUS_PIECE]);
    assert_eq!(read, (IO_ERROR, 0));
    let header = driver.header(spec::VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(driver.serve(&[header, STATUS_PIECE]), (IO_ERROR, 1));
}

#[test]
fn chains_that_make_no_sense_come_back_and_do_nothing() {
    let end = MEMORY as u64;
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    driver
        .memory
        .write_slice(&[1; 4096], GuestAddress(DATA))
        .unwrap();
    let header = driver.header(spec::VIRTIO_BLK_T_OUT, 0);
    let with_answer: &[&[Piece]] = &[
        // Data that is not memory, in part or at all, or wraps round.
        &[header, (end - 256, 512, 0), STATUS_PIECE],
        &[header, (end, 512, 0), STATUS_PIECE],
        &[header, (u64::MAX - 255, 512, 0), STATUS_PIECE],
        &[header, (DATA, 512, 0), (1 << 40, 512, 0), STATUS_PIECE],
        &[header, (DATA, 4096, 0), (1 << 40, 512, 0), STATUS_PIECE],
        // More than a request may have.
        &[header, (DATA, (64 << 20) + 512, 0), STATUS_PIECE],
        // Too short a header, none, or one that is not memory.
        &[(HEADER, 15, 0), STATUS_PIECE],
        &[STATUS_PIECE],
        &[(end - 8, 16, 0), STATUS_PIECE],
        // What can be read after what can be written.
        &[header, STATUS_PIECE, (DATA, 512, 0)],
    ];
    for pieces in with_answer {
        assert_eq!(driver.serve(pieces).0, IO_ERROR, "{pieces:x?}");
    }
    let without_answer: &[&[Piece]] = &[
        &[header, (DATA, 512, 0)],
        // More than a chain may have: it can't be read to its end.
        &[
            header,
            (DATA, u32::MAX, 0),
            (DATA, u32::MAX, 0),
            STATUS_PIECE,
        ],
        &[header, (DATA, 512, 0), (end, 1, WRITE)],
        &[header, (DATA, 512, 0), (u64::MAX, 2, WRITE)],
        &[header, (DATA, 512, 0), (STATUS, 0, WRITE)],
    ];
    for pieces in without_answer {
        let (status, len) = driver.serve(pieces);
        assert_eq!((status, len), (0xff, 0), "{pieces:x?}");
    }
    assert!(driver.is_untouched());
    // And it goes on.
    assert_eq!(driver.write(0, &[1; 512]), OK);
}

#[test]
fn a_chain_that_loops_comes_back() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    let header = driver.header(spec::VIRTIO_BLK_T_OUT, 0);
    driver.offer(&[header, (DATA, 512, 0), STATUS_PIECE]);
    // The second descriptor is followed by itself.
    driver.put(TABLE + 16 + 14, 1u16);
    driver.kick();
    assert_eq!(driver.used(), (1, 0));
    assert!(driver.is_untouched());
}

#[test]
fn rings_that_make_no_sense_are_left_alone() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    // More than the ring has room for.
    driver.put(AVAILABLE + 2, SIZE + 1);
    driver.kick();
    driver.kick();
    assert_eq!(driver.used().0, 0);
    // A descriptor that is none.
    driver.offer_head(SIZE);
    driver.kick();
    // And it goes on with a driver that begins anew.
    driver.vring.set_queue_next_avail(0);
    driver.vring.set_queue_next_used(0);
    driver.asked = 0;
    driver.put(USED + 2, 0u16);
    assert_eq!(driver.write(0, &[1; 512]), OK);
}

#[test]
fn a_ring_that_is_off_is_not_served() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    let header = driver.header(spec::VIRTIO_BLK_T_FLUSH, 0);
    driver.offer(&[header, STATUS_PIECE]);
    driver.vring.set_enabled(false);
    driver.kick();
    driver.vring.set_enabled(true);
    driver.vring.set_queue_ready(false);
    driver.kick();
    assert_eq!(driver.used().0, 0);
    driver.vring.set_queue_ready(true);
    driver.kick();
    assert_eq!(driver.used().0, 1);
    driver.backend.stop();
    driver.offer(&[header, STATUS_PIECE]);
    driver.kick();
    assert_eq!(driver.used().0, 1, "nothing is taken after the stop");
}

#[test]
fn more_than_a_batch_is_served_at_one_kick() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    let header = driver.header(spec::VIRTIO_BLK_T_FLUSH, 0);
    driver.offer(&[header, STATUS_PIECE]);
    for _ in 1..SIZE {
        driver.offer_head(0);
    }
    driver.kick();
    assert_eq!(driver.used().0, SIZE);
    assert_eq!(driver.log().len(), usize::from(SIZE));
}

#[test]
fn memory_that_is_not_shared_any_more_is_not_touched() {
    let mut driver = Driver::new(MemoryDisk::new(DISK));
    let none = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    driver.backend.update_memory(none).unwrap();
    let header = driver.header(spec::VIRTIO_BLK_T_FLUSH, 0);
    driver.offer(&[header, STATUS_PIECE]);
    driver.kick();
    assert_eq!(driver.used().0, 0);
    let back = GuestMemoryAtomic::new(driver.memory.clone());
    driver.backend.update_memory(back).unwrap();
    driver.kick();
    assert_eq!(driver.used().0, 1);
}
