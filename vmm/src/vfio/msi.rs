//! The MSI capability: what its registers say, and the routes that follow them.
//!
//! Pure but for [`MsiRouter`], which tells [`MsiRoutes`] of changes. The layout is the host's, so that a driver which
//! remembers offsets finds what it expects; none of it reaches the host.
//! Sources: PCI Local Bus 3.0, 6.8.1.

use super::registers::RegisterFile;
use super::snapshot::{Capability, Snapshot};
use crate::pci::{ConfigSpace, MsiMessage, MsiRoutes};

/// Most vectors a function can have.
pub(super) const MSI_VECTORS: u16 = 32;

/// Offset of message control in the capability.
const CONTROL: u16 = 2;
const CONTROL_ENABLE: u16 = 1 << 0;
/// Number of vectors that the guest wants, as a power of two.
const CONTROL_ENABLED_VECTORS: u16 = 0b111 << 4;
const CONTROL_64: u16 = 1 << 7;
const CONTROL_MASKS: u16 = 1 << 8;
const ADDRESS: u16 = 4;
/// Messages go to doublewords.
const ADDRESS_LOW: u32 = !0b11;

/// Where the capability is and which registers it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsiCapability {
    at: u16,
    /// The address has an upper half.
    wide: bool,
    /// Each vector has a mask and a pending bit.
    masks: bool,
    /// Number of vectors as a power of two.
    vectors_log2: u16,
}

impl MsiCapability {
    /// Shows the host's capability with as many vectors as the host can raise. `None`: it can raise none, or the
    /// capability does not fit where it is.
    pub(super) fn keep(
        file: &mut RegisterFile,
        snapshot: &Snapshot,
        found: Capability,
        vectors: u32,
    ) -> Option<Self> {
        let control = snapshot.u16(found.at + CONTROL);
        let capability = Self {
            at: found.at,
            wide: control & CONTROL_64 != 0,
            masks: control & CONTROL_MASKS != 0,
            vectors_log2: u16::try_from(vectors.checked_ilog2()?)
                .ok()?
                .min(control >> 1 & 0b111)
                .min(MSI_VECTORS.ilog2().try_into().ok()?),
        };
        let length = capability.length();
        if found.room < length {
            return None;
        }
        file.hide(found.at, length);
        let space = file.space_mut();
        let fixed = control & (CONTROL_64 | CONTROL_MASKS) | capability.vectors_log2 << 1;
        space.set(found.at + CONTROL, &fixed.to_le_bytes());
        let writable = CONTROL_ENABLE | CONTROL_ENABLED_VECTORS;
        space.allow(found.at + CONTROL, &writable.to_le_bytes());
        space.allow(found.at + ADDRESS, &ADDRESS_LOW.to_le_bytes());
        if capability.wide {
            space.allow(found.at + ADDRESS + 4, &[0xff; 4]);
        }
        space.allow(capability.data(), &[0xff; 2]);
        if let Some(mask) = capability.mask() {
            let vectors = u32::MAX >> (32 - (1 << capability.vectors_log2));
            space.allow(mask, &vectors.to_le_bytes());
        }
        Some(capability)
    }

    fn data(self) -> u16 {
        self.at + ADDRESS + if self.wide { 8 } else { 4 }
    }

    fn mask(self) -> Option<u16> {
        self.masks.then_some(self.data() + 4)
    }

    /// Where the pending bits are, 4 bytes.
    pub(super) fn pending(self) -> Option<u16> {
        self.masks.then_some(self.data() + 8)
    }

    fn length(self) -> u16 {
        let end = self.data() + if self.masks { 12 } else { 2 };
        end - self.at
    }

    /// What the registers say.
    pub(super) fn state(self, space: &ConfigSpace) -> MsiState {
        let control = space.read_u16(self.at + CONTROL);
        if control & CONTROL_ENABLE == 0 {
            return MsiState::OFF;
        }
        let high = if self.wide {
            space.read_u32(self.at + ADDRESS + 4)
        } else {
            0
        };
        let low = space.read_u32(self.at + ADDRESS);
        MsiState {
            // A guest that asks for more gets what there is.
            vectors: 1 << ((control & CONTROL_ENABLED_VECTORS) >> 4).min(self.vectors_log2),
            address: u64::from(high) << 32 | u64::from(low),
            data: space.read_u16(self.data()),
            masked: self.mask().map_or(0, |mask| space.read_u32(mask)),
        }
    }
}

/// MSI as the guest has set it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MsiState {
    /// How many vectors are on; 0: MSI is off.
    pub(super) vectors: u16,
    address: u64,
    data: u16,
    masked: u32,
}

impl MsiState {
    /// Switched off.
    pub(super) const OFF: Self = Self {
        vectors: 0,
        address: 0,
        data: 0,
        masked: 0,
    };

    /// What a vector sends; `None`: it is off or masked.
    pub(super) fn message(&self, vector: u16) -> Option<MsiMessage> {
        let open = vector < self.vectors && self.masked >> vector & 1 == 0;
        open.then(|| MsiMessage {
            address: self.address,
            // The function changes the low bits of the data.
            data: u32::from(self.data & !(self.vectors - 1) | vector),
        })
    }
}

/// Keeps the routes of MSI as the registers say.
#[derive(Debug, Default)]
pub(super) struct MsiRouter {
    told: [Option<MsiMessage>; MSI_VECTORS as usize],
}

impl MsiRouter {
    /// Tells the routes what has changed.
    pub(super) fn follow(&mut self, state: &MsiState, routes: &dyn MsiRoutes) {
        for (vector, told) in (0..).zip(&mut self.told) {
            let message = state.message(vector);
            if *told != message {
                *told = message;
                routes.set(vector, message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::CONFIG_SPACE;
    use crate::pci::testing::{FakeRoutes, IDENTITY};

    const AT: u16 = 0x50;

    fn kept(control: u16, room: u16, vectors: u32) -> (RegisterFile, Option<MsiCapability>) {
        let mut bytes = [0; CONFIG_SPACE];
        bytes[0x52..0x54].copy_from_slice(&control.to_le_bytes());
        let mut file = RegisterFile::new(ConfigSpace::new(&IDENTITY));
        file.forward(AT, 0x20);
        let found = Capability {
            id: 5,
            at: AT,
            room,
        };
        let capability = MsiCapability::keep(&mut file, &Snapshot::of(&bytes), found, vectors);
        (file, capability)
    }

    #[test]
    fn the_host_says_what_there_is() {
        let (file, capability) = kept(0x0186, 0x18, 32);
        let capability = capability.unwrap();
        assert_eq!(file.space().read_u16(AT + CONTROL), 0x0186);
        assert_eq!(
            (capability.length(), capability.pending()),
            (0x18, Some(AT + 0x14))
        );
        let (file, _) = kept(0x0186, 0x18, 5);
        assert_eq!(
            file.space().read_u16(AT + CONTROL),
            0x0184,
            "4 of 5 are a power of two"
        );
        assert_eq!(kept(0x0186, 0x17, 32).1, None, "no room");
        assert_eq!(kept(0x0186, 0x18, 0).1, None, "the host can raise none");
        for (control, length) in [(0, 0x0a), (0x80, 0x0e), (0x100, 0x14)] {
            assert_eq!(kept(control, 0x18, 1).1.unwrap().length(), length);
        }
    }

    #[test]
    fn vectors_differ_in_the_low_bits_of_their_data() {
        let (mut file, capability) = kept(0x0184, 0x18, 4);
        let capability = capability.unwrap();
        let routes = FakeRoutes::default();
        let mut follower = MsiRouter::default();
        for (register, value) in [
            (4, 0xfee0_1003),
            (8, 1),
            (0xc, 0x43),
            (0x10, 0b0100),
            (0, 0x21 << 16),
        ] {
            let (_, forwards) = file.write(AT + register, &u32::to_le_bytes(value));
            assert_eq!(forwards, []);
            follower.follow(&capability.state(file.space()), &routes);
        }
        let at = |data| {
            Some(MsiMessage {
                address: 0x1_fee0_1000,
                data,
            })
        };
        let told = [0, 1, 2, 3, 4].map(|vector| routes.get(vector));
        assert_eq!(told, [at(0x40), at(0x41), None, at(0x43), None]);
        assert_eq!(routes.sets(), 3);
        follower.follow(&MsiState::OFF, &routes);
        assert!((0..32).all(|vector| routes.get(vector).is_none()));
    }

    proptest! {
        #[test]
        fn routes_are_what_the_registers_say(
            control in any::<u16>(),
            vectors in 1u32..40,
            stores in prop::collection::vec((0u16..0x18, prop::collection::vec(any::<u8>(), 1..5)), 0..60),
        ) {
            let (mut file, capability) = kept(control, 0x18, vectors);
            let capability = capability.unwrap();
            let routes = FakeRoutes::default();
            let mut follower = MsiRouter::default();
            for (offset, data) in stores {
                file.write(AT + offset, &data);
                let state = capability.state(file.space());
                follower.follow(&state, &routes);
                let control = file.space().read_u16(AT + CONTROL);
                prop_assert_eq!(state.vectors != 0, control & 1 == 1);
                prop_assert!(u32::from(state.vectors) <= vectors);
                prop_assert!(state.vectors <= 1 << (control >> 1 & 0b111));
                for vector in 0..MSI_VECTORS {
                    prop_assert_eq!(routes.get(vector), state.message(vector));
                }
            }
        }
    }
}
