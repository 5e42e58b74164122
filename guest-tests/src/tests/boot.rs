//! Guests come up on every kind of memory, see what they were given, and the host maps it by entries as large as it can.

use std::fmt::Debug;

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

const HOLE: u64 = 3 * GIB;
const ABOVE_HOLE: u64 = 4 * GIB;
/// Small entries that are no RAM of the guest's: the interrupt controller's page, the task state of real mode.
const FEW_SMALL_PAGES: u64 = 16;

fn expect<T: PartialEq + Debug>(what: &str, found: &T, expected: &T) -> Result<(), TestError> {
    claim(found == expected, || {
        format!("{what}: expected {expected:?}, found {found:?}")
    })
}

/// RAM is mapped by large entries only.
fn no_small_entries(pages: MappedPages) -> Result<(), TestError> {
    claim(pages.pages_4k <= FEW_SMALL_PAGES, || {
        format!("some memory is mapped in 4K pieces: {pages:?}")
    })
}

/// Fills and reads back some of the guest's memory.
fn holds_patterns(guest: &mut Guest, bytes: Option<u64>) -> Result<(), TestError> {
    let report = guest.pattern(bytes)?;
    claim(report.wrong_words == 0 && report.passes > 0, || {
        format!("memory does not read back as written: {report:?}")
    })
}

/// What the VMM has mapped.
fn maps(lab: &Lab, guest: &mut Guest) -> Result<String, TestError> {
    Ok(lab
        .host
        .read_text(&format!("/proc/{}/maps", guest.vmm().pid()))?)
}

fn boots_on_one_dax_zone_with_2m_entries(lab: &mut Lab) -> Result<(), TestError> {
    let mut guest = boot_on(lab, &[&dax_zone(lab, "z0", 0, GIB, 0)])?;
    has_memory(&mut guest, GIB)?;
    no_complaints(&mut guest)?;
    expect("online processors", &guest.online_cpus()?, &1)?;
    holds_patterns(&mut guest, Some(512 * MIB))?;
    let pages = kvm_pages(lab, &mut guest)?;
    claim(pages.pages_2m >= 256, || {
        format!("512 MiB of 2M-aligned device-dax should take 256 entries of 2M: {pages:?}")
    })?;
    no_small_entries(pages)?;
    let command = format!("cat /proc/{}/task/*/comm", guest.vmm().pid());
    let threads = lab.host.check(&["sh", "-c", &command])?;
    claim(threads.lines().any(|name| name == "vcpu0"), || {
        format!("no thread is called vcpu0: {threads}")
    })?;
    let on_host = lab.host.check(&["date", "+%s"])?;
    let in_guest = guest.rtc()?;
    let apart = on_host
        .trim()
        .parse::<u64>()
        .map(|host| host.abs_diff(in_guest));
    claim(apart.is_ok_and(|seconds| seconds <= 60), || {
        format!("the guest's clock says {in_guest}, the host's {on_host}")
    })?;
    power_off(guest)
}

fn boots_on_1g_aligned_dax_with_1g_entries(lab: &mut Lab) -> Result<(), TestError> {
    let mut guest = boot_on(lab, &[&dax_zone(lab, "z0", 2, 2 * GIB, 0)])?;
    has_memory(&mut guest, 2 * GIB)?;
    holds_patterns(&mut guest, Some(64 * MIB))?;
    let pages = kvm_pages(lab, &mut guest)?;
    // The kernel has touched both ends of its RAM by now.
    expect(
        "2 GiB of 1G-aligned device-dax: entries of 1G",
        &pages.pages_1g,
        &2,
    )?;
    expect(
        "2 GiB of 1G-aligned device-dax: entries of 2M",
        &pages.pages_2m,
        &0,
    )?;
    no_small_entries(pages)?;
    power_off(guest)
}

fn boots_a_bzimage_on_two_vcpus_with_more_to_come(lab: &mut Lab) -> Result<(), TestError> {
    let mut spec = spec_on(lab, &[&dax_zone(lab, "z0", 0, GIB, 0)]);
    spec.arguments
        .extend(["--cpus".to_owned(), "boot=2,max=4".to_owned()]);
    spec.form = ImageForm::BzImage;
    let mut guest = Guest::boot(&lab.host, &spec)?;
    no_complaints(&mut guest)?;
    expect("online processors", &guest.online_cpus()?, &2)?;
    let possible = guest.cat("/sys/devices/system/cpu/possible")?;
    claim(possible.trim() == "0-3", || {
        format!("max=4 should make 0-3 possible, found {possible}")
    })?;
    let cpuinfo = guest.cat("/proc/cpuinfo")?;
    let values = |name: &str| -> Vec<String> {
        let fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        let named = fields.filter(|(field, _)| field.trim() == name);
        named.map(|(_, value)| value.trim().to_owned()).collect()
    };
    // Two cores of one package.
    for (name, expected) in [
        ("apicid", ["0", "1"]),
        ("core id", ["0", "1"]),
        ("physical id", ["0", "0"]),
    ] {
        expect(name, &values(name), &expected.map(str::to_owned).to_vec())?;
    }
    power_off(guest)
}

fn boots_on_two_dax_devices(lab: &mut Lab) -> Result<(), TestError> {
    let zones = [dax_zone(lab, "a", 0, GIB, 0), dax_zone(lab, "b", 1, GIB, 0)];
    let mut guest = boot_on(lab, &[&zones[0], &zones[1]])?;
    has_memory(&mut guest, 2 * GIB)?;
    no_complaints(&mut guest)?;
    let maps = maps(lab, &mut guest)?;
    for device in &lab.host.dax()[..2] {
        claim(maps.contains(&device.path), || {
            format!("{} is not mapped\n{maps}", device.path)
        })?;
    }
    power_off(guest)
}

fn boots_on_dax_and_anonymous_memory(lab: &mut Lab) -> Result<(), TestError> {
    let zones = [
        dax_zone(lab, "dax", 0, GIB, 0),
        "id=anon,size=256M".to_owned(),
    ];
    let mut guest = boot_on(lab, &[&zones[0], &zones[1]])?;
    has_memory(&mut guest, GIB + 256 * MIB)?;
    no_complaints(&mut guest)?;
    let ranges = ram_ranges(&mut guest)?;
    let end = GIB + 256 * MIB - 1;
    claim(
        ranges
            .last()
            .is_some_and(|(first, last)| *first < GIB && *last == end),
        || format!("the zones should follow each other: {ranges:x?}"),
    )?;
    power_off(guest)
}

fn boots_on_a_dax_range_at_an_offset(lab: &mut Lab) -> Result<(), TestError> {
    // A multiple of 2M, and of nothing larger.
    const OFFSET: u64 = GIB + 2 * MIB;
    let mut guest = boot_on(lab, &[&dax_zone(lab, "z0", 0, GIB, OFFSET)])?;
    has_memory(&mut guest, GIB)?;
    let pages = kvm_pages(lab, &mut guest)?;
    claim(
        pages.pages_2m > 0 && pages.pages_4k <= FEW_SMALL_PAGES,
        || format!("an offset of 513 times 2M should keep 2M entries: {pages:?}"),
    )?;
    let maps = maps(lab, &mut guest)?;
    let path = &lab.host.dax()[0].path;
    let mapped = maps.lines().find(|line| line.ends_with(path.as_str()));
    claim(
        mapped.is_some_and(|line| line.contains(&format!(" {OFFSET:08x} "))),
        || format!("the device should be mapped from {OFFSET:#x}: {maps}"),
    )?;
    power_off(guest)
}

fn boots_on_huge_pages_and_shared_memory(lab: &mut Lab) -> Result<(), TestError> {
    lab.host.set_hugepages(128)?;
    let outcome = boots_with_128_huge_pages(lab);
    lab.host.set_hugepages(0)?;
    outcome
}

fn boots_with_128_huge_pages(lab: &Lab) -> Result<(), TestError> {
    let zones = [
        "id=huge,size=256M,hugepages=on,hugepage_size=2M,prefault=on",
        "id=shared,size=256M,shared=on",
    ];
    let mut guest = boot_on(lab, &zones)?;
    has_memory(&mut guest, 512 * MIB)?;
    no_complaints(&mut guest)?;
    let meminfo = lab.host.read_text("/proc/meminfo")?;
    let free = meminfo
        .lines()
        .find(|line| line.starts_with("HugePages_Free:"));
    claim(
        free.is_some_and(|line| line.split_whitespace().nth(1) == Some("0")),
        || format!("prefault should take all 128 huge pages: {free:?}"),
    )?;
    let pages = kvm_pages(lab, &mut guest)?;
    claim(pages.pages_2m > 0, || {
        format!("huge pages should be mapped as such: {pages:?}")
    })?;
    power_off(guest)
}

fn boots_on_plain_memory(lab: &mut Lab) -> Result<(), TestError> {
    let mut spec = spec_on(lab, &[]);
    spec.arguments = vec!["--memory".to_owned(), "size=512M".to_owned()];
    let mut guest = Guest::boot(&lab.host, &spec)?;
    has_memory(&mut guest, 512 * MIB)?;
    power_off(guest)
}

fn three_gib_end_at_the_hole(lab: &mut Lab) -> Result<(), TestError> {
    let mut guest = boot_on(lab, &[&dax_zone(lab, "z0", 0, 3 * GIB, 0)])?;
    has_memory(&mut guest, 3 * GIB)?;
    let ranges = ram_ranges(&mut guest)?;
    claim(
        ranges.last().is_some_and(|(_, last)| *last == HOLE - 1),
        || format!("RAM should end at 3 GiB: {ranges:x?}"),
    )?;
    power_off(guest)
}

fn four_gib_continue_above_the_hole(lab: &mut Lab) -> Result<(), TestError> {
    let mut guest = boot_on(lab, &[&dax_zone(lab, "z0", 0, 4 * GIB, 0)])?;
    has_memory(&mut guest, 4 * GIB)?;
    no_complaints(&mut guest)?;
    let ranges = ram_ranges(&mut guest)?;
    let below = ranges.iter().any(|(_, last)| *last == HOLE - 1);
    let above = ranges.last() == Some(&(ABOVE_HOLE, ABOVE_HOLE + GIB - 1));
    claim(below && above, || {
        format!("RAM should be split around the hole from 3 to 4 GiB: {ranges:x?}")
    })?;
    power_off(guest)
}

fn five_gib_hold_patterns_on_both_sides_of_the_hole(lab: &mut Lab) -> Result<(), TestError> {
    const BYTES: u64 = 32 * MIB;
    // The last memory below the hole, the first above it, and some further up.
    let places = [HOLE - BYTES, ABOVE_HOLE, ABOVE_HOLE + GIB - BYTES];
    let mut spec = spec_on(lab, &[&dax_zone(lab, "z0", 0, 5 * GIB, 0)]);
    let reserved = places.map(|address| format!("memmap=32M${address:#x}"));
    spec.cmdline = reserved.join(" ");
    let mut guest = Guest::boot(&lab.host, &spec)?;
    // All are written before any is read: memory that appears twice would hold the later pattern.
    for address in places {
        guest.write_physical(address, BYTES, address)?;
    }
    for address in places {
        let report = guest.read_physical(address, BYTES, address)?;
        claim(report.wrong_words == 0 && report.words == BYTES / 8, || {
            format!("memory at {address:#x} does not read back as written: {report:?}")
        })?;
    }
    no_small_entries(kvm_pages(lab, &mut guest)?)?;
    power_off(guest)
}

fn all_memory_holds_patterns(lab: &mut Lab) -> Result<(), TestError> {
    let zones = [
        dax_zone(lab, "z0", 0, 384 * MIB, 0),
        "id=anon,size=64M".to_owned(),
    ];
    let mut guest = boot_on(lab, &[&zones[0], &zones[1]])?;
    let free = guest.meminfo()?.available_bytes;
    let report = guest.pattern(None)?;
    claim(report.wrong_words == 0, || {
        format!("memory does not read back as written: {report:?}")
    })?;
    claim(report.checked_bytes >= free / 4 * 3, || {
        format!("only {} of {free} bytes were checked", report.checked_bytes)
    })?;
    power_off(guest)
}

fn numa_nodes_reach_the_guest(lab: &mut Lab) -> Result<(), TestError> {
    let zones = [
        dax_zone(lab, "a", 0, GIB, 0),
        dax_zone(lab, "b", 1, 512 * MIB, 0),
    ];
    let mut spec = spec_on(lab, &[&zones[0], &zones[1]]);
    let words = [
        "--cpus",
        "boot=2",
        "--numa",
        "guest_numa_id=0,cpus=[1],memory_zones=[a],distances=[1@30]",
        "guest_numa_id=1,cpus=[0],memory_zones=[b]",
    ];
    spec.arguments.extend(words.map(str::to_owned));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    no_complaints(&mut guest)?;
    let nodes = guest.numa()?;
    let seen: Vec<(u32, &str, &[u32])> = nodes
        .iter()
        .map(|node| (node.node, node.cpus.as_str(), node.distances.as_slice()))
        .collect();
    expect(
        "nodes, processors, distances",
        &seen,
        &vec![(0, "1", &[10, 30][..]), (1, "0", &[30, 10][..])],
    )?;
    for (node, given) in nodes.iter().zip([GIB, 512 * MIB]) {
        let least = given - given / 32 - 128 * MIB;
        claim((least..=given).contains(&node.total_bytes), || {
            format!(
                "the zone of node {} has {given} bytes, its kernel manages {node:?}",
                node.node
            )
        })?;
    }
    power_off(guest)
}
