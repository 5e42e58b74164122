//! The threads that serve queues.
//!
//! ```text
//!            spawn                 pause              resume
//!   (none) ─────────▶ Running ───────────▶ Paused ───────────▶ Running
//!                        │ stop               │ stop
//!                        └─────▶ draining ◀───┘ ──▶ gone: `is_gone`, the queues and their memory are let go of
//! ```
//! A worker is a subscriber of an event manager that runs on its thread. It is told to stop through a descriptor, so
//! stopping never waits for the guest; it ends when what is in flight has come back from the host.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use tracing::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Serves queues on a thread of its own. Its events are those of [`MutEventSubscriber`]: `init` adds the doorbells and
/// what else it waits for, `process` matches one closed set of tokens.
pub trait Worker: MutEventSubscriber + Send {
    /// The thread's name, at most 15 bytes: `_disk0_q0`, `_net0`, `_rng`.
    fn name(&self) -> String;

    /// Called last on the thread: finish or cancel what the host still works on. When it returns, nothing reaches
    /// guest memory any more.
    fn drain(&mut self) {}
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct Control {
    wish: Mutex<Wish>,
    changed: Condvar,
    /// Threads that are held in a pause.
    paused: AtomicUsize,
    /// Threads that have not ended.
    alive: AtomicUsize,
    failed: AtomicBool,
}

impl Control {
    fn wish(&self) -> Wish {
        *self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The workers of one activation of one device.
#[derive(Debug)]
pub struct Crew {
    control: Arc<Control>,
    wakes: Vec<Arc<EventFd>>,
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Starts a thread for each worker.
    pub fn spawn(workers: Vec<Box<dyn Worker>>) -> io::Result<Self> {
        let control = Arc::new(Control {
            wish: Mutex::new(Wish::Run),
            changed: Condvar::new(),
            paused: AtomicUsize::new(0),
            alive: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        });
        let mut crew = Self {
            control,
            wakes: Vec::new(),
            threads: Vec::new(),
        };
        for worker in workers {
            let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
            let (control, on_thread) = (Arc::clone(&crew.control), Arc::clone(&wake));
            crew.control.alive.fetch_add(1, Ordering::SeqCst);
            let thread = Builder::new()
                .name(worker.name())
                .spawn(move || {
                    // Also when the worker panics.
                    let _gone = Gone(&control);
                    serve(worker, &control, &on_thread);
                })
                .inspect_err(|_| {
                    crew.control.alive.fetch_sub(1, Ordering::SeqCst);
                })?;
            crew.wakes.push(wake);
            crew.threads.push(thread);
        }
        Ok(crew)
    }

    /// Tells the workers to end and returns at once; [`Crew::is_gone`] tells when they have.
    pub fn stop(&self) {
        self.want(Wish::Stop);
    }

    /// Tells the workers to serve nothing; [`Crew::is_paused`] tells when none does.
    pub fn pause(&self) {
        self.want(Wish::Pause);
    }

    /// The undo of [`Crew::pause`].
    pub fn resume(&self) {
        self.want(Wish::Run);
    }

    /// Whether no worker touches guest memory any more.
    pub fn is_gone(&self) -> bool {
        self.control.alive.load(Ordering::SeqCst) == 0
    }

    /// Whether every worker that lives is held.
    pub fn is_paused(&self) -> bool {
        self.control.paused.load(Ordering::SeqCst) >= self.control.alive.load(Ordering::SeqCst)
    }

    /// Whether a worker ended by itself: its event loop failed or it panicked.
    pub fn has_failed(&self) -> bool {
        self.control.failed.load(Ordering::SeqCst)
    }

    fn want(&self, wish: Wish) {
        {
            let mut current = self
                .control
                .wish
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // A stop is for good.
            if *current != Wish::Stop {
                *current = wish;
            }
        }
        self.control.changed.notify_all();
        for wake in &self.wakes {
            // Only a full counter gives an error, and then the worker is awake anyway.
            let _ = wake.write(1);
        }
    }
}

impl Drop for Crew {
    /// Waits for the workers: bounded by what the host has in flight for them.
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                error!(thread = name, "a device's worker panicked");
            }
        }
    }
}

struct Gone<'a>(&'a Control);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        if self.0.wish() != Wish::Stop {
            self.0.failed.store(true, Ordering::SeqCst);
        }
        self.0.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Wakes the event manager when the owner wants something.
struct WakeUp(Arc<EventFd>);

impl MutEventSubscriber for WakeUp {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(self.0.as_ref(), EventSet::IN)) {
            error!(%error, "a worker can't be woken");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.0.read();
    }
}

/// The whole life of a worker's thread.
fn serve(worker: Box<dyn Worker>, control: &Control, wake: &Arc<EventFd>) {
    let mut manager: EventManager<Box<dyn MutEventSubscriber + Send>> = match EventManager::new() {
        Ok(manager) => manager,
        Err(error) => {
            error!(%error, "a worker has no event manager");
            return;
        }
    };
    manager.add_subscriber(Box::new(WakeUp(Arc::clone(wake))));
    // Shared with nobody: only so that `drain` can be called after the manager is done with it.
    let worker = Arc::new(Mutex::new(worker));
    manager.add_subscriber(Box::new(Arc::clone(&worker)) as Box<dyn MutEventSubscriber + Send>);
    loop {
        match control.wish() {
            Wish::Run => {}
            Wish::Stop => break,
            Wish::Pause => {
                control.paused.fetch_add(1, Ordering::SeqCst);
                let wish = control.wish.lock().unwrap_or_else(PoisonError::into_inner);
                // Ends when the owner resumes or stops, which it always does.
                drop(
                    control
                        .changed
                        .wait_while(wish, |wish| *wish == Wish::Pause)
                        .unwrap_or_else(PoisonError::into_inner),
                );
                control.paused.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
        }
        if let Err(error) = manager.run() {
            error!(%error, "a worker's event loop failed");
            break;
        }
    }
    worker
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .drain();
}
