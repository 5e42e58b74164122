//! A passed-through function under a guest that writes anything anywhere, while its device interrupts, refuses and vanishes: what
//! the host has enabled is what the guest's registers say, and nothing reaches the host that may not.
#![no_main]

use std::sync::Arc;

use daxhund::bus::BusDevice;
use daxhund::pci::testing::windows;
use daxhund::pci::{Ecam, Segment};
use daxhund::vfio::testing::{Bench, FakeHost};
use daxhund_fuzz_support::input::Input;
use libfuzzer_sys::fuzz_target;

const SLOT: u8 = 3;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let bench = Bench::new(match input.u8() % 3 {
        0 => FakeHost::nvme(),
        1 => FakeHost::e1000e(),
        _ => FakeHost::edu(),
    });
    let segment = Arc::new(Segment::new(windows()));
    let ecam = Ecam::new(Arc::clone(&segment));
    segment
        .insert(SLOT, Arc::clone(&bench.function) as _)
        .expect("there is room at first");
    // While the host refuses, and after that until something else is wanted, the registers say more than it has.
    let mut refused = false;
    let mut gone = false;
    while !input.is_empty() {
        let (deed, what) = {
            let byte = input.u8();
            (byte >> 4, byte & 0x0f)
        };
        let mut read = [0xff; 8];
        let function = u64::from(SLOT) << 15;
        let [low, high] = segment.apertures();
        let aperture = if what & 1 == 0 { low } else { high };
        match deed {
            0..=5 => {
                let register = u64::from(input.u16() % 0x1000);
                ecam.write(function | register, &input.store());
            }
            6 | 7 => {
                let register = u64::from(input.u16() % 0x1000);
                let read = &mut read[..usize::from(what % 8) + 1];
                ecam.read(function | register, read);
                assert!(!gone || read.iter().all(|byte| *byte == 0xff));
            }
            8 | 9 => aperture.write(input.u64(), &input.store()),
            10 | 11 => aperture.read(input.u64(), &mut read),
            // The device interrupts, by a vector that is on.
            12 => {
                let chosen = usize::from(input.u8());
                if let Some((_, vectors)) = bench.host.enabled()
                    && !vectors.is_empty()
                {
                    bench.host.raise(vectors[chosen % vectors.len()]);
                }
            }
            13 => {
                bench.host.refuse_irqs(what & 1 != 0);
                refused = true;
            }
            14 => bench.windows.refuse_map(what & 1 != 0),
            _ if what & 1 == 0 => {
                bench.host.vanish();
                gone = true;
            }
            _ => bench.function.stop().expect("windows can be unmapped"),
        }
        if !refused && !gone && !bench.function.is_stopped() {
            bench.check();
        }
        assert!(
            gone || bench.host.violations().is_empty(),
            "{:?}",
            bench.host.violations()
        );
    }
    bench.function.stop().expect("windows can be unmapped");
    bench.check_stopped();
    assert!(gone || bench.host.enabled().is_none());
    drop(segment.remove(SLOT));
    drop((ecam, segment));
    assert_eq!(Arc::strong_count(&bench.function), 1, "one holder is left");
});
