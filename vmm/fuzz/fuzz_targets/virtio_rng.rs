//! A hostile driver of the random number device: the device lives.

#![no_main]

mod moves;

use daxhund::virtio::rng::{RngDevice, RngSpec};
use libfuzzer_sys::fuzz_target;
use moves::Moves;

fuzz_target!(|data: &[u8]| {
    // The same numbers every time, and never an end.
    let spec = RngSpec {
        id: "fuzz".to_owned(),
        src: "/dev/zero".into(),
    };
    let device = RngDevice::open(spec).expect("/dev/zero");
    Moves::new(data).play(&device, |_| {});
});
