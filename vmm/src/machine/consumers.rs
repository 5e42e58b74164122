//! Introduces those who reach guest memory to [`crate::memory::ram`].
//!
//! The table of discards is there from the start, the IOMMU from the first passed-through device on
//! ([`super::dma`]), and KVM with each VM: a reset is another one.

use crate::kvm::{MemorySlots, SlotLease, SlotRange};
use crate::memory::ram::{Consumer, Lease, Rank, Reason};
use crate::memory::region::Region;

/// The guest's own view: KVM memory slots. First to attach, last to let go.
pub(super) struct KvmSlots(pub(super) MemorySlots);

impl Consumer for KvmSlots {
    fn name(&self) -> &'static str {
        "KVM"
    }

    fn rank(&self) -> Rank {
        Rank::Guest
    }

    fn attach(&mut self, region: &Region) -> Result<Lease, Reason> {
        let range = SlotRange {
            gpa: region.gpa().0,
            size: region.size(),
            host_address: region.host_address(),
        };
        Ok(Lease(Box::new(self.0.create(range)?)))
    }

    fn detach(&mut self, _region: &Region, lease: Lease) -> Result<(), (Lease, Reason)> {
        let slot = match lease.0.downcast::<SlotLease>() {
            Ok(slot) => slot,
            Err(other) => return Err((Lease(other), "not a lease of a KVM memory slot".into())),
        };
        self.0
            .delete(*slot)
            .map_err(|(slot, error)| (Lease(Box::new(slot)), error.into()))
    }
}
