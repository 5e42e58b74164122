//! Persistent memory that a daemon owns and lends to one guest after the other, over vhost-user.
//!
//! ```text
//!   frontend (a VMM) ──unix socket──▶ Daemon ──one at a time──▶ session: Backend
//!       │  ▲                             │                         │  │ flush requests, by the guest's queue
//!       │  └── SHMEM_MAP: the range ─────┼─────────────────────────┘  ▼
//!       ▼      as an open file           ▼                          Lender: the range, its lock, what a flush is
//!   maps it for its guest              signals, removals
//! ```
//! The guest loads and stores by itself: no byte of the memory passes through here, and this process does not touch it. It
//! says where the memory is (a shared memory region of the device, which the frontend maps), and makes it durable when the
//! guest asks.
//!
//! # Invariants
//! - What is lent is locked by the open file description that is lent: as long as a frontend has it mapped it is locked,
//!   whatever becomes of this daemon ([`lender`]).
//! - A range that a frontend has kept is lent to nobody else: one that shows that it has it is served again.
//! - "Done" is said only after a flush that began after the request was seen, and never of memory that is gone.
//! - A removal that the guard holds is answered when nobody has a part of the range mapped: neither this process nor one that it
//!   was lent to ([`daemon`]).
//! - Nothing that a frontend or a guest sends is believed before it is checked.
//!
//! # Not here
//! Several guests that write (a daemon for each range does that), migration.

#![forbid(unsafe_code)]

pub mod args;
pub mod backend;
pub mod config;
pub mod daemon;
pub mod lender;
pub mod metrics;
