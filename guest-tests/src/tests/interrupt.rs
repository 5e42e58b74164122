//! `^C` ends the lab, whenever it comes: no QEMU stays behind, nor a file.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

use super::support::eventually;
use super::{GuestTest, Lab, TestError, claim};
use crate::provision::QEMU;
use crate::wait::PATIENCE;

/// What a killed QEMU may take to give back a host's memory.
const QEMU_ENDS: Duration = PATIENCE;
/// A shell's status after the signal that `^C` sends.
const INTERRUPTED: i32 = 130;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "interrupted_lab_leaves_no_qemu_behind",
        run: |lab| leaves_nothing(lab, Aim::Terminal),
    },
    GuestTest {
        name: "interrupted_lab_ends_qemu_that_was_not_told",
        run: |lab| leaves_nothing(lab, Aim::LabOnly),
    },
];

/// Who gets the signal.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Aim {
    /// Everything that runs at the terminal, as `^C` does it.
    Terminal,
    /// The lab's own process.
    LabOnly,
}

/// A lab of its own, started as from a terminal. It does not outlive the test.
struct OtherLab(Child);

impl Drop for OtherLab {
    fn drop(&mut self) {
        // Both fail where it has ended, which is as it should be.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn leaves_nothing(lab: &mut Lab, aim: Aim) -> Result<(), TestError> {
    let log = lab.setup.file(&lab.kernel, "interrupted");
    let failed = |what: &str, error: io::Error| TestError::Claim(format!("{what}: {error}"));
    let mut other = start(lab, &log).map_err(|error| failed("another lab", error))?;
    let pid = Pid::from_child(&other.0);
    let said = || fs::read_to_string(&log).unwrap_or_default();

    let mut qemu = None;
    eventually("the other lab has started QEMU", || {
        let ended = other
            .0
            .try_wait()
            .map_err(|error| failed("another lab", error))?;
        claim(ended.is_none(), || format!("it has ended: {}", said()))?;
        qemu = descendants(pid).into_iter().find(|pid| is_qemu(*pid));
        Ok(qemu.is_some())
    })?;
    let Some(qemu) = qemu else {
        return Err(TestError::Claim("no QEMU".to_owned()));
    };
    let ended =
        pidfd_open(qemu, PidfdFlags::empty()).map_err(|error| failed("QEMU", error.into()))?;
    let files = run_directory(lab, pid);
    claim(files.is_dir(), || format!("no {}", files.display()))?;

    match aim {
        Aim::Terminal => kill_process_group(pid, Signal::INT),
        Aim::LabOnly => kill_process(pid, Signal::INT),
    }
    .map_err(|error| failed("the signal", error.into()))?;
    let status = other.0.wait().map_err(|error| failed("the lab", error))?;
    claim(status.code() == Some(INTERRUPTED), || {
        let signal = status.signal();
        format!("the lab ended with {status}, signal {signal:?}: {}", said())
    })?;
    claim(
        await_end(&ended).map_err(|error| failed("QEMU", error))?,
        || format!("QEMU, process {qemu:?}, goes on without the lab"),
    )?;
    claim(!files.exists(), || format!("{} is left", files.display()))?;
    fs::remove_file(&log).map_err(|error| failed("its log", error))
}

/// `cargo lab shell`, in a process group of its own as a shell with job control makes it.
fn start(lab: &Lab, log: &Path) -> io::Result<OtherLab> {
    let output = File::create(log)?;
    let child = Command::new(std::env::current_exe()?)
        .args(["shell", "--host-kernel", &lab.kernel.name])
        .current_dir(&lab.setup.workspace.root)
        .stdin(Stdio::piped())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()?;
    Ok(OtherLab(child))
}

/// Where a lab keeps what goes with it.
fn run_directory(lab: &Lab, pid: Pid) -> PathBuf {
    let target = &lab.setup.workspace.target;
    target.join("lab").join(format!("run-{pid}"))
}

/// The processes that this one has started, and those that they have.
fn descendants(pid: Pid) -> Vec<Pid> {
    let processes: Vec<(Pid, Pid)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            // Processes come and go meanwhile.
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
            Some((
                Pid::from_raw(pid)?,
                Pid::from_raw(parent.trim().parse().ok()?)?,
            ))
        })
        .collect();
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        let children = processes.iter().filter(|(_, of)| *of == parent);
        found.extend(children.map(|(pid, _)| *pid));
        next += 1;
    }
    found
}

fn is_qemu(pid: Pid) -> bool {
    let program = fs::read_link(format!("/proc/{pid}/exe"));
    program.is_ok_and(|path| path.file_name().is_some_and(|name| name == QEMU))
}

/// Whether the process ends in time.
fn await_end(process: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    let deadline = Timespec {
        tv_sec: QEMU_ENDS.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    Ok(poll(&mut fds, Some(&deadline))? == 1)
}
