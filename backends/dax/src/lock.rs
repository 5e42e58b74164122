//! An advisory lock on a range, so that two VMMs cannot take overlapping parts of one device.
//!
//! The kernel lets any number of processes map the same bytes of a dax device and knows no exclusive open. A lock
//! here is an open-file-description lock on the device node: it ends with the last descriptor, so a VMM that dies
//! leaves none behind. Such locks don't conflict within one open file description, so a device also keeps a list of
//! the ranges it has handed out.
//!
//! A range that is lent to another process ([`Host::adopt`](crate::Host::adopt)) has one lock for both: it goes with the
//! descriptor, whoever of them asks for it again has it, and neither takes it from the other.
//!
//! Locks hold only among those who take them, and only through one device node: a second node made with `mknod`
//! for the same device has its own locks.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use thiserror::Error;

use crate::holder::{self, Holder};
use crate::mapping::{DaxMapping, MapError};
use crate::ofd::{self, Request};
use crate::open::{DaxDevice, Shared};
use crate::range::DaxRange;

/// How a range is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Nobody else may hold any byte of the range.
    Exclusive,
    /// Others may hold it as well, if they also ask for `Shared`: memory shared between guests on purpose.
    Shared,
}

/// Why a lock was not had.
#[derive(Debug, Error)]
pub enum LockError {
    /// Somebody holds a part of the range.
    #[error(
        "{asked} of {} is in use{}: stop that user, or choose a range that is free with offset= and size=",
        path.display(), by(*held, holder.as_ref())
    )]
    InUse {
        /// The device.
        path: PathBuf,
        /// The range asked for.
        asked: DaxRange,
        /// The range that stands in the way, when it was still there to be asked about.
        held: Option<DaxRange>,
        /// Who holds it, as far as procfs tells.
        holder: Option<Holder>,
    },
    /// The kernel refused the call itself.
    #[error("cannot lock {asked} of {}", path.display())]
    Refused {
        /// The device.
        path: PathBuf,
        /// The range asked for.
        asked: DaxRange,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Why a range was not let go.
#[derive(Debug, Error)]
#[error("cannot release {range} of {}", path.display())]
pub struct ReleaseError {
    /// The device.
    pub path: PathBuf,
    /// The range that stays held.
    pub range: DaxRange,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

fn by(held: Option<DaxRange>, holder: Option<&Holder>) -> String {
    match (held, holder) {
        (Some(held), Some(holder)) => format!(" by {holder}, which holds {held}"),
        (Some(held), None) => format!(" by a process that can't be seen, which holds {held}"),
        (None, Some(holder)) => format!(" by {holder}"),
        (None, None) => String::new(),
    }
}

/// A range of a device that is held by this process. Dropping it lets the range go.
#[derive(Debug)]
#[must_use = "dropping a RangeLock releases the range"]
pub struct RangeLock {
    device: Arc<Shared>,
    range: DaxRange,
    /// The pool that it was taken from, if it was.
    pool: Option<Arc<String>>,
    released: bool,
}

impl DaxDevice {
    /// Takes a range without waiting.
    pub fn lock(&self, range: DaxRange, kind: LockKind) -> Result<RangeLock, LockError> {
        let device = self.shared();
        let request = match kind {
            LockKind::Exclusive => Request::Write,
            LockKind::Shared => Request::Read,
        };
        // Held across the system call: two threads asking for the same bytes must not both pass the list.
        let mut claims = device.claims.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = claims.iter().find(|claim| claim.overlaps(&range)) {
            return Err(LockError::InUse {
                path: device.path.clone(),
                asked: range,
                held: Some(*held),
                holder: Some(Holder::this_process(&device.proc)),
            });
        }
        ofd::set(&device.file, request, range.span())
            .map_err(|error| lock_error(device, request, range, error))?;
        claims.push(range);
        drop(claims);
        Ok(RangeLock {
            device: Arc::clone(device),
            range,
            pool: None,
            released: false,
        })
    }
}

fn lock_error(device: &Shared, request: Request, range: DaxRange, error: io::Error) -> LockError {
    let (path, asked) = (device.path.clone(), range);
    if !ofd::is_conflict(&error) {
        return LockError::Refused {
            path,
            asked,
            source: error,
        };
    }
    // The holder may leave before it can be asked about; the refusal stands all the same.
    let conflict = ofd::conflict(&device.file, request, range.span())
        .ok()
        .flatten();
    let holder =
        conflict.and_then(|conflict| holder::of_lock(&device.proc, &device.file, conflict));
    let held = conflict.map(|conflict| DaxRange::reported(conflict, device.facts.size_bytes));
    LockError::InUse {
        path,
        asked,
        held,
        holder,
    }
}

impl RangeLock {
    /// The range held.
    pub fn range(&self) -> DaxRange {
        self.range
    }

    /// The name of the pool that the range was taken from, if it was.
    pub fn pool(&self) -> Option<&str> {
        self.pool.as_ref().map(|pool| pool.as_str())
    }

    pub(crate) fn of_pool(mut self, pool: &Arc<String>) -> Self {
        self.pool = Some(Arc::clone(pool));
        self
    }

    /// The open device that the range is of.
    pub fn opened(&self) -> DaxDevice {
        DaxDevice::of(Arc::clone(&self.device))
    }

    /// Cuts off the first `len` bytes as a lock of their own. Nobody can take either part meanwhile. `None`, and nothing is
    /// changed, unless both parts are whole multiples of the device's alignment and neither is empty.
    pub fn split_off_front(&mut self, len: u64) -> Option<Self> {
        let (front, rest) = self.range.split(len, self.device.facts.align_bytes)?;
        let claims = &self.device.claims;
        let mut claims = claims.lock().unwrap_or_else(PoisonError::into_inner);
        claims.retain(|claim| *claim != self.range);
        claims.extend([front, rest]);
        drop(claims);
        self.range = rest;
        Some(Self {
            device: Arc::clone(&self.device),
            range: front,
            pool: self.pool.clone(),
            released: false,
        })
    }

    /// Maps the range. On failure the range is let go.
    pub fn map(self) -> Result<DaxMapping, MapError> {
        DaxMapping::new(self)
    }

    /// Lets the range go. A failure hands the lock back.
    pub fn release(mut self) -> Result<(), (Self, ReleaseError)> {
        match self.unlock() {
            Ok(()) => Ok(()),
            Err(source) => {
                let error = ReleaseError {
                    path: self.device.path.clone(),
                    range: self.range,
                    source,
                };
                Err((self, error))
            }
        }
    }

    pub(crate) fn device(&self) -> &Arc<Shared> {
        &self.device
    }

    fn unlock(&mut self) -> io::Result<()> {
        let claims = &self.device.claims;
        let mut claims = claims.lock().unwrap_or_else(PoisonError::into_inner);
        // In common with others the range is locked as long as one of them has the file: it ends with the last descriptor.
        if !self.device.in_common {
            ofd::set(&self.device.file, Request::Unlock, self.range.span())?;
        }
        claims.retain(|claim| *claim != self.range);
        self.released = true;
        Ok(())
    }
}

impl Drop for RangeLock {
    fn drop(&mut self) {
        if !self.released {
            // A lock that can't be released here ends when the device is closed.
            drop(self.unlock());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::DeviceFile;

    const PAGE: u64 = 4096;

    fn range(page: u64, pages: u64) -> DaxRange {
        DaxRange::for_test(page * PAGE, pages * PAGE)
    }

    #[test]
    fn another_open_device_is_refused_and_told_who_and_what() {
        let file = DeviceFile::new(16 * PAGE);
        let (first, second) = (file.open(), file.open());
        let held = first.lock(range(2, 4), LockKind::Exclusive).unwrap();
        let error = second.lock(range(5, 4), LockKind::Exclusive).unwrap_err();
        let LockError::InUse {
            held: Some(conflict),
            holder: Some(holder),
            ..
        } = &error
        else {
            panic!("{error:?}")
        };
        assert_eq!(*conflict, held.range());
        assert_eq!(holder.pid, std::process::id());
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(holder.comm, comm.trim_end());
        let text = error.to_string();
        assert!(text.contains("16K at offset 20K"), "{text}");
        assert!(text.contains("holds 16K at offset 8K"), "{text}");
        held.release().unwrap();
        let _lock = second.lock(range(5, 4), LockKind::Exclusive).unwrap();
    }

    #[test]
    fn the_same_open_device_is_refused_too() {
        let file = DeviceFile::new(16 * PAGE);
        let device = file.open();
        let held = device.lock(range(0, 8), LockKind::Exclusive).unwrap();
        let error = device.lock(range(7, 2), LockKind::Exclusive).unwrap_err();
        assert!(
            matches!(&error, LockError::InUse { holder: Some(h), .. } if h.pid == std::process::id()),
            "{error:?}"
        );
        let neighbour = device.lock(range(8, 8), LockKind::Exclusive).unwrap();
        drop(held);
        drop(device.lock(range(0, 8), LockKind::Exclusive).unwrap());
        drop(neighbour);
    }

    #[test]
    fn releasing_one_range_keeps_its_neighbour() {
        let file = DeviceFile::new(16 * PAGE);
        let (first, second) = (file.open(), file.open());
        let left = first.lock(range(0, 8), LockKind::Exclusive).unwrap();
        let _right = first.lock(range(8, 8), LockKind::Exclusive).unwrap();
        left.release().unwrap();
        let _freed = second.lock(range(0, 8), LockKind::Exclusive).unwrap();
        second.lock(range(8, 1), LockKind::Exclusive).unwrap_err();
    }

    #[test]
    fn a_lock_in_two_parts_is_held_throughout_and_let_go_in_parts() {
        let file = DeviceFile::new(16 * PAGE);
        let (device, other) = (file.open(), file.open());
        let mut lock = device.lock(range(2, 8), LockKind::Exclusive).unwrap();
        for len in [0, 1, 8 * PAGE, 9 * PAGE] {
            assert!(lock.split_off_front(len).is_none(), "{len}");
        }
        let front = lock.split_off_front(3 * PAGE).unwrap();
        assert_eq!((front.range(), lock.range()), (range(2, 3), range(5, 5)));
        for device in [&device, &other] {
            device.lock(range(4, 1), LockKind::Exclusive).unwrap_err();
            device.lock(range(5, 1), LockKind::Exclusive).unwrap_err();
        }
        front.release().unwrap();
        let _front = other.lock(range(2, 3), LockKind::Exclusive).unwrap();
        other.lock(range(5, 1), LockKind::Exclusive).unwrap_err();
        lock.release().unwrap();
        let _rest = device.lock(range(5, 5), LockKind::Exclusive).unwrap();
    }

    #[test]
    fn shared_locks_exclude_only_exclusive_ones() {
        let file = DeviceFile::new(16 * PAGE);
        let (a, b, c) = (file.open(), file.open(), file.open());
        let _a = a.lock(range(0, 8), LockKind::Shared).unwrap();
        let _b = b.lock(range(4, 8), LockKind::Shared).unwrap();
        c.lock(range(6, 1), LockKind::Exclusive).unwrap_err();
        let _c = c.lock(range(12, 1), LockKind::Exclusive).unwrap();
    }

    #[test]
    fn what_is_lent_is_locked_until_the_last_who_has_it_has_closed_it() {
        let file = DeviceFile::new(16 * PAGE);
        let (lender, stranger) = (file.open(), file.open());
        let lent = lender.lock(range(0, 8), LockKind::Exclusive).unwrap();
        let borrower = DeviceFile::in_common_with(&lender);
        let kept = borrower.lock(range(0, 8), LockKind::Exclusive).unwrap();
        kept.release().unwrap();
        stranger.lock(range(0, 8), LockKind::Shared).unwrap_err();
        let kept = borrower.lock(range(0, 8), LockKind::Exclusive).unwrap();
        let again = DeviceFile::in_common_with(&borrower);
        drop((lent, lender));
        // The one that is not in common unlocks; so a lender lends what is.
        drop((kept, borrower));
        let last = again.lock(range(0, 8), LockKind::Exclusive).unwrap();
        stranger.lock(range(0, 8), LockKind::Shared).unwrap_err();
        drop((last, again));
        drop(stranger.lock(range(0, 8), LockKind::Shared).unwrap());
    }

    #[test]
    fn the_last_close_releases() {
        let file = DeviceFile::new(16 * PAGE);
        let device = file.open();
        let lock = device.lock(range(0, 16), LockKind::Exclusive).unwrap();
        let other = file.open();
        drop(device);
        other.lock(range(0, 1), LockKind::Exclusive).unwrap_err();
        drop(lock);
        let _lock = other.lock(range(0, 1), LockKind::Exclusive).unwrap();
    }
}
