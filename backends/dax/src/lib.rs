//! Find, check, lock and map device-dax memory.
//!
//! The kernel is permissive where it hurts: it maps `/dev/daxX.Y` past the end and answers the first touch with
//! SIGBUS, it answers a wrong alignment with a bare `EINVAL`, and it lets any number of processes map the same
//! bytes. This crate checks first and names what is wrong together with the command that mends it.
//!
//! The stages are types, so that an unchecked or unlocked mapping can't be written down:
//!
//! ```text
//! Host --open--> DaxDevice --range--> DaxRange --lock--> RangeLock --map--> DaxMapping
//!                                                            ^                  |
//!                                                            +------unmap-------+
//! ```
//!
//! A [`DaxMapping`] owns its [`RangeLock`], which owns a share of the open device: the order munmap, unlock, close
//! is by construction.
//!
//! # Invariants
//! - A device is opened only after sysfs has said that it is a dax device with the `device_dax` driver bound.
//! - Every [`DaxRange`] is a non-empty, aligned part of the device it was made by.
//! - Every mapping is shared, starts at an address that is a multiple of the device's alignment, and was readable
//!   at both ends when it was handed out.
//!
//! A [`Pool`] is devices of which anybody takes what is free: it gives a [`RangeLock`], the first that fits.
//!
//! [`Watch`] tells when a device that is mapped goes away without notice; [`sigbus`] survives a touch of what is gone, and
//! [`loss`] says then what may be believed of what was read.
//!
//! # Not here
//! No hugetlb or anonymous memory, no pins, and nothing that changes the host: the one write
//! to sysfs is `deep_flush` ([`Flusher`]), and no byte of a device is written but by [`DaxMapping::zero`].
//!
//! # Example
//! ```no_run
//! use daxhund_dax::{Host, LockKind};
//! use std::path::Path;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let host = Host::system();
//! for facts in host.devices()? {
//!     println!("{}: {} bytes, align {}", facts.name, facts.size_bytes, facts.align_bytes);
//! }
//! let device = host.open(Path::new("/dev/dax0.0"))?;
//! let range = device.range(None, Some(1 << 30))?;
//! let mapping = device.lock(range, LockKind::Exclusive)?.map()?;
//! assert_eq!(mapping.as_ptr() as u64 % device.facts().align_bytes, 0);
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

mod classify;
mod device;
mod enumerate;
mod file_lock;
mod holder;
mod host;
pub mod incidents;
mod lock;
pub mod loss;
mod mapping;
mod ofd;
mod open;
mod pages;
mod persistence;
mod pool;
mod range;
mod room;
pub mod sigbus;
mod size;
mod sysfs;
#[cfg(test)]
mod testing;
mod uevent;
mod watch;
mod zero;

pub use classify::{ClassifyError, FileBacking, NotDaxKind, PathKind};
pub use device::{
    BadDeviceName, DeviceFacts, DeviceName, DeviceNumber, Driver, MapLocation, Mode, PhysRange,
    RegionFacts, RegionKind,
};
pub use file_lock::FileLockError;
pub use holder::Holder;
pub use host::Host;
pub use lock::{LockError, LockKind, RangeLock, ReleaseError};
pub use mapping::{DaxMapping, MapError, Probe, ProbeError, UnmapError};
pub use open::{DaxDevice, OpenError, is_for_writing};
pub use pages::Pages;
pub use persistence::{Flusher, FlusherError, PersistenceDomain};
pub use pool::{Member, Miss, Pool, PoolError, Wanted, Why};
pub use range::{Asked, DaxRange, RangeError};
pub use room::{Room, RoomError, Taken};
pub use size::ByteSize;
pub use sysfs::SysfsError;
pub use watch::{Lost, Pace, Sign, Unheard, Watch, WatchError, WatchId};
pub use zero::ZeroError;
