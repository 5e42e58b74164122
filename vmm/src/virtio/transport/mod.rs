//! A virtio device as a PCI function (virtio 1.2, 4.1): modern only, MSI-X only.
//!
//! ```text
//! BAR 0, 64-bit:  0x0000 common configuration    0x1000 interrupt status    0x2000 device configuration
//!                 0x3000 doorbells, 4 bytes each 0x4000 MSI-X table         0x7000 MSI-X pending bits
//! ```
//! Lock order: `registers`, then `serving`; apart from them `config`, then MSI-X's own. No lock is held while a device's own code runs, but for [`Device::activate`], which is serialised by
//! `serving`.

mod common;
mod layout;
mod serving;
mod signals;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tracing::{debug, warn};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::common::{Action, CommonRegisters};
use self::layout::{
    BAR, COMMON, Configuration, DEVICE, ISR, MAX_QUEUES, MSIX, NOTIFY, NOTIFY_MULTIPLIER, Window,
};
use self::serving::Serving;
use self::signals::Wires;
use super::device::Device;
use crate::memory::ram::GuestView;
use crate::pci::{BarChange, ConfigSpace, Function, MsiRoutes, Msix};

/// Feature bits every device has.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Guest addresses at which a store rings an event, without a way through this process.
pub trait Doorbells: Send + Sync {
    /// From now on a store to `address` writes `event`.
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// The undo.
    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// What a transport is made of.
pub struct Parts {
    /// The device's name in messages.
    pub id: String,
    /// The device.
    pub device: Arc<dyn Device>,
    /// Its interrupts: [`vectors_for`] vectors.
    pub routes: Arc<dyn MsiRoutes>,
    /// Where doorbells are connected.
    pub doorbells: Arc<dyn Doorbells>,
    /// Guest memory.
    pub memory: GuestView,
}

/// How many MSI-X vectors a device wants: one for its configuration, one for each queue.
pub fn vectors_for(device: &dyn Device) -> u16 {
    u16::try_from(device.queue_sizes().len() + 1).unwrap_or(u16::MAX)
}

/// A virtio device in a slot.
pub struct VirtioPci {
    id: String,
    device: Arc<dyn Device>,
    doorbells: Arc<dyn Doorbells>,
    memory: GuestView,
    config: Mutex<ConfigSpace>,
    /// The capability through which configuration space alone reaches the BAR.
    window: Window,
    msix: Msix,
    msix_capability: u8,
    wires: Arc<Wires>,
    kicks: Vec<EventFd>,
    registers: Mutex<CommonRegisters>,
    serving: Mutex<Serving>,
}

impl VirtioPci {
    /// A device after power-on, in no slot yet.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let Parts {
            id,
            device,
            routes,
            doorbells,
            memory,
        } = parts;
        let sizes = device.queue_sizes();
        debug_assert!(
            sizes.len() <= MAX_QUEUES,
            "no room for the doorbells of {id}"
        );
        let vectors = vectors_for(device.as_ref());
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<Vec<_>>>()?;
        let offered = device.features() | (TRANSPORT_FEATURES & device.ring_features());
        let wires = Arc::new(Wires::new(&id, Arc::clone(&routes), sizes.len()));
        let Configuration {
            space,
            msix,
            msix_capability,
            window,
        } = Configuration::new(device.kind(), vectors, routes);
        Ok(Self {
            id,
            device,
            doorbells,
            memory,
            config: Mutex::new(space),
            window,
            msix,
            msix_capability,
            wires,
            kicks,
            registers: Mutex::new(CommonRegisters::new(offered, &sizes, vectors)),
            serving: Mutex::new(Serving::Idle),
        })
    }

    /// The device itself.
    pub fn device(&self) -> &dyn Device {
        self.device.as_ref()
    }

    /// Tells the workers to serve nothing. Wait with [`VirtioPci::wait_paused`].
    pub fn pause(&self) {
        if let Some(crew) = self.serving().crew() {
            crew.pause();
        }
    }

    /// Waits until no worker serves anything; `false` when one still does by then.
    pub fn wait_paused(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        self.serving()
            .crew()
            .is_none_or(|crew| crew.wait_paused(left))
    }

    /// The undo of [`VirtioPci::pause`].
    pub fn resume(&self) {
        if let Some(crew) = self.serving().crew() {
            crew.resume();
        }
    }

    /// Tells the workers to go, for good. Wait with [`VirtioPci::is_gone`].
    pub fn stop(&self) {
        self.serving().stop();
    }

    /// Whether no worker touches guest memory any more.
    pub fn is_gone(&self) -> bool {
        self.serving().is_idle()
    }

    fn registers(&self) -> MutexGuard<'_, CommonRegisters> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn serving(&self) -> MutexGuard<'_, Serving> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.registers();
        registers.generation = self.wires.generation();
        if self.wires.is_reset_needed() {
            registers.set_needs_reset();
        }
        self.finish_reset(&mut registers);
        registers.read(offset, data);
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut registers = self.registers();
        if !self.finish_reset(&mut registers) {
            // Between a reset and its end nothing is taken; the driver waits for a status of 0.
            return;
        }
        match registers.write(offset, data) {
            Action::None => {}
            Action::Reset => {
                debug!(device = self.id, "reset by the driver");
                self.serving().stop();
                if self.serving().is_idle() {
                    self.reset_registers(&mut registers);
                }
            }
            Action::Activate => {
                debug!(device = self.id, features = %format_args!("{:#x}", registers.features()), "driver ready");
                self.serving().start(
                    self.device.as_ref(),
                    &registers,
                    &self.memory,
                    &self.wires,
                    &self.kicks,
                );
            }
        }
        let vectors = registers.queues.iter().map(|queue| queue.vector);
        self.wires.set_vectors(registers.config_vector, vectors);
    }

    /// Ends a reset whose workers have gone; `false` while it goes on.
    fn finish_reset(&self, registers: &mut CommonRegisters) -> bool {
        let mut serving = self.serving();
        if !serving.is_stopping() {
            return true;
        }
        let done = serving.is_idle();
        drop(serving);
        if done {
            self.reset_registers(registers);
        }
        done
    }

    fn reset_registers(&self, registers: &mut CommonRegisters) {
        registers.reset();
        self.wires.reset();
        let vectors = registers.queues.iter().map(|queue| queue.vector);
        self.wires.set_vectors(registers.config_vector, vectors);
    }

    /// A doorbell that KVM did not take, because its address was just changing.
    fn ring(&self, offset: u64) {
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(index) {
            // Only a full counter gives an error, and then the worker is awake anyway.
            let _ = kick.write(1);
        }
    }

    /// Connects (or disconnects) all doorbells of a BAR at `base`.
    fn wire_doorbells(&self, base: u64, connect: bool) {
        for (index, kick) in (0u64..).zip(&self.kicks) {
            let address = base + NOTIFY + index * u64::from(NOTIFY_MULTIPLIER);
            let done = if connect {
                self.doorbells.connect(address, kick)
            } else {
                self.doorbells.disconnect(address, kick)
            };
            if let Err(error) = done {
                // They still work, by an exit each.
                warn!(device = self.id, %error, address = %format_args!("{address:#x}"), connect, "doorbell");
            }
        }
    }
}

impl Function for VirtioPci {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        if let Some(access) = self.window.access(&self.config(), register, data.len()) {
            self.bar_read(access.bar, access.offset, data);
            return;
        }
        self.config().read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> Vec<BarChange> {
        let access = self.window.access(&self.config(), register, data.len());
        if let Some(access) = access {
            self.bar_write(access.bar, access.offset, data);
            return Vec::new();
        }
        let mut config = self.config();
        let changes = config.write(register, data);
        // The bus serialises configuration writes, and the table is locked after the space everywhere.
        self.msix.config_written(&config, self.msix_capability);
        changes
    }

    fn bars(&self) -> Vec<BarChange> {
        self.config().bars()
    }

    fn bar_moved(&self, change: BarChange) {
        if change.bar != BAR {
            return;
        }
        if let Some(old) = change.old {
            self.wire_doorbells(old, false);
        }
        if let Some(new) = change.new {
            self.wire_doorbells(new, true);
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if bar != BAR {
            return;
        }
        data.fill(0);
        match offset {
            COMMON..ISR => self.read_common(offset - COMMON, data),
            ISR => data[0] = self.wires.take_isr(),
            DEVICE..NOTIFY => self.device.config_read(offset - DEVICE, data),
            MSIX.. => {
                self.msix.bar_read(bar, offset, data);
            }
            _ => {}
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar != BAR {
            return;
        }
        match offset {
            COMMON..ISR => self.write_common(offset - COMMON, data),
            DEVICE..NOTIFY => self.device.config_write(offset - DEVICE, data),
            NOTIFY..MSIX => self.ring(offset - NOTIFY),
            MSIX.. => {
                self.msix.bar_write(bar, offset, data);
            }
            _ => {}
        }
    }
}
