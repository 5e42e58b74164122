//! Configuration mechanism 1: an address register at 0xcf8, four data bytes at 0xcfc.

use std::sync::{Arc, Mutex, PoisonError};

use super::{ConfigAddress, Segment};
use crate::bus::BusDevice;

/// First port.
pub const CONFIG_PORTS: u16 = 0xcf8;
/// Number of ports.
pub const CONFIG_PORT_COUNT: u16 = 8;

const DATA: u64 = 4;
const DATA_SIZE: usize = 4;
const ENABLE: u32 = 1 << 31;
/// Bits of the address register that hold something: enable, bus, device, function, register.
const IMPLEMENTED: u32 = 0x80ff_fffc;

/// The two registers.
#[derive(Debug)]
pub struct ConfigPorts {
    segment: Arc<Segment>,
    address: Mutex<u32>,
}

impl ConfigPorts {
    /// Into this segment, which is number 0: the mechanism knows no other.
    pub fn new(segment: Arc<Segment>) -> Self {
        Self {
            segment,
            address: Mutex::new(0),
        }
    }

    fn address(&self) -> u32 {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an access to the data bytes means now. `None`: it leaves them, or they are switched off.
    fn target(&self, offset: u64, len: usize) -> Option<ConfigAddress> {
        let within = usize::try_from(offset.checked_sub(DATA)?).ok()?;
        let address = self.address();
        if within + len > DATA_SIZE || address & ENABLE == 0 {
            return None;
        }
        let [register, devfn, bus, _] = address.to_le_bytes();
        Some(ConfigAddress {
            bus,
            devfn,
            register: u16::from(register) + u16::try_from(within).ok()?,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address().to_le_bytes());
        } else if let Some(address) = self.target(offset, data.len()) {
            self.segment.config_read(address, data);
        }
    }

    /// Only a whole register is an address; a byte at 0xcf9 is another device's on a PC.
    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            let address = u32::from_le_bytes(bytes) & IMPLEMENTED;
            *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
        } else if let Some(address) = self.target(offset, data.len()) {
            self.segment.config_write(address, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::testing::windows;

    fn ports() -> ConfigPorts {
        ConfigPorts::new(Arc::new(Segment::new(windows())))
    }

    fn read(ports: &ConfigPorts, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xff; len];
        ports.read(offset, &mut data);
        data
    }

    /// What Linux does to find mechanism 1 (arch/x86/pci/direct.c).
    #[test]
    fn the_address_reads_back_and_leads_to_the_bridge() {
        let ports = ports();
        ports.write(0, &0x8000_0000u32.to_le_bytes());
        assert_eq!(read(&ports, 0, 4), 0x8000_0000u32.to_le_bytes());
        assert_eq!(read(&ports, 4, 2), [0x86, 0x80]);
        ports.write(0, &0x8000_0008u32.to_le_bytes());
        assert_eq!(read(&ports, 6, 2), [0x00, 0x06]);
        ports.write(0, &0x8000_0800u32.to_le_bytes());
        assert_eq!(read(&ports, 4, 4), [0xff; 4]);
    }

    #[test]
    fn without_the_enable_bit_there_is_nothing() {
        let ports = ports();
        ports.write(0, &[0; 4]);
        assert_eq!(read(&ports, 4, 4), [0xff; 4]);
    }

    proptest! {
        #[test]
        fn whatever_the_guest_does_the_ports_live(
            steps in prop::collection::vec((0u64..8, prop::collection::vec(any::<u8>(), 1..9)), 0..40)
        ) {
            let ports = ports();
            for (offset, data) in steps {
                ports.write(offset, &data);
                read(&ports, offset, data.len());
            }
        }
    }
}
