//! The host bridge in slot 0 of every segment. Without one, Linux finds no way to configuration space and says so at
//! every boot. It has no register that can be written.

use super::{BarChange, Class, ConfigSpace, Function, Identity};

const VENDOR_INTEL: u16 = 0x8086;
/// What other VMMs of this family call theirs.
const DEVICE_VIRTUAL_HOST_BRIDGE: u16 = 0x0d57;
const CLASS_HOST_BRIDGE: Class = Class {
    base: 0x06,
    sub: 0x00,
    interface: 0x00,
};

/// A host bridge.
#[derive(Debug)]
pub(super) struct HostBridge(ConfigSpace);

impl HostBridge {
    pub(super) fn new() -> Self {
        Self(ConfigSpace::new(&Identity {
            vendor: VENDOR_INTEL,
            device: DEVICE_VIRTUAL_HOST_BRIDGE,
            revision: 0,
            class: CLASS_HOST_BRIDGE,
            subsystem_vendor: 0,
            subsystem: 0,
        }))
    }
}

impl Function for HostBridge {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.0.read(register, data);
    }

    fn config_write(&self, _register: u16, _data: &[u8]) -> Vec<BarChange> {
        Vec::new()
    }

    fn bars(&self) -> Vec<BarChange> {
        Vec::new()
    }

    fn bar_read(&self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
}
