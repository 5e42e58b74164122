//! Makes the emulated host's bare kernel a system: mounts, modules, the read-only share, a user without rights.
//!
//! The initramfs says what to load, in `/etc/lab/modules`: one file and its parameters per line, in order.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, mount};
use rustix::system::finit_module;

/// Where the share with the binaries appears.
const SHARE: &str = "/lab";
/// What the agent and everything it starts look programs up in.
const PATH: &str = "/lab/bin:/bin:/sbin:/usr/bin:/usr/sbin";

#[derive(Debug, thiserror::Error)]
pub(crate) enum SystemError {
    #[error("cannot mount {kind} on {target}")]
    Mount {
        kind: &'static str,
        target: &'static str,
        source: io::Error,
    },
    #[error("cannot read {path}")]
    Read {
        path: &'static str,
        source: io::Error,
    },
    #[error("cannot load the module {path}")]
    Module { path: String, source: io::Error },
}

/// Mounts the kernel's own file systems.
pub(crate) fn mount_all() -> Result<(), SystemError> {
    for (kind, target, options) in [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", ""),
        ("devpts", "/dev/pts", "ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("tmpfs", "/tmp", "mode=1777"),
        ("tmpfs", "/run", "mode=755"),
        ("debugfs", "/sys/kernel/debug", ""),
        ("tracefs", "/sys/kernel/tracing", ""),
        ("hugetlbfs", "/dev/hugepages", "mode=1777"),
    ] {
        mount_one(kind, target, options)?;
    }
    Ok(())
}

fn mount_one(kind: &'static str, target: &'static str, options: &str) -> Result<(), SystemError> {
    let failed = |source| SystemError::Mount {
        kind,
        target,
        source,
    };
    if !Path::new(target).is_dir() {
        fs::create_dir_all(target).map_err(failed)?;
    }
    let options = CString::new(options).map_err(|error| failed(error.into()))?;
    mount(kind, target, kind, MountFlags::empty(), &*options).map_err(|error| failed(error.into()))
}

/// Loads the modules, mounts the share and sets the environment. What the host can do without is returned as warnings.
pub(crate) fn prepare() -> Result<Vec<String>, SystemError> {
    let path = "/etc/lab/modules";
    let list = fs::read_to_string(path).map_err(|source| SystemError::Read { path, source })?;
    for line in list.lines() {
        let (file, parameters) = line.split_once(' ').unwrap_or((line, ""));
        load_module(file, parameters)?;
    }
    let options = c"trans=virtio,version=9p2000.L,cache=loose,msize=524288";
    mount("share", SHARE, "9p", MountFlags::RDONLY, options).map_err(|error| {
        SystemError::Mount {
            kind: "9p",
            target: SHARE,
            source: error.into(),
        }
    })?;
    let mut warnings = Vec::new();
    // Loopback, for tests of sockets.
    match Command::new("/bin/busybox")
        .args(["ip", "link", "set", "lo", "up"])
        .status()
    {
        Ok(status) if status.success() => {}
        Ok(status) => warnings.push(format!("the loopback interface stays down: {status}")),
        Err(error) => warnings.push(format!("the loopback interface stays down: {error}")),
    }
    Ok(warnings)
}

fn load_module(path: &str, parameters: &str) -> Result<(), SystemError> {
    let failed = |source| SystemError::Module {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let parameters = CString::new(parameters).map_err(|error| failed(error.into()))?;
    match finit_module(&file, &parameters, 0) {
        // A module that another one has asked the kernel for meanwhile.
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

/// Environment of what the agent starts.
pub(crate) fn environment() -> [(&'static str, &'static str); 3] {
    [("PATH", PATH), ("HOME", "/root"), ("TERM", "linux")]
}

pub(crate) fn kernel_release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

pub(crate) fn uptime_seconds() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or_default()
}
