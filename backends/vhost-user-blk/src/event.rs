//! What happens to the daemon, told to whoever reads `--event-monitor`: objects of the VMM's form ([`daxhund_monitor`]).

#![forbid(unsafe_code)]

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Frontends can connect.
    Listening {
        /// What the disk is on.
        disk: &'a str,
        /// Its length.
        bytes: &'a str,
    },
    /// One has.
    FrontendConnected,
    /// It is not served any more.
    FrontendGone,
    /// Somebody on the host wants to take the disk's device away, and waits.
    RemovalRequested {
        /// The device.
        device: &'a str,
        /// Who.
        by: &'a str,
    },
    /// It was refused.
    RemovalRefused {
        /// The device.
        device: &'a str,
    },
    /// Nobody waits for the device any more; it is kept.
    RemovalCalledOff,
    /// The disk's memory is gone: requests fail from now on.
    DiskLost {
        /// What it was on.
        disk: &'a str,
        /// Whether it was `given` to the host, or `taken`.
        how: &'a str,
    },
    /// The daemon ends.
    Ending {
        /// An error, or `signal`.
        why: &'a str,
    },
}

impl daxhund_monitor::Event for Event<'_> {
    fn source(&self) -> &'static str {
        "vhost-user-blk"
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Listening { .. } => "listening",
            Self::FrontendConnected => "frontend-connected",
            Self::FrontendGone => "frontend-gone",
            Self::RemovalRequested { .. } => "removal-requested",
            Self::RemovalRefused { .. } => "removal-refused",
            Self::RemovalCalledOff => "removal-called-off",
            Self::DiskLost { .. } => "disk-lost",
            Self::Ending { .. } => "ending",
        }
    }

    fn properties(&self) -> Vec<(&'static str, &str)> {
        match self {
            Self::Listening { disk, bytes } => vec![("disk", disk), ("bytes", bytes)],
            Self::RemovalRequested { device, by } => vec![("device", device), ("by", by)],
            Self::RemovalRefused { device } => vec![("device", device)],
            Self::DiskLost { disk, how } => vec![("disk", disk), ("how", how)],
            Self::Ending { why } => vec![("why", why)],
            Self::FrontendConnected | Self::FrontendGone | Self::RemovalCalledOff => Vec::new(),
        }
    }
}
