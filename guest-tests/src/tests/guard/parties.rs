//! Who takes part: the guard, a holder, and the tools by which a device is taken away and given back.

use std::time::Duration;

use lab_agent::host_protocol::{ExitStatus, SpawnSpec};

use super::super::support::eventually;
use super::super::{Lab, TestError, claim};
use crate::host::Output;
use crate::host::process::Process;
pub(in crate::tests) use crate::host::process::SIGKILL;
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

/// What takes milliseconds on a real machine.
pub(in crate::tests) const SOON: Duration = PATIENCE;
/// A holder that is to answer in time: far more than any step of a story takes.
pub(in crate::tests) const PATIENT_MS: u64 = 300_000;
pub(in crate::tests) const SIGTERM: i32 = 15;
pub(in crate::tests) const SIGSTOP: i32 = 19;
pub(in crate::tests) const SIGCONT: i32 = 18;

/// The device that is held: the lab's second.
pub(in crate::tests) struct Device {
    /// As in `dax1.0`.
    pub(in crate::tests) name: String,
    /// X in daxX.Y.
    pub(in crate::tests) region: String,
    pub(in crate::tests) align_bytes: u64,
}

impl Device {
    pub(in crate::tests) fn held(lab: &Lab) -> Result<Self, TestError> {
        Self::at(lab, 1)
    }

    /// One that nobody holds: the lab's third.
    pub(in crate::tests) fn other(lab: &Lab) -> Result<Self, TestError> {
        Self::at(lab, 2)
    }

    fn at(lab: &Lab, index: usize) -> Result<Self, TestError> {
        let device = &lab.host.dax()[index];
        let region = device.name.trim_start_matches("dax").split('.').next();
        let region =
            region.ok_or_else(|| TestError::Claim(format!("no region in {}", device.name)))?;
        Ok(Self {
            name: device.name.clone(),
            region: region.to_owned(),
            align_bytes: device.align_bytes,
        })
    }

    pub(in crate::tests) fn namespace(&self) -> String {
        format!("namespace{}.0", self.region)
    }

    /// The driver that has it; nothing without a driver or a device.
    pub(in crate::tests) fn driver(&self, lab: &Lab) -> Result<Option<String>, TestError> {
        let link = format!("/sys/bus/dax/devices/{}/driver", self.name);
        let output = lab.host.run(&["readlink", "-f", &link])?;
        let name = output
            .stdout
            .trim()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        Ok((output.status.success() && name != "driver").then_some(name))
    }

    pub(in crate::tests) fn is_usable(&self, lab: &Lab) -> Result<bool, TestError> {
        Ok(self.driver(lab)?.as_deref() == Some("device_dax"))
    }
}

/// A way to take a device away.
#[derive(Clone, Copy, Debug)]
pub(in crate::tests) enum Way {
    Unbind,
    DisableDevice,
    SystemRam,
    DisableNamespace,
    DestroyNamespace,
    DisableRegion,
    UnbindBus,
}

impl Way {
    pub(in crate::tests) const ALL: [Self; 7] = [
        Self::Unbind,
        Self::DisableDevice,
        Self::SystemRam,
        Self::DisableNamespace,
        Self::DestroyNamespace,
        Self::DisableRegion,
        Self::UnbindBus,
    ];

    /// The command that does it.
    pub(in crate::tests) fn command(self, device: &Device) -> Vec<String> {
        let (name, namespace) = (&device.name, device.namespace());
        let words = |text: String| text.split(' ').map(str::to_owned).collect();
        match self {
            Self::Unbind => shell(&format!(
                "echo {name} > /sys/bus/dax/drivers/device_dax/unbind"
            )),
            Self::DisableDevice => words(format!("daxctl disable-device {name}")),
            Self::SystemRam => words(format!(
                "daxctl reconfigure-device -m system-ram --no-online {name}"
            )),
            Self::DisableNamespace => words(format!("ndctl disable-namespace {namespace}")),
            Self::DestroyNamespace => words(format!("ndctl destroy-namespace -f {namespace}")),
            Self::DisableRegion => words(format!("ndctl disable-region region{}", device.region)),
            Self::UnbindBus => shell("echo ACPI0012:00 > /sys/bus/acpi/drivers/nfit/unbind"),
        }
    }

    /// The `unbind` that it opens first. (Disabling a region disables its namespaces first.)
    pub(in crate::tests) fn caught_at(self) -> &'static str {
        match self {
            Self::Unbind | Self::DisableDevice | Self::SystemRam => "dax/drivers/device_dax/unbind",
            Self::DisableNamespace | Self::DestroyNamespace | Self::DisableRegion => {
                "nd/drivers/dax_pmem/unbind"
            }
            Self::UnbindBus => "acpi/drivers/nfit/unbind",
        }
    }

    /// Gives the device back to those who use it.
    pub(in crate::tests) fn undo(self, lab: &Lab, device: &Device) -> Result<(), TestError> {
        let (name, region) = (&device.name, &device.region);
        match self {
            Self::Unbind | Self::DisableDevice => bind(lab, device)?,
            Self::SystemRam => {
                let argv = ["daxctl", "reconfigure-device", "-f", "-m", "devdax", name];
                lab.host.check(&argv).map(drop)?;
            }
            Self::DisableNamespace => {
                let namespace = device.namespace();
                lab.host
                    .check(&["ndctl", "enable-namespace", &namespace])
                    .map(drop)?;
            }
            Self::DestroyNamespace => {
                let (region, align) = (format!("region{region}"), device.align_bytes.to_string());
                let argv = [
                    "ndctl",
                    "create-namespace",
                    "-f",
                    "-m",
                    "devdax",
                    "-r",
                    &region,
                    "-M",
                    "mem",
                    "-a",
                    &align,
                ];
                lab.host.check(&argv).map(drop)?;
            }
            Self::DisableRegion => {
                let region = format!("region{region}");
                lab.host
                    .check(&["ndctl", "enable-region", &region])
                    .map(drop)?;
            }
            // It takes every device of the host with it: no story lets it pass.
            Self::UnbindBus => {}
        }
        eventually("the device is usable again", || device.is_usable(lab))
    }
}

/// Leaves new memory offline for as long as `story` takes: onlined memory may never be given back.
pub(in crate::tests) fn with_memory_offline(
    lab: &Lab,
    story: impl FnOnce() -> Result<(), TestError>,
) -> Result<(), TestError> {
    let policy = "/sys/devices/system/memory/auto_online_blocks";
    let before = lab.host.read_text(policy)?;
    lab.host.write_file(policy, b"offline")?;
    let outcome = story();
    lab.host.write_file(policy, before.as_bytes())?;
    outcome
}

/// Gives a device without a driver to `device_dax`.
pub(in crate::tests) fn bind(lab: &Lab, device: &Device) -> Result<(), TestError> {
    let script = format!(
        "echo {} > /sys/bus/dax/drivers/device_dax/bind",
        device.name
    );
    lab.host.sh(&script)?;
    Ok(())
}

pub(in crate::tests) fn shell(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(str::to_owned).to_vec()
}

pub(in crate::tests) fn spawn(lab: &Lab, argv: Vec<String>) -> Result<Process, TestError> {
    Ok(lab.host.spawn(SpawnSpec {
        argv,
        ..SpawnSpec::default()
    })?)
}

/// The daemon.
pub(in crate::tests) struct Daemon {
    process: Process,
}

impl Daemon {
    pub(in crate::tests) fn start(lab: &Lab) -> Result<Self, TestError> {
        Self::with(lab, &[])
    }

    pub(in crate::tests) fn with(lab: &Lab, words: &[&str]) -> Result<Self, TestError> {
        Self::at(lab, &Self::socket(), words)
    }

    /// One that listens at a socket.
    pub(in crate::tests) fn at(lab: &Lab, socket: &str, words: &[&str]) -> Result<Self, TestError> {
        let argv = ["daxhund-guardd", "--socket", socket];
        let argv = argv
            .iter()
            .chain(words)
            .map(|word| (*word).to_owned())
            .collect();
        let process = spawn(lab, argv)?;
        lab.host
            .check(&["lab-agent", "await-socket", socket, "30"])?;
        Ok(Self { process })
    }

    pub(in crate::tests) fn socket() -> String {
        format!("{SCRATCH}/guard.sock")
    }

    /// Its log has a line with this text.
    pub(in crate::tests) fn says(&self, text: &str) -> Result<String, TestError> {
        Ok(self.process.wait_for_error(text, SOON)?)
    }

    pub(in crate::tests) fn signal(&self, signal: i32) -> Result<(), TestError> {
        Ok(self.process.signal(signal)?)
    }

    pub(in crate::tests) fn wait(&self) -> Result<ExitStatus, TestError> {
        Ok(self.process.wait(SOON)?)
    }

    /// Ends it; it has nothing to complain about.
    pub(in crate::tests) fn end(self) -> Result<(), TestError> {
        self.signal(SIGTERM)?;
        let status = self.wait()?;
        claim(status.success(), || {
            format!("the guard ended with {status}: {}", self.process.stderr())
        })
    }
}

/// A program that holds a device.
pub(in crate::tests) struct Holder {
    process: Process,
    device: String,
}

impl Holder {
    pub(in crate::tests) fn start(lab: &Lab, device: &Device) -> Result<Self, TestError> {
        Self::at(lab, device, &Daemon::socket(), PATIENT_MS)
    }

    /// One that uses the daemon at a socket, or a `helper`.
    pub(in crate::tests) fn at(
        lab: &Lab,
        device: &Device,
        place: &str,
        answer_ms: u64,
    ) -> Result<Self, TestError> {
        Self::of(lab, device, place, answer_ms, None)
    }

    pub(in crate::tests) fn of(
        lab: &Lab,
        device: &Device,
        place: &str,
        answer_ms: u64,
        uid: Option<u32>,
    ) -> Result<Self, TestError> {
        let answer_ms = answer_ms.to_string();
        let argv = [
            "lab-agent",
            "guard-hold",
            place,
            "vm1",
            &device.name,
            &answer_ms,
        ];
        let process = lab.host.spawn(SpawnSpec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            stdin: true,
            uid,
            ..SpawnSpec::default()
        })?;
        let mut holder = Self {
            process,
            device: device.name.clone(),
        };
        let held = format!("held {}", holder.device);
        holder.says(&held)?;
        Ok(holder)
    }

    pub(in crate::tests) fn says(&mut self, text: &str) -> Result<String, TestError> {
        Ok(self.process.wait_for(text, SOON)?)
    }

    pub(in crate::tests) fn said(&self) -> String {
        self.process.stdout()
    }

    pub(in crate::tests) fn has_said(&self, text: &str) -> bool {
        self.process.stdout().contains(text)
    }

    /// It is asked for the device on behalf of a process. Gives what it says.
    pub(in crate::tests) fn is_asked(&mut self) -> Result<String, TestError> {
        let text = format!("wanted {}", self.device);
        self.says(&text)
    }

    pub(in crate::tests) fn tell(&self, line: &str) -> Result<(), TestError> {
        Ok(self.process.send(format!("{line}\n").as_bytes())?)
    }

    /// Tells it something that it confirms.
    pub(in crate::tests) fn told(
        &mut self,
        line: &str,
        confirmation: &str,
    ) -> Result<String, TestError> {
        self.tell(line)?;
        self.says(confirmation)
    }

    pub(in crate::tests) fn signal(&self, signal: i32) -> Result<(), TestError> {
        Ok(self.process.signal(signal)?)
    }

    pub(in crate::tests) fn wait(&self) -> Result<ExitStatus, TestError> {
        Ok(self.process.wait(SOON)?)
    }

    pub(in crate::tests) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it as a VMM ends.
    pub(in crate::tests) fn end(self) -> Result<(), TestError> {
        self.process.close_stdin()?;
        let status = self.process.wait(SOON)?;
        claim(status.success(), || {
            format!("the holder ended with {status}: {}", self.process.stderr())
        })
    }
}

/// The removal waits: it has not ended, and the device is what it was. (The holder has been asked by then.)
pub(in crate::tests) fn still_waits(
    lab: &Lab,
    removal: &Process,
    device: &Device,
) -> Result<(), TestError> {
    let usable = device.is_usable(lab)?;
    claim(usable && !removal.has_ended(), || {
        format!("`{}` should wait: {}", removal.command(), removal.stderr())
    })
}

/// The removal has ended well and the device is nobody's.
pub(in crate::tests) fn has_passed(
    lab: &Lab,
    removal: Process,
    device: &Device,
) -> Result<(), TestError> {
    let command = removal.command().to_owned();
    let output = removal.finish(SOON)?;
    claim(output.status.success(), || {
        format!(
            "`{command}` ended with {}: {}",
            output.status, output.stderr
        )
    })?;
    let usable = device.is_usable(lab)?;
    claim(!usable, || {
        format!("`{command}` has passed, and {} is bound still", device.name)
    })
}

/// The removal was refused by the kernel in the guard's name, and the device is what it was. The tool's own word is of
/// little use: ndctl says "disabled 1 namespace" and ends with 0 when its `open` got EPERM, daxctl says "busy".
pub(in crate::tests) fn was_refused(
    lab: &Lab,
    removal: Process,
    device: &Device,
) -> Result<Output, TestError> {
    let command = removal.command().to_owned();
    let output = removal.finish(SOON)?;
    let says_so = if command.starts_with("ndctl ") {
        true
    } else if command.starts_with("daxctl ") {
        !output.status.success()
    } else {
        output.stderr.contains("not permitted") && !output.status.success()
    };
    claim(says_so, || {
        format!(
            "`{command}` should be refused, it ended with {}: {}{}",
            output.status, output.stdout, output.stderr
        )
    })?;
    let usable = device.is_usable(lab)?;
    claim(usable, || {
        format!("`{command}` was refused, and {} is gone", device.name)
    })?;
    Ok(output)
}
