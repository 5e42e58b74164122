//! `--cpus`: how many virtual processors the guest starts with and may have.

use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::json::{JsonObject, NotBuilt, Shape};
use super::schema::as_sent;
use super::{CpuTopology, Key, TopologyError, Word, WordError};

/// Most vCPUs a guest can have: xAPIC identifiers are 8 bits wide, 255 is the broadcast address
/// and one is kept for the I/O APIC.
pub const MAX_VCPUS: u32 = 254;

/// As in the contract: 64 TiB.
const DEFAULT_PHYS_BITS: u8 = 46;
/// What the architecture has, and what is still of use.
const PHYS_BITS: RangeInclusive<u8> = 36..=52;

/// Virtual processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct CpusConfig {
    /// vCPUs that run from the start (`boot=`); of a guest that was given another number, that one.
    pub boot_vcpus: u32,
    /// vCPUs the guest's tables describe (`max=`).
    pub max_vcpus: u32,
    /// How they are arranged (`topology=`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Width of a guest-physical address, if the host's is not less (`max_phys_bits=`).
    #[serde(default = "default_phys_bits")]
    pub max_phys_bits: u8,
}

fn default_phys_bits() -> u8 {
    DEFAULT_PHYS_BITS
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            max_phys_bits: DEFAULT_PHYS_BITS,
        }
    }
}

impl JsonObject for CpusConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::switch("kvm_hyperv", false),
            NotBuilt::empty("affinity"),
            NotBuilt::object("features", &[NotBuilt::switch("amx", false)]),
            NotBuilt::switch("nested", true),
            NotBuilt::text("core_scheduling", "Vm"),
            NotBuilt::text("profile", "Host"),
        ],
        ..Shape::WHOLE
    };
}

/// A number of vCPUs that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CpusError {
    /// `boot=0`.
    #[error("--cpus boot=0: a guest needs a vCPU to run on; give boot=1 or more")]
    NoVcpus,
    /// Fewer at most than at boot.
    #[error(
        "--cpus boot={boot},max={max}: max is below boot; leave max out or give max={boot} or more"
    )]
    MaxBelowBoot {
        /// vCPUs at boot.
        boot: u32,
        /// vCPUs at most.
        max: u32,
    },
    /// Above what the machine can number.
    #[error(
        "--cpus asks for {asked} vCPUs; a guest can have {MAX_VCPUS}: give at most max={MAX_VCPUS}"
    )]
    TooMany {
        /// vCPUs asked for.
        asked: u32,
    },
    /// No width of an address.
    #[error(
        "--cpus max_phys_bits={asked}: guest-physical addresses have {} to {} bits; leave it out or give one of those",
        PHYS_BITS.start(), PHYS_BITS.end()
    )]
    PhysBits {
        /// Bits asked for.
        asked: u8,
    },
    /// Arranged as they are not.
    #[error(transparent)]
    Topology(#[from] TopologyError),
}

/// A number of vCPUs that a guest which runs can't have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the guest can have 1 to {max} vCPUs, not {asked}; ask for a number between these limits, or start it with a larger \
     --cpus max="
)]
pub struct VcpusOutOfLimits {
    /// Asked for.
    pub asked: u32,
    /// What its tables describe.
    pub max: u32,
}

#[derive(Default)]
pub(crate) struct CpusDraft {
    boot: Option<u32>,
    max: Option<u32>,
    topology: Option<CpuTopology>,
    phys_bits: Option<u8>,
}

impl CpusConfig {
    pub(crate) const WORD: Word<CpusDraft> = Word {
        flag: "--cpus",
        about: "Virtual processors",
        keys: &[
            Key::new(
                "boot",
                "N",
                "vCPUs at start [default: 1]",
                |draft, value| {
                    draft.boot = Some(value.integer()?);
                    Ok(())
                },
            ),
            Key::new(
                "max",
                "N",
                "vCPUs at most, up to 254 [default: boot]",
                |draft, value| {
                    draft.max = Some(value.integer()?);
                    Ok(())
                },
            ),
            Key::new(
                "topology",
                "THREADS:CORES:DIES:PACKAGES",
                "arrangement of the vCPUs, if it is to be checked: 1:max:1:1 without NUMA nodes",
                |draft, value| {
                    draft.topology =
                        Some(value.parsed("four numbers, as in 1:4:1:1 for four cores")?);
                    Ok(())
                },
            ),
            Key::not_built("kvm_hyperv"),
            Key::new(
                "max_phys_bits",
                "N",
                "bits of a guest-physical address, the host's if those are fewer [default: 46]",
                |draft, value| {
                    draft.phys_bits = Some(value.integer()?);
                    Ok(())
                },
            ),
            Key::not_built("affinity"),
            Key::not_built("features"),
            Key::not_built("nested"),
            Key::not_built("core_scheduling"),
            Key::not_built("profile"),
        ],
    };

    /// Reads the value of `--cpus`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut draft = CpusDraft::default();
        Self::WORD.fill(text, &mut draft)?;
        let boot_vcpus = draft.boot.unwrap_or(1);
        Ok(Self {
            boot_vcpus,
            max_vcpus: draft.max.unwrap_or(boot_vcpus),
            topology: draft.topology,
            max_phys_bits: draft.phys_bits.unwrap_or(DEFAULT_PHYS_BITS),
        })
    }

    /// The same guest with another number of vCPUs.
    pub fn resized(&self, asked: u32) -> Result<Self, VcpusOutOfLimits> {
        let max = self.max_vcpus;
        if (1..=max).contains(&asked) {
            Ok(Self {
                boot_vcpus: asked,
                ..self.clone()
            })
        } else {
            Err(VcpusOutOfLimits { asked, max })
        }
    }

    pub(super) fn check(&self) -> Result<(), CpusError> {
        let (boot, max) = (self.boot_vcpus, self.max_vcpus);
        if boot == 0 {
            return Err(CpusError::NoVcpus);
        }
        if max < boot {
            return Err(CpusError::MaxBelowBoot { boot, max });
        }
        if max > MAX_VCPUS {
            return Err(CpusError::TooMany { asked: max });
        }
        let asked = self.max_phys_bits;
        if !PHYS_BITS.contains(&asked) {
            return Err(CpusError::PhysBits { asked });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(boot_vcpus: u32, max_vcpus: u32) -> CpusConfig {
        CpusConfig {
            boot_vcpus,
            max_vcpus,
            ..CpusConfig::default()
        }
    }

    #[test]
    fn max_follows_boot_unless_given() {
        assert_eq!(CpusConfig::parse("boot=4"), Ok(cpus(4, 4)));
        assert_eq!(CpusConfig::parse("boot=2,max=8"), Ok(cpus(2, 8)));
        assert_eq!(CpusConfig::parse("max=8"), Ok(cpus(1, 8)));
    }

    #[test]
    fn impossible_numbers_are_refused() {
        assert_eq!(cpus(1, 254).check(), Ok(()));
        for (config, error, words) in [
            (cpus(0, 1), CpusError::NoVcpus, "boot=1 or more"),
            (cpus(0, 0), CpusError::NoVcpus, "boot=0"),
            (
                cpus(4, 2),
                CpusError::MaxBelowBoot { boot: 4, max: 2 },
                "max=4 or more",
            ),
            (
                cpus(1, 255),
                CpusError::TooMany { asked: 255 },
                "at most max=254",
            ),
        ] {
            assert_eq!(config.check(), Err(error.clone()));
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn keys_of_the_contract_that_are_not_built_are_named() {
        for key in ["kvm_hyperv", "affinity", "features", "nested"] {
            let error = CpusConfig::parse(&format!("boot=1,{key}=1")).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("not supported by daxhund: --cpus {key}")
            );
        }
    }

    #[test]
    fn another_number_is_within_the_limits() {
        let before = cpus(2, 4);
        for asked in 1..=4 {
            assert_eq!(before.resized(asked), Ok(cpus(asked, 4)));
        }
        for asked in [0, 5, u32::MAX] {
            let error = before.resized(asked).unwrap_err();
            let limits = VcpusOutOfLimits { asked, max: 4 };
            assert_eq!(error, limits);
            assert!(
                error
                    .to_string()
                    .contains(&format!("1 to 4 vCPUs, not {asked}"))
            );
        }
    }

    #[test]
    fn addresses_have_a_width_and_vcpus_an_arrangement() {
        let config = CpusConfig::parse("boot=2,topology=1:2:1:1,max_phys_bits=40").unwrap();
        assert_eq!(config.max_phys_bits, 40);
        assert_eq!(config.topology, Some("1:2:1:1".parse().unwrap()));
        assert_eq!(config.check(), Ok(()));
        for asked in [0, 35, 53, 255] {
            let config = CpusConfig {
                max_phys_bits: asked,
                ..CpusConfig::default()
            };
            let error = config.check().unwrap_err();
            assert_eq!(error, CpusError::PhysBits { asked });
            assert!(error.to_string().contains("36 to 52"), "{error}");
        }
        let error = CpusConfig::parse("topology=4").unwrap_err();
        assert!(error.to_string().contains("1:4:1:1"), "{error}");
    }

    #[test]
    fn json_uses_the_contract_names_and_refuses_others() {
        let json = r#"{"boot_vcpus":2,"max_vcpus":4,"max_phys_bits":46}"#;
        assert_eq!(
            serde_json::from_str::<CpusConfig>(json).unwrap(),
            cpus(2, 4)
        );
        assert_eq!(serde_json::to_string(&cpus(2, 4)).unwrap(), json);
        let error = serde_json::from_str::<CpusConfig>(r#"{"boot_vcpus":2,"max_vcpus":4,"x":1}"#);
        assert!(error.unwrap_err().to_string().contains("unknown field `x`"));
    }
}
