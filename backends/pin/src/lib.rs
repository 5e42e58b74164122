//! Makes memory reachable by devices of the host and holds it there: long-term pins through VFIO.

#![deny(unsafe_code)]

mod function;
mod mapper;

pub use function::{HostFunction, IrqInfo, IrqKind, Region, RegionIndex, RegionMapping};
pub use mapper::{DmaFacts, DmaLease, DmaMapper, DmaMemory, DmaRequest, MapError, UnmapError};
