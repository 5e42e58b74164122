//! What a PCI function is to the bus.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// A change of where a BAR answers, caused by a write to configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarChange {
    /// Which BAR, by its first register: 0 to 5; [`ROM_BAR`](super::ROM_BAR) is the expansion ROM.
    pub bar: u8,
    /// Length in bytes, a power of two.
    pub size: u64,
    /// Where it answered until now; `None` when it did not.
    pub old: Option<u64>,
    /// Where it answers from now on; `None` when it does not.
    pub new: Option<u64>,
}

/// One function in a slot. Called from vCPU threads, several at a time except where it says otherwise; it guards
/// itself and returns at once.
pub trait Function: Send + Sync {
    /// Reads configuration space; `register` + `data.len()` is at most 4096 and `data` is 1, 2 or 4 bytes.
    fn config_read(&self, register: u16, data: &mut [u8]);

    /// Writes configuration space and tells which BARs moved by it. The bus serialises the writes of one segment and
    /// has moved the BARs before the next one.
    fn config_write(&self, register: u16, data: &[u8]) -> Vec<BarChange>;

    /// Where its BARs answer now.
    fn bars(&self) -> Vec<BarChange>;

    /// The bus has moved a BAR as [`Function::config_write`] said (or let go of it: `new` is `None`): connect and
    /// disconnect what depends on the address. Serialised with configuration writes.
    fn bar_moved(&self, change: BarChange) {
        let _ = change;
    }

    /// A load from a BAR. `data` starts as all ones.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// A store to a BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
}

/// What an MSI-X table entry says: a memory write that is an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// The host's side of a function's MSI-X vectors: KVM routes, or a fake. One for each function.
pub trait MsiRoutes: Send + Sync {
    /// From now on, `vector` is this message; `None`: it is masked and must not reach the guest. What was signalled
    /// while masked is delivered when it is unmasked.
    fn set(&self, vector: u16, message: Option<MsiMessage>);
    /// Raises `vector` from this side; while it is masked, it stays pending.
    fn signal(&self, vector: u16);
    /// Whether `vector` was signalled while masked.
    fn is_pending(&self, vector: u16) -> bool;
    /// What raises `vector` when it is written, for another process; `None`: there is no such vector.
    fn event_of(&self, vector: u16) -> io::Result<Option<EventFd>> {
        let _ = vector;
        Ok(None)
    }
}
