//! The guest's network: a tap of the host's behind virtio-net.

use super::support::{
    LAB_USER, MIB, dax_zone, no_complaints, open_to_all, power_off, refused, refused_as, spec_with,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::network::{self, GUEST_ADDRESS, HOST_ADDRESS, SERVER};
use crate::guest::{Guest, GuestSpec};

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "a_tap_carries_the_guests_traffic_both_ways",
        run: a_tap_carries_the_guests_traffic_both_ways,
    },
    GuestTest {
        name: "bad_networks_are_refused",
        run: bad_networks_are_refused,
    },
];

const MAC: &str = "52:54:00:12:34:56";

fn a_tap_carries_the_guests_traffic_both_ways(lab: &mut Lab) -> Result<(), TestError> {
    let word = network::tap_word("lab0", &format!(",mac={MAC},mtu=1400,num_queues=4,id=n0"));
    let spec = spec_with(lab, &["--cpus", "boot=2", "--net", &word]);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&["virtio_pci", "virtio_net"])?;
    guest.await_path("/sys/class/net/eth0")?;
    for (file, expected) in [("address", MAC), ("mtu", "1400")] {
        let found = guest.cat(&format!("/sys/class/net/eth0/{file}"))?;
        claim(found.trim() == expected, || {
            format!("the guest's {file} should be {expected}, it is {found}")
        })?;
    }
    let queues = guest.sh("ls /sys/class/net/eth0/queues")?;
    for queue in ["rx-0", "rx-1", "tx-0", "tx-1"] {
        claim(queues.contains(queue), || {
            format!("two pairs of queues should give {queue}: {queues}")
        })?;
    }
    guest.bring_up("eth0")?;
    lab.host
        .check(&["ping", "-c", "2", "-w", "20", GUEST_ADDRESS])?;

    let server = network::serve(&lab.host)?;
    guest.transfer("tcp-send", SERVER, 8 * MIB)?;
    guest.transfer("tcp-receive", SERVER, 8 * MIB)?;
    drop(server);
    guest.ask("tcp-echo 7")?;
    let address = format!("{GUEST_ADDRESS}:7");
    let answer = lab
        .host
        .check(&["lab-agent", "tcp-ask", &address, "hello from the host"])?;
    claim(answer.trim() == "hello from the host", || {
        format!("the guest answers {answer:?}")
    })?;
    // Frames as large as they get, and larger than one.
    guest.sh(&format!("ping -c 2 -w 20 -s 1372 {HOST_ADDRESS}"))?;
    guest.sh(&format!("ping -c 2 -w 20 -s 8000 {HOST_ADDRESS}"))?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    let left = lab.host.run(&["ip", "link", "show", "lab0"])?;
    claim(!left.status.success(), || {
        format!("the tap that the VMM has made is left: {}", left.stdout)
    })
}

fn bad_networks_are_refused(lab: &mut Lab) -> Result<(), TestError> {
    let zone = dax_zone(lab, "z0", 0, 256 * MIB, 0);
    let with = |word: &str, status: i32, said: &[&str]| {
        refused(lab, &["--memory-zone", &zone, "--net", word], status, said)
    };
    with("tap=a-name-that-is-too-long,id=n0", 2, &["tap="])?;
    with("tap=lab0,mac=33:33:00:00:00:01,id=n0", 2, &["mac="])?;
    with("tap=lab0,num_queues=3,id=n0", 2, &["num_queues=3"])?;
    with("tap=lab0,queue_size=3,id=n0", 2, &["queue_size=3"])?;
    with("tap=lo,id=n0", 1, &["n0", "lo"])?;

    let word = network::tap_word("lab1", ",id=n0");
    let spec = GuestSpec::new(
        &lab.kernel.release,
        &["--memory-zone", &zone, "--net", &word],
    );
    let argv = spec.argv();
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let dax = lab.host.dax()[0].path.clone();
    let as_user = |said: &[&str]| refused_as(lab, &argv, Some(LAB_USER), 1, said);
    open_to_all(lab, &["/dev/kvm", &dax], || {
        as_user(&["n0", "/dev/net/tun"])
    })?;
    open_to_all(lab, &["/dev/kvm", &dax, "/dev/net/tun"], || {
        as_user(&["n0", "lab1"])
    })
}
