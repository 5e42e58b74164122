//! device-dax: the devices, the regions they come from, and persistent memory that could be one.
//!
//! A host passes when at least one device is usable; a device that is not is then a warning only.

use daxhund_dax::{ByteSize, DeviceFacts, Driver, Host, RegionFacts, RegionKind};

use super::report::{Row, Status};
use super::roots::{Live, Roots};

const HUGE: u64 = 2 << 20;

pub(super) fn check(roots: &Roots, live: &dyn Live) -> Vec<Row> {
    let host = Host::at(&roots.sys, &roots.dev, &roots.proc);
    let listed = host
        .devices()
        .and_then(|devices| Ok((devices, host.regions()?)));
    let (devices, regions) = match listed {
        Ok(found) => found,
        Err(error) => {
            let source = std::error::Error::source(&error).map(|s| format!(": {s}"));
            let found = format!("{error}{}", source.unwrap_or_default());
            let mend = "see `dmesg | grep -i dax`; a sandbox may hide a part of /sys";
            return vec![Row::fail("dax", found, mend)];
        }
    };
    // A dynamic region keeps a device without memory at hand: nothing to mend, and nothing to count.
    let (seeds, with_memory): (Vec<_>, Vec<_>) =
        devices.iter().partition(|facts| facts.size_bytes == 0);
    let verdicts: Vec<_> = with_memory
        .iter()
        .map(|facts| device(&host, live, facts))
        .collect();
    let usable = verdicts.iter().filter(|(_, usable)| *usable).count();
    let mut rows = vec![summary(
        &host,
        verdicts.len(),
        usable,
        seeds.first().copied(),
    )];
    rows.extend(verdicts.into_iter().map(|(row, _)| row));
    rows.extend(
        seeds
            .iter()
            .map(|facts| Row::ok(facts.name.to_string(), "has no memory")),
    );
    rows.extend(regions.iter().map(region));
    rows.extend(namespaces(roots, &devices, usable));
    rows
}

fn summary(host: &Host, devices: usize, usable: usize, seed: Option<&DeviceFacts>) -> Row {
    let plural = |n| if n == 1 { "device" } else { "devices" };
    match (devices, usable) {
        (0, _) if !host.has_dax_bus() => Row::fail(
            "dax",
            "this kernel has no dax bus",
            "`modprobe -a device_dax dax_pmem dax_hmem` (a kernel with CONFIG_DEV_DAX)",
        ),
        (0, _) if let Some(seed) = seed => Row::fail(
            "dax",
            "there is no dax device with memory",
            format!("`daxctl create-device -r {}`", seed.name.region),
        ),
        (0, _) => Row::fail(
            "dax",
            "there is no dax device",
            "persistent memory: `ndctl create-namespace -m devdax -M mem`; without any, the kernel parameter \
             memmap=4G!4G sets ordinary memory aside as such",
        ),
        (_, 0) => Row::fail(
            "dax",
            format!("none of {devices} {} is usable", plural(devices)),
            "mend one of the devices below",
        ),
        (_, _) => Row::ok(
            "dax",
            format!("{usable} of {devices} {} usable", plural(devices)),
        ),
    }
}

/// The device's row, and whether a guest can use it.
fn device(host: &Host, live: &dyn Live, facts: &DeviceFacts) -> (Row, bool) {
    let name = facts.name.to_string();
    let about = describe(facts);
    let node = host.node_path(facts);
    let shown = node.display();
    let refused = |found: String, mend: String| (Row::warn(&name, found, mend), false);
    match &facts.driver {
        Driver::DeviceDax => {}
        Driver::Kmem => {
            return refused(
                format!("{about}: the kernel uses its memory as its own"),
                format!(
                    "`daxctl reconfigure-device -m devdax {name}` (-f takes the memory offline first)"
                ),
            );
        }
        Driver::None => {
            return refused(
                format!("{about}: no driver is bound"),
                format!("`daxctl enable-device {name}`"),
            );
        }
        Driver::Other(driver) => {
            return refused(
                format!("{about}: the driver {driver} can't be mapped"),
                format!("`daxctl disable-device {name}`, then `daxctl enable-device {name}`"),
            );
        }
    }
    if !node.exists() {
        return refused(
            format!("{about}: {shown} does not exist"),
            format!(
                "`mknod {shown} c {} {}`; in a container, pass the device in",
                facts.number.major, facts.number.minor
            ),
        );
    }
    if !live.may_open(&node) {
        return refused(
            format!("{about}: {shown} may not be opened for reading and writing"),
            format!("`chgrp kvm {shown} && chmod g+rw {shown}`, or run as root"),
        );
    }
    (working(host, facts, &about), true)
}

/// A device that can be used; alignment and size can still make it a poor one.
fn working(host: &Host, facts: &DeviceFacts, about: &str) -> Row {
    let name = facts.name.to_string();
    if facts.align_bytes < HUGE {
        let mend = match &facts.namespace {
            Some(namespace) => {
                format!(
                    "`ndctl create-namespace -f -e {namespace} -m devdax -M mem -a 2M` (erases it)"
                )
            }
            None => format!(
                "`daxctl disable-device {name}; echo {HUGE} > /sys/bus/dax/devices/{name}/align; \
                 daxctl enable-device {name}`"
            ),
        };
        return Row::warn(&name, format!("{about}: guests get no huge entries"), mend);
    }
    let tail = facts.size_bytes % facts.align_bytes;
    if tail != 0 {
        return Row::warn(
            &name,
            format!("{about}: the last {} can't be mapped", ByteSize(tail)),
            format!(
                "use size={} or less, or make the device anew with a size that is a multiple of {}",
                ByteSize(facts.size_bytes - tail),
                ByteSize(facts.align_bytes)
            ),
        );
    }
    let users: Vec<_> = host
        .openers(facts)
        .iter()
        .map(|holder| format!("{} ({})", holder.pid, holder.comm))
        .collect();
    let used = match users.as_slice() {
        [] => "no user seen".to_owned(),
        users => format!("open in {}", users.join(", ")),
    };
    Row::ok(&name, format!("{about}; {used}"))
}

fn describe(facts: &DeviceFacts) -> String {
    let mode = if facts.driver == Driver::Kmem {
        "system-ram"
    } else {
        "devdax"
    };
    let node = |node: Option<u32>| node.map_or_else(|| "-".to_owned(), |node| node.to_string());
    format!(
        "{mode}, {}, align {}, driver {}, near node {}, target node {}",
        ByteSize(facts.size_bytes),
        ByteSize(facts.align_bytes),
        facts.driver,
        node(facts.numa_node),
        node(facts.target_node),
    )
}

fn region(region: &RegionFacts) -> Row {
    let provider = region.provider.as_deref().unwrap_or("unknown provider");
    let size = ByteSize(region.size_bytes);
    let found = match region.kind {
        RegionKind::Static => format!("static ({provider}), {size}"),
        RegionKind::Dynamic { available_size: 0 } => {
            format!("dynamic ({provider}), {size}, all taken")
        }
        RegionKind::Dynamic { available_size } => format!(
            "dynamic ({provider}), {size}, {} free for `daxctl create-device -r {}`",
            ByteSize(available_size),
            region.id
        ),
    };
    Row::ok(format!("region{}", region.id), found)
}

/// Persistent memory that is not a dax device. In the way of nothing when there is a usable device.
fn namespaces(roots: &Roots, devices: &[DeviceFacts], usable: usize) -> Vec<Row> {
    const ND: &str = "bus/nd/devices";
    let mut rows = Vec::new();
    for name in roots.sys_names(ND) {
        let attribute = |attribute: &str| roots.sys_text(&format!("{ND}/{name}/{attribute}"));
        let size = attribute("size")
            .and_then(|size| size.parse().ok())
            .unwrap_or(0);
        // A namespace without memory is the kernel's seed for the next one.
        if !name.starts_with("namespace") || size == 0 {
            continue;
        }
        let size = ByteSize(size);
        let (found, mend) = match attribute("mode").as_deref() {
            Some("dax") if devices.iter().any(|d| d.namespace.as_ref() == Some(&name)) => continue,
            Some("dax") => (
                format!("{size} in devdax mode, but no device came of it"),
                format!("`modprobe dax_pmem`, `ndctl enable-namespace {name}`"),
            ),
            // A disabled namespace reports raw, whatever it holds: never advise to erase one unseen.
            Some("raw") if !is_claimed(roots, &format!("{ND}/{name}")) => (
                format!("{size}, disabled, so its mode can't be told"),
                format!("`ndctl enable-namespace {name}`"),
            ),
            mode => (
                format!("{size} in {} mode, not devdax", mode_name(mode)),
                format!("`ndctl create-namespace -f -e {name} -m devdax -M mem` (erases it)"),
            ),
        };
        let status = if usable == 0 {
            Status::Warn
        } else {
            Status::Ok
        };
        rows.push(Row {
            check: name,
            status,
            found,
            mend: (status == Status::Warn).then_some(mend),
        });
    }
    rows
}

/// True when a driver or a device built on top holds the namespace.
fn is_claimed(roots: &Roots, namespace: &str) -> bool {
    let holder = roots.sys_text(&format!("{namespace}/holder"));
    roots.sys(&format!("{namespace}/driver")).exists()
        || holder.is_some_and(|holder| !holder.is_empty())
}

/// sysfs and ndctl name the modes differently.
fn mode_name(sysfs: Option<&str>) -> &str {
    match sysfs {
        Some("memory") => "fsdax",
        Some("safe") => "sector",
        Some(other) => other,
        None => "an unreadable",
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{FakeHost, FakeLive, row};
    use super::*;

    const DEVICE: &str = "bus/dax/devices/dax0.0";

    fn examine(host: &FakeHost) -> Vec<Row> {
        check(host.roots(), &FakeLive::allowing())
    }

    fn mend(row: &Row) -> &str {
        row.mend.as_deref().unwrap_or_default()
    }

    #[test]
    fn a_usable_device_is_described() {
        let rows = examine(&FakeHost::healthy());
        assert_eq!(row(&rows, "dax").found, "1 of 1 device usable");
        let found = &row(&rows, "dax0.0").found;
        let about = "devdax, 2046M, align 2M, driver device_dax, near node 0, target node 1";
        assert!(found.starts_with(about), "{found}");
        assert_eq!(row(&rows, "region0").found, "static (nd), 2046M");
    }

    #[test]
    fn system_ram_alone_fails_and_beside_a_usable_device_warns() {
        let host = FakeHost::healthy();
        host.set_driver("dax0.0", Some("kmem"));
        let rows = examine(&host);
        assert_eq!(row(&rows, "dax").status, Status::Fail);
        let device = row(&rows, "dax0.0");
        assert_eq!(device.status, Status::Warn);
        assert!(device.found.starts_with("system-ram, 2046M"), "{device:?}");
        assert!(mend(device).contains("daxctl reconfigure-device -m devdax dax0.0"));

        host.add_hmem("dax1.0");
        let rows = examine(&host);
        assert_eq!(row(&rows, "dax").status, Status::Ok);
        assert_eq!(row(&rows, "dax").found, "1 of 2 devices usable");
        assert_eq!(row(&rows, "dax0.0").status, Status::Warn);
    }

    #[test]
    fn other_unusable_devices_have_their_own_mend() {
        let host = FakeHost::healthy();
        host.set_driver("dax0.0", None);
        assert_eq!(
            mend(row(&examine(&host), "dax0.0")),
            "`daxctl enable-device dax0.0`"
        );
        host.set_driver("dax0.0", Some("fsdev_dax"));
        assert!(mend(row(&examine(&host), "dax0.0")).contains("disable-device dax0.0"));
        host.set_driver("dax0.0", Some("device_dax"));
        let rows = check(host.roots(), &FakeLive::refusing("dax0.0"));
        assert!(mend(row(&rows, "dax0.0")).contains("chmod g+rw"));
        assert_eq!(row(&rows, "dax").status, Status::Fail);
        host.remove_dev("dax0.0");
        assert!(mend(row(&examine(&host), "dax0.0")).contains("mknod"));
    }

    #[test]
    fn a_device_without_memory_is_not_counted() {
        let host = FakeHost::healthy();
        host.add_hmem("dax1.0");
        host.write_sys("bus/dax/devices/dax1.0/size", "0");
        let rows = examine(&host);
        assert_eq!(row(&rows, "dax").found, "1 of 1 device usable");
        assert_eq!(row(&rows, "dax1.0").status, Status::Ok);
        host.write_sys(&format!("{DEVICE}/size"), "0");
        let rows = examine(&host);
        assert_eq!(row(&rows, "dax").status, Status::Fail);
        assert_eq!(mend(row(&rows, "dax")), "`daxctl create-device -r 0`");
    }

    #[test]
    fn poor_alignment_and_a_tail_warn_but_do_not_fail() {
        let host = FakeHost::healthy();
        host.write_sys(&format!("{DEVICE}/align"), "4096");
        let rows = examine(&host);
        let device = row(&rows, "dax0.0");
        assert_eq!(device.status, Status::Warn);
        assert!(mend(device).contains("ndctl create-namespace -f -e namespace0.0"));
        assert_eq!(row(&rows, "dax").status, Status::Ok);

        host.write_sys(&format!("{DEVICE}/align"), "1073741824");
        let rows = examine(&host);
        let device = row(&rows, "dax0.0");
        assert!(
            device.found.ends_with("the last 1022M can't be mapped"),
            "{device:?}"
        );
        assert!(mend(device).starts_with("use size=1G or less"));
    }

    #[test]
    fn alignment_of_a_dynamic_device_is_mended_with_daxctl() {
        let host = FakeHost::healthy();
        host.add_hmem("dax1.0");
        host.write_sys("bus/dax/devices/dax1.0/align", "4096");
        let rows = examine(&host);
        assert!(
            mend(row(&rows, "dax1.0")).contains("echo 2097152 > /sys/bus/dax/devices/dax1.0/align")
        );
        let region = &row(&rows, "region1").found;
        assert!(
            region.contains("768M free for `daxctl create-device -r 1`"),
            "{region}"
        );
    }

    #[test]
    fn namespaces_are_offered_when_no_device_is_usable() {
        let host = FakeHost::healthy();
        host.add_namespace("namespace1.0", "memory", 4 << 30);
        host.add_namespace("namespace2.0", "raw", 0);
        let rows = examine(&host);
        let namespace = row(&rows, "namespace1.0");
        assert_eq!(namespace.status, Status::Ok);
        assert_eq!(namespace.found, "4G in fsdax mode, not devdax");
        assert!(!rows.iter().any(|row| row.check == "namespace2.0"));
        assert!(!rows.iter().any(|row| row.check == "namespace0.0"));

        host.set_driver("dax0.0", None);
        let rows = examine(&host);
        let namespace = row(&rows, "namespace1.0");
        assert_eq!(namespace.status, Status::Warn);
        assert!(mend(namespace).contains("-e namespace1.0 -m devdax"));
    }

    #[test]
    fn a_disabled_namespace_is_to_be_enabled_not_erased() {
        let host = FakeHost::empty();
        host.add_namespace("namespace1.0", "raw", 4 << 30);
        let disabled = examine(&host);
        assert_eq!(
            mend(row(&disabled, "namespace1.0")),
            "`ndctl enable-namespace namespace1.0`"
        );
        host.write_sys("bus/nd/devices/namespace1.0/driver/uevent", "");
        let raw = examine(&host);
        let namespace = row(&raw, "namespace1.0");
        assert_eq!(namespace.found, "4G in raw mode, not devdax");
        assert!(mend(namespace).ends_with("(erases it)"));
    }

    #[test]
    fn a_devdax_namespace_without_a_device_is_noticed() {
        let host = FakeHost::empty();
        host.add_namespace("namespace3.0", "dax", 4 << 30);
        let rows = examine(&host);
        assert!(mend(row(&rows, "namespace3.0")).contains("modprobe dax_pmem"));
        assert!(row(&rows, "dax").found.contains("no dax bus"));
    }

    #[test]
    fn sysfs_that_makes_no_sense_is_reported() {
        let host = FakeHost::healthy();
        host.write_sys(&format!("{DEVICE}/align"), "x");
        let rows = examine(&host);
        assert_eq!(row(&rows, "dax").status, Status::Fail);
        assert!(row(&rows, "dax").found.contains("align says \"x\""));
    }
}
