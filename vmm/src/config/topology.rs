//! `--cpus topology=`: how a caller sees the virtual processors arranged.
//!
//! What the guest gets follows from its nodes: each vCPU is a core of one thread, all cores of a node are one package, and
//! without nodes there is one package. Callers that say it beforehand, as Kata Containers does with each guest, may say
//! that and nothing else.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{CpusConfig, NumaConfig};

/// What a caller says; a number that is absent is not said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuTopology {
    /// Threads of a core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads_per_core: Option<u16>,
    /// Cores of a die.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores_per_die: Option<u16>,
    /// Dies of a package.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dies_per_package: Option<u16>,
    /// Packages of the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packages: Option<u16>,
}

/// Another arrangement than the guest gets.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TopologyError {
    /// There is one, and it is another.
    #[error(
        "--cpus topology={asked} is not supported by daxhund: vCPUs are cores of one thread, in one package for each NUMA \
         node; leave it out or give {given}"
    )]
    Other {
        /// Asked for.
        asked: CpuTopology,
        /// What the guest gets.
        given: CpuTopology,
    },
    /// The packages differ in size.
    #[error(
        "--cpus topology={asked} is not supported by daxhund: {vcpus} vCPUs in {packages} packages, one for each NUMA \
         node, are not as many in each; leave it out"
    )]
    Uneven {
        /// Asked for.
        asked: CpuTopology,
        /// vCPUs at most.
        vcpus: u32,
        /// Packages.
        packages: usize,
    },
}

/// Refuses what is said of a guest that gets something else. Numbers of vCPUs and nodes have been checked before.
pub(super) fn check(cpus: &CpusConfig, nodes: &[NumaConfig]) -> Result<(), TopologyError> {
    let Some(topology) = cpus.topology else {
        return Ok(());
    };
    let vcpus = cpus.max_vcpus as usize;
    let mut sizes: Vec<usize> = nodes.iter().map(|node| node.cpus.len()).collect();
    // Those of no node share a package; a node without any has none.
    sizes.push(vcpus.saturating_sub(sizes.iter().sum()));
    sizes.retain(|size| *size > 0);
    topology.check(cpus.max_vcpus, &sizes)
}

impl CpuTopology {
    /// As [`check`]; `sizes` has the number of vCPUs of each package.
    fn check(self, vcpus: u32, sizes: &[usize]) -> Result<(), TopologyError> {
        let packages = sizes.len();
        let in_each = sizes.first().copied().unwrap_or(0);
        if sizes.iter().any(|size| *size != in_each) {
            return Err(TopologyError::Uneven {
                asked: self,
                vcpus,
                packages,
            });
        }
        let given = Self {
            threads_per_core: Some(1),
            cores_per_die: u16::try_from(in_each).ok(),
            dies_per_package: Some(1),
            packages: u16::try_from(packages).ok(),
        };
        let says = |asked: Option<u16>, given| asked.is_none() || asked == given;
        if says(self.threads_per_core, given.threads_per_core)
            && says(self.cores_per_die, given.cores_per_die)
            && says(self.dies_per_package, given.dies_per_package)
            && says(self.packages, given.packages)
        {
            return Ok(());
        }
        Err(TopologyError::Other { asked: self, given })
    }

    fn numbers(self) -> [Option<u16>; 4] {
        [
            self.threads_per_core,
            self.cores_per_die,
            self.dies_per_package,
            self.packages,
        ]
    }
}

/// As the command line has it: `THREADS:CORES:DIES:PACKAGES`.
impl FromStr for CpuTopology {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let numbers: Result<Vec<u16>, _> = text.split(':').map(str::parse).collect();
        let [threads, cores, dies, packages] = numbers.map_err(drop)?[..] else {
            return Err(());
        };
        Ok(Self {
            threads_per_core: Some(threads),
            cores_per_die: Some(cores),
            dies_per_package: Some(dies),
            packages: Some(packages),
        })
    }
}

impl fmt::Display for CpuTopology {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = self.numbers().map(|number| match number {
            Some(number) => number.to_string(),
            None => "-".to_owned(),
        });
        out.write_str(&numbers.join(":"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(text: &str) -> CpuTopology {
        text.parse().unwrap()
    }

    fn checked(asked: &str, max: u32, nodes: &[&[u32]]) -> Result<(), TopologyError> {
        let cpus = CpusConfig {
            max_vcpus: max,
            topology: Some(topology(asked)),
            ..CpusConfig::default()
        };
        let nodes = nodes.iter().map(|cpus| NumaConfig {
            cpus: cpus.to_vec(),
            ..NumaConfig::default()
        });
        check(&cpus, &nodes.collect::<Vec<_>>())
    }

    #[test]
    fn what_the_guest_gets_may_be_said() {
        assert_eq!(checked("1:2:1:1", 2, &[]), Ok(()));
        assert_eq!(checked("1:2:1:2", 4, &[&[0, 2], &[1, 3]]), Ok(()));
        // One node has memory only, and two vCPUs have no node.
        assert_eq!(checked("1:2:1:2", 4, &[&[0, 1], &[]]), Ok(()));
        assert_eq!(CpuTopology::default().check(5, &[5]), Ok(()));
        let only_packages = CpuTopology {
            packages: Some(1),
            ..CpuTopology::default()
        };
        assert_eq!(only_packages.check(5, &[5]), Ok(()));
        assert_eq!(check(&CpusConfig::default(), &[]), Ok(()));
    }

    #[test]
    fn another_arrangement_is_refused_with_the_one_there_is() {
        const NONE: &[&[u32]] = &[];
        for (asked, max, nodes) in [
            ("2:1:1:1", 2, NONE),
            ("1:1:1:2", 2, &[]),
            ("1:1:2:1", 2, &[]),
            ("1:2:1:1", 4, &[]),
            ("0:0:0:0", 1, &[]),
            ("1:4:1:1", 4, &[&[0, 1], &[2, 3]]),
        ] {
            let error = checked(asked, max, nodes).unwrap_err();
            let TopologyError::Other { given, .. } = &error else {
                panic!("{asked}: {error}");
            };
            assert_eq!(checked(&given.to_string(), max, nodes), Ok(()), "{error}");
            let message = error.to_string();
            assert!(message.contains(&format!("topology={asked}")), "{message}");
            assert!(message.contains(&format!("give {given}")), "{message}");
        }
        let error = checked("1:2:1:2", 4, &[&[0, 1, 2], &[3]]).unwrap_err();
        assert!(
            error.to_string().contains("4 vCPUs in 2 packages"),
            "{error}"
        );
    }

    #[test]
    fn the_command_line_has_four_numbers() {
        assert_eq!(topology("1:2:3:4").to_string(), "1:2:3:4");
        for text in ["", "1", "1:2:3", "1:2:3:4:5", "1:2:3:x", "1:2:3:-4"] {
            assert!(text.parse::<CpuTopology>().is_err(), "{text}");
        }
    }
}
