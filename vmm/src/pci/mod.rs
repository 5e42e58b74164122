//! PCI: flat segments of 32 slots, what sits in them, and how the guest finds and configures it.
//!
//! ```text
//!   Segment ── slot 0: host bridge
//!     │  │└─── slot n: Function { ConfigSpace, Msix, BARs }        virtio, passed-through devices
//!     │  └──── Aperture (32-bit), Aperture (64-bit): the BARs      on the MMIO bus
//!     └─────── Ecam, on segment 0 also ConfigPorts                 on the MMIO and the port bus
//! ```
//! There are no bridges: bus 0 of each segment is all there is, so a device's address is its slot. Segments differ in
//! their windows only.
//!
//! Nothing here knows KVM: interrupts are [`MsiRoutes`], doorbells are the business of whoever hears
//! [`Function::bar_moved`].
//! Sources: PCI Local Bus 3.0, 3.2.2.3.2 and chapter 6; PCI Express Base 5.0, 7.2.2 and 7.5.

mod aperture;
mod config_space;
pub mod function;
mod host_bridge;
pub(crate) mod hotplug;
mod layout;
mod msix;
mod ports;
mod segment;
mod slots;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
mod window;

pub use aperture::Aperture;
pub(crate) use config_space::{
    BAR_64, BAR_IO, BAR_PREFETCHABLE, CAPABILITIES, CLASS, COMMAND, COMMAND_BUS_MASTER,
    COMMAND_INTX_DISABLE, COMMAND_MEMORY, FIRST_BAR, REVISION, STATUS, STATUS_CAPABILITIES,
    SUBSYSTEM,
};
pub use config_space::{
    BARS, Bar, BarError, BarWidth, CONFIG_SPACE, CapabilityError, Class, ConfigSpace, Identity,
    ROM_BAR,
};
pub use function::{BarChange, Function, MsiMessage, MsiRoutes};
pub use hotplug::{Ejected, Hotplug, OnEjected};
pub use layout::{
    LayoutError, LayoutRequest, MAX_SEGMENTS, MemoryArea, NoPlace, PciLayout, SECTION,
    SegmentLayout,
};
pub use msix::{BarOffset, MSIX_CAPABILITY, MSIX_VECTORS, Msix, MsixError, MsixLayout};
pub use ports::{CONFIG_PORT_COUNT, CONFIG_PORTS, ConfigPorts};
pub use segment::{Ecam, InsertError, Segment, SegmentWindows};
pub use slots::{HOST_BRIDGE_SLOT, SLOTS, Slot, SlotError, Slots};
pub use window::{Allocator, Window};

/// Global system interrupts that pins of PCI functions raise: those of the I/O APIC that nothing else uses.
pub const PIN_GSIS: std::ops::Range<u32> = 17..24;

/// The interrupt that pin A of a slot's function raises. Level-triggered, and shared by slots.
pub fn pin_gsi(slot: u8) -> u32 {
    PIN_GSIS.start + u32::from(slot) % (PIN_GSIS.end - PIN_GSIS.start)
}

/// A function's place on bus 0 and the register in its configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigAddress {
    /// Bus number.
    pub bus: u8,
    /// Device in bits 7:3, function in 2:0.
    pub devfn: u8,
    /// Byte offset, 0 to 4095.
    pub register: u16,
}
