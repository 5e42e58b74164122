//! The DSDT: the devices that are not on a discoverable bus, PCI's roots and slots, processors, and the sleep states.

use acpi_tables::aml::{IO, Interrupt, Memory32Fixed, Name, Package, Path, Scope, ZERO};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::aml::{Encoded, crs, device, hid, name, refs};
use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE, hotplug, pci, processors, serialise};
use crate::devices::{cmos, places, power, serial};
use crate::pci::Window;

/// Header only; ACPI 6.5, 5.2.6.
const HEADER: u32 = 36;
/// With 64-bit integers.
const REVISION: u8 = 6;

pub(super) fn build(description: &Description) -> impl Aml {
    let devices = system_bus(description);
    let soft_off = Package::new(vec![&power::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    let mut body = serialise(&Scope::new(Path::new("\\_SB_"), refs(&devices)));
    body.extend(serialise(&Name::new("_S5_".into(), &soft_off)));
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, REVISION, OEM_ID, OEM_TABLE, OEM_REVISION);
    // At once: the crate sums up the whole table for each piece it is given.
    dsdt.append_slice(&body);
    Finished(dsdt)
}

struct Finished(Sdt);

impl Aml for Finished {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

fn system_bus(description: &Description) -> Vec<Encoded> {
    let mut devices = vec![
        motherboard(description),
        simple(
            "RTC_",
            "PNP0B00",
            vec![&ports(cmos::PORTS, cmos::PORT_COUNT)],
        ),
    ];
    if description.serial_port {
        // Consumer, edge-triggered, active high, not shared.
        let interrupt = Interrupt::new(true, true, false, false, serial::GSI);
        let ports = ports(serial::PORTS, serial::PORT_COUNT);
        devices.push(simple("COM1", "PNP0501", vec![&interrupt, &ports]));
    }
    // The devices are of the VMM, which is as near to one node as to another.
    let node = description.nodes.first().map(|node| node.id);
    let bridges = description.segments.iter();
    devices.extend(bridges.map(|segment| pci::host_bridge(segment, description.hotplug, node)));
    devices.extend(processors::boards(description));
    devices.push(hotplug::power_button());
    devices.push(hotplug::event_device(
        description.hotplug,
        description.segments.iter().map(pci::bridge_name),
        processors::board_names(description),
    ));
    devices
}

/// Reserves what no other device claims: configuration space (which Linux does not use where it is not reserved), the
/// hotplug and the power registers.
fn motherboard(description: &Description) -> Encoded {
    let hotplug = description.hotplug;
    let windows = [
        Window::new(hotplug.slots, places::WINDOW),
        Window::new(hotplug.processors, places::WINDOW),
    ];
    let reserved: Vec<Memory32Fixed> = description
        .segments
        .iter()
        .map(|segment| segment.ecam)
        .chain(windows.into_iter().flatten())
        .map(|window| {
            let word = |value| u32::try_from(value).expect("below 4 GiB by layout");
            Memory32Fixed::new(true, word(window.base()), word(window.size()))
        })
        .collect();
    let power = ports(power::ACPI_PORTS, power::ACPI_PORT_COUNT);
    let mut resources: Vec<&dyn Aml> = vec![&power];
    resources.extend(reserved.iter().map(|window| window as &dyn Aml));
    simple("MBRD", "PNP0C02", resources)
}

fn ports(first: u16, count: u16) -> IO {
    IO::new(
        first,
        first,
        1,
        u8::try_from(count).expect("a handful of ports"),
    )
}

/// A device that has an identity and resources, nothing else.
fn simple(path: &str, id: &str, resources: Vec<&dyn Aml>) -> Encoded {
    device(path, &[hid(id), name("_UID", &ZERO), crs(resources)])
}
