//! The connection to the agent on the emulated host.
//!
//! One thread reads events and files them under their ids; whoever waits for one is woken. The thread always reads,
//! so the agent is never held up. What programs print is kept whole, up to `OUTPUT_LIMIT_BYTES` each; a program that
//! prints more is killed, and whoever waits for it is told, so that nothing is lost without a word.
//! Lock order: `writer` and `state` are never held together.

use crate::host::process::SIGKILL;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lab_agent::host_protocol::{Event, ExitStatus, Request, RequestId, Stream};

use super::RUN_DEADLINE;

/// What one program may print.
const OUTPUT_LIMIT_BYTES: usize = 64 * 1024 * 1024;
/// Lines of a program's output that explain a failure.
const TAIL_LINES: usize = 40;
/// From one interrupt for the host to the next.
const PULSE_INTERVAL: Duration = Duration::from_millis(250);

/// Something asked of a running host that did not come about.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// It took too long.
    #[error("{what}: not within {seconds} s")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
    },
    /// The host is gone.
    #[error("{what}: the emulated host is gone ({reason})")]
    Gone {
        /// What was asked or waited for.
        what: String,
        /// How it went.
        reason: String,
    },
    /// The agent says no.
    #[error("{what}: {message}")]
    Refused {
        /// What was asked.
        what: String,
        /// Why not.
        message: String,
    },
    /// The program failed.
    #[error("`{command}` failed on the emulated host: {status}\n{stderr}")]
    Failed {
        /// The program.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// The program ended before it did what was waited for.
    #[error("{what}: the program has ended with {status}")]
    Ended {
        /// What was waited for.
        what: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// The program printed too much.
    #[error("`{command}` printed more than {OUTPUT_LIMIT_BYTES} bytes and was killed")]
    TooMuchOutput {
        /// The program.
        command: String,
    },
    /// An answer of the wrong kind.
    #[error("{what}: unexpected answer {event}")]
    Unexpected {
        /// What was asked.
        what: String,
        /// The answer.
        event: String,
    },
}

/// Shared by everything that talks to one host.
#[derive(Clone, Debug)]
pub struct Channel {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    writer: Mutex<UnixStream>,
    state: Mutex<State>,
    changed: Condvar,
    next_id: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct State {
    hello: Option<(String, f64)>,
    /// Why no more events will come.
    gone: Option<String>,
    pub(super) programs: BTreeMap<RequestId, Program>,
    replies: BTreeMap<RequestId, Event>,
}

/// What is known of a program on the host.
#[derive(Debug, Default)]
pub(super) struct Program {
    pub(super) command: String,
    pub(super) pid: Option<u32>,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    pub(super) exited: Option<ExitStatus>,
    pub(super) closed: bool,
    pub(super) refused: Option<String>,
    pub(super) input_taken: bool,
    pub(super) too_much: bool,
}

impl Channel {
    pub(super) fn open(socket: UnixStream) -> Self {
        let reader = socket.try_clone();
        let shared = Arc::new(Shared {
            writer: Mutex::new(socket),
            state: Mutex::default(),
            changed: Condvar::new(),
            next_id: AtomicU64::new(1),
        });
        let channel = Self { shared };
        let events = channel.clone();
        match reader {
            Ok(reader) => {
                let pulse = channel.clone();
                drop(thread::spawn(move || events.read(reader)));
                drop(thread::spawn(move || pulse.beat()));
            }
            Err(error) => channel.lock().gone = Some(error.to_string()),
        }
        channel
    }

    /// Gives the host an interrupt now and then for as long as it is there.
    ///
    /// The emulator's processor changes its word of pending interrupts at entries to a guest and at exits from it without
    /// the lock that devices change it under (`interrupt_request` in QEMU's `target/i386/tcg/sysemu/svm_helper.c`), so now
    /// and then an interrupt is pending in the local APIC and the processor sleeps on. With the timer's lost, a host that
    /// waits for nothing else sleeps for good: one guest in a hundred. At any interrupt the processor looks at all of them.
    fn beat(&self) {
        let request = Request::Pulse;
        let what = describe(&request);
        loop {
            let (state, waited) = self
                .shared
                .changed
                .wait_timeout_while(self.lock(), PULSE_INTERVAL, |state| state.gone.is_none())
                .unwrap_or_else(PoisonError::into_inner);
            if !waited.timed_out() {
                return;
            }
            drop(state);
            // When the host is gone, the reader says so.
            drop(self.send(&request, &what));
        }
    }

    /// Waits for the agent's first word: the kernel's release and uptime.
    pub(super) fn wait_hello(&self, deadline: Duration) -> Result<(String, f64), HostError> {
        self.wait("waiting for the emulated host", deadline, |state| {
            state.hello.clone().map(Ok)
        })
    }

    pub(super) fn new_id(&self) -> RequestId {
        RequestId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Asks something that is answered by one event.
    pub(super) fn ask(
        &self,
        request: impl FnOnce(RequestId) -> Request,
        deadline: Duration,
    ) -> Result<Event, HostError> {
        let id = self.new_id();
        let request = request(id);
        let what = describe(&request);
        self.send(&request, &what)?;
        let answer = self.wait(&what, deadline, |state| state.replies.remove(&id).map(Ok))?;
        match answer {
            Event::Refused { message, .. } => Err(HostError::Refused { what, message }),
            event => Ok(event),
        }
    }

    pub(super) fn send(&self, request: &Request, what: &str) -> Result<(), HostError> {
        let gone = |reason: String| HostError::Gone {
            what: what.to_owned(),
            reason,
        };
        let mut line = serde_json::to_vec(request).map_err(|error| gone(error.to_string()))?;
        line.push(b'\n');
        let mut writer = self
            .shared
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        writer
            .write_all(&line)
            .map_err(|error| gone(error.to_string()))
    }

    /// Waits until `ready` gives something.
    pub(super) fn wait<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut ready: impl FnMut(&mut State) -> Option<Result<T, HostError>>,
    ) -> Result<T, HostError> {
        let end = Instant::now() + deadline;
        let mut state = self.lock();
        loop {
            if let Some(outcome) = ready(&mut state) {
                return outcome;
            }
            if let Some(reason) = &state.gone {
                return Err(HostError::Gone {
                    what: what.to_owned(),
                    reason: reason.clone(),
                });
            }
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                return Err(HostError::Timeout {
                    what: what.to_owned(),
                    seconds: deadline.as_secs(),
                });
            };
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops what is known of programs that have ended.
    pub(super) fn forget_ended(&self) {
        self.lock()
            .programs
            .retain(|_, program| !program.closed && program.refused.is_none());
    }

    /// How the programs that are not forgotten are doing, and the ends of what they printed.
    pub(super) fn programs_tail(&self) -> String {
        let state = self.lock();
        let mut text = String::new();
        for program in state.programs.values() {
            let status = program
                .exited
                .map_or("running".to_owned(), |status| status.to_string());
            for (name, data) in [
                ("standard output", &program.stdout),
                ("standard error", &program.stderr),
            ] {
                if !data.is_empty() {
                    let _ = write!(
                        text,
                        "--- {name} of `{}` ({status}) ---\n{}\n",
                        program.command,
                        tail(data)
                    );
                }
            }
        }
        text
    }

    fn read(&self, socket: UnixStream) {
        let mut lines = BufReader::with_capacity(256 * 1024, socket);
        let mut line = String::new();
        let reason = loop {
            line.clear();
            match lines.read_line(&mut line) {
                Ok(0) => break "it has hung up".to_owned(),
                Ok(_) => match serde_json::from_str(&line) {
                    Ok(event) => self.file(event),
                    Err(error) => {
                        break format!("it says something unintelligible: {error}: {line}");
                    }
                },
                Err(error) => break error.to_string(),
            }
        };
        self.lock().gone = Some(reason);
        self.shared.changed.notify_all();
    }

    /// Files an event under its id.
    fn file(&self, event: Event) {
        let mut overflow = None;
        {
            let mut state = self.lock();
            if let Event::Hello {
                release,
                uptime_seconds,
                warnings,
            } = event
            {
                for warning in warnings {
                    crate::progress::note(&format!("emulated host: {warning}"));
                }
                state.hello = Some((release, uptime_seconds));
            } else {
                let id = id_of(&event);
                match state.programs.get_mut(&id) {
                    Some(program) => {
                        if program.take(event) {
                            overflow = Some(id);
                        }
                    }
                    None => drop(state.replies.insert(id, event)),
                }
            }
        }
        self.shared.changed.notify_all();
        if let Some(id) = overflow {
            let kill = Request::Kill {
                id,
                reply: self.new_id(),
                signal: SIGKILL,
                group: true,
            };
            // When the host is gone, whoever waits is told so.
            drop(self.send(&kill, "killing a program that prints too much"));
        }
    }
}

impl Program {
    /// Takes an event in; says whether the program has just printed too much.
    fn take(&mut self, event: Event) -> bool {
        match event {
            Event::Spawned { pid, .. } => self.pid = Some(pid),
            Event::Output { stream, data, .. } if !self.too_much => {
                let kept = match stream {
                    Stream::Stdout => &mut self.stdout,
                    Stream::Stderr => &mut self.stderr,
                };
                kept.extend(data.0);
                self.too_much = self.stdout.len() + self.stderr.len() > OUTPUT_LIMIT_BYTES;
                return self.too_much;
            }
            Event::Exited { status, .. } => self.exited = Some(status),
            Event::Closed { .. } => self.closed = true,
            Event::StdinTaken { .. } => self.input_taken = true,
            Event::Refused { message, .. } => self.refused = Some(message),
            Event::Output { .. }
            | Event::Hello { .. }
            | Event::File { .. }
            | Event::Inventory { .. }
            | Event::Done { .. } => {}
        }
        false
    }
}

/// The last lines of what a program printed.
fn tail(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

fn id_of(event: &Event) -> RequestId {
    match event {
        // Never an id that is given out.
        Event::Hello { .. } => RequestId(0),
        Event::Spawned { id, .. }
        | Event::Output { id, .. }
        | Event::Exited { id, .. }
        | Event::Closed { id }
        | Event::StdinTaken { id }
        | Event::File { id, .. }
        | Event::Inventory { id, .. }
        | Event::Done { id }
        | Event::Refused { id, .. } => *id,
    }
}

fn describe(request: &Request) -> String {
    match request {
        Request::Pulse => "keeping the host awake".to_owned(),
        Request::Spawn { spec, .. } => format!("running `{}`", spec.argv.join(" ")),
        Request::Stdin { .. } => "writing to a program".to_owned(),
        Request::CloseStdin { .. } => "closing a program's input".to_owned(),
        Request::Kill { signal, .. } => format!("sending signal {signal}"),
        Request::Resize { .. } => "resizing a terminal".to_owned(),
        Request::Inventory { .. } => "taking the host's inventory".to_owned(),
        Request::ReadFile { path, .. } => format!("reading {path}"),
        Request::WriteFile { path, .. } => format!("writing {path}"),
    }
}

/// How long to wait for answers that need no work.
pub(super) const ANSWER_DEADLINE: Duration = RUN_DEADLINE;

#[cfg(test)]
mod tests {
    use super::*;
    use lab_agent::host_protocol::Bytes;

    fn far_end() -> (Channel, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Channel::open(near), far)
    }

    #[test]
    fn a_late_answer_is_a_timeout_that_says_what_was_asked() {
        let (channel, _far) = far_end();
        let request = |id| Request::ReadFile {
            id,
            path: "/x".into(),
        };
        let error = channel.ask(request, Duration::ZERO).unwrap_err();
        assert!(
            matches!(&error, HostError::Timeout { what, .. } if what == "reading /x"),
            "{error}"
        );
    }

    #[test]
    fn the_host_gets_interrupts_though_nothing_is_asked_of_it() {
        let (_channel, far) = far_end();
        let mut lines = BufReader::new(far);
        for _ in 0..2 {
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            let request: Request = serde_json::from_str(&line).unwrap();
            assert_eq!(request, Request::Pulse);
        }
    }

    #[test]
    fn whoever_waits_is_told_when_the_host_goes() {
        let (channel, far) = far_end();
        drop(far);
        let error = channel.wait_hello(Duration::from_mins(1)).unwrap_err();
        assert!(matches!(error, HostError::Gone { .. }), "{error}");
    }

    #[test]
    fn a_refusal_reaches_the_one_who_asked() {
        let (channel, far) = far_end();
        let agent = thread::spawn(move || {
            let id = BufReader::new(far.try_clone().unwrap())
                .lines()
                .find_map(|line| match serde_json::from_str(&line.unwrap()) {
                    Ok(Request::ReadFile { id, .. }) => Some(id),
                    Ok(Request::Pulse) => None,
                    other => panic!("{other:?}"),
                })
                .unwrap();
            let answer = serde_json::to_string(&Event::Refused {
                id,
                message: "no such file".into(),
            })
            .unwrap();
            (&far).write_all(format!("{answer}\n").as_bytes()).unwrap();
        });
        let request = |id| Request::ReadFile {
            id,
            path: "/x".into(),
        };
        let error = channel.ask(request, Duration::from_mins(1)).unwrap_err();
        agent.join().unwrap();
        assert_eq!(error.to_string(), "reading /x: no such file");
    }

    #[test]
    fn too_much_output_is_noticed_once() {
        let mut program = Program::default();
        let id = RequestId(1);
        let output = |bytes| Event::Output {
            id,
            stream: Stream::Stdout,
            data: Bytes(vec![0; bytes]),
        };
        assert!(!program.take(output(OUTPUT_LIMIT_BYTES)));
        assert!(program.take(output(1)));
        assert!(!program.take(output(1)));
        assert_eq!(program.stdout.len(), OUTPUT_LIMIT_BYTES + 1);
    }
}
