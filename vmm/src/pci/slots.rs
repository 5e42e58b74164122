//! Who has which slot of a segment.
//!
//! ```text
//!            reserve: generation + 1
//!   Free(generation) ───────────────▶ Taken(generation, id)
//!         ▲                                │
//!         └──── free, same generation ─────┘
//! ```
//! A slot is known by its number *and* its generation, so whoever comes late with the slot of a device that is gone
//! can't reach the one that sits there now.

use thiserror::Error;

/// Slots of a bus.
pub const SLOTS: u8 = 32;
/// The host bridge's.
pub const HOST_BRIDGE_SLOT: u8 = 0;

/// A reserved slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    number: u8,
    generation: u64,
}

impl Slot {
    /// Device number on bus 0, 1 to 31.
    pub fn number(self) -> u8 {
        self.number
    }

    /// Which of the devices that had this slot one after the other.
    pub fn generation(self) -> u64 {
        self.generation
    }
}

/// A slot can't be had.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SlotError {
    /// Not a slot for devices.
    #[error(
        "there is no PCI slot {number} for a device: give pci_device_id from 1 to 31, or leave it out"
    )]
    NoSuchSlot {
        /// Asked for.
        number: u8,
    },
    /// Another device has it.
    #[error(
        "PCI slot {number} of segment {segment} is taken by {id}: give another pci_device_id, or leave it out"
    )]
    Taken {
        /// The segment.
        segment: u16,
        /// The slot.
        number: u8,
        /// Who has it.
        id: String,
    },
    /// None is left.
    #[error(
        "all 31 slots of PCI segment {segment} are taken: remove a device, or use pci_segment= with a further segment of \
         --platform num_pci_segments="
    )]
    Full {
        /// The segment.
        segment: u16,
    },
}

#[derive(Debug, Default)]
struct State {
    generation: u64,
    id: Option<String>,
}

/// The slots of one segment.
#[derive(Debug)]
pub struct Slots {
    segment: u16,
    states: [State; SLOTS as usize],
}

impl Slots {
    /// All free, except the host bridge's.
    pub fn new(segment: u16) -> Self {
        Self {
            segment,
            states: Default::default(),
        }
    }

    /// Reserves this slot, or the first that is free, for the device `id`.
    pub fn reserve(&mut self, wanted: Option<u8>, id: &str) -> Result<Slot, SlotError> {
        let number = match wanted {
            Some(number) if number == HOST_BRIDGE_SLOT || number >= SLOTS => {
                return Err(SlotError::NoSuchSlot { number });
            }
            Some(number) => number,
            None => (HOST_BRIDGE_SLOT + 1..SLOTS)
                .find(|number| self.states[usize::from(*number)].id.is_none())
                .ok_or(SlotError::Full {
                    segment: self.segment,
                })?,
        };
        let state = &mut self.states[usize::from(number)];
        if let Some(id) = &state.id {
            return Err(SlotError::Taken {
                segment: self.segment,
                number,
                id: id.clone(),
            });
        }
        state.generation += 1;
        state.id = Some(id.to_owned());
        Ok(Slot {
            number,
            generation: state.generation,
        })
    }

    /// The undo of [`Slots::reserve`]. False, and nothing done, if the slot is not this one's any more.
    pub fn free(&mut self, slot: Slot) -> bool {
        let holds = self.occupant(slot).is_some();
        if holds {
            self.states[usize::from(slot.number)].id = None;
        }
        holds
    }

    /// The device that has exactly this slot.
    pub fn occupant(&self, slot: Slot) -> Option<&str> {
        let state = self.states.get(usize::from(slot.number))?;
        (state.generation == slot.generation)
            .then_some(state.id.as_deref())
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slots_are_given_from_1_up_and_errors_name_who_has_them() {
        let mut slots = Slots::new(3);
        assert_eq!(slots.reserve(Some(2), "disk").unwrap().number(), 2);
        assert_eq!(slots.reserve(None, "a").unwrap().number(), 1);
        assert_eq!(slots.reserve(None, "b").unwrap().number(), 3);
        let error = slots.reserve(Some(2), "net").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("slot 2 of segment 3 is taken by disk")
        );
        for number in [0, 32, 255] {
            let error = slots.reserve(Some(number), "x").unwrap_err();
            assert_eq!(error, SlotError::NoSuchSlot { number });
        }
        for _ in 4..32 {
            slots.reserve(None, "more").unwrap();
        }
        let error = slots.reserve(None, "x").unwrap_err();
        assert_eq!(error, SlotError::Full { segment: 3 });
        assert!(error.to_string().contains("all 31 slots of PCI segment 3"));
    }

    #[test]
    fn who_comes_late_frees_nothing() {
        let mut slots = Slots::new(0);
        let old = slots.reserve(None, "old").unwrap();
        assert!(slots.free(old));
        assert!(!slots.free(old));
        let newcomer = slots.reserve(Some(old.number()), "new").unwrap();
        assert!(!slots.free(old));
        assert_eq!(slots.occupant(old), None);
        assert_eq!(slots.occupant(newcomer), Some("new"));
        assert!(slots.free(newcomer));
    }

    proptest! {
        #[test]
        fn a_slot_has_one_owner(steps in prop::collection::vec((any::<bool>(), 0u8..34, any::<prop::sample::Index>()), 0..200)) {
            let mut slots = Slots::new(0);
            let (mut held, mut gone) = (Vec::<Slot>::new(), Vec::<Slot>::new());
            for (reserve, number, which) in steps {
                if reserve {
                    let wanted = (number < 33).then_some(number);
                    match slots.reserve(wanted, "id") {
                        Ok(slot) => {
                            prop_assert!(held.iter().all(|other| other.number() != slot.number()));
                            prop_assert!(!gone.contains(&slot));
                            held.push(slot);
                        }
                        Err(SlotError::Full { .. }) => prop_assert_eq!(held.len(), 31),
                        Err(SlotError::Taken { number, .. }) => {
                            prop_assert!(held.iter().any(|other| other.number() == number));
                        }
                        Err(SlotError::NoSuchSlot { number }) => prop_assert!(!(1..32).contains(&number)),
                    }
                } else if !held.is_empty() {
                    let slot = held.swap_remove(which.index(held.len()));
                    prop_assert!(slots.free(slot));
                    gone.push(slot);
                }
                for slot in &gone {
                    prop_assert!(!slots.free(*slot));
                }
            }
        }
    }
}
