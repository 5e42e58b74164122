//! What a guest is asked to be: plain data, one type per command-line word.
//!
//! Each type is the whole truth about its word. The same fields are filled by the command line
//! (a table of keys beside the type), by JSON (serde, with Cloud Hypervisor's field names) and
//! printed by `--help`, so the three cannot drift apart.
//!
//! Invariants:
//! - A [`VmConfig`] is only what somebody wrote. [`VmConfig::validate`] is the one way to a
//!   [`ValidConfig`], which is the only thing a machine is built from.
//! - Nothing is ignored: an unknown key, a key given twice and a key that is not built yet are
//!   errors that name it.
//!
//! Not done here: no file is opened and no device looked at. Whether `/dev/dax0.0` exists, how big
//! it is and whether the host has the huge pages is for those who open them.

#![forbid(unsafe_code)]

mod console;
mod cpus;
mod keyvalue;
mod memory;
mod numa;
mod payload;
mod size;
mod valid;
mod zone;

pub use console::{ConsoleConfig, ConsoleFieldsError};
pub use cpus::{CpusConfig, CpusError, MAX_VCPUS};
pub use keyvalue::WordError;
pub(crate) use keyvalue::{Key, Value, Word};
pub use memory::{DEFAULT_MEMORY_SIZE, HotplugMethod, MemoryConfig, MemoryError};
pub use numa::{MAX_NUMA_NODES, NumaConfig, NumaDistance, NumaError};
pub use payload::{PayloadConfig, PayloadError};
pub use size::ByteSize;
pub use valid::{Backing, ConfigError, DEFAULT_ZONE_ID, HugePageSize, ValidConfig, ZoneSpec};
pub use zone::{MemoryZoneConfig, ZoneError};

use serde::{Deserialize, Deserializer, Serialize};

/// Size of an x86-64 base page; every piece of guest memory is a multiple of it.
pub const PAGE_SIZE: u64 = 4096;

/// Everything one guest is made of, as asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Virtual processors (`--cpus`).
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Guest RAM (`--memory` and `--memory-zone`).
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What the guest boots (`--kernel`, `--initramfs`, `--cmdline`).
    pub payload: PayloadConfig,
    /// The 16550 serial port (`--serial`).
    #[serde(default = "ConsoleConfig::serial_default")]
    pub serial: ConsoleConfig,
    /// The virtio console (`--console`).
    #[serde(default)]
    pub console: ConsoleConfig,
    /// Guest NUMA nodes (`--numa`); empty when the guest has no NUMA topology.
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub numa: Vec<NumaConfig>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            payload: PayloadConfig::default(),
            serial: ConsoleConfig::serial_default(),
            console: ConsoleConfig::Off,
            numa: Vec::new(),
        }
    }
}

/// JSON clients send `null` for a list they do not use.
fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
