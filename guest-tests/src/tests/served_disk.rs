//! Disks that the daemon serves over vhost-user, on device-dax: what becomes of the range when frontends and daemons come and
//! go, and when the host takes the device away.

use lab_agent::host_protocol::{ExitStatus, SpawnSpec};

use super::remote::Remote;
use super::removal::{REMOVAL_DEADLINE, bind, unbind, with_device};
use super::support::{
    MIB, Orphan, dax_zone, eventually, kill, no_complaints, power_off, says_i_o_error, scratch,
    spec_on, spec_with,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::{Guest, load_disk};
use crate::host::DaxDevice;
use crate::host::process::{Process, SIGKILL};
use crate::served::serve_dax;
use crate::share::Initramfs;
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "served_disk_is_a_range_of_dax_that_outlives_its_daemons",
        run: served_disk_is_a_range_of_dax_that_outlives_its_daemons,
    },
    GuestTest {
        name: "served_disk_that_the_host_takes_away_is_errors_and_nothing_is_held",
        run: served_disk_that_the_host_takes_away_is_errors_and_nothing_is_held,
    },
    GuestTest {
        name: "served_disk_of_a_guest_outlives_its_daemon_and_not_its_device",
        run: served_disk_of_a_guest_outlives_its_daemon_and_not_its_device,
    },
    GuestTest {
        name: "a_disk_on_dax_outlives_daemons_that_are_killed_under_fio",
        run: a_disk_on_dax_outlives_daemons_that_are_killed_under_fio,
    },
    GuestTest {
        name: "served_disks_keep_what_was_acknowledged_to_vmms_that_are_killed",
        run: served_disks_keep_what_was_acknowledged_to_vmms_that_are_killed,
    },
];

const SIGTERM: i32 = 15;
const USUAL_KILLS: u32 = 4;
const FULL_KILLS: u32 = 100;
/// Small and larger blocks in the same places again and again, several at once, each verified soon after it was written.
const FIO: &str = "--name=kill --filename=/dev/vdb --size=16M --bsrange=4k-64k --rw=randwrite --direct=1 --ioengine=libaio \
                   --iodepth=8 --verify=crc32c --verify_backlog=32 --verify_fatal=1 --time_based --runtime=7d";
/// Of records, in the guests' file systems.
const RECORDS: &str = "/mnt/records";
/// More than any guest gets to write.
const RECORD_LIMIT: u64 = 4096;
/// What is on the disk. Scratch memory has another.
const GENUINE: u8 = 0x5a;
/// In sectors.
const RANGE: u64 = 64 << 11;

pub(super) fn start(lab: &Lab, words: &[&str], stdin: bool) -> Result<Process, TestError> {
    Ok(lab.host.spawn(SpawnSpec {
        argv: words.iter().map(|word| (*word).to_owned()).collect(),
        stdin,
        ..SpawnSpec::default()
    })?)
}

/// A daemon that listens on this socket.
pub(super) fn serve(
    lab: &Lab,
    socket: &str,
    disk: &str,
    more: &[&str],
) -> Result<Process, TestError> {
    Ok(serve_dax(&lab.host, socket, disk, more)?)
}

pub(super) fn end(daemon: Process) -> Result<(), TestError> {
    daemon.signal(SIGTERM)?;
    let output = daemon.finish(REMOVAL_DEADLINE)?;
    claim(output.status == ExitStatus::Code(0), || {
        format!("{output:?}")
    })
}

/// What connects to a daemon and asks requests of it.
pub(super) struct Frontend(Process);

impl Frontend {
    pub(super) fn connect(lab: &Lab, socket: &str) -> Result<Self, TestError> {
        let mut process = start(lab, &["lab-agent", "disk", socket], true)?;
        process.wait_for("connected", REMOVAL_DEADLINE)?;
        Ok(Self(process))
    }

    fn begin(&self, request: &str) -> Result<(), TestError> {
        Ok(self.0.send(format!("{request}\n").as_bytes())?)
    }

    fn answer(&mut self, request: &str) -> Result<String, TestError> {
        let line = self.0.wait_for(&format!("{request}: "), REMOVAL_DEADLINE)?;
        Ok(line.replacen(&format!("{request}: "), "", 1))
    }

    fn answers(&mut self, request: &str, expected: &str) -> Result<(), TestError> {
        let answer = self.answer(request)?;
        claim(answer == expected, || {
            format!("{request}: expected {expected}, got {answer}")
        })
    }

    pub(super) fn ask(&mut self, request: &str, expected: &str) -> Result<(), TestError> {
        self.begin(request)?;
        self.answers(request, expected)
    }

    /// An I/O error, whatever is in the buffer then.
    pub(super) fn fails(&mut self, request: &str) -> Result<(), TestError> {
        self.begin(request)?;
        let answer = self.answer(request)?;
        claim(answer.starts_with('1'), || {
            format!("{request}: expected an error, got {answer}")
        })
    }

    pub(super) fn go(self) -> Result<(), TestError> {
        self.0.close_stdin()?;
        let output = self.0.finish(REMOVAL_DEADLINE)?;
        claim(output.status.success(), || format!("{output:?}"))
    }
}

/// Whether a process has this path open or mapped.
fn holds(lab: &Lab, process: &Process, path: &str) -> Result<bool, TestError> {
    let pid = process.pid();
    let open = lab
        .host
        .sh(&format!("ls -l /proc/{pid}/fd; cat /proc/{pid}/maps"))?;
    Ok(open.lines().any(|line| line.trim_end().ends_with(path)))
}

fn served_disk_is_a_range_of_dax_that_outlives_its_daemons(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let dax = lab.host.dax()[1].path.clone();
    let [one, two] = ["one", "two"].map(|name| format!("{SCRATCH}/{name}.sock"));
    let [first, second] = ["0", "64M"].map(|at| format!("{dax},offset={at},size=64M"));
    let daemon = serve(lab, &one, &first, &[])?;
    let beside = serve(lab, &two, &second, &[])?;
    let mut frontend = Frontend::connect(lab, &one)?;
    let mut neighbour = Frontend::connect(lab, &two)?;
    neighbour.ask("write 0 99", "0")?;
    frontend.ask("write 0 7", "0")?;
    frontend.ask("write 1024 8", "0")?;
    // The last that there is, and what would be the neighbour's.
    let last = RANGE - 128;
    frontend.ask(&format!("write {last} 9"), "0")?;
    frontend.ask(&format!("write {RANGE} 9"), "1")?;
    frontend.ask("flush", "0")?;
    frontend.ask("discard 0", "0")?;
    frontend.ask("zero 1024", "0")?;
    neighbour.ask("read 0", "0 99")?;
    frontend.go()?;
    neighbour.go()?;

    // The same daemon, the next frontend.
    let mut frontend = Frontend::connect(lab, &one)?;
    frontend.ask("read 0", "0 7")?;
    frontend.go()?;
    let words = [
        crate::served::DAEMON,
        "--socket-path",
        "/tmp/none",
        "--dax",
        &dax,
    ];
    let refused = lab.host.run(&words)?;
    claim(
        !refused.status.success() && refused.stderr.contains("is in use by process"),
        || format!("a range is given twice: {refused:?}"),
    )?;
    end(beside)?;
    end(daemon)?;
    claim(!lab.host.exists(&one)?, || format!("{one} is left"))?;

    // The next daemons: two that only read the same.
    let readers = [
        serve(lab, &one, &first, &["--read-only"])?,
        serve(lab, &two, &first, &["--read-only"])?,
    ];
    for socket in [&one, &two] {
        let mut frontend = Frontend::connect(lab, socket)?;
        frontend.ask("read 0", "0 7")?;
        frontend.ask("read 1024", "0 0")?;
        frontend.ask(&format!("read {last}"), "0 9")?;
        frontend.ask("write 0 1", "1")?;
        frontend.ask("read 0", "0 7")?;
        frontend.go()?;
    }
    readers.into_iter().try_for_each(end)
}

fn served_disk_that_the_host_takes_away_is_errors_and_nothing_is_held(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let dax = lab.host.dax()[1].clone();
    for under_way in ["reads", "writes"] {
        let request = format!("{under_way} 0 {GENUINE}");
        with_device(lab, &dax.name, || lose_under(lab, &dax, &request))?;
    }
    Ok(())
}

/// The device goes away under a request that is asked again and again, some of them in the daemon's own copies.
fn lose_under(lab: &Lab, dax: &DaxDevice, request: &str) -> Result<(), TestError> {
    let socket = format!("{SCRATCH}/blk.sock");
    let disk = format!("{},size=64M", dax.path);
    let daemon = serve(lab, &socket, &disk, &[])?;
    let mut frontend = Frontend::connect(lab, &socket)?;
    frontend.ask(&format!("write 0 {GENUINE}"), "0")?;
    claim(holds(lab, &daemon, &dax.path)?, || {
        "the daemon serves a device that it does not have".to_owned()
    })?;
    frontend.begin(request)?;
    let gone = unbind(lab, &dax.name)?;
    claim(gone.status.success(), || format!("{gone:?}"))?;
    frontend.answers(request, "1")?;
    for request in ["read 0", "write 0 8", "zero 0", "discard 0", "flush"] {
        frontend.fails(request)?;
    }
    eventually("the daemon lets go of the device", || {
        Ok(!holds(lab, &daemon, &dax.path)?)
    })?;
    claim(!daemon.has_ended(), || "the session was cut off".to_owned())?;
    // With nobody left to answer it ends, and says why.
    frontend.go()?;
    let output = daemon.finish(REMOVAL_DEADLINE)?;
    claim(
        output.status == ExitStatus::Code(1)
            && output.stderr.contains("the host has taken /dev/")
            && !lab.host.exists(&socket)?,
        || format!("{output:?}"),
    )?;

    bind(lab, &dax.name)?;
    let daemon = serve(lab, &socket, &disk, &[])?;
    let mut frontend = Frontend::connect(lab, &socket)?;
    frontend.ask("read 0", &format!("0 {GENUINE}"))?;
    frontend.go()?;
    end(daemon)
}

fn keeps(guest: &mut Guest, offset: u64) -> Result<(), TestError> {
    let report = guest.compare_blocks("/dev/vda", offset, 2 * MIB, offset)?;
    claim(
        report.wrong_words == 0 && report.words == 2 * MIB / 8,
        || format!("at {offset}: {report:?}"),
    )
}

/// Both the guest's memory and its disk are device-dax.
fn served_disk_of_a_guest_outlives_its_daemon_and_not_its_device(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let dax = lab.host.dax()[1].clone();
    let socket = format!("{SCRATCH}/blk.sock");
    let disk = format!("{},offset=2M,size=64M", dax.path);
    let offsets = [4096, 62 * MIB];
    with_device(lab, &dax.name, || {
        let daemon = serve(lab, &socket, &disk, &["--num-queues", "2"])?;
        let word = format!("vhost_user=on,socket={socket},num_queues=2,id=d0");
        let mut guest = Guest::boot(&lab.host, &spec_with(lab, &["--disk", &word]))?;
        guest.modprobe(&["virtio_pci", "virtio_blk"])?;
        guest.await_path("/dev/vda")?;
        for offset in offsets {
            guest.fill_blocks("/dev/vda", offset, 2 * MIB, offset)?;
        }
        for offset in offsets {
            keeps(&mut guest, offset)?;
        }
        // The next daemon goes on where this one stopped, under the guest's writes.
        guest.sh(
            "(for i in 1 2 3 4 5 6 7 8; do dd if=/dev/vda of=/dev/vda bs=64k count=256 skip=128 seek=128 conv=notrunc,fsync \
             || exit 1; done; touch /tmp/copied) < /dev/null > /tmp/copies 2>&1 &",
        )?;
        end(daemon)?;
        let daemon = serve(lab, &socket, &disk, &["--num-queues", "2"])?;
        eventually("the guest's copies end well", || {
            Ok(guest.sh("ls /tmp")?.contains("copied"))
        })?;
        guest.sh("echo 3 > /proc/sys/vm/drop_caches")?;
        for offset in offsets {
            keeps(&mut guest, offset)?;
        }
        no_complaints(&mut guest)?;

        let gone = unbind(lab, &dax.name)?;
        claim(gone.status.success(), || format!("{gone:?}"))?;
        let read = "dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>&1 || true";
        let said = guest.sh(read)?;
        says_i_o_error(&said)?;
        eventually("the daemon lets go of the device", || {
            Ok(!holds(lab, &daemon, &dax.path)?)
        })?;
        power_off(guest)?;
        let output = daemon.finish(REMOVAL_DEADLINE)?;
        claim(output.status == ExitStatus::Code(1), || {
            format!("{output:?}")
        })
    })
}

/// Sectors that the guest's disk has written.
fn written(guest: &mut Guest) -> Result<u64, TestError> {
    let stat = guest.cat("/sys/block/vdb/stat")?;
    let field = stat.split_whitespace().nth(6).unwrap_or_default();
    Ok(field.parse().unwrap_or_default())
}

fn a_disk_on_dax_outlives_daemons_that_are_killed_under_fio(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let lab = &*lab;
    let socket = format!("{SCRATCH}/blk.sock");
    let disk = format!("{},size=64M", lab.host.dax()[1].path);
    let mut daemon = serve(lab, &socket, &disk, &[])?;
    let remote = Remote::new();
    let mut spec = spec_with(lab, &["--api-socket", remote.socket()]);
    spec.initramfs = Initramfs::Tools;
    spec.arguments.extend(load_disk());
    spec.arguments
        .push(format!("vhost_user=on,socket={socket},id=d0"));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.mount_load()?;
    guest.await_path("/dev/vdb")?;
    guest.begin_fio(FIO)?;
    let kills = if lab.full { FULL_KILLS } else { USUAL_KILLS };
    for kill in 0..=kills {
        let (before, connected) = (written(&mut guest)?, remote.connections(lab, "d0")?);
        eventually("fio goes on", || Ok(written(&mut guest)? > before))?;
        let ended = guest.fio_has_ended()?;
        claim(ended.is_none(), || format!("fio has ended: {ended:?}"))?;
        if kill == kills {
            break;
        }
        // At once, whatever it is at; then the next one.
        daemon.signal(SIGKILL)?;
        daemon.wait(REMOVAL_DEADLINE)?;
        daemon = serve(lab, &socket, &disk, &[])?;
        eventually("the next daemon is found", || {
            Ok(remote.connections(lab, "d0")? > connected)
        })?;
    }
    let ended = guest.end_fio()?;
    claim(ended.contains("err= 0"), || ended.clone())?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    end(daemon)
}

/// Gives how many records it had been told were durable, too.
fn kill_while_it_writes(lab: &Lab, mut guest: Guest) -> Result<(Orphan, u64), TestError> {
    let orphan = kill(lab, &mut guest)?;
    let records = guest.acknowledged_records();
    claim((1..RECORD_LIMIT).contains(&records), || {
        format!("killed too early or too late to tell anything: after {records} records")
    })?;
    Ok((orphan, records))
}

/// Two guests with disks on one device. The VMM of one is killed, the neighbour goes on, and is killed as well; the next guests
/// get their disks from the same daemons.
fn served_disks_keep_what_was_acknowledged_to_vmms_that_are_killed(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let lab = &*lab;
    let dax = lab.host.dax()[1].path.clone();
    let socket = |index: u64| format!("{SCRATCH}/{index}.sock");
    let serve_one = |index: u64| {
        let disk = format!("{dax},offset={},size=64M", index * 64 * MIB);
        serve(lab, &socket(index), &disk, &[])
    };
    let daemons = [serve_one(0)?, serve_one(1)?];
    let boot = |index: u64| -> Result<Guest, TestError> {
        let ram = dax_zone(lab, "z0", 0, 512 * MIB, index * 512 * MIB);
        let mut spec = spec_on(lab, &[&ram]);
        spec.initramfs = Initramfs::Tools;
        let word = format!("vhost_user=on,socket={},id=d0", socket(index));
        spec.arguments.extend(["--disk".to_owned(), word]);
        let mut guest = Guest::boot(&lab.host, &spec)?;
        guest.modprobe(&["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"])?;
        guest.await_path("/dev/vda")?;
        Ok(guest)
    };
    let write = |index: u64| -> Result<Guest, TestError> {
        let mut guest = boot(index)?;
        guest.sh("mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")?;
        guest.start_records(RECORDS, index, "append", RECORD_LIMIT)?;
        guest.await_record(8)?;
        Ok(guest)
    };
    let one = write(0)?;
    let mut two = write(1)?;
    let (orphan_of_one, of_one) = kill_while_it_writes(lab, one)?;
    let so_far = two.acknowledged_records();
    two.await_record(so_far + 20)?;
    let (orphan_of_two, of_two) = kill_while_it_writes(lab, two)?;
    orphan_of_one.ends(lab)?;
    orphan_of_two.ends(lab)?;
    let killed = [(0, of_one), (1, of_two)];
    let looked_at = if lab.full { killed.len() } else { 1 };
    for (index, records) in killed.into_iter().take(looked_at) {
        let mut guest = boot(index)?;
        guest.sh("mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")?;
        let found = guest.check_records(RECORDS, index)?;
        claim(found.records >= records, || {
            format!(
                "{records} records were acknowledged to guest {index}, of which the next finds {found:?}"
            )
        })?;
        no_complaints(&mut guest)?;
        power_off(guest)?;
    }
    daemons.into_iter().try_for_each(end)
}
