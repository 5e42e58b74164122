//! The configuration space that the guest sees: the host's identity, our header, and the capabilities that are kept.
//!
//! Pure: it is made from a [`Snapshot`] and facts, says what a store changes, and leaves the doing to its owner.
//!
//! Invariants:
//! - BARs, the ROM, command, interrupt line and everything that enables interrupts or DMA is ours; the host gets the
//!   command register as a value of ours.
//! - Nothing that the device says later changes what is ours.

use super::capabilities::{self, Abilities, Kept};
use super::interrupts::Switches;
use super::msi::MsiState;
use super::registers::{Forward, RegisterFile};
use super::snapshot::Snapshot;
use crate::pci::{
    Bar, BarChange, BarError, CLASS, COMMAND, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE,
    COMMAND_MEMORY, Class, ConfigSpace, Identity, REVISION, STATUS, STATUS_CAPABILITIES, SUBSYSTEM,
};

/// Bits of the command register that the host gets.
const COMMAND_FORWARDED: u16 = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
/// Errors, cleared by writing ones.
const STATUS_ERRORS: u16 = 0xf900;
const CACHE_LINE: u16 = 0x0c;
const LATENCIES: u16 = 0x3e;
/// INTA: all that a slot with one function uses.
const PIN_A: u8 = 1;

/// What the configuration space is made for.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    /// Memory BARs.
    pub(super) bars: Vec<Bar>,
    /// Length of the expansion ROM.
    pub(super) rom: Option<u64>,
    /// There is an interrupt pin, here and in the host.
    pub(super) pin: bool,
    /// What the host can do.
    pub(super) abilities: Abilities,
}

/// What has to be done after a store.
#[derive(Debug)]
pub(super) struct Written {
    /// Where BARs answer now.
    pub(super) changes: Vec<BarChange>,
    /// What the host is to have in its command register, if that changes.
    pub(super) command: Option<u16>,
    /// Stores to the host.
    pub(super) forwards: Vec<Forward>,
    /// The guest resets the function.
    pub(super) reset: bool,
}

/// What the guest's registers say about interrupts.
#[derive(Debug, Clone, Copy)]
pub(super) struct InterruptState {
    pub(super) switches: Switches,
    pub(super) msi: MsiState,
    /// Message control of MSI-X.
    pub(super) msix_control: u16,
}

/// The guest's configuration space.
#[derive(Debug)]
pub(super) struct VirtualConfig {
    file: RegisterFile,
    /// Our part as it was made.
    fresh: ConfigSpace,
    kept: Kept,
    pin: bool,
}

impl VirtualConfig {
    /// As after power-on.
    pub(super) fn new(snapshot: &Snapshot, facts: &Facts) -> Result<Self, BarError> {
        let [interface, sub, base] = [0, 1, 2].map(|byte| snapshot.u8(CLASS + byte));
        let mut space = ConfigSpace::new(&Identity {
            vendor: snapshot.u16(0),
            device: snapshot.u16(2),
            revision: snapshot.u8(REVISION),
            class: Class {
                base,
                sub,
                interface,
            },
            subsystem_vendor: snapshot.u16(SUBSYSTEM),
            subsystem: snapshot.u16(SUBSYSTEM + 2),
        });
        for bar in &facts.bars {
            space.add_bar(*bar)?;
        }
        if let Some(size) = facts.rom {
            space.add_rom(size)?;
        }
        space.allow(CACHE_LINE, &[0xff]);
        if facts.pin {
            space.set_interrupt_pin(PIN_A);
        }
        space.set(LATENCIES, snapshot.bytes(LATENCIES, 2));
        let mut file = RegisterFile::new(space);
        file.live(STATUS, &(!STATUS_CAPABILITIES).to_le_bytes());
        file.pass(STATUS, STATUS_ERRORS, 0);
        let kept = capabilities::keep(&mut file, snapshot, facts.abilities);
        Ok(Self {
            fresh: file.space().clone(),
            file,
            kept,
            pin: facts.pin,
        })
    }

    /// The capabilities whose registers have effects.
    pub(super) fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Where BARs and the ROM answer.
    pub(super) fn bars(&self) -> Vec<BarChange> {
        self.file.space().bars()
    }

    /// What the host is to have in its command register.
    pub(super) fn host_command(&self) -> u16 {
        self.file.space().command() & COMMAND_FORWARDED
    }

    /// Reads; `host` fills what is read there, `pending` tells which MSI vectors are pending.
    pub(super) fn read(
        &mut self,
        register: u16,
        data: &mut [u8],
        host: impl Fn(u16, &mut [u8]),
        pending: impl Fn(u16) -> bool,
    ) {
        self.refresh_pending(register, data.len(), pending);
        self.file.read(register, data, host);
    }

    /// Pending bits are asked for when they are read.
    fn refresh_pending(&mut self, register: u16, len: usize, pending: impl Fn(u16) -> bool) {
        let Some((msi, at)) = self.kept.msi.and_then(|msi| Some((msi, msi.pending()?))) else {
            return;
        };
        let read = usize::from(register)..usize::from(register) + len;
        if read.start >= usize::from(at) + 4 || read.end <= usize::from(at) {
            return;
        }
        let vectors = msi.state(self.file.space()).vectors;
        let bits = (0..vectors)
            .filter(|vector| pending(*vector))
            .fold(0u32, |bits, vector| bits | 1 << vector);
        self.file.space_mut().set(at, &bits.to_le_bytes());
    }

    /// Takes a store of the guest.
    pub(super) fn write(&mut self, register: u16, data: &[u8]) -> Written {
        let before = self.host_command();
        let (changes, forwards) = self.file.write(register, data);
        let after = self.host_command();
        Written {
            changes,
            command: (before != after).then_some(after),
            forwards,
            reset: self.kept.resets(register, data),
        }
    }

    /// As after power-on again; tells which BARs answer no more.
    pub(super) fn reset(&mut self) -> Vec<BarChange> {
        let space = self.file.space_mut();
        let changes = space.write(COMMAND, &[0; 2]);
        *space = self.fresh.clone();
        changes
    }

    /// What the registers say about interrupts.
    pub(super) fn interrupts(&self) -> InterruptState {
        let space = self.file.space();
        let msi = self.kept.msi;
        let msi = msi.map_or(MsiState::OFF, |msi| msi.state(space));
        let msix = self.kept.msix;
        let msix_control = msix.map_or(0, |msix| space.read_u16(msix.control));
        let active = space.memory_enabled() || space.bus_master();
        InterruptState {
            switches: Switches {
                msix: msix_control & MSIX_ENABLE != 0,
                msi: msi.vectors,
                pin: self.pin && active,
            },
            msi,
            msix_control,
        }
    }
}

/// MSI-X is on; bit 15 of message control.
const MSIX_ENABLE: u16 = 1 << 15;
