//! What is known of a backend by those who must not wait for it.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::OwnedFd;

use super::caller::Line;
use super::class::{Class, Shape};
use super::connection::ConnectError;
use super::socket::{Listening, dial};

/// What has become of a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// One serves the device again.
    Connected,
    /// It is lost, and another one is waited for.
    Lost {
        /// What was noticed.
        why: String,
    },
    /// It wants the memory back that it has lent.
    WantedBack,
}

/// Called on the backend's threads; to hand the news on, not to act on it.
pub type OnChange = Box<dyn Fn(Change) + Send + Sync>;

/// How it stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Why no backend is there; `None`: one is.
    pub lost: Option<String>,
    /// How often one was lost.
    pub losses: u64,
    /// How often one was found.
    pub connections: u64,
}

pub(super) struct Shared {
    pub(super) id: String,
    pub(super) socket: PathBuf,
    pub(super) class: Class,
    pub(super) shape: Shape,
    /// Where this side listens, until it is closed; `None`: it connects.
    listening: Option<Mutex<Option<Arc<Listening>>>>,
    pub(super) line: Line,
    /// Written when the watch is to look again.
    pub(super) wake: OwnedFd,
    closed: AtomicBool,
    status: Mutex<Status>,
    space: Mutex<Space>,
    /// By which a backend that lends memory says something by itself.
    channel: Mutex<Option<Arc<UnixStream>>>,
    on_change: OnChange,
}

/// What the device is to the guest.
#[derive(Debug, Clone, Default)]
pub(super) struct Space {
    pub(super) features: u64,
    pub(super) config: Vec<u8>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(
        id: String,
        (socket, listening): (PathBuf, Option<Listening>),
        (class, shape): (Class, Shape),
        on_change: OnChange,
    ) -> io::Result<Self> {
        Ok(Self {
            id,
            socket,
            class,
            shape,
            listening: listening.map(|it| Mutex::new(Some(Arc::new(it)))),
            line: Line::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            closed: AtomicBool::new(false),
            status: Mutex::default(),
            space: Mutex::default(),
            channel: Mutex::default(),
            on_change,
        })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Where this side listens, if it does.
    pub(super) fn listening(&self) -> Option<Arc<Listening>> {
        self.listening.as_ref().and_then(|it| locked(it).clone())
    }

    /// A backend to talk to, at once or not at all.
    pub(super) fn meet(&self) -> Result<UnixStream, ConnectError> {
        let socket = || self.socket.display().to_string();
        let met = match &self.listening {
            None => dial(&self.socket).map(Some),
            Some(listening) => match &*locked(listening) {
                Some(listening) => listening.accept(),
                None => Ok(None),
            },
        };
        let met = met.map_err(|source| ConnectError::Socket {
            socket: socket(),
            example: self.class.example,
            source,
        })?;
        met.ok_or_else(|| ConnectError::Nobody { socket: socket() })
    }

    /// Nobody listens any more, and the socket's file is gone, as soon as nobody waits there.
    pub(super) fn listen_no_more(&self) {
        if let Some(listening) = &self.listening {
            locked(listening).take();
        }
    }

    /// No backend is wanted any more: the connection ends, and none is looked for.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.line.cut();
        self.wake();
    }

    pub(super) fn wake(&self) {
        // Only a full counter gives an error, and then it is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(super) fn status(&self) -> Status {
        locked(&self.status).clone()
    }

    pub(super) fn space(&self) -> MutexGuard<'_, Space> {
        locked(&self.space)
    }

    /// Whether the guest has read it otherwise.
    pub(super) fn set_config(&self, config: Vec<u8>, features: u64) -> bool {
        let mut space = self.space();
        let changed = !space.config.is_empty() && space.config != config;
        *space = Space { features, config };
        changed
    }

    pub(super) fn channel(&self) -> Option<Arc<UnixStream>> {
        locked(&self.channel).clone()
    }

    /// Of the backend that is there; `None`: it says nothing by itself, or none is there.
    pub(super) fn set_channel(&self, channel: Option<Arc<UnixStream>>) {
        *locked(&self.channel) = channel;
    }

    pub(super) fn connected(&self) {
        let mut status = locked(&self.status);
        status.connections += 1;
        let was_lost = status.lost.take().is_some();
        drop(status);
        if was_lost {
            (self.on_change)(Change::Connected);
        }
        self.wake();
    }

    pub(super) fn lost(&self, why: String) {
        let mut status = locked(&self.status);
        status.losses += 1;
        status.lost = Some(why.clone());
        drop(status);
        (self.on_change)(Change::Lost { why });
        self.wake();
    }

    pub(super) fn wanted_back(&self) {
        (self.on_change)(Change::WantedBack);
    }

    /// A try that failed.
    pub(super) fn not_connected(&self, why: &dyn std::error::Error) {
        locked(&self.status).lost = Some(crate::chain(why));
    }
}
