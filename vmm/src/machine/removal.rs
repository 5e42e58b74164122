//! What the host takes back from a running machine: memory and devices, announced or not.
//!
//! ```text
//!   the host asks  ──▶ claim: the guest is asked ──▶ ejects ───────────────▶ given back, forgotten
//!                                 │ deadline
//!   it is gone  ──▶ lost ─────────┴──▶ severed: DMA off, then all others; ▶ given back ── the guest ejects ──▶ forgotten
//!                                      the place stays taken
//! ```
//! Boot RAM can't be ejected: its loss ends the machine, in order, DMA first. What somebody does not let go of at once
//! (a worker in the middle of a batch) is tried again by [`RunningVm::settle`] until it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::devices::Settled;
use super::guard::Used;
use super::vm::{RunningVm, release_one};
use crate::config::{DEFAULT_REMOVAL_TIMEOUT, OnRemoval, PmemConfig};
use crate::memory::layout::Gpa;
use crate::memory::region::{Mapping, Region};

/// A device that the guest still knows, with nothing of the host behind it.
pub(super) struct Severed {
    pub(super) id: String,
    /// Where its memory was.
    pub(super) place: Option<Place>,
}

/// Addresses whose memory is going or gone.
pub(super) struct Place {
    gpa: Gpa,
    /// Whether somebody has still not let go of the memory.
    held: bool,
}

/// Whose memory a region is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum User {
    /// A zone: boot RAM.
    Zone(String),
    /// A device that brought it.
    Device(String),
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Zone(id) => write!(f, "memory zone {id}"),
            Self::Device(id) => write!(f, "device {id}"),
        }
    }
}

/// A range of boot RAM that is not there any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostRam {
    /// Its zone.
    pub zone: String,
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// The host's device.
    pub device: String,
}

impl std::fmt::Display for LostRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            zone,
            gpa,
            size,
            device,
        } = self;
        write!(
            f,
            "memory zone {zone} (guest {gpa:#x}, {size:#x} bytes) is gone: the host took {device} away from under it; \
             the guest can't go on and was ended"
        )
    }
}

/// What a look for lost memory has found.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Boot RAM: the machine can't go on.
    pub(super) ram: Option<LostRam>,
    /// Devices that were cut off.
    pub(super) settled: Vec<Settled>,
}

impl Losses {
    pub(super) fn is_empty(&self) -> bool {
        self.ram.is_none() && self.settled.is_empty()
    }
}

/// The device-dax device behind a region.
pub(super) fn dax_device(region: &Region) -> Option<String> {
    match region.mapping() {
        Mapping::Dax(mapping) => Some(mapping.facts().name.to_string()),
        Mapping::Host(_) => None,
    }
}

/// Whether the host has taken the memory away. What can't be told is there.
fn is_gone(region: &Region) -> bool {
    if region.mark().is_lost() {
        return true;
    }
    match region.mapping() {
        Mapping::Dax(mapping) => match mapping.probe() {
            Ok(probe) => probe == daxhund_dax::Probe::Gone,
            Err(error) => {
                warn!(%error, "memory can't be looked at");
                false
            }
        },
        Mapping::Host(_) => false,
    }
}

impl RunningVm {
    /// Whose memory is on a device-dax device: each user once.
    pub(super) fn users_of(&self, device: &str) -> Vec<User> {
        let mut users = Vec::new();
        for region in self.ram.regions() {
            if dax_device(region).as_deref() == Some(device) {
                let user = self.user(region);
                if !users.contains(&user) {
                    users.push(user);
                }
            }
        }
        users
    }

    /// The device-dax devices under guest memory.
    pub(super) fn used_dax(&self) -> BTreeMap<String, Used> {
        let mut devices = BTreeMap::<String, Used>::new();
        for region in self.ram.regions() {
            let Mapping::Dax(mapping) = region.mapping() else {
                continue;
            };
            let (_, timeout) = self.removal_policy(&self.user(region));
            devices
                .entry(mapping.facts().name.to_string())
                .and_modify(|used| used.timeout = used.timeout.max(timeout))
                .or_insert_with(|| Used {
                    node: Arc::clone(mapping.file()),
                    timeout,
                });
        }
        devices
    }

    /// What a request for a user's memory does, and how long the guest has then.
    pub(super) fn removal_policy(&self, user: &User) -> (OnRemoval, Duration) {
        let config = self.config();
        let (policy, default, timeout) = match user {
            User::Zone(id) => {
                let zone = config.memory.zones.iter().find(|zone| zone.id == *id);
                let timeout = zone.and_then(|zone| zone.removal_timeout);
                (zone.and_then(|z| z.on_removal), OnRemoval::Refuse, timeout)
            }
            User::Device(id) => {
                let is = |pmem: &&PmemConfig| pmem.id.as_ref() == Some(id);
                let pmem = config.pmem.iter().find(is);
                let timeout = pmem.and_then(|pmem| pmem.removal_timeout);
                (pmem.and_then(|p| p.on_removal), OnRemoval::Eject, timeout)
            }
        };
        let timeout = timeout.map_or(DEFAULT_REMOVAL_TIMEOUT, Duration::from);
        (policy.unwrap_or(default), timeout)
    }

    fn user(&self, region: &Region) -> User {
        let severed = |gpa| self.severed.iter().any(|severed| severed.is_at(gpa));
        let is_device = self
            .host
            .devices
            .iter()
            .any(|d| d.memory == Some(region.gpa()));
        // A device's memory is named after it.
        if is_device || severed(region.gpa()) {
            User::Device(region.zone().to_owned())
        } else {
            User::Zone(region.zone().to_owned())
        }
    }

    /// The host wants a device back: the guest is asked, and cut off if it has not let go by then.
    pub(super) fn claim(&mut self, id: &str, until: Instant) -> bool {
        self.machine.devices.claim(id, until)
    }

    /// The host does not want it any more.
    pub(super) fn unclaim(&mut self, id: &str) {
        self.machine.devices.unclaim(id, Instant::now());
    }

    /// A device is lost: cut off at once.
    pub(super) fn lost_device(&mut self, id: &str) -> Vec<Settled> {
        let settled: Vec<Settled> = self.machine.devices.lost(id).into_iter().collect();
        self.after(&settled);
        settled
    }

    /// Looks at all memory that can be taken away, and cuts off what is gone or on one of these devices: transfers of
    /// devices first of all.
    pub(super) fn look_for_losses(&mut self, going: &BTreeSet<String>) -> Losses {
        let is_going =
            |region: &Region| dax_device(region).is_some_and(|device| going.contains(&device));
        let gone: Vec<Gpa> = self
            .ram
            .regions()
            .filter(|region| is_going(region) || is_gone(region))
            .map(Region::gpa)
            .collect();
        for gpa in &gone {
            if let Err(error) = self.ram.cut_dma(*gpa) {
                error!(%error, "devices may still reach memory that is not ours any more");
            }
        }
        let mut losses = Losses::default();
        for region in self.ram.regions() {
            if gone.contains(&region.gpa()) {
                region.mark().lose();
            }
        }
        for gpa in gone {
            let Some(region) = self.ram.regions().find(|region| region.gpa() == gpa) else {
                continue;
            };
            let (user, size) = (self.user(region), region.size());
            let device = dax_device(region).unwrap_or_default();
            match user {
                User::Device(id) => {
                    // One that is severed already is on its way.
                    losses.settled.extend(self.machine.devices.lost(&id));
                }
                User::Zone(zone) => {
                    error!(zone, %gpa, size = %format_args!("{size:#x}"), device, "guest memory was taken away");
                    losses.ram.get_or_insert(LostRam {
                        zone,
                        gpa: gpa.0,
                        size,
                        device,
                    });
                }
            }
        }
        self.after(&losses.settled);
        losses
    }

    /// Does what a look at removals asks for.
    pub(super) fn after(&mut self, settled: &[Settled]) {
        for settled in settled {
            match settled {
                Settled::Gone { id, memory, .. } => self.forget(id, *memory),
                Settled::Severed { id, .. } => self.sever(id),
                Settled::Unanswered { .. } => {}
            }
        }
    }

    /// Gives everything of the host back that a device has; its place stays taken.
    fn sever(&mut self, id: &str) {
        let Some(index) = self.host.devices.iter().position(|device| device.id == id) else {
            return;
        };
        let device = self.host.devices.remove(index);
        let place = device.memory.map(|gpa| Place { gpa, held: true });
        if let Some(Place { gpa, .. }) = &place {
            self.bury(*gpa);
        }
        let id = device.id.clone();
        // Without its region: that goes when nobody uses it any more.
        self.host.close_device(device, None, &mut self.ram);
        self.severed.push(Severed { id, place });
        self.finish_severing();
    }

    /// Memory that begins there is about to go. Before it does, so that there is no moment at which a load would find neither.
    pub(super) fn bury(&self, gpa: Gpa) {
        if let Some(region) = self.ram.regions().find(|region| region.gpa() == gpa) {
            self.host.tombstones.insert(gpa, region.size());
        }
    }

    /// Memory that is to go goes as soon as nobody uses it any more.
    pub(super) fn finish_severing(&mut self) {
        for place in self.severed.iter_mut().filter_map(|s| s.place.as_mut()) {
            if !place.held {
                continue;
            }
            match self.ram.detach(place.gpa) {
                Ok(region) => {
                    place.held = false;
                    info!(zone = region.zone(), gpa = %place.gpa, "memory is given back to the host");
                    release_one(region);
                }
                Err(error) => {
                    tracing::debug!(%error, "memory that is to go is still in use");
                }
            }
        }
    }

    /// Whether memory waits for somebody to let go of it.
    pub(super) fn is_severing(&self) -> bool {
        let mut places = self.severed.iter().filter_map(|s| s.place.as_ref());
        places.any(|place| place.held)
    }

    /// The guest has let go of a device, or was never to have it again: what it still had goes, and its place is free.
    fn forget(&mut self, id: &str, memory: Option<Gpa>) {
        match self.severed.iter().position(|severed| severed.id == id) {
            None => self.give_back(id, memory),
            Some(index) => {
                let severed = self.severed.remove(index);
                self.forget_severed(&severed);
            }
        }
    }

    fn forget_severed(&mut self, severed: &Severed) {
        if let Some(Place { gpa, held }) = &severed.place {
            if *held {
                error!(id = severed.id, %gpa, "memory of a device that is gone stays mapped");
            } else {
                self.host.device_memory.free(gpa.0);
            }
        }
        self.forget_word(&severed.id);
    }

    /// A guest that starts anew knows nothing of devices that were cut off.
    pub(super) fn forget_all_severed(&mut self) {
        for severed in std::mem::take(&mut self.severed) {
            self.forget_severed(&severed);
        }
        self.host.tombstones.clear();
    }
}

impl Severed {
    fn is_at(&self, gpa: Gpa) -> bool {
        self.place.as_ref().is_some_and(|place| place.gpa == gpa)
    }
}
