//! A program on the emulated host, seen from the lab.
//!
//! Dropping the value kills the program and all that it started, so that a test that fails leaves nothing behind.

use std::time::Duration;

use lab_agent::host_protocol::{
    Bytes, ExitStatus, Request, RequestId, STDIN_CHUNK_BYTES, SpawnSpec, TerminalSize,
};

use super::Output;
use super::channel::{ANSWER_DEADLINE, Channel, HostError, Program, State};

/// For [`Process::signal`].
pub const SIGKILL: i32 = 9;
/// Of every thread of the process `$0`: name, state, processor time in user and kernel mode, system call, stack in the kernel. Twice,
/// so that what moves is told from what stands still; with the interrupts that are taken for guests.
const WHAT_IT_DOES: &str = r#"for round in 1 2; do
    for task in /proc/$0/task/*; do
        echo "${task##*/} $(cat $task/comm): $(cut -d ' ' -f 3,14,15 $task/stat); $(cat $task/syscall)"
        cat $task/stack
    done
    grep -E 'vfio|kvm' /proc/interrupts | grep -vE '^ *[0-9]+:( +0)+ +[A-Z]'
    test $round = 2 || sleep 2
done"#;

/// A program that was started.
#[derive(Debug)]
pub struct Process {
    channel: Channel,
    id: RequestId,
    command: String,
    pid: u32,
    /// How far [`Process::wait_for`] has read.
    seen: usize,
}

impl Process {
    pub(super) fn start(channel: Channel, spec: SpawnSpec) -> Result<Self, HostError> {
        let id = channel.new_id();
        let command = spec.argv.join(" ");
        let what = format!("running `{command}`");
        channel.lock().programs.insert(
            id,
            Program {
                command: command.clone(),
                ..Program::default()
            },
        );
        channel.send(&Request::Spawn { id, spec }, &what)?;
        let pid = channel.wait(&what, ANSWER_DEADLINE, |state| {
            let program = program(state, id);
            let refused = program.refused.clone();
            refused
                .map(|message| {
                    Err(HostError::Refused {
                        what: what.clone(),
                        message,
                    })
                })
                .or_else(|| program.pid.map(Ok))
        })?;
        Ok(Self {
            channel,
            id,
            command,
            pid,
            seen: 0,
        })
    }

    /// Its number on the emulated host.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its command line.
    pub fn command(&self) -> &str {
        &self.command
    }

    /// Waits until its standard error has `text`. Gives the line with the text.
    pub fn wait_for_error(&self, text: &str, deadline: Duration) -> Result<String, HostError> {
        let what = format!(
            "waiting for `{text}` on standard error of `{}`",
            self.command
        );
        self.channel.wait(&what, deadline, |state| {
            let program = program(state, self.id);
            if let Some((line, _)) = find_line(&program.stderr, 0, text) {
                return Some(Ok(line));
            }
            ended_early(program, &what).map(Err)
        })
    }

    /// Waits until its standard output has `text`, after what an earlier call found. Gives the line with the text.
    pub fn wait_for(&mut self, text: &str, deadline: Duration) -> Result<String, HostError> {
        let what = format!("waiting for `{text}` from `{}`", self.command);
        let (id, seen) = (self.id, self.seen);
        let mut searched = seen;
        let found = self.channel.wait(&what, deadline, |state| {
            let program = program(state, id);
            if let Some(found) = find_line(&program.stdout, searched, text) {
                return Some(Ok(found));
            }
            // The last line is searched again when there is more of it.
            let line = program
                .stdout
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |newline| newline + 1);
            searched = line.max(seen);
            ended_early(program, &what).map(Err)
        });
        let (line, end) = found.map_err(|error| self.with_its_threads(error))?;
        self.seen = end;
        Ok(line)
    }

    /// Gives what it has printed since `from` as soon as there is something; nothing when it has ended.
    pub fn output_after(
        &self,
        from: usize,
        deadline: Duration,
    ) -> Result<Option<Vec<u8>>, HostError> {
        let what = format!("waiting for output of `{}`", self.command);
        self.channel.wait(&what, deadline, |state| {
            let program = program(state, self.id);
            match program.stdout.get(from..) {
                Some(new) if !new.is_empty() => Some(Ok(Some(new.to_vec()))),
                _ => (program.exited.is_some() && program.closed).then_some(Ok(None)),
            }
        })
    }

    /// All that it has printed on standard output.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&program(&mut self.channel.lock(), self.id).stdout).into_owned()
    }

    /// All that it has printed on standard error.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&program(&mut self.channel.lock(), self.id).stderr).into_owned()
    }

    /// Writes to its standard input and waits until it is taken.
    pub fn send(&self, data: &[u8]) -> Result<(), HostError> {
        data.chunks(STDIN_CHUNK_BYTES).try_for_each(|chunk| {
            self.input(&Request::Stdin {
                id: self.id,
                data: Bytes(chunk.to_vec()),
            })
        })
    }

    /// Closes its standard input.
    pub fn close_stdin(&self) -> Result<(), HostError> {
        self.input(&Request::CloseStdin { id: self.id })
    }

    fn input(&self, request: &Request) -> Result<(), HostError> {
        let what = format!("writing to `{}`", self.command);
        program(&mut self.channel.lock(), self.id).input_taken = false;
        self.channel.send(request, &what)?;
        self.channel.wait(&what, ANSWER_DEADLINE, |state| {
            let program = program(state, self.id);
            if let Some(message) = program.refused.take() {
                return Some(Err(HostError::Refused {
                    what: what.clone(),
                    message,
                }));
            }
            program
                .input_taken
                .then_some(Ok(()))
                .or_else(|| ended_early(program, &what).map(Err))
        })
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: i32) -> Result<(), HostError> {
        let request = |reply| Request::Kill {
            id: self.id,
            reply,
            signal,
            group: false,
        };
        self.channel.ask(request, ANSWER_DEADLINE).map(|_| ())
    }

    /// Changes the size of its terminal.
    pub fn resize(&self, size: TerminalSize) -> Result<(), HostError> {
        self.channel
            .ask(
                |reply| Request::Resize {
                    id: self.id,
                    reply,
                    size,
                },
                ANSWER_DEADLINE,
            )
            .map(|_| ())
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        program(&mut self.channel.lock(), self.id).exited.is_some()
    }

    /// Waits until it has ended and nothing holds its output any more. One that does not end is told of with what its
    /// threads are at.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus, HostError> {
        match self.wait_plainly(deadline) {
            Err(error @ HostError::Timeout { .. }) if !self.has_ended() => {
                Err(self.with_its_threads(error))
            }
            Err(HostError::Timeout { seconds, .. }) => Err(HostError::Timeout {
                what: format!(
                    "`{}` has ended, but something that it started still holds its output",
                    self.command
                ),
                seconds,
            }),
            outcome => outcome,
        }
    }

    fn wait_plainly(&self, deadline: Duration) -> Result<ExitStatus, HostError> {
        let what = format!("waiting for the end of `{}`", self.command);
        self.channel.wait(&what, deadline, |state| {
            let program = program(state, self.id);
            if program.too_much {
                return Some(Err(HostError::TooMuchOutput {
                    command: program.command.clone(),
                }));
            }
            program.exited.filter(|_| program.closed).map(Ok)
        })
    }

    /// What was not in time, with what the process was at meanwhile.
    fn with_its_threads(&self, error: HostError) -> HostError {
        match error {
            HostError::Timeout { what, seconds } => HostError::Timeout {
                what: format!("{what}, whose threads are at\n{}", self.threads()),
                seconds,
            },
            other => other,
        }
    }

    fn threads(&self) -> String {
        let argv = ["sh", "-c", WHAT_IT_DOES, &self.pid.to_string()];
        let spec = SpawnSpec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            ..SpawnSpec::default()
        };
        let told = Self::start(self.channel.clone(), spec).and_then(|look| {
            look.wait_plainly(ANSWER_DEADLINE)?;
            Ok(look.stdout())
        });
        told.unwrap_or_else(|error| error.to_string())
    }

    /// Waits for its end and takes its output.
    pub fn finish(self, deadline: Duration) -> Result<Output, HostError> {
        let status = self.wait(deadline)?;
        Ok(Output {
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.has_ended() {
            let request = |reply| Request::Kill {
                id: self.id,
                reply,
                signal: SIGKILL,
                group: true,
            };
            // It may end by itself just now, and the host may be gone: either way it does not run any more.
            if self.channel.ask(request, ANSWER_DEADLINE).is_ok() {
                drop(self.wait(ANSWER_DEADLINE));
            }
        }
    }
}

/// The entry of a program that was started. It is only forgotten when the program has ended, and then it is empty.
fn program(state: &mut State, id: RequestId) -> &mut Program {
    state.programs.entry(id).or_insert_with(|| Program {
        closed: true,
        ..Program::default()
    })
}

/// Why what is waited for will not come.
fn ended_early(program: &Program, what: &str) -> Option<HostError> {
    if program.too_much {
        return Some(HostError::TooMuchOutput {
            command: program.command.clone(),
        });
    }
    let status = program.exited.filter(|_| program.closed)?;
    Some(HostError::Ended {
        what: what.to_owned(),
        status,
    })
}

/// Finds `text` at or after `from`; gives the whole line around it, once the line has ended, and the line's end.
fn find_line(data: &[u8], from: usize, text: &str) -> Option<(String, usize)> {
    let new = data.get(from..)?;
    let start = from
        + new
            .windows(text.len())
            .position(|window| window == text.as_bytes())?;
    let end = start + data[start..].iter().position(|byte| *byte == b'\n')?;
    let begin = data[..start]
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |newline| newline + 1);
    Some((
        String::from_utf8_lossy(&data[begin..end])
            .trim_end()
            .to_owned(),
        end + 1,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_when_it_is_complete() {
        let data = b"boot\r\n[1.0] GUEST-READY 3.2\r\nlogin: ";
        let (line, end) = find_line(data, 0, "GUEST-READY").unwrap();
        assert_eq!(line, "[1.0] GUEST-READY 3.2");
        assert_eq!(&data[end..], b"login: ");
        assert_eq!(find_line(data, end, "GUEST-READY"), None);
        assert_eq!(find_line(data, 0, "login"), None, "the line may go on");
    }
}
