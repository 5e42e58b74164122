//! Disks that another process serves: QEMU's storage daemon, over vhost-user.

use std::time::Duration;

use super::remote::Remote;
use super::support::{
    MIB, VirtioKind, comes_back_to, count, dax_zone, descriptors_and_threads, eventually, mapped,
    no_complaints, power_off, refused, scratch, spec_on, spec_with, times_told,
};
use super::{GuestTest, Lab, TestError, claim, pci, pmem};
use crate::guest::Guest;
use crate::host::process::{Process, SIGKILL};
use crate::served::storage_daemon;
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "a_vhost_user_disk_reaches_all_of_the_guests_dax_memory",
        run: a_vhost_user_disk_reaches_all_of_the_guests_dax_memory,
    },
    GuestTest {
        name: "vhost_user_disks_and_memory_come_and_go",
        run: vhost_user_disks_and_memory_come_and_go,
    },
    GuestTest {
        name: "a_vhost_user_backend_that_dies_is_waited_for",
        run: a_vhost_user_backend_that_dies_is_waited_for,
    },
    GuestTest {
        name: "bad_vhost_user_backends_are_refused",
        run: bad_vhost_user_backends_are_refused,
    },
];

pub(super) const DISK_BYTES: u64 = 64 * MIB;
pub(super) const PIECE: u64 = 2 * MIB;
const MODULES: [&str; 2] = ["virtio_pci", "virtio_blk"];
const SIGTERM: i32 = 15;
const SIGCONT: i32 = 18;
const SIGSTOP: i32 = 19;
const END: Duration = PATIENCE;

/// A storage daemon that exports a file as a disk.
pub(super) struct StorageDaemon {
    process: Process,
    pub(super) socket: String,
}

impl StorageDaemon {
    /// Serves `SCRATCH/NAME` at `SCRATCH/NAME.sock`; makes the file unless it is there.
    pub(super) fn start(lab: &Lab, name: &str, queues: u16) -> Result<Self, TestError> {
        let socket = format!("{SCRATCH}/{name}.sock");
        let (file, pid_file) = (format!("{SCRATCH}/{name}"), format!("{SCRATCH}/{name}.pid"));
        lab.host.sh(&format!(
            "test -e {file} || truncate -s {DISK_BYTES} {file}; rm -f {socket} {pid_file}"
        ))?;
        let spec = storage_daemon(&file, &socket, &pid_file, queues);
        let process = lab.host.spawn(spec)?;
        // Written when everything else is there.
        eventually("the storage daemon serves", || {
            claim(!process.has_ended(), || {
                format!("the storage daemon has ended: {}", process.stderr())
            })?;
            Ok(lab.host.exists(&pid_file)?)
        })?;
        Ok(Self { process, socket })
    }

    /// For a guest with such a disk.
    fn word(&self, more: &str) -> String {
        format!("vhost_user=on,socket={}{more}", self.socket)
    }

    /// Whether it has a device open or mapped.
    fn holds(&self, lab: &Lab, device: &str) -> Result<bool, TestError> {
        let pid = self.process.pid();
        let open = lab.host.sh(&format!("ls -l /proc/{pid}/fd"))?;
        Ok(mapped(lab, &self.process, device)? > 0 || open.contains(device))
    }

    pub(super) fn kill(self) -> Result<(), TestError> {
        self.process.signal(SIGKILL)?;
        self.process.wait(END)?;
        Ok(())
    }

    /// Has it end as its administrator would; everything it was given is on the file then.
    pub(super) fn end(self) -> Result<(), TestError> {
        self.process.signal(SIGTERM)?;
        self.process.wait(END)?;
        Ok(())
    }
}

/// It has come, whole, with two queues.
pub(super) fn has_the_daemons_disk(guest: &mut Guest) -> Result<(), TestError> {
    guest.await_path("/dev/vda")?;
    pci::is_driven(guest, VirtioKind::Block)?;
    let size = guest.cat("/sys/block/vda/size")?;
    claim(size.trim() == (DISK_BYTES / 512).to_string(), || {
        format!("vda should have {DISK_BYTES} bytes, it has {size} sectors")
    })?;
    let queues = guest.sh("ls /sys/block/vda/mq | wc -l")?;
    claim(queues.trim() == "2", || format!("{queues} queues"))
}

/// Fills a piece, at its end as well, and reads it back.
pub(super) fn is_usable(guest: &mut Guest, disk: &str, seed: u64) -> Result<(), TestError> {
    for offset in [4096, DISK_BYTES - PIECE] {
        guest.fill_blocks(disk, offset, PIECE, seed)?;
        keeps(guest, disk, offset, seed)?;
    }
    Ok(())
}

pub(super) fn keeps(
    guest: &mut Guest,
    disk: &str,
    offset: u64,
    seed: u64,
) -> Result<(), TestError> {
    let report = guest.compare_blocks(disk, offset, PIECE, seed)?;
    claim(report.wrong_words == 0 && report.words == PIECE / 8, || {
        format!("{disk} at {offset} does not read back as written: {report:?}")
    })
}

fn a_vhost_user_disk_reaches_all_of_the_guests_dax_memory(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let daemon = StorageDaemon::start(lab, "disk", 2)?;
    // On both sides of the hole below 4 GiB, and on two devices.
    let zones = [
        dax_zone(lab, "z0", 0, 3584 * MIB, 0),
        dax_zone(lab, "z1", 1, 256 * MIB, 512 * MIB),
    ];
    let mut spec = spec_on(lab, &[&zones[0], &zones[1]]);
    let disk = daemon.word(",num_queues=2,queue_size=256,id=d0");
    spec.arguments
        .extend(["--cpus", "boot=2", "--disk", &disk].map(str::to_owned));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&MODULES)?;
    has_the_daemons_disk(&mut guest)?;
    let cache = guest.cat("/sys/block/vda/queue/write_cache")?;
    claim(cache.trim() == "write back", || {
        format!("a disk that is flushed has a write-back cache, not {cache}")
    })?;
    let (first, second) = (&lab.host.dax()[0].path, &lab.host.dax()[1].path);
    claim(
        mapped(lab, &daemon.process, first)? >= 3584 * MIB
            && mapped(lab, &daemon.process, second)? >= 256 * MIB,
        || "the daemon has not mapped all of the guest's memory".to_owned(),
    )?;
    is_usable(&mut guest, "/dev/vda", 1)?;
    // Through whatever memory the page cache takes, from several processes.
    guest.sh(
        "for i in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=1M count=16 skip=$i 2>/dev/null & done; wait",
    )?;
    // What is flushed is the host's to see while the guest runs.
    guest
        .sh("echo flushed > /tmp/text && dd if=/tmp/text of=/dev/vda bs=512 conv=fsync,notrunc")?;
    let text = lab.host.sh(&format!("head -n 1 {SCRATCH}/disk"))?;
    claim(text.trim() == "flushed", || {
        format!("the file starts with {text:?}")
    })?;
    // The same backend serves the next kernel.
    guest.leave("reboot")?;
    guest.wait_ready()?;
    guest.modprobe(&MODULES)?;
    guest.await_path("/dev/vda")?;
    keeps(&mut guest, "/dev/vda", DISK_BYTES - PIECE, 1)?;
    is_usable(&mut guest, "/dev/vda", 2)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    eventually("the daemon lets go of the memory", || {
        Ok(mapped(lab, &daemon.process, first)? + mapped(lab, &daemon.process, second)? == 0)
    })?;
    daemon.end()
}

fn vhost_user_disks_and_memory_come_and_go(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(": > {SCRATCH}/events"))?;
    let remote = Remote::new();
    let daemon = StorageDaemon::start(lab, "disk", 1)?;
    let events = format!("path={SCRATCH}/events");
    let spec = spec_with(
        lab,
        &["--api-socket", remote.socket(), "--event-monitor", &events],
    );
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&["virtio_pci", "virtio_blk", "virtio_pmem", "nd_pmem"])?;
    let at_first = descriptors_and_threads(lab, &mut guest)?;
    let (ram, pmem_path) = (&lab.host.dax()[0].path, &lab.host.dax()[1].path);
    for round in 0..2 {
        let disk_at = remote.add(lab, "add-disk", &daemon.word(",id=d0"))?;
        guest.await_path("/dev/vda")?;
        is_usable(&mut guest, "/dev/vda", 3 + round)?;
        let info = remote.info(lab)?;
        claim(
            info["device_tree"]["d0"]["backend"]["state"] == "connected",
            || format!("vm.info says of the disk: {}", info["device_tree"]["d0"]),
        )?;
        // Persistent memory comes, and the backend has it before the guest does; and goes.
        let word = format!("file={pmem_path},size=1G,id=p0");
        let pmem_at = remote.add(lab, "add-pmem", &word)?;
        claim(
            mapped(lab, &daemon.process, pmem_path)? >= 1024 * MIB,
            || "the daemon has not mapped the persistent memory".to_owned(),
        )?;
        pmem::is_usable(&mut guest, "pmem0")?;
        keeps(&mut guest, "/dev/vda", 4096, 3 + round)?;
        // A drain comes back when the host may have the device: neither of the two has it open.
        let how = if round == 0 { "remove-device" } else { "drain" };
        remote.ok(lab, &[how, "p0"])?;
        if how == "drain" {
            claim(!daemon.holds(lab, pmem_path)?, || {
                "the drain is over, and the daemon has the device open".to_owned()
            })?;
        }
        guest.await_gone(&format!("/sys/bus/pci/devices/{pmem_at}"))?;
        eventually("p0 is no part of the VM any more", || {
            Ok(!remote.knows(lab, "p0")?)
        })?;
        claim(!daemon.holds(lab, pmem_path)?, || {
            "memory was given up while the daemon has it".to_owned()
        })?;
        is_usable(&mut guest, "/dev/vda", 5 + round)?;
        remote.ok(lab, &["remove-device", "d0"])?;
        guest.await_gone(&format!("/sys/bus/pci/devices/{disk_at}"))?;
        eventually("d0 is no part of the VM any more", || {
            Ok(!remote.knows(lab, "d0")?)
        })?;
        comes_back_to("descriptors and threads", &at_first, || {
            descriptors_and_threads(lab, &mut guest)
        })?;
        eventually("the daemon lets go of the memory", || {
            Ok(mapped(lab, &daemon.process, ram)? == 0)
        })?;
    }
    let missing = format!("vhost_user=on,socket={SCRATCH}/nobody.sock,id=d1");
    remote.refused(lab, &["add-disk", &missing], &["d1", "nobody serves"])?;
    let more = daemon.word(",num_queues=2,id=d1");
    remote.refused(lab, &["add-disk", &more], &["d1", "num_queues=1"])?;
    comes_back_to("descriptors and threads", &at_first, || {
        descriptors_and_threads(lab, &mut guest)
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    daemon.end()
}

fn a_vhost_user_backend_that_dies_is_waited_for(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(": > {SCRATCH}/events"))?;
    let remote = Remote::new();
    let mut daemon = StorageDaemon::start(lab, "disk", 2)?;
    let (events, disk) = (
        format!("path={SCRATCH}/events"),
        daemon.word(",num_queues=2,id=d0"),
    );
    let words = [
        "--cpus",
        "boot=2",
        "--disk",
        &disk,
        "--api-socket",
        remote.socket(),
        "--event-monitor",
        &events,
    ];
    let mut guest = Guest::boot(&lab.host, &spec_with(lab, &words))?;
    guest.modprobe(&MODULES)?;
    guest.await_path("/dev/vda")?;
    is_usable(&mut guest, "/dev/vda", 1)?;
    let told = |event: &str| times_told(lab, event);
    for round in 1..=3_usize {
        // Several writers, each of which tells what it has been promised: every block that was flushed.
        guest.sh(
            "rm -f /tmp/done*; for i in 1 2 3 4; do (n=0; while [ ! -e /tmp/stop ]; do \
             echo $i-$n | dd of=/dev/vda bs=4096 seek=$((i * 1024 + n % 512)) conv=sync,fsync,notrunc oflag=direct 2>/dev/null && \
             echo $((i * 1024 + n % 512)) $i-$n >> /tmp/done$i; n=$((n + 1)); done; echo over >> /tmp/over) </dev/null >/dev/null 2>&1 & done",
        )?;
        eventually("the guest writes", || {
            Ok(count(&mut guest, "cat /tmp/done? 2>/dev/null | wc -l")? >= 20)
        })?;
        daemon.kill()?;
        eventually("the loss is told", || Ok(told("backend-lost")? == round))?;
        let info = remote.info(lab)?;
        claim(
            info["device_tree"]["d0"]["backend"]["state"] == "lost" && info["state"] == "Running",
            || format!("vm.info says of the disk: {}", info["device_tree"]["d0"]),
        )?;
        guest.ask("ping")?;
        daemon = StorageDaemon::start(lab, "disk", 2)?;
        eventually(
            "it is served on",
            || Ok(told("backend-connected")? == round),
        )?;
        guest.sh("touch /tmp/stop")?;
        eventually("every writer gets its answer", || {
            Ok(count(&mut guest, "cat /tmp/over 2>/dev/null | wc -l")? == 4)
        })?;
        let wrong = guest.sh(
            "echo 3 > /proc/sys/vm/drop_caches; cat /tmp/done? | awk '{last[$1] = $2} END {for (b in last) print b, last[b]}' | \
             while read b t; do [ \"$(dd if=/dev/vda bs=4096 skip=$b count=1 2>/dev/null | head -n 1)\" = \"$t\" ] || echo $b $t; done; \
             rm -f /tmp/stop /tmp/over",
        )?;
        claim(wrong.trim().is_empty(), || {
            format!("blocks that were flushed are not what was written: {wrong}")
        })?;
    }
    keeps(&mut guest, "/dev/vda", DISK_BYTES - PIECE, 1)?;
    is_usable(&mut guest, "/dev/vda", 2)?;
    hangs_while_memory_comes(lab, &remote, &mut guest, &daemon)?;
    // One that is gone is no hindrance for the guest to start anew, nor for the device to be removed.
    daemon.kill()?;
    guest.leave("reboot")?;
    guest.wait_ready()?;
    remote.ok(lab, &["remove-device", "d0"])?;
    eventually("d0 is no part of the VM any more", || {
        Ok(!remote.knows(lab, "d0")?)
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)
}

/// One that answers nothing holds nobody up, and has the memory that came meanwhile as soon as it goes on.
fn hangs_while_memory_comes(
    lab: &Lab,
    remote: &Remote,
    guest: &mut Guest,
    daemon: &StorageDaemon,
) -> Result<(), TestError> {
    let told = |event: &str| times_told(lab, event);
    let (lost, connected) = (told("backend-lost")?, told("backend-connected")?);
    daemon.process.signal(SIGSTOP)?;
    let path = &lab.host.dax()[1].path;
    remote.add(lab, "add-pmem", &format!("file={path},size=1G,id=p0"))?;
    eventually("the silence is told", || {
        Ok(told("backend-lost")? == lost + 1)
    })?;
    let backend = remote.info(lab)?["device_tree"]["d0"]["backend"].to_string();
    claim(backend.contains("lost"), || {
        format!("vm.info says of the disk: {backend}")
    })?;
    guest.ask("ping")?;
    daemon.process.signal(SIGCONT)?;
    eventually("it is served on", || {
        Ok(told("backend-connected")? == connected + 1)
    })?;
    claim(mapped(lab, &daemon.process, path)? >= 1024 * MIB, || {
        "the daemon has not mapped what came meanwhile".to_owned()
    })?;
    is_usable(guest, "/dev/vda", 3)
}

fn bad_vhost_user_backends_are_refused(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let zone = dax_zone(lab, "z0", 0, 256 * MIB, 0);
    let with = |word: &str, status: i32, said: &[&str]| {
        refused(lab, &["--memory-zone", &zone, "--disk", word], status, said)
    };
    with("vhost_user=on,id=d0", 2, &["d0", "socket=PATH"])?;
    with("vhost_user=on,socket=/s,path=/d", 2, &["path="])?;
    with("vhost_user=on,sockte=/s", 2, &["sockte", "socket"])?;
    let socket = |name: &str| format!("vhost_user=on,socket={SCRATCH}/{name},id=d0");
    with(&socket("nobody"), 1, &["d0", "nobody", "No such file"])?;
    lab.host.sh(&format!(": > {SCRATCH}/file"))?;
    with(&socket("file"), 1, &["d0", "file", "refused"])?;
    let daemon = StorageDaemon::start(lab, "disk", 1)?;
    with(
        &daemon.word(",num_queues=3,id=d0"),
        1,
        &["d0", "num_queues=1"],
    )?;
    // Memory that the daemon could not map.
    let word = daemon.word(",id=d0");
    refused(
        lab,
        &["--memory", "size=256M", "--disk", &word],
        1,
        &["private", "shared=on", "/dev/daxX.Y"],
    )?;
    // It serves one guest at a time.
    let mut guest = Guest::boot(&lab.host, &spec_with(lab, &["--disk", &word]))?;
    let zone = dax_zone(lab, "z1", 1, 256 * MIB, 0);
    refused(
        lab,
        &["--memory-zone", &zone, "--disk", &word],
        1,
        &["d0", "one guest at a time"],
    )?;
    guest.modprobe(&MODULES)?;
    guest.await_path("/dev/vda")?;
    power_off(guest)?;
    daemon.kill()?;
    with(&word, 1, &["d0", "nobody serves", "refused"])?;
    // Something that speaks, but not this.
    let remote = Remote::new();
    let vmm = Guest::start(&lab.host, super::remote::waiting_vmm(&remote, &[], None))?;
    remote.ready(lab)?;
    with(&socket("api.sock"), 1, &["d0", "does not talk like"])?;
    drop(vmm);
    Ok(())
}
