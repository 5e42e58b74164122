//! The words that the lab and its agents exchange.
//!
//! One agent is the first process of the emulated host and runs what the lab asks for there; another is
//! the first process of a guest and answers questions from inside it. This library holds only the messages,
//! so that both ends parse one definition. It opens nothing and starts nothing.

#![forbid(unsafe_code)]

pub mod caller_protocol;
pub mod guest_protocol;
pub mod host_protocol;
pub mod pin_protocol;
pub mod removal_protocol;
