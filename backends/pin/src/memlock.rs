//! What may be pinned: the account behind `RLIMIT_MEMLOCK`.
//!
//! Two paths, two accounts:
//! - type1 charges the process (`VmLck`). Pages that are reserved, which device-dax pages are, are not charged.
//! - iommufd charges the user, over all of their processes, and charges device-dax too. procfs does not show that account,
//!   so only what this address space itself holds is known here.
//!
//! With `CAP_IPC_LOCK` no limit holds on either path. The kernel asks for it in the initial user namespace: a container's
//! root does not have it.
//!
//! The check only refuses what can't succeed; the kernel has the last word.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::host::Host;
use crate::mapper::DmaMemory;
use crate::size::ByteSize;
use crate::space::SpaceKind;

const CAP_IPC_LOCK: u32 = 14;

/// Limit and use of locked memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemlockAccount {
    /// `RLIMIT_MEMLOCK`; `None`: unlimited.
    pub limit_bytes: Option<u64>,
    /// What is charged now, as far as it is known.
    pub used_bytes: u64,
    /// `CAP_IPC_LOCK`: the limit does not hold.
    pub exempt: bool,
}

/// An account that can't be read.
#[derive(Debug, Error)]
#[error("how much memory may be locked can't be told from {}", path.display())]
pub struct AccountError {
    /// What was read.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl Host {
    /// What this process may lock. iommufd's use, which is its user's, is not in it.
    pub fn memlock_account(&self) -> Result<MemlockAccount, AccountError> {
        MemlockAccount::of_this_process(self.proc())
    }
}

impl MemlockAccount {
    /// The account of this process, from `/proc/self`.
    pub(crate) fn of_this_process(proc: &Path) -> Result<Self, AccountError> {
        let read = |name: &str| {
            let path = proc.join("self").join(name);
            fs::read_to_string(&path).map_err(|source| AccountError { path, source })
        };
        let malformed = |name: &str| AccountError {
            path: proc.join("self").join(name),
            source: io::Error::from(io::ErrorKind::InvalidData),
        };
        let status = read("status")?;
        let limit_bytes = memlock_limit(&read("limits")?).ok_or_else(|| malformed("limits"))?;
        let used_bytes = kib(&status, "VmLck:").ok_or_else(|| malformed("status"))?;
        // Without the map there are no user namespaces.
        let initial = read("uid_map").map_or(true, |map| is_initial_namespace(&map));
        Ok(Self {
            limit_bytes,
            used_bytes,
            exempt: initial && has_ipc_lock(&status),
        })
    }

    /// Whether `needed` more bytes can be charged.
    pub fn check(&self, kind: SpaceKind, needed: u64) -> Result<(), Shortage> {
        let Some(limit) = self.limit_bytes.filter(|_| !self.exempt) else {
            return Ok(());
        };
        if self.used_bytes.saturating_add(needed) <= limit {
            return Ok(());
        }
        Err(self.shortage(kind, needed, limit))
    }

    pub(crate) fn shortage(&self, kind: SpaceKind, needed: u64, limit: u64) -> Shortage {
        Shortage {
            kind,
            needed_bytes: needed,
            used_bytes: self.used_bytes,
            limit_bytes: limit,
            pid: std::process::id(),
        }
    }
}

/// Whether memory of a kind is charged.
pub(crate) fn is_charged(kind: SpaceKind, memory: DmaMemory) -> bool {
    match (kind, memory) {
        (_, DmaMemory::Registers) | (SpaceKind::Type1, DmaMemory::DeviceDax) => false,
        (_, _) => true,
    }
}

/// A limit that is too low.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Whose account it is.
    pub kind: SpaceKind,
    /// What was asked for.
    pub needed_bytes: u64,
    /// What was charged before.
    pub used_bytes: u64,
    /// The limit.
    pub limit_bytes: u64,
    /// This process.
    pub pid: u32,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = match self.kind {
            SpaceKind::Type1 => "this process",
            SpaceKind::Iommufd => "all processes of this user",
        };
        let enough = self.used_bytes.saturating_add(self.needed_bytes);
        write!(
            f,
            "{} more are needed, {} are known to be in use, and {whose} may lock {} (RLIMIT_MEMLOCK): start it with \
             `ulimit -l {}` \
             (systemd: `LimitMEMLOCK={enough}`), or now `prlimit --pid {} --memlock={enough}`",
            ByteSize(self.needed_bytes),
            ByteSize(self.used_bytes),
            ByteSize(self.limit_bytes),
            enough.div_ceil(1024),
            self.pid,
        )
    }
}

/// Bytes that this process holds for devices, as the kernel counts them while a map is under way.
pub(crate) fn counted_bytes(proc: &Path, kind: SpaceKind) -> Option<u64> {
    let status = fs::read_to_string(proc.join("self/status")).ok()?;
    match kind {
        SpaceKind::Type1 => kib(&status, "VmLck:"),
        SpaceKind::Iommufd => kib(&status, "VmPin:"),
    }
}

/// `VmLck:       64 kB`, in bytes.
fn kib(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let mut words = line.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    number.checked_mul(1024)
}

/// The soft limit in `/proc/self/limits`: `Max locked memory         8388608              8388608              bytes`.
#[allow(clippy::option_option)] // Malformed, unlimited, limited.
fn memlock_limit(limits: &str) -> Option<Option<u64>> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(None),
        number => Some(Some(number.parse().ok()?)),
    }
}

fn has_ipc_lock(status: &str) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|caps| caps & (1 << CAP_IPC_LOCK) != 0)
}

/// The initial user namespace maps every id to itself.
fn is_initial_namespace(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const M: u64 = 1 << 20;
    const MAP: &str = "         0          0 4294967295\n";

    fn fake(status: &str, limit: &str, uid_map: &str) -> Result<MemlockAccount, AccountError> {
        let proc = tempfile::tempdir().unwrap();
        let dir = proc.path().join("self");
        fs::create_dir(&dir).unwrap();
        let limits = format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max processes             63704                63704                processes \n\
             Max locked memory         {limit}              8388608              bytes     \n"
        );
        fs::write(dir.join("limits"), limits).unwrap();
        fs::write(dir.join("status"), status).unwrap();
        fs::write(dir.join("uid_map"), uid_map).unwrap();
        MemlockAccount::of_this_process(proc.path())
    }

    fn status(locked: u64, caps: u64) -> String {
        format!("Name:\tx\nVmLck:\t{locked:8} kB\nVmPin:\t       0 kB\nCapEff:\t{caps:016x}\n")
    }

    #[test]
    fn the_account_is_read_from_procfs() {
        let account = fake(&status(64, 0), "8388608", MAP).unwrap();
        let wanted = MemlockAccount {
            limit_bytes: Some(8 * M),
            used_bytes: 64 << 10,
            exempt: false,
        };
        assert_eq!(account, wanted);
        let account = fake(&status(0, 0), "unlimited", MAP).unwrap();
        assert_eq!(account.limit_bytes, None);
        assert!(fake(&status(0, 1 << 14), "65536", MAP).unwrap().exempt);
        // What looks like root in a container is not exempt.
        let inside = fake(&status(0, u64::MAX), "65536", "0 100000 65536\n").unwrap();
        assert!(!inside.exempt);
        Host::system().memlock_account().unwrap();
    }

    #[test]
    fn an_account_that_makes_no_sense_is_an_error() {
        let error = fake("Name:\tx\n", "65536", MAP).unwrap_err();
        assert!(error.path.ends_with("self/status"));
        let error = fake(&status(0, 0), "much", MAP).unwrap_err();
        assert!(error.path.ends_with("self/limits"));
        MemlockAccount::of_this_process(Path::new("/nowhere")).unwrap_err();
    }

    #[test]
    fn the_shortage_says_what_is_enough() {
        let account = fake(&status(1024, 0), "8388608", MAP).unwrap();
        account.check(SpaceKind::Type1, 7 * M).unwrap();
        let shortage = account.check(SpaceKind::Type1, 8 * M).unwrap_err();
        let text = shortage.to_string();
        let pid = std::process::id();
        assert_eq!(
            text,
            format!(
                "8M more are needed, 1M are known to be in use, and this process may lock 8M (RLIMIT_MEMLOCK): start it with \
                 `ulimit -l 9216` (systemd: `LimitMEMLOCK=9437184`), or now `prlimit --pid {pid} --memlock=9437184`"
            )
        );
        let shortage = account.check(SpaceKind::Iommufd, 8 * M).unwrap_err();
        assert!(
            shortage
                .to_string()
                .contains("all processes of this user may lock 8M")
        );
    }

    #[test]
    fn who_charges_what() {
        use DmaMemory::{Anonymous, DeviceDax, File, Hugetlb, Registers};
        for memory in [Anonymous, File, Hugetlb] {
            assert!(is_charged(SpaceKind::Type1, memory) && is_charged(SpaceKind::Iommufd, memory));
        }
        assert!(!is_charged(SpaceKind::Type1, DeviceDax));
        assert!(is_charged(SpaceKind::Iommufd, DeviceDax));
        assert!(!is_charged(SpaceKind::Type1, Registers));
        assert!(!is_charged(SpaceKind::Iommufd, Registers));
    }

    proptest! {
        #[test]
        fn what_is_refused_is_over_the_limit(limit: Option<u64>, used_bytes: u64, exempt: bool, needed: u64) {
            let account = MemlockAccount { limit_bytes: limit, used_bytes, exempt };
            let fits = u128::from(used_bytes) + u128::from(needed) <= limit.map_or(u128::MAX, u128::from);
            // At the very top a sum that saturates is the limit.
            prop_assume!(limit != Some(u64::MAX));
            match account.check(SpaceKind::Type1, needed) {
                Ok(()) => prop_assert!(fits || exempt),
                Err(shortage) => {
                    prop_assert!(!fits && !exempt);
                    prop_assert!(!shortage.to_string().is_empty());
                }
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC*") {
            let _ = memlock_limit(&text);
            let _ = kib(&text, "VmLck:");
            let _ = has_ipc_lock(&text);
        }
    }
}
