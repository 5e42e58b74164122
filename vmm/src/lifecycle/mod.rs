//! Pure state machines: events in, actions out. No descriptor, no clock, no thread; time is passed in.

#![forbid(unsafe_code)]

pub mod region;
#[cfg(test)]
mod simulation;
pub mod slot;
pub mod vcpus;
