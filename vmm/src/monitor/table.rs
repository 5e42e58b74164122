//! All events, for people: the table of the README, which a test compares with it.

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// What it happened to.
    pub source: &'static str,
    /// What happened.
    pub event: &'static str,
    /// Names of all that may be told of it.
    pub properties: &'static [&'static str],
    /// In words.
    pub meaning: &'static str,
}

const fn row(
    (source, event): (&'static str, &'static str),
    properties: &'static [&'static str],
    meaning: &'static str,
) -> Row {
    Row {
        source,
        event,
        properties,
        meaning,
    }
}

/// What of a range of guest memory is always told.
const RANGE: [&str; 3] = ["id", "gpa", "size"];

impl Row {
    /// All there are, as they stand in the README.
    pub const TABLE: &'static [Self] = &[
        row(("vmm", "starting"), &[], "the VMM is there"),
        row(("vmm", "shutdown"), &[], "the VMM ends"),
        row(("vm", "booting"), &[], "the guest is about to be started"),
        row(("vm", "booted"), &[], "it runs"),
        row(("vm", "pausing"), &[], "its vCPUs are about to be held"),
        row(("vm", "paused"), &[], "they are held"),
        row(("vm", "resuming"), &[], "they are about to be let go"),
        row(("vm", "resumed"), &[], "they run"),
        row(("vm", "rebooting"), &[], "the guest is about to start anew"),
        row(("vm", "rebooted"), &[], "it runs again"),
        row(
            ("vm", "resizing"),
            &[],
            "vCPUs, balloon or a disk are about to change",
        ),
        row(("vm", "resized"), &[], "they have changed"),
        row(
            ("vm", "resize-unanswered"),
            &["vcpus"],
            "the guest has not let go of vCPUs in time",
        ),
        row(("vm", "shutdown"), &[], "the guest was taken down"),
        row(("vm", "deleted"), &[], "its definition is gone"),
        row(
            ("vm", "device-removed"),
            &["id", "bdf"],
            "nothing of a device is left, in the guest or on the host",
        ),
        row(
            ("vm", "device-removal-unanswered"),
            &["id"],
            "the guest did not let go in time; it keeps the device",
        ),
        row(
            ("vm", "device-requested"),
            &["id"],
            "the host wants a passed-through device back, or a backend lent memory",
        ),
        row(
            ("vm", "device-cut-off"),
            &["id"],
            "the host has everything of a device; the guest still has its place",
        ),
        row(
            ("vm", "device-error"),
            &["id"],
            "a passed-through device has an error that it can't mend",
        ),
        row(
            ("vm", "drain-requested"),
            &["id"],
            "an operator wants a device or a zone, and waits",
        ),
        row(
            ("vm", "removal-requested"),
            &["device", "by"],
            "somebody on the host wants device-dax memory, and waits",
        ),
        row(("vm", "removal-refused"), &["device"], "it is kept"),
        row(
            ("vm", "removal-granted"),
            &["device"],
            "nothing of it is left here; whoever waited has it",
        ),
        row(
            ("vm", "removal-called-off"),
            &["device"],
            "nobody waits for it any more",
        ),
        row(
            ("vm", "memory-lost"),
            &[RANGE[0], "device", RANGE[1], RANGE[2]],
            "RAM was taken away; the guest ends or is held",
        ),
        row(
            ("vm", "memory-stuck"),
            &[RANGE[0], RANGE[1], RANGE[2], "held_by"],
            "somebody keeps memory that is to go; it is tried again",
        ),
        row(
            ("vm", "memory-free"),
            &RANGE,
            "such memory has gone at last",
        ),
        row(
            ("vm", "memory-poisoned"),
            &[RANGE[0], RANGE[1], RANGE[2], "touched"],
            "memory is poisoned that was not known to be",
        ),
        row(
            ("vm", "backend-lost"),
            &["id", "why"],
            "a vhost-user backend has gone; its device waits",
        ),
        row(
            ("vm", "backend-connected"),
            &["id"],
            "a vhost-user backend serves the device again",
        ),
        row(
            ("vm", "pin-progress"),
            &["done_bytes", "total_bytes", "bytes_per_second", "eta_ms"],
            "pinning memory for devices takes a while",
        ),
    ];
}

#[cfg(test)]
mod tests {
    use daxhund_monitor::Event as _;

    use super::*;
    use crate::monitor::Event;

    /// One of each. A variant that is missing here does not compile in [`place`], and one that is there twice or not at all
    /// does not have its place.
    fn each() -> Vec<Event<'static>> {
        let (id, device, gpa, size) = ("i", "d", "0x0", "1");
        vec![
            Event::VmmStarting,
            Event::VmmShutdown,
            Event::Booting,
            Event::Booted,
            Event::Pausing,
            Event::Paused,
            Event::Resuming,
            Event::Resumed,
            Event::Rebooting,
            Event::Rebooted,
            Event::Resizing,
            Event::Resized,
            Event::ResizeUnanswered { vcpus: "1" },
            Event::Shutdown,
            Event::Deleted,
            Event::DeviceRemoved { id, bdf: "b" },
            Event::DeviceRemovalUnanswered { id },
            Event::DeviceRequested { id },
            Event::DeviceCutOff { id },
            Event::DeviceError { id },
            Event::DrainRequested { id },
            Event::RemovalRequested { device, by: "x" },
            Event::RemovalRefused { device },
            Event::RemovalGranted { device },
            Event::RemovalCalledOff { device },
            Event::MemoryLost {
                id,
                device,
                gpa,
                size,
            },
            Event::MemoryStuck {
                id,
                gpa,
                size,
                held_by: "x",
            },
            Event::MemoryFree { id, gpa, size },
            Event::MemoryPoisoned {
                id,
                gpa,
                size,
                touched: "true",
            },
            Event::BackendLost { id, why: "x" },
            Event::BackendConnected { id },
            Event::PinProgress {
                done_bytes: "1",
                total_bytes: "2",
                bytes_per_second: Some("1"),
                eta_ms: Some("1000"),
            },
        ]
    }

    /// Where it stands in [`each`] and in the table.
    fn place(event: &Event<'_>) -> usize {
        match event {
            Event::VmmStarting => 0,
            Event::VmmShutdown => 1,
            Event::Booting => 2,
            Event::Booted => 3,
            Event::Pausing => 4,
            Event::Paused => 5,
            Event::Resuming => 6,
            Event::Resumed => 7,
            Event::Rebooting => 8,
            Event::Rebooted => 9,
            Event::Resizing => 10,
            Event::Resized => 11,
            Event::ResizeUnanswered { .. } => 12,
            Event::Shutdown => 13,
            Event::Deleted => 14,
            Event::DeviceRemoved { .. } => 15,
            Event::DeviceRemovalUnanswered { .. } => 16,
            Event::DeviceRequested { .. } => 17,
            Event::DeviceCutOff { .. } => 18,
            Event::DeviceError { .. } => 19,
            Event::DrainRequested { .. } => 20,
            Event::RemovalRequested { .. } => 21,
            Event::RemovalRefused { .. } => 22,
            Event::RemovalGranted { .. } => 23,
            Event::RemovalCalledOff { .. } => 24,
            Event::MemoryLost { .. } => 25,
            Event::MemoryStuck { .. } => 26,
            Event::MemoryFree { .. } => 27,
            Event::MemoryPoisoned { .. } => 28,
            Event::BackendLost { .. } => 29,
            Event::BackendConnected { .. } => 30,
            Event::PinProgress { .. } => 31,
        }
    }

    #[test]
    fn each_event_has_its_row_and_the_readme_has_each_row() {
        let events = each();
        assert_eq!(events.len(), Row::TABLE.len());
        for (index, (event, row)) in events.iter().zip(Row::TABLE).enumerate() {
            assert_eq!(place(event), index, "{event:?}");
            assert_eq!((event.source(), event.name()), (row.source, row.event));
            let told = event.properties();
            let told: Vec<&str> = told.iter().map(|(name, _)| *name).collect();
            assert_eq!(told, row.properties, "{event:?}");
        }
        let readme = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"));
        let rows: Vec<&str> = readme
            .lines()
            .skip_while(|line| !line.starts_with("| source | event |"))
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .collect();
        let expected: Vec<String> = Row::TABLE
            .iter()
            .map(|row| {
                let Row {
                    source,
                    event,
                    meaning,
                    ..
                } = row;
                let properties = row.properties.join(", ");
                format!("| {source} | {event} | {properties} | {meaning} |")
            })
            .collect();
        assert_eq!(rows, expected, "the table of events in README.md");
    }
}
