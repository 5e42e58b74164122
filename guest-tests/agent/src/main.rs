//! First process of the emulated host (`host`) and of its guests (`guest`).
//!
//! The initramfs says which in `/etc/lab/role`. The host's first process only reaps and watches: the agent proper
//! is its child, so that waiting for orphans never takes the exit status of a process that the lab asked for.
//! Otherwise the role is the first argument. `scrub` is a tool for benches: it clears memory on the emulated host; more
//! small programs are for tests, see [`tools`].

#![deny(unsafe_code)]

mod bare;
mod caller;
mod disk;
mod guard;
mod guest;
mod host;
mod memory;
mod removal;
mod rest;
mod sockets;
mod taps;
mod tools;
mod wait;

use std::fs;
use std::io;
use std::process::{Command, ExitCode};

use rustix::process::{WaitOptions, getpid, wait};
use rustix::system::{RebootCommand, reboot};

fn main() -> ExitCode {
    let first = getpid().as_raw_nonzero().get() == 1;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let role = match arguments.first() {
        Some(word) if !first => Some(word.clone()),
        _ if first => fs::read_to_string("/etc/lab/role")
            .ok()
            .map(|text| text.trim().to_owned()),
        _ => None,
    };
    match role.as_deref() {
        Some("host") if first => {
            let problem = watch_over_host_agent();
            eprintln!("lab-agent: {problem}");
            power_off()
        }
        Some("host") => match host::serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("lab-agent: {error}");
                ExitCode::FAILURE
            }
        },
        Some("guest") => {
            let problem = guest::serve();
            eprintln!("lab-agent: {problem}");
            if first {
                power_off()
            } else {
                ExitCode::FAILURE
            }
        }
        Some("scrub") => match scrub(&arguments[1..]) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                eprintln!("lab-agent: {message}");
                ExitCode::FAILURE
            }
        },
        Some(word) if tools::NAMES.contains(&word) => tools::run(&arguments),
        _ => {
            eprintln!(
                "lab-agent: say `lab-agent host`, `lab-agent guest`, `lab-agent scrub DEVICE BYTES`, or one of {:?}",
                tools::NAMES
            );
            ExitCode::from(2)
        }
    }
}

/// Fills the first bytes of a device's memory with zeros.
fn scrub(arguments: &[String]) -> Result<(), String> {
    let [device, bytes] = arguments else {
        return Err("scrub takes a device and a number of bytes".to_owned());
    };
    let bytes = bytes
        .parse()
        .map_err(|_| format!("not a number of bytes: {bytes}"))?;
    memory::Words::of_device(device, bytes)?.clear();
    Ok(())
}

/// Starts the agent and reaps whatever becomes an orphan; returns why it can go on no longer.
fn watch_over_host_agent() -> String {
    if let Err(error) = host::system::mount_all() {
        return error.to_string();
    }
    let agent = match Command::new("/proc/self/exe").arg("host").spawn() {
        Ok(child) => i32::try_from(child.id()).ok(),
        Err(error) => return format!("cannot start the agent: {error}"),
    };
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid.as_raw_nonzero().get()) == agent => {
                return format!("the agent ended: {status:?}");
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return format!("cannot wait for the agent: {}", io::Error::from(error)),
        }
    }
}

fn power_off() -> ExitCode {
    rustix::fs::sync();
    match reboot(RebootCommand::PowerOff) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: cannot power off: {error}");
            ExitCode::FAILURE
        }
    }
}
