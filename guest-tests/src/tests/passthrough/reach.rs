//! Where a passed-through device can write and read: everywhere that the guest can, and nowhere else.

use lab_agent::guest_protocol::Transfer;

use super::super::support::{GIB, MIB, dax_zone, no_complaints, power_off, ram_ranges};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{By, expect, expect_nothing, faults_are_told, function, spec};
use crate::guest::Guest;
use crate::host::account::DmaWatch;
use crate::host::cards::Card;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_dma_reaches_every_zone_and_pmem",
        run: |lab| every_zone(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_dma_does_not_reach_a_zone_without_dma",
        run: |lab| zone_without_dma(lab, By::Groups),
    },
];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_dma_reaches_every_zone_and_pmem_by_iommufd",
        run: |lab| every_zone(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_dma_does_not_reach_a_zone_without_dma_by_iommufd",
        run: |lab| zone_without_dma(lab, By::Iommufd),
    },
];

/// Where the device's own page is, in the first zone.
const HOME: u64 = 256 * MIB;
const PAGE: u64 = 4096;

/// Words for the guest's command line that keep its kernel from using a page.
fn reserve(pages: &[u64]) -> String {
    let words: Vec<String> = pages
        .iter()
        .map(|page| format!("memmap=4K${page:#x}"))
        .collect();
    words.join(" ")
}

/// Four zones of three kinds of memory, on both sides of the hole and across it; and persistent memory.
fn every_zone(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let edu = lab.host.bind_vfio(Card::Edu)?;
    let zones = [
        dax_zone(lab, "z0", 0, 2 * GIB, 0),
        // From 2 GiB to the hole at 3 GiB, and on above it.
        dax_zone(lab, "z1", 0, 2 * GIB, 2 * GIB),
        dax_zone(lab, "z2", 2, GIB, 0),
        "id=z3,size=256M,shared=on".to_owned(),
    ];
    let words: Vec<&str> = zones.iter().map(String::as_str).collect();
    // The first and the last page of each zone, but for the very first of all, which the kernel needs.
    let pages = [
        MIB,
        2 * GIB - PAGE,
        2 * GIB,
        3 * GIB - PAGE,
        4 * GIB,
        5 * GIB - PAGE,
        5 * GIB,
        6 * GIB - PAGE,
        6 * GIB,
        6 * GIB + 256 * MIB - PAGE,
    ];
    let mut spec = spec(lab, by, &words, &[&edu]);
    spec.cmdline = format!("{} {}", reserve(&[HOME]), reserve(&pages));
    let pmem = format!("file={},size=1G,id=p0", lab.host.dax()[1].path);
    spec.arguments.extend(["--pmem".to_owned(), pmem]);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    let ranges = ram_ranges(&mut guest)?;
    let last = ranges.iter().map(|(_, last)| *last).max();
    claim(last.is_some_and(|last| last < 6 * GIB + 256 * MIB), || {
        format!("the guest's RAM should end at 6.25 GiB: {ranges:x?}")
    })?;
    guest.modprobe_pmem()?;
    guest.await_path("/dev/pmem0")?;
    guest.sh(
        "mkdir -p /mnt && mkfs.ext4 -q -F -b 4096 /dev/pmem0 && mount -t ext4 -o dax /dev/pmem0 /mnt && \
         for n in 1 2; do dd if=/dev/zero of=/mnt/$n bs=1M count=4; done; sync",
    )?;
    let address = function(&mut guest, Card::Edu)?.address;
    let mut targets: Vec<String> = pages.iter().map(|page| format!("{page:#x}")).collect();
    targets.extend(["/mnt/1", "/mnt/2"].map(|path| format!("file:{path}")));
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    let reports = guest.edu_dma(&address, HOME, &targets)?;
    expect(&reports, targets.len(), Transfer::Arrived)?;
    let in_pmem = reports
        .iter()
        .filter(|report| report.target.starts_with("file:"));
    claim(
        in_pmem
            .clone()
            .all(|report| report.address > 6 * GIB + 256 * MIB),
        || format!("files on pmem should lie above RAM: {reports:x?}"),
    )?;
    guest.sh("umount /mnt")?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    Ok(edu.release()?)
}

/// The device's accesses fault in the host's IOMMU; nobody else is harmed.
fn zone_without_dma(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let edu = lab.host.bind_vfio(Card::Edu)?;
    let watch = DmaWatch::begin(&lab.host)?;
    let closed = format!("{},dma=off", dax_zone(lab, "z1", 1, 512 * MIB, 0));
    let mut spec = spec(
        lab,
        by,
        &[&dax_zone(lab, "z0", 0, 512 * MIB, 0), &closed],
        &[&edu],
    );
    let (reached, shut) = (512 * MIB - PAGE, [512 * MIB, GIB - PAGE]);
    spec.cmdline = format!("{} {}", reserve(&[HOME, reached]), reserve(&shut));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    let address = function(&mut guest, Card::Edu)?.address;
    let maps = watch.read()?;
    claim((512 * MIB..GIB).contains(&maps.live_bytes()), || {
        format!("one zone of two should be mapped for DMA: {maps:?}")
    })?;

    let words = shut.map(|page| format!("{page:#x}"));
    let reports = guest.edu_dma(&address, HOME, &[&words[0], &words[1]])?;
    expect_nothing(&reports, shut.len())?;
    faults_are_told(lab, &edu, &shut)?;
    // The zone beside it is reached as before.
    let reports = guest.edu_dma(&address, HOME, &[&format!("{reached:#x}")])?;
    expect(&reports, 1, Transfer::Arrived)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    let maps = watch.read()?;
    claim(maps.live_bytes() == 0, || {
        format!("something is still mapped for DMA: {maps:?}")
    })?;
    watch.end()?;
    Ok(edu.release()?)
}
