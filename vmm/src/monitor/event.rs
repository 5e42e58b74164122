//! The events there are.

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The VMM is there.
    VmmStarting,
    /// The VMM ends.
    VmmShutdown,
    /// The guest is about to be built and started.
    Booting,
    /// It runs.
    Booted,
    /// It has been taken down.
    Shutdown,
    /// It is about to be taken down and started again.
    Rebooting,
    /// It runs again.
    Rebooted,
    /// Its vCPUs are about to be held.
    Pausing,
    /// They are held.
    Paused,
    /// They are about to be let go.
    Resuming,
    /// They run.
    Resumed,
    /// Its resources are about to change.
    Resizing,
    /// They have changed.
    Resized,
    /// The guest was asked to let go of vCPUs and did not in time; it still has them.
    ResizeUnanswered {
        /// How many it has.
        vcpus: &'a str,
    },
    /// Its definition is gone.
    Deleted,
    /// A device is gone from the guest and from the host's side.
    DeviceRemoved {
        /// The device's name.
        id: &'a str,
        /// Where it sat.
        bdf: &'a str,
    },
    /// The guest was asked to let go of a device and did not answer in time; it still has it.
    DeviceRemovalUnanswered {
        /// The device's name.
        id: &'a str,
    },
    /// The guest did not let go in time of what the host wanted back, or it was gone already: nothing of the host is behind
    /// the device any more.
    DeviceCutOff {
        /// The device's name.
        id: &'a str,
    },
    /// RAM was taken away by the host; the guest ends, or is held for good.
    MemoryLost {
        /// The zone.
        id: &'a str,
        /// The host's device.
        device: &'a str,
        /// First guest-physical address of the range.
        gpa: &'a str,
        /// Its bytes.
        size: &'a str,
    },
    /// Memory that is to go back to the host does not: somebody keeps it. It is tried again.
    MemoryStuck {
        /// The zone, or the device that brought it.
        id: &'a str,
        /// First guest-physical address of the range.
        gpa: &'a str,
        /// Its bytes.
        size: &'a str,
        /// Who.
        held_by: &'a str,
    },
    /// Memory that was stuck has gone back to the host.
    MemoryFree {
        /// The zone, or the device that brought it.
        id: &'a str,
        /// First guest-physical address of the range.
        gpa: &'a str,
        /// Its bytes.
        size: &'a str,
    },
    /// Guest memory is poisoned, and was not known to be. The guest lives on.
    MemoryPoisoned {
        /// The zone or the device.
        id: &'a str,
        /// First guest-physical address of the range.
        gpa: &'a str,
        /// Its bytes.
        size: &'a str,
        /// Whether somebody has touched it: `true` or `false`.
        touched: &'a str,
    },
    /// Somebody on the host wants to take device-dax memory away, and waits.
    RemovalRequested {
        /// The host's device.
        device: &'a str,
        /// Who.
        by: &'a str,
    },
    /// It was refused.
    RemovalRefused {
        /// The host's device.
        device: &'a str,
    },
    /// Nothing of the device is left here: whoever waited has it.
    RemovalGranted {
        /// The host's device.
        device: &'a str,
    },
    /// Nobody waits for the device any more; it is kept.
    RemovalCalledOff {
        /// The host's device.
        device: &'a str,
    },
    /// An operator wants a device, or a memory zone, and waits.
    DrainRequested {
        /// The device's or the zone's name.
        id: &'a str,
    },
    /// The host wants a passed-through device back, or a backend the memory that it has lent.
    DeviceRequested {
        /// The device's name.
        id: &'a str,
    },
    /// A passed-through device reports an error that it can't mend.
    DeviceError {
        /// The device's name.
        id: &'a str,
    },
    /// The vhost-user backend of a device has gone, or was cut off; the device waits for another one.
    BackendLost {
        /// The device's name.
        id: &'a str,
        /// What was noticed.
        why: &'a str,
    },
    /// A vhost-user backend serves the device again.
    BackendConnected {
        /// The device's name.
        id: &'a str,
    },
    /// Memory is being pinned for devices, and it takes a while.
    PinProgress {
        /// Bytes that are pinned.
        done_bytes: &'a str,
        /// Bytes that are to be.
        total_bytes: &'a str,
        /// How fast it was so far.
        bytes_per_second: Option<&'a str>,
        /// How long the rest takes at that rate.
        eta_ms: Option<&'a str>,
    },
}

impl daxhund_monitor::Event for Event<'_> {
    fn source(&self) -> &'static str {
        match self {
            Self::VmmStarting | Self::VmmShutdown => "vmm",
            _ => "vm",
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::VmmStarting => "starting",
            Self::VmmShutdown | Self::Shutdown => "shutdown",
            Self::Booting => "booting",
            Self::Booted => "booted",
            Self::Rebooting => "rebooting",
            Self::Rebooted => "rebooted",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Resumed => "resumed",
            Self::Resizing => "resizing",
            Self::Resized => "resized",
            Self::ResizeUnanswered { .. } => "resize-unanswered",
            Self::Deleted => "deleted",
            Self::DeviceRemoved { .. } => "device-removed",
            Self::DeviceRemovalUnanswered { .. } => "device-removal-unanswered",
            Self::DeviceCutOff { .. } => "device-cut-off",
            Self::MemoryLost { .. } => "memory-lost",
            Self::MemoryStuck { .. } => "memory-stuck",
            Self::MemoryFree { .. } => "memory-free",
            Self::MemoryPoisoned { .. } => "memory-poisoned",
            Self::RemovalRequested { .. } => "removal-requested",
            Self::RemovalRefused { .. } => "removal-refused",
            Self::RemovalGranted { .. } => "removal-granted",
            Self::RemovalCalledOff { .. } => "removal-called-off",
            Self::DrainRequested { .. } => "drain-requested",
            Self::DeviceRequested { .. } => "device-requested",
            Self::DeviceError { .. } => "device-error",
            Self::BackendLost { .. } => "backend-lost",
            Self::BackendConnected { .. } => "backend-connected",
            Self::PinProgress { .. } => "pin-progress",
        }
    }

    fn properties(&self) -> Vec<(&'static str, &str)> {
        match self {
            Self::PinProgress {
                done_bytes,
                total_bytes,
                bytes_per_second,
                eta_ms,
            } => {
                let known = [
                    ("done_bytes", Some(*done_bytes)),
                    ("total_bytes", Some(*total_bytes)),
                    ("bytes_per_second", *bytes_per_second),
                    ("eta_ms", *eta_ms),
                ];
                let known = known.into_iter();
                known
                    .filter_map(|(name, text)| Some((name, text?)))
                    .collect()
            }
            Self::MemoryLost {
                id,
                device,
                gpa,
                size,
            } => vec![("id", id), ("device", device), ("gpa", gpa), ("size", size)],
            Self::MemoryStuck {
                id,
                gpa,
                size,
                held_by,
            } => vec![
                ("id", id),
                ("gpa", gpa),
                ("size", size),
                ("held_by", held_by),
            ],
            Self::MemoryFree { id, gpa, size } => {
                vec![("id", id), ("gpa", gpa), ("size", size)]
            }
            Self::MemoryPoisoned {
                id,
                gpa,
                size,
                touched,
            } => vec![
                ("id", id),
                ("gpa", gpa),
                ("size", size),
                ("touched", touched),
            ],
            Self::RemovalRequested { device, by } => vec![("device", device), ("by", by)],
            Self::RemovalRefused { device }
            | Self::RemovalGranted { device }
            | Self::RemovalCalledOff { device } => vec![("device", device)],
            Self::DeviceRemoved { id, bdf } => vec![("id", id), ("bdf", bdf)],
            Self::ResizeUnanswered { vcpus } => vec![("vcpus", vcpus)],
            Self::BackendLost { id, why } => vec![("id", id), ("why", why)],
            Self::DeviceRemovalUnanswered { id }
            | Self::DeviceCutOff { id }
            | Self::DeviceRequested { id }
            | Self::DeviceError { id }
            | Self::DrainRequested { id }
            | Self::BackendConnected { id } => vec![("id", id)],
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use daxhund_monitor::Event as _;

    use super::*;

    #[test]
    fn an_event_says_what_happened_to_whom() {
        let removed = Event::DeviceRemoved {
            id: "d0",
            bdf: "0000:00:05.0",
        };
        assert_eq!((removed.source(), removed.name()), ("vm", "device-removed"));
        let expected = [("id", "d0"), ("bdf", "0000:00:05.0")];
        assert_eq!(removed.properties(), expected);
        let starting = Event::VmmStarting;
        assert_eq!((starting.source(), starting.name()), ("vmm", "starting"));
        assert!(starting.properties().is_empty());
    }
}
