//! A network whose backend moves frames: what the guest transmits in a pair of queues comes back in the same pair.

use std::fs::File;
use std::io::{Read, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::classes::{CTRL_VQ, MQ, several_pairs};
use super::*;
use crate::memory::layout::Gpa;
use crate::memory::mapping::{HostMapping, Source, memfd};
use crate::memory::region::{Mapping, Region};
use crate::memory::snapshot::Snapshot;
use crate::virtio::testing::Piece;

const FEATURES: u64 = 1 << 32 | CTRL_VQ | MQ;
const PAIRS: u16 = 2;
const CONTROL: usize = 4;
const OK: u8 = 0;
const REFUSED: u8 = 1;

/// As DPDK has it: the number it says is of pairs, and it offers a control queue that it does not serve.
fn manners() -> Manners {
    Manners {
        features: FEATURES | 1 << 30,
        protocol: PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_MEM_SLOTS,
        queues: PAIRS.into(),
        ..Manners::default()
    }
}

/// One of a backend's rings, as it was told of it.
struct Served {
    queue: Queue,
    kick: Arc<File>,
    call: Arc<File>,
}

impl Served {
    /// Rung within a time that is enough.
    fn await_kick(&self) {
        let mut fds = [PollFd::new(self.kick.as_ref(), PollFlags::IN)];
        let at_most = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut fds, Some(&at_most)).unwrap(), 1, "no bell");
        let mut count = [0; 8];
        self.kick.as_ref().read_exact(&mut count).unwrap();
    }

    fn ring_back(&self) {
        self.call.as_ref().write_all(&1u64.to_ne_bytes()).unwrap();
    }
}

/// What a backend makes of the messages.
struct Echo {
    memory: GuestMemoryMmap,
    rings: Vec<Served>,
}

impl Echo {
    fn of(fake: &Fake) -> Self {
        let (_, body, file) = fake.kept(ADD_MEM_REG).pop().unwrap();
        let [_, gpa, size, user, offset] = numbers(&body)[..] else {
            panic!("a region has five numbers");
        };
        let file = FileOffset::from_arc(file, offset);
        let range = (GuestAddress(gpa), size.try_into().unwrap(), Some(file));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let ring = |index: u16| {
            let is_meant = |body: &[u8]| body[..4] == u32::from(index).to_le_bytes();
            let told = |kind| {
                let bodies = fake.bodies(kind);
                let body = bodies.into_iter().rfind(|body| is_meant(body)).unwrap();
                numbers(&body)
            };
            let bell = |kind| {
                let mut kept = fake.kept(kind).into_iter();
                kept.rfind(|(_, body, _)| is_meant(body)).unwrap().2
            };
            let size = u16::try_from(told(SET_VRING_NUM)[0] >> 32).unwrap();
            let base = u16::try_from(told(SET_VRING_BASE)[0] >> 32).unwrap();
            let place = |address: u64| GuestAddress(address - user + gpa);
            let addresses = told(SET_VRING_ADDR);
            let mut queue = Queue::new(size).unwrap();
            queue
                .try_set_desc_table_address(place(addresses[1]))
                .unwrap();
            queue
                .try_set_used_ring_address(place(addresses[2]))
                .unwrap();
            queue
                .try_set_avail_ring_address(place(addresses[3]))
                .unwrap();
            queue.set_next_avail(base);
            queue.set_next_used(base);
            queue.set_ready(true);
            Served {
                queue,
                kick: bell(SET_VRING_KICK),
                call: bell(SET_VRING_CALL),
            }
        };
        let rings = (0..PAIRS * net::QUEUES).map(ring).collect();
        Self { memory, rings }
    }

    /// When the guest has rung: everything that it has transmitted in this pair, put into what it has there to receive.
    fn serve(&mut self, pair: usize) {
        let Self { memory, rings } = self;
        let [rx, tx] = &mut rings[pair * 2..][..2] else {
            panic!("two rings make a pair");
        };
        tx.await_kick();
        while let Some(sent) = tx.queue.pop_descriptor_chain(&*memory) {
            let mut frame = Vec::new();
            for piece in sent.clone().readable() {
                let mut bytes = vec![0; piece.len() as usize];
                memory.read_slice(&mut bytes, piece.addr()).unwrap();
                frame.extend(bytes);
            }
            tx.queue.add_used(memory, sent.head_index(), 0).unwrap();
            let room = rx.queue.pop_descriptor_chain(&*memory).unwrap();
            let place = room.clone().writable().next().unwrap();
            assert!(frame.len() <= place.len() as usize, "one buffer for each");
            memory.write_slice(&frame, place.addr()).unwrap();
            let len = frame.len().try_into().unwrap();
            rx.queue.add_used(memory, room.head_index(), len).unwrap();
        }
        tx.ring_back();
        rx.ring_back();
    }
}

fn frame(seed: u8) -> Vec<u8> {
    (0..60 + usize::from(seed))
        .map(|at| u8::try_from(at % 251).unwrap() ^ seed)
        .collect()
}

/// Frames go out and come back in a pair of queues.
fn talk(driver: &mut Driver, echo: &mut Echo, pair: usize, seed: u8) {
    let (rx, tx) = (pair * 2, pair * 2 + 1);
    let frames = [frame(seed), frame(seed + 1)];
    let rooms: Vec<_> = (0..2)
        .map(|_| driver.offer(rx, &[Piece::Writable(512)]))
        .collect();
    for frame in &frames {
        driver.offer(tx, &[Piece::Readable(frame.clone())]);
    }
    driver.ring(tx);
    echo.serve(pair);
    for (room, frame) in rooms.iter().zip(&frames) {
        let (head, len) = driver.used(rx);
        assert_eq!(
            (head, len as usize),
            (room.head, frame.len()),
            "pair {pair}"
        );
        assert_eq!(
            driver.bytes((room.buffers[0].0, len)),
            *frame,
            "pair {pair}"
        );
        driver.used(tx);
    }
}

/// What the driver is answered.
fn order(driver: &mut Driver, queue: usize, order: &[u8]) -> u8 {
    let words = [Piece::Readable(order.to_vec()), Piece::Writable(1)];
    let sent = driver.send(queue, &words);
    assert_eq!(driver.used(queue), (sent.head, 1));
    driver.bytes(sent.buffers[1])[0]
}

fn use_pairs(driver: &mut Driver, pairs: u16) -> u8 {
    let [low, high] = pairs.to_le_bytes();
    order(driver, CONTROL, &[4, 0, low, high])
}

/// Queues that were told to be in use, or not, since the last `before` times.
fn told_used(fake: &Fake, before: usize) -> Vec<(u64, bool)> {
    let told = fake.bodies(SET_VRING_ENABLE).split_off(before);
    let number = |body: &Vec<u8>| numbers(body)[0];
    let of = |body: &Vec<u8>| (number(body) & 0xffff_ffff, number(body) >> 32 == 1);
    told.iter().map(of).collect()
}

/// Memory of a guest that a backend can map as well.
fn shared_memory() -> (Region, SharedRegion) {
    let file = Arc::new(memfd(MEMORY, None).unwrap());
    let source = Source::File {
        file: Arc::clone(&file),
        offset: 0,
        shared: true,
    };
    let mapping = Mapping::Host(HostMapping::new(source, MEMORY, 4096).unwrap());
    let ours = Region::new("z0", Gpa(0), mapping).map_err(|(_, error)| error);
    let theirs = SharedRegion {
        file,
        ..region(0, MEMORY, 0)
    };
    (ours.unwrap(), theirs)
}

#[test]
fn frames_go_through_the_pairs_that_the_driver_uses() {
    let mut fake = Fake::new();
    fake.serve(manners());
    let (class, shape) = several_pairs(PAIRS);
    let (backend, _) = open_as(&fake, class, shape).unwrap();
    let (memory, theirs) = shared_memory();
    backend.attach(vec![theirs]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    let view = Snapshot::new().with(memory.guest_region()).unwrap();
    let mut driver = Driver::with_memory(&device, view);
    driver.start(&device, FEATURES).unwrap();
    until("one pair is in use", || told_used(&fake, 0).len() == 2);
    assert_eq!(told_used(&fake, 0), [(0, true), (1, true)]);
    assert_eq!(fake.kept(SET_VRING_KICK).len(), 4, "not the control queue");
    let mut echo = Echo::of(&fake);
    talk(&mut driver, &mut echo, 0, 1);
    // Answered when the backend has it.
    assert_eq!(use_pairs(&mut driver, 2), OK);
    assert_eq!(told_used(&fake, 2), [(2, true), (3, true)]);
    talk(&mut driver, &mut echo, 1, 10);
    talk(&mut driver, &mut echo, 0, 20);
    for wrong in [
        &[4, 0, 3, 0][..],
        &[4, 0, 0, 0],
        &[4, 0, 1],
        &[0, 0, 1],
        &[5, 0],
        &[4],
    ] {
        assert_eq!(order(&mut driver, CONTROL, wrong), REFUSED, "{wrong:?}");
    }
    assert_eq!(use_pairs(&mut driver, 1), OK);
    assert_eq!(told_used(&fake, 4), [(2, false), (3, false)]);
    talk(&mut driver, &mut echo, 0, 30);
    // What is ordered while nobody is there is what the next one is told.
    fake.die();
    until("it is missed", || backend.status().lost.is_some());
    assert_eq!(use_pairs(&mut driver, 2), OK);
    fake.serve(manners());
    until("it is served on", || backend.status().lost.is_none());
    let all = [(0, true), (1, true), (2, true), (3, true)];
    assert_eq!(told_used(&fake, 0), all);
    let mut echo = Echo::of(&fake);
    talk(&mut driver, &mut echo, 1, 40);
    talk(&mut driver, &mut echo, 0, 50);
    driver.stop();
    assert_eq!(fake.bodies(GET_VRING_BASE).len(), 4);
    backend.close();
    drop((driver, device, echo));
    memory.release().unwrap();
}

#[test]
fn a_driver_of_one_pair_has_its_control_queue_after_that() {
    let mut fake = Fake::new();
    fake.serve(manners());
    let (class, shape) = several_pairs(PAIRS);
    let (backend, _) = open_as(&fake, class, shape).unwrap();
    backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    let mut driver = Driver::new(&device);
    driver.start(&device, 1 << 32 | CTRL_VQ).unwrap();
    until("the pair is in use", || told_used(&fake, 0).len() == 2);
    assert_eq!(fake.kept(SET_VRING_KICK).len(), 2);
    assert_eq!(order(&mut driver, 2, &[4, 0, 1, 0]), REFUSED, "no MQ");
    driver.stop();
    backend.close();
}
