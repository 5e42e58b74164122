//! The daemon's process, which is ended with the test.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_daxhund-vhost-user-blk");

pub(crate) struct Daemon {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Daemon {
    /// Started, and listening.
    pub(crate) fn start(words: &[&str]) -> Self {
        Self::spawn(Command::new(PROGRAM).args(words))
    }

    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("listening") {
            let read = stderr.read_line(&mut said).unwrap();
            assert!(read > 0, "it has ended: {said}");
        }
        Self { child, stderr }
    }

    fn proc(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.child.id())
    }

    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(self.proc("fd")).unwrap().count()
    }

    pub(crate) fn threads(&self) -> usize {
        std::fs::read_dir(self.proc("task")).unwrap().count()
    }

    pub(crate) fn mappings_of(&self, name: &str) -> usize {
        let maps = std::fs::read_to_string(self.proc("maps")).unwrap();
        maps.lines().filter(|line| line.contains(name)).count()
    }

    /// SIGTERM, and the exit status of an orderly end.
    pub(crate) fn ends_well(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {said}");
        assert!(said.contains("ending by a signal"), "{said}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gone already, when the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What it says when it ends by itself.
pub(crate) fn refuses(words: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(words).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    said
}
