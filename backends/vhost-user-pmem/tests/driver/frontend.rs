//! A frontend and a driver in one: memory in a file, a split ring, and the channel by which it is lent memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};

use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserMMap, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

pub(crate) const OK: u32 = 0;

const SIZE: u16 = 64;
const LEN: usize = 1 << 20;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x4000;
const REQUESTS: u64 = 0x6000;
/// Where what is lent is in the guest.
const LENT: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;

/// What a frontend knows of shared memory regions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    Nothing,
    ChannelOnly,
    Shmem,
}

/// Offset in the file, in the region, length, flags; and the file.
type Loan = ((u64, u64, u64, u64), File);

/// The frontend's answers.
#[derive(Default)]
struct Lent {
    loan: Mutex<Option<Loan>>,
    refuses: Mutex<bool>,
}

impl VhostUserFrontendReqHandler for Lent {
    fn shmem_map(&self, asked: &VhostUserMMap, fd: &dyn AsRawFd) -> HandlerResult<u64> {
        assert_eq!(asked.shmid, 0);
        if *self.refuses.lock().unwrap() {
            return Err(io::Error::other("asked for"));
        }
        // The same open file description; by its path it would be another.
        let file = File::from(dup(fd.as_raw_fd())?);
        let asked = (asked.fd_offset, asked.shm_offset, asked.len, asked.flags);
        *self.loan.lock().unwrap() = Some((asked, file));
        Ok(0)
    }
}

/// A descriptor of one's own, without `unsafe`.
fn dup(fd: i32) -> io::Result<std::os::fd::OwnedFd> {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(this, fd, PidfdGetfdFlags::empty())?)
}

pub(crate) struct Driver {
    frontend: Frontend,
    reach: Reach,
    memory: GuestMemoryMmap,
    lent: Arc<Lent>,
    channel: Option<FrontendReqHandler<Lent>>,
    kick: EventFd,
    call: EventFd,
    asked: u16,
}

fn memory() -> GuestMemoryMmap {
    let file = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(LEN as u64).unwrap();
    let range = (GuestAddress(0), LEN, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}

impl Driver {
    /// Connected; what it can do is said.
    pub(crate) fn connect(socket: &Path, reach: Reach) -> Self {
        let mut driver = Self {
            frontend: Frontend::connect(socket, 1).unwrap(),
            reach,
            memory: memory(),
            lent: Arc::default(),
            channel: None,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap(),
            asked: 0,
        };
        driver.shake_hands();
        driver
    }

    pub(crate) fn reconnect(&mut self, socket: &Path) {
        self.frontend = Frontend::connect(socket, 1).unwrap();
        self.lent = Arc::default();
        self.shake_hands();
    }

    fn shake_hands(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert_eq!(features & 1, 1, "the memory is a shared memory region");
        let all = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        let channel =
            VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::BACKEND_SEND_FD;
        let shmem = channel | VhostUserProtocolFeatures::SHMEM;
        let offered = frontend.get_protocol_features().unwrap();
        assert_eq!(offered, all | shmem);
        let wanted = match self.reach {
            Reach::Nothing => all,
            Reach::ChannelOnly => all | channel,
            Reach::Shmem => all | shmem,
        };
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if self.reach != Reach::Nothing {
            let mut channel = FrontendReqHandler::new(Arc::clone(&self.lent)).unwrap();
            channel.set_reply_ack_flag(true);
            let sent = frontend.set_backend_request_fd(&channel.get_tx_raw_fd());
            // One that can't be lent anything by it may have been let go of before the answer.
            assert!(sent.is_ok() || self.reach == Reach::ChannelOnly);
            self.channel = Some(channel);
        }
    }

    /// Answers the daemon's request.
    pub(crate) fn take_the_loan(&mut self) {
        let channel = self.channel.as_mut().unwrap();
        channel.handle_request().unwrap();
    }

    pub(crate) fn refuse_the_loan(&mut self) {
        *self.lent.refuses.lock().unwrap() = true;
        let channel = self.channel.as_mut().unwrap();
        channel.handle_request().unwrap_err();
    }

    /// What was lent.
    pub(crate) fn loan(&mut self) -> Loan {
        let loan = self.lent.loan.lock().unwrap();
        let (asked, file) = loan.as_ref().unwrap();
        (*asked, file.try_clone().unwrap())
    }

    /// How many shared memory regions there are, and how long the first is.
    pub(crate) fn regions(&mut self) -> (u32, u64) {
        let regions = self.frontend.get_shmem_config().unwrap();
        (regions.nregions, regions.memory_sizes[0])
    }

    pub(crate) fn config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let empty = vec![0; size as usize];
        let flags = VhostUserConfigFlags::empty();
        self.frontend
            .get_config(offset, size, flags, &empty)
            .unwrap()
            .1
    }

    /// Shares what it has been lent before, as it shares all guest memory.
    pub(crate) fn show(&mut self, file: &File, offset: u64, len: u64) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: LENT,
            memory_size: len,
            userspace_addr: LENT,
            mmap_offset: offset,
            mmap_handle: file.as_raw_fd(),
        };
        self.frontend.add_mem_region(&region).unwrap();
    }

    /// The daemon hangs up when the rings are to be set up.
    pub(crate) fn is_let_go(&mut self) {
        let features = PROTOCOL_FEATURES | VERSION_1;
        // The answer may come before the end, and then the next does not.
        let ended = self.frontend.set_features(features).is_err()
            || (0..1000).any(|_| self.frontend.get_features().is_err());
        assert!(ended);
    }

    /// Rings, from where they are.
    pub(crate) fn set_up(&mut self) {
        let frontend = &mut self.frontend;
        frontend
            .set_features(PROTOCOL_FEATURES | VERSION_1)
            .unwrap();
        let region = self.memory.iter().next().unwrap();
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.add_mem_region(&info).unwrap();
        let at = |offset| region.as_ptr() as u64 + offset;
        let rings = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: at(0),
            avail_ring_addr: at(AVAILABLE),
            used_ring_addr: at(USED),
            log_addr: None,
        };
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        frontend.set_vring_num(0, SIZE).unwrap();
        frontend.set_vring_base(0, used).unwrap();
        frontend.set_vring_addr(0, &rings).unwrap();
        frontend.set_vring_call(0, &self.call).unwrap();
        frontend.set_vring_kick(0, &self.kick).unwrap();
        frontend.set_vring_enable(0, true).unwrap();
        self.kick.write(1).unwrap();
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn offer(&mut self, kind: u32) -> u64 {
        let slot = self.asked % (SIZE / 2);
        let (first, request) = (slot * 2, REQUESTS + u64::from(slot) * 16);
        self.put(request, kind);
        self.put(request + 8, 0xeeee_eeeeu32);
        for (index, at, flags, next) in [
            (first, request, 1u16, first + 1),
            (first + 1, request + 8, 2, 0),
        ] {
            let entry = u64::from(index) * 16;
            self.put(entry, at);
            self.put(entry + 8, 4u32);
            self.put(entry + 12, flags);
            self.put(entry + 14, next);
        }
        self.put(AVAILABLE + 4 + 2 * u64::from(self.asked % SIZE), first);
        fence(Ordering::SeqCst);
        self.asked = self.asked.wrapping_add(1);
        self.put(AVAILABLE + 2, self.asked);
        fence(Ordering::SeqCst);
        self.kick.write(1).unwrap();
        request + 8
    }

    /// A flush that is not waited for.
    pub(crate) fn ask(&mut self) {
        self.offer(0);
    }

    /// Until all requests have come back. An interrupt that does not come is a failure.
    pub(crate) fn wait_for_all(&self) {
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, self.call.as_raw_fd(), event)
            .unwrap();
        loop {
            fence(Ordering::SeqCst);
            let answered: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
            if answered == self.asked {
                return;
            }
            let ready = epoll.wait(20_000, &mut [event]).unwrap();
            assert!(ready > 0, "{answered} of {} have come back", self.asked);
            let _ = self.call.read();
        }
    }

    /// One request: its response.
    pub(crate) fn request(&mut self, kind: u32) -> u32 {
        let response = self.offer(kind);
        self.wait_for_all();
        self.memory.read_obj(GuestAddress(response)).unwrap()
    }

    pub(crate) fn flush(&mut self) -> u32 {
        self.request(0)
    }
}
