//! The walk of one device: from the host into a slot of the guest, and back.
//!
//! ```text
//!   HostDevice ─plug─▶ slot ▶ interrupts ▶ function ▶ bus ▶ (guest told) ─ Plugged
//!       ▲                                                                     │
//!       └──────────────── the same in reverse, the slot last ◀────── withdraw, settle
//! ```
//! A device that the host takes back before the guest has let go is cut off: what it has of the host goes, its slot stays
//! taken until the guest ejects what it knows of it. A [`HostDevice`] is what was taken from the host: it outlives resets of the guest. What the machine adds is a
//! [`Plugged`], one field for each step. Memory that a device brings (persistent memory) goes through
//! [`crate::memory::ram`] like RAM, before the device is plugged and after it is gone.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;
use tracing::{debug, info, warn};

use super::passthrough::PassedThrough;
use super::seat::Seat;
use super::wiring::{Fabric, KvmPin, KvmRoutes, KvmWindows};
use crate::kvm::VectorsError;
use crate::lifecycle::region::RegionId;
use crate::lifecycle::slot::{self, Claimant, SlotAction, SlotEvent, SlotState};
use crate::memory::ram::GuestView;
use crate::pci::{Ejected, Hotplug, InsertError, Segment, Slot, SlotError, Slots};
use crate::vfio::{self, VfioPci, vectors_needed};
use crate::virtio::Device;
use crate::virtio::blk::DiskResizeError;
use crate::virtio::transport::{Parts, VirtioPci, vectors_for};

/// A device as it was taken from the host.
pub(super) struct HostDevice {
    /// Its name in the configuration.
    pub(super) id: String,
    /// PCI segment.
    pub(super) segment: u16,
    /// The slot it has to be in: as configured, or where it was before a reset.
    pub(super) slot: Option<u8>,
    /// The device itself.
    pub(super) kind: HostKind,
    /// The memory that it brings.
    pub(super) memory: Option<RegionId>,
}

/// What a device is to the host.
pub(super) enum HostKind {
    /// Files, taps, sockets, memory; served by this process.
    Virtio(Arc<dyn Device>),
    /// Hardware.
    Passthrough(Arc<PassedThrough>),
}

impl HostKind {
    /// Gives a disk so many bytes.
    pub(super) fn resize(&self, bytes: u64) -> Result<(), DiskResizeError> {
        match self {
            Self::Virtio(device) => device.resize(bytes),
            Self::Passthrough(_) => Err(DiskResizeError::NotHere),
        }
    }

    /// What it has counted, for `vm.counters`.
    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        match self {
            Self::Virtio(device) => device.counters(),
            Self::Passthrough(_) => Vec::new(),
        }
    }
}

impl std::fmt::Debug for HostKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Virtio(device) => write!(f, "{:?}", device.kind()),
            Self::Passthrough(_) => f.write_str("Passthrough"),
        }
    }
}

/// Where a function sits, as orchestrators write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bdf {
    pub(super) segment: u16,
    pub(super) slot: u8,
}

impl std::fmt::Display for Bdf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04x}:00:{:02x}.0", self.segment, self.slot)
    }
}

/// A device can't be plugged.
#[derive(Debug, Error)]
pub enum PlugError {
    /// No such segment.
    #[error(
        "device {id}: the guest has no PCI segment {segment}; --platform num_pci_segments= gives it more"
    )]
    NoSegment {
        /// Which device.
        id: String,
        /// Asked for.
        segment: u16,
    },
    /// No slot.
    #[error("device {id}")]
    Slot {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: SlotError,
    },
    /// No interrupts.
    #[error("device {id}")]
    Vectors {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: VectorsError,
    },
    /// No event descriptors.
    #[error(
        "device {id}: no event descriptor could be made; `ulimit -n` raises how many a process may have"
    )]
    Event {
        /// Which device.
        id: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A function of the host that a guest can't be shown.
    #[error("device {id}")]
    Show {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: Box<vfio::NewError>,
    },
    /// No addresses.
    #[error("device {id}")]
    Insert {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: InsertError,
    },
}

/// A device in its slot. Fields in the order in which they are acquired.
struct Plugged {
    id: String,
    bdf: Bdf,
    slot: Slot,
    /// Empty once the function was cut off.
    seat: Option<Seat>,
    memory: Option<RegionId>,
    state: SlotState,
}

impl Plugged {
    /// Whether the function is cut off and something of it is still in flight on the host.
    fn is_being_severed(&self) -> bool {
        let host_side = self.seat.as_ref().is_some_and(|seat| !seat.outlives_host());
        self.state == SlotState::Severed && host_side
    }
}

/// One PCI segment and who sits in it.
struct Board {
    segment: Arc<Segment>,
    slots: Slots,
}

/// What is to be done after a removal was looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// The device is gone from the machine; its memory, host resources and configuration can go.
    Gone {
        id: String,
        bdf: String,
        memory: Option<RegionId>,
    },
    /// The guest did not answer in time.
    Unanswered { id: String },
    /// The guest is cut off: what the device has of the host, memory first, can go. Its place stays taken.
    Severed {
        id: String,
        memory: Option<RegionId>,
    },
}

impl Settled {
    /// Which device.
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Gone { id, .. } | Self::Unanswered { id } | Self::Severed { id, .. } => id,
        }
    }
}

/// No such device.
#[derive(Debug, Error)]
#[error("the guest has no device with id {id}; vm.info lists them")]
pub struct UnknownDevice {
    /// Asked for.
    pub id: String,
}

/// A removal can't be asked for.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// There is none.
    #[error(transparent)]
    Unknown(#[from] UnknownDevice),
    /// It has let go of it already.
    #[error(
        "device {id} is on its way out already: the guest has let go of it, the host is still finishing its work"
    )]
    Leaving {
        /// Asked for.
        id: String,
    },
}

/// All devices of one machine.
pub(super) struct Devices {
    boards: Vec<Board>,
    hotplug: Arc<Hotplug>,
    fabric: Fabric,
    memory: GuestView,
    plugged: Vec<Plugged>,
}

impl Devices {
    pub(super) fn new(
        segments: &[Arc<Segment>],
        hotplug: Arc<Hotplug>,
        fabric: Fabric,
        memory: GuestView,
    ) -> Self {
        Self {
            boards: segments
                .iter()
                .map(|segment| Board {
                    segment: Arc::clone(segment),
                    slots: Slots::new(segment.number()),
                })
                .collect(),
            hotplug,
            fabric,
            memory,
            plugged: Vec::new(),
        }
    }

    /// Puts a device into a slot, where it stays over resets. The guest is told with [`Devices::announce`]; a guest that
    /// has not started yet finds it by itself.
    pub(super) fn plug(&mut self, host: &mut HostDevice) -> Result<Bdf, PlugError> {
        let id = || host.id.clone();
        let board = self
            .boards
            .get_mut(usize::from(host.segment))
            .ok_or_else(|| PlugError::NoSegment {
                id: id(),
                segment: host.segment,
            })?;
        let slot = board
            .slots
            .reserve(host.slot, &host.id)
            .map_err(|source| PlugError::Slot { id: id(), source })?;
        let seat = match self.seat(host, slot.number()) {
            Ok(seat) => seat,
            Err(error) => {
                self.free(host.segment, slot);
                return Err(error);
            }
        };
        let board = &self.boards[usize::from(host.segment)];
        if let Err(source) = board.segment.insert(slot.number(), seat.function()) {
            seat.stop();
            seat.release();
            self.free(host.segment, slot);
            return Err(PlugError::Insert { id: id(), source });
        }
        let bdf = Bdf {
            segment: host.segment,
            slot: slot.number(),
        };
        self.hotplug.set_present(bdf.segment, slot);
        host.slot = Some(slot.number());
        info!(id = host.id, %bdf, kind = ?host.kind, "device plugged");
        self.plugged.push(Plugged {
            id: host.id.clone(),
            bdf,
            slot,
            seat: Some(seat),
            memory: host.memory,
            state: SlotState::Present,
        });
        Ok(bdf)
    }

    fn seat(&self, host: &HostDevice, slot: u8) -> Result<Seat, PlugError> {
        let id = || host.id.clone();
        let vectors = |count| {
            let vectors = self.fabric.interrupts.vectors(count);
            let vectors = vectors.map_err(|source| PlugError::Vectors { id: id(), source })?;
            Ok(Arc::new(KvmRoutes(vectors)))
        };
        match &host.kind {
            HostKind::Virtio(device) => {
                let parts = Parts {
                    id: id(),
                    device: Arc::clone(device),
                    routes: vectors(vectors_for(device.as_ref()))?,
                    doorbells: Arc::clone(&self.fabric.doorbells) as Arc<_>,
                    memory: self.memory.clone(),
                };
                let transport = VirtioPci::new(parts);
                let transport =
                    transport.map_err(|source| PlugError::Event { id: id(), source })?;
                Ok(Seat::Virtio(Arc::new(transport)))
            }
            HostKind::Passthrough(device) => {
                let function = device.function();
                let parts = vfio::Parts {
                    id: id(),
                    vectors: vectors(vectors_needed(function.as_ref()))?,
                    host: function,
                    intx: Some(Arc::new(KvmPin::of_slot(&self.fabric.pins, slot))),
                    windows: Arc::new(KvmWindows::new(
                        &self.fabric.slots,
                        device.registers_in_reach_of(),
                    )),
                    exclude_mmap_bars: device.exclude_mmap_bars(),
                };
                let function = VfioPci::new(parts).map_err(|source| PlugError::Show {
                    id: id(),
                    source: Box::new(source),
                })?;
                Ok(Seat::passthrough(
                    Arc::new(function),
                    Arc::clone(device),
                    Arc::clone(&self.fabric.vfio),
                ))
            }
        }
    }

    fn free(&mut self, segment: u16, slot: Slot) {
        self.boards[usize::from(segment)].slots.free(slot);
    }

    /// Tells a running guest of a device (ACPI Device Check).
    pub(super) fn announce(&self, bdf: Bdf) {
        if let Some(plugged) = self.plugged.iter().find(|plugged| plugged.bdf == bdf) {
            self.hotplug.announce(bdf.segment, plugged.slot);
        }
    }

    /// Asks the guest to let go of a device. It ends with an eject, or with [`Settled::Unanswered`].
    pub(super) fn request_removal(&mut self, id: &str, now: Instant) -> Result<(), RemoveError> {
        let plugged = self
            .plugged
            .iter_mut()
            .find(|plugged| plugged.id == id)
            .ok_or_else(|| UnknownDevice { id: id.to_owned() })?;
        let (state, action) = slot::step(plugged.state, SlotEvent::Ask { now });
        plugged.state = state;
        if action != SlotAction::RequestEject {
            return Err(RemoveError::Leaving { id: id.to_owned() });
        }
        info!(id, bdf = %plugged.bdf, "the guest is asked to let go of the device");
        self.hotplug
            .request_eject(plugged.bdf.segment, plugged.slot);
        Ok(())
    }

    /// A device is wanted back: the guest is asked, and cut off when it has not let go by then.
    pub(super) fn claim(&mut self, id: &str, by: Claimant, until: Instant) {
        let Some(plugged) = self.plugged.iter_mut().find(|plugged| plugged.id == id) else {
            return;
        };
        let (state, action) = slot::step(plugged.state, SlotEvent::Claim { by, until });
        plugged.state = state;
        if action == SlotAction::RequestEject {
            info!(id, bdf = %plugged.bdf, ?by, "the device is wanted back; the guest is asked to let go of it");
            self.hotplug
                .request_eject(plugged.bdf.segment, plugged.slot);
        }
    }

    /// An operator wants a device for the host: as [`Devices::claim`]. One that can't be taken from a guest that keeps it is
    /// asked for: [`Devices::is_kept`].
    pub(super) fn drain(&mut self, id: &str, until: Instant, now: Instant) {
        let plugged = self.plugged.iter().find(|plugged| plugged.id == id);
        let seat = plugged.and_then(|plugged| plugged.seat.as_ref());
        if seat.is_none_or(Seat::can_be_cut_off) {
            self.claim(id, Claimant::Operator, until);
        } else if let Err(error) = self.request_removal(id, now) {
            debug!(%error, "it is on its way without being asked for");
        }
    }

    /// Whether the guest is asked for it, and may let go of it still.
    pub(super) fn is_asked_for(&self, id: &str) -> bool {
        let is_asked = |state| matches!(state, SlotState::Asked { .. } | SlotState::Claimed(_));
        let asked = |plugged: &Plugged| plugged.id == id && is_asked(plugged.state);
        self.plugged.iter().any(asked)
    }

    /// Whether the guest was asked for it, and has not let go in time.
    pub(super) fn is_kept(&self, id: &str) -> bool {
        let kept = |plugged: &Plugged| plugged.id == id && plugged.state == SlotState::Unanswered;
        self.plugged.iter().any(kept)
    }

    /// The host does not want it any more. The guest was asked already, and an operator may still want it.
    pub(super) fn unclaim(&mut self, id: &str, now: Instant) {
        if let Some(plugged) = self.plugged.iter_mut().find(|plugged| plugged.id == id) {
            (plugged.state, _) = slot::step(plugged.state, SlotEvent::Unclaim { now });
        }
    }

    /// The host has taken a device already: it is cut off before this returns, except for what is in flight.
    /// [`Devices::settle`] tells when that is home.
    pub(super) fn lost(&mut self, id: &str) -> Option<Settled> {
        let index = self.plugged.iter().position(|plugged| plugged.id == id)?;
        let plugged = &mut self.plugged[index];
        let (state, action) = slot::step(plugged.state, SlotEvent::Lost);
        plugged.state = state;
        match action {
            SlotAction::CutOff { tell } => self.cut_off(index, tell),
            _ => None,
        }
    }

    /// Takes everything of the host from a device that the guest still has.
    fn cut_off(&mut self, index: usize, tell: bool) -> Option<Settled> {
        let plugged = &self.plugged[index];
        warn!(id = plugged.id, bdf = %plugged.bdf, "the guest is cut off from the device");
        if plugged.seat.as_ref().is_some_and(Seat::outlives_host) {
            if let Some(seat) = &plugged.seat {
                seat.sever();
            }
            if tell {
                self.hotplug
                    .request_eject(plugged.bdf.segment, plugged.slot);
            }
            return Some(Settled::Severed {
                id: plugged.id.clone(),
                memory: plugged.memory,
            });
        }
        withdraw(&self.boards, plugged);
        // The slot is empty for all the guest can see, and it is asked to forget what was there.
        self.hotplug.withdraw(plugged.bdf.segment, plugged.slot);
        self.finish_cut(index)
    }

    /// When nothing of a function is in flight any more it is let go of.
    fn finish_cut(&mut self, index: usize) -> Option<Settled> {
        let plugged = &mut self.plugged[index];
        let seat = plugged.seat.take_if(|seat| seat.is_gone())?;
        if !seat.release() {
            warn!(
                id = plugged.id,
                "a function is still held by somebody else than its slot"
            );
        }
        Some(Settled::Severed {
            id: plugged.id.clone(),
            memory: plugged.memory,
        })
    }

    /// The guest has ejected a slot: the device is off the bus when this returns. It is gone when it has settled.
    pub(super) fn ejected(&mut self, Ejected { segment, slot }: Ejected) {
        let meant = |plugged: &&mut Plugged| plugged.bdf.segment == segment && plugged.slot == slot;
        let Some(plugged) = self.plugged.iter_mut().find(meant) else {
            debug!(
                segment,
                ?slot,
                "an eject of a device that is not there any more"
            );
            return;
        };
        let bdf = plugged.bdf;
        let (state, action) = slot::step(plugged.state, SlotEvent::Ejected);
        plugged.state = state;
        if action == SlotAction::Withdraw {
            info!(id = plugged.id, %bdf, "ejected by the guest");
            withdraw(&self.boards, plugged);
        }
    }

    /// Looks at removals that are under way. Call it after an eject, and at intervals while [`Devices::is_settling`].
    pub(super) fn settle(&mut self, now: Instant) -> Vec<Settled> {
        let mut settled = Vec::new();
        let mut index = 0;
        while let Some(plugged) = self.plugged.get_mut(index) {
            if plugged.is_being_severed() {
                settled.extend(self.finish_cut(index));
                index += 1;
                continue;
            }
            let event = if plugged.state == SlotState::Draining
                && plugged.seat.as_ref().is_none_or(Seat::is_gone)
            {
                SlotEvent::Drained
            } else {
                SlotEvent::Tick { now }
            };
            let (state, action) = slot::step(plugged.state, event);
            plugged.state = state;
            match action {
                SlotAction::Release => {
                    let plugged = self.plugged.remove(index);
                    settled.push(self.release(plugged));
                    continue;
                }
                SlotAction::ReportUnanswered => {
                    warn!(id = plugged.id, bdf = %plugged.bdf, "the guest did not let go of the device in time; it keeps it");
                    settled.push(Settled::Unanswered {
                        id: plugged.id.clone(),
                    });
                }
                SlotAction::CutOff { tell } => settled.extend(self.cut_off(index, tell)),
                _ => {}
            }
            index += 1;
        }
        settled
    }

    /// Whether a removal waits for the guest or the host.
    pub(super) fn is_settling(&self) -> bool {
        self.plugged.iter().any(|p| {
            let underway = matches!(
                p.state,
                SlotState::Asked { .. } | SlotState::Claimed { .. } | SlotState::Draining
            );
            underway || p.is_being_severed()
        })
    }

    fn release(&mut self, plugged: Plugged) -> Settled {
        let Plugged {
            id,
            bdf,
            slot,
            seat,
            memory,
            state: _,
        } = plugged;
        if seat.is_some_and(|seat| !seat.release()) {
            warn!(
                id,
                "a function is still held by somebody else than its slot"
            );
        }
        self.hotplug.clear(bdf.segment, slot);
        if !self.boards[usize::from(bdf.segment)].slots.free(slot) {
            warn!(id, %bdf, "the slot had another owner by then");
        }
        Settled::Gone {
            id,
            bdf: bdf.to_string(),
            memory,
        }
    }

    /// The guest is about to start anew: devices that it was asked for, or was cut off from, it does not find again. To be
    /// done when the machine is taken apart.
    pub(super) fn end_for_reset(&mut self) -> Vec<Settled> {
        let mut ended = Vec::new();
        for plugged in &mut self.plugged {
            let (state, action) = slot::step(plugged.state, SlotEvent::Reset);
            plugged.state = state;
            if action == SlotAction::Release {
                info!(id = plugged.id, bdf = %plugged.bdf, "the reset takes the device from the guest");
                ended.push(Settled::Gone {
                    id: plugged.id.clone(),
                    bdf: plugged.bdf.to_string(),
                    memory: plugged.memory,
                });
            }
        }
        ended
    }

    /// Takes all devices off the bus, for a machine that ends; waits until none reaches guest memory any more, which is
    /// bounded by what the host has in flight for them.
    pub(super) fn unplug_all(&mut self) {
        for plugged in &mut self.plugged {
            if plugged.state != SlotState::Draining {
                withdraw(&self.boards, plugged);
                plugged.state = SlotState::Draining;
            }
        }
        while let Some(plugged) = self.plugged.pop() {
            self.release(plugged);
        }
    }

    /// Tells all workers to serve nothing, and waits for it; the ids of devices that did not stop in time.
    pub(super) fn pause(&self, until: Instant) -> Vec<String> {
        for seat in self.plugged.iter().filter_map(|p| p.seat.as_ref()) {
            seat.pause();
        }
        self.plugged
            .iter()
            .filter(|plugged| {
                plugged
                    .seat
                    .as_ref()
                    .is_some_and(|seat| !seat.wait_paused(until))
            })
            .map(|plugged| plugged.id.clone())
            .collect()
    }

    /// The undo of [`Devices::pause`].
    pub(super) fn resume(&self) {
        for seat in self.plugged.iter().filter_map(|p| p.seat.as_ref()) {
            seat.resume();
        }
    }

    /// For `vm.info`: id, place and state of each.
    pub(super) fn tree(&self) -> impl Iterator<Item = (&str, Bdf, &'static str)> {
        self.plugged
            .iter()
            .map(|plugged| (plugged.id.as_str(), plugged.bdf, plugged.state.name()))
    }
}

/// First the bus, so that no vCPU reaches it, then its workers.
fn withdraw(boards: &[Board], plugged: &Plugged) {
    if let Some(board) = boards.get(usize::from(plugged.bdf.segment)) {
        board.segment.remove(plugged.bdf.slot);
    }
    if let Some(seat) = &plugged.seat {
        seat.stop();
    }
}
