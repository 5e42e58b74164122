//! KVM memory slots: which host memory a guest-physical range is.
//!
//! A slot is the first thing a region gets and the last thing it gives back. Deleting it makes KVM drop every
//! second-level entry of the range before the ioctl returns; nothing may be unmapped before that.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use thiserror::Error;

/// A guest-physical range and the host memory behind it. All in bytes, all multiples of 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotRange {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length.
    pub size: u64,
    /// First host-virtual address.
    pub host_address: u64,
    /// The guest's stores leave KVM.
    pub read_only: bool,
}

/// Proof that a slot exists; give it back to [`MemorySlots::delete`].
#[derive(Debug)]
#[must_use = "a slot that is forgotten keeps its host memory reachable by the guest"]
pub struct SlotLease {
    slot: u32,
    range: SlotRange,
}

impl SlotLease {
    /// What the guest reaches by it.
    pub fn range(&self) -> SlotRange {
        self.range
    }
}

/// A slot could not be made or deleted.
#[derive(Debug, Error)]
pub enum SlotError {
    /// All numbers are taken.
    #[error(
        "no KVM memory slot is free: this host allows {max} per VM; use fewer or larger memory zones"
    )]
    Exhausted {
        /// `KVM_CAP_NR_MEMSLOTS` of the host.
        max: usize,
    },
    /// The kernel refused.
    #[error("KVM would not {what} memory slot {slot} (guest {:#x}, {:#x} bytes)", range.gpa, range.size)]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Slot number.
        slot: u32,
        /// The range of the slot.
        range: SlotRange,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The slot table of one VM; clones are the same table.
#[derive(Debug, Clone)]
pub struct MemorySlots {
    vm: Arc<VmFd>,
    max: usize,
    /// Index is the slot number; `None` is free.
    used: Arc<Mutex<Vec<Option<SlotRange>>>>,
}

impl MemorySlots {
    pub(super) fn new(vm: Arc<VmFd>, max: usize) -> Self {
        Self {
            vm,
            max,
            used: Arc::default(),
        }
    }

    /// Lets the guest reach `range`.
    ///
    /// The caller keeps the host memory mapped until [`MemorySlots::delete`] has succeeded: `memory::Ram` for guest
    /// memory, the window of a BAR for registers of a passed-through function.
    pub fn create(&self, range: SlotRange) -> Result<SlotLease, SlotError> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match used.iter().position(Option::is_none) {
            Some(free) => free,
            None if used.len() < self.max => {
                used.push(None);
                used.len() - 1
            }
            None => return Err(SlotError::Exhausted { max: self.max }),
        };
        let slot = u32::try_from(index).map_err(|_| SlotError::Exhausted { max: self.max })?;
        self.set("create", slot, range, range.size)?;
        used[index] = Some(range);
        Ok(SlotLease { slot, range })
    }

    /// The undo of [`MemorySlots::create`]. On failure the lease comes back and the slot is still live.
    pub fn delete(&self, lease: SlotLease) -> Result<(), (SlotLease, SlotError)> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        match self.set("delete", lease.slot, lease.range, 0) {
            Ok(()) => {
                used[lease.slot as usize] = None;
                Ok(())
            }
            Err(error) => Err((lease, error)),
        }
    }

    fn set(
        &self,
        what: &'static str,
        slot: u32,
        range: SlotRange,
        size: u64,
    ) -> Result<(), SlotError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if range.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: range.gpa,
            memory_size: size,
            userspace_addr: range.host_address,
        };
        // SAFETY: the range is guest memory or registers that nothing in this process holds a Rust reference into, and
        // who creates a slot keeps it mapped until after it is deleted (a size of 0 deletes). KVM checks that the addresses are user addresses of this process.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| SlotError::Refused {
            what,
            slot,
            range,
            source: io::Error::from(e),
        })
    }
}
