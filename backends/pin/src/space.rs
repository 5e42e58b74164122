//! Either kind of address space, so that who uses one need not care which.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use serde::Serialize;
use thiserror::Error;

use crate::address::PciAddress;
use crate::attach::{AttachError, DetachError};
use crate::host::Host;
use crate::iommufd::Iommufd;
use crate::limits::Limits;
use crate::locate::PciFunction;
use crate::mapper::{DmaFacts, DmaLease, DmaMapper, DmaRequest, MapError, UnmapError};
use crate::node::NodeError;
use crate::type1::Type1;
use crate::vfio::VfioFunction;

/// How devices are given their address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SpaceKind {
    /// A VFIO container with groups.
    Type1,
    /// iommufd.
    Iommufd,
}

impl fmt::Display for SpaceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Type1 => "type1",
            Self::Iommufd => "iommufd",
        })
    }
}

/// There is no address space to be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Its node does not open.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// VFIO is there, its IOMMU driver is not.
    #[error("VFIO has no type1 IOMMU driver: `modprobe vfio_iommu_type1`")]
    NoType1,
    /// The kernel refused.
    #[error("the kernel makes no {kind} address space")]
    Refused {
        /// Which kind.
        kind: SpaceKind,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// What an address space is and has, for people and programs that ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SpaceFacts {
    /// Its kind.
    pub kind: SpaceKind,
    /// What is mapped.
    #[serde(flatten)]
    pub dma: DmaFacts,
    /// Who reaches it.
    pub devices: Vec<PciAddress>,
}

/// An address space of devices.
#[derive(Debug)]
pub enum AddressSpace {
    /// A VFIO container with groups.
    Type1(Type1),
    /// iommufd.
    Iommufd(Iommufd),
}

impl AddressSpace {
    /// An empty address space of a kind.
    pub fn open(kind: SpaceKind, host: Host) -> Result<Self, OpenError> {
        Ok(match kind {
            SpaceKind::Type1 => Self::Type1(Type1::open_on(host)?),
            SpaceKind::Iommufd => Self::Iommufd(Iommufd::open_on(host)?),
        })
    }

    /// Which kind it is.
    pub fn kind(&self) -> SpaceKind {
        match self {
            Self::Type1(_) => SpaceKind::Type1,
            Self::Iommufd(_) => SpaceKind::Iommufd,
        }
    }

    /// Makes a function this process's, and what is mapped here reachable by it.
    pub fn attach(&self, function: &PciFunction) -> Result<VfioFunction, AttachError> {
        match self {
            Self::Type1(space) => space.attach(function),
            Self::Iommufd(space) => space.attach(function),
        }
    }

    /// The same for a device file that somebody else has opened: iommufd only.
    pub fn attach_fd(&self, device: OwnedFd) -> Result<VfioFunction, AttachError> {
        match self {
            Self::Type1(space) => space.attach_fd(device),
            Self::Iommufd(space) => space.attach_fd(device),
        }
    }

    /// The undo of an attach. KVM has forgotten the function's file before, and its registers are unmapped.
    pub fn detach(&self, function: VfioFunction) -> Result<(), DetachError> {
        match self {
            Self::Type1(space) => space.detach(function),
            Self::Iommufd(space) => space.detach(function),
        }
    }

    /// What can be mapped now. Attached devices narrow it.
    pub fn limits(&self) -> io::Result<Limits> {
        match self {
            Self::Type1(space) => space.limits(),
            Self::Iommufd(space) => space.limits(),
        }
    }

    /// What it is and has.
    pub fn space_facts(&self) -> SpaceFacts {
        SpaceFacts {
            kind: self.kind(),
            dma: self.facts(),
            devices: match self {
                Self::Type1(space) => space.attached(),
                Self::Iommufd(space) => space.attached(),
            },
        }
    }

    fn mapper(&self) -> &dyn DmaMapper {
        match self {
            Self::Type1(space) => space,
            Self::Iommufd(space) => space,
        }
    }
}

impl DmaMapper for AddressSpace {
    fn map(&self, request: &DmaRequest<'_>) -> Result<DmaLease, MapError> {
        self.mapper().map(request)
    }

    fn unmap(&self, lease: DmaLease) -> Result<(), (DmaLease, UnmapError)> {
        self.mapper().unmap(lease)
    }

    fn facts(&self) -> DmaFacts {
        self.mapper().facts()
    }

    fn check(&self, requests: &[DmaRequest<'_>]) -> Result<(), MapError> {
        self.mapper().check(requests)
    }

    fn parallel(&self) -> bool {
        self.mapper().parallel()
    }

    fn counted_bytes(&self) -> Option<u64> {
        self.mapper().counted_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_plain_data() {
        let facts = SpaceFacts {
            kind: SpaceKind::Iommufd,
            dma: DmaFacts {
                ranges: 2,
                pinned_bytes: 4096,
                charged_bytes: 0,
            },
            devices: vec!["0000:01:00.0".parse().unwrap()],
        };
        assert_eq!(
            serde_json::to_string(&facts).unwrap(),
            r#"{"kind":"iommufd","ranges":2,"pinned_bytes":4096,"charged_bytes":0,"devices":["0000:01:00.0"]}"#
        );
    }
}
