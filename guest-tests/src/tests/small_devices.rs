//! A console, random numbers, sockets to the host, and a balloon.

use std::collections::HashSet;
use std::time::Duration;

use lab_agent::host_protocol::SpawnSpec;

use super::remote::Remote;
use super::support::{
    MIB, VirtioKind, dax_zone, eventually, no_complaints, power_off, scratch, spec_on, spec_with,
};
use super::{GuestTest, Lab, TestError, claim, pci};
use crate::guest::Guest;
use crate::host::figures::rss_anon;
use crate::host::process::Process;
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "console_random_numbers_and_sockets_reach_the_guest",
        run: console_random_numbers_and_sockets_reach_the_guest,
    },
    GuestTest {
        name: "a_balloon_takes_and_gives_memory_and_leaves_dax_contents_alone",
        run: a_balloon_takes_and_gives_memory_and_leaves_dax_contents_alone,
    },
];

const ANSWER: Duration = PATIENCE;
/// That a guest writes to its console in one go.
const CONSOLE_LINES: u32 = 1000;

fn spawn(lab: &Lab, argv: &[&str], stdin: bool) -> Result<Process, TestError> {
    Ok(lab.host.spawn(SpawnSpec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        stdin,
        ..SpawnSpec::default()
    })?)
}

fn console_random_numbers_and_sockets_reach_the_guest(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let console = format!("{SCRATCH}/console.sock");
    let vsock = format!("{SCRATCH}/vsock.sock");
    let spec = spec_with(
        lab,
        &[
            "--console",
            &format!("socket={console}"),
            "--rng",
            "src=/dev/urandom",
            "--vsock",
            &format!("cid=3,socket={vsock},id=v0"),
        ],
    );
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&["virtio_pci", "virtio_console", "virtio_rng"])?;
    guest.modprobe(&["vmw_vsock_virtio_transport"])?;
    for kind in [VirtioKind::Console, VirtioKind::Rng, VirtioKind::Vsock] {
        pci::is_driven(&mut guest, kind)?;
    }
    console_answers(lab, &mut guest, &console)?;
    random_numbers_differ(&mut guest)?;
    vsock_goes_both_ways(lab, &mut guest, &vsock)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    for socket in [&console, &vsock] {
        claim(!lab.host.exists(socket)?, || {
            format!("{socket} is left behind")
        })?;
    }
    Ok(())
}

fn console_answers(lab: &Lab, guest: &mut Guest, socket: &str) -> Result<(), TestError> {
    guest.await_path("/dev/hvc0")?;
    let mut person = spawn(lab, &["lab-agent", "connect", socket], true)?;
    guest.sh("echo welcome > /dev/hvc0")?;
    person.wait_for("welcome", ANSWER)?;
    // Open for both directions before anything is sent: what comes for a closed terminal is dropped.
    guest.sh(
        "(exec 3<>/dev/hvc0; echo listening >&3; read line <&3; echo heard $line >&3) > /dev/null 2>&1 &",
    )?;
    person.wait_for("listening", ANSWER)?;
    person.send(b"somebody\n")?;
    person.wait_for("heard somebody", ANSWER)?;
    // The queue goes round several times: the driver gives away a line at most, and waits for each piece to be used. The
    // emulated host has one processor, so a piece costs the guest a time slice.
    guest.sh(&format!("seq 1 {CONSOLE_LINES} > /dev/hvc0"))?;
    person.wait_for(&CONSOLE_LINES.to_string(), ANSWER)?;
    let said = person.stdout();
    let lines: HashSet<&str> = said.lines().collect();
    let missing = (1..=CONSOLE_LINES).find(|number| !lines.contains(number.to_string().as_str()));
    claim(missing.is_none(), || {
        format!("line {missing:?} of {CONSOLE_LINES} did not arrive")
    })
}

fn random_numbers_differ(guest: &mut Guest) -> Result<(), TestError> {
    let current = guest.cat("/sys/class/misc/hw_random/rng_current")?;
    claim(current.starts_with("virtio_rng"), || {
        format!("the kernel takes its random numbers from {current}")
    })?;
    let draw = "dd if=/dev/hwrng bs=64 count=4 iflag=fullblock 2>/dev/null | xxd -p";
    let draws = [guest.sh(draw)?, guest.sh(draw)?];
    claim(
        draws
            .iter()
            .all(|text| text.split_whitespace().map(str::len).sum::<usize>() == 512)
            && draws[0] != draws[1],
        || format!("256 random bytes each, and different ones: {draws:?}"),
    )
}

/// The guest answers a connection from the host, and the host one from the guest.
pub(super) fn vsock_goes_both_ways(
    lab: &Lab,
    guest: &mut Guest,
    socket: &str,
) -> Result<(), TestError> {
    guest.ask("vsock-echo 1234")?;
    let answer = lab
        .host
        .check(&["lab-agent", "vsock-ask", socket, "1234", "from the host"])?;
    claim(answer.trim() == "from the host", || {
        format!("the guest answers {answer:?}")
    })?;
    let nobody = lab
        .host
        .run(&["lab-agent", "vsock-ask", socket, "4321", "anybody?"])?;
    claim(!nobody.status.success(), || {
        "a port that nobody listens on has answered".to_owned()
    })?;
    let listener = format!("{socket}_5678");
    let mut server = spawn(lab, &["lab-agent", "unix-echo", &listener], false)?;
    server.wait_for("serving", ANSWER)?;
    let answer = guest.ask("vsock-ask 5678 from-the-guest")?;
    claim(answer.as_str() == Some("from-the-guest"), || {
        format!("the host answers {answer}")
    })?;
    drop(server);
    lab.host.check(&["rm", "-f", &listener])?;
    let refused = guest.ask("vsock-ask 5678 from-the-guest");
    claim(refused.is_err(), || {
        "a port that nobody listens on has answered".to_owned()
    })
}

/// RAM is device-dax and as much again of the host's own memory, so that the balloon takes some of both.
fn a_balloon_takes_and_gives_memory_and_leaves_dax_contents_alone(
    lab: &mut Lab,
) -> Result<(), TestError> {
    const MARK_AT: u64 = 256 * MIB;
    const MARK_SIZE: u64 = 16 * MIB;
    const BALLOON: u64 = 400 * MIB;
    scratch(lab)?;
    let remote = Remote::new();
    let zone = dax_zone(lab, "z0", 0, 384 * MIB, 0);
    let mut spec = spec_on(lab, &[&zone, "id=anon,size=256M"]);
    spec.cmdline = format!("memmap=16M${MARK_AT:#x}");
    let more = ["--balloon", "size=0", "--api-socket", remote.socket()];
    spec.arguments.extend(more.map(str::to_owned));
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&["virtio_pci", "virtio_balloon"])?;
    pci::is_driven(&mut guest, VirtioKind::Balloon)?;
    guest.write_physical(MARK_AT, MARK_SIZE, 99)?;
    // Have all memory touched, so that there is something to be given back.
    let free = guest.meminfo()?.available_bytes.saturating_sub(64 * MIB) / MIB;
    guest.sh(&format!(
        "mount -o remount,size=100% /tmp && dd if=/dev/zero of=/tmp/fill bs=1M count={free} && rm /tmp/fill && sync"
    ))?;
    let before = guest.meminfo()?.total_bytes;
    let pid = guest.vmm().pid();
    let private_before = rss_anon(&lab.host, pid)?;

    remote.ok(lab, &["resize", "--balloon", "400M"])?;
    eventually("the guest has given 400 MiB to the balloon", || {
        Ok(guest.meminfo()?.total_bytes <= before - BALLOON)
    })?;
    eventually("the host has some of its memory back", || {
        Ok(rss_anon(&lab.host, pid)? + 32 * MIB < private_before)
    })?;
    let actual = remote.info(lab)?;
    claim(
        actual["memory_actual_size"]
            .as_u64()
            .is_some_and(|size| size <= 640 * MIB - BALLOON),
        || format!("memory_actual_size should be without the balloon: {actual}"),
    )?;

    remote.ok(lab, &["resize", "--balloon", "0"])?;
    eventually("the guest has its memory back", || {
        Ok(guest.meminfo()?.total_bytes == before)
    })?;
    let mark = guest.read_physical(MARK_AT, MARK_SIZE, 99)?;
    claim(mark.wrong_words == 0, || {
        format!("device-dax contents beside the balloon were changed: {mark:?}")
    })?;
    let report = guest.pattern(Some(64 * MIB))?;
    claim(report.wrong_words == 0, || format!("{report:?}"))?;
    no_complaints(&mut guest)?;
    power_off(guest)
}
