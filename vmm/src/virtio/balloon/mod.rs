//! virtio-balloon: the guest gives memory up that the host can use meanwhile (virtio 1.2, section 5.5).
//!
//! ```text
//!   owner ─resize─▶ num_pages ─configuration interrupt─▶ driver
//!   driver ─inflateq───▶ page numbers ─┐
//!          ─reportingq─▶ free ranges ──┴─▶ memory::discard   what the host can take back, it takes back
//!          ─deflateq───▶ page numbers      nothing to do: a page comes back when it is touched
//!          ─actual─────▶ configuration     what the balloon holds, as the driver says
//! ```
//! Where memory can't be given back (device-dax above all) the driver is answered as if it had been: the balloon is
//! right, only nobody gains by it. What was given back and what was not is counted.
//!
//! Not here: statistics, hints of free pages for a migration, page poison.

mod pages;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use thiserror::Error;

use super::device::{ActivateError, Activation, Device, Kind, LastSignals, read_space};
use super::worker::Worker;
use crate::memory::discard::Discard;
use pages::PAGE;
use worker::BalloonWorker;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Numbers of queues that are not offered are left out.
const REPORTING: u16 = 2;
/// Linux reports free pages only with at least 32.
const QUEUE_SIZE: u16 = 128;

/// Feature bit: the driver may take pages out again by itself when it has no other memory.
const F_DEFLATE_ON_OOM: u32 = 2;
/// Feature bit: the driver reports free pages.
const F_REPORTING: u32 = 5;

/// `actual` in the configuration space, after `num_pages`.
const ACTUAL: std::ops::Range<u64> = 4..8;

/// What `--balloon` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BalloonSpec {
    /// Id of the device.
    pub id: String,
    /// How much it is to hold, in bytes.
    pub size: u64,
    /// Whether the guest may take pages out again by itself when it has no other memory.
    pub deflate_on_oom: bool,
    /// Whether the guest reports free pages.
    pub free_page_reporting: bool,
}

/// A balloon can't have this size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BalloonSizeError {
    /// It holds whole pages.
    #[error(
        "a balloon of {bytes} bytes is not whole pages of 4096 bytes; {} is the next smaller size",
        bytes - bytes % PAGE
    )]
    NotPages {
        /// Size asked for.
        bytes: u64,
    },
    /// Its size is a 32-bit number of pages.
    #[error(
        "a balloon of {bytes} bytes is too large: it can hold at most {} bytes",
        Self::MOST
    )]
    TooLarge {
        /// Size asked for.
        bytes: u64,
    },
}

impl BalloonSizeError {
    const MOST: u64 = u32::MAX as u64 * PAGE;
}

/// The device.
pub struct BalloonDevice {
    id: String,
    features: u64,
    state: Arc<State>,
    discard: Arc<dyn Discard>,
    signals: LastSignals,
}

/// In pages of 4096 bytes where it does not say bytes.
#[derive(Debug, Default)]
struct State {
    target: AtomicU32,
    actual: AtomicU32,
    inflated: AtomicU64,
    deflated: AtomicU64,
    reported_bytes: AtomicU64,
    discarded_bytes: AtomicU64,
    kept_bytes: AtomicU64,
    outside_bytes: AtomicU64,
    ignored: AtomicU64,
    bad_chains: AtomicU64,
}

impl BalloonDevice {
    /// A balloon that is to hold `spec.size` bytes and gives what it gets to `discard`.
    pub fn new(spec: BalloonSpec, discard: Arc<dyn Discard>) -> Result<Self, BalloonSizeError> {
        let state = State::default();
        state.target.store(pages(spec.size)?, Ordering::Relaxed);
        let bit = |wanted: bool, bit: u32| u64::from(wanted) << bit;
        Ok(Self {
            id: spec.id,
            features: bit(spec.deflate_on_oom, F_DEFLATE_ON_OOM)
                | bit(spec.free_page_reporting, F_REPORTING),
            state: Arc::new(state),
            discard,
            signals: LastSignals::default(),
        })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Asks the driver for a balloon of `bytes`. It comes as far as it can and says so in `actual`; whether more is
    /// asked for than the guest has is the caller's to judge.
    pub fn resize(&self, bytes: u64) -> Result<(), BalloonSizeError> {
        self.state.target.store(pages(bytes)?, Ordering::SeqCst);
        self.signals.config_changed();
        Ok(())
    }

    /// What was asked for, in bytes.
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.state.target.load(Ordering::SeqCst)) * PAGE
    }

    /// What the driver says it holds, in bytes. Any number: the driver is not trusted.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.state.actual.load(Ordering::SeqCst)) * PAGE
    }
}

fn pages(bytes: u64) -> Result<u32, BalloonSizeError> {
    if !bytes.is_multiple_of(PAGE) {
        return Err(BalloonSizeError::NotPages { bytes });
    }
    u32::try_from(bytes / PAGE).map_err(|_| BalloonSizeError::TooLarge { bytes })
}

impl Device for BalloonDevice {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let reporting = self.features & (1 << F_REPORTING) != 0;
        vec![QUEUE_SIZE; if reporting { 3 } else { 2 }]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 8];
        let (target, actual) = (&self.state.target, &self.state.actual);
        space[..4].copy_from_slice(&target.load(Ordering::SeqCst).to_le_bytes());
        space[4..].copy_from_slice(&actual.load(Ordering::SeqCst).to_le_bytes());
        read_space(&space, offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        let merged = |actual: u32| {
            let mut bytes = actual.to_le_bytes();
            for (at, byte) in (offset..u64::MAX).zip(data) {
                if ACTUAL.contains(&at) {
                    bytes[usize::try_from(at - ACTUAL.start).ok()?] = *byte;
                }
            }
            Some(u32::from_le_bytes(bytes))
        };
        let order = Ordering::SeqCst;
        // Fails never: an offset below 8 is one.
        let _ = self.state.actual.fetch_update(order, order, merged);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let reporting = activation.has(F_REPORTING);
        let Activation {
            memory,
            mut queues,
            signals,
            ..
        } = activation;
        let mut queue = |index: u16| {
            queues
                .get_mut(usize::from(index))
                .and_then(Option::take)
                .ok_or(ActivateError::MissingQueue { index })
        };
        let (inflate, deflate) = (queue(INFLATE)?, queue(DEFLATE)?);
        // The driver may have the feature and not use it.
        let reporting = queue(REPORTING).ok().filter(|_| reporting);
        // A driver that begins holds nothing yet.
        self.state.actual.store(0, Ordering::SeqCst);
        self.signals.set(&signals);
        let worker = BalloonWorker::new(
            [Some(inflate), Some(deflate), reporting],
            memory,
            signals,
            Arc::clone(&self.discard),
            Arc::clone(&self.state),
        );
        Ok(vec![Box::new(worker)])
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = &self.state;
        vec![
            ("inflated_bytes", get(&state.inflated).wrapping_mul(PAGE)),
            ("deflated_bytes", get(&state.deflated).wrapping_mul(PAGE)),
            ("reported_bytes", get(&state.reported_bytes)),
            ("discarded_bytes", get(&state.discarded_bytes)),
            ("kept_bytes", get(&state.kept_bytes)),
            ("outside_bytes", get(&state.outside_bytes)),
            ("ignored_pieces", get(&state.ignored)),
            ("bad_chains", get(&state.bad_chains)),
        ]
    }
}

#[cfg(test)]
mod tests;
