//! What the host takes back from a running machine: memory and devices, announced or not.
//!
//! ```text
//!   the host asks  ──▶ claim: the guest is asked ──▶ ejects ──▶ Gone ──▶ memory is let go of
//!                                 │ deadline
//!   it is gone  ──▶ DMA off ──▶ lost ──┴──▶ Severed ──▶ memory is given up ── the guest ejects ──▶ Gone
//! ```
//! What becomes of a device is [`crate::lifecycle::slot`]'s to say, of its memory [`crate::lifecycle::region`]'s. Boot RAM can't be
//! ejected: its loss ends the machine, or pauses it for good. A device's removal is told of, and its name free, when nothing of
//! its memory is left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, error, warn};

use super::devices::Settled;
use super::guard::Used;
use super::regions::Known;
use super::vm::{PAUSE_DEADLINE, PauseError, RunningVm};
use crate::config::{DEFAULT_REMOVAL_TIMEOUT, OnLoss, OnRemoval, PmemConfig};
use crate::lifecycle::region::{RegionEvent, RegionId, RegionState, Stage};
use crate::lifecycle::slot::Claimant;
use crate::memory::layout::Gpa;
use crate::memory::region::{Mapping, Region};

/// For vCPUs to leave the guest before a transfer is stopped; one that waits for the owner does not.
const HOLD_DEADLINE: Duration = Duration::from_millis(20);

/// Whose memory a region is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum User {
    /// A zone: boot RAM.
    Zone(String),
    /// A device that brought it.
    Device(String),
}

impl User {
    /// Its name in the configuration.
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Zone(id) | Self::Device(id) => id,
        }
    }
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
            "memory zone {zone} (guest {gpa:#x}, {size:#x} bytes) is gone: the host took {device} away from under it"
        )
    }
}

/// What a look for lost memory has found.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Boot RAM: the machine can't go on.
    pub(super) ram: Vec<LostRam>,
    /// Devices that were cut off.
    pub(super) settled: Vec<Settled>,
    /// How many regions were not known to be gone.
    pub(super) regions: u64,
}

impl Losses {
    pub(super) fn is_empty(&self) -> bool {
        self.ram.is_empty() && self.settled.is_empty()
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
        for (_, state, known) in self.regions.iter() {
            if known.device.as_deref() == Some(device)
                && !state.is_given_back()
                && !users.contains(&known.user)
            {
                users.push(known.user.clone());
            }
        }
        users
    }

    /// The device-dax devices that something of guest memory is left of.
    pub(super) fn used_dax(&self) -> BTreeMap<String, Used> {
        let mut devices = BTreeMap::<String, Used>::new();
        for region in self.ram.regions().chain(self.regions.ours()) {
            let (Mapping::Dax(mapping), Some((.., known))) =
                (region.mapping(), self.regions.at(region.gpa()))
            else {
                continue;
            };
            let (_, timeout) = self.removal_policy(&known.user);
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

    /// The host wants a device back: the guest is asked, and cut off if it has not let go by then.
    pub(super) fn claim(&mut self, id: &str, until: Instant) {
        self.machine.devices.claim(id, Claimant::Host, until);
    }

    /// The host does not want it any more.
    pub(super) fn unclaim(&mut self, id: &str) {
        self.machine.devices.unclaim(id, Instant::now());
    }

    /// A device is lost: cut off at once.
    pub(super) fn lost_device(&mut self, id: &str) -> Vec<Settled> {
        let settled: Vec<Settled> = self.machine.devices.lost(id).into_iter().collect();
        self.after(settled);
        self.take_settled()
    }

    /// Looks at all memory that can be taken away, and cuts off what is gone or on one of these devices: transfers of
    /// devices first of all.
    pub(super) fn look_for_losses(&mut self, going: &BTreeSet<String>) -> Losses {
        let is_going =
            |region: &Region| dax_device(region).is_some_and(|device| going.contains(&device));
        let gone: Vec<(RegionId, RegionState)> = self
            .ram
            .regions()
            .filter(|region| is_going(region) || is_gone(region))
            .filter_map(|region| self.regions.at(region.gpa()))
            .map(|(id, state, _)| (id, state))
            .collect();
        // What was on its way out before is no news.
        let is_present = |(_, state): &&(RegionId, RegionState)| state.stage() == Stage::Present;
        let news: Vec<RegionId> = gone.iter().filter(is_present).map(|(id, _)| *id).collect();
        let start = Instant::now();
        // Until the unmap is over the guest gives its devices no new work there, and takes no processor from it.
        let hold = self.host.dma.is_some() && !self.paused && !news.is_empty();
        if hold && !self.machine.hold_vcpus(HOLD_DEADLINE) {
            debug!("a vCPU runs on while devices are kept from memory that is gone");
        }
        self.drive(gone.iter().map(|(id, _)| (*id, RegionEvent::Lost)));
        let elapsed_us = start.elapsed().as_micros();
        let is_news = |(id, _, _): &(RegionId, RegionState, &Known)| news.contains(id);
        let is_cut = |(_, state, _): (RegionId, RegionState, &Known)| state.stage() == Stage::Cut;
        if self.host.dma.is_some() && self.regions.iter().filter(is_news).any(is_cut) {
            warn!(elapsed_us, "devices do not reach it any more");
        }
        let mut losses = Losses {
            regions: news.len() as u64,
            ..Losses::default()
        };
        let mut cut_off = Vec::new();
        for (_, _, known) in self.regions.iter().filter(is_news) {
            match &known.user {
                // One that is on its way out already gives it up in its turn.
                User::Device(id) => cut_off.extend(self.machine.devices.lost(id)),
                User::Zone(zone) => losses.ram.push(LostRam {
                    zone: zone.clone(),
                    gpa: known.gpa.0,
                    size: known.size,
                    device: known.device.clone().unwrap_or_default(),
                }),
            }
        }
        for LostRam {
            zone,
            gpa,
            size,
            device,
        } in &losses.ram
        {
            error!(zone, gpa = %format_args!("{gpa:#x}"), size = %format_args!("{size:#x}"), device, "guest memory was taken away");
        }
        // One that has lost RAM is held, or ended, by who hears of it.
        if hold && losses.ram.is_empty() {
            self.machine.release();
        }
        self.after(cut_off);
        losses.settled = self.take_settled();
        losses
    }

    /// Whether the guest is to be held when this RAM is gone.
    pub(super) fn is_held_on_loss(&self, lost: &[LostRam]) -> bool {
        let zones = &self.config().memory.zones;
        let pauses = |lost: &LostRam| {
            let zone = zones.iter().find(|zone| zone.id == lost.zone);
            zone.and_then(|zone| zone.on_loss) == Some(OnLoss::Pause)
        };
        lost.iter().all(pauses)
    }

    /// Holds the guest for good, and gives the host back what is left of its RAM that is gone: devices were out of it before.
    pub(super) fn hold_for_loss(&mut self, lost: Vec<LostRam>) -> Result<(), PauseError> {
        if !self.machine.hold_vcpus(PAUSE_DEADLINE) {
            return Err(PauseError::Vcpu);
        }
        let busy = self.machine.devices.pause(Instant::now() + PAUSE_DEADLINE);
        if !busy.is_empty() {
            warn!(devices = ?busy, "devices are still at work; what they use is kept until they have finished");
        }
        self.paused = true;
        let gone = lost.iter().filter_map(|lost| {
            let (id, ..) = self.regions.at(Gpa(lost.gpa))?;
            Some((id, RegionEvent::GiveUp))
        });
        self.drive(gone.collect::<Vec<_>>());
        self.lost.extend(lost);
        // Those that wait for a look wait for a resume from now on.
        self.machine.mended();
        Ok(())
    }

    /// Does what a look at removals asks for.
    pub(super) fn after(&mut self, settled: Vec<Settled>) {
        for settled in settled {
            match &settled {
                Settled::Gone { id, memory, .. } => self.forget(id, *memory),
                Settled::Severed { id, memory } => self.sever(id, *memory),
                Settled::Unanswered { .. } => {}
            }
            self.settled.push(settled);
        }
    }

    /// What is so by now. The end of a device is when nothing of its memory is left.
    pub(super) fn take_settled(&mut self) -> Vec<Settled> {
        let regions = &self.regions;
        let is_so = |settled: &mut Settled| match settled {
            Settled::Gone { memory, .. } | Settled::Severed { memory, .. } => {
                memory.is_none_or(|memory| regions.is_given_back(memory))
            }
            Settled::Unanswered { .. } => true,
        };
        let settled: Vec<Settled> = self.settled.extract_if(.., is_so).collect();
        for settled in &settled {
            if let Settled::Gone { id, .. } = settled {
                self.forget_word(id);
            }
        }
        settled
    }

    /// Gives everything of the host back that a device has; its place stays taken.
    fn sever(&mut self, id: &str, memory: Option<RegionId>) {
        self.close(id);
        self.drive(memory.map(|memory| (memory, RegionEvent::GiveUp)));
    }

    /// The undo of [`RunningVm::add`], after the function is gone, but for the name.
    fn forget(&mut self, id: &str, memory: Option<RegionId>) {
        self.drive(memory.map(|memory| (memory, RegionEvent::LetGo)));
        self.close(id);
    }

    /// What a device has of the host, memory apart; nothing when it was cut off before.
    fn close(&mut self, id: &str) {
        if let Some(index) = self.host.devices.iter().position(|device| device.id == id) {
            let device = self.host.devices.remove(index);
            self.host.close_device(device, &mut self.ram);
        }
    }

    /// Tells regions what happens to them.
    pub(super) fn drive(&mut self, events: impl IntoIterator<Item = (RegionId, RegionEvent)>) {
        self.regions.drive(events, &mut self.ram, &mut self.host);
    }

    /// The guest that is about to run has heard of no memory that it does not find: neither of what these devices had, nor of
    /// what was on its way out.
    pub(super) fn drive_for_reset(&mut self, ended: &[Settled]) {
        let has_ended = |id: RegionId| {
            ended
                .iter()
                .any(|ended| matches!(ended, Settled::Gone { memory, .. } if *memory == Some(id)))
        };
        let events = self.regions.iter().map(|(id, ..)| {
            let event = if has_ended(id) {
                RegionEvent::Undone
            } else {
                RegionEvent::Reset
            };
            (id, event)
        });
        self.drive(events.collect::<Vec<_>>());
    }

    /// Asks those again who keep memory that is to go. A vCPU that waits for it tries again, too.
    pub(super) fn ask_again(&mut self) {
        if self.regions.tick(&mut self.ram, &mut self.host) {
            self.machine.mended();
        }
    }
}
