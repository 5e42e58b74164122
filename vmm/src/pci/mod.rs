//! PCI as far as it goes without devices: configuration space with a host bridge in it.
//!
//! Both ways in are there, ports 0xcf8/0xcfc (mechanism 1) and memory-mapped (ECAM), onto the same [`RootBus`]. Without a
//! host bridge Linux finds no way to configuration space and says so at every boot. There is no root bridge in ACPI yet,
//! so Linux does not look for devices.
//! Sources: PCI Local Bus 3.0, 3.2.2.3.2 and 6.1; PCI Express Base 5.0, 7.2.2.

pub mod function;
mod ports;

use std::sync::Arc;

pub use function::{BarChange, Function, MsiMessage, MsiRoutes};
pub use ports::{CONFIG_PORT_COUNT, CONFIG_PORTS, ConfigPorts};

use crate::bus::BusDevice;

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

const HOST_BRIDGE: u8 = 0;
const VENDOR_INTEL: u16 = 0x8086;
/// What other VMMs of this family call theirs.
const DEVICE_VIRTUAL_HOST_BRIDGE: u16 = 0x0d57;
const CLASS_HOST_BRIDGE: [u8; 3] = [0x00, 0x00, 0x06];
const HEADER: usize = 64;

/// Configuration space of segment 0: a host bridge at 00:00.0, nothing else.
#[derive(Debug)]
pub struct RootBus {
    bridge: [u8; HEADER],
}

impl RootBus {
    /// A bus with its bridge.
    pub fn new() -> Self {
        let mut bridge = [0; HEADER];
        bridge[0..2].copy_from_slice(&VENDOR_INTEL.to_le_bytes());
        bridge[2..4].copy_from_slice(&DEVICE_VIRTUAL_HOST_BRIDGE.to_le_bytes());
        bridge[9..12].copy_from_slice(&CLASS_HOST_BRIDGE);
        Self { bridge }
    }

    /// Reads configuration space. What is not there reads as all ones; registers that do not exist as zero.
    pub fn read(&self, address: ConfigAddress, data: &mut [u8]) {
        let present = address.bus == 0 && address.devfn == HOST_BRIDGE;
        for (at, byte) in (usize::from(address.register)..).zip(data) {
            *byte = if present {
                self.bridge.get(at).copied().unwrap_or(0)
            } else {
                0xff
            };
        }
    }
}

impl Default for RootBus {
    fn default() -> Self {
        Self::new()
    }
}

/// Memory-mapped configuration space.
#[derive(Debug)]
pub struct Ecam {
    bus: Arc<RootBus>,
}

impl Ecam {
    /// Onto this bus.
    pub fn new(bus: Arc<RootBus>) -> Self {
        Self { bus }
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [low, devfn_low, devfn_high, bus_high, ..] = offset.to_le_bytes();
        // Register in 11:0, function in 14:12, device in 19:15, bus in 27:20.
        let register = u16::from_le_bytes([low, devfn_low & 0xf]);
        let devfn = (devfn_low >> 4) | (devfn_high << 4);
        let bus = (devfn_high >> 4) | (bus_high << 4);
        self.bus.read(
            ConfigAddress {
                bus,
                devfn,
                register,
            },
            data,
        );
    }

    /// The bridge has no register that can be written.
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ecam(offset: u64) -> [u8; 4] {
        let mut data = [0xa5; 4];
        Ecam::new(Arc::default()).read(offset, &mut data);
        data
    }

    #[test]
    fn the_bridge_is_at_0_and_nothing_else_is() {
        assert_eq!(ecam(0), [0x86, 0x80, 0x57, 0x0d]);
        assert_eq!(ecam(8), [0x00, 0x00, 0x00, 0x06]);
        assert_eq!(ecam(0x40), [0; 4], "no extended capability");
        assert_eq!(ecam(0xffe), [0; 4], "past the end of the function");
        for elsewhere in [1 << 12, 1 << 15, 1 << 20, 0xff << 20] {
            assert_eq!(ecam(elsewhere), [0xff; 4], "{elsewhere:#x}");
        }
    }
}
