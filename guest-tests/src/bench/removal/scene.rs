//! A guest whose drive writes into memory that the host takes away, on a host whose memory modules are files.
//!
//! ```text
//!   the lab:   watcher ── reads ──▶ file of module 0     file of module 1        file of module 2
//!                                     │ dax0.0: RAM         │ dax1.0: RAM or pmem    │ dax2.0: marks
//!   host:                             │ of the guest        │ goes away              │ `lab-agent take`
//!   guest:                          heartbeat            targets ◀── DMA ── drive
//! ```

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lab_agent::host_protocol::{ExitStatus, SpawnSpec};
use lab_agent::removal_protocol::{Step, Taken};

use super::log;
use super::watcher::{Place, Seen, WatchError, Watched, Watcher};
use crate::bench::boot::MeasureError;
use crate::guest::{Guest, GuestError, GuestSpec};
use crate::host::Host;
use crate::host::channel::HostError;
use crate::host::machine::{Contents, Dimm, Machine, PageArray};
use crate::host::process::{Process, SIGKILL};
use crate::setup::{Setup, StartError};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The guest's RAM, and its persistent memory: what is taken away.
pub const BYTES: u64 = 512 * MIB;
/// A page of the guest's RAM that its kernel leaves alone.
const HEART: u64 = 256 * MIB;
const TARGETS: usize = 4;
/// Of the drive: blocks that differ from each other.
const DRIVE_BYTES: u64 = MIB;
const DRIVE: &str = "/dev/nvme0n1";
/// The persistent memory in the guest.
pub const PMEM: &str = "/dev/pmem0";
/// What the loop calls a target that is no file.
const ANONYMOUS: &str = "anonymous";
/// First word of a target before the drive writes it; a target's number is added.
const MARK: u64 = 0x6461_7868_0000_0000;
const GO: &str = "/tmp/go";
const LOOP_LOG: &str = "/tmp/dma-loop";
/// How long the drive writes undisturbed, and how long it is watched after all is over: many transfers each.
const BEFORE: Duration = Duration::from_millis(700);
const AFTER: Duration = Duration::from_millis(1500);
/// From the removal's start to its end: longer than the guard and a guest take.
const TAKE_DEADLINE: Duration = Duration::from_mins(2);
const MARKED_DEADLINE: Duration = Duration::from_mins(1);
const ALIVE_DEADLINE: Duration = Duration::from_secs(15);
/// From the loss of a guest's RAM to the end of its VMM.
const END_DEADLINE: Duration = Duration::from_secs(15);
/// The guest's kernel has zeroed all it needs when the file system is made. Otherwise it goes on in the background for some
/// megabytes, and every store where memory was is an exit: emulated, that kept a guest from answering for half a minute.
pub const NO_LATE_ZEROS: &str = "lazy_itable_init=0,lazy_journal_init=0";

/// What of the guest is on the memory that goes away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Persistent memory; RAM is elsewhere.
    Pmem,
    /// All of its RAM.
    Ram,
}

/// The host, and where its memory is in files.
#[derive(Debug)]
pub struct Scene {
    /// The host.
    pub host: Host,
    /// Starts of the DAX devices' memory.
    memory: Vec<Place>,
    files: Vec<PathBuf>,
    removals: u64,
}

/// A guest whose drive writes.
#[derive(Debug)]
pub struct Busy {
    /// The guest.
    pub guest: Guest,
    watched: Watched,
}

/// A removal that is over.
#[derive(Debug)]
pub struct Removal {
    /// What the remover tells.
    pub taken: Taken,
    /// What was seen.
    pub seen: Seen,
    /// How the VMM has ended, if it has.
    pub ended: Option<ExitStatus>,
    /// Whether the guest answers.
    pub alive: bool,
    /// Whether anything at all changed in the memory that was taken away, from the removal's end to the end of the watch.
    pub changed_after: bool,
    /// What the VMM says.
    pub said: String,
    /// What the guest has printed.
    pub console: String,
    /// When the kernel began to take the page array down, after the removal's start.
    pub teardown: Option<Duration>,
}

impl Scene {
    /// Boots a host whose modules are files called after `name`.
    pub fn boot(
        setup: &Setup,
        kernel: &crate::provision::kernel::Kernel,
        name: &str,
    ) -> Result<Self, SceneError> {
        let files: Vec<PathBuf> = (0..3)
            .map(|module| setup.file(kernel, &format!("{name}-nvdimm{module}")))
            .collect();
        let dimm = |(path, size_bytes): (&PathBuf, u64)| Dimm {
            size_bytes,
            align_bytes: 2 * MIB,
            page_array: PageArray::Memory,
            contents: Contents::New(path.clone()),
        };
        let sizes = [GIB, GIB, GIB / 2];
        let machine = Machine {
            memory_bytes: 2 * GIB,
            dimms: files.iter().zip(sizes).map(dimm).collect(),
            ..Machine::default()
        };
        let host = setup.boot_beside(kernel, machine, name)?;
        let mut scene = Self {
            host,
            memory: Vec::new(),
            files,
            removals: 0,
        };
        scene.memory = scene.places()?;
        log::trace_teardown(&scene.host)?;
        Ok(scene)
    }

    /// A device starts in its module's file where it starts in its region.
    fn places(&self) -> Result<Vec<Place>, MeasureError> {
        let place = |(device, path): (&crate::host::DaxDevice, &PathBuf)| {
            let number = device.name.trim_start_matches("dax");
            let region = number.split('.').next().unwrap_or_default();
            let [of_device, of_region] = [
                format!("/sys/bus/dax/devices/{}/resource", device.name),
                format!("/sys/bus/nd/devices/region{region}/resource"),
            ]
            .map(|path| self.address(&path));
            let offset = of_device? - of_region?;
            let file = File::open(path).map_err(WatchError::from)?;
            let file = Arc::new(file);
            Ok(Place { file, offset })
        };
        self.host.dax().iter().zip(&self.files).map(place).collect()
    }

    fn address(&self, path: &str) -> Result<u64, HostError> {
        let text = self.host.read_text(path)?;
        let digits = text.trim_start_matches("0x");
        u64::from_str_radix(digits, 16).map_err(|_| HostError::Unexpected {
            what: format!("reading {path}"),
            event: text.clone(),
        })
    }

    /// The device that goes away.
    pub fn victim(&self) -> &str {
        &self.host.dax()[1].name
    }

    fn marks(&self) -> &str {
        &self.host.dax()[2].path
    }

    /// Zone on the device of this kind's RAM.
    pub fn zone(&self, kind: Kind) -> String {
        let device = match kind {
            Kind::Pmem => 0,
            Kind::Ram => 1,
        };
        let path = &self.host.dax()[device].path;
        format!("id=z0,size={BYTES},file={path}")
    }

    /// What the guest's kernel is told beside the usual.
    pub fn cmdline() -> String {
        format!("memmap=4K${HEART:#x}")
    }

    /// Boots a guest of daxhund's.
    pub fn boot_guest(&self, spec: &GuestSpec) -> Result<Guest, MeasureError> {
        Ok(Guest::boot(&self.host, spec)?)
    }

    /// Has the drive of a guest that is up write into its memory.
    pub fn set_busy(&mut self, mut guest: Guest, kind: Kind) -> Result<Busy, MeasureError> {
        let targets: Vec<String> = match kind {
            Kind::Ram => vec![ANONYMOUS.to_owned(); TARGETS],
            Kind::Pmem => {
                guest.modprobe_pmem()?;
                guest.await_path(PMEM)?;
                guest.sh(&format!(
                    "mkdir -p /mnt && mkfs.ext4 -q -F -b 4096 -E {NO_LATE_ZEROS} {PMEM} && \
                     mount -t ext4 -o dax {PMEM} /mnt"
                ))?;
                let files = (0..TARGETS).map(|target| format!("/mnt/{target}"));
                let files: Vec<String> = files.collect();
                guest.sh(&format!(
                    "for f in {}; do dd if=/dev/zero of=$f bs=4096 count=1; done 2>/dev/null; sync",
                    files.join(" ")
                ))?;
                files
            }
        };
        let mark = self.mark_targets(&mut guest, &targets)?;
        let ram = match kind {
            Kind::Pmem => 0,
            Kind::Ram => 1,
        };
        let targets = self.memory[1].marked(BYTES, mark, TARGETS)?;
        let watched = Watched {
            marks: self.memory[2].clone(),
            // The guest's RAM starts where its device starts.
            heart: self.memory[ram].at(HEART),
            targets,
        };
        guest.sh(&format!("touch {GO}"))?;
        Ok(Busy { guest, watched })
    }

    /// Has the drive of a guest that is up write into its RAM, where nobody watches.
    pub fn set_drive_busy(&mut self, guest: &mut Guest) -> Result<(), MeasureError> {
        self.mark_targets(guest, &[ANONYMOUS.to_owned()])?;
        guest.sh(&format!("touch {GO}"))?;
        Ok(())
    }

    /// Starts the loop, which waits for the word to go; gives the first target's mark.
    fn mark_targets(&mut self, guest: &mut Guest, targets: &[String]) -> Result<u64, MeasureError> {
        self.removals += 1;
        let mark = MARK + (self.removals << 8);
        guest.modprobe(&["nvme"])?;
        guest.await_path(DRIVE)?;
        guest.fill_blocks(DRIVE, 0, DRIVE_BYTES, self.removals)?;
        guest.sh(&format!(
            "rm -f {GO}; : > {LOOP_LOG}; \
             (/init dma-loop {DRIVE} {HEART} {GO} {mark} {} > {LOOP_LOG} 2>&1) < /dev/null > /dev/null 2>&1 &",
            targets.join(" ")
        ))?;
        let end = Instant::now() + MARKED_DEADLINE;
        loop {
            let said = guest.cat(LOOP_LOG)?;
            if said.contains("marked") {
                return Ok(mark);
            }
            // It says nothing else unless it fails.
            if !said.is_empty() || Instant::now() > end {
                return Err(MeasureError::Guest(GuestError::Script {
                    script: "dma-loop".to_owned(),
                    status: None,
                    said,
                }));
            }
        }
    }

    /// Takes the memory from a VMM; waits until the removal is over and the VMM has let go.
    pub fn unbind(&self, guest: &mut Guest) -> Result<Taken, MeasureError> {
        log::clear_trace(&self.host)?;
        let pid = guest.vmm().pid().to_string();
        let argv = ["lab-agent", "take", self.victim(), &pid, self.marks()];
        let remover = self.host.spawn(SpawnSpec {
            argv: argv.map(str::to_owned).to_vec(),
            ..SpawnSpec::default()
        })?;
        finish(remover)
    }

    /// Takes the memory away and watches; gives the guest back.
    pub fn take(&self, busy: Busy) -> Result<(Removal, Guest), MeasureError> {
        let Busy { mut guest, watched } = busy;
        let watcher = Watcher::start(watched);
        std::thread::sleep(BEFORE);
        let taken = self.unbind(&mut guest)?;
        let before = self.memory[1].digest(BYTES)?;
        std::thread::sleep(AFTER);
        let changed_after = self.memory[1].digest(BYTES)? != before;
        let seen = watcher.finish()?;
        // One that has ended does not answer, and one whose RAM is gone is about to end.
        let alive = guest.ask_within("ping", ALIVE_DEADLINE).is_ok();
        let ended = match guest
            .vmm()
            .wait(if alive { Duration::ZERO } else { END_DEADLINE })
        {
            Ok(status) => Some(status),
            Err(HostError::Timeout { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let removal = Removal {
            teardown: log::teardown(&self.host, taken.asked_monotonic_ns)?,
            said: guest.vmm().stderr(),
            console: guest.console(),
            taken,
            seen,
            ended,
            alive,
            changed_after,
        };
        Ok((removal, guest))
    }

    /// Ends a guest in whatever state, and has the device back.
    pub fn restore(&self, mut guest: Guest) -> Result<(), MeasureError> {
        if !guest.vmm().has_ended() {
            guest.vmm().signal(SIGKILL)?;
            guest.wait_end()?;
        }
        drop(guest);
        self.bind()
    }

    /// Gives the device its driver back, if it has none.
    pub fn bind(&self) -> Result<(), MeasureError> {
        let name = self.victim();
        if !self
            .host
            .exists(&format!("/sys/bus/dax/devices/{name}/driver"))?
        {
            let bind = "/sys/bus/dax/drivers/device_dax/bind";
            self.host.sh(&format!("echo {name} > {bind}"))?;
        }
        Ok(())
    }

    /// Powers the host off, and removes its modules' files.
    pub fn end(self) {
        let Self { host, files, .. } = self;
        drop(host);
        for file in files {
            // One that is not there was not made; the run's directory goes in the end in any case.
            let _ = std::fs::remove_file(file);
        }
    }
}

impl Removal {
    /// The moment that everything is counted from.
    pub fn start(&self) -> Option<Instant> {
        self.seen.step(Step::Asked)
    }

    /// How many transfers changed memory after a step.
    pub fn writes_after(&self, step: Step) -> usize {
        let Some(from) = self.seen.step(step) else {
            return 0;
        };
        self.seen.writes.iter().filter(|at| **at > from).count()
    }

    /// How many came before the start.
    pub fn writes_before(&self) -> usize {
        self.seen.writes.len() - self.writes_after(Step::Asked)
    }
}

fn finish(remover: Process) -> Result<Taken, MeasureError> {
    let command = remover.command().to_owned();
    let output = remover.finish(TAKE_DEADLINE)?;
    serde_json::from_str(&output.stdout).map_err(|source| MeasureError::Garbled {
        command,
        text: output.stdout + &output.stderr,
        source,
    })
}

/// A host that could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SceneError {
    /// It did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It has not what is needed.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// It does not answer.
    #[error(transparent)]
    Host(#[from] HostError),
}
