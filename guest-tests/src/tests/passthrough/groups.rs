//! Functions that the IOMMU can't tell apart: they are one owner's, all of them.

use lab_agent::guest_protocol::Transfer;

use super::super::remote::Remote;
use super::super::support::{MIB, dax_zone, eventually, no_complaints, power_off, scratch};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{
    By, DRIVERS, expect, function, is_driven, keeps_blocks, ram, spec, start_refused, word,
};
use crate::guest::Guest;
use crate::host::cards::Card;

pub(super) const TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_of_a_group_is_of_all_of_it",
    run: |lab| group(lab, By::Groups),
}];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_of_a_group_is_of_all_of_it_by_iommufd",
    run: |lab| group(lab, By::Iommufd),
}];

/// Pages of the guest's that its kernel leaves alone.
const HOME: u64 = 256 * MIB;
const TARGET: &str = "0x11000000";

fn group(lab: &mut Lab, by: By) -> Result<(), TestError> {
    scratch(lab)?;
    let at_first = lab.host.pci_device(Card::PairedDisk)?;
    let (sibling, path) = (at_first.address.clone(), at_first.path());
    let driver_of_sibling = || lab.host.pci_device(Card::PairedDisk).map(|it| it.driver);
    let edu = lab.host.bind_vfio(Card::PairedEdu)?;

    // The host has the other function.
    if at_first.driver.is_none() {
        lab.host.check(&["modprobe", "nvme"])?;
        eventually("the host's driver has the drive", || {
            Ok(driver_of_sibling()?.is_some())
        })?;
    }
    let unbind = format!("{path}/driver/unbind");
    let said = [
        edu.device().address.as_str(),
        &sibling,
        "host's driver nvme",
        &unbind,
        "vfio-pci",
    ];
    start_refused(lab, by, &[&ram(lab)], &word(&edu), &said)?;

    // Nobody has it: then nobody gets it either.
    lab.host.sh(&format!("echo {sibling} > {unbind}"))?;
    let remote = Remote::new();
    let mut spec = spec(lab, by, &[&ram(lab)], &[&edu]);
    spec.cmdline = format!("memmap=4K${HOME:#x} memmap=4K${TARGET}");
    spec.arguments
        .extend(["--api-socket", remote.socket()].map(str::to_owned));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&DRIVERS)?;
    let edu_at = function(&mut guest, Card::PairedEdu)?.address;
    let reaches = |guest: &mut Guest| {
        let reports = guest.edu_dma(&edu_at, HOME, &[TARGET])?;
        expect(&reports, 1, Transfer::Arrived)
    };
    reaches(&mut guest)?;
    let bind = format!("echo {sibling} > /sys/bus/pci/drivers/nvme/bind");
    let bound = lab.host.run(&["sh", "-c", &bind])?;
    claim(
        !bound.status.success() && driver_of_sibling()?.is_none(),
        || format!("the host got a function of a group that a guest has: {bound:?}"),
    )?;

    // Another guest does not get it.
    let disk = lab.host.bind_vfio(Card::PairedDisk)?;
    let pid = guest.vmm().pid().to_string();
    let other = dax_zone(lab, "z1", 1, 512 * MIB, 0);
    let said: &[&str] = match by {
        By::Groups => &["in use", "daxhund", &pid],
        By::Iommufd => &[
            &sibling,
            "another process has",
            edu.device().address.as_str(),
        ],
    };
    start_refused(lab, by, &[&other], &word(&disk), said)?;
    reaches(&mut guest)?;

    // The same guest does, and has both at once, and the one when the other is gone.
    let disk_at = remote.add(lab, "add-device", &word(&disk))?;
    guest.await_path(&format!("/sys/bus/pci/devices/{disk_at}"))?;
    is_driven(&mut guest, Card::PairedDisk)?;
    keeps_blocks(&mut guest, "/dev/nvme0n1", 4 * MIB, 41)?;
    reaches(&mut guest)?;
    remote.ok(lab, &["remove-device", Card::PairedEdu.id()])?;
    guest.await_gone(&format!("/sys/bus/pci/devices/{edu_at}"))?;
    eventually("the first function is let go", || {
        Ok(!remote.knows(lab, Card::PairedEdu.id())?)
    })?;
    keeps_blocks(&mut guest, "/dev/nvme0n1", 4 * MIB, 42)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;

    edu.release()?;
    disk.release()?;
    if at_first.driver.is_some() {
        lab.host.sh(&bind)?;
    } else {
        lab.host.check(&["modprobe", "-r", "nvme"])?;
    }
    Ok(())
}
