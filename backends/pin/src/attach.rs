//! Why a function does not become this process's, or does not stop being it.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::address::PciAddress;
use crate::locate::LocateError;
use crate::node::NodeError;
use crate::space::SpaceKind;

/// A function can't be attached. Nothing of it is held.
#[derive(Debug, Error)]
pub enum AttachError {
    /// Its node does not open.
    #[error("{address} can't be attached")]
    Node {
        /// Which function.
        address: PciAddress,
        /// Why.
        #[source]
        source: NodeError,
    },
    /// It is not VFIO's, or not only.
    #[error(transparent)]
    Locate(#[from] LocateError),
    /// The kernel offers groups only.
    #[error(
        "{address} has no VFIO device file, which iommufd needs: Linux 6.6 or later with CONFIG_VFIO_DEVICE_CDEV makes \
         /dev/vfio/devices/vfioN; use type1 instead of iommufd on this kernel"
    )]
    NoCdev {
        /// Which function.
        address: PciAddress,
    },
    /// The kernel says that the host uses a part of the group.
    #[error(
        "{address} can't be attached: its IOMMU group {group} is not viable, the host uses a function of it; \
         `lspci -k -s` each of `ls /sys/kernel/iommu_groups/{group}/devices`, and give those with a host driver to VFIO"
    )]
    NotViable {
        /// Which function.
        address: PciAddress,
        /// Its group.
        group: u32,
    },
    /// The host can't keep the device's interrupts apart.
    #[error(
        "{address} can't be attached: without interrupt remapping a device can fake interrupts of the host, and the \
         kernel refuses that (dmesg: unsafe_interrupts); switch interrupt remapping on in the firmware (Intel VT-d, \
         AMD-Vi; no intremap=off on the kernel command line), or, if every guest with a device is trusted, accept the \
         risk with `echo 1 > /sys/module/{}/parameters/allow_unsafe_interrupts`", module(*kind)
    )]
    UnsafeInterrupts {
        /// Which function.
        address: PciAddress,
        /// Whose parameter it is.
        kind: SpaceKind,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another process has a function of the group, or interrupts can't be kept apart: the kernel does not tell which.
    #[error(
        "{address} can't be attached: another process has {sibling}, which shares its IOMMU group, or the host has no \
         interrupt remapping (dmesg: unsafe_interrupts); give all functions of a group to one guest, and switch interrupt \
         remapping on in the firmware"
    )]
    GroupOrInterrupts {
        /// Which function.
        address: PciAddress,
        /// One that shares its group.
        sibling: PciAddress,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is attached already.
    #[error("{address} is attached to this address space already: give the guest another device")]
    Twice {
        /// Which function.
        address: PciAddress,
    },
    /// The function's IOMMU can't take what is mapped.
    #[error(
        "{address} can't be attached: memory that is mapped for the other devices lies where this device's IOMMU can't \
         map (`cat /sys/kernel/iommu_groups/{group}/reserved_regions`); attach it before the memory is mapped, or move \
         the memory"
    )]
    Conflict {
        /// Which function.
        address: PciAddress,
        /// Its group.
        group: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// iommufd pins what is mapped when a first device comes.
    #[error(
        "{address} can't be attached: the memory that is mapped can't be pinned for it; RLIMIT_MEMLOCK of this user may \
         be too low (`ulimit -l`), or a part of the memory is gone"
    )]
    Pin {
        /// Which function.
        address: PciAddress,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// type1 takes no open device.
    #[error(
        "an open device file can't be attached with type1: the device belongs to the container of the process that \
         opened it; name the device by its path, or use iommufd with a file of /dev/vfio/devices/"
    )]
    NoDescriptors,
    /// VFIO does not call it a PCI function.
    #[error("{address}: VFIO does not offer it as a PCI function: bind it to vfio-pci")]
    NotPci {
        /// Which function.
        address: PciAddress,
    },
    /// A step of the set-up.
    #[error("can't {what} {address}")]
    Step {
        /// Which function.
        address: PciAddress,
        /// The step.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn module(kind: SpaceKind) -> &'static str {
    match kind {
        SpaceKind::Type1 => "vfio_iommu_type1",
        SpaceKind::Iommufd => "iommufd",
    }
}

/// A function's file is closed, but its group stays where it was.
#[derive(Debug, Error)]
#[error(
    "IOMMU group {group} of {address} does not leave its container: another descriptor of a device of it is open, or \
     registers of one are still mapped; close or unmap those"
)]
pub struct DetachError {
    /// Which function.
    pub address: PciAddress,
    /// Its group.
    pub group: u32,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// The functions that are attached to one address space.
#[derive(Debug, Default, Clone)]
pub(crate) struct Claims(Arc<Mutex<BTreeSet<PciAddress>>>);

impl Claims {
    /// Takes an address until the claim is dropped.
    pub(crate) fn claim(&self, address: PciAddress) -> Result<Claim, AttachError> {
        if !self.set().insert(address) {
            return Err(AttachError::Twice { address });
        }
        Ok(Claim {
            claims: self.clone(),
            address,
        })
    }

    pub(crate) fn all(&self) -> Vec<PciAddress> {
        self.set().iter().copied().collect()
    }

    fn set(&self) -> MutexGuard<'_, BTreeSet<PciAddress>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attached function's entry.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Claims,
    address: PciAddress,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.set().remove(&self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_attached_once_at_a_time() {
        let claims = Claims::default();
        let address: PciAddress = "0000:01:00.0".parse().unwrap();
        let claim = claims.claim(address).unwrap();
        let error = claims.claim(address).unwrap_err();
        assert!(
            error.to_string().starts_with("0000:01:00.0 is attached"),
            "{error}"
        );
        assert_eq!(claims.all(), [address]);
        drop(claim);
        drop(claims.claim(address).unwrap());
        assert!(claims.all().is_empty());
    }

    #[test]
    fn the_risk_of_unsafe_interrupts_is_told_with_the_parameter() {
        let error = AttachError::UnsafeInterrupts {
            address: "0000:01:00.0".parse().unwrap(),
            kind: SpaceKind::Type1,
            source: io::Error::from_raw_os_error(libc::EPERM),
        };
        let text = error.to_string();
        assert!(text.contains("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"));
        assert!(text.contains("trusted"), "{text}");
    }
}
