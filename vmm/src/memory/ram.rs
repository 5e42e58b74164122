//! Guest memory and everyone who can reach it.
//!
//! ```text
//!             attach: consumers in order                    detach: in reverse
//!   Region ─────────────────────────────▶ Attached ────────────────────────────▶ Region
//!      ▲          │ one refuses                 │ one refuses
//!      └──────────┘ earlier leases given        └──▶ Stuck: still attached for those that have
//!        back, in reverse                            not let go; visible, can be tried again
//! ```
//! One page of RAM walks this path and no other. A region belongs to the caller before `attach` and after `detach`;
//! in between it is mapped and stays where it is. Consumers come in the order KVM slots, vhost-user tables, DMA; so
//! the reverse takes DMA away first, always. Devices in this process see guest memory through a snapshot
//! ([`Ram::view`]) that is replaced, never changed.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::{
    GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionCollection, GuestRegionMmap,
};

use super::layout::Gpa;
use super::region::Region;

/// What devices see of guest memory.
pub type GuestView = GuestMemoryAtomic<GuestMemoryMmap>;

/// The reason a consumer gives.
pub type Reason = Box<dyn std::error::Error + Send + Sync>;

/// Proof that a consumer reaches a region. What it means is the consumer's; it must go back to
/// [`Consumer::detach`].
#[derive(Debug)]
#[must_use = "a lease that is forgotten leaves the region reachable for ever"]
pub struct Lease(pub Box<dyn std::any::Any + Send>);

/// Someone who can reach guest memory: KVM, a vhost-user backend, a DMA domain.
pub trait Consumer: Send {
    /// Name in messages.
    fn name(&self) -> &'static str;
    /// Makes the region reachable.
    fn attach(&mut self, region: &Region) -> Result<Lease, Reason>;
    /// The undo. On failure the lease comes back and the region is still reachable.
    fn detach(&mut self, region: &Region, lease: Lease) -> Result<(), (Lease, Reason)>;
}

/// A region could not be attached.
#[derive(Debug, Error)]
#[error("{error}")]
pub struct AttachFailure {
    /// The region, the caller's again; `None` when a consumer that had taken it does not let go: then it is kept,
    /// stuck, and [`Ram::detach`] can be tried.
    pub region: Option<Region>,
    /// Why.
    #[source]
    pub error: AttachError,
}

/// Why a region could not be attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The guest-physical range is in use.
    #[error("guest range {:#x}..{:#x} of memory zone {zone} overlaps memory that exists", gpa.0, gpa.0 + size)]
    Overlap {
        /// Zone of the region.
        zone: String,
        /// First address.
        gpa: Gpa,
        /// Length in bytes.
        size: u64,
    },
    /// A consumer refused.
    #[error("{consumer} does not take memory zone {zone} at guest {:#x}", gpa.0)]
    Refused {
        /// Who.
        consumer: &'static str,
        /// Zone of the region.
        zone: String,
        /// First address.
        gpa: Gpa,
        /// Why.
        #[source]
        source: Reason,
    },
}

/// A region could not be detached: it is still there, and stuck.
#[derive(Debug, Error)]
pub enum DetachError {
    /// No region starts there.
    #[error("no guest memory starts at {:#x}", gpa.0)]
    Unknown {
        /// Address asked for.
        gpa: Gpa,
    },
    /// A consumer does not let go.
    #[error("{consumer} does not let go of memory zone {zone} at guest {:#x}; it can be tried again", gpa.0)]
    Refused {
        /// Who.
        consumer: &'static str,
        /// Zone of the region.
        zone: String,
        /// First address.
        gpa: Gpa,
        /// Why.
        #[source]
        source: Reason,
    },
    /// A device of this process still holds the snapshot.
    #[error("{holders} device(s) still hold memory zone {zone} at guest {:#x}; it can be tried again", gpa.0)]
    Held {
        /// How many others.
        holders: usize,
        /// Zone of the region.
        zone: String,
        /// First address.
        gpa: Gpa,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Every consumer reaches it.
    Present,
    /// On its way out, and somebody does not let go. Devices of this process don't see it any more.
    Stuck,
}

#[derive(Debug)]
struct Attached {
    state: State,
    region: Region,
    /// By index of the consumer, in order of attachment; a missing one has let go already.
    leases: Vec<(usize, Lease)>,
}

/// All guest memory of one machine.
pub struct Ram {
    consumers: Vec<Box<dyn Consumer>>,
    attached: Vec<Attached>,
    view: GuestView,
}

impl Ram {
    /// No memory yet. Consumers are visited in this order.
    pub fn new(consumers: Vec<Box<dyn Consumer>>) -> Self {
        Self {
            consumers,
            attached: Vec::new(),
            view: GuestView::new(GuestMemoryMmap::new()),
        }
    }

    /// What devices use; follows every attach and detach.
    pub fn view(&self) -> &GuestView {
        &self.view
    }

    /// The regions that exist.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.attached.iter().map(|a| &a.region)
    }

    /// The regions that are stuck on their way out.
    pub fn stuck(&self) -> impl Iterator<Item = &Region> {
        self.attached
            .iter()
            .filter(|a| a.state == State::Stuck)
            .map(|a| &a.region)
    }

    /// Makes a region reachable for every consumer, then for the devices of this process.
    pub fn attach(&mut self, region: Region) -> Result<(), Box<AttachFailure>> {
        if let Some(error) = self.overlap(&region) {
            return Err(Box::new(AttachFailure {
                region: Some(region),
                error,
            }));
        }
        let mut attached = Attached {
            state: State::Present,
            region,
            leases: Vec::new(),
        };
        for (index, consumer) in self.consumers.iter_mut().enumerate() {
            match consumer.attach(&attached.region) {
                Ok(lease) => attached.leases.push((index, lease)),
                Err(source) => {
                    let error = AttachError::Refused {
                        consumer: consumer.name(),
                        zone: attached.region.zone().to_owned(),
                        gpa: attached.region.gpa(),
                        source,
                    };
                    return Err(Box::new(self.give_back(attached, error)));
                }
            }
        }
        self.attached.push(attached);
        self.publish();
        Ok(())
    }

    /// Undo of a half-done attach.
    fn give_back(&mut self, mut attached: Attached, error: AttachError) -> AttachFailure {
        match self.release_leases(&mut attached) {
            Ok(()) => AttachFailure {
                region: Some(attached.region),
                error,
            },
            Err(stuck) => {
                tracing::error!(error = %stuck, "memory stays mapped because a consumer does not let go of it");
                attached.state = State::Stuck;
                self.attached.push(attached);
                AttachFailure {
                    region: None,
                    error,
                }
            }
        }
    }

    /// The undo of [`Ram::attach`]: consumers let go in reverse order, then the region is the caller's again.
    pub fn detach(&mut self, gpa: Gpa) -> Result<Region, DetachError> {
        let index = self
            .attached
            .iter()
            .position(|a| a.region.gpa() == gpa)
            .ok_or(DetachError::Unknown { gpa })?;
        let mut attached = self.attached.swap_remove(index);
        attached.state = State::Stuck;
        // Devices stop seeing it first: what they still hold after this, they hold in flight.
        self.publish();
        if let Err(error) = self.release_leases(&mut attached) {
            self.attached.push(attached);
            return Err(error);
        }
        let holders = attached.region.holders() - 1;
        if holders > 0 {
            let zone = attached.region.zone().to_owned();
            self.attached.push(attached);
            return Err(DetachError::Held { holders, zone, gpa });
        }
        Ok(attached.region)
    }

    /// Detaches everything, highest address first. What is stuck stays, and is named.
    pub fn detach_all(&mut self) -> (Vec<Region>, Vec<DetachError>) {
        let mut addresses: Vec<Gpa> = self.regions().map(Region::gpa).collect();
        addresses.sort_unstable();
        let (mut regions, mut stuck) = (Vec::new(), Vec::new());
        for gpa in addresses.into_iter().rev() {
            match self.detach(gpa) {
                Ok(region) => regions.push(region),
                Err(error) => stuck.push(error),
            }
        }
        regions.reverse();
        (regions, stuck)
    }

    fn release_leases(&mut self, attached: &mut Attached) -> Result<(), DetachError> {
        while let Some((index, lease)) = attached.leases.pop() {
            let consumer = &mut self.consumers[index];
            if let Err((lease, source)) = consumer.detach(&attached.region, lease) {
                let error = DetachError::Refused {
                    consumer: consumer.name(),
                    zone: attached.region.zone().to_owned(),
                    gpa: attached.region.gpa(),
                    source,
                };
                attached.leases.push((index, lease));
                return Err(error);
            }
        }
        Ok(())
    }

    fn overlap(&self, region: &Region) -> Option<AttachError> {
        let taken = |other: &Region| other.gpa() < region.end() && region.gpa() < other.end();
        self.regions().any(taken).then(|| AttachError::Overlap {
            zone: region.zone().to_owned(),
            gpa: region.gpa(),
            size: region.size(),
        })
    }

    /// Gives the devices a new snapshot: the regions every consumer has.
    fn publish(&self) {
        let mut regions: Vec<Arc<GuestRegionMmap>> = self
            .attached
            .iter()
            .filter(|a| a.state == State::Present)
            .map(|a| a.region.guest_region())
            .collect();
        regions.sort_by_key(|r| vm_memory::GuestMemoryRegion::start_addr(r.as_ref()));
        let snapshot = if regions.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestRegionCollection::from_arc_regions(regions)
                .expect("regions are sorted here and `attach` let none overlap")
        };
        let guard = self
            .view
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        guard.replace(snapshot);
    }
}

impl Drop for Ram {
    /// A backstop: the owner detaches everything itself. Memory that a consumer does not let go of is never
    /// unmapped under it.
    fn drop(&mut self) {
        let (regions, stuck) = self.detach_all();
        drop(regions);
        for error in stuck {
            tracing::error!(error = %error, "guest memory leaked");
        }
        for attached in self.attached.drain(..) {
            std::mem::forget(attached);
        }
    }
}

/// Guest address as vm-memory has it.
impl From<Gpa> for GuestAddress {
    fn from(gpa: Gpa) -> Self {
        Self(gpa.0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend};

    use super::*;
    use crate::memory::mapping::{HostMapping, Source};
    use crate::memory::region::Mapping;

    const SIZE: u64 = 0x1000;

    fn region(gpa: u64) -> Region {
        let source = Source::Anonymous {
            huge_bytes: None,
            thp: false,
        };
        let mapping = Mapping::Host(HostMapping::new(source, SIZE, 4096).unwrap());
        Region::new("z0", Gpa(gpa), mapping)
            .map_err(|(_, e)| e)
            .unwrap()
    }

    /// What happened, in order: (consumer, attached?, address).
    type Log = Arc<Mutex<Vec<(&'static str, bool, u64)>>>;

    struct Fake {
        name: &'static str,
        log: Log,
        refuse_attach: bool,
        refuse_detach: Arc<Mutex<bool>>,
    }

    impl Consumer for Fake {
        fn name(&self) -> &'static str {
            self.name
        }
        fn attach(&mut self, region: &Region) -> Result<Lease, Reason> {
            if self.refuse_attach {
                return Err("no room".into());
            }
            self.log
                .lock()
                .unwrap()
                .push((self.name, true, region.gpa().0));
            Ok(Lease(Box::new(region.gpa().0)))
        }
        fn detach(&mut self, region: &Region, lease: Lease) -> Result<(), (Lease, Reason)> {
            if *self.refuse_detach.lock().unwrap() {
                return Err((lease, "busy".into()));
            }
            assert_eq!(
                lease.0.downcast_ref(),
                Some(&region.gpa().0),
                "somebody else's lease"
            );
            self.log
                .lock()
                .unwrap()
                .push((self.name, false, region.gpa().0));
            Ok(())
        }
    }

    struct Bench {
        ram: Ram,
        log: Log,
        /// By consumer.
        stuck: Vec<Arc<Mutex<bool>>>,
    }

    fn bench(names: &[&'static str], refusing: Option<&str>) -> Bench {
        let log = Log::default();
        let stuck: Vec<_> = names.iter().map(|_| Arc::new(Mutex::new(false))).collect();
        let consumers = names.iter().zip(&stuck).map(|(&name, refuse_detach)| {
            Box::new(Fake {
                name,
                log: Arc::clone(&log),
                refuse_attach: refusing == Some(name),
                refuse_detach: Arc::clone(refuse_detach),
            }) as Box<dyn Consumer>
        });
        Bench {
            ram: Ram::new(consumers.collect()),
            log,
            stuck,
        }
    }

    #[test]
    fn consumers_come_in_order_and_go_in_reverse() {
        let mut b = bench(&["slots", "vhost", "dma"], None);
        b.ram.attach(region(0)).unwrap();
        let back = b.ram.detach(Gpa(0)).unwrap();
        assert_eq!(back.holders(), 1);
        let expected = [
            ("slots", true, 0),
            ("vhost", true, 0),
            ("dma", true, 0),
            ("dma", false, 0),
            ("vhost", false, 0),
            ("slots", false, 0),
        ];
        assert_eq!(*b.log.lock().unwrap(), expected);
    }

    #[test]
    fn a_refusal_gives_the_region_back_and_leaves_nothing() {
        let mut b = bench(&["slots", "vhost", "dma"], Some("dma"));
        let failure = b.ram.attach(region(0)).unwrap_err();
        assert!(failure.region.is_some());
        assert!(matches!(
            failure.error,
            AttachError::Refused {
                consumer: "dma",
                ..
            }
        ));
        let log = b.log.lock().unwrap();
        assert_eq!(log[2..], [("vhost", false, 0), ("slots", false, 0)]);
        assert_eq!(b.ram.regions().count(), 0);
        assert_eq!(b.ram.view().memory().num_regions(), 0);
    }

    #[test]
    fn what_is_not_let_go_is_stuck_visible_and_can_be_tried_again() {
        let mut b = bench(&["slots", "dma"], None);
        b.ram.attach(region(0)).unwrap();
        *b.stuck[0].lock().unwrap() = true;
        let error = b.ram.detach(Gpa(0)).unwrap_err();
        assert!(
            matches!(
                error,
                DetachError::Refused {
                    consumer: "slots",
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(b.ram.stuck().count(), 1);
        assert_eq!(
            b.ram.view().memory().num_regions(),
            0,
            "devices don't see it any more"
        );
        *b.stuck[0].lock().unwrap() = false;
        b.ram.detach(Gpa(0)).unwrap();
        // The DMA lease was given back once, not twice.
        let released = b
            .log
            .lock()
            .unwrap()
            .iter()
            .filter(|e| **e == ("dma", false, 0))
            .count();
        assert_eq!(released, 1);
    }

    #[test]
    fn a_snapshot_in_use_keeps_the_region() {
        let mut b = bench(&["slots"], None);
        b.ram.attach(region(0)).unwrap();
        let held = b.ram.view().memory();
        assert!(matches!(
            b.ram.detach(Gpa(0)),
            Err(DetachError::Held { holders: 1, .. })
        ));
        held.write_obj(7u8, GuestAddress(0)).unwrap();
        drop(held);
        b.ram.detach(Gpa(0)).unwrap();
    }

    #[test]
    fn overlapping_regions_are_refused() {
        let mut b = bench(&[], None);
        b.ram.attach(region(0x1000)).unwrap();
        let failure = b.ram.attach(region(0x1000)).unwrap_err();
        assert!(matches!(failure.error, AttachError::Overlap { .. }));
        b.ram.attach(region(0)).unwrap();
        b.ram.attach(region(0x2000)).unwrap();
        assert_eq!(b.ram.view().memory().num_regions(), 3);
    }

    proptest! {
        /// Whatever the order of attaches, detaches and refusals: no consumer sees a region twice, none keeps one
        /// that was let go, and devices see exactly the regions that are present.
        #[test]
        fn leases_balance(steps in prop::collection::vec((0u64..6, any::<bool>(), 0usize..3, any::<bool>()), 1..60)) {
            let mut b = bench(&["slots", "vhost", "dma"], None);
            for (page, attach, consumer, refuse) in steps {
                *b.stuck[consumer].lock().unwrap() = refuse;
                let gpa = page * SIZE;
                let known = b.ram.regions().any(|r| r.gpa().0 == gpa);
                if attach {
                    prop_assert_eq!(b.ram.attach(region(gpa)).is_ok(), !known);
                } else {
                    let result = b.ram.detach(Gpa(gpa));
                    prop_assert!(known || result.is_err());
                }
                let present = b.ram.regions().count() - b.ram.stuck().count();
                prop_assert_eq!(b.ram.view().memory().num_regions(), present);
            }
            for stuck in &b.stuck {
                *stuck.lock().unwrap() = false;
            }
            let (_, stuck) = b.ram.detach_all();
            prop_assert!(stuck.is_empty());
            let mut balance = std::collections::BTreeMap::new();
            for (name, attached, gpa) in b.log.lock().unwrap().iter() {
                let count = balance.entry((*name, *gpa)).or_insert(0i32);
                *count += if *attached { 1 } else { -1 };
                prop_assert!((0..=1).contains(count), "{} {:#x} {}", name, gpa, count);
            }
            prop_assert!(balance.values().all(|count| *count == 0));
        }
    }
}
