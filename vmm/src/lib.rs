//! daxhund: a virtual machine monitor whose guest memory is device-dax.
//!
//! The binary is a thin `main` over this library. Start reading at [`machine`]; ARCHITECTURE.md tells the walks of a
//! page of RAM and of a device through these modules.

#![deny(unsafe_code)]

pub mod acpi;
pub mod api;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod config;
pub mod devices;
pub mod doctor;
#[cfg(test)]
mod documents;
pub mod guard;
pub mod host_config;
#[allow(unsafe_code, reason = "takes over descriptors by their number")]
pub mod inherited;
#[allow(unsafe_code, reason = "wraps the KVM system calls")]
pub mod kvm;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod monitor;
pub mod pci;
pub mod pool;
pub mod remote;
pub mod vfio;
pub mod virtio;

pub use daxhund_guard::chain;
