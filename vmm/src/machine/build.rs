//! Building a machine and taking it apart, side by side.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::warn;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::consumers::KvmSlots;
use super::devices::{Devices, PlugError};
use super::events::{Event, EventSender, Events};
use super::processors::{Processors, ResizeVcpusError};
use super::resources::HostResources;
use super::vcpus::{GuestIo, SpawnError, Vcpus};
use super::wiring::Fabric;
use crate::acpi::{self, TablesTooLarge};
use crate::boot::{self, LoadError, MemoryMap, place};
use crate::bus::{Bus, Overlap};
use crate::config::{ConsoleConfig, ValidConfig};
use crate::devices::cmos::{self, Cmos};
use crate::devices::places::{self, Interrupt};
use crate::devices::power::{self, AcpiPower, KeyboardReset, OnPowerRequest};
use crate::devices::processors;
use crate::devices::serial::{self, SerialParts, SerialPort};
use crate::kvm::{CpuidTemplate, CreateVmError, SetupError, Vcpu, Vm};
use crate::memory::ram::{ConsumerId, DetachError, JoinError, Ram};
use crate::pci::{self, ConfigPorts, Hotplug, Segment};

/// Global interrupt of the hotplug registers: the first pin of the I/O APIC that no PC device has.
const HOTPLUG_GSI: u32 = 16;

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
    /// KVM does not take guest memory.
    #[error(transparent)]
    Memory(#[from] JoinError),
    /// A device in its slot.
    #[error(transparent)]
    Plug(#[from] PlugError),
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
    pub(super) processors: Processors,
    io: Arc<GuestIo>,
    pub(super) devices: Devices,
    hotplug: Arc<Hotplug>,
    pub(super) serial: Option<SerialParts>,
    pub(super) events: Events,
    /// KVM among those who reach guest memory.
    slots: ConsumerId,
    vm: Vm,
}

impl Machine {
    /// Builds a machine whose memory is `ram`. On failure everything is let go.
    pub(super) fn build(
        config: &ValidConfig,
        host: &mut HostResources,
        ram: &mut Ram,
    ) -> Result<Self, BuildError> {
        let vm = Vm::create(&host.hypervisor)?;
        let memory_slots = vm.memory_slots();
        let slots = match ram.join(Box::new(KvmSlots::new(&memory_slots, &host.poison))) {
            Ok(slots) => slots,
            Err(failure) => {
                if let Some(slots) = failure.stays {
                    leave(ram, slots);
                }
                return Err(failure.into());
            }
        };
        let fabric = Fabric::new(&vm, memory_slots);
        Self::assemble(config, host, ram, (vm, slots, fabric)).inspect_err(|_| leave(ram, slots))
    }

    fn assemble(
        config: &ValidConfig,
        host: &mut HostResources,
        ram: &Ram,
        (vm, slots, fabric): (Vm, ConsumerId, Fabric),
    ) -> Result<Self, BuildError> {
        let (sender, events) = Events::channel().map_err(BuildError::Event)?;
        let serial = serial_port(&vm, host)?;
        let segments = segments(host);
        let interrupt = hotplug_interrupt(&vm)?;
        let hotplug = hotplug_registers(&segments, &sender, &interrupt);
        let boot_vcpus = small(config.cpus().boot_vcpus);
        let registers = processor_registers(boot_vcpus, &sender, interrupt);
        let mut devices = Devices::new(&segments, Arc::clone(&hotplug), fabric, ram.view().clone());
        for device in &mut host.devices {
            devices.plug(device)?;
        }
        let ports = ports(&sender, serial.as_ref(), &segments)?;
        let mmio = mmio(host, &segments, &hotplug, &registers)?;
        let start = load(config, host, ram)?;
        let vcpus = vcpus(&vm, host, boot_vcpus, &start)?;
        let io = Arc::new(GuestIo {
            ports,
            mmio,
            memory: ram.view().clone(),
            tombstones: Arc::clone(&host.tombstones),
            poison: Arc::clone(&host.poison),
        });
        let vcpus = Vcpus::spawn(vcpus, &io, &sender)?;
        Ok(Self {
            processors: Processors::new(vcpus, registers, host.metrics.clone()),
            io,
            devices,
            hotplug,
            serial,
            events,
            slots,
            vm,
        })
    }

    /// Lets the vCPUs run for the first time.
    pub(super) fn start(&self) {
        self.processors.vcpus.start();
    }

    /// Lets the vCPUs run.
    pub(super) fn release(&self) {
        self.processors.vcpus.release();
    }

    /// The undo of [`Machine::start`] and [`Machine::release`]; `false` when a vCPU did not leave the guest by then.
    pub(super) fn hold_vcpus(&self, at_most: Duration) -> bool {
        self.processors.vcpus.hold(at_most)
    }

    /// Lets vCPUs try again that found no memory.
    pub(super) fn mended(&self) {
        self.processors.vcpus.mended();
    }

    /// Whether that happened since then.
    pub(super) fn was_mended_since(&self, count: u64) -> bool {
        self.processors.vcpus.was_mended_since(count)
    }

    /// As [`Processors::resize`].
    pub(super) fn resize_vcpus(
        &mut self,
        count: usize,
        cpuid: &CpuidTemplate,
        now: Instant,
    ) -> Result<(), ResizeVcpusError> {
        self.processors.resize(count, (&self.vm, cpuid), now)
    }

    /// The guest sees its power button pressed; what it does then is its own affair.
    pub(super) fn power_button(&self) {
        self.hotplug.press_power_button();
    }

    /// Interrupts every vCPU, masked or not.
    pub(super) fn nmi(&self) {
        self.processors.vcpus.nmi();
    }

    /// The undo of [`Machine::build`], in reverse. `let_go` is called when nothing of the machine uses guest memory any more
    /// but KVM: it takes memory from those who are to let go before KVM does.
    pub(super) fn take_apart<T>(
        mut self,
        host: &mut HostResources,
        ram: &mut Ram,
        let_go: impl FnOnce(&mut Ram) -> T,
    ) -> (T, Result<(), DetachError>) {
        self.processors.vcpus.stop();
        let Self {
            processors,
            io,
            mut devices,
            hotplug,
            serial,
            events,
            slots,
            vm,
        } = self;
        drop(processors);
        drop(io);
        devices.unplug_all();
        drop(devices);
        drop(hotplug);
        host.serial = serial.and_then(SerialParts::into_output);
        drop(events);
        let let_go = let_go(ram);
        let left = ram.leave(slots);
        let holders = vm.holders();
        if holders != 1 {
            warn!(
                holders,
                "the VM is still held by somebody else than its owner"
            );
        }
        (let_go, left)
    }
}

/// After a failure: KVM's slots go before the VM does.
fn leave(ram: &mut Ram, slots: ConsumerId) {
    if let Err(error) = ram.leave(slots) {
        warn!(%error, "a VM that is not built keeps its memory slots");
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

fn segments(host: &HostResources) -> Vec<Arc<Segment>> {
    host.pci
        .segments
        .iter()
        .map(|segment| Arc::new(Segment::new(segment.windows())))
        .collect()
}

/// What all hotplug registers raise.
fn hotplug_interrupt(vm: &Vm) -> Result<Interrupt, BuildError> {
    let interrupt = EventFd::new(EFD_NONBLOCK).map_err(BuildError::Event)?;
    vm.connect_interrupt(&interrupt, HOTPLUG_GSI)?;
    // Only a full counter gives an error, and then the interrupt is under way.
    Ok(Arc::new(move || drop(interrupt.write(1))))
}

/// The registers through which guest and owner talk of slots that fill and empty.
fn hotplug_registers(
    segments: &[Arc<Segment>],
    events: &EventSender,
    interrupt: &Interrupt,
) -> Arc<Hotplug> {
    let events = events.clone();
    let count = u16::try_from(segments.len()).expect("at most 16 segments");
    Arc::new(Hotplug::new(
        count,
        Arc::new(move |ejected| events.send(Event::Ejected(ejected))),
        Arc::clone(interrupt),
    ))
}

/// Those of processors.
fn processor_registers(
    count: u8,
    events: &EventSender,
    interrupt: Interrupt,
) -> Arc<processors::Processors> {
    let events = events.clone();
    Arc::new(processors::Processors::new(
        count,
        Arc::new(move |vcpu| events.send(Event::ProcessorEjected(vcpu))),
        interrupt,
    ))
}

fn ports(
    events: &EventSender,
    serial: Option<&SerialParts>,
    segments: &[Arc<Segment>],
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
    if let Some(first) = segments.first() {
        ports.insert(
            pci::CONFIG_PORTS.into(),
            pci::CONFIG_PORT_COUNT.into(),
            Arc::new(ConfigPorts::new(Arc::clone(first))),
        )?;
    }
    Ok(ports)
}

fn mmio(
    host: &HostResources,
    segments: &[Arc<Segment>],
    hotplug: &Arc<Hotplug>,
    processors: &Arc<processors::Processors>,
) -> Result<Bus, BuildError> {
    let mut mmio = Bus::default();
    for (segment, place) in segments.iter().zip(&host.pci.segments) {
        let ecam = Arc::new(pci::Ecam::new(Arc::clone(segment)));
        mmio.insert(place.ecam.base(), place.ecam.size(), ecam)?;
        for aperture in segment.apertures() {
            let window = aperture.window();
            mmio.insert(window.base(), window.size(), aperture)?;
        }
    }
    mmio.insert(
        place::HOTPLUG,
        places::WINDOW,
        Arc::clone(hotplug) as Arc<_>,
    )?;
    mmio.insert(
        place::PROCESSORS,
        places::WINDOW,
        Arc::clone(processors) as Arc<_>,
    )?;
    Ok(mmio)
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
        segments: host.pci.segments.clone(),
        hotplug: acpi::HotplugDescription {
            slots: place::HOTPLUG,
            processors: place::PROCESSORS,
            gsi: HOTPLUG_GSI,
        },
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
    let ecams = host.pci.segments.iter();
    let ecams = ecams.map(|segment| (segment.ecam.base(), segment.ecam.size()));
    let reserved = ecams.chain(poisoned_ram(host)).collect();
    let map = MemoryMap::new(ranges, reserved);
    let memory = vm_memory::GuestAddressSpace::memory(ram.view());
    Ok(boot::load(&mut host.payload, &memory, &map, &tables)?)
}

/// What the guest must not take for RAM: first address and length.
fn poisoned_ram(host: &HostResources) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for poisoned in host.poison.known() {
        for range in host.layout.ranges() {
            let start = poisoned.gpa.max(range.gpa.0);
            let end = (poisoned.gpa + poisoned.size).min(range.gpa.0 + range.size);
            if start < end {
                found.push((start, end - start));
            }
        }
    }
    found
}

fn vcpus(
    vm: &Vm,
    host: &HostResources,
    count: u8,
    registers: &crate::kvm::BootRegisters,
) -> Result<Vec<Vcpu>, BuildError> {
    let mut vcpus = Vec::new();
    for id in 0..count {
        let mut vcpu = vm.create_vcpu(id, host.cpuid.topology())?;
        vcpu.set_up(&host.cpuid, (id == 0).then_some(registers))?;
        vcpu.count_exits(host.metrics.exits_of(id));
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
