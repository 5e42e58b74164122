//! Numbers for a monitoring system: what is so now, and how often it was, as `OpenMetrics` text.
//!
//! ```text
//!   the owner ────publish────▶ View (replaced, never changed) ◀──┐
//!   vCPU threads ──count─────▶ ExitCounts                     ◀──┼── text: the API's thread
//!   whoever pins memory ─────▶ PinCounts                      ◀──┘
//! ```
//! The owner is one thread, and some of what it does takes minutes: a start pins all memory, a backend is waited for. A
//! monitoring system that had to wait for it would miss just that time. So nobody who asks waits for the owner: it publishes a
//! [`View`] when it has done something, and the text is made of the last one, with its age. What moves while the owner is busy
//! (exits, a pin) is counted beside the view by those who do it. Counters of devices are in the view, as the owner has read
//! them, because a device's files are open as long as anybody has a handle to it: a reader's would keep memory from going back
//! to the host. The API's thread asks the owner to publish anew first, and gives it a moment ([`PATIENCE`]).
//!
//! Counts of vCPUs and pins are of the process: they go on over resets and over a guest's end.

#![forbid(unsafe_code)]

mod text;
mod view;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use view::{Outcomes, View, VmPhase};

use crate::kvm::ExitCounts;

/// For the owner to publish what is so now, before it is told what was so. It does at once when it is not busy.
pub const PATIENCE: Duration = Duration::from_millis(100);

/// What the text is served as.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The numbers of this process; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    view: Mutex<Arc<View>>,
    /// By number.
    vcpus: Mutex<Vec<Arc<ExitCounts>>>,
    pins: PinCounts,
}

/// Memory that is pinned for devices, over time.
#[derive(Debug, Default)]
struct PinCounts {
    count: AtomicU64,
    nanos: AtomicU64,
    /// Of the one that is under way.
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Metrics {
    /// What is so from now on.
    pub fn publish(&self, view: View) {
        *locked(&self.0.view) = Arc::new(view);
    }

    /// A guest is being started, which takes its time.
    pub fn booting(&self) {
        self.publish(View {
            state: VmPhase::Booting,
            ..View::clone(&self.view())
        });
    }

    /// Where a vCPU counts its exits.
    pub fn exits_of(&self, vcpu: u8) -> Arc<ExitCounts> {
        let mut vcpus = locked(&self.0.vcpus);
        let index = usize::from(vcpu);
        if vcpus.len() <= index {
            vcpus.resize_with(index + 1, Arc::default);
        }
        Arc::clone(&vcpus[index])
    }

    /// So much of what is to be pinned is.
    pub fn pinning(&self, done_bytes: u64, total_bytes: u64) {
        let pins = &self.0.pins;
        pins.done_bytes.store(done_bytes, Ordering::Relaxed);
        pins.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    /// That is over, well or not.
    pub fn pinned(&self, took: Duration) {
        let pins = &self.0.pins;
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        pins.nanos.fetch_add(nanos, Ordering::Relaxed);
        pins.count.fetch_add(1, Ordering::Relaxed);
        self.pinning(0, 0);
    }

    /// All of it, as text that ends with `# EOF`. Waits for nobody.
    pub fn text(&self) -> String {
        text::of(text::Moment {
            view: self.view(),
            vcpus: locked(&self.0.vcpus).clone(),
            pins: {
                let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
                let pins = &self.0.pins;
                text::Pins {
                    count: read(&pins.count),
                    took: Duration::from_nanos(read(&pins.nanos)),
                    done_bytes: read(&pins.done_bytes),
                    total_bytes: read(&pins.total_bytes),
                }
            },
            now: Instant::now(),
        })
    }

    fn view(&self) -> Arc<View> {
        Arc::clone(&locked(&self.0.view))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
