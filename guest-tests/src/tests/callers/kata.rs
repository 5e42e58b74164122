//! Kata Containers: the calls of its driver `clh` (`src/runtime/virtcontainers/clh.go`), with all fields that its generated client
//! fills in, and what it does with the answers; `vm.add-fs` is its runtime's in Rust, which plugs a directory when a guest runs.
//!
//! One thing is the lab's: the guest has an agent of its own, whose console is the serial port that the driver switches on
//! to find out why something fails.

use std::time::Duration;

use lab_agent::caller_protocol::{Exchange, Exchanged};
use lab_agent::host_protocol::ExitStatus;
use serde_json::{Value, json};

use super::super::remote::{Remote, waiting_vmm};
use super::super::support::{GIB, MIB, VirtioKind, eventually, no_complaints, scratch};
use super::super::vhost_fs::FsDaemon;
use super::super::{Lab, TestError, claim, pci};
use super::{Answer, Caller, plain};
use crate::guest::{Guest, GuestSpec};
use crate::host::cards::Card;
use crate::share::{ImageForm, Initramfs, initramfs_path, kernel_path};
use crate::suite::SCRATCH;
use crate::wait::{self, SLACK};

/// From the VMM's start to its first answer (`clhTimeout`).
const LAUNCH: Duration = Duration::from_secs(10);
/// One call (`clhAPITimeout`).
const CALL: Duration = Duration::from_secs(1);
/// From `vm.create` to a guest that runs (`clhCreateAndBootVMMinimumTimeout`).
const CREATE_AND_BOOT: Duration = Duration::from_secs(10);
/// A device (`clhHotPlugAPITimeout`).
const HOTPLUG: Duration = Duration::from_secs(5);
/// `vmm.shutdown`, and once more from its answer to the VMM's end (`clhStopSandboxTimeout`).
const STOP: Duration = Duration::from_secs(3);
/// Where its agent listens in the guest.
const AGENT_PORT: &str = "1024";
const MACS: [&str; 2] = ["02:00:ca:fe:00:01", "02:00:ca:fe:00:02"];
/// The driver's network devices are queues of taps that its runtime has made.
const TAPS: [&str; 2] = ["kata0", "kata1"];
const MODULES: [&str; 8] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "nvme",
];

struct Kata {
    caller: Caller,
    /// What each call took.
    spent: Vec<String>,
}

impl Kata {
    /// A call of the generated client: over the connection that is there, and with an end of line after the body.
    fn call(
        &mut self,
        method: &str,
        name: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Value, TestError> {
        let answer = self
            .caller
            .exchange(&plain(request(method, name, body)), limit)?;
        self.told(name, &answer)
    }

    fn told(&mut self, name: &str, answer: &Answer) -> Result<Value, TestError> {
        self.spent.push(format!("{name} {:?}", answer.took));
        // The client takes anything below 300, and the driver has no use for other successes than these.
        claim([200, 204].contains(&answer.status), || {
            format!("{name}: status {}: {}", answer.status, answer.body)
        })?;
        super::json(answer)
    }

    fn get(&mut self, name: &str) -> Result<Value, TestError> {
        self.call("GET", name, None, CALL)
    }

    fn put(&mut self, name: &str, limit: Duration) -> Result<(), TestError> {
        self.call("PUT", name, None, limit).map(|_| ())
    }

    fn is(&mut self, state: &str) -> Result<Value, TestError> {
        let info = self.get("vm.info")?;
        claim(info["state"] == state, || {
            format!("the VM should be {state}: {info}")
        })?;
        Ok(info)
    }

    /// Plugs a device in; gives its name and its address, which the driver takes apart.
    fn hotplug(&mut self, name: &str, body: &Value) -> Result<(String, String), TestError> {
        let told = self.call("PUT", name, Some(body), HOTPLUG)?;
        place(&told)
    }

    /// All network devices that it knows of, over a connection for this alone, each with its tap beside it. Those that were
    /// plugged before are plugged again, with the same descriptor.
    fn add_nets(&mut self, count: usize) -> Result<Vec<Value>, TestError> {
        let mut told = Vec::new();
        for (at, (mac, tap)) in MACS.iter().zip(TAPS).enumerate().take(count) {
            let body = net(mac).to_string();
            let exchange = Exchange {
                request: format!(
                    "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
                     Content-Length: {}\r\nContent-Type: application/json\r\n\r\n{body}",
                    body.len()
                ),
                tap: Some(tap.to_owned()),
                anew: at == 0,
            };
            let answer = self.caller.exchange(&exchange, CALL)?;
            told.push(self.told("vm.add-net", &answer)?);
        }
        Ok(told)
    }
}

fn request(method: &str, name: &str, body: Option<&Value>) -> String {
    let body = body.map(|body| format!("{body}\n"));
    let mut head = format!(
        "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: OpenAPI-Generator/1.0.0/go\r\n"
    );
    match &body {
        None if method == "GET" => head.push_str("Accept: application/json\r\n"),
        None => head.push_str("Content-Length: 0\r\n"),
        Some(body) => {
            let length = format!(
                "Content-Length: {}\r\nContent-Type: application/json\r\n",
                body.len()
            );
            head.push_str(&length);
        }
    }
    format!(
        "{head}Accept-Encoding: gzip\r\n\r\n{}",
        body.unwrap_or_default()
    )
}

/// Name and address in an answer, if the address is one that the driver takes: `0000:00:XX.0`.
fn place(told: &Value) -> Result<(String, String), TestError> {
    let text = |field: &str| told[field].as_str().unwrap_or_default().to_owned();
    let (id, address) = (text("id"), text("bdf"));
    let slot = address
        .strip_prefix("0000:00:")
        .and_then(|rest| rest.strip_suffix(".0"));
    let good = slot
        .is_some_and(|slot| slot.len() == 2 && slot.bytes().all(|digit| digit.is_ascii_hexdigit()));
    claim(good && !id.is_empty(), || {
        format!("no device at 0000:00:XX.0 in {told}")
    })?;
    Ok((id, address))
}

fn disk(path: &str, readonly: bool) -> Value {
    json!({
        "backing_files": false, "direct": false, "image_type": "Raw", "iommu": false, "num_queues": 1, "path": path,
        "queue_size": 1024, "readonly": readonly, "sparse": true, "vhost_user": false,
    })
}

fn net(mac: &str) -> Value {
    json!({
        "ip": "192.168.249.1", "iommu": false, "mac": mac, "mask": "255.255.255.0", "num_queues": 2, "offload_csum": true,
        "offload_tso": true, "offload_ufo": true, "queue_size": 256, "vhost_mode": "Client", "vhost_user": false,
    })
}

fn guest_of(lab: &Lab, vsock: &str, shared: &FsDaemon) -> Value {
    let cmdline = GuestSpec::new(&lab.kernel.release, &[]).whole_cmdline();
    json!({
        "balloon": {"deflate_on_oom": false, "free_page_reporting": true, "size": 0},
        "console": {"iommu": false, "mode": "Off"},
        "cpus": {
            "boot_vcpus": 1, "kvm_hyperv": false, "max_vcpus": 2, "nested": true,
            "topology": {"cores_per_die": 2, "dies_per_package": 1, "packages": 1, "threads_per_core": 1},
        },
        "disks": [disk(&format!("{SCRATCH}/initdata"), true)],
        "fs": [{"num_queues": 1, "pci_segment": 1, "queue_size": 1024, "socket": shared.socket, "tag": "kataShared"}],
        "iommu": false,
        "landlock_enable": false,
        "memory": {
            "hotplug_method": "Acpi", "hotplug_size": 2 * GIB, "hugepages": false, "mergeable": false, "prefault": false,
            "shared": true, "size": 512 * MIB, "thp": true,
        },
        "payload": {
            "cmdline": cmdline, "initramfs": initramfs_path(&lab.kernel.release, Initramfs::Tools), "kernel": kernel_path(&lab.kernel.release, ImageForm::Elf),
        },
        "platform": {"num_pci_segments": 2, "sev_snp": false, "tdx": false},
        "pvpanic": false,
        "rng": {"iommu": false, "src": "/dev/urandom"},
        "serial": {"iommu": false, "mode": "Tty"},
        "vsock": {"cid": 3, "iommu": false, "socket": vsock},
        "watchdog": false,
    })
}

pub(super) fn calls_in_its_order_are_answered_in_its_time(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    lab.host.sh(&format!(
        "cd {SCRATCH} && truncate -s 1M initdata && truncate -s 16M disk"
    ))?;
    let card = lab.host.bind_vfio(Card::Disk)?;
    let shared = FsDaemon::serve(lab, "virtiofsd", "shared")?;
    let remote = Remote::new();
    let vsock = format!("{SCRATCH}/clh.sock");
    let mut guest = Guest::start(
        &lab.host,
        waiting_vmm(&remote, &["-v", "--seccomp", "false"], None),
    )?;
    let mut kata = Kata {
        caller: Caller::start(lab, remote.socket())?,
        spent: Vec::new(),
    };
    is_launched(&mut kata)?;
    is_booted(&mut kata, &guest_of(lab, &vsock, &shared))?;
    guest.wait_ready()?;
    guest.modprobe(&MODULES)?;
    the_agent_answers(lab, &mut guest, &vsock)?;
    has_a_thread_for_each_vcpu(lab, &mut guest, 1)?;

    let share = pci::is_driven(&mut guest, VirtioKind::FileSystem)?.address;
    claim(share.starts_with("0001:00:"), || {
        format!("the shared directory should be on segment 1, it is at {share}")
    })?;
    is_shared(lab, &mut guest, "kataShared", "shared")?;
    vcpus_are_as_asked_for(lab, &mut kata, &mut guest)?;
    let disk = hotplugs_a_disk(&mut kata, &mut guest)?;
    hotplugs_a_network(&mut kata, &mut guest)?;
    let more = FsDaemon::serve(lab, "more", "more")?;
    let body = json!({
        "tag": "more", "socket": more.socket, "num_queues": 1, "queue_size": 1024, "id": null, "pci_segment": 0,
    });
    let (_, address) = kata.hotplug("vm.add-fs", &body)?;
    served(&mut guest, &address)?;
    is_shared(lab, &mut guest, "more", "more")?;

    kata.put("vm.pause", CALL)?;
    kata.is("Paused")?;
    kata.put("vm.resume", CALL)?;
    kata.is("Running")?;
    the_agent_answers(lab, &mut guest, &vsock)?;
    unplugs(&mut kata, &mut guest, &disk)?;
    let path = card.path();
    let nvme = kata.hotplug("vm.add-device", &json!({"iommu": false, "path": path}))?;
    // Later than its driver, which does not like to be disturbed before.
    guest.await_path(&format!(
        "/sys/bus/pci/devices/{}/nvme/nvme0/nvme0n1",
        nvme.1
    ))?;
    unplugs(&mut kata, &mut guest, &nvme)?;
    no_complaints(&mut guest)?;
    guest.sh("umount /mnt/kataShared /mnt/more")?;
    is_terminated(&mut kata, guest)?;
    shared.has_served()?;
    more.has_served()?;
    card.release()?;
    claim(!lab.host.exists(remote.socket())?, || {
        "the socket is left behind".to_owned()
    })
}

/// It asks again every 10 ms until it is answered.
fn is_launched(kata: &mut Kata) -> Result<(), TestError> {
    let ping = plain(request("GET", "vmm.ping", None));
    let mut last = String::new();
    let mut answered = || match kata.caller.try_exchange(&ping, CALL)? {
        Exchanged::Answer { status, body, .. } => {
            claim(status == 200 && body.contains("\"version\""), || {
                format!("vmm.ping: status {status}: {body}")
            })?;
            Ok(true)
        }
        Exchanged::Failure(why) => {
            last = why;
            Ok(false)
        }
    };
    // Not in the error: it borrows what the closure has.
    wait::until(LAUNCH * SLACK, &mut answered, || {
        TestError::Claim("vmm.ping is not answered".to_owned())
    })
    .map_err(|error| TestError::Claim(format!("{error}: {last}")))
}

fn is_booted(kata: &mut Kata, config: &Value) -> Result<(), TestError> {
    let begun = std::time::Instant::now();
    kata.call("PUT", "vm.create", Some(config), CREATE_AND_BOOT)?;
    let info = kata.is("Created")?;
    claim(info["config"]["memory"]["hotplug_size"] == 2 * GIB, || {
        format!("the limit that memory is resized to is not told: {info}")
    })?;
    let told = kata.add_nets(1)?;
    claim(told == [Value::Null], || {
        format!("before it runs there is no address to tell: {told:?}")
    })?;
    kata.put("vm.boot", CREATE_AND_BOOT)?;
    kata.is("Running")?;
    claim(begun.elapsed() <= CREATE_AND_BOOT * SLACK, || {
        format!("create and boot took too long: {:?}", kata.spent)
    })
}

/// `CONNECT 1024` on the unix socket of the vsock device.
fn the_agent_answers(lab: &Lab, guest: &mut Guest, vsock: &str) -> Result<(), TestError> {
    // One that listens already is refused its port.
    let _listens = guest.ask(&format!("vsock-echo {AGENT_PORT}"));
    let ask = [
        "lab-agent",
        "vsock-ask",
        vsock,
        AGENT_PORT,
        "grpc.Health/Check",
    ];
    let answer = lab.host.check(&ask)?;
    claim(answer.trim() == "grpc.Health/Check", || {
        format!("the guest's agent answers {answer:?}")
    })
}

/// Names that match `^vcpu\d+$`, by which the runtime finds threads to put into a group.
fn has_a_thread_for_each_vcpu(lab: &Lab, guest: &mut Guest, count: usize) -> Result<(), TestError> {
    let pid = guest.vmm().pid();
    let names = lab.host.sh(&format!("cat /proc/{pid}/task/*/comm"))?;
    let mut numbers: Vec<usize> = names
        .lines()
        .filter_map(|name| name.strip_prefix("vcpu")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    claim(numbers == (0..count).collect::<Vec<_>>(), || {
        format!("{count} threads should be vcpu0 and so on: {names}")
    })
}

/// Mounted, it shows what the host has there.
fn is_shared(lab: &Lab, guest: &mut Guest, tag: &str, directory: &str) -> Result<(), TestError> {
    lab.host.sh(&format!(
        "echo {tag} of the host > {SCRATCH}/{directory}/file"
    ))?;
    let seen = guest.sh(&format!(
        "mkdir -p /mnt/{tag} && mount -t virtiofs {tag} /mnt/{tag} && cat /mnt/{tag}/file"
    ))?;
    claim(seen.trim() == format!("{tag} of the host"), || {
        format!("{tag}: the guest reads {seen}")
    })
}

/// It reads how many there are and may be, asks for what a container's limits come to, and is told that this is under way.
fn vcpus_are_as_asked_for(lab: &Lab, kata: &mut Kata, guest: &mut Guest) -> Result<(), TestError> {
    let info = kata.get("vm.info")?;
    let cpus = &info["config"]["cpus"];
    claim(cpus["boot_vcpus"] == 1 && cpus["max_vcpus"] == 2, || {
        format!("the vCPUs are not told: {info}")
    })?;
    let wanted = json!({"desired_vcpus": cpus["max_vcpus"]});
    kata.call("PUT", "vm.resize", Some(&wanted), CALL)?;
    guest.await_path("/sys/devices/system/cpu/cpu1")?;
    // What the agent does with it.
    guest.sh("echo 1 > /sys/devices/system/cpu/cpu1/online")?;
    has_a_thread_for_each_vcpu(lab, guest, 2)
}

/// Waits for the driver of a virtio device, which comes after that of its function.
fn served(guest: &mut Guest, address: &str) -> Result<(), TestError> {
    eventually(&format!("the device at {address} has a driver"), || {
        let list = format!("ls -d /sys/bus/pci/devices/{address}/virtio*/driver");
        Ok(guest.try_sh(&list)?.status == Some(0))
    })
}

/// Kata's agent finds the disk by the address alone.
fn hotplugs_a_disk(kata: &mut Kata, guest: &mut Guest) -> Result<(String, String), TestError> {
    let body = disk(&format!("{SCRATCH}/disk"), false);
    let (id, address) = kata.hotplug("vm.add-disk", &body)?;
    served(guest, &address)?;
    let mut name = String::new();
    eventually("the disk has a name", || {
        let list = format!("ls /sys/bus/pci/devices/{address}/virtio*/block 2>/dev/null || true");
        guest.sh(&list)?.trim().clone_into(&mut name);
        Ok(!name.is_empty())
    })?;
    let node = format!("/dev/{name}");
    guest.fill_blocks(&node, 0, MIB, 5)?;
    let report = guest.compare_blocks(&node, 0, MIB, 5)?;
    claim(report.wrong_words == 0, || format!("{node}: {report:?}"))?;
    Ok((id, address))
}

/// The first one is plugged once more, as the driver does; the second one is new.
fn hotplugs_a_network(kata: &mut Kata, guest: &mut Guest) -> Result<(), TestError> {
    let told = kata.add_nets(2)?;
    for (told, mac) in told.iter().zip(MACS) {
        let (_, address) = place(told)?;
        served(guest, &address)?;
        let mut found = String::new();
        eventually("the interface is there", || {
            let list = format!(
                "cat /sys/bus/pci/devices/{address}/virtio*/net/*/address 2>/dev/null || true"
            );
            guest.sh(&list)?.trim().clone_into(&mut found);
            Ok(!found.is_empty())
        })?;
        claim(found == mac, || {
            format!("the interface at {address} should be {mac}, it is {found}")
        })?;
    }
    Ok(())
}

/// Asks for a removal and goes on; the guest lets go of the device by itself.
fn unplugs(kata: &mut Kata, guest: &mut Guest, device: &(String, String)) -> Result<(), TestError> {
    let (id, address) = device;
    kata.call("PUT", "vm.remove-device", Some(&json!({"id": id})), HOTPLUG)?;
    guest.await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
    eventually(&format!("{id} is no part of the VM any more"), || {
        let info = kata.get("vm.info")?;
        Ok(info["device_tree"].get(id).is_none())
    })
}

fn is_terminated(kata: &mut Kata, mut guest: Guest) -> Result<(), TestError> {
    kata.get("vmm.ping")?;
    kata.put("vmm.shutdown", STOP)?;
    let status = guest.vmm().wait(STOP * SLACK)?;
    claim(status == ExitStatus::Code(0), || {
        format!("vmm.shutdown ended the VMM with {status}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_generated_clients() {
        assert_eq!(
            request("PUT", "vm.remove-device", Some(&json!({"id": "a"}))),
            "PUT /api/v1/vm.remove-device HTTP/1.1\r\nHost: localhost\r\nUser-Agent: OpenAPI-Generator/1.0.0/go\r\n\
             Content-Length: 11\r\nContent-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n{\"id\":\"a\"}\n"
        );
        assert!(request("PUT", "vm.boot", None).contains("\r\nContent-Length: 0\r\n"));
    }

    #[test]
    fn only_addresses_that_the_driver_takes_are_taken() {
        let at = |bdf: &str| place(&json!({"id": "a", "bdf": bdf}));
        assert_eq!(
            at("0000:00:0a.0").unwrap(),
            ("a".to_owned(), "0000:00:0a.0".to_owned())
        );
        for bdf in [
            "0001:00:0a.0",
            "0000:01:0a.0",
            "0000:00:0a.1",
            "0000:00:a.0",
            "",
        ] {
            assert!(at(bdf).is_err(), "{bdf}");
        }
    }
}
