//! Persistent memory of the guest: device-dax and files behind virtio-pmem.

use super::support::{
    GIB, LAB_USER, MIB, VirtioKind, boot_on, dax_zone, kvm_pages, no_complaints, open_to_all,
    power_off, refused, refused_as, scratch, spec_with,
};
use super::{GuestTest, Lab, TestError, claim, pci};
use crate::bench::removal::scene::NO_LATE_ZEROS;
use crate::guest::{Guest, GuestSpec};
use crate::share::Initramfs;
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "pmem_is_a_dax_device_with_its_size_and_its_large_entries",
        run: pmem_is_a_dax_device_with_its_size_and_its_large_entries,
    },
    GuestTest {
        name: "file_systems_on_pmem_are_found_by_the_next_guest",
        run: file_systems_on_pmem_are_found_by_the_next_guest,
    },
    GuestTest {
        name: "pmem_on_files_is_written_or_forgotten_as_asked",
        run: pmem_on_files_is_written_or_forgotten_as_asked,
    },
    GuestTest {
        name: "bad_pmem_backings_are_refused",
        run: bad_pmem_backings_are_refused,
    },
];

const MODULES: [&str; 3] = ["virtio_pci", "virtio_pmem", "nd_pmem"];

/// A guest with file systems and these devices, up, its pmem drivers loaded and its first pmem there.
pub(super) fn boot_with_pmem(lab: &Lab, devices: &[&str]) -> Result<Guest, TestError> {
    boot_spec_with_pmem(lab, spec_with(lab, devices))
}

/// As [`boot_with_pmem`], with more said of the guest.
pub(super) fn boot_spec_with_pmem(lab: &Lab, mut spec: GuestSpec) -> Result<Guest, TestError> {
    spec.initramfs = Initramfs::Tools;
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&MODULES)?;
    guest.await_path("/dev/pmem0")?;
    guest.modprobe(&["crc32c_generic", "ext4", "xfs"])?;
    guest.sh("mkdir -p /mnt")?;
    Ok(guest)
}

/// Makes a file system on `/dev/pmem0` as the story `kind` wants it: `ext4`, `ext4-dax`, `xfs` or `xfs-dax`.
pub(super) fn make_file_system(guest: &mut Guest, kind: &str) -> Result<(), TestError> {
    let make = if kind.starts_with("ext4") {
        format!("mkfs.ext4 -q -F -b 4096 -E {NO_LATE_ZEROS} /dev/pmem0")
    } else {
        // 6.1 does not have shared blocks and dax together on every device.
        "mkfs.xfs -q -f -m reflink=0 /dev/pmem0".to_owned()
    };
    guest.sh(&make)?;
    Ok(())
}

/// Mounts it on `/mnt`.
pub(super) fn mount_file_system(guest: &mut Guest, kind: &str) -> Result<(), TestError> {
    let (system, options) = match kind.split_once('-') {
        Some((system, option)) => (system, format!("-o {option}")),
        None => (kind, String::new()),
    };
    guest.sh(&format!("mount -t {system} {options} /dev/pmem0 /mnt"))?;
    let mounts = guest.cat("/proc/mounts")?;
    let line = mounts.lines().find(|line| line.contains(" /mnt "));
    let dax = line.is_some_and(|line| line.contains("dax"));
    claim(dax == kind.ends_with("-dax"), || {
        format!("{kind} is mounted as {line:?}")
    })
}

/// Guest-physical addresses of the persistent memory regions, in the order of their numbers.
pub(super) fn regions(guest: &mut Guest) -> Result<Vec<u64>, TestError> {
    let text = guest.sh("cat /sys/bus/nd/devices/region*/resource")?;
    let parse = |line: &str| u64::from_str_radix(line.trim().strip_prefix("0x")?, 16).ok();
    Ok(text.lines().filter_map(parse).collect())
}

fn sectors(guest: &mut Guest, name: &str) -> Result<u64, TestError> {
    let text = guest.cat(&format!("/sys/block/{name}/size"))?;
    Ok(text.trim().parse().unwrap_or_default())
}

fn pmem_is_a_dax_device_with_its_size_and_its_large_entries(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let devices = lab.host.dax().to_vec();
    let whole = format!("file={},id=p0", devices[1].path);
    let giant = format!("file={},size=1G,id=p1", devices[2].path);
    let mut guest = boot_with_pmem(lab, &["--pmem", &whole, &giant])?;
    guest.await_path("/dev/pmem1")?;
    let mut found = [sectors(&mut guest, "pmem0")?, sectors(&mut guest, "pmem1")?].map(|n| n * 512);
    found.sort_unstable();
    claim(found == [GIB, devices[1].size_bytes], || {
        format!(
            "expected 1 GiB and {} bytes, the guest sees {found:?}",
            devices[1].size_bytes
        )
    })?;
    let regions = regions(&mut guest)?;
    claim(
        regions.len() == 2
            && regions.iter().all(|at| at.is_multiple_of(2 * MIB))
            && regions.iter().any(|at| at.is_multiple_of(GIB)),
        || {
            format!(
                "expected one region at a multiple of 2M and one at a multiple of 1G: {regions:x?}"
            )
        },
    )?;
    // Touch both from end to end, so that the entries are there to be counted.
    guest.sh("for p in /dev/pmem0 /dev/pmem1; do dd if=$p of=/dev/null bs=1M count=512; done")?;
    let pages = kvm_pages(lab, &mut guest)?;
    claim(
        pages.pages_4k == 0 && pages.pages_2m >= 256 && pages.pages_1g >= 1,
        || {
            format!(
                "512 MiB of 2M-aligned and of 1G-aligned pmem should take entries of 2M and 1G: {pages:?}"
            )
        },
    )?;
    let functions = super::support::virtio_functions(&mut guest, VirtioKind::Pmem)?;
    claim(
        functions.len() == 2 && functions.iter().all(|function| function.driver.is_some()),
        || format!("{functions:?}"),
    )?;
    no_complaints(&mut guest)?;
    power_off(guest)
}

fn file_systems_on_pmem_are_found_by_the_next_guest(lab: &mut Lab) -> Result<(), TestError> {
    let path = lab.host.dax()[1].path.clone();
    let word = format!("file={path},size=1G,id=p0");
    // Each guest looks for what the one before has left, then makes the next file system.
    let mut left: Option<&str> = None;
    for kind in ["ext4-dax", "xfs-dax"].map(Some).into_iter().chain([None]) {
        let mut guest = boot_with_pmem(lab, &["--pmem", &word])?;
        if let Some(kind) = left {
            mount_file_system(&mut guest, kind)?;
            let found =
                guest.sh("cat /mnt/directory/name && md5sum /mnt/data /mnt/directory/copy")?;
            let sums: Vec<&str> = found
                .lines()
                .skip(1)
                .filter_map(|line| line.split_whitespace().next())
                .collect();
            claim(
                found.starts_with(kind) && sums.len() == 2 && sums[0] == sums[1],
                || format!("what the guest before has written to {kind}: {found}"),
            )?;
            guest.sh("umount /mnt")?;
        }
        if let Some(kind) = kind {
            make_file_system(&mut guest, kind)?;
            mount_file_system(&mut guest, kind)?;
            guest.sh(&format!(
                "mkdir /mnt/directory && echo {kind} > /mnt/directory/name && \
                 dd if=/dev/urandom of=/mnt/data bs=1M count=8 && cp /mnt/data /mnt/directory/copy && umount /mnt"
            ))?;
        }
        no_complaints(&mut guest)?;
        power_off(guest)?;
        left = kind;
    }
    Ok(())
}

fn pmem_on_files_is_written_or_forgotten_as_asked(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let (kept, forgotten) = (format!("{SCRATCH}/kept"), format!("{SCRATCH}/forgotten"));
    for file in [&kept, &forgotten] {
        lab.host
            .sh(&format!("truncate -s 128M {file} && echo before > {file}.text && dd if={file}.text of={file} conv=notrunc"))?;
    }
    let words = [
        format!("file={kept},id=kept"),
        format!("file={forgotten},id=forgotten,discard_writes=on"),
    ];
    let mut guest = boot_with_pmem(lab, &["--pmem", &words[0], &words[1]])?;
    guest.await_path("/dev/pmem1")?;
    for device in ["/dev/pmem0", "/dev/pmem1"] {
        let text = guest.sh(&format!("head -n 1 {device}"))?;
        claim(text.trim() == "before", || {
            format!("{device} starts with {text:?}")
        })?;
        guest.sh(&format!(
            "echo after > /tmp/text && dd if=/tmp/text of={device} conv=notrunc,fsync && sync"
        ))?;
        let text = guest.sh(&format!(
            "dd if={device} bs=512 count=1 2>/dev/null | head -n 1"
        ))?;
        claim(text.trim() == "after", || {
            format!("{device} reads back {text:?}")
        })?;
    }
    no_complaints(&mut guest)?;
    // What has been flushed is in the file, before the VMM's end and after.
    let expect = |file: &str, expected: &str| {
        let text = lab.host.sh(&format!("head -n 1 {file}"))?;
        claim(text.trim() == expected, || {
            format!("{file} should start with {expected:?}: {text:?}")
        })
    };
    expect(&kept, "after")?;
    power_off(guest)?;
    expect(&kept, "after")?;
    expect(&forgotten, "before")
}

fn bad_pmem_backings_are_refused(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let dax = lab.host.dax()[1].clone();
    let path = &dax.path;
    let zone = dax_zone(lab, "z0", 0, 256 * MIB, 0);
    let with = |word: &str, status: i32, said: &[&str]| {
        refused(lab, &["--memory-zone", &zone, "--pmem", word], status, said)
    };
    let file = |name: &str| format!("{SCRATCH}/{name}");
    lab.host.sh(&format!(
        "cd {SCRATCH} && : > empty && truncate -s 3000000 odd && truncate -s 128M good && mkdir directory"
    ))?;
    with("id=p0", 2, &["--pmem", "file"])?;
    with(
        "file=/nonexistent,id=p0",
        1,
        &["p0", "/nonexistent", "does not exist"],
    )?;
    with(
        &format!("file={},id=p0", file("empty")),
        1,
        &["p0", &file("empty")],
    )?;
    with(
        &format!("file={},id=p0", file("odd")),
        1,
        &["p0", &file("odd"), "multiple"],
    )?;
    with(
        &format!("file={},id=p0", file("directory")),
        1,
        &["p0", "directory"],
    )?;
    with(
        &format!("file={},size=256M,id=p0", file("good")),
        1,
        &["p0", "past the end"],
    )?;
    with(&format!("file={path},size=0,id=p0"), 2, &["size=0"])?;
    with(
        &format!("file={path},size=1M,id=p0"),
        1,
        &["p0", "multiple"],
    )?;
    with(
        &format!("file={path},offset=1M,id=p0"),
        1,
        &["p0", "multiple"],
    )?;
    with(
        &format!("file={path},size=64G,id=p0"),
        1,
        &["p0", path, "does not fit"],
    )?;
    with(
        &format!("file={path},discard_writes=on,id=p0"),
        1,
        &["p0", "discard_writes"],
    )?;

    // A guest's RAM or another pmem on the same bytes.
    let ram = dax_zone(lab, "z1", 1, 512 * MIB, 0);
    let busy = format!("file={path},size=512M,id=p0");
    refused(
        lab,
        &["--memory-zone", &zone, &ram, "--pmem", &busy],
        2,
        &["p0", "z1", path],
    )?;
    let mut holder = boot_on(lab, &[&ram])?;
    let pid = holder.vmm().pid().to_string();
    with(&busy, 1, &["p0", "in use", "daxhund", &pid])?;
    power_off(holder)?;

    // A user who may not write.
    let word = format!("file={},id=p0", file("good"));
    let spec = GuestSpec::new(
        &lab.kernel.release,
        &["--memory-zone", &zone, "--pmem", &word],
    );
    let argv = spec.argv();
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    open_to_all(lab, &["/dev/kvm", &lab.host.dax()[0].path], || {
        refused_as(lab, &argv, Some(LAB_USER), 1, &["p0", &file("good")])
    })
}

/// Pmem added to a running guest is used like any other.
pub(super) fn is_usable(guest: &mut Guest, name: &str) -> Result<(), TestError> {
    guest.await_path(&format!("/dev/{name}"))?;
    pci::is_driven(guest, VirtioKind::Pmem)?;
    guest.fill_blocks(&format!("/dev/{name}"), 0, 4 * MIB, 5)?;
    let report = guest.compare_blocks(&format!("/dev/{name}"), 0, 4 * MIB, 5)?;
    claim(report.wrong_words == 0 && report.words == MIB / 2, || {
        format!("{name} does not read back as written: {report:?}")
    })
}
