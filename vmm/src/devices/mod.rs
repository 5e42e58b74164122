//! The few devices a PC has without a PCI bus: serial port, clock, power control, and the sockets of its processors.
//!
//! Each is a [`crate::bus::BusDevice`] over one folder-flat file: registers on top, what they do below, tests last.
//! What a device wants of the machine it says through a closure given at construction; none knows the machine.

pub mod cmos;
pub mod console;
pub mod places;
pub mod power;
pub mod processors;
pub mod serial;
