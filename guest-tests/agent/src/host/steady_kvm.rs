//! Keeps one idle virtual machine for as long as the host is up.
//!
//! The kernel patches its own code when the first virtual machine of a host comes and when the last one goes, the scheduler included.
//! An emulator that runs each processor on a thread of its own may execute the breakpoint of such a patch after the
//! kernel has forgotten it, and the host panics: within a few hundred machines that come and go one by one. A
//! machine that stays makes every other one come second. Its processor never runs; it holds the interrupt
//! controller's patched branches in the same way.

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Holds the machine; nothing is done with it.
#[derive(Debug)]
pub(crate) struct SteadyKvm {
    _vcpu: VcpuFd,
    _vm: VmFd,
    _kvm: Kvm,
}

impl SteadyKvm {
    pub(crate) fn hold() -> Result<Self, kvm_ioctls::Error> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        vm.create_irq_chip()?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(Self {
            _vcpu: vcpu,
            _vm: vm,
            _kvm: kvm,
        })
    }
}
