//! What tells one kind of vhost-user device from another; all else they have in common.

use crate::virtio::device::Kind;

/// A kind of device.
#[derive(Debug, Clone, Copy)]
pub struct Class {
    /// What it is in messages.
    pub name: &'static str,
    /// What it is to the guest.
    pub kind: Kind,
    /// Features of the device type that a guest is offered where the backend has them.
    pub features: u64,
    /// Length of the configuration space.
    pub config_bytes: u32,
    /// Whether the backend lends the device memory: a shared memory region, which becomes the guest's.
    pub lends: bool,
    /// Puts into it what this side decides.
    pub fit: fn(&mut [u8], Shape),
}

/// What this side decides of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many queues.
    pub queues: u16,
    /// How long each is.
    pub queue_size: u16,
}
