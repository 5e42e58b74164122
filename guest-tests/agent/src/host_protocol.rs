//! Messages between the lab and the agent on the emulated host: JSON, one per line, over a virtio-serial port.
//!
//! Invariants: an id names one request for the whole life of the host; every request but `Pulse` is answered by at least one
//! event with its id; `Exited` and `Closed` come once for each `Spawned`, and `Closed` comes after the last `Output`.
//! A `Stdin` may only be followed by another one for the same process after `StdinTaken`: this bounds what the
//! agent has to keep, so a process that does not read can never hold up the others.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "lab.agent";
/// Most bytes of standard input in one message.
pub const STDIN_CHUNK_BYTES: usize = 32 * 1024;
/// Largest file that one message carries.
pub const FILE_LIMIT_BYTES: usize = 16 * 1024 * 1024;

/// Names a request and everything that answers it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct RequestId(pub u64);

/// Bytes that travel as base64.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD
            .decode(text)
            .map(Self)
            .map_err(serde::de::Error::custom)
    }
}

/// How a process is started.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SpawnSpec {
    /// Program and arguments; a program without a slash is looked for in `PATH`.
    pub argv: Vec<String>,
    /// Variables added to the agent's own.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory; `/` when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// User and group to run as; root when absent.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Gives the process a terminal of its own instead of pipes; its output is then one stream.
    #[serde(default)]
    pub pty: Option<TerminalSize>,
    /// Keeps standard input open for `Stdin`; `/dev/null` otherwise.
    #[serde(default)]
    pub stdin: bool,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// What the lab asks for.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Nothing is asked: the host gets an interrupt. No answer.
    Pulse,
    /// Starts a process. Answers: `Spawned`, then `Output`, `Exited` and `Closed`; or `Refused`.
    Spawn {
        /// Names the process from now on.
        id: RequestId,
        /// What to start.
        spec: SpawnSpec,
    },
    /// Writes to a process. Answers: `StdinTaken` or `Refused`.
    Stdin {
        /// The process.
        id: RequestId,
        /// At most [`STDIN_CHUNK_BYTES`].
        data: Bytes,
    },
    /// Closes a process's standard input. Answers: `StdinTaken` or `Refused`.
    CloseStdin {
        /// The process.
        id: RequestId,
    },
    /// Sends a signal. Answers: `Done` or `Refused`, under `reply`.
    Kill {
        /// The process.
        id: RequestId,
        /// Where the answer goes.
        reply: RequestId,
        /// Number of the signal.
        signal: i32,
        /// Also reaches what the process started.
        group: bool,
    },
    /// Changes the size of a process's terminal. Answers: `Done` or `Refused`, under `reply`.
    Resize {
        /// The process.
        id: RequestId,
        /// Where the answer goes.
        reply: RequestId,
        /// The new size.
        size: TerminalSize,
    },
    /// Reads a file of at most [`FILE_LIMIT_BYTES`]. Answers: `File` or `Refused`.
    ReadFile {
        /// Names the request.
        id: RequestId,
        /// Absolute path.
        path: String,
    },
    /// Lists what a test could have changed. Answers: `Inventory` or `Refused`.
    Inventory {
        /// Names the request.
        id: RequestId,
    },
    /// Writes a file in one go; creates it with `mode` when absent. Answers: `Done` or `Refused`.
    WriteFile {
        /// Names the request.
        id: RequestId,
        /// Absolute path.
        path: String,
        /// Permission bits for a file that is created.
        mode: u32,
        /// The whole contents.
        data: Bytes,
    },
}

/// One of a process's output streams.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It ended by itself with this status.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl ExitStatus {
    /// Whether it ended by itself with status 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(out, "exit status {code}"),
            Self::Signal(signal) => write!(out, "signal {signal}"),
        }
    }
}

/// What a test could have changed on the host. Every list is sorted, and its lines are for people.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    /// Number and command line of every process but the kernel's and the agent's.
    pub processes: Vec<String>,
    /// Every dax device with driver, size, alignment and permissions.
    pub dax_devices: Vec<String>,
    /// Every PCI function with its driver, and the driver that it is kept for.
    pub pci_devices: Vec<String>,
    /// Mounted file systems.
    pub mounts: Vec<String>,
    /// File locks.
    pub locks: Vec<String>,
    /// What lies in the directories for temporary things.
    pub files: Vec<String>,
    /// Huge pages, reserved and free.
    pub huge_pages: Vec<String>,
}

/// What the agent reports.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// First line of all: mounts and modules are in place.
    Hello {
        /// The host kernel's release.
        release: String,
        /// Seconds since the host's kernel started.
        uptime_seconds: f64,
        /// What went wrong on the way here without being fatal.
        warnings: Vec<String>,
    },
    /// The process runs.
    Spawned {
        /// The request.
        id: RequestId,
        /// Its number on the emulated host.
        pid: u32,
    },
    /// It wrote something.
    Output {
        /// The process.
        id: RequestId,
        /// Where to.
        stream: Stream,
        /// What.
        data: Bytes,
    },
    /// It ended.
    Exited {
        /// The process.
        id: RequestId,
        /// How.
        status: ExitStatus,
    },
    /// Nobody holds its output streams any more.
    Closed {
        /// The process.
        id: RequestId,
    },
    /// Its input has been written, or was closed.
    StdinTaken {
        /// The process.
        id: RequestId,
    },
    /// The contents of a file.
    File {
        /// The request.
        id: RequestId,
        /// All of it.
        data: Bytes,
    },
    /// What there is on the host.
    Inventory {
        /// The request.
        id: RequestId,
        /// All of it.
        inventory: Inventory,
    },
    /// Done, with nothing more to say.
    Done {
        /// The request.
        id: RequestId,
    },
    /// Not done.
    Refused {
        /// The request.
        id: RequestId,
        /// Why, with path or program.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_the_wire() {
        let event = Event::Output {
            id: RequestId(7),
            stream: Stream::Stderr,
            data: Bytes((0..=255).collect()),
        };
        let line = serde_json::to_string(&event).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
    }

    #[test]
    fn an_unknown_request_is_refused() {
        assert!(serde_json::from_str::<Request>(r#"{"op":"format_disk","id":1}"#).is_err());
        assert!(
            serde_json::from_str::<Request>(r#"{"op":"close_stdin","id":1,"now":true}"#).is_err()
        );
    }
}
