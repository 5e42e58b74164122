//! A passed-through PCI function as the guest sees it.
//!
//! ```text
//!   config_read, config_write ─▶ VirtualConfig (pure) ──▶ what changed
//!                                    │ live, passed            │
//!                                    ▼                         ├─▶ Windows: BARs in the guest ──▶ BarWindows (KVM, DMA)
//!                              HostFunction (VFIO) ◀───────────┤
//!                                    ▲                         └─▶ Signals: one kind of interrupt ─▶ Vectors, Intx (KVM)
//!   bar_read, bar_write ─▶ MSI-X table, else ┘                              events: VFIO ───────────▶ KVM
//! ```
//! VFIO keeps the host safe from the device and from this process. This module keeps what this process and the guest
//! know in step: where BARs are, which interrupts are on, what a reset leaves. It shows a function without bridge and link
//! (`capabilities`), so that a guest looks for nothing that is not there.
//!
//! Invariants:
//! - What the guest writes changes the host only in the ways that are listed in `capabilities` and `config`.
//! - Windows leave the guest before memory decode goes off in the host and before the function is reset: VFIO takes a
//!   mapped BAR away from under its users then.
//! - At most one kind of interrupt is enabled in the host, the one that the guest's registers say.
//! - After [`VfioPci::stop`] reads are all ones and stores do nothing; the host has neither interrupts nor DMA on.
//! - Reads of a device that does not answer any more are all ones.
//!
//! Not here: opening the device, the IOMMU, resets between guests, requests and errors of the host
//! (`backends/pin`, the machine); KVM.
//!
//! Lock order: `work`, then one of `config`, MSI-X's table and then the state of `signals`. A store to configuration
//! space that resets the function takes as long as the reset (100 ms and more), on the vCPU that wrote it; the guest has to
//! wait that long anyway.

mod bars;
mod capabilities;
mod config;
mod descriptor;
mod interrupts;
mod msi;
mod needs;
mod registers;
mod signals;
mod snapshot;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use daxhund_pin::{HostFunction, IrqKind, RegionIndex};
use thiserror::Error;
use tracing::{debug, info, warn};

use self::bars::Windows;
use self::capabilities::Abilities;
use self::config::{Facts, InterruptState, VirtualConfig};
use self::interrupts::Use;
use self::msi::{MSI_VECTORS, MsiRouter, MsiState};
pub use self::needs::{BarWindows, Intx, Vectors, Window, WindowError, WindowLease};
use self::registers::Forward;
use self::signals::{MsixRoutes, Pin, Signals};
use self::snapshot::Snapshot;
pub use self::snapshot::SnapshotError;
use crate::pci::{
    Bar, BarChange, BarError, COMMAND, COMMAND_MEMORY, Function, MSIX_VECTORS, Msix, MsixError,
    MsixLayout, ROM_BAR,
};

/// The header's type, without the bit that says there are more functions.
const HEADER_TYPE: u16 = 0x0e;
const HEADER_TYPE_MASK: u8 = 0x7f;
/// The smallest that a ROM's register can say.
const SMALLEST_ROM: u64 = 0x800;
/// What nobody's registers read as.
const NOBODY: u16 = 0xffff;

/// What a passed-through function is made of.
pub struct Parts {
    /// The device's name in messages.
    pub id: String,
    /// The function, from VFIO.
    pub host: Arc<dyn HostFunction>,
    /// Its vectors: [`vectors_needed`].
    pub vectors: Arc<dyn Vectors>,
    /// Its interrupt pin; `None`: the guest sees none.
    pub intx: Option<Arc<dyn Intx>>,
    /// Where its BARs are mapped.
    pub windows: Arc<dyn BarWindows>,
    /// BARs of which nothing is mapped into the guest.
    pub exclude_mmap_bars: Vec<u8>,
}

/// A function can't be shown to a guest.
#[derive(Debug, Error)]
pub enum NewError {
    /// Its configuration space can't be had.
    #[error("the configuration of the function can't be taken over")]
    Config(#[from] SnapshotError),
    /// It is not there.
    #[error(
        "the function does not answer: its vendor id reads as 0xffff; is it powered and still plugged in?"
    )]
    Absent,
    /// It is a bridge.
    #[error(
        "the function has a header of type {header_type}, only type 0 can be passed through; pass what is behind the bridge"
    )]
    Bridge {
        /// Header type.
        header_type: u8,
    },
    /// A BAR that can't be.
    #[error("the function has a BAR that can't be shown to a guest")]
    Bar(#[from] BarError),
    /// MSI-X registers that can't be.
    #[error("the function's MSI-X registers can't be shown to a guest")]
    Msix(#[from] MsixError),
    /// MSI-X registers outside of their BAR.
    #[error(
        "the function's MSI-X registers reach to {end:#x} of BAR {bar}, which has {size:#x} bytes of memory"
    )]
    MsixOutside {
        /// Which BAR.
        bar: u8,
        /// Where they end.
        end: u64,
        /// What it has.
        size: u64,
    },
    /// Too few vectors were given.
    #[error("the function needs {needed} interrupt vectors and was given fewer")]
    Vectors {
        /// How many it needs.
        needed: u16,
    },
    /// No descriptors for the pin.
    #[error(
        "no event descriptor could be made for the interrupt pin; `ulimit -n` raises how many a process may have"
    )]
    Event(#[source] io::Error),
}

/// BARs of a stopped function that are still in the guest.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("{windows} windows of {id} are still mapped into the guest; stop it again, or end the VM")]
pub struct StopError {
    /// The device.
    pub id: String,
    /// How many windows.
    pub windows: usize,
}

/// How many vectors a function needs: those of MSI-X or MSI, whichever are more, and one for a function that has neither.
pub fn vectors_needed(host: &dyn HostFunction) -> u16 {
    let count = |kind, most: u16| {
        let count = host.irq(kind).count;
        u16::try_from(count).unwrap_or(most).min(most)
    };
    count(IrqKind::Msix, MSIX_VECTORS)
        .max(count(IrqKind::Msi, MSI_VECTORS))
        .max(1)
}

/// What changes together: one store of the guest, or a stop, at a time.
#[derive(Debug)]
struct Work {
    windows: Windows,
    msi: MsiRouter,
}

/// A passed-through function in a slot.
pub struct VfioPci {
    id: String,
    host: Arc<dyn HostFunction>,
    vectors: Arc<dyn Vectors>,
    signals: Arc<Signals>,
    msix: Option<Msix>,
    config: Mutex<VirtualConfig>,
    work: Mutex<Work>,
    stopped: AtomicBool,
}

impl fmt::Debug for VfioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioPci")
            .field("id", &self.id)
            .field("signals", &self.signals)
            .field("stopped", &self.is_stopped())
            .finish_non_exhaustive()
    }
}

/// For the machine's owner.
impl VfioPci {
    /// A function after power-on, in no slot yet: the host has its decode, DMA and interrupts off.
    pub fn new(parts: Parts) -> Result<Self, NewError> {
        let Parts {
            id,
            host,
            vectors,
            intx,
            windows,
            exclude_mmap_bars,
        } = parts;
        let snapshot = Snapshot::take(host.as_ref())?;
        if snapshot.u16(0) == NOBODY {
            return Err(NewError::Absent);
        }
        let header_type = snapshot.u8(HEADER_TYPE) & HEADER_TYPE_MASK;
        if header_type != 0 {
            return Err(NewError::Bridge { header_type });
        }
        let needed = vectors_needed(host.as_ref());
        if vectors.event(needed - 1).is_none() {
            return Err(NewError::Vectors { needed });
        }
        let rom = host.region(RegionIndex::Rom).map_or(0, |rom| rom.size);
        // VFIO tells how long the image is where the host shadows it.
        let rom = (rom != 0).then(|| {
            rom.checked_next_power_of_two()
                .unwrap_or(rom)
                .max(SMALLEST_ROM)
        });
        let intx = intx.filter(|_| host.irq(IrqKind::Intx).count > 0);
        let facts = Facts {
            bars: bars::memory_bars(&id, host.as_ref(), &snapshot),
            rom,
            pin: intx.is_some(),
            abilities: Abilities {
                reset: host.can_reset(),
                msi_vectors: host.irq(IrqKind::Msi).count,
                msix_vectors: host.irq(IrqKind::Msix).count,
            },
        };
        let config = VirtualConfig::new(&snapshot, &facts)?;
        let layout = config.kept().msix.map(|msix| msix.layout);
        if let Some(layout) = &layout {
            check_msix(layout, &facts.bars)?;
        }
        let pin = intx.map(Pin::new).transpose().map_err(NewError::Event)?;
        let signals = Arc::new(Signals::new(
            &id,
            Arc::clone(&host),
            Arc::clone(&vectors),
            pin,
            layout.map_or(0, |layout| layout.vectors),
        ));
        let routes = || Arc::new(MsixRoutes(Arc::clone(&signals)));
        let msix = layout
            .map(|layout| Msix::new(layout, routes()))
            .transpose()?;
        let windows = Windows::new(
            &id,
            host.as_ref(),
            windows,
            &facts.bars,
            layout.as_ref(),
            &exclude_mmap_bars,
        );
        let function = Self {
            id,
            host,
            vectors,
            signals,
            msix,
            config: Mutex::new(config),
            work: Mutex::new(Work {
                windows,
                msi: MsiRouter::default(),
            }),
            stopped: AtomicBool::new(false),
        };
        function.switch(&function.work(), 0);
        Ok(function)
    }

    /// The undo of [`VfioPci::new`] and of everything the guest has done: interrupts off, windows out of the guest, DMA off.
    /// Idempotent; on an error it can be called again. A device that is gone stops like any other.
    pub fn stop(&self) -> Result<(), StopError> {
        let mut work = self.work();
        let first = !self.stopped.swap(true, Ordering::SeqCst);
        if !first && work.windows.leases() == 0 {
            return Ok(());
        }
        let windows = work.windows.stop();
        if first {
            if let Some(msix) = &self.msix {
                msix.reset();
            }
            work.msi.follow(&MsiState::OFF, self.vectors.as_ref());
            self.signals.stop();
            info!(device = self.id, "stopped");
        }
        self.switch(&work, 0);
        if windows == 0 {
            return Ok(());
        }
        let id = self.id.clone();
        Err(StopError { id, windows })
    }

    /// Whether it was stopped.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

/// MSI-X's registers are within memory BARs.
fn check_msix(layout: &MsixLayout, bars: &[Bar]) -> Result<(), NewError> {
    let vectors = layout.vectors;
    for (place, length) in [
        (layout.table, MsixLayout::table_size(vectors)),
        (layout.pending, MsixLayout::pending_size(vectors)),
    ] {
        let bar = bars.iter().find(|bar| bar.index == place.bar);
        let size = bar.map_or(0, |bar| bar.size);
        let end = u64::from(place.offset) + length;
        if end > size {
            let bar = place.bar;
            return Err(NewError::MsixOutside { bar, end, size });
        }
    }
    Ok(())
}

impl VfioPci {
    /// Does what the guest's interrupt registers say: vectors of a kind that goes off lose their routes first, those of
    /// one that comes on get them last.
    fn follow_interrupts(&self, work: &mut Work, now: &InterruptState) {
        let wanted = now.switches.wanted();
        let msix_control = if wanted == Use::Msix {
            now.msix_control
        } else {
            0
        };
        let msi = if matches!(wanted, Use::Msi(_)) {
            now.msi
        } else {
            MsiState::OFF
        };
        if let (Some(msix), 0) = (&self.msix, msix_control) {
            msix.set_control(0);
        }
        if msi == MsiState::OFF {
            work.msi.follow(&msi, self.vectors.as_ref());
        }
        self.signals.follow(wanted);
        if let Some(msix) = &self.msix {
            msix.set_control(msix_control);
        }
        work.msi.follow(&msi, self.vectors.as_ref());
    }

    /// The guest resets the function: ours is as after power-on when the host's is.
    fn reset_by_guest(&self, work: &mut Work) -> Vec<BarChange> {
        info!(device = self.id, "reset by the guest");
        work.windows.withdraw();
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        let (changes, now) = {
            let mut config = self.config();
            (config.reset(), config.interrupts())
        };
        self.follow_interrupts(work, &now);
        if let Err(error) = self.host.reset() {
            warn!(device = self.id, %error, "the host could not reset the device; it goes on as it was, and the guest does not know");
        }
        // VFIO restores what was there before.
        self.switch(work, 0);
        changes
    }

    /// Gives the host its command register. Decode stays on while a window could not be taken out of the guest: without it
    /// the guest's next access there would end the VM.
    fn switch(&self, work: &Work, command: u16) {
        let command = if work.windows.leases() == 0 {
            command
        } else {
            command | COMMAND_MEMORY
        };
        let done = self
            .host
            .write(RegionIndex::Config, COMMAND.into(), &command.to_le_bytes());
        if let Err(error) = done {
            // Only a device that is gone does not take it, and that has nothing to switch.
            debug!(device = self.id, %error, command, "command register");
        }
    }

    fn forward(&self, forward: &Forward) {
        let register = u64::from(forward.register);
        let mut now = [0; 4];
        let now = &mut now[..forward.len()];
        let index = RegionIndex::Config;
        let read = if forward.is_merged() {
            self.host.read(index, register, now)
        } else {
            Ok(())
        };
        let done = read.and_then(|()| self.host.write(index, register, &forward.merge(now)));
        if let Err(error) = done {
            // As on hardware: a store that nobody takes is lost.
            debug!(device = self.id, %error, register, "a store to configuration space");
        }
    }

    /// Whether there is a device to ask. Its vendor id is read each time: it may be in the middle of a reset and come back.
    fn answers(&self) -> bool {
        let mut vendor = [0; 2];
        let read = self.host.read(RegionIndex::Config, 0, &mut vendor);
        read.is_ok() && u16::from_le_bytes(vendor) != NOBODY
    }

    fn config(&self) -> MutexGuard<'_, VirtualConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function for VfioPci {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        if self.is_stopped() || !self.answers() {
            data.fill(0xff);
            return;
        }
        let host = |register: u16, data: &mut [u8]| {
            let read = self.host.read(RegionIndex::Config, register.into(), data);
            if read.is_err() {
                data.fill(0xff);
            }
        };
        let pending = |vector| self.vectors.is_pending(vector);
        self.config().read(register, data, host, pending);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> Vec<BarChange> {
        let mut work = self.work();
        if self.is_stopped() {
            return Vec::new();
        }
        let (written, now) = {
            let mut config = self.config();
            (config.write(register, data), config.interrupts())
        };
        if written.reset {
            return self.reset_by_guest(&mut work);
        }
        if let Some(command) = written.command {
            if command & COMMAND_MEMORY == 0 {
                work.windows.withdraw();
            }
            self.switch(&work, command);
        }
        for forward in &written.forwards {
            self.forward(forward);
        }
        self.follow_interrupts(&mut work, &now);
        written.changes
    }

    fn bars(&self) -> Vec<BarChange> {
        self.config().bars()
    }

    fn bar_moved(&self, change: BarChange) {
        self.work().windows.moved(&change);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if self.is_stopped() {
            return;
        }
        if let Some(msix) = &self.msix
            && msix.bar_read(bar, offset, data)
        {
            if !self.answers() {
                data.fill(0xff);
            }
            return;
        }
        if self.host.read(region(bar), offset, data).is_err() {
            data.fill(0xff);
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if self.is_stopped() {
            return;
        }
        if let Some(msix) = &self.msix
            && msix.bar_write(bar, offset, data)
        {
            return;
        }
        if bar != ROM_BAR
            && let Err(error) = self.host.write(region(bar), offset, data)
        {
            debug!(device = self.id, bar, offset, %error, "a store to a BAR");
        }
    }
}

fn region(bar: u8) -> RegionIndex {
    if bar == ROM_BAR {
        RegionIndex::Rom
    } else {
        RegionIndex::Bar(bar)
    }
}

impl Drop for VfioPci {
    fn drop(&mut self) {
        if !self.is_stopped()
            && let Err(error) = self.stop()
        {
            warn!(%error, "a passed-through function that was not stopped");
        }
    }
}
