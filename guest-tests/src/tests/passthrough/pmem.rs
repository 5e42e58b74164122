//! Persistent memory comes to a guest that has devices: they reach it before the guest knows of it, or never.

use lab_agent::guest_protocol::Transfer;

use super::super::remote::Remote;
use super::super::support::{GIB, MIB, eventually, no_complaints, on_fs_dax, power_off, scratch};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{By, expect, expect_nothing, faults_are_told, function, ram, spec};
use crate::guest::Guest;
use crate::host::account::DmaWatch;
use crate::host::cards::Card;

pub(super) const TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_reaches_pmem_that_comes_later",
    run: |lab| pmem_comes(lab, By::Groups),
}];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_reaches_pmem_that_comes_later_by_iommufd",
    run: |lab| pmem_comes(lab, By::Iommufd),
}];

/// Pages of the guest's that its kernel leaves alone.
const HOME: u64 = 256 * MIB;
const TARGET: &str = "0x11000000";
const BYTES: u64 = 16 * MIB;

fn pmem_comes(lab: &mut Lab, by: By) -> Result<(), TestError> {
    scratch(lab)?;
    let lab = &*lab;
    let edu = lab.host.bind_vfio(Card::Edu)?;
    let disk = lab.host.bind_vfio(Card::Disk)?;
    let watch = DmaWatch::begin(&lab.host)?;
    let live = || watch.read().map(|maps| maps.live_bytes());
    let remote = Remote::new();
    let mut spec = spec(lab, by, &[&ram(lab)], &[&edu, &disk]);
    spec.cmdline = format!("memmap=4K${HOME:#x} memmap=4K${TARGET}");
    spec.arguments
        .extend(["--api-socket", remote.socket()].map(str::to_owned));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe_pmem()?;
    guest.modprobe(&["nvme"])?;
    let edu_at = function(&mut guest, Card::Edu)?.address;
    let reports = guest.edu_dma(&edu_at, HOME, &[TARGET])?;
    expect(&reports, 1, Transfer::Arrived)?;
    // The registers of both devices are in use by now, and in reach of the other one.
    guest.await_path("/dev/nvme0n1")?;
    let without = live()?;

    // The guest is held while its memory comes: what is mapped now is mapped before it knows.
    let word = format!("file={},size=1G,id=p0", lab.host.dax()[1].path);
    remote.ok(lab, &["pause"])?;
    let address = remote.add(lab, "add-pmem", &word)?;
    let with = live()?;
    claim(with == without + GIB, || {
        format!("1 GiB of pmem came, {without} bytes were mapped for DMA before, now {with}")
    })?;
    remote.ok(lab, &["resume"])?;
    mount(&mut guest, "pmem0", "/mnt/0")?;
    guest.fill_blocks("/dev/nvme0n1", 0, BYTES, 91)?;
    let mapped = guest.read_into_mapping("/dev/nvme0n1", BYTES, "/mnt/0/file", 91)?;
    claim(mapped.wrong_words == 0 && mapped.words == BYTES / 8, || {
        format!("what the drive has written into pmem that came later: {mapped:?}")
    })?;

    // Not so when nobody wants it.
    let word = format!("file={},size=1G,id=p1,dma=off", lab.host.dax()[2].path);
    remote.add(lab, "add-pmem", &word)?;
    claim(live()? == with, || {
        "pmem with dma=off is mapped for DMA".to_owned()
    })?;
    mount(&mut guest, "pmem1", "/mnt/1")?;
    let reports = guest.edu_dma(&edu_at, HOME, &["file:/mnt/1/file"])?;
    expect_nothing(&reports, 1)?;
    let places: Vec<u64> = reports.iter().map(|report| report.address).collect();
    faults_are_told(lab, &edu, &places)?;
    let reports = guest.edu_dma(&edu_at, HOME, &["file:/mnt/0/file"])?;
    expect(&reports, 1, Transfer::Arrived)?;

    // When it goes, the devices' way to it goes.
    guest.sh("umount /mnt/0 && umount /mnt/1")?;
    remote.ok(lab, &["remove-device", "p0"])?;
    guest.await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
    eventually("the devices reach what they reached before", || {
        Ok(!remote.knows(lab, "p0")? && live()? == without)
    })?;

    // A file on fs-dax is left out, and nobody can have it otherwise.
    on_fs_dax(lab, |place| {
        lab.host
            .sh(&format!("dd if=/dev/zero of={place}/pmem bs=1M count=256"))?;
        let word = format!("file={place}/pmem,id=p2");
        let wanted = format!("{word},dma=on");
        remote.refused(
            lab,
            &["add-pmem", &wanted],
            &["p2", "dma=on", "fs-dax", "devdax"],
        )?;
        let address = remote.add(lab, "add-pmem", &word)?;
        guest.await_path(&format!("/sys/bus/pci/devices/{address}/driver"))?;
        claim(live()? == without, || {
            "a file on fs-dax is mapped for DMA".to_owned()
        })?;
        let said = guest.vmm().stderr();
        claim(said.contains("do not reach this memory"), || {
            format!("nobody was told that devices do not reach the file: {said}")
        })?;
        remote.ok(lab, &["remove-device", "p2"])?;
        guest.await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
        eventually("the file is let go", || Ok(!remote.knows(lab, "p2")?))
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    claim(live()? == 0, || {
        "something is still mapped for DMA".to_owned()
    })?;
    watch.end()?;
    edu.release()?;
    Ok(disk.release()?)
}

/// Makes a file system with a file on it, mapped without a cache in between.
fn mount(guest: &mut Guest, name: &str, place: &str) -> Result<(), TestError> {
    guest.await_path(&format!("/dev/{name}"))?;
    guest.sh(&format!(
        "mkdir -p {place} && mkfs.ext4 -q -F -b 4096 /dev/{name} && mount -t ext4 -o dax /dev/{name} {place} && \
         dd if=/dev/zero of={place}/file bs=1M count={} && sync",
        BYTES >> 20
    ))?;
    Ok(())
}
