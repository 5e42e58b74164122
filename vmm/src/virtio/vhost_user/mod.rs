//! Devices that another process serves: the frontend's side of vhost-user.
//!
//! ```text
//!   Ram ──attach, detach──▶┐                                       ┌─▶ backend
//!   Worker ──start, stop──▶├─ Backend ─call─▶ Session ─▶ Connection ─┤   maps guest memory, has doorbells (ioeventfd) and
//!   watch ──lost, again ──▶┘   (deadlines)    (state)     (messages) └─  interrupts (irqfd): nothing in between
//! ```
//! What is a device type's own is a [`Class`] in a file of its own ([`blk`], [`fs`], [`net`], [`pmem`], [`generic`]); all else is here once.
//!
//! Invariants:
//! - Whatever the backend does or leaves undone, every call here comes back in time. One that hangs, talks nonsense or goes
//!   away is cut off: the device stalls, is served on when one is there again, and nobody else notices.
//! - Memory reaches a backend before the guest hears of it, and is taken back, or the backend cut off, before it is given up.
//! - A descriptor of guest memory is what a backend maps: it has the lock of a device-dax range as long as we do.
//! - The backend is trusted with guest memory, and with nothing else: what it says is checked and never an address here.
//! - Memory that a backend lends (`lending`) is this side's to map, to place and to take down: it stays when the backend goes.

pub mod blk;
mod caller;
mod class;
mod connection;
pub mod fs;
pub mod generic;
mod lending;
pub mod net;
pub mod pmem;
mod session;
mod shared;
mod socket;
mod stand_in;
mod table;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod watch;
mod worker;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::caller::Caller;
use self::session::Session;
use self::shared::Shared;
use self::socket::{Listening, Waited};
use self::worker::Orderly;
use super::device::read_space;
use super::net::{CONTROL_SIZE, Control};
use super::worker as workers;
use super::{ActivateError, Activation, Device, Kind};

pub use caller::NoAnswer;
pub use class::{Class, Config, Shape};
pub use connection::{CallError, ConnectError, TooManyRegions};
pub use lending::{Loan, LoanError};
pub use session::{AttachError, Service};
pub use shared::{Change, OnChange, Status};
pub use socket::{ListenError, Mode};
pub use table::SharedRegion;

/// For an answer of a backend that has been answering.
const CALL: Duration = Duration::from_millis(if cfg!(test) { 700 } else { 3000 });
/// Memory that a backend maps in a second, if it locks its own memory and so touches every page: several times as much as it takes.
const MAPPED_IN_A_SECOND: u64 = 4 << 30;
/// For a backend to say what it is. Callers of the API wait five seconds for a device.
const HANDSHAKE: Duration = Duration::from_millis(if cfg!(test) { 700 } else { 4000 });

/// For a backend that is to connect before a guest starts. A client of `vm.boot` waits a minute for its answer.
pub const AT_START: Duration = Duration::from_secs(50);
/// For one of a device that a running guest is to get.
pub const WHILE_RUNNING: Duration = Duration::from_secs(3);

/// Features of rings: the transport's own, as far as the backend knows them.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device to be served by a backend.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The device's name.
    pub id: String,
    /// Where the backend listens, or this side.
    pub socket: PathBuf,
    /// Which of the two.
    pub mode: Mode,
    /// What kind of device it is.
    pub class: Class,
    /// Its queues.
    pub shape: Shape,
}

/// There is no backend that could serve the device.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It can't be talked to.
    #[error("device {id}")]
    Connect {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: ConnectError,
    },
    /// It says nothing.
    #[error(
        "device {id}: the backend at {socket} says nothing for {HANDSHAKE:?}; it may be serving somebody else already: a backend \
         serves one guest at a time"
    )]
    Silent {
        /// Which device.
        id: String,
        /// Where it is.
        socket: String,
    },
    /// This side can't listen.
    #[error("device {id}")]
    Listen {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: ListenError,
    },
    /// This side listens, and no backend came that is one.
    #[error(
        "device {id}: no backend has connected to the socket {socket} within {waited:?}; start one that connects there (for one: a \
         port of Open vSwitch of type dpdkvhostuserclient)"
    )]
    Nobody {
        /// Which device.
        id: String,
        /// Where it listens.
        socket: String,
        /// How long.
        waited: Duration,
        /// What was wrong with the last one that did connect.
        #[source]
        source: Option<Box<ConnectError>>,
    },
    /// It was told to end meanwhile.
    #[error("device {id}: the wait for a backend at the socket {socket} was ended")]
    Ended {
        /// Which device.
        id: String,
        /// Where it listens.
        socket: String,
    },
    /// Something of the host.
    #[error(
        "device {id}: no thread or descriptor for its backend; `ulimit -u` and `ulimit -n` raise how many there may be"
    )]
    Host {
        /// Which device.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The backend of one device, whether it is there or not.
pub struct Backend {
    shared: Arc<Shared>,
    caller: Arc<Caller<Session>>,
    watch: Mutex<Option<JoinHandle<()>>>,
}

impl Backend {
    /// Finds the backend and asks it what it is. One that goes away later is waited for; one that is not there now is an error,
    /// or, where this side listens, waited for as long as it was said, or until `told` is readable.
    pub fn open(
        spec: Spec,
        on_change: OnChange,
        told: BorrowedFd<'_>,
    ) -> Result<Arc<Self>, OpenError> {
        let Spec {
            id,
            socket,
            mode,
            class,
            shape,
        } = spec;
        let listening = match mode {
            Mode::Client => None,
            Mode::Server { .. } => {
                let listening = Listening::at(&socket);
                Some(listening.map_err(|source| OpenError::Listen {
                    id: id.clone(),
                    source,
                })?)
            }
        };
        let host = |source| OpenError::Host {
            id: id.clone(),
            source,
        };
        let name = |what| thread_name(&id, what);
        let meeting = (socket, listening);
        let shared = Shared::new(id.clone(), meeting, (class, shape), on_change).map_err(host)?;
        let shared = Arc::new(shared);
        let session = Session::new(Arc::clone(&shared));
        let caller = Caller::spawn(name("_call"), Arc::clone(&shared), session).map_err(host)?;
        let caller = Arc::new(caller);
        let backend = Self {
            shared: Arc::clone(&shared),
            caller: Arc::clone(&caller),
            watch: Mutex::default(),
        };
        match mode {
            Mode::Client => backend.connect()?,
            Mode::Server { patience } => backend.await_first(patience, told)?,
        }
        let watch = Builder::new()
            .name(name("_watch"))
            .spawn(move || watch::run(&shared, &caller))
            .map_err(host)?;
        *backend.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch);
        Ok(Arc::new(backend))
    }

    /// Asks a backend that is there what it is.
    fn connect(&self) -> Result<(), OpenError> {
        let Self { shared, caller, .. } = self;
        let id = shared.id.clone();
        match caller.call(HANDSHAKE, Session::connect) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source @ ConnectError::NothingLent { .. })) => {
                Err(OpenError::Connect { id, source })
            }
            Ok(Err(_)) | Err(NoAnswer) if shared.line.gave_up() => Err(OpenError::Silent {
                id,
                socket: shared.socket.display().to_string(),
            }),
            Ok(Err(source)) => Err(OpenError::Connect { id, source }),
            Err(error) => Err(OpenError::Host {
                id,
                source: io::Error::other(error),
            }),
        }
    }

    /// Waits for the first backend that connects. Who connects and leaves, or talks like none, is none: whoever looks whether the
    /// socket is in use does so.
    fn await_first(&self, patience: Duration, told: BorrowedFd<'_>) -> Result<(), OpenError> {
        let id = || self.id().to_owned();
        let socket = || self.socket().display().to_string();
        let Some(listening) = self.shared.listening() else {
            return self.connect();
        };
        let end = Instant::now() + patience;
        let mut last = None;
        loop {
            let waited = listening.wait(end, told);
            match waited.map_err(|source| OpenError::Host { id: id(), source })? {
                Waited::Somebody => {}
                Waited::Nobody => {
                    return Err(OpenError::Nobody {
                        id: id(),
                        socket: socket(),
                        waited: patience,
                        source: last,
                    });
                }
                Waited::Ended => {
                    return Err(OpenError::Ended {
                        id: id(),
                        socket: socket(),
                    });
                }
            }
            match self.connect() {
                Err(OpenError::Connect {
                    source: error @ (ConnectError::Call { .. } | ConnectError::Nobody { .. }),
                    ..
                }) => last = Some(Box::new(error)),
                connected => return connected,
            }
        }
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Where it listens, or this side does.
    pub fn socket(&self) -> &Path {
        &self.shared.socket
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// Has it reach more memory.
    pub fn attach(&self, regions: Vec<SharedRegion>) -> Result<(), AttachError> {
        let bytes: u64 = regions.iter().map(|region| region.size).sum();
        let mapping = Duration::from_secs(bytes / MAPPED_IN_A_SECOND);
        self.caller
            .call(CALL + mapping, move |session| session.attach(&regions))?
    }

    /// Takes memory back from it.
    pub fn detach(&self, gpa: u64) -> Result<(), NoAnswer> {
        self.caller.call(CALL, move |session| session.detach(gpa))
    }

    /// Has it serve queues.
    pub fn start(&self, service: Service) -> Result<(), NoAnswer> {
        self.caller
            .call(CALL, move |session| session.start(service))
    }

    /// Tells it what the driver stores in the configuration space, and reads that again.
    fn write_config(&self, offset: u32, data: Vec<u8>) -> Result<(), NoAnswer> {
        self.caller
            .call(CALL, move |session| session.write_config(offset, &data))
    }

    /// Has it serve the first so many queues, of those that it was given, and no others.
    fn use_queues(&self, used: u16) -> Result<(), NoAnswer> {
        self.caller
            .call(CALL, move |session| session.use_queues(used))
    }

    /// The undo of [`Backend::start`].
    pub fn stop(&self) -> Result<(), NoAnswer> {
        self.caller.call(CALL, Session::stop)
    }

    /// What the backend lends, once: to be mapped, and then [`Backend::loan_is_mapped`].
    pub fn take_loan(&self) -> Result<Option<Loan>, NoAnswer> {
        self.caller.call(CALL, Session::take_loan)
    }

    /// The backend may count on its memory being the guest's.
    pub fn loan_is_mapped(&self) -> Result<(), NoAnswer> {
        self.caller.call(CALL, Session::loan_is_mapped)
    }

    /// The host takes the memory away: no backend lends it again, and when this returns none serves the device. One that does not
    /// stop is cut off.
    pub fn borrow_no_more(&self) {
        if let Err(error) = self.caller.call(CALL, Session::borrow_no_more) {
            tracing::warn!(device = self.id(), %error, "the backend may serve on, and lend its memory again");
        }
    }

    /// No backend is wanted any more.
    pub fn close(&self) {
        self.shared.close();
        let watch = self
            .watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(watch) = watch
            && watch.join().is_err()
        {
            tracing::error!("the thread that watches a vhost-user backend panicked");
        }
        self.shared.listen_no_more();
    }
}

impl Drop for Backend {
    /// A backstop: the owner closes it.
    fn drop(&mut self) {
        self.close();
    }
}

/// At most 15 bytes, with the end of it kept.
fn thread_name(id: &str, what: &str) -> String {
    let room = 15 - what.len();
    let mut end = id.len().min(room);
    while !id.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{what}", &id[..end])
}

/// What a backend is to serve.
fn service(class: &Class, activation: Activation) -> Result<Service, ActivateError> {
    let Activation {
        memory,
        features,
        queues,
        signals,
    } = activation;
    let mut rings = Vec::new();
    for queue in queues.into_iter().flatten() {
        let ring = queue.into_ring().map_err(|source| ActivateError::Host {
            what: "no descriptor of a queue's interrupt for the backend",
            source,
        })?;
        rings.push(ring);
    }
    Ok(Service {
        features,
        rings,
        used: class.used_at_first(),
        memory,
        signals,
        inflight: None,
        was_served: false,
    })
}

/// A virtio device whose queues a backend serves.
pub struct VhostUserDevice(Arc<Backend>);

impl VhostUserDevice {
    /// The guest's side of a backend.
    pub fn new(backend: Arc<Backend>) -> Self {
        Self(backend)
    }
}

impl Device for VhostUserDevice {
    fn kind(&self) -> Kind {
        self.0.shared.class.kind
    }

    fn features(&self) -> u64 {
        let class = &self.0.shared.class;
        self.0.shared.space().features & class.features | class.own_features
    }

    fn ring_features(&self) -> u64 {
        self.0.shared.space().features & RING_FEATURES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = self.0.shared.shape.sizes().to_vec();
        sizes.extend(self.0.shared.class.has_control.then_some(CONTROL_SIZE));
        sizes
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.0.shared.space().config, offset, data);
    }

    /// Waits for the backend: what the driver reads next is the backend's answer. One that gives none is cut off.
    fn config_write(&self, offset: u64, data: &[u8]) {
        if matches!(self.0.shared.class.config, Config::Passed { .. })
            && let Ok(offset) = u32::try_from(offset)
            && let Err(error) = self.0.write_config(offset, data.to_vec())
        {
            tracing::warn!(device = self.0.id(), %error, "what the driver stores is not told");
        }
    }

    fn activate(
        &self,
        activation: Activation,
    ) -> Result<Vec<Box<dyn workers::Worker>>, ActivateError> {
        let mut activation = activation;
        let Shared { class, shape, .. } = self.0.shared.as_ref();
        let control = if class.has_control {
            let pairs = usize::from(shape.queues() / net::QUEUES);
            Control::split_off(&mut activation.queues, activation.features, pairs)
        } else {
            None
        };
        let orderly = control.map(|control| Orderly {
            control,
            memory: activation.memory.clone(),
            signals: Arc::clone(&activation.signals),
            // A driver may leave out pairs at the end.
            pairs: activation
                .queues
                .iter()
                .take_while(|queue| queue.is_some())
                .count()
                / usize::from(net::QUEUES),
        });
        Ok(vec![Box::new(worker::Worker {
            backend: Arc::clone(&self.0),
            service: Some(service(class, activation)?),
            orderly,
        })])
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Status {
            losses,
            connections,
            ..
        } = self.0.status();
        vec![
            ("backend_connections", connections),
            ("backend_losses", losses),
        ]
    }
}
