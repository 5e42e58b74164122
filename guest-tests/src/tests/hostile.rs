//! A guest that means harm hurts nobody but its own device.

use super::support::{MIB, VirtioKind, dax_zone, power_off, scratch, spec_with, virtio_functions};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::{Guest, network};
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[GuestTest {
    name: "a_hostile_driver_hurts_its_own_device_only",
    run: a_hostile_driver_hurts_its_own_device_only,
}];

const CASES: [&str; 8] = [
    "descriptors-outside-ram",
    "descriptors-at-mmio",
    "descriptor-loop",
    "bad-avail-index",
    "bad-queues",
    "reset-mid-request",
    "bad-msix",
    "overlapping-bars",
];
/// 16 MiB that the guest's kernel leaves alone, for rings and buffers.
const MEMORY: u64 = 256 * MIB;

fn a_hostile_driver_hurts_its_own_device_only(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(
        "cd {SCRATCH} && truncate -s 16M victim witness && : > console"
    ))?;
    let pmem = format!(
        "file={},offset=512M,size=128M,id=p0",
        lab.host.dax()[1].path
    );
    let mut spec = spec_with(
        lab,
        &[
            "--disk",
            &format!("path={SCRATCH}/witness,id=witness,image_type=raw"),
            &format!("path={SCRATCH}/victim,id=victim,image_type=raw"),
            "--net",
            &network::tap_word("lab0", ",id=n0"),
            "--vsock",
            &format!("cid=3,socket={SCRATCH}/vsock.sock,id=v0"),
            "--pmem",
            &pmem,
            "--balloon",
            "size=0",
            "--console",
            &format!("file={SCRATCH}/console"),
        ],
    );
    spec.cmdline = format!("memmap=16M${MEMORY:#x} iomem=relaxed");
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&["virtio_pci", "virtio_blk"])?;
    guest.await_path("/dev/vda")?;
    guest.await_path("/dev/vdb")?;
    let disks = virtio_functions(&mut guest, VirtioKind::Block)?;
    let [_, victim] = disks.as_slice() else {
        return Err(TestError::Claim(format!("not two disks: {disks:?}")));
    };
    guest.fill_blocks("/dev/vda", 0, MIB, 1)?;
    guest.fill_blocks("/dev/vdb", 0, MIB, 2)?;
    let mut victims = vec![victim.address.clone()];
    for kind in [
        VirtioKind::Net,
        VirtioKind::Rng,
        VirtioKind::Vsock,
        VirtioKind::Pmem,
        VirtioKind::Balloon,
        VirtioKind::Console,
    ] {
        let found = virtio_functions(&mut guest, kind)?;
        victims.extend(found.into_iter().map(|function| function.address));
    }
    for address in &victims {
        for case in CASES {
            guest.hostile(case, address, MEMORY)?;
            // The other device answers, and so does the VMM, whose serial port carries this.
            let report = guest.compare_blocks("/dev/vda", 0, MIB / 4, 1)?;
            claim(report.wrong_words == 0 && report.words == MIB / 32, || {
                format!("{case} on {address} has hurt another disk: {report:?}")
            })?;
        }
    }
    // In a decent driver's hands every victim works again.
    for address in &victims {
        guest.sh(&format!(
            "echo {address} > /sys/bus/pci/drivers/virtio-pci/bind"
        ))?;
    }
    guest.await_path("/dev/vdb")?;
    let report = guest.compare_blocks("/dev/vdb", MIB / 2, MIB / 2, 2)?;
    claim(report.wrong_words == 0, || {
        format!("the disk that was abused has lost what was written before: {report:?}")
    })?;
    guest.modprobe(&["virtio_net", "virtio_rng", "virtio_pmem", "nd_pmem"])?;
    guest.bring_up("eth0")?;
    guest.await_path("/dev/pmem0")?;
    guest.fill_blocks("/dev/pmem0", 0, MIB, 3)?;
    guest.sh("dd if=/dev/hwrng of=/dev/null bs=64 count=1")?;
    let pages = super::support::kvm_pages(lab, &mut guest)?;
    claim(pages.pages_2m > 0, || format!("{pages:?}"))?;
    power_off(guest)?;
    // Its memory was its own all the time: another guest boots on the same range.
    power_off(super::support::boot_on(
        lab,
        &[&dax_zone(lab, "z0", 0, 512 * MIB, 0)],
    )?)
}
