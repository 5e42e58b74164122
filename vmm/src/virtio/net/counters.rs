//! What a network device counts, both directions, all queues.

use std::sync::atomic::{AtomicU64, Ordering};

/// One direction.
#[derive(Debug, Default)]
pub(super) struct Direction {
    frames: AtomicU64,
    bytes: AtomicU64,
    drops: AtomicU64,
}

impl Direction {
    /// A frame has arrived at the other side.
    pub(super) fn moved(&self, bytes: usize) {
        self.frames.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A frame was lost.
    pub(super) fn dropped(&self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
    }
}

/// The counters of one device.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// To the guest.
    pub rx: Direction,
    /// From the guest.
    pub tx: Direction,
}

impl Counters {
    /// By the names of `vm.counters`. Bytes are those of the frames, without the virtio-net header.
    pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("rx_frames", of(&self.rx.frames)),
            ("rx_bytes", of(&self.rx.bytes)),
            ("rx_drops", of(&self.rx.drops)),
            ("tx_frames", of(&self.tx.frames)),
            ("tx_bytes", of(&self.tx.bytes)),
            ("tx_drops", of(&self.tx.drops)),
        ]
    }
}
