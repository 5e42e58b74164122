//! A virtio disk that is a range of device-dax memory, or a file, served over vhost-user.
//!
//! ```text
//!   frontend (a VMM) ──unix socket──▶ Daemon ──one at a time──▶ session (vhost-user-backend)
//!       │                               │                          │ memory, rings, doorbells
//!       │ guest memory, doorbells       │ signals,                 ▼
//!       └───────────────────────────┐   │ removals    Backend: a thread for each queue
//!                                   ▼   ▼                          │
//!                              GuestMemory ◀──Chain, Request──▶ serve ──▶ Disk (DaxDisk, FileDisk)
//! ```
//! Requests come from a guest and messages from a frontend; neither is trusted. A chain is read once ([`daxhund_virtio_blk`]), what it
//! asks is checked against the disk ([`request`]), and only then is anything done ([`serve`]).
//!
//! # Invariants
//! - Guest memory and the disk's memory can go away under any access. Nothing that was read of either is passed on before a
//!   look at its mark ([`daxhund_dax::loss`]): no scratch byte is written to the disk, and a read that met scratch fails.
//! - A worker holds the guest's memory (a lock, for reading) for one batch of requests. Who takes the lock for writing has
//!   seen every batch end: so memory that is taken back is unmapped before the frontend is answered, and a ring is stopped
//!   only when nothing of it is under way.
//! - Requests of one queue are done one after the other, and each is answered before the next is taken. A frontend that
//!   connects again goes on at the used index, and nothing is lost or done twice.
//! - A disk's range is locked before it is mapped and as long as it is served.
//! - A removal that the guard holds is answered when nothing here maps the device or has it open ([`daxhund_vhost_user::removal`]).
//!
//! # Not here
//! In-flight tracking (there is nothing in flight when a queue stops), migration.

#![deny(unsafe_code)]

pub use daxhund_vhost_user::{guest, socket};

pub mod args;
pub mod backend;
pub mod config;
pub mod daemon;
pub mod disk;
pub mod metrics;
pub mod request;
pub mod serve;
pub mod space;
