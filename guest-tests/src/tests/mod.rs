//! The guest tests: stories of a user's, observed from inside the guest and on the emulated host.
//!
//! A test gets a host that is up and leaves it as it found it; files go to [`crate::suite::SCRATCH`]. What it starts it
//! may simply drop. Every wait has a deadline; nothing sleeps.

mod add_back;
mod api;
mod blk;
mod boot;
mod callers;
mod consoles;
mod drain;
mod exposure;
mod generic_vhost_user;
mod guard;
mod host;
mod hostile;
mod hotplug;
mod interrupt;
mod net;
mod passthrough;
mod pci;
mod peer_ram;
mod persistence;
mod pmem;
mod poison;
mod pools;
mod power;
mod processors;
mod remote;
mod removal;
mod served_disk;
mod shared_range;
mod small_devices;
pub mod soak;
mod start_errors;
mod support;
mod vhost_fs;
mod vhost_net;
mod vhost_pmem;
mod vhost_user;

use std::sync::Arc;

use crate::bench::boot::MeasureError;
use crate::guest::GuestError;
use crate::host::Host;
use crate::host::channel::HostError;
use crate::host::figures::FiguresError;
use crate::host::qmp::QmpError;
use crate::provision::kernel::Kernel;
use crate::provision::lab_kernel;
use crate::setup::{Setup, StartError};

/// What a test works with.
#[derive(Debug)]
pub struct Lab {
    /// The emulated host.
    pub host: Host,
    /// Its kernel, which is also the guests' unless a test says otherwise.
    pub kernel: Kernel,
    /// Whether long repeat counts are wanted.
    pub full: bool,
    /// What further hosts are booted from.
    pub setup: Arc<Setup>,
}

/// A test.
#[derive(Clone, Copy, Debug)]
pub struct GuestTest {
    /// Says what is so when it passes.
    pub name: &'static str,
    /// Does it.
    pub run: fn(&mut Lab) -> Result<(), TestError>,
}

/// Why a test fails.
#[derive(Debug, thiserror::Error)]
pub enum TestError {
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// What KVM tells of a guest.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// Figures about a VMM.
    #[error(transparent)]
    Figures(#[from] FiguresError),
    /// Another host.
    #[error(transparent)]
    Start(#[from] StartError),
    /// QEMU's monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// What should be so is not.
    #[error("{0}")]
    Claim(String),
}

/// Fails the test with what `message` gives unless `holds`.
pub fn claim(holds: bool, message: impl FnOnce() -> String) -> Result<(), TestError> {
    if holds {
        Ok(())
    } else {
        Err(TestError::Claim(message()))
    }
}

/// Every test for a kernel of this name, in the order in which they run. What only the lab's own kernel can do is tested on no other.
pub fn all(kernel: &str) -> Vec<GuestTest> {
    let iommufd = if kernel == lab_kernel::NAME {
        passthrough::iommufd_tests()
    } else {
        Vec::new()
    };
    [
        host::TESTS.to_vec(),
        interrupt::TESTS.to_vec(),
        boot::TESTS.to_vec(),
        power::TESTS.to_vec(),
        pools::TESTS.to_vec(),
        consoles::TESTS.to_vec(),
        start_errors::TESTS.to_vec(),
        pci::TESTS.to_vec(),
        pmem::TESTS.to_vec(),
        removal::TESTS.to_vec(),
        drain::TESTS.to_vec(),
        poison::TESTS.to_vec(),
        exposure::TESTS.to_vec(),
        add_back::TESTS.to_vec(),
        persistence::TESTS.to_vec(),
        blk::TESTS.to_vec(),
        served_disk::TESTS.to_vec(),
        shared_range::TESTS.to_vec(),
        vhost_user::TESTS.to_vec(),
        generic_vhost_user::TESTS.to_vec(),
        vhost_fs::TESTS.to_vec(),
        vhost_net::TESTS.to_vec(),
        vhost_pmem::TESTS.to_vec(),
        net::TESTS.to_vec(),
        small_devices::TESTS.to_vec(),
        hotplug::TESTS.to_vec(),
        api::TESTS.to_vec(),
        processors::TESTS.to_vec(),
        callers::TESTS.to_vec(),
        hostile::TESTS.to_vec(),
        guard::tests(),
        passthrough::tests(kernel),
        iommufd,
    ]
    .concat()
}
