//! Compares what there is on the host before and after a test.

use std::time::Duration;

use lab_agent::host_protocol::{Event, Request};

pub use lab_agent::host_protocol::Inventory;

use super::Host;
use super::channel::HostError;
use crate::wait::PATIENCE;

const DEADLINE: Duration = PATIENCE;

pub(super) fn take(host: &Host) -> Result<Inventory, HostError> {
    match host.channel.ask(|id| Request::Inventory { id }, DEADLINE)? {
        Event::Inventory { inventory, .. } => Ok(inventory),
        other => Err(HostError::Unexpected {
            what: "the inventory".to_owned(),
            event: format!("{other:?}"),
        }),
    }
}

/// What has come and gone, one line each; nothing when the host is as it was.
pub fn differences(before: &Inventory, after: &Inventory) -> Vec<String> {
    let mut found = Vec::new();
    for (kind, before, after) in [
        ("process", &before.processes, &after.processes),
        ("dax device", &before.dax_devices, &after.dax_devices),
        ("pci device", &before.pci_devices, &after.pci_devices),
        ("mount", &before.mounts, &after.mounts),
        ("lock", &before.locks, &after.locks),
        ("file", &before.files, &after.files),
        ("huge pages", &before.huge_pages, &after.huge_pages),
    ] {
        found.extend(
            before
                .iter()
                .filter(|item| !after.contains(item))
                .map(|item| format!("gone: {kind} {item}")),
        );
        found.extend(
            after
                .iter()
                .filter(|item| !before.contains(item))
                .map(|item| format!("new: {kind} {item}")),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_test_leaves_behind_is_named() {
        let before = Inventory {
            mounts: vec!["a".into(), "b".into()],
            ..Inventory::default()
        };
        let after = Inventory {
            mounts: vec!["b".into()],
            processes: vec!["77 daxhund".into()],
            ..Inventory::default()
        };
        assert_eq!(
            differences(&before, &after),
            ["new: process 77 daxhund", "gone: mount a"]
        );
        assert!(differences(&before, &before).is_empty());
    }
}
