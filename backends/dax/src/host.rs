//! The host as this crate sees it: where sysfs, the device nodes and procfs are.
//!
//! A VMM uses [`Host::system`]; a test or a container manager names other roots. No state beyond the three paths.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use crate::device::DeviceFacts;
use crate::sysfs::Sysfs;

/// Where to look for dax devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    sys: Sysfs,
    dev: PathBuf,
    proc: PathBuf,
}

impl Host {
    /// The running system: `/sys`, `/dev`, `/proc`.
    pub fn system() -> Self {
        Self::at("/sys", "/dev", "/proc")
    }

    /// A host whose sysfs, device nodes and procfs are found elsewhere.
    pub fn at(sys: impl Into<PathBuf>, dev: impl Into<PathBuf>, proc: impl Into<PathBuf>) -> Self {
        Self {
            sys: Sysfs::new(sys),
            dev: dev.into(),
            proc: proc.into(),
        }
    }

    /// Where a device's node is expected.
    pub fn node_path(&self, facts: &DeviceFacts) -> PathBuf {
        self.dev.join(facts.name.to_string())
    }

    pub(crate) fn sys(&self) -> &Sysfs {
        &self.sys
    }

    pub(crate) fn proc(&self) -> &Path {
        &self.proc
    }
}
