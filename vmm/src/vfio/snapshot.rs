//! What the host's configuration space held when the function was taken, and the two lists of capabilities in it.
//!
//! Pure. A device is not trusted to have made its lists well: pointers that lead back, out of the space, or into another
//! capability end the walk or shorten the capability; nothing here loops or reads past the end.
//! Sources: PCI Local Bus 3.0, 6.7; PCI Express Base 5.0, 7.6.3.

use std::io;

use daxhund_pin::{HostFunction, RegionIndex};
use thiserror::Error;

use crate::pci::{CAPABILITIES, CONFIG_SPACE, STATUS, STATUS_CAPABILITIES};

/// Bytes of a conventional function; the first list is in them.
pub(super) const CONVENTIONAL: u16 = 256;
/// Where the first list may begin.
pub(super) const HEADER: u16 = 0x40;
const ALL: u16 = 4096;

/// The host's configuration space can't be had.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// VFIO gives none, or too little.
    #[error(
        "VFIO gives {size:#x} bytes of configuration space, a function has {CONVENTIONAL:#x} at least; is it a PCI function?"
    )]
    Size {
        /// What there is.
        size: u64,
    },
    /// A read failed.
    #[error("configuration space can't be read at {register:#x}; has the device gone?")]
    Read {
        /// Where.
        register: u16,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// All of it.
pub(super) struct Snapshot {
    bytes: Box<[u8; CONFIG_SPACE]>,
    /// How much of it the function has: 256 or 4096.
    size: u16,
}

/// One capability in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capability {
    pub(super) id: u16,
    pub(super) at: u16,
    /// Bytes to the next capability or the end of the space: what it can have at most.
    pub(super) room: u16,
}

impl Snapshot {
    /// Reads it, a doubleword at a time.
    pub(super) fn take(host: &dyn HostFunction) -> Result<Self, SnapshotError> {
        let given = host
            .region(RegionIndex::Config)
            .map_or(0, |region| region.size);
        let size = match given {
            0..256 => return Err(SnapshotError::Size { size: given }),
            256..4096 => CONVENTIONAL,
            _ => ALL,
        };
        let mut bytes = Box::new([0; CONFIG_SPACE]);
        for register in (0..size).step_by(4) {
            let at = usize::from(register);
            host.read(RegionIndex::Config, register.into(), &mut bytes[at..at + 4])
                .map_err(|source| SnapshotError::Read { register, source })?;
        }
        Ok(Self { bytes, size })
    }

    #[cfg(test)]
    pub(super) fn of(bytes: &[u8; CONFIG_SPACE]) -> Self {
        Self {
            bytes: Box::new(*bytes),
            size: ALL,
        }
    }

    /// The bytes from `at`, as many as there are up to `len`.
    pub(super) fn bytes(&self, at: u16, len: u16) -> &[u8] {
        let from = usize::from(at).min(CONFIG_SPACE);
        let to = (from + usize::from(len)).min(CONFIG_SPACE);
        &self.bytes[from..to]
    }

    fn array<const N: usize>(&self, at: u16) -> [u8; N] {
        let mut array = [0; N];
        for (to, from) in array
            .iter_mut()
            .zip(&self.bytes[usize::from(at).min(CONFIG_SPACE)..])
        {
            *to = *from;
        }
        array
    }

    pub(super) fn u8(&self, at: u16) -> u8 {
        u8::from_le_bytes(self.array(at))
    }

    pub(super) fn u16(&self, at: u16) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(super) fn u32(&self, at: u16) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// The list in the first 256 bytes, in its order.
    pub(super) fn capabilities(&self) -> Vec<Capability> {
        let mut found: Vec<(u16, u16)> = Vec::new();
        if self.u16(STATUS) & STATUS_CAPABILITIES != 0 {
            let mut at = u16::from(self.u8(CAPABILITIES) & !0b11);
            while at >= HEADER && found.iter().all(|(_, other)| *other != at) {
                found.push((self.u8(at).into(), at));
                at = u16::from(self.u8(at + 1) & !0b11);
            }
        }
        with_room(&found, CONVENTIONAL)
    }

    /// The list from 0x100 on, in its order; without the empty entry that a list may begin with.
    pub(super) fn extended(&self) -> Vec<Capability> {
        let mut found: Vec<(u16, u16)> = Vec::new();
        if self.size == ALL {
            let mut at = CONVENTIONAL;
            while at >= CONVENTIONAL && found.iter().all(|(_, other)| *other != at) {
                let [id_low, id_high, next_low, next_high] = self.array(at);
                found.push((u16::from_le_bytes([id_low, id_high]), at));
                // Version in the low 4 bits; the lowest 2 bits of the pointer are reserved.
                at = u16::from_le_bytes([next_low, next_high]) >> 4 & !0b11;
            }
        }
        let mut all = with_room(&found, ALL);
        all.retain(|capability| !matches!(capability.id, 0 | 0xffff));
        all
    }
}

fn with_room(found: &[(u16, u16)], end: u16) -> Vec<Capability> {
    let room = |at: u16| {
        let starts = found.iter().map(|(_, other)| *other);
        starts.filter(|other| *other > at).min().unwrap_or(end) - at
    };
    found
        .iter()
        .map(|&(id, at)| Capability {
            id,
            at,
            room: room(at),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space(parts: &[(usize, &[u8])]) -> Snapshot {
        let mut bytes = [0; CONFIG_SPACE];
        bytes[usize::from(STATUS)] = 0x10;
        for (at, part) in parts {
            bytes[*at..*at + part.len()].copy_from_slice(part);
        }
        Snapshot::of(&bytes)
    }

    fn capability(id: u16, at: u16, room: u16) -> Capability {
        Capability { id, at, room }
    }

    #[test]
    fn lists_are_walked_in_their_order() {
        let snapshot = space(&[
            (0x34, &[0x80]),
            (0x80, &[0x05, 0x43]),
            (0x40, &[0x10, 0]),
            (0x100, &[1, 0, 0x02, 0x20]),
            (0x200, &[3, 0, 0x01, 0x00]),
        ]);
        let found = [capability(5, 0x80, 0x80), capability(0x10, 0x40, 0x40)];
        assert_eq!(snapshot.capabilities(), found);
        let found = [capability(1, 0x100, 0x100), capability(3, 0x200, 0xe00)];
        assert_eq!(snapshot.extended(), found);
    }

    #[test]
    fn lists_that_lead_back_or_astray_end() {
        let looped = space(&[
            (0x34, &[0x40]),
            (0x40, &[1, 0x50]),
            (0x50, &[5, 0x40]),
            (0x100, &[1, 0, 0x01, 0x10]),
        ]);
        assert_eq!(looped.capabilities().len(), 2);
        assert_eq!(looped.extended().len(), 1);
        let astray = space(&[(0x34, &[0x40]), (0x40, &[1, 0x10]), (0x100, &[0, 0, 0, 4])]);
        assert_eq!(astray.capabilities(), [capability(1, 0x40, 0xc0)]);
        assert_eq!(astray.extended(), [], "the entry at 0x100 is empty");
        let mut bytes = [0; CONFIG_SPACE];
        bytes[0x34] = 0x40;
        assert_eq!(Snapshot::of(&bytes).capabilities(), [], "status says so");
    }

    proptest! {
        #[test]
        fn walks_end_within_the_space(bytes in prop::collection::vec(any::<u8>(), CONFIG_SPACE)) {
            let mut space = [0; CONFIG_SPACE];
            space.copy_from_slice(&bytes);
            space[usize::from(STATUS)] |= 0x10;
            let snapshot = Snapshot::of(&space);
            for (all, end) in [(snapshot.capabilities(), CONVENTIONAL), (snapshot.extended(), ALL)] {
                for one in &all {
                    prop_assert!(one.room > 0 && one.at + one.room <= end);
                    let overlaps = all.iter().filter(|other| one.at <= other.at && other.at < one.at + one.room);
                    prop_assert_eq!(overlaps.count(), 1);
                }
            }
        }
    }
}
