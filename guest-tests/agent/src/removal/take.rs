//! Takes a device-dax device away from a VMM, and marks each step in memory that the lab sees.
//!
//! The marks are in another device-dax device: its memory is a file of the lab's, so that the lab's clock is the one clock for
//! what happens here, in the guest, and in the memory that is taken away.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab_agent::removal_protocol::{Step, Taken};
use rustix::time::{ClockId, clock_gettime};

use super::DRIVER;
use crate::memory::Words;

/// How much of the marks' device is mapped: its alignment.
const MARKS_BYTES: usize = 2 << 20;
/// How often the user is looked at; a look takes a part of a millisecond of the emulated processor from him.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// For the user to let go, from before the removal: longer than a guard holds one.
const PATIENCE: Duration = Duration::from_secs(45);

struct Marks(Mutex<Words>);

impl Marks {
    fn set(&self, step: Step) -> u64 {
        let now = ns_of(ClockId::Realtime);
        if let Ok(mut words) = self.0.lock() {
            words.set(step.index(), now);
        }
        now
    }
}

/// Takes `name` (as in `dax1.0`) away while process `pid` uses it. A step is marked before the next one begins, but for the last one,
/// which is marked a moment after it is over.
pub(crate) fn take(name: &str, pid: u32, marks_path: &str) -> Result<Taken, String> {
    let mut words = Words::of_device(marks_path, MARKS_BYTES)?;
    for step in Step::ALL {
        words.set(step.index(), 0);
    }
    let marks = Marks(Mutex::new(words));
    let is_kept = AtomicBool::new(false);
    thread::scope(|scope| {
        let looker = scope.spawn(|| released(name, pid, &marks, &is_kept));
        let taken = unbind(name, &marks);
        let kept = taken.as_ref().map_or(true, |taken| taken.refused.is_some());
        is_kept.store(kept, Ordering::SeqCst);
        let released_ns = looker.join().map_err(|_| "the looker panicked")?;
        Ok(Taken {
            released_ns,
            ..taken?
        })
    })
}

/// By a shell, whose arguments tell a guard which device is meant. It says how far it is, and goes on when that is marked.
fn unbind(name: &str, marks: &Marks) -> Result<Taken, String> {
    let script = format!(
        "echo asked; read x; exec 3> {DRIVER}/unbind; echo opened; read x; echo {name} >&3 && echo returned"
    );
    let mut shell = Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start a shell: {error}"))?;
    let failed = |error: io::Error| format!("cannot talk to the shell: {error}");
    let mut go = shell.stdin.take().ok_or("the shell has no input")?;
    let said = shell.stdout.take().ok_or("the shell has no output")?;
    let mut taken = Taken {
        asked_ns: 0,
        asked_monotonic_ns: 0,
        opened_ns: None,
        returned_ns: 0,
        released_ns: None,
        refused: None,
    };
    for line in BufReader::new(said).lines() {
        match line.map_err(failed)?.as_str() {
            "asked" => {
                taken.asked_monotonic_ns = ns_of(ClockId::Monotonic);
                taken.asked_ns = marks.set(Step::Asked);
                go.write_all(b"\n").map_err(failed)?;
            }
            "opened" => {
                taken.opened_ns = Some(marks.set(Step::Opened));
                go.write_all(b"\n").map_err(failed)?;
            }
            _ => taken.returned_ns = marks.set(Step::Returned),
        }
    }
    let output = shell.wait_with_output().map_err(failed)?;
    if taken.returned_ns == 0 {
        taken.returned_ns = marks.set(Step::Returned);
        taken.refused = Some(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(taken)
}

/// When neither the process nor its children have the device any more, or none of them is there any more.
fn released(name: &str, pid: u32, marks: &Marks, is_kept: &AtomicBool) -> Option<u64> {
    let path = format!("/dev/{name}");
    let until = Instant::now() + PATIENCE;
    while is_user(pid, &path) {
        if is_kept.load(Ordering::SeqCst) || Instant::now() >= until {
            return None;
        }
        thread::sleep(LOOK_AGAIN);
    }
    Some(marks.set(Step::Released))
}

fn is_user(pid: u32, path: &str) -> bool {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let mut processes = children
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .chain([pid]);
    processes.any(|pid: u32| has_mapped(pid, path) || has_open(pid, path))
}

/// A device that is gone is still called what it was called, and that it is deleted.
fn has_mapped(pid: u32, path: &str) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"));
    maps.is_ok_and(|maps| maps.contains(path))
}

fn has_open(pid: u32, path: &str) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    files.into_iter().flatten().flatten().any(|file| {
        fs::read_link(file.path()).is_ok_and(|target| target.to_string_lossy().starts_with(path))
    })
}

fn ns_of(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let now = Duration::try_from(now).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_what_it_has_open() {
        let path = std::env::temp_dir().join(format!("lab-agent-take-{}", std::process::id()));
        let text = path.to_str().unwrap();
        let file = fs::File::create(&path).unwrap();
        assert!(is_user(std::process::id(), text));
        drop(file);
        fs::remove_file(&path).unwrap();
        assert!(!is_user(std::process::id(), text));
    }
}
