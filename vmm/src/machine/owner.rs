//! The owner's event loop: every cause of work is a [`Token`], and every one is matched in one place.
//!
//! ```text
//!            create                boot                    pause
//!   NoVm ───────────▶ Created ───────────▶ Running ◀──────────────▶ Paused
//!     ▲                │   ▲                 │        resume           │
//!     │     delete     │   └─────shutdown────┴─────────────────────────┘
//!     └────────────────┴── (from any state)
//! ```
//! A guest that powers itself off, and a fault, end the process; a guest that resets is built anew on the same memory.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventManager, EventOps, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use tracing::{debug, info, warn};

use super::calls::Calls;
use super::devices::Settled;
use super::drains::Drain;
use super::events::Event;
use super::guard::Removals;
use super::lookout::Lookout;
use super::passthrough::Notice;
use super::poison::News;
use super::processors::Resized;
use super::regions::StuckMemory;
use super::removal::LostRam;
use super::requests::Stopping;
use super::serial_feed::{SerialFeed, add, remove};
use super::taps::HandedTaps;
use super::timer::Timer;
use super::vm::RunningVm;
use super::{Ending, RunError};
use crate::api::Call;
use crate::config::{HostConfig, VmConfig};
use crate::devices::power::PowerRequest;
use crate::kvm::VcpuFault;
use crate::metrics::Metrics;
use crate::monitor::{Event as Happened, Monitor};
use crate::virtio::vhost_user::Change;

/// The owner can't wait for events.
#[derive(Debug, Error)]
pub enum OwnerError {
    /// A signal handler.
    #[error("signal {signal} can't be handled")]
    Signal {
        /// Its number.
        signal: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A descriptor to wait on.
    #[error("no {what} could be made; `ulimit -n` raises how many descriptors a process may have")]
    Descriptor {
        /// What it is for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The event manager.
    #[error("the event manager failed")]
    EventManager(#[source] event_manager::Error),
}

const ENDING_SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Signals that end the guest in order, as descriptors.
#[derive(Debug)]
pub(super) struct Signals {
    pipes: Vec<(i32, UnixStream)>,
    /// Readable from the first of them on: nobody reads it.
    told: Arc<UnixStream>,
    handlers: Vec<signal_hook::SigId>,
}

impl Signals {
    pub(super) fn install() -> Result<Self, OwnerError> {
        let pipe = || {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            write.set_nonblocking(true)?;
            Ok((read, write))
        };
        let (told, teller) = pipe().map_err(|source| OwnerError::Descriptor {
            what: "pair of sockets for signals",
            source,
        })?;
        let mut signals = Self {
            pipes: Vec::new(),
            told: Arc::new(told),
            handlers: Vec::new(),
        };
        for signal in ENDING_SIGNALS {
            let failed = |source| OwnerError::Signal { signal, source };
            let (read, write) = pipe().map_err(failed)?;
            let teller = teller.try_clone().map_err(failed)?;
            for end in [write, teller] {
                let handler =
                    signal_hook::low_level::pipe::register(signal, end).map_err(failed)?;
                signals.handlers.push(handler);
            }
            signals.pipes.push((signal, read));
        }
        Ok(signals)
    }

    /// For waits outside the loop: readable once this process was told to end.
    pub(super) fn told(&self) -> Arc<UnixStream> {
        Arc::clone(&self.told)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}

/// Every cause of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// A vCPU thread posted something.
    Machine,
    /// The console has input.
    ConsoleInput,
    /// The guest has emptied the serial port's input FIFO.
    SerialSpace,
    /// A client waits at the console's socket.
    ConsoleClient,
    /// The API has a call.
    Calls,
    /// A removal has to be looked at again.
    Timer,
    /// The host tells something of a passed-through device.
    Notices,
    /// The removal guard asks something.
    Guard,
    /// A device goes away that nobody asked for.
    Watch,
    /// This process has touched memory that is not there.
    Incidents,
    /// A removal guard is to be looked for again.
    NoGuard,
    /// A vhost-user backend has gone or come.
    Backends,
    /// A signal; the index into [`Signals`].
    Signal(u32),
}

impl Token {
    pub(super) fn data(self) -> u32 {
        match self {
            Self::Machine => 0,
            Self::ConsoleInput => 1,
            Self::SerialSpace => 2,
            Self::ConsoleClient => 3,
            Self::Calls => 4,
            Self::Timer => 5,
            Self::Notices => 6,
            Self::Guard => 7,
            Self::Watch => 8,
            Self::Incidents => 9,
            Self::NoGuard => 10,
            Self::Backends => 11,
            Self::Signal(index) => 12 + index,
        }
    }

    fn from_data(data: u32) -> Self {
        match data {
            0 => Self::Machine,
            1 => Self::ConsoleInput,
            2 => Self::SerialSpace,
            3 => Self::ConsoleClient,
            4 => Self::Calls,
            5 => Self::Timer,
            6 => Self::Notices,
            7 => Self::Guard,
            8 => Self::Watch,
            9 => Self::Incidents,
            10 => Self::NoGuard,
            11 => Self::Backends,
            signal => Self::Signal(signal - 12),
        }
    }
}

/// What the owner has.
pub(super) enum State {
    /// Nothing.
    NoVm,
    /// A definition; nothing of the host is open.
    Created(Box<VmConfig>),
    /// A machine.
    Up(Box<RunningVm>),
}

/// While a removal waits for guest or host, it is looked at this often.
const SETTLE_INTERVAL: Duration = Duration::from_millis(20);

/// The loop's state.
pub(super) struct Owner {
    calls: Calls,
    pub(super) signals: Signals,
    timer: Timer,
    /// When a guard is looked for again.
    guard_timer: Timer,
    pub(super) monitor: Monitor,
    /// What the host has pools of.
    pub(super) pools: Arc<HostConfig>,
    pub(super) metrics: Metrics,
    /// Whether anybody can ask for them.
    has_api: bool,
    pub(super) state: State,
    /// What clients have handed over of networks that the VM has.
    pub(super) taps: HandedTaps,
    feed: SerialFeed,
    /// The descriptor of the machine's events that is waited on.
    machine_fd: Option<RawFd>,
    /// That of what the host tells of its devices.
    notices_fd: Option<RawFd>,
    /// That of news of vhost-user backends.
    backends_fd: Option<RawFd>,
    pub(super) removals: Removals,
    guard_fd: Option<RawFd>,
    lookout: Lookout,
    /// The guest is to stop, because its RAM is wanted.
    pub(super) stopping: Option<Stopping>,
    /// Who waits for what is to be taken from the guest.
    pub(super) drains: Vec<Drain>,
    /// What the last machine could not give back.
    pub(super) left_behind: Vec<String>,
    ended: Option<Result<Ending, RunError>>,
}

impl Owner {
    pub(super) fn new(
        calls: Calls,
        signals: Signals,
        (monitor, metrics, has_api): (Monitor, Metrics, bool),
        pools: Arc<HostConfig>,
        (removals, lookout): (Removals, Lookout),
        running: Option<RunningVm>,
    ) -> Result<Self, OwnerError> {
        let timer = || {
            Timer::new().map_err(|source| OwnerError::Descriptor {
                what: "timer",
                source,
            })
        };
        Ok(Self {
            calls,
            signals,
            timer: timer()?,
            guard_timer: timer()?,
            monitor,
            pools,
            metrics,
            has_api,
            state: running.map_or(State::NoVm, |vm| State::Up(Box::new(vm))),
            taps: HandedTaps::default(),
            feed: SerialFeed::default(),
            machine_fd: None,
            notices_fd: None,
            backends_fd: None,
            removals,
            guard_fd: None,
            lookout,
            stopping: None,
            drains: Vec::new(),
            left_behind: Vec::new(),
            ended: None,
        })
    }

    /// Serves events until one of them ends the process.
    pub(super) fn run(self) -> Result<Ending, RunError> {
        let mut manager = EventManager::new().map_err(OwnerError::EventManager)?;
        let owner = manager.add_subscriber(self);
        loop {
            manager.run().map_err(OwnerError::EventManager)?;
            let owner = manager
                .subscriber_mut(owner)
                .map_err(OwnerError::EventManager)?;
            if let Some(ended) = owner.ended.take() {
                return ended;
            }
        }
    }

    /// The first cause to end wins.
    pub(super) fn end(&mut self, ended: Result<Ending, RunError>) {
        self.ended.get_or_insert(ended);
    }

    /// Holds removals of what is used now, and waits on who holds them.
    fn follow(&mut self, ops: &mut EventOps<'_>) {
        let used = match &self.state {
            State::Up(vm) => {
                self.lookout.follow(vm.ram.regions());
                vm.used_dax()
            }
            State::NoVm | State::Created(_) => {
                self.lookout.follow(std::iter::empty());
                BTreeMap::new()
            }
        };
        // A guard that was lost since the last time goes before another one comes.
        self.wait_on_guard(ops);
        self.removals.follow(&used);
        for device in &self.removals.take_granted() {
            self.monitor.send(&Happened::RemovalGranted { device });
        }
        self.wait_on_guard(ops);
        self.guard_timer.set_once(self.removals.looks_again_at());
    }

    /// Nobody reads the metrics of a VMM without an API.
    fn publish_if_read(&self) {
        if self.has_api {
            self.publish();
        }
    }

    /// Waits on the guard that there is, and on no other.
    fn wait_on_guard(&mut self, ops: &mut EventOps<'_>) {
        let fd = self.removals.fd();
        if fd != self.guard_fd {
            if let Some(old) = self.guard_fd.take() {
                remove(ops, old, Token::Guard);
            }
            self.guard_fd = fd.filter(|fd| add(ops, *fd, Token::Guard));
        }
        self.removals.forget_lost();
    }

    /// Begins to wait on a machine's descriptors.
    pub(super) fn watch(&mut self, ops: &mut EventOps<'_>) {
        let State::Up(vm) = &mut self.state else {
            return;
        };
        let fd = vm.machine.events.as_raw_fd();
        if add(ops, fd, Token::Machine) {
            self.machine_fd = Some(fd);
        }
        let fd = vm.host.notices.as_raw_fd();
        if add(ops, fd, Token::Notices) {
            self.notices_fd = Some(fd);
        }
        let fd = vm.host.backends.as_raw_fd();
        if add(ops, fd, Token::Backends) {
            self.backends_fd = Some(fd);
        }
        let serial = vm.machine.serial.as_ref();
        self.feed.start(ops, serial, &mut vm.host.serial_input);
    }

    /// The undo of [`Owner::watch`]; before the machine goes.
    fn unwatch(&mut self, ops: &mut EventOps<'_>) {
        if let Some(fd) = self.machine_fd.take() {
            remove(ops, fd, Token::Machine);
        }
        if let Some(fd) = self.notices_fd.take() {
            remove(ops, fd, Token::Notices);
        }
        if let Some(fd) = self.backends_fd.take() {
            remove(ops, fd, Token::Backends);
        }
        self.feed.stop(ops);
        self.timer.set(None);
    }

    fn on_machine(&mut self, ops: &mut EventOps<'_>) {
        let State::Up(vm) = &mut self.state else {
            return;
        };
        let events: Vec<Event> = vm.machine.events.drain().collect();
        let mut reset = false;
        for event in events {
            debug!(?event, "machine");
            match event {
                Event::Power(PowerRequest::PowerOff) => self.end(Ok(Ending::PowerOff)),
                Event::Power(PowerRequest::Reset) => reset = true,
                Event::TripleFault => self.end(Ok(Ending::TripleFault)),
                Event::VcpuFailed(fault) => self.end(Ok(Ending::VcpuFailed(fault))),
                Event::VcpuPanicked(id) => self.end(Ok(Ending::VcpuPanicked(id))),
                Event::MemoryGone { fault, mended } => self.on_memory_gone(fault, mended),
                Event::PoisonTouched { mended } => self.on_poison_touched(mended),
                Event::Ejected(ejected) => {
                    if let State::Up(vm) = &mut self.state {
                        vm.machine.devices.ejected(ejected);
                    }
                }
                // A look at the registers tells all; it comes below.
                Event::ProcessorEjected(_) => {}
            }
        }
        // A reset that comes with an end of the same instant is no reset.
        if self.ended.is_some() {
            return;
        }
        // Nor is one of a guest that is held because its RAM is gone.
        let is_lost = matches!(&self.state, State::Up(vm) if !vm.lost.is_empty());
        if reset && !is_lost {
            if let Err(error) = self.reset(ops) {
                self.end(Err(error));
            }
            return;
        }
        self.settle();
    }

    /// A vCPU found no memory: what is gone is looked for. When nothing is, its fault has another reason.
    fn on_memory_gone(&mut self, fault: VcpuFault, mended: u64) {
        self.look_at_incidents();
        let State::Up(vm) = &mut self.state else {
            return;
        };
        // One whose memory somebody keeps waits until he is asked again.
        let looked_after = vm.machine.was_mended_since(mended) || vm.regions.is_waiting();
        if !self.look_for_losses(&BTreeSet::new()) && !looked_after {
            self.end(Ok(Ending::VcpuFailed(fault)));
        }
    }

    /// Whether something goes away. Most of the time nothing does, and a look is all there is to it.
    fn on_watch(&mut self) -> bool {
        let going = self.lookout.read_watch();
        if going.is_empty() {
            return false;
        }
        self.look_for_losses(&going);
        self.settle();
        true
    }

    /// A vCPU's guest touched poison, and the vCPU waits. It tries again whatever was found.
    fn on_poison_touched(&mut self, mended: u64) {
        self.look_at_incidents();
        if let State::Up(vm) = &self.state
            && !vm.machine.was_mended_since(mended)
        {
            vm.machine.mended();
        }
    }

    fn on_incidents(&mut self) {
        self.look_at_incidents();
        self.settle();
    }

    /// Does about what the handler of SIGBUS has noted what is to be done.
    fn look_at_incidents(&mut self) {
        let (gone, poison) = self.lookout.read_incidents();
        let State::Up(vm) = &mut self.state else {
            return;
        };
        let mut too_much = false;
        if gone || !poison.is_empty() {
            for News { id, range, touched } in vm.on_poison(&poison) {
                self.monitor.send(&Happened::MemoryPoisoned {
                    id: &id,
                    gpa: &format!("{:#x}", range.start),
                    size: &(range.end - range.start).to_string(),
                    touched: if touched { "true" } else { "false" },
                });
            }
            // More than a mark tells apart is a loss.
            too_much = vm.ram.regions().any(|region| region.mark().is_lost());
        }
        if gone || too_much {
            self.look_for_losses(&BTreeSet::new());
        }
    }

    /// Looks for memory that the host has taken away, all that is on these devices among it, and does what is to be done
    /// about it; whether there was any.
    fn look_for_losses(&mut self, going: &BTreeSet<String>) -> bool {
        let State::Up(vm) = &mut self.state else {
            return false;
        };
        let losses = vm.look_for_losses(going);
        let found = !losses.is_empty();
        self.removals.outcomes.lost += losses.regions;
        self.tell(losses.settled);
        for lost in &losses.ram {
            self.monitor.send(&Happened::MemoryLost {
                id: &lost.zone,
                device: &lost.device,
                gpa: &format!("{:#x}", lost.gpa),
                size: &lost.size.to_string(),
            });
        }
        if !losses.ram.is_empty() {
            self.on_lost_ram(losses.ram);
        } else if found && let State::Up(vm) = &self.state {
            vm.machine.mended();
        }
        found
    }

    /// The guest can't go on: it is ended, or held for good.
    fn on_lost_ram(&mut self, lost: Vec<LostRam>) {
        let State::Up(vm) = &mut self.state else {
            return;
        };
        let first = lost.first().cloned();
        if vm.is_held_on_loss(&lost) {
            match vm.hold_for_loss(lost) {
                Ok(()) => {
                    warn!("the guest is held for good (on_loss=pause); vm.reboot starts it anew");
                    self.monitor.send(&Happened::Paused);
                    return;
                }
                Err(error) => warn!(%error, "the guest is not held but ended"),
            }
        }
        if let Some(first) = first {
            self.end(Ok(Ending::MemoryLost(first)));
        }
    }

    /// Looks at removals, and arms the timer while there are any.
    pub(super) fn settle(&mut self) {
        let State::Up(vm) = &mut self.state else {
            self.timer.set(None);
            return;
        };
        let settled = vm.settle();
        let resized = vm.settle_vcpus();
        let waiting = vm.is_settling() || self.stopping.is_some() || !self.drains.is_empty();
        self.timer.set(waiting.then_some(SETTLE_INTERVAL));
        let reports = vm.regions.take_reports();
        self.tell(settled);
        if let Some(resized) = resized {
            self.tell_of_vcpus(resized);
        }
        self.tell_of_stuck(&reports);
        self.stop_in_time();
    }

    /// Tells of removals.
    pub(super) fn tell(&self, settled: Vec<Settled>) {
        for settled in settled {
            match settled {
                Settled::Gone { id, bdf, .. } => {
                    info!(id, bdf, "device removed");
                    self.monitor
                        .send(&Happened::DeviceRemoved { id: &id, bdf: &bdf });
                }
                Settled::Unanswered { id } => {
                    self.monitor
                        .send(&Happened::DeviceRemovalUnanswered { id: &id });
                }
                Settled::Severed { id, .. } => {
                    self.monitor.send(&Happened::DeviceCutOff { id: &id });
                }
            }
        }
    }

    /// Tells of vCPUs that the guest was asked for.
    fn tell_of_vcpus(&self, Resized { count, as_asked }: Resized) {
        info!(
            vcpus = count,
            as_asked, "a change of the number of vCPUs is over"
        );
        let vcpus = &*count.to_string();
        self.monitor.send(&if as_asked {
            Happened::Resized
        } else {
            Happened::ResizeUnanswered { vcpus }
        });
    }

    /// Tells of memory that somebody keeps.
    fn tell_of_stuck(&self, reports: &[StuckMemory]) {
        for report in reports {
            let (id, gpa) = (report.user.id(), format!("{:#x}", report.gpa.0));
            let (gpa, size) = (gpa.as_str(), &*report.size.to_string());
            self.monitor.send(&match &report.held_by {
                Some(held_by) => Happened::MemoryStuck {
                    id,
                    gpa,
                    size,
                    held_by,
                },
                None => Happened::MemoryFree { id, gpa, size },
            });
        }
    }

    fn on_notices(&mut self) {
        let State::Up(vm) = &mut self.state else {
            return;
        };
        for (id, notice) in vm.host.notices.drain() {
            match notice {
                Notice::Request => {
                    warn!(id, "the host wants a passed-through device back");
                    self.monitor.send(&Happened::DeviceRequested { id: &id });
                    self.claim(&id);
                }
                Notice::Error => {
                    warn!(
                        id,
                        "a passed-through device reports an error that it can't mend"
                    );
                    self.monitor.send(&Happened::DeviceError { id: &id });
                    self.lose(&id);
                }
            }
        }
        self.settle();
    }

    fn on_backends(&mut self) {
        let State::Up(vm) = &self.state else {
            return;
        };
        for (id, change) in vm.host.backends.drain() {
            match change {
                Change::Connected => self.monitor.send(&Happened::BackendConnected { id: &id }),
                Change::Lost { why } => {
                    let why = &why;
                    self.monitor.send(&Happened::BackendLost { id: &id, why });
                }
                Change::WantedBack => self.on_wanted_back(&id),
            }
        }
        self.settle();
    }

    fn on_signal(&mut self, index: u32) {
        let Some((signal, pipe)) = self.signals.pipes.get_mut(index as usize) else {
            return;
        };
        let mut bytes = [0; 16];
        if matches!(pipe.read(&mut bytes), Ok(n) if n > 0) {
            info!(signal = *signal, "told to end");
            let signal = *signal;
            self.end(Ok(Ending::Signal(signal)));
        }
    }

    /// Serves the serial port of the machine that runs.
    fn on_serial(&mut self, token: Token, ops: &mut EventOps<'_>) {
        let State::Up(vm) = &mut self.state else {
            return;
        };
        let Some(serial) = vm.machine.serial.as_ref() else {
            return;
        };
        let input = &mut vm.host.serial_input;
        match token {
            Token::ConsoleInput => self.feed.on_input(ops, serial, input),
            Token::SerialSpace => self.feed.on_space(ops, serial, input),
            _ => self.feed.on_client(ops, input),
        }
    }

    fn on_calls(&mut self, ops: &mut EventOps<'_>) {
        self.calls.acknowledge();
        while let Some(Call { request, reply }) = self.calls.next() {
            debug!(?request, "call");
            self.serve(Call { request, reply }, ops);
            if self.ended.is_some() {
                return;
            }
        }
    }

    pub(super) fn reset(&mut self, ops: &mut EventOps<'_>) -> Result<(), RunError> {
        self.unwatch(ops);
        match std::mem::replace(&mut self.state, State::NoVm) {
            State::Up(vm) => {
                self.monitor.send(&Happened::Rebooting);
                self.state = State::Up(Box::new(vm.reset()?));
                self.monitor.send(&Happened::Rebooted);
            }
            other => self.state = other,
        }
        self.watch(ops);
        // What the guest had been asked for has gone with it.
        self.settle();
        Ok(())
    }

    /// Takes the machine down; its definition stays.
    pub(super) fn shut_down(&mut self, ops: &mut EventOps<'_>) {
        self.unwatch(ops);
        match std::mem::replace(&mut self.state, State::NoVm) {
            State::Up(vm) => {
                self.stopping = None;
                let config = Box::new(vm.config().clone());
                self.left_behind = vm.shut_down();
                self.state = State::Created(config);
                self.monitor.send(&Happened::Shutdown);
            }
            other => self.state = other,
        }
    }
}

impl MutEventSubscriber for Owner {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        add(ops, self.calls.as_raw_fd(), Token::Calls);
        add(ops, self.timer.as_raw_fd(), Token::Timer);
        add(ops, self.guard_timer.as_raw_fd(), Token::NoGuard);
        add(ops, self.lookout.watch_fd(), Token::Watch);
        add(ops, self.lookout.incidents_fd(), Token::Incidents);
        for (index, (_, pipe)) in (0u32..).zip(&self.signals.pipes) {
            add(ops, pipe.as_raw_fd(), Token::Signal(index));
        }
        self.watch(ops);
        self.follow(ops);
        self.publish_if_read();
    }

    fn process(&mut self, events: event_manager::Events, ops: &mut EventOps<'_>) {
        match Token::from_data(events.data()) {
            Token::Machine => self.on_machine(ops),
            // Nothing of it shows in what is followed and published.
            token @ (Token::ConsoleInput | Token::SerialSpace | Token::ConsoleClient) => {
                self.on_serial(token, ops);
                return;
            }
            Token::Calls => self.on_calls(ops),
            Token::Timer => {
                self.timer.acknowledge();
                self.settle();
            }
            Token::Notices => self.on_notices(),
            Token::Backends => self.on_backends(),
            Token::Guard => self.on_guard(),
            Token::Watch => {
                if !self.on_watch() {
                    return;
                }
            }
            Token::Incidents => self.on_incidents(),
            // What is used is followed after every event.
            Token::NoGuard => self.guard_timer.acknowledge(),
            Token::Signal(index) => self.on_signal(index),
        }
        if self.ended.is_some() {
            // In the reverse order of building, before the loop is left.
            self.shut_down(ops);
        }
        self.follow(ops);
        self.publish_if_read();
        self.taps.follow(&self.state);
        self.answer_drains();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_trip_through_epoll() {
        let all = [
            Token::Machine,
            Token::ConsoleInput,
            Token::SerialSpace,
            Token::ConsoleClient,
            Token::Calls,
            Token::Timer,
            Token::Notices,
            Token::Guard,
            Token::Watch,
            Token::Incidents,
            Token::NoGuard,
            Token::Backends,
            Token::Signal(0),
            Token::Signal(2),
        ];
        for token in all {
            assert_eq!(Token::from_data(token.data()), token);
        }
    }
}
