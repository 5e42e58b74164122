//! Backends that lend memory: as they should, and as they should not.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;
use crate::memory::layout::Gpa;
use crate::virtio::testing::{Piece, Sent};
use crate::virtio::vhost_user::pmem::{self, LentPmem, PMEM};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;
const NEED_REPLY: u32 = 9;
const MAP: u32 = 9;
const UNMAP: u32 = 10;

fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].map(u32::to_le_bytes).concat()
}

/// Region; then offset in the file, offset in the region, length, flags.
fn request(kind: u32, shmid: u64, [file, at, len, flags]: [u64; 4]) -> Vec<u8> {
    let body = [shmid, file, at, len, flags].map(u64::to_le_bytes);
    [header(kind, NEED_REPLY, 40), body.concat()].concat()
}

fn whole() -> Vec<u8> {
    request(MAP, 0, [2 * MIB, 0, SIZE, 1])
}

fn file() -> Arc<File> {
    Arc::new(tempfile::tempfile().unwrap())
}

fn lending(bytes: Vec<u8>, file: Option<Arc<File>>) -> Manners {
    Manners {
        features: 1 << 32 | 1 << 30 | 1,
        protocol: ALL_PROTOCOL | LENDING,
        shared: SIZE,
        asks: Some((bytes, file)),
        ..Manners::default()
    }
}

fn borrow(fake: &Fake) -> Result<Arc<Backend>, OpenError> {
    open_as(fake, PMEM, pmem::shape()).map(|(backend, _)| backend)
}

fn borrowed(manners: Manners) -> (Fake, Arc<Backend>) {
    let mut fake = Fake::new();
    fake.serve(manners);
    let backend = borrow(&fake).unwrap();
    (fake, backend)
}

/// What the backend is answered.
fn answer(mut channel: &UnixStream) -> (u32, u64) {
    let mut bytes = [0; 20];
    channel.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[4..12], [5, 0, 0, 0, 8, 0, 0, 0]);
    let value = u64::from_le_bytes(bytes[12..].try_into().unwrap());
    (u32::from(bytes[0]), value)
}

fn refusal(manners: Manners) -> String {
    let mut fake = Fake::new();
    fake.serve(manners);
    match borrow(&fake) {
        Ok(_) => panic!("a backend that lends nothing that can be had"),
        Err(error) => crate::chain(&error),
    }
}

#[test]
fn what_is_lent_is_answered_when_it_is_mapped_and_kept_when_the_backend_goes() {
    let lent = file();
    let (mut fake, backend) = borrowed(lending(whole(), Some(Arc::clone(&lent))));
    let loan = backend.take_loan().unwrap().unwrap();
    assert_eq!((loan.offset, loan.size), (2 * MIB, SIZE));
    let inode = |file: &File| file.metadata().unwrap().ino();
    assert_eq!(inode(&loan.file), inode(&lent));
    assert!(backend.take_loan().unwrap().is_none(), "once");
    let channel = fake.channel();
    channel.set_nonblocking(true).unwrap();
    (&channel).read_exact(&mut [0]).unwrap_err();
    channel.set_nonblocking(false).unwrap();
    backend.loan_is_mapped().unwrap();
    assert_eq!(answer(&channel), (MAP, 0));

    // The guest is told where this side has put it.
    let device = LentPmem::new(Arc::clone(&backend), Gpa(5 << 30), SIZE).unwrap();
    let mut space = [0xff; 16];
    device.config_read(0, &mut space);
    assert_eq!(space[..], [5 << 30, SIZE].map(u64::to_le_bytes).concat());
    assert_eq!((device.kind(), device.features()), (Kind::Pmem, 0));
    assert_eq!(device.queue_sizes(), [64]);

    // The next one lends the same: it is told so at once.
    fake.die();
    fake.serve(lending(whole(), Some(Arc::clone(&lent))));
    until("the next is found", || backend.status().connections == 2);
    assert_eq!(answer(&fake.channel()), (MAP, 0));
    assert!(backend.take_loan().unwrap().is_none(), "nothing new");

    // One that lends something else is told, and is none.
    for (asks, file) in [
        (whole(), file()),
        (request(MAP, 0, [0, 0, SIZE, 1]), Arc::clone(&lent)),
    ] {
        fake.die();
        fake.serve(lending(asks, Some(file)));
        until("it is said", || {
            let why = backend.status().lost.unwrap_or_default();
            why.contains("now lends other memory")
        });
    }
    fake.die();
    fake.serve(lending(whole(), Some(lent)));
    until("the right one is found", || backend.status().lost.is_none());
    device.sever();
    fake.die();
    fake.serve(lending(whole(), Some(file())));
    until("nothing is lent again", || {
        let why = backend.status().lost.unwrap_or_default();
        why.contains("was taken away from the guest")
    });
}

#[test]
fn what_can_t_be_the_devices_memory_is_refused_and_said() {
    for (numbers, shmid, expected) in [
        ([0, 0, SIZE, 1], 1, "region 1 mapped"),
        ([0, 2 * MIB, SIZE, 1], 0, "0x400000 bytes at 0x200000"),
        ([0, 0, 2 * SIZE, 1], 0, "0x800000 bytes at 0x0"),
        ([0, 0, 2 * MIB, 1], 0, "0x200000 bytes at 0x0"),
        ([0, 0, 0, 1], 0, "0x0 bytes at 0x0"),
        ([0, u64::MAX, SIZE, 1], 0, "0xffffffffffffffff"),
        ([0, 0, SIZE, 0], 0, "that is for writing, too"),
        ([0, 0, SIZE, 3], 0, "that is for writing, too"),
    ] {
        let said = refusal(lending(request(MAP, shmid, numbers), Some(file())));
        assert!(said.contains(expected), "{numbers:?}: {said}");
    }
    let said = refusal(Manners {
        shared: 0,
        ..lending(whole(), Some(file()))
    });
    assert!(said.contains("which is no memory"), "{said}");
}

#[test]
fn what_is_lent_for_reading_comes_by_a_descriptor_for_reading() {
    let named = tempfile::NamedTempFile::new().unwrap();
    let reader = Arc::new(File::open(named.path()).unwrap());
    let to_read = request(MAP, 0, [0, 0, SIZE, 0]);
    let (mut fake, backend) = borrowed(lending(to_read, Some(Arc::clone(&reader))));
    assert!(!backend.take_loan().unwrap().unwrap().writable);
    backend.loan_is_mapped().unwrap();
    // The next one lends the same to write.
    fake.die();
    let writer = File::options().read(true).write(true).open(named.path());
    let to_write = request(MAP, 0, [0, 0, SIZE, 1]);
    fake.serve(lending(to_write.clone(), Some(Arc::new(writer.unwrap()))));
    until("it is said", || {
        let why = backend.status().lost.unwrap_or_default();
        why.contains("now lends other memory")
    });
    let said = refusal(lending(to_write, Some(reader)));
    assert!(
        said.contains("for writing, by a descriptor that is for reading only"),
        "{said}"
    );
}

#[test]
fn a_backend_that_can_t_lend_or_talks_nonsense_is_none() {
    for (protocol, expected) in [
        (ALL_PROTOCOL, "VHOST_USER_PROTOCOL_F_SHMEM"),
        (
            ALL_PROTOCOL | PROTOCOL_SHMEM,
            "VHOST_USER_PROTOCOL_F_BACKEND_REQ",
        ),
        (PROTOCOL_CONFIG | LENDING, "VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    ] {
        let said = refusal(Manners {
            protocol,
            ..lending(whole(), Some(file()))
        });
        assert!(said.contains(expected), "{said}");
    }
    let half = whole()[..30].to_vec();
    for (bytes, file) in [
        // No file with it, one with what has none, too long, another version, an answer.
        (whole(), None),
        (request(UNMAP, 0, [0, 0, SIZE, 0]), Some(file())),
        (
            [header(MAP, NEED_REPLY, 41), vec![0; 41]].concat(),
            Some(file()),
        ),
        (header(MAP, NEED_REPLY, u32::MAX), Some(file())),
        (header(MAP, 2, 40), Some(file())),
        (header(MAP, 5, 8), None),
        (vec![0xff; 64], None),
        // Nothing, nothing whole, and nothing that is meant.
        (vec![], None),
        (half, Some(file())),
        (header(2, NEED_REPLY, 0), None),
    ] {
        let said = refusal(lending(bytes.clone(), file));
        assert!(said.contains("lends no memory"), "{bytes:?}: {said}");
    }
}

#[test]
fn memory_stays_whatever_its_backend_asks_for_later() {
    let mut fake = Fake::new();
    fake.serve(lending(whole(), Some(file())));
    let (backend, news) = open_as(&fake, PMEM, pmem::shape()).unwrap();
    drop(backend.take_loan().unwrap().unwrap());
    backend.loan_is_mapped().unwrap();
    let mut channel = fake.channel();
    assert_eq!(answer(&channel), (MAP, 0));
    let unmap = request(UNMAP, 0, [0, 0, SIZE, 0]);
    channel.write_all(&unmap).unwrap();
    assert_eq!(answer(&channel), (UNMAP, 1));
    let again = file();
    let sent = channel.send_with_fd(whole().as_slice(), again.as_raw_fd());
    sent.unwrap();
    assert_eq!(answer(&channel), (MAP, 1));
    channel.write_all(&header(2, NEED_REPLY, 0)).unwrap();
    assert_eq!(answer(&channel), (2, 1));
    assert_eq!(backend.status().lost, None);
    // Who owns the device hears of it: once, however often it is said.
    channel.write_all(&unmap).unwrap();
    assert_eq!(answer(&channel), (UNMAP, 1));
    assert_eq!(*news.lock().unwrap(), [Change::WantedBack]);
    // Nonsense is the end of that backend, and the next one is looked for.
    channel.write_all(&[0xff; 12]).unwrap();
    until("it is cut off", || backend.status().losses == 1);
    until("the next is found", || backend.status().lost.is_none());
    assert!(backend.take_loan().unwrap().is_none());
}

fn flush() -> [Piece; 2] {
    [Piece::Readable(vec![0; 4]), Piece::Writable(4)]
}

/// The response to the flush that was sent.
fn response(driver: &mut Driver, sent: &Sent) -> Vec<u8> {
    assert_eq!(driver.used(0), (sent.head, 4));
    driver.bytes(*sent.buffers.last().unwrap())
}

fn with_a_driver(manners: Manners) -> (Fake, Arc<Backend>, LentPmem, Driver) {
    let (fake, backend) = borrowed(manners);
    drop(backend.take_loan().unwrap().unwrap());
    backend.loan_is_mapped().unwrap();
    backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
    let device = LentPmem::new(Arc::clone(&backend), Gpa(5 << 30), SIZE).unwrap();
    let driver = Driver::new(&device);
    (fake, backend, device, driver)
}

const FAILED: [u8; 4] = [1, 0, 0, 0];

#[test]
fn flushes_of_memory_that_is_taken_away_are_answered_whatever_the_backend_does() {
    let good = lending(whole(), Some(file()));
    let misdeed = |misdeed| Manners {
        misdeed: Some((GET_VRING_BASE, misdeed)),
        ..good.clone()
    };
    for manners in [
        good.clone(),
        misdeed(Misdeed::Silence),
        misdeed(Misdeed::End),
    ] {
        let (mut fake, backend, device, mut driver) = with_a_driver(manners);
        driver.start(&device, 1 << 32).unwrap();
        fake.await_message(SET_VRING_ENABLE);
        // This backend never answers any.
        let sent = [driver.send(0, &flush()), driver.send(0, &flush())];
        device.sever();
        for sent in &sent {
            assert_eq!(response(&mut driver, sent), FAILED);
        }
        // The backend goes for good, and the guest goes on asking.
        backend.close();
        fake.die();
        let sent = driver.send(0, &flush());
        assert_eq!(response(&mut driver, &sent), FAILED);
        driver.stop();
        let mut driver = Driver::new(&device);
        driver.start(&device, 1 << 32).unwrap();
        let sent = driver.send(0, &flush());
        assert_eq!(response(&mut driver, &sent), FAILED);
        driver.stop();
    }
}

#[test]
fn a_backend_that_is_lost_when_the_memory_is_taken_away_is_not_waited_for() {
    let (mut fake, backend, device, mut driver) = with_a_driver(lending(whole(), Some(file())));
    driver.start(&device, 1 << 32).unwrap();
    fake.await_message(SET_VRING_ENABLE);
    fake.die();
    until("it is lost", || backend.status().lost.is_some());
    let sent = driver.send(0, &flush());
    device.sever();
    assert_eq!(response(&mut driver, &sent), FAILED);
    driver.stop();
}
