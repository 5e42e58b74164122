//! Devices come to a running guest and go again, and nothing of them stays behind.

use super::remote::Remote;
use super::support::{
    GIB, MIB, VirtioKind, eventually, holds, no_complaints, power_off, scratch, spec_with,
    virtio_functions,
};
use super::{GuestTest, Lab, TestError, claim, pci, pmem, small_devices};
use crate::guest::{Guest, network};
use crate::host::account;
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "devices_come_and_go_while_the_guest_runs",
        run: devices_come_and_go_while_the_guest_runs,
    },
    GuestTest {
        name: "a_guest_that_lets_nothing_go_keeps_it",
        run: a_guest_that_lets_nothing_go_keeps_it,
    },
];

/// Modules of all that comes; loaded before, so that a device has its driver as soon as it is found.
const MODULES: [&str; 6] = [
    "virtio_pci",
    "virtio_pmem",
    "nd_pmem",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
];

fn boot(lab: &Lab, remote: &Remote, more: &[&str], cmdline: &str) -> Result<Guest, TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(
        "cd {SCRATCH} && truncate -s 16M disk other && : > events"
    ))?;
    let mut spec = spec_with(lab, &["--api-socket", remote.socket()]);
    spec.arguments
        .extend(more.iter().map(|word| (*word).to_owned()));
    cmdline.clone_into(&mut spec.cmdline);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&MODULES)?;
    Ok(guest)
}

/// Asks for a removal, and waits until it is gone for the guest, for `vm.info`, and for the host.
fn remove(
    lab: &Lab,
    remote: &Remote,
    guest: &mut Guest,
    device: (&str, &str),
    held: Option<&str>,
) -> Result<(), TestError> {
    let (id, address) = device;
    if let Some(path) = held {
        claim(holds(lab, guest, path)?, || {
            format!("the VMM uses {id} and does not hold {path}")
        })?;
    }
    remote.ok(lab, &["remove-device", id])?;
    guest.await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
    eventually(&format!("{id} is no part of the VM any more"), || {
        Ok(!remote.knows(lab, id)?)
    })?;
    if let Some(path) = held {
        eventually(&format!("{path} is let go"), || {
            Ok(!holds(lab, guest, path)?)
        })?;
    }
    Ok(())
}

fn descriptors(lab: &Lab, guest: &mut Guest) -> Result<u64, TestError> {
    Ok(account::descriptors(&lab.host, guest.vmm().pid())?)
}

fn devices_come_and_go_while_the_guest_runs(lab: &mut Lab) -> Result<(), TestError> {
    let remote = Remote::new();
    let events = format!("path={SCRATCH}/events");
    let mut guest = boot(lab, &remote, &["--event-monitor", &events], "")?;
    let at_first = descriptors(lab, &mut guest)?;

    // A disk: used, and removed while the guest has it open would be the guest's affair; here it is closed.
    let disk = format!("{SCRATCH}/disk");
    let word = format!("path={disk},id=disk0,image_type=raw");
    let disk_at = remote.add(lab, "add-disk", &word)?;
    guest.await_path("/dev/vda")?;
    claim(
        pci::is_driven(&mut guest, VirtioKind::Block)?.address == disk_at,
        || format!("the disk should be at {disk_at}"),
    )?;
    guest.fill_blocks("/dev/vda", 0, 1 << 20, 8)?;
    remote.refused(lab, &["add-disk", &word], &["disk0"])?;
    remote.refused(
        lab,
        &["add-disk", "path=/nonexistent,id=disk1"],
        &["/nonexistent"],
    )?;
    // It grows under the guest, which sees that by itself and keeps what it has. It does not shrink.
    let resize = |size: &'static str| ["resize-disk", "--disk", "disk0", "--size", size];
    remote.ok(lab, &resize("96M"))?;
    eventually("the guest sees the larger disk", || {
        let sectors = guest.cat("/sys/block/vda/size")?;
        Ok(sectors.trim() == (96 * MIB / 512).to_string())
    })?;
    guest.fill_blocks("/dev/vda", 95 * MIB, 1 << 20, 9)?;
    let kept = guest.compare_blocks("/dev/vda", 0, 1 << 20, 8)?;
    claim(kept.wrong_words == 0, || {
        format!("the disk lost contents as it grew: {kept:?}")
    })?;
    remote.refused(lab, &resize("1M"), &["disk0", "400", "shrink"])?;
    remote.refused(lab, &resize("200000001"), &["disk0", "400", "whole blocks"])?;
    let other = ["resize-disk", "--disk", "disk9", "--size", "1G"];
    remote.refused(lab, &other, &["disk9", "404"])?;
    remove(lab, &remote, &mut guest, ("disk0", &disk_at), Some(&disk))?;
    remote.refused(lab, &["remove-device", "disk0"], &["disk0"])?;

    // Persistent memory takes the slot that is free again, and is another device all the same.
    let dax = lab.host.dax()[1].path.clone();
    let word = format!("file={dax},size=1G,id=pmem0");
    let pmem_at = remote.add(lab, "add-pmem", &word)?;
    claim(pmem_at == disk_at, || {
        format!("{disk_at} is free again, but the next device comes to {pmem_at}")
    })?;
    pmem::is_usable(&mut guest, "pmem0")?;
    remove(lab, &remote, &mut guest, ("pmem0", &pmem_at), Some(&dax))?;
    // The range is free: it comes again, elsewhere or not, with what was written.
    let pmem_at = remote.add(lab, "add-pmem", &word)?;
    guest.await_path("/dev/pmem0")?;
    let report = guest.compare_blocks("/dev/pmem0", 0, 1 << 20, 5)?;
    claim(report.wrong_words == 0, || {
        format!("device-dax contents were changed between two uses: {report:?}")
    })?;

    let word = network::tap_word("lab0", ",id=net0");
    let net_at = remote.add(lab, "add-net", &word)?;
    guest.await_path(&format!("/sys/bus/pci/devices/{net_at}/driver"))?;
    pci::is_driven(&mut guest, VirtioKind::Net)?;
    guest.bring_up("eth0")?;
    let socket = format!("{SCRATCH}/vsock.sock");
    let word = format!("cid=5,socket={socket},id=vsock0");
    let vsock_at = remote.add(lab, "add-vsock", &word)?;
    guest.await_path(&format!("/sys/bus/pci/devices/{vsock_at}/driver"))?;
    pci::is_driven(&mut guest, VirtioKind::Vsock)?;
    small_devices::vsock_goes_both_ways(lab, &mut guest, &socket)?;
    remove(lab, &remote, &mut guest, ("vsock0", &vsock_at), None)?;
    claim(!lab.host.exists(&socket)?, || format!("{socket} is left"))?;
    remove(
        lab,
        &remote,
        &mut guest,
        ("net0", &net_at),
        Some("/dev/net/tun"),
    )?;
    let tap = lab.host.run(&["ip", "link", "show", "lab0"])?;
    claim(!tap.status.success(), || "the tap is left".to_owned())?;
    remove(lab, &remote, &mut guest, ("pmem0", &pmem_at), Some(&dax))?;
    eventually("every descriptor is closed", || {
        Ok(descriptors(lab, &mut guest)? <= at_first)
    })?;

    slots_run_out(lab, &remote, &mut guest)?;
    let events = lab.host.read_text(&format!("{SCRATCH}/events"))?;
    for id in ["disk0", "pmem0", "net0", "vsock0"] {
        claim(
            events.contains("device-removed") && events.contains(id),
            || format!("the events should tell that {id} was removed: {events}"),
        )?;
    }
    no_complaints(&mut guest)?;
    power_off(guest)
}

/// Disks are added until there is no slot for another one; all of them are there.
fn slots_run_out(lab: &Lab, remote: &Remote, guest: &mut Guest) -> Result<(), TestError> {
    const SLOTS: usize = 31;
    let taken = guest
        .pci()?
        .iter()
        .filter(|function| {
            function.address.starts_with("0000:00:") && function.address != "0000:00:00.0"
        })
        .count();
    for number in taken..SLOTS {
        let word = format!("path={SCRATCH}/other,id=many{number},image_type=raw,readonly=on");
        remote.add(lab, "add-disk", &word)?;
    }
    let word = format!("path={SCRATCH}/other,id=one-more,image_type=raw,readonly=on");
    remote.refused(lab, &["add-disk", &word], &["slot"])?;
    let wanted = SLOTS - taken;
    eventually("the guest has found every disk", || {
        let disks = virtio_functions(guest, VirtioKind::Block)?;
        Ok(disks.iter().filter(|disk| disk.driver.is_some()).count() == wanted)
    })
}

/// A paused guest answers nobody; neither does one whose kernel does not know how. Both keep the device, and say so.
fn a_guest_that_lets_nothing_go_keeps_it(lab: &mut Lab) -> Result<(), TestError> {
    let remote = Remote::new();
    let disk = format!("{SCRATCH}/disk");
    let word = format!("path={disk},id=disk0,image_type=raw");
    let mut guest = boot(lab, &remote, &["--disk", &word], "")?;
    guest.await_path("/dev/vda")?;
    let address = pci::is_driven(&mut guest, VirtioKind::Block)?.address;
    remote.ok(lab, &["pause"])?;
    // Asked for or refused; within the time that any program has here, and the device stays what it was.
    let asked = remote.run(lab, &["remove-device", "disk0"])?;
    claim(
        remote.knows(lab, "disk0")? && holds(lab, &mut guest, &disk)?,
        || "a device was taken from a guest that has not let go of it".to_owned(),
    )?;
    remote.ok(lab, &["resume"])?;
    if !asked.status.success() {
        remote.ok(lab, &["remove-device", "disk0"])?;
    }
    guest.await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
    eventually("the device is let go", || {
        Ok(!remote.knows(lab, "disk0")? && !holds(lab, &mut guest, &disk)?)
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)?;

    let mut guest = boot(lab, &remote, &["--disk", &word], "acpiphp.disable=1")?;
    guest.await_path("/dev/vda")?;
    remote.run(lab, &["remove-device", "disk0"])?;
    // Asked again while the first is pending, or after it has been given up: an answer, whatever it is.
    remote.run(lab, &["remove-device", "disk0"])?;
    claim(remote.knows(lab, "disk0")?, || {
        "the device is gone for the VMM, but not for the guest".to_owned()
    })?;
    guest.fill_blocks("/dev/vda", 0, 1 << 20, 9)?;
    remote.expect_state(lab, "Running")?;
    power_off(guest)?;
    claim(lab.host.dax()[1].size_bytes >= GIB, || {
        "a dax device has shrunk".to_owned()
    })
}
