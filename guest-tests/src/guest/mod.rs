//! A guest on the emulated host: starts the VMM, waits for the guest's agent, asks it questions.
//!
//! The VMM's standard output is the guest's console, its standard error the VMM's own words. Every wait is bounded;
//! dropping a guest kills its VMM.

mod devices;
mod load;
pub mod network;

use std::time::Duration;

use lab_agent::guest_protocol::{
    ANSWER_MARK, Answer, ExecReport, LogRecord, MemInfo, NumaNode, Outcome, PatternReport,
    PhysicalReport, READY_MARK,
};
use lab_agent::host_protocol::{ExitStatus, SpawnSpec};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::host::Host;
use crate::host::channel::HostError;
use crate::host::process::Process;
use crate::share::{ImageForm, Initramfs, initramfs_path, kernel_path};
use crate::wait::PATIENCE;
pub use load::load_disk;

/// From the VMM's start to the guest's first word; usually 5 to 15 s.
pub const READY_DEADLINE: Duration = Duration::from_mins(5);
/// A question that needs no work.
const ASK_DEADLINE: Duration = PATIENCE;
/// From a command to power off, or the like, to the end of the VMM.
pub const LEAVE_DEADLINE: Duration = PATIENCE;
/// Bytes of memory that a guest fills and reads back in a second, with both levels emulated, at the very least.
const PATTERN_BYTES_PER_SECOND: u64 = 4 << 20;
/// A panic is a reboot, so that it is noticed.
const CMDLINE: &str = "console=ttyS0 panic=-1";
/// Without what takes a third of an emulated start and is the same on any machine: the kernel's tests of its ciphers, and the
/// checks of the signatures on its own certificates.
const QUICK: &str = " quiet cryptomgr.notests initcall_blacklist=load_system_certificate_list";

/// A guest that does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The host, or the VMM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The guest's agent says no.
    #[error("the guest refuses `{command}`: {message}")]
    Refused {
        /// The question.
        command: String,
        /// Its reason.
        message: String,
    },
    /// The answer cannot be read.
    #[error("the guest's answer to `{command}` cannot be read: {line}")]
    Garbled {
        /// The question.
        command: String,
        /// What came.
        line: String,
        /// Why it cannot be read.
        source: serde_json::Error,
    },
    /// A script in the guest has failed.
    #[error("`{script}` failed in the guest with status {status:?}: {said}")]
    Script {
        /// The script.
        script: String,
        /// Its status, or none when a signal ended it.
        status: Option<i32>,
        /// What it said and printed.
        said: String,
    },
    /// An answer to something else.
    #[error("the guest answers question {found} instead of {expected}, `{command}`")]
    OutOfOrder {
        /// The question.
        command: String,
        /// Its number.
        expected: u64,
        /// The answer's.
        found: u64,
    },
}

/// How a guest is started.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Release of its kernel: one that the share has.
    pub kernel_release: String,
    /// Form of its kernel.
    pub form: ImageForm,
    /// What its initramfs holds.
    pub initramfs: Initramfs,
    /// Added to the command line.
    pub cmdline: String,
    /// Whether the kernel tells all and does all. Every character on the console is an exit to the VMM, so it takes time.
    pub verbose: bool,
    /// The VMM's arguments beside kernel, initramfs, command line and serial port.
    pub arguments: Vec<String>,
    /// Variables for the VMM.
    pub env: Vec<(String, String)>,
    /// User to run the VMM as.
    pub uid: Option<u32>,
}

impl GuestSpec {
    /// A guest with the ELF image of `kernel_release` and these arguments.
    pub fn new(kernel_release: &str, arguments: &[&str]) -> Self {
        Self {
            kernel_release: kernel_release.to_owned(),
            form: ImageForm::Elf,
            initramfs: Initramfs::Plain,
            cmdline: String::new(),
            verbose: false,
            arguments: arguments.iter().map(|word| (*word).to_owned()).collect(),
            env: Vec::new(),
            uid: None,
        }
    }

    /// The whole kernel command line.
    pub fn whole_cmdline(&self) -> String {
        let quick = if self.verbose { "" } else { QUICK };
        format!("{CMDLINE}{quick} {}", self.cmdline)
            .trim_end()
            .to_owned()
    }

    /// The VMM's command line.
    pub fn argv(&self) -> Vec<String> {
        let kernel = kernel_path(&self.kernel_release, self.form);
        let initramfs = initramfs_path(&self.kernel_release, self.initramfs);
        let cmdline = self.whole_cmdline();
        let fixed = [
            "daxhund",
            "--kernel",
            &kernel,
            "--initramfs",
            &initramfs,
            "--cmdline",
            &cmdline,
            "--serial",
            "tty",
        ];
        fixed
            .iter()
            .map(|word| (*word).to_owned())
            .chain(self.arguments.iter().cloned())
            .collect()
    }
}

/// A guest and the VMM that runs it.
#[derive(Debug)]
pub struct Guest {
    vmm: Process,
    asked: u64,
}

impl Guest {
    /// Starts daxhund; the guest may not be up yet.
    pub fn launch(host: &Host, spec: &GuestSpec) -> Result<Self, GuestError> {
        let (argv, env) = (spec.argv(), spec.env.clone());
        Self::start(
            host,
            SpawnSpec {
                argv,
                env,
                uid: spec.uid,
                stdin: true,
                ..SpawnSpec::default()
            },
        )
    }

    /// Starts any VMM whose standard input and output are the guest's serial console.
    pub fn start(host: &Host, spec: SpawnSpec) -> Result<Self, GuestError> {
        Ok(Self {
            vmm: host.spawn(spec)?,
            asked: 0,
        })
    }

    /// Starts daxhund and waits for the guest.
    pub fn boot(host: &Host, spec: &GuestSpec) -> Result<Self, GuestError> {
        let mut guest = Self::launch(host, spec)?;
        guest.wait_ready()?;
        Ok(guest)
    }

    /// The VMM's process.
    pub fn vmm(&mut self) -> &mut Process {
        &mut self.vmm
    }

    /// Waits until the guest's user space is up; gives the guest's uptime in seconds. After a reboot, waits for the next time.
    pub fn wait_ready(&mut self) -> Result<f64, GuestError> {
        let line = self.vmm.wait_for(READY_MARK, READY_DEADLINE)?;
        let uptime = line
            .split_whitespace()
            .last()
            .and_then(|word| word.parse().ok());
        Ok(uptime.unwrap_or_default())
    }

    /// All that the guest has printed.
    pub fn console(&self) -> String {
        self.vmm.stdout()
    }

    /// Asks the guest's agent; see the agent's `help`.
    pub fn ask(&mut self, command: &str) -> Result<Value, GuestError> {
        self.ask_within(command, ASK_DEADLINE)
    }

    /// As [`Guest::ask`], with another deadline.
    pub fn ask_within(&mut self, command: &str, deadline: Duration) -> Result<Value, GuestError> {
        self.tell(command)?;
        let line = self.vmm.wait_for(ANSWER_MARK, deadline)?;
        let command = || command.to_owned();
        // A kernel message without an end of line may stand before it.
        let json = line
            .split_once(ANSWER_MARK)
            .map_or(line.as_str(), |(_, json)| json);
        // Another one may follow it, before the agent has ended its line.
        let mut values = serde_json::Deserializer::from_str(json);
        let answer = Answer::deserialize(&mut values).map_err(|source| GuestError::Garbled {
            command: command(),
            line: line.clone(),
            source,
        })?;
        if answer.id != self.asked {
            let (expected, found) = (self.asked, answer.id);
            return Err(GuestError::OutOfOrder {
                command: command(),
                expected,
                found,
            });
        }
        match answer.outcome {
            Outcome::Ok(value) => Ok(value),
            Outcome::Err(message) => Err(GuestError::Refused {
                command: command(),
                message,
            }),
        }
    }

    /// Gives a command that the guest does not survive.
    fn tell(&mut self, command: &str) -> Result<(), GuestError> {
        self.asked += 1;
        Ok(self
            .vmm
            .send(format!("#{} {command}\n", self.asked).as_bytes())?)
    }

    fn ask_for<T: DeserializeOwned>(
        &mut self,
        command: &str,
        deadline: Duration,
    ) -> Result<T, GuestError> {
        let value = self.ask_within(command, deadline)?;
        let line = value.to_string();
        serde_json::from_value(value).map_err(|source| GuestError::Garbled {
            command: command.to_owned(),
            line,
            source,
        })
    }

    /// The guest's memory.
    pub fn meminfo(&mut self) -> Result<MemInfo, GuestError> {
        self.ask_for("meminfo", ASK_DEADLINE)
    }

    /// How many processors are online.
    pub fn online_cpus(&mut self) -> Result<u64, GuestError> {
        Ok(self.ask("cpus")?["online"].as_u64().unwrap_or_default())
    }

    /// A text file of the guest.
    pub fn cat(&mut self, path: &str) -> Result<String, GuestError> {
        self.ask_for(&format!("cat {path}"), ASK_DEADLINE)
    }

    /// What the guest's kernel has complained about: warnings and worse.
    pub fn problems(&mut self) -> Result<Vec<LogRecord>, GuestError> {
        self.ask_for("dmesg", ASK_DEADLINE)
    }

    /// The guest's map of physical addresses.
    pub fn iomem(&mut self) -> Result<String, GuestError> {
        self.ask_for("iomem", ASK_DEADLINE)
    }

    /// The guest's real-time clock, in seconds since 1970.
    pub fn rtc(&mut self) -> Result<u64, GuestError> {
        Ok(self.ask("rtc")?["since_epoch"].as_u64().unwrap_or_default())
    }

    /// The guest's NUMA nodes.
    pub fn numa(&mut self) -> Result<Vec<NumaNode>, GuestError> {
        self.ask_for("numa", ASK_DEADLINE)
    }

    /// Fills `bytes` of the guest's memory, all that is free when not given, with patterns and reads them back.
    pub fn pattern(&mut self, bytes: Option<u64>) -> Result<PatternReport, GuestError> {
        let amount = match bytes {
            Some(bytes) => bytes,
            None => self.meminfo()?.available_bytes,
        };
        let deadline = ASK_DEADLINE + Duration::from_secs(amount / PATTERN_BYTES_PER_SECOND);
        let word = bytes.map_or("all".to_owned(), |bytes| bytes.to_string());
        self.ask_for(&format!("pattern {word}"), deadline)
    }

    /// Writes the seed's pattern to physical memory that the command line keeps from the kernel (`memmap=SIZE$ADDRESS`).
    pub fn write_physical(
        &mut self,
        address: u64,
        bytes: u64,
        seed: u64,
    ) -> Result<(), GuestError> {
        self.ask(&format!("physwrite {address:#x} {bytes} {seed}"))
            .map(|_| ())
    }

    /// Compares physical memory with the seed's pattern.
    pub fn read_physical(
        &mut self,
        address: u64,
        bytes: u64,
        seed: u64,
    ) -> Result<PhysicalReport, GuestError> {
        self.ask_for(
            &format!("physread {address:#x} {bytes} {seed}"),
            ASK_DEADLINE,
        )
    }

    /// Runs one of busybox's programs in the guest.
    pub fn exec(&mut self, words: &str) -> Result<ExecReport, GuestError> {
        self.ask_for(&format!("exec {words}"), ASK_DEADLINE)
    }

    /// Tells the guest to leave by `poweroff`, `reboot`, `halt`, `triple-fault` or `panic`, and does not wait.
    pub fn leave(&mut self, how: &str) -> Result<(), GuestError> {
        self.tell(how)
    }

    /// Powers the guest off and waits for the VMM.
    pub fn power_off(mut self) -> Result<ExitStatus, GuestError> {
        self.tell("poweroff")?;
        Ok(self.vmm.wait(LEAVE_DEADLINE)?)
    }

    /// Waits for the VMM's end.
    pub fn wait_end(&self) -> Result<ExitStatus, GuestError> {
        Ok(self.vmm.wait(LEAVE_DEADLINE)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_one_argument() {
        let mut spec = GuestSpec::new("6.1.0-9-amd64", &["--cpus", "boot=2"]);
        spec.cmdline = "memtest=1".to_owned();
        let argv = spec.argv();
        assert_eq!(argv[2], "/lab/kernels/6.1.0-9-amd64/vmlinux");
        assert!(argv.contains(&format!("console=ttyS0 panic=-1{QUICK} memtest=1")));
        assert_eq!(argv[argv.len() - 2..], ["--cpus", "boot=2"]);
    }
}
