//! What the owner tells of itself to those who watch: where memory is, and numbers of everything.

use std::time::Instant;

use daxhund_pin::AddressSpace;

use super::guard::Removals;
use super::owner::{Owner, State};
use super::removal::User;
use super::vm::RunningVm;
use crate::api::{Answer, Reply};
use crate::lifecycle::region::Stage;
use crate::memory::layout::Gpa;
use crate::memory::report::{Holder, RegionKind, RegionReport, RegionsReport};
use crate::metrics::{View, VmPhase};

/// Of a region that is there, and that the guest has been asked for.
const DRAINING: &str = "draining";

impl Owner {
    /// Where every page of guest memory is.
    pub(super) fn regions(&mut self) -> Answer {
        self.up()?;
        Reply::json(&RegionsReport {
            regions: self.region_reports(),
        })
    }

    fn region_reports(&self) -> Vec<RegionReport> {
        let State::Up(vm) = &self.state else {
            return Vec::new();
        };
        let stopping = self.stopping.as_ref();
        vm.region_reports(&self.removals, stopping.map(|stopping| &*stopping.zone))
    }

    /// How the VM stands.
    fn phase(&self) -> VmPhase {
        match &self.state {
            State::NoVm => VmPhase::NoVm,
            State::Created(_) => VmPhase::Created,
            State::Up(vm) if vm.is_paused() => VmPhase::Paused,
            State::Up(_) => VmPhase::Running,
        }
    }

    /// Tells what is so by now to those who don't wait for the owner.
    pub(super) fn publish(&self) {
        let mut view = View {
            at: Instant::now(),
            state: self.phase(),
            regions: self.region_reports(),
            removals: self.removals.outcomes,
            waiting: self.removals.waiting(),
            has_guard: self.removals.fd().is_some(),
            ..View::default()
        };
        if let State::Up(vm) = &self.state {
            vm.describe(&mut view);
        }
        self.metrics.publish(view);
    }
}

impl RunningVm {
    /// All regions by address, those that are on their way out too.
    fn region_reports(&self, removals: &Removals, stopping: Option<&str>) -> Vec<RegionReport> {
        let mut reports: Vec<RegionReport> = Vec::new();
        for (_, state, known) in self.regions.iter() {
            let mut report = known.report.clone();
            let is_present = state.stage() == Stage::Present;
            let is_wanted = match &known.user {
                User::Zone(zone) => stopping == Some(zone),
                User::Device(id) => self.machine.devices.is_asked_for(id),
            };
            report.state = if is_present && is_wanted {
                DRAINING.to_owned()
            } else {
                state.name().to_owned()
            };
            if self.is_lent(&known.user) {
                report.kind = RegionKind::LentPmem;
            }
            report.host_numa_node = report.host_numa_node.or(self.node_of(&known.user));
            if !state.is_given_back() {
                report.held_by = known.held_by().map(str::to_owned);
                report.holders = self.ram.holders_of(Gpa(report.gpa));
                report.poison = self.host.poison.known_within(report.gpa..report.end());
                let device = known.device.as_deref();
                let guard = device.and_then(|device| removals.standing_of(device));
                let guard = guard.map(|wanted| Holder::Guard { wanted });
                report.holders.extend(guard);
            }
            reports.push(report);
        }
        reports.sort_by_key(|report| report.gpa);
        reports
    }

    /// Whether it is lent by a vhost-user backend.
    fn is_lent(&self, user: &User) -> bool {
        let pmem = self.config().pmem.iter();
        let mut lent = pmem.filter(|pmem| pmem.socket.is_some());
        matches!(user, User::Device(id) if lent.any(|pmem| pmem.id.as_ref() == Some(id)))
    }

    /// The node that a zone's memory comes from by its word.
    fn node_of(&self, user: &User) -> Option<u32> {
        let User::Zone(id) = user else { return None };
        let zones = &self.config().memory.zones;
        zones.iter().find(|zone| zone.id == *id)?.host_numa_node
    }

    /// What there is to say of a machine that is up.
    fn describe(&self, view: &mut View) {
        view.memory_actual_bytes = self.memory_actual_bytes();
        view.devices = self.device_counters().collect();
        view.backends = self.host.backends.connected().collect();
        let space = self.host.dma.as_ref().map(|domain| domain.space.as_ref());
        view.dma = space.map(AddressSpace::space_facts);
        let [_, (_, machine_checks), (_, dropped_stores)] = self.host.poison.counters();
        view.machine_checks = machine_checks;
        view.dropped_stores = dropped_stores;
    }
}
