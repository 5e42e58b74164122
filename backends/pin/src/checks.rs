//! What is asked before a map, and what the kernel's refusal of one means. The same for both kinds of address space.

#![forbid(unsafe_code)]

use std::io;
use std::path::Path;

use crate::limits::Limits;
use crate::mapper::{DmaMemory, DmaRequest, MapError};
use crate::memlock::{self, MemlockAccount};
use crate::space::SpaceKind;

/// An address space that is asked to take memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) kind: SpaceKind,
    pub(crate) proc: &'a Path,
    /// What this address space has charged.
    pub(crate) charged_bytes: u64,
}

impl Asked<'_> {
    /// Memory that the kernel holds for no one.
    pub(crate) fn check_kind(request: &DmaRequest<'_>) -> Result<(), MapError> {
        if request.memory == DmaMemory::FsDax {
            return Err(MapError::FsDax {
                name: request.name.to_owned(),
            });
        }
        Ok(())
    }

    /// Everything that can be known before the kernel is asked. Gives whether the memory is charged.
    pub(crate) fn check(
        &self,
        limits: &Limits,
        request: &DmaRequest<'_>,
    ) -> Result<bool, MapError> {
        Self::check_kind(request)?;
        limits.check(request)?;
        if !memlock::is_charged(self.kind, request.memory) {
            return Ok(false);
        }
        let account = self.account(request)?;
        account
            .check(self.kind, request.size)
            .map_err(|shortage| MapError::Memlock {
                name: request.name.to_owned(),
                shortage,
            })?;
        // iommufd asks for the capability once and then charges nothing; type1 charges all the same.
        Ok(self.kind == SpaceKind::Type1 || !account.exempt)
    }

    /// The same for several at once: what they need together must be there before the first is pinned.
    pub(crate) fn check_all(
        &self,
        limits: &Limits,
        requests: &[DmaRequest<'_>],
    ) -> Result<(), MapError> {
        let mut limits = limits.clone();
        for request in requests {
            self.check(&limits, request)?;
            limits.entries_left = limits.entries_left.map(|left| left.saturating_sub(1));
        }
        let charged = requests
            .iter()
            .filter(|request| memlock::is_charged(self.kind, request.memory));
        let needed = charged
            .clone()
            .fold(0_u64, |sum, request| sum.saturating_add(request.size));
        let Some(first) = charged.clone().next() else {
            return Ok(());
        };
        let account = self.account(first)?;
        account
            .check(self.kind, needed)
            .map_err(|shortage| MapError::Memlock {
                name: match charged.count() {
                    1 => first.name.to_owned(),
                    count => format!("{} (with {} more)", first.name, count - 1),
                },
                shortage,
            })
    }

    /// What the kernel's refusal means.
    pub(crate) fn refused(&self, request: &DmaRequest<'_>, source: io::Error) -> MapError {
        let name = request.name.to_owned();
        let DmaRequest {
            iova, size, memory, ..
        } = *request;
        match (source.raw_os_error(), memory) {
            (Some(libc::EEXIST), _) => MapError::Taken { name, iova, size },
            (Some(libc::ENOSPC), _) if self.kind == SpaceKind::Type1 => {
                MapError::NoEntries { name, iova }
            }
            (_, DmaMemory::Registers) => MapError::Registers {
                name,
                iova,
                kind: self.kind,
                source,
            },
            (Some(libc::EFAULT | libc::EOPNOTSUPP), DmaMemory::File) => {
                MapError::FileNotPinned { name, source }
            }
            (Some(libc::EFAULT | libc::EHWPOISON), DmaMemory::DeviceDax) => {
                MapError::Vanished { name, source }
            }
            (Some(libc::ENOMEM), _) => self.no_memory(request, source),
            _ => MapError::Refused {
                name,
                iova,
                size,
                source,
            },
        }
    }

    /// The limit of locked memory, in most cases. iommufd's account is the user's, of which only a part is known here.
    fn no_memory(&self, request: &DmaRequest<'_>, source: io::Error) -> MapError {
        let name = request.name.to_owned();
        let is_charged = memlock::is_charged(self.kind, request.memory);
        if let Some(account) = self.account(request).ok().filter(|_| is_charged) {
            let shortage = match (self.kind, account.limit_bytes.filter(|_| !account.exempt)) {
                (SpaceKind::Iommufd, Some(limit)) => {
                    Some(account.shortage(self.kind, request.size, limit))
                }
                _ => account.check(self.kind, request.size).err(),
            };
            if let Some(shortage) = shortage {
                return MapError::Memlock { name, shortage };
            }
        }
        if request.memory == DmaMemory::DeviceDax && self.kind == SpaceKind::Type1 {
            return MapError::DaxReferences { name, source };
        }
        MapError::Refused {
            name,
            iova: request.iova,
            size: request.size,
            source,
        }
    }

    fn account(&self, request: &DmaRequest<'_>) -> Result<MemlockAccount, MapError> {
        let mut account =
            MemlockAccount::of_this_process(self.proc).map_err(|source| MapError::Account {
                name: request.name.to_owned(),
                source,
            })?;
        if self.kind == SpaceKind::Iommufd {
            account.used_bytes = self.charged_bytes;
        }
        Ok(account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    const M: u64 = 1 << 20;

    /// A process that may lock 8M and has locked 4M.
    fn proc(caps: &str) -> TempDir {
        let proc = tempfile::tempdir().unwrap();
        let dir = proc.path().join("self");
        fs::create_dir(&dir).unwrap();
        fs::write(
            dir.join("limits"),
            "Max locked memory  8388608  8388608  bytes\n",
        )
        .unwrap();
        fs::write(
            dir.join("status"),
            format!("VmLck:\t4096 kB\nCapEff:\t{caps}\n"),
        )
        .unwrap();
        proc
    }

    fn asked(kind: SpaceKind, proc: &TempDir) -> Asked<'_> {
        Asked {
            kind,
            proc: proc.path(),
            charged_bytes: M,
        }
    }

    fn request(memory: DmaMemory, size: u64) -> DmaRequest<'static> {
        DmaRequest {
            name: "zone z0",
            iova: 0,
            host_address: M,
            size,
            memory,
        }
    }

    const ANY: Limits = Limits {
        align_bytes: 4096,
        ranges: None,
        entries_left: None,
    };

    fn check(kind: SpaceKind, memory: DmaMemory, size: u64) -> Result<bool, MapError> {
        asked(kind, &proc("0")).check(&ANY, &request(memory, size))
    }

    #[test]
    fn each_path_has_its_account() {
        use DmaMemory::{Anonymous, DeviceDax, Registers};
        use SpaceKind::{Iommufd, Type1};
        // The process has locked 4M, this address space 1M; the limit is 8M.
        assert!(check(Type1, Anonymous, 4 * M).unwrap());
        check(Type1, Anonymous, 5 * M).unwrap_err();
        assert!(check(Iommufd, Anonymous, 7 * M).unwrap());
        check(Iommufd, Anonymous, 8 * M).unwrap_err();
        assert!(!check(Type1, DeviceDax, 1 << 40).unwrap());
        let error = check(Iommufd, DeviceDax, 1 << 40).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("zone z0 can't be pinned: 1T more are needed")
        );
        assert!(!check(Iommufd, Registers, 1 << 40).unwrap());
    }

    #[test]
    fn what_is_needed_together_is_known_before_the_first_is_pinned() {
        let proc = proc("0");
        let asked = asked(SpaceKind::Type1, &proc);
        let of = |memory, size| request(memory, size);
        let both = [
            of(DmaMemory::Anonymous, 3 * M),
            of(DmaMemory::DeviceDax, 64 * M),
        ];
        asked.check_all(&ANY, &both).unwrap();
        asked.check_all(&ANY, &[]).unwrap();
        let three = [both[0], both[1], of(DmaMemory::Hugetlb, 2 * M)];
        let error = asked.check_all(&ANY, &three).unwrap_err().to_string();
        assert!(
            error.starts_with("zone z0 (with 1 more) can't be pinned: 5M more"),
            "{error}"
        );

        let two_left = Limits {
            entries_left: Some(2),
            ..ANY
        };
        let dax = of(DmaMemory::DeviceDax, M);
        asked.check_all(&two_left, &[dax; 2]).unwrap();
        let error = asked.check_all(&two_left, &[dax; 3]).unwrap_err();
        assert!(matches!(error, MapError::NoEntries { .. }), "{error:?}");
    }

    #[test]
    fn with_the_capability_no_limit_holds() {
        let proc = proc("0000000000004000");
        let request = request(DmaMemory::Anonymous, 1 << 40);
        assert!(
            asked(SpaceKind::Type1, &proc)
                .check(&ANY, &request)
                .unwrap()
        );
        let charged = asked(SpaceKind::Iommufd, &proc).check(&ANY, &request);
        assert!(!charged.unwrap());
    }

    #[test]
    fn fs_dax_is_refused_before_the_kernel_is_asked() {
        let error = check(SpaceKind::Type1, DmaMemory::FsDax, M).unwrap_err();
        assert!(
            error.to_string().contains("ndctl create-namespace"),
            "{error}"
        );
    }

    #[test]
    fn a_refusal_is_told_by_what_was_to_be_mapped() {
        use DmaMemory::{Anonymous, DeviceDax, File, Registers};
        let proc = proc("0");
        let refused = |kind, memory, errno| {
            asked(kind, &proc).refused(&request(memory, M), io::Error::from_raw_os_error(errno))
        };
        let (type1, iommufd) = (SpaceKind::Type1, SpaceKind::Iommufd);
        let error = refused(type1, File, libc::EFAULT);
        assert!(matches!(error, MapError::FileNotPinned { .. }), "{error:?}");
        let error = refused(type1, File, libc::EOPNOTSUPP);
        assert!(matches!(error, MapError::FileNotPinned { .. }), "{error:?}");
        let error = refused(type1, DeviceDax, libc::EFAULT);
        assert!(matches!(error, MapError::Vanished { .. }), "{error:?}");
        let error = refused(iommufd, Registers, libc::EFAULT);
        assert!(error.to_string().ends_with("need type1 instead of iommufd"));
        let error = refused(type1, Registers, libc::EINVAL);
        assert!(
            error
                .to_string()
                .ends_with("refuses to map them with type1")
        );
        let error = refused(type1, Anonymous, libc::EEXIST);
        assert!(matches!(error, MapError::Taken { .. }), "{error:?}");
        let error = refused(type1, Anonymous, libc::ENOSPC);
        assert!(matches!(error, MapError::NoEntries { .. }), "{error:?}");
        let error = refused(iommufd, Anonymous, libc::ENOSPC);
        assert!(matches!(error, MapError::Refused { .. }), "{error:?}");
        let error = refused(type1, Anonymous, libc::EFAULT);
        assert!(matches!(error, MapError::Refused { .. }), "{error:?}");
    }

    #[test]
    fn no_memory_is_the_limit_or_the_references() {
        use DmaMemory::{Anonymous, DeviceDax};
        let proc = proc("0");
        let refused = |kind, memory, size| {
            let no_memory = io::Error::from_raw_os_error(libc::ENOMEM);
            asked(kind, &proc).refused(&request(memory, size), no_memory)
        };
        let error = refused(SpaceKind::Type1, Anonymous, 8 * M);
        assert!(matches!(error, MapError::Memlock { .. }), "{error:?}");
        let error = refused(SpaceKind::Type1, Anonymous, M);
        assert!(matches!(error, MapError::Refused { .. }), "{error:?}");
        // Another process of the user can have used up the account.
        let error = refused(SpaceKind::Iommufd, DeviceDax, M);
        assert!(matches!(error, MapError::Memlock { .. }), "{error:?}");
        let error = refused(SpaceKind::Type1, DeviceDax, M);
        assert!(matches!(error, MapError::DaxReferences { .. }), "{error:?}");
    }
}
