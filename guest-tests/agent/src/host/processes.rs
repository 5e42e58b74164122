//! The processes that the lab has asked for.
//!
//! ```text
//! spawn ──> running ──(child ends)──> Exited ──(last writer of its output gone)──> Closed, forgotten
//! ```
//! Each process has one thread per output stream, one for its input if that is open, and one that waits for it.
//! Invariant: a process number is only signalled while the process has not been reaped, so a signal never
//! reaches a newcomer with the same number. Lock order: `table` alone; no event is sent while it is held.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use lab_agent::host_protocol::{
    Bytes, Event, ExitStatus, RequestId, SpawnSpec, Stream, TerminalSize,
};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};

use super::{reply, send, system, terminal};

/// Bytes of output in one event.
const OUTPUT_CHUNK_BYTES: usize = 32 * 1024;

pub(crate) struct Processes {
    events: SyncSender<Event>,
    table: Arc<Mutex<HashMap<RequestId, Entry>>>,
}

struct Entry {
    /// Set until the process is reaped.
    pid: Option<Pid>,
    stdin: Option<SyncSender<Vec<u8>>>,
    terminal: Option<File>,
}

/// What a process was started with.
struct Started {
    child: Child,
    terminal: Option<File>,
}

impl Processes {
    pub(crate) fn new(events: SyncSender<Event>) -> Self {
        Self {
            events,
            table: Arc::default(),
        }
    }

    pub(crate) fn spawn(&self, id: RequestId, spec: &SpawnSpec) {
        if let Err(error) = start(spec).and_then(|started| self.adopt(id, spec, started)) {
            let program = spec.argv.first().map_or("", String::as_str);
            reply(
                &self.events,
                id,
                Err(format!("cannot run `{program}`: {error}")),
            );
        }
    }

    /// Registers a process that runs and starts its threads.
    fn adopt(&self, id: RequestId, spec: &SpawnSpec, started: Started) -> io::Result<()> {
        let Started {
            mut child,
            terminal,
        } = started;
        let number = child.id();
        let pid = i32::try_from(number).ok().and_then(Pid::from_raw);
        let mut sources: Vec<(Stream, Box<dyn Read + Send>)> = Vec::new();
        let mut sink: Option<Box<dyn Write + Send>> = None;
        if let Some(control) = &terminal {
            sources.push((Stream::Stdout, Box::new(control.try_clone()?)));
            sink = Some(Box::new(control.try_clone()?));
        } else {
            sources.extend(
                child
                    .stdout
                    .take()
                    .map(|pipe| (Stream::Stdout, Box::new(pipe) as _)),
            );
            sources.extend(
                child
                    .stderr
                    .take()
                    .map(|pipe| (Stream::Stderr, Box::new(pipe) as _)),
            );
            sink = child
                .stdin
                .take()
                .map_or(sink, |pipe| Some(Box::new(pipe) as _));
        }
        let stdin = sink
            .filter(|_| spec.stdin || spec.pty.is_some())
            .map(|sink| self.feeder(id, sink));
        self.lock().insert(
            id,
            Entry {
                pid,
                stdin,
                terminal,
            },
        );
        send(&self.events, Event::Spawned { id, pid: number });
        let readers = sources
            .into_iter()
            .map(|(stream, source)| self.reader(id, stream, source))
            .collect();
        self.waiter(id, child, pid, readers);
        Ok(())
    }

    /// Passes one output stream on until its last writer is gone.
    fn reader(
        &self,
        id: RequestId,
        stream: Stream,
        mut source: Box<dyn Read + Send>,
    ) -> JoinHandle<()> {
        let events = self.events.clone();
        thread::spawn(move || {
            let mut chunk = vec![0; OUTPUT_CHUNK_BYTES];
            loop {
                match source.read(&mut chunk) {
                    Ok(0) => return,
                    Ok(length) => {
                        let data = Bytes(chunk[..length].to_vec());
                        send(&events, Event::Output { id, stream, data });
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // A terminal whose other end is closed answers EIO.
                    Err(_) => return,
                }
            }
        })
    }

    /// Writes to the process's input what arrives, one message at a time.
    fn feeder(&self, id: RequestId, mut sink: Box<dyn Write + Send>) -> SyncSender<Vec<u8>> {
        let (sender, queue) = sync_channel::<Vec<u8>>(1);
        let events = self.events.clone();
        thread::spawn(move || {
            for data in queue {
                let written = sink.write_all(&data).and_then(|()| sink.flush());
                match written {
                    Ok(()) => send(&events, Event::StdinTaken { id }),
                    Err(error) => reply(
                        &events,
                        id,
                        Err(format!("cannot write to its input: {error}")),
                    ),
                }
            }
        });
        sender
    }

    fn waiter(
        &self,
        id: RequestId,
        mut child: Child,
        pid: Option<Pid>,
        readers: Vec<JoinHandle<()>>,
    ) {
        let events = self.events.clone();
        let table = Arc::clone(&self.table);
        thread::spawn(move || {
            if let Some(pid) = pid {
                // Leaves it a zombie, so that its number stays taken until the entry says that it is gone.
                let how = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
                while matches!(waitid(WaitId::Pid(pid), how), Err(rustix::io::Errno::INTR)) {}
            }
            let status = {
                let mut table = lock(&table);
                if let Some(entry) = table.get_mut(&id) {
                    entry.pid = None;
                    entry.stdin = None;
                    entry.terminal = None;
                }
                child.wait()
            };
            let status = match status {
                Ok(status) => match (status.code(), status.signal()) {
                    (Some(code), _) => ExitStatus::Code(code),
                    (None, signal) => ExitStatus::Signal(signal.unwrap_or_default()),
                },
                Err(error) => {
                    eprintln!("lab-agent: cannot wait for {pid:?}: {error}");
                    ExitStatus::Signal(0)
                }
            };
            send(&events, Event::Exited { id, status });
            for reader in readers {
                drop(reader.join());
            }
            lock(&table).remove(&id);
            send(&events, Event::Closed { id });
        });
    }

    pub(crate) fn feed(&self, id: RequestId, data: Vec<u8>) {
        let stdin = self.lock().get(&id).and_then(|entry| entry.stdin.clone());
        let refused = match stdin.map(|stdin| stdin.try_send(data)) {
            Some(Ok(())) => return,
            Some(Err(TrySendError::Full(_))) => "it has not taken the input before this one",
            Some(Err(TrySendError::Disconnected(_))) | None => "its input is closed",
        };
        reply(&self.events, id, Err(refused.to_owned()));
    }

    pub(crate) fn close_stdin(&self, id: RequestId) {
        if let Some(entry) = self.lock().get_mut(&id) {
            entry.stdin = None;
        }
        send(&self.events, Event::StdinTaken { id });
    }

    pub(crate) fn kill(&self, id: RequestId, signal: i32, group: bool) -> Result<(), String> {
        let signal = Signal::from_named_raw(signal)
            .ok_or_else(|| format!("no signal has the number {signal}"))?;
        let table = self.lock();
        let pid = table
            .get(&id)
            .and_then(|entry| entry.pid)
            .ok_or("the process has ended")?;
        if group {
            kill_process_group(pid, signal)
        } else {
            kill_process(pid, signal)
        }
        .map_err(|error| format!("cannot signal {pid:?}: {error}"))
    }

    pub(crate) fn resize(&self, id: RequestId, size: TerminalSize) -> Result<(), String> {
        let table = self.lock();
        let control = table
            .get(&id)
            .and_then(|entry| entry.terminal.as_ref())
            .ok_or("it has no terminal")?;
        terminal::resize(control, size).map_err(|error| format!("cannot resize: {error}"))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Entry>> {
        lock(&self.table)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start(spec: &SpawnSpec) -> io::Result<Started> {
    let program = spec
        .argv
        .first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "empty command"))?;
    let mut command = Command::new(program);
    command
        .args(&spec.argv[1..])
        .envs(system::environment())
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .current_dir(spec.cwd.as_deref().unwrap_or("/"));
    if let Some(uid) = spec.uid {
        command.uid(uid).gid(uid);
    }
    let terminal = if let Some(size) = spec.pty {
        Some(terminal::attach(&mut command, size)?)
    } else {
        let stdin = if spec.stdin {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        None
    };
    // `command` holds the terminal's near end and must go before anyone waits for the far end to close.
    Ok(Started {
        child: command.spawn()?,
        terminal,
    })
}
