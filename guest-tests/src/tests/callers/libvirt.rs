//! libvirt: what its driver `ch` (`src/ch`) takes for granted of the VMM that it starts.
//!
//! It listens at the API's socket itself and hands that over, follows events by counting braces, finds threads by their names,
//! and sends the descriptors of taps beside its requests.

use std::time::Duration;

use lab_agent::caller_protocol::Exchange;
use lab_agent::host_protocol::{ExitStatus, SpawnSpec};
use serde_json::{Value, json};

use super::super::support::{
    MIB, VirtioKind, eventually, initramfs, no_complaints, scratch, virtio_functions,
};
use super::super::{Lab, TestError, claim, pci};
use super::{Caller, plain};
use crate::guest::{Guest, GuestSpec};
use crate::host::process::Process;
use crate::share::{ImageForm, kernel_path};
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

/// An answer to a request with descriptors (`PKT_TIMEOUT_MS`), and here to any other, for which it waits as long as it takes.
const ANSWER: Duration = Duration::from_millis(500);
const MACS: [&str; 2] = ["52:54:00:aa:00:01", "52:54:00:aa:00:02"];
const MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_console",
];
/// What it knows of events, as source and name.
const STARTED: [&str; 3] = ["vmm:starting", "vm:booting", "vm:booted"];

/// The VMM that it has started.
struct Started {
    vmm: Process,
    /// Reads the FIFO.
    events: Process,
    caller: Caller,
}

impl Started {
    /// A request of the HTTP library that it uses; without a body it is an upload of nothing.
    fn put(&mut self, name: &str, body: Option<&Value>) -> Result<(), TestError> {
        let (kind, body) = match body {
            Some(body) => ("Content-Type: application/json\r\n", body.to_string()),
            None => ("", String::new()),
        };
        let request = format!(
            "PUT /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n{kind}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = self.caller.exchange(&plain(request), ANSWER)?;
        claim([200, 204].contains(&answer.status), || {
            format!("{name}: status {}: {}", answer.status, answer.body)
        })
    }

    fn info(&mut self) -> Result<Value, TestError> {
        let request = "GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
                       Content-Type: application/json\r\n\r\n";
        let answer = self.caller.exchange(&plain(request.to_owned()), ANSWER)?;
        super::json(&answer)
    }

    /// A network with its tap, over a connection of its own; gives what is answered.
    fn add_net(&mut self, number: usize) -> Result<Value, TestError> {
        let body = json!({"id": format!("net_{number}"), "mac": MACS[number], "num_queues": 2})
            .to_string();
        let exchange = Exchange {
            request: format!(
                "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            ),
            tap: Some(format!("vnet{number}")),
            anew: true,
        };
        let answer = self.caller.exchange(&exchange, ANSWER)?;
        claim([200, 204].contains(&answer.status), || {
            format!("vm.add-net: status {}: {}", answer.status, answer.body)
        })?;
        super::json(&answer)
    }

    /// Waits until all of these have been told.
    fn told(&self, wanted: &[&str]) -> Result<(), TestError> {
        eventually(&format!("the events {wanted:?}"), || {
            let text = self.events.stdout();
            let names: Vec<String> = objects(&text).map(event).collect::<Result<_, _>>()?;
            Ok(wanted
                .iter()
                .all(|name| names.iter().any(|told| told == name)))
        })
    }

    /// Names of the VMM's threads, each on its line.
    fn threads(&self, lab: &Lab) -> Result<String, TestError> {
        Ok(lab
            .host
            .sh(&format!("cat /proc/{}/task/*/comm", self.vmm.pid()))?)
    }
}

pub(super) fn finds_what_it_relies_on(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let (emulator, socket) = (
        format!("{SCRATCH}/cloud-hypervisor"),
        format!("{SCRATCH}/guest-socket"),
    );
    let fifo = format!("{SCRATCH}/guest-event-monitor-fifo");
    lab.host.sh(&format!(
        "cd {SCRATCH} && ln -s /lab/bin/daxhund {emulator} && mkfifo {fifo} && truncate -s 1M root && truncate -s 1M cdrom"
    ))?;
    let told = lab.host.check(&[&emulator, "--version"])?;
    claim(
        version(&told).is_some_and(|version| version >= (40, 0, 0)),
        || format!("no version of 40 or later: {told}"),
    )?;

    let mut started = start(lab, &emulator, &socket, &fifo)?;
    let serial = format!("{SCRATCH}/serial.sock");
    let mut guest = connected(lab, &serial)?;
    started.put("vm.create", Some(&guest_of(lab, &serial)))?;
    claim(started.add_net(0)? == Value::Null, || {
        "there is no address yet".to_owned()
    })?;
    started.put("vm.boot", None)?;
    started.told(&STARTED)?;
    has_the_vcpus(&started.threads(lab)?, 2)?;
    let info = started.info()?;
    let console = info["config"]["console"]["file"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    claim(
        lab.host.run(&["test", "-c", &console])?.status.success(),
        || format!("config.console.file should be the pseudo terminal: {info}"),
    )?;

    guest.wait_ready()?;
    guest.modprobe(&MODULES)?;
    eventually("both disks have a driver", || {
        let disks = virtio_functions(&mut guest, VirtioKind::Block)?;
        Ok(disks.iter().filter(|disk| disk.driver.is_some()).count() == 2)
    })?;
    pci::is_driven(&mut guest, VirtioKind::Rng)?;
    let threads = started.threads(lab)?;
    for prefix in ["_disk0", "_disk1", "_net", "_rng"] {
        claim(threads.lines().any(|name| name.starts_with(prefix)), || {
            format!("no thread's name begins with {prefix}: {threads}")
        })?;
    }
    let address = started.add_net(1)?["bdf"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    guest.await_path(&format!("/sys/bus/pci/devices/{address}/driver"))?;
    eventually("the second interface has a thread", || {
        Ok(started
            .threads(lab)?
            .lines()
            .any(|name| name.starts_with("_net_1")))
    })?;

    started.put("vm.pause", None)?;
    started.put("vm.resume", None)?;
    started.told(&["vm:pausing", "vm:paused", "vm:resuming", "vm:resumed"])?;
    no_complaints(&mut guest)?;
    started.put("vmm.shutdown", None)?;
    let status = started.vmm.wait(PATIENCE)?;
    claim(status == ExitStatus::Code(0), || {
        format!("vmm.shutdown ended the VMM with {status}")
    })?;
    // What was told until the end, and then no more.
    started.events.wait(PATIENCE)?;
    started.told(&["vmm:shutdown"])?;
    guest.wait_end()?;
    claim(lab.host.exists(&socket)?, || {
        "the socket is not the VMM's to remove".to_owned()
    })
}

/// The VMM inherits a socket on which somebody listens already, and waits for nobody to read its events.
fn start(lab: &Lab, emulator: &str, socket: &str, fifo: &str) -> Result<Started, TestError> {
    let event_monitor = format!("path={fifo}");
    let argv = [
        "lab-agent",
        "listening",
        socket,
        emulator,
        "--api-socket",
        "fd={fd}",
        "--event-monitor",
        &event_monitor,
    ];
    let spawn = |argv: &[&str]| {
        lab.host.spawn(SpawnSpec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            ..SpawnSpec::default()
        })
    };
    let vmm = spawn(&argv)?;
    // Nobody has to wait for it: connections are taken in from the start.
    lab.host
        .check(&["lab-agent", "await-socket", socket, "60"])?;
    let events = spawn(&["cat", fifo])?;
    Ok(Started {
        vmm,
        events,
        caller: Caller::start(lab, socket)?,
    })
}

fn guest_of(lab: &Lab, serial: &str) -> Value {
    let cmdline = GuestSpec::new(&lab.kernel.release, &[]).whole_cmdline();
    json!({
        "console": {"mode": "Pty"},
        "serial": {"mode": "Socket", "socket": serial},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 512 * MIB},
        "payload": {
            "kernel": kernel_path(&lab.kernel.release, ImageForm::Elf), "cmdline": cmdline, "initramfs": initramfs(lab),
        },
        "disks": [
            {"path": format!("{SCRATCH}/root")}, {"path": format!("{SCRATCH}/cdrom"), "readonly": true},
        ],
    })
}

/// The guest behind a serial port that is a socket, as soon as that is there.
fn connected(lab: &Lab, socket: &str) -> Result<Guest, TestError> {
    let script =
        format!("until test -S {socket}; do usleep 10000; done; exec lab-agent connect {socket}");
    let spec = SpawnSpec {
        argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
        stdin: true,
        ..SpawnSpec::default()
    };
    Ok(Guest::start(&lab.host, spec)?)
}

/// It takes the number after `vcpu` for that of the vCPU.
fn has_the_vcpus(threads: &str, count: usize) -> Result<(), TestError> {
    let mut numbers: Vec<usize> = threads
        .lines()
        .filter_map(|name| name.strip_prefix("vcpu")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    claim(numbers == (0..count).collect::<Vec<_>>(), || {
        format!(
            "threads vcpu0 to vcpu{} should be there: {threads}",
            count - 1
        )
    })
}

/// The version in `cloud-hypervisor v<major>.<minor>.<micro>`, whatever follows.
fn version(text: &str) -> Option<(u32, u32, u32)> {
    let text = text.strip_prefix("cloud-hypervisor v")?;
    let end = text
        .find(|c: char| c != '.' && !c.is_ascii_digit())
        .unwrap_or(text.len());
    let mut numbers = text[..end].split('.').map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some((next()?, next()?, next()?))
}

/// Whole objects in a text: from a brace to the one that ends it, wherever braces stand.
fn objects(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_usize;
    let mut start = 0;
    text.bytes().enumerate().filter_map(move |(at, byte)| {
        match byte {
            b'{' => {
                if depth == 0 {
                    start = at;
                }
                depth += 1;
            }
            b'}' if depth > 0 => {
                depth -= 1;
                if depth == 0 {
                    return Some(&text[start..=at]);
                }
            }
            _ => {}
        }
        None
    })
}

/// Source and name of an event, which has all that one has.
fn event(object: &str) -> Result<String, TestError> {
    let wrong = |what: String| TestError::Claim(format!("{what}: {object}"));
    let event: Value = serde_json::from_str(object).map_err(|error| wrong(error.to_string()))?;
    let timestamp = &event["timestamp"];
    let timed = timestamp["secs"].is_u64() && timestamp["nanos"].is_u64();
    match (event["source"].as_str(), event["event"].as_str()) {
        (Some(source), Some(name)) if timed && event.get("properties").is_some() => {
            Ok(format!("{source}:{name}"))
        }
        _ => Err(wrong("no event".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_three_numbers() {
        assert_eq!(
            version("cloud-hypervisor v53.0.0 (daxhund 0.1.0)\n"),
            Some((53, 0, 0))
        );
        assert_eq!(version("cloud-hypervisor v40.1.2"), Some((40, 1, 2)));
        assert_eq!(version("cloud-hypervisor v40.1"), None);
        assert_eq!(version("daxhund 0.1.0"), None);
    }

    #[test]
    fn objects_end_at_their_own_brace() {
        let text = "{\"a\": {\"b\": 1}}\n\n{}{\"c\":";
        assert_eq!(
            objects(text).collect::<Vec<_>>(),
            ["{\"a\": {\"b\": 1}}", "{}"]
        );
    }

    #[test]
    fn an_event_has_a_time_a_source_and_a_name() {
        let good = r#"{"timestamp":{"secs":0,"nanos":1},"source":"vm","event":"booted","properties":null}"#;
        assert_eq!(event(good).unwrap(), "vm:booted");
        assert!(event(r#"{"source":"vm","event":"booted","properties":null}"#).is_err());
    }
}
