//! The lab: an emulated host with device-dax memory, an IOMMU and KVM, on which real guests run.
//!
//! No machine that builds this project needs any of these. QEMU emulates a host ("L1") without hardware help; daxhund runs on that host's
//! real Linux kernel, real KVM and real device-dax memory, and its guest is "L2".
//!
//! ```text
//! provision: packages ──> image: initramfs ──> host: QEMU + agent ──> guest: VMM + agent ──> tests, demo, bench
//! ```
//! It listens on no network, needs no rights beyond installing QEMU, and leaves no process behind.

#![deny(unsafe_code)]

pub mod artifacts;
pub mod bench;
pub mod child;
pub mod cli;
pub mod command;
pub mod demo;
pub mod guest;
pub mod host;
pub mod image;
pub mod progress;
pub mod provision;
pub mod served;
pub mod setup;
pub mod share;
pub mod shell;
pub mod signals;
pub mod suite;
pub mod tests;
pub mod wait;
