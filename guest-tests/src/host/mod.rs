//! The emulated host: boots it, runs programs on it, and finds its device-dax memory.
//!
//! ```text
//! Machine (QEMU's arguments) ──> Vm (the process, its log, QMP) ──> Channel (the agent) ──> Host
//! ```
//! Invariants: a host that exists has answered; every wait has a deadline; dropping a host ends its QEMU, and the
//! kernel ends it when the lab is killed. A host knows nothing of guests: see [`crate::guest`].

pub mod account;
pub mod cards;
pub mod channel;
pub mod figures;
pub mod inventory;
pub mod machine;
pub mod passthrough;
pub mod process;
pub mod qmp;
mod vm;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use lab_agent::host_protocol::{Event, ExitStatus, Request, SpawnSpec};
use serde::Deserialize;

use crate::provision::kernel::Kernel;
use crate::wait::PATIENCE;
use channel::{Channel, HostError};
use machine::{Contents, Dimm, Machine, PageArray};
use process::Process;
use qmp::Qmp;
use vm::{Vm, VmError};

/// From power-on to the agent's first word. Emulation on a busy machine is slow; this is many times the usual.
const BOOT_DEADLINE: Duration = Duration::from_mins(4);
/// From power-on until the kernel has found a namespace that was there before.
const KEPT_DEADLINE_SECONDS: &str = "120";
/// A program that only looks something up or changes a setting.
pub const RUN_DEADLINE: Duration = PATIENCE;

/// A host that did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// QEMU.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The agent said nothing.
    #[error(
        "the emulated host with kernel {release} did not come up\n--- its console ---\n{console}\n--- QEMU ---\n{qemu}"
    )]
    Silent {
        /// The kernel.
        release: String,
        /// End of the console.
        console: String,
        /// What QEMU said.
        qemu: String,
        /// What was waited for.
        source: Box<HostError>,
    },
    /// The DAX devices could not be made.
    #[error(
        "the emulated host came up, but its device-dax memory could not be made\n--- its console ---\n{console}"
    )]
    Dax {
        /// End of the console.
        console: String,
        /// Why.
        source: Box<HostError>,
    },
    /// There is no such memory.
    #[error("the emulated host has {found} persistent memory regions, expected {expected}")]
    Regions {
        /// What the kernel found.
        found: usize,
        /// What QEMU was told.
        expected: usize,
    },
}

/// What a host is made of.
#[derive(Clone, Debug)]
pub struct HostSpec {
    /// Its kernel.
    pub kernel: Kernel,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// What it sees, read-only, as `/lab`.
    pub share: PathBuf,
    /// Where its console's log goes.
    pub logs: PathBuf,
    /// Its processors, memory and devices.
    pub machine: Machine,
}

/// A device-dax device of the host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DaxDevice {
    /// As in `dax0.0`.
    pub name: String,
    /// As in `/dev/dax0.0`.
    pub path: String,
    /// What can be mapped.
    pub size_bytes: u64,
    /// Granularity of a mapping.
    pub align_bytes: u64,
}

/// What a program left behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output, undecodable bytes replaced.
    pub stdout: String,
    /// Standard error, undecodable bytes replaced.
    pub stderr: String,
}

impl Output {
    /// Of a program that must succeed.
    pub fn succeeded(self, command: &str) -> Result<Self, HostError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(HostError::Failed {
            command: command.to_owned(),
            status: self.status,
            stderr: self.stderr,
        })
    }
}

/// An emulated host that is up.
#[derive(Debug)]
pub struct Host {
    vm: Vm,
    channel: Channel,
    dax: Vec<DaxDevice>,
    hello: Hello,
}

/// What the agent said first.
#[derive(Clone, Debug)]
pub struct Hello {
    /// The kernel's release.
    pub release: String,
    /// How long the host's kernel took.
    pub uptime_seconds: f64,
}

impl Host {
    /// Powers a host on and makes its DAX devices.
    pub fn boot(spec: &HostSpec) -> Result<Self, BootError> {
        let (vm, agent) = Vm::start(spec)?;
        let channel = Channel::open(agent);
        let hello = match channel.wait_hello(BOOT_DEADLINE) {
            Ok((release, uptime_seconds)) => Hello {
                release,
                uptime_seconds,
            },
            Err(source) => {
                let (console, qemu) = (vm.console_tail(), vm.qemu_tail());
                return Err(BootError::Silent {
                    release: spec.kernel.release.clone(),
                    console,
                    qemu,
                    source: Box::new(source),
                });
            }
        };
        let mut host = Self {
            vm,
            channel,
            dax: Vec::new(),
            hello,
        };
        host.dax = host.make_dax_devices(&spec.machine.dimms)?;
        host.channel.forget_ended();
        Ok(host)
    }

    /// What the agent said first.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The DAX devices, in the order of the machine's memory modules.
    pub fn dax(&self) -> &[DaxDevice] {
        &self.dax
    }

    /// Talks to QEMU's monitor.
    pub fn qmp(&mut self) -> &mut Qmp {
        self.vm.qmp()
    }

    /// Runs a program to its end; a failure is a result.
    pub fn run(&self, argv: &[&str]) -> Result<Output, HostError> {
        self.run_within(argv, RUN_DEADLINE)
    }

    /// Whether there is something at a path.
    pub fn exists(&self, path: &str) -> Result<bool, HostError> {
        Ok(self.run(&["test", "-e", path])?.status.success())
    }

    /// Runs a script that must succeed; gives its standard output.
    pub fn sh(&self, script: &str) -> Result<String, HostError> {
        check(&self.channel, &["sh", "-c", script])
    }

    /// As [`Host::run`], with another deadline.
    pub fn run_within(&self, argv: &[&str], deadline: Duration) -> Result<Output, HostError> {
        run_within(&self.channel, argv, deadline)
    }

    /// Runs a program that must succeed; gives its standard output.
    pub fn check(&self, argv: &[&str]) -> Result<String, HostError> {
        check(&self.channel, argv)
    }

    /// Starts a program.
    pub fn spawn(&self, spec: SpawnSpec) -> Result<Process, HostError> {
        Process::start(self.channel.clone(), spec)
    }

    /// Reads a file.
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>, HostError> {
        let event = self.channel.ask(
            |id| Request::ReadFile {
                id,
                path: path.to_owned(),
            },
            RUN_DEADLINE,
        )?;
        match event {
            Event::File { data, .. } => Ok(data.0),
            other => Err(HostError::Unexpected {
                what: format!("reading {path}"),
                event: format!("{other:?}"),
            }),
        }
    }

    /// Reads a text file, without white space at its ends.
    pub fn read_text(&self, path: &str) -> Result<String, HostError> {
        Ok(String::from_utf8_lossy(&self.read_file(path)?)
            .trim()
            .to_owned())
    }

    /// Writes a file, creating it for everyone to read.
    pub fn write_file(&self, path: &str, data: &[u8]) -> Result<(), HostError> {
        let data = lab_agent::host_protocol::Bytes(data.to_vec());
        let request = |id| Request::WriteFile {
            id,
            path: path.to_owned(),
            mode: 0o644,
            data,
        };
        self.channel.ask(request, RUN_DEADLINE).map(|_| ())
    }

    /// Reserves huge pages of 2 MiB. The kernel may find fewer: that is an error.
    pub fn set_hugepages(&self, count: u32) -> Result<(), HostError> {
        let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
        self.write_file(path, count.to_string().as_bytes())?;
        let got = self.read_text(path)?;
        if got == count.to_string() {
            return Ok(());
        }
        Err(HostError::Refused {
            what: format!("reserving {count} huge pages"),
            message: format!("the kernel found {got}"),
        })
    }

    /// What runs, is mounted, locked and bound: to be compared before and after a test.
    pub fn inventory(&self) -> Result<inventory::Inventory, HostError> {
        inventory::take(self)
    }

    /// End of the host's console.
    pub fn console_tail(&self) -> String {
        self.vm.console_tail()
    }

    /// Ends of everything that can explain a failure: the console, and the output of the programs started since the
    /// last [`Host::forget_programs`].
    pub fn evidence(&self) -> String {
        let mut text = self.channel.programs_tail();
        let _ = write!(
            text,
            "--- console of the emulated host ---\n{}\n",
            self.console_tail()
        );
        text
    }

    /// Forgets programs that have ended, before a new test.
    pub fn forget_programs(&self) {
        self.channel.forget_ended();
    }

    /// Makes a device-dax namespace on every region, or waits for the one that it has kept. Regions are matched to memory modules by address: the
    /// kernel's numbers follow the firmware's table, whose order is QEMU's own.
    fn make_dax_devices(&self, dimms: &[Dimm]) -> Result<Vec<DaxDevice>, BootError> {
        let failed = |source| BootError::Dax {
            console: self.console_tail(),
            source: Box::new(source),
        };
        let listing = self.check(&[
            "sh",
            "-c",
            "for r in /sys/bus/nd/devices/region*; do echo ${r##*/region} $(cat $r/resource); done",
        ]);
        let listing = listing.map_err(failed)?;
        let regions: BTreeMap<u64, &str> = listing
            .lines()
            .filter_map(|line| {
                let (number, address) = line.split_once(' ')?;
                Some((
                    u64::from_str_radix(address.strip_prefix("0x")?, 16).ok()?,
                    number,
                ))
            })
            .collect();
        if regions.len() != dimms.len() {
            return Err(BootError::Regions {
                found: regions.len(),
                expected: dimms.len(),
            });
        }
        let mut making = Vec::new();
        for (dimm, region) in dimms.iter().zip(regions.values()) {
            if let Contents::Kept(_) = dimm.contents {
                making.push(Making::Kept(format!("dax{region}.0")));
                continue;
            }
            let namespace = format!("namespace{region}.0");
            let align = dimm.align_bytes.to_string();
            let map = match dimm.page_array {
                PageArray::Memory => "mem",
                PageArray::Device => "dev",
            };
            let words = [
                "ndctl",
                "create-namespace",
                "-f",
                "-m",
                "devdax",
                "-e",
                &namespace,
                "-M",
                map,
                "-a",
                &align,
            ];
            let argv = words
                .iter()
                .map(|word| (*word).to_owned())
                .collect::<Vec<_>>();
            // All at once: each waits for the kernel most of the time.
            making.push(Making::New(
                argv.join(" "),
                self.spawn(SpawnSpec {
                    argv,
                    ..SpawnSpec::default()
                })
                .map_err(failed)?,
            ));
        }
        let mut devices = Vec::new();
        for making in making {
            let (command, process) = match making {
                Making::New(command, process) => (command, process),
                Making::Kept(name) => {
                    let device = DaxDevice::named(name);
                    let argv = ["lab-agent", "await", &device.path, KEPT_DEADLINE_SECONDS];
                    self.check(&argv).map_err(failed)?;
                    devices.push(device);
                    continue;
                }
            };
            let output = process
                .finish(RUN_DEADLINE)
                .and_then(|output| output.succeeded(&command))
                .map_err(failed)?;
            devices.push(parse_namespace(&output.stdout).ok_or_else(|| {
                failed(HostError::Unexpected {
                    what: command,
                    event: output.stdout,
                })
            })?);
        }
        for device in &mut devices {
            let read = |attribute| {
                let path = format!("/sys/bus/dax/devices/{}/{attribute}", device.name);
                let text = self.read_text(&path).map_err(failed)?;
                let number = text.parse::<u64>();
                number.map_err(|_| {
                    failed(HostError::Unexpected {
                        what: path,
                        event: text,
                    })
                })
            };
            (device.size_bytes, device.align_bytes) = (read("size")?, read("align")?);
        }
        Ok(devices)
    }
}

/// Runs a program to its end; a failure is a result.
fn run_within(channel: &Channel, argv: &[&str], deadline: Duration) -> Result<Output, HostError> {
    let spec = SpawnSpec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        ..SpawnSpec::default()
    };
    Process::start(channel.clone(), spec)?.finish(deadline)
}

/// Runs a program that must succeed; gives its standard output.
fn check(channel: &Channel, argv: &[&str]) -> Result<String, HostError> {
    let output = run_within(channel, argv, RUN_DEADLINE)?;
    Ok(output.succeeded(&argv.join(" "))?.stdout)
}

/// A device on its way.
enum Making {
    /// The command that makes its namespace.
    New(String, Process),
    /// The name it has when the kernel has found its namespace.
    Kept(String),
}

impl DaxDevice {
    fn named(name: String) -> Self {
        Self {
            path: format!("/dev/{name}"),
            name,
            size_bytes: 0,
            align_bytes: 0,
        }
    }
}

/// Reads the name of the device from what `ndctl create-namespace` prints.
fn parse_namespace(json: &str) -> Option<DaxDevice> {
    #[derive(Deserialize)]
    struct Namespace {
        daxregion: Region,
    }
    #[derive(Deserialize)]
    struct Region {
        devices: Vec<Device>,
    }
    #[derive(Deserialize)]
    struct Device {
        chardev: String,
    }
    let namespace: Namespace = serde_json::from_str(json).ok()?;
    let name = namespace.daxregion.devices.into_iter().next()?.chardev;
    Some(DaxDevice::named(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_found_in_what_ndctl_prints() {
        let json = r#"{"dev":"namespace1.0","mode":"devdax","map":"mem","daxregion":{"id":1,"align":2097152,
                       "devices":[{"chardev":"dax1.0","size":"6.00 GiB","mode":"devdax"}]},"align":2097152}"#;
        assert_eq!(parse_namespace(json).unwrap().path, "/dev/dax1.0");
        assert_eq!(parse_namespace("{}"), None);
    }
}
