//! A daemon's process in a test, which is ended with it.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

/// For a thread that is about to end.
const SETTLED: Duration = Duration::from_secs(30);

/// A daemon that listens.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

/// A line of the daemon's.
#[derive(Debug)]
pub struct Said(String);

impl Said {
    /// It has this, too.
    pub fn and(self, more: &str) {
        assert!(self.0.contains(more), "{}", self.0);
    }
}

impl Daemon {
    /// Started, and listening.
    pub fn start(program: &str, words: &[&str]) -> Self {
        Self::spawn(Command::new(program).args(words))
    }

    /// The same of a command.
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let mut daemon = Self { child, stderr };
        daemon.says("listening");
        daemon
    }

    /// Waits for a line; that it never comes is seen when the daemon or the test's time ends.
    pub fn says(&mut self, what: &str) -> Said {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            let read = self.stderr.read_line(&mut line).unwrap();
            assert!(read > 0, "it has ended without `{what}`: {all}");
            if line.contains(what) {
                return Said(line);
            }
            all.push_str(&line);
        }
    }

    fn proc(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.child.id())
    }

    /// How many descriptors and threads it has, when no thread has the name `but`: one that nobody waits for.
    pub fn descriptors_and_threads(&self, but: Option<&str>) -> (usize, usize) {
        let end = Instant::now() + SETTLED;
        loop {
            let tasks = std::fs::read_dir(self.proc("task")).unwrap();
            let names: Vec<_> = tasks
                .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
                .collect();
            if names.iter().all(|name| Some(name.trim()) != but) {
                let descriptors = std::fs::read_dir(self.proc("fd")).unwrap();
                return (descriptors.count(), names.len());
            }
            assert!(Instant::now() < end, "still there: {names:?}");
            std::thread::yield_now();
        }
    }

    /// How many of its mappings are of this name.
    pub fn mappings_of(&self, name: &str) -> usize {
        let maps = std::fs::read_to_string(self.proc("maps")).unwrap();
        maps.lines().filter(|line| line.contains(name)).count()
    }

    /// SIGTERM, and the exit status of an orderly end.
    pub fn ends_well(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {said}");
        assert!(said.contains("ending by a signal"), "{said}");
    }

    /// SIGKILL.
    pub fn dies(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gone already, when the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a daemon says that ends by itself.
pub fn refuses(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    said
}

/// A counter of those that a daemon gives on its `--metrics-socket`, by its whole name.
pub fn counted(socket: &Path, name: &str) -> u64 {
    let mut text = String::new();
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.read_to_string(&mut text).unwrap();
    let name = format!("{name}_total ");
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap().parse().unwrap()
}

/// The names of the events in what `--event-monitor` has got.
pub fn told(events: &str) -> Vec<&str> {
    let lines = events.lines().map(str::trim);
    let names = lines.filter_map(|line| line.strip_prefix("\"event\": \""));
    names.map(|name| name.trim_end_matches("\",")).collect()
}
