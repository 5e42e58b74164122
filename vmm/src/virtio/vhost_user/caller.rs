//! The thread that talks to the backend, and the end of a wait for it.
//!
//! ```text
//!   owner, worker, watch ──call(deadline)──▶ caller's thread ──▶ socket
//!          ▲                                      │
//!          └──────────── answer ──────────────────┘        deadline over: the socket is shut down, the call under way fails,
//!                                                          and the answer is that of a backend that is lost
//! ```
//! `vhost` waits for a reply without a limit, and takes a timeout of the socket for a reason to wait again. Shutting the
//! socket down is what ends it.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use thiserror::Error;

use super::shared::Shared;

/// From a socket that is shut down to the answer: the thread has only to be scheduled.
const GRACE: Duration = Duration::from_secs(2);

/// The thread does not come back, or is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the thread that talks to the vhost-user backend does not answer")]
pub struct NoAnswer;

/// The socket in use, for those who end its use.
#[derive(Debug, Default)]
pub(super) struct Line(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    stream: Option<Arc<UnixStream>>,
    /// How many there were.
    count: u64,
    /// Whether this one was given up on.
    gave_up: bool,
}

impl Line {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another one.
    pub(super) fn set(&self, stream: UnixStream) {
        let mut held = self.held();
        held.stream = Some(Arc::new(stream));
        held.count += 1;
        held.gave_up = false;
    }

    pub(super) fn get(&self) -> Option<Arc<UnixStream>> {
        self.held().stream.clone()
    }

    /// Tells one from the next.
    pub(super) fn count(&self) -> u64 {
        self.held().count
    }

    /// Whether the last one was given up on.
    pub(super) fn gave_up(&self) -> bool {
        self.held().gave_up
    }

    /// Both sides read the end of it from now on. Not an error: one that is not connected any more.
    pub(super) fn cut(&self) {
        if let Some(stream) = self.get() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn give_up(&self) {
        self.held().gave_up = true;
        self.cut();
    }

    /// No socket any more; whether it was given up on.
    pub(super) fn hang_up(&self) -> bool {
        self.cut();
        let mut held = self.held();
        held.stream = None;
        held.gave_up
    }
}

type Work<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A thread with a state of its own, which does what it is asked, one after the other.
pub(super) struct Caller<S> {
    shared: Arc<Shared>,
    work: Option<Sender<Work<S>>>,
    thread: Option<JoinHandle<()>>,
}

impl<S: Send + 'static> Caller<S> {
    pub(super) fn spawn(name: String, shared: Arc<Shared>, mut state: S) -> io::Result<Self> {
        let (work, todo) = channel::<Work<S>>();
        let thread = Builder::new().name(name).spawn(move || {
            // Ends with the last sender.
            for work in todo {
                work(&mut state);
            }
        })?;
        Ok(Self {
            shared,
            work: Some(work),
            thread: Some(thread),
        })
    }

    /// Has it done, and waits; after `at_most` the socket is shut down.
    pub(super) fn call<T: Send + 'static>(
        &self,
        at_most: Duration,
        work: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Result<T, NoAnswer> {
        let (answer, answered) = channel();
        let work: Work<S> = Box::new(move |state| {
            // One who does not wait any more needs none.
            let _ = answer.send(work(state));
        });
        let sender = self.work.as_ref().ok_or(NoAnswer)?;
        sender.send(work).map_err(|_| NoAnswer)?;
        match answered.recv_timeout(at_most) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) => Err(NoAnswer),
            Err(RecvTimeoutError::Timeout) => {
                self.shared.line.give_up();
                answered.recv_timeout(GRACE).map_err(|_| NoAnswer)
            }
        }
    }
}

impl<S> Drop for Caller<S> {
    /// Waits for the thread: bounded, because its socket is shut down and dialling does not wait.
    fn drop(&mut self) {
        drop(self.work.take());
        self.shared.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that talks to a vhost-user backend panicked");
        }
    }
}
