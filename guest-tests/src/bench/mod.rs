//! Measurements, and how they are told.

pub mod boot;
pub mod devices;
pub mod peer;
pub mod pin;
pub mod removal;
mod results;
pub mod rounds;
pub mod statistics;
pub mod trace;
pub mod vhost;
