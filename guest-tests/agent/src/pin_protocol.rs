//! What the programs on the emulated host tell of passing a device through: the bare one, and the client of a VMM.
//!
//! Durations are in nanoseconds, taken where the work is done: the way to the lab is slow.

use serde::{Deserialize, Serialize};

/// One attach by the bare program, step by step.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BareAttach {
    /// Mapping the memory into the process, every page of it. A guest's memory is there before its device.
    pub populate_ns: u64,
    /// Opening the container with its group, or the address space.
    pub open_ns: u64,
    /// Getting the device's file.
    pub device_ns: u64,
    /// Resetting the device.
    pub reset_ns: u64,
    /// Having the device reach the memory.
    pub map_ns: u64,
    /// Taking all of it down.
    pub release_ns: u64,
}

impl BareAttach {
    /// What an attach to memory that is there takes.
    pub fn attach_ns(&self) -> u64 {
        self.open_ns + self.device_ns + self.reset_ns + self.map_ns
    }
}

/// The kernel's interface for DMA.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Interface {
    /// VFIO's container.
    Type1,
    /// iommufd.
    Iommufd,
}

impl Interface {
    /// As it is written in arguments.
    pub fn word(self) -> &'static str {
        match self {
            Self::Type1 => "type1",
            Self::Iommufd => "iommufd",
        }
    }

    /// The undo of [`Interface::word`].
    pub fn of_word(word: &str) -> Option<Self> {
        [Self::Type1, Self::Iommufd]
            .into_iter()
            .find(|interface| interface.word() == word)
    }
}

/// A request to a VMM, seen by who has made it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RestCall {
    /// From the connection to the end of what was waited for.
    pub took_ns: u64,
    /// What was answered.
    pub answer: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attach_is_all_but_what_comes_before_and_after() {
        let attach = BareAttach {
            populate_ns: 1,
            open_ns: 10,
            device_ns: 100,
            reset_ns: 1000,
            map_ns: 10_000,
            release_ns: 100_000,
        };
        assert_eq!(attach.attach_ns(), 11_110);
    }

    #[test]
    fn interfaces_have_words() {
        for interface in [Interface::Type1, Interface::Iommufd] {
            assert_eq!(Interface::of_word(interface.word()), Some(interface));
        }
        assert_eq!(Interface::of_word("type2"), None);
    }
}
