//! Guest memory: from a zone in the configuration to a page every consumer can reach, and back.
//!
//! The walk of one page of RAM, file by file:
//! 1. [`zone`]: a configured zone is opened and checked, or taken of one of the host's [`pools`]; nothing is built on it yet.
//! 2. [`layout`]: pure arithmetic gives each zone its guest-physical ranges.
//! 3. [`mapping`] and `daxhund-dax`: each range is locked and mapped at an address with the alignment it needs.
//! 4. [`region`]: mapping and guest-physical address become one thing.
//! 5. [`ram`]: the region is attached to every consumer in order, detached in reverse, and released.
//!
//! Persistent memory walks the same way from step 3 on; [`pmem`] is its step 1.
//! [`report`] is what of a region is told to those who ask.
//! [`dma`] says whether passed-through devices reach a region.
//! [`tombstones`] are where memory was that the host took away.
//! Devices of this process reach what is attached through a [`snapshot`].
//! [`loss`] says whether a region is still there, [`sigbus`] survives a touch when it is not (both are `daxhund-dax`'s);
//! [`poison`] remembers.
//! [`discard`] gives pages back that the guest does not use, where nothing is lost by it.

#[allow(unsafe_code, reason = "wraps madvise")]
pub mod discard;
pub mod dma;
pub mod layout;
#[allow(unsafe_code, reason = "wraps mmap and its kin")]
pub mod mapping;
pub mod pmem;
pub mod poison;
pub mod pools;
pub mod ram;
#[allow(unsafe_code, reason = "hands a mapping to vm-memory")]
pub mod region;
pub mod report;
pub mod snapshot;
#[cfg(test)]
pub(crate) mod testing;
pub mod tombstones;
pub mod zone;

pub use daxhund_dax::{incidents, loss, sigbus};
