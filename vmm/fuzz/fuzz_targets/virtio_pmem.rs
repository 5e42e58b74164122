//! Flush requests of a hostile driver: the device lives, and an honest driver has its chains back.

#![no_main]

mod chains;

use std::io;
use std::sync::Arc;

use chains::Offered;
use daxhund::memory::layout::Gpa;
use daxhund::memory::pmem::Flush;
use daxhund::virtio::pmem::PmemDevice;
use daxhund::virtio::testing::Driver;
use daxhund_fuzz_support::input::Input;
use libfuzzer_sys::fuzz_target;

struct Nothing;

impl Flush for Nothing {
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let device = PmemDevice::new("fuzz", Gpa(4 << 30), 1 << 30, Arc::new(Nothing));
    let mut driver = Driver::new(&device);
    let Ok(mut worker) = device.worker(driver.activation(0)) else {
        return;
    };
    let (mut input, mut offered) = (Input::new(data), Offered::default());
    while !input.is_empty() {
        let serve = offered.play(&mut driver, &mut input, |input| {
            u32::from(input.u8() % 2).to_le_bytes().to_vec()
        });
        if serve || input.is_empty() {
            // Once, even when there is more: a driver that turns the ring for ever is never done.
            worker.process_queue();
            offered.check(&mut driver);
        }
    }
});
