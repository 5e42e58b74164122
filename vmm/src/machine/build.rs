//! Building a machine and taking it apart, side by side.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use tracing::{info, warn};

use super::consumers::KvmSlots;
use super::events::{Event, EventSender, Events};
use super::owner::{Owner, OwnerError, Signals, Stop};
use super::resources::HostResources;
use super::vcpus::{GuestIo, SpawnError, Vcpus};
use crate::acpi::{self, Ecam, TablesTooLarge};
use crate::boot::{self, LoadError, MemoryMap, place};
use crate::bus::{Bus, Overlap};
use crate::config::{ConsoleConfig, ValidConfig};
use crate::devices::cmos::{self, Cmos};
use crate::devices::power::{self, AcpiPower, KeyboardReset, OnPowerRequest};
use crate::devices::serial::{self, SerialParts, SerialPort};
use crate::kvm::{CreateVmError, SetupError, Vcpu, Vm};
use crate::memory::ram::{AttachFailure, DetachError, Ram};
use crate::memory::region::Region;
use crate::pci::{self, ConfigPorts, RootBus};

/// Configuration space of PCI segment 0: one bus.
const ECAM: Ecam = Ecam {
    base: place::ECAM,
    last_bus: 0,
};

/// A machine can't be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The VM or a vCPU.
    #[error(transparent)]
    Vm(#[from] CreateVmError),
    /// A vCPU's state.
    #[error(transparent)]
    Vcpu(#[from] SetupError),
    /// A vCPU's thread.
    #[error(transparent)]
    Thread(#[from] SpawnError),
    /// Guest memory.
    #[error(transparent)]
    Attach(#[from] Box<AttachFailure>),
    /// Two devices on one address.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] TablesTooLarge),
    /// Kernel, initramfs, command line.
    #[error(transparent)]
    Boot(#[from] LoadError),
    /// An event descriptor.
    #[error("no event descriptor could be made; `ulimit -n` raises how many a process may have")]
    Event(#[source] io::Error),
}

/// A VM, complete, its vCPUs held at their first instruction.
pub struct Machine {
    vcpus: Vcpus,
    io: Arc<GuestIo>,
    serial: Option<SerialParts>,
    events: Events,
    ram: Ram,
    vm: Vm,
}

impl Machine {
    /// Builds a machine in which `regions` are the memory. On failure everything is let go.
    pub fn build(
        config: &ValidConfig,
        host: &mut HostResources,
        regions: Vec<Region>,
    ) -> Result<Self, BuildError> {
        let vm = Vm::create(&host.hypervisor)?;
        let mut ram = Ram::new(vec![Box::new(KvmSlots(vm.memory_slots()))]);
        for region in regions {
            ram.attach(region)?;
        }
        let (sender, events) = Events::channel().map_err(BuildError::Event)?;
        let serial = serial_port(&vm, host)?;
        let root_bus = Arc::new(RootBus::new());
        let ports = ports(&sender, serial.as_ref(), &root_bus)?;
        let mut mmio = Bus::default();
        let ecam = Arc::new(pci::Ecam::new(root_bus));
        mmio.insert(ECAM.base, ECAM.size(), ecam)?;
        let registers = load(config, host, &ram)?;
        let vcpus = vcpus(&vm, host, config.cpus().boot_vcpus, &registers)?;
        let io = Arc::new(GuestIo {
            ports,
            mmio,
            layout: host.layout.clone(),
        });
        let vcpus = Vcpus::spawn(vcpus, &io, &sender)?;
        Ok(Self {
            vcpus,
            io,
            serial,
            events,
            ram,
            vm,
        })
    }

    /// Lets the guest run until something ends it.
    pub(super) fn run(
        mut self,
        host: &mut HostResources,
        signals: &mut Signals,
    ) -> (StoppedMachine, Result<Stop, OwnerError>) {
        info!(
            ram_bytes = host.layout.size(),
            regions = host.layout.ranges().len(),
            "guest starts"
        );
        self.vcpus.release();
        let why = Owner::new(
            &self.events,
            self.serial.as_ref(),
            &mut host.serial_input,
            signals,
        )
        .run();
        self.vcpus.stop();
        let Self {
            vcpus,
            io,
            serial,
            events,
            ram,
            vm,
        } = self;
        // In the reverse order of building; the vCPUs are closed already.
        drop(vcpus);
        drop(io);
        host.serial = serial.and_then(SerialParts::into_output);
        drop(events);
        (StoppedMachine { ram, vm }, why)
    }
}

/// A machine without vCPUs and devices.
pub(super) struct StoppedMachine {
    ram: Ram,
    vm: Vm,
}

impl StoppedMachine {
    /// The undo of [`Machine::build`]: the regions are the caller's again, except those that are stuck.
    pub(super) fn take_apart(mut self) -> (Vec<Region>, Vec<DetachError>) {
        let (regions, stuck) = self.ram.detach_all();
        drop(self.ram);
        let holders = self.vm.holders();
        if holders != 1 {
            warn!(
                holders,
                "the VM is still held by somebody else than its owner"
            );
        }
        (regions, stuck)
    }
}

fn serial_port(vm: &Vm, host: &mut HostResources) -> Result<Option<SerialParts>, BuildError> {
    let Some(output) = host.serial.take() else {
        return Ok(None);
    };
    let parts = SerialPort::create(output).map_err(BuildError::Event)?;
    vm.connect_interrupt(&parts.interrupt, serial::GSI)?;
    Ok(Some(parts))
}

fn ports(
    events: &EventSender,
    serial: Option<&SerialParts>,
    root_bus: &Arc<RootBus>,
) -> Result<Bus, BuildError> {
    let on_power: OnPowerRequest = {
        let events = events.clone();
        Arc::new(move |request| events.send(Event::Power(request)))
    };
    let mut ports = Bus::default();
    if let Some(serial) = serial {
        ports.insert(
            serial::PORTS.into(),
            serial::PORT_COUNT.into(),
            serial.port.clone(),
        )?;
    }
    ports.insert(
        cmos::PORTS.into(),
        cmos::PORT_COUNT.into(),
        Arc::new(Cmos::new()),
    )?;
    ports.insert(
        power::ACPI_PORTS.into(),
        power::ACPI_PORT_COUNT.into(),
        Arc::new(AcpiPower::new(Arc::clone(&on_power))),
    )?;
    ports.insert(
        power::KEYBOARD_PORT.into(),
        1,
        Arc::new(KeyboardReset::new(on_power)),
    )?;
    ports.insert(
        pci::CONFIG_PORTS.into(),
        pci::CONFIG_PORT_COUNT.into(),
        Arc::new(ConfigPorts::new(Arc::clone(root_bus))),
    )?;
    Ok(ports)
}

fn load(
    config: &ValidConfig,
    host: &mut HostResources,
    ram: &Ram,
) -> Result<crate::kvm::BootRegisters, BuildError> {
    let topology = host.cpuid.topology();
    let description = acpi::Description {
        boot_cpus: small(config.cpus().boot_vcpus),
        apic_ids: (0..topology.cpus())
            .map(|cpu| topology.apic_id(cpu))
            .collect(),
        ecam: ECAM,
        serial_port: *config.serial() != ConsoleConfig::Off,
        nodes: nodes(config, host),
    };
    let room = usize::try_from(place::ACPI_SIZE).expect("128 KiB");
    let tables = acpi::build(&description, place::ACPI, room)?;
    let ranges = host
        .layout
        .ranges()
        .iter()
        .map(|range| (range.gpa.0, range.size));
    let map = MemoryMap::new(ranges, vec![(ECAM.base, ECAM.size())]);
    let memory = vm_memory::GuestAddressSpace::memory(ram.view());
    Ok(boot::load(&mut host.payload, &memory, &map, &tables)?)
}

fn vcpus(
    vm: &Vm,
    host: &HostResources,
    count: u32,
    registers: &crate::kvm::BootRegisters,
) -> Result<Vec<Vcpu>, BuildError> {
    let mut vcpus = Vec::new();
    for id in 0..small(count) {
        let vcpu = vm.create_vcpu(id, host.cpuid.topology())?;
        vcpu.set_up(&host.cpuid, (id == 0).then_some(registers))?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// A number of vCPUs; the configuration was checked to have at most 254.
fn small(cpus: u32) -> u8 {
    u8::try_from(cpus).expect("checked in HostResources::open")
}

/// The guest's NUMA nodes with the ranges their zones got.
fn nodes(config: &ValidConfig, host: &HostResources) -> Vec<acpi::Node> {
    let topology = host.cpuid.topology();
    config
        .numa()
        .iter()
        .map(|node| acpi::Node {
            id: node.guest_numa_id,
            apic_ids: node
                .cpus
                .iter()
                .map(|cpu| topology.apic_id(small(*cpu)))
                .collect(),
            memory: host
                .layout
                .ranges()
                .iter()
                .filter(|range| node.memory_zones.contains(&host.zone_ids[range.zone]))
                .map(|range| acpi::NodeMemory {
                    base: range.gpa.0,
                    size: range.size,
                })
                .collect(),
            distances: node
                .distances
                .iter()
                .map(|d| (d.destination, d.distance))
                .collect(),
        })
        .collect()
}
