//! Notices that memory goes away without anybody having asked.
//!
//! Two things tell: a watch on the devices under guest memory (their drivers, a probe, the kernel's events) and this
//! process's own SIGBUS. Neither is the truth by itself: on each of them [`super::removal`] looks at all memory.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, RawFd};

use daxhund_dax::{Host, Pace, Watch, WatchError, WatchId};
use thiserror::Error;
use tracing::{error, info, warn};

use crate::memory::incidents::{Cause, Incident};
use crate::memory::region::{Mapping, Region};
use crate::memory::sigbus::{GuardError, Incidents};

/// Removals can't be noticed.
#[derive(Debug, Error)]
pub enum LookoutError {
    /// The watch.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The handler of SIGBUS.
    #[error(transparent)]
    Sigbus(#[from] GuardError),
}

/// A mapping: guest address, and host address so that a successor is another one.
type Place = (u64, u64);

/// What is heard and seen.
pub(super) struct Lookout {
    watch: Watch,
    watched: BTreeMap<Place, WatchId>,
    incidents: Incidents,
}

impl Lookout {
    /// Watches nothing yet.
    pub(super) fn new(host: &Host) -> Result<Self, LookoutError> {
        let watch = Watch::new(host, Pace::default())?;
        for unheard in watch.unheard() {
            info!(error = %crate::chain(unheard), "a sign of removals is missing");
        }
        Ok(Self {
            watch,
            watched: BTreeMap::new(),
            incidents: Incidents::open()?,
        })
    }

    /// Readable when a device may be gone.
    pub(super) fn watch_fd(&self) -> RawFd {
        self.watch.as_fd().as_raw_fd()
    }

    /// Readable when this process has touched memory that is not there.
    pub(super) fn incidents_fd(&self) -> RawFd {
        self.incidents.as_raw_fd()
    }

    /// Watches these regions and no others. To be called after memory came or went, before the watch is read again: it goes
    /// by addresses.
    pub(super) fn follow<'a>(&mut self, regions: impl Iterator<Item = &'a Region>) {
        let mut present = BTreeSet::new();
        for region in regions {
            let Mapping::Dax(mapping) = region.mapping() else {
                continue;
            };
            let place = (region.gpa().0, region.host_address());
            present.insert(place);
            if self.watched.contains_key(&place) {
                continue;
            }
            match self.watch.add(mapping) {
                Ok(id) => {
                    self.watched.insert(place, id);
                }
                Err(error) => {
                    error!(zone = region.zone(), %error, "its removal is noticed by faults only");
                }
            }
        }
        let gone = self
            .watched
            .extract_if(.., |place, _| !present.contains(place));
        for (_, id) in gone {
            if let Err(error) = self.watch.forget(id) {
                warn!(%error, "a device is watched for nothing");
            }
        }
    }

    /// The devices that are gone, or on their way.
    pub(super) fn read_watch(&mut self) -> BTreeSet<String> {
        match self.watch.read() {
            Ok(lost) => {
                for lost in &lost {
                    warn!(device = %lost.device, by = ?lost.by, "a device goes away and nobody asked");
                }
                lost.into_iter().map(|l| l.device.to_string()).collect()
            }
            Err(error) => {
                error!(%error, "removals are noticed by faults only");
                BTreeSet::new()
            }
        }
    }

    /// What this process has touched: whether memory is gone, and what is poisoned.
    pub(super) fn read_incidents(&self) -> (bool, Vec<Incident>) {
        let taken = self.incidents.take();
        let gone = taken.missed > 0 || taken.incidents.iter().any(|i| i.cause == Cause::Gone);
        let poison = taken.incidents.into_iter();
        let poison = poison.filter(|incident| incident.cause != Cause::Gone);
        (gone, poison.collect())
    }
}
