//! Where a host is looked at, and the two questions that no file tree answers.
//!
//! A missing or forbidden file reads as `None`: a check then says what it could not see.

use std::fs;
use std::path::{Path, PathBuf};

use daxhund_guard::{DEFAULT_SOCKET, Guard};
use rustix::fs::{Access, AtFlags, CWD, accessat};

use crate::config::HostConfig;
use crate::host_config::{self, ReadError};
use crate::kvm::{Hypervisor, OpenError};

/// The roots of a host's sysfs, procfs and device nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// `/sys`
    pub sys: PathBuf,
    /// `/proc`
    pub proc: PathBuf,
    /// `/dev`
    pub dev: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
            dev: "/dev".into(),
        }
    }
}

impl Roots {
    pub(super) fn sys(&self, path: &str) -> PathBuf {
        self.sys.join(path)
    }

    pub(super) fn dev(&self, path: &str) -> PathBuf {
        self.dev.join(path)
    }

    pub(super) fn sys_text(&self, path: &str) -> Option<String> {
        text(&self.sys(path))
    }

    pub(super) fn proc_text(&self, path: &str) -> Option<String> {
        text(&self.proc.join(path))
    }

    /// Whether this process has a capability, by its number, as far as procfs tells.
    pub(super) fn may(&self, capability: u32) -> bool {
        self.proc_text("self/status")
            .as_deref()
            .and_then(|status| status.lines().find_map(|line| line.strip_prefix("CapEff:")))
            .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
            .is_some_and(|set| set >> capability & 1 == 1)
    }

    pub(super) fn sys_number(&self, path: &str) -> Option<u64> {
        self.sys_text(path)?.parse().ok()
    }

    /// The names in a directory of sysfs, sorted; none without the directory.
    pub(super) fn sys_names(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.sys(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim_end().to_owned())
}

/// The removal guard's daemon.
#[derive(Clone, Debug)]
pub(super) enum Daemon {
    /// No socket of its.
    None,
    /// It is there.
    Answers,
    /// Its socket is there; why it does not answer.
    Silent(String),
}

/// What must be asked of the running kernel itself.
pub(super) trait Live {
    /// Opens KVM and checks what daxhund needs of it; gives the most vCPUs a VM may have.
    fn kvm(&self, node: &Path) -> Result<usize, OpenError>;
    /// Whether this process may open a node for reading and writing.
    fn may_open(&self, node: &Path) -> bool;
    /// Asks the removal guard's daemon whether it is there.
    fn guard_daemon(&self) -> Daemon;
    /// What a VMM that this user starts reads of the host's configuration.
    fn host_config(&self) -> Result<HostConfig, ReadError>;
}

/// This process on the running kernel.
pub(super) struct ThisProcess;

impl Live for ThisProcess {
    fn kvm(&self, node: &Path) -> Result<usize, OpenError> {
        Hypervisor::open_at(node).map(|kvm| kvm.max_vcpus())
    }

    fn may_open(&self, node: &Path) -> bool {
        let access = Access::READ_OK | Access::WRITE_OK;
        accessat(CWD, node, access, AtFlags::EACCESS).is_ok()
    }

    fn guard_daemon(&self) -> Daemon {
        let socket = Path::new(DEFAULT_SOCKET);
        if !socket.exists() {
            return Daemon::None;
        }
        match Guard::connect(socket, "daxhund doctor") {
            Ok(_) => Daemon::Answers,
            Err(error) => Daemon::Silent(crate::chain(&error)),
        }
    }

    fn host_config(&self) -> Result<HostConfig, ReadError> {
        host_config::read()
    }
}
