//! `--numa`: the guest's NUMA nodes, which ACPI tells it in SRAT and SLIT.
//!
//! Linux drops the whole topology when RAM is in no node or a distance is out of its rules, so both
//! are refused here instead of being lost in the guest.

use std::collections::HashMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::json::{JsonObject, NotBuilt, Shape};
use super::schema::as_sent;
use super::{CpusConfig, Key, MAX_VCPUS, MemoryConfig, Word, WordError};

/// Node identifiers are below this: SLIT is a square table with a row for every number up to the
/// highest, and a default x86-64 kernel knows this many nodes.
pub const MAX_NUMA_NODES: u32 = 64;

/// Distance of a node to itself, fixed by ACPI.
const LOCAL_DISTANCE: u8 = 10;
/// ACPI's 255 means unreachable.
const MAX_DISTANCE: u8 = 254;

/// One guest NUMA node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct NumaConfig {
    /// The node's number in the guest.
    pub guest_numa_id: u32,
    /// vCPUs of the node.
    #[serde(default)]
    pub cpus: Vec<u32>,
    /// How far other nodes are.
    #[serde(default)]
    pub distances: Vec<NumaDistance>,
    /// Memory zones of the node, by id.
    #[serde(default)]
    pub memory_zones: Vec<String>,
}

impl JsonObject for NumaConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::empty("pci_segments"),
            NotBuilt::empty("device_id"),
        ],
        ..Shape::WHOLE
    };
}

/// How far a node is, in ACPI's units: 10 is local.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NumaDistance {
    /// The other node.
    pub destination: u32,
    /// 11 to 254; 10 to itself.
    pub distance: u8,
}

/// A NUMA topology that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NumaError {
    /// Two nodes have one number.
    #[error("--numa guest_numa_id={node} is given twice; give each node a number of its own")]
    DuplicateNode {
        /// The number.
        node: u32,
    },
    /// The number is too high.
    #[error("--numa guest_numa_id={node}: node numbers end at {}; number the nodes from 0", MAX_NUMA_NODES - 1)]
    NodeOutOfRange {
        /// The number.
        node: u32,
    },
    /// Neither vCPUs nor memory.
    #[error(
        "--numa guest_numa_id={node} has neither vCPUs nor memory; give it cpus=[..] or memory_zones=[..]"
    )]
    EmptyNode {
        /// The node.
        node: u32,
    },
    /// RAM is not in zones, so no node can have it.
    #[error("--numa needs RAM in zones; describe it with --memory-zone instead of --memory size=")]
    NoZones,
    /// No zone has this id.
    #[error(
        "--numa guest_numa_id={node}: there is no memory zone \"{zone}\"; the zones are {zones}"
    )]
    UnknownZone {
        /// The node.
        node: u32,
        /// The id given.
        zone: String,
        /// The ids there are.
        zones: String,
    },
    /// A zone is in two nodes.
    #[error(
        "--numa: memory zone \"{zone}\" is given to node {first} and again to node {second}; give it to one"
    )]
    ZoneTwice {
        /// The zone.
        zone: String,
        /// The node that has it.
        first: u32,
        /// The node that asks for it again.
        second: u32,
    },
    /// A zone is in no node.
    #[error(
        "--numa: memory zone \"{zone}\" is in no node, and a guest then ignores the whole topology; add it to a node's memory_zones=[..]"
    )]
    ZoneInNoNode {
        /// The zone.
        zone: String,
    },
    /// No such vCPU.
    #[error("--numa guest_numa_id={node}: there is no vCPU {cpu}; with --cpus max={max} they are 0 to {}", max - 1)]
    UnknownCpu {
        /// The node.
        node: u32,
        /// The vCPU given.
        cpu: u32,
        /// How many vCPUs the guest can have.
        max: u32,
    },
    /// A vCPU is in two nodes.
    #[error(
        "--numa: vCPU {cpu} is given to node {first} and again to node {second}; give it to one"
    )]
    CpuTwice {
        /// The vCPU.
        cpu: u32,
        /// The node that has it.
        first: u32,
        /// The node that asks for it again.
        second: u32,
    },
    /// The distance is to a node that is not there.
    #[error(
        "--numa guest_numa_id={node}: a distance to node {destination}, which is not defined; add --numa guest_numa_id={destination} or remove it"
    )]
    UnknownDestination {
        /// The node.
        node: u32,
        /// The node it names.
        destination: u32,
    },
    /// Two distances to one node.
    #[error("--numa guest_numa_id={node}: two distances to node {destination}; give one")]
    DistanceTwice {
        /// The node.
        node: u32,
        /// The node it names.
        destination: u32,
    },
    /// A distance no guest accepts.
    #[error(
        "--numa guest_numa_id={node}: distance {destination}@{distance} is out of range; \
         give {LOCAL_DISTANCE} to the node itself and 11 to {MAX_DISTANCE} to others"
    )]
    Distance {
        /// The node.
        node: u32,
        /// The node it names.
        destination: u32,
        /// The distance given.
        distance: u8,
    },
}

#[derive(Default)]
pub(crate) struct NumaDraft {
    id: Option<u32>,
    node: NumaConfig,
}

impl NumaConfig {
    pub(crate) const WORD: Word<NumaDraft> = Word {
        flag: "--numa",
        about: "A guest NUMA node; repeat for more",
        keys: &[
            Key::new(
                "guest_numa_id",
                "N",
                "its number, from 0 (required)",
                |draft, value| {
                    draft.id = Some(value.integer()?);
                    Ok(())
                },
            ),
            Key::new("cpus", "[N,N-N]", "its vCPUs", |draft, value| {
                draft.node.cpus = value.integers_up_to(MAX_VCPUS - 1)?;
                Ok(())
            }),
            Key::new(
                "distances",
                "[N@D,..]",
                "distance D (11-254) to node N",
                |draft, value| {
                    draft.node.distances = value.distances()?;
                    Ok(())
                },
            ),
            Key::new(
                "memory_zones",
                "[ID,..]",
                "its memory zones",
                |draft, value| {
                    let zones = value.list()?;
                    draft.node.memory_zones = zones
                        .into_iter()
                        .map(super::Value::text)
                        .collect::<Result<_, _>>()?;
                    Ok(())
                },
            ),
            Key::not_built("pci_segments"),
            Key::not_built("device_id"),
        ],
    };

    /// Reads the value of one `--numa`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut draft = NumaDraft::default();
        Self::WORD.fill(text, &mut draft)?;
        let guest_numa_id = draft.id.ok_or(WordError::MissingKey {
            flag: Self::WORD.flag,
            key: "guest_numa_id",
        })?;
        Ok(Self {
            guest_numa_id,
            ..draft.node
        })
    }
}

impl super::Value<'_> {
    fn distances(self) -> Result<Vec<NumaDistance>, super::keyvalue::Expected> {
        const EXPECTED: super::keyvalue::Expected =
            super::keyvalue::Expected("a list of node@distance such as [1@20,2@30]");
        self.list()?
            .into_iter()
            .map(|item| {
                let (destination, distance) = item.pair().ok_or(EXPECTED)?;
                Ok(NumaDistance {
                    destination: destination.integer().map_err(|_| EXPECTED)?,
                    distance: distance.integer().map_err(|_| EXPECTED)?,
                })
            })
            .collect()
    }
}

/// Checks all nodes against each other, the vCPUs and the zones.
pub(super) fn check(
    nodes: &[NumaConfig],
    cpus: &CpusConfig,
    memory: &MemoryConfig,
) -> Result<(), NumaError> {
    if nodes.is_empty() {
        return Ok(());
    }
    if memory.zones.is_empty() {
        return Err(NumaError::NoZones);
    }
    for (at, node) in nodes.iter().enumerate() {
        let id = node.guest_numa_id;
        if id >= MAX_NUMA_NODES {
            return Err(NumaError::NodeOutOfRange { node: id });
        }
        if nodes[..at].iter().any(|other| other.guest_numa_id == id) {
            return Err(NumaError::DuplicateNode { node: id });
        }
        if node.cpus.is_empty() && node.memory_zones.is_empty() {
            return Err(NumaError::EmptyNode { node: id });
        }
    }
    check_cpus(nodes, cpus.max_vcpus)?;
    check_zones(nodes, memory)?;
    check_distances(nodes)
}

fn check_cpus(nodes: &[NumaConfig], max: u32) -> Result<(), NumaError> {
    let mut owner: HashMap<u32, u32> = HashMap::new();
    for node in nodes {
        let id = node.guest_numa_id;
        for &cpu in &node.cpus {
            if cpu >= max {
                return Err(NumaError::UnknownCpu { node: id, cpu, max });
            }
            if let Some(first) = owner.insert(cpu, id) {
                return Err(NumaError::CpuTwice {
                    cpu,
                    first,
                    second: id,
                });
            }
        }
    }
    Ok(())
}

fn check_zones(nodes: &[NumaConfig], memory: &MemoryConfig) -> Result<(), NumaError> {
    let mut owner: HashMap<&str, u32> = HashMap::new();
    for node in nodes {
        let id = node.guest_numa_id;
        for zone in &node.memory_zones {
            if !memory.zones.iter().any(|known| known.id == *zone) {
                let known: Vec<&str> = memory.zones.iter().map(|z| z.id.as_str()).collect();
                return Err(NumaError::UnknownZone {
                    node: id,
                    zone: zone.clone(),
                    zones: known.join(", "),
                });
            }
            if let Some(first) = owner.insert(zone, id) {
                return Err(NumaError::ZoneTwice {
                    zone: zone.clone(),
                    first,
                    second: id,
                });
            }
        }
    }
    match memory
        .zones
        .iter()
        .find(|zone| !owner.contains_key(zone.id.as_str()))
    {
        Some(zone) => Err(NumaError::ZoneInNoNode {
            zone: zone.id.clone(),
        }),
        None => Ok(()),
    }
}

fn check_distances(nodes: &[NumaConfig]) -> Result<(), NumaError> {
    for node in nodes {
        let id = node.guest_numa_id;
        for (at, entry) in node.distances.iter().enumerate() {
            let NumaDistance {
                destination,
                distance,
            } = *entry;
            if !nodes.iter().any(|other| other.guest_numa_id == destination) {
                return Err(NumaError::UnknownDestination {
                    node: id,
                    destination,
                });
            }
            if node.distances[..at]
                .iter()
                .any(|other| other.destination == destination)
            {
                return Err(NumaError::DistanceTwice {
                    node: id,
                    destination,
                });
            }
            let in_range = if destination == id {
                distance == LOCAL_DISTANCE
            } else {
                (LOCAL_DISTANCE + 1..=MAX_DISTANCE).contains(&distance)
            };
            if !in_range {
                return Err(NumaError::Distance {
                    node: id,
                    destination,
                    distance,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

    fn check_words(words: &[&str]) -> Result<(), NumaError> {
        let nodes: Vec<NumaConfig> = words
            .iter()
            .map(|text| NumaConfig::parse(text).unwrap())
            .collect();
        let cpus = CpusConfig::parse("boot=2,max=4").unwrap();
        let memory = MemoryConfig::parse(None, &["id=a,size=1G", "id=b,size=1G"]).unwrap();
        check(&nodes, &cpus, &memory)
    }

    #[test]
    fn every_key_is_stored_and_survives_json() {
        let node = NumaConfig::parse(
            "guest_numa_id=1,cpus=[0-1,3],distances=[0@20,2@30],memory_zones=[a,b]",
        )
        .unwrap();
        assert_eq!(
            node,
            NumaConfig {
                guest_numa_id: 1,
                cpus: vec![0, 1, 3],
                distances: vec![
                    NumaDistance {
                        destination: 0,
                        distance: 20
                    },
                    NumaDistance {
                        destination: 2,
                        distance: 30
                    },
                ],
                memory_zones: vec!["a".into(), "b".into()],
            }
        );
        let json = serde_json::to_string(&node).unwrap();
        assert_eq!(serde_json::from_str::<NumaConfig>(&json).unwrap(), node);
        let json = br#"{"guest_numa_id":1,"cpus":null,"pci_segments":[],"device_id":null}"#;
        let node: NumaConfig = from_json(json).unwrap();
        assert!(node.cpus.is_empty());
    }

    #[test]
    fn malformed_words_are_named() {
        for (text, words) in [
            ("cpus=[0]", "key \"guest_numa_id\" is missing"),
            ("guest_numa_id=x", "a whole number"),
            ("guest_numa_id=0,distances=[1]", "node@distance"),
            ("guest_numa_id=0,distances=[1@256]", "node@distance"),
            ("guest_numa_id=0,distances=[@10]", "node@distance"),
            ("guest_numa_id=0,cpus=[254]", "numbers in range"),
            (
                "guest_numa_id=0,device_id=x",
                "not supported by daxhund: --numa device_id",
            ),
            (
                "guest_numa_id=0,pci_segments=[0]",
                "not supported by daxhund: --numa pci_segments",
            ),
        ] {
            let error = NumaConfig::parse(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_sound_topology_passes() {
        assert_eq!(check_words(&[]), Ok(()));
        let nodes = [
            "guest_numa_id=0,cpus=[0,1],memory_zones=[a],distances=[0@10,1@20]",
            "guest_numa_id=1,memory_zones=[b],distances=[0@254]",
        ];
        assert_eq!(check_words(&nodes), Ok(()));
    }

    #[test]
    fn each_contradiction_has_its_own_error() {
        let rest = "guest_numa_id=1,memory_zones=[b]";
        for (words, message) in [
            (
                &[
                    "guest_numa_id=0,memory_zones=[a]",
                    "guest_numa_id=0,memory_zones=[b]",
                ][..],
                "guest_numa_id=0 is given twice",
            ),
            (
                &["guest_numa_id=64,memory_zones=[a,b]"],
                "node numbers end at 63",
            ),
            (&["guest_numa_id=0"], "neither vCPUs nor memory"),
            (
                &["guest_numa_id=0,memory_zones=[a,c]", rest],
                "no memory zone \"c\"; the zones are a, b",
            ),
            (
                &["guest_numa_id=0,memory_zones=[a,b]", rest],
                "\"b\" is given to node 0 and again to node 1",
            ),
            (&["guest_numa_id=0,memory_zones=[a]"], "\"b\" is in no node"),
            (
                &["guest_numa_id=0,cpus=[4],memory_zones=[a]", rest],
                "no vCPU 4; with --cpus max=4 they are 0 to 3",
            ),
            (
                &[
                    "guest_numa_id=0,cpus=[1],memory_zones=[a]",
                    "guest_numa_id=1,cpus=[1],memory_zones=[b]",
                ],
                "vCPU 1 is given to node 0 and again to node 1",
            ),
            (
                &["guest_numa_id=0,cpus=[1,1],memory_zones=[a,b]"],
                "vCPU 1 is given to node 0 and again to node 0",
            ),
            (
                &["guest_numa_id=0,memory_zones=[a],distances=[7@20]", rest],
                "distance to node 7, which is not defined",
            ),
            (
                &[
                    "guest_numa_id=0,memory_zones=[a],distances=[1@20,1@30]",
                    rest,
                ],
                "two distances to node 1",
            ),
            (
                &["guest_numa_id=0,memory_zones=[a],distances=[1@10]", rest],
                "1@10 is out of range",
            ),
            (
                &["guest_numa_id=0,memory_zones=[a],distances=[1@255]", rest],
                "1@255 is out of range",
            ),
            (
                &["guest_numa_id=0,memory_zones=[a],distances=[0@11]", rest],
                "0@11 is out of range",
            ),
        ] {
            let error = check_words(words).unwrap_err();
            assert!(error.to_string().contains(message), "{words:?}: {error}");
        }
        let node = NumaConfig::parse("guest_numa_id=0,cpus=[0]").unwrap();
        let error = check(&[node], &CpusConfig::default(), &MemoryConfig::default()).unwrap_err();
        assert_eq!(error, NumaError::NoZones);
        assert!(error.to_string().contains("--memory-zone instead of"));
    }
}
