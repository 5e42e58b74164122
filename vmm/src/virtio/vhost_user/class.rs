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
    /// As many it has to have that says no number.
    pub unsaid: u16,
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
        fit: fn(&mut [u8], &Shape),
    },
    /// This side's. The backend is not asked.
    Own(Vec<u8>),
    /// The backend's as it is, if it can say it. It is told what the driver stores there.
    Passed {
        /// Its length; zero: there is none.
        bytes: u32,
    },
}

impl Class {
    /// How many queues are in use as soon as the driver is ready: of those in pairs, one pair, until it says otherwise.
    pub(super) fn used_at_first(&self) -> u16 {
        if self.in_pairs { 2 } else { u16::MAX }
    }

    /// The configuration space, of what a backend says that it is.
    pub(super) fn config(&self, mut theirs: Vec<u8>, shape: &Shape) -> Vec<u8> {
        match &self.config {
            Config::Backend { fit, .. } => {
                fit(&mut theirs, shape);
                theirs
            }
            Config::Own(ours) => ours.clone(),
            Config::Passed { .. } => theirs,
        }
    }
}

/// What this side decides of a device: how long each of its queues is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape(Vec<u16>);

impl Shape {
    /// Queues of one length.
    pub fn even(queues: u16, size: u16) -> Self {
        Self(vec![size; queues.into()])
    }

    /// One queue for each length: at most 65535.
    pub fn of(sizes: Vec<u16>) -> Self {
        Self(sizes)
    }

    /// The length of each.
    pub fn sizes(&self) -> &[u16] {
        &self.0
    }

    /// How many there are.
    pub fn queues(&self) -> u16 {
        u16::try_from(self.0.len()).unwrap_or(u16::MAX)
    }

    /// How long the shortest is.
    pub fn shortest(&self) -> u16 {
        self.0.iter().copied().min().unwrap_or_default()
    }
}
