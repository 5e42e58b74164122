//! What daemons have in common that serve a virtio device over vhost-user, one frontend after the other.
//!
//! - [`socket`]: where frontends connect; - [`session`]: one connection, with threads of its own, and its bounded end;
//! - [`guest`]: the memory that a frontend shares, which can go away; - [`source`]: what is served, as it is typed;
//! - [`events`]: what such a daemon waits for; - [`program`]: what is around it;
//! - [`policy`]: what it is told besides; - [`removal`]: the host wants the device back; - [`seccomp`]: which system calls it makes;
//! - [`event`], [`metrics`]: what happens and how much.
//!
//! What is a device's own, and the loop over all of it, is each daemon's.

#![deny(unsafe_code)]

pub mod event;
pub mod events;
pub mod guest;
pub mod metrics;
pub mod policy;
pub mod program;
pub mod removal;
pub mod seccomp;
pub mod session;
pub mod socket;
pub mod source;
#[cfg(feature = "testing")]
pub mod testing;
