//! A hostile driver of a network device, and frames that come meanwhile: the device lives.

#![no_main]

mod moves;

use daxhund::virtio::net::{NetDevice, NetSpec};
use libfuzzer_sys::fuzz_target;
use moves::Moves;

fuzz_target!(|data: &[u8]| {
    let (device, wire) = NetDevice::on_sockets(NetSpec {
        id: "fuzz".to_owned(),
        num_queues: 4,
        queue_size: 64,
        ..NetSpec::default()
    });
    Moves::new(data).play(&device, |moves| {
        let end = usize::from(moves.u8()) % wire.ends.len();
        let len = usize::from(moves.u16());
        // One is taken and one is sent; neither waits.
        wire.take(end);
        let frame = vec![0x5a; 12 + len];
        wire.try_send(end, &frame);
    });
});
