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
//! in between it is mapped and stays where it is. Consumers come in the order of their [`Rank`]s: KVM slots, tables of
//! this and other processes, DMA; so the reverse takes DMA away first, always. One that comes later ([`Ram::join`]) is
//! replayed what exists, and takes its place in that order. Devices in this process see guest memory through a snapshot
//! ([`Ram::view`]) that is replaced, never changed.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryRegion};

use super::layout::Gpa;
use super::region::Region;
use super::report::Holder;
use super::snapshot::{Snapshot, SnapshotRegion};

/// What devices see of guest memory.
pub type GuestView = GuestMemoryAtomic<Snapshot>;

/// The reason a consumer gives.
pub type Reason = Box<dyn std::error::Error + Send + Sync>;

/// Proof that a consumer reaches a region. What it means is the consumer's; it must go back to
/// [`Consumer::detach`].
#[derive(Debug)]
#[must_use = "a lease that is forgotten leaves the region reachable for ever"]
pub struct Lease(pub Box<dyn std::any::Any + Send>);

/// When a consumer gets a region; it lets go in the reverse order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// The guest itself: KVM's memory slots.
    Guest,
    /// Tables of this process and of vhost-user backends.
    Tables,
    /// Devices of the host.
    Dma,
}

/// Someone who can reach guest memory: KVM, a vhost-user backend, a DMA domain.
pub trait Consumer: Send {
    /// Name in messages.
    fn name(&self) -> &'static str;
    /// Its place among the others.
    fn rank(&self) -> Rank;
    /// Makes the region reachable.
    fn attach(&mut self, region: &Region) -> Result<Lease, Reason>;
    /// Makes several regions reachable, or none: what exists when the consumer comes. Leases in the order of the regions.
    ///
    /// On an error, regions that it could not let go of again come back with their leases.
    fn attach_all(&mut self, regions: &[&Region]) -> Result<Vec<Lease>, NotAllAttached> {
        let mut leases = Vec::with_capacity(regions.len());
        for (index, region) in regions.iter().enumerate() {
            match self.attach(region) {
                Ok(lease) => leases.push(lease),
                Err(reason) => {
                    let taken = leases.into_iter().enumerate().rev();
                    let kept = taken.filter_map(|(taken, lease)| {
                        let (lease, error) = self.detach(regions[taken], lease).err()?;
                        tracing::error!(error = %error, "memory is not let go of again");
                        Some((taken, lease))
                    });
                    return Err(NotAllAttached {
                        kept: kept.collect(),
                        region: index,
                        reason,
                    });
                }
            }
        }
        Ok(leases)
    }
    /// The undo. On failure the lease comes back and the region is still reachable.
    fn detach(&mut self, region: &Region, lease: Lease) -> Result<(), (Lease, Reason)>;
    /// What of the region is to be reachable has changed. Who always reaches all of it has nothing to do. On failure the lease
    /// comes back, for what is reachable then.
    fn renew(&mut self, region: &Region, lease: Lease) -> Result<Lease, (Lease, Reason)> {
        let _ = region;
        Ok(lease)
    }
    /// What it has of a region, for those who ask; `None` of one who neither maps nor pins it.
    fn holding(&self, lease: &Lease) -> Option<Holder> {
        let _ = lease;
        None
    }
}

/// Why [`Consumer::attach_all`] did not.
#[derive(Debug)]
pub struct NotAllAttached {
    /// Which region was refused, by its index.
    pub region: usize,
    /// Why.
    pub reason: Reason,
    /// What is still reachable all the same, by index.
    pub kept: Vec<(usize, Lease)>,
}

/// A consumer, for as long as it is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerId(u64);

/// A consumer could not join.
#[derive(Debug, Error)]
#[error("{error}")]
pub struct JoinError {
    /// Why.
    #[source]
    pub error: AttachError,
    /// Set when it still reaches some memory and so has to stay: [`Ram::leave`] can be tried.
    pub stays: Option<ConsumerId>,
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

/// Consumers did not follow a change of what is reachable.
#[derive(Debug, Error)]
pub enum RenewError {
    /// No region starts there.
    #[error("no guest memory starts at {:#x}", gpa.0)]
    Unknown {
        /// Address asked for.
        gpa: Gpa,
    },
    /// One of them.
    #[error("{consumer} does not follow a change of memory zone {zone} at guest {:#x}", gpa.0)]
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Every consumer reaches it.
    Present,
    /// Devices of the host are out, or are to be, and no consumer that comes later gets it. All others still have it.
    Cut,
    /// On its way out, and somebody does not let go. Devices of this process don't see it any more.
    Stuck,
}

#[derive(Debug)]
struct Attached {
    state: State,
    region: Region,
    /// In the order of the consumers; a missing one has let go already.
    leases: Vec<(ConsumerId, Lease)>,
}

struct Member {
    id: ConsumerId,
    consumer: Box<dyn Consumer>,
}

/// All guest memory of one machine.
pub struct Ram {
    /// By rank.
    members: Vec<Member>,
    next_member: u64,
    attached: Vec<Attached>,
    view: GuestView,
}

impl Ram {
    /// No memory yet. Consumers are visited by rank, those of one rank in this order.
    pub fn new(consumers: Vec<Box<dyn Consumer>>) -> Self {
        let mut ram = Self {
            members: Vec::new(),
            next_member: 0,
            attached: Vec::new(),
            view: GuestView::new(Snapshot::new()),
        };
        for consumer in consumers {
            ram.seat(consumer);
        }
        ram
    }

    /// Gives a consumer its place.
    fn seat(&mut self, consumer: Box<dyn Consumer>) -> ConsumerId {
        let id = ConsumerId(self.next_member);
        self.next_member += 1;
        let rank = consumer.rank();
        let place = self
            .members
            .partition_point(|member| member.consumer.rank() <= rank);
        self.members.insert(place, Member { id, consumer });
        id
    }

    /// Takes a consumer that comes later: it gets all regions that are present, or none.
    pub fn join(&mut self, mut consumer: Box<dyn Consumer>) -> Result<ConsumerId, JoinError> {
        let present: Vec<usize> = (0..self.attached.len())
            .filter(|index| self.attached[*index].state == State::Present)
            .collect();
        let regions: Vec<&Region> = present
            .iter()
            .map(|index| &self.attached[*index].region)
            .collect();
        match consumer.attach_all(&regions) {
            Ok(leases) => {
                let id = self.seat(consumer);
                for (index, lease) in present.into_iter().zip(leases) {
                    self.keep(index, id, lease);
                }
                Ok(id)
            }
            Err(NotAllAttached {
                region,
                reason,
                kept,
            }) => {
                let region = regions[region];
                let error = AttachError::Refused {
                    consumer: consumer.name(),
                    zone: region.zone().to_owned(),
                    gpa: region.gpa(),
                    source: reason,
                };
                let stays = (!kept.is_empty()).then(|| self.seat(consumer));
                if let Some(id) = stays {
                    for (taken, lease) in kept {
                        self.keep(present[taken], id, lease);
                    }
                }
                Err(JoinError { error, stays })
            }
        }
    }

    /// Puts a lease where its consumer's turn is.
    fn keep(&mut self, index: usize, id: ConsumerId, lease: Lease) {
        let turn = |id: ConsumerId| self.members.iter().position(|member| member.id == id);
        let own = turn(id);
        let leases = &self.attached[index].leases;
        let place = leases.partition_point(|(other, _)| turn(*other) < own);
        self.attached[index].leases.insert(place, (id, lease));
    }

    /// The undo of [`Ram::join`]: the consumer lets go of every region, the last one first. On an error it stays, with what
    /// it has not let go of; it can be tried again.
    pub fn leave(&mut self, id: ConsumerId) -> Result<(), DetachError> {
        let Some(place) = self.members.iter().position(|member| member.id == id) else {
            return Ok(());
        };
        let consumer = &mut self.members[place].consumer;
        for attached in self.attached.iter_mut().rev() {
            let Some(index) = attached.leases.iter().position(|(of, _)| *of == id) else {
                continue;
            };
            let (_, lease) = attached.leases.remove(index);
            if let Err((lease, source)) = consumer.detach(&attached.region, lease) {
                attached.leases.insert(index, (id, lease));
                return Err(DetachError::Refused {
                    consumer: consumer.name(),
                    zone: attached.region.zone().to_owned(),
                    gpa: attached.region.gpa(),
                    source,
                });
            }
        }
        self.members.remove(place);
        Ok(())
    }

    /// What devices use; follows every attach and detach.
    pub fn view(&self) -> &GuestView {
        &self.view
    }

    /// The regions that exist.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.attached.iter().map(|a| &a.region)
    }

    /// Who has a region that exists, in the order in which they got it.
    pub fn holders_of(&self, gpa: Gpa) -> Vec<Holder> {
        let attached = self.attached.iter().find(|a| a.region.gpa() == gpa);
        let leases = attached.into_iter().flat_map(|attached| &attached.leases);
        let holding = leases.filter_map(|(id, lease)| {
            let member = self.members.iter().find(|member| member.id == *id)?;
            member.consumer.holding(lease)
        });
        holding.collect()
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
        for Member { id, consumer } in &mut self.members {
            match consumer.attach(&attached.region) {
                Ok(lease) => attached.leases.push((*id, lease)),
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

    /// Has devices of the host let go of a region at once, before anything else is done about it: its memory is not ours any
    /// more. Everybody else still has it; [`Ram::detach`] is to follow. From the first try on, no consumer that joins gets it.
    pub fn cut_dma(&mut self, gpa: Gpa) -> Result<(), DetachError> {
        let attached = self.attached.iter_mut().find(|a| a.region.gpa() == gpa);
        let attached = attached.ok_or(DetachError::Unknown { gpa })?;
        if attached.state == State::Present {
            attached.state = State::Cut;
        }
        // By rank, so that they are the last ones.
        while let Some((id, lease)) = attached.leases.pop() {
            let member = self.members.iter_mut().find(|member| member.id == id);
            let consumer = &mut member.expect("it leaves when it has let go").consumer;
            if consumer.rank() != Rank::Dma {
                attached.leases.push((id, lease));
                break;
            }
            if let Err((lease, source)) = consumer.detach(&attached.region, lease) {
                attached.leases.push((id, lease));
                return Err(DetachError::Refused {
                    consumer: consumer.name(),
                    zone: attached.region.zone().to_owned(),
                    gpa,
                    source,
                });
            }
        }
        Ok(())
    }

    /// Has every consumer look again at what of a region is to be reachable.
    pub fn renew(&mut self, gpa: Gpa) -> Result<(), RenewError> {
        let attached = self.attached.iter_mut().find(|a| a.region.gpa() == gpa);
        let attached = attached.ok_or(RenewError::Unknown { gpa })?;
        let mut outcome = Ok(());
        for (id, lease) in std::mem::take(&mut attached.leases) {
            let member = self.members.iter_mut().find(|member| member.id == id);
            let consumer = &mut member.expect("it leaves when it has let go").consumer;
            let lease = match consumer.renew(&attached.region, lease) {
                Ok(lease) => lease,
                Err((lease, source)) => {
                    outcome = Err(RenewError::Refused {
                        consumer: consumer.name(),
                        zone: attached.region.zone().to_owned(),
                        gpa,
                        source,
                    });
                    lease
                }
            };
            attached.leases.push((id, lease));
        }
        outcome
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
        while let Some((id, lease)) = attached.leases.pop() {
            let member = self.members.iter_mut().find(|member| member.id == id);
            let consumer = &mut member.expect("it leaves when it has let go").consumer;
            if let Err((lease, source)) = consumer.detach(&attached.region, lease) {
                let error = DetachError::Refused {
                    consumer: consumer.name(),
                    zone: attached.region.zone().to_owned(),
                    gpa: attached.region.gpa(),
                    source,
                };
                attached.leases.push((id, lease));
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

    /// Gives the devices a new snapshot: the regions that are not on their way out.
    fn publish(&self) {
        let mut regions: Vec<Arc<SnapshotRegion>> = self
            .attached
            .iter()
            .filter(|a| a.state != State::Stuck)
            .map(|a| a.region.guest_region())
            .collect();
        regions.sort_by_key(|r| r.start_addr());
        let snapshot =
            Snapshot::of(regions).expect("regions are sorted here and `attach` let none overlap");
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
mod tests;
