//! One vCPU: its state at power-on, and running it.
//!
//! A [`Vcpu`] is made and set up on the owner thread, then bound to the thread that runs it ([`Vcpu::bind`]); from
//! then on it can be kicked. What a guest does that needs user space ends up in an [`Io`]; what ends the guest, or
//! this vCPU, is an [`Exit`] or a [`VcpuFault`].

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_fpu, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;

use super::cpuid::{self, CpuidTemplate};
use super::exits::{ExitCounts, ExitReason};
use super::kick::Kickable;
use super::machine_check::MachineChecks;

/// Control and extended feature bits, Intel SDM vol. 3A, 2.5 and 2.2.1.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: what firmware leaves behind, and what KVM's huge mappings want.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

/// Local vector table registers, offsets into the local APIC page; SDM vol. 3A, 12.5.1.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0x7 << 8;
const DELIVERY_NMI: u32 = 0x4 << 8;
const DELIVERY_MASK: u32 = 0x7 << 8;

/// Registers of the boot vCPU at the kernel's entry point. The tables they name are in guest memory already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootRegisters {
    /// 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst): long mode, paging on, zero page in RSI.
    Linux64 {
        /// 64-bit entry point.
        entry: u64,
        /// Guest-physical address of `struct boot_params`.
        zero_page: u64,
        /// Guest-physical address of the top-level page table.
        page_table: u64,
        /// Guest-physical address of the descriptor table.
        gdt: u64,
    },
    /// PVH boot (Xen's docs/misc/pvh.pandoc): 32-bit protected mode, paging off, start info in EBX.
    Pvh {
        /// 32-bit entry point.
        entry: u64,
        /// Guest-physical address of `struct hvm_start_info`.
        start_info: u64,
        /// Guest-physical address of the descriptor table.
        gdt: u64,
    },
}

impl BootRegisters {
    /// The descriptors, by selector order, that the boot code writes to `gdt`: null, code, data, task state.
    pub fn descriptors(&self) -> [u64; 4] {
        let code = self.code();
        [0, descriptor(&code), descriptor(&DATA), descriptor(&TASK)]
    }

    fn code(&self) -> kvm_segment {
        match self {
            Self::Linux64 { .. } => kvm_segment { l: 1, ..CODE },
            Self::Pvh { .. } => kvm_segment { db: 1, ..CODE },
        }
    }

    fn gdt(&self) -> u64 {
        match self {
            Self::Linux64 { gdt, .. } | Self::Pvh { gdt, .. } => *gdt,
        }
    }
}

/// Flat segments: base 0, limit 4 GiB, present, ring 0.
const FLAT: kvm_segment = kvm_segment {
    base: 0,
    limit: 0xffff_ffff,
    selector: 0,
    type_: 0,
    present: 1,
    dpl: 0,
    db: 0,
    s: 1,
    l: 0,
    g: 1,
    avl: 0,
    unusable: 0,
    padding: 0,
};
const CODE: kvm_segment = kvm_segment {
    selector: 0x8,
    type_: 0xb,
    ..FLAT
};
const DATA: kvm_segment = kvm_segment {
    selector: 0x10,
    type_: 0x3,
    db: 1,
    ..FLAT
};
const TASK: kvm_segment = kvm_segment {
    selector: 0x18,
    type_: 0xb,
    s: 0,
    g: 0,
    limit: 0x67,
    ..FLAT
};

/// A segment as its 8-byte descriptor, SDM vol. 3A, 3.4.5.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    };
    let limit = u64::from(limit);
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.avl) << 12
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | flags << 40
        | (limit >> 16 & 0xf) << 48
        | (segment.base >> 24 & 0xff) << 56
}

/// The vCPU could not be given its power-on state.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The CPUID table.
    #[error("vCPU {id} can't be given its CPUID table")]
    Cpuid {
        /// Which vCPU.
        id: u8,
        /// Why.
        #[source]
        source: cpuid::CpuidError,
    },
    /// A model-specific register that KVM does not take.
    #[error("vCPU {id} can't be given MSR {msr:#x}")]
    Msr {
        /// Which vCPU.
        id: u8,
        /// The register's number.
        msr: u32,
    },
    /// Another ioctl.
    #[error("vCPU {id}: {what} failed")]
    Ioctl {
        /// Which vCPU.
        id: u8,
        /// The KVM ioctl.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Where the guest's port and memory-mapped accesses go.
pub trait Io {
    /// An `in` of `data.len()` bytes.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// An `out`; a repeated string instruction arrives as one long slice.
    fn port_write(&self, port: u16, data: &[u8]);
    /// A load outside every memory slot.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A store outside every memory slot.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// What a guest-physical address is that KVM has no memory slot for, or does not reach through it.
    fn beneath(&self, address: u64) -> Beneath;
    /// The guest takes a machine check for its load there.
    fn machine_checked(&self, address: u64);
    /// Its store there goes nowhere.
    fn store_dropped(&self, address: u64);
}

/// What an access that leaves KVM is to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beneath {
    /// A device, or nothing.
    Device,
    /// Guest memory: the access is a fault of the memory behind it.
    Memory,
    /// Guest memory that can't be stored to: a store goes nowhere, as to ROM; a load that comes here is a fault of the memory.
    ReadOnly,
    /// Memory was there and was taken away, or is poisoned: a load is a machine check, a store goes nowhere.
    Tombstone,
}

/// Why a vCPU stopped running, as its owner wanted or as the guest did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// A signal: look at what is wanted.
    Kicked,
    /// The guest's processor shut down: a triple fault.
    TripleFault,
}

/// Why a vCPU can't go on.
#[derive(Debug, Error)]
pub enum VcpuFault {
    /// Host memory behind the guest is not there any more.
    #[error(
        "vCPU {id} touched guest memory that is gone{}: its device-dax device, file or huge page was taken away or is poisoned; \
         `dmesg` on the host tells which",
        address.map(|a| format!(" (guest address {a:#x})")).unwrap_or_default()
    )]
    MemoryGone {
        /// Which vCPU.
        id: u8,
        /// Guest-physical address where KVM tells it (it seldom does).
        address: Option<u64>,
    },
    /// The processor refused the state it was given.
    #[error("vCPU {id} can't be entered: hardware reason {reason:#x} on host CPU {cpu}")]
    FailEntry {
        /// Which vCPU.
        id: u8,
        /// `hardware_entry_failure_reason`.
        reason: u64,
        /// Host CPU.
        cpu: u32,
    },
    /// KVM gave up, most often on an instruction it can't emulate.
    #[error(
        "KVM gave up on vCPU {id} at guest address {rip:#x}: internal error {suberror}, data {data:x?}"
    )]
    Internal {
        /// Which vCPU.
        id: u8,
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// What KVM adds to it.
        data: Vec<u64>,
        /// Instruction pointer.
        rip: u64,
    },
    /// An exit that this configuration can't cause.
    #[error("vCPU {id} left KVM for a reason that daxhund does not know: {exit}")]
    Unknown {
        /// Which vCPU.
        id: u8,
        /// The exit as kvm-ioctls names it.
        exit: String,
    },
    /// `KVM_RUN` failed.
    #[error("vCPU {id}: KVM_RUN failed")]
    Run {
        /// Which vCPU.
        id: u8,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl VcpuFault {
    /// Whether the reason is that host memory behind the guest is gone.
    pub fn is_memory_gone(&self) -> bool {
        matches!(self, Self::MemoryGone { .. })
    }
}

/// A vCPU that no thread runs yet.
#[derive(Debug)]
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
    /// Set by [`Vcpu::set_up`].
    machine_checks: Option<MachineChecks>,
    is_set_up: bool,
    exits: Arc<ExitCounts>,
}

impl Vcpu {
    pub(super) fn new(id: u8, fd: VcpuFd) -> Self {
        Self {
            id,
            fd,
            machine_checks: None,
            is_set_up: false,
            exits: Arc::default(),
        }
    }

    /// Its number.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Has its exits counted there: nobody else's are, from then on.
    pub fn count_exits(&mut self, exits: Arc<ExitCounts>) {
        self.exits = exits;
    }

    /// Power-on state. `boot` is given to the boot vCPU only; the others wait for INIT and SIPI in KVM.
    pub fn set_up(
        &mut self,
        cpuid: &CpuidTemplate,
        boot: Option<&BootRegisters>,
    ) -> Result<(), SetupError> {
        let table =
            cpuid::to_kvm(&cpuid.for_vcpu(self.id)).map_err(|source| SetupError::Cpuid {
                id: self.id,
                source,
            })?;
        self.fd
            .set_cpuid2(&table)
            .map_err(|e| self.ioctl("KVM_SET_CPUID2", e))?;
        self.set_msrs()?;
        let machine_checks = cpuid.machine_checks();
        machine_checks
            .set_up(&self.fd)
            .map_err(|source| SetupError::Ioctl {
                id: self.id,
                what: "KVM_X86_SETUP_MCE",
                source,
            })?;
        self.machine_checks = Some(machine_checks);
        let fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        self.fd
            .set_fpu(&fpu)
            .map_err(|e| self.ioctl("KVM_SET_FPU", e))?;
        self.set_local_interrupts()?;
        if let Some(boot) = boot {
            self.set_boot_registers(boot)?;
        }
        self.is_set_up = true;
        Ok(())
    }

    /// Power-on state of one that comes while the guest runs. One that ran before keeps what INIT resets anyway, and waits
    /// for INIT and SIPI again.
    pub fn set_up_again(&mut self, cpuid: &CpuidTemplate) -> Result<(), SetupError> {
        if !self.is_set_up {
            return self.set_up(cpuid, None);
        }
        let state = kvm_mp_state {
            mp_state: KVM_MP_STATE_UNINITIALIZED,
        };
        self.fd
            .set_mp_state(state)
            .map_err(|e| self.ioctl("KVM_SET_MP_STATE", e))
    }

    fn ioctl(&self, what: &'static str, error: kvm_ioctls::Error) -> SetupError {
        SetupError::Ioctl {
            id: self.id,
            what,
            source: io::Error::from(error),
        }
    }

    fn set_msrs(&self) -> Result<(), SetupError> {
        let wanted = [
            (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        ];
        let entries = wanted.map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
        let msrs = Msrs::from_entries(&entries).map_err(|_| SetupError::Msr {
            id: self.id,
            msr: wanted[0].0,
        })?;
        let set = self
            .fd
            .set_msrs(&msrs)
            .map_err(|e| self.ioctl("KVM_SET_MSRS", e))?;
        match wanted.get(set) {
            None => Ok(()),
            Some((msr, _)) => Err(SetupError::Msr {
                id: self.id,
                msr: *msr,
            }),
        }
    }

    /// LINT0 takes the 8259, LINT1 the NMI: what firmware leaves behind ("virtual wire mode", MP spec 1.4, 3.6.2.2).
    fn set_local_interrupts(&self) -> Result<(), SetupError> {
        let mut lapic = self
            .fd
            .get_lapic()
            .map_err(|e| self.ioctl("KVM_GET_LAPIC", e))?;
        for (offset, delivery) in [(LVT_LINT0, DELIVERY_EXTINT), (LVT_LINT1, DELIVERY_NMI)] {
            let bytes = &mut lapic.regs[offset..offset + 4];
            let old =
                u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]].map(i8::cast_unsigned));
            let new = (old & !DELIVERY_MASK) | delivery;
            for (to, from) in bytes.iter_mut().zip(new.to_le_bytes()) {
                *to = from.cast_signed();
            }
        }
        self.fd
            .set_lapic(&lapic)
            .map_err(|e| self.ioctl("KVM_SET_LAPIC", e))
    }

    fn set_boot_registers(&self, boot: &BootRegisters) -> Result<(), SetupError> {
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(|e| self.ioctl("KVM_GET_SREGS", e))?;
        set_segments(&mut sregs, boot);
        let mut regs = kvm_regs {
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        match *boot {
            BootRegisters::Linux64 {
                entry,
                zero_page,
                page_table,
                ..
            } => {
                regs.rip = entry;
                regs.rsi = zero_page;
                sregs.cr3 = page_table;
                sregs.cr4 |= CR4_PAE;
                sregs.cr0 |= CR0_PE | CR0_PG;
                sregs.efer |= EFER_LME | EFER_LMA;
            }
            BootRegisters::Pvh {
                entry, start_info, ..
            } => {
                regs.rip = entry;
                regs.rbx = start_info;
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
            }
        }
        self.fd
            .set_sregs(&sregs)
            .map_err(|e| self.ioctl("KVM_SET_SREGS", e))?;
        self.fd
            .set_regs(&regs)
            .map_err(|e| self.ioctl("KVM_SET_REGS", e))
    }

    /// Makes the calling thread the one that runs this vCPU, until [`BoundVcpu::unbind`].
    pub fn bind(mut self) -> BoundVcpu {
        let run = std::ptr::from_mut(self.fd.get_kvm_run());
        // SAFETY: the page is mapped by `self.fd` for as long as that lives; `BoundVcpu` holds both, drops `kick`
        // first (field order), and is not `Send` because `Kickable` holds a raw pointer.
        let kick = unsafe { Kickable::enter(run) };
        BoundVcpu {
            kick,
            id: self.id,
            fd: self.fd,
            machine_checks: self.machine_checks,
            exits: self.exits,
        }
    }
}

fn set_segments(sregs: &mut kvm_sregs, boot: &BootRegisters) {
    sregs.cs = boot.code();
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = DATA;
    }
    sregs.tr = TASK;
    sregs.gdt.base = boot.gdt();
    // Limits are the last valid byte.
    sregs.gdt.limit =
        u16::try_from(size_of_val(&boot.descriptors()) - 1).expect("four descriptors of 8 bytes");
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

/// A vCPU and the thread that runs it.
#[derive(Debug)]
pub struct BoundVcpu {
    kick: Kickable,
    pub(super) id: u8,
    pub(super) fd: VcpuFd,
    machine_checks: Option<MachineChecks>,
    exits: Arc<ExitCounts>,
}

/// What one return from `KVM_RUN` asks for, once the borrow of the shared page is over.
enum Step {
    Continue,
    Exit(Exit),
    Lost(u64),
    /// A load that KVM could not do although there is a memory slot.
    LostLoad(u64),
    /// A load from memory that was taken away.
    DeadLoad(u64),
    Internal,
    Fault(VcpuFault),
}

impl BoundVcpu {
    /// Forgets the kicks so far. Call it, then read what is wanted of this vCPU, then [`BoundVcpu::run`].
    pub fn acknowledge_kick(&self) {
        self.kick.acknowledge();
    }

    /// Tells the guest that it was paused, so that its watchdogs do not take the pause for a lock-up
    /// (`KVM_KVMCLOCK_CTRL`). A guest without the paravirtual clock has nothing to be told.
    pub fn forgive_pause(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl() {
            tracing::debug!(vcpu = self.id, %error, "the guest is not told of its pause");
        }
    }

    /// The undo of [`Vcpu::bind`].
    pub fn unbind(self) -> Vcpu {
        let Self {
            kick,
            id,
            fd,
            machine_checks,
            exits,
        } = self;
        drop(kick);
        Vcpu {
            id,
            fd,
            machine_checks,
            is_set_up: true,
            exits,
        }
    }

    /// Sends it a non-maskable interrupt (`KVM_NMI`), which it takes when it is run. One that waits for a SIPI takes none; KVM
    /// would keep it for the time after that, and leave `KVM_RUN` because of it again and again until then.
    pub fn nmi(&self) {
        const WAITING: [u32; 2] = [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED];
        let state = self.fd.get_mp_state();
        if state.is_ok_and(|state| WAITING.contains(&state.mp_state)) {
            return;
        }
        if let Err(error) = self.fd.nmi() {
            tracing::warn!(vcpu = self.id, %error, "KVM does not take a non-maskable interrupt");
        }
    }

    /// Runs the guest until it is kicked, ends or can't go on; serves its accesses through `io` meanwhile. After
    /// [`VcpuFault::MemoryGone`] it can be run again: the access is tried anew.
    pub fn run(&mut self, io: &impl Io) -> Result<Exit, VcpuFault> {
        loop {
            match self.step(io) {
                Step::Continue => {}
                Step::Exit(exit) => return Ok(exit),
                Step::Lost(address) => {
                    return Err(VcpuFault::MemoryGone {
                        id: self.id,
                        address: Some(address),
                    });
                }
                Step::LostLoad(address) => {
                    self.take_load_back()?;
                    return Err(VcpuFault::MemoryGone {
                        id: self.id,
                        address: Some(address),
                    });
                }
                Step::DeadLoad(address) => {
                    self.take_load_back()?;
                    return self.machine_check(io, address);
                }
                Step::Internal => return self.internal_error(io),
                Step::Fault(fault) => return Err(fault),
            }
        }
    }

    fn step(&mut self, io: &impl Io) -> Step {
        let id = self.id;
        let ran = self.fd.run();
        self.exits.add(ExitReason::of(&ran));
        match ran {
            Ok(VcpuExit::IoIn(port, data)) => io.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => io.port_write(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => match io.beneath(address) {
                Beneath::Device => io.mmio_read(address, data),
                Beneath::Memory | Beneath::ReadOnly => return Step::LostLoad(address),
                Beneath::Tombstone => return Step::DeadLoad(address),
            },
            Ok(VcpuExit::MmioWrite(address, data)) => match io.beneath(address) {
                Beneath::Device => io.mmio_write(address, data),
                Beneath::Memory => return Step::Lost(address),
                Beneath::Tombstone => io.store_dropped(address),
                Beneath::ReadOnly => {}
            },
            Ok(VcpuExit::Intr) => return Step::Exit(Exit::Kicked),
            Ok(VcpuExit::Shutdown) => return Step::Exit(Exit::TripleFault),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Step::Fault(VcpuFault::FailEntry { id, reason, cpu });
            }
            Ok(VcpuExit::InternalError) => return Step::Internal,
            Ok(VcpuExit::MemoryFault { gpa, .. }) => return Step::Lost(gpa),
            Ok(other) => {
                return Step::Fault(VcpuFault::Unknown {
                    id,
                    exit: format!("{other:?}"),
                });
            }
            Err(e) => {
                return match e.errno() {
                    // EAGAIN: a vCPU that has not had its SIPI was woken; the owner may want something.
                    libc::EINTR | libc::EAGAIN => Step::Exit(Exit::Kicked),
                    libc::EFAULT | libc::EHWPOISON => {
                        Step::Fault(VcpuFault::MemoryGone { id, address: None })
                    }
                    _ => Step::Fault(VcpuFault::Run {
                        id,
                        source: io::Error::from(e),
                    }),
                };
            }
        }
        Step::Continue
    }

    /// Brings a vCPU back to before a load for which there is nothing to give.
    ///
    /// KVM is half-way through the instruction and wants it finished first. It is, with bytes that the guest does not get
    /// to see: its registers are put back.
    fn take_load_back(&mut self) -> Result<(), VcpuFault> {
        let before = self.fd.get_regs().map_err(|error| self.run_error(error))?;
        self.finish_instruction()?;
        self.fd
            .set_regs(&before)
            .map_err(|error| self.run_error(error))
    }

    /// Has the guest take a machine check at the instruction that its registers stand at.
    pub(super) fn machine_check(&mut self, io: &impl Io, address: u64) -> Result<Exit, VcpuFault> {
        let id = self.id;
        if let Some(checks) = self.machine_checks {
            tracing::debug!(vcpu = id, address = %format_args!("{address:#x}"), "a load from memory that is gone or poisoned");
            checks
                .raise(&self.fd, address)
                .map_err(|source| VcpuFault::Run { id, source })?;
            io.machine_checked(address);
        }
        // The kick's flag was used: what is wanted of this vCPU has to be read again.
        Ok(Exit::Kicked)
    }

    /// Runs until the instruction that KVM was emulating is over and the guest would be entered
    /// (Documentation/virt/kvm/api.rst, `KVM_RUN` with `immediate_exit`). An instruction makes a bounded number of accesses.
    fn finish_instruction(&mut self) -> Result<(), VcpuFault> {
        let id = self.id;
        self.fd.set_kvm_immediate_exit(1);
        loop {
            match self.fd.run() {
                Ok(VcpuExit::MmioRead(_, data) | VcpuExit::IoIn(_, data)) => data.fill(0xff),
                Ok(VcpuExit::MmioWrite(..) | VcpuExit::IoOut(..)) => {}
                Ok(VcpuExit::Intr) => return Ok(()),
                Err(error) if error.errno() == libc::EINTR => return Ok(()),
                Ok(other) => {
                    return Err(VcpuFault::Unknown {
                        id,
                        exit: format!("{other:?}"),
                    });
                }
                Err(error) => return Err(self.run_error(error)),
            }
        }
    }

    pub(super) fn run_error(&self, error: kvm_ioctls::Error) -> VcpuFault {
        VcpuFault::Run {
            id: self.id,
            source: io::Error::from(error),
        }
    }

    /// The instruction that KVM could not emulate, if that is what it tells of.
    pub(super) fn unemulated(&mut self) -> Option<Vec<u8>> {
        let run = self.fd.get_kvm_run();
        // SAFETY: KVM_RUN just returned KVM_EXIT_INTERNAL_ERROR, for which `emulation_failure` and `internal` are the
        // live members of the union and begin alike; every bit pattern is valid for their integers.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        let has_bytes = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        if failure.suberror != KVM_INTERNAL_ERROR_EMULATION
            || failure.ndata == 0
            || failure.flags & has_bytes == 0
        {
            return None;
        }
        // SAFETY: the union has one member, of bytes.
        let told = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let size = usize::from(told.insn_size).min(told.insn_bytes.len());
        Some(told.insn_bytes[..size].to_vec())
    }

    pub(super) fn internal_fault(&mut self, rip: u64) -> VcpuFault {
        let id = self.id;
        let run = self.fd.get_kvm_run();
        // SAFETY: KVM_RUN just returned KVM_EXIT_INTERNAL_ERROR, for which `internal` is the live member of the
        // union; every bit pattern is valid for its integers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        VcpuFault::Internal {
            id,
            suberror: internal.suberror,
            data: internal.data[..count].to_vec(),
            rip,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINUX: BootRegisters = BootRegisters::Linux64 {
        entry: 0,
        zero_page: 0,
        page_table: 0,
        gdt: 0,
    };
    const PVH: BootRegisters = BootRegisters::Pvh {
        entry: 0,
        start_info: 0,
        gdt: 0,
    };

    /// Values from the SDM's descriptor layout, as every boot loader's table has them.
    #[test]
    fn descriptors_are_the_flat_ones() {
        assert_eq!(
            LINUX.descriptors(),
            [
                0,
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x0000_8b00_0000_0067
            ]
        );
        assert_eq!(PVH.descriptors()[1], 0x00cf_9b00_0000_ffff);
    }
}
