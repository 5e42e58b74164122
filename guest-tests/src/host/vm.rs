//! The QEMU process of an emulated host.
//!
//! QEMU gets its connections as inherited sockets, so it listens nowhere and leaves no socket file. A thread of its own
//! starts it and waits for it, because the kernel's promise to kill a child holds for as long as the thread that started it lives:
//! QEMU ends when it is asked to, when the value is dropped, and when the lab dies in whatever way.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::HostSpec;
use super::machine::Wiring;
use super::qmp::{Qmp, QmpError};
use crate::child;
use crate::provision::QEMU;

/// Lines of a log that explain a failure.
const TAIL_LINES: usize = 40;
/// From SIGKILL to the process's end; only a kernel in trouble takes longer.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// From QEMU closing its sockets to its end.
const HANG_UP_DEADLINE: Duration = Duration::from_secs(1);

/// QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It did not start.
    #[error("cannot start {QEMU}; `cargo lab provision` installs it")]
    Start(#[source] io::Error),
    /// No sockets or log file.
    #[error("cannot prepare {path}")]
    Prepare {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It started and ended.
    #[error("{QEMU} ended at once: {stderr}")]
    Ended {
        /// What it said.
        stderr: String,
        /// What its monitor said.
        source: QmpError,
    },
}

#[derive(Debug)]
pub(super) struct Vm {
    /// Names this process and no later one.
    process: OwnedFd,
    qmp: Qmp,
    /// Says how the process has ended, once.
    ended: Receiver<String>,
    console_log: PathBuf,
    qemu_log: PathBuf,
}

impl Vm {
    /// Starts QEMU; gives the socket to the host's agent.
    pub(super) fn start(spec: &HostSpec) -> Result<(Self, UnixStream), VmError> {
        let prepare = |path: &Path| {
            let path = path.to_owned();
            move |source| VmError::Prepare { path, source }
        };
        fs::create_dir_all(&spec.logs).map_err(prepare(&spec.logs))?;
        let console_log = spec.logs.join("console.log");
        let qemu_log = spec.logs.join("qemu.log");
        let log = File::create(&qemu_log).map_err(prepare(&qemu_log))?;
        for card in &spec.machine.cards {
            card.make_disk(&spec.logs).map_err(prepare(&spec.logs))?;
        }
        let (agent, agent_far) = UnixStream::pair().map_err(prepare(Path::new("a socket pair")))?;
        let (qmp, qmp_far) = UnixStream::pair().map_err(prepare(Path::new("a socket pair")))?;
        let wiring = Wiring {
            kernel: &spec.kernel.vmlinux,
            initramfs: &spec.initramfs,
            share: &spec.share,
            console_log: &console_log,
            disks: &spec.logs,
            agent_fd: agent_far.as_raw_fd(),
            qmp_fd: qmp_far.as_raw_fd(),
        };
        let arguments = spec.machine.arguments(&wiring);
        let (process, ended) =
            supervise(arguments, log, [agent_far, qmp_far]).map_err(VmError::Start)?;
        let qmp = match Qmp::open(qmp) {
            Ok(qmp) => qmp,
            Err(source) => {
                // It may also just be silent; there is nothing to be had from it any more.
                let _ = pidfd_send_signal(&process, Signal::KILL);
                let _ = ended.recv_timeout(KILL_DEADLINE);
                return Err(VmError::Ended {
                    stderr: tail(&qemu_log),
                    source,
                });
            }
        };
        Ok((
            Self {
                process,
                qmp,
                ended,
                console_log,
                qemu_log,
            },
            agent,
        ))
    }

    pub(super) fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    pub(super) fn console_tail(&self) -> String {
        tail(&self.console_log)
    }

    /// What QEMU said, and how it ended when it has.
    pub(super) fn qemu_tail(&self) -> String {
        let said = tail(&self.qemu_log);
        match self.ended.recv_timeout(HANG_UP_DEADLINE) {
            Ok(how) => format!("{said}\n{how}"),
            Err(_) => format!("{said}\n{QEMU} is running"),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended by itself, and then there is nobody to signal.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let _ = self.ended.recv_timeout(KILL_DEADLINE);
    }
}

/// Starts QEMU on a thread that stays until it ends.
fn supervise(
    arguments: Vec<OsString>,
    log: File,
    sockets: [UnixStream; 2],
) -> io::Result<(OwnedFd, Receiver<String>)> {
    let (started, start) = channel();
    let (ending, ended) = channel();
    thread::Builder::new()
        .name("qemu".to_owned())
        .spawn(move || {
            let spawned = spawn(arguments, log, &sockets);
            drop(sockets);
            match spawned {
                Ok(mut child) => {
                    let _ = started.send(descriptor_of(&child));
                    let how = match child.wait() {
                        Ok(status) => format!("{QEMU} has ended: {status}"),
                        Err(error) => format!("cannot wait for {QEMU}: {error}"),
                    };
                    // Whoever started it may not be interested any more.
                    let _ = ending.send(how);
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            }
        })?;
    Ok((start.recv().map_err(io::Error::other)??, ended))
}

fn descriptor_of(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("no process has this number"))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn spawn(arguments: Vec<OsString>, log: File, sockets: &[UnixStream]) -> io::Result<Child> {
    let mut command = Command::new(QEMU);
    // A process group of its own: ^C on the terminal is for the lab, which then ends QEMU.
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0);
    child::die_with_parent(
        &mut command,
        sockets.iter().map(AsRawFd::as_raw_fd).collect(),
    );
    command.spawn()
}

/// The last lines of a log, without what QEMU says about processor features that it does not emulate.
fn tail(path: &Path) -> String {
    let data = match fs::read(path) {
        Ok(data) => data,
        Err(error) => return format!("(cannot read {}: {error})", path.display()),
    };
    let text = String::from_utf8_lossy(&data);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.contains("TCG doesn't support"))
        .collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
