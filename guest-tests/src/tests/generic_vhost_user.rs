//! Devices of which the VMM knows only what their backends say, and backends that are to connect to it.

use std::time::Duration;

use lab_agent::host_protocol::ExitStatus;

use super::remote::Remote;
use super::support::{
    MIB, comes_back_to, dax_zone, descriptors_and_threads, eventually, no_complaints, power_off,
    refused, scratch, spec_with,
};
use super::vhost_user::{DISK_BYTES, PIECE, StorageDaemon, has_the_daemons_disk, is_usable, keeps};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::served::serve_dax;
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "a_generic_vhost_user_device_is_what_its_backend_says",
        run: a_generic_vhost_user_device_is_what_its_backend_says,
    },
    GuestTest {
        name: "bad_generic_vhost_user_devices_and_sockets_to_connect_to_are_refused",
        run: bad_generic_vhost_user_devices_and_sockets_to_connect_to_are_refused,
    },
];

const MODULES: [&str; 2] = ["virtio_pci", "virtio_blk"];
const SIGTERM: i32 = 15;
const END: Duration = PATIENCE;

fn a_generic_vhost_user_device_is_what_its_backend_says(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let remote = Remote::new();
    let daemon = StorageDaemon::start(lab, "disk", 2)?;
    let word = format!(
        "device_type=block,socket={},queue_sizes=[128,64],id=g0",
        daemon.socket
    );
    let words = [
        "--cpus",
        "boot=2",
        "--generic-vhost-user",
        &word,
        "--api-socket",
        remote.socket(),
    ];
    let mut guest = Guest::boot(&lab.host, &spec_with(lab, &words))?;
    guest.modprobe(&MODULES)?;
    has_the_daemons_disk(&mut guest)?;
    is_usable(&mut guest, "/dev/vda", 1)?;
    // A store to the configuration space, which the backend hears of, and says what it is then.
    for mode in ["write through", "write back"] {
        guest.sh(&format!("echo '{mode}' > /sys/block/vda/cache_type"))?;
        let found = guest.cat("/sys/block/vda/cache_type")?;
        claim(found.trim() == mode, || {
            format!("the cache should be {mode}, it is {found}")
        })?;
    }
    is_usable(&mut guest, "/dev/vda", 2)?;
    // The next one serves on.
    daemon.kill()?;
    let state = |lab: &Lab| -> Result<String, TestError> {
        Ok(remote.info(lab)?["device_tree"]["g0"]["backend"]["state"].to_string())
    };
    eventually("the loss is told", || Ok(state(lab)?.contains("lost")))?;
    let daemon = StorageDaemon::start(lab, "disk", 2)?;
    eventually("it is served on", || Ok(state(lab)?.contains("connected")))?;
    keeps(&mut guest, "/dev/vda", DISK_BYTES - PIECE, 2)?;
    is_usable(&mut guest, "/dev/vda", 3)?;
    another_backend_comes_and_goes(lab, &remote, &mut guest)?;
    // And is the next kernel's.
    guest.leave("reboot")?;
    guest.wait_ready()?;
    guest.modprobe(&MODULES)?;
    guest.await_path("/dev/vda")?;
    keeps(&mut guest, "/dev/vda", DISK_BYTES - PIECE, 3)?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    daemon.end()
}

/// Our own daemon, which is nobody's relative, by the older name of the key.
fn another_backend_comes_and_goes(
    lab: &Lab,
    remote: &Remote,
    guest: &mut Guest,
) -> Result<(), TestError> {
    let at_first = descriptors_and_threads(lab, guest)?;
    let socket = format!("{SCRATCH}/ours.sock");
    let range = format!(
        "{},offset=0,size={}M",
        lab.host.dax()[1].path,
        DISK_BYTES / MIB
    );
    let ours = serve_dax(&lab.host, &socket, &range, &[])?;
    let word = format!("virtio_id=2,socket={socket},queue_sizes=[256],id=g1");
    let place = remote.add(lab, "add-generic-vhost-user", &word)?;
    guest.await_path("/dev/vdb")?;
    is_usable(guest, "/dev/vdb", 7)?;
    let info = remote.info(lab)?;
    claim(
        info["config"]["generic_vhost_user"][1]["device_type"] == 2,
        || format!("vm.info says: {}", info["config"]),
    )?;
    remote.ok(lab, &["remove-device", "g1"])?;
    guest.await_gone(&format!("/sys/bus/pci/devices/{place}"))?;
    eventually("g1 is no part of the VM any more", || {
        Ok(!remote.knows(lab, "g1")?)
    })?;
    comes_back_to("descriptors and threads", &at_first, || {
        descriptors_and_threads(lab, guest)
    })?;
    let more = format!("device_type=2,socket={socket},queue_sizes=[64,64],id=g1");
    let said = ["g1", "has 1 queue(s)", "list 1 or fewer"];
    remote.refused(lab, &["add-generic-vhost-user", &more], &said)?;
    ours.signal(SIGTERM)?;
    ours.wait(END)?;
    Ok(())
}

fn bad_generic_vhost_user_devices_and_sockets_to_connect_to_are_refused(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let zone = dax_zone(lab, "z0", 0, 256 * MIB, 0);
    let with = |flag: &str, word: &str, status: i32, said: &[&str]| {
        refused(lab, &["--memory-zone", &zone, flag, word], status, said)
    };
    let generic = "--generic-vhost-user";
    with(generic, "socket=/s,queue_sizes=[64]", 2, &["device_type"])?;
    with(
        generic,
        "device_type=64,socket=/s,queue_sizes=[64]",
        2,
        &["device_type=64", "1 to 63"],
    )?;
    with(
        generic,
        "device_type=2,socket=/s,queue_sizes=[]",
        2,
        &["queue_sizes="],
    )?;
    with(
        generic,
        "device_type=2,socket=/s,queue_size=64",
        2,
        &["queue_size", "queue_sizes"],
    )?;
    let nobody = format!("device_type=2,socket={SCRATCH}/nobody,queue_sizes=[64],id=g0");
    with(generic, &nobody, 1, &["g0", "nobody serves"])?;

    // Where backends are to connect.
    let server = |name: &str| {
        format!("vhost_user=on,vhost_mode=server,socket={SCRATCH}/{name},num_queues=4,id=n0")
    };
    with("--net", "vhost_mode=server", 2, &["vhost_user=on"])?;
    with(
        "--net",
        "vhost_user=on,socket=/s,num_queues=3",
        2,
        &["num_queues=3", "pairs"],
    )?;
    lab.host.sh(&format!(": > {SCRATCH}/file"))?;
    with("--net", &server("file"), 1, &["n0", "is not a socket"])?;
    let remote = Remote::new();
    let mut guest = Guest::boot(
        &lab.host,
        &spec_with(lab, &["--api-socket", remote.socket()]),
    )?;
    let at_first = descriptors_and_threads(lab, &mut guest)?;
    remote.refused(
        lab,
        &["add-net", &server("api.sock")],
        &["n0", "api.sock is in use"],
    )?;
    remote.refused(
        lab,
        &["add-net", &server("late.sock")],
        &["n0", "no backend has connected", "within 3s"],
    )?;
    claim(!lab.host.exists(&format!("{SCRATCH}/late.sock"))?, || {
        "the socket of a device that there is not is left".to_owned()
    })?;
    comes_back_to("descriptors and threads", &at_first, || {
        descriptors_and_threads(lab, &mut guest)
    })?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    let socket = format!("{SCRATCH}/wait.sock");
    ends_while_it_waits(lab, &server("wait.sock"), &socket)
}

/// A VMM that waits for a backend before its guest starts is told to end.
fn ends_while_it_waits(lab: &Lab, net: &str, socket: &str) -> Result<(), TestError> {
    let spec = spec_with(lab, &["--net", net]);
    let mut vmm = Guest::launch(&lab.host, &spec)?;
    let pid = vmm.vmm().pid();
    // In poll or ppoll.
    let waits = format!("test -e {socket} && grep -qE '^(7|271) ' /proc/{pid}/syscall");
    eventually("it waits for a backend", || {
        Ok(lab.host.run(&["sh", "-c", &waits])?.status.success())
    })?;
    vmm.vmm().signal(SIGTERM)?;
    let status = vmm.vmm().wait(END)?;
    claim(status == ExitStatus::Code(1), || {
        format!("it ended with {status}")
    })?;
    let said = vmm.vmm().stderr();
    claim(said.contains("n0: the wait for a backend"), || {
        format!("it should say that it waited for a backend: {said}")
    })?;
    claim(!lab.host.exists(socket)?, || {
        "the socket is left".to_owned()
    })
}
