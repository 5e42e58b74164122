//! The event monitor: what happens, as JSON objects in a file, a FIFO or a socket. For the VMM and for daemons.
//!
//! ```text
//!   Monitor::send ──▶ queue of a fixed length ──▶ thread `event-monitor` ──▶ the file
//! ```
//! Names and form are Cloud Hypervisor's: each event is one pretty-printed object with `timestamp` (since the monitor
//! was opened), `source`, `event` and `properties` (texts, or null), and an empty line after it. Who reads line by line takes
//! [`Form::JsonLines`]: the same objects, each on one line.
//!
//! Invariants:
//! - [`Monitor::send`] never waits. When the reader is slow or absent and the queue is full, events are dropped, and a
//!   warning says so once: what a guest can repeat must not fill the log.
//! - Braces are only those of JSON objects: readers count them to find an object's end. In texts they become
//!   parentheses.
//! - Closing waits for nobody: events that the file does not take at once are lost.

#![forbid(unsafe_code)]

mod event;
mod sink;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{error, warn};

pub use event::{Event, Form, UnknownForm};

use sink::{Sink, Written};

/// Events that wait to be written.
const QUEUE: usize = 1024;

/// How long the thread may take to end; only a file system that hangs makes it last.
const PATIENCE: Duration = Duration::from_secs(1);

/// Events can't be written.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The path.
    #[error("can't write events to {}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The descriptor.
    #[error("can't write events to the descriptor")]
    Descriptor(#[source] io::Error),
    /// Open for reading only.
    #[error("can't write events to the descriptor: it is open for reading only")]
    ReadOnly,
    /// The thread or what it needs.
    #[error("the thread that writes events can't be started")]
    Thread(#[source] io::Error),
}

/// The owner's end: while it lives, events are written.
#[derive(Debug)]
pub struct EventMonitor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<()>,
}

/// Sends events; cheap to clone. Without an [`EventMonitor`] it only logs them.
#[derive(Clone, Debug, Default)]
pub struct Monitor(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    start: Instant,
    form: Form,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Takes the thread out of its wait for a reader.
    end: sink::Wake,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<String>,
    ended: bool,
    warned: bool,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventMonitor {
    /// Writes events to what is at `path`: a FIFO, whether somebody reads it by now or not, or a file, which is made
    /// when it is not there and emptied when it is.
    pub fn open(path: &Path, form: Form) -> Result<Self, OpenError> {
        let sink = Sink::open(path).map_err(|source| OpenError::Path {
            path: path.to_owned(),
            source,
        })?;
        Self::start(sink, form)
    }

    /// Writes events to a pipe, a socket or a file that is open already. It is set to non-blocking, which whoever
    /// shares it sees, too.
    pub fn inherited(descriptor: OwnedFd, form: Form) -> Result<Self, OpenError> {
        let sink = Sink::of(descriptor).map_err(|error| match error.raw_os_error() {
            Some(libc::EBADF) => OpenError::ReadOnly,
            _ => OpenError::Descriptor(error),
        })?;
        Self::start(sink, form)
    }

    fn start(sink: Sink, form: Form) -> Result<Self, OpenError> {
        let shared = Arc::new(Shared {
            start: Instant::now(),
            form,
            queue: Mutex::default(),
            changed: Condvar::new(),
            end: sink::Wake::new().map_err(OpenError::Thread)?,
        });
        let (end, ended) = channel::<()>();
        let on_thread = Arc::clone(&shared);
        let thread = Builder::new()
            .name("event-monitor".to_owned())
            .spawn(move || {
                // Dropped when the thread ends in whatever way.
                let _end = end;
                write(&on_thread, sink);
            })
            .map_err(OpenError::Thread)?;
        Ok(Self {
            shared,
            thread: Some(thread),
            ended,
        })
    }

    /// What sends events to it.
    pub fn monitor(&self) -> Monitor {
        Monitor(Some(Arc::clone(&self.shared)))
    }
}

impl Drop for EventMonitor {
    fn drop(&mut self) {
        self.shared.queue().ended = true;
        self.shared.end.wake();
        self.shared.changed.notify_one();
        let Some(thread) = self.thread.take() else {
            return;
        };
        match self.ended.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Timeout) => warn!("the last events are still being written"),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                if thread.join().is_err() {
                    error!("the thread that writes events panicked; this is a defect of daxhund");
                }
            }
        }
    }
}

impl Monitor {
    /// Sends nothing.
    pub fn off() -> Self {
        Self::default()
    }

    /// Tells what happened; returns at once.
    pub fn send(&self, event: &impl Event) {
        tracing::debug!(source = event.source(), event = event.name(), "event");
        let Some(shared) = &self.0 else {
            return;
        };
        let text = event::text(event, shared.start.elapsed(), shared.form);
        let mut queue = shared.queue();
        if queue.ended {
            return;
        }
        if queue.events.len() < QUEUE {
            queue.events.push_back(text);
            shared.changed.notify_one();
        } else if !queue.warned {
            queue.warned = true;
            warn!(
                "events are dropped: {QUEUE} wait for whoever reads the event monitor; this is said once"
            );
        }
    }
}

/// The thread's life.
fn write(shared: &Shared, mut sink: Sink) {
    loop {
        let text = {
            let queue = shared.queue();
            // Ends when there is an event or the owner drops its end, which it always does.
            let mut queue = shared
                .changed
                .wait_while(queue, |queue| queue.events.is_empty() && !queue.ended)
                .unwrap_or_else(PoisonError::into_inner);
            match queue.events.pop_front() {
                Some(text) => text,
                None => return,
            }
        };
        match sink.write(text.as_bytes(), &shared.end) {
            Ok(Written::All) => {}
            Ok(Written::Ended) => return,
            Err(error) => {
                warn!(%error, "events can't be written any more");
                let mut queue = shared.queue();
                queue.ended = true;
                queue.events = VecDeque::new();
                return;
            }
        }
    }
}
