//! One device-dax device, several users: guests, and a daemon that serves a part of it or has been lent another. Whoever takes
//! the device away waits for all of them.

use lab_agent::host_protocol::ExitStatus;

use super::add_back::COMPLAINTS;
use super::guard::parties::Daemon as GuardDaemon;
use super::pmem::{boot_spec_with_pmem, boot_with_pmem};
use super::removal::{REMOVAL_DEADLINE, is_bound, is_well, unbind_script, with_device};
use super::served_disk::{Frontend, end, serve, start};
use super::support::{MIB, no_complaints, power_off, says_i_o_error, scratch, spec_with};
use super::vhost_pmem::{lend, word};
use super::{GuestTest, Lab, TestError, claim, support};
use crate::guest::Guest;
use crate::host::DaxDevice;
use crate::host::account::kernel_says;
use crate::host::process::{Process, SIGKILL};
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "removal_of_a_served_range_is_answered_as_its_daemon_was_told",
        run: removal_of_a_served_range_is_answered_as_its_daemon_was_told,
    },
    GuestTest {
        name: "removal_of_a_guests_served_disk_waits_until_the_daemon_is_off_it",
        run: removal_of_a_guests_served_disk_waits_until_the_daemon_is_off_it,
    },
    GuestTest {
        name: "removal_of_pmem_that_is_lent_waits_for_its_guest_and_its_borrower",
        run: removal_of_pmem_that_is_lent_waits_for_its_guest_and_its_borrower,
    },
    GuestTest {
        name: "removal_of_a_device_waits_for_its_guest_and_for_the_daemon_that_serves_of_it",
        run: removal_of_a_device_waits_for_its_guest_and_for_the_daemon_that_serves_of_it,
    },
    GuestTest {
        name: "removal_of_a_daemons_pmem_waits_for_its_guest_and_for_the_daemon",
        run: removal_of_a_daemons_pmem_waits_for_its_guest_and_for_the_daemon,
    },
    GuestTest {
        name: "removal_of_a_daemons_pmem_goes_on_when_its_guest_keeps_it_too_long",
        run: removal_of_a_daemons_pmem_goes_on_when_its_guest_keeps_it_too_long,
    },
];

/// Where VMMs and daemons look for the guard.
const GUARD: &str = "/run/daxhund/guard.sock";
const HELD: &str = "the removal of the disk's device is held";
const PMEM_HELD: &str = "the removal of the memory's device is held";
/// The daemon's share is closed, and what the guest flushes is an error.
const LET_GO: &str = "the memory is let go of, for the host";
const WANTED: &str = "the host wants the disk's device";
const GIVEN: &str = "is given to the host";

/// Runs a story while the guard's daemon runs where everybody looks for it. The host's kernel has nothing to say against it.
fn with_guard(
    lab: &Lab,
    story: impl FnOnce(&GuardDaemon) -> Result<(), TestError>,
) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh("mkdir -p /run/daxhund")?;
    let guard = GuardDaemon::at(lab, GUARD, &[])?;
    let before = kernel_says(&lab.host, &COMPLAINTS)?.len();
    let outcome = story(&guard);
    let ended = guard.end();
    // One that was killed leaves it, and those that come would wait for it.
    lab.host.sh(&format!("rm -f {GUARD}; rmdir /run/daxhund"))?;
    outcome.and(ended)?;
    let complaints = kernel_says(&lab.host, &COMPLAINTS)?.split_off(before);
    claim(complaints.is_empty(), || {
        format!("the host's kernel complains: {complaints:?}")
    })
}

/// Prints the processes that have the device mapped or open.
fn users_script(dax: &DaxDevice) -> String {
    format!(
        "for p in /proc/[0-9]*; do (cat $p/maps; ls -l $p/fd) 2>/dev/null | grep -q {} && echo ${{p#/proc/}}; done",
        dax.path
    )
}

/// These processes use the device, and nobody else does; the guard is to know those in `held`.
fn is_used_by(lab: &Lab, dax: &DaxDevice, users: &[u32], held: &[u32]) -> Result<(), TestError> {
    let seen = lab.host.sh(&format!("{}; true", users_script(dax)))?;
    let mut pids: Vec<u32> = seen.split_whitespace().flat_map(str::parse).collect();
    pids.sort_unstable();
    claim(pids == users, || format!("expected {users:?}, seen {seen}"))?;
    let listed = lab.host.check(&["lab-agent", "guard-list", GUARD])?;
    for pid in held {
        let entry = format!("\"device\":\"{}\",", dax.name);
        let is_it =
            |part: &&str| part.contains(&entry) && part.contains(&format!("\"pid\":{pid},"));
        claim(listed.split('{').any(|part| is_it(&part)), || {
            format!("process {pid} is no user to the guard: {listed}")
        })?;
    }
    Ok(())
}

/// A person who takes the device away, and looks at once who has it mapped or open then.
fn take(lab: &Lab, dax: &DaxDevice) -> Result<Process, TestError> {
    let script = format!(
        "sh -c '{}' && {}; test ! -e /sys/bus/dax/devices/{}/driver",
        unbind_script(&dax.name),
        users_script(dax),
        dax.name
    );
    start(lab, &["sh", "-c", &script], false)
}

fn still_waits(lab: &Lab, removal: &Process, dax: &DaxDevice) -> Result<(), TestError> {
    claim(is_bound(lab, &dax.name)? && !removal.has_ended(), || {
        format!("it should wait: {} {}", removal.stdout(), removal.stderr())
    })
}

/// The device is gone, and nobody had anything of it at that moment.
fn has_gone(removal: Process) -> Result<(), TestError> {
    let output = removal.finish(REMOVAL_DEADLINE)?;
    claim(output.status.success() && output.stdout.is_empty(), || {
        format!("{output:?}")
    })
}

/// The daemon ends by itself, and says that it gave the device.
fn gave_it_up(daemon: Process) -> Result<(), TestError> {
    let output = daemon.finish(REMOVAL_DEADLINE)?;
    claim(
        output.status == ExitStatus::Code(1)
            && output.stderr.contains(GIVEN)
            && output.stderr.contains("back and has it now"),
        || format!("{output:?}"),
    )
}

fn removal_of_a_served_range_is_answered_as_its_daemon_was_told(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let socket = format!("{SCRATCH}/blk.sock");
    let disk = |more: &str| format!("{},size=64M{more}", dax.path);
    let words = ["daxhund-vhost-user-blk", "--socket-path", &socket, "--dax"];
    let with = |disk: &str, guard: &str| {
        start(
            lab,
            &[&words[..], &[disk, "--removal-guard", guard]].concat(),
            false,
        )
    };
    scratch(lab)?;
    let output = with(&disk(""), "daemon")?.finish(REMOVAL_DEADLINE)?;
    claim(
        !output.status.success() && output.stderr.contains("no removal guard listens"),
        || format!("{output:?}"),
    )?;
    with_guard(lab, |_| {
        // Kept.
        let daemon = serve(lab, &socket, &disk(",on_removal=refuse"), &[])?;
        daemon.wait_for_error(HELD, REMOVAL_DEADLINE)?;
        let mut frontend = Frontend::connect(lab, &socket)?;
        let refused = take(lab, &dax)?.finish(REMOVAL_DEADLINE)?;
        claim(
            refused.stderr.contains("Operation not permitted") && is_bound(lab, &dax.name)?,
            || format!("{refused:?}"),
        )?;
        frontend.ask("write 0 7", "0")?;
        frontend.go()?;
        end(daemon)?;

        with_device(lab, &dax.name, || {
            let daemon = serve(lab, &socket, &disk(",removal_timeout=3600"), &[])?;
            daemon.wait_for_error(HELD, REMOVAL_DEADLINE)?;
            let mut frontend = Frontend::connect(lab, &socket)?;
            // Called off.
            let script = unbind_script(&dax.name);
            let removal = start(lab, &["sh", "-c", &script], false)?;
            daemon.wait_for_error(WANTED, REMOVAL_DEADLINE)?;
            still_waits(lab, &removal, &dax)?;
            removal.signal(SIGKILL)?;
            removal.wait(REMOVAL_DEADLINE)?;
            daemon.wait_for_error("called off", REMOVAL_DEADLINE)?;
            frontend.ask("read 0", "0 7")?;
            // When the frontend has gone nobody needs the time that is left.
            let removal = take(lab, &dax)?;
            support::eventually("the daemon is asked again", || {
                Ok(daemon.stderr().matches(WANTED).count() == 2)
            })?;
            frontend.ask("write 0 9", "0")?;
            still_waits(lab, &removal, &dax)?;
            frontend.go()?;
            has_gone(removal)?;
            gave_it_up(daemon)
        })?;

        // A frontend that stays has errors from then on.
        with_device(lab, &dax.name, || {
            let daemon = serve(lab, &socket, &disk(",removal_timeout=0"), &[])?;
            daemon.wait_for_error(HELD, REMOVAL_DEADLINE)?;
            let mut frontend = Frontend::connect(lab, &socket)?;
            frontend.ask("read 0", "0 9")?;
            has_gone(take(lab, &dax)?)?;
            for request in ["read 0", "write 0 8", "flush"] {
                frontend.fails(request)?;
            }
            claim(!daemon.has_ended(), || "the session was cut off".to_owned())?;
            frontend.go()?;
            gave_it_up(daemon)
        })
    })
}

/// A guest of ours with RAM on the first device.
fn boot(lab: &Lab, words: &[&str]) -> Result<Guest, TestError> {
    let mut guest = Guest::boot(&lab.host, &spec_with(lab, words))?;
    guest.modprobe(&["virtio_pci", "virtio_blk"])?;
    guest.await_path("/dev/vda")?;
    Ok(guest)
}

fn read_of_the_disk(guest: &mut Guest) -> Result<String, TestError> {
    Ok(guest.sh("dd if=/dev/vda of=/dev/null bs=64k count=4 iflag=direct 2>&1 || true")?)
}

fn disk_works(guest: &mut Guest) -> Result<(), TestError> {
    guest.fill_blocks("/dev/vda", 4096, 2 * MIB, 11)?;
    let report = guest.compare_blocks("/dev/vda", 4096, 2 * MIB, 11)?;
    claim(report.wrong_words == 0, || format!("{report:?}"))
}

fn disk_fails(guest: &mut Guest) -> Result<(), TestError> {
    says_i_o_error(&read_of_the_disk(guest)?)
}

fn removal_of_a_guests_served_disk_waits_until_the_daemon_is_off_it(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let socket = format!("{SCRATCH}/blk.sock");
    let disk = format!("{},size=64M,removal_timeout=5", dax.path);
    with_guard(lab, |_| {
        with_device(lab, &dax.name, || {
            let daemon = serve(lab, &socket, &disk, &[])?;
            daemon.wait_for_error(HELD, REMOVAL_DEADLINE)?;
            let word = format!("vhost_user=on,socket={socket},id=d0");
            let mut guest = boot(lab, &["--disk", &word])?;
            disk_works(&mut guest)?;
            no_complaints(&mut guest)?;
            // Requests are under way all the time.
            guest.sh(
                "(while dd if=/dev/zero of=/dev/vda bs=64k count=64 oflag=direct; do :; done; touch /tmp/failed) \
                 < /dev/null > /tmp/writes 2>&1 &",
            )?;
            let removal = take(lab, &dax)?;
            daemon.wait_for_error(WANTED, REMOVAL_DEADLINE)?;
            still_waits(lab, &removal, &dax)?;
            has_gone(removal)?;
            guest.await_path("/tmp/failed")?;
            disk_fails(&mut guest)?;
            is_well(&mut guest)?;
            claim(!daemon.has_ended(), || "the session was cut off".to_owned())?;
            power_off(guest)?;
            gave_it_up(daemon)
        })
    })
}

/// The daemon's disk is a file: it has nothing of the device but what the guest has lent it.
fn removal_of_pmem_that_is_lent_waits_for_its_guest_and_its_borrower(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let (socket, file) = (format!("{SCRATCH}/blk.sock"), format!("{SCRATCH}/disk"));
    with_guard(lab, |_| {
        lab.host.sh(&format!("truncate -s 64M {file}"))?;
        let words = [
            "daxhund-vhost-user-blk",
            "--socket-path",
            &socket,
            "--file",
            &file,
        ];
        with_device(lab, &dax.name, || {
            let daemon = start(lab, &words, false)?;
            daemon.wait_for_error("listening", REMOVAL_DEADLINE)?;
            let disk = format!("vhost_user=on,socket={socket},id=d0");
            let pmem = format!("file={},size=1G,id=p0", dax.path);
            let spec = spec_with(lab, &["--disk", &disk, "--pmem", &pmem]);
            let mut guest = boot_spec_with_pmem(lab, spec)?;
            guest.modprobe(&["virtio_blk"])?;
            guest.await_path("/dev/vda")?;
            disk_works(&mut guest)?;
            let vmm = guest.vmm().pid();
            is_used_by(lab, &dax, &[daemon.pid(), vmm], &[vmm])?;
            has_gone(take(lab, &dax)?)?;
            guest.await_gone("/dev/pmem0")?;
            // The disk is another matter.
            disk_works(&mut guest)?;
            is_well(&mut guest)?;
            power_off(guest)?;
            end(daemon)
        })
    })
}

fn removal_of_a_device_waits_for_its_guest_and_for_the_daemon_that_serves_of_it(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let socket = format!("{SCRATCH}/blk.sock");
    let disk = format!("{},offset=1G,size=64M,removal_timeout=2", dax.path);
    with_guard(lab, |_| {
        with_device(lab, &dax.name, || {
            let daemon = serve(lab, &socket, &disk, &[])?;
            daemon.wait_for_error(HELD, REMOVAL_DEADLINE)?;
            let word = format!("vhost_user=on,socket={socket},id=d0");
            // A guest that does not eject: it is cut off from the memory, and the daemon with it.
            let pmem = format!("file={},size=1G,id=p0,removal_timeout=4", dax.path);
            let mut spec = spec_with(lab, &["--disk", &word, "--pmem", &pmem]);
            "acpiphp.disable=1".clone_into(&mut spec.cmdline);
            let mut guest = boot_spec_with_pmem(lab, spec)?;
            guest.modprobe(&["virtio_blk"])?;
            guest.await_path("/dev/vda")?;
            disk_works(&mut guest)?;
            let users = [daemon.pid(), guest.vmm().pid()];
            is_used_by(lab, &dax, &users, &users)?;
            let removal = take(lab, &dax)?;
            daemon.wait_for_error(GIVEN, REMOVAL_DEADLINE)?;
            has_gone(removal)?;
            disk_fails(&mut guest)?;
            is_well(&mut guest)?;
            power_off(guest)?;
            gave_it_up(daemon)
        })
    })
}

/// A daemon that lends a part of the device, whose removal it has held.
fn lend_held(lab: &Lab, dax: &DaxDevice, more: &str) -> Result<Process, TestError> {
    let daemon = lend(lab, &["--dax", &format!("{},size=512M{more}", dax.path)])?;
    daemon.wait_for_error(PMEM_HELD, REMOVAL_DEADLINE)?;
    Ok(daemon)
}

/// Stores, and what a flush of them came to.
fn flush(guest: &mut Guest) -> Result<String, TestError> {
    let dd = "dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 conv=notrunc,fsync";
    Ok(guest.sh(&format!("{dd} 2>&1 && echo flushed || true"))?)
}

fn flush_works(guest: &mut Guest) -> Result<(), TestError> {
    let said = flush(guest)?;
    claim(said.contains("flushed"), || said.clone())
}

fn flush_fails(guest: &mut Guest) -> Result<(), TestError> {
    says_i_o_error(&flush(guest)?)
}

fn removal_of_a_daemons_pmem_waits_for_its_guest_and_for_the_daemon(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    with_guard(lab, |_| {
        // Kept by the daemon's word, whatever its guest would do.
        let daemon = lend_held(lab, &dax, ",on_removal=refuse")?;
        let refused = take(lab, &dax)?.finish(REMOVAL_DEADLINE)?;
        claim(
            refused.stderr.contains("Operation not permitted") && is_bound(lab, &dax.name)?,
            || format!("{refused:?}"),
        )?;
        end(daemon)?;
        // The guest ejects it: asked by its VMM, which hears of it from the guard, or from the daemon alone.
        for guard in ["daemon", "off"] {
            with_device(lab, &dax.name, || {
                let daemon = lend_held(lab, &dax, ",removal_timeout=3600")?;
                let words = ["--removal-guard", guard, "--pmem", &word("p0")];
                let mut guest = boot_with_pmem(lab, &words)?;
                flush_works(&mut guest)?;
                let users = [daemon.pid(), guest.vmm().pid()];
                let held = if guard == "off" { &users[..1] } else { &users };
                is_used_by(lab, &dax, &users, held)?;
                has_gone(take(lab, &dax)?)?;
                guest.await_gone("/dev/pmem0")?;
                no_complaints(&mut guest)?;
                power_off(guest)?;
                gave_it_up(daemon)
            })?;
        }
        Ok(())
    })
}

/// The daemon's time is up before its guest's VMM takes the guest off the memory.
fn removal_of_a_daemons_pmem_goes_on_when_its_guest_keeps_it_too_long(
    lab: &mut Lab,
) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    with_guard(lab, |_| {
        with_device(lab, &dax.name, || {
            let daemon = lend_held(lab, &dax, ",removal_timeout=1")?;
            let lent = format!("{},removal_timeout=10", word("p0"));
            let mut spec = spec_with(lab, &["--pmem", &lent]);
            "acpiphp.disable=1".clone_into(&mut spec.cmdline);
            let mut guest = boot_spec_with_pmem(lab, spec)?;
            flush_works(&mut guest)?;
            let removal = take(lab, &dax)?;
            daemon.wait_for_error(LET_GO, REMOVAL_DEADLINE)?;
            flush_fails(&mut guest)?;
            still_waits(lab, &removal, &dax)?;
            claim(!daemon.has_ended(), || "the session was cut off".to_owned())?;
            has_gone(removal)?;
            gave_it_up(daemon)?;
            // Nobody is left to answer but the VMM.
            flush_fails(&mut guest)?;
            is_well(&mut guest)?;
            power_off(guest)
        })
    })
}
