//! Every way to take a device away: held while it is held, let through after its release, refused on refusal.

use super::super::support::{LAB_USER, open_to_all, scratch};
use super::super::{GuestTest, Lab, TestError, claim};
use super::parties::{
    Daemon, Device, Holder, PATIENT_MS, SOON, Way, bind, has_passed, shell, spawn, still_waits,
    was_refused, with_memory_offline,
};
use crate::suite::SCRATCH;
use lab_agent::host_protocol::SpawnSpec;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "guard_holds_every_removal_until_the_release",
        run: guard_holds_every_removal_until_the_release,
    },
    GuestTest {
        name: "guard_refuses_every_removal_that_the_holder_refuses",
        run: guard_refuses_every_removal_that_the_holder_refuses,
    },
    GuestTest {
        name: "guard_lets_others_pass_at_once",
        run: guard_lets_others_pass_at_once,
    },
    GuestTest {
        name: "guard_refuses_what_it_can_not_tell_and_names_the_way",
        run: guard_refuses_what_it_can_not_tell_and_names_the_way,
    },
    GuestTest {
        name: "guard_releases_on_request",
        run: guard_releases_on_request,
    },
    GuestTest {
        name: "guard_serves_users_without_rights",
        run: guard_serves_users_without_rights,
    },
    GuestTest {
        name: "guard_can_not_hold_what_it_does_not_see",
        run: guard_can_not_hold_what_it_does_not_see,
    },
];

fn guard_holds_every_removal_until_the_release(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let daemon = Daemon::start(lab)?;
    // The bus has all of the host's memory on it: see the refusals.
    let ways = Way::ALL
        .into_iter()
        .filter(|way| !matches!(way, Way::UnbindBus));
    with_memory_offline(lab, || {
        ways.into_iter()
            .try_for_each(|way| held_and_let_through(lab, &device, way))
    })?;
    daemon.end()
}

fn held_and_let_through(lab: &Lab, device: &Device, way: Way) -> Result<(), TestError> {
    let mut holder = Holder::start(lab, device)?;
    let removal = spawn(lab, way.command(device))?;
    let asked = holder.is_asked()?;
    claim(asked.contains(way.caught_at()), || {
        format!("{way:?} was caught elsewhere: {asked}")
    })?;
    still_waits(lab, &removal, device)?;
    holder.told("release", "answered")?;
    has_passed(lab, removal, device)?;
    holder.end()?;
    way.undo(lab, device)
}

fn guard_refuses_every_removal_that_the_holder_refuses(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let daemon = Daemon::start(lab)?;
    with_memory_offline(lab, || {
        let mut ways = Way::ALL.into_iter();
        ways.try_for_each(|way| refused_and_kept(lab, &daemon, &device, way))
    })?;
    // The refused destruction has destroyed nothing.
    has_passed(
        lab,
        spawn(lab, Way::DisableNamespace.command(&device))?,
        &device,
    )?;
    Way::DisableNamespace.undo(lab, &device)?;
    daemon.end()
}

/// The tools try again by other files and ask again: the holder refuses each time.
fn refused_and_kept(
    lab: &Lab,
    daemon: &Daemon,
    device: &Device,
    way: Way,
) -> Result<(), TestError> {
    let mut holder = Holder::start(lab, device)?;
    let why = format!("it is boot RAM, says {way:?}");
    holder.told(&format!("always-refuse {why}"), "stubborn")?;
    let removal = spawn(lab, way.command(device))?;
    let asked = holder.is_asked()?;
    claim(asked.contains(way.caught_at()), || {
        format!("{way:?} was caught elsewhere: {asked}")
    })?;
    was_refused(lab, removal, device)?;
    let line = daemon.says(&why)?;
    claim(line.contains("vm1") && line.contains(&device.name), || {
        format!("the log does not say who keeps what: {line}")
    })?;
    holder.end()
}

fn guard_lets_others_pass_at_once(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let (device, other) = (Device::held(lab)?, Device::other(lab)?);
    let daemon = Daemon::start(lab)?;
    let holder = Holder::start(lab, &device)?;
    for way in [Way::Unbind, Way::DisableDevice, Way::DisableNamespace] {
        has_passed(lab, spawn(lab, way.command(&other))?, &other)?;
        way.undo(lab, &other)?;
    }
    // Who reads takes nothing away, and nor does another driver's file.
    lab.host
        .run(&["cat", "/sys/bus/dax/drivers/device_dax/unbind"])?;
    let argv = shell("echo nonsense > /sys/bus/dax/drivers/kmem/unbind");
    let output = spawn(lab, argv)?.finish(SOON)?;
    claim(!output.stderr.contains("not permitted"), || {
        format!("kmem has nothing that is held: {}", output.stderr)
    })?;
    claim(!holder.has_said("wanted"), || {
        "the holder was asked for nothing of its own".to_owned()
    })?;
    holder.end()?;
    // It ended without a word, and with it its lock: that counts as released.
    has_passed(lab, spawn(lab, Way::Unbind.command(&device))?, &device)?;
    Way::Unbind.undo(lab, &device)?;
    daemon.end()
}

fn guard_refuses_what_it_can_not_tell_and_names_the_way(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let (device, other) = (Device::held(lab)?, Device::other(lab)?);
    let unbind = "/sys/bus/dax/drivers/device_dax/unbind";
    let script = format!("{SCRATCH}/script.sh");
    lab.host.write_file(
        &script,
        format!("echo {} > {unbind}\n", other.name).as_bytes(),
    )?;
    let ways = [
        vec!["sh".to_owned(), script],
        shell(&format!("name={}; echo $name > {unbind}", other.name)),
        shell(&format!("echo {} | tee {unbind}", other.name)),
    ];
    let daemon = Daemon::start(lab)?;
    for argv in ways.clone() {
        let mut holder = Holder::start(lab, &device)?;
        let output = spawn(lab, argv.clone())?.finish(SOON)?;
        claim(output.stderr.contains("not permitted"), || {
            format!("{argv:?} should get EPERM: {}", output.stderr)
        })?;
        let line = daemon.says(&format!("daxhund guard release {}", device.name))?;
        claim(line.contains("not known"), || line.clone())?;
        claim(!holder.has_said("wanted"), || {
            "nobody is asked about the unknown".to_owned()
        })?;
        holder.told("let-go", "gone")?;
        // With nothing held nobody is asked anything.
        let output = spawn(lab, argv.clone())?.finish(SOON)?;
        claim(!output.stderr.contains("not permitted"), || {
            format!("{argv:?}: {}", output.stderr)
        })?;
        bind(lab, &other)?;
        holder.end()?;
    }
    daemon.end()?;
    let daemon = Daemon::with(lab, &["--unknown", "hold-all"])?;
    let mut holder = Holder::start(lab, &device)?;
    let removal = spawn(lab, ways[0].clone())?;
    holder.is_asked()?;
    holder.told("release", "answered")?;
    has_passed(lab, removal, &other)?;
    bind(lab, &other)?;
    holder.end()?;
    daemon.end()
}

fn guard_releases_on_request(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let socket = Daemon::socket();
    let release = || {
        ["lab-agent", "guard-release", &socket, &device.name]
            .map(str::to_owned)
            .to_vec()
    };
    let daemon = Daemon::start(lab)?;
    let mut holder = Holder::start(lab, &device)?;
    let refused = spawn(lab, release())?;
    holder.is_asked()?;
    let list = lab.host.check(&["lab-agent", "guard-list", &socket])?;
    for word in ["vm1", &device.name, "connected", "release"] {
        claim(list.contains(word), || {
            format!("the list lacks {word}: {list}")
        })?;
    }
    holder.told("refuse not now", "answered")?;
    let output = refused.finish(SOON)?;
    claim(
        !output.status.success() && output.stderr.contains("not now"),
        || {
            format!(
                "the refusal is not told: {} {}",
                output.status, output.stderr
            )
        },
    )?;
    let removal = spawn(lab, release())?;
    holder.is_asked()?;
    still_waits(lab, &removal, &device)?;
    holder.told("release", "answered")?;
    has_passed(lab, removal, &device)?;
    let list = lab.host.check(&["lab-agent", "guard-list", &socket])?;
    claim(list.contains("\"held\":[]"), || {
        format!("nothing should be held: {list}")
    })?;
    bind(lab, &device)?;
    holder.end()?;
    daemon.end()
}

fn guard_serves_users_without_rights(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let socket = Daemon::socket();
    let as_user = |argv: &[&str]| SpawnSpec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        uid: Some(LAB_USER),
        ..SpawnSpec::default()
    };
    // The guard itself can't be run by them, and says so.
    let other_socket = format!("{SCRATCH}/user/guard.sock");
    lab.host.check(&["chmod", "777", SCRATCH])?;
    let own = as_user(&["daxhund-guardd", "--socket", &other_socket]);
    let output = lab.host.spawn(own)?.finish(SOON)?;
    claim(
        !output.status.success() && output.stderr.contains("CAP_SYS_ADMIN"),
        || {
            format!(
                "it should say what it lacks: {} {}",
                output.status, output.stderr
            )
        },
    )?;
    let daemon = Daemon::start(lab)?;
    let path = format!("/dev/{}", device.name);
    open_to_all(lab, &[&path], || {
        let mut holder = Holder::of(lab, &device, &socket, PATIENT_MS, Some(LAB_USER))?;
        let removal = spawn(lab, Way::DisableDevice.command(&device))?;
        holder.is_asked()?;
        holder.told("refuse it is mine", "answered")?;
        was_refused(lab, removal, &device)?;
        let release = as_user(&["lab-agent", "guard-release", &socket, &device.name]);
        let output = lab.host.spawn(release)?.finish(SOON)?;
        claim(output.stderr.contains("only root"), || {
            format!("a user may take nothing away: {}", output.stderr)
        })?;
        holder.end()
    })?;
    daemon.end()
}

fn guard_can_not_hold_what_it_does_not_see(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = Device::held(lab)?;
    let name = &device.name;
    let unbind = "/sys/bus/dax/drivers/device_dax/unbind";
    let daemon = Daemon::start(lab)?;
    // Another mount in the same network namespace is the same file system to the kernel.
    let mut holder = Holder::start(lab, &device)?;
    let mounted = format!("{SCRATCH}/sys");
    lab.host.sh(&format!(
        "mkdir {mounted} && mount -t sysfs sysfs {mounted}"
    ))?;
    let removal = spawn(lab, shell(&format!("echo {name} > {SCRATCH}{unbind}")))?;
    let asked = holder.is_asked()?;
    holder.told("refuse no", "answered")?;
    was_refused(lab, removal, &device)?;
    claim(asked.contains(&mounted), || {
        format!("it came by {mounted}: {asked}")
    })?;
    lab.host.check(&["umount", &mounted])?;
    // In another one it is not, and nobody is asked.
    let script = format!("mount -t sysfs sysfs {mounted} && echo {name} > {SCRATCH}{unbind}");
    let argv = ["unshare", "-n", "-m", "sh", "-c", &script].map(str::to_owned);
    has_passed(lab, spawn(lab, argv.to_vec())?, &device)?;
    claim(!holder.has_said("file /sys/"), || {
        "nobody should have been asked".to_owned()
    })?;
    holder.signal(super::parties::SIGKILL)?;
    holder.wait()?;
    bind(lab, &device)?;
    // A file that was opened before the device was held.
    let fifo = format!("{SCRATCH}/go");
    lab.host.check(&["mkfifo", &fifo])?;
    let early = spawn(
        lab,
        shell(&format!(
            "exec 3> {unbind}; echo open; cat {fifo}; echo {name} >&3"
        )),
    )?;
    let mut early = early;
    early.wait_for("open", SOON)?;
    let holder = Holder::start(lab, &device)?;
    lab.host.sh(&format!("echo > {fifo}"))?;
    has_passed(lab, early, &device)?;
    claim(!holder.has_said("wanted"), || {
        "nobody should have been asked".to_owned()
    })?;
    holder.signal(super::parties::SIGKILL)?;
    holder.wait()?;
    bind(lab, &device)?;
    daemon.end()
}
