//! The ACPI tables of the machine: what it has, told to a guest that can't probe for it.
//!
//! Hardware-reduced ACPI (ACPI 6.5, 4.1): no fixed PM blocks, no 8259, no PIT; power-off and reset are the registers
//! of [`crate::devices::power`]. Tables are pure data: the same inputs give the same bytes. Bytes come from
//! `acpi_tables`; the one structure that crate lacks (SRAT local APIC affinity) is declared in `srat.rs`.

mod aml;
mod dsdt;
mod hotplug;
mod pci;
mod processors;
mod srat;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::slit::SLIT;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;

pub use srat::{Node, NodeMemory};

use crate::devices::{cmos, power};
use crate::pci::SegmentLayout;

/// Where the local APICs of all vCPUs are, SDM vol. 3A, 12.4.1.
const LOCAL_APIC: u32 = 0xfee0_0000;
/// Where KVM's I/O APIC is.
const IO_APIC: u32 = 0xfec0_0000;

/// Bus 0 is all there is in a segment.
const LAST_BUS: u8 = 0;

const OEM_ID: [u8; 6] = *b"DAXHND";
const OEM_TABLE: [u8; 8] = *b"DAXHUND ";
const OEM_REVISION: u32 = 1;

/// FADT `IAPC_BOOT_ARCH`, ACPI 6.5, table 5.11: there are devices on the LPC bus (COM1), there is no VGA. The 8042
/// bit stays clear: only its reset line exists.
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// The hotplug registers and the interrupt they raise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HotplugDescription {
    /// Guest-physical address of those of PCI slots, below 4 GiB.
    pub slots: u64,
    /// Of those of processors, below 4 GiB.
    pub processors: u64,
    /// Global system interrupt, edge-triggered, active high.
    pub gsi: u32,
}

/// What the tables tell.
#[derive(Debug, Clone)]
pub struct Description {
    /// vCPUs that run from the start.
    pub boot_cpus: u8,
    /// APIC ids of the vCPUs that may ever exist, by number.
    pub apic_ids: Vec<u8>,
    /// PCI segments.
    pub segments: Vec<SegmentLayout>,
    /// How PCI devices and processors come and go.
    pub hotplug: HotplugDescription,
    /// Whether there is a COM1.
    pub serial_port: bool,
    /// NUMA nodes; empty for none.
    pub nodes: Vec<Node>,
}

/// The tables as they go to guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Where they begin; the root pointer (RSDP) is the first of them.
    pub address: u64,
    /// All of them.
    pub bytes: Vec<u8>,
}

/// They do not fit.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "the ACPI tables take {needed} bytes, there is room for {room}; use fewer vCPUs or NUMA nodes"
)]
pub struct TablesTooLarge {
    /// Bytes they take.
    pub needed: usize,
    /// Bytes there are.
    pub room: usize,
}

/// Builds the tables for a place in guest memory.
pub fn build(
    description: &Description,
    address: u64,
    room: usize,
) -> Result<Tables, TablesTooLarge> {
    // The root pointer comes first and names the XSDT, which names the others: so they are laid out first and the
    // root pointer is written into the room kept for it.
    let mut area = Area {
        address,
        bytes: vec![0; Rsdp::len().next_multiple_of(ALIGN)],
    };
    let dsdt = area.place(&dsdt::build(description));
    let mut entries = vec![
        area.place(&fadt(dsdt)),
        area.place(&madt(description)),
        area.place(&mcfg(&description.segments)),
    ];
    if !description.nodes.is_empty() {
        entries.push(area.place(&srat::build(&description.nodes)));
        entries.push(area.place(&slit(&description.nodes)));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = area.place(&xsdt);
    let pointer = serialise(&Rsdp::new(OEM_ID, xsdt));
    area.bytes[..pointer.len()].copy_from_slice(&pointer);
    if area.bytes.len() > room {
        return Err(TablesTooLarge {
            needed: area.bytes.len(),
            room,
        });
    }
    Ok(Tables {
        address,
        bytes: area.bytes,
    })
}

const ALIGN: usize = 16;

struct Area {
    address: u64,
    bytes: Vec<u8>,
}

impl Area {
    fn place(&mut self, table: &dyn Aml) -> u64 {
        let address = self.address + self.bytes.len() as u64;
        self.bytes.extend(serialise(table));
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        address
    }
}

fn serialise(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    fadt.iapc_boot_arch = (BOOT_ARCH_LEGACY_DEVICES | BOOT_ARCH_NO_VGA).into();
    fadt.century = cmos::CENTURY;
    fadt.reset_reg = port(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(description: &Description) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC),
    );
    for (cpu, apic_id) in (0u8..).zip(&description.apic_ids) {
        let status = if cpu < description.boot_cpus {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        madt.add_structure(ProcessorLocalApic::new(cpu, *apic_id, status));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn mcfg(segments: &[SegmentLayout]) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    for segment in segments {
        mcfg.add_ecam(segment.ecam.base(), segment.number, 0, LAST_BUS);
    }
    mcfg
}

fn slit(nodes: &[Node]) -> impl Aml {
    srat::distances(
        nodes,
        SLIT::new(OEM_ID, OEM_TABLE, OEM_REVISION, srat::localities(nodes)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{LayoutRequest, PciLayout};

    const ADDRESS: u64 = 0xe_0000;

    fn segments(segments: u16) -> Vec<SegmentLayout> {
        let request = LayoutRequest {
            segments,
            address_bits: 40,
            ram_end: 1 << 30,
        };
        PciLayout::new(request).unwrap().segments
    }

    fn description() -> Description {
        Description {
            boot_cpus: 2,
            apic_ids: vec![0, 2, 3],
            segments: segments(1),
            hotplug: HotplugDescription {
                slots: 0xe900_0000,
                processors: 0xe900_1000,
                gsi: 5,
            },
            serial_port: true,
            nodes: vec![
                Node {
                    id: 0,
                    apic_ids: vec![0],
                    memory: vec![NodeMemory {
                        base: 0,
                        size: 1 << 30,
                    }],
                    distances: vec![(1, 25)],
                },
                Node {
                    id: 1,
                    apic_ids: vec![2, 3],
                    memory: vec![NodeMemory {
                        base: 1 << 30,
                        size: 1 << 30,
                    }],
                    distances: vec![],
                },
            ],
        }
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Walks RSDP, XSDT and every table it names: (signature, bytes).
    fn walk(tables: &Tables) -> Vec<(String, Vec<u8>)> {
        let table = |address: u64| {
            let start = usize::try_from(address - tables.address).unwrap();
            let len =
                u32::from_le_bytes(tables.bytes[start + 4..start + 8].try_into().unwrap()) as usize;
            let bytes = tables.bytes[start..start + len].to_vec();
            (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
        };
        assert_eq!(&tables.bytes[..8], b"RSD PTR ");
        let (signature, xsdt) = table(u64_at(&tables.bytes, 24));
        assert_eq!(signature, "XSDT");
        let mut all: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(u64_at(entry, 0)))
            .collect();
        let fadt = &all.iter().find(|(s, _)| s == "FACP").unwrap().1;
        all.push(table(u64_at(fadt, 140)));
        all
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        let tables = build(&description(), ADDRESS, 0x2_0000).unwrap();
        let all = walk(&tables);
        let names: Vec<&str> = all.iter().map(|(s, _)| s.as_str()).collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG", "SRAT", "SLIT", "DSDT"]);
        for (name, bytes) in &all {
            assert_eq!(
                bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b)),
                0,
                "{name}"
            );
        }
    }

    #[test]
    fn processors_beyond_boot_can_come_online_later() {
        let tables = build(&description(), ADDRESS, 0x2_0000).unwrap();
        let madt = walk(&tables)
            .into_iter()
            .find(|(s, _)| s == "APIC")
            .unwrap()
            .1;
        let flags: Vec<u8> = (0..3).map(|cpu| madt[44 + cpu * 8 + 4]).collect();
        assert_eq!(flags, [1, 1, 2]);
        let ids: Vec<u8> = (0..3).map(|cpu| madt[44 + cpu * 8 + 3]).collect();
        assert_eq!(ids, [0, 2, 3]);
    }

    #[test]
    fn distances_are_symmetric_and_default_to_twenty() {
        let mut description = description();
        let slit = |d: &Description| {
            let tables = build(d, ADDRESS, 0x2_0000).unwrap();
            walk(&tables)
                .into_iter()
                .find(|(s, _)| s == "SLIT")
                .unwrap()
                .1[44..]
                .to_vec()
        };
        assert_eq!(slit(&description), [10, 25, 25, 10]);
        description.nodes[0].distances.clear();
        assert_eq!(slit(&description), [10, 20, 20, 10]);
    }

    #[test]
    fn every_segment_has_configuration_space_a_root_and_slots() {
        let mut description = description();
        description.segments = segments(16);
        let room = 0x1_f000;
        let tables = walk(&build(&description, ADDRESS, room).unwrap());
        let table = |name| &tables.iter().find(|(s, _)| s == name).unwrap().1;
        let mcfg = table("MCFG");
        for (entry, number) in mcfg[44..].chunks(16).zip(0u8..) {
            assert_eq!(u64_at(entry, 0), 0xe800_0000 + (u64::from(number) << 20));
            assert_eq!(entry[8..12], [number, 0, 0, 0], "segment, buses 0 to 0");
        }
        let dsdt = table("DSDT");
        let count = |name: &[u8; 4]| dsdt.windows(4).filter(|at| at == name).count();
        assert_eq!(mcfg.len(), 44 + 16 * 16);
        assert_eq!(
            (count(b"_SEG"), count(b"_SUN"), count(b"_EJ0")),
            (16, 16 * 31, 16 * 31 + 3)
        );
        assert_eq!((count(b"_EVT"), count(b"PWRB")), (1, 2));
        // Defined in its device, and called by the event device.
        assert_eq!((count(b"PC0F"), count(b"SCAN")), (2, 32 + 2));
    }

    #[test]
    fn every_processor_has_a_place_with_its_entry_and_its_node() {
        let mut description = description();
        let dsdt = |description: &Description| {
            let tables = walk(&build(description, ADDRESS, 0x1_f000).unwrap());
            tables.into_iter().find(|(s, _)| s == "DSDT").unwrap().1
        };
        let bytes = dsdt(&description);
        let count = |what: &[u8]| bytes.windows(what.len()).filter(|at| *at == what).count();
        for processor in [b"C000", b"C001", b"C002"] {
            // Defined, and notified.
            assert_eq!(count(processor), 2);
        }
        assert_eq!(
            (count(b"C003"), count(b"ACPI0007"), count(b"ACPI0010")),
            (0, 3, 1)
        );
        // Type 0, 8 bytes, number, APIC id, enabled.
        assert_eq!(count(&[0, 8, 1, 2, 1, 0, 0, 0]), 1);
        // On node 0: the host bridge and the first processor. `_PXM` is a name (8) with an integer (0, 1).
        assert_eq!((count(b"\x08_PXM\x00"), count(b"\x08_PXM\x01")), (2, 2));

        description.nodes.clear();
        description.segments = segments(16);
        description.apic_ids = (0..254).collect();
        let bytes = dsdt(&description);
        let count = |what: &[u8]| bytes.windows(what.len()).filter(|at| *at == what).count();
        assert_eq!(
            (count(b"_PXM"), count(b"ACPI0007"), count(b"ACPI0010")),
            (0, 254, 8)
        );
        // Defined in its device, and called by the event device.
        assert_eq!((count(b"CPB7"), count(b"SCAN")), (2, 32 + 16));
    }

    #[test]
    fn room_is_checked() {
        let error = build(&description(), ADDRESS, 100).unwrap_err();
        assert_eq!(error.room, 100);
        assert!(error.needed > 100);
    }
}
