//! What passing PCI devices through takes: an IOMMU, interrupt remapping, VFIO.
//!
//! A guest starts without any of it, so nothing here fails.

use super::report::Row;
use super::roots::{Live, Roots};

pub(super) fn check(roots: &Roots, live: &dyn Live) -> Vec<Row> {
    let mut rows = vec![iommu(roots)];
    rows.extend(interrupt_remapping(roots));
    rows.push(vfio(roots, live));
    rows.extend(bound_devices(roots, live));
    rows
}

fn iommu(roots: &Roots) -> Row {
    let units = roots.sys_names("class/iommu");
    let groups = roots.sys_names("kernel/iommu_groups").len();
    match (units.as_slice(), groups) {
        ([], _) => Row::warn(
            "iommu",
            "no IOMMU: devices can't be passed through",
            "enable VT-d or AMD-Vi in the firmware; on Intel boot with intel_iommu=on",
        ),
        (units, 0) => Row::warn(
            "iommu",
            format!("{}, but no groups: DMA is not translated", units.join(", ")),
            "boot with intel_iommu=on (Intel) or without iommu=off and amd_iommu=off",
        ),
        (units, groups) => Row::ok("iommu", format!("{}; {groups} groups", units.join(", "))),
    }
}

/// x86 names interrupt chips that go through the IOMMU `IR-...`. No row on a host that shows no interrupts at all.
fn interrupt_remapping(roots: &Roots) -> Option<Row> {
    const CHECK: &str = "interrupt-remapping";
    let interrupts = roots.proc_text("interrupts")?;
    let remapped = interrupts
        .split_whitespace()
        .any(|word| word.starts_with("IR-"));
    Some(if remapped {
        Row::ok(CHECK, "on")
    } else {
        Row::warn(
            CHECK,
            "off: VFIO refuses devices whose interrupts can't be confined",
            "enable it with the IOMMU in the firmware, and boot without intremap=off",
        )
    })
}

fn vfio(roots: &Roots, live: &dyn Live) -> Row {
    let driver = roots.sys(DRIVER).exists();
    let (container, iommufd) = (roots.dev("vfio/vfio"), roots.dev("iommu"));
    let mut missing = Vec::new();
    if !driver {
        missing.push("the vfio-pci driver is not loaded".to_owned());
    }
    if !container.exists() && !iommufd.exists() {
        missing.push(format!(
            "neither {} nor {} exists",
            container.display(),
            iommufd.display()
        ));
    }
    if !missing.is_empty() {
        return Row::warn("vfio", missing.join("; "), "`modprobe vfio-pci`");
    }
    let backend = |name: &str, node: &std::path::Path| {
        if !node.exists() {
            format!("no {name}")
        } else if live.may_open(node) {
            name.to_owned()
        } else {
            format!("{name} not permitted")
        }
    };
    let found = format!(
        "vfio-pci, {}, {}",
        backend("type1", &container),
        backend("iommufd", &iommufd)
    );
    if live.may_open(&container) || live.may_open(&iommufd) {
        Row::ok("vfio", found)
    } else {
        let node = if container.exists() {
            container
        } else {
            iommufd
        };
        let mend = format!("`chmod 0666 {}`, or run as root", node.display());
        Row::warn("vfio", found, mend)
    }
}

const DRIVER: &str = "bus/pci/drivers/vfio-pci";

/// One row for each device that waits for a guest.
fn bound_devices(roots: &Roots, live: &dyn Live) -> Vec<Row> {
    let is_function = |name: &String| name.matches(':').count() == 2;
    let functions = roots.sys_names(DRIVER).into_iter().filter(is_function);
    functions
        .map(|function| bound_device(roots, live, function))
        .collect()
}

fn bound_device(roots: &Roots, live: &dyn Live, function: String) -> Row {
    let link = roots.sys(&format!("{DRIVER}/{function}/iommu_group"));
    let group = std::fs::read_link(link).ok();
    let group = group
        .as_deref()
        .and_then(|target| target.file_name())
        .and_then(|name| name.to_str());
    let Some(group) = group else {
        return Row::warn(
            function,
            "bound to vfio-pci without an IOMMU group",
            "enable the IOMMU in the firmware; on Intel boot with intel_iommu=on",
        );
    };
    let node = roots.dev(&format!("vfio/{group}"));
    let found = format!("bound to vfio-pci, group {group}");
    if live.may_open(&node) {
        Row::ok(function, found)
    } else {
        let shown = node.display();
        Row::warn(
            function,
            format!("{found}: {shown} may not be opened"),
            format!("`chgrp kvm {shown} && chmod g+rw {shown}`, or run as root"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::super::testing::{FakeHost, FakeLive, row};
    use super::*;

    #[test]
    fn a_host_without_iommu_warns() {
        let host = FakeHost::healthy();
        host.remove_sys("class/iommu/dmar0");
        let found = iommu(host.roots());
        assert_eq!(found.status, Status::Warn);
        assert!(found.mend.unwrap().contains("intel_iommu=on"));
        host.write_proc("interrupts", " 24:  1  IO-APIC  5-edge  ACPI:Ged");
        assert_eq!(
            interrupt_remapping(host.roots()).unwrap().status,
            Status::Warn
        );
    }

    #[test]
    fn an_iommu_that_is_switched_off_is_told_from_none() {
        let host = FakeHost::healthy();
        host.remove_sys("kernel/iommu_groups");
        let found = iommu(host.roots());
        assert!(found.found.starts_with("dmar0, but no groups"), "{found:?}");
    }

    #[test]
    fn vfio_parts_are_named() {
        let host = FakeHost::healthy();
        let rows = check(host.roots(), &FakeLive::allowing());
        assert_eq!(row(&rows, "vfio").found, "vfio-pci, type1, no iommufd");
        assert_eq!(
            row(&rows, "0000:01:00.0").found,
            "bound to vfio-pci, group 7"
        );

        let refused = check(host.roots(), &FakeLive::refusing("vfio/vfio"));
        let vfio = row(&refused, "vfio");
        assert_eq!(vfio.status, Status::Warn);
        assert!(vfio.mend.as_ref().unwrap().contains("vfio/vfio"));

        host.remove_sys(DRIVER);
        let rows = check(host.roots(), &FakeLive::allowing());
        assert_eq!(
            row(&rows, "vfio").mend.as_deref(),
            Some("`modprobe vfio-pci`")
        );
    }

    #[test]
    fn a_bound_device_that_may_not_be_opened_names_its_group() {
        let host = FakeHost::healthy();
        let rows = check(host.roots(), &FakeLive::refusing("vfio/7"));
        let device = row(&rows, "0000:01:00.0");
        assert_eq!(device.status, Status::Warn);
        assert!(device.mend.as_ref().unwrap().contains("/vfio/7"));
    }
}
