//! PCI to ACPI: a host bridge for each segment, and its hotplug slots (`hotplug.rs` says how they fill and empty).
//!
//! No `_OSC`: the platform keeps control, so Linux uses ACPI hotplug (acpiphp), which wants `_ADR`, `_EJ0`, `_STA` and
//! `_SUN` of every slot. `_PRT` says which interrupt pin A of a slot is; function 0 of a slot is all there is, and it has
//! no other pin.
//! Sources: ACPI 6.5, 6.3, 6.5; PCI Firmware 3.3, 4.1.3 and 4.2.

use acpi_tables::Aml;
use acpi_tables::aml::{AddressSpace, AddressSpaceCacheable, EISAName, IO, ONE, Package, ZERO};

use super::HotplugDescription;
use super::aml::{Encoded, crs, device, encoded, hid, name, refs};
use super::hotplug::{block_terms, place_methods};
use crate::devices::places;
use crate::pci::{
    CONFIG_PORT_COUNT, CONFIG_PORTS, HOST_BRIDGE_SLOT, SLOTS, SegmentLayout, Window, pin_gsi,
};

/// `\_SB.PCnn` for a segment.
pub(super) fn bridge_name(segment: &SegmentLayout) -> String {
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
    let base = hotplug.slots + places::block(segment.number);
    let slots = hotplug_slots().map(|slot| (slot_name(slot), 1 << slot));
    let mut children = vec![
        hid("PNP0A08"),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_UID", &segment.number),
        name("_SEG", &segment.number),
        name("_BBN", &ZERO),
        name("_CCA", &ONE),
        windows(segment),
        pins(),
    ];
    children.extend(block_terms(base, slots));
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

fn slot(segment: u16, number: u8) -> Encoded {
    let bit = 1u32 << number;
    // Device in the upper half, function in the lower.
    let address = u32::from(number) << 16;
    // A number of its own in the whole machine: Linux names slots by it.
    let user_number = u32::from(segment) * u32::from(SLOTS) + u32::from(number);
    let mut children = vec![name("_ADR", &address), name("_SUN", &user_number)];
    children.extend(place_methods(bit));
    device(&slot_name(number), &children)
}
