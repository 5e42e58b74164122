//! One connection, driven by threads of its own; nothing of it reaches the next.
//!
//! ```text
//!   start ──▶ messages, one thread of the crate ──▶ the frontend goes, or talks nonsense ──▶ workers end ──▶ ended
//!               └─ workers, as many as the device wants        ▲
//!                                     finish, hang up ─────────┘
//! ```

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use vhost::vhost_user::{Error as MessageError, Listener};
use vhost_user_backend::{
    Error as CrateError, ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringMutex,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::event::{Event, Events};
use crate::events::ready;
use crate::metrics::Counter;

/// A device of one session.
pub trait Device: VhostUserBackend<Bitmap = (), Vring = VringMutex> + 'static {
    /// Workers finish what they are at and take nothing more.
    fn stop(&self);

    /// The event that ends a worker. The crate's own way ([`VhostUserBackend::exit_event`]) leaves a descriptor of each
    /// worker of each session behind.
    fn exit_token(&self) -> u64;

    /// The connection, for a device that has to end it. It may have had messages before.
    fn connected(&self, _connection: Connection) {}
}

/// Shuts a connection down: its session ends.
#[derive(Clone)]
pub struct Connection(Option<Arc<ShutdownHandle>>);

impl Connection {
    /// Without an effect when it has ended.
    pub fn shut(&self) {
        if let Some(connection) = &self.0 {
            connection.shutdown();
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connection").finish_non_exhaustive()
    }
}

/// A session did not come to be.
#[derive(Debug)]
enum StartError {
    /// The frontend's doing, or nobody's.
    Crate(CrateError),
    /// The host has no descriptor or thread.
    Host(io::Error),
}

/// A session did not end.
#[derive(Debug, Error)]
pub enum FinishError {
    /// What was taken is still under way.
    #[error("requests were not finished in time")]
    Unfinished,
    /// It can't be waited for.
    #[error("can't wait for the end of a session")]
    Wait(#[source] io::Error),
}

/// One connection.
#[derive(Debug)]
pub struct Session<D> {
    device: Arc<D>,
    connection: Connection,
    /// Its other end is closed when everything of the session is gone but the thread that saw to it.
    ended: UnixStream,
    thread: JoinHandle<()>,
}

/// The crate's daemon, whose workers end before it is dropped: its drop waits for them.
struct Serving<D: Device> {
    device: Arc<D>,
    /// Dropped before the event: a worker that has not looked yet would not see one that is closed.
    daemon: VhostUserDaemon<Arc<D>>,
    exit: EventFd,
}

impl<D: Device> Serving<D> {
    fn new(device: D) -> Result<Self, StartError> {
        let exit = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(StartError::Host)?;
        let device = Arc::new(device);
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new("messages".into(), Arc::clone(&device), memory)
            .map_err(StartError::Crate)?;
        let serving = Self {
            device,
            daemon,
            exit,
        };
        for worker in serving.daemon.get_epoll_handlers() {
            let token = serving.device.exit_token();
            worker
                .register_listener(serving.exit.as_raw_fd(), EventSet::IN, token)
                .map_err(StartError::Host)?;
        }
        Ok(serving)
    }
}

impl<D: Device> Drop for Serving<D> {
    fn drop(&mut self) {
        self.device.stop();
        // Nobody reads it, so one is enough for all workers; only a full counter gives an error.
        let _ = self.exit.write(1);
    }
}

impl<D: Device> Session<D> {
    /// Accepts the connection that waits, which is told of and counted. `None` when its frontend could not be served; the next one
    /// may.
    pub fn accept(
        device: D,
        listener: &mut Listener,
        events: &Events,
        accepted: &Counter,
    ) -> io::Result<Option<Self>> {
        match Self::start(device, listener) {
            Ok(session) => {
                accepted.inc();
                events.send(Event::FrontendConnected);
                tracing::info!("a frontend has connected");
                Ok(Some(session))
            }
            Err(StartError::Crate(error)) => {
                tracing::warn!(%error, "a frontend can't be served");
                Ok(None)
            }
            Err(StartError::Host(error)) => Err(error),
        }
    }

    fn start(device: D, listener: &mut Listener) -> Result<Self, StartError> {
        let (ended, end) = UnixStream::pair().map_err(StartError::Host)?;
        let mut serving = Serving::new(device)?;
        serving.daemon.start(listener).map_err(StartError::Crate)?;
        let connection = Connection(serving.daemon.shutdown_handle().map(Arc::new));
        let device = Arc::clone(&serving.device);
        device.connected(connection.clone());
        let thread = std::thread::Builder::new()
            .name("session".into())
            .spawn(move || {
                match serving.daemon.wait() {
                    Ok(())
                    | Err(CrateError::HandleRequest(
                        MessageError::Disconnected | MessageError::PartialMessage,
                    )) => tracing::info!("the frontend has gone"),
                    Err(error) => tracing::warn!(%error, "the session has failed"),
                }
                drop(serving);
                drop(end);
            })
            .map_err(StartError::Host)?;
        Ok(Self {
            device,
            connection,
            ended,
            thread,
        })
    }

    /// Its device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Shuts the connection down: the session ends, and is finished when that is seen.
    pub fn cut(&self) {
        self.connection.shut();
    }

    /// Answers what was taken, takes no more, and waits until nothing of the session is left.
    pub fn finish(self, within: Duration) -> Result<(), FinishError> {
        self.device.stop();
        self.connection.shut();
        let ready = ready(&[self.ended.as_fd()], Some(within)).map_err(FinishError::Wait)?;
        if !ready.contains(&true) {
            return Err(FinishError::Unfinished);
        }
        if self.thread.join().is_err() {
            tracing::error!("the session's thread has panicked");
        }
        Ok(())
    }
}

/// Readable when it has ended: then [`Session::finish`] does not wait.
impl<D> AsFd for Session<D> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }
}
