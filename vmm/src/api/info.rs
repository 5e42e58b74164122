//! What `vm.info` and `vm.counters` tell.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

use crate::config::VmConfig;
use crate::memory::poison::Poisoned;

/// The machine.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct VmInfo<'a> {
    /// What it is made of, with the names of devices that were given none.
    pub config: &'a VmConfig,
    /// What it does.
    pub state: VmState,
    /// Bytes of RAM, without what the balloon has taken; 0 when it is not booted.
    pub memory_actual_size: u64,
    /// Its devices by name; `null` when it is not booted.
    pub device_tree: Option<BTreeMap<String, DeviceNode<'a>>>,
    /// The device-dax memory that it has; absent when the guest is not booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dax_memory: Option<Vec<DaxMemory<'a>>>,
    /// Memory that is on its way out of the guest, or gone; absent when the guest is not booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_leaving: Option<Vec<MemoryLeaving<'a>>>,
    /// Memory that is known to be bad; absent when the guest is not booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poison: Option<Vec<Poisoned>>,
    /// Functions of the host that could not be given back, by name; absent when there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices_kept: Vec<&'a str>,
    /// Why the guest is held for good; absent when it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused_because: Option<String>,
}

/// What the machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub enum VmState {
    /// It is defined and not booted.
    Created,
    /// It is booted.
    Running,
    /// It is booted, and its vCPUs are held.
    Paused,
}

/// A device of the running machine.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DeviceNode<'a> {
    /// Its name.
    pub id: &'a str,
    /// Where it sits: `0000:00:05.0`.
    pub pci_bdf: String,
    /// None: a device has no devices below it.
    pub children: &'a [&'a str],
    /// How it stands between being there and being gone.
    pub state: &'static str,
    /// The vhost-user backend that serves it; absent when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendNode<'a>>,
}

/// A vhost-user backend.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct BackendNode<'a> {
    /// Where it listens, or this process for it.
    pub socket: &'a Path,
    /// Whether it is there.
    pub state: BackendState,
    /// Why it is lost; absent when it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub because: Option<String>,
}

/// Whether a backend is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// It serves.
    Connected,
    /// It is waited for.
    Lost,
}

/// Guest memory that is a range of a device-dax device.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DaxMemory<'a> {
    /// The device or zone that it is of.
    pub id: &'a str,
    /// First guest-physical address, in hexadecimal.
    pub gpa: String,
    /// Bytes.
    pub size: u64,
    /// The host's device.
    pub file: &'a Path,
    /// Where in the device it begins.
    pub offset: u64,
    /// The host's pool that it was taken of; absent when it is of none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<&'a str>,
}

/// Memory that is on its way out of the guest, or gone.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MemoryLeaving<'a> {
    /// The device or zone that it is of.
    pub id: &'a str,
    /// First guest-physical address, in hexadecimal.
    pub gpa: String,
    /// Bytes.
    pub size: u64,
    /// How far it is.
    pub state: &'static str,
    /// Who does not let go of it; absent when nobody is known to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_by: Option<&'a str>,
}

/// What has been counted: by device, and in it by what is counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct VmCounters(pub BTreeMap<String, BTreeMap<String, u64>>);
