//! Introduces those who reach guest memory to [`crate::memory::ram`].

use super::resources::HostResources;
use crate::kvm::{MemorySlots, SlotLease, SlotRange, Vm};
use crate::memory::ram::{Consumer, Lease, Rank, Reason};
use crate::memory::region::Region;

/// Everyone, in the order in which they are visited.
pub(super) fn all(vm: &Vm, host: &HostResources) -> Vec<Box<dyn Consumer>> {
    vec![
        Box::new(KvmSlots(vm.memory_slots())),
        host.discard.consumer(),
    ]
}

/// The guest's own view: KVM memory slots. First to attach, last to let go.
struct KvmSlots(MemorySlots);

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
