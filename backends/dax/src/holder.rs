//! Who has a device open, and who holds a locked range of it.
//!
//! The kernel does not say whose an open-file-description lock is, but procfs shows a lock beside the descriptor
//! that holds it. Best effort: without privilege only one's own processes can be looked into, and a process can
//! leave while it is looked at. An answer is a name for a message, never a basis for a decision.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::device::{DeviceFacts, DeviceNumber};
use crate::host::Host;
use crate::ofd::Span;

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command name, as in `/proc/PID/comm`; `?` when it could not be read.
    pub comm: String,
}

impl Holder {
    fn of(proc: &Path, pid: u32) -> Self {
        let comm = fs::read_to_string(proc.join(pid.to_string()).join("comm"));
        let comm = comm.map_or_else(|_| "?".to_owned(), |text| text.trim_end().to_owned());
        Self { pid, comm }
    }

    /// The calling process.
    pub(crate) fn this_process(proc: &Path) -> Self {
        Self::of(proc, std::process::id())
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.comm)
    }
}

impl Host {
    /// The processes that have the device open, as far as the caller may see; the caller itself is among them when
    /// it has.
    pub fn openers(&self, facts: &DeviceFacts) -> Vec<Holder> {
        let is_device = |metadata: &Metadata| {
            metadata.file_type().is_char_device()
                && DeviceNumber::from_rdev(metadata.rdev()) == facts.number
        };
        let mut holders = Vec::new();
        for pid in pids(self.proc()) {
            if descriptors(self.proc(), pid).any(|(_, metadata)| is_device(&metadata)) {
                holders.push(Holder::of(self.proc(), pid));
            }
        }
        holders
    }
}

/// The process whose lock on `file` is `conflict`.
pub(crate) fn of_lock(proc: &Path, file: &File, conflict: Span) -> Option<Holder> {
    of_locks(proc, file, &[conflict]).pop().flatten()
}

/// For each of these locks on `file`, the process that holds it. Looks at every process once.
pub(crate) fn of_locks(proc: &Path, file: &File, locks: &[Span]) -> Vec<Option<Holder>> {
    let mut holders = vec![None; locks.len()];
    let Ok(inode) = file.metadata() else {
        return holders;
    };
    for pid in pids(proc) {
        for (fd, metadata) in descriptors(proc, pid) {
            if holders.iter().all(Option::is_some) {
                return holders;
            }
            if (metadata.dev(), metadata.ino()) != (inode.dev(), inode.ino()) {
                continue;
            }
            let info = fs::read_to_string(fd_info(proc, pid, &fd)).unwrap_or_default();
            for (lock, holder) in locks.iter().zip(&mut holders) {
                if holder.is_none() && info.lines().any(|line| is_lock(line, *lock)) {
                    *holder = Some(Holder::of(proc, pid));
                }
            }
        }
    }
    holders
}

fn pids(proc: &Path) -> Vec<u32> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

/// The descriptors of a process and what they are open on.
fn descriptors(proc: &Path, pid: u32) -> impl Iterator<Item = (String, Metadata)> {
    let dir = proc.join(pid.to_string()).join("fd");
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries
        .filter_map(io::Result::ok)
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .filter_map(|(fd, path)| Some((fd, fs::metadata(path).ok()?)))
}

fn fd_info(proc: &Path, pid: u32, fd: &str) -> PathBuf {
    proc.join(pid.to_string()).join("fdinfo").join(fd)
}

/// `lock: 1: OFDLCK  ADVISORY  WRITE -1 00:06:88 0 2097151`; the last word is `EOF` for an open end.
fn is_lock(line: &str, conflict: Span) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["lock:", _, "OFDLCK", .., start, end] = words[..] else {
        return false;
    };
    let last = match conflict.len {
        0 => "EOF".to_owned(),
        len => (conflict.offset + (len - 1)).to_string(),
    };
    start == conflict.offset.to_string() && end == last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_are_matched_exactly() {
        let conflict = Span {
            offset: 4096,
            len: 8192,
        };
        let line = |kind, start, end| {
            format!("lock:\t1: {kind}  ADVISORY  WRITE -1 00:06:88 {start} {end}")
        };
        assert!(is_lock(&line("OFDLCK", 4096, "12287"), conflict));
        assert!(!is_lock(&line("OFDLCK", 4096, "12288"), conflict));
        assert!(!is_lock(&line("OFDLCK", 0, "12287"), conflict));
        assert!(!is_lock(&line("POSIX", 4096, "12287"), conflict));
        assert!(!is_lock("pos:\t0", conflict));
        let open_end = Span { offset: 0, len: 0 };
        assert!(is_lock(&line("OFDLCK", 0, "EOF"), open_end));
    }

    #[test]
    fn a_process_that_can_not_be_seen_has_no_name() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(Holder::of(empty.path(), 7).to_string(), "process 7 (?)");
        assert!(pids(&empty.path().join("absent")).is_empty());
    }
}
