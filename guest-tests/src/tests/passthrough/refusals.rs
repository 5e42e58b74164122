//! Devices that cannot be passed through: each is refused with its reason, and nothing is left behind.

use lab_agent::guest_protocol::Transfer;

use super::super::support::{
    LAB_USER, MIB, initramfs, open_to_all, power_off, refused, refused_as,
};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{By, boot, function, ram, spec, word};
use crate::guest::Guest;
use crate::host::account::DmaWatch;
use crate::host::cards::Card;
use crate::share::{ImageForm, kernel_path};

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_of_what_is_no_free_device_is_refused",
        run: |lab| no_free_device(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_of_a_device_in_use_is_refused_and_harms_nobody",
        run: |lab| in_use(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_without_rights_is_refused",
        run: without_rights,
    },
    GuestTest {
        name: "passthrough_beyond_the_limit_of_locked_memory_is_refused",
        run: |lab| beyond_the_limit(lab, By::Groups),
    },
];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_of_what_is_no_free_device_is_refused_by_iommufd",
        run: |lab| no_free_device(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_of_a_device_in_use_is_refused_and_harms_nobody_by_iommufd",
        run: |lab| in_use(lab, By::Iommufd),
    },
];

/// A page of the guest's that its kernel leaves alone, and another one.
const HOME: u64 = 256 * MIB;
const TARGET: &str = "0x11000000";

/// The whole command line of a guest that is not to come up.
fn argv(lab: &Lab, by: By, zone: &str, device: &str) -> Vec<String> {
    let mut spec = spec(lab, by, &[zone], &[]);
    spec.arguments
        .extend(["--device".to_owned(), device.to_owned()]);
    spec.argv()
}

fn no_free_device(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let zone = ram(lab);
    let with = |device: &str, status: i32, said: &[&str]| {
        let argv = argv(lab, by, &zone, device);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        refused_as(lab, &argv, None, status, said)
    };
    refused(
        lab,
        &["--memory-zone", &zone, "--device", "id=d0"],
        2,
        &["--device", "path"],
    )?;
    let nowhere = "/sys/bus/pci/devices/0000:99:00.0";
    with(
        &format!("path={nowhere},id=d0"),
        1,
        &[nowhere, "does not exist", "lspci"],
    )?;
    let dax = format!("/sys/bus/dax/devices/{}", lab.host.dax()[0].name);
    with(
        &format!("path={dax},id=d0"),
        1,
        &[&dax, "not a PCI function"],
    )?;
    with("path=/tmp,id=d0", 1, &["/tmp", "not a PCI function"])?;
    let bridge = Card::Disk.root_address();
    with(
        &format!("path=/sys/bus/pci/devices/{bridge},id=d0"),
        1,
        &[&bridge, "bridge"],
    )?;

    // Nobody has it; the host has it. Both say what would give it to VFIO.
    let edu = lab.host.pci_device(Card::Edu)?;
    let commands = ["driver_override", "drivers_probe", "vfio-pci"];
    let no_driver = [&[edu.address.as_str(), "no driver"][..], &commands].concat();
    with(&format!("path={},id=d0", edu.path()), 1, &no_driver)?;
    let loaded = lab.host.pci_device(Card::Network)?.driver.is_some();
    if !loaded {
        lab.host.check(&["modprobe", "e1000e"])?;
    }
    let network = lab.host.pci_device(Card::Network)?;
    let host_driver = [
        &[network.address.as_str(), "e1000e", "unbind"][..],
        &commands,
    ]
    .concat();
    let outcome = with(&format!("path={},id=d0", network.path()), 1, &host_driver);
    if !loaded {
        lab.host.check(&["modprobe", "-r", "e1000e"])?;
    }
    outcome?;

    // The same device twice.
    let card = lab.host.bind_vfio(Card::Edu)?;
    let path = card.path();
    let mut twice = spec(lab, by, &[&zone], &[]);
    let words = [format!("path={path},id=d0"), format!("path={path},id=d1")];
    twice.arguments.push("--device".to_owned());
    twice.arguments.extend(words);
    let argv = twice.argv();
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let output = lab.host.run(&argv)?;
    claim(
        !output.status.success() && output.stderr.contains("d1"),
        || format!("one device as d0 and d1: {output:?}"),
    )?;
    Ok(card.release()?)
}

fn in_use(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Edu)?;
    let mut spec = spec(lab, by, &[&ram(lab)], &[&card]);
    spec.cmdline = format!("memmap=4K${HOME:#x} memmap=4K${TARGET}");
    let mut guest = Guest::boot(&lab.host, &spec)?;
    let address = function(&mut guest, Card::Edu)?.address;
    let reaches = |guest: &mut Guest| {
        let reports = guest.edu_dma(&address, HOME, &[TARGET])?;
        claim(
            reports.iter().all(|report| {
                (report.written, report.read) == (Transfer::Arrived, Transfer::Arrived)
            }),
            || format!("{reports:?}"),
        )
    };
    reaches(&mut guest)?;
    let pid = guest.vmm().pid().to_string();
    let other = super::super::support::dax_zone(lab, "z1", 1, 512 * MIB, 0);
    let argv = argv(lab, by, &other, &word(&card));
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    refused_as(lab, &argv, None, 1, &["in use", "daxhund", &pid])?;
    // The guest that has it notices nothing.
    reaches(&mut guest)?;
    power_off(guest)?;
    // And when that has gone, the device is free.
    power_off(boot(lab, by, &[&card])?)?;
    Ok(card.release()?)
}

/// Files that every VMM needs, open to all; the group's own is not.
fn without_rights(lab: &mut Lab) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Edu)?;
    let argv = argv(lab, By::Groups, &ram(lab), &word(&card));
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let (dax, group) = (lab.host.dax()[0].path.clone(), card.group_file());
    open_to_all(lab, &["/dev/kvm", &dax], || {
        refused_as(
            lab,
            &argv,
            Some(LAB_USER),
            1,
            &[&group, "no permission", "uid 1000", "chmod", "udev"],
        )
    })?;
    Ok(card.release()?)
}

/// A user's plain memory counts against the user's limit, and device-dax against nobody's.
fn beyond_the_limit(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Edu)?;
    let watch = DmaWatch::begin(&lab.host)?;
    let kernel = kernel_path(&lab.kernel.release, ImageForm::Elf);
    let script = format!(
        "ulimit -l 1024; exec daxhund --kernel {kernel} --initramfs {} --serial null --memory-zone id=z0,size=512M --device {}",
        initramfs(lab),
        word(&card)
    );
    let (dax, group) = (lab.host.dax()[0].path.clone(), card.group_file());
    open_to_all(lab, &["/dev/kvm", &dax, &group], || {
        refused_as(
            lab,
            &["sh", "-c", &script],
            Some(LAB_USER),
            1,
            &["z0", "can't be pinned", "RLIMIT_MEMLOCK", "ulimit -l"],
        )?;
        let maps = watch.read()?;
        claim(maps.live_bytes() == 0, || {
            format!("the refused guest has left mappings behind: {maps:?}")
        })?;
        // The same user, with RAM on device-dax.
        let mut spec = spec(lab, by, &[&ram(lab)], &[&card]);
        spec.uid = Some(LAB_USER);
        power_off(Guest::boot(&lab.host, &spec)?)
    })?;
    watch.end()?;
    Ok(card.release()?)
}
