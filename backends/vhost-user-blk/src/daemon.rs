//! The daemon: one frontend at a time, until a signal or the loss of the disk.
//!
//! ```text
//!              a frontend connects
//!   waiting ───────────────────────▶ session ──┐
//!      ▲                               │       │ SIGTERM, SIGINT: no more requests are taken, those that were are
//!      └───────── it goes away ────────┘       │ answered, the connection is shut ──▶ end
//!                                              │
//!                the disk's memory is gone, or is given to the host that wants it: requests fail, the device is let go of;
//!                ends with the session ──▶ error
//! ```
//! Each connection gets a session of its own with rings, memory and threads; nothing of one reaches the next. A frontend
//! that connects meanwhile waits in the socket's queue.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daxhund_dax::sigbus::{GuardError, Incidents};
use daxhund_dax::{Host, Pace, Watch, WatchError};
use daxhund_guard::ConnectError;
use daxhund_monitor::OpenError;
use daxhund_vhost_user::event::{Event, Events, Nouns};
use daxhund_vhost_user::events::{ready, signals};
use daxhund_vhost_user::metrics::{MetricsSocketError, Server};
use daxhund_vhost_user::removal::Removals;
use daxhund_vhost_user::session::{self, FinishError};
use thiserror::Error;

use crate::backend::Backend;
use crate::config::{Config, DiskSource};
use crate::disk::{OpenDisk, OpenDiskError};
use crate::metrics::Metrics;
use crate::socket::{Socket, SocketError};

type Session = session::Session<Backend>;

/// The words for this daemon.
pub const NOUNS: Nouns = Nouns {
    program: "daxhund-vhost-user-blk",
    source: "vhost-user-blk",
    thing: "disk",
    lost: "disk-lost",
    use_of_it: "served as a disk",
};

/// How long a session has to finish its requests. Each is at most a copy of 64M; only storage that hangs, or a frontend that
/// makes its doorbell block, needs longer, and then the end is an error.
const FINISH: Duration = Duration::from_secs(10);

/// The daemon can't serve, or not any more.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// No disk.
    #[error(transparent)]
    Disk(#[from] OpenDiskError),
    /// No socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Memory that goes away can't be watched for.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// Nothing would survive its going away.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// Nobody holds removals although somebody was to.
    #[error("--removal-guard daemon: leave the flag out to serve without where there is none")]
    NoGuard(#[source] ConnectError),
    /// Nobody can be told what happens.
    #[error("--event-monitor")]
    Events(#[source] OpenError),
    /// Nobody can be told how much.
    #[error(transparent)]
    Metrics(#[from] MetricsSocketError),
    /// The host refuses what the loop needs.
    #[error("can't {what}")]
    Loop {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The device is gone.
    #[error(
        "the host has taken {} away, and with it the disk: start again when the device is back (`daxctl list`)",
        path.display()
    )]
    Lost {
        /// The device.
        path: PathBuf,
    },
    /// The device was given up.
    #[error(
        "the host wanted {} back and has it now, and with it the disk: start again when the device is back (`daxctl list`); \
         on_removal=refuse keeps it",
        path.display()
    )]
    GivenUp {
        /// The device.
        path: PathBuf,
    },
    /// Requests are still under way.
    #[error(
        "requests were not finished within {} s of the signal: does the disk's storage hang?", within.as_secs()
    )]
    Unfinished {
        /// How long was waited.
        within: Duration,
    },
}

/// A disk and a socket to serve it on.
#[derive(Debug)]
pub struct Daemon {
    disk: OpenDisk,
    path: PathBuf,
    num_queues: u16,
    socket: Socket,
    signals: UnixStream,
    incidents: Incidents,
    events: Events,
    metrics: Arc<Metrics>,
    server: Option<Server>,
    /// `None` when there is nothing to watch, or not any more.
    watch: Option<Watch>,
    /// `None` when there is nothing to remove, or not any more.
    removals: Option<Removals>,
    /// The host was given what it wanted.
    is_given_up: bool,
}

/// A cause of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The daemon is to end.
    Signal,
    /// Memory was touched that is gone: the disk's or a frontend's.
    Incident,
    /// A sign that the disk's device goes away, or time to look.
    Watch,
    /// Somebody wants the metrics.
    Metrics,
    /// The guard has something to say.
    Guard,
    /// One wants to connect, or the one that is served has gone.
    Frontend,
}

impl Daemon {
    /// Opens and locks the disk, then listens. On an error nothing is left.
    pub fn new(config: &Config) -> Result<Self, DaemonError> {
        let host = Host::system();
        let events = Events::open(config.policy.events.as_ref(), NOUNS);
        let events = events.map_err(DaemonError::Events)?;
        let metrics = Arc::new(Metrics::default());
        let incidents = Incidents::open()?;
        let signals = signals().map_err(failed("handle signals"))?;
        let disk = OpenDisk::open(&host, config)?;
        let removals = match &config.disk {
            DiskSource::Dax { .. } => {
                let (guard, policy) = (config.policy.removal_guard, config.policy.removal);
                let removals = Removals::new(guard, policy, events.clone());
                Some(removals.map_err(DaemonError::NoGuard)?)
            }
            DiskSource::File(_) => None,
        };
        let watch = match &disk {
            OpenDisk::Dax(dax) => {
                let mut watch = Watch::new(&host, Pace::default())?;
                for unheard in watch.unheard() {
                    tracing::warn!("{unheard}");
                }
                dax.watch(&mut watch)?;
                Some(watch)
            }
            OpenDisk::File(_) => None,
        };
        let socket = Socket::open(config.socket_path.as_deref())?;
        let path = config.disk.path();
        let server = config.policy.metrics_socket.as_deref();
        let server = server.map(|path| metrics.serve(path)).transpose()?;
        events.send(Event::Listening {
            path: &path.to_string_lossy(),
            bytes: &disk.shared().len().to_string(),
        });
        tracing::info!(
            disk = %path.display(), bytes = disk.shared().len(), queues = config.num_queues,
            read_only = config.read_only, "listening"
        );
        Ok(Self {
            path: path.to_owned(),
            disk,
            num_queues: config.num_queues,
            socket,
            signals,
            incidents,
            events,
            metrics,
            server,
            watch,
            removals,
            is_given_up: false,
        })
    }

    /// Serves until a signal, which is an orderly end, or until the disk is gone.
    pub fn run(mut self) -> Result<(), DaemonError> {
        let outcome = self.serve();
        self.events.ending(&outcome);
        outcome
    }

    fn serve(&mut self) -> Result<(), DaemonError> {
        let mut session: Option<Session> = None;
        loop {
            self.settle(session.is_some());
            if session.is_none() && self.is_lost() {
                return Err(self.end_of_the_disk());
            }
            for source in self.wait(session.as_ref())? {
                match source {
                    Source::Signal => {
                        tracing::info!("ending by a signal");
                        return session.take().map_or(Ok(()), finish);
                    }
                    Source::Incident => {
                        self.incidents.take();
                        tracing::debug!("memory was touched that is gone");
                        self.look_after_the_disk()?;
                    }
                    Source::Watch => self.look_after_the_disk()?,
                    Source::Metrics => {
                        if let Some(server) = &self.server {
                            server.serve();
                        }
                    }
                    Source::Guard => {
                        if let Some(removals) = &mut self.removals {
                            removals.read();
                        }
                    }
                    Source::Frontend => {
                        session = match session.take() {
                            // It has ended, so this does not wait.
                            Some(session) => {
                                finish(session)?;
                                self.events.send(Event::FrontendGone);
                                None
                            }
                            None => self.accept()?,
                        };
                    }
                }
            }
        }
    }

    /// Has the device's removal held, and lets go of the device when that is due.
    fn settle(&mut self, has_frontend: bool) {
        let (OpenDisk::Dax(disk), Some(removals)) = (&self.disk, &mut self.removals) else {
            return;
        };
        if removals.is_due(has_frontend) {
            if !self.is_lost() {
                tracing::warn!(
                    device = %self.path.display(),
                    "the disk's memory is given to the host: requests fail from now on"
                );
                self.is_given_up = true;
                self.tell_of_loss("given");
            }
            self.let_go();
        } else {
            removals.follow(|guard, within| disk.hold(guard, within));
        }
    }

    fn tell_of_loss(&self, how: &str) {
        self.events.send(Event::Lost {
            path: &self.path.to_string_lossy(),
            how,
        });
    }

    fn end_of_the_disk(&self) -> DaemonError {
        let path = self.path.clone();
        if self.is_given_up {
            DaemonError::GivenUp { path }
        } else {
            DaemonError::Lost { path }
        }
    }

    /// What there is to do, a signal first.
    fn wait(&self, session: Option<&Session>) -> Result<Vec<Source>, DaemonError> {
        let frontend = session.map_or(self.socket.as_fd(), Session::as_fd);
        let mut sources = vec![
            (Source::Signal, self.signals.as_fd()),
            (Source::Incident, self.incidents.as_fd()),
            (Source::Frontend, frontend),
        ];
        if let Some(watch) = &self.watch {
            sources.push((Source::Watch, watch.as_fd()));
        }
        if let Some(server) = &self.server {
            sources.push((Source::Metrics, server.as_fd()));
        }
        let removals = self.removals.as_ref();
        if let Some(fd) = removals.and_then(Removals::fd) {
            sources.push((Source::Guard, fd));
        }
        let until = removals.and_then(Removals::wakes_at);
        let within = until.map(|until| until.saturating_duration_since(Instant::now()));
        let fds: Vec<_> = sources.iter().map(|(_, fd)| *fd).collect();
        let ready = ready(&fds, within).map_err(failed("wait for events"))?;
        let awake = sources.iter().zip(ready).filter(|(_, ready)| *ready);
        Ok(awake.map(|((source, _), _)| *source).collect())
    }

    fn is_lost(&self) -> bool {
        matches!(&self.disk, OpenDisk::Dax(disk) if disk.is_lost())
    }

    /// Lets go of a device that is gone.
    fn look_after_the_disk(&mut self) -> Result<(), DaemonError> {
        let touched = self.is_lost();
        if let Some(watch) = &mut self.watch
            && (!watch.read()?.is_empty() || touched)
        {
            tracing::error!(
                device = %self.path.display(),
                "the host takes the disk's memory away: requests fail from now on"
            );
            self.tell_of_loss("taken");
            self.let_go();
        }
        Ok(())
    }

    /// Nothing of the device is kept: its memory may come back only when nobody has it mapped. Who waits for it is answered then.
    fn let_go(&mut self) {
        // Before the mapping: it looks at its address.
        self.watch = None;
        let OpenDisk::Dax(disk) = &self.disk else {
            return;
        };
        match disk.release() {
            Ok(()) => {
                if let Some(removals) = self.removals.take() {
                    removals.let_go(disk.device());
                }
            }
            Err(error) => {
                tracing::error!(%error, "the disk's memory is kept by the kernel: it is tried again");
                if let Some(removals) = &mut self.removals {
                    removals.put_off();
                }
            }
        }
    }

    /// `None` when the frontend could not be served; the next one may.
    fn accept(&mut self) -> Result<Option<Session>, DaemonError> {
        let backend = Backend::new(self.disk.shared(), self.num_queues, self.metrics.clone());
        let (events, sessions) = (&self.events, &self.metrics.sessions);
        let session = Session::accept(backend, self.socket.accepting(), events, sessions);
        session.map_err(failed("start a session"))
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> DaemonError {
    move |source| DaemonError::Loop { what, source }
}

/// Answers what was taken and waits until nothing of the session is left.
fn finish(session: Session) -> Result<(), DaemonError> {
    session.finish(FINISH).map_err(|error| match error {
        FinishError::Unfinished => DaemonError::Unfinished { within: FINISH },
        FinishError::Wait(source) => failed("wait for events")(source),
    })
}
