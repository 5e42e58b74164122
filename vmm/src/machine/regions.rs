//! The lives of the machine's regions: what [`crate::lifecycle::region`] decides is done here, and how it went goes back there.

use std::time::Instant;

use tracing::{error, info, warn};

use super::removal::{User, dax_device};
use super::resources::HostResources;
use crate::api::MemoryLeaving;
use crate::lifecycle::region::{
    RegionAction, RegionEvent, RegionId, RegionState, Regions as Lives, Stage,
};
use crate::memory::layout::Gpa;
use crate::memory::ram::{DetachError, Ram};
use crate::memory::region::Region;
use crate::memory::report::{RegionKind, RegionReport};

/// What is known of a region beside its state.
pub(super) struct Known {
    pub(super) user: User,
    pub(super) gpa: Gpa,
    pub(super) size: u64,
    /// The host's device, for device-dax.
    pub(super) device: Option<String>,
    /// What does not change of it.
    pub(super) report: RegionReport,
    /// Who did not let go at the last try.
    held_by: Option<String>,
    /// Set between the last consumer's letting go and its unmapping.
    ours: Option<Region>,
}

/// Memory that somebody does not let go of, or that has gone at last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StuckMemory {
    pub(super) user: User,
    pub(super) gpa: Gpa,
    pub(super) size: u64,
    /// Who keeps it; `None` when it has gone.
    pub(super) held_by: Option<String>,
}

/// All regions of a machine. Those that are attached are in its [`Ram`].
#[derive(Default)]
pub(super) struct Regions {
    lives: Lives<Known>,
    reports: Vec<StuckMemory>,
}

impl Regions {
    /// A region that is about to be attached.
    pub(super) fn begin(&mut self, region: &Region, user: User) -> RegionId {
        let kind = match user {
            User::Zone(_) => RegionKind::Ram,
            User::Device(_) => RegionKind::Pmem,
        };
        self.lives.begin(Known {
            report: RegionReport::of(region, user.id(), kind),
            user,
            gpa: region.gpa(),
            size: region.size(),
            device: dax_device(region),
            held_by: None,
            ours: None,
        })
    }

    /// The undo of [`Regions::begin`], for a region that nobody took.
    pub(super) fn forget(&mut self, id: RegionId) {
        self.lives.end(id);
    }

    /// Tells the lives of regions what has happened, does what is to be done, tells them how it went, and so on. Each region's
    /// first step comes before any one's second: transfers of devices into all of them are stopped before anything else.
    pub(super) fn drive(
        &mut self,
        events: impl IntoIterator<Item = (RegionId, RegionEvent)>,
        ram: &mut Ram,
        host: &mut HostResources,
    ) {
        let mut round: Vec<(RegionId, RegionEvent)> = events.into_iter().collect();
        while !round.is_empty() {
            let mut next = Vec::new();
            for (id, event) in round {
                for action in self.lives.step(id, event) {
                    let outcome = self.act(id, action, ram, host);
                    next.extend(outcome.map(|event| (id, event)));
                }
            }
            round = next;
        }
    }

    fn act(
        &mut self,
        id: RegionId,
        action: RegionAction,
        ram: &mut Ram,
        host: &mut HostResources,
    ) -> Option<RegionEvent> {
        let now = Instant::now();
        let known = self.lives.get_mut(id)?;
        match action {
            RegionAction::CutDma => Some(match ram.cut_dma(known.gpa) {
                Ok(()) => RegionEvent::DmaOff,
                Err(error) => {
                    error!(%error, "devices may still reach memory that is to go");
                    known.held_by = Some(crate::chain(&error));
                    RegionEvent::DmaStays { now }
                }
            }),
            RegionAction::MarkLost => {
                if let Some(region) = ram.regions().find(|region| region.gpa() == known.gpa) {
                    region.mark().lose();
                }
                None
            }
            RegionAction::Bury => {
                host.tombstones.insert(known.gpa, known.size);
                None
            }
            RegionAction::Detach => Some(match ram.detach(known.gpa) {
                Ok(region) => {
                    host.poison.forget(&(region.gpa().0..region.end().0));
                    known.ours = Some(region);
                    RegionEvent::Detached
                }
                Err(error) => {
                    known.held_by = Some(held_by(&error));
                    RegionEvent::Held { now }
                }
            }),
            RegionAction::Close => Some(match known.ours.take().map(Region::release) {
                None | Some(Ok(())) => {
                    info!(user = %known.user, gpa = %known.gpa, "memory is given back to the host");
                    RegionEvent::Closed
                }
                Some(Err(failure)) => {
                    let (region, error) = *failure;
                    known.ours = Some(region);
                    known.held_by = Some(crate::chain(&error));
                    RegionEvent::NotClosed { now }
                }
            }),
            RegionAction::ReportStuck => {
                let held_by = known.held_by.clone().unwrap_or_default();
                warn!(user = %known.user, gpa = %known.gpa, held_by, "memory that is to go is stuck; it is tried again");
                let report = known.report(Some(held_by));
                self.reports.push(report);
                None
            }
            RegionAction::ReportFree => {
                warn!(user = %known.user, gpa = %known.gpa, "memory that was stuck has gone");
                let report = known.report(None);
                self.reports.push(report);
                None
            }
            RegionAction::FreePlace => {
                if let User::Device(_) = known.user {
                    host.device_memory.free(known.gpa.0);
                }
                self.lives.end(id);
                None
            }
        }
    }

    /// Asks those again who have not let go; whether there were any whose time it was.
    pub(super) fn tick(&mut self, ram: &mut Ram, host: &mut HostResources) -> bool {
        let now = Instant::now();
        let before = self.waiting();
        if before.is_empty() {
            return false;
        }
        let ticks = before
            .iter()
            .map(|(id, _)| (*id, RegionEvent::Tick { now }));
        self.drive(ticks.collect::<Vec<_>>(), ram, host);
        self.waiting() != before
    }

    fn waiting(&self) -> Vec<(RegionId, RegionState)> {
        self.iter()
            .filter(|(_, state, _)| state.is_waiting())
            .map(|(id, state, _)| (id, state))
            .collect()
    }

    /// Whether somebody is to be asked again.
    pub(super) fn is_waiting(&self) -> bool {
        self.iter().any(|(_, state, _)| state.is_waiting())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (RegionId, RegionState, &Known)> {
        self.lives.iter()
    }

    /// Whether nothing of it is left on the host's side.
    pub(super) fn is_given_back(&self, id: RegionId) -> bool {
        self.lives
            .state(id)
            .is_none_or(|state| state.is_given_back())
    }

    /// The region there that the host does not have back yet.
    pub(super) fn at(&self, gpa: Gpa) -> Option<(RegionId, RegionState, &Known)> {
        self.iter()
            .find(|(_, state, known)| known.gpa == gpa && !state.is_given_back())
    }

    /// What is only ours to unmap: in no [`Ram`], and still in the way of a removal.
    pub(super) fn ours(&self) -> impl Iterator<Item = &Region> {
        self.iter().filter_map(|(.., known)| known.ours.as_ref())
    }

    /// Who is in the way of this user's memory.
    pub(super) fn holders(&self, user: &User) -> Vec<String> {
        self.iter()
            .filter(|(_, state, known)| known.user == *user && !state.is_given_back())
            .filter_map(|(.., known)| known.held_by.clone())
            .collect()
    }

    /// What got stuck, or free again, since the last call.
    pub(super) fn take_reports(&mut self) -> Vec<StuckMemory> {
        std::mem::take(&mut self.reports)
    }

    /// For `vm.info`: every region that is not simply there.
    pub(super) fn tree(&self) -> Vec<MemoryLeaving<'_>> {
        self.iter()
            .filter(|(_, state, _)| state.stage() != Stage::Present)
            .map(|(_, state, known)| MemoryLeaving {
                id: known.user.id(),
                gpa: format!("{:#x}", known.gpa.0),
                size: known.size,
                state: state.name(),
                held_by: known.held_by.as_deref().filter(|_| !state.is_given_back()),
            })
            .collect()
    }
}

impl Known {
    /// Who did not let go at the last try.
    pub(super) fn held_by(&self) -> Option<&str> {
        self.held_by.as_deref()
    }

    fn report(&self, held_by: Option<String>) -> StuckMemory {
        StuckMemory {
            user: self.user.clone(),
            gpa: self.gpa,
            size: self.size,
            held_by,
        }
    }
}

/// In a few words; a refusal has a reason.
fn held_by(error: &DetachError) -> String {
    match error {
        DetachError::Held { holders, .. } => {
            format!("{holders} worker(s) of devices that are in the middle of a request")
        }
        DetachError::Refused { .. } | DetachError::Unknown { .. } => crate::chain(error),
    }
}
