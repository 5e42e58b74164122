//! The serial port's other end: terminal, pseudo terminal, file, socket, nothing. Nothing is left behind.

use std::time::Duration;

use lab_agent::host_protocol::{ExitStatus, SpawnSpec, TerminalSize};

use super::support::{MIB, dax_zone, initramfs, power_off, refused, spec_with};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::{Guest, READY_DEADLINE};
use crate::host::process::Process;
use crate::share::{ImageForm, kernel_path};
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "serial_on_a_terminal_restores_its_mode",
        run: serial_on_a_terminal_restores_its_mode,
    },
    GuestTest {
        name: "serial_to_a_file",
        run: serial_to_a_file,
    },
    GuestTest {
        name: "serial_on_a_socket",
        run: serial_on_a_socket,
    },
    GuestTest {
        name: "serial_on_a_pseudo_terminal",
        run: serial_on_a_pseudo_terminal,
    },
    GuestTest {
        name: "serial_input_of_any_length_arrives",
        run: serial_input_of_any_length_arrives,
    },
    GuestTest {
        name: "a_guest_runs_without_anybody_listening",
        run: a_guest_runs_without_anybody_listening,
    },
    GuestTest {
        name: "a_failing_start_leaves_nothing_behind",
        run: a_failing_start_leaves_nothing_behind,
    },
];

const LEAVE: Duration = PATIENCE;

/// daxhund with a guest on device-dax and this serial port.
fn command(lab: &Lab, serial: &str) -> Vec<String> {
    let kernel = kernel_path(&lab.kernel.release, ImageForm::Elf);
    let initramfs = initramfs(lab);
    let zone = dax_zone(lab, "z0", 1, 512 * MIB, 0);
    let words = [
        "daxhund",
        "--kernel",
        &kernel,
        "--initramfs",
        &initramfs,
        "--cmdline",
        "console=ttyS0 quiet panic=-1",
        "--memory-zone",
        &zone,
        "--serial",
        serial,
    ];
    words.map(str::to_owned).to_vec()
}

fn start(lab: &Lab, serial: &str) -> Result<Process, TestError> {
    lab.host.check(&["mkdir", "-p", SCRATCH])?;
    let argv = command(lab, serial);
    Ok(lab.host.spawn(SpawnSpec {
        argv,
        ..SpawnSpec::default()
    })?)
}

fn ends_well(vmm: &Process) -> Result<(), TestError> {
    let status = vmm.wait(LEAVE)?;
    claim(status == ExitStatus::Code(0), || {
        format!("ended with {status}: {}", vmm.stderr())
    })
}

/// A shell on a terminal runs the VMM and prints the terminal's mode before and after; SIGTERM ends the second one.
fn serial_on_a_terminal_restores_its_mode(lab: &mut Lab) -> Result<(), TestError> {
    let vmm: Vec<String> = command(lab, "tty")
        .iter()
        .map(|word| format!("'{word}'"))
        .collect();
    let vmm = vmm.join(" ");
    let script = format!(
        "stty -a > /tmp/scratch/before; {vmm}; echo STATUS $?; stty -a > /tmp/scratch/after; {vmm} & wait $!; echo STATUS $?; stty -a > /tmp/scratch/killed"
    );
    lab.host.check(&["mkdir", "-p", SCRATCH])?;
    let spec = SpawnSpec {
        argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
        pty: Some(TerminalSize {
            rows: 24,
            columns: 80,
        }),
        stdin: true,
        ..SpawnSpec::default()
    };
    let mut shell = lab.host.spawn(spec)?;
    shell.wait_for("GUEST-READY", READY_DEADLINE)?;
    // What is typed reaches the guest, and comes back once: the terminal does not echo, the guest's does.
    shell.send(b"#1 ping\n")?;
    let answer = shell.wait_for("@@ ", LEAVE)?;
    claim(answer.contains(r#""id":1"#), || answer.clone())?;
    shell.send(b"#2 poweroff\n")?;
    let status = shell.wait_for("STATUS", LEAVE)?;
    claim(status.trim() == "STATUS 0", || status.clone())?;
    shell.wait_for("GUEST-READY", READY_DEADLINE)?;
    lab.host
        .check(&["sh", "-c", "kill -TERM $(pidof daxhund)"])?;
    let status = shell.wait_for("STATUS", LEAVE)?;
    claim(status.trim() == "STATUS 143", || status.clone())?;
    shell.wait(LEAVE)?;
    let before = lab.host.read_text("/tmp/scratch/before")?;
    for name in ["after", "killed"] {
        let mode = lab.host.read_text(&format!("/tmp/scratch/{name}"))?;
        claim(mode == before, || {
            format!("terminal before:\n{before}\n{name}:\n{mode}")
        })?;
    }
    claim(
        before.contains(" icanon") && !before.contains("-icanon"),
        || before.clone(),
    )
}

/// A driver takes 256 bytes at an interrupt, the port has room for 64, a line of a terminal is up to 4095 long.
fn serial_input_of_any_length_arrives(lab: &mut Lab) -> Result<(), TestError> {
    let mut guest = Guest::boot(&lab.host, &spec_with(lab, &["--cpus", "boot=2"]))?;
    // Each character is several exits to the VMM, there and back.
    for sent in (240..4000).step_by(if lab.full { 61 } else { 457 }) {
        let counted = guest.sh(&format!("printf {} | wc -c", "x".repeat(sent)))?;
        claim(counted.trim() == sent.to_string(), || {
            format!("{sent} bytes sent, the guest had {}", counted.trim())
        })?;
    }
    power_off(guest)
}

fn serial_to_a_file(lab: &mut Lab) -> Result<(), TestError> {
    let vmm = start(lab, "file=/tmp/scratch/serial.log")?;
    let follow = "until test -s /tmp/scratch/serial.log; do usleep 10000; done; exec tail -n +1 -f /tmp/scratch/serial.log";
    let mut tail = lab.host.spawn(SpawnSpec {
        argv: ["sh", "-c", follow].map(str::to_owned).to_vec(),
        ..SpawnSpec::default()
    })?;
    tail.wait_for("GUEST-READY", READY_DEADLINE)?;
    vmm.signal(15)?;
    let status = vmm.wait(LEAVE)?;
    claim(status == ExitStatus::Code(143), || {
        format!("ended with {status}")
    })?;
    let log = lab.host.read_text("/tmp/scratch/serial.log")?;
    claim(log.contains("GUEST-READY"), || log.clone())?;
    claim(vmm.stdout().is_empty(), || {
        format!("printed to standard output: {}", vmm.stdout())
    })
}

fn serial_on_a_socket(lab: &mut Lab) -> Result<(), TestError> {
    let path = "/tmp/scratch/serial.sock";
    let vmm = start(lab, &format!("socket={path}"))?;
    let connect = |lab: &Lab| -> Result<Process, TestError> {
        let script =
            format!("until test -S {path}; do usleep 10000; done; exec lab-agent connect {path}");
        let argv = ["sh", "-c", &script].map(str::to_owned).to_vec();
        Ok(lab.host.spawn(SpawnSpec {
            argv,
            stdin: true,
            ..SpawnSpec::default()
        })?)
    };
    let mut client = connect(lab)?;
    client.wait_for("GUEST-READY", READY_DEADLINE)?;
    client.send(b"#1 ping\n")?;
    client.wait_for("@@ ", LEAVE)?;
    // The client goes, another one comes; the guest does not notice.
    client.close_stdin()?;
    client.wait(LEAVE)?;
    let mut client = connect(lab)?;
    client.send(b"#2 ping\n")?;
    let answer = client.wait_for("@@ ", LEAVE)?;
    claim(answer.contains(r#""id":2"#), || answer.clone())?;
    client.send(b"#3 poweroff\n")?;
    ends_well(&vmm)?;
    client.wait(LEAVE)?;
    let left = lab.host.run(&["test", "-e", path])?;
    claim(!left.status.success(), || format!("{path} is left behind"))
}

fn serial_on_a_pseudo_terminal(lab: &mut Lab) -> Result<(), TestError> {
    let vmm = start(lab, "pty")?;
    // Its name is the first thing the VMM says; the guest has not started to print by then.
    let name = wait_for_stderr(&vmm, "serial port: ")?;
    let script = format!("exec dd if={name} bs=1 2>/dev/null");
    let mut reader = lab.host.spawn(SpawnSpec {
        argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
        ..SpawnSpec::default()
    })?;
    reader.wait_for("GUEST-READY", READY_DEADLINE)?;
    lab.host
        .check(&["sh", "-c", &format!("printf '#1 ping\\n' > {name}")])?;
    let answer = reader.wait_for("@@ ", LEAVE)?;
    claim(answer.contains(r#""id":1"#), || answer.clone())?;
    lab.host.check(&[
        "sh",
        "-c",
        &format!("printf '{}' > {name}", "#2 poweroff\\n"),
    ])?;
    ends_well(&vmm)
}

/// The rest of the first line on standard error that begins with `prefix`.
fn wait_for_stderr(vmm: &Process, prefix: &str) -> Result<String, TestError> {
    let line = vmm.wait_for_error(prefix, LEAVE)?;
    line.split_once(prefix)
        .map(|(_, rest)| rest.trim().to_owned())
        .ok_or_else(|| TestError::Claim(format!("no {prefix:?} in {line:?}")))
}

/// Nothing can be asked of such a guest; but its kernel finds no init, panics and resets the processor by a triple fault.
fn a_guest_runs_without_anybody_listening(lab: &mut Lab) -> Result<(), TestError> {
    let kernel = kernel_path(&lab.kernel.release, ImageForm::Elf);
    let zone = dax_zone(lab, "z0", 1, 512 * MIB, 0);
    for serial in ["off", "null"] {
        let argv = [
            "daxhund",
            "--kernel",
            &kernel,
            "--cmdline",
            "console=ttyS0 quiet panic=-1 reboot=triple",
            "--memory-zone",
            &zone,
            "--serial",
            serial,
            "--console",
            "null",
        ];
        super::support::refused_as(lab, &argv, None, 3, &["triple fault"])?;
    }
    Ok(())
}

fn a_failing_start_leaves_nothing_behind(lab: &mut Lab) -> Result<(), TestError> {
    lab.host.check(&["mkdir", "-p", SCRATCH])?;
    let zone = dax_zone(lab, "z0", 0, 64 * MIB, 0);
    let socket = "/tmp/scratch/serial.sock";
    let serial = format!("socket={socket}");
    let kernel = kernel_path(&lab.kernel.release, ImageForm::Elf);
    let initramfs = initramfs(lab);
    // Fails last of all: memory is locked and mapped, the socket is made, the kernel does not fit.
    let argv = [
        "daxhund",
        "--kernel",
        &kernel,
        "--initramfs",
        &initramfs,
        "--memory-zone",
        &zone,
        "--serial",
        &serial,
    ];
    super::support::refused_as(lab, &argv, None, 1, &["guest memory is too small"])?;
    let left = lab.host.run(&["test", "-e", socket])?;
    claim(!left.status.success(), || {
        format!("{socket} is left behind")
    })?;
    // A path that is taken is left alone and named.
    lab.host.write_file(socket, b"mine")?;
    super::support::refused_as(lab, &argv, None, 1, &[socket, "exists already"])?;
    claim(lab.host.read_text(socket)? == "mine", || {
        "the file was changed".to_owned()
    })?;
    // Nothing holds the range.
    refused(
        lab,
        &["--memory-zone", &zone],
        1,
        &["guest memory is too small"],
    )
}
