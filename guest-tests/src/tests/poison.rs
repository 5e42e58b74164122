//! Memory of the host goes bad under a guest. Nothing is really broken: the host's kernel is told so, and does what it does
//! when the hardware tells it.
//!
//! What the host does with a page of device-dax that somebody else finds bad: the entry of the page table is taken away, one
//! thread of each process that has it there gets `BUS_MCEERR_AO`, and the next touch has the page again as if nothing
//! had been. So it is daxhund alone that answers here, whereas for anonymous memory each touch is a signal by KVM.

use super::pmem::{make_file_system, mount_file_system, regions};
use super::removal::{KILLED_BY_SIGBUS, WORD, bind, boot_on_pmem, is_well, told, unbind};
use super::support::{GIB, MIB, dax_zone, eventually, power_off, ram_ranges, scratch, spec_on};
use super::{GuestTest, Lab, TestError, claim, remote::Remote};
use crate::guest::Guest;
use crate::host::DaxDevice;
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "poison_in_pmem_ends_the_programs_that_load_it_and_nothing_else",
        run: poison_in_pmem_ends_the_programs_that_load_it_and_nothing_else,
    },
    GuestTest {
        name: "poison_in_ram_that_a_program_loads_ends_the_program",
        run: poison_in_ram_that_a_program_loads_ends_the_program,
    },
    GuestTest {
        name: "poison_in_ram_that_nobody_touched_is_told_and_kept_from_the_next_guest",
        run: poison_in_ram_that_nobody_touched_is_told_and_kept_from_the_next_guest,
    },
];

const PAGE: u64 = 4096;
/// Where the programs load: with 2M of the file on either side, so that all that is poisoned is the file's.
const OFFSET: u64 = 4 * MIB;

/// The host's memory goes bad at a physical address, as a scrubber would find it.
fn poison(lab: &Lab, physical: u64) -> Result<(), TestError> {
    let place = "/sys/devices/system/memory/hard_offline_page";
    lab.host.sh(&format!("echo {physical:#x} > {place}"))?;
    Ok(())
}

/// Runs a story that leaves pages of a device marked as bad: with the driver's page structures that goes.
fn with_device_mended<T>(
    lab: &Lab,
    dax: &DaxDevice,
    story: impl FnOnce() -> Result<T, TestError>,
) -> Result<T, TestError> {
    let outcome = story();
    let gone = unbind(lab, &dax.name)?;
    claim(gone.status.success(), || {
        format!("{} is still in use: {gone:?}", dax.name)
    })?;
    bind(lab, &dax.name)?;
    outcome
}

/// Where a device's memory begins in the host's physical space.
fn resource(lab: &Lab, dax: &DaxDevice) -> Result<u64, TestError> {
    let path = format!("/sys/bus/dax/devices/{}/resource", dax.name);
    number(&lab.host.read_text(&path)?)
}

fn number(text: &str) -> Result<u64, TestError> {
    let text = text.trim();
    let hex = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(hex, 16)
        .map_err(|_| TestError::Claim(format!("not a hexadecimal number: {text:?}")))
}

/// A program of the guest's that loads a word of a file again and again.
struct Program {
    name: &'static str,
}

impl Program {
    fn start(
        guest: &mut Guest,
        name: &'static str,
        file: &str,
        offset: u64,
    ) -> Result<Self, TestError> {
        guest.sh(&format!(
            "rm -f /tmp/{name}.ended; : > /tmp/{name}; (/init loads {file} {WORD} {offset} > /tmp/{name} 2>&1; echo $? > /tmp/{name}.ended) \
             < /dev/null > /dev/null 2>&1 &"
        ))?;
        Ok(Self { name })
    }

    /// The guest-physical address that it loads from.
    fn place(&self, guest: &mut Guest) -> Result<u64, TestError> {
        let path = format!("/tmp/{}", self.name);
        let mut said = String::new();
        eventually("the guest's program loads", || {
            said = guest.cat(&path)?;
            Ok(said.ends_with('\n'))
        })?;
        let place = number(said.strip_prefix("loading ").unwrap_or(&said))?;
        claim(place != 0, || {
            "the guest's kernel tells no place".to_owned()
        })?;
        Ok(place)
    }

    /// It got SIGBUS.
    fn is_killed(&self, guest: &mut Guest) -> Result<String, TestError> {
        let name = self.name;
        guest.await_path(&format!("/tmp/{name}.ended"))?;
        let ended = guest.cat(&format!("/tmp/{name}.ended"))?;
        let said = guest.cat(&format!("/tmp/{name}"))?;
        claim(ended.trim() == KILLED_BY_SIGBUS, || {
            format!("the program {name} ended with {ended} and said {said}")
        })?;
        Ok(said)
    }

    /// It loads, from its first load on.
    fn goes_on(&self, guest: &mut Guest) -> Result<(), TestError> {
        let name = self.name;
        guest.sh(&format!("test ! -e /tmp/{name}.ended"))?;
        Ok(())
    }
}

/// Writes the word into a file, at an offset that is a multiple of a page.
fn write_word(guest: &mut Guest, file: &str, offset: u64) -> Result<(), TestError> {
    let escapes = WORD.to_le_bytes().map(|byte| format!("\\x{byte:02x}"));
    guest.sh(&format!(
        "printf '{}' | dd of={file} bs={PAGE} seek={} conv=notrunc 2>/dev/null; sync",
        escapes.concat(),
        offset / PAGE
    ))?;
    Ok(())
}

/// `vm.info` lists one range of poison of this size, with this page if one is expected; gives its first address.
fn listed(lab: &Lab, remote: &Remote, size: u64, page: Option<u64>) -> Result<u64, TestError> {
    let info = remote.info(lab)?;
    let list = info["poison"].as_array().cloned().unwrap_or_default();
    let [one] = &list[..] else {
        return Err(TestError::Claim(format!(
            "vm.info should list one range: {list:?}"
        )));
    };
    let pages: Vec<u64> = one["pages"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(serde_json::Value::as_u64)
        .collect();
    claim(one["size"] == size && pages == Vec::from_iter(page), || {
        format!("vm.info should list {size:#x} bytes with page {page:x?}: {list:?}")
    })?;
    Ok(one["gpa"].as_u64().unwrap_or_default())
}

fn poison_in_pmem_ends_the_programs_that_load_it_and_nothing_else(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let remote = Remote::new();
    with_device_mended(lab, &dax, || {
        let mut guest = boot_on_pmem(lab, "", &["--api-socket", remote.socket()], "")?;
        make_file_system(&mut guest, "ext4-dax")?;
        mount_file_system(&mut guest, "ext4-dax")?;
        guest.sh(
            "dd if=/dev/zero of=/mnt/file bs=8M count=1 && dd if=/dev/urandom of=/mnt/rest bs=1M count=1",
        )?;
        let rest = guest.sh("md5sum /mnt/rest")?;
        write_word(&mut guest, "/mnt/file", OFFSET)?;
        let first = Program::start(&mut guest, "first", "/mnt/file", OFFSET)?;
        let page = first.place(&mut guest)? / PAGE * PAGE;
        let base = regions(&mut guest)?.first().copied().unwrap_or_default();
        claim((base..base + GIB).contains(&page), || {
            format!("the program loads at {page:#x}, not in the pmem at {base:#x}")
        })?;

        poison(lab, resource(lab, &dax)? + (page - base))?;
        told(lab, "memory-poisoned")?;
        first.is_killed(&mut guest)?;
        let gpa = listed(lab, &remote, 2 * MIB, Some(page))?;
        claim(gpa == page / (2 * MIB) * (2 * MIB), || {
            format!("{page:#x} is not in the range at {gpa:#x}")
        })?;
        // The host's kernel has forgotten by now.
        let second = Program::start(&mut guest, "second", "/mnt/file", OFFSET)?;
        let said = second.is_killed(&mut guest)?;
        claim(!said.contains("loading"), || {
            format!("the second program has loaded something: {said}")
        })?;
        // What is around it is as it was, and takes new data.
        let again = guest.sh("md5sum /mnt/rest")?;
        claim(rest == again, || {
            format!("the rest of the pmem was {rest}, is {again}")
        })?;
        guest.sh("cp /mnt/rest /mnt/more && sync && cmp /mnt/rest /mnt/more && umount /mnt")?;
        is_well(&mut guest)?;

        // Nor does another guest on the same memory get it.
        guest.leave("reboot")?;
        guest.wait_ready()?;
        guest.modprobe(&["virtio_pci", "virtio_pmem", "nd_pmem"])?;
        guest.await_path("/dev/pmem0")?;
        guest.modprobe(&["crc32c_generic", "ext4"])?;
        guest.sh("mkdir -p /mnt")?;
        mount_file_system(&mut guest, "ext4-dax")?;
        Program::start(&mut guest, "third", "/mnt/file", OFFSET)?.is_killed(&mut guest)?;
        guest.sh("umount /mnt")?;
        listed(lab, &remote, 2 * MIB, Some(page))?;
        power_off(guest)
    })
}

/// The host's physical page behind an address of a process.
fn frame(lab: &Lab, pid: u32, address: u64) -> Result<u64, TestError> {
    let entry = lab.host.sh(&format!(
        "dd if=/proc/{pid}/pagemap bs=8 skip={} count=1 2>/dev/null | xxd -p",
        address / PAGE
    ))?;
    let entry = number(&entry)?.swap_bytes();
    let frame = entry & ((1 << 55) - 1);
    claim(entry >> 63 == 1 && frame != 0, || {
        format!("no page at {address:#x}: {entry:#x}")
    })?;
    Ok(frame)
}

fn poison_in_ram_that_a_program_loads_ends_the_program(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let remote = Remote::new();
    let mut spec = spec_on(lab, &["id=z0,size=512M"]);
    let more = ["-v", "--api-socket", remote.socket()];
    spec.arguments.extend(more.map(str::to_owned));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.sh("dd if=/dev/zero of=/tmp/file bs=4096 count=1")?;
    write_word(&mut guest, "/tmp/file", 0)?;
    let program = Program::start(&mut guest, "program", "/tmp/file", 0)?;
    let page = program.place(&mut guest)? / PAGE * PAGE;
    let said = guest.vmm().stderr();
    let mapped = said
        .lines()
        .find(|line| line.contains("guest memory mapped"));
    let host = mapped.and_then(|line| line.split("host=").nth(1)?.split_whitespace().next());
    let host = number(host.unwrap_or(&said))?;
    let pid = guest.vmm().pid();
    let frame = frame(lab, pid, host + page)?;

    poison(lab, frame * PAGE)?;
    program.is_killed(&mut guest)?;
    // This page, because KVM says so, and no other.
    let gpa = listed(lab, &remote, PAGE, Some(page))?;
    claim(gpa == page, || {
        format!("the program loaded at {page:#x}, {gpa:#x} is poisoned")
    })?;
    is_well(&mut guest)?;
    power_off(guest)?;
    lab.host.sh(&format!(
        "echo {frame:#x} > /sys/kernel/debug/hwpoison/unpoison-pfn"
    ))?;
    Ok(())
}

fn poison_in_ram_that_nobody_touched_is_told_and_kept_from_the_next_guest(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let remote = Remote::new();
    with_device_mended(lab, &dax, || {
        scratch(lab)?;
        lab.host.sh(&format!("cd {SCRATCH} && : > events"))?;
        let mut spec = spec_on(lab, &[&dax_zone(lab, "z0", 1, 512 * MIB, 0)]);
        let events = format!("path={SCRATCH}/events");
        let more = ["--event-monitor", &events, "--api-socket", remote.socket()];
        spec.arguments.extend(more.map(str::to_owned));
        let mut guest = Guest::boot(&lab.host, &spec)?;
        // Large enough to reach beyond what the kernel has freed of itself: the next one loads there.
        guest.sh("dd if=/dev/zero of=/tmp/file bs=1M count=64")?;
        write_word(&mut guest, "/tmp/file", 48 * MIB)?;
        let program = Program::start(&mut guest, "program", "/tmp/file", 48 * MIB)?;
        let page = program.place(&mut guest)? / PAGE * PAGE;

        // The zone begins at 0 in both, and all of it is below the hole.
        poison(lab, resource(lab, &dax)? + page)?;
        told(lab, "memory-poisoned")?;
        let text = lab.host.read_text(&format!("{SCRATCH}/events"))?;
        claim(
            text.contains("\"touched\": \"false\"") && text.contains("\"id\": \"z0\""),
            || format!("the event does not say whose it is, and that nobody touched it: {text}"),
        )?;
        let gpa = listed(lab, &remote, 2 * MIB, None)?;
        is_well(&mut guest)?;
        program.goes_on(&mut guest)?;

        guest.leave("reboot")?;
        guest.wait_ready()?;
        let ranges = ram_ranges(&mut guest)?;
        claim(
            ranges
                .iter()
                .all(|(first, last)| *last < gpa || gpa + 2 * MIB <= *first),
            || format!("{gpa:#x} is poisoned, the guest has RAM at {ranges:x?}"),
        )?;
        is_well(&mut guest)?;
        power_off(guest)
    })
}
