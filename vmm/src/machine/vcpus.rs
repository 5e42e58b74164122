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
//! All vCPUs of a machine want the same. Threads are created held, so that a machine whose last thread can't be
//! created never ran an instruction. To stop, the wish is written first and each thread kicked once afterwards; see
//! [`crate::kvm`] for why once is enough.

use std::io;
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
    /// Threads that wait out a hold.
    held: usize,
    /// Threads that were let into the guest for the first time.
    started: usize,
    /// Threads whose vCPU has ended by itself.
    ended: usize,
    /// How often the owner has looked after memory that is gone.
    mended: u64,
    /// Non-maskable interrupts that each vCPU was sent.
    nmis: u64,
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, wish: Wish) {
        self.lock().wish = wish;
        self.changed.notify_all();
    }

    /// Waits out a hold; the wait ends when the owner releases or stops the machine, which it always does. Tells
    /// whether it waited.
    fn wanted(&self) -> (Wish, bool) {
        let mut state = self.lock();
        let waits = state.wish == Wish::Hold;
        if waits {
            state.held += 1;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.wish == Wish::Hold)
                .unwrap_or_else(PoisonError::into_inner);
            state.held -= 1;
        }
        (state.wish, waits)
    }

    /// Waits until the owner has looked after memory that is gone, or ends the machine; one of both it always does.
    fn await_mending(&self, since: u64) {
        let mut state = self.lock();
        state.held += 1;
        self.changed.notify_all();
        state = self
            .changed
            .wait_while(state, |state| {
                state.wish != Wish::Stop && state.mended == since
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

/// The running vCPUs of a machine.
#[derive(Debug)]
pub(super) struct Vcpus {
    control: Arc<Control>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Creates a thread for each vCPU, held. vCPU n is `vcpus[n]`, its thread `vcpun`.
    pub(super) fn spawn(
        vcpus: Vec<Vcpu>,
        io: &Arc<GuestIo>,
        events: &EventSender,
    ) -> Result<Self, SpawnError> {
        let control = Arc::new(Control {
            state: Mutex::new(State {
                wish: Wish::Hold,
                held: 0,
                started: 0,
                ended: 0,
                mended: 0,
                nmis: 0,
            }),
            changed: Condvar::new(),
        });
        let mut spawned = Self {
            control,
            threads: Vec::with_capacity(vcpus.len()),
        };
        for (id, vcpu) in (0u8..).zip(vcpus) {
            let (control, io, events) =
                (Arc::clone(&spawned.control), Arc::clone(io), events.clone());
            let thread = Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || {
                    let _tell = TellOfEnd {
                        id,
                        events: &events,
                        control: &control,
                    };
                    run(vcpu, &control, io.as_ref(), &events);
                })
                .map_err(|source| SpawnError { id, source })?;
            spawned.threads.push(thread);
        }
        Ok(spawned)
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
        for thread in &self.threads {
            if let Err(error) = thread.kick() {
                error!(error = %error, "a vCPU may not stop");
            }
        }
    }

    /// Takes every vCPU out of the guest and ends its thread; its KVM descriptor is closed when this returns.
    pub(super) fn stop(&mut self) {
        self.control.set(Wish::Stop);
        self.kick();
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                error!(thread = name, "a vCPU thread panicked");
            }
        }
    }
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

/// The whole life of a vCPU thread.
fn run(vcpu: Vcpu, control: &Control, io: &GuestIo, events: &EventSender) {
    // Poison that the guest touches comes to this thread as a signal.
    let touches = OnVcpuThread::enter(u32::from(vcpu.id()));
    let mut vcpu = vcpu.bind();
    let mut has_run = false;
    let mut nmis = 0;
    loop {
        vcpu.acknowledge_kick();
        let (wish, waited) = control.wanted();
        if wish == Wish::Stop {
            return;
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
                control.await_mending(mended);
                continue;
            }
            Err(fault) if fault.is_memory_gone() => {
                debug!(%fault, "vCPU waits");
                events.send(Event::MemoryGone { fault, mended });
                control.await_mending(mended);
                continue;
            }
            Ok(Exit::TripleFault) => Event::TripleFault,
            Err(fault) => Event::VcpuFailed(fault),
        };
        debug!(?event, "vCPU ends");
        events.send(event);
        return;
    }
}
