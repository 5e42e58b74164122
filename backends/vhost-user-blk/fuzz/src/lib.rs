//! One session of the daemon for each run, and the other end of its socket.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use daxhund_dax::Host;
use daxhund_vhost_user::session::Device;
use daxhund_vhost_user_blk::backend::Backend;
use daxhund_vhost_user_blk::disk::{Disk, FileDisk};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::{Error as MessageError, Listener};
use vhost_user_backend::{Error as SessionError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Queues that the daemon offers.
pub const QUEUES: u16 = 2;
/// Bytes of the disk.
pub const DISK_BYTES: u64 = 1 << 20;

/// A file in memory.
pub fn memory(bytes: u64) -> File {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(bytes).expect("room for it");
    file
}

/// One disk for all runs.
pub fn disk() -> &'static (Arc<dyn Disk>, File) {
    static DISK: OnceLock<(Arc<dyn Disk>, File)> = OnceLock::new();
    DISK.get_or_init(|| {
        let image = memory(DISK_BYTES);
        let path = format!("/proc/self/fd/{}", image.as_raw_fd());
        let disk = FileDisk::open(&Host::system(), path.as_ref(), false).expect("a disk");
        (Arc::new(disk), image)
    })
}

/// The daemon's side of a connection, made as the daemon makes it.
pub struct Session {
    backend: Arc<Backend>,
    /// Dropped before the event: a worker that has not looked yet would not see one that is closed.
    daemon: VhostUserDaemon<Arc<Backend>>,
    exit: EventFd,
}

/// The socket that the daemon listens at, and where it is. It outlives all runs.
fn listener() -> &'static (Mutex<Listener>, std::os::unix::net::SocketAddr) {
    static LISTENER: OnceLock<(Mutex<Listener>, std::os::unix::net::SocketAddr)> = OnceLock::new();
    LISTENER.get_or_init(|| {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("daxhund-fuzz-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name).expect("a name");
        let listener = UnixListener::bind_addr(&address).expect("a socket");
        (Mutex::new(Listener::from(listener)), address)
    })
}

impl Session {
    /// Connects to a daemon.
    pub fn start() -> (Self, UnixStream) {
        let exit = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an event");
        let backend = Arc::new(Backend::new(Arc::clone(&disk().0), QUEUES, Arc::default()));
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon =
            VhostUserDaemon::new("fuzz".into(), Arc::clone(&backend), memory).expect("a daemon");
        for worker in daemon.get_epoll_handlers() {
            worker
                .register_listener(exit.as_raw_fd(), EventSet::IN, backend.exit_token())
                .expect("an event more");
        }
        let (listener, address) = listener();
        let stream = UnixStream::connect_addr(address).expect("a connection");
        let mut listener = listener.lock().unwrap_or_else(PoisonError::into_inner);
        daemon.start(&mut listener).expect("a session");
        let session = Self {
            backend,
            daemon,
            exit,
        };
        (session, stream)
    }

    /// Waits until the daemon has done with what the frontend has sent.
    pub fn finish(mut self) -> Result<(), MessageError> {
        match self.daemon.wait() {
            Ok(()) => Ok(()),
            Err(SessionError::HandleRequest(error)) => Err(error),
            Err(error) => panic!("the session has not ended in an orderly way: {error}"),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.backend.stop();
        let _ = self.exit.write(1);
    }
}

/// Descriptors that this process has.
pub fn descriptors() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}
