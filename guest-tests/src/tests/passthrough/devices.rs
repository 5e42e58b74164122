//! What a guest does with a device of its own: a network card, a drive, two at once; and how they interrupt it.

use lab_agent::guest_protocol::InterruptKind;

use super::super::support::{MIB, no_complaints, power_off};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{
    By, boot, carries_data, function, functions, interrupts_arrive, is_driven, keeps_blocks, ram,
    spec,
};
use crate::guest::{Guest, load_disk};
use crate::host::account::vfio_interrupts;
use crate::host::cards::Card;

/// Many small writes at random places of the file system, past the page cache; then all of them are read and compared.
const FIO_VERIFIES: &str = "--name=verify --directory=/mnt --size=8M --bs=4k --rw=randwrite --direct=1 --ioengine=libaio \
                            --iodepth=8 --verify=crc32c --do_verify=1 --verify_fatal=1 --end_fsync=1";

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_network_card_gets_a_lease_and_carries_data",
        run: |lab| network_card(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_drive_holds_a_file_system",
        run: |lab| drive(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_drive_reads_straight_into_pmem",
        run: |lab| drive_into_pmem(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_two_drives_and_a_network_card_work_at_once",
        run: |lab| several_at_once(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_interrupts_come_by_wire",
        run: |lab| interrupts_by_wire(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_network_card_interrupts_by_wire",
        run: |lab| network_card_by_wire(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_survives_reboots",
        run: |lab| reboots(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_device_that_fails_its_reset_is_told_of",
        run: |lab| reset_that_fails(lab, By::Groups),
    },
];

/// For kernels with drivers for ATA.
pub(super) const TESTS_WITH_ATA: &[GuestTest] = &[GuestTest {
    name: "passthrough_controller_without_msix_interrupts_by_message",
    run: |lab| controller_without_msix(lab, By::Groups),
}];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_network_card_gets_a_lease_and_carries_data_by_iommufd",
        run: |lab| network_card(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_drive_holds_a_file_system_by_iommufd",
        run: |lab| drive(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_drive_reads_straight_into_pmem_by_iommufd",
        run: |lab| drive_into_pmem(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_two_drives_and_a_network_card_work_at_once_by_iommufd",
        run: |lab| several_at_once(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_interrupts_come_by_wire_by_iommufd",
        run: |lab| interrupts_by_wire(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_network_card_interrupts_by_wire_by_iommufd",
        run: |lab| network_card_by_wire(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_survives_reboots_by_iommufd",
        run: |lab| reboots(lab, By::Iommufd),
    },
];

fn network_card(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Network)?;
    let mut guest = boot(lab, by, &[&card])?;
    is_driven(&mut guest, Card::Network)?;
    carries_data(&mut guest, 4 * MIB)?;
    interrupts_arrive(lab, &mut guest, &card, InterruptKind::MsiX)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    claim(
        vfio_interrupts(&lab.host, &card.device().address)?.is_empty(),
        || "the host still takes interrupts for a guest that is gone".to_owned(),
    )?;
    Ok(card.release()?)
}

fn drive(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Disk)?;
    let mut spec = spec(lab, by, &[&ram(lab)], &[&card]);
    spec.arguments.extend(load_disk());
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&super::DRIVERS)?;
    is_driven(&mut guest, Card::Disk)?;
    keeps_blocks(&mut guest, "/dev/nvme0n1", 32 * MIB, 3)?;
    guest.modprobe(&["crc32c_generic", "ext4"])?;
    let sums = guest.sh(
        "mkdir -p /mnt && mkfs.ext4 -q -F /dev/nvme0n1 && mount -t ext4 /dev/nvme0n1 /mnt && \
         dd if=/dev/urandom of=/mnt/data bs=1M count=32 && md5sum < /mnt/data && \
         umount /mnt && echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 /dev/nvme0n1 /mnt && md5sum < /mnt/data",
    )?;
    let sums: Vec<&str> = sums.lines().collect();
    claim(sums.len() == 2 && sums[0] == sums[1], || {
        format!("the file's sums before and after a mount anew: {sums:?}")
    })?;
    guest.mount_load()?;
    let told = guest.fio(FIO_VERIFIES)?;
    claim(told.contains("err= 0"), || told.clone())?;
    guest.sh("rm /load/mnt/verify.0.0")?;
    interrupts_arrive(lab, &mut guest, &card, InterruptKind::MsiX)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    // What the first guest has left is there for the next one.
    let mut guest = boot(lab, by, &[&card])?;
    guest.await_path("/dev/nvme0n1")?;
    guest.modprobe(&["crc32c_generic", "ext4"])?;
    let sum = guest.sh(
        "mkdir -p /mnt && mount -t ext4 /dev/nvme0n1 /mnt && md5sum < /mnt/data && umount /mnt",
    )?;
    claim(sum.trim() == sums[0], || {
        format!("the next guest reads {sum}, the first one wrote {sums:?}")
    })?;
    power_off(guest)?;
    Ok(card.release()?)
}

/// The drive writes where the file lies: on the host's second dax device, which is no RAM of the guest's.
fn drive_into_pmem(lab: &mut Lab, by: By) -> Result<(), TestError> {
    const BYTES: u64 = 32 * MIB;
    let card = lab.host.bind_vfio(Card::Disk)?;
    let mut spec = spec(lab, by, &[&ram(lab)], &[&card]);
    let pmem = format!("file={},size=1G,id=p0", lab.host.dax()[1].path);
    spec.arguments.extend(["--pmem".to_owned(), pmem]);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe_pmem()?;
    guest.modprobe(&["nvme"])?;
    guest.await_path("/dev/pmem0")?;
    keeps_blocks(&mut guest, "/dev/nvme0n1", BYTES, 11)?;
    guest.sh(
        "mkdir -p /mnt && mkfs.ext4 -q -F -b 4096 /dev/pmem0 && mount -t ext4 -o dax /dev/pmem0 /mnt && \
         dd if=/dev/zero of=/mnt/file bs=1M count=32 && sync",
    )?;
    let mapped = guest.read_into_mapping("/dev/nvme0n1", BYTES, "/mnt/file", 11)?;
    claim(mapped.wrong_words == 0 && mapped.words == BYTES / 8, || {
        format!("what the drive has written into mapped pmem: {mapped:?}")
    })?;
    let file = guest.compare_blocks("/mnt/file", 0, BYTES, 11)?;
    claim(file.wrong_words == 0, || {
        format!("the file on pmem is not what the drive has written: {file:?}")
    })?;
    // And the other way: the drive reads from pmem.
    guest.sh("dd if=/mnt/file of=/dev/nvme0n1 bs=1M seek=64 oflag=direct && sync")?;
    let sums = guest.sh(
        "echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/file; dd if=/dev/nvme0n1 bs=1M skip=64 count=32 2>/dev/null | md5sum",
    )?;
    let sums: Vec<&str> = sums.lines().collect();
    claim(sums.len() == 2 && sums[0] == sums[1], || {
        format!("pmem and what the drive has read from it: {sums:?}")
    })?;
    guest.sh("umount /mnt")?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    Ok(card.release()?)
}

fn several_at_once(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let network = lab.host.bind_vfio(Card::Network)?;
    let first = lab.host.bind_vfio(Card::Disk)?;
    let second = lab.host.bind_vfio(Card::SecondDisk)?;
    let mut guest = boot(lab, by, &[&first, &second, &network])?;
    let drives = functions(&mut guest, Card::Disk)?;
    claim(drives.len() == 2, || {
        format!("expected two drives: {drives:?}")
    })?;
    for path in ["/dev/nvme0n1", "/dev/nvme1n1"] {
        guest.await_path(path)?;
    }
    // Each is told from the other by what it says of itself, in the order of the command line.
    for (drive, card) in drives.iter().zip([&first, &second]) {
        let serial = guest.sh(&format!(
            "cat /sys/bus/pci/devices/{}/nvme/nvme*/serial",
            drive.address
        ))?;
        claim(serial.trim() == card.device().card.id(), || {
            format!(
                "{} has the serial number {serial}, expected {card:?}",
                drive.address
            )
        })?;
    }
    // Drives copy in the background while the network is busy.
    guest.fill_blocks("/dev/nvme0n1", 0, 16 * MIB, 21)?;
    guest.sh(
        "( dd if=/dev/nvme0n1 of=/dev/nvme1n1 bs=1M count=16 iflag=direct oflag=direct && echo done > /tmp/copied ) \
         > /tmp/log 2>&1 &",
    )?;
    carries_data(&mut guest, 2 * MIB)?;
    guest.await_path("/tmp/copied")?;
    let copy = guest.compare_blocks("/dev/nvme1n1", 0, 16 * MIB, 21)?;
    claim(copy.wrong_words == 0, || {
        format!("the copy is not the original: {copy:?}")
    })?;
    interrupts_arrive(lab, &mut guest, &network, InterruptKind::MsiX)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    for card in [network, first, second] {
        card.release()?;
    }
    Ok(())
}

/// Level interrupts: each comes once, and the next one only after it was acknowledged.
fn interrupts_by_wire(lab: &mut Lab, by: By) -> Result<(), TestError> {
    const COUNT: u32 = 50;
    let card = lab.host.bind_vfio(Card::Edu)?;
    let mut guest = Guest::boot(&lab.host, &spec(lab, by, &[&ram(lab)], &[&card]))?;
    guest.modprobe(&["uio_pci_generic"])?;
    let address = function(&mut guest, Card::Edu)?.address;
    for _ in 0..2 {
        let report = guest.edu_interrupts(&address, COUNT)?;
        claim(
            report.interrupts == u64::from(COUNT) + 1 && report.factorial == 3_628_800,
            || format!("{report:?}"),
        )?;
    }
    let seen = guest.interrupts(&address)?;
    let least = 2 * (u64::from(COUNT) + 1);
    claim(
        seen.kind == InterruptKind::IntX && seen.count >= least,
        || format!("{least} interrupts were raised by wire, the guest's kernel counts {seen:?}"),
    )?;
    interrupts_arrive(lab, &mut guest, &card, InterruptKind::IntX)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    Ok(card.release()?)
}

/// Many of them, by a driver of the kernel's that takes the wire although there are messages to be had. (By one message, MSI
/// without X, the emulated card fails its driver's own test on the host as well: `controller_without_msix` is for that.)
fn network_card_by_wire(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Network)?;
    let mut spec = spec(lab, by, &[&ram(lab)], &[&card]);
    "e1000e.IntMode=0".clone_into(&mut spec.cmdline);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&["e1000e"])?;
    carries_data(&mut guest, 4 * MIB)?;
    interrupts_arrive(lab, &mut guest, &card, InterruptKind::IntX)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    Ok(card.release()?)
}

/// A device that has nothing better, that can't be reset by itself, and whose group has functions that nobody drives.
fn controller_without_msix(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Sata)?;
    // The second guest finds it as the first one has left it.
    for seed in [61, 62] {
        let mut guest = boot(lab, by, &[&card])?;
        guest.modprobe(&["ahci", "sd_mod"])?;
        is_driven(&mut guest, Card::Sata)?;
        keeps_blocks(&mut guest, "/dev/sda", 8 * MIB, seed)?;
        interrupts_arrive(lab, &mut guest, &card, InterruptKind::Msi)?;
        no_complaints(&mut guest)?;
        let said = guest.vmm().stderr();
        claim(said.contains("can't be reset"), || {
            format!("the VMM should say that the controller can't be reset: {said}")
        })?;
        power_off(guest)?;
    }
    Ok(card.release()?)
}

/// The host's administrator takes the means to reset it away while a guest has it: the guest goes on, and somebody is told.
fn reset_that_fails(lab: &mut Lab, by: By) -> Result<(), TestError> {
    const FAILED: &str = "could not be reset";
    let card = lab.host.bind_vfio(Card::Disk)?;
    let mut guest = boot(lab, by, &[&card])?;
    keeps_blocks(&mut guest, "/dev/nvme0n1", MIB, 33)?;
    let methods = format!("{}/reset_method", card.path());
    let before = lab.host.read_text(&methods)?;
    lab.host.sh(&format!("echo > {methods}"))?;
    let said = guest.vmm().stderr();
    claim(!before.is_empty() && !said.contains(FAILED), || {
        format!("with the reset methods {before:?}, it should be reset: {said}")
    })?;
    guest.leave("reboot")?;
    guest.wait_ready()?;
    guest.modprobe(&super::DRIVERS)?;
    guest.await_path("/dev/nvme0n1")?;
    let report = guest.compare_blocks("/dev/nvme0n1", 0, MIB, 33)?;
    claim(report.wrong_words == 0, || {
        format!("the drive has lost what it was given: {report:?}")
    })?;
    let said = guest.vmm().stderr();
    claim(said.contains(FAILED), || {
        format!("nobody was told that the reset has failed: {said}")
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    lab.host.sh(&format!("echo default > {methods}"))?;
    let after = lab.host.read_text(&methods)?;
    claim(after == before, || {
        format!("the reset methods were {before:?}, they are {after:?}")
    })?;
    Ok(card.release()?)
}

fn reboots(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let disk = lab.host.bind_vfio(Card::Disk)?;
    let network = lab.host.bind_vfio(Card::Network)?;
    let mut guest = boot(lab, by, &[&disk, &network])?;
    keeps_blocks(&mut guest, "/dev/nvme0n1", 4 * MIB, 31)?;
    let rounds = if lab.full { 20 } else { 2 };
    for round in 0..rounds {
        carries_data(&mut guest, MIB)?;
        guest.leave("reboot")?;
        guest.wait_ready()?;
        guest.modprobe(&super::DRIVERS)?;
        guest.await_path("/dev/nvme0n1")?;
        let report = guest.compare_blocks("/dev/nvme0n1", 0, 4 * MIB, 31)?;
        claim(report.wrong_words == 0, || {
            format!("round {round}: the drive has lost what it was given: {report:?}")
        })?;
        no_complaints(&mut guest)?;
    }
    carries_data(&mut guest, MIB)?;
    for binding in [&disk, &network] {
        interrupts_arrive(lab, &mut guest, binding, InterruptKind::MsiX)?;
    }
    power_off(guest)?;
    disk.release()?;
    Ok(network.release()?)
}
