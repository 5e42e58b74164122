//! The least that starting a guest takes: what a VMM's start is measured against.
//!
//! ```text
//!   map the memory ─▶ read kernel, initramfs ─▶ machine ─▶ its memory ─▶ processor ─▶ one instruction
//! ```
//! One thread, no checks, no tables, no devices. The instruction writes to a port, so that the guest ends with it.
//!
//! Nothing is undone on an error: the process ends, and the kernel closes what it holds.
#![allow(unsafe_code)]

use std::fs::File;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};

use crate::memory::Words;

/// Where a kernel is loaded.
const KERNEL: usize = 1 << 20;
/// As high as the initramfs is loaded, its length apart.
const INITRAMFS_END: usize = 1 << 29;
/// Three pages that KVM wants on Intel's processors, out of the way.
const TSS: usize = 0xfffb_d000;
const CODE: usize = 0x1000;
/// `out %al, $0x10`.
const INSTRUCTION: u64 = 0x10e6;

/// Starts a guest on a device's memory, and ends it at once.
pub(crate) fn run(kernel: &str, initramfs: &str, dax: &str, bytes: u64) -> Result<(), String> {
    let length = usize::try_from(bytes).map_err(|error| error.to_string())?;
    let mut memory = Words::of_device(dax, length)?;
    load(&mut memory, kernel, |_| KERNEL)?;
    load(&mut memory, initramfs, |length| {
        (INITRAMFS_END - length) & !0xfff
    })?;
    memory.set(CODE / size_of::<u64>(), INSTRUCTION);
    start(&memory, bytes).map_err(|error| format!("KVM: {error}"))?
}

fn load(memory: &mut Words, path: &str, at: impl Fn(usize) -> usize) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{path}: {error}");
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let length = usize::try_from(length).map_err(|error| error.to_string())?;
    memory.load(at(length), &file, length)
}

/// Whether KVM does all that, and whether the guest came out of its instruction then.
fn start(memory: &Words, bytes: u64) -> Result<Result<(), String>, kvm_ioctls::Error> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.set_tss_address(TSS)?;
    vm.create_irq_chip()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: bytes,
        userspace_addr: memory.address(0) as u64,
    };
    // SAFETY: the mapping outlives the machine, which is gone when this returns; nothing in this process refers to what the
    // guest writes but by volatile access.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut segments = vcpu.get_sregs()?;
    segments.cs.base = 0;
    segments.cs.selector = 0;
    vcpu.set_sregs(&segments)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = CODE as u64;
    vcpu.set_regs(&registers)?;
    Ok(match vcpu.run()? {
        VcpuExit::IoOut(..) => Ok(()),
        exit => Err(format!("the guest ended with {exit:?}")),
    })
}
