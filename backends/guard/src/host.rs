//! The host as this crate sees it: where sysfs, the device nodes and procfs are.
//!
//! The guard uses [`Host::system`]; a test names other roots. No state beyond the three paths.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

/// Where to look for dax devices and for those who open files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    sys: PathBuf,
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
            sys: sys.into(),
            dev: dev.into(),
            proc: proc.into(),
        }
    }

    pub(crate) fn sys(&self) -> &Path {
        &self.sys
    }

    pub(crate) fn dev(&self) -> &Path {
        &self.dev
    }

    pub(crate) fn proc(&self) -> &Path {
        &self.proc
    }

    /// Whether some bus has a device of this name.
    pub(crate) fn has_device(&self, name: &str) -> bool {
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            return false;
        }
        let buses = std::fs::read_dir(self.sys.join("bus"))
            .into_iter()
            .flatten();
        buses
            .flatten()
            .any(|bus| bus.path().join("devices").join(name).exists())
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::system()
    }
}
