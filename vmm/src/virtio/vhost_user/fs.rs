//! A directory of the host that a vhost-user backend serves as a file system (virtio 1.2, 5.11): what is its own.

use super::class::{Class, Config, Shape};
use crate::virtio::device::Kind;

/// How the guest names it when it mounts it.
pub const TAG_BYTES: usize = 36;

/// The queue for what must not wait behind requests.
pub const HIGH_PRIORITY_QUEUES: u16 = 1;

/// A file system of this name, whose `shape` has all queues. No memory is shared but the guest's own: its page cache is in its
/// memory, and there is no window to the host's.
///
/// The configuration space is the tag, padded with zeros, and the number of request queues. `virtiofsd` has none that could be asked
/// for.
pub fn file_system(tag: &[u8; TAG_BYTES], shape: &Shape) -> Class {
    let requests = u32::from(shape.queues() - HIGH_PRIORITY_QUEUES);
    Class {
        name: "vhost-user file system",
        example: "virtiofsd --socket-path=... --shared-dir=...",
        kind: Kind::FileSystem,
        features: 0,
        own_features: 0,
        config: Config::Own([&tag[..], &requests.to_le_bytes()].concat()),
        uncounted: HIGH_PRIORITY_QUEUES,
        always: HIGH_PRIORITY_QUEUES + 1,
        unsaid: HIGH_PRIORITY_QUEUES + 1,
        more_by: 0,
        in_pairs: false,
        has_control: false,
        lends: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_space_is_a_tag_and_a_number_of_queues() {
        let mut tag = [0; TAG_BYTES];
        tag[..3].copy_from_slice(b"lab");
        let shape = Shape::even(4, 1024);
        let config = file_system(&tag, &shape).config(Vec::new(), &shape);
        assert_eq!(config[..4], *b"lab\0");
        assert_eq!(config[36..], [3, 0, 0, 0]);
    }
}
