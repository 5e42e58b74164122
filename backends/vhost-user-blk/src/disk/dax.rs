//! A range of device-dax memory as a disk.
//!
//! ```text
//!   DaxDisk::open ──▶ served ──touch of what is gone──▶ marked: every request fails
//!                       │                                  │
//!                       └──────── release ◀────────────────┘   unmapped, unlocked, closed: nothing of the device is kept
//!                                    └── munmap fails: kept, not used, and tried again by the next release
//! ```
//! The host may take the device away at any time, and does not wait for whoever has it mapped. Until the mapping and the
//! descriptor are gone the memory can't safely come back, so they go as soon as it is known ([`DaxDisk::release`]).

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use daxhund_dax::loss::{LossMark, Lost};
use daxhund_dax::sigbus::GuardError;
use daxhund_dax::{
    DaxDevice, DaxMapping, Flusher, FlusherError, Host, LockError, LockKind, MapError, OpenError,
    RangeError, UnmapError, Watch, WatchError, WatchId,
};
use daxhund_guard::{Guard, HoldError};
use thiserror::Error;
use vm_memory::VolatileSlice;

use super::mapped::Mapped;
use super::{Disk, ID_LEN, serial};

/// Small enough to stay in the first level of cache between the guest and the disk.
const CHUNK: usize = 16 << 10;
/// How long other work waits for a range that is zeroed, at most.
const ZEROED_AT_ONCE: usize = 1 << 20;

/// A range of device-dax memory is no disk.
#[derive(Debug, Error)]
pub enum OpenDaxError {
    /// Not a usable device.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The range is not in the device.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Somebody else has it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// It can't be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A flush can't be made.
    #[error(transparent)]
    Flusher(#[from] FlusherError),
    /// Nothing would survive its going away.
    #[error(transparent)]
    Guard(#[from] GuardError),
}

/// A disk.
#[derive(Debug)]
pub struct DaxDisk {
    /// As in `dax1.0`.
    device: String,
    len: u64,
    read_only: bool,
    serial: [u8; ID_LEN],
    mark: LossMark,
    /// Held for reading by a worker for one copy.
    memory: RwLock<Memory>,
    flusher: Flusher,
}

/// What there is of the device.
#[derive(Debug)]
enum Memory {
    /// It can be used.
    There(Mapped),
    /// Not used any more, and the kernel does not unmap it.
    Stuck(DaxMapping),
    /// Nothing.
    Gone,
}

impl Memory {
    fn usable(&self) -> Option<&Mapped> {
        match self {
            Self::There(mapped) => Some(mapped),
            Self::Stuck(_) | Self::Gone => None,
        }
    }
}

impl DaxDisk {
    /// Opens, locks and maps a range (offset and size). A disk that is only read shares it with others that only read.
    pub fn open(
        host: &Host,
        path: &Path,
        (offset, size): (Option<u64>, Option<u64>),
        read_only: bool,
    ) -> Result<Self, OpenDaxError> {
        let device = host.open(path)?;
        let range = device.range(offset, size)?;
        let kind = if read_only {
            LockKind::Shared
        } else {
            LockKind::Exclusive
        };
        let mapping = device.lock(range, kind)?.map()?;
        let flusher = flusher(&device)?;
        let mark = LossMark::new();
        let name = format!("{}@{:x}", device.facts().name, range.offset());
        Ok(Self {
            device: device.facts().name.to_string(),
            len: range.len(),
            read_only,
            serial: serial(&name),
            memory: RwLock::new(Memory::There(Mapped::new(mapping, mark.clone())?)),
            mark,
            flusher,
        })
    }

    /// Has the device watched; `None` when it is gone already.
    pub fn watch(&self, by: &mut Watch) -> Result<Option<WatchId>, WatchError> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        let mapped = memory.usable();
        mapped.map(|mapped| by.add(mapped.mapping())).transpose()
    }

    /// Has removals of the device held; `None` when it is gone already.
    pub fn hold(&self, by: &mut Guard, answer_within: Duration) -> Option<Result<(), HoldError>> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        let node = memory.usable()?.mapping().file().as_fd();
        Some(by.hold(&self.device, node, answer_within))
    }

    /// The device's name, as in `dax1.0`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Whether a touch has found out that the memory is gone.
    pub fn is_lost(&self) -> bool {
        self.mark.is_lost()
    }

    /// Lets go of the device: requests fail from now on. Waits for copies that are under way, each of at most a request. When it
    /// returns `Ok` nothing maps the device or has it open here; when not, it can be tried again.
    pub fn release(&self) -> Result<(), UnmapError> {
        self.mark.lose();
        let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        let mapping = match std::mem::replace(&mut *memory, Memory::Gone) {
            Memory::There(mapped) => mapped.into_mapping(),
            Memory::Stuck(mapping) => mapping,
            Memory::Gone => return Ok(()),
        };
        match mapping.unmap() {
            // The lock ends with the descriptor, whose last user it is.
            Ok(lock) => drop(lock),
            Err((mapping, error)) => {
                *memory = Memory::Stuck(mapping);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Does something with the memory, if it is there before and after.
    fn with(&self, copy: impl FnOnce(&Mapped) -> Result<(), Lost>) -> io::Result<()> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        let there = memory.usable().filter(|_| !self.mark.is_lost());
        there.ok_or(Lost).and_then(copy).map_err(io::Error::other)
    }
}

fn flusher(device: &DaxDevice) -> Result<Flusher, FlusherError> {
    let flusher = Flusher::new(device)?;
    if let Some(warning) = flusher.warning() {
        tracing::warn!("{warning}");
    }
    Ok(flusher)
}

impl Disk for DaxDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn physical_block(&self) -> u32 {
        4096
    }

    fn chunk(&self) -> usize {
        CHUNK
    }

    fn serial(&self) -> [u8; ID_LEN] {
        self.serial
    }

    fn read(&self, offset: u64, into: &[VolatileSlice<'_>], _: &mut [u8]) -> io::Result<()> {
        self.with(|mapped| mapped.read(offset, into))
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.with(|mapped| mapped.write(offset, from))
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let now = usize::try_from(len - done).map_or(ZEROED_AT_ONCE, |n| n.min(ZEROED_AT_ONCE));
            self.with(|mapped| mapped.zero(offset + done, now))?;
            done += now as u64;
        }
        Ok(())
    }

    /// Nothing: the memory is the guest's, whether it uses it or not, and what it did not ask to be zeroed stays.
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        self.with(|_| Ok(()))
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|_| Ok(()))?;
        self.flusher.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{FakeDax, slices};
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_written_is_read_and_only_zeroes_are_zeroed() {
        let fake = FakeDax::new();
        let disk = fake.disk((None, Some(4 * MIB)), false).unwrap();
        assert_eq!(disk.len(), 4 * MIB);
        assert!(disk.serial().starts_with(b"dax0.0@0\0"));
        let bytes: Vec<u8> = (0..8192u32).map(|n| n.to_le_bytes()[0] | 1).collect();
        disk.write(512, &bytes).unwrap();
        disk.write(4 * MIB - 512, &bytes[..512]).unwrap();
        disk.discard(0, 4 * MIB).unwrap();
        let read = |offset, len| {
            let mut memory = vec![0; len];
            // In pieces that no boundary suits.
            let parts = slices(&mut memory, &[3, 4096, 1, 700]);
            disk.read(offset, &parts, &mut []).unwrap();
            memory
        };
        assert_eq!(read(512, 8192), bytes);
        assert_eq!(read(4 * MIB - 512, 512), bytes[..512]);
        disk.zero(1024, 4096).unwrap();
        let after = read(512, 8192);
        assert_eq!(after[..512], bytes[..512]);
        assert_eq!(after[512..4608], [0; 4096]);
        assert_eq!(after[4608..], bytes[4608..]);
        disk.flush().unwrap();
    }

    #[test]
    fn what_is_gone_is_an_error_to_every_request() {
        let fake = FakeDax::new();
        let disk = fake.disk((None, Some(2 * MIB)), false).unwrap();
        disk.write(0, &[1; 512]).unwrap();
        disk.release().unwrap();
        disk.release().unwrap();
        assert!(disk.is_lost());
        let mut memory = [0; 512];
        let parts = slices(&mut memory, &[]);
        disk.read(0, &parts, &mut []).unwrap_err();
        disk.write(0, &[1; 512]).unwrap_err();
        disk.zero(0, 512).unwrap_err();
        disk.discard(0, 512).unwrap_err();
        disk.flush().unwrap_err();
        // Nothing of it is held any more.
        fake.disk((None, Some(2 * MIB)), false).unwrap();
    }

    #[test]
    fn a_range_has_one_writer_or_several_readers() {
        let fake = FakeDax::new();
        let writer = fake.disk((None, Some(4 * MIB)), false).unwrap();
        let error = fake.disk((Some(2 * MIB), None), true).unwrap_err();
        assert!(matches!(error, OpenDaxError::Lock(_)), "{error:?}");
        assert!(error.to_string().contains("is in use"), "{error}");
        // The lock is had; the fake has no memory there.
        let beside = fake
            .disk((Some(4 * MIB), Some(2 * MIB)), false)
            .unwrap_err();
        assert!(matches!(beside, OpenDaxError::Map(_)), "{beside:?}");
        drop(writer);
        let _one = fake.disk((None, Some(4 * MIB)), true).unwrap();
        let _two = fake.disk((None, Some(2 * MIB)), true).unwrap();
        fake.disk((None, Some(2 * MIB)), false).unwrap_err();
    }

    #[test]
    fn a_range_that_is_not_there_is_refused() {
        let fake = FakeDax::new();
        let error = fake.disk((Some(4096), None), false).unwrap_err();
        assert!(matches!(error, OpenDaxError::Range(_)), "{error:?}");
        let error = fake.disk((None, Some(1 << 40)), false).unwrap_err();
        assert!(matches!(error, OpenDaxError::Range(_)), "{error:?}");
    }
}
