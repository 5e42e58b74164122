//! A device of any type that a vhost-user backend serves: this side knows nothing of it but the number of its type.
//!
//! What the backend offers is what the driver is offered, all queues are the backend's, and the configuration space is the backend's:
//! read when it connects, and again after the driver has stored something there, which the backend is told first.

use super::class::{Class, Config};
use crate::virtio::device::Kind;

/// Feature bits that are a device type's own (virtio 1.2, 2.2).
const FEATURES: u64 = 0x00ff_ffff | !0 << 50;

/// A device of this type.
pub fn device(device_type: u16) -> Class {
    Class {
        name: "generic vhost-user",
        example: "for device_type=2, qemu-storage-daemon --export type=vhost-user-blk,...",
        kind: Kind::of(device_type),
        features: FEATURES,
        own_features: 0,
        config: Config::Passed {
            bytes: config_bytes(device_type),
        },
        uncounted: 0,
        always: 0,
        unsaid: u16::MAX,
        more_by: 0,
        in_pairs: false,
        has_control: false,
        lends: false,
    }
}

/// How long the configuration space of a device type is (virtio 1.2, section 5, up to what backends of all ages have). It has to
/// be asked for whole, and a backend that is asked for more than it has says nothing. Zero: it has none, or its length is not known,
/// and the driver reads zeros.
fn config_bytes(device_type: u16) -> u32 {
    match device_type {
        // A network's up to the MTU, a sound device's up to its channel maps.
        1 | 3 | 25 => 12,
        2 => 60,
        5 | 16 | 27 => 16,
        8 => 36,
        // A socket device's context id, a GPIO chip's names and lines.
        19 | 41 => 8,
        18 => 136,
        20 | 24 => 56,
        26 => 40,
        _ => 0,
    }
}
