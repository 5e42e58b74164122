//! Processors to ACPI: all that the guest may ever have, on boards of 32, as places that fill and empty.
//!
//! Which of them run from the start, and which can come, is the MADT's to say; here is how they come and go. A processor
//! is known by its `_UID`, the same as in the MADT. `_MAT` is its MADT entry as it is once the processor is there: Linux
//! takes one that isn't enabled for one that isn't there.
//! Sources: ACPI 6.5, 8.4, 6.2.10, 6.2.15; 5.2.12.2 (the entry).

use acpi_tables::aml::{BufferData, Name};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::aml::{Encoded, device, encoded, name};
use super::hotplug::{block_terms, place_methods};
use super::{Description, serialise};
use crate::devices::places;
use crate::devices::processors::BLOCK_PROCESSORS;

/// Names of the boards in `\_SB`, in order.
pub(super) fn board_names(description: &Description) -> impl Iterator<Item = String> {
    let count = description.apic_ids.len();
    (0..count.div_ceil(BLOCK_PROCESSORS.into())).map(|number| format!("CPB{number}"))
}

fn processor_name(processor: u8) -> String {
    format!("C{processor:03}")
}

/// The boards with their processors.
pub(super) fn boards(description: &Description) -> Vec<Encoded> {
    let all: Vec<(u8, u8)> = (0..).zip(description.apic_ids.iter().copied()).collect();
    let blocks = all.chunks(BLOCK_PROCESSORS.into());
    (0..)
        .zip(blocks)
        .zip(board_names(description))
        .map(|((number, processors), name)| board(description, number, &name, processors))
        .collect()
}

/// A container of processors with those numbers and APIC ids.
fn board(
    description: &Description,
    number: u8,
    board_name: &str,
    processors: &[(u8, u8)],
) -> Encoded {
    let base = description.hotplug.processors + places::block(number.into());
    let mut children = vec![
        encoded(&Name::new("_HID".into(), &"ACPI0010")),
        name("_UID", &number),
    ];
    let named = processors.iter();
    let named = named.map(|(processor, _)| (processor_name(*processor), bit(*processor)));
    children.extend(block_terms(base, named));
    children.extend(
        processors
            .iter()
            .map(|(processor, apic_id)| device_of(description, *processor, *apic_id)),
    );
    device(board_name, &children)
}

fn bit(processor: u8) -> u32 {
    1 << (processor % BLOCK_PROCESSORS)
}

fn device_of(description: &Description, processor: u8, apic_id: u8) -> Encoded {
    let entry = ProcessorLocalApic::new(processor, apic_id, EnabledStatus::Enabled);
    let mut children = vec![
        encoded(&Name::new("_HID".into(), &"ACPI0007")),
        name("_UID", &processor),
        name("_MAT", &BufferData::new(serialise(&entry))),
    ];
    children.extend(place_methods(bit(processor)));
    let mut nodes = description.nodes.iter();
    let node = nodes.find(|node| node.apic_ids.contains(&apic_id));
    children.extend(node.map(|node| name("_PXM", &node.id)));
    device(&processor_name(processor), &children)
}
