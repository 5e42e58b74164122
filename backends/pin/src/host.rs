//! The host as this crate sees it: where sysfs, the device nodes and procfs are.
//!
//! A VMM uses [`Host::system`]; a test names other roots. No state beyond the three paths.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

/// Where to look for PCI functions and their nodes.
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
}

impl Default for Host {
    fn default() -> Self {
        Self::system()
    }
}
