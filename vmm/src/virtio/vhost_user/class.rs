//! What tells one kind of vhost-user device from another; all else they have in common.

use crate::virtio::device::Kind;

/// A kind of device.
#[derive(Debug, Clone)]
pub struct Class {
    /// What it is in messages.
    pub name: &'static str,
    /// A command line that starts a backend of the kind.
    pub example: &'static str,
    /// What it is to the guest.
    pub kind: Kind,
    /// Features of the device type that a guest is offered where the backend has them.
    pub features: u64,
    /// Features that this side alone sees to: a guest is offered them whatever the backend has, which hears of those only that it
    /// has itself.
    pub own_features: u64,
    /// Its configuration space.
    pub config: Config,
    /// How many of its queues `num_queues=` does not count.
    pub uncounted: u16,
    /// As many queues every backend of the kind has: it is asked only when there are to be more.
    pub always: u16,
    /// Without these features a backend has no more than those, whatever number it says.
    pub more_by: u64,
    /// Whether its queues come in pairs, and the number that a backend says may be one of pairs: DPDK's and passt's is, that of
    /// others is of queues. As many pairs are asked for then, as QEMU does.
    pub in_pairs: bool,
    /// Whether another queue follows the backend's, which is served here: a network's control queue.
    pub has_control: bool,
    /// Whether the backend lends the device memory: a shared memory region, which becomes the guest's.
    pub lends: bool,
}

/// Whose a configuration space is.
#[derive(Debug, Clone)]
pub enum Config {
    /// The backend's, which has to be able to say it (`VHOST_USER_PROTOCOL_F_CONFIG`).
    Backend {
        /// Its length.
        bytes: u32,
        /// Puts into it what this side decides.
        fit: fn(&mut [u8], Shape),
    },
    /// This side's. The backend is not asked.
    Own(Vec<u8>),
}

impl Class {
    /// As many queues a backend has to have that says no number.
    pub(super) fn least(&self) -> u16 {
        self.always.max(1)
    }

    /// How many queues are in use as soon as the driver is ready: of those in pairs, one pair, until it says otherwise.
    pub(super) fn used_at_first(&self) -> u16 {
        if self.in_pairs { 2 } else { u16::MAX }
    }

    /// The configuration space, of what a backend says that it is.
    pub(super) fn config(&self, mut theirs: Vec<u8>, shape: Shape) -> Vec<u8> {
        match &self.config {
            Config::Backend { fit, .. } => {
                fit(&mut theirs, shape);
                theirs
            }
            Config::Own(ours) => ours.clone(),
        }
    }
}

/// What this side decides of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many queues.
    pub queues: u16,
    /// How long each is.
    pub queue_size: u16,
}
