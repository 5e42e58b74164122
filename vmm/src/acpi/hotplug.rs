//! Places that fill and empty while the guest runs, and the event device that tells of them.
//!
//! ```text
//!   interrupt ─▶ \_SB.GED._EVT ─┬─ PENDING bit n ─▶ SCAN of a block ─▶ CHECK, EJECT_REQUEST ─▶ Notify (place, 1 or 3)
//!                               └─ BUTTON ─▶ Notify (\_SB.PWRB, 0x80)
//!   a place's _STA reads PRESENT, its _EJ0 writes EJECT
//! ```
//! PCI slots and processors have this in common: up to 32 places share a block of registers, a bit each. Each block has
//! registers of its own, so there is nothing to select and no lock around it; a scan is serialized so that two events do
//! not notify twice. A scan writes back what it has read before it notifies: that is what makes the registers lose nothing.
//! Sources: ACPI 6.5, 5.6.6, 5.6.9, 6.3.

use acpi_tables::aml::{
    And, Arg, If, Interrupt, Local, Method, MethodCall, Name, Path, Return, Store, ZERO,
};

use super::HotplugDescription;
use super::aml::{
    Encoded, crs, device, encoded, hid, if_any, name, notify, refs, registers, serialized_method,
};
use crate::devices::places::{BLOCK, CHECK, EJECT, EJECT_REQUEST, PENDING, PRESENT};
use crate::pci::hotplug::{BUTTON, POWER_BUTTON};

/// Notification values, ACPI 6.5, 5.6.6.
const DEVICE_CHECK: u32 = 1;
const EJECT_REQUESTED: u32 = 3;
const BUTTON_PRESSED: u32 = 0x80;
/// Present, enabled, shown, functioning.
const STATUS_PRESENT: u32 = 0xf;

/// What the device has that holds the places of the block of registers at `base`: registers, `STAT`, `NOTI` and `SCAN`.
/// `places` have names and bits.
pub(super) fn block_terms(base: u64, places: impl Iterator<Item = (String, u32)>) -> Vec<Encoded> {
    let fields = [
        (*b"CHCK", CHECK),
        (*b"EJRQ", EJECT_REQUEST),
        (*b"PRES", PRESENT),
        (*b"EJCT", EJECT),
    ];
    vec![
        registers("REGS", base, BLOCK, &fields),
        status_method(),
        notify_method(places),
        scan_method(),
    ]
}

/// `_STA` and `_EJ0` of a place.
pub(super) fn place_methods(bit: u32) -> [Encoded; 2] {
    let status = MethodCall::new("STAT".into(), vec![&bit]);
    let status = Return::new(&status);
    let eject = Path::new("EJCT");
    let eject = Store::new(&eject, &bit);
    [
        encoded(&Method::new("_STA".into(), 0, false, vec![&status])),
        serialized_method("_EJ0", 1, vec![&eject]),
    ]
}

/// `STAT (bit)`: `_STA` of a place.
fn status_method() -> Encoded {
    let present = encoded(&Return::new(&STATUS_PRESENT));
    let test = encoded(&And::new(&ZERO, &Path::new("PRES"), &Arg(0)));
    let test = If::new(&test, vec![&present]);
    let absent = Return::new(&ZERO);
    encoded(&Method::new("STAT".into(), 1, false, vec![&test, &absent]))
}

/// `NOTI (places, value)`: notifies the places whose bits are set.
fn notify_method(places: impl Iterator<Item = (String, u32)>) -> Encoded {
    let places: Vec<Encoded> = places
        .map(|(name, bit)| if_any(&Arg(0), bit, &notify(&name, &Arg(1))))
        .collect();
    serialized_method("NOTI", 2, refs(&places))
}

/// `SCAN ()`: takes what is pending in this block and passes it on. Those that came go first, so that one which is to
/// go at once is known.
fn scan_method() -> Encoded {
    let mut body = Vec::new();
    for (register, value) in [("CHCK", DEVICE_CHECK), ("EJRQ", EJECT_REQUESTED)] {
        let register = Path::new(register);
        body.push(encoded(&Store::new(&Local(0), &register)));
        body.push(encoded(&Store::new(&register, &Local(0))));
        let notify = MethodCall::new("NOTI".into(), vec![&Local(0), &value]);
        body.push(encoded(&notify));
    }
    serialized_method("SCAN", 0, refs(&body))
}

/// Looks at a register of pending blocks: bit n stands for the n-th of `holders`, which are scanned.
fn look(pending: &str, holders: impl Iterator<Item = String>) -> Vec<Encoded> {
    let mut body = vec![encoded(&Store::new(&Local(0), &Path::new(pending)))];
    body.extend((0u32..).zip(holders).map(|(number, holder)| {
        let scan = format!("\\_SB_.{holder}.SCAN");
        let scan = MethodCall::new(Path::new(&scan), Vec::new());
        if_any(&Local(0), 1 << number, &scan)
    }));
    body
}

/// The generic event device: what the interrupt of the hotplug registers means. `bridges` and `boards` hold PCI slots and
/// processors, a block each, in order.
pub(super) fn event_device(
    hotplug: HotplugDescription,
    bridges: impl Iterator<Item = String>,
    boards: impl Iterator<Item = String>,
) -> Encoded {
    // Consumer, edge-triggered, active high, not shared.
    let interrupt = Interrupt::new(true, true, false, false, hotplug.gsi);
    let of_slots = [(*b"PEND", PENDING), (*b"BUTN", BUTTON)];
    let of_processors = [(*b"PROC", PENDING)];
    let mut body = look("PEND", bridges);
    body.extend(look("PROC", boards));
    let button = Path::new("BUTN");
    let seen = encoded(&Store::new(&button, &POWER_BUTTON));
    let pressed = notify("\\_SB_.PWRB", &BUTTON_PRESSED);
    let test = And::new(&ZERO, &button, &POWER_BUTTON);
    body.push(encoded(&If::new(&test, vec![&seen, &pressed])));
    device(
        "GED_",
        &[
            encoded(&Name::new("_HID".into(), &"ACPI0013")),
            name("_UID", &ZERO),
            crs(vec![&interrupt]),
            registers("REGS", hotplug.slots, BLOCK, &of_slots),
            registers("PRGS", hotplug.processors, BLOCK, &of_processors),
            serialized_method("_EVT", 1, refs(&body)),
        ],
    )
}

/// The power button, which is pressed through the event device.
pub(super) fn power_button() -> Encoded {
    device("PWRB", &[hid("PNP0C0C"), name("_UID", &ZERO)])
}
