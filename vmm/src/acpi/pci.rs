//! PCI to ACPI: a host bridge for each segment, its hotplug slots, and the event device that tells of them.
//!
//! ```text
//!   interrupt ─▶ \_SB.GED._EVT ─┬─ PENDING bit n ─▶ \_SB.PCnn.SCAN ─▶ CHECK, EJECT_REQUEST ─▶ Notify (Snn, 1 or 3)
//!                               └─ BUTTON ─▶ Notify (\_SB.PWRB, 0x80)
//!   Snn._STA reads PRESENT, Snn._EJ0 writes EJECT
//! ```
//! Each segment has registers of its own, so there is nothing to select and no lock around it; a scan is serialized so
//! that two events do not notify twice. A scan writes back what it has read before it notifies: that is what makes
//! [`Hotplug`](crate::pci::Hotplug) lose nothing.
//!
//! No `_OSC`: the platform keeps control, so Linux uses ACPI hotplug (acpiphp), which wants `_ADR`, `_EJ0`, `_STA` and
//! `_SUN` of every slot. `_PRT` says which interrupt pin A of a slot is; function 0 of a slot is all there is, and it has
//! no other pin.
//! Sources: ACPI 6.5, 5.6.6, 5.6.9, 6.3, 6.5; PCI Firmware 3.3, 4.1.3 and 4.2.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, EISAName, IO, If, Interrupt, Local, Method,
    MethodCall, Name, ONE, Package, Path, Return, Store, ZERO,
};

use super::HotplugDescription;
use super::aml::{
    Encoded, crs, device, encoded, hid, if_any, name, notify, refs, registers, serialized_method,
};
use crate::pci::hotplug::{
    self, BLOCK, BUTTON, CHECK, EJECT, EJECT_REQUEST, PENDING, POWER_BUTTON, PRESENT,
};
use crate::pci::{
    CONFIG_PORT_COUNT, CONFIG_PORTS, HOST_BRIDGE_SLOT, SLOTS, SegmentLayout, Window, pin_gsi,
};

/// Notification values, ACPI 6.5, 5.6.6.
const DEVICE_CHECK: u32 = 1;
const EJECT_REQUESTED: u32 = 3;
const BUTTON_PRESSED: u32 = 0x80;
/// Present, enabled, shown, functioning.
const STATUS_PRESENT: u32 = 0xf;

/// `\_SB.PCnn` for a segment.
fn bridge_name(segment: &SegmentLayout) -> String {
    format!("PC{:02X}", segment.number)
}

fn slot_name(slot: u8) -> String {
    format!("S{slot:02}_")
}

fn hotplug_slots() -> impl Iterator<Item = u8> {
    HOST_BRIDGE_SLOT + 1..SLOTS
}

/// The host bridge of a segment with its slots. `node` is its NUMA node, where there are nodes: Linux warns when it is not
/// told.
pub(super) fn host_bridge(
    segment: &SegmentLayout,
    hotplug: HotplugDescription,
    node: Option<u32>,
) -> Encoded {
    let base = hotplug.registers + hotplug::block(segment.number);
    let fields = [
        (*b"CHCK", CHECK),
        (*b"EJRQ", EJECT_REQUEST),
        (*b"PRES", PRESENT),
        (*b"EJCT", EJECT),
    ];
    let mut children = vec![
        hid("PNP0A08"),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_UID", &segment.number),
        name("_SEG", &segment.number),
        name("_BBN", &ZERO),
        name("_CCA", &ONE),
        windows(segment),
        registers("REGS", base, BLOCK, &fields),
        pins(),
        status_method(),
        notify_method(),
        scan_method(),
    ];
    children.extend(node.map(|node| name("_PXM", &node)));
    children.extend(hotplug_slots().map(|number| slot(segment.number, number)));
    device(&bridge_name(segment), &children)
}

fn windows(segment: &SegmentLayout) -> Encoded {
    let bus = AddressSpace::new_bus_number(0u16, 0);
    let mut resources: Vec<&dyn Aml> = vec![&bus];
    let count = u8::try_from(CONFIG_PORT_COUNT).expect("8 ports");
    let ports = IO::new(CONFIG_PORTS, CONFIG_PORTS, 1, count);
    if segment.number == 0 {
        resources.push(&ports);
    }
    let low = (segment.mmio32.size() != 0).then(|| {
        let edge = |address| u32::try_from(address).expect("below 4 GiB by layout");
        let (first, last) = (edge(segment.mmio32.base()), edge(last(segment.mmio32)));
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
    });
    resources.extend(low.as_ref().map(|low| low as &dyn Aml));
    // Not called prefetchable: Linux puts a BAR that isn't only where no window says it is.
    let high = (segment.mmio64.size() != 0).then(|| {
        let (first, last) = (segment.mmio64.base(), last(segment.mmio64));
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None)
    });
    resources.extend(high.as_ref().map(|high| high as &dyn Aml));
    crs(resources)
}

fn last(window: Window) -> u64 {
    window.end() - 1
}

/// `_PRT`: a row for each slot, ACPI 6.5, 6.2.13. All functions of the device, pin A, no link device, the interrupt.
fn pins() -> Encoded {
    let rows: Vec<Encoded> = hotplug_slots()
        .map(|slot| {
            let address = u32::from(slot) << 16 | 0xffff;
            let gsi = pin_gsi(slot);
            encoded(&Package::new(vec![&address, &ZERO, &ZERO, &gsi]))
        })
        .collect();
    name("_PRT", &Package::new(refs(&rows)))
}

/// `STAT (bit)`: `_STA` of a slot.
fn status_method() -> Encoded {
    let present = encoded(&Return::new(&STATUS_PRESENT));
    let test = encoded(&And::new(&ZERO, &Path::new("PRES"), &Arg(0)));
    let test = If::new(&test, vec![&present]);
    let absent = Return::new(&ZERO);
    encoded(&Method::new("STAT".into(), 1, false, vec![&test, &absent]))
}

/// `NOTI (slots, value)`: notifies the slots whose bits are set.
fn notify_method() -> Encoded {
    let slots: Vec<Encoded> = hotplug_slots()
        .map(|slot| if_any(&Arg(0), 1 << slot, &notify(&slot_name(slot), &Arg(1))))
        .collect();
    serialized_method("NOTI", 2, refs(&slots))
}

/// `SCAN ()`: takes what is pending in this segment and passes it on. Those that came go first, so that one which is to
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

fn slot(segment: u16, number: u8) -> Encoded {
    let bit = 1u32 << number;
    // Device in the upper half, function in the lower.
    let address = u32::from(number) << 16;
    // A number of its own in the whole machine: Linux names slots by it.
    let user_number = u32::from(segment) * u32::from(SLOTS) + u32::from(number);
    let status = MethodCall::new("STAT".into(), vec![&bit]);
    let status = Return::new(&status);
    let eject = Path::new("EJCT");
    let eject = Store::new(&eject, &bit);
    device(
        &slot_name(number),
        &[
            name("_ADR", &address),
            name("_SUN", &user_number),
            encoded(&Method::new("_STA".into(), 0, false, vec![&status])),
            serialized_method("_EJ0", 1, vec![&eject]),
        ],
    )
}

/// The generic event device: what the interrupt of the hotplug registers means.
pub(super) fn event_device(segments: &[SegmentLayout], hotplug: HotplugDescription) -> Encoded {
    // Consumer, edge-triggered, active high, not shared.
    let interrupt = Interrupt::new(true, true, false, false, hotplug.gsi);
    let fields = [(*b"PEND", PENDING), (*b"BUTN", BUTTON)];
    let mut body = vec![encoded(&Store::new(&Local(0), &Path::new("PEND")))];
    body.extend(segments.iter().map(|segment| {
        let scan = format!("\\_SB_.{}.SCAN", bridge_name(segment));
        let scan = MethodCall::new(Path::new(&scan), Vec::new());
        if_any(&Local(0), 1 << segment.number, &scan)
    }));
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
            registers("REGS", hotplug.registers, BLOCK, &fields),
            serialized_method("_EVT", 1, refs(&body)),
        ],
    )
}

/// The power button, which is pressed through the event device.
pub(super) fn power_button() -> Encoded {
    device("PWRB", &[hid("PNP0C0C"), name("_UID", &ZERO)])
}
