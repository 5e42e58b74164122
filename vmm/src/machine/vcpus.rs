//! The vCPU threads.
//!
//! ```text
//!            release                stop
//!   Held ─────────────▶ Running ───────────▶ Stopped (thread ends)
//!     ▲                    │                    ▲
//!     ├───────hold─────────┘                    │
//!     └───────────────────stop──────────────────┘
//! ```
//! A vCPU whose access found no memory, or poison, waits, as if held, until the owner has looked after it: then it tries
//! again, and finds memory, a tombstone, or the same fault.
//!
//! All vCPUs of a machine want the same, but those that the guest has ejected: they stop. Threads are created held, so that a
//! machine whose last thread can't be created never ran an instruction. To stop, the wish is written first and each thread
//! kicked once afterwards; see [`crate::kvm`] for why once is enough.
//!
//! A vCPU is KVM's until the VM ends. One without a thread is kept, and gets another thread when it comes again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use thiserror::Error;
use tracing::{debug, error};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::events::{Event, EventSender};
use crate::bus::Bus;
use crate::kvm::{Beneath, Exit, Io, KickTarget, Vcpu};
use crate::memory::poison::Poison;
use crate::memory::ram::GuestView;
use crate::memory::sigbus::OnVcpuThread;
use crate::memory::tombstones::Tombstones;

/// A thread could not be created.
#[derive(Debug, Error)]
#[error("the thread of vCPU {id} can't be created")]
pub struct SpawnError {
    /// Which vCPU.
    pub id: u8,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Hold,
    Run,
    Stop,
}

#[derive(Debug)]
struct State {
    wish: Wish,
    /// vCPUs that stop whatever is wished of the others.
    retired: BTreeSet<u8>,
    /// Threads that wait out a hold.
    held: usize,
    /// Threads that were let into the guest for the first time.
    started: usize,
    /// Threads whose vCPU has ended and that nobody has joined.
    ended: usize,
    /// How often the owner has looked after memory that is gone.
    mended: u64,
    /// Non-maskable interrupts that each vCPU was sent.
    nmis: u64,
}

impl State {
    fn wish_for(&self, vcpu: u8) -> Wish {
        if self.retired.contains(&vcpu) {
            Wish::Stop
        } else {
            self.wish
        }
    }
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    /// All are held.
    fn new() -> Self {
        Self {
            state: Mutex::new(State {
                wish: Wish::Hold,
                retired: BTreeSet::new(),
                held: 0,
                started: 0,
                ended: 0,
                mended: 0,
                nmis: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, wish: Wish) {
        self.lock().wish = wish;
        self.changed.notify_all();
    }

    /// Waits out a hold; the wait ends when the owner releases or stops the machine, which it always does. Tells
    /// whether it waited.
    fn wanted(&self, vcpu: u8) -> (Wish, bool) {
        let mut state = self.lock();
        let waits = state.wish_for(vcpu) == Wish::Hold;
        if waits {
            state.held += 1;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.wish_for(vcpu) == Wish::Hold)
                .unwrap_or_else(PoisonError::into_inner);
            state.held -= 1;
        }
        (state.wish_for(vcpu), waits)
    }

    /// Waits until the owner has looked after memory that is gone, or ends the machine or this vCPU; one of these it always
    /// does.
    fn await_mending(&self, vcpu: u8, since: u64) {
        let mut state = self.lock();
        state.held += 1;
        self.changed.notify_all();
        state = self
            .changed
            .wait_while(state, |state| {
                state.wish_for(vcpu) != Wish::Stop && state.mended == since
            })
            .unwrap_or_else(PoisonError::into_inner);
        state.held -= 1;
    }

    fn start(&self) {
        self.lock().started += 1;
        self.changed.notify_all();
    }

    fn end(&self) {
        self.lock().ended += 1;
        self.changed.notify_all();
    }
}

/// What a vCPU reaches without the owner.
pub(super) struct GuestIo {
    pub(super) ports: Bus,
    pub(super) mmio: Bus,
    /// RAM and other memory: it comes and goes with regions.
    pub(super) memory: GuestView,
    /// Where memory was that the host took away.
    pub(super) tombstones: Arc<Tombstones>,
    /// What is poisoned, and out of the guest's reach for that.
    pub(super) poison: Arc<Poison>,
}

impl Io for GuestIo {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(u64::from(port), data);
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }

    fn beneath(&self, address: u64) -> Beneath {
        // A region on its way out may be both.
        if self.tombstones.contains(address) || self.poison.is_out(address) {
            return Beneath::Tombstone;
        }
        let memory = self.memory.memory();
        match memory.find_region(GuestAddress(address)) {
            Some(region) if region.is_read_only() => Beneath::ReadOnly,
            Some(_) => Beneath::Memory,
            None => Beneath::Device,
        }
    }

    fn machine_checked(&self, address: u64) {
        self.poison.note_load(address);
    }

    fn store_dropped(&self, address: u64) {
        self.poison.note_store(address);
    }
}

/// The vCPUs of a machine.
pub(super) struct Vcpus {
    control: Arc<Control>,
    io: Arc<GuestIo>,
    events: EventSender,
    /// By vCPU. Who panicked has lost its vCPU.
    threads: BTreeMap<u8, JoinHandle<Option<Vcpu>>>,
    /// vCPUs without a thread: they were ejected, or never got one.
    kept: BTreeMap<u8, Vcpu>,
}

impl Vcpus {
    /// Creates a thread for each vCPU, held. The thread of vCPU n is `vcpun`.
    pub(super) fn spawn(
        vcpus: Vec<Vcpu>,
        io: &Arc<GuestIo>,
        events: &EventSender,
    ) -> Result<Self, SpawnError> {
        let mut spawned = Self {
            control: Arc::new(Control::new()),
            io: Arc::clone(io),
            events: events.clone(),
            threads: BTreeMap::new(),
            kept: BTreeMap::new(),
        };
        for vcpu in vcpus {
            spawned.begin(vcpu)?;
        }
        Ok(spawned)
    }

    /// Gives a vCPU a thread, which does what is wished of all. On failure the vCPU is kept.
    pub(super) fn begin(&mut self, vcpu: Vcpu) -> Result<(), SpawnError> {
        let id = vcpu.id();
        let control = Arc::clone(&self.control);
        let (io, events) = (Arc::clone(&self.io), self.events.clone());
        // Those from before are not its own.
        let nmis = control.lock().nmis;
        // Only a thread that is there can be given something that is not lost with it.
        let (give, given) = sync_channel::<Vcpu>(1);
        let thread = Builder::new().name(format!("vcpu{id}")).spawn(move || {
            let vcpu = given.recv().ok()?;
            let _tell = TellOfEnd {
                id,
                events: &events,
                control: &control,
            };
            Some(run(vcpu, nmis, &control, io.as_ref(), &events))
        });
        match thread {
            Ok(thread) => {
                // It waits for it, so this does not.
                if let Err(unsent) = give.send(vcpu) {
                    self.kept.insert(id, unsent.0);
                }
                self.threads.insert(id, thread);
                Ok(())
            }
            Err(source) => {
                self.kept.insert(id, vcpu);
                Err(SpawnError { id, source })
            }
        }
    }

    /// vCPUs that have a thread.
    pub(super) fn threads(&self) -> impl Iterator<Item = u8> {
        self.threads.keys().copied()
    }

    /// A vCPU that KVM has and no thread runs.
    pub(super) fn take_kept(&mut self, id: u8) -> Option<Vcpu> {
        self.kept.remove(&id)
    }

    /// Keeps a vCPU: the undo of [`Vcpus::take_kept`].
    pub(super) fn keep(&mut self, vcpu: Vcpu) {
        self.kept.insert(vcpu.id(), vcpu);
    }

    /// Takes a vCPU out of the guest for good and has its thread end, without waiting for that: [`Vcpus::join_ended`].
    /// False: it was told before, or has no thread.
    pub(super) fn retire(&self, id: u8) -> bool {
        let Some(thread) = self.threads.get(&id) else {
            return false;
        };
        let is_new = self.control.lock().retired.insert(id);
        if is_new {
            self.control.changed.notify_all();
            kick(thread);
        }
        is_new
    }

    /// Joins the threads that have ended of vCPUs that were retired, and keeps the vCPUs. Whether there are more to come.
    pub(super) fn join_ended(&mut self) -> bool {
        let retired = self.control.lock().retired.clone();
        for id in retired {
            let thread = self.threads.get(&id);
            if thread.is_none_or(JoinHandle::is_finished) {
                self.join(id);
            }
        }
        !self.control.lock().retired.is_empty()
    }

    /// Retires a vCPU and waits for its thread, as [`Vcpus::stop`] does.
    pub(super) fn end(&mut self, id: u8) {
        if self.retire(id) {
            self.join(id);
        }
    }

    fn join(&mut self, id: u8) {
        let thread = self.threads.remove(&id);
        let joined = thread.is_some();
        self.kept
            .extend(thread.and_then(join).map(|vcpu| (id, vcpu)));
        let mut state = self.control.lock();
        state.retired.remove(&id);
        state.ended = state.ended.saturating_sub(joined.into());
    }

    /// Lets them run for the first time, and waits until they are on their way, or for a moment. Where there is one processor
    /// for all, the guest goes before the caller's chores: it would wait for a removal guard to be started, too.
    pub(super) fn start(&self) {
        const MOMENT: Duration = Duration::from_millis(20);
        self.release();
        let waits = |state: &mut State| state.started + state.ended < self.threads.len();
        let state = self.control.lock();
        // Nothing depends on who is first.
        let _ = self
            .control
            .changed
            .wait_timeout_while(state, MOMENT, waits);
    }

    /// Lets them run.
    pub(super) fn release(&self) {
        self.control.set(Wish::Run);
    }

    /// Takes every vCPU out of the guest and keeps it out; `false` when one is still in the guest by then (then it
    /// leaves as soon as the host lets it).
    pub(super) fn hold(&self, at_most: Duration) -> bool {
        self.control.set(Wish::Hold);
        self.kick();
        let threads = self.threads.len();
        let (_state, timeout) = self
            .control
            .changed
            .wait_timeout_while(self.control.lock(), at_most, |state| {
                state.held + state.ended < threads
            })
            .unwrap_or_else(PoisonError::into_inner);
        !timeout.timed_out()
    }

    /// Lets vCPUs try again that wait for memory to be looked after.
    pub(super) fn mended(&self) {
        self.control.lock().mended += 1;
        self.control.changed.notify_all();
    }

    /// Whether memory was looked after since then: a vCPU that told of a fault before it tries again.
    pub(super) fn was_mended_since(&self, count: u64) -> bool {
        self.control.lock().mended != count
    }

    /// Interrupts every vCPU, masked or not. One that is held takes it when it is let go.
    pub(super) fn nmi(&self) {
        self.control.lock().nmis += 1;
        self.kick();
    }

    fn kick(&self) {
        self.threads.values().for_each(kick);
    }

    /// Takes every vCPU out of the guest and ends its thread; its KVM descriptor is closed when this returns.
    pub(super) fn stop(&mut self) {
        self.control.set(Wish::Stop);
        self.kick();
        while let Some((_, thread)) = self.threads.pop_first() {
            drop(join(thread));
        }
        self.kept.clear();
    }
}

fn kick(thread: &JoinHandle<Option<Vcpu>>) {
    if let Err(error) = thread.kick() {
        error!(error = %error, "a vCPU may not stop");
    }
}

/// Its vCPU, unless it panicked.
fn join(thread: JoinHandle<Option<Vcpu>>) -> Option<Vcpu> {
    let name = thread.thread().name().unwrap_or_default().to_owned();
    thread.join().unwrap_or_else(|_| {
        error!(thread = name, "a vCPU thread panicked");
        None
    })
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A thread that panics must not leave a guest that hangs for ever.
struct TellOfEnd<'a> {
    id: u8,
    events: &'a EventSender,
    control: &'a Control,
}

impl Drop for TellOfEnd<'_> {
    fn drop(&mut self) {
        self.control.end();
        if std::thread::panicking() {
            self.events.send(Event::VcpuPanicked(self.id));
        }
    }
}

/// The whole life of a vCPU thread; what is left of it is the vCPU. `nmis` were sent before.
fn run(vcpu: Vcpu, mut nmis: u64, control: &Control, io: &GuestIo, events: &EventSender) -> Vcpu {
    let id = vcpu.id();
    // Poison that the guest touches comes to this thread as a signal.
    let touches = OnVcpuThread::enter(u32::from(id));
    let mut vcpu = vcpu.bind();
    let mut has_run = false;
    loop {
        vcpu.acknowledge_kick();
        let (wish, waited) = control.wanted(id);
        if wish == Wish::Stop {
            return vcpu.unbind();
        }
        if !has_run {
            control.start();
        } else if waited {
            vcpu.forgive_pause();
        }
        has_run = true;
        let State {
            mended, nmis: sent, ..
        } = *control.lock();
        // KVM keeps two of them at most, the one that is taken and the next one, as processors do.
        for _ in nmis..sent {
            vcpu.nmi();
        }
        nmis = sent;
        let event = match vcpu.run(io) {
            Ok(Exit::Kicked) if !touches.takes_poison() => continue,
            // The guest stands at the access. Entered now, it would find the page there again and go on with it.
            Ok(Exit::Kicked) => {
                events.send(Event::PoisonTouched { mended });
                control.await_mending(id, mended);
                continue;
            }
            Err(fault) if fault.is_memory_gone() => {
                debug!(%fault, "vCPU waits");
                events.send(Event::MemoryGone { fault, mended });
                control.await_mending(id, mended);
                continue;
            }
            Ok(Exit::TripleFault) => Event::TripleFault,
            Err(fault) => Event::VcpuFailed(fault),
        };
        debug!(?event, "vCPU ends");
        events.send(event);
        return vcpu.unbind();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn one_that_is_retired_stops_whatever_it_waits_for() {
        let control = Control::new();
        thread::scope(|scope| {
            let held = scope.spawn(|| control.wanted(1));
            let other = scope.spawn(|| control.wanted(2));
            let mending = scope.spawn(|| control.await_mending(1, 0));
            let state = control.lock();
            let all_wait = control.changed.wait_while(state, |state| state.held < 3);
            all_wait.unwrap().retired.insert(1);
            control.changed.notify_all();
            assert_eq!(held.join().unwrap(), (Wish::Stop, true));
            mending.join().unwrap();
            assert_eq!(control.wanted(1), (Wish::Stop, false), "nor does it wait");
            assert_eq!(control.lock().held, 1);
            control.set(Wish::Run);
            assert_eq!(other.join().unwrap(), (Wish::Run, true));
        });
    }
}
