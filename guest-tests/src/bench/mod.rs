//! Measurements, and how they are told.

pub mod boot;
pub mod peer;
pub mod statistics;
pub mod trace;
