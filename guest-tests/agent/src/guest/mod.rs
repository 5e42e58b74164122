//! The agent inside a guest: says that user space is up, then answers questions from the serial console.
//!
//! It needs nothing but the kernel's own file systems and a console. Questions come from the lab or from a person;
//! `help` lists the commands.

mod bandwidth;
mod block;
mod commands;
mod edu;
pub(crate) mod exposure;
mod hostile;
mod interrupts;
mod kernel_log;
mod modules;
pub(crate) mod page_map;
mod pattern;
mod pci;
pub(crate) mod persist;
mod reads;
mod vsock;

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use lab_agent::guest_protocol::{ANSWER_MARK, Answer, Outcome, READY_MARK, READY_PORT_BYTES};
use rustix::mount::{MountFlags, mount};
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

/// Brings the guest up and answers questions; returns why it cannot go on.
pub(crate) fn serve() -> String {
    match run() {
        Ok(()) => "the console was closed".to_owned(),
        Err(error) => format!("the console fails: {error}"),
    }
}

fn run() -> io::Result<()> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
    ] {
        // What is mounted already (a kernel may mount /dev by itself) is as good.
        match mount(kind, target, kind, MountFlags::empty(), None) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => eprintln!("lab-agent: cannot mount {kind}: {error}"),
        }
    }
    if let Err(error) = mark_port() {
        eprintln!("lab-agent: cannot write to I/O port 0x80: {error}");
    }
    silence_echo();
    // From here on only what is bad goes to the console, as with `quiet`: chatter in the middle of an answer would garble it.
    if let Err(error) = fs::write("/proc/sys/kernel/printk", "4") {
        eprintln!("lab-agent: cannot quiet the kernel: {error}");
    }
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let mut console = io::stdout();
    writeln!(
        console,
        "{READY_MARK} {}",
        uptime.split_whitespace().next().unwrap_or("0")
    )?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (id, words) = number_and_words(&line);
        if words.is_empty() {
            continue;
        }
        let outcome = match commands::run(&words) {
            Ok(value) => Outcome::Ok(value),
            Err(message) => Outcome::Err(message),
        };
        let answer = serde_json::to_string(&Answer { id, outcome })?;
        // One write, so that a kernel message comes before or after it.
        console.write_all(format!("{ANSWER_MARK}{answer}\n").as_bytes())?;
        console.flush()?;
    }
    Ok(())
}

/// Splits `#7 cat /proc/cmdline`; a person may leave the number out.
fn number_and_words(line: &str) -> (u64, Vec<&str>) {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let number = words
        .first()
        .and_then(|word| word.strip_prefix('#'))
        .and_then(|word| word.parse().ok());
    if number.is_some() {
        words.remove(0);
    }
    (number.unwrap_or(0), words)
}

/// Shows the host that user space runs: see [`READY_PORT_BYTES`].
fn mark_port() -> io::Result<()> {
    let path = Path::new("/dev/port");
    let port = OpenOptions::new().write(true).open(path)?;
    for byte in READY_PORT_BYTES {
        port.write_all_at(&[byte], 0x80)?;
    }
    Ok(())
}

/// Keeps the console from repeating every question. Without a terminal there is nothing to silence.
fn silence_echo() {
    let stdin = io::stdin();
    if let Ok(mut modes) = tcgetattr(&stdin) {
        modes.local_modes.remove(LocalModes::ECHO);
        if let Err(error) = tcsetattr(&stdin, OptionalActions::Now, &modes) {
            eprintln!("lab-agent: cannot silence the console: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_optional() {
        assert_eq!(number_and_words("#12 cat /x\r"), (12, vec!["cat", "/x"]));
        assert_eq!(number_and_words("ping"), (0, vec!["ping"]));
        assert_eq!(number_and_words("  "), (0, vec![]));
    }
}
