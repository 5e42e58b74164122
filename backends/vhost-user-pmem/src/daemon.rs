//! The daemon: one frontend at a time, or many that only read, until a signal or the loss of the memory.
//!
//! ```text
//!              a frontend connects
//!   waiting ───────────────────────▶ session ──┐
//!      ▲                               │       │ SIGTERM, SIGINT: no more requests are taken, those that were are
//!      └──── it goes away ─────────────┘       │ answered, the connection is shut ──▶ end
//!            the range is locked anew          │
//!                the memory is gone: flushes fail, the device is let go of; ends with the session ──▶ error
//!
//!   the host wants the device ─▶ frontends are asked for it (SHMEM_UNMAP) ─▶ all have given it back, or their time is up:
//!            flushes fail, our share is closed ─▶ nobody has it mapped: the host is answered
//!                                                   └─ one keeps it: its session is cut; and still: the removal is refused
//! ```
//! Each connection gets a session of its own; nothing of one reaches the next. A frontend that connects meanwhile waits in the
//! socket's queue.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daxhund_dax::sigbus::{GuardError, Incidents};
use daxhund_dax::{Host, Pace, Watch, WatchError, WatchId};
use daxhund_guard::ConnectError;
use daxhund_monitor::OpenError;
use daxhund_vhost_user::event::{Event, Events, Nouns};
use daxhund_vhost_user::events::{ready, signals};
use daxhund_vhost_user::metrics::{MetricsSocketError, Server};
use daxhund_vhost_user::removal::Removals;
use daxhund_vhost_user::session::{self, FinishError};
use daxhund_vhost_user::socket::{Socket, SocketError};
use thiserror::Error;

use crate::backend::Backend;
use crate::config::Config;
use crate::lender::{LendError, Lender};
use crate::metrics::Metrics;

type Session = session::Session<Backend>;

/// The words for this daemon.
pub const NOUNS: Nouns = Nouns {
    program: "daxhund-vhost-user-pmem",
    source: "vhost-user-pmem",
    thing: "memory",
    lost: "memory-lost",
    use_of_it: "lent as persistent memory",
};

/// How long a session has to finish its flushes; only storage that hangs needs longer, and then the end is an error.
const FINISH: Duration = Duration::from_secs(10);
/// How often a range is asked for that somebody has kept.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Nobody is told when a lock goes. This is how often it is looked for while a removal waits for that.
const LOOK: Duration = Duration::from_millis(50);
/// How long a frontend has, when its guest's time is up, to take the guest off the memory; then its session is cut, and it has as
/// long again. Both are within what a removal has beyond the guest's time.
const PATIENCE: Duration = Duration::from_secs(10);
/// Frontends that read at once.
const MOST_READERS: usize = 64;

/// The daemon can't serve, or not any more.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// No memory.
    #[error(transparent)]
    Lend(#[from] LendError),
    /// No socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Memory that goes away can't be watched for.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// Nothing would survive the going away of a frontend's memory.
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
        "the host has taken {} away: start again when the device is back (`daxctl list`)",
        path.display()
    )]
    Lost {
        /// The device.
        path: PathBuf,
    },
    /// The device was given up.
    #[error(
        "the host wanted {} back and has it now: start again when the device is back (`daxctl list`); on_removal=refuse keeps it",
        path.display()
    )]
    GivenUp {
        /// The device.
        path: PathBuf,
    },
    /// Flushes are still under way.
    #[error(
        "flushes were not finished within {} s of the signal: does the file's storage hang?", within.as_secs()
    )]
    Unfinished {
        /// How long was waited.
        within: Duration,
    },
}

/// A range and a socket to lend it by.
#[derive(Debug)]
pub struct Daemon {
    lender: Arc<Lender>,
    most_sessions: usize,
    socket: Socket,
    signals: UnixStream,
    incidents: Incidents,
    events: Events,
    metrics: Arc<Metrics>,
    server: Option<Server>,
    watch: Watch,
    /// `None` while there is nothing to watch.
    watched: Option<WatchId>,
    /// `None` when there is nothing to remove, or not any more.
    removals: Option<Removals>,
    /// How far the removal is that is wanted now.
    leaving: Leaving,
    /// The host was given what it wanted.
    is_given_up: bool,
}

/// What frontends were told of a removal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Leaving {
    /// Nothing: nobody wants the device.
    #[default]
    Not,
    /// They were asked for the memory.
    AskedBack,
    /// They were cut off.
    Cut,
}

/// A cause of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The daemon is to end.
    Signal,
    /// Memory of a frontend was touched that is gone.
    Incident,
    /// A sign that the device goes away, or time to look.
    Watch,
    /// A frontend has shown that it has the range, or has given it back.
    Bell,
    /// Somebody wants the metrics.
    Metrics,
    /// The guard has something to say.
    Guard,
    /// The frontend of this session has gone.
    Session(usize),
    /// One wants to connect.
    Frontend,
}

impl Daemon {
    /// Opens and locks the range, then listens. On an error nothing is left.
    pub fn new(config: &Config) -> Result<Self, DaemonError> {
        let host = Host::system();
        let events = Events::open(config.policy.events.as_ref(), NOUNS);
        let events = events.map_err(DaemonError::Events)?;
        let metrics = Arc::new(Metrics::default());
        let incidents = Incidents::open()?;
        let signals = signals().map_err(failed("handle signals"))?;
        let lender = Arc::new(Lender::open(&host, config)?);
        let removals = lender.device().map(|_| {
            let (guard, policy) = (config.policy.removal_guard, config.policy.removal);
            Removals::new(guard, policy, events.clone())
        });
        let removals = removals.transpose().map_err(DaemonError::NoGuard)?;
        let mut watch = Watch::new(&host, Pace::default())?;
        let watched = lender.watch(&mut watch)?;
        if watched.is_some() {
            for unheard in watch.unheard() {
                tracing::warn!("{unheard}");
            }
        }
        let socket = Socket::open(config.socket_path.as_deref())?;
        let server = config.policy.metrics_socket.as_deref();
        let server = server.map(|path| metrics.serve(path)).transpose()?;
        events.send(Event::Listening {
            path: &lender.path().to_string_lossy(),
            bytes: &lender.len().to_string(),
        });
        tracing::info!(
            memory = %lender.path().display(), offset = lender.offset(), bytes = lender.len(),
            read_only = config.read_only, "listening"
        );
        Ok(Self {
            most_sessions: if config.read_only { MOST_READERS } else { 1 },
            lender,
            socket,
            signals,
            incidents,
            events,
            metrics,
            server,
            watch,
            watched,
            removals,
            leaving: Leaving::Not,
            is_given_up: false,
        })
    }

    /// Serves until a signal, which is an orderly end, or until the memory is gone.
    pub fn run(mut self) -> Result<(), DaemonError> {
        let outcome = self.serve();
        self.events.ending(&outcome);
        outcome
    }

    fn serve(&mut self) -> Result<(), DaemonError> {
        let mut sessions: Vec<Session> = Vec::new();
        loop {
            self.settle(&sessions)?;
            if sessions.is_empty() && self.lender.is_lost() {
                return Err(self.end_of_the_memory());
            }
            let sources = self.wait(&sessions)?;
            if sources.is_empty() && sessions.is_empty() && self.lender.is_kept() {
                self.renew()?;
            }
            for source in sources {
                match source {
                    Source::Signal => {
                        tracing::info!("ending by a signal");
                        return sessions.into_iter().try_for_each(finish);
                    }
                    Source::Incident => {
                        self.incidents.take();
                        tracing::debug!("memory was touched that is gone");
                    }
                    Source::Watch => self.look_after_the_device()?,
                    Source::Bell => {
                        self.lender.acknowledge_bell();
                        self.watch_anew()?;
                    }
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
                    Source::Session(index) => {
                        // It has ended, so this does not wait.
                        finish(sessions.remove(index))?;
                        self.events.send(Event::FrontendGone);
                        if !self.is_wanted() {
                            self.renew()?;
                        }
                    }
                    Source::Frontend => sessions.extend(self.accept()?),
                }
            }
        }
    }

    /// What there is to do, a signal first. Sessions come last one first, so that those before keep their places when one goes.
    fn wait(&self, sessions: &[Session]) -> Result<Vec<Source>, DaemonError> {
        let mut sources = vec![
            (Source::Signal, self.signals.as_fd()),
            (Source::Incident, self.incidents.as_fd()),
            (Source::Bell, self.lender.bell()),
            (Source::Watch, self.watch.as_fd()),
        ];
        if let Some(server) = &self.server {
            sources.push((Source::Metrics, server.as_fd()));
        }
        let removals = self.removals.as_ref();
        if let Some(fd) = removals.and_then(Removals::fd) {
            sources.push((Source::Guard, fd));
        }
        for (index, session) in sessions.iter().enumerate().rev() {
            sources.push((Source::Session(index), session.as_fd()));
        }
        if sessions.len() < self.most_sessions {
            sources.push((Source::Frontend, self.socket.as_fd()));
        }
        let within = if self.is_wanted() && self.lender.is_let_go() {
            Some(LOOK)
        } else {
            let until = removals.and_then(Removals::wakes_at);
            let until = until.map(|until| until.saturating_duration_since(Instant::now()));
            let is_missed = sessions.is_empty() && self.lender.is_kept();
            until
                .into_iter()
                .chain(is_missed.then_some(ASK_AGAIN))
                .min()
        };
        let fds: Vec<_> = sources.iter().map(|(_, fd)| *fd).collect();
        let ready = ready(&fds, within).map_err(failed("wait for events"))?;
        let awake = sources.iter().zip(ready).filter(|(_, ready)| *ready);
        Ok(awake.map(|((source, _), _)| *source).collect())
    }

    /// Whether somebody waits for the device.
    fn is_wanted(&self) -> bool {
        let wanted = self.removals.as_ref().and_then(Removals::wanted);
        wanted.is_some()
    }

    /// Has the device's removal held, and lets go of the device when that is due.
    fn settle(&mut self, sessions: &[Session]) -> Result<(), DaemonError> {
        let Some(removals) = &mut self.removals else {
            return Ok(());
        };
        let Some(until) = removals.wanted() else {
            self.leaving = Leaving::Not;
            if self.lender.is_let_go() {
                // Called off, or refused: those that still have it show it.
                self.renew()?;
                for session in sessions {
                    session.device().look_again();
                }
                self.watch_anew()?;
            }
            let lender = &self.lender;
            if let Some(removals) = &mut self.removals {
                removals.follow(|guard, within| lender.hold(guard, within));
            }
            return Ok(());
        };
        if self.leaving == Leaving::Not {
            self.leaving = Leaving::AskedBack;
            for session in sessions {
                session.device().ask_back();
            }
        }
        let now = Instant::now();
        let is_back = sessions.iter().all(|it| it.device().has_given_back());
        if !self.lender.is_let_go() && (is_back || now >= until) {
            tracing::warn!(
                device = %self.lender.path().display(), is_back,
                "the memory is let go of, for the host: flushes fail from now on"
            );
            self.forget()?;
            self.lender.let_go();
        }
        if self.lender.is_let_go() {
            self.hand_over(sessions, until, now);
        }
        Ok(())
    }

    /// Our share is closed. When nobody else has the range, the host gets the device.
    fn hand_over(&mut self, sessions: &[Session], until: Instant, now: Instant) {
        let path = self.lender.path().to_owned();
        let device = self.lender.device().unwrap_or_default().to_owned();
        // What can't be told is kept.
        let is_free = self.lender.is_free().unwrap_or_else(|error| {
            tracing::error!(%error, "can't see whether anybody has a lock on {}", path.display());
            false
        });
        if is_free {
            tracing::warn!(device = %path.display(), "the memory is given to the host");
            self.tell_of_loss("given");
            self.lender.lose();
            self.is_given_up = true;
            if let Some(removals) = self.removals.take() {
                removals.let_go(&device);
            }
        } else if now >= until + 2 * PATIENCE {
            if let Some(removals) = &mut self.removals {
                removals.refuse(
                    &device,
                    "a process that it was lent to does not give it back (`lslocks` shows it)",
                );
            }
        } else if now >= until + PATIENCE && self.leaving == Leaving::AskedBack {
            self.leaving = Leaving::Cut;
            if !sessions.is_empty() {
                tracing::warn!("the frontend keeps the memory: its session is cut");
                sessions.iter().for_each(Session::cut);
            }
        }
    }

    fn tell_of_loss(&self, how: &str) {
        self.events.send(Event::Lost {
            path: &self.lender.path().to_string_lossy(),
            how,
        });
    }

    fn end_of_the_memory(&self) -> DaemonError {
        let path = self.lender.path().to_owned();
        if self.is_given_up {
            DaemonError::GivenUp { path }
        } else {
            DaemonError::Lost { path }
        }
    }

    /// Nothing of a device that is gone is kept: its memory may come back only when nobody has it.
    fn look_after_the_device(&mut self) -> Result<(), DaemonError> {
        if self.watch.read()?.is_empty() {
            return Ok(());
        }
        tracing::error!(
            device = %self.lender.path().display(),
            "the host takes the memory away: flushes fail from now on"
        );
        self.tell_of_loss("taken");
        self.forget()?;
        self.lender.lose();
        if let (Some(removals), Some(device)) = (self.removals.take(), self.lender.device()) {
            removals.let_go(device);
        }
        Ok(())
    }

    fn forget(&mut self) -> Result<(), DaemonError> {
        if let Some(watched) = self.watched.take() {
            self.watch.forget(watched)?;
        }
        Ok(())
    }

    fn watch_anew(&mut self) -> Result<(), DaemonError> {
        self.forget()?;
        self.watched = self.lender.watch(&mut self.watch)?;
        Ok(())
    }

    /// After a session, and before one when the range was not ours.
    fn renew(&mut self) -> Result<(), DaemonError> {
        self.forget()?;
        self.lender.renew();
        self.watch_anew()
    }

    /// `None` when the frontend could not be served; the next one may.
    fn accept(&mut self) -> Result<Option<Session>, DaemonError> {
        if !self.is_wanted() && self.lender.lend().is_err() {
            self.renew()?;
        }
        let backend = Backend::new(Arc::clone(&self.lender), Arc::clone(&self.metrics));
        let (events, sessions) = (&self.events, &self.metrics.sessions);
        let session = Session::accept(backend, self.socket.accepting(), events, sessions);
        session.map_err(failed("start a session"))
    }
}

/// Answers what was taken and waits until nothing of the session is left.
fn finish(session: Session) -> Result<(), DaemonError> {
    session.finish(FINISH).map_err(|error| match error {
        FinishError::Unfinished => DaemonError::Unfinished { within: FINISH },
        FinishError::Wait(source) => failed("wait for events")(source),
    })
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> DaemonError {
    move |source| DaemonError::Loop { what, source }
}
