//! What the host wants back while the guest runs, as the owner deals with it.

use std::time::{Duration, Instant};

use daxhund_guard::RequestId;
use tracing::{info, warn};

use super::Ending;
use super::guard::Asked;
use super::owner::{Owner, State};
use super::removal::User;
use crate::config::{DEFAULT_REMOVAL_TIMEOUT, OnRemoval};
use crate::lifecycle::slot::Claimant;
use crate::monitor::Event as Happened;

/// A guest that was asked to power off, because its RAM is wanted.
#[derive(Debug)]
pub(super) struct Stopping {
    pub(super) until: Instant,
    pub(super) by: Claimant,
    pub(super) zone: String,
    pub(super) device: String,
}

impl Owner {
    /// The guard asks.
    pub(super) fn on_guard(&mut self) {
        for asked in self.removals.read() {
            match asked {
                Asked::Wanted {
                    request,
                    device,
                    by,
                } => self.on_wanted(request, &device, &by),
                Asked::Unwanted(device) => self.on_unwanted(&device),
            }
        }
        self.settle();
    }

    /// Every user of a device has its policy; one that refuses keeps the device for all.
    fn on_wanted(&mut self, request: RequestId, device: &str, by: &str) {
        let State::Up(vm) = &self.state else { return };
        warn!(device, by, "the host wants memory back");
        self.monitor
            .send(&Happened::RemovalRequested { device, by });
        let users: Vec<(User, OnRemoval, Duration)> = vm
            .users_of(device)
            .into_iter()
            .map(|user| {
                let (policy, timeout) = vm.removal_policy(&user);
                (user, policy, timeout)
            })
            .collect();
        if let Some((user, ..)) = users.iter().find(|(_, p, _)| *p == OnRemoval::Refuse) {
            let why = format!("{user} is on it, with on_removal=refuse");
            warn!(device, why, "the removal is refused");
            self.monitor.send(&Happened::RemovalRefused { device });
            self.removals.refuse(request, why);
            return;
        }
        let now = Instant::now();
        for (user, policy, timeout) in users {
            match (user, policy) {
                (User::Device(id), _) => self.claim_until(&id, now + timeout),
                (User::Zone(zone), _) => {
                    let until = now + timeout;
                    self.stop_guest(Stopping {
                        until,
                        by: Claimant::Host,
                        zone,
                        device: device.to_owned(),
                    });
                }
            }
        }
    }

    fn on_unwanted(&mut self, device: &str) {
        info!(device, "the host does not want it any more");
        self.monitor.send(&Happened::RemovalCalledOff { device });
        // The button was pressed; what the guest makes of it is its own affair.
        self.stopping
            .take_if(|stopping| stopping.device == device && stopping.by == Claimant::Host);
        let State::Up(vm) = &mut self.state else {
            return;
        };
        for user in vm.users_of(device) {
            if let User::Device(id) = user {
                vm.unclaim(&id);
            }
        }
    }

    /// The host wants a passed-through device back.
    pub(super) fn claim(&mut self, id: &str) {
        self.claim_until(id, Instant::now() + DEFAULT_REMOVAL_TIMEOUT);
    }

    /// Who has lent a device's memory wants it back, for the host.
    pub(super) fn on_wanted_back(&mut self, id: &str) {
        let State::Up(vm) = &self.state else { return };
        let user = User::Device(id.to_owned());
        let (policy, timeout) = vm.removal_policy(&user);
        self.monitor.send(&Happened::DeviceRequested { id });
        if policy == OnRemoval::Refuse {
            let device = &vm.device_of(&user);
            warn!(
                id,
                "the backend wants its memory back; on_removal=refuse keeps it"
            );
            self.monitor.send(&Happened::RemovalRefused { device });
            return;
        }
        warn!(id, "the backend wants its memory back");
        self.claim_until(id, Instant::now() + timeout);
    }

    fn claim_until(&mut self, id: &str, until: Instant) {
        if let State::Up(vm) = &mut self.state {
            vm.claim(id, until);
        }
    }

    /// A passed-through device does not work any more: for the guest it is as if somebody had pulled it.
    pub(super) fn lose(&mut self, id: &str) {
        if let State::Up(vm) = &mut self.state {
            let settled = vm.lost_device(id);
            self.tell(settled);
        }
    }

    /// Asks the guest to power off; the first zone that is wanted sets the time.
    pub(super) fn stop_guest(&mut self, stopping: Stopping) {
        let State::Up(vm) = &self.state else { return };
        match &mut self.stopping {
            None => {
                info!(zone = stopping.zone, "the guest is asked to power off");
                vm.machine.power_button();
                self.stopping = Some(stopping);
            }
            // Who does not think better of it decides.
            Some(before) if stopping.by == Claimant::Operator => before.by = stopping.by,
            Some(_) => {}
        }
    }

    /// A guest that has not powered off by then is stopped.
    pub(super) fn stop_in_time(&mut self) {
        let now = Instant::now();
        if let Some(Stopping { zone, device, .. }) = self.stopping.take_if(|s| s.until <= now) {
            self.end(Ok(Ending::MemoryWithdrawn { zone, device }));
        }
    }
}
