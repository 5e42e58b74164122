//! Slots and regions together, in a world that does its worst: a guest that ejects late, twice or never; devices and workers that
//! keep memory; a host that claims, thinks better of it, takes without asking and brings back; resets, pauses and additions at
//! any step. What the machine does between the two state machines (`machine::removal`, `machine::devices`) is done here in the
//! same order, on a model of the host. Everything that must hold is looked at after every step.

mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use self::steps::{FOR_EVER, Step, steps};
use super::region::{PATIENCE, RegionAction, RegionEvent, RegionId, Regions, Stage};
use super::slot::{self, Claimant, EJECT_DEADLINE, SlotAction, SlotEvent, SlotState};

/// What the host knows of a region.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a holder or a fact")]
struct Memory {
    place: usize,
    /// `None` is boot RAM.
    device: Option<u32>,
    /// Devices of the host reach it.
    dma: bool,
    /// KVM has it.
    slot: bool,
    /// Workers are in the middle of something with it.
    busy: bool,
    mapped: bool,
    /// The host has taken it.
    taken: bool,
    /// And that was noted, for the next look.
    noted: bool,
    marked: bool,
    keeps_dma: u8,
    keeps_mapping: u8,
    reports: u32,
    waits_since: Option<Instant>,
}

/// A device in its slot.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact")]
struct Plugged {
    serial: u32,
    state: SlotState,
    memory: Option<RegionId>,
    is_card: bool,
    /// Something of it is in flight.
    busy: bool,
    /// A card that is cut off, with something in flight.
    is_being_cut: bool,
    /// The guest was told to let go.
    told: bool,
}

#[derive(Debug)]
struct Ended {
    serial: u32,
    memory: Option<RegionId>,
    is_gone: bool,
}

struct Sim {
    now: Instant,
    regions: Regions<Memory>,
    devices: Vec<Plugged>,
    settled: Vec<Ended>,
    next_serial: u32,
    /// Files of the host, by device: true while open.
    open: BTreeMap<u32, bool>,
    /// Devices the guest believes to have.
    guest_has: BTreeSet<u32>,
    /// And those it had since it was started.
    guest_had: BTreeSet<u32>,
    removed: BTreeSet<u32>,
    tombstones: BTreeSet<usize>,
    /// Places of device memory that are taken.
    places: BTreeSet<usize>,
    paused: bool,
    lost_ram: bool,
    /// By whom and until when; kept here so that a claim that is forgotten is found.
    claims: BTreeMap<(u32, bool), Instant>,
}

const RAM_PLACE: usize = 1000;

impl Sim {
    fn new() -> Self {
        let mut sim = Self {
            now: Instant::now(),
            regions: Regions::default(),
            devices: Vec::new(),
            settled: Vec::new(),
            next_serial: 0,
            open: BTreeMap::new(),
            guest_has: BTreeSet::new(),
            guest_had: BTreeSet::new(),
            removed: BTreeSet::new(),
            tombstones: BTreeSet::new(),
            places: BTreeSet::new(),
            paused: false,
            lost_ram: false,
            claims: BTreeMap::new(),
        };
        sim.regions.begin(Memory::new(RAM_PLACE, None));
        sim
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::AddPmem { fails } => self.add_pmem(fails),
            Step::AddCard => self.plug(None, true),
            Step::Ask(which) => {
                let now = self.now;
                self.tell_slot(which, SlotEvent::Ask { now });
            }
            Step::Claim(which, by_host, ms) => {
                let (by, until) = (claimant(by_host), self.now + Duration::from_millis(ms));
                if let Some(serial) = self.tell_slot(which, SlotEvent::Claim { by, until }) {
                    let claim = self.claims.entry((serial, by_host)).or_insert(until);
                    *claim = until.min(*claim);
                }
            }
            Step::Unclaim(which) => {
                let now = self.now;
                if let Some(serial) = self.tell_slot(which, SlotEvent::Unclaim { now }) {
                    self.claims.remove(&(serial, true));
                }
            }
            Step::Eject(which) if !self.paused => self.eject(which),
            Step::LateEject(which) if !self.removed.is_empty() => {
                let late = self.removed.iter().nth(which % self.removed.len());
                // A slot has its generation: nobody is meant.
                let meant = |plugged: &Plugged| Some(&plugged.serial) == late;
                assert!(!self.devices.iter().any(meant));
            }
            Step::Begin(which) => self.set_busy(which, true),
            Step::Finish(which) => self.set_busy(which, false),
            Step::KeepDma(which, times) => self.with_memory(which, |m| m.keeps_dma = times),
            Step::KeepMapping(which, times) => self.with_memory(which, |m| m.keeps_mapping = times),
            Step::HostTakes(which) => {
                self.with_memory(which, |m| (m.taken, m.noted) = (true, true));
            }
            // What comes back is another device: what was mapped of the one before is lost all the same.
            Step::HostBringsBack(which) => self.with_memory(which, |m| m.taken = false),
            Step::Eject(_) | Step::LateEject(_) => {}
            Step::Look => self.look(),
            Step::CardFails(which) => {
                if let Some(index) = self.index(which)
                    && self.devices[index].is_card
                {
                    let ended = self.lose(index);
                    self.after(ended.into_iter().collect());
                }
            }
            Step::Wait(ms) => self.now += Duration::from_millis(ms),
            Step::Pause => self.paused = true,
            Step::Resume => self.paused &= self.lost_ram,
            Step::Reset => self.reset(),
        }
        self.settle();
    }

    fn index(&self, which: usize) -> Option<usize> {
        (!self.devices.is_empty()).then(|| which % self.devices.len())
    }

    fn tell_slot(&mut self, which: usize, event: SlotEvent) -> Option<u32> {
        let index = self.index(which)?;
        let plugged = &mut self.devices[index];
        let (state, action) = slot::step(plugged.state, event);
        plugged.state = state;
        plugged.told |= action == SlotAction::RequestEject;
        Some(plugged.serial)
    }

    fn with_memory(&mut self, which: usize, change: impl FnOnce(&mut Memory)) {
        let ids: Vec<RegionId> = self.regions.iter().map(|(id, ..)| id).collect();
        if let Some(memory) = self.regions.get_mut(ids[which % ids.len()]) {
            change(memory);
        }
    }

    /// A worker of a device holds its own memory and RAM, while it is on the bus.
    fn set_busy(&mut self, which: usize, busy: bool) {
        let Some(index) = self.index(which) else {
            return;
        };
        let plugged = &mut self.devices[index];
        let works = matches!(
            plugged.state,
            SlotState::Present
                | SlotState::Asked { .. }
                | SlotState::Unanswered
                | SlotState::Claimed(_)
        );
        if busy && !works {
            return;
        }
        plugged.busy = busy;
        if let Some(id) = plugged.memory
            && let Some(state) = self.regions.state(id)
            && let Some(memory) = self.regions.get_mut(id)
        {
            // A region that left the snapshot can't be taken into hands any more.
            memory.busy = busy && state.stage() < Stage::Leaving;
        }
    }

    fn add_pmem(&mut self, fails: bool) {
        let free = (0..100).find(|place| !self.places.contains(place));
        let place = free.expect("fewer steps than places");
        self.places.insert(place);
        // It gives way to what comes there.
        self.tombstones.remove(&place);
        let memory = self
            .regions
            .begin(Memory::new(place, Some(self.next_serial)));
        if fails {
            self.open.insert(self.next_serial, false);
            self.removed.insert(self.next_serial);
            self.next_serial += 1;
            self.drive(vec![(memory, RegionEvent::Undone)]);
        } else {
            self.plug(Some(memory), false);
        }
    }

    fn plug(&mut self, memory: Option<RegionId>, is_card: bool) {
        let serial = self.next_serial;
        self.next_serial += 1;
        self.open.insert(serial, true);
        self.guest_has.insert(serial);
        self.guest_had.insert(serial);
        self.devices.push(Plugged {
            serial,
            state: SlotState::Present,
            memory,
            is_card,
            busy: false,
            is_being_cut: false,
            told: false,
        });
    }

    fn eject(&mut self, which: usize) {
        let Some(index) = self.index(which) else {
            return;
        };
        let plugged = &mut self.devices[index];
        self.guest_has.remove(&plugged.serial);
        let (state, action) = slot::step(plugged.state, SlotEvent::Ejected);
        plugged.state = state;
        plugged.is_being_cut &= action != SlotAction::Withdraw;
    }

    /// `Devices::lost`
    fn lose(&mut self, index: usize) -> Option<Ended> {
        let plugged = &mut self.devices[index];
        let (state, action) = slot::step(plugged.state, SlotEvent::Lost);
        plugged.state = state;
        match action {
            SlotAction::CutOff { tell } => self.cut_off(index, tell),
            _ => None,
        }
    }

    /// `Devices::cut_off`
    fn cut_off(&mut self, index: usize, tell: bool) -> Option<Ended> {
        let plugged = &mut self.devices[index];
        assert!(tell || plugged.told, "nobody tells the guest");
        plugged.told = true;
        plugged.is_being_cut = true;
        self.finish_cut(index)
    }

    /// `Devices::finish_cut`: hardware that is in the middle of something is waited for, workers show in their memory.
    fn finish_cut(&mut self, index: usize) -> Option<Ended> {
        let plugged = &mut self.devices[index];
        if !plugged.is_being_cut || (plugged.is_card && plugged.busy) {
            return None;
        }
        plugged.is_being_cut = false;
        Some(Ended {
            serial: plugged.serial,
            memory: plugged.memory,
            is_gone: false,
        })
    }

    /// `RunningVm::settle`
    fn settle(&mut self) {
        let (mut index, now) = (0, self.now);
        let mut ended = Vec::new();
        while index < self.devices.len() {
            if self.devices[index].is_being_cut {
                ended.extend(self.finish_cut(index));
                index += 1;
                continue;
            }
            let plugged = &mut self.devices[index];
            let event = if plugged.state == SlotState::Draining && !plugged.busy {
                SlotEvent::Drained
            } else {
                SlotEvent::Tick { now }
            };
            let (state, action) = slot::step(plugged.state, event);
            plugged.state = state;
            match action {
                SlotAction::Release => {
                    let plugged = self.devices.remove(index);
                    ended.push(Ended {
                        serial: plugged.serial,
                        memory: plugged.memory,
                        is_gone: true,
                    });
                    continue;
                }
                SlotAction::CutOff { tell } => ended.extend(self.cut_off(index, tell)),
                _ => {}
            }
            index += 1;
        }
        self.after(ended);
        let now = self.now;
        let waiting = self
            .regions
            .iter()
            .filter(|(_, state, _)| state.is_waiting());
        let ticks = waiting.map(|(id, ..)| (id, RegionEvent::Tick { now }));
        self.drive(ticks.collect());
        self.tell();
    }

    /// `RunningVm::after`
    fn after(&mut self, ended: Vec<Ended>) {
        for ended in ended {
            let event = if ended.is_gone {
                RegionEvent::LetGo
            } else {
                RegionEvent::GiveUp
            };
            self.drive(
                ended
                    .memory
                    .map(|memory| (memory, event))
                    .into_iter()
                    .collect(),
            );
            self.open.insert(ended.serial, false);
            self.settled.push(ended);
        }
    }

    /// `RunningVm::take_settled`
    fn tell(&mut self) {
        let regions = &self.regions;
        let is_so = |ended: &mut Ended| {
            let state = ended.memory.and_then(|memory| regions.state(memory));
            state.is_none_or(|state| state.is_given_back())
        };
        for ended in self.settled.extract_if(.., is_so) {
            if ended.is_gone {
                assert!(
                    self.removed.insert(ended.serial),
                    "removed twice: {ended:?}"
                );
            }
        }
    }

    /// `RunningVm::look_for_losses`, and `on_loss=pause`.
    fn look(&mut self) {
        let gone: Vec<(RegionId, Stage)> = self
            .regions
            .iter()
            .filter(|(_, state, memory)| (memory.taken || memory.noted) && !state.is_given_back())
            .map(|(id, state, _)| (id, state.stage()))
            .collect();
        self.drive(
            gone.iter()
                .map(|(id, _)| (*id, RegionEvent::Lost))
                .collect(),
        );
        for (id, before) in gone {
            if let Some(memory) = self.regions.get_mut(id) {
                memory.noted = false;
            }
            if before != Stage::Present {
                continue;
            }
            let Some(memory) = self.regions.get_mut(id) else {
                continue;
            };
            assert!(
                memory.marked,
                "what is read of it may be scratch: {memory:?}"
            );
            match memory.device {
                None => {
                    (self.paused, self.lost_ram) = (true, true);
                    self.drive(vec![(id, RegionEvent::GiveUp)]);
                }
                Some(serial) => {
                    let index = self.devices.iter().position(|p| p.serial == serial);
                    let ended = index.and_then(|index| self.lose(index));
                    self.after(ended.into_iter().collect());
                }
            }
        }
    }

    /// `RunningVm::reset`. A guest whose RAM is gone is built from nothing instead.
    fn reset(&mut self) {
        if self.lost_ram {
            return;
        }
        self.paused = false;
        let mut ended = Vec::new();
        for plugged in &mut self.devices {
            let (state, action) = slot::step(plugged.state, SlotEvent::Reset);
            plugged.state = state;
            // Workers are waited for.
            plugged.busy = false;
            if action == SlotAction::Release {
                ended.push(Ended {
                    serial: plugged.serial,
                    memory: plugged.memory,
                    is_gone: true,
                });
            }
        }
        self.devices
            .retain(|plugged| plugged.state != SlotState::Gone);
        self.guest_has = self.devices.iter().map(|plugged| plugged.serial).collect();
        self.guest_had.clone_from(&self.guest_has);
        for plugged in &mut self.devices {
            plugged.told = false;
        }
        let all: Vec<RegionId> = self.regions.iter().map(|(id, ..)| id).collect();
        for id in &all {
            let present = self
                .regions
                .state(*id)
                .is_some_and(|s| s.stage() == Stage::Present);
            if let Some(memory) = self.regions.get_mut(*id) {
                // A new KVM gets what is present, and no more.
                memory.slot = present;
                memory.busy = false;
            }
        }
        let event = |id: RegionId| {
            if ended.iter().any(|ended| ended.memory == Some(id)) {
                RegionEvent::Undone
            } else {
                RegionEvent::Reset
            }
        };
        self.drive(all.into_iter().map(|id| (id, event(id))).collect());
        self.after(ended);
        self.tombstones.clear();
    }

    /// `machine::regions::Regions::drive`
    fn drive(&mut self, mut round: Vec<(RegionId, RegionEvent)>) {
        while !round.is_empty() {
            let mut next = Vec::new();
            for (id, event) in round {
                for action in self.regions.step(id, event) {
                    next.extend(self.act(id, action).map(|event| (id, event)));
                }
            }
            round = next;
        }
    }

    fn act(&mut self, id: RegionId, action: RegionAction) -> Option<RegionEvent> {
        let now = self.now;
        if action == RegionAction::FreePlace {
            let memory = self.regions.end(id).expect("it is freed once");
            assert!(!memory.is_anybodys(), "freed and in use: {memory:?}");
            if let Some(device) = memory.device {
                assert!(
                    !self.guest_has.contains(&device),
                    "the guest may look there: {memory:?}"
                );
                assert!(self.places.remove(&memory.place), "freed twice: {memory:?}");
            }
            return None;
        }
        let had = &self.guest_had;
        let memory = self
            .regions
            .get_mut(id)
            .expect("nothing is done after the end");
        let was_known = memory.device.is_none_or(|device| had.contains(&device));
        let fails = |tries: &mut u8| {
            let fails = *tries > 0;
            *tries -= u8::from(fails && *tries != FOR_EVER);
            fails
        };
        match action {
            RegionAction::CutDma if fails(&mut memory.keeps_dma) => {
                Some(RegionEvent::DmaStays { now })
            }
            RegionAction::CutDma => {
                memory.dma = false;
                Some(RegionEvent::DmaOff)
            }
            RegionAction::MarkLost => {
                memory.marked = true;
                None
            }
            RegionAction::Bury => {
                assert!(was_known, "memory never was there: {memory:?}");
                self.tombstones.insert(memory.place);
                None
            }
            RegionAction::Detach => {
                assert!(!memory.dma, "DMA is on: {memory:?}");
                assert!(
                    !was_known || self.tombstones.contains(&memory.place),
                    "nothing is there: {memory:?}"
                );
                memory.slot = false;
                Some(if memory.busy {
                    RegionEvent::Held { now }
                } else {
                    RegionEvent::Detached
                })
            }
            RegionAction::Close if fails(&mut memory.keeps_mapping) => {
                Some(RegionEvent::NotClosed { now })
            }
            RegionAction::Close => {
                assert!(
                    memory.mapped && !memory.dma && !memory.slot && !memory.busy,
                    "{memory:?}"
                );
                memory.mapped = false;
                Some(RegionEvent::Closed)
            }
            RegionAction::ReportStuck => {
                memory.reports += 1;
                None
            }
            RegionAction::ReportFree => {
                assert_eq!(memory.reports, 1);
                None
            }
            RegionAction::FreePlace => None,
        }
    }

    /// What holds after every step.
    fn check(&mut self) {
        let now = self.now;
        let mut taken = BTreeSet::new();
        for (id, state, memory) in self.regions.iter() {
            assert!(
                taken.insert(memory.place),
                "two regions at one place: {memory:?}"
            );
            assert!(memory.reports <= 1);
            match state.stage() {
                Stage::Present => assert!(memory.dma && memory.slot && memory.mapped, "{memory:?}"),
                Stage::Cutting => assert!(
                    memory.dma && memory.slot | !self.knows(memory),
                    "{memory:?}"
                ),
                Stage::Cut => {
                    // Somebody will give it up.
                    let is_due = |p: &Plugged| {
                        p.memory == Some(id) && (p.state == SlotState::Draining || p.is_being_cut)
                    };
                    assert!(
                        self.devices.iter().any(is_due),
                        "nobody gives it up: {memory:?}"
                    );
                }
                Stage::Leaving | Stage::Closing => {
                    assert!(!memory.dma && !memory.slot, "{memory:?}");
                }
                Stage::Buried | Stage::Gone => assert!(!memory.is_anybodys(), "{memory:?}"),
            }
            // On its way: somebody keeps it, and is asked again; for long: he was named.
            let underway = matches!(
                state.stage(),
                Stage::Cutting | Stage::Leaving | Stage::Closing
            );
            assert_eq!(
                underway,
                state.is_waiting(),
                "nobody is asked: {state:?} {memory:?}"
            );
            if memory
                .waits_since
                .is_some_and(|since| underway && now - since > 2 * PATIENCE)
            {
                assert!(state.is_stuck(), "nobody is named: {state:?} {memory:?}");
            }
            if self.knows(memory) && !memory.slot {
                assert!(
                    self.tombstones.contains(&memory.place),
                    "made-up bytes: {memory:?}"
                );
            }
        }
        for (_, known) in self
            .open
            .iter()
            .filter(|(serial, _)| self.removed.contains(serial))
        {
            assert!(!known, "removed, and open");
        }
        // A device that the guest has is in its slot.
        for serial in &self.guest_has {
            assert!(
                self.devices.iter().any(|p| p.serial == *serial),
                "no slot for {serial}"
            );
        }
        for ((serial, _), until) in &self.claims {
            let keeps = |p: &Plugged| {
                p.serial == *serial
                    && matches!(
                        p.state,
                        SlotState::Present
                            | SlotState::Asked { .. }
                            | SlotState::Unanswered
                            | SlotState::Claimed(_)
                    )
            };
            assert!(
                now < *until || !self.devices.iter().any(keeps),
                "{serial} is claimed"
            );
        }
    }

    /// The guest may look there.
    fn knows(&self, memory: &Memory) -> bool {
        memory
            .device
            .is_none_or(|device| self.guest_has.contains(&device))
    }

    /// Since when regions wait, as somebody outside sees it.
    fn note_waiting(&mut self) {
        let now = self.now;
        let all: Vec<(RegionId, bool)> = self
            .regions
            .iter()
            .map(|(id, state, _)| (id, state.is_waiting()))
            .collect();
        for (id, waits) in all {
            if let Some(memory) = self.regions.get_mut(id) {
                memory.waits_since = waits.then(|| memory.waits_since.unwrap_or(now));
            }
        }
    }

    /// Nobody is hostile any more: what was to go goes.
    fn comes_to_rest(&mut self) {
        let ids: Vec<RegionId> = self.regions.iter().map(|(id, ..)| id).collect();
        for id in ids {
            if let Some(memory) = self.regions.get_mut(id) {
                (memory.keeps_dma, memory.keeps_mapping, memory.busy) = (0, 0, false);
            }
        }
        for plugged in &mut self.devices {
            plugged.busy = false;
        }
        self.look();
        for _ in 0..20 {
            self.now += EJECT_DEADLINE;
            self.settle();
            self.check();
        }
        for (_, state, memory) in self.regions.iter() {
            let rests = matches!(state.stage(), Stage::Present | Stage::Buried);
            let is_kept = state.stage() != Stage::Buried || self.knows(memory);
            assert!(is_kept, "its place is never free: {state:?} {memory:?}");
            assert!(rests, "it never comes to rest: {state:?} {memory:?}");
        }
        assert!(
            self.settled.is_empty(),
            "nobody is told: {:?}",
            self.settled
        );
        for (serial, _) in self.claims.keys() {
            assert!(
                !self.open[serial],
                "{serial} was claimed and is not given back"
            );
        }
    }
}

impl Memory {
    fn new(place: usize, device: Option<u32>) -> Self {
        Self {
            place,
            device,
            dma: true,
            slot: true,
            busy: false,
            mapped: true,
            taken: false,
            noted: false,
            marked: false,
            keeps_dma: 0,
            keeps_mapping: 0,
            reports: 0,
            waits_since: None,
        }
    }

    fn is_anybodys(&self) -> bool {
        self.dma || self.slot || self.busy || self.mapped
    }
}

fn claimant(by_host: bool) -> Claimant {
    if by_host {
        Claimant::Host
    } else {
        Claimant::Operator
    }
}

proptest! {
    /// `PROPTEST_CASES=20000` looks longer.
    #[test]
    fn nothing_hostile_breaks_a_removal(steps in prop::collection::vec(steps(), 1..50)) {
        let mut sim = Sim::new();
        for step in &steps {
            sim.step(step);
            sim.note_waiting();
            sim.check();
        }
        sim.comes_to_rest();
    }
}
