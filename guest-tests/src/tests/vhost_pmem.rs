//! Persistent memory that a daemon lends over vhost-user: whose it is when guests and daemons come, go and are killed, and
//! when the host takes it away.

use lab_agent::host_protocol::{ExitStatus, SpawnSpec};

use super::pmem::{boot_spec_with_pmem, boot_with_pmem, is_usable};
use super::remote::Remote;
use super::removal::{REMOVAL_DEADLINE, is_bound, is_well, unbind, with_device};
use super::support::{
    MIB, dax_zone, eventually, holds, kill, kvm_pages, no_complaints, power_off, refused, scratch,
    spec_on, spec_with,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::host::process::{Process, SIGKILL};
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "lent_pmem_is_kept_by_guest_after_guest_and_daemon_after_daemon",
        run: lent_pmem_is_kept_by_guest_after_guest_and_daemon_after_daemon,
    },
    GuestTest {
        name: "lent_pmem_comes_and_goes_and_is_the_hosts_to_take",
        run: lent_pmem_comes_and_goes_and_is_the_hosts_to_take,
    },
    GuestTest {
        name: "lent_pmem_is_read_by_two_guests_at_once_and_written_by_neither",
        run: lent_pmem_is_read_by_two_guests_at_once_and_written_by_neither,
    },
    GuestTest {
        name: "pmem_that_can_t_be_lent_is_refused",
        run: pmem_that_can_t_be_lent_is_refused,
    },
];

const DAEMON: &str = "daxhund-vhost-user-pmem";
const SIZE: u64 = 512 * MIB;
const PIECE: u64 = 2 * MIB;
const SIGTERM: i32 = 15;

fn socket() -> String {
    format!("{SCRATCH}/pmem.sock")
}

/// For a guest that is lent what is at the socket.
pub(super) fn word(id: &str) -> String {
    format!("socket={},id={id}", socket())
}

fn spawn(lab: &Lab, memory: &[&str]) -> Result<Process, TestError> {
    let socket = socket();
    let words = [&[DAEMON, "--socket-path", &socket][..], memory].concat();
    Ok(lab.host.spawn(SpawnSpec {
        argv: words.iter().map(|word| (*word).to_owned()).collect(),
        ..SpawnSpec::default()
    })?)
}

pub(super) fn lend(lab: &Lab, memory: &[&str]) -> Result<Process, TestError> {
    let daemon = spawn(lab, memory)?;
    daemon.wait_for_error("listening", REMOVAL_DEADLINE)?;
    Ok(daemon)
}

/// One that refuses to start, and says each of these.
fn does_not_lend(lab: &Lab, memory: &[&str], says: &[&str]) -> Result<(), TestError> {
    let output = spawn(lab, memory)?.finish(REMOVAL_DEADLINE)?;
    claim(
        output.status == ExitStatus::Code(1)
            && says.iter().all(|word| output.stderr.contains(word)),
        || format!("{memory:?}: expected {says:?}: {output:?}"),
    )
}

fn end(daemon: Process) -> Result<(), TestError> {
    daemon.signal(SIGTERM)?;
    let output = daemon.finish(REMOVAL_DEADLINE)?;
    claim(output.status == ExitStatus::Code(0), || {
        format!("{output:?}")
    })
}

/// Whether the daemon has the device open or mapped.
fn has(lab: &Lab, daemon: &Process, path: &str) -> Result<bool, TestError> {
    let pid = daemon.pid();
    let script = format!("ls -l /proc/{pid}/fd; cat /proc/{pid}/maps");
    let open = lab.host.sh(&script)?;
    Ok(open.lines().any(|line| line.trim_end().ends_with(path)))
}

fn keeps(guest: &mut Guest, offset: u64, seed: u64) -> Result<(), TestError> {
    let report = guest.compare_blocks("/dev/pmem0", offset, PIECE, seed)?;
    claim(report.wrong_words == 0 && report.words == PIECE / 8, || {
        format!("at {offset}: {report:?}")
    })
}

fn lent_pmem_is_kept_by_guest_after_guest_and_daemon_after_daemon(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let lab = &*lab;
    let dax = lab.host.dax()[1].path.clone();
    let memory = format!("{dax},offset=128M,size=512M");
    let range = ["--dax", &memory];
    let daemon = lend(lab, &range)?;
    let remote = Remote::new();
    let words = ["--api-socket", remote.socket(), "--pmem", &word("p0")];
    let mut guest = boot_spec_with_pmem(lab, spec_with(lab, &words))?;
    let sectors = guest.cat("/sys/block/pmem0/size")?;
    claim(sectors.trim() == (SIZE / 512).to_string(), || {
        format!("the guest sees {sectors} sectors")
    })?;
    // From end to end, so that KVM's entries are there to be counted: large ones, as of one's own device.
    guest.sh("dd if=/dev/pmem0 of=/dev/null bs=1M")?;
    let pages = kvm_pages(lab, &mut guest)?;
    claim(pages.pages_2m >= SIZE / (2 * MIB), || format!("{pages:?}"))?;
    let last = SIZE - PIECE;
    for offset in [0, last] {
        guest.fill_blocks("/dev/pmem0", offset, PIECE, offset)?;
    }
    guest.sh("sync; dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 seek=4096 conv=notrunc,fsync")?;

    // Nobody else has any of it, by whichever way; what is beside it is free.
    does_not_lend(lab, &range, &["is in use by process", "--rejoin"])?;
    let zone = dax_zone(lab, "z1", 0, 256 * MIB, 1024 * MIB);
    let refused = |word: &str, says: &[&str]| {
        refused(lab, &["--memory-zone", &zone, "--pmem", word], 1, says)
    };
    let direct = format!("file={dax},offset=512M,size=256M,id=p0");
    refused(&direct, &["p0", "is in use by process"])?;
    refused(&word("p0"), &["p0", "one guest at a time"])?;

    // A daemon that is killed leaves the memory with the guest, and the guest's flushes to the next one.
    daemon.signal(SIGKILL)?;
    daemon.wait(REMOVAL_DEADLINE)?;
    guest.sh("rm -f /tmp/flushed; echo kept > /tmp/text")?;
    guest.sh(
        "(dd if=/tmp/text of=/dev/pmem0 bs=512 seek=65536 conv=sync,notrunc,fsync && touch /tmp/flushed) \
         </dev/null >/dev/null 2>&1 &",
    )?;
    for offset in [0, last] {
        keeps(&mut guest, offset, offset)?;
    }
    let flushed = guest.sh("ls /tmp")?;
    claim(!flushed.contains("flushed"), || {
        "a flush came back from nobody".to_owned()
    })?;
    refused(&direct, &["p0", "is in use by process"])?;
    does_not_lend(lab, &range, &["is in use by process", "--rejoin"])?;
    // Another range is not what the guest has.
    let other = format!("{dax},offset=1G,size=512M");
    let stranger = lend(lab, &["--dax", &other])?;
    let why = || -> Result<String, TestError> {
        Ok(remote.info(lab)?["device_tree"]["p0"]["backend"].to_string())
    };
    eventually("the other range is refused", || {
        Ok(why()?.contains("now lends other memory"))
    })?;
    end(stranger)?;
    let daemon = lend(lab, &["--dax", &memory, "--rejoin"])?;
    eventually("the flush comes back", || {
        Ok(guest.sh("ls /tmp")?.contains("flushed"))
    })?;
    claim(remote.connections(lab, "p0")? == 2, || {
        "not one connection for each daemon".to_owned()
    })?;
    daemon.wait_for_error("it is served again", REMOVAL_DEADLINE)?;
    // The next kernel finds what the last one wrote, by the same backend.
    guest.leave("reboot")?;
    guest.wait_ready()?;
    guest.modprobe_pmem()?;
    guest.await_path("/dev/pmem0")?;
    for offset in [0, last] {
        keeps(&mut guest, offset, offset)?;
    }
    no_complaints(&mut guest)?;
    power_off(guest)?;

    // And so does the next guest.
    let mut guest = boot_with_pmem(lab, &["--pmem", &word("p0")])?;
    for offset in [0, last] {
        keeps(&mut guest, offset, offset)?;
    }
    let text = guest.sh("dd if=/dev/pmem0 bs=512 skip=65536 count=1 2>/dev/null | head -n 1")?;
    claim(text.trim() == "kept", || format!("it reads {text:?}"))?;
    power_off(guest)?;
    end(daemon)?;
    claim(!lab.host.exists(&socket())?, || {
        "the socket is left".to_owned()
    })
}

fn lent_pmem_comes_and_goes_and_is_the_hosts_to_take(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let lab = &*lab;
    let dax = lab.host.dax()[1].clone();
    let memory = format!("{},size=512M", dax.path);
    let remote = Remote::new();
    let mut guest = Guest::boot(
        &lab.host,
        &spec_with(lab, &["--api-socket", remote.socket()]),
    )?;
    guest.modprobe(&["virtio_pci", "virtio_pmem", "nd_pmem"])?;
    remote.refused(lab, &["add-pmem", &word("p0")], &["p0", "nobody serves"])?;
    let daemon = lend(lab, &["--dax", &memory])?;
    for _ in 0..2 {
        let at = remote.add(lab, "add-pmem", &word("p0"))?;
        is_usable(&mut guest, "pmem0")?;
        claim(holds(lab, &mut guest, &dax.path)?, || {
            "the guest's memory is not mapped".to_owned()
        })?;
        remote.ok(lab, &["remove-device", "p0"])?;
        guest.await_gone(&format!("/sys/bus/pci/devices/{at}"))?;
        eventually("p0 is no part of the VM any more", || {
            Ok(!remote.knows(lab, "p0")?)
        })?;
        claim(!holds(lab, &mut guest, &dax.path)?, || {
            "what was lent is still held".to_owned()
        })?;
    }
    let at = remote.add(lab, "add-pmem", &word("p0"))?;
    is_usable(&mut guest, "pmem0")?;
    with_device(lab, &dax.name, || {
        let gone = unbind(lab, &dax.name)?;
        claim(gone.status.success() && !is_bound(lab, &dax.name)?, || {
            format!("{} does not go: {gone:?}", dax.name)
        })?;
        claim(!holds(lab, &mut guest, &dax.path)?, || {
            "the VMM has the device still".to_owned()
        })?;
        guest.await_gone(&format!("/sys/bus/pci/devices/{at}"))?;
        // With nothing to lend and nobody to answer it ends, and says why.
        let output = daemon.finish(REMOVAL_DEADLINE)?;
        claim(
            output.status == ExitStatus::Code(1)
                && output.stderr.contains("the host has taken /dev/"),
            || format!("{output:?}"),
        )
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)
}

fn keep(guests: &mut [Guest], offsets: &[u64]) -> Result<(), TestError> {
    for guest in guests {
        guest.sh("echo 3 > /proc/sys/vm/drop_caches")?;
        for offset in offsets {
            keeps(guest, *offset, *offset)?;
        }
    }
    Ok(())
}

fn lent_pmem_is_read_by_two_guests_at_once_and_written_by_neither(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let lab = &*lab;
    let dax = lab.host.dax()[1].path.clone();
    let memory = format!("{dax},size=512M");
    let offsets = [0, SIZE - PIECE];
    let daemon = lend(lab, &["--dax", &memory])?;
    let mut guest = boot_with_pmem(lab, &["--pmem", &word("p0")])?;
    for offset in offsets {
        guest.fill_blocks("/dev/pmem0", offset, PIECE, offset)?;
    }
    guest.sh("sync")?;
    power_off(guest)?;
    end(daemon)?;

    let daemon = lend(lab, &["--dax", &memory, "--read-only"])?;
    let lent = word("p0");
    let boot = |ram: u64| {
        let mut spec = spec_on(lab, &[&dax_zone(lab, "z0", 0, 512 * MIB, ram)]);
        let words = ["--pmem", &lent].map(str::to_owned);
        spec.arguments.extend(words);
        boot_spec_with_pmem(lab, spec)
    };
    let mut guests = [boot(0)?, boot(512 * MIB)?];
    keep(&mut guests, &offsets)?;
    for guest in &mut guests {
        let maps = lab
            .host
            .sh(&format!("cat /proc/{}/maps", guest.vmm().pid()))?;
        let mut mapped = maps.lines().filter(|line| line.ends_with(&dax)).peekable();
        claim(
            mapped.peek().is_some() && mapped.all(|line| line.contains(" r--s ")),
            || format!("mapped for writing: {maps}"),
        )?;
    }
    // Nobody writes meanwhile, by whichever way.
    does_not_lend(lab, &["--dax", &memory], &["is in use by process"])?;
    let zone = dax_zone(lab, "z1", 0, 256 * MIB, 1024 * MIB);
    let direct = format!("file={dax},size=512M,id=p0");
    let words = ["--memory-zone", &zone, "--pmem", &direct];
    refused(lab, &words, 1, &["p0", "is in use by process"])?;
    // What a guest stores goes nowhere, and no harm comes of it: Linux does not know that it can't write.
    let [one, _] = &mut guests;
    one.sh("dd if=/dev/zero of=/dev/pmem0 bs=4k count=16 conv=notrunc,fsync")?;
    keep(&mut guests, &offsets)?;
    // The end of one VMM, however sudden, is nothing to the other's guest.
    let [mut one, mut other] = guests;
    let orphan = kill(lab, &mut one)?;
    keep(std::slice::from_mut(&mut other), &offsets)?;
    claim(orphan.is_there(lab)?, || {
        "nobody holds what the killed VMM had, which may be lent".to_owned()
    })?;
    is_well(&mut other)?;
    no_complaints(&mut other)?;
    power_off(other)?;
    end(daemon)?;
    orphan.ends(lab)
}

fn pmem_that_can_t_be_lent_is_refused(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let lab = &*lab;
    let dax = lab.host.dax()[1].path.clone();
    let zone = dax_zone(lab, "z0", 0, 256 * MIB, 0);
    let with = |word: &str, status: i32, says: &[&str]| {
        refused(lab, &["--memory-zone", &zone, "--pmem", word], status, says)
    };
    let both = format!("{},file={dax}", word("p0"));
    with(&both, 2, &["p0", "file= says nothing"])?;
    with(&word("p0"), 1, &["p0", "nobody serves"])?;
    // One that serves something else.
    let socket = socket();
    let disk = format!("{dax},size=64M");
    let blk = lab.host.spawn(SpawnSpec {
        argv: [
            "daxhund-vhost-user-blk",
            "--socket-path",
            &socket,
            "--dax",
            &disk,
        ]
        .map(str::to_owned)
        .to_vec(),
        ..SpawnSpec::default()
    })?;
    blk.wait_for_error("listening", REMOVAL_DEADLINE)?;
    with(&word("p0"), 1, &["VHOST_USER_PROTOCOL_F_SHMEM", "pmem"])?;
    end(blk)?;
    let odd = format!("{dax},size=513M");
    does_not_lend(lab, &["--dax", &odd], &["513M"])?;
    // A file can be lent as well, and what is flushed is in it.
    let file = format!("{SCRATCH}/memory");
    lab.host.sh(&format!("truncate -s 64M {file}"))?;
    let daemon = lend(lab, &["--file", &file])?;
    let mut guest = boot_with_pmem(lab, &["--pmem", &word("p0")])?;
    guest.sh(
        "echo flushed > /tmp/text && dd if=/tmp/text of=/dev/pmem0 bs=512 conv=fsync,notrunc",
    )?;
    let text = lab.host.sh(&format!("head -n 1 {file}"))?;
    claim(text.trim() == "flushed", || {
        format!("the file starts with {text:?}")
    })?;
    // A daemon that ends in good order leaves the memory, too.
    end(daemon)?;
    keeps_what_it_reads(&mut guest)?;
    // What the guest flushes waits for the next one, and it flushes when it powers off.
    let daemon = lend(lab, &["--file", &file, "--rejoin"])?;
    power_off(guest)?;
    end(daemon)?;
    let daemon = lend(lab, &["--file", &file])?;
    claim(has(lab, &daemon, "memory")?, || {
        "what is lent is open".to_owned()
    })?;
    end(daemon)
}

fn keeps_what_it_reads(guest: &mut Guest) -> Result<(), TestError> {
    let text = guest.sh(
        "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/pmem0 bs=512 count=1 2>/dev/null | head -n 1",
    )?;
    claim(text.trim() == "flushed", || format!("it reads {text:?}"))
}
