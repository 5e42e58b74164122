//! Machine checks: how a guest learns that memory it loads from is not there any more, or is poisoned.
//!
//! The guest sees what hardware would have shown: the exception at the load itself, with the physical address in a bank's
//! registers. Linux then ends the process that loaded, or fails the copy that its kernel made for one; a load of its kernel
//! that has no way out ends the guest.
//! Sources: Intel SDM vol. 3B, 17.3 and 17.9; AMD APM vol. 2, 9.3; Documentation/virt/kvm/api.rst, 4.104 to 4.106.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{KVMIO, kvm_x86_mce};
use kvm_ioctls::{Kvm, VcpuFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_ior_nr!(KVM_X86_GET_MCE_CAP_SUPPORTED, KVMIO, 0x9d, u64);
ioctl_iow_nr!(KVM_X86_SET_MCE, KVMIO, 0x9e, kvm_x86_mce);

/// `IA32_MCG_CAP`: control register present, software recovery, local machine checks.
const MCG_CTL_P: u64 = 1 << 8;
const MCG_SER_P: u64 = 1 << 24;
const MCG_LMCE_P: u64 = 1 << 27;
/// Banks of registers, of which the last is used: the first ones have a meaning of their own on some processors.
const BANKS: u64 = 10;
const BANK: u8 = 9;

/// `IA32_MCG_STATUS`: the interrupted program can go on after the handler, the address of its instruction is the culprit's,
/// a machine check is in progress, and it is this processor's alone.
const MCG_STATUS_RIPV: u64 = 1;
const MCG_STATUS_EIPV: u64 = 1 << 1;
const MCG_STATUS_MCIP: u64 = 1 << 2;
const MCG_STATUS_LMCES: u64 = 1 << 3;

/// `IA32_MCi_STATUS`.
const STATUS_POISON: u64 = 1 << 43;
const STATUS_AR: u64 = 1 << 55;
const STATUS_S: u64 = 1 << 56;
const STATUS_ADDRV: u64 = 1 << 58;
const STATUS_MISCV: u64 = 1 << 59;
const STATUS_EN: u64 = 1 << 60;
const STATUS_UC: u64 = 1 << 61;
const STATUS_VAL: u64 = 1 << 63;
/// Intel's error code of a data load, SDM table 17-11.
const DATA_LOAD: u64 = 0x134;

/// `IA32_MCi_MISC`: the address is physical and known to this many bits.
const MISC_PHYSICAL: u64 = 2 << 6;
const MISC_PAGE: u64 = 12;

/// Whose processor the guest sees: the two tell of errors differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vendor {
    Amd,
    Intel,
}

/// What the machine-check registers of a guest can do.
#[derive(Debug, Clone, Copy)]
pub(super) struct MachineChecks {
    vendor: Vendor,
    capabilities: u64,
}

impl MachineChecks {
    /// What this host's KVM has.
    pub(super) fn new(kvm: &Kvm, vendor: Vendor) -> io::Result<Self> {
        let mut supported = 0u64;
        // SAFETY: the ioctl writes one u64 through the reference, which outlives the call.
        let done =
            unsafe { ioctl_with_mut_ref(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED(), &mut supported) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self::of(supported, vendor))
    }

    /// Of what KVM supports.
    pub(super) fn of(supported: u64, vendor: Vendor) -> Self {
        let wanted = match vendor {
            Vendor::Amd => MCG_CTL_P,
            Vendor::Intel => MCG_CTL_P | MCG_SER_P | MCG_LMCE_P,
        };
        Self {
            vendor,
            capabilities: (supported & wanted) | BANKS,
        }
    }

    pub(super) fn vendor(self) -> Vendor {
        self.vendor
    }

    /// Gives a vCPU its registers; before it runs.
    pub(super) fn set_up(self, vcpu: &VcpuFd) -> io::Result<()> {
        // SAFETY: the ioctl reads one u64 through the reference, which outlives the call.
        let done = unsafe { ioctl_with_ref(&Raw(vcpu), KVM_X86_SETUP_MCE(), &self.capabilities) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// What the registers say of a load of the page at `address`, a guest-physical one.
    fn of_load(self, address: u64) -> kvm_x86_mce {
        let known = STATUS_VAL | STATUS_UC | STATUS_EN | STATUS_MISCV | STATUS_ADDRV;
        let status = match self.vendor {
            Vendor::Amd => known | STATUS_POISON,
            Vendor::Intel => known | STATUS_S | STATUS_AR | DATA_LOAD,
        };
        let local = match self.vendor {
            Vendor::Amd => 0,
            Vendor::Intel => MCG_STATUS_LMCES,
        };
        kvm_x86_mce {
            status,
            addr: address,
            misc: MISC_PHYSICAL | MISC_PAGE,
            mcg_status: MCG_STATUS_MCIP | MCG_STATUS_EIPV | MCG_STATUS_RIPV | local,
            bank: BANK,
            ..Default::default()
        }
    }

    /// Raises it on a vCPU that is at the load. One that is in the handler of another, or has none yet, shuts down, as
    /// processors do.
    pub(super) fn raise(self, vcpu: &VcpuFd, address: u64) -> io::Result<()> {
        let check = self.of_load(address);
        // SAFETY: the ioctl reads one `kvm_x86_mce` through the reference, which outlives the call.
        let done = unsafe { ioctl_with_ref(&Raw(vcpu), KVM_X86_SET_MCE(), &check) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A vCPU's descriptor, for ioctls that kvm-ioctls does not have.
struct Raw<'a>(&'a VcpuFd);

impl AsRawFd for Raw<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of `asm/kvm.h`.
    #[test]
    fn the_ioctls_have_their_numbers() {
        assert_eq!(KVM_X86_SETUP_MCE(), 0x4008_ae9c);
        assert_eq!(KVM_X86_GET_MCE_CAP_SUPPORTED(), 0x8008_ae9d);
        assert_eq!(KVM_X86_SET_MCE(), 0x4040_ae9e);
    }

    #[test]
    fn a_load_is_told_as_each_vendor_does() {
        let amd = MachineChecks::of(u64::MAX, Vendor::Amd);
        assert_eq!(amd.capabilities, 0x10a);
        let check = amd.of_load(0x1_2345_6000);
        assert_eq!(check.status, 0xbc00_0800_0000_0000);
        assert_eq!(
            (check.addr, check.misc, check.bank),
            (0x1_2345_6000, 0x8c, 9)
        );
        assert_eq!(check.mcg_status, 0x7);
        // As Intel's table of recoverable errors has it: S, AR, MISCV, ADDRV, code 0x134.
        let intel = MachineChecks::of(u64::MAX, Vendor::Intel);
        assert_eq!(intel.of_load(0).status, 0xbd80_0000_0000_0134);
        assert_eq!(intel.of_load(0).mcg_status, 0xf);
        assert_eq!(MachineChecks::of(0, Vendor::Intel).capabilities, BANKS);
    }
}
