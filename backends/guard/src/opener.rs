//! Who is at the door: the process that opens a watched file, as procfs tells.
//!
//! The process waits inside of `open` while it is looked at, so what procfs says of the call is the kernel's own word.
//! Its arguments are the process's word: whoever wants to lie about a target can.

#![forbid(unsafe_code)]

use std::{fmt, fs};

use nix::libc;
use serde::{Deserialize, Serialize};

use crate::host::Host;

/// Who wants something of a device, and through which file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opener {
    /// The process; 0 when it is in another PID namespace.
    pub pid: u32,
    /// Its command name, as in `/proc/PID/comm`; `?` when it could not be read.
    pub name: String,
    /// The file it opens.
    pub file: String,
}

impl fmt::Display for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, name, file } = self;
        write!(f, "{name} (process {pid}, {file})")
    }
}

/// What is known of an opener beyond its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Visitor {
    pub(crate) opener: Opener,
    /// Its words; empty when they could not be read.
    pub(crate) words: Vec<String>,
    /// It opens for reading only: nothing can come of that.
    pub(crate) only_reads: bool,
}

impl Visitor {
    /// The process that a thread belongs to. `None` when it is gone.
    pub(crate) fn process_of(host: &Host, thread: u32) -> Option<u32> {
        let status = fs::read_to_string(host.proc().join(format!("{thread}/status"))).ok()?;
        let tgid = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
        tgid.trim().parse().ok()
    }

    /// The process `pid`, whose thread `thread` waits in the opening of `file`.
    pub(crate) fn look(host: &Host, pid: u32, thread: u32, file: &str) -> Self {
        let read =
            |name: &str| fs::read(host.proc().join(format!("{thread}/{name}"))).unwrap_or_default();
        let comm = String::from_utf8_lossy(&read("comm")).trim_end().to_owned();
        let words = read("cmdline");
        let words = words.strip_suffix(&[0]).unwrap_or(&words);
        let words: Vec<String> = match words {
            [] => Vec::new(),
            words => words
                .split(|byte| *byte == 0)
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect(),
        };
        Self {
            opener: Opener {
                pid,
                name: if comm.is_empty() {
                    "?".to_owned()
                } else {
                    comm
                },
                file: file.to_owned(),
            },
            words,
            only_reads: only_reads(&String::from_utf8_lossy(&read("syscall"))),
        }
    }
}

/// Whether the call in `/proc/TID/syscall` opens for reading only. A call that is not understood may write.
fn only_reads(call: &str) -> bool {
    let mut fields = call.split_whitespace();
    let number: Option<libc::c_long> = fields.next().and_then(|word| word.parse().ok());
    let mut argument = |index: usize| {
        let word = fields.nth(index)?.strip_prefix("0x")?;
        u64::from_str_radix(word, 16).ok()
    };
    let flags = match number {
        #[cfg(target_arch = "x86_64")]
        Some(libc::SYS_open) => argument(1),
        Some(libc::SYS_openat) => argument(2),
        _ => None,
    };
    let writes = (libc::O_ACCMODE | libc::O_TRUNC).unsigned_abs();
    flags.is_some_and(|flags| flags & u64::from(writes) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeHost;

    #[test]
    fn only_a_call_that_is_understood_is_one_that_only_reads() {
        // openat(AT_FDCWD, PATH, O_RDONLY | O_CLOEXEC)
        assert!(only_reads(
            "257 0xffffff9c 0x7ffd1000 0x80000 0x0 0x0 0x0 0x7ffd0f00 0x7f001234"
        ));
        // ... O_WRONLY | O_CREAT | O_TRUNC, a shell's redirection
        assert!(!only_reads(
            "257 0xffffff9c 0x7ffd1000 0x241 0x1b6 0x0 0x0 0x7ffd0f00 0x7f001234"
        ));
        assert!(!only_reads(
            "257 0xffffff9c 0x7ffd1000 0x2 0x0 0x0 0x0 0x7ffd0f00 0x7f001234"
        ));
        #[cfg(target_arch = "x86_64")]
        assert!(only_reads(
            "2 0x7ffd1000 0x0 0x0 0x0 0x0 0x0 0x7ffd0f00 0x7f001234"
        ));
        // openat2 has its flags in memory; creat writes; a task that runs shows nothing.
        for other in [
            "437 0x3 0x7ffd1000 0x0 0x18 0x0 0x0 0x1 0x2",
            "85 0x7ffd 0x0 0x0",
            "running",
            "",
            "-1 0x1 0x2",
        ] {
            assert!(!only_reads(other), "{other}");
        }
    }

    #[test]
    fn words_are_those_of_the_command_line() {
        let host = FakeHost::new();
        host.write("proc/77/cmdline", "sh\0-c\0echo dax1.0 > x\0");
        host.write("proc/77/comm", "sh\n");
        host.write("proc/77/status", "Name:\tsh\nTgid:\t70\nPid:\t77\n");
        assert_eq!(Visitor::process_of(host.host(), 77), Some(70));
        let visitor = Visitor::look(host.host(), 70, 77, "/sys/x");
        assert_eq!(visitor.words, ["sh", "-c", "echo dax1.0 > x"]);
        assert_eq!(
            (visitor.opener.pid, visitor.opener.name.as_str()),
            (70, "sh")
        );
        assert!(!visitor.only_reads);
        let gone = Visitor::look(host.host(), 1, 1, "/sys/x");
        assert_eq!((gone.opener.name.as_str(), gone.words.len()), ("?", 0));
        assert_eq!(Visitor::process_of(host.host(), 1), None);
    }
}
