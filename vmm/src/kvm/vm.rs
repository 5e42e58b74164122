//! One KVM virtual machine: the fd, its interrupt controllers and the fixed addresses x86 KVM wants.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_EXIT_ON_EMULATION_FAILURE, kvm_enable_cap};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::hypervisor::Hypervisor;
use super::interrupts::Interrupts;
use super::kick;
use super::slots::MemorySlots;
use super::topology::Topology;
use super::vcpu::Vcpu;
use super::vfio::VfioRegistry;

/// Three pages that Intel hosts without unrestricted guest mode use for a task state segment
/// (`KVM_SET_TSS_ADDR`), with the identity map page just below; the range is in the MMIO hole, above the local APIC
/// and I/O APIC windows and below the reset vector.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// The VM could not be created.
#[derive(Debug, Error)]
#[error("KVM would not {what}")]
pub struct CreateVmError {
    /// The step that failed.
    pub what: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// An empty VM: no memory, no vCPU.
#[derive(Debug, Clone)]
pub struct Vm {
    fd: Arc<VmFd>,
    max_slots: usize,
}

impl Vm {
    /// Creates the VM with its in-kernel interrupt controllers.
    pub fn create(hypervisor: &Hypervisor) -> Result<Self, CreateVmError> {
        let failed = |what: &'static str| {
            move |e: kvm_ioctls::Error| CreateVmError {
                what,
                source: io::Error::from(e),
            }
        };
        let kvm = hypervisor.kvm();
        // KVM_CREATE_VM starts kernel threads and gives EINTR when a signal is pending for the caller: asking again
        // is what its contract wants.
        let fd = loop {
            match kvm.create_vm() {
                Err(e) if e.errno() == libc::EINTR => {}
                other => break other.map_err(failed("create a VM"))?,
            }
        };
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(failed("place the identity map page"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(failed("place the TSS pages"))?;
        fd.create_irq_chip()
            .map_err(failed("create the in-kernel irqchip"))?;
        // Else what can't be emulated is an invalid instruction to a guest's program, and the vCPU is not asked (5.14).
        let tell_of_failed_emulation = kvm_enable_cap {
            cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
            args: [1, 0, 0, 0],
            ..Default::default()
        };
        if fd.check_extension_raw(u64::from(KVM_CAP_EXIT_ON_EMULATION_FAILURE)) > 0 {
            fd.enable_cap(&tell_of_failed_emulation)
                .map_err(failed("tell of failed emulations"))?;
        }
        Ok(Self {
            fd: Arc::new(fd),
            max_slots: kvm.get_nr_memslots(),
        })
    }

    /// The table of memory slots; ask once per VM and clone it.
    pub fn memory_slots(&self) -> MemorySlots {
        MemorySlots::new(Arc::clone(&self.fd), self.max_slots)
    }

    /// Creates a vCPU with the APIC id that the topology gives it: on x86, KVM takes the id for both.
    pub fn create_vcpu(&self, id: u8, topology: &Topology) -> Result<Vcpu, CreateVmError> {
        // Before any thread could be kicked: the signal's default action ends the process.
        kick::install().map_err(|e| CreateVmError {
            what: "be interrupted by a signal",
            source: e.source,
        })?;
        let fd = self
            .fd
            .create_vcpu(u64::from(topology.apic_id(id)))
            .map_err(|e| CreateVmError {
                what: "create a vCPU",
                source: io::Error::from(e),
            })?;
        Ok(Vcpu::new(id, fd))
    }

    /// Has KVM raise `gsi` (edge) each time the event is written, without an exit to user space.
    pub fn connect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), CreateVmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|e| CreateVmError {
                what: "connect an interrupt event",
                source: io::Error::from(e),
            })
    }

    /// The table of message-signalled interrupts; one per VM.
    pub fn interrupts(&self) -> Interrupts {
        Interrupts::new(Arc::clone(&self.fd))
    }

    /// Level-triggered interrupts with an end-of-interrupt notice.
    pub fn pins(&self) -> Pins {
        Pins(Arc::clone(&self.fd))
    }

    /// KVM's list of the VFIO files that this VM uses; one per VM.
    pub fn vfio_registry(&self) -> VfioRegistry {
        VfioRegistry::new(&self.fd)
    }

    /// Doorbells of devices: guest stores that write an event without an exit to user space.
    pub fn doorbells(&self) -> Doorbells {
        Doorbells(Arc::clone(&self.fd))
    }

    /// Number of owners of the VM fd in this process: one when all vCPUs and slots are gone.
    pub fn holders(&self) -> usize {
        Arc::strong_count(&self.fd)
    }
}

/// Addresses at which a guest's store of any width writes an event (`KVM_IOEVENTFD`).
#[derive(Debug, Clone)]
pub struct Doorbells(Arc<VmFd>);

impl Doorbells {
    /// From now on a store to `address` writes `event` and is not seen otherwise.
    pub fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }

    /// The undo of [`Doorbells::connect`].
    pub fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)
    }
}

/// Interrupts that stay raised until the guest has seen to them (`KVM_IRQFD` with `KVM_IRQFD_FLAG_RESAMPLE`).
#[derive(Debug, Clone)]
pub struct Pins(Arc<VmFd>);

impl Pins {
    /// From now on a write of `trigger` raises `gsi`; when the guest ends the interrupt, KVM lowers it and writes
    /// `resample`. Several may share one `gsi`.
    pub fn connect(&self, gsi: u32, trigger: &EventFd, resample: &EventFd) -> io::Result<()> {
        self.0
            .register_irqfd_with_resample(trigger, resample, gsi)
            .map_err(io::Error::from)
    }

    /// The undo of [`Pins::connect`].
    pub fn disconnect(&self, gsi: u32, trigger: &EventFd) -> io::Result<()> {
        self.0
            .unregister_irqfd(trigger, gsi)
            .map_err(io::Error::from)
    }
}
