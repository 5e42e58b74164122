//! The machine: what it is made of, and the one thread that changes it.
//!
//! ```text
//!   HostResources ──build──▶ Machine ──run──▶ Ending
//!        ▲                      │
//!        └──────take apart──────┘   (reset: the same memory, a new VM)
//! ```
//! [`HostResources`] is everything taken from the host before a VM exists: `/dev/kvm`, the kernel file, the locked
//! and mapped memory, the console. A [`Machine`] is a VM built on them. Power-off, reset and failure take it apart in
//! the reverse order of building; after a reset it is built again on the same memory, whose contents nobody touched.
//!
//! The thread that calls [`run`] owns the machine. vCPU threads only post events to it.

mod build;
mod consumers;
mod events;
mod owner;
mod resources;
mod vcpus;

use thiserror::Error;
use tracing::{error, info};

pub use build::{BuildError, Machine};
pub use events::{Event, EventSender, Events};
pub use owner::OwnerError;
pub use resources::{HostResources, PrepareError};

use crate::config::ValidConfig;
use crate::kvm::VcpuFault;
use crate::memory::ram::DetachError;
use crate::memory::region::Region;

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
}

/// The guest could not be run to an end.
#[derive(Debug, Error)]
pub enum RunError {
    /// Something of the host is missing, in use or not what was asked for.
    #[error("can't start the guest")]
    Prepare(#[source] Box<PrepareError>),
    /// The VM can't be built.
    #[error("can't build the machine")]
    Build(#[source] Box<BuildError>),
    /// The owner's event loop.
    #[error("the machine's event loop failed")]
    Owner(#[from] OwnerError),
    /// Memory that a consumer does not let go of: it is neither unmapped nor used again.
    #[error("guest memory could not be taken back for a reset")]
    TakeApart(#[source] DetachError),
}

impl From<PrepareError> for RunError {
    fn from(error: PrepareError) -> Self {
        Self::Prepare(Box::new(error))
    }
}

impl From<BuildError> for RunError {
    fn from(error: BuildError) -> Self {
        Self::Build(Box::new(error))
    }
}

/// Runs a guest until it ends.
pub fn run(config: &ValidConfig) -> Result<Ending, RunError> {
    // Before anything that must be undone: from here on a signal ends the guest in order.
    let mut signals = owner::Signals::install()?;
    let (mut resources, mut regions) = HostResources::open(config)?;
    let ending = loop {
        let machine = Machine::build(config, &mut resources, regions)?;
        let (stopped, why) = machine.run(&mut resources, &mut signals);
        let (left, stuck) = stopped.take_apart();
        regions = left;
        for error in &stuck {
            error!(error = %error, "memory is not given back");
        }
        match why? {
            owner::Stop::Reset => {
                if let Some(first) = stuck.into_iter().next() {
                    return Err(RunError::TakeApart(first));
                }
                info!("reset");
            }
            owner::Stop::End(ending) => break ending,
        }
    };
    release(regions);
    Ok(ending)
}

/// The last step of each page's walk.
fn release(regions: Vec<Region>) {
    for region in regions.into_iter().rev() {
        if let Err(failure) = region.release() {
            error!(error = %failure.1, "guest memory is not given back before the process ends");
        }
    }
}
