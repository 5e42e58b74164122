//! Virtio 1.x devices: what the guest's own drivers drive.
//!
//! ```text
//!   vCPU threads                               a worker thread for each group of queues
//!   ────────────                               ────────────────────────────────────────
//!   configuration, status ──▶ transport ──activate──▶ worker::Crew { device's Worker }
//!   doorbell write ──▶ KVM ioeventfd ───────────────▶ Queue::kick   ─▶ chains served
//!                      KVM irqfd ◀── MSI-X vector ◀── Queue::notify ◀─ used ring
//! ```
//! Every device is a folder of one shape: `mod.rs` has the [`Device`] (what it is: features, configuration space, what
//! it takes from the host), `worker.rs` the [`Worker`] (how its queues are served), further files the nouns it needs.
//! Learning one teaches all.
//!
//! Invariants:
//! - The driver is not trusted. A descriptor chain may point anywhere, loop, or change while it is read; what is wrong
//!   with it is an error to that device only.
//! - No queue is served on a vCPU thread. A vCPU that touches a register returns at once.
//! - Guest memory is reached through a snapshot of `GuestView` taken for one batch of work and dropped after it, so
//!   that memory can be taken away from the guest; never by a Rust reference.
//! - Memory can be lost while it is read, and then what is read is scratch. Nothing comes of a chain before all of it was
//!   read and [`Queue::is_torn`] has said no; system calls get addresses behind which there is never scratch
//!   ([`crate::memory::snapshot`]).
//! - A reset at any moment is answered: the status register reads 0 only when no worker touches guest memory any more.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
#[cfg(test)]
mod loss;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
pub mod transport;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

pub use device::{ActivateError, Activation, Device, Kind, Signals};
pub use queue::{Queue, QueueError};
pub use worker::{Crew, Worker};
