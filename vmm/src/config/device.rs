//! What every device on the guest's PCI bus has: an id, and a place on a segment.
//!
//! Invariants:
//! - An id names one thing of the running guest, over all kinds of devices and memory zones.
//! - A generated id is never one that is in use or that somebody asked for, and is not generated again soon after its
//!   device went: the counter behind it is one for all kinds and only grows, as orchestrators know it.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::Key;

/// Most PCI segments a guest can have.
pub const MAX_PCI_SEGMENTS: u16 = 16;

/// Most devices on one segment, the host bridge among them.
pub const DEVICES_PER_SEGMENT: u8 = 32;

/// Where a device sits on PCI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The segment, one of those the guest has.
    pub segment: u16,
    /// The device number on its bus, 1 to 31; `None` is any that is free.
    pub device: Option<u8>,
}

/// A place that the guest does not have. `device` is the word with what tells it from others of its kind.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlaceError {
    /// No such segment.
    #[error(
        "{device}: pci_segment={segment}, but the guest's segments end at {}; give a lower one, or \
         --platform num_pci_segments={}", segments.saturating_sub(1), u32::from(*segment) + 1
    )]
    Segment {
        /// The device.
        device: String,
        /// The segment asked for.
        segment: u16,
        /// How many there are.
        segments: u16,
    },
    /// No such device number.
    #[error(
        "{device}: pci_device_id={number} is out of range: give 1 to {}, or leave it out",
        DEVICES_PER_SEGMENT - 1
    )]
    Number {
        /// The device.
        device: String,
        /// The number asked for.
        number: u8,
    },
    /// The host bridge's place.
    #[error(
        "{device}: pci_device_id=0 is the host bridge's: give 1 to {}, or leave it out",
        DEVICES_PER_SEGMENT - 1
    )]
    HostBridge {
        /// The device.
        device: String,
    },
    /// Two devices in one place.
    #[error(
        "{device}: pci_segment={segment},pci_device_id={number} is where {other} is; give it \
         another number, or leave it out"
    )]
    Taken {
        /// The later device.
        device: String,
        /// The device before it.
        other: String,
        /// The segment.
        segment: u16,
        /// The number.
        number: u8,
    },
}

impl Place {
    /// Checks the place of one device by itself.
    pub(super) fn check(
        device: &str,
        segment: u16,
        number: Option<u8>,
        segments: u16,
    ) -> Result<Self, PlaceError> {
        let device = device.to_owned();
        if segment >= segments {
            return Err(PlaceError::Segment {
                device,
                segment,
                segments,
            });
        }
        match number {
            Some(0) => Err(PlaceError::HostBridge { device }),
            Some(number) if number >= DEVICES_PER_SEGMENT => {
                Err(PlaceError::Number { device, number })
            }
            number => Ok(Self {
                segment,
                device: number,
            }),
        }
    }
}

/// Checks that no two devices ask for one place; each comes with how errors name it.
pub(super) fn check_places(
    devices: impl IntoIterator<Item = (String, Place)>,
) -> Result<(), PlaceError> {
    let mut taken: BTreeMap<(u16, u8), String> = BTreeMap::new();
    for (device, place) in devices {
        let Some(number) = place.device else { continue };
        let segment = place.segment;
        if let Some(other) = taken.insert((segment, number), device.clone()) {
            return Err(PlaceError::Taken {
                device,
                other,
                segment,
                number,
            });
        }
    }
    Ok(())
}

/// An id that a device or a zone cannot have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IdError {
    /// The empty text.
    #[error("{device} has an empty id; give it one with id=NAME, or leave it out")]
    Empty {
        /// What asks for it.
        device: String,
    },
    /// A name of the contract's own.
    #[error(
        "{device}: id={id} begins with two underscores, which the VMM keeps for itself; give \
         another one"
    )]
    Kept {
        /// What asks for it.
        device: String,
        /// The id asked for.
        id: String,
    },
    /// Somebody else's.
    #[error("id={id} is used by {other} and by {device}; give each an id of its own")]
    Duplicate {
        /// What asks for it.
        device: String,
        /// What has it.
        other: String,
        /// The id.
        id: String,
    },
}

/// How a kind of device is named when nobody does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Naming {
    /// `_disk0`, `_disk3`: there may be many.
    Numbered(&'static str),
    /// `_rng`: there is one.
    Single(&'static str),
}

/// The ids in use. A running guest's is the one its devices come and go in: an id is taken by `validate` of a device's
/// configuration and given back with [`IdAllocator::release`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdAllocator {
    /// Each id with what has it, as errors name it.
    taken: BTreeMap<String, String>,
    /// Ids that will be taken, which no generated one may be.
    asked_for: BTreeSet<String>,
    next: u64,
}

impl IdAllocator {
    /// Keeps ids that are asked for from being generated before they are taken.
    pub(super) fn keep<'a>(&mut self, ids: impl IntoIterator<Item = &'a str>) {
        self.asked_for.extend(ids.into_iter().map(str::to_owned));
    }

    /// Takes an id for `device`: the one asked for, or a new one.
    pub(super) fn take(
        &mut self,
        device: &str,
        asked: Option<&str>,
        naming: Naming,
    ) -> Result<String, IdError> {
        let id = match asked {
            Some(id) => self.check(device, id)?.to_owned(),
            None => self.generate(naming),
        };
        self.asked_for.remove(&id);
        self.taken.insert(id.clone(), device.to_owned());
        Ok(id)
    }

    /// Takes the id of something that always has one.
    pub(super) fn take_named(&mut self, device: &str, id: &str) -> Result<(), IdError> {
        let id = self.check(device, id)?.to_owned();
        self.asked_for.remove(&id);
        self.taken.insert(id, device.to_owned());
        Ok(())
    }

    /// Gives an id back; `false` when nothing has it.
    pub fn release(&mut self, id: &str) -> bool {
        self.taken.remove(id).is_some()
    }

    /// Whether something has the id.
    pub fn is_taken(&self, id: &str) -> bool {
        self.taken.contains_key(id)
    }

    fn check<'a>(&self, device: &str, id: &'a str) -> Result<&'a str, IdError> {
        let device = device.to_owned();
        if id.is_empty() {
            return Err(IdError::Empty { device });
        }
        let id_text = id.to_owned();
        if id.starts_with("__") {
            return Err(IdError::Kept {
                device,
                id: id_text,
            });
        }
        match self.taken.get(id) {
            Some(other) => Err(IdError::Duplicate {
                device,
                other: other.clone(),
                id: id_text,
            }),
            None => Ok(id),
        }
    }

    fn generate(&mut self, naming: Naming) -> String {
        let prefix = match naming {
            Naming::Single(name) if self.is_free(name) => return name.to_owned(),
            Naming::Single(prefix) | Naming::Numbered(prefix) => prefix,
        };
        // Ends: there are fewer ids than numbers.
        loop {
            let id = format!("{prefix}{}", self.next);
            self.next += 1;
            if self.is_free(&id) {
                return id;
            }
        }
    }

    fn is_free(&self, id: &str) -> bool {
        !self.taken.contains_key(id) && !self.asked_for.contains(id)
    }
}

/// A draft or configuration with the keys that all devices share.
pub(super) trait OnPci {
    fn pci(&mut self) -> PciFields<'_>;
}

/// Those keys' fields.
pub(super) struct PciFields<'a> {
    pub(super) id: &'a mut Option<String>,
    pub(super) segment: &'a mut u16,
    pub(super) number: &'a mut Option<u8>,
}

/// `id=`.
pub(super) const fn id_key<D: OnPci>() -> Key<D> {
    Key::new(
        "id",
        "NAME",
        "its name, unique [default: a new one]",
        |device, value| {
            *device.pci().id = Some(value.text()?);
            Ok(())
        },
    )
}

/// `pci_segment=`.
pub(super) const fn segment_key<D: OnPci>() -> Key<D> {
    Key::new(
        "pci_segment",
        "N",
        "its PCI segment [default: 0]",
        |device, value| {
            *device.pci().segment = value.integer()?;
            Ok(())
        },
    )
}

/// `pci_device_id=`.
pub(super) const fn number_key<D: OnPci>() -> Key<D> {
    Key::new(
        "pci_device_id",
        "N",
        "its PCI device number, 1 to 31 [default: a free one]",
        |device, value| {
            *device.pci().number = Some(value.integer()?);
            Ok(())
        },
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK: Naming = Naming::Numbered("_disk");

    #[test]
    fn a_place_is_one_the_guest_has() {
        let check = |segment, number| Place::check("--pmem id=a", segment, number, 2);
        for (segment, device) in [(0, None), (1, None), (0, Some(1)), (1, Some(31))] {
            assert_eq!(check(segment, device), Ok(Place { segment, device }));
        }
        for (segment, number, words) in [
            (
                2,
                None,
                "pci_segment=2, but the guest's segments end at 1; give a lower one, or --platform num_pci_segments=3",
            ),
            (u16::MAX, Some(1), "num_pci_segments=65536"),
            (
                0,
                Some(0),
                "pci_device_id=0 is the host bridge's: give 1 to 31",
            ),
            (
                0,
                Some(32),
                "pci_device_id=32 is out of range: give 1 to 31",
            ),
        ] {
            let error = check(segment, number).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert!(error.starts_with("--pmem id=a: "), "{error}");
        }
    }

    #[test]
    fn two_devices_have_two_places() {
        let place = |segment, device| Place { segment, device };
        let named = |places: &[Place]| {
            let names = ["--disk id=a", "--net id=b", "--pmem id=c"];
            check_places(names.map(str::to_owned).into_iter().zip(places.to_vec()))
        };
        let apart = [place(0, Some(4)), place(1, Some(4)), place(0, None)];
        assert_eq!(named(&apart), Ok(()));
        assert_eq!(named(&[place(0, None); 3]), Ok(()));
        let error = named(&[place(0, Some(4)), place(0, None), place(0, Some(4))]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--pmem id=c: pci_segment=0,pci_device_id=4 is where --disk id=a is; give it another \
             number, or leave it out"
        );
    }

    #[test]
    fn ids_are_taken_once() {
        let mut ids = IdAllocator::default();
        assert_eq!(ids.take("--disk", Some("a"), DISK), Ok("a".to_owned()));
        let error = ids.take("--pmem", Some("a"), DISK).unwrap_err();
        assert_eq!(
            error.to_string(),
            "id=a is used by --disk and by --pmem; give each an id of its own"
        );
        assert_eq!(ids.take_named("--memory-zone", "a").unwrap_err(), {
            IdError::Duplicate {
                device: "--memory-zone".into(),
                other: "--disk".into(),
                id: "a".into(),
            }
        });
        assert!(ids.release("a"));
        assert!(!ids.release("a"));
        assert!(ids.take("--pmem", Some("a"), DISK).is_ok());
        let error = ids.take("--disk", Some(""), DISK).unwrap_err();
        assert!(error.to_string().contains("has an empty id"));
        let error = ids.take("--disk", Some("__x"), DISK).unwrap_err();
        assert!(error.to_string().contains("two underscores"), "{error}");
    }

    #[test]
    fn generated_ids_count_over_all_kinds_and_do_not_come_back() {
        let mut ids = IdAllocator::default();
        let rng = Naming::Single("_rng");
        ids.keep(["_net1", "_rng"]);
        let mut next = |naming| ids.take("device", None, naming).unwrap();
        assert_eq!(next(DISK), "_disk0");
        assert_eq!(next(Naming::Numbered("_net")), "_net2");
        assert_eq!(next(rng), "_rng3");
        assert_eq!(next(DISK), "_disk4");
        assert!(ids.release("_disk4"));
        assert_eq!(ids.take("device", None, DISK).unwrap(), "_disk5");
        assert!(ids.take("device", Some("_net1"), DISK).is_ok());
        let mut ids = IdAllocator::default();
        assert_eq!(ids.take("device", None, rng).unwrap(), "_rng");
        assert_eq!(ids.take("device", None, rng).unwrap(), "_rng0");
    }

    proptest! {
        #[test]
        fn no_id_is_ever_given_twice(steps in proptest::collection::vec((0_u8..3, "_?disk[0-3]?"), 0..40)) {
            let mut ids = IdAllocator::default();
            let mut live = BTreeSet::new();
            for (step, name) in steps {
                match step {
                    0 => {
                        let id = ids.take("device", None, DISK).unwrap();
                        prop_assert!(live.insert(id));
                    }
                    1 => prop_assert_eq!(
                        ids.take("device", Some(&name), DISK).is_ok(),
                        live.insert(name)
                    ),
                    _ => prop_assert_eq!(ids.release(&name), live.remove(&name)),
                }
            }
        }
    }
}
