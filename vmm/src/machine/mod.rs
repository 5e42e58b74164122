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
mod backends;
mod build;
mod calls;
mod consumers;
mod devices;
mod dma;
mod drains;
mod events;
mod guard;
mod host_devices;
mod lookout;
mod notices;
mod owner;
mod passthrough;
mod pin_progress;
mod poison;
mod processors;
mod regions;
mod removal;
mod report;
mod requests;
mod resources;
mod seat;
mod serial_feed;
mod taps;
mod timer;
mod vcpus;
mod vm;
mod wiring;

use std::sync::Arc;

use thiserror::Error;

pub use build::{BuildError, Machine};
pub use devices::{PlugError, RemoveError};
pub use events::{Event, EventSender, Events};
pub use guard::GuardError;
pub use host_devices::OpenDeviceError;
pub use lookout::LookoutError;
pub use owner::OwnerError;
pub use passthrough::OpenPassthroughError;
pub use processors::ResizeVcpusError;
pub use removal::LostRam;
pub use resources::{HostResources, PrepareError};
pub use vm::{AddError, BalloonResizeError, BootError, PauseError, ResetError};

use crate::api::{ListenError, Listener, Server, StartError};
use crate::config::{HostConfig, RemovalGuard, ValidConfig};
use crate::kvm::VcpuFault;
use crate::metrics::Metrics;
use crate::monitor::{Event as Happened, Monitor};
use calls::Calls;
use guard::Removals;
use lookout::Lookout;
use owner::Owner;
use taps::HandedTaps;
use vm::RunningVm;

/// How a guest ended.
#[derive(Debug)]
pub enum Ending {
    /// It powered itself off.
    PowerOff,
    /// A triple fault.
    TripleFault,
    /// A vCPU could not go on; most often memory behind it is gone.
    VcpuFailed(VcpuFault),
    /// RAM was taken away by the host.
    MemoryLost(LostRam),
    /// The host wanted RAM back and got it.
    MemoryWithdrawn {
        /// The zone.
        zone: String,
        /// The host's device.
        device: String,
    },
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
    /// The removal guard that was asked for.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// Who notices removals.
    #[error("removals of memory can't be noticed")]
    Lookout(#[from] LookoutError),
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
    /// What the host has pools of.
    pub pools: HostConfig,
    /// Where the API listens.
    pub api: Option<Listener>,
    /// Where events go.
    pub monitor: Monitor,
    /// Who holds removals of its memory.
    pub guard: RemovalGuard,
}

/// Runs guests until one of them, a signal or a client ends the process.
pub fn run(options: Options) -> Result<Ending, RunError> {
    let Options {
        config,
        pools,
        api,
        monitor,
        guard,
    } = options;
    let pools = Arc::new(pools);
    monitor.send(&Happened::VmmStarting);
    // Before anything that must be undone: from here on a signal ends the guest in order.
    let signals = owner::Signals::install()?;
    let mut removals = Removals::new(guard)?;
    let lookout = Lookout::new(&daxhund_dax::Host::system())?;
    let (sender, calls) = Calls::channel().map_err(|source| OwnerError::Descriptor {
        what: "event descriptor",
        source,
    })?;
    let metrics = Metrics::default();
    let server = api
        .map(|listener| Server::start(listener, sender, metrics.clone()))
        .transpose()?;
    let running = match config {
        None => None,
        Some(valid) => {
            monitor.send(&Happened::Booting);
            metrics.booting();
            let vm = RunningVm::boot(
                valid,
                Arc::clone(&pools),
                (&monitor, &metrics),
                &mut removals,
                signals.told(),
                &HandedTaps::default(),
            )?;
            monitor.send(&Happened::Booted);
            Some(vm)
        }
    };
    let ended = Owner::new(
        calls,
        signals,
        (monitor.clone(), metrics, server.is_some()),
        pools,
        (removals, lookout),
        running,
    )?
    .run();
    // Every call was answered or dropped with the owner, so that this waits for nobody.
    if let Some(server) = server {
        server.stop();
    }
    monitor.send(&Happened::VmmShutdown);
    ended
}
