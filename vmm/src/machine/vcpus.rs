//! The vCPU threads.
//!
//! ```text
//!            release                stop
//!   Held ─────────────▶ Running ───────────▶ Stopped (thread ends)
//!     └───────────────────stop─────────────────▲
//! ```
//! All vCPUs of a machine want the same. Threads are created held, so that a machine whose last thread can't be
//! created never ran an instruction. To stop, the wish is written first and each thread kicked once afterwards; see
//! [`crate::kvm`] for why once is enough.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use thiserror::Error;
use tracing::{debug, error};

use super::events::{Event, EventSender};
use crate::bus::Bus;
use crate::kvm::{Exit, Io, KickTarget, Vcpu};
use crate::memory::layout::{Gpa, RamLayout};

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
struct Control {
    wish: Mutex<Wish>,
    changed: Condvar,
}

impl Control {
    fn set(&self, wish: Wish) {
        *self.wish.lock().unwrap_or_else(PoisonError::into_inner) = wish;
        self.changed.notify_all();
    }

    /// Waits out a hold; the wait ends when the owner releases or stops the machine, which it always does.
    fn wanted(&self) -> Wish {
        let wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        *self
            .changed
            .wait_while(wish, |wish| *wish == Wish::Hold)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a vCPU reaches without the owner.
#[derive(Debug)]
pub(super) struct GuestIo {
    pub(super) ports: Bus,
    pub(super) mmio: Bus,
    pub(super) layout: RamLayout,
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

    fn is_memory(&self, address: u64) -> bool {
        self.layout.is_ram(Gpa(address))
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
            wish: Mutex::new(Wish::Hold),
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
                    let _tell = TellOfPanic {
                        id,
                        events: &events,
                    };
                    run(vcpu, &control, io.as_ref(), &events);
                })
                .map_err(|source| SpawnError { id, source })?;
            spawned.threads.push(thread);
        }
        Ok(spawned)
    }

    /// Lets them run.
    pub(super) fn release(&self) {
        self.control.set(Wish::Run);
    }

    /// Takes every vCPU out of the guest and ends its thread; its KVM descriptor is closed when this returns.
    pub(super) fn stop(&mut self) {
        self.control.set(Wish::Stop);
        for thread in &self.threads {
            if let Err(error) = thread.kick() {
                error!(error = %error, "a vCPU may not stop");
            }
        }
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
struct TellOfPanic<'a> {
    id: u8,
    events: &'a EventSender,
}

impl Drop for TellOfPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.events.send(Event::VcpuPanicked(self.id));
        }
    }
}

/// The whole life of a vCPU thread.
fn run(vcpu: Vcpu, control: &Control, io: &GuestIo, events: &EventSender) {
    let mut vcpu = vcpu.bind();
    loop {
        vcpu.acknowledge_kick();
        if control.wanted() == Wish::Stop {
            return;
        }
        let event = match vcpu.run(io) {
            Ok(Exit::Kicked) => continue,
            Ok(Exit::TripleFault) => Event::TripleFault,
            Err(fault) => Event::VcpuFailed(fault),
        };
        debug!(?event, "vCPU ends");
        events.send(event);
        return;
    }
}
