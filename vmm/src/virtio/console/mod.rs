//! virtio-console, one port: `hvc0` in a Linux guest (virtio 1.2, section 5.3).
//!
//! ```text
//!   guest ─▶ transmitq ─▶ output.rs ─▶ ConsoleOutput      terminal, pseudo terminal, file, socket
//!   guest ◀─ receiveq  ◀─ input.rs  ◀─ ConsoleInput       waited on while the driver has buffers for it
//! ```
//! The host's side outlives the driver: a worker has it on loan, and it is back with the device when the worker is
//! gone, whatever ended it. So neither a reset of the device nor, through [`ConsoleDevice::take`], one of the machine
//! parts with a client or renames a pseudo terminal.
//!
//! Not here: more ports (`MULTIPORT`) and the emergency write, which would write to the host on a vCPU thread.

mod input;
mod output;
mod worker;

use std::io::{self, Read};
use std::mem;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::termios::tcgetwinsize;
use tracing::debug;

use super::device::{ActivateError, Activation, Device, Kind, read_space};
use super::worker::Worker;
use crate::devices::console::Console;
use input::InputWatch;
use output::OutputFlow;
use worker::ConsoleWorker;

/// Feature bit: columns and rows are in the configuration space.
const F_SIZE: u32 = 0;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZE: u16 = 128;

/// The device.
#[derive(Debug)]
pub struct ConsoleDevice {
    id: String,
    home: Home,
    window: Option<Window>,
    counters: Arc<Counters>,
}

/// Where the console is while no worker has it.
type Home = Arc<Mutex<Option<Console>>>;

#[derive(Debug, Default)]
struct Counters {
    input_bytes: AtomicU64,
    output_bytes: AtomicU64,
    lost_bytes: AtomicU64,
    bad_chains: AtomicU64,
}

impl ConsoleDevice {
    /// A console device between the guest and `console`.
    pub fn new(id: impl Into<String>, console: Console) -> Self {
        Self {
            id: id.into(),
            window: console.input.terminal().map(Window::new),
            home: Arc::new(Mutex::new(Some(console))),
            counters: Arc::default(),
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The host's side, for the device of the next machine. `None` while a worker has it, and after it was taken.
    pub fn take(&self) -> Option<Console> {
        lock(&self.home).take()
    }
}

impl Device for ConsoleDevice {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn features(&self) -> u64 {
        u64::from(self.window.is_some()) << F_SIZE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        // cols, rows; max_nr_ports and emerg_wr belong to features that are not offered.
        let mut space = [0; 12];
        if let Some(size) = self.window.as_ref().and_then(Window::size) {
            let (columns, rows) = size;
            space[..2].copy_from_slice(&columns.to_le_bytes());
            space[2..4].copy_from_slice(&rows.to_le_bytes());
        }
        read_space(&space, offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let Activation {
            memory,
            mut queues,
            signals,
            ..
        } = activation;
        let mut queue = |index: u16| {
            queues
                .get_mut(usize::from(index))
                .and_then(Option::take)
                .ok_or(ActivateError::MissingQueue { index })
        };
        let (receive, transmit) = (queue(RECEIVE)?, queue(TRANSMIT)?);
        let flow = OutputFlow::new().map_err(|source| ActivateError::Host {
            what: "no timer for the console",
            source,
        })?;
        let console = self.take().ok_or_else(|| ActivateError::Host {
            what: "the console's host side is still with an earlier worker",
            source: io::ErrorKind::ResourceBusy.into(),
        })?;
        let loan = Loan {
            console,
            home: Arc::clone(&self.home),
        };
        Ok(vec![Box::new(ConsoleWorker {
            receive,
            transmit,
            memory,
            signals,
            loan,
            watch: InputWatch::new(),
            flow,
            resized: self.window.as_ref().and_then(Window::watch),
            counters: Arc::clone(&self.counters),
            sent: 0,
            broken: false,
        })])
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("input_bytes", get(&self.counters.input_bytes)),
            ("output_bytes", get(&self.counters.output_bytes)),
            ("lost_bytes", get(&self.counters.lost_bytes)),
            ("bad_chains", get(&self.counters.bad_chains)),
        ]
    }
}

/// The console in a worker's hands; goes home by itself, also when the worker panics.
#[derive(Debug)]
struct Loan {
    console: Console,
    home: Home,
}

impl Drop for Loan {
    fn drop(&mut self) {
        let console = mem::replace(&mut self.console, Console::nowhere());
        *lock(&self.home) = Some(console);
    }
}

fn lock(home: &Home) -> std::sync::MutexGuard<'_, Option<Console>> {
    home.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The window that the guest's output is seen in.
#[derive(Debug)]
struct Window {
    /// A descriptor of its own: the size is asked for on vCPU threads while a worker has the console.
    terminal: OwnedFd,
    resized: Option<Arc<Resized>>,
}

/// `SIGWINCH`, as a descriptor. A pseudo terminal's size is set from its other side and tells nobody.
#[derive(Debug)]
struct Resized {
    told: UnixStream,
    handler: signal_hook::SigId,
}

impl Window {
    fn new(terminal: OwnedFd) -> Self {
        let resized = Resized::install()
            .inspect_err(|error| debug!(%error, "a console's window is not watched"))
            .ok();
        Self {
            terminal,
            resized: resized.map(Arc::new),
        }
    }

    /// Columns and rows.
    fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(&self.terminal).ok()?;
        Some((size.ws_col, size.ws_row))
    }

    fn watch(&self) -> Option<Arc<Resized>> {
        self.resized.clone()
    }
}

impl Resized {
    fn install() -> io::Result<Self> {
        let (told, teller) = UnixStream::pair()?;
        told.set_nonblocking(true)?;
        teller.set_nonblocking(true)?;
        let handler = signal_hook::low_level::pipe::register(libc::SIGWINCH, teller)?;
        Ok(Self { told, handler })
    }

    /// Takes all there is, so that it wakes again for the next.
    fn acknowledge(&self) {
        let mut bytes = [0; 64];
        while matches!((&self.told).read(&mut bytes), Ok(n) if n > 0) {}
    }
}

impl Drop for Resized {
    fn drop(&mut self) {
        signal_hook::low_level::unregister(self.handler);
    }
}

#[cfg(test)]
mod tests;
