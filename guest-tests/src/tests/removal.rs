//! The host takes memory back while a guest uses it: held by the guard, and not held.
//!
//! Each story looks from inside the guest and on the host. The guard is the helper of a VMM with rights, which is what a
//! VMM has here by default.

use std::time::Duration;

use lab_agent::host_protocol::{ExitStatus, SpawnSpec};

use super::pmem::{boot_spec_with_pmem, make_file_system, mount_file_system};
use super::support::{
    GIB, MIB, boot_on, dax_zone, eventually, holds, no_complaints, power_off, scratch, spec_on,
    spec_with, times_told,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::host::{DaxDevice, Output};
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "removal_of_boot_ram_is_refused_and_the_guest_goes_on",
        run: removal_of_boot_ram_is_refused_and_the_guest_goes_on,
    },
    GuestTest {
        name: "removal_of_boot_ram_stops_the_guest_where_asked",
        run: removal_of_boot_ram_stops_the_guest_where_asked,
    },
    GuestTest {
        name: "removal_of_pmem_waits_for_the_guests_eject",
        run: removal_of_pmem_waits_for_the_guests_eject,
    },
    GuestTest {
        name: "removal_of_pmem_cuts_off_a_guest_that_keeps_it",
        run: removal_of_pmem_cuts_off_a_guest_that_keeps_it,
    },
    GuestTest {
        name: "removal_of_pmem_that_nobody_holds_is_survived",
        run: removal_of_pmem_that_nobody_holds_is_survived,
    },
    GuestTest {
        name: "removal_is_held_again_after_the_guard_has_died",
        run: removal_is_held_again_after_the_guard_has_died,
    },
    GuestTest {
        name: "removal_that_is_called_off_leaves_the_device_in_use",
        run: removal_that_is_called_off_leaves_the_device_in_use,
    },
];

/// What the guest's program finds in the first word of its file.
pub(super) const WORD: u64 = 0x6461_7868_756e_6421;
/// From the guest's eject to the host's unbind there is little to do.
pub(super) const REMOVAL_DEADLINE: Duration = PATIENCE;
/// 128 + SIGBUS, as the shell tells it.
pub(super) const KILLED_BY_SIGBUS: &str = "135";

pub(super) const DRIVER: &str = "/sys/bus/dax/drivers/device_dax";

/// What a person would type.
pub(super) fn unbind_script(device: &str) -> String {
    format!("echo {device} > {DRIVER}/unbind")
}

pub(super) fn unbind(lab: &Lab, device: &str) -> Result<Output, TestError> {
    Ok(lab
        .host
        .run_within(&["sh", "-c", &unbind_script(device)], REMOVAL_DEADLINE)?)
}

pub(super) fn is_bound(lab: &Lab, device: &str) -> Result<bool, TestError> {
    Ok(lab
        .host
        .exists(&format!("/sys/bus/dax/devices/{device}/driver"))?)
}

pub(super) fn bind(lab: &Lab, device: &str) -> Result<(), TestError> {
    let script = format!("echo {device} > {DRIVER}/bind");
    lab.host.check(&["sh", "-c", &script])?;
    Ok(())
}

/// Runs a story that may leave a device without its driver, and gives it back.
pub(super) fn with_device<T>(
    lab: &Lab,
    device: &str,
    story: impl FnOnce() -> Result<T, TestError>,
) -> Result<T, TestError> {
    let outcome = story();
    if !is_bound(lab, device)? {
        bind(lab, device)?;
    }
    outcome
}

/// An unbind goes through, and by then the VMM has nothing of the device any more.
pub(super) fn unbind_goes_through(
    lab: &Lab,
    guest: &mut Guest,
    dax: &DaxDevice,
) -> Result<(), TestError> {
    let gone = unbind(lab, &dax.name)?;
    claim(gone.status.success() && !is_bound(lab, &dax.name)?, || {
        format!("{} does not go: {gone:?}", dax.name)
    })?;
    claim(!holds(lab, guest, &dax.path)?, || {
        format!("{} was let go of and is still in use", dax.path)
    })
}

/// A file on the guest's persistent memory, which a program of the guest has mapped and loads from.
pub(super) fn start_loads(guest: &mut Guest) -> Result<(), TestError> {
    make_file_system(guest, "ext4-dax")?;
    mount_file_system(guest, "ext4-dax")?;
    let escapes = WORD.to_le_bytes().map(|byte| format!("\\x{byte:02x}"));
    let bytes = escapes.concat();
    guest.sh(&format!(
        "truncate -s 4096 /mnt/file; printf '{bytes}' | dd of=/mnt/file conv=notrunc 2>/dev/null; sync; \
         (/init loads /mnt/file {WORD} > /tmp/loads 2>&1; echo $? > /tmp/ended) < /dev/null > /dev/null 2>&1 &"
    ))?;
    eventually("the guest's program loads", || {
        Ok(guest.cat("/tmp/loads")?.contains("loading"))
    })
}

/// The program got SIGBUS, and no byte that nobody wrote.
pub(super) fn loads_ended_in_sigbus(guest: &mut Guest) -> Result<(), TestError> {
    guest.await_path("/tmp/ended")?;
    let (ended, said) = (guest.cat("/tmp/ended")?, guest.cat("/tmp/loads")?);
    claim(ended.trim() == KILLED_BY_SIGBUS, || {
        format!("the program that loads ended with {ended} and said {said}")
    })
}

/// Programs on files of their own that load and store by instructions that KVM can't emulate; [`start_loads`] comes first.
fn start_vectors(guest: &mut Guest) -> Result<(), TestError> {
    guest.sh(&format!(
        "cp /mnt/file /mnt/loads; cp /mnt/file /mnt/stores; sync; \
         (/init vector-loads /mnt/loads {WORD} > /tmp/vector-loads 2>&1; echo $? > /tmp/vector-ended) < /dev/null > /dev/null 2>&1 & \
         /init vector-stores /mnt/stores < /dev/null > /tmp/vector-stores 2>&1 &"
    ))?;
    eventually("the guest's programs load and store", || {
        Ok(guest.cat("/tmp/vector-loads")?.contains("loading")
            && !guest.cat("/tmp/vector-stores")?.is_empty())
    })
}

/// What is loaded is a machine check, what is stored goes nowhere.
fn vectors_end_as_they_should(guest: &mut Guest) -> Result<(), TestError> {
    guest.await_path("/tmp/vector-ended")?;
    let (ended, said) = (
        guest.cat("/tmp/vector-ended")?,
        guest.cat("/tmp/vector-loads")?,
    );
    claim(ended.trim() == KILLED_BY_SIGBUS, || {
        format!("the program that loads by vectors ended with {ended} and said {said}")
    })?;
    let mut stores = || -> Result<u64, TestError> {
        let said = guest.cat("/tmp/vector-stores")?;
        let last = said.lines().last().unwrap_or_default();
        let number = last.trim().parse();
        number.map_err(|_| TestError::Claim(format!("the program that stores says {last}")))
    };
    let before = stores()?;
    eventually("the guest's program goes on storing", || {
        Ok(stores()? > before)
    })
}

/// The guest works: its other memory, its agent, its kernel.
pub(super) fn is_well(guest: &mut Guest) -> Result<(), TestError> {
    let report = guest.pattern(Some(32 * MIB))?;
    claim(report.wrong_words == 0, || {
        format!("the guest's RAM is damaged: {report:?}")
    })
}

/// Boots on pmem of the second device with RAM on the first, events to a file.
pub(super) fn boot_on_pmem(
    lab: &Lab,
    keys: &str,
    more: &[&str],
    cmdline: &str,
) -> Result<Guest, TestError> {
    scratch(lab)?;
    lab.host.sh(&format!("cd {SCRATCH} && : > events"))?;
    let path = &lab.host.dax()[1].path;
    let pmem = format!("file={path},size=1G,id=p0{keys}");
    let events = format!("path={SCRATCH}/events");
    let mut words = vec!["-vv", "--event-monitor", &events, "--pmem", &pmem];
    words.extend(more);
    let mut spec = spec_with(lab, &words);
    cmdline.clone_into(&mut spec.cmdline);
    boot_spec_with_pmem(lab, spec)
}

/// The host goes on as soon as nothing of the memory is left, which can be before that is told.
pub(super) fn told(lab: &Lab, event: &str) -> Result<(), TestError> {
    eventually(&format!("the event {event} is told"), || {
        Ok(times_told(lab, &format!("\"{event}\""))? > 0)
    })
}

fn removal_of_boot_ram_is_refused_and_the_guest_goes_on(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 1, 512 * MIB, 0);
    let device = lab.host.dax()[1].name.clone();
    let mut guest = boot_on(lab, &[&zone])?;
    let refused = unbind(lab, &device)?;
    claim(
        !refused.status.success() && refused.stderr.contains("Operation not permitted"),
        || format!("an unbind under a guest's RAM: {refused:?}"),
    )?;
    claim(is_bound(lab, &device)?, || {
        format!("{device} has no driver")
    })?;
    guest
        .vmm()
        .wait_for_error("the removal is refused", REMOVAL_DEADLINE)?;
    let said = guest.vmm().stderr();
    claim(said.contains("memory zone z0"), || {
        format!("the VMM does not say which zone refuses: {said}")
    })?;
    is_well(&mut guest)?;
    // A device that nobody uses goes at once.
    let other = lab.host.dax()[0].name.clone();
    with_device(lab, &other, || {
        let gone = unbind(lab, &other)?;
        claim(gone.status.success(), || {
            format!("{other} is not in use and is held: {gone:?}")
        })
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    // Nobody is left who would hold it.
    with_device(lab, &device, || {
        let gone = unbind(lab, &device)?;
        claim(gone.status.success(), || {
            format!("{device} is held after its guest has ended: {gone:?}")
        })
    })
}

fn removal_of_boot_ram_stops_the_guest_where_asked(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 1, 512 * MIB, 0) + ",on_removal=stop,removal_timeout=2";
    let device = lab.host.dax()[1].name.clone();
    let mut guest = boot_on(lab, &[&zone])?;
    with_device(lab, &device, || {
        let gone = unbind(lab, &device)?;
        claim(gone.status.success() && !is_bound(lab, &device)?, || {
            format!("the guest was to stop for it: {gone:?}")
        })?;
        let status = guest.vmm().wait(REMOVAL_DEADLINE)?;
        let said = guest.vmm().stderr();
        claim(status == ExitStatus::Code(5) && said.contains("z0"), || {
            format!("ended with {status}: {said}")
        })
    })?;
    drop(guest);
    power_off(boot_on(lab, &[&dax_zone(lab, "z0", 1, 512 * MIB, 0)])?)
}

fn removal_of_pmem_waits_for_the_guests_eject(lab: &mut Lab) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let mut guest = boot_on_pmem(lab, "", &[], "")?;
    start_loads(&mut guest)?;
    with_device(lab, &dax.name, || {
        unbind_goes_through(lab, &mut guest, &dax)
    })?;
    guest.await_gone("/dev/pmem0")?;
    loads_ended_in_sigbus(&mut guest)?;
    is_well(&mut guest)?;
    told(lab, "removal-requested")?;
    told(lab, "device-removed")?;
    power_off(guest)
}

fn removal_of_pmem_cuts_off_a_guest_that_keeps_it(lab: &mut Lab) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let mut guest = boot_on_pmem(lab, ",removal_timeout=2", &[], "acpiphp.disable=1")?;
    start_loads(&mut guest)?;
    start_vectors(&mut guest)?;
    with_device(lab, &dax.name, || {
        unbind_goes_through(lab, &mut guest, &dax)
    })?;
    loads_ended_in_sigbus(&mut guest)?;
    vectors_end_as_they_should(&mut guest)?;
    is_well(&mut guest)?;
    told(lab, "device-cut-off")?;
    power_off(guest)
}

fn removal_of_pmem_that_nobody_holds_is_survived(lab: &mut Lab) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let mut guest = boot_on_pmem(lab, "", &["--removal-guard", "off"], "")?;
    start_loads(&mut guest)?;
    with_device(lab, &dax.name, || {
        let gone = unbind(lab, &dax.name)?;
        claim(gone.status.success(), || {
            format!(
                "somebody holds {} although nobody is to: {gone:?}",
                dax.name
            )
        })?;
        loads_ended_in_sigbus(&mut guest)?;
        eventually("nothing of the device is left in the VMM", || {
            Ok(!holds(lab, &mut guest, &dax.path)?)
        })
    })?;
    guest.await_gone("/dev/pmem0")?;
    is_well(&mut guest)?;
    told(lab, "device-cut-off")?;
    power_off(guest)?;
    // As good as before.
    power_off(boot_on(lab, &[&dax_zone(lab, "z0", 1, GIB, 0)])?)
}

/// Whoever waits gives up; the guest that was asked by then may let go all the same, but nothing is taken from it.
fn removal_that_is_called_off_leaves_the_device_in_use(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 1, 512 * MIB, 0) + ",on_removal=stop,removal_timeout=3600";
    let device = lab.host.dax()[1].name.clone();
    let mut spec = spec_on(lab, &[&zone]);
    // Nobody in this guest hears of its power button.
    "acpi_no_button=1".clone_into(&mut spec.cmdline);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    let script = unbind_script(&device);
    let waiting = lab.host.spawn(SpawnSpec {
        argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
        ..SpawnSpec::default()
    })?;
    guest
        .vmm()
        .wait_for_error("the host wants memory back", REMOVAL_DEADLINE)?;
    claim(!waiting.has_ended(), || "it does not wait".to_owned())?;
    waiting.signal(9)?;
    waiting.wait(REMOVAL_DEADLINE)?;
    claim(is_bound(lab, &device)?, || {
        format!("{device} has no driver")
    })?;
    is_well(&mut guest)?;
    no_complaints(&mut guest)?;
    power_off(guest)
}

/// A helper that dies is followed by another one, which the VMM hears of removals from.
fn removal_is_held_again_after_the_guard_has_died(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 1, 512 * MIB, 0);
    let device = lab.host.dax()[1].name.clone();
    let mut spec = spec_on(lab, &[&zone]);
    spec.arguments.push("-v".to_owned());
    let mut guest = Guest::boot(&lab.host, &spec)?;
    let pid = guest.vmm().pid();
    for times in 1..=3 {
        eventually("the removal is held", || {
            let said = guest.vmm().stderr();
            Ok(said.matches("its removal is held").count() == times)
        })?;
        let children = format!("/proc/{pid}/task/{pid}/children");
        let helper = lab.host.read_text(&children)?;
        lab.host.check(&["kill", "-9", helper.trim()])?;
    }
    eventually("the removal is held again", || {
        let said = guest.vmm().stderr();
        Ok(said.matches("its removal is held").count() == 4)
    })?;
    let refused = unbind(lab, &device)?;
    claim(!refused.status.success() && is_bound(lab, &device)?, || {
        format!("an unbind after the guard has died: {refused:?}")
    })?;
    // By the VMM, not because it was silent.
    guest
        .vmm()
        .wait_for_error("the removal is refused", REMOVAL_DEADLINE)?;
    is_well(&mut guest)?;
    power_off(guest)
}
