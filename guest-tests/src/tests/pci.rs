//! The guest finds its devices on PCI where orchestrators expect them, and may rearrange them.

use lab_agent::guest_protocol::{PciBar, PciFunction};

use super::support::{
    MIB, VirtioKind, no_complaints, power_off, refused, scratch, spec_with, virtio_function,
    virtio_functions,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "devices_are_found_on_two_segments_and_interrupt_by_msix",
        run: devices_are_found_on_two_segments_and_interrupt_by_msix,
    },
    GuestTest {
        name: "devices_that_cannot_be_placed_are_refused",
        run: devices_that_cannot_be_placed_are_refused,
    },
];

/// Number of a segment's slots that are for devices: slot 0 is the host bridge's.
const DEVICES_PER_SEGMENT: usize = 31;

fn devices_are_found_on_two_segments_and_interrupt_by_msix(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host
        .sh(&format!("truncate -s 16M {SCRATCH}/a {SCRATCH}/b"))?;
    let disks = [
        format!("path={SCRATCH}/a,id=a,image_type=raw"),
        format!("path={SCRATCH}/b,id=b,image_type=raw,pci_segment=1"),
    ];
    let spec = spec_with(
        lab,
        &[
            "--platform",
            "num_pci_segments=2",
            "--disk",
            &disks[0],
            &disks[1],
        ],
    );
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&["virtio_pci", "virtio_blk", "virtio_rng"])?;
    for disk in ["/dev/vda", "/dev/vdb"] {
        guest.await_path(disk)?;
    }

    let functions = guest.pci()?;
    let on = |segment: &str| {
        let place = format!("{segment}:00:");
        let wanted = |function: &&PciFunction| function.address.starts_with(&place);
        functions.iter().filter(wanted).count()
    };
    claim(
        on("0000") >= 2 && on("0001") >= 1 && functions.iter().all(|f| f.address.ends_with(".0")),
        || format!("expected devices at 0000:00:XX.0 and 0001:00:XX.0 alone: {functions:?}"),
    )?;
    claim(
        functions.iter().any(|f| f.address == "0001:00:01.0"),
        || format!("the only device of segment 1 should be its first: {functions:?}"),
    )?;
    bars_are_apart_and_in_windows(&mut guest, &functions)?;

    let disks = virtio_functions(&mut guest, VirtioKind::Block)?;
    let [first, second] = disks.as_slice() else {
        return Err(TestError::Claim(format!("not two disks: {disks:?}")));
    };
    for disk in [first, second] {
        claim(
            disk.driver.as_deref() == Some("virtio-pci") && disk.vectors >= 2,
            || {
                format!(
                    "a disk should have a vector for its queue and one for its configuration: {disk:?}"
                )
            },
        )?;
    }
    let before = disk_interrupts(&mut guest)?;
    guest.fill_blocks("/dev/vda", 0, MIB, 1)?;
    guest.fill_blocks("/dev/vdb", 0, MIB, 2)?;
    let after = disk_interrupts(&mut guest)?;
    claim(
        before.len() == 2
            && before
                .iter()
                .zip(&after)
                .all(|(before, after)| before < after),
        || format!("each disk's request vector should count up: {before:?}, then {after:?}"),
    )?;

    guest_moves_a_bar(&mut guest, first, &functions)?;
    let report = guest.compare_blocks("/dev/vda", 0, MIB, 1)?;
    claim(report.wrong_words == 0, || {
        format!("the disk has other contents after its BAR was moved: {report:?}")
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)
}

/// Counts of the vectors that serve disks' requests, in the order of the table.
fn disk_interrupts(guest: &mut Guest) -> Result<Vec<u64>, TestError> {
    let table = guest.cat("/proc/interrupts")?;
    let counts = table
        .lines()
        .filter(|line| line.contains("-req."))
        .map(|line| {
            let words = line.split_whitespace().skip(1);
            words.map_while(|word| word.parse::<u64>().ok()).sum()
        });
    Ok(counts.collect())
}

/// Memory windows of the guest's PCI host bridges: first and last address.
fn windows(guest: &mut Guest) -> Result<Vec<(u64, u64)>, TestError> {
    let iomem = guest.iomem()?;
    let parse = |text: &str| u64::from_str_radix(text.trim(), 16).ok();
    let windows = iomem
        .lines()
        .filter(|line| !line.starts_with(' ') && line.contains(" : PCI Bus "))
        .filter_map(|line| {
            let (first, last) = line.split_once(" : ")?.0.split_once('-')?;
            Some((parse(first)?, parse(last)?))
        });
    Ok(windows.collect())
}

fn bars_are_apart_and_in_windows(
    guest: &mut Guest,
    functions: &[PciFunction],
) -> Result<(), TestError> {
    let windows = windows(guest)?;
    let mut bars: Vec<PciBar> = functions
        .iter()
        .flat_map(|function| function.bars.iter().copied())
        .collect();
    bars.sort_by_key(|bar| bar.start);
    claim(!bars.is_empty(), || "no device has a BAR".to_owned())?;
    for bar in &bars {
        claim(
            windows
                .iter()
                .any(|(first, last)| *first <= bar.start && bar.end <= *last),
            || format!("{bar:x?} is in none of the windows {windows:x?}"),
        )?;
        let size = bar.end - bar.start + 1;
        claim(
            size.is_power_of_two() && bar.start.is_multiple_of(size),
            || format!("{bar:x?} is not aligned to its size"),
        )?;
    }
    claim(bars.windows(2).all(|two| two[0].end < two[1].start), || {
        format!("BARs overlap: {bars:x?}")
    })
}

/// Puts a device's BAR to a free place and has the guest's kernel find the device anew there.
fn guest_moves_a_bar(
    guest: &mut Guest,
    function: &PciFunction,
    all: &[PciFunction],
) -> Result<(), TestError> {
    let address = &function.address;
    let bar = function.bars.first().copied();
    let bar = bar.ok_or_else(|| TestError::Claim(format!("no BAR: {function:?}")))?;
    let size = bar.end - bar.start + 1;
    let window = windows(guest)?
        .into_iter()
        .find(|(first, last)| *first <= bar.start && bar.end <= *last)
        .ok_or_else(|| TestError::Claim(format!("{bar:x?} is in no window")))?;
    let highest = all
        .iter()
        .flat_map(|function| &function.bars)
        .map(|bar| bar.end)
        .filter(|end| *end <= window.1)
        .max()
        .unwrap_or(bar.end);
    let place = (highest + 1).next_multiple_of(size) + size;
    claim(place + size - 1 <= window.1, || {
        format!("no room behind {highest:#x} in {window:x?}")
    })?;
    guest.ask(&format!("pci-move {address} {place:#x}"))?;
    // The kernel finds it anew, with its driver.
    guest.sh(&format!(
        "echo 1 > /sys/bus/pci/devices/{address}/remove && echo 1 > /sys/bus/pci/rescan"
    ))?;
    guest.await_path("/dev/vda")?;
    let found = guest.pci()?;
    let found = found.iter().find(|found| found.address == *address);
    claim(
        found.is_some_and(|found| found.driver.is_some() && found.bars.len() == 1),
        || format!("{address} should be back with its driver: {found:x?}"),
    )
}

fn devices_that_cannot_be_placed_are_refused(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let count = DEVICES_PER_SEGMENT + 1;
    lab.host.sh(&format!(
        "truncate -s 1M {SCRATCH}/disk; for i in $(seq {count}); do truncate -s 1M {SCRATCH}/$i; done"
    ))?;
    let zone = super::support::dax_zone(lab, "z0", 0, 256 * MIB, 0);
    let plain = |more: &str| format!("path={SCRATCH}/disk,image_type=raw{more}");
    let with = |words: &[&str], status: i32, said: &[&str]| {
        let mut arguments = vec!["--memory-zone", &zone];
        arguments.extend(words);
        refused(lab, &arguments, status, said)
    };
    with(&["--disk", &plain(",pci_segment=1")], 2, &["pci_segment=1"])?;
    with(
        &[
            "--disk",
            &plain(",id=d"),
            &format!("path={SCRATCH}/1,id=d,image_type=raw"),
        ],
        2,
        &["id=d"],
    )?;
    with(
        &["--disk", &plain(",pci_device_id=0")],
        2,
        &["pci_device_id=0"],
    )?;
    with(
        &["--disk", &plain(",pci_device_id=32")],
        2,
        &["pci_device_id=32"],
    )?;
    with(
        &["--disk", &plain(",queue_size=100000")],
        2,
        &["queue_size"],
    )?;
    with(
        &["--disk", &plain(",queue_size=100")],
        2,
        &["queue_size=100"],
    )?;
    with(&["--disk", &plain(",num_queues=0")], 2, &["num_queues=0"])?;
    let many: Vec<String> = (1..=count)
        .map(|number| format!("path={SCRATCH}/{number},image_type=raw"))
        .collect();
    let mut words = vec!["--disk"];
    words.extend(many.iter().map(String::as_str));
    with(&words, 1, &["slot"])
}

/// Used by the tests of single devices too: the function is bound to its driver.
pub(super) fn is_driven(guest: &mut Guest, kind: VirtioKind) -> Result<PciFunction, TestError> {
    let function = virtio_function(guest, kind)?;
    claim(function.driver.is_some(), || {
        format!("nothing drives {function:?}")
    })?;
    Ok(function)
}
