//! Introduces those who reach guest memory to [`crate::memory::ram`].
//!
//! The table of discards is there from the start, the IOMMU from the first passed-through device on
//! ([`super::dma`]), and KVM with each VM: a reset is another one.

use std::ops::Range;
use std::sync::Arc;

use crate::kvm::{MemorySlots, SlotError, SlotLease, SlotRange};
use crate::memory::poison::Poison;
use crate::memory::ram::{Consumer, Lease, Rank, Reason};
use crate::memory::region::Region;
use crate::memory::report::Holder;

/// The guest's own view: KVM memory slots. First to attach, last to let go.
///
/// A region is one slot, or several around what of it is poisoned and out. Guest and host addresses stay congruent in each,
/// so that all of them get the large entries they can have.
pub(super) struct KvmSlots {
    slots: MemorySlots,
    poison: Arc<Poison>,
}

impl KvmSlots {
    pub(super) fn new(slots: &MemorySlots, poison: &Arc<Poison>) -> Self {
        Self {
            slots: slots.clone(),
            poison: Arc::clone(poison),
        }
    }

    /// What the guest is to reach of a region.
    fn wanted(&self, region: &Region) -> Vec<SlotRange> {
        let parts = self.poison.left_of(region.gpa().0..region.end().0);
        let slot = |Range { start, end }: Range<u64>| SlotRange {
            gpa: start,
            size: end - start,
            host_address: region.host_address() + (start - region.gpa().0),
            read_only: region.is_read_only(),
        };
        parts.into_iter().map(slot).collect()
    }

    /// Makes the slots that are missing. Those that were made are there also after an error.
    fn create(&self, wanted: &[SlotRange], leases: &mut Vec<SlotLease>) -> Result<(), SlotError> {
        for range in wanted {
            if !leases.iter().any(|lease| lease.range() == *range) {
                leases.push(self.slots.create(*range)?);
            }
        }
        Ok(())
    }

    /// Deletes the slots that are not wanted. After an error it and those that were not tried are still there.
    fn delete(&self, wanted: &[SlotRange], leases: &mut Vec<SlotLease>) -> Result<(), SlotError> {
        while let Some(index) = leases
            .iter()
            .position(|lease| !wanted.contains(&lease.range()))
        {
            if let Err((lease, error)) = self.slots.delete(leases.swap_remove(index)) {
                leases.push(lease);
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Consumer for KvmSlots {
    fn name(&self) -> &'static str {
        "KVM"
    }

    fn rank(&self) -> Rank {
        Rank::Guest
    }

    fn attach(&mut self, region: &Region) -> Result<Lease, Reason> {
        let mut leases = Vec::new();
        let created = self.create(&self.wanted(region), &mut leases);
        if let Err(error) = created {
            if let Err(error) = self.delete(&[], &mut leases) {
                tracing::error!(%error, "guest memory that is not attached stays in a memory slot");
            }
            return Err(error.into());
        }
        Ok(Lease(Box::new(leases)))
    }

    fn detach(&mut self, _region: &Region, lease: Lease) -> Result<(), (Lease, Reason)> {
        let mut leases = slots_of(lease)?;
        self.delete(&[], &mut leases)
            .map_err(|error| (Lease(Box::new(leases)), error.into()))
    }

    /// To be called while no vCPU runs: between the slot that goes and those that come there is none.
    fn renew(&mut self, region: &Region, lease: Lease) -> Result<Lease, (Lease, Reason)> {
        let mut leases = slots_of(lease)?;
        let wanted = self.wanted(region);
        let renewed = self.delete(&wanted, &mut leases);
        match renewed.and_then(|()| self.create(&wanted, &mut leases)) {
            Ok(()) => Ok(Lease(Box::new(leases))),
            Err(error) => Err((Lease(Box::new(leases)), error.into())),
        }
    }

    fn holding(&self, lease: &Lease) -> Option<Holder> {
        let leases: &Vec<SlotLease> = lease.0.downcast_ref()?;
        Some(Holder::Kvm {
            slots: leases.len(),
            bytes: leases.iter().map(|lease| lease.range().size).sum(),
        })
    }
}

fn slots_of(lease: Lease) -> Result<Vec<SlotLease>, (Lease, Reason)> {
    lease
        .0
        .downcast()
        .map(|leases| *leases)
        .map_err(|other| (Lease(other), "not a lease of KVM memory slots".into()))
}
