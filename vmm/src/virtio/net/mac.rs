//! An Ethernet address.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;

use thiserror::Error;

/// Bit of the first byte: a group of stations, not one.
const GROUP: u8 = 1;
/// Bit of the first byte: given by an administrator, not by a manufacturer.
const LOCAL: u8 = 2;

/// The address of one network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac([u8; 6]);

/// Not the address of an interface.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MacError {
    /// Not six bytes in hexadecimal.
    #[error("{text:?} is no MAC address: write six bytes in hexadecimal, as in 12:34:56:78:90:ab")]
    Syntax {
        /// What was given.
        text: String,
    },
    /// A multicast or broadcast address.
    #[error(
        "{mac} is the address of a group, not of an interface: clear the lowest bit of its first byte"
    )]
    Group {
        /// What was given.
        mac: Mac,
    },
    /// All zeros.
    #[error("{mac} is the address of no interface: leave it out to get a random one")]
    Zero {
        /// What was given.
        mac: Mac,
    },
}

impl Mac {
    /// The address with these bytes.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        let mac = Self(bytes);
        if bytes == [0; 6] {
            return Err(MacError::Zero { mac });
        }
        if bytes[0] & GROUP != 0 {
            return Err(MacError::Group { mac });
        }
        Ok(mac)
    }

    /// A random address of the kind that an administrator gives.
    pub fn random() -> Self {
        // The keys of a `RandomState` come from the host's random numbers, and their hash is 64 bits of them.
        let random = RandomState::new().build_hasher().finish().to_ne_bytes();
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&random[2..]);
        bytes[0] = bytes[0] & !GROUP | LOCAL;
        Self(bytes)
    }

    /// Its bytes, in the order of the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let syntax = || MacError::Syntax {
            text: text.to_owned(),
        };
        let mut bytes = [0; 6];
        let mut words = text.split(':');
        for byte in &mut bytes {
            let word = words.next().ok_or_else(syntax)?;
            // `from_str_radix` takes a sign too.
            if word.len() != 2 || !word.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *byte = u8::from_str_radix(word, 16).map_err(|_| syntax())?;
        }
        if words.next().is_some() {
            return Err(syntax());
        }
        Self::new(bytes)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, byte) in self.0.iter().enumerate() {
            let colon = if n > 0 { ":" } else { "" };
            write!(f, "{colon}{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_back_as_it_is_written() {
        let mac: Mac = "12:34:56:78:9A:bc".parse().unwrap();
        assert_eq!(mac.bytes(), [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc]);
        assert_eq!(mac.to_string(), "12:34:56:78:9a:bc");
    }

    #[test]
    fn what_is_no_address_says_why() {
        for text in [
            "",
            "12:34:56:78:90",
            "12:34:56:78:90:ab:cd",
            "12-34-56-78-90-ab",
            "1:2:3:4:5:6",
            "+1:34:56:78:90:ab",
            "é:34:56:78:90:ab",
        ] {
            let error = text.parse::<Mac>().unwrap_err();
            assert!(matches!(error, MacError::Syntax { .. }), "{text}: {error}");
        }
        let error = "ff:ff:ff:ff:ff:ff".parse::<Mac>().unwrap_err();
        assert!(matches!(error, MacError::Group { .. }), "{error}");
        let error = "00:00:00:00:00:00".parse::<Mac>().unwrap_err();
        assert!(matches!(error, MacError::Zero { .. }), "{error}");
    }

    #[test]
    fn random_addresses_are_local_and_differ() {
        let (one, other) = (Mac::random(), Mac::random());
        assert_ne!(one, other);
        for mac in [one, other] {
            assert_eq!(mac.bytes()[0] & (GROUP | LOCAL), LOCAL);
        }
    }
}
