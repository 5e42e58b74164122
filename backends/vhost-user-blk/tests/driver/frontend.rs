//! A frontend and a driver in one: memory in files, split rings, requests one at a time or many at once.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk as spec;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

pub(crate) const OK: u8 = 0;
pub(crate) const IO_ERROR: u8 = 1;

const SIZE: u16 = 128;
/// What stays: rings and buffers.
const NEAR_LEN: usize = 16 << 20;
/// What comes and goes.
pub(crate) const FAR: u64 = 1 << 32;
const FAR_LEN: usize = 2 << 20;
const DATA: u64 = 8 << 20;
const FLUSH: u64 = 1 << spec::VIRTIO_BLK_F_FLUSH;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

/// Address, length, whether the device writes.
pub(crate) type Piece = (u64, u32, bool);

struct Queue {
    kick: EventFd,
    call: EventFd,
    asked: u16,
}

pub(crate) struct Driver {
    frontend: Frontend,
    near: GuestMemoryMmap,
    far: GuestMemoryMmap,
    far_file: File,
    features: u64,
    queues: Vec<Queue>,
}

fn memory(name: &str, at: u64, len: usize) -> (GuestMemoryMmap, File) {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len as u64).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let range = (GuestAddress(at), len, Some(offset));
    (
        GuestMemoryMmap::from_ranges_with_files([range]).unwrap(),
        file,
    )
}

fn info(memory: &GuestMemoryMmap) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo::from_guest_region(memory.iter().next().unwrap()).unwrap()
}

/// Where the rings of a queue are, and the header and status of its one request.
fn rings(queue: usize) -> u64 {
    (queue as u64 + 1) << 16
}

impl Driver {
    /// Connected, with this many queues set up and on.
    pub(crate) fn connect(socket: &Path, queues: usize) -> Self {
        let (near, _) = memory("guest-near", 0, NEAR_LEN);
        let (far, far_file) = memory("guest-far", FAR, FAR_LEN);
        let queue = || Queue {
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap(),
            asked: 0,
        };
        let mut driver = Self {
            frontend: Frontend::connect(socket, queues as u64).unwrap(),
            near,
            far,
            far_file,
            features: 0,
            queues: (0..queues).map(|_| queue()).collect(),
        };
        driver.set_up();
        driver
    }

    /// To another daemon, with the same memory and rings: from where the last one stopped.
    pub(crate) fn reconnect(&mut self, socket: &Path) {
        self.frontend = Frontend::connect(socket, self.queues.len() as u64).unwrap();
        self.set_up();
        for queue in &self.queues {
            queue.kick.write(1).unwrap();
        }
    }

    fn set_up(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        self.features = frontend.get_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        assert_eq!(frontend.get_protocol_features().unwrap(), wanted);
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(frontend.get_queue_num().unwrap() >= self.queues.len() as u64);
        let features = PROTOCOL_FEATURES | VERSION_1 | EVENT_IDX | FLUSH;
        assert_eq!(self.features & features, features);
        frontend.set_features(features).unwrap();
        frontend.set_mem_table(&[info(&self.near)]).unwrap();
        for (index, queue) in self.queues.iter().enumerate() {
            let base = rings(index);
            let host = |at: u64| self.near.get_host_address(GuestAddress(at)).unwrap() as u64;
            frontend.set_vring_num(index, SIZE).unwrap();
            let addresses = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: host(base),
                used_ring_addr: host(base + 0x4000),
                avail_ring_addr: host(base + 0x2000),
                log_addr: None,
            };
            frontend.set_vring_addr(index, &addresses).unwrap();
            let used: u16 = self.near.read_obj(GuestAddress(base + 0x4002)).unwrap();
            frontend.set_vring_base(index, used).unwrap();
            frontend.set_vring_call(index, &queue.call).unwrap();
            frontend.set_vring_kick(index, &queue.kick).unwrap();
            frontend.set_vring_enable(index, true).unwrap();
        }
    }

    pub(crate) fn offered(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    pub(crate) fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let room = vec![0; len as usize];
        let flags = VhostUserConfigFlags::empty();
        self.frontend
            .get_config(offset, len, flags, &room)
            .unwrap()
            .1
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.near.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// A request with header and status of its own, which are the queue's `nth`.
    fn offer(&mut self, queue: usize, nth: u16, kind: u32, sector: u64, pieces: &[Piece]) {
        let base = rings(queue);
        let own = base + 0x6000 + u64::from(nth) * 32;
        self.put(own, kind);
        self.put(own + 4, 0u32);
        self.put(own + 8, sector);
        self.put(own + 16, 0xffu8);
        let all = [&[(own, 16, false)], pieces, &[(own + 16, 1, true)]].concat();
        let first = nth * 3 % SIZE;
        for (place, (at, len, writes)) in all.iter().enumerate() {
            let index = first + u16::try_from(place).unwrap();
            let entry = base + u64::from(index) * 16;
            let more = u16::from(place + 1 < all.len());
            self.put(entry, *at);
            self.put(entry + 8, *len);
            self.put(entry + 12, more | (u16::from(*writes) << 1));
            self.put(entry + 14, index + 1);
        }
        let asked = self.queues[queue].asked;
        let available = base + 0x2000;
        self.put(available + 4 + 2 * u64::from(asked % SIZE), first);
        // An interrupt for the next that comes back.
        self.put(available + 4 + 2 * u64::from(SIZE), self.answered(queue));
        fence(Ordering::SeqCst);
        self.queues[queue].asked = asked.wrapping_add(1);
        self.put(available + 2, asked.wrapping_add(1));
        fence(Ordering::SeqCst);
    }

    /// Chains that have come back.
    pub(crate) fn answered(&self, queue: usize) -> u16 {
        fence(Ordering::SeqCst);
        self.near
            .read_obj(GuestAddress(rings(queue) + 0x4002))
            .unwrap()
    }

    /// Until all chains have come back. An interrupt that does not come is a failure.
    pub(crate) fn wait_for_all(&self, queue: usize) {
        let Queue { call, asked, .. } = &self.queues[queue];
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, call.as_raw_fd(), event)
            .unwrap();
        loop {
            let answered = self.answered(queue);
            // The interrupt is wanted for the next; it is looked again after that was said.
            self.put(rings(queue) + 0x2004 + 2 * u64::from(SIZE), answered);
            if self.answered(queue) != answered {
                continue;
            }
            if answered == *asked {
                return;
            }
            let ready = epoll.wait(20_000, &mut [event]).unwrap();
            assert!(ready > 0, "{answered} of {asked} have come back");
            let _ = call.read();
        }
    }

    /// One request with these pieces of data: its status.
    pub(crate) fn request(&mut self, queue: usize, kind: u32, sector: u64, pieces: &[Piece]) -> u8 {
        self.offer(queue, 0, kind, sector, pieces);
        self.queues[queue].kick.write(1).unwrap();
        self.wait_for_all(queue);
        let status = rings(queue) + 0x6010;
        self.near.read_obj(GuestAddress(status)).unwrap()
    }

    pub(crate) fn write(&mut self, queue: usize, sector: u64, bytes: &[u8]) -> u8 {
        self.near.write_slice(bytes, GuestAddress(DATA)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.request(queue, spec::VIRTIO_BLK_T_OUT, sector, &[(DATA, len, false)])
    }

    pub(crate) fn read(&mut self, queue: usize, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let mut bytes = vec![0xee; len as usize];
        self.near.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let status = self.request(queue, spec::VIRTIO_BLK_T_IN, sector, &[(DATA, len, true)]);
        self.near
            .read_slice(&mut bytes, GuestAddress(DATA))
            .unwrap();
        (status, bytes)
    }

    /// A discard or a write of zeroes.
    pub(crate) fn range(&mut self, queue: usize, kind: u32, sector: u64, sectors: u32) -> u8 {
        self.put(DATA, sector);
        self.put(DATA + 8, sectors);
        self.put(DATA + 12, 0u32);
        self.request(queue, kind, 0, &[(DATA, 16, false)])
    }

    pub(crate) fn flush(&mut self, queue: usize) -> u8 {
        self.request(queue, spec::VIRTIO_BLK_T_FLUSH, 0, &[])
    }

    /// Writes of these bytes, one behind the other, on the first queue: as many as it has room for, rung for and left.
    pub(crate) fn ask_many(&mut self, bytes: &[u8]) -> u16 {
        const MANY: u16 = 42;
        self.near.write_slice(bytes, GuestAddress(DATA)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        for nth in 0..MANY {
            let sector = u64::from(nth) * u64::from(len) / 512;
            self.offer(
                0,
                nth,
                spec::VIRTIO_BLK_T_OUT,
                sector,
                &[(DATA, len, false)],
            );
        }
        self.queues[0].kick.write(1).unwrap();
        MANY
    }

    pub(crate) fn share_far(&mut self) {
        self.frontend.add_mem_region(&info(&self.far)).unwrap();
    }

    pub(crate) fn take_far_back(&mut self) {
        self.frontend.remove_mem_region(&info(&self.far)).unwrap();
    }

    pub(crate) fn far_write(&self, at: u64, bytes: &[u8]) {
        self.far.write_slice(bytes, GuestAddress(FAR + at)).unwrap();
    }

    /// As memory goes that the host takes away. This process does not touch it any more.
    pub(crate) fn cut_far_off(&self) {
        self.far_file.set_len(0).unwrap();
    }
}
