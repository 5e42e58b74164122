//! Makes memory reachable by devices of the host and holds it there: long-term pins through VFIO.
//!
//! VFIO says no with bare numbers, and yes where it should have asked: it pins until a limit is hit, and a pin that is left
//! behind when the memory goes can damage the host. This crate asks first, names what is wrong together with the command
//! that mends it, and makes who holds what visible.
//!
//! ```text
//! Host --locate--> PciFunction --attach--> VfioFunction      registers, interrupts, reset
//!                                 |
//!                            AddressSpace                    type1 container, or iommufd
//!                                 |
//!                       map(DmaRequest) -> DmaLease          pinned until unmap(DmaLease)
//! ```
//!
//! # Invariants
//! - A function is opened only after sysfs has said that VFIO has it and that its group is not the host's.
//! - Memory is mapped with one call, and unmapped with one call of the same range, after the checks of [`Limits`] and
//!   [`MemlockAccount`].
//! - What fails releases what it had taken. An unmap that is refused gives the lease back.
//! - Device file, group, container are closed in this order.
//!
//! # Who comes first
//! A function is attached before memory is mapped: its IOMMU decides what can be. To take it away: KVM forgets its file
//! ([`VfioFunction::kvm_file`]), mappings of its registers go, memory is unmapped if it was the last, then
//! [`AddressSpace::detach`]. Host memory is unmapped, and its file closed, only after its lease has been taken back.
//!
//! # Not here
//! Nothing of the guest. No host memory is mapped, no driver is bound, and no limit is raised: the messages say how.
//!
//! # Example
//! ```no_run
//! use daxhund_pin::{AddressSpace, DmaMapper, DmaMemory, DmaRequest, Host, SpaceKind, map_all, unmap_all};
//! use std::path::Path;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (host_address, size) = (0x7f00_0000_0000, 1 << 30);
//! let host = Host::system();
//! let function = host.locate(Path::new("/sys/bus/pci/devices/0000:01:00.0"))?;
//! let space = AddressSpace::open(SpaceKind::Type1, host)?;
//! let device = space.attach(&function)?;
//! let zone = DmaRequest {
//!     name: "zone z0",
//!     iova: 0,
//!     host_address,
//!     size,
//!     memory: DmaMemory::DeviceDax,
//! };
//! let leases = map_all(&space, &[zone], &mut |progress| {
//!     println!("{} of {} bytes", progress.done_bytes, progress.total_bytes);
//! })?;
//! assert_eq!(space.facts().pinned_bytes, size);
//!
//! let stuck = unmap_all(&space, leases);
//! assert!(stuck.is_empty());
//! space.detach(device)?;
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

mod address;
mod attach;
mod caps;
mod checks;
mod function;
mod holder;
mod host;
mod iommufd;
mod ledger;
mod limits;
mod locate;
mod map_all;
mod mapper;
mod memlock;
mod node;
mod pages;
mod progress;
mod size;
mod space;
mod sys;
#[cfg(test)]
mod testing;
mod type1;
mod vfio;

pub use address::{BadAddress, PciAddress};
pub use attach::{AttachError, DetachError};
pub use function::{HostFunction, IrqInfo, IrqKind, Region, RegionIndex, RegionMapping};
pub use holder::Holder;
pub use host::Host;
pub use iommufd::Iommufd;
pub use limits::{Hole, IovaRange, Limits};
pub use locate::{LocateError, PciFunction, Sibling};
pub use map_all::{MapAllError, map_all, unmap_all};
pub use mapper::{DmaFacts, DmaLease, DmaMapper, DmaMemory, DmaRequest, MapError, UnmapError};
pub use memlock::{AccountError, MemlockAccount, Shortage};
pub use node::NodeError;
pub use progress::Progress;
pub use size::ByteSize;
pub use space::{AddressSpace, OpenError, SpaceFacts, SpaceKind};
pub use type1::Type1;
pub use vfio::VfioFunction;
