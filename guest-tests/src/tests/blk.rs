//! Disks of the guest: files and a block device of the host's behind virtio-blk.

use super::support::{
    LAB_USER, MIB, dax_zone, no_complaints, open_to_all, power_off, refused, refused_as, scratch,
    spec_with,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::{Guest, GuestSpec};
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "disks_keep_what_they_are_given",
        run: disks_keep_what_they_are_given,
    },
    GuestTest {
        name: "bad_disks_are_refused",
        run: bad_disks_are_refused,
    },
];

const DISK_BYTES: u64 = 64 * MIB;
const PIECE: u64 = 2 * MIB;

fn disks_keep_what_they_are_given(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(
        "cd {SCRATCH} && truncate -s 64M file && head -c 67108864 /dev/zero | tr '\\0' r > readonly && \
         modprobe brd rd_nr=1 rd_size=65536"
    ))?;
    let outcome = use_disks(lab);
    // A kernel that has it built in keeps it.
    lab.host
        .sh("! test -e /sys/module/brd/initstate || rmmod brd")?;
    outcome
}

fn use_disks(lab: &Lab) -> Result<(), TestError> {
    let disks = [
        format!("path={SCRATCH}/file,id=d0,image_type=raw,num_queues=2,serial=first-disk"),
        format!("path={SCRATCH}/readonly,id=d1,image_type=raw,readonly=on"),
        "path=/dev/ram0,id=d2,image_type=raw,direct=on".to_owned(),
    ];
    let mut spec = spec_with(lab, &["--cpus", "boot=2", "--disk"]);
    spec.arguments.extend(disks);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&["virtio_pci", "virtio_blk"])?;
    for name in ["vda", "vdb", "vdc"] {
        guest.await_path(&format!("/dev/{name}"))?;
        let size = guest.cat(&format!("/sys/block/{name}/size"))?;
        claim(size.trim() == (DISK_BYTES / 512).to_string(), || {
            format!("{name} should have {DISK_BYTES} bytes, it has {size} sectors")
        })?;
    }
    shapes(&mut guest)?;

    // By several queues at once, in sizes that do and do not fit one segment, and flushed.
    for (seed, disk) in [(1, "/dev/vda"), (2, "/dev/vdc")] {
        guest.fill_blocks(disk, 4096, PIECE, seed)?;
        guest.fill_blocks(disk, DISK_BYTES - PIECE, PIECE, seed)?;
        for offset in [4096, DISK_BYTES - PIECE] {
            let report = guest.compare_blocks(disk, offset, PIECE, seed)?;
            claim(report.wrong_words == 0 && report.words == PIECE / 8, || {
                format!("{disk} at {offset} does not read back as written: {report:?}")
            })?;
        }
    }
    guest.sh(
        "for i in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=1M count=16 skip=$i 2>/dev/null & done; wait",
    )?;
    // What is flushed is the host's to see while the guest runs.
    guest
        .sh("echo flushed > /tmp/text && dd if=/tmp/text of=/dev/vda bs=512 conv=fsync,notrunc")?;
    let text = lab.host.sh(&format!("head -n 1 {SCRATCH}/file"))?;
    claim(text.trim() == "flushed", || {
        format!("the file starts with {text:?}")
    })?;

    readonly_stays_as_it_is(lab, &mut guest)?;
    holes_and_zeros(lab, &mut guest)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    let rest = lab
        .host
        .sh(&format!("tr -d r < {SCRATCH}/readonly | wc -c"))?;
    claim(rest.trim() == "0", || {
        "the read-only file was changed".to_owned()
    })
}

fn shapes(guest: &mut Guest) -> Result<(), TestError> {
    let queues = guest.sh("ls /sys/block/vda/mq | wc -l")?;
    claim(queues.trim() == "2", || {
        format!("num_queues=2 on two processors gives {queues} queues")
    })?;
    let serial = guest.cat("/sys/block/vda/serial")?;
    claim(serial.trim() == "first-disk", || {
        format!("the serial number is {serial:?}")
    })?;
    for (name, expected) in [("vda", "0"), ("vdb", "1"), ("vdc", "0")] {
        let found = guest.cat(&format!("/sys/block/{name}/ro"))?;
        claim(found.trim() == expected, || {
            format!("{name} says read-only: {found}")
        })?;
    }
    let cache = guest.cat("/sys/block/vda/queue/write_cache")?;
    claim(cache.trim() == "write back", || {
        format!("a disk that is flushed has a write-back cache, not {cache}")
    })
}

fn readonly_stays_as_it_is(lab: &Lab, guest: &mut Guest) -> Result<(), TestError> {
    let written = guest.try_sh("dd if=/dev/zero of=/dev/vdb bs=4096 count=1 conv=fsync,notrunc")?;
    claim(written.status != Some(0), || {
        "a read-only disk was written".to_owned()
    })?;
    let start = guest.sh("head -c 4 /dev/vdb")?;
    claim(start == "rrrr", || format!("vdb starts with {start:?}"))?;
    // Two guests may read it at once; only one may write to the other.
    let zone = dax_zone(lab, "z9", 1, 256 * MIB, 0);
    let word = format!("path={SCRATCH}/file,id=d0,image_type=raw");
    refused(
        lab,
        &["--memory-zone", &zone, "--disk", &word],
        1,
        &["d0", "in use"],
    )
}

/// Discarding makes holes in the file, zeroing makes zeros; their neighbours stay.
fn holes_and_zeros(lab: &Lab, guest: &mut Guest) -> Result<(), TestError> {
    let blocks = || -> Result<u64, TestError> {
        let text = lab.host.sh(&format!("stat -c %b {SCRATCH}/file"))?;
        Ok(text.trim().parse().unwrap_or_default())
    };
    let at = 16 * MIB;
    guest.fill_blocks("/dev/vda", at, 4 * MIB, 3)?;
    let before = blocks()?;
    guest.sh(&format!("blkdiscard -o {} -l {MIB} /dev/vda", at + MIB))?;
    let after = blocks()?;
    claim(before >= after + MIB / 512 * 9 / 10, || {
        format!("discarding 1 MiB should free its blocks: {before} before, {after} after")
    })?;
    let zeroing = guest.cat("/sys/block/vda/queue/write_zeroes_max_bytes")?;
    claim(zeroing.trim() != "0", || {
        "the disk does not offer to write zeros".to_owned()
    })?;
    guest.ask(&format!("blkzero /dev/vda {} {MIB}", at + 2 * MIB))?;
    let zeros = guest.sh(&format!(
        "dd if=/dev/vda bs=1M skip={} count=2 2>/dev/null | tr -d '\\0' | wc -c",
        at / MIB + 1
    ))?;
    claim(zeros.trim() == "0", || {
        format!("{} bytes are left where zeros should be", zeros.trim())
    })?;
    for offset in [at, at + 3 * MIB] {
        let report = guest.compare_blocks("/dev/vda", offset, MIB, 3)?;
        claim(report.wrong_words == 0, || {
            format!("the neighbour at {offset} was changed: {report:?}")
        })?;
    }
    Ok(())
}

fn bad_disks_are_refused(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(
        "cd {SCRATCH} && truncate -s 1M good && : > empty && mkdir directory && chmod 600 good"
    ))?;
    let zone = dax_zone(lab, "z0", 0, 256 * MIB, 0);
    let with = |word: &str, status: i32, said: &[&str]| {
        refused(lab, &["--memory-zone", &zone, "--disk", word], status, said)
    };
    with("id=d0", 2, &["--disk", "path"])?;
    with("path=/nonexistent,id=d0", 1, &["d0", "/nonexistent"])?;
    with(
        &format!("path={SCRATCH}/directory,id=d0"),
        1,
        &["d0", "directory"],
    )?;
    with(&format!("path={SCRATCH}/empty,id=d0"), 1, &["d0", "empty"])?;
    with("path=/dev/null,id=d0", 1, &["d0", "/dev/null"])?;
    let word = format!("path={SCRATCH}/good,id=d0");
    let spec = GuestSpec::new(
        &lab.kernel.release,
        &["--memory-zone", &zone, "--disk", &word],
    );
    let argv = spec.argv();
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    open_to_all(lab, &["/dev/kvm", &lab.host.dax()[0].path], || {
        refused_as(lab, &argv, Some(LAB_USER), 1, &["d0", "good"])
    })
}
