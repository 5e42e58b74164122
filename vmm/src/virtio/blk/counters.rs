//! What a disk has done, for `vm.counters`.

use std::sync::atomic::{AtomicU64, Ordering};

use daxhund_virtio_blk::Status;

use super::request::Kind;

/// Of all queues, since the disk was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    others: AtomicU64,
    errors: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    kicks: AtomicU64,
    interrupts: AtomicU64,
    at_once: AtomicU64,
}

/// Of one queue: since it was last added, but for the two that are since the start.
#[derive(Debug, Default)]
pub(super) struct Tally {
    reads: u64,
    writes: u64,
    flushes: u64,
    others: u64,
    errors: u64,
    read_bytes: u64,
    written_bytes: u64,
    pub(super) kicks: u64,
    /// Since the start.
    pub(super) interrupts: u64,
    /// Since the start.
    pub(super) at_once: u64,
    added_interrupts: u64,
    added_at_once: u64,
}

impl Tally {
    pub(super) fn begun(&mut self, kind: Kind, bytes: u64) {
        match kind {
            Kind::In => {
                self.reads += 1;
                self.read_bytes += bytes;
            }
            Kind::Out => {
                self.writes += 1;
                self.written_bytes += bytes;
            }
            Kind::Flush => self.flushes += 1,
            _ => self.others += 1,
        }
    }

    pub(super) fn answered(&mut self, status: Status) {
        self.errors += u64::from(status != Status::Ok);
    }
}

impl Counters {
    /// Moves a tally here.
    pub(super) fn add(&self, tally: &mut Tally) {
        let add = |counter: &AtomicU64, value: u64| {
            if value != 0 {
                counter.fetch_add(value, Ordering::Relaxed);
            }
        };
        add(&self.reads, tally.reads);
        add(&self.writes, tally.writes);
        add(&self.flushes, tally.flushes);
        add(&self.others, tally.others);
        add(&self.errors, tally.errors);
        add(&self.read_bytes, tally.read_bytes);
        add(&self.written_bytes, tally.written_bytes);
        add(&self.kicks, tally.kicks);
        add(&self.interrupts, tally.interrupts - tally.added_interrupts);
        add(&self.at_once, tally.at_once - tally.added_at_once);
        *tally = Tally {
            interrupts: tally.interrupts,
            at_once: tally.at_once,
            added_interrupts: tally.interrupts,
            added_at_once: tally.at_once,
            ..Tally::default()
        };
    }

    pub(super) fn all(&self) -> Vec<(&'static str, u64)> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let each = [&self.reads, &self.writes, &self.flushes, &self.others];
        vec![
            ("requests", each.into_iter().map(read).sum()),
            ("read_ops", read(&self.reads)),
            ("write_ops", read(&self.writes)),
            ("flush_ops", read(&self.flushes)),
            ("errors", read(&self.errors)),
            ("read_bytes", read(&self.read_bytes)),
            ("write_bytes", read(&self.written_bytes)),
            ("kicks", read(&self.kicks)),
            ("interrupts", read(&self.interrupts)),
            ("done_at_once", read(&self.at_once)),
        ]
    }
}
