//! Holders, openers and guards that are stopped, killed and started again.

use std::time::Instant;

use lab_agent::host_protocol::ExitStatus;

use super::super::support::{eventually, scratch};
use super::super::{GuestTest, Lab, TestError, claim};
use super::parties::{
    Daemon, Device, Holder, PATIENT_MS, SIGCONT, SIGKILL, SIGSTOP, SIGTERM, SOON, Way, bind,
    has_passed, spawn, still_waits, was_refused,
};
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "guard_waits_for_what_a_dead_holder_has_lent",
        run: guard_waits_for_what_a_dead_holder_has_lent,
    },
    GuestTest {
        name: "guard_takes_silence_for_no",
        run: guard_takes_silence_for_no,
    },
    GuestTest {
        name: "guard_hears_of_openers_that_are_killed",
        run: guard_hears_of_openers_that_are_killed,
    },
    GuestTest {
        name: "guard_can_be_ended_and_started_again",
        run: guard_can_be_ended_and_started_again,
    },
    GuestTest {
        name: "guard_helper_outlives_its_vmm_and_ends_by_itself",
        run: guard_helper_outlives_its_vmm_and_ends_by_itself,
    },
];

/// A process that a holder lent its descriptor to gives it back.
fn give_back(lab: &Lab, path: &str) -> Result<(), TestError> {
    Ok(lab.host.write_file(path, b"")?)
}

fn guard_waits_for_what_a_dead_holder_has_lent(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let daemon = Daemon::start(lab)?;
    let back = format!("{SCRATCH}/give-back");
    // Killed while a removal waits, and before one comes.
    for asked in [true, false] {
        let mut holder = Holder::start(lab, &device)?;
        holder.told(&format!("lend {back}"), "lent to")?;
        let waiting = if asked {
            let removal = spawn(lab, Way::DisableDevice.command(&device))?;
            holder.is_asked()?;
            Some(removal)
        } else {
            None
        };
        holder.signal(SIGKILL)?;
        daemon.says("process has ended")?;
        let removal = match waiting {
            Some(removal) => removal,
            None => spawn(lab, Way::DisableDevice.command(&device))?,
        };
        // It is at the door, or will be soon; either way it does not pass.
        let list = || {
            lab.host
                .check(&["lab-agent", "guard-list", &Daemon::socket()])
        };
        eventually("the removal waits", || Ok(list()?.contains("daxctl")))?;
        let listed = list()?;
        claim(listed.contains("ended, memory lent"), || listed.clone())?;
        still_waits(lab, &removal, &device)?;
        give_back(lab, &back)?;
        has_passed(lab, removal, &device)?;
        bind(lab, &device)?;
        lab.host.check(&["rm", &back])?;
    }
    // With nothing lent the exit is enough.
    let holder = Holder::start(lab, &device)?;
    let pid = holder.pid();
    holder.signal(SIGKILL)?;
    let status = holder.wait()?;
    claim(status == ExitStatus::Signal(SIGKILL), || {
        format!("process {pid}: {status}")
    })?;
    has_passed(
        lab,
        spawn(lab, Way::DisableDevice.command(&device))?,
        &device,
    )?;
    bind(lab, &device)?;
    daemon.end()
}

fn guard_takes_silence_for_no(lab: &mut Lab) -> Result<(), TestError> {
    const ANSWER_MS: u64 = 2000;
    scratch(lab)?;
    let device = Device::held(lab)?;
    let daemon = Daemon::start(lab)?;
    let mut holder = Holder::at(lab, &device, &Daemon::socket(), ANSWER_MS)?;
    holder.signal(SIGSTOP)?;
    let begin = Instant::now();
    let removal = spawn(lab, Way::Unbind.command(&device))?;
    was_refused(lab, removal, &device)?;
    let took = begin.elapsed();
    claim(took.as_millis() >= u128::from(ANSWER_MS), || {
        format!("refused after {took:?} already")
    })?;
    daemon.says("did not answer in time")?;
    holder.signal(SIGCONT)?;
    holder.is_asked()?;
    holder.says("withdrawn")?;
    // It is held still, and the next one is asked for.
    let removal = spawn(lab, Way::Unbind.command(&device))?;
    holder.is_asked()?;
    holder.told("release", "answered")?;
    has_passed(lab, removal, &device)?;
    bind(lab, &device)?;
    holder.end()?;
    daemon.end()
}

fn guard_hears_of_openers_that_are_killed(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let daemon = Daemon::start(lab)?;
    let mut holder = Holder::start(lab, &device)?;
    for way in [Way::Unbind, Way::DisableNamespace] {
        let removal = spawn(lab, way.command(&device))?;
        holder.is_asked()?;
        removal.signal(SIGKILL)?;
        let status = removal.wait(SOON)?;
        claim(status == ExitStatus::Signal(SIGKILL), || {
            format!("the opener should be killed while it waits: {status}")
        })?;
        holder.says("withdrawn")?;
        daemon.says("it ended while it waited")?;
    }
    let usable = device.is_usable(lab)?;
    claim(usable, || {
        "an opener that is dead has taken the device away".to_owned()
    })?;
    let removal = spawn(lab, Way::Unbind.command(&device))?;
    holder.is_asked()?;
    holder.told("refuse no", "answered")?;
    was_refused(lab, removal, &device)?;
    holder.end()?;
    daemon.end()
}

fn guard_can_be_ended_and_started_again(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let daemon = Daemon::start(lab)?;
    let mut holder = Holder::start(lab, &device)?;
    let removal = spawn(lab, Way::Unbind.command(&device))?;
    holder.is_asked()?;
    daemon.signal(SIGTERM)?;
    was_refused(lab, removal, &device)?;
    let status = daemon.wait()?;
    claim(status.success(), || {
        format!("the guard ended with {status}")
    })?;
    holder.says("lost")?;

    let daemon = Daemon::start(lab)?;
    holder.told("reconnect", "held")?;
    let removal = spawn(lab, Way::Unbind.command(&device))?;
    holder.is_asked()?;
    holder.told("refuse no", "answered")?;
    was_refused(lab, removal, &device)?;

    // One that is killed lets those through who wait: the kernel's rule, and why a VMM must not be the guard.
    let removal = spawn(lab, Way::Unbind.command(&device))?;
    holder.is_asked()?;
    daemon.signal(SIGKILL)?;
    has_passed(lab, removal, &device)?;
    holder.says("lost")?;
    holder.signal(SIGKILL)?;
    holder.wait()?;
    bind(lab, &device)?;

    // Its socket is left; the next one takes it over.
    let daemon = Daemon::start(lab)?;
    let holder = Holder::start(lab, &device)?;
    holder.end()?;
    daemon.end()
}

fn guard_helper_outlives_its_vmm_and_ends_by_itself(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let back = format!("{SCRATCH}/give-back");
    let gone = |lab: &Lab, pid: &str| -> Result<(), TestError> {
        let path = format!("/proc/{pid}");
        eventually("the helper has ended", || Ok(!lab.host.exists(&path)?))
    };
    let helper_of = |holder: &Holder| -> Result<String, TestError> {
        let text = holder.said();
        let pid = text.lines().find_map(|line| line.strip_prefix("helper "));
        pid.map(str::to_owned)
            .ok_or_else(|| TestError::Claim(format!("no helper in {text}")))
    };
    let mut holder = Holder::at(lab, &device, "helper", PATIENT_MS)?;
    let helper = helper_of(&holder)?;
    let removal = spawn(lab, Way::DisableNamespace.command(&device))?;
    holder.is_asked()?;
    holder.told("refuse no", "answered")?;
    was_refused(lab, removal, &device)?;

    holder.told(&format!("lend {back}"), "lent to")?;
    let removal = spawn(lab, Way::DisableNamespace.command(&device))?;
    holder.is_asked()?;
    lab.host.check(&["kill", "-TERM", &helper])?;
    holder.signal(SIGKILL)?;
    // The lent descriptor keeps its pipes; its end is seen elsewhere.
    let path = format!("/proc/{}/exe", holder.pid());
    eventually("the holder has ended", || Ok(!lab.host.exists(&path)?))?;
    still_waits(lab, &removal, &device)?;
    give_back(lab, &back)?;
    has_passed(lab, removal, &device)?;
    gone(lab, &helper)?;
    Way::DisableNamespace.undo(lab, &device)?;

    // An orderly end takes it along at once.
    let holder = Holder::at(lab, &device, "helper", PATIENT_MS)?;
    let helper = helper_of(&holder)?;
    holder.end()?;
    gone(lab, &helper)
}
