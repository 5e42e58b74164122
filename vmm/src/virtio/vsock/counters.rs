//! What a vsock device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of one device.
#[derive(Debug, Default)]
pub(super) struct Counters {
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    connections: AtomicU64,
    resets: AtomicU64,
    drops: AtomicU64,
}

impl Counters {
    /// A packet for the guest, with so much data.
    pub(super) fn packet_to_guest(&self, bytes: usize) {
        self.rx_packets.fetch_add(1, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A packet of the guest.
    pub(super) fn packet_from_guest(&self) {
        self.tx_packets.fetch_add(1, Ordering::Relaxed);
    }

    /// Its data.
    pub(super) fn data_from_guest(&self, bytes: usize) {
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A new connection, of either side.
    pub(super) fn opened(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection that was refused or cut off.
    pub(super) fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    /// A packet of the guest that was none.
    pub(super) fn dropped(&self) {
        self.drops.fetch_add(1, Ordering::Relaxed);
    }

    /// By the names of `vm.counters`; rx is to the guest.
    pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
        [
            ("rx_packets", &self.rx_packets),
            ("rx_bytes", &self.rx_bytes),
            ("tx_packets", &self.tx_packets),
            ("tx_bytes", &self.tx_bytes),
            ("connections", &self.connections),
            ("resets", &self.resets),
            ("tx_drops", &self.drops),
        ]
        .into_iter()
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .collect()
    }
}
