use daxhund_pin::{DmaFacts, SpaceFacts, SpaceKind};

use super::*;
use crate::memory::poison::Poisoned;
use crate::memory::report::{Backing, BackingKind, Holder, Pinned, RegionKind, RegionReport};

const M: u64 = 1 << 20;

fn region() -> RegionReport {
    RegionReport {
        id: "z\"0".into(),
        kind: RegionKind::Ram,
        gpa: 4 * M,
        size: 8 * M,
        state: "present".into(),
        held_by: None,
        backing: Backing {
            kind: BackingKind::DeviceDax,
            path: Some("/dev/dax0.0".into()),
            offset: 0,
            pool: None,
        },
        page_size: 2 * M,
        host_numa_node: None,
        read_only: false,
        dma: true,
        holders: vec![Holder::Iommufd(Pinned {
            bytes: 8 * M,
            took_us: 1_500_000,
            devices: Vec::new(),
        })],
        poison: vec![Poisoned {
            gpa: 4 * M,
            size: 2 * M,
            pages: Vec::new(),
        }],
    }
}

/// Samples are there, each whole, and nothing but samples, words and the end.
fn has(text: &str, samples: &[&str]) {
    for sample in samples {
        let found = text.lines().any(|line| line == *sample);
        assert!(found, "{sample} is not in:\n{text}");
    }
    assert!(text.ends_with("\n# EOF\n"), "{text}");
    let mut families: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .collect();
    let count = families.len();
    families.sort_unstable();
    families.dedup();
    assert_eq!(count, families.len(), "each family stands once");
}

#[test]
fn before_there_is_a_vm_that_is_said() {
    let text = Metrics::default().text();
    has(
        &text,
        &[
            "daxhund_vm_state{state=\"NoVm\"} 1",
            "daxhund_vm_state{state=\"Running\"} 0",
            "daxhund_memory_actual_bytes 0",
            "daxhund_removals_total{outcome=\"lost\"} 0",
            "daxhund_removal_guard 0",
            "daxhund_pins_total 0",
        ],
    );
    assert!(!text.contains("daxhund_region_bytes"), "{text}");
    let version = env!("CARGO_PKG_VERSION");
    has(
        &text,
        &[&format!("daxhund_build_info{{version=\"{version}\"}} 1")],
    );
}

#[test]
fn what_the_owner_tells_is_told() {
    let metrics = Metrics::default();
    metrics.publish(View {
        state: VmPhase::Paused,
        memory_actual_bytes: 8 * M,
        regions: vec![region()],
        devices: vec![
            ("d0".into(), vec![("requests", 3), ("read_bytes", 4096)]),
            ("d1".into(), vec![("requests", 5)]),
        ],
        backends: vec![("d1".into(), false)],
        dma: Some(SpaceFacts {
            kind: SpaceKind::Iommufd,
            dma: DmaFacts {
                ranges: 1,
                pinned_bytes: 8 * M,
                charged_bytes: 4096,
            },
            devices: Vec::new(),
        }),
        removals: Outcomes {
            held: 3,
            let_through: 1,
            refused: 2,
            ..Outcomes::default()
        },
        has_guard: true,
        ..View::default()
    });
    let place = "id=\"z\\\"0\",gpa=\"0x400000\"";
    let of_region = |name: &str, more: &str, value: &str| {
        format!("daxhund_region_{name}{{{place}{more}}} {value}")
    };
    let size = of_region(
        "bytes",
        ",kind=\"ram\",state=\"present\",backing=\"device-dax\",page_size=\"2097152\"",
        "8388608",
    );
    let text = metrics.text();
    has(
        &text,
        &[
            "daxhund_vm_state{state=\"Paused\"} 1",
            &size,
            &of_region("poisoned_bytes", "", "2097152"),
            &of_region("pinned_bytes", "", "8388608"),
            &of_region("pin_seconds", "", "1.5"),
            "daxhund_pinned_bytes{space=\"iommufd\"} 8388608",
            "daxhund_pin_charged_bytes{space=\"iommufd\"} 4096",
            "daxhund_device_requests_total{id=\"d0\"} 3",
            "daxhund_device_requests_total{id=\"d1\"} 5",
            "daxhund_device_read_bytes_total{id=\"d0\"} 4096",
            "daxhund_backend_connected{id=\"d1\"} 0",
            "daxhund_removals_total{outcome=\"refused\"} 2",
            "daxhund_removal_guard 1",
            "# TYPE daxhund_device_requests counter",
        ],
    );
}

#[test]
fn what_moves_while_the_owner_is_busy_is_told_all_the_same() {
    let metrics = Metrics::default();
    metrics.publish(View {
        state: VmPhase::Created,
        regions: vec![region()],
        ..View::default()
    });
    metrics.booting();
    let exits = metrics.exits_of(1);
    assert!(Arc::ptr_eq(&exits, &metrics.exits_of(1)), "over resets");
    metrics.pinning(M, 4 * M);
    let text = metrics.text();
    has(
        &text,
        &[
            "daxhund_vm_state{state=\"Booting\"} 1",
            "daxhund_vcpu_exits_total{vcpu=\"0\",reason=\"mmio_read\"} 0",
            "daxhund_vcpu_exits_total{vcpu=\"1\",reason=\"other\"} 0",
            "daxhund_pinning_done_bytes 1048576",
            "daxhund_pinning_total_bytes 4194304",
        ],
    );
    assert!(text.contains("daxhund_region_bytes{"), "what was so, is");
    metrics.pinned(Duration::from_millis(2500));
    has(
        &metrics.text(),
        &[
            "daxhund_pins_total 1",
            "daxhund_pin_seconds_total 2.5",
            "daxhund_pinning_total_bytes 0",
        ],
    );
}
