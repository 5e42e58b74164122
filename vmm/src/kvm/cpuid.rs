//! The CPUID leaves a guest sees: what KVM supports, with the topology and the APIC ids made the guest's own.
//!
//! Everything KVM reports is passed on. Changed is only what names the *host's* processor the vCPU happens to run
//! on: the APIC id, the number of logical processors and the cores they make, and the leaves that describe caches
//! shared between them. All vCPUs are cores of one package with one thread each.
//! Sources: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.

use std::io;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use thiserror::Error;

use super::hypervisor::Hypervisor;
use super::machine_check::{MachineChecks, Vendor};
use super::topology::Topology;

const FEATURES: u32 = 0x1;
const CACHES_INTEL: u32 = 0x4;
const MONITOR: u32 = 0x5;
const PERFMON: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_RAS: u32 = 0x8000_0007;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const ECX_MONITOR: u32 = 1 << 3;
const EDX_HTT: u32 = 1 << 28;
/// Legacy method of counting cores, APM vol. 3 E.4.2; and the topology extensions that leaves 0x8000001d/1e need.
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;

/// What a guest on AMD wants to see before it survives an error that memory reports: bits `OverflowRecov` and `SUCCOR`,
/// APM vol. 3, E.4.6.
const AMD_EBX_RECOVERY: u32 = 0b11;

/// `GenuineIntel` begins so; everybody else, AMD and Hygon, tells of memory errors as AMD does.
const INTEL_EBX: u32 = u32::from_le_bytes(*b"Genu");

/// Levels of the extended topology leaf (SDM vol. 2A, CPUID leaf 0BH).
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// KVM would not say what it supports.
#[derive(Debug, Error)]
#[error("KVM would not {what}")]
pub struct CpuidError {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// What all vCPUs of one VM have in common.
#[derive(Debug, Clone)]
pub struct CpuidTemplate {
    leaves: Vec<kvm_cpuid_entry2>,
    topology: Topology,
    machine_checks: MachineChecks,
}

impl CpuidTemplate {
    /// Asks KVM; the topology is of all vCPUs that the VM may ever have.
    pub fn new(hypervisor: &Hypervisor, topology: Topology) -> Result<Self, CpuidError> {
        let kvm = hypervisor.kvm();
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| CpuidError {
                what: "list the CPUID leaves it supports",
                source: io::Error::from(e),
            })?;
        let supported = supported.as_slice();
        let machine_checks =
            MachineChecks::new(kvm, vendor(supported)).map_err(|source| CpuidError {
                what: "list the machine-check registers it supports",
                source,
            })?;
        Ok(Self::from_supported(supported, topology, machine_checks))
    }

    fn from_supported(
        supported: &[kvm_cpuid_entry2],
        topology: Topology,
        machine_checks: MachineChecks,
    ) -> Self {
        let mut leaves = supported.to_vec();
        // The topology leaf is per guest, not per host: rebuilt below for every vCPU.
        let had_topology = leaves.iter().any(|l| l.function == TOPOLOGY);
        leaves.retain(|l| !matches!(l.function, TOPOLOGY | TOPOLOGY_V2 | AMD_TOPOLOGY_V2));
        if had_topology {
            for index in [0, 1] {
                leaves.push(kvm_cpuid_entry2 {
                    function: TOPOLOGY,
                    index,
                    flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    ..Default::default()
                });
            }
        }
        if !leaves.iter().any(|leaf| leaf.function == AMD_RAS) {
            leaves.push(kvm_cpuid_entry2 {
                function: AMD_RAS,
                ..Default::default()
            });
        }
        Self {
            leaves,
            topology,
            machine_checks,
        }
    }

    /// The same with guest-physical addresses of `bits` bits at most.
    #[must_use]
    pub fn limited_to(mut self, bits: u8) -> Self {
        for leaf in &mut self.leaves {
            if leaf.function == AMD_SIZES {
                let [host, rest @ ..] = leaf.eax.to_le_bytes();
                let [linear, guest, reserved] = rest;
                leaf.eax = u32::from_le_bytes([host.min(bits), linear, guest, reserved]);
            }
        }
        self
    }

    /// Width of a guest-physical address: what KVM reports of the host (leaf 0x80000008), or the architecture's
    /// minimum where it reports nothing; no more than what was asked for.
    pub fn address_bits(&self) -> u8 {
        const MINIMUM: u8 = 36;
        let sizes = self.leaves.iter().find(|leaf| leaf.function == AMD_SIZES);
        sizes.map_or(MINIMUM, |leaf| leaf.eax.to_le_bytes()[0])
    }

    /// Packages and cores.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// How a guest is told of memory that is gone.
    pub(super) fn machine_checks(&self) -> MachineChecks {
        self.machine_checks
    }

    /// The table of one vCPU.
    pub(super) fn for_vcpu(&self, cpu: u8) -> Vec<kvm_cpuid_entry2> {
        let mut leaves = self.leaves.clone();
        for leaf in &mut leaves {
            self.adapt(leaf, cpu);
        }
        leaves
    }

    fn adapt(&self, leaf: &mut kvm_cpuid_entry2, cpu: u8) {
        let cores = self.topology.cores_beside(cpu);
        let id = u32::from(self.topology.apic_id(cpu));
        // Other cores that share the cache which leaf 4 or 0x8000001d describes: the last level (level in 7:5) belongs
        // to the package, the others to one core.
        let sharers = |eax: u32| if (eax >> 5) & 0x7 >= 3 { cores - 1 } else { 0 };
        match leaf.function {
            FEATURES => {
                leaf.ebx = (leaf.ebx & 0x0000_ffff) | (cores << 16) | (id << 24);
                leaf.ecx |= ECX_HYPERVISOR | ECX_TSC_DEADLINE;
                leaf.ecx &= !ECX_MONITOR;
                set(&mut leaf.edx, EDX_HTT, cores > 1);
            }
            CACHES_INTEL if leaf.eax & 0x1f != 0 => {
                // Bits 31:26 cores in the package, bits 25:14 logical processors that share this cache, each minus one.
                leaf.eax =
                    (leaf.eax & 0x3fff) | ((cores - 1).min(63) << 26) | (sharers(leaf.eax) << 14);
            }
            // No MONITOR/MWAIT, no performance counters: neither is virtualised here.
            MONITOR | PERFMON => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            TOPOLOGY => {
                let (shift, count, level) = match leaf.index {
                    0 => (0, 1, LEVEL_SMT),
                    _ => (self.topology.core_bits(), cores, LEVEL_CORE),
                };
                leaf.eax = shift;
                leaf.ebx = count;
                leaf.ecx = leaf.index | (level << 8);
                leaf.edx = id;
            }
            AMD_RAS if self.machine_checks.vendor() == Vendor::Amd => leaf.ebx |= AMD_EBX_RECOVERY,
            AMD_FEATURES => set(&mut leaf.ecx, AMD_ECX_CMP_LEGACY, cores > 1),
            // ApicIdCoreIdSize in 15:12, number of threads minus one in 7:0.
            AMD_SIZES => leaf.ecx = (self.topology.core_bits() << 12) | (cores - 1),
            AMD_CACHES if leaf.eax & 0x1f != 0 => {
                leaf.eax = (leaf.eax & 0x3fff) | (sharers(leaf.eax) << 14);
            }
            AMD_TOPOLOGY => {
                // Extended APIC id; core id, one thread per core; one node for each package.
                leaf.eax = id;
                leaf.ebx = u32::from(self.topology.core(cpu));
                leaf.ecx = u32::from(self.topology.package(cpu));
            }
            _ => {}
        }
    }
}

fn vendor(leaves: &[kvm_cpuid_entry2]) -> Vendor {
    let intel = |leaf: &kvm_cpuid_entry2| leaf.function == 0 && leaf.ebx == INTEL_EBX;
    if leaves.iter().any(intel) {
        Vendor::Intel
    } else {
        Vendor::Amd
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

/// As `KVM_SET_CPUID2` takes it.
pub(super) fn to_kvm(leaves: &[kvm_cpuid_entry2]) -> Result<CpuId, CpuidError> {
    CpuId::from_entries(leaves).map_err(|_| CpuidError {
        what: "take a table of so many CPUID leaves",
        source: io::Error::from_raw_os_error(libc::E2BIG),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: 0xffff_ffff,
            ebx: 0xffff_ffff,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves
            .iter()
            .find(|l| l.function == function && l.index == index)
            .unwrap()
    }

    #[test]
    fn addresses_are_no_wider_than_asked_for_nor_than_the_hosts() {
        for (asked, expected) in [(46, 0x322e_u32), (48, 0x3230), (52, 0x3230), (36, 0x3224)] {
            let sizes = kvm_cpuid_entry2 {
                eax: 0x3230,
                ..leaf(AMD_SIZES, 0)
            };
            let template = CpuidTemplate::from_supported(
                &[sizes],
                Topology::new(1, &[]).unwrap(),
                MachineChecks::of(0, Vendor::Amd),
            );
            let template = template.limited_to(asked);
            assert_eq!(find(&template.for_vcpu(0), AMD_SIZES, 0).eax, expected);
            assert_eq!(template.address_bits(), expected.to_le_bytes()[0]);
        }
    }

    #[test]
    fn apic_ids_are_the_guests() {
        let template = CpuidTemplate::from_supported(
            &[
                leaf(FEATURES, 0),
                leaf(TOPOLOGY, 0),
                leaf(TOPOLOGY, 1),
                leaf(TOPOLOGY, 2),
                leaf(AMD_TOPOLOGY, 0),
            ],
            Topology::new(3, &[]).unwrap(),
            MachineChecks::of(0, Vendor::Amd),
        );
        for id in 0..3 {
            let leaves = template.for_vcpu(id);
            assert_eq!(find(&leaves, FEATURES, 0).ebx >> 24, u32::from(id));
            assert_eq!((find(&leaves, FEATURES, 0).ebx >> 16) & 0xff, 3);
            assert_eq!(find(&leaves, TOPOLOGY, 0).edx, u32::from(id));
            assert_eq!(find(&leaves, TOPOLOGY, 1).ebx, 3);
            assert_eq!(
                find(&leaves, TOPOLOGY, 1).eax,
                2,
                "three cores need two bits"
            );
            assert_eq!(find(&leaves, AMD_TOPOLOGY, 0).eax, u32::from(id));
            assert!(
                !leaves
                    .iter()
                    .any(|l| l.function == TOPOLOGY && l.index == 2)
            );
        }
    }

    #[test]
    fn a_single_vcpu_has_no_siblings() {
        let template = CpuidTemplate::from_supported(
            &[leaf(FEATURES, 0), leaf(AMD_SIZES, 0), leaf(AMD_FEATURES, 0)],
            Topology::new(1, &[]).unwrap(),
            MachineChecks::of(0, Vendor::Intel),
        );
        let leaves = template.for_vcpu(0);
        assert_eq!(find(&leaves, FEATURES, 0).edx & EDX_HTT, 0);
        assert_eq!(find(&leaves, AMD_SIZES, 0).ecx, 0);
        assert_eq!(find(&leaves, AMD_FEATURES, 0).ecx & AMD_ECX_CMP_LEGACY, 0);
    }

    #[test]
    fn caches_below_the_last_level_are_private() {
        let level = |n: u32| kvm_cpuid_entry2 {
            eax: (n << 5) | 1 | (7 << 14),
            ..leaf(AMD_CACHES, n)
        };
        let sharers = |nodes: &[Vec<u8>], cpu| {
            let topology = Topology::new(4, nodes).unwrap();
            let template = CpuidTemplate::from_supported(
                &[level(1), level(2), level(3)],
                topology,
                MachineChecks::of(0, Vendor::Amd),
            );
            let leaves = template.for_vcpu(cpu);
            [1, 2, 3].map(|n| (find(&leaves, AMD_CACHES, n).eax >> 14) + 1)
        };
        assert_eq!(sharers(&[], 0), [1, 1, 4]);
        assert_eq!(sharers(&[vec![0, 3], vec![1], vec![2]], 3), [1, 1, 2]);
        assert_eq!(sharers(&[vec![0, 3], vec![1], vec![2]], 2), [1, 1, 1]);
    }

    #[test]
    fn a_guest_on_amd_sees_that_it_survives_errors_of_memory() {
        let table = |vendor, leaves: &[kvm_cpuid_entry2]| {
            let checks = MachineChecks::of(0, vendor);
            let topology = Topology::new(1, &[]).unwrap();
            CpuidTemplate::from_supported(leaves, topology, checks).for_vcpu(0)
        };
        let empty = kvm_cpuid_entry2 {
            function: AMD_RAS,
            ..Default::default()
        };
        for leaves in [&[empty][..], &[]] {
            assert_eq!(find(&table(Vendor::Amd, leaves), AMD_RAS, 0).ebx, 0b11);
        }
        assert_eq!(find(&table(Vendor::Intel, &[empty]), AMD_RAS, 0).ebx, 0);
    }

    #[test]
    fn the_vendor_is_what_leaf_0_spells() {
        let named = |ebx| kvm_cpuid_entry2 {
            ebx,
            ..Default::default()
        };
        assert_eq!(vendor(&[named(0x756e_6547)]), Vendor::Intel);
        assert_eq!(vendor(&[named(0x6874_7541)]), Vendor::Amd);
    }
}
