//! Which capabilities of the host's function the guest sees, and what of each is ours, the host's, or nobody's.
//!
//! | capability | the guest sees |
//! |---|---|
//! | MSI, MSI-X | ours; the host's vectors are enabled behind them |
//! | power management | ours: the device stays in D0, the guest reads back the state it wrote; no PME |
//! | PCI Express | an integrated endpoint without a link; control and status are the host's, reset is ours |
//! | advanced features | reset is ours |
//! | vital product data, vendor specific | the host's |
//! | device serial number, error reporting | the host's, read-only |
//! | power budgeting, vendor specific (extended) | the host's |
//!
//! Every other one is left out of the list and reads as zero: what it would change concerns the host's fabric (SR-IOV, ARI,
//! ATS, PASID, PRI, resizable BARs, L1 substates, latency, containment). Capabilities stay where they are; only the pointers change.
//!
//! Invariant: a capability that does not fit where it is (into the next one, over the end) is left out.
//! Sources: PCI Local Bus 3.0, 6.7 and 6.8; PCI Power Management 1.2, 3.2; PCI Express Base 5.0, 7.5.3 and 7.8; Advanced
//! Capabilities for Conventional PCI; `drivers/vfio/pci/vfio_pci_config.c` for what the host lets through.

use tracing::debug;

use super::msi::MsiCapability;
use super::registers::RegisterFile;
use super::snapshot::{CONVENTIONAL, Capability, HEADER, Snapshot};
use crate::pci::{BarOffset, CAPABILITIES, MSIX_CAPABILITY, MSIX_VECTORS, MsixLayout, STATUS};

const POWER_MANAGEMENT: u16 = 0x01;
const VITAL_PRODUCT_DATA: u16 = 0x03;
const MSI: u16 = 0x05;
const VENDOR_SPECIFIC: u16 = 0x09;
const EXPRESS: u16 = 0x10;
const MSIX: u16 = MSIX_CAPABILITY as u16;
const ADVANCED_FEATURES: u16 = 0x13;

const ERROR_REPORTING: u16 = 0x0001;
const SERIAL_NUMBER: u16 = 0x0003;
const POWER_BUDGETING: u16 = 0x0004;
const VENDOR_SPECIFIC_EXTENDED: u16 = 0x000b;

/// What the host can do behind the capabilities.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Abilities {
    /// The function can be reset.
    pub(super) reset: bool,
    /// MSI vectors.
    pub(super) msi_vectors: u32,
    /// MSI-X vectors.
    pub(super) msix_vectors: u32,
}

/// The capabilities whose registers have effects.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Kept {
    pub(super) msi: Option<MsiCapability>,
    pub(super) msix: Option<MsixCapability>,
    /// Bytes and bits that reset the function when they are written as one.
    express_reset: Option<(u16, u8)>,
    advanced_reset: Option<(u16, u8)>,
}

/// The MSI-X capability.
#[derive(Debug, Clone, Copy)]
pub(super) struct MsixCapability {
    /// Where message control is.
    pub(super) control: u16,
    pub(super) layout: MsixLayout,
}

impl Kept {
    /// Whether such a store resets the function.
    pub(super) fn resets(&self, register: u16, data: &[u8]) -> bool {
        let bits = [self.express_reset, self.advanced_reset];
        bits.into_iter().flatten().any(|(at, bit)| {
            let byte = at.checked_sub(register).map(usize::from);
            byte.and_then(|index| data.get(index))
                .is_some_and(|byte| byte & bit != 0)
        })
    }
}

/// Fills everything from 0x40 on.
pub(super) fn keep(file: &mut RegisterFile, snapshot: &Snapshot, abilities: Abilities) -> Kept {
    let mut kept = Kept::default();
    // What is in no capability is the function's own business, and the host's to judge.
    file.forward(HEADER, CONVENTIONAL - HEADER);
    let mut express = false;
    let mut list = Vec::new();
    for found in snapshot.capabilities() {
        // A function has one of each, but for what its maker adds.
        let first = list.iter().all(|(id, _)| *id != found.id);
        let shown = match found.id {
            VENDOR_SPECIFIC => keep_forwarded(file, found, snapshot.u8(found.at + 2).into()),
            _ if !first => false,
            VITAL_PRODUCT_DATA => keep_forwarded(file, found, 8),
            POWER_MANAGEMENT => keep_power(file, snapshot, found),
            MSI => {
                kept.msi = MsiCapability::keep(file, snapshot, found, abilities.msi_vectors);
                kept.msi.is_some()
            }
            MSIX => {
                kept.msix = keep_msix(file, snapshot, found, abilities.msix_vectors);
                kept.msix.is_some()
            }
            EXPRESS => {
                express = keep_express(file, snapshot, found, abilities.reset);
                let reset = (found.at + DEVICE_CONTROL + 1, DEVICE_CONTROL_RESET_HIGH);
                kept.express_reset = (express && abilities.reset).then_some(reset);
                express
            }
            ADVANCED_FEATURES if abilities.reset => {
                let shown = keep_advanced(file, snapshot, found);
                kept.advanced_reset = shown.then_some((found.at + ADVANCED_CONTROL, 1));
                shown
            }
            _ => false,
        };
        if shown {
            list.push((found.id, found.at));
        } else {
            debug!(id = found.id, at = found.at, "capability left out");
            file.hide(found.at, found.room);
        }
    }
    link(file, &list);
    if express {
        keep_extended(file, snapshot);
    }
    kept
}

/// Chains the capabilities in their order.
fn link(file: &mut RegisterFile, list: &[(u16, u16)]) {
    let byte = |value: u16| value.to_le_bytes()[0];
    let mut pointer = CAPABILITIES;
    for (id, at) in list {
        file.hide(*at, 2);
        let space = file.space_mut();
        space.set(*at, &[byte(*id), 0]);
        space.set(pointer, &[byte(*at)]);
        pointer = at + 1;
    }
    if !list.is_empty() {
        let space = file.space_mut();
        let status = space.read_u16(STATUS) | crate::pci::STATUS_CAPABILITIES;
        space.set(STATUS, &status.to_le_bytes());
    }
}

/// All after id and pointer is the host's.
fn keep_forwarded(file: &mut RegisterFile, found: Capability, length: u16) -> bool {
    let fits = (3..=found.room).contains(&length);
    if fits {
        file.forward(found.at + 2, length - 2);
    }
    fits
}

/// Makes `length` bytes ours, if there is room.
fn take(file: &mut RegisterFile, found: Capability, length: u16) -> bool {
    let fits = length <= found.room;
    if fits {
        file.hide(found.at, length);
    }
    fits
}

const POWER_LENGTH: u16 = 8;
const POWER_CAPABILITIES: u16 = 2;
/// Version, D1 and D2; not PME, auxiliary current and the clock it needs.
const POWER_CAPABILITIES_SHOWN: u16 = 0x0607;
const POWER_CONTROL: u16 = 4;
/// D0 to D3hot.
const POWER_STATE: u16 = 0b11;
const POWER_NO_SOFT_RESET: u16 = 1 << 3;

fn keep_power(file: &mut RegisterFile, snapshot: &Snapshot, found: Capability) -> bool {
    if !take(file, found, POWER_LENGTH) {
        return false;
    }
    let at = found.at;
    let shown = snapshot.u16(at + POWER_CAPABILITIES) & POWER_CAPABILITIES_SHOWN;
    let space = file.space_mut();
    space.set(at + POWER_CAPABILITIES, &shown.to_le_bytes());
    space.set(at + POWER_CONTROL, &POWER_NO_SOFT_RESET.to_le_bytes());
    space.allow(at + POWER_CONTROL, &POWER_STATE.to_le_bytes());
    true
}

const MSIX_LENGTH: u16 = 12;
const MSIX_CONTROL: u16 = 2;
const MSIX_CONTROL_VECTORS: u16 = 0x7ff;
/// Enable and function mask.
const MSIX_CONTROL_WRITABLE: u16 = 0b11 << 14;

fn keep_msix(
    file: &mut RegisterFile,
    snapshot: &Snapshot,
    found: Capability,
    vectors: u32,
) -> Option<MsixCapability> {
    let at = found.at;
    let control = at + MSIX_CONTROL;
    let in_table = (snapshot.u16(control) & MSIX_CONTROL_VECTORS) + 1;
    let vectors = u16::try_from(vectors).unwrap_or(MSIX_VECTORS).min(in_table);
    if vectors == 0 || !take(file, found, MSIX_LENGTH) {
        return None;
    }
    let place = |register: u16| {
        let value = snapshot.u32(register);
        BarOffset {
            bar: value.to_le_bytes()[0] & 0b111,
            offset: value & !0b111,
        }
    };
    let space = file.space_mut();
    space.set(control, &(vectors - 1).to_le_bytes());
    space.set(at + 4, snapshot.bytes(at + 4, 8));
    space.allow(control, &MSIX_CONTROL_WRITABLE.to_le_bytes());
    Some(MsixCapability {
        control,
        layout: MsixLayout {
            vectors,
            table: place(at + 4),
            pending: place(at + 8),
        },
    })
}

const EXPRESS_FLAGS: u16 = 2;
/// Version in 3:0; type in 7:4: this one is an endpoint integrated into the root complex, as bus 0 has no root ports.
const EXPRESS_TYPE_INTEGRATED: u16 = 9 << 4;
const DEVICE_CAPABILITIES: u16 = 4;
/// Payload size, extended tags, role-based errors; not phantom functions, latencies towards a link, slot power.
const DEVICE_CAPABILITIES_SHOWN: u32 = 0x8027;
const DEVICE_CAPABILITIES_RESET: u32 = 1 << 28;
const DEVICE_CONTROL: u16 = 8;
/// Not phantom functions, auxiliary power and reset.
const DEVICE_CONTROL_PASSED: u16 = 0x79ff;
const DEVICE_CONTROL_KEPT: u16 = 0x0600;
/// Bit 15.
const DEVICE_CONTROL_RESET_HIGH: u8 = 1 << 7;
const DEVICE_STATUS: u16 = 0xa;
/// Errors, cleared by writing ones.
const DEVICE_STATUS_PASSED: u16 = 0x000f;
const DEVICE_CAPABILITIES_2: u16 = 0x24;
/// Completion timeouts.
const DEVICE_CAPABILITIES_2_SHOWN: u32 = 0x001f;
const DEVICE_CONTROL_2: u16 = 0x28;
const DEVICE_CONTROL_2_PASSED: u16 = 0x001f;
const EXPRESS_1_LENGTH: u16 = 0x14;
const EXPRESS_2_LENGTH: u16 = 0x3c;
/// Of an integrated endpoint of version 1: it ends before the link.
const EXPRESS_SHORTEST: u16 = 0x0c;

fn keep_express(
    file: &mut RegisterFile,
    snapshot: &Snapshot,
    found: Capability,
    reset: bool,
) -> bool {
    let at = found.at;
    let version = snapshot.u16(at + EXPRESS_FLAGS) & 0xf;
    let (version, length) = match found.room {
        EXPRESS_2_LENGTH.. if version >= 2 => (2u16, EXPRESS_2_LENGTH),
        EXPRESS_1_LENGTH.. => (1, EXPRESS_1_LENGTH),
        room => (1, room),
    };
    if length < EXPRESS_SHORTEST || !take(file, found, length) {
        return false;
    }
    let flags = version | EXPRESS_TYPE_INTEGRATED;
    let mut capabilities = snapshot.u32(at + DEVICE_CAPABILITIES) & DEVICE_CAPABILITIES_SHOWN;
    if reset {
        capabilities |= DEVICE_CAPABILITIES_RESET;
    }
    let space = file.space_mut();
    space.set(at + EXPRESS_FLAGS, &flags.to_le_bytes());
    space.set(at + DEVICE_CAPABILITIES, &capabilities.to_le_bytes());
    file.live(at + DEVICE_CONTROL, &[0xff, !DEVICE_CONTROL_RESET_HIGH]);
    file.pass(
        at + DEVICE_CONTROL,
        DEVICE_CONTROL_PASSED,
        DEVICE_CONTROL_KEPT,
    );
    file.live(at + DEVICE_STATUS, &[0xff; 2]);
    file.pass(at + DEVICE_STATUS, DEVICE_STATUS_PASSED, 0);
    if version == 2 {
        let capabilities = snapshot.u32(at + DEVICE_CAPABILITIES_2) & DEVICE_CAPABILITIES_2_SHOWN;
        let space = file.space_mut();
        space.set(at + DEVICE_CAPABILITIES_2, &capabilities.to_le_bytes());
        file.live(
            at + DEVICE_CONTROL_2,
            &DEVICE_CONTROL_2_PASSED.to_le_bytes(),
        );
        file.pass(
            at + DEVICE_CONTROL_2,
            DEVICE_CONTROL_2_PASSED,
            !DEVICE_CONTROL_2_PASSED,
        );
    }
    true
}

const ADVANCED_LENGTH: u16 = 6;
const ADVANCED_CONTROL: u16 = 4;
const ADVANCED_STATUS: u16 = 5;

/// Only for a function that can be reset.
fn keep_advanced(file: &mut RegisterFile, snapshot: &Snapshot, found: Capability) -> bool {
    if !take(file, found, ADVANCED_LENGTH) {
        return false;
    }
    let space = file.space_mut();
    // Length; transactions pending and reset.
    let shown = snapshot.u8(found.at + 3) & 0b11 | 0b10;
    space.set(found.at + 2, &[6, shown]);
    file.live(found.at + ADVANCED_STATUS, &[1]);
    true
}

/// Bytes of the header of an extended capability.
const EXTENDED_HEADER: u16 = 4;
/// Of an endpoint: up to the last register that is not a root port's.
const ERROR_REPORTING_LENGTH: u16 = 0x2c;
const SERIAL_NUMBER_LENGTH: u16 = 12;
const POWER_BUDGETING_LENGTH: u16 = 16;
/// Length in bits 15:4 of the upper half.
const VENDOR_SPECIFIC_LENGTH: u16 = 6;

fn keep_extended(file: &mut RegisterFile, snapshot: &Snapshot) {
    let mut list: Vec<u16> = Vec::new();
    for found in snapshot.extended() {
        let at = found.at;
        let length = match found.id {
            ERROR_REPORTING => ERROR_REPORTING_LENGTH,
            SERIAL_NUMBER => SERIAL_NUMBER_LENGTH,
            POWER_BUDGETING => POWER_BUDGETING_LENGTH,
            VENDOR_SPECIFIC_EXTENDED => snapshot.u16(at + VENDOR_SPECIFIC_LENGTH) >> 4,
            _ => 0,
        };
        if !(EXTENDED_HEADER + 1..=found.room).contains(&length) {
            debug!(id = found.id, at, "extended capability left out");
            continue;
        }
        let body = (at + EXTENDED_HEADER, length - EXTENDED_HEADER);
        match found.id {
            SERIAL_NUMBER => file.space_mut().set(body.0, snapshot.bytes(body.0, body.1)),
            ERROR_REPORTING => file.live(body.0, &vec![0xff; body.1.into()]),
            _ => file.forward(body.0, body.1),
        }
        list.push(at);
    }
    let mut next = 0;
    for at in list.iter().rev() {
        // Id and version are the host's.
        let header = u32::from(snapshot.u16(*at))
            | u32::from(snapshot.u16(at + 2) & 0xf) << 16
            | u32::from(next) << 20;
        file.space_mut().set(*at, &header.to_le_bytes());
        next = *at;
    }
    if next > CONVENTIONAL {
        // The list begins here: an entry without id that only leads on.
        let empty = u32::from(next) << 20;
        file.space_mut().set(CONVENTIONAL, &empty.to_le_bytes());
    }
}
