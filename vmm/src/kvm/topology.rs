//! Which vCPU is which core of which package, and the APIC ids that say so.
//!
//! Without NUMA nodes all vCPUs are cores of one package. With nodes, each node's vCPUs are a package of their own:
//! a package shares its last-level cache, and Linux rejects a cache that spans nodes. An APIC id is the package's number
//! above [`Topology::core_bits`] bits for the core. vCPU 0 is always core 0 of package 0: KVM starts APIC id 0.

use thiserror::Error;

/// The vCPUs can't be numbered.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{cpus} vCPUs in {packages} NUMA nodes need APIC ids up to {last}, there are {LAST_APIC_ID}; use fewer vCPUs or nodes"
)]
pub struct TopologyError {
    /// vCPUs.
    pub cpus: usize,
    /// Packages, one for each node.
    pub packages: usize,
    /// The highest id they need.
    pub last: u32,
}

/// 255 is the broadcast address of an xAPIC.
const LAST_APIC_ID: u32 = 254;

/// Packages and cores of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// By vCPU number: its package and its core in it.
    places: Vec<(u8, u8)>,
    /// By package: its number of cores.
    cores: Vec<u8>,
}

impl Topology {
    /// `cpus` vCPUs, of which each list in `nodes` is one node's. vCPUs in no list share a package.
    pub fn new(cpus: u8, nodes: &[Vec<u8>]) -> Result<Self, TopologyError> {
        let in_node = |cpu: u8| nodes.iter().position(|node| node.contains(&cpu));
        let mut order: Vec<Option<usize>> = Vec::new();
        let mut places = Vec::new();
        let mut cores: Vec<u8> = Vec::new();
        // Packages are numbered as their first vCPU comes, so that vCPU 0 is in package 0.
        for cpu in 0..cpus {
            let node = in_node(cpu);
            let package = order
                .iter()
                .position(|known| *known == node)
                .unwrap_or_else(|| {
                    order.push(node);
                    cores.push(0);
                    order.len() - 1
                });
            places.push((narrow(package), cores[package]));
            cores[package] += 1;
        }
        let topology = Self { places, cores };
        let last = (0..cpus)
            .map(|cpu| topology.wide_id(cpu))
            .max()
            .unwrap_or(0);
        if last > LAST_APIC_ID {
            return Err(TopologyError {
                cpus: usize::from(cpus),
                packages: topology.cores.len(),
                last,
            });
        }
        Ok(topology)
    }

    /// How many vCPUs there are.
    pub fn cpus(&self) -> u8 {
        narrow(self.places.len())
    }

    /// The APIC id of a vCPU.
    pub fn apic_id(&self, cpu: u8) -> u8 {
        narrow(self.wide_id(cpu) as usize)
    }

    /// Bits of an APIC id that number the core within its package.
    pub fn core_bits(&self) -> u32 {
        let most = self.cores.iter().copied().max().unwrap_or(1);
        u32::from(most).next_power_of_two().trailing_zeros()
    }

    /// Number of cores in the package of a vCPU.
    pub fn cores_beside(&self, cpu: u8) -> u32 {
        u32::from(self.cores[usize::from(self.package(cpu))])
    }

    /// The package of a vCPU.
    pub fn package(&self, cpu: u8) -> u8 {
        self.places[usize::from(cpu)].0
    }

    /// The core of a vCPU in its package.
    pub fn core(&self, cpu: u8) -> u8 {
        self.places[usize::from(cpu)].1
    }

    fn wide_id(&self, cpu: u8) -> u32 {
        (u32::from(self.package(cpu)) << self.core_bits()) | u32::from(self.core(cpu))
    }
}

/// Counts here are of vCPUs, of which there are at most 254.
fn narrow(count: usize) -> u8 {
    u8::try_from(count).expect("at most as many as vCPUs")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn without_nodes_there_is_one_package() {
        let topology = Topology::new(6, &[]).unwrap();
        let ids: Vec<u8> = (0..6).map(|cpu| topology.apic_id(cpu)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
        assert_eq!((topology.core_bits(), topology.cores_beside(5)), (3, 6));
    }

    #[test]
    fn each_node_is_a_package_and_the_first_vcpu_has_id_0() {
        let topology = Topology::new(5, &[vec![1, 2, 3], vec![0, 4]]).unwrap();
        let ids: Vec<u8> = (0..5).map(|cpu| topology.apic_id(cpu)).collect();
        assert_eq!(ids, [0, 4, 5, 6, 1]);
        assert_eq!(topology.cores_beside(4), 2);
        assert_eq!(topology.cores_beside(1), 3);
    }

    #[test]
    fn ids_that_do_not_exist_are_refused() {
        assert!(Topology::new(254, &[]).is_ok());
        // Ten cores want four bits; 16 packages of that are 256 ids.
        let nodes: Vec<Vec<u8>> = (0..17)
            .map(|node| (node * 10..node * 10 + 10).collect())
            .collect();
        let error = Topology::new(170, &nodes).unwrap_err();
        assert_eq!((error.packages, error.last), (17, 265));
    }

    proptest! {
        #[test]
        fn ids_are_unique_and_nodes_do_not_share_packages(homes in prop::collection::vec(0usize..4, 1..40)) {
            let mut nodes = vec![Vec::new(); 4];
            for (cpu, home) in (0u8..).zip(&homes) {
                nodes[*home].push(cpu);
            }
            let cpus = u8::try_from(homes.len()).unwrap();
            let topology = Topology::new(cpus, &nodes).unwrap();
            let ids: std::collections::BTreeSet<u8> = (0..cpus).map(|cpu| topology.apic_id(cpu)).collect();
            prop_assert_eq!(ids.len(), homes.len());
            prop_assert_eq!(topology.apic_id(0), 0);
            for a in 0..cpus {
                for b in 0..cpus {
                    let same_node = homes[usize::from(a)] == homes[usize::from(b)];
                    let same_package = topology.apic_id(a) >> topology.core_bits() == topology.apic_id(b) >> topology.core_bits();
                    prop_assert_eq!(same_node, same_package);
                }
            }
        }
    }
}
