//! What a passed-through function needs of KVM, as narrow as it goes; the machine brings it.

use std::error::Error;
use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::pci::MsiRoutes;

/// Why a window can't be mapped or unmapped.
pub type WindowError = Box<dyn Error + Send + Sync>;

/// A part of a BAR that the guest is to reach without leaving guest mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window<'a> {
    /// Name in messages: the function and the BAR.
    pub name: &'a str,
    /// Guest-physical address, page-aligned.
    pub gpa: u64,
    /// Where this process has it mapped, page-aligned.
    pub host_address: u64,
    /// Length in bytes, whole pages.
    pub size: u64,
}

/// Proof that a window is mapped; goes back to [`BarWindows::unmap`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a lease that is forgotten leaves the guest in registers that may be somebody else's"]
pub struct WindowLease {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Whatever the lender finds it by.
    pub token: u64,
}

/// Puts BARs into the guest's address space, where other passed-through devices may reach them too.
pub trait BarWindows: Send + Sync {
    /// From now on the guest's accesses go to the registers. On an error none does.
    ///
    /// The caller keeps the host mapping until [`BarWindows::unmap`] has succeeded.
    fn map(&self, window: &Window<'_>) -> Result<WindowLease, WindowError>;
    /// The undo. On an error the lease comes back and the window counts as mapped.
    fn unmap(&self, lease: WindowLease) -> Result<(), (WindowLease, WindowError)>;
}

/// The vectors of a function, MSI or MSI-X, each with the event that VFIO writes.
///
/// While a vector has no route KVM does not listen to its event, so what the device raises stays in the event's count: that
/// is what is pending. Masking a vector never asks VFIO for anything.
pub trait Vectors: MsiRoutes {
    /// The event of a vector, which does not block when it is read; `None`: there is no such vector.
    fn event(&self, vector: u16) -> Option<&EventFd>;
}

/// A level-triggered pin of the guest's interrupt controller, with a resample event.
pub trait Intx: Send + Sync {
    /// From now on a write to `trigger` raises the pin; when the guest has acknowledged it, the pin is lowered and
    /// `resample` is written.
    fn connect(&self, trigger: &EventFd, resample: &EventFd) -> io::Result<()>;
    /// The undo. The pin is low afterwards.
    fn disconnect(&self, trigger: &EventFd) -> io::Result<()>;
}
