//! `/dev/kvm` itself: opened once, checked once.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

/// `KVM_API_VERSION` of the stable interface (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// What every guest needs; all of it is in any x86 kernel that daxhund supports (6.1 and later).
const REQUIRED: [(Cap, &str); 10] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// `/dev/kvm` can't be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no such device node.
    #[error(
        "{} does not exist: this host offers no KVM; load its module (`modprobe kvm_amd` or `modprobe kvm_intel`) \
         and see that virtualisation is enabled in the firmware",
        path.display()
    )]
    Missing {
        /// The device node asked for.
        path: PathBuf,
    },
    /// It is there, but not for this user.
    #[error(
        "{} may not be opened by uid {uid}: it belongs to uid {owner} gid {group} with mode {mode:o}; \
         add the user to its group (`usermod -aG kvm NAME`) or run as root",
        path.display()
    )]
    NotPermitted {
        /// The device node asked for.
        path: PathBuf,
        /// Who asked.
        uid: u32,
        /// Owner of the node.
        owner: u32,
        /// Group of the node.
        group: u32,
        /// Permission bits of the node.
        mode: u32,
    },
    /// It is something else.
    #[error("{} is not a character device, so it is not KVM", path.display())]
    NotKvm {
        /// The path asked for.
        path: PathBuf,
    },
    /// The module is loaded but has nothing to run on, or another failure.
    #[error("{} can't be opened; `dmesg | grep kvm` tells why the module refuses", path.display())]
    Other {
        /// The device node asked for.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An interface nobody has shipped since 2007, or not KVM at all.
    #[error("{} speaks KVM API version {found}, daxhund needs {API_VERSION}", path.display())]
    ApiVersion {
        /// The device node asked for.
        path: PathBuf,
        /// What it answered.
        found: i32,
    },
    /// The host kernel lacks something.
    #[error(
        "the host's KVM lacks {name}; daxhund needs Linux 6.1 or later with the full in-kernel irqchip"
    )]
    Capability {
        /// Name of the capability in `linux/kvm.h`.
        name: &'static str,
    },
}

/// An open `/dev/kvm` that has what daxhund needs.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self, OpenError> {
        Self::open_at(Path::new("/dev/kvm"))
    }

    /// Opens KVM at another device node.
    pub fn open_at(path: &Path) -> Result<Self, OpenError> {
        let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| {
            OpenError::NotKvm {
                path: path.to_owned(),
            }
        })?;
        let kvm =
            Kvm::new_with_path(c_path).map_err(|e| Self::explain(path, io::Error::from(e)))?;
        let found = kvm.get_api_version();
        if found != API_VERSION {
            return Err(OpenError::ApiVersion {
                path: path.to_owned(),
                found,
            });
        }
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(OpenError::Capability { name });
        }
        Ok(Self { kvm })
    }

    fn explain(path: &Path, source: io::Error) -> OpenError {
        let path = path.to_owned();
        match (source.kind(), std::fs::metadata(&path)) {
            (io::ErrorKind::NotFound, _) => OpenError::Missing { path },
            (io::ErrorKind::PermissionDenied, Ok(meta)) => OpenError::NotPermitted {
                path,
                uid: rustix::process::geteuid().as_raw(),
                owner: meta.uid(),
                group: meta.gid(),
                mode: meta.mode() & 0o7777,
            },
            (_, Ok(meta)) if !meta.file_type().is_char_device() => OpenError::NotKvm { path },
            _ => OpenError::Other { path, source },
        }
    }

    /// Most vCPUs that one VM of this host may have.
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    pub(super) fn kvm(&self) -> &Kvm {
        &self.kvm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_node_names_the_module_to_load() {
        let error = Hypervisor::open_at(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(matches!(error, OpenError::Missing { .. }), "{error}");
        assert!(error.to_string().contains("modprobe kvm_amd"));
    }

    #[test]
    fn a_plain_file_is_not_kvm() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Hypervisor::open_at(file.path()).unwrap_err();
        assert!(
            matches!(
                error,
                OpenError::ApiVersion { .. } | OpenError::NotKvm { .. }
            ),
            "{error}"
        );
    }
}
