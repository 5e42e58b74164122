//! Directories of the host that another process serves as a file system: virtiofsd, over vhost-user.

use std::time::Duration;

use lab_agent::host_protocol::SpawnSpec;

use super::peer_ram::{PeerRam, Zone, spec_in};
use super::remote::Remote;
use super::support::{
    MIB, VirtioKind, comes_back_to, count, dax_zone, descriptors_and_threads, eventually,
    no_complaints, power_off, refused, scratch, times_told,
};
use super::{GuestTest, Lab, TestError, claim, pci};
use crate::guest::Guest;
use crate::host::process::{Process, SIGKILL};
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "a_shared_directory_is_read_and_written_through_all_of_the_guests_dax_memory",
        run: a_shared_directory_is_read_and_written_through_all_of_the_guests_dax_memory,
    },
    GuestTest {
        name: "shared_directories_come_and_go",
        run: shared_directories_come_and_go,
    },
    GuestTest {
        name: "a_file_system_daemon_that_dies_is_waited_for_and_its_directory_mounted_again",
        run: a_file_system_daemon_that_dies_is_waited_for_and_its_directory_mounted_again,
    },
    GuestTest {
        name: "bad_file_systems_are_refused",
        run: bad_file_systems_are_refused,
    },
];

const PLACE: &str = "/lab/peers/virtiofsd";
const MODULES: [&str; 2] = ["virtio_pci", "virtiofs"];
const MOUNT: &str = "mkdir -p /mnt && mount -t virtiofs share /mnt";
/// For it to start, and to end when its frontend has gone.
const DEADLINE: Duration = PATIENCE;
/// More than the memory above the hole has.
const BIG: u64 = 192 * MIB;
const ABOVE_THE_HOLE: u64 = 128 * MIB;

/// A daemon that serves a directory to one guest, and ends with it.
pub(super) struct FsDaemon {
    process: Process,
    pub(super) socket: String,
}

impl FsDaemon {
    fn start(lab: &Lab) -> Result<Self, TestError> {
        Self::serve(lab, "fs", "share")
    }

    /// Serves `SCRATCH/DIRECTORY`, which is made, at `SCRATCH/NAME.sock`.
    pub(super) fn serve(lab: &Lab, name: &str, directory: &str) -> Result<Self, TestError> {
        let socket = format!("{SCRATCH}/{name}.sock");
        let share = format!("{SCRATCH}/{directory}");
        lab.host.sh(&format!("mkdir -p {share}; rm -f {socket}"))?;
        let argv = [
            format!("{PLACE}/virtiofsd"),
            format!("--socket-path={socket}"),
            "-o".to_owned(),
            // The emulated host's root can't be pivoted away from.
            format!("source={share},sandbox=chroot"),
        ];
        let process = lab.host.spawn(SpawnSpec {
            argv: argv.to_vec(),
            env: vec![("LD_LIBRARY_PATH".to_owned(), format!("{PLACE}/lib"))],
            ..SpawnSpec::default()
        })?;
        process.wait_for_error("Waiting for vhost-user socket connection", DEADLINE)?;
        Ok(Self { process, socket })
    }

    /// For a guest with the directory.
    fn word(&self, more: &str) -> String {
        format!("tag=share,socket={}{more}", self.socket)
    }

    fn kill(self) -> Result<(), TestError> {
        self.process.signal(SIGKILL)?;
        self.process.wait(DEADLINE)?;
        Ok(())
    }

    /// Its frontend has gone: it ends by itself.
    pub(super) fn has_served(self) -> Result<(), TestError> {
        self.process.wait(DEADLINE)?;
        Ok(())
    }
}

/// The one of Debian 12 is QEMU's, and takes every file; the one of 13 is another program.
fn takes_dax(lab: &Lab) -> Result<bool, TestError> {
    let version = lab.host.sh(&format!(
        "LD_LIBRARY_PATH={PLACE}/lib {PLACE}/virtiofsd --version"
    ))?;
    Ok(version.starts_with("virtiofsd version"))
}

/// RAM of a guest that needs no more.
fn one_zone(lab: &Lab) -> Result<PeerRam, TestError> {
    Ok(PeerRam::small(takes_dax(lab)?))
}

/// The sum of a file, as both sides print it.
fn sum(text: &str) -> String {
    text.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn host_sum(lab: &Lab, name: &str) -> Result<String, TestError> {
    let text = lab.host.sh(&format!("md5sum {SCRATCH}/share/{name}"))?;
    Ok(sum(&text))
}

/// Both sides read the same in a file.
fn is_the_same(lab: &Lab, guest: &mut Guest, name: &str) -> Result<(), TestError> {
    let seen = sum(&guest.sh(&format!("md5sum /mnt/{name}"))?);
    let written = host_sum(lab, name)?;
    claim(seen == written && !seen.is_empty(), || {
        format!("{name}: the guest reads {seen}, the host {written}")
    })
}

/// What is mounted is the host's directory, in both directions.
fn is_usable(lab: &Lab, guest: &mut Guest, seed: u32) -> Result<(), TestError> {
    lab.host.sh(&format!(
        "mkdir -p {SCRATCH}/share/{seed} && dd if=/dev/urandom of={SCRATCH}/share/{seed}/host bs=64k count=32 2>/dev/null"
    ))?;
    is_the_same(lab, guest, &format!("{seed}/host"))?;
    let written = guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/text bs=64k count=33 2>/dev/null && cp /tmp/text /mnt/{seed}/guest && \
         mkdir /mnt/{seed}/made && mv /mnt/{seed}/guest /mnt/{seed}/made/moved && sync && md5sum /tmp/text"
    ))?;
    let found = host_sum(lab, &format!("{seed}/made/moved"))?;
    claim(found == sum(&written), || {
        format!("the guest has written {written}, the host finds {found}")
    })?;
    guest.sh(&format!("rm /mnt/{seed}/host && ls /mnt/{seed}"))?;
    claim(
        !lab.host.exists(&format!("{SCRATCH}/share/{seed}/host"))?,
        || "what the guest removed is still there".to_owned(),
    )
}

fn a_shared_directory_is_read_and_written_through_all_of_the_guests_dax_memory(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let daemon = FsDaemon::start(lab)?;
    lab.host.sh(&format!(
        "dd if=/dev/urandom of={SCRATCH}/piece bs=1M count=16 2>/dev/null; for i in $(seq {}); do cat {SCRATCH}/piece; echo $i; done > \
         {SCRATCH}/share/big",
        BIG / (16 * MIB)
    ))?;
    // On both sides of the hole below 4 GiB, on two devices, and too little above it for what is read.
    let ram = PeerRam::new(
        takes_dax(lab)?,
        &[
            Zone {
                device: 0,
                offset: 0,
                dax_bytes: 3072 * MIB,
                other_bytes: 768 * MIB,
            },
            Zone {
                device: 1,
                offset: 512 * MIB,
                dax_bytes: ABOVE_THE_HOLE,
                other_bytes: ABOVE_THE_HOLE,
            },
        ],
    );
    let word = daemon.word(",id=f0");
    let spec = spec_in(lab, &ram, &["--cpus", "boot=2", "--fs", &word]);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&MODULES)?;
    pci::is_driven(&mut guest, VirtioKind::FileSystem)?;
    guest.sh(MOUNT)?;
    claim(ram.is_mapped(lab, &daemon.process)?, || {
        "the daemon has not mapped all of the guest's memory".to_owned()
    })?;
    is_the_same(lab, &mut guest, "big")?;
    // It is in the guest's memory now: the host's is not asked again.
    let cached = count(&mut guest, "awk '/^Cached:/ {print $2}' /proc/meminfo")? << 10;
    claim(cached >= BIG, || {
        format!("the guest has {cached} bytes in its page cache after it has read {BIG}")
    })?;
    is_usable(lab, &mut guest, 1)?;
    // Readers and writers at once.
    guest.sh(
        "echo 3 > /proc/sys/vm/drop_caches; for i in 1 2 3 4; do dd if=/mnt/big of=/mnt/copy$i bs=1M count=8 skip=$((i * 9)) 2>/dev/null & \
         done; wait; sync",
    )?;
    for copy in ["copy1", "copy2", "copy3", "copy4"] {
        is_the_same(lab, &mut guest, copy)?;
    }
    let whole = lab.host.sh(&format!(
        "for i in 1 2 3 4; do dd if={SCRATCH}/share/big bs=1M count=8 skip=$((i * 9)) 2>/dev/null | cmp - {SCRATCH}/share/copy$i || echo $i; done"
    ))?;
    claim(whole.trim().is_empty(), || {
        format!("copies that the guest has made differ: {whole}")
    })?;
    // The same daemon serves the next kernel.
    guest.leave("reboot")?;
    guest.wait_ready()?;
    guest.modprobe(&MODULES)?;
    guest.sh(MOUNT)?;
    is_usable(lab, &mut guest, 2)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    daemon.has_served()
}

fn shared_directories_come_and_go(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let remote = Remote::new();
    let ram = one_zone(lab)?;
    let spec = spec_in(lab, &ram, &["--api-socket", remote.socket()]);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&MODULES)?;
    let at_first = descriptors_and_threads(lab, &mut guest)?;
    for round in 0..2 {
        let daemon = FsDaemon::start(lab)?;
        let place = remote.add(lab, "add-fs", &daemon.word(",id=f0"))?;
        guest.sh(&format!(
            "until test -e /sys/bus/pci/devices/{place}/virtio*/driver; do usleep 10000; done"
        ))?;
        guest.sh(MOUNT)?;
        claim(ram.is_mapped(lab, &daemon.process)?, || {
            "the daemon has not mapped all of the guest's memory".to_owned()
        })?;
        is_usable(lab, &mut guest, round)?;
        let info = remote.info(lab)?;
        claim(
            info["device_tree"]["f0"]["backend"]["state"] == "connected"
                && info["config"]["fs"][0]["tag"] == "share",
            || format!("vm.info says: {info}"),
        )?;
        guest.sh("umount /mnt")?;
        remote.ok(lab, &["remove-device", "f0"])?;
        guest.await_gone(&format!("/sys/bus/pci/devices/{place}"))?;
        eventually("f0 is no part of the VM any more", || {
            Ok(!remote.knows(lab, "f0")?)
        })?;
        daemon.has_served()?;
        comes_back_to("descriptors and threads", &at_first, || {
            descriptors_and_threads(lab, &mut guest)
        })?;
    }
    let nobody = format!("tag=share,socket={SCRATCH}/nobody.sock,id=f1");
    remote.refused(
        lab,
        &["add-fs", &nobody],
        &["f1", "nobody serves", "virtiofsd"],
    )?;
    let body = r#"{"tag":"share","socket":"/s","cache_size":1}"#;
    remote.answers(
        lab,
        ("PUT", "/api/v1/vm.add-fs", body),
        "400",
        &["cache_size"],
    )?;
    comes_back_to("descriptors and threads", &at_first, || {
        descriptors_and_threads(lab, &mut guest)
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)
}

fn a_file_system_daemon_that_dies_is_waited_for_and_its_directory_mounted_again(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(": > {SCRATCH}/events"))?;
    let remote = Remote::new();
    let mut daemon = FsDaemon::start(lab)?;
    let (events, word) = (format!("path={SCRATCH}/events"), daemon.word(",id=f0"));
    let words = [
        "--fs",
        &word,
        "--api-socket",
        remote.socket(),
        "--event-monitor",
        &events,
    ];
    let ram = one_zone(lab)?;
    let mut guest = Guest::boot(&lab.host, &spec_in(lab, &ram, &words))?;
    guest.modprobe(&MODULES)?;
    guest.sh(MOUNT)?;
    is_usable(lab, &mut guest, 0)?;
    let told = |event: &str| times_told(lab, event);
    for round in 1..=2_u32 {
        daemon.kill()?;
        eventually("the loss is told", || {
            Ok(told("backend-lost")? == round as usize)
        })?;
        let info = remote.info(lab)?;
        claim(
            info["device_tree"]["f0"]["backend"]["state"] == "lost" && info["state"] == "Running",
            || format!("vm.info says: {}", info["device_tree"]["f0"]),
        )?;
        // Who wants something of it waits, and nobody else.
        guest.sh(
            "rm -f /tmp/over; (cat /mnt/new; echo $? > /tmp/over) </dev/null >/dev/null 2>&1 &",
        )?;
        guest.ask("ping")?;
        daemon = FsDaemon::start(lab)?;
        eventually("it is served on", || {
            Ok(told("backend-connected")? == round as usize)
        })?;
        // The new daemon knows nothing of what was mounted: whoever waited gets an error, not silence.
        eventually("who waited gets an answer", || {
            Ok(guest.try_sh("test -s /tmp/over")?.status == Some(0))
        })?;
        let status = count(&mut guest, "cat /tmp/over")?;
        claim(status != 0, || {
            "a file that is not there was read".to_owned()
        })?;
        let old = guest.try_sh("ls /mnt/0")?;
        claim(old.status != Some(0), || {
            format!("a mount of the daemon before still answers: {}", old.stdout)
        })?;
        guest.sh(&format!("umount /mnt && {MOUNT}"))?;
        is_usable(lab, &mut guest, round)?;
    }
    no_complaints(&mut guest)?;
    // A guest that starts while nobody serves it has the directory as soon as somebody does.
    daemon.kill()?;
    eventually("the loss is told", || Ok(told("backend-lost")? == 3))?;
    remote.ok(lab, &["reboot"])?;
    guest.wait_ready()?;
    guest.modprobe(&MODULES)?;
    let daemon = FsDaemon::start(lab)?;
    guest.sh(MOUNT)?;
    is_usable(lab, &mut guest, 3)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    daemon.has_served()
}

fn bad_file_systems_are_refused(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let zone = dax_zone(lab, "z0", 0, 256 * MIB, 0);
    let with = |word: &str, status: i32, said: &[&str]| {
        refused(lab, &["--memory-zone", &zone, "--fs", word], status, said)
    };
    with("tag=share", 2, &["--fs", "socket"])?;
    with("socket=/s", 2, &["--fs", "tag"])?;
    with("tag=share,socket=/s,dax=on", 2, &["dax", "num_queues"])?;
    let long = format!("tag={},socket=/s", "t".repeat(37));
    with(&long, 2, &["37 bytes", "1 to 36"])?;
    with("tag=share,socket=/s,num_queues=0", 2, &["num_queues=0"])?;
    let socket = |name: &str| format!("tag=share,socket={SCRATCH}/{name},id=f0");
    with(&socket("nobody"), 1, &["f0", "virtiofsd", "No such file"])?;
    lab.host.sh(&format!(": > {SCRATCH}/file"))?;
    with(&socket("file"), 1, &["f0", "file", "refused"])?;
    // It serves one frontend, and ends.
    let daemon = FsDaemon::start(lab)?;
    with(
        &daemon.word(",num_queues=5,id=f0"),
        1,
        &["f0", "num_queues=5 asks for more", "give num_queues=1 or"],
    )?;
    daemon.has_served()?;
    let daemon = FsDaemon::start(lab)?;
    refused(
        lab,
        &["--memory", "size=256M", "--fs", &daemon.word(",id=f0")],
        1,
        &["private", "shared=on", "/dev/daxX.Y"],
    )?;
    daemon.has_served()?;
    let mut daemon = FsDaemon::start(lab)?;
    let word = daemon.word(",id=f0");
    if !takes_dax(lab)? {
        PeerRam::sees_refusal(lab, &["--fs", &word])?;
        daemon.has_served()?;
        daemon = FsDaemon::start(lab)?;
    }
    let ram = one_zone(lab)?;
    let mut guest = Guest::boot(&lab.host, &spec_in(lab, &ram, &["--fs", &word]))?;
    let zone = dax_zone(lab, "z1", 1, 256 * MIB, 0);
    // It does not listen any more.
    refused(
        lab,
        &["--memory-zone", &zone, "--fs", &word],
        1,
        &["f0", "fs.sock"],
    )?;
    guest.modprobe(&MODULES)?;
    guest.sh(MOUNT)?;
    is_usable(lab, &mut guest, 0)?;
    power_off(guest)?;
    daemon.has_served()
}
