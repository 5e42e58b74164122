//! Memory is handed over: drained by an operator, or gone from under a guest that is held for it.

use std::time::{Duration, Instant};

use lab_agent::host_protocol::{ExitStatus, SpawnSpec};
use serde_json::Value;

use super::remote::Remote;
use super::removal::{
    bind, boot_on_pmem, is_bound, is_well, loads_ended_in_sigbus, start_loads, told, unbind,
    unbind_goes_through, unbind_script, with_device,
};
use super::support::{MIB, dax_zone, eventually, holds, power_off, scratch, spec_on};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::host::RUN_DEADLINE;
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "drain_of_pmem_returns_when_the_host_may_take_it",
        run: drain_of_pmem_returns_when_the_host_may_take_it,
    },
    GuestTest {
        name: "drain_of_pmem_cuts_off_a_guest_that_keeps_it",
        run: drain_of_pmem_cuts_off_a_guest_that_keeps_it,
    },
    GuestTest {
        name: "removal_of_pmem_ends_with_a_reset",
        run: removal_of_pmem_ends_with_a_reset,
    },
    GuestTest {
        name: "ram_that_is_gone_holds_the_guest_where_asked",
        run: ram_that_is_gone_holds_the_guest_where_asked,
    },
];

/// What the VMM says when the guard asks it.
const ASKED: &str = "the host wants memory back";
/// A guest that keeps its device has two seconds; cutting it off and answering takes little, emulated some more.
const CUT_OFF_WITHIN: Duration = Duration::from_secs(30);

/// The host takes the device as soon as the drain has returned: nobody has to be asked any more.
fn host_takes_it_at_once(lab: &Lab, guest: &mut Guest) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    unbind_goes_through(lab, guest, &dax)?;
    let said = guest.vmm().stderr();
    claim(!said.contains(ASKED), || {
        format!("the guard had to ask although the drain had returned: {said}")
    })
}

fn drain_of_pmem_returns_when_the_host_may_take_it(lab: &mut Lab) -> Result<(), TestError> {
    let device = lab.host.dax()[1].name.clone();
    let remote = Remote::new();
    let mut guest = boot_on_pmem(lab, "", &["--api-socket", remote.socket()], "")?;
    remote.refused(lab, &["drain", "nobody"], &["404", "nobody"])?;
    remote.refused(
        lab,
        &["drain", "z0"],
        &["409", "memory zone z0", "on_removal=refuse"],
    )?;
    start_loads(&mut guest)?;
    with_device(lab, &device, || {
        remote.ok(lab, &["drain", "p0"])?;
        host_takes_it_at_once(lab, &mut guest)
    })?;
    claim(!remote.knows(lab, "p0")?, || {
        "the VM still knows p0 after it was drained".to_owned()
    })?;
    guest.await_gone("/dev/pmem0")?;
    loads_ended_in_sigbus(&mut guest)?;
    is_well(&mut guest)?;
    told(lab, "device-removed")?;
    power_off(guest)
}

fn drain_of_pmem_cuts_off_a_guest_that_keeps_it(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let device = lab.host.dax()[1].name.clone();
    let (remote, disk) = (Remote::new(), format!("{SCRATCH}/disk"));
    lab.host.check(&["truncate", "-s", "16M", &disk])?;
    let disk_word = format!("path={disk},image_type=raw,id=d0");
    let mut guest = boot_on_pmem(
        lab,
        ",removal_timeout=2",
        &["--api-socket", remote.socket(), "--disk", &disk_word],
        "acpiphp.disable=1",
    )?;
    start_loads(&mut guest)?;
    with_device(lab, &device, || {
        let start = Instant::now();
        let argv = [
            "daxhund-remote",
            "--api-socket",
            remote.socket(),
            "drain",
            "p0",
        ];
        let draining = lab.host.spawn(SpawnSpec {
            argv: argv.map(str::to_owned).to_vec(),
            ..SpawnSpec::default()
        })?;
        // Nobody else waits for it.
        remote.ok(lab, &["ping"])?;
        remote.expect_state(lab, "Running")?;
        let drained = draining.finish(RUN_DEADLINE)?;
        claim(drained.status == ExitStatus::Code(0), || {
            format!("the drain of a guest that keeps p0: {drained:?}")
        })?;
        claim(start.elapsed() < CUT_OFF_WITHIN, || {
            format!("the drain took {:?}", start.elapsed())
        })?;
        host_takes_it_at_once(lab, &mut guest)
    })?;
    loads_ended_in_sigbus(&mut guest)?;
    is_well(&mut guest)?;
    told(lab, "device-cut-off")?;
    // It has nothing of it any more, and once more is as good as once.
    remote.ok(lab, &["drain", "p0"])?;
    // A disk can't be taken from a guest that keeps it: its driver would wait for ever.
    remote.refused(lab, &["drain", "d0"], &["409", "d0", "keeps it"])?;
    claim(holds(lab, &mut guest, &disk)?, || {
        format!("{disk} was not drained and is closed")
    })?;
    is_well(&mut guest)?;
    power_off(guest)
}

/// A guest that keeps what the host wants is started anew: it does not find it again, and the host need not wait any longer.
fn removal_of_pmem_ends_with_a_reset(lab: &mut Lab) -> Result<(), TestError> {
    let dax = lab.host.dax()[1].clone();
    let remote = Remote::new();
    let mut guest = boot_on_pmem(
        lab,
        ",removal_timeout=600",
        &["--api-socket", remote.socket()],
        "acpiphp.disable=1",
    )?;
    with_device(lab, &dax.name, || {
        let script = unbind_script(&dax.name);
        let waiting = lab.host.spawn(SpawnSpec {
            argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
            ..SpawnSpec::default()
        })?;
        guest.vmm().wait_for_error(ASKED, RUN_DEADLINE)?;
        claim(!waiting.has_ended() && is_bound(lab, &dax.name)?, || {
            "the host does not wait for the guest".to_owned()
        })?;
        remote.ok(lab, &["reboot"])?;
        let gone = waiting.finish(RUN_DEADLINE)?;
        claim(
            gone.status == ExitStatus::Code(0) && !is_bound(lab, &dax.name)?,
            || format!("{} does not go with the guest's reset: {gone:?}", dax.name),
        )?;
        claim(!holds(lab, &mut guest, &dax.path)?, || {
            format!("{} was let go of and is still in use", dax.path)
        })?;
        guest.wait_ready()?;
        is_well(&mut guest)
    })?;
    claim(!remote.knows(lab, "p0")?, || {
        "the VM still knows p0 after the reset".to_owned()
    })?;
    told(lab, "device-removed")?;
    power_off(guest)
}

/// The state of a zone's memory as `vm.info` has it.
fn memory_state(info: &Value, zone: &str) -> String {
    let regions = info["memory_leaving"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let region = regions.into_iter().find(|region| region["id"] == zone);
    region.map_or_else(String::new, |region| {
        region["state"].as_str().unwrap_or_default().to_owned()
    })
}

fn ram_that_is_gone_holds_the_guest_where_asked(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let dax = lab.host.dax()[1].clone();
    let remote = Remote::new();
    let zone = dax_zone(lab, "z0", 1, 512 * MIB, 0) + ",on_loss=pause";
    lab.host.sh(&format!(": > {SCRATCH}/events"))?;
    let mut spec = spec_on(lab, &[&zone]);
    let events = format!("path={SCRATCH}/events");
    spec.arguments.extend(
        [
            "--api-socket",
            remote.socket(),
            "--removal-guard",
            "off",
            "--event-monitor",
            &events,
        ]
        .map(str::to_owned),
    );
    let mut guest = Guest::boot(&lab.host, &spec)?;
    with_device(lab, &dax.name, || {
        let gone = unbind(lab, &dax.name)?;
        claim(gone.status.success() && !is_bound(lab, &dax.name)?, || {
            format!("nobody is to hold {}: {gone:?}", dax.name)
        })?;
        eventually("the guest is held", || Ok(remote.state(lab)? == "Paused"))?;
        told(lab, "memory-lost")?;
        let info = remote.info(lab)?;
        let why = info["paused_because"].as_str().unwrap_or_default();
        claim(why.contains("z0") && why.contains(&dax.name), || {
            format!("vm.info does not say why the guest is held: {info}")
        })?;
        remote.refused(lab, &["resume"], &["409", "z0", &dax.name, "vm.reboot"])?;
        eventually("nothing of the device is left in the VMM", || {
            Ok(!holds(lab, &mut guest, &dax.path)?)
        })?;
        let state = memory_state(&remote.info(lab)?, "z0");
        claim(state == "given-back", || {
            format!("z0's memory is {state:?}")
        })?;
        // Without its memory it does not start anew, and that is said; its definition stays.
        remote.refused(lab, &["reboot"], &["500"])?;
        remote.expect_state(lab, "Created")?;
        bind(lab, &dax.name)?;
        remote.ok(lab, &["boot"])?;
        guest.wait_ready()?;
        is_well(&mut guest)
    })?;
    remote.ok(lab, &["shutdown-vmm"])?;
    let status = guest.vmm().wait(RUN_DEADLINE)?;
    claim(status == ExitStatus::Code(0), || {
        format!("shutdown-vmm ended the VMM with {status}")
    })
}
