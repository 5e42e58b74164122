//! The agent on the emulated host: runs processes and reads and writes files for the lab.
//!
//! One thread reads requests from the virtio-serial port and one writes events to it, through a bounded queue:
//! when the lab is slow the queue fills, the threads that read the processes' output wait, and the pipes make
//! the processes wait. Nothing is dropped. The lab always reads, so requests are always answered.
//! It decides nothing: what to run and what its result means is up to the lab.

mod inventory;
mod processes;
mod steady_kvm;
pub(crate) mod system;
mod terminal;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use lab_agent::host_protocol::{Bytes, Event, FILE_LIMIT_BYTES, PORT_NAME, Request, RequestId};

use processes::Processes;
use steady_kvm::SteadyKvm;

/// Events that wait for the port; each holds at most one chunk of output.
const QUEUE_LENGTH: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    System(#[from] system::SystemError),
    #[error("no virtio-serial port is named {PORT_NAME}; ports: {found:?}")]
    NoPort { found: Vec<String> },
    #[error("cannot use the port {path}")]
    Port { path: PathBuf, source: io::Error },
}

/// Brings the host up, then answers until the lab hangs up.
pub(crate) fn serve() -> Result<(), ServeError> {
    let mut warnings = system::prepare()?;
    let steady = SteadyKvm::hold();
    if let Err(error) = &steady {
        warnings.push(format!(
            "no idle virtual machine, the host may panic when guests come and go: {error}"
        ));
    }
    let path = find_port()?;
    let failed = |source| ServeError::Port {
        path: path.clone(),
        source,
    };
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    let (events, queue) = sync_channel(QUEUE_LENGTH);
    let out = port.try_clone().map_err(failed)?;
    thread::spawn(move || write_events(out, &queue));
    let hello = Event::Hello {
        release: system::kernel_release(),
        uptime_seconds: system::uptime_seconds(),
        warnings,
    };
    send(&events, hello);
    answer_requests(port, &events).map_err(failed)
}

fn answer_requests(port: File, events: &SyncSender<Event>) -> io::Result<()> {
    let processes = Processes::new(events.clone());
    let mut lines = BufReader::with_capacity(64 * 1024, port);
    let mut line = String::new();
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 {
            return Ok(());
        }
        match serde_json::from_str::<Request>(&line) {
            Ok(request) => answer(request, &processes, events),
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
}

fn answer(request: Request, processes: &Processes, events: &SyncSender<Event>) {
    let (id, outcome) = match request {
        Request::Pulse => return,
        Request::Spawn { id, spec } => return processes.spawn(id, &spec),
        Request::Stdin { id, data } => return processes.feed(id, data.0),
        Request::CloseStdin { id } => return processes.close_stdin(id),
        Request::Kill {
            id,
            reply,
            signal,
            group,
        } => (reply, processes.kill(id, signal, group)),
        Request::Resize { id, reply, size } => (reply, processes.resize(id, size)),
        Request::Inventory { id } => match inventory::take() {
            Ok(inventory) => return send(events, Event::Inventory { id, inventory }),
            Err(error) => (id, Err(format!("cannot take the inventory: {error}"))),
        },
        Request::ReadFile { id, path } => match read_file(&path) {
            Ok(data) => {
                return send(
                    events,
                    Event::File {
                        id,
                        data: Bytes(data),
                    },
                );
            }
            Err(error) => (id, Err(format!("cannot read {path}: {error}"))),
        },
        Request::WriteFile {
            id,
            path,
            mode,
            data,
        } => (
            id,
            write_file(&path, mode, &data.0)
                .map_err(|error| format!("cannot write {path}: {error}")),
        ),
    };
    reply(events, id, outcome);
}

fn reply(events: &SyncSender<Event>, id: RequestId, outcome: Result<(), String>) {
    send(
        events,
        match outcome {
            Ok(()) => Event::Done { id },
            Err(message) => Event::Refused { id, message },
        },
    );
}

/// Queues an event, waiting for room. The queue only ends with the agent, so there is nobody to tell of a failure.
fn send(events: &SyncSender<Event>, event: Event) {
    drop(events.send(event));
}

fn write_events(mut port: File, queue: &Receiver<Event>) {
    for event in queue {
        let written = serde_json::to_vec(&event)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                port.write_all(&line)
            });
        if let Err(error) = written {
            eprintln!("lab-agent: cannot report to the lab: {error}");
            std::process::exit(1);
        }
    }
}

fn read_file(path: &str) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    let limit = FILE_LIMIT_BYTES as u64;
    File::open(path)?.take(limit + 1).read_to_end(&mut data)?;
    if data.len() > FILE_LIMIT_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("larger than {limit} bytes"),
        ));
    }
    Ok(data)
}

/// One `write` call, as sysfs and tracefs files want it. Directories above the file are made.
fn write_file(path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
    if let Some(directory) = Path::new(path).parent() {
        fs::create_dir_all(directory)?;
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    file.write_all(data)
}

fn find_port() -> Result<PathBuf, ServeError> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/virtio-ports")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
        found.push(name.trim().to_owned());
    }
    Err(ServeError::NoPort { found })
}
