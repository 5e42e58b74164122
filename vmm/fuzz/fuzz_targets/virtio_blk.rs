//! Disk requests of a hostile driver: the device lives, the image keeps its length, and an honest driver has its
//! chains back.

#![no_main]

mod chains;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use chains::Offered;
use daxhund::memory::mapping::memfd;
use daxhund::virtio::Device;
use daxhund::virtio::blk::{Disk, DiskSpec, EngineChoice};
use daxhund::virtio::testing::Driver;
use daxhund_fuzz_support::input::Input;
use libfuzzer_sys::fuzz_target;

const LEN: u64 = 1 << 20;

/// One disk for all runs: an image in memory, moved by system calls on this thread.
fn disk() -> &'static (Disk, File) {
    static DISK: OnceLock<(Disk, File)> = OnceLock::new();
    DISK.get_or_init(|| {
        let image = memfd(LEN, None).expect("a memfd");
        let path = format!("/proc/self/fd/{}", image.as_raw_fd());
        let spec = DiskSpec {
            engine: EngineChoice::Sync,
            ..DiskSpec::new("fuzz", path)
        };
        (Disk::open(&spec).expect("a disk"), image)
    })
}

/// A header of a known type, or a range; the sector mostly on the disk.
fn request(input: &mut Input<'_>) -> Vec<u8> {
    const TYPES: [u32; 8] = [0, 1, 4, 8, 11, 13, 14, 0x8000_0000];
    let kind = TYPES[usize::from(input.u8()) % TYPES.len()];
    let sector = match input.u8() {
        0xff => u64::MAX,
        0xfe => u64::MAX / 512,
        sector => u64::from(sector) * 9,
    };
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    // Discard and write zeroes want a range after it.
    if input.u8() % 2 == 0 {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(u32::from(input.u8()).to_le_bytes());
        bytes.extend(u32::from(input.u8() % 4).to_le_bytes());
    }
    bytes
}

fuzz_target!(|data: &[u8]| {
    let (disk, image) = disk();
    let mut driver = Driver::new(disk);
    let mut input = Input::new(data);
    let features = if input.u8() % 2 == 0 {
        disk.features()
    } else {
        0
    };
    let Ok(mut workers) = disk.workers(driver.activation(features)) else {
        return;
    };
    let Some(worker) = workers.first_mut() else {
        return;
    };
    let mut offered = Offered::default();
    while !input.is_empty() {
        let serve = offered.play(&mut driver, &mut input, request);
        if serve || input.is_empty() {
            // Once, even when there is more: a driver that turns the ring for ever is never done.
            worker.process_queue();
            offered.check(&mut driver);
        }
    }
    assert_eq!(image.metadata().expect("a memfd").len(), LEN);
});
