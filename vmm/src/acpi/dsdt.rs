//! The DSDT: the devices that are not on a discoverable bus, and the sleep states.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
    ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE};
use crate::devices::{cmos, power, serial};

/// Header only; ACPI 6.5, 5.2.6.
const HEADER: u32 = 36;
/// With 64-bit integers.
const REVISION: u8 = 6;

pub(super) fn build(description: &Description) -> impl Aml {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, REVISION, OEM_ID, OEM_TABLE, OEM_REVISION);
    system_bus(description, &mut dsdt);
    let soft_off = Package::new(vec![&power::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &soft_off).to_aml_bytes(&mut dsdt);
    Finished(dsdt)
}

struct Finished(Sdt);

impl Aml for Finished {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

fn system_bus(description: &Description, sink: &mut dyn AmlSink) {
    let ecam_base =
        u32::try_from(description.ecam.base).expect("configuration space is below 4 GiB by layout");
    let ecam_size = u32::try_from(description.ecam.size()).expect("at most 256 buses of 1 MiB");
    let ecam = Memory32Fixed::new(true, ecam_base, ecam_size);
    let power = ports(power::ACPI_PORTS, power::ACPI_PORT_COUNT);
    // Reserves what no other device claims: configuration space and the power registers.
    device("MBRD", "PNP0C02", vec![&ecam, &power], sink);
    device(
        "RTC_",
        "PNP0B00",
        vec![&ports(cmos::PORTS, cmos::PORT_COUNT)],
        sink,
    );
    if description.serial_port {
        // Consumer, edge-triggered, active high, not shared.
        let interrupt = Interrupt::new(true, true, false, false, serial::GSI);
        device(
            "COM1",
            "PNP0501",
            vec![&interrupt, &ports(serial::PORTS, serial::PORT_COUNT)],
            sink,
        );
    }
}

fn ports(first: u16, count: u16) -> IO {
    IO::new(
        first,
        first,
        1,
        u8::try_from(count).expect("a handful of ports"),
    )
}

/// A device of the system bus with its identity and its resources.
fn device(name: &str, id: &str, resources: Vec<&dyn Aml>, sink: &mut dyn AmlSink) {
    let hid_value = EISAName::new(id);
    let hid = Name::new("_HID".into(), &hid_value);
    let uid = Name::new("_UID".into(), &ZERO);
    let crs_value = ResourceTemplate::new(resources);
    let crs = Name::new("_CRS".into(), &crs_value);
    let device = Device::new(name.into(), vec![&hid, &uid, &crs]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(sink);
}
