//! The memory that passed-through devices reach: one address space for all of them.
//!
//! ```text
//!   first device attached ──▶ DmaDomain ──join──▶ a consumer of Ram: what exists is pinned, what comes is pinned
//!                                                    │
//!   last device gone ◀──────────── leave ────────────┘  everything unpinned
//! ```
//! The space exists while there are devices in it, because it is they who give it an IOMMU. A reset of the guest changes
//! nothing here: the pages stay pinned, once (a type1 pin of device-dax is never given back page by page, so pinning anew
//! at each reset would use up the pages' reference counts).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use daxhund_pin::{
    AddressSpace, DmaLease, DmaMapper, DmaMemory, DmaRequest, PciFunction, Progress, SpaceFacts,
    SpaceKind, map_all,
};
use rustix::fs::Access;
use tracing::warn;

use super::guard::Removals;
use super::passthrough::PassedThrough;
use super::pin_progress::PinProgress;
use crate::memory::discard::Forbidden;
use crate::memory::ram::{Consumer, ConsumerId, Lease, NotAllAttached, Rank, Reason};
use crate::memory::region::Region;
use crate::memory::report::{Holder, Pinned};
use crate::metrics::Metrics;
use crate::monitor::Monitor;

/// Of iommufd, there with its module and usable with rights to it.
const IOMMUFD: &str = "/dev/iommu";

/// The address space of a machine's passed-through devices.
pub(super) struct DmaDomain {
    pub(super) space: Arc<AddressSpace>,
    /// Set while it is a consumer of guest memory.
    pub(super) member: Option<ConsumerId>,
    /// Devices in it.
    pub(super) devices: usize,
    /// Where progress is told.
    pub(super) monitor: Monitor,
    /// Where it is counted.
    pub(super) metrics: Metrics,
    /// Functions that could not leave because memory is still mapped for them.
    pub(super) kept: Vec<Arc<PassedThrough>>,
    /// When that is tried again, while there are any.
    pub(super) ask_again: Option<Instant>,
    /// A device keeps the page it was given; the guest would get another one.
    pub(super) _no_discard: Forbidden,
}

/// Device-dax among the memory that devices are to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DaxInReach {
    /// None.
    None,
    /// There is, and its removal is held until it is unpinned.
    Held,
    /// There is, and it can go at any moment.
    Unheld,
}

impl DaxInReach {
    /// Whether a guard holds removals is asked only when there is something to hold.
    pub(super) fn of<'a>(
        regions: impl IntoIterator<Item = &'a Region>,
        removals: &mut Removals,
    ) -> Self {
        if !any_dax(regions) {
            Self::None
        } else if removals.are_held() {
            Self::Held
        } else {
            Self::Unheld
        }
    }
}

/// Whether this process may use iommufd.
pub(super) fn may_use_iommufd() -> bool {
    rustix::fs::access(IOMMUFD, Access::READ_OK | Access::WRITE_OK).is_ok()
}

/// Which kind of address space fits: what was asked for, or else iommufd, which shares pins and accounts for them. But its
/// unpin looks at the pages, and those of a device-dax device that went unannounced are gone: so type1 where that can be.
pub(super) fn choose(
    asked: Option<bool>,
    function: Option<&PciFunction>,
    dax: DaxInReach,
    may_use_iommufd: bool,
) -> SpaceKind {
    // A descriptor is a device file of iommufd's: type1 could not take it.
    let is_only_iommufd = function.is_none();
    let is_offered = may_use_iommufd && function.is_some_and(|f| f.cdev.is_some());
    match asked {
        Some(true) => SpaceKind::Iommufd,
        None if is_only_iommufd || (is_offered && dax != DaxInReach::Unheld) => SpaceKind::Iommufd,
        Some(false) | None => SpaceKind::Type1,
    }
}

/// Whether any of these is device-dax that devices reach.
fn any_dax<'a>(regions: impl IntoIterator<Item = &'a Region>) -> bool {
    regions
        .into_iter()
        .any(|region| region.dma().memory() == DmaMemory::DeviceDax && region.dma().is_reachable())
}

impl DmaDomain {
    /// For [`crate::memory::ram::Ram::join`].
    pub(super) fn consumer(&self) -> Box<dyn Consumer> {
        Box::new(DmaConsumer {
            space: Arc::clone(&self.space),
            monitor: self.monitor.clone(),
            metrics: self.metrics.clone(),
            said: BTreeSet::new(),
        })
    }
}

/// Pins regions for devices. Last to attach, first to let go.
struct DmaConsumer {
    space: Arc<AddressSpace>,
    monitor: Monitor,
    metrics: Metrics,
    /// Zones whose exclusion was told.
    said: BTreeSet<String>,
}

/// What a region gets: `None` when devices don't reach it.
type Pin = Option<DmaLease>;

impl DmaConsumer {
    fn request<'a>(&mut self, region: &'a Region) -> Option<DmaRequest<'a>> {
        let dma = region.dma();
        if dma.is_reachable() {
            return Some(DmaRequest {
                name: region.zone(),
                iova: region.gpa().0,
                host_address: region.host_address(),
                size: region.size(),
                memory: dma.memory(),
            });
        }
        if let Some(why) = dma.unasked_exclusion()
            && self.said.insert(region.zone().to_owned())
        {
            warn!(
                zone = region.zone(),
                why, "passed-through devices do not reach this memory"
            );
        }
        None
    }
}

impl Consumer for DmaConsumer {
    fn name(&self) -> &'static str {
        "the IOMMU"
    }

    fn rank(&self) -> Rank {
        Rank::Dma
    }

    fn attach(&mut self, region: &Region) -> Result<Lease, Reason> {
        let lease = self.attach_all(&[region]).map_err(|failure| {
            // One region: a single call of the kernel, which maps it or does not.
            debug_assert!(failure.kept.is_empty());
            failure.reason
        })?;
        lease.into_iter().next().ok_or_else(|| "no lease".into())
    }

    fn attach_all(&mut self, regions: &[&Region]) -> Result<Vec<Lease>, NotAllAttached> {
        let requests: Vec<Option<DmaRequest<'_>>> =
            regions.iter().map(|region| self.request(region)).collect();
        // Where each of those that are asked for is among all regions.
        let wanted: Vec<usize> = (0..requests.len())
            .filter(|index| requests[*index].is_some())
            .collect();
        let asked: Vec<DmaRequest<'_>> = requests.iter().flatten().copied().collect();
        let mut progress = PinProgress::new(&self.monitor, &self.metrics);
        let mut tell = |now: Progress| progress.tell(now);
        let pins = map_all(self.space.as_ref(), &asked, &mut tell).map_err(|failure| {
            let stuck = failure.stuck.into_iter();
            let kept = stuck.filter_map(|(pin, _)| {
                let index = asked.iter().position(|asked| asked.iova == pin.iova)?;
                Some((wanted[index], Lease(Box::new(Some(pin) as Pin))))
            });
            NotAllAttached {
                kept: kept.collect(),
                // Of too much in all, the first is as good as any: the reason says what is too much.
                region: wanted[failure.refused.unwrap_or_default()],
                reason: failure.source.into(),
            }
        })?;
        let mut pins = pins.into_iter();
        let pin_of = |request: &Option<DmaRequest<'_>>| -> Pin {
            request.as_ref().and_then(|_| pins.next())
        };
        let leases = requests.iter().map(pin_of);
        Ok(leases.map(|pin| Lease(Box::new(pin))).collect())
    }

    fn detach(&mut self, _region: &Region, lease: Lease) -> Result<(), (Lease, Reason)> {
        match lease.0.downcast::<Pin>() {
            Ok(pin) => match *pin {
                None => Ok(()),
                Some(pin) => self
                    .space
                    .unmap(pin)
                    .map_err(|(pin, error)| (Lease(Box::new(Some(pin) as Pin)), error.into())),
            },
            Err(other) => Err((Lease(other), "not a lease of the IOMMU".into())),
        }
    }

    fn holding(&self, lease: &Lease) -> Option<Holder> {
        let pin = lease.0.downcast_ref::<Pin>()?.as_ref()?;
        let SpaceFacts { kind, devices, .. } = self.space.space_facts();
        let pinned = Pinned {
            bytes: pin.size,
            took_us: u64::try_from(pin.took.as_micros()).unwrap_or(u64::MAX),
            devices: devices.iter().map(ToString::to_string).collect(),
        };
        Some(match kind {
            SpaceKind::Type1 => Holder::Type1(pinned),
            SpaceKind::Iommufd => Holder::Iommufd(pinned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> PciFunction {
        PciFunction {
            address: "0000:01:00.0".parse().unwrap(),
            sysfs_path: "/sys/devices/x".into(),
            group: 1,
            driver: Some("vfio-pci".to_owned()),
            cdev: Some("/dev/vfio/devices/vfio0".into()),
            siblings: Vec::new(),
            vendor_id: 1,
            device_id: 1,
            class: 0x0001_0802,
            numa_node: None,
            is_vfio: true,
        }
    }

    #[test]
    fn what_is_asked_for_is_taken() {
        for dax in [DaxInReach::None, DaxInReach::Held, DaxInReach::Unheld] {
            let chosen = |asked| choose(asked, None, dax, false);
            assert_eq!(chosen(Some(true)), SpaceKind::Iommufd);
            assert_eq!(chosen(Some(false)), SpaceKind::Type1);
            assert_eq!(chosen(None), SpaceKind::Iommufd, "a descriptor");
        }
    }

    #[test]
    fn memory_that_can_go_at_any_moment_goes_through_a_container() {
        let mut function = function();
        let chosen = |function: &_, dax, may| choose(None, Some(function), dax, may);
        for (dax, kind) in [
            (DaxInReach::None, SpaceKind::Iommufd),
            (DaxInReach::Held, SpaceKind::Iommufd),
            (DaxInReach::Unheld, SpaceKind::Type1),
        ] {
            assert_eq!(chosen(&function, dax, true), kind, "{dax:?}");
            assert_eq!(chosen(&function, dax, false), SpaceKind::Type1, "{dax:?}");
        }
        function.cdev = None;
        let held = chosen(&function, DaxInReach::Held, true);
        assert_eq!(held, SpaceKind::Type1, "a kernel without device files");
    }
}
