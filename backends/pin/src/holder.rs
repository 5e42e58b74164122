//! Who has a device node open.
//!
//! Best effort: without privilege only one's own processes can be looked into, and a process can leave while it is looked
//! at. An answer is a name for a message, never a basis for a decision.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command name, as in `/proc/PID/comm`; `?` when it could not be read.
    pub comm: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.comm)
    }
}

/// A process that has the character device `node` open, the lowest process id first; this one comes last.
pub(crate) fn of_node(proc: &Path, node: &Path) -> Option<Holder> {
    let this = std::process::id();
    other_of_node(proc, node).or_else(|| find(proc, node, |pid| pid == this))
}

/// A process other than this one that has the character device `node` open.
pub(crate) fn other_of_node(proc: &Path, node: &Path) -> Option<Holder> {
    let this = std::process::id();
    find(proc, node, |pid| pid != this)
}

fn find(proc: &Path, node: &Path, among: impl Fn(u32) -> bool) -> Option<Holder> {
    let device = fs::metadata(node).ok()?;
    if !device.file_type().is_char_device() {
        return None;
    }
    let entries = fs::read_dir(proc).ok()?.flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| among(*pid))
        .collect();
    pids.sort_unstable();
    let pid = pids.into_iter().find(|pid| {
        let fds = fs::read_dir(proc.join(pid.to_string()).join("fd"));
        fds.into_iter().flatten().flatten().any(|fd| {
            // Follows the link of procfs to what is open.
            fs::metadata(fd.path())
                .is_ok_and(|open| open.file_type().is_char_device() && open.rdev() == device.rdev())
        })
    })?;
    let comm = fs::read_to_string(proc.join(pid.to_string()).join("comm"));
    let comm = comm.map_or_else(|_| "?".to_owned(), |text| text.trim_end().to_owned());
    Some(Holder { pid, comm })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_process_that_has_a_node_open_is_found() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, target) in [("12", "/dev/null"), ("7", "/dev/full"), ("9", "/dev/full")] {
            let fds = proc.path().join(pid).join("fd");
            fs::create_dir_all(&fds).unwrap();
            symlink(target, fds.join("3")).unwrap();
        }
        fs::write(proc.path().join("7/comm"), "qemu\n").unwrap();
        fs::create_dir(proc.path().join("self")).unwrap();
        let found = |node: &str| of_node(proc.path(), Path::new(node)).map(|h| h.to_string());
        assert_eq!(found("/dev/full").as_deref(), Some("process 7 (qemu)"));
        assert_eq!(found("/dev/null").as_deref(), Some("process 12 (?)"));
        assert_eq!(found("/dev/zero"), None);
        assert_eq!(found("/dev/nothing"), None);
    }

    #[test]
    fn this_process_is_named_when_nobody_else_has_it() {
        let proc = tempfile::tempdir().unwrap();
        let this = std::process::id();
        let fds = proc.path().join(this.to_string()).join("fd");
        fs::create_dir_all(&fds).unwrap();
        symlink("/dev/full", fds.join("3")).unwrap();
        let node = Path::new("/dev/full");
        assert_eq!(
            of_node(proc.path(), node).map(|holder| holder.pid),
            Some(this)
        );
        assert_eq!(other_of_node(proc.path(), node), None);
    }
}
