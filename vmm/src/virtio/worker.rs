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
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

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

    /// Holds the calling thread in a pause. Ends when the owner resumes or stops, which it always does.
    fn hold(&self) {
        let wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        // Both under the lock: whoever asks for a pause again after a resume never counts one who is on its way out.
        self.paused.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_all();
        let wish = self
            .changed
            .wait_while(wish, |wish| *wish == Wish::Pause)
            .unwrap_or_else(PoisonError::into_inner);
        self.paused.fetch_sub(1, Ordering::SeqCst);
        drop(wish);
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

    /// Waits until [`Crew::is_gone`]; `false` when it is not by then.
    pub fn wait_gone(&self, at_most: Duration) -> bool {
        let wish = self
            .control
            .wish
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (_wish, timeout) = self
            .control
            .changed
            .wait_timeout_while(wish, at_most, |_| !self.is_gone())
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
    }

    /// Whether no worker touches guest memory any more.
    pub fn is_gone(&self) -> bool {
        self.control.alive.load(Ordering::SeqCst) == 0
    }

    /// Waits until every worker that lives is held; `false` when one is not by then. What keeps it is the host: a
    /// read or a flush that does not come back.
    pub fn wait_paused(&self, at_most: Duration) -> bool {
        let wish = self
            .control
            .wish
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (_wish, timeout) = self
            .control
            .changed
            .wait_timeout_while(wish, at_most, |_| !self.is_paused())
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
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
        let _wish = self.0.wish.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.alive.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify_all();
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
    // Shared with nobody: only so that `drain` can be called after the manager is done with it.
    let worker = Arc::new(Mutex::new(worker));
    let served = catch_unwind(AssertUnwindSafe(|| {
        serve_events(&worker, control, wake);
    }));
    // Also after a panic: the host may still work on what is in flight.
    worker
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .drain();
    if let Err(panic) = served {
        resume_unwind(panic);
    }
}

fn serve_events(worker: &Arc<Mutex<Box<dyn Worker>>>, control: &Control, wake: &Arc<EventFd>) {
    let mut manager: EventManager<Box<dyn MutEventSubscriber + Send>> = match EventManager::new() {
        Ok(manager) => manager,
        Err(error) => {
            error!(%error, "a worker has no event manager");
            return;
        }
    };
    manager.add_subscriber(Box::new(WakeUp(Arc::clone(wake))));
    manager.add_subscriber(Box::new(Arc::clone(worker)));
    loop {
        match control.wish() {
            Wish::Stop => return,
            Wish::Pause => control.hold(),
            Wish::Run => {
                if let Err(error) = manager.run() {
                    error!(%error, "a worker's event loop failed");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// What a worker did, as its owner sees it.
    #[derive(Default)]
    struct Seen {
        events: AtomicUsize,
        drained: AtomicUsize,
    }

    struct Probe {
        event: Arc<EventFd>,
        seen: Arc<Seen>,
        /// Never takes the event, so that it comes again and again.
        restless: bool,
        panics: bool,
    }

    impl MutEventSubscriber for Probe {
        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(self.event.as_ref(), EventSet::IN))
                .unwrap();
        }

        fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
            assert!(!self.panics, "as the test wants");
            if !self.restless {
                self.event.read().unwrap();
            }
            self.seen.events.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Worker for Probe {
        fn name(&self) -> String {
            "_probe".to_owned()
        }

        fn drain(&mut self) {
            self.seen.drained.fetch_add(1, Ordering::SeqCst);
        }
    }

    struct Bench {
        event: Arc<EventFd>,
        seen: Arc<Seen>,
    }

    impl Bench {
        fn new() -> Self {
            Self {
                event: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
                seen: Arc::default(),
            }
        }

        fn probe(&self) -> Probe {
            Probe {
                event: Arc::clone(&self.event),
                seen: Arc::clone(&self.seen),
                restless: false,
                panics: false,
            }
        }

        fn crew(probe: Probe) -> Crew {
            Crew::spawn(vec![Box::new(probe)]).unwrap()
        }

        fn ring(&self) {
            self.event.write(1).unwrap();
        }

        fn events(&self) -> usize {
            self.seen.events.load(Ordering::SeqCst)
        }

        fn drained(&self) -> usize {
            self.seen.drained.load(Ordering::SeqCst)
        }
    }

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < end, "never: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_paused_worker_serves_nothing_and_forgets_nothing() {
        let bench = Bench::new();
        let crew = Bench::crew(bench.probe());
        for round in 0..200 {
            crew.pause();
            until("it is held", || crew.is_paused());
            bench.ring();
            assert!(crew.is_paused());
            assert_eq!(bench.events(), round);
            crew.resume();
            until("it has served", || bench.events() == round + 1);
        }
        assert!(!crew.is_gone() && !crew.has_failed());
    }

    #[test]
    fn a_pause_counts_nobody_who_is_still_being_resumed() {
        let bench = Bench::new();
        let crew = Bench::crew(Probe {
            restless: true,
            ..bench.probe()
        });
        bench.ring();
        for _ in 0..300 {
            crew.pause();
            until("it is held", || crew.is_paused());
            let before = bench.events();
            std::thread::yield_now();
            assert_eq!(bench.events(), before, "served while paused");
            crew.resume();
        }
    }

    #[test]
    fn one_that_is_never_done_can_be_paused_and_stopped() {
        let bench = Bench::new();
        let crew = Bench::crew(Probe {
            restless: true,
            ..bench.probe()
        });
        bench.ring();
        until("it serves", || bench.events() > 10);
        crew.pause();
        until("it is held", || crew.is_paused());
        crew.resume();
        let before = bench.events();
        until("it serves again", || bench.events() > before);
        crew.stop();
        until("it is gone", || crew.is_gone());
        assert_eq!(bench.drained(), 1);
    }

    #[test]
    fn stop_ends_a_pause_and_lets_go_of_everything() {
        let bench = Bench::new();
        let crew = Bench::crew(bench.probe());
        crew.pause();
        until("it is held", || crew.is_paused());
        crew.stop();
        until("it is gone", || crew.is_gone());
        assert_eq!(bench.drained(), 1);
        assert_eq!(Arc::strong_count(&bench.seen), 1, "the worker is dropped");
        assert!(!crew.has_failed());
        // A stop is for good.
        crew.resume();
        crew.pause();
        assert!(crew.is_gone() && crew.is_paused());
    }

    #[test]
    fn a_stop_that_comes_first_is_not_lost() {
        for _ in 0..200 {
            let bench = Bench::new();
            let crew = Bench::crew(bench.probe());
            crew.stop();
            drop(crew);
            assert_eq!(bench.drained(), 1);
        }
    }

    #[test]
    fn one_that_panics_is_drained_and_the_others_live() {
        let (bad, good) = (Bench::new(), Bench::new());
        let panics = Probe {
            panics: true,
            ..bad.probe()
        };
        let crew = Crew::spawn(vec![Box::new(panics), Box::new(good.probe())]).unwrap();
        assert!(!crew.has_failed());
        bad.ring();
        until("it is seen", || crew.has_failed());
        until("it lets go", || Arc::strong_count(&bad.seen) == 1);
        assert_eq!(bad.drained(), 1);
        assert!(!crew.is_gone());
        good.ring();
        until("the other serves", || good.events() == 1);
        crew.pause();
        until("the other is held", || crew.is_paused());
        crew.stop();
        until("both are gone", || crew.is_gone());
        drop(crew);
        assert_eq!(good.drained(), 1);
    }

    #[test]
    fn nobody_is_gone_and_held() {
        let crew = Crew::spawn(Vec::new()).unwrap();
        assert!(crew.is_gone() && crew.is_paused() && !crew.has_failed());
    }
}
