//! Which vCPUs and which memory are near each other (SRAT), and how near (SLIT).

use acpi_tables::slit::SLIT;
use acpi_tables::srat::{MemoryAffinity, SRAT};
use acpi_tables::{Aml, AmlSink};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE};

/// Distance between different nodes where nothing is said; ACPI's own scale has 10 for "local".
const REMOTE: u8 = 20;

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeMemory {
    /// First guest-physical address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

/// A guest NUMA node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Proximity domain.
    pub id: u32,
    /// Its vCPUs.
    pub apic_ids: Vec<u8>,
    /// Memory.
    pub memory: Vec<NodeMemory>,
    /// (other node, distance from 10 to 254).
    pub distances: Vec<(u32, u8)>,
}

/// Processor local APIC affinity, ACPI 6.5, table 5.50; `acpi_tables` has no type for it.
struct LocalApicAffinity {
    domain: u32,
    apic_id: u8,
}

impl Aml for LocalApicAffinity {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const KIND: u8 = 0;
        const LENGTH: u8 = 16;
        const ENABLED: u32 = 1;
        let [low, high @ ..] = self.domain.to_le_bytes();
        sink.vec(&[KIND, LENGTH, low, self.apic_id]);
        sink.dword(ENABLED);
        sink.byte(0); // local SAPIC EID
        sink.vec(&high);
        sink.dword(0); // clock domain
    }
}

/// The table, with the processors the crate can't add: its sums are redone for the whole.
pub(super) fn build(nodes: &[Node]) -> impl Aml {
    let mut srat = SRAT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    for node in nodes {
        for range in &node.memory {
            srat.add_memory_affinity(
                MemoryAffinity::new(node.id, range.base, range.size).enabled(),
            );
        }
    }
    let mut bytes = super::serialise(&srat);
    for node in nodes {
        for &apic_id in &node.apic_ids {
            bytes.extend(super::serialise(&LocalApicAffinity {
                domain: node.id,
                apic_id,
            }));
        }
    }
    let length = u32::try_from(bytes.len()).expect("a few hundred entries of 40 bytes");
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    bytes[9] = 0;
    bytes[9] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    Raw(bytes)
}

struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Rows and columns of the distance table: node ids need not be dense.
pub(super) fn localities(nodes: &[Node]) -> u32 {
    nodes.iter().map(|node| node.id + 1).max().unwrap_or(0)
}

/// A distance given for one direction holds for both, unless the other is given too.
pub(super) fn distances(nodes: &[Node], mut slit: SLIT) -> impl Aml {
    let count = localities(nodes);
    for a in 0..count {
        for b in a + 1..count {
            slit.set_distance(a as usize, b as usize, distance(nodes, a, b));
        }
    }
    slit
}

fn distance(nodes: &[Node], a: u32, b: u32) -> u8 {
    let given = |from: u32, to: u32| {
        let node = nodes.iter().find(|node| node.id == from)?;
        node.distances
            .iter()
            .find(|(other, _)| *other == to)
            .map(|(_, distance)| *distance)
    };
    given(a, b).or_else(|| given(b, a)).unwrap_or(REMOTE)
}
