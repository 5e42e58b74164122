//! What is mapped in one address space.
//!
//! The kernel does not list it. One entry for each lease that is out; nothing here talks to the kernel.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::mapper::{DmaFacts, DmaMemory, DmaRequest};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    size: u64,
    memory: DmaMemory,
    is_charged: bool,
}

/// Entries by their first I/O virtual address.
#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<BTreeMap<u64, Entry>>);

impl Ledger {
    pub(crate) fn insert(&self, request: &DmaRequest<'_>, is_charged: bool) {
        let entry = Entry {
            size: request.size,
            memory: request.memory,
            is_charged,
        };
        self.entries().insert(request.iova, entry);
    }

    pub(crate) fn remove(&self, iova: u64) {
        self.entries().remove(&iova);
    }

    pub(crate) fn holds(&self, iova: u64) -> bool {
        self.entries().contains_key(&iova)
    }

    /// The kernel has unmapped everything.
    pub(crate) fn clear(&self) {
        self.entries().clear();
    }

    pub(crate) fn facts(&self) -> DmaFacts {
        let entries = self.entries();
        let bytes = |which: fn(&Entry) -> bool| {
            entries
                .values()
                .filter(|entry| which(entry))
                .map(|entry| entry.size)
                .fold(0_u64, u64::saturating_add)
        };
        DmaFacts {
            ranges: entries.len(),
            pinned_bytes: bytes(|entry| entry.memory != DmaMemory::Registers),
            charged_bytes: bytes(|entry| entry.is_charged),
        }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_of_what_is_there() {
        let ledger = Ledger::default();
        let mut request = DmaRequest {
            name: "z0",
            iova: 0,
            host_address: 0,
            size: 10,
            memory: DmaMemory::DeviceDax,
        };
        ledger.insert(&request, false);
        request.iova = 10;
        request.memory = DmaMemory::Anonymous;
        ledger.insert(&request, true);
        request.iova = 20;
        request.memory = DmaMemory::Registers;
        ledger.insert(&request, false);
        let facts = |ranges, pinned_bytes, charged_bytes| DmaFacts {
            ranges,
            pinned_bytes,
            charged_bytes,
        };
        assert_eq!(ledger.facts(), facts(3, 20, 10));
        assert!(ledger.holds(10));
        ledger.remove(10);
        assert!(!ledger.holds(10));
        assert_eq!(ledger.facts(), facts(2, 10, 0));
        ledger.clear();
        assert_eq!(ledger.facts(), DmaFacts::default());
    }
}
