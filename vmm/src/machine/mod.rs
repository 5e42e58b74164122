//! The machine: what it is made of, and the one thread that changes it.
//!
//! ```text
//!   HostResources ──build──▶ Machine ──▶ the owner's loop
//!        ▲                      │
//!        └──────take apart──────┘   (reset: the same memory and devices, a new VM)
//! ```
//! [`HostResources`] is everything taken from the host before a VM exists: `/dev/kvm`, the kernel file, the locked
//! and mapped memory, devices' files, the console. A [`Machine`] is a VM built on them. Power-off, reset and failure
//! take it apart in the reverse order of building; after a reset it is built again on the same memory, whose contents
//! nobody touched.
//!
//! The thread that calls [`run`] owns the machine. vCPU threads, workers of devices and the API only post events to it.

mod answers;
mod build;
mod calls;
mod consumers;
mod devices;
mod dma;
mod events;
mod host_devices;
mod notices;
mod owner;
mod passthrough;
mod pin_progress;
mod resources;
mod seat;
mod serial_feed;
mod timer;
mod vcpus;
mod vm;
mod wiring;

use thiserror::Error;

pub use build::{BuildError, Machine};
pub use devices::{PlugError, RemoveError};
pub use events::{Event, EventSender, Events};
pub use host_devices::OpenDeviceError;
pub use owner::OwnerError;
pub use passthrough::OpenPassthroughError;
pub use resources::{HostResources, PrepareError};
pub use vm::{AddError, BalloonResizeError, BootError, PauseError, ResetError};

use crate::api::{ListenError, Listener, Server, StartError};
use crate::config::ValidConfig;
use crate::kvm::VcpuFault;
use crate::monitor::{Event as Happened, Monitor};
use calls::Calls;
use owner::Owner;
use vm::RunningVm;

/// How a guest ended.
#[derive(Debug)]
pub enum Ending {
    /// It powered itself off.
    PowerOff,
    /// A triple fault.
    TripleFault,
    /// Memory behind it is gone, or a vCPU could not go on.
    VcpuFailed(VcpuFault),
    /// The thread of this vCPU panicked: a defect of the VMM.
    VcpuPanicked(u8),
    /// The VMM was told to end by this signal.
    Signal(i32),
    /// A client of the API ended the VMM.
    Asked,
}

/// The guest could not be run to an end.
#[derive(Debug, Error)]
pub enum RunError {
    /// It can't be started.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// It can't be started again.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The owner's event loop.
    #[error("the machine's event loop failed")]
    Owner(#[from] OwnerError),
    /// The API's socket.
    #[error("--api-socket")]
    Listen(#[from] ListenError),
    /// The API's thread.
    #[error("--api-socket")]
    Api(#[from] StartError),
}

/// What a process is to do.
#[derive(Debug)]
pub struct Options {
    /// The guest to start with; without it one comes by the API.
    pub config: Option<ValidConfig>,
    /// Where the API listens.
    pub api: Option<Listener>,
    /// Where events go.
    pub monitor: Monitor,
}

/// Runs guests until one of them, a signal or a client ends the process.
pub fn run(options: Options) -> Result<Ending, RunError> {
    let Options {
        config,
        api,
        monitor,
    } = options;
    monitor.send(&Happened::VmmStarting);
    // Before anything that must be undone: from here on a signal ends the guest in order.
    let signals = owner::Signals::install()?;
    let (sender, calls) = Calls::channel().map_err(|source| OwnerError::Descriptor {
        what: "event descriptor",
        source,
    })?;
    let server = api
        .map(|listener| Server::start(listener, sender))
        .transpose()?;
    let running = match config {
        None => None,
        Some(valid) => {
            monitor.send(&Happened::Booting);
            let vm = RunningVm::boot(valid, &monitor)?;
            monitor.send(&Happened::Booted);
            Some(vm)
        }
    };
    let ended = Owner::new(calls, signals, monitor.clone(), running)?.run();
    // Every call was answered or dropped with the owner, so that this waits for nobody.
    if let Some(server) = server {
        server.stop();
    }
    monitor.send(&Happened::VmmShutdown);
    ended
}
