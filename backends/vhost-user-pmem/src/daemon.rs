//! The daemon: one frontend at a time, until a signal or the loss of the memory.
//!
//! ```text
//!              a frontend connects
//!   waiting ───────────────────────▶ session ──┐
//!      ▲                               │       │ SIGTERM, SIGINT: no more requests are taken, those that were are
//!      └──── it goes away ─────────────┘       │ answered, the connection is shut ──▶ end
//!            the range is locked anew          │
//!                the memory is gone: flushes fail, the device is let go of; ends with the session ──▶ error
//! ```
//! Each connection gets a session of its own; nothing of one reaches the next. A frontend that connects meanwhile waits in the
//! socket's queue.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use daxhund_dax::sigbus::{GuardError, Incidents};
use daxhund_dax::{Host, Pace, Watch, WatchError, WatchId};
use daxhund_vhost_user::events::{ready, signals};
use daxhund_vhost_user::session::{self, FinishError, StartError};
use daxhund_vhost_user::socket::{Socket, SocketError};
use thiserror::Error;

use crate::backend::Backend;
use crate::config::Config;
use crate::lender::{LendError, Lender};

type Session = session::Session<Backend>;

/// How long a session has to finish its flushes; only storage that hangs needs longer, and then the end is an error.
const FINISH: Duration = Duration::from_secs(10);
/// How often a range is asked for that somebody has kept.
const ASK_AGAIN: Duration = Duration::from_secs(1);

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
    socket: Socket,
    signals: UnixStream,
    incidents: Incidents,
    watch: Watch,
    /// `None` while there is nothing to watch.
    watched: Option<WatchId>,
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
    /// The range is ours again.
    Regained,
    /// One wants to connect, or the one that is served has gone.
    Frontend,
}

impl Daemon {
    /// Opens and locks the range, then listens. On an error nothing is left.
    pub fn new(config: &Config) -> Result<Self, DaemonError> {
        let host = Host::system();
        let incidents = Incidents::open()?;
        let signals = signals().map_err(failed("handle signals"))?;
        let lender = Arc::new(Lender::open(&host, config)?);
        let mut watch = Watch::new(&host, Pace::default())?;
        let watched = lender.watch(&mut watch)?;
        if watched.is_some() {
            for unheard in watch.unheard() {
                tracing::warn!("{unheard}");
            }
        }
        let socket = Socket::open(config.socket_path.as_deref())?;
        tracing::info!(
            memory = %lender.path().display(), offset = lender.offset(), bytes = lender.len(),
            read_only = config.read_only, "listening"
        );
        Ok(Self {
            lender,
            socket,
            signals,
            incidents,
            watch,
            watched,
        })
    }

    /// Serves until a signal, which is an orderly end, or until the memory is gone.
    pub fn run(mut self) -> Result<(), DaemonError> {
        let mut session: Option<Session> = None;
        while session.is_some() || !self.lender.is_lost() {
            let sources = self.wait(session.as_ref())?;
            if sources.is_empty() {
                self.renew()?;
            }
            for source in sources {
                match source {
                    Source::Signal => {
                        tracing::info!("ending by a signal");
                        return session.map_or(Ok(()), finish);
                    }
                    Source::Incident => {
                        self.incidents.take();
                        tracing::debug!("memory was touched that is gone");
                    }
                    Source::Watch => self.look_after_the_device()?,
                    Source::Regained => {
                        let mut count = [0; 8];
                        // Nothing to read when it was read before.
                        let _ = rustix::io::read(self.lender.regained(), &mut count);
                        self.watch_anew()?;
                    }
                    Source::Frontend => {
                        session = match session.take() {
                            // It has ended, so this does not wait.
                            Some(session) => {
                                finish(session)?;
                                self.renew()?;
                                None
                            }
                            None => self.accept()?,
                        };
                    }
                }
            }
        }
        Err(DaemonError::Lost {
            path: self.lender.path().to_owned(),
        })
    }

    /// What there is to do, a signal first; nothing: it is time to ask for the range.
    fn wait(&self, session: Option<&Session>) -> Result<Vec<Source>, DaemonError> {
        let frontend = session.map_or(self.socket.as_fd(), Session::as_fd);
        let sources = [
            (Source::Signal, self.signals.as_fd()),
            (Source::Incident, self.incidents.as_fd()),
            (Source::Regained, self.lender.regained()),
            (Source::Watch, self.watch.as_fd()),
            (Source::Frontend, frontend),
        ];
        let fds = sources.map(|(_, fd)| fd);
        let is_wanted = session.is_none() && self.lender.is_kept();
        let ready =
            ready(&fds, is_wanted.then_some(ASK_AGAIN)).map_err(failed("wait for events"))?;
        let awake = sources.iter().zip(ready).filter(|(_, ready)| *ready);
        Ok(awake.map(|((source, _), _)| *source).collect())
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
        self.forget()?;
        self.lender.lose();
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
        if self.lender.lend().is_err() {
            self.renew()?;
        }
        let backend = Backend::new(Arc::clone(&self.lender));
        match Session::start(backend, self.socket.accepting()) {
            Ok(session) => {
                tracing::info!("a frontend has connected");
                Ok(Some(session))
            }
            Err(StartError::Crate(error)) => {
                tracing::warn!(%error, "a frontend can't be served");
                Ok(None)
            }
            Err(StartError::Host(source)) => Err(failed("start a session")(source)),
        }
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
