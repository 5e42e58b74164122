//! From the host's interrupts to the guest's vectors: does what [`interrupts`](super::interrupts) decides.
//!
//! ```text
//!   INTx:        VFIO ──trigger──▶ KVM pin ──guest's EOI──resample──▶ VFIO unmasks
//!   MSI, MSI-X:  VFIO ──event──▶ KVM route, or the event's count while there is none
//! ```
//! Invariants:
//! - The host has at most one kind enabled, and after [`Signals::stop`] none is enabled again.
//! - A vector's event is emptied when its kind is switched off: what was raised then belongs to nobody.
//!
//! A host that refuses is told of once. There is no register to tell the guest by: its driver sees a device that does not interrupt.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use daxhund_pin::{HostFunction, IrqKind};
use tracing::{debug, warn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::descriptor::descriptor;
use super::interrupts::{Kinds, Step, Use};
use super::needs::{Intx, Vectors};
use crate::pci::{MsiMessage, MsiRoutes};

/// The pin's way and its two events.
pub(super) struct Pin {
    wire: Arc<dyn Intx>,
    trigger: EventFd,
    resample: EventFd,
}

impl Pin {
    pub(super) fn new(wire: Arc<dyn Intx>) -> io::Result<Self> {
        Ok(Self {
            wire,
            trigger: EventFd::new(EFD_NONBLOCK)?,
            resample: EventFd::new(EFD_NONBLOCK)?,
        })
    }
}

#[derive(Default)]
struct State {
    kinds: Kinds,
    /// By vector of MSI-X: the host writes its event.
    started: Vec<bool>,
    stopped: bool,
    /// A refusal was told of.
    complained: bool,
}

/// The interrupts of one function.
///
/// Lock order: MSI-X's table, then `state`.
pub(super) struct Signals {
    id: String,
    host: Arc<dyn HostFunction>,
    vectors: Arc<dyn Vectors>,
    pin: Option<Pin>,
    /// Number of vectors that MSI-X has.
    msix_vectors: u16,
    state: Mutex<State>,
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signals")
            .field("id", &self.id)
            .field("on", &self.state().kinds.on())
            .finish_non_exhaustive()
    }
}

impl Signals {
    /// Nothing is enabled.
    pub(super) fn new(
        id: &str,
        host: Arc<dyn HostFunction>,
        vectors: Arc<dyn Vectors>,
        pin: Option<Pin>,
        msix_vectors: u16,
    ) -> Self {
        Self {
            id: id.to_owned(),
            host,
            vectors,
            pin,
            msix_vectors,
            state: Mutex::default(),
        }
    }

    /// Brings the host to `wanted`. The caller has taken the routes of the vectors that are to be off.
    pub(super) fn follow(&self, wanted: Use) {
        let mut state = self.state();
        if state.stopped {
            return;
        }
        while let Some(step) = state.kinds.next(wanted) {
            let done = match step {
                Step::Disable(kind) => self.disable(kind),
                Step::Enable(kind) => self.enable(kind),
            };
            match done {
                Ok(()) => {
                    debug!(device = self.id, ?step, "interrupts");
                    let all_at_once = !self.host.irq(IrqKind::Msix).resizable;
                    state.started = match step {
                        Step::Enable(Use::Msix) => vec![all_at_once; self.msix_vectors.into()],
                        _ => Vec::new(),
                    };
                    state.kinds.done(step);
                }
                Err(error) => {
                    self.complain(&mut state, &error, &format_args!("{step:?}"));
                    state.kinds.failed(wanted);
                }
            }
        }
    }

    /// A vector of MSI-X has a route: the host is to write its event from now on.
    fn start(&self, vector: u16) {
        let mut state = self.state();
        if state.kinds.on() != Use::Msix || state.started.get(usize::from(vector)) != Some(&false) {
            return;
        }
        match self.set(IrqKind::Msix, vector, &[self.event(vector)]) {
            Ok(()) => state.started[usize::from(vector)] = true,
            // Asked again at the vector's next route.
            Err(error) => self.complain(&mut state, &error, &format_args!("vector {vector}")),
        }
    }

    /// Switches everything off, for good. A device that is gone has nothing on any more, so a refusal is no failure.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        if std::mem::replace(&mut state.stopped, true) {
            return;
        }
        let on = state.kinds.on();
        if on != Use::Nothing
            && let Err(error) = self.disable(on)
        {
            debug!(device = self.id, %error, ?on, "interrupts of a device that stops");
            if let (Use::Intx, Some(pin)) = (on, &self.pin) {
                self.disconnect(pin);
            }
        }
        state.kinds = Kinds::default();
    }

    fn enable(&self, kind: Use) -> io::Result<()> {
        match kind {
            Use::Nothing => Ok(()),
            Use::Intx => self.enable_pin(),
            Use::Msi(count) => self.set(IrqKind::Msi, 0, &self.events(count)),
            // A first vector without an event switches MSI-X on in the device.
            Use::Msix if self.host.irq(IrqKind::Msix).resizable => {
                self.set(IrqKind::Msix, 0, &[None])
            }
            Use::Msix => self.set(IrqKind::Msix, 0, &self.events(self.msix_vectors)),
        }
    }

    fn disable(&self, kind: Use) -> io::Result<()> {
        match kind {
            Use::Nothing => {}
            Use::Intx => {
                self.host.disable_irqs(IrqKind::Intx)?;
                if let Some(pin) = &self.pin {
                    self.disconnect(pin);
                }
            }
            Use::Msi(count) => {
                self.host.disable_irqs(IrqKind::Msi)?;
                self.empty(count);
            }
            Use::Msix => {
                self.host.disable_irqs(IrqKind::Msix)?;
                self.empty(self.msix_vectors);
            }
        }
        Ok(())
    }

    /// KVM listens first, so that nothing is lost; what is acknowledged before the host listens stays in `resample`.
    fn enable_pin(&self) -> io::Result<()> {
        let Some(pin) = &self.pin else {
            return Ok(());
        };
        pin.wire.connect(&pin.trigger, &pin.resample)?;
        let enabled = self
            .set(IrqKind::Intx, 0, &[Some(descriptor(&pin.trigger))])
            .and_then(|()| {
                let unmasking = self.host.unmask_intx_by(descriptor(&pin.resample));
                unmasking.inspect_err(|_| {
                    if let Err(error) = self.host.disable_irqs(IrqKind::Intx) {
                        debug!(device = self.id, %error, "a pin that was just enabled");
                    }
                })
            });
        enabled.inspect_err(|_| self.disconnect(pin))
    }

    fn disconnect(&self, pin: &Pin) {
        if let Err(error) = pin.wire.disconnect(&pin.trigger) {
            warn!(device = self.id, %error, "KVM still listens to the interrupt pin of a device");
        }
        empty(&pin.trigger);
        empty(&pin.resample);
    }

    fn set(&self, kind: IrqKind, start: u16, events: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        self.host.set_irqs(kind, start.into(), events)
    }

    fn events(&self, count: u16) -> Vec<Option<BorrowedFd<'_>>> {
        (0..count).map(|vector| self.event(vector)).collect()
    }

    fn event(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        self.vectors.event(vector).map(descriptor)
    }

    fn empty(&self, count: u16) {
        (0..count)
            .filter_map(|vector| self.vectors.event(vector))
            .for_each(empty);
    }

    fn complain(&self, state: &mut State, error: &io::Error, what: &dyn fmt::Display) {
        if std::mem::replace(&mut state.complained, true) {
            debug!(device = self.id, %error, %what, "the host refuses interrupts again");
        } else {
            warn!(
                device = self.id, %error, %what,
                "the host refuses a change of the device's interrupts; the guest's driver will wait for interrupts that do not come"
            );
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets what was raised. An error means that nothing was.
fn empty(event: &EventFd) {
    let _ = event.read();
}

/// The routes of MSI-X: a vector that gets its first one is started in the host.
pub(super) struct MsixRoutes(pub(super) Arc<Signals>);

impl MsiRoutes for MsixRoutes {
    fn set(&self, vector: u16, message: Option<MsiMessage>) {
        self.0.vectors.set(vector, message);
        if message.is_some() {
            self.0.start(vector);
        }
    }

    fn signal(&self, vector: u16) {
        self.0.vectors.signal(vector);
    }

    fn is_pending(&self, vector: u16) -> bool {
        self.0.vectors.is_pending(vector)
    }
}
