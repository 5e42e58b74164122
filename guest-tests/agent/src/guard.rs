//! A small holder of DAX memory, for stories of the removal guard: it does what a VMM does, on a test's word.
//!
//! `guard-hold WHERE NAME DEVICE MILLISECONDS`, where WHERE is the daemon's socket or `helper`. It has the device open and a
//! part of it locked, prints what the guard tells it, and takes these lines on standard input: `release`, `refuse WHY`, `always-refuse WHY`,
//! `let-go`, `lend PATH` (a process of its own keeps the descriptor until PATH exists), `reconnect`.
//! `guard-release SOCKET DEVICE` and `guard-list SOCKET` are what the VMM's command line will do.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use daxhund_dax::{Host, LockKind};
use daxhund_guard::{Guard, Helper, Notice, RequestId, Verdict, chain};
use rustix::event::{PollFd, PollFlags, poll};

/// What is locked of a device: a granule of every alignment.
const LOCKED_BYTES: u64 = 1 << 30;
/// The program that is a helper.
const GUARD: &str = "daxhund-guardd";

struct Holder {
    guard: Option<Guard>,
    place: String,
    name: String,
    device: String,
    answer_within: Duration,
    /// Open and locked, while the device is used.
    node: Option<File>,
    request: Option<RequestId>,
    /// What it says to everybody, without being told to.
    always: Option<String>,
}

/// Holds a device until its input ends.
pub(crate) fn hold(place: &str, name: &str, device: &str, milliseconds: u64) -> Result<(), String> {
    let path = PathBuf::from("/dev").join(device);
    let node = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Host::system()
        .lock_file(&node, &path, LockKind::Exclusive, Some(0..LOCKED_BYTES))
        .map_err(|error| error.to_string())?;
    let mut holder = Holder {
        guard: None,
        place: place.to_owned(),
        name: name.to_owned(),
        device: device.to_owned(),
        answer_within: Duration::from_millis(milliseconds),
        node: Some(node),
        request: None,
        always: None,
    };
    holder.connect()?;
    holder.serve()
}

impl Holder {
    fn connect(&mut self) -> Result<(), String> {
        let mut guard = if self.place == "helper" {
            let helper =
                Helper::spawn::<&str>(Path::new(GUARD), []).map_err(|error| chain(&error))?;
            println!("helper {}", helper.pid());
            Guard::of_helper(helper, &self.name)
        } else {
            Guard::connect(Path::new(&self.place), &self.name)
        }
        .map_err(|error| chain(&error))?;
        let node = self.node.as_ref().ok_or("the device is released")?;
        guard
            .hold(&self.device, node.as_fd(), self.answer_within)
            .map_err(|error| chain(&error))?;
        println!("held {}", self.device);
        self.guard = Some(guard);
        Ok(())
    }

    fn serve(&mut self) -> Result<(), String> {
        let mut line = Vec::new();
        loop {
            let input = io::stdin();
            let mut polled = vec![PollFd::new(&input, PollFlags::IN)];
            polled.extend(
                self.guard
                    .as_ref()
                    .map(|guard| PollFd::new(guard, PollFlags::IN)),
            );
            poll(&mut polled, None).map_err(|error| error.to_string())?;
            let [from_input, from_guard] =
                [0, 1].map(|index| polled.get(index).is_some_and(|it| !it.revents().is_empty()));
            if from_guard {
                self.listen()?;
            }
            if from_input {
                let mut byte = [0];
                match File::from(
                    input
                        .as_fd()
                        .try_clone_to_owned()
                        .map_err(|e| e.to_string())?,
                )
                .read(&mut byte)
                {
                    Ok(0) => return Ok(()),
                    Ok(_) if byte[0] == b'\n' => {
                        self.obey(&String::from_utf8_lossy(&line))?;
                        line.clear();
                    }
                    Ok(_) => line.push(byte[0]),
                    Err(error) => return Err(error.to_string()),
                }
            }
        }
    }

    fn listen(&mut self) -> Result<(), String> {
        let Some(guard) = &mut self.guard else {
            return Ok(());
        };
        match guard.read() {
            Ok(notices) => {
                for notice in notices {
                    match notice {
                        Notice::Wanted {
                            request,
                            device,
                            by,
                        } => {
                            println!(
                                "wanted {device} by {} pid {} file {}",
                                by.name, by.pid, by.file
                            );
                            self.request = Some(request);
                            if let Some(why) = self.always.clone() {
                                let verdict = Verdict::Refused { why };
                                guard
                                    .answer(request, verdict)
                                    .map_err(|error| chain(&error))?;
                            }
                        }
                        Notice::Withdrawn { .. } => {
                            println!("withdrawn");
                            self.request = None;
                        }
                    }
                }
            }
            Err(error) => {
                println!("lost: {error}");
                self.guard = None;
            }
        }
        Ok(())
    }

    fn obey(&mut self, line: &str) -> Result<(), String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if word == "reconnect" {
            return self.connect();
        }
        if word == "always-refuse" {
            self.always = Some(rest.to_owned());
            println!("stubborn");
            return Ok(());
        }
        if word == "lend" {
            return self.lend(rest);
        }
        let guard = self.guard.as_mut().ok_or("there is no guard")?;
        let verdict = match word {
            "let-go" => {
                self.node = None;
                guard.let_go(&self.device).map_err(|error| chain(&error))?;
                println!("gone");
                return Ok(());
            }
            "release" => {
                self.node = None;
                Verdict::Released
            }
            "refuse" => Verdict::Refused {
                why: rest.to_owned(),
            },
            _ => return Err(format!("not a command: {line}")),
        };
        let request = self.request.take().ok_or("nobody wants anything")?;
        guard
            .answer(request, verdict)
            .map_err(|error| chain(&error))?;
        println!("answered");
        Ok(())
    }

    /// Another process gets the open file, lock and all.
    fn lend(&mut self, until: &str) -> Result<(), String> {
        let node = self.node.as_ref().ok_or("the device is released")?;
        let node = node.try_clone().map_err(|error| error.to_string())?;
        let child = Command::new("/proc/self/exe")
            .args(["await", until, "120"])
            .stdin(Stdio::from(node))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        println!("lent to {}", child.id());
        Ok(())
    }
}

/// As `daxhund guard release`.
pub(crate) fn release(socket: &str, device: &str) -> Result<(), String> {
    daxhund_guard::release(Path::new(socket), device).map_err(|error| chain(&error))
}

/// As `daxhund guard list`.
pub(crate) fn list(socket: &str) -> Result<(), String> {
    let listing = daxhund_guard::list(Path::new(socket)).map_err(|error| chain(&error))?;
    let text = serde_json::to_string(&listing).map_err(|error| error.to_string())?;
    println!("{text}");
    Ok(())
}
