//! KVM's list of the VFIO files a VM uses (`KVM_DEV_TYPE_VFIO`, virt/kvm/vfio.c).
//!
//! KVM asks the files on it whether their devices do DMA past the caches, and then has the guest's `WBINVD` do something;
//! drivers that need to know their VM learn it by it. The list is made with the VM and goes with it: Linux before 6.6 lets
//! a VM have one in its life, and a device that comes and goes is to leave no descriptor behind.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// The list of one VM.
#[derive(Debug)]
pub struct VfioRegistry {
    /// Or what KVM said instead: a kernel without VFIO has none, and most VMs need none.
    device: Result<DeviceFd, i32>,
}

impl VfioRegistry {
    pub(super) fn new(vm: &VmFd) -> Self {
        let mut asked = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            fd: 0,
            flags: 0,
        };
        let device = vm.create_device(&mut asked);
        Self {
            device: device.map_err(kvm_ioctls::Error::errno),
        }
    }

    /// Puts a VFIO group or device file on the list. A file can be on it once.
    pub fn add(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file)
    }

    /// The undo of [`VfioRegistry::add`].
    pub fn remove(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_DEL, file)
    }

    fn set(&self, what: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        let device = self.device.as_ref();
        let device = device.map_err(|code| io::Error::from_raw_os_error(*code))?;
        let number = file.as_raw_fd();
        // The kernel reads the number from this address before the call returns.
        let address = std::ptr::from_ref(&number).expose_provenance();
        let attribute = kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: what.into(),
            addr: address as u64,
            flags: 0,
        };
        device.set_device_attr(&attribute).map_err(io::Error::from)
    }
}
