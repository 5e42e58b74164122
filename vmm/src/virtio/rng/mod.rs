//! virtio-rng: random numbers of the host for the guest (virtio 1.2, section 5.4).
//!
//! The driver gives buffers, the worker fills them from the source. A source that is slow (a FIFO, `/dev/random` soon
//! after boot) is waited for on the device's own thread, which a stop interrupts; a source that has ended leaves the
//! driver's buffers where they are, for no bytes are better than made-up ones.

mod source;
mod worker;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{ActivateError, Activation, Device, Kind};
use super::worker::Worker;
pub use source::OpenRngError;
use source::Source;
use worker::RngWorker;

const REQUEST: u16 = 0;
const QUEUE_SIZE: u16 = 64;

/// What `--rng` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngSpec {
    /// Id of the device.
    pub id: String,
    /// Where the numbers come from.
    pub src: PathBuf,
}

/// The device.
#[derive(Debug)]
pub struct RngDevice {
    id: String,
    /// Shared with the worker. Two never run at a time, so nobody waits for it.
    source: Arc<Mutex<Source>>,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    source_errors: AtomicU64,
    bad_chains: AtomicU64,
}

impl RngDevice {
    /// Opens the source.
    pub fn open(spec: RngSpec) -> Result<Self, OpenRngError> {
        Ok(Self {
            source: Arc::new(Mutex::new(Source::open(spec.src)?)),
            id: spec.id,
            counters: Arc::default(),
        })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl Device for RngDevice {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let Activation {
            memory,
            queues,
            signals,
            ..
        } = activation;
        let queue = queues
            .into_iter()
            .next()
            .flatten()
            .ok_or(ActivateError::MissingQueue { index: REQUEST })?;
        let source = Arc::clone(&self.source);
        let counters = Arc::clone(&self.counters);
        let worker =
            RngWorker::new(queue, memory, signals, source, counters).map_err(|source| {
                ActivateError::Host {
                    what: "no timer for the random number source",
                    source,
                }
            })?;
        Ok(vec![Box::new(worker)])
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("bytes", get(&self.counters.bytes)),
            ("source_errors", get(&self.counters.source_errors)),
            ("bad_chains", get(&self.counters.bad_chains)),
        ]
    }
}

fn lock(source: &Mutex<Source>) -> std::sync::MutexGuard<'_, Source> {
    source.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
