//! Where a PCI function is: `0000:01:00.0`.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use thiserror::Error;

/// Domain, bus, device and function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Domain, also called segment. Some bridges make domains above 16 bits.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

/// A text that is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no PCI address: write domain:bus:device.function in hexadecimal, as in 0000:01:00.0 (`lspci -D`)"
)]
pub struct BadAddress(pub String);

impl PciAddress {
    /// From the form in which VFIO names functions: device and function in one byte.
    pub(crate) fn of_devfn(domain: u16, bus: u8, devfn: u8) -> Self {
        Self {
            domain: u32::from(domain),
            bus,
            device: devfn >> 3,
            function: devfn & 7,
        }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

impl FromStr for PciAddress {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        parse(text).ok_or_else(|| BadAddress(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let hex = |digits: &str, lengths: std::ops::RangeInclusive<usize>| {
        let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !plain || !lengths.contains(&digits.len()) {
            return None;
        }
        u32::from_str_radix(digits, 16).ok()
    };
    let (rest, function) = text.split_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.split_once(':')?;
    let address = PciAddress {
        domain: hex(domain, 4..=8)?,
        bus: hex(bus, 2..=2)?.try_into().ok()?,
        device: hex(device, 2..=2)?.try_into().ok()?,
        function: hex(function, 1..=1)?.try_into().ok()?,
    };
    (address.device < 32 && address.function < 8).then_some(address)
}

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_whole_addresses_are_addresses() {
        let texts = [
            "",
            "01:00.0",
            "0000:01:00",
            "0000:01:00.8",
            "0000:01:20.0",
            "0000:1:00.0",
            "000:01:00.0",
            "0000:01:00.0 ",
            "0000:01:00.00",
            "+000:01:00.0",
            "0000:01:0g.0",
            "0000:00:01:00.0",
        ];
        for text in texts {
            let error = text.parse::<PciAddress>().unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with(&format!("{text:?} is no PCI"))
            );
        }
    }

    #[test]
    fn vfio_names_device_and_function_in_one_byte() {
        let address = PciAddress::of_devfn(0, 0x3a, 0xfd);
        assert_eq!(address.to_string(), "0000:3a:1f.5");
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read(domain: u32, bus: u8, device in 0_u8..32, function in 0_u8..8) {
            let address = PciAddress { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse(), Ok(address));
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC*") {
            let _ = text.parse::<PciAddress>();
        }
    }
}
