//! vCPUs that come and go while a guest runs.

use super::remote::Remote;
use super::support::{
    MIB, count, dax_zone, eventually, no_complaints, power_off, scratch, spec_on, times_told,
    with_words,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[GuestTest {
    name: "processors_come_and_go",
    run: processors_come_and_go,
}];

fn processors_come_and_go(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let remote = Remote::new();
    let events = format!("path={SCRATCH}/events");
    let zones = [
        dax_zone(lab, "a", 0, 512 * MIB, 0),
        dax_zone(lab, "b", 1, 256 * MIB, 0),
    ];
    let words = [
        "--cpus",
        "boot=1,max=4",
        "--numa",
        "guest_numa_id=0,cpus=[0-1],memory_zones=[a]",
        "guest_numa_id=1,cpus=[2-3],memory_zones=[b]",
        "--api-socket",
        remote.socket(),
        "--event-monitor",
        &events,
    ];
    let spec = with_words(spec_on(lab, &[&zones[0], &zones[1]]), &words);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    has_vcpus(lab, &mut guest, &remote, 1)?;
    what_no_guest_can_have_is_refused(lab, &remote)?;
    // Something that is always there to be moved from one processor to another.
    guest
        .sh("(while :; do md5sum /proc/cpuinfo; sleep 0.05; done) </dev/null >/dev/null 2>&1 &")?;

    remote.ok(lab, &["resize", "--cpus", "3"])?;
    take_online(&mut guest, &[1, 2])?;
    has_vcpus(lab, &mut guest, &remote, 3)?;
    let nodes = guest.numa()?;
    let cpus: Vec<&str> = nodes.iter().map(|node| node.cpus.as_str()).collect();
    claim(cpus == ["0-1", "2"], || {
        format!("each processor should be on its node: {nodes:?}")
    })?;
    remote.ok(lab, &["resize", "--cpus", "3"])?;
    remote.ok(lab, &["pause"])?;
    remote.ok(lab, &["resume"])?;
    has_vcpus(lab, &mut guest, &remote, 3)?;

    // A guest that is held can't have answered.
    let told = times_told(lab, "\"resized\"")?;
    remote.ok(lab, &["pause"])?;
    remote.ok(lab, &["resize", "--cpus", "1"])?;
    let other = ("PUT", "/api/v1/vm.resize", r#"{"desired_vcpus":2}"#);
    remote.answers(lab, other, "429", &["resized"])?;
    remote.ok(lab, &["resume"])?;
    eventually("two vCPUs go", || {
        Ok(times_told(lab, "\"resized\"")? == told + 1)
    })?;
    has_vcpus(lab, &mut guest, &remote, 1)?;

    // One that was there before comes again.
    remote.ok(lab, &["resize", "--cpus", "2"])?;
    take_online(&mut guest, &[1])?;
    has_vcpus(lab, &mut guest, &remote, 2)?;
    no_complaints(&mut guest)?;
    every_processor_takes_an_nmi(lab, &mut guest, &remote, 2)?;

    guest.leave("reboot")?;
    guest.wait_ready()?;
    has_vcpus(lab, &mut guest, &remote, 2)?;
    no_complaints(&mut guest)?;
    power_off(guest)
}

fn what_no_guest_can_have_is_refused(lab: &Lab, remote: &Remote) -> Result<(), TestError> {
    for asked in [0, 5] {
        let body = format!("{{\"desired_vcpus\":{asked}}}");
        let request = ("PUT", "/api/v1/vm.resize", body.as_str());
        remote.answers(lab, request, "400", &["1 to 4 vCPUs"])?;
    }
    remote.refused(lab, &["resize", "--cpus", "5"], &["1 to 4 vCPUs"])
}

fn every_processor_takes_an_nmi(
    lab: &Lab,
    guest: &mut Guest,
    remote: &Remote,
    processors: usize,
) -> Result<(), TestError> {
    let before = nmis(guest)?;
    remote.ok(lab, &["nmi"])?;
    // Each says so on the console, and nothing is asked there until they are through.
    for _ in 0..processors {
        guest
            .vmm()
            .wait_for("Dazed and confused, but trying to continue", PATIENCE)?;
    }
    let now = nmis(guest)?;
    let expected: Vec<u64> = before.iter().map(|count| count + 1).collect();
    claim(now == expected && now.len() == processors, || {
        format!("each of {processors} processors should take one NMI: {before:?}, then {now:?}")
    })
}

/// What udev does where there is one.
fn take_online(guest: &mut Guest, processors: &[u32]) -> Result<(), TestError> {
    for processor in processors {
        let path = format!("/sys/devices/system/cpu/cpu{processor}/online");
        guest.await_path(&path)?;
        guest.sh(&format!("echo 1 > {path}"))?;
    }
    Ok(())
}

/// The guest uses so many, the VMM has as many threads, and says so.
fn has_vcpus(
    lab: &Lab,
    guest: &mut Guest,
    remote: &Remote,
    expected: usize,
) -> Result<(), TestError> {
    let online = count(guest, "nproc")?;
    claim(online == expected as u64, || {
        format!("{online} processors online, expected {expected}")
    })?;
    let pid = guest.vmm().pid();
    let threads = lab.host.sh(&format!("cat /proc/{pid}/task/*/comm"))?;
    let mut vcpus: Vec<&str> = threads
        .lines()
        .filter(|name| name.starts_with("vcpu"))
        .collect();
    vcpus.sort_unstable();
    let names: Vec<String> = (0..expected).map(|vcpu| format!("vcpu{vcpu}")).collect();
    claim(vcpus == names, || {
        format!("expected the threads {names:?}, found {vcpus:?}")
    })?;
    let info = remote.info(lab)?;
    let cpus = &info["config"]["cpus"];
    claim(
        cpus["boot_vcpus"] == expected && cpus["max_vcpus"] == 4,
        || format!("expected {expected} of 4 vCPUs, vm.info says {cpus}"),
    )
}

/// Non-maskable interrupts that each processor has taken.
fn nmis(guest: &mut Guest) -> Result<Vec<u64>, TestError> {
    let table = guest.cat("/proc/interrupts")?;
    let row = table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("NMI:"));
    let counts = row.map(|row| row.split_whitespace().map_while(|word| word.parse().ok()));
    counts
        .map(Iterator::collect)
        .ok_or_else(|| TestError::Claim(format!("no count of NMIs in {table}")))
}
