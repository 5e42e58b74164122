//! Networks that another process serves: DPDK's testpmd over vhost-user, which answers ARP and ICMP echo by itself.

use std::time::Duration;

use lab_agent::host_protocol::{SpawnSpec, TerminalSize};

use super::peer_ram::{PeerRam, Zone, spec_in};
use super::remote::Remote;
use super::support::{
    MIB, VirtioKind, comes_back_to, count, descriptors_and_threads, eventually, no_complaints,
    power_off, scratch, times_told,
};
use super::{GuestTest, Lab, TestError, claim, pci};
use crate::guest::Guest;
use crate::guest::network::{GUEST_ADDRESS, HOST_ADDRESS};
use crate::host::process::{Process, SIGKILL};
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "a_vhost_user_network_carries_frames_in_all_pairs_and_outlives_its_backend",
        run: a_vhost_user_network_carries_frames_in_all_pairs_and_outlives_its_backend,
    },
    GuestTest {
        name: "vhost_user_networks_come_and_go",
        run: vhost_user_networks_come_and_go,
    },
    GuestTest {
        name: "a_network_backend_connects_to_the_vmm_and_so_does_the_next_one",
        run: a_network_backend_connects_to_the_vmm_and_so_does_the_next_one,
    },
];

const PLACE: &str = "/lab/peers/testpmd";
/// By name: of one with a path it wants no directory above to be writable by all, and the host's root is.
const DRIVERS: [&str; 2] = ["librte_net_vhost.so", "librte_mempool_ring.so"];
const MODULES: [&str; 2] = ["virtio_pci", "virtio_net"];
const MAC: &str = "52:54:00:12:34:56";
/// What testpmd answers with: an address that DPDK makes of "VHOST" and the number of the port.
const ITS_MAC: &str = "56:48:4f:53:54:00";
const MTU: u32 = 9000;
/// The largest echo that goes in one frame, less the headers of IP and ICMP. It does not answer those that come in fragments.
const LARGEST: u32 = MTU - 28;
/// From its start until it serves: it loads 60 libraries.
const DEADLINE: Duration = PATIENCE;

/// DPDK 22.11 of Debian 12 does, 24.11 of 13 does not.
fn takes_dax(lab: &Lab) -> Result<bool, TestError> {
    Ok(lab
        .host
        .exists(&format!("{PLACE}/lib/librte_vhost.so.23"))?)
}

/// Who listens at the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listens {
    Daemon,
    Vmm,
}

/// A daemon with two pairs of queues.
struct NetDaemon {
    process: Process,
}

impl NetDaemon {
    /// Starts one; when this returns it listens, or looks once a second whether the VMM does.
    fn start(lab: &Lab, listens: Listens) -> Result<Self, TestError> {
        let socket = socket();
        let mut device = format!("--vdev=net_vhost0,iface={socket},queues=2");
        match listens {
            Listens::Daemon => {
                lab.host.check(&["rm", "-f", &socket])?;
            }
            Listens::Vmm => device += ",client=1",
        }
        let program = format!("{PLACE}/dpdk-testpmd");
        let mut argv = vec![program.as_str()];
        argv.extend(["--no-pci", "--no-huge", "--no-shconf", "--no-telemetry"]);
        argv.extend(["-m", "64", "--lcores", "0@0,1@0"]);
        for driver in DRIVERS {
            argv.extend(["-d", driver]);
        }
        argv.push(&device);
        // Locked memory would have it touch every page of the guest as it maps it.
        argv.extend([
            "--",
            "--forward-mode=icmpecho",
            "--auto-start",
            "--no-mlockall",
        ]);
        argv.extend(["--rxq=2", "--txq=2", "--total-num-mbufs=4096"]);
        let mut process = lab.host.spawn(SpawnSpec {
            argv: argv.into_iter().map(str::to_owned).collect(),
            env: vec![
                ("LD_LIBRARY_PATH".to_owned(), format!("{PLACE}/lib")),
                ("RUNTIME_DIRECTORY".to_owned(), SCRATCH.to_owned()),
            ],
            // It ends with its standard input.
            pty: Some(TerminalSize {
                rows: 24,
                columns: 200,
            }),
            ..SpawnSpec::default()
        })?;
        process.wait_for("Press enter to exit", DEADLINE)?;
        Ok(Self { process })
    }

    fn kill(self) -> Result<(), TestError> {
        self.process.signal(SIGKILL)?;
        self.process.wait(DEADLINE)?;
        Ok(())
    }

    /// Has it end as its administrator would.
    fn end(self) -> Result<(), TestError> {
        self.process.send(b"\n")?;
        let status = self.process.wait(DEADLINE)?;
        claim(status.success(), || {
            format!("testpmd ended with {status}: {}", self.process.stdout())
        })
    }
}

fn socket() -> String {
    format!("{SCRATCH}/net.sock")
}

/// For a guest with such a network.
fn word(more: &str) -> String {
    format!(
        "vhost_user=on,socket={},num_queues=4,mac={MAC},mtu={MTU},id=n0{more}",
        socket()
    )
}

/// The card is what the command line says, and is driven. It gets an address, and its neighbour answers who it is.
fn comes_up(guest: &mut Guest) -> Result<(), TestError> {
    guest.modprobe(&MODULES)?;
    guest.await_path("/sys/class/net/eth0")?;
    pci::is_driven(guest, VirtioKind::Net)?;
    for (file, expected) in [("address", MAC.to_owned()), ("mtu", MTU.to_string())] {
        let found = guest.cat(&format!("/sys/class/net/eth0/{file}"))?;
        claim(found.trim() == expected, || {
            format!("the guest's {file} should be {expected}, it is {found}")
        })?;
    }
    let queues = guest.sh("ls /sys/class/net/eth0/queues")?;
    claim(
        queues
            .split_whitespace()
            .eq(["rx-0", "rx-1", "tx-0", "tx-1"]),
        || format!("two pairs of queues: {queues}"),
    )?;
    guest.sh(&format!(
        "ip addr add {GUEST_ADDRESS}/24 dev eth0 && ip link set eth0 up && arping -f -w 20 -I eth0 {HOST_ADDRESS}"
    ))?;
    echoes(guest, 0, "-c 3", 3)?;
    let neighbours = guest.sh("ip neigh show dev eth0")?;
    claim(neighbours.contains(ITS_MAC), || {
        format!("{ITS_MAC} should be a neighbour: {neighbours}")
    })
}

/// Every one of so many echoes, sent by a processor, comes back.
fn echoes(
    guest: &mut Guest,
    processor: u32,
    options: &str,
    expected: u32,
) -> Result<(), TestError> {
    let told = guest.sh(&format!(
        "taskset {} ping -q -w 25 {options} {HOST_ADDRESS}",
        1 << processor
    ))?;
    claim(
        told.contains(&format!(" {expected} packets received, 0% packet loss")),
        || format!("not every echo comes back: {told}"),
    )
}

/// Interrupts of the card's for what it receives in a pair of queues.
fn interrupts(guest: &mut Guest, pair: u32) -> Result<u64, TestError> {
    count(
        guest,
        &format!(
            "awk '/virtio[0-9]+-input\\.{pair}$/ {{for (i = 2; i < NF; i++) if ($i ~ /^[0-9]+$/) n += $i; else break}} END {{print n + 0}}' \
             /proc/interrupts"
        ),
    )
}

/// Small frames and the largest, from each processor, which has a pair of queues for itself.
fn is_usable(guest: &mut Guest) -> Result<(), TestError> {
    for processor in 0..2 {
        let before = interrupts(guest, processor)?;
        for size in [56, LARGEST] {
            echoes(guest, processor, &format!("-A -c 20 -s {size}"), 20)?;
        }
        let after = interrupts(guest, processor)?;
        claim(after > before, || {
            format!("{before} interrupts of pair {processor} before, {after} after")
        })?;
    }
    Ok(())
}

/// Its backend has gone: the guest goes on, without an answer.
fn is_missed(lab: &Lab, remote: &Remote, guest: &mut Guest) -> Result<(), TestError> {
    eventually("the loss is told", || {
        let info = remote.info(lab)?;
        Ok(info["device_tree"]["n0"]["backend"]["state"] == "lost")
    })?;
    remote.expect_state(lab, "Running")?;
    let unanswered = guest.try_sh(&format!("ping -q -c 1 -W 1 {HOST_ADDRESS}"))?;
    claim(unanswered.status != Some(0), || {
        format!("nobody is there, and answers: {}", unanswered.stdout)
    })
}

fn is_served(lab: &Lab, remote: &Remote) -> Result<(), TestError> {
    eventually("it is served on", || {
        let info = remote.info(lab)?;
        Ok(info["device_tree"]["n0"]["backend"]["state"] == "connected")
    })
}

fn a_vhost_user_network_carries_frames_in_all_pairs_and_outlives_its_backend(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(": > {SCRATCH}/events"))?;
    let remote = Remote::new();
    let daemon = NetDaemon::start(lab, Listens::Daemon)?;
    let events = format!("path={SCRATCH}/events");
    if !takes_dax(lab)? {
        PeerRam::sees_refusal(lab, &["--net", &word("")])?;
    }
    // On both sides of the hole below 4 GiB, and on two devices.
    let ram = PeerRam::new(
        takes_dax(lab)?,
        &[
            Zone {
                device: 0,
                offset: 0,
                dax_bytes: 3584 * MIB,
                other_bytes: 768 * MIB,
            },
            Zone {
                device: 1,
                offset: 512 * MIB,
                dax_bytes: 256 * MIB,
                other_bytes: 128 * MIB,
            },
        ],
    );
    let word = word("");
    let words = [
        "--cpus",
        "boot=2",
        "--net",
        &word,
        "--api-socket",
        remote.socket(),
        "--event-monitor",
        &events,
    ];
    let mut guest = Guest::boot(&lab.host, &spec_in(lab, &ram, &words))?;
    comes_up(&mut guest)?;
    claim(ram.is_mapped(lab, &daemon.process)?, || {
        "the daemon has not mapped all of the guest's memory".to_owned()
    })?;
    is_usable(&mut guest)?;
    let told = |event: &str| times_told(lab, event);
    // While frames are under way.
    guest.sh(&format!(
        "ping -q -A -s {LARGEST} {HOST_ADDRESS} </dev/null >/dev/null 2>&1 &"
    ))?;
    daemon.kill()?;
    is_missed(lab, &remote, &mut guest)?;
    claim(told("backend-lost")? == 1, || "one loss is told".to_owned())?;
    let daemon = NetDaemon::start(lab, Listens::Daemon)?;
    is_served(lab, &remote)?;
    claim(told("backend-connected")? == 1, || {
        "one that has come is told".to_owned()
    })?;
    guest.sh("killall ping")?;
    is_usable(&mut guest)?;
    // The same daemon serves the next kernel. This one may have complained of a queue that stood still: nobody was there.
    guest.leave("reboot")?;
    guest.wait_ready()?;
    comes_up(&mut guest)?;
    is_usable(&mut guest)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    eventually("the daemon lets go of the memory", || {
        ram.is_let_go(lab, &daemon.process)
    })?;
    daemon.end()
}

fn vhost_user_networks_come_and_go(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let remote = Remote::new();
    let ram = PeerRam::small(takes_dax(lab)?);
    let words = ["--cpus", "boot=2", "--api-socket", remote.socket()];
    let mut guest = Guest::boot(&lab.host, &spec_in(lab, &ram, &words))?;
    guest.modprobe(&MODULES)?;
    let at_first = descriptors_and_threads(lab, &mut guest)?;
    let daemon = NetDaemon::start(lab, Listens::Daemon)?;
    for _ in 0..2 {
        let place = remote.add(lab, "add-net", &word(""))?;
        comes_up(&mut guest)?;
        claim(ram.is_mapped(lab, &daemon.process)?, || {
            "the daemon has not mapped all of the guest's memory".to_owned()
        })?;
        is_usable(&mut guest)?;
        let info = remote.info(lab)?;
        claim(
            info["device_tree"]["n0"]["backend"]["state"] == "connected"
                && info["config"]["net"][0]["num_queues"] == 4,
            || format!("vm.info says: {info}"),
        )?;
        remote.ok(lab, &["remove-device", "n0"])?;
        guest.await_gone(&format!("/sys/bus/pci/devices/{place}"))?;
        eventually("n0 is no part of the VM any more", || {
            Ok(!remote.knows(lab, "n0")?)
        })?;
        eventually("the daemon lets go of the memory", || {
            ram.is_let_go(lab, &daemon.process)
        })?;
        comes_back_to("descriptors and threads", &at_first, || {
            descriptors_and_threads(lab, &mut guest)
        })?;
    }
    daemon.end()?;
    remote.refused(lab, &["add-net", &word("")], &["n0", "nobody serves"])?;
    comes_back_to("descriptors and threads", &at_first, || {
        descriptors_and_threads(lab, &mut guest)
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)
}

fn a_network_backend_connects_to_the_vmm_and_so_does_the_next_one(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let remote = Remote::new();
    let word = word(",vhost_mode=server");
    let words = [
        "--cpus",
        "boot=2",
        "--net",
        &word,
        "--api-socket",
        remote.socket(),
    ];
    // Whoever is first waits for the other.
    let ram = PeerRam::small(takes_dax(lab)?);
    let mut guest = Guest::launch(&lab.host, &spec_in(lab, &ram, &words))?;
    eventually("the VMM listens", || Ok(lab.host.exists(&socket())?))?;
    let daemon = NetDaemon::start(lab, Listens::Vmm)?;
    guest.wait_ready()?;
    comes_up(&mut guest)?;
    daemon.kill()?;
    is_missed(lab, &remote, &mut guest)?;
    let daemon = NetDaemon::start(lab, Listens::Vmm)?;
    is_served(lab, &remote)?;
    is_usable(&mut guest)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    claim(!lab.host.exists(&socket())?, || {
        "the socket of a VMM that has ended is left".to_owned()
    })?;
    daemon.end()
}
