//! Debian's kernel boots on every kind of memory, and the host maps device-dax with its largest entries.

use super::support::{
    GIB, MIB, boot_on, dax_zone, has_memory, kvm_pages, no_complaints, power_off, ram_ranges,
    spec_on,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::host::figures::MappedPages;
use crate::share::ImageForm;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "boots_on_one_dax_zone_with_2m_entries",
        run: boots_on_one_dax_zone_with_2m_entries,
    },
    GuestTest {
        name: "boots_on_1g_aligned_dax_with_1g_entries",
        run: boots_on_1g_aligned_dax_with_1g_entries,
    },
    GuestTest {
        name: "boots_a_bzimage_on_two_vcpus_with_more_to_come",
        run: boots_a_bzimage_on_two_vcpus_with_more_to_come,
    },
    GuestTest {
        name: "boots_on_two_dax_devices",
        run: boots_on_two_dax_devices,
    },
    GuestTest {
        name: "boots_on_dax_and_anonymous_memory",
        run: boots_on_dax_and_anonymous_memory,
    },
    GuestTest {
        name: "boots_on_a_dax_range_at_an_offset",
        run: boots_on_a_dax_range_at_an_offset,
    },
    GuestTest {
        name: "boots_on_huge_pages_and_shared_memory",
        run: boots_on_huge_pages_and_shared_memory,
    },
    GuestTest {
        name: "boots_on_plain_memory",
        run: boots_on_plain_memory,
    },
    GuestTest {
        name: "three_gib_end_at_the_hole",
        run: three_gib_end_at_the_hole,
    },
    GuestTest {
        name: "four_gib_continue_above_the_hole",
        run: four_gib_continue_above_the_hole,
    },
    GuestTest {
        name: "five_gib_hold_patterns_on_both_sides_of_the_hole",
        run: five_gib_hold_patterns_on_both_sides_of_the_hole,
    },
    GuestTest {
        name: "all_memory_holds_patterns",
        run: all_memory_holds_patterns,
    },
    GuestTest {
        name: "numa_nodes_reach_the_guest",
        run: numa_nodes_reach_the_guest,
    },
];

fn boots_on_one_dax_zone_with_2m_entries(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 0, GIB, 0);
    let mut guest = boot_on(lab, &[&zone])?;
    has_memory(&mut guest, GIB)?;
    no_complaints(&mut guest)?;
    claim(guest.online_cpus()? == 1, || "not one vCPU".to_owned())?;

    // Touch a part of it, so that the entries are there to be counted.
    guest.pattern(Some(256 * MIB))?;
    let pages = kvm_pages(lab, &mut guest)?;
    claim(pages.pages_2m >= 128 && pages.pages_1g == 0, || {
        format!("256 MiB of 2M-aligned device-dax should take 128 entries of 2M: {pages:?}")
    })?;
    claim(pages.pages_4k == 0, || {
        format!("device-dax memory is mapped in 4K pieces: {pages:?}")
    })?;
    let pid = guest.vmm().pid();
    let threads = lab
        .host
        .check(&["sh", "-c", &format!("cat /proc/{pid}/task/*/comm")])?;
    claim(threads.lines().any(|name| name == "vcpu0"), || {
        format!("no thread is called vcpu0: {threads}")
    })?;
    // What the guest sees as its clock is the host's.
    let host: u64 = lab
        .host
        .check(&["date", "+%s"])?
        .trim()
        .parse()
        .unwrap_or(0);
    let clock = guest.rtc()?;
    claim(clock.abs_diff(host) <= 60, || {
        format!("the guest's clock says {clock}, the host's {host}")
    })?;
    power_off(guest)
}

fn boots_on_1g_aligned_dax_with_1g_entries(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 2, 2 * GIB, 0);
    let mut guest = boot_on(lab, &[&zone])?;
    has_memory(&mut guest, 2 * GIB)?;
    guest.pattern(Some(64 * MIB))?;
    let pages = kvm_pages(lab, &mut guest)?;
    let expected = MappedPages {
        pages_4k: 0,
        pages_2m: 0,
        pages_1g: 2,
    };
    // The guest's kernel is in the first GiB, its memory map in the second: both are touched.
    claim(pages == expected, || {
        format!("2 GiB of 1G-aligned device-dax: expected {expected:?}, found {pages:?}")
    })?;
    power_off(guest)
}

fn boots_a_bzimage_on_two_vcpus_with_more_to_come(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 0, GIB, 0);
    let mut spec = spec_on(lab, &[&zone]);
    spec.form = ImageForm::BzImage;
    spec.arguments
        .extend(["--cpus".into(), "boot=2,max=4".into()]);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    no_complaints(&mut guest)?;
    claim(guest.online_cpus()? == 2, || "not two vCPUs".to_owned())?;
    let possible = guest.cat("/sys/devices/system/cpu/possible")?;
    claim(possible.trim() == "0-3", || {
        format!("max=4 should make 0-3 possible, found {possible}")
    })?;
    let cpuinfo = guest.cat("/proc/cpuinfo")?;
    for (field, expected) in [
        ("apicid", ["0", "1"]),
        ("core id", ["0", "1"]),
        ("physical id", ["0", "0"]),
    ] {
        let found: Vec<&str> = cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(name, _)| name.trim() == field)
            .map(|(_, value)| value.trim())
            .collect();
        claim(found == expected, || {
            format!("{field}: expected {expected:?}, found {found:?}")
        })?;
    }
    power_off(guest)
}

fn boots_on_two_dax_devices(lab: &mut Lab) -> Result<(), TestError> {
    let first = dax_zone(lab, "a", 0, GIB, 0);
    let second = dax_zone(lab, "b", 1, GIB, 0) + ",prefault=on";
    let mut guest = boot_on(lab, &[&first, &second])?;
    has_memory(&mut guest, 2 * GIB)?;
    no_complaints(&mut guest)?;
    let pid = guest.vmm().pid();
    let maps = lab.host.read_text(&format!("/proc/{pid}/maps"))?;
    for device in &lab.host.dax()[..2] {
        claim(maps.contains(&device.path), || {
            format!("{} is not mapped", device.path)
        })?;
    }
    power_off(guest)
}

fn boots_on_dax_and_anonymous_memory(lab: &mut Lab) -> Result<(), TestError> {
    let dax = dax_zone(lab, "dax", 0, GIB, 0);
    let mut guest = boot_on(lab, &[&dax, "id=anon,size=256M"])?;
    has_memory(&mut guest, GIB + 256 * MIB)?;
    no_complaints(&mut guest)?;
    let ranges = ram_ranges(&mut guest)?;
    claim(
        ranges
            .last()
            .is_some_and(|(_, last)| *last == GIB + 256 * MIB - 1),
        || format!("the zones should follow each other: {ranges:x?}"),
    )?;
    power_off(guest)
}

fn boots_on_a_dax_range_at_an_offset(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 0, GIB, 1026 * MIB);
    let mut guest = boot_on(lab, &[&zone])?;
    has_memory(&mut guest, GIB)?;
    let pages = kvm_pages(lab, &mut guest)?;
    claim(pages.pages_4k == 0 && pages.pages_2m > 0, || {
        format!("an offset of 513 times 2M should keep 2M entries: {pages:?}")
    })?;
    let pid = guest.vmm().pid();
    let maps = lab.host.read_text(&format!("/proc/{pid}/maps"))?;
    // Offsets in maps are in bytes, as eight hexadecimal digits.
    let line = maps
        .lines()
        .find(|line| line.contains(&lab.host.dax()[0].path));
    claim(line.is_some_and(|line| line.contains(" 40200000 ")), || {
        format!("the device should be mapped from 0x40200000: {line:?}")
    })?;
    power_off(guest)
}

fn boots_on_huge_pages_and_shared_memory(lab: &mut Lab) -> Result<(), TestError> {
    lab.host.set_hugepages(128)?;
    let zones = [
        "id=huge,size=256M,hugepages=on,hugepage_size=2M,prefault=on",
        "id=shared,size=256M,shared=on",
    ];
    let outcome = boot_on(lab, &zones).and_then(|mut guest| {
        has_memory(&mut guest, 512 * MIB)?;
        no_complaints(&mut guest)?;
        let meminfo = lab.host.read_text("/proc/meminfo")?;
        claim(
            meminfo
                .lines()
                .any(|line| line.starts_with("HugePages_Free:") && line.ends_with(" 0")),
            || format!("prefault should take all 128 huge pages: {meminfo}"),
        )?;
        let pages = kvm_pages(lab, &mut guest)?;
        claim(pages.pages_2m > 0, || {
            format!("huge pages should be mapped as such: {pages:?}")
        })?;
        power_off(guest)
    });
    lab.host.set_hugepages(0)?;
    outcome
}

fn boots_on_plain_memory(lab: &mut Lab) -> Result<(), TestError> {
    let spec = crate::guest::GuestSpec::new(&lab.kernel.release, &["--memory", "size=512M"]);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    has_memory(&mut guest, 512 * MIB)?;
    power_off(guest)
}

fn three_gib_end_at_the_hole(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 0, 3 * GIB, 0);
    let mut guest = boot_on(lab, &[&zone])?;
    has_memory(&mut guest, 3 * GIB)?;
    let ranges = ram_ranges(&mut guest)?;
    claim(
        ranges.last().is_some_and(|(_, last)| *last == 3 * GIB - 1),
        || format!("RAM should end at 3 GiB: {ranges:x?}"),
    )?;
    power_off(guest)
}

fn four_gib_continue_above_the_hole(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 0, 4 * GIB, 0);
    let mut guest = boot_on(lab, &[&zone])?;
    has_memory(&mut guest, 4 * GIB)?;
    no_complaints(&mut guest)?;
    let ranges = ram_ranges(&mut guest)?;
    claim(
        ranges.iter().any(|range| range.1 == 3 * GIB - 1)
            && ranges.last() == Some(&(4 * GIB, 5 * GIB - 1)),
        || format!("RAM should be split around the hole from 3 to 4 GiB: {ranges:x?}"),
    )?;
    power_off(guest)
}

fn five_gib_hold_patterns_on_both_sides_of_the_hole(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 0, 5 * GIB, 0);
    let mut spec = spec_on(lab, &[&zone]);
    // Kept from the guest's kernel: 32 MiB on each side of the hole and at the very end.
    let pieces = [3 * GIB - 32 * MIB, 4 * GIB, 6 * GIB - 32 * MIB];
    let reserve: Vec<String> = pieces
        .iter()
        .map(|at| format!("memmap=32M${at:#x}"))
        .collect();
    spec.cmdline = reserve.join(" ");
    let mut guest = Guest::boot(&lab.host, &spec)?;
    for (seed, at) in (1..).zip(pieces) {
        guest.write_physical(at, 32 * MIB, seed)?;
    }
    for (seed, at) in (1..).zip(pieces) {
        let report = guest.read_physical(at, 32 * MIB, seed)?;
        claim(report.wrong_words == 0 && report.words == 4 * MIB, || {
            format!("memory at {at:#x} does not read back as written: {report:?}")
        })?;
    }
    let pages = kvm_pages(lab, &mut guest)?;
    claim(pages.pages_4k == 0, || {
        format!("some memory is mapped in 4K pieces: {pages:?}")
    })?;
    power_off(guest)
}

fn all_memory_holds_patterns(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 1, 384 * MIB, 0);
    let mut guest = boot_on(lab, &[&zone, "id=anon,size=64M"])?;
    let available = guest.meminfo()?.available_bytes;
    let report = guest.pattern(None)?;
    claim(report.wrong_words == 0 && report.passes >= 2, || {
        format!("{report:?}")
    })?;
    claim(report.checked_bytes >= available / 4 * 3, || {
        format!(
            "only {} of {available} bytes were checked",
            report.checked_bytes
        )
    })?;
    power_off(guest)
}

fn numa_nodes_reach_the_guest(lab: &mut Lab) -> Result<(), TestError> {
    let (first, second) = (
        dax_zone(lab, "a", 0, GIB, 0),
        dax_zone(lab, "b", 1, 512 * MIB, 0),
    );
    let mut spec = spec_on(lab, &[&first, &second]);
    let nodes = [
        "--cpus",
        "boot=2",
        "--numa",
        "guest_numa_id=0,cpus=[1],memory_zones=[a],distances=[1@30]",
        "guest_numa_id=1,cpus=[0],memory_zones=[b]",
    ];
    spec.arguments.extend(nodes.map(str::to_owned));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    no_complaints(&mut guest)?;
    let nodes = guest.numa()?;
    let shape: Vec<(u32, &str, &[u32])> = nodes
        .iter()
        .map(|node| (node.node, node.cpus.as_str(), node.distances.as_slice()))
        .collect();
    claim(
        shape == [(0, "1", &[10, 30][..]), (1, "0", &[30, 10][..])],
        || format!("{nodes:?}"),
    )?;
    claim(nodes[0].total_bytes > nodes[1].total_bytes, || {
        format!("{nodes:?}")
    })?;
    power_off(guest)
}
