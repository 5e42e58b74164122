//! `vm.regions` for people.

use comfy_table::Table;
use comfy_table::presets::NOTHING;

use crate::config::ByteSize;
use crate::memory::report::{Backing, Holder, Pinned, RegionReport, RegionsReport};

const HEADER: [&str; 10] = [
    "ID", "KIND", "GUEST", "SIZE", "STATE", "BACKING", "PAGE", "NODE", "DMA", "HELD BY",
];

/// One line for each region; what of it is poisoned, and who keeps it, below them.
pub(super) fn of(report: &RegionsReport) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(HEADER);
    for region in &report.regions {
        table.add_row(row(region));
    }
    let mut lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    for region in &report.regions {
        if let Some(by) = &region.held_by {
            lines.push(format!("{} at {:#x} is kept: {by}", region.id, region.gpa));
        }
        for poison in &region.poison {
            lines.push(format!(
                "{} is poisoned at {:#x}, {}",
                region.id,
                poison.gpa,
                size(poison.size)
            ));
        }
    }
    lines.join("\n")
}

fn row(region: &RegionReport) -> [String; 10] {
    let holders: Vec<String> = region.holders.iter().map(holder).collect();
    [
        region.id.clone(),
        region.kind.name().to_owned(),
        format!("{:#x}", region.gpa),
        size(region.size),
        region.state.clone(),
        backing(&region.backing),
        size(region.page_size),
        region
            .host_numa_node
            .map_or_else(|| "-".to_owned(), |node| node.to_string()),
        if region.dma { "on" } else { "off" }.to_owned(),
        if holders.is_empty() {
            "-".to_owned()
        } else {
            holders.join(", ")
        },
    ]
}

fn backing(backing: &Backing) -> String {
    match &backing.path {
        Some(path) => format!("{}+{:#x}", path.display(), backing.offset),
        None => backing.kind.name().to_owned(),
    }
}

/// All regions of one holder have the same size as they do, as a rule: only what is pinned is told.
fn holder(holder: &Holder) -> String {
    let pinned = |space: &str, Pinned { bytes, devices, .. }: &Pinned| {
        format!("{space} {} for {}", size(*bytes), devices.join(" "))
    };
    match holder {
        Holder::Kvm { slots: 1, .. } => "kvm".to_owned(),
        Holder::Kvm { slots, .. } => format!("kvm ({slots} slots)"),
        Holder::VhostUser {
            id,
            connected: true,
            ..
        } => format!("backend of {id}"),
        Holder::VhostUser { id, .. } => format!("backend of {id} (lost)"),
        Holder::Type1(by) => pinned("type1", by),
        Holder::Iommufd(by) => pinned("iommufd", by),
        Holder::Guard { wanted: false } => "guard".to_owned(),
        Holder::Guard { wanted: true } => "guard (wanted)".to_owned(),
    }
}

fn size(bytes: u64) -> String {
    ByteSize::from_bytes(bytes).to_string()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::memory::poison::Poisoned;
    use crate::memory::report::{BackingKind, RegionKind};

    const G: u64 = 1 << 30;

    /// RAM that a device reaches, and memory that somebody keeps.
    pub(in crate::remote) fn two_regions() -> RegionsReport {
        let ram = RegionReport {
            id: "z0".into(),
            kind: RegionKind::Ram,
            gpa: 0,
            size: G,
            state: "present".into(),
            held_by: None,
            backing: Backing {
                kind: BackingKind::DeviceDax,
                path: Some("/dev/dax0.0".into()),
                offset: 2 * G,
                pool: None,
            },
            page_size: 2 << 20,
            host_numa_node: Some(1),
            read_only: false,
            dma: true,
            holders: vec![
                Holder::Kvm { slots: 2, bytes: G },
                Holder::Type1(Pinned {
                    bytes: G,
                    took_us: 1,
                    devices: vec!["0000:01:00.0".into()],
                }),
                Holder::Guard { wanted: false },
            ],
            poison: vec![Poisoned {
                gpa: 2 << 20,
                size: 2 << 20,
                pages: Vec::new(),
            }],
        };
        let pmem = RegionReport {
            id: "p0".into(),
            kind: RegionKind::Pmem,
            gpa: 4 * G,
            state: "stuck".into(),
            held_by: Some("1 worker".into()),
            backing: Backing {
                kind: BackingKind::Memfd,
                path: None,
                offset: 0,
                pool: None,
            },
            host_numa_node: None,
            dma: false,
            holders: Vec::new(),
            poison: Vec::new(),
            ..ram.clone()
        };
        RegionsReport {
            regions: vec![ram, pmem],
        }
    }

    #[test]
    fn each_region_is_a_line_and_what_is_wrong_another() {
        let text = of(&two_regions());
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[0].join(" "), HEADER.join(" "));
        assert_eq!(
            lines[1].join(" "),
            "z0 ram 0x0 1G present /dev/dax0.0+0x80000000 2M 1 on kvm (2 slots), type1 1G for 0000:01:00.0, guard"
        );
        assert_eq!(
            lines[2].join(" "),
            "p0 pmem 0x100000000 1G stuck memfd 2M - off -"
        );
        assert_eq!(lines[3].join(" "), "z0 is poisoned at 0x200000, 2M");
        assert_eq!(lines[4].join(" "), "p0 at 0x100000000 is kept: 1 worker");
        assert_eq!(lines.len(), 5);
    }
}
