//! Opening the nodes through which VFIO and iommufd are reached, and saying why one does not open.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::holder::{self, Holder};
use crate::host::Host;

/// A node that does not open.
#[derive(Debug, Error)]
pub enum NodeError {
    /// It is not there.
    #[error("{} is not there: {mend}", path.display())]
    Missing {
        /// The node.
        path: PathBuf,
        /// What makes it appear.
        mend: &'static str,
    },
    /// Its owner and mode do not let this user in.
    #[error(
        "no permission to open {0} for reading and writing as uid {uid}: it belongs to {owner}:{group} with mode \
         {mode:04o}; `chgrp kvm {0} && chmod g+rw {0}` and join that group, or for good a udev rule `{rule}, \
         GROUP=\"kvm\", MODE=\"0660\"`",
        path.display()
    )]
    NoPermission {
        /// The node.
        path: PathBuf,
        /// The caller's effective user id.
        uid: u32,
        /// The node's owner.
        owner: u32,
        /// The node's group.
        group: u32,
        /// The node's permission bits.
        mode: u32,
        /// What a udev rule would match it by.
        rule: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something other than the node's mode forbids it.
    #[error(
        "opening {0} is forbidden, whatever its mode: a device cgroup or security module denies it; allow it for this \
         service (systemd: `DeviceAllow={0} rw`)",
        path.display()
    )]
    Forbidden {
        /// The node.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it.
    #[error(
        "{} is in use by {}: stop that user, or give this guest another device",
        path.display(), by(holder.as_ref())
    )]
    Busy {
        /// The node.
        path: PathBuf,
        /// Who has it, as far as procfs tells.
        holder: Option<Holder>,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The open failed in another way.
    #[error("can't open {}", path.display())]
    Refused {
        /// The node.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn by(holder: Option<&Holder>) -> String {
    holder.map_or_else(
        || "a process that can't be seen (`fuser -v` as root names it)".to_owned(),
        Holder::to_string,
    )
}

/// A node, and what its errors say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node<'a> {
    pub(crate) path: &'a Path,
    /// What makes it appear.
    pub(crate) mend: &'static str,
    /// What a udev rule would match it by.
    pub(crate) rule: &'static str,
}

impl Node<'_> {
    /// Opens it for reading and writing.
    pub(crate) fn open(&self, host: &Host) -> Result<File, NodeError> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path)
            .map_err(|source| self.error(host, source))
    }

    /// What an error of opening it, or of claiming what it stands for, means.
    pub(crate) fn error(&self, host: &Host, source: io::Error) -> NodeError {
        let path = self.path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => NodeError::Missing {
                path,
                mend: self.mend,
            },
            Some(libc::EPERM) => NodeError::Forbidden { path, source },
            Some(libc::EBUSY) => NodeError::Busy {
                holder: holder::of_node(host.proc(), self.path),
                path,
                source,
            },
            Some(libc::EACCES) => match self.path.metadata() {
                Ok(metadata) => NodeError::NoPermission {
                    uid: rustix::process::geteuid().as_raw(),
                    owner: metadata.uid(),
                    group: metadata.gid(),
                    mode: metadata.mode() & 0o7777,
                    rule: self.rule,
                    path,
                    source,
                },
                Err(_) => NodeError::Refused { path, source },
            },
            _ => NodeError::Refused { path, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(path: &str, errno: i32) -> NodeError {
        let node = Node {
            path: Path::new(path),
            mend: "`modprobe vfio-pci`",
            rule: "SUBSYSTEM==\"vfio\"",
        };
        node.error(&Host::system(), io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn each_refusal_says_what_mends_it() {
        let text = error("/dev/null", libc::EACCES).to_string();
        assert!(text.contains("it belongs to 0:0 with mode 0666"), "{text}");
        assert!(text.contains("`chgrp kvm /dev/null && chmod g+rw /dev/null`"));
        assert!(text.contains("`SUBSYSTEM==\"vfio\", GROUP=\"kvm\", MODE=\"0660\"`"));
        let text = error("/dev/null", libc::EPERM).to_string();
        assert!(text.contains("DeviceAllow=/dev/null rw"), "{text}");
        let text = error("/dev/nothing", libc::EBUSY).to_string();
        assert!(
            text.contains("in use by a process that can't be seen"),
            "{text}"
        );
        let text = error("/dev/null", libc::EIO).to_string();
        assert_eq!(text, "can't open /dev/null");
    }

    #[test]
    fn a_node_that_is_not_there_says_what_makes_it_appear() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vfio");
        let node = Node {
            path: &path,
            mend: "`modprobe vfio-pci`",
            rule: "",
        };
        let error = node.open(&Host::system()).unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("vfio is not there: `modprobe vfio-pci`")
        );
        File::create(&path).unwrap();
        node.open(&Host::system()).unwrap();
    }
}
