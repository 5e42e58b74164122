//! What faces `/dev/kvm`: the VM, its vCPUs and its memory slots.
//!
//! Everything here is a thin, checked layer over `kvm-ioctls`; nothing knows of devices, boot or memory backings.
//! The interrupt controllers are the kernel's own (full in-kernel irqchip, never split: level interrupts of
//! passed-through devices will need resample irqfds).
//!
//! A vCPU can always be brought out of `KVM_RUN` by a signal, see `kick.rs`. `KVM_RUN` may never return by itself
//! when guest memory is taken away under it, so no design here may wait for it without that signal.

mod cpuid;
mod exits;
mod hypervisor;
mod instruction;
mod interrupts;
mod kick;
mod machine_check;
mod slots;
mod topology;
mod unemulated;
mod vcpu;
mod vfio;
mod vm;

pub use cpuid::{CpuidError, CpuidTemplate};
pub use exits::{ExitCounts, ExitReason};
pub use hypervisor::{Hypervisor, OpenError};
pub use interrupts::{Interrupts, Message, Vectors, VectorsError};
pub use kick::{KickError, KickTarget};
pub use slots::{MemorySlots, SlotError, SlotLease, SlotRange};
pub use topology::{Topology, TopologyError};
pub use vcpu::{Beneath, BootRegisters, BoundVcpu, Exit, Io, SetupError, Vcpu, VcpuFault};
pub use vfio::VfioRegistry;
pub use vm::{CreateVmError, Doorbells, Pins, Vm};
