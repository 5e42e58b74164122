//! Configuration space, BARs, segment and apertures under a guest that writes anything anywhere, while devices come and
//! go.
#![no_main]

use std::sync::Arc;

use daxhund::bus::BusDevice;
use daxhund::pci::testing::{FakeFunction, Told, bar32, bar64, windows};
use daxhund::pci::{ConfigPorts, Ecam, Segment};
use daxhund_fuzz_support::input::Input;
use libfuzzer_sys::fuzz_target;

const SLOTS: u8 = 4;

fn function(slot: u8) -> Arc<FakeFunction> {
    let bars = match slot {
        1 => vec![bar32(0, 0x1000), bar32(1, 0x4000)],
        2 => vec![bar64(2, 0x4000), bar32(5, 0x10)],
        3 => vec![bar64(0, 1 << 33), bar64(4, 1 << 20)],
        _ => vec![bar32(0, 0x1000)],
    };
    FakeFunction::new(&bars)
}

struct Occupant {
    function: Arc<FakeFunction>,
    inserted: bool,
    /// Where each BAR was said to answer.
    answering: [Option<u64>; 6],
}

impl Occupant {
    fn listen(&mut self) {
        for told in self.function.told() {
            if let Told::Moved(change) = told {
                let now = &mut self.answering[usize::from(change.bar)];
                assert_eq!(*now, change.old);
                *now = change.new;
            }
        }
    }
}

fn check(segment: &Segment, occupants: &mut [Occupant]) {
    let mut ranges = Vec::new();
    for occupant in &mut *occupants {
        occupant.listen();
        for bar in occupant.function.space().bars() {
            let address = occupant.function.space().bar_address(bar.bar);
            assert!(address.is_some_and(|at| at.is_multiple_of(bar.size)));
            if let Some(at) = occupant.answering[usize::from(bar.bar)] {
                assert!(occupant.inserted);
                assert_eq!(bar.new, Some(at));
                ranges.push((at, bar.size, bar.bar));
            }
        }
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        assert!(
            pair[0].0 + pair[0].1 <= pair[1].0,
            "two BARs at one address"
        );
    }
    for (at, size, bar) in ranges {
        let apertures = segment.apertures();
        let window = |aperture: &Arc<daxhund::pci::Aperture>| aperture.window();
        let aperture = apertures
            .iter()
            .find(|aperture| window(aperture).base() <= at && at < window(aperture).end())
            .expect("a BAR answers outside of the apertures");
        for offset in [0, size - 1] {
            let mut data = [0xff];
            aperture.read(at + offset - window(aperture).base(), &mut data);
            assert_eq!(data, [bar]);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let segment = Arc::new(Segment::new(windows()));
    let ecam = Ecam::new(Arc::clone(&segment));
    let ports = ConfigPorts::new(Arc::clone(&segment));
    let mut occupants: Vec<Occupant> = (0..SLOTS)
        .map(|slot| Occupant {
            function: function(slot),
            inserted: false,
            answering: [None; 6],
        })
        .collect();
    for slot in 1..SLOTS {
        let occupant = &mut occupants[usize::from(slot)];
        occupant.inserted = segment
            .insert(slot, Arc::clone(&occupant.function) as _)
            .is_ok();
        assert!(occupant.inserted, "there is room at first");
    }
    while !input.is_empty() {
        let (deed, slot) = {
            let byte = input.u8();
            (byte >> 4, byte & 0x0f)
        };
        let mut read = [0xff; 8];
        match deed {
            // Most deeds are in the header of a function.
            0..=4 => {
                let offset = u64::from(slot % SLOTS) << 15 | u64::from(input.u8() % 0x48);
                ecam.write(offset, &input.store());
            }
            5 => ecam.write(input.u32().into(), &input.store()),
            6 => ecam.read(input.u32().into(), &mut read[..usize::from(slot % 8) + 1]),
            7 | 8 => ports.write((slot % 8).into(), &input.store()),
            9 => ports.read((slot % 8).into(), &mut read[..usize::from(slot / 2) + 1]),
            10 => {
                let [low, high] = segment.apertures();
                let aperture = if slot & 1 == 0 { low } else { high };
                aperture.write(input.u64(), &input.store());
            }
            11 => {
                let [low, high] = segment.apertures();
                let aperture = if slot & 1 == 0 { low } else { high };
                aperture.read(input.u64(), &mut read);
            }
            // Whole registers, where a BAR could be.
            12 | 13 => {
                let register = 0x10 + u64::from(input.u8() % 6) * 4;
                let value = 0xc000_0000 | u32::from(input.u16()) << 8;
                ecam.write(
                    u64::from(slot % SLOTS) << 15 | register,
                    &value.to_le_bytes(),
                );
            }
            _ => {
                let slot = slot % SLOTS;
                let occupant = &mut occupants[usize::from(slot)];
                let removed = segment.remove(slot);
                assert_eq!(removed.is_some(), occupant.inserted);
                drop(removed);
                occupant.listen();
                assert_eq!(occupant.answering, [None; 6]);
                assert_eq!(Arc::strong_count(&occupant.function), 1);
                if !occupant.inserted && slot != 0 {
                    occupant.function = function(slot);
                    let function = Arc::clone(&occupant.function);
                    occupant.inserted = segment.insert(slot, function).is_ok();
                } else {
                    occupant.inserted = false;
                }
            }
        }
        check(&segment, &mut occupants);
    }
});
