//! What a PCI function that VFIO lends to this process can be asked (`linux/vfio.h`). A fake implements it in tests.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// One of the regions of a VFIO PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RegionIndex {
    /// BAR by its first register, 0 to 5.
    Bar(u8),
    /// Expansion ROM.
    Rom,
    /// Configuration space.
    Config,
}

/// What a region offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Length in bytes; a BAR's is a power of two.
    pub size: u64,
    /// `VFIO_REGION_INFO_FLAG_READ`.
    pub readable: bool,
    /// `VFIO_REGION_INFO_FLAG_WRITE`.
    pub writable: bool,
    /// What of it can be mapped, in ascending order, whole pages; the whole region where there are no sparse areas.
    pub mappable: Vec<Range<u64>>,
    /// `VFIO_REGION_INFO_CAP_MSIX_MAPPABLE`: the part with the MSI-X table can be mapped too.
    pub msix_mappable: bool,
}

/// A kind of interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IrqKind {
    /// Level-triggered pin, masked by the host each time it fires.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
    /// The device reports an unrecoverable error.
    Error,
    /// The host wants the device back.
    Request,
}

/// What a kind of interrupt offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqInfo {
    /// Number of vectors; 0: the function has none of this kind.
    pub count: u32,
    /// `VFIO_IRQ_INFO_NORESIZE` is clear: vectors can be added while others are in use.
    pub resizable: bool,
}

/// A part of a region, mapped into this process until it is dropped.
pub trait RegionMapping: fmt::Debug + Send + Sync {
    /// First host address, page-aligned.
    fn host_address(&self) -> u64;
    /// Length in bytes.
    fn size(&self) -> u64;
}

/// A PCI function in this process's hands. Called from any thread. None of the methods panics when the device is gone:
/// they give an error.
pub trait HostFunction: fmt::Debug + Send + Sync {
    /// Facts of a region; `None`: the function has none there.
    fn region(&self, index: RegionIndex) -> Option<&Region>;
    /// Reads all of `data`; on an error `data` is all ones.
    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data`.
    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Maps a part of a region that is mappable.
    fn map(&self, index: RegionIndex, part: Range<u64>) -> io::Result<Box<dyn RegionMapping>>;
    /// Facts of a kind of interrupt.
    fn irq(&self, kind: IrqKind) -> IrqInfo;
    /// From now on vectors `start..start + events.len()` write these events (`None`: nothing). The first call of a kind
    /// enables it in the device; one kind of `INTx`, MSI and MSI-X can be enabled at a time.
    fn set_irqs(
        &self,
        kind: IrqKind,
        start: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()>;
    /// Disables all vectors of a kind.
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()>;
    /// `INTx` only: each write of `event` unmasks it in the host (`VFIO_IRQ_SET_ACTION_UNMASK` with an event).
    fn unmask_intx_by(&self, event: BorrowedFd<'_>) -> io::Result<()>;
    /// Resets the function (`VFIO_DEVICE_RESET`, else a hot reset of its bus where everybody on it is ours).
    fn reset(&self) -> io::Result<()>;
    /// Whether the function can be reset at all.
    fn can_reset(&self) -> bool;
}
