//! An advisory lock on a part of an ordinary file or of a block device: a disk image, a file that is memory.
//!
//! The same open-file-description locks as for a dax range. The lock ends with the last descriptor of the open file
//! description it was taken through, so there is nothing to release: whoever keeps the file open keeps the lock.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::holder::{self, Holder};
use crate::host::Host;
use crate::lock::LockKind;
use crate::ofd::{self, Request, Span};

/// Why a file was not locked.
#[derive(Debug, Error)]
pub enum FileLockError {
    /// Somebody holds a part of it.
    #[error(
        "{} is in use by {}: stop that user first (`lslocks` shows the locks), or name another file",
        path.display(),
        holder.as_ref().map_or("a process that can't be seen".to_owned(), Holder::to_string)
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who holds it, as far as procfs tells.
        holder: Option<Holder>,
    },
    /// The kernel refused the call itself.
    #[error("cannot lock {}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Host {
    /// Whether somebody has a lock on this part of a file that is in the way of one of this kind. Takes none.
    pub fn is_locked(&self, file: &File, kind: LockKind, range: Range<u64>) -> io::Result<bool> {
        let conflict = ofd::conflict(file, request(kind), span(range))?;
        Ok(conflict.is_some())
    }

    /// Takes a lock without waiting; without a range it is on the whole file, however long that becomes. The file
    /// must be open for writing for [`LockKind::Exclusive`] and for reading for [`LockKind::Shared`].
    pub fn lock_file(
        &self,
        file: &File,
        path: &Path,
        kind: LockKind,
        range: Option<Range<u64>>,
    ) -> Result<(), FileLockError> {
        let request = request(kind);
        let span = range.map_or(Span { offset: 0, len: 0 }, span);
        let path = path.to_owned();
        match ofd::set(file, request, span) {
            Ok(()) => Ok(()),
            Err(error) if ofd::is_conflict(&error) => {
                let conflict = ofd::conflict(file, request, span).ok().flatten();
                let holder = conflict.and_then(|it| holder::of_lock(self.proc(), file, it));
                Err(FileLockError::InUse { path, holder })
            }
            Err(source) => Err(FileLockError::Refused { path, source }),
        }
    }
}

fn request(kind: LockKind) -> Request {
    match kind {
        LockKind::Exclusive => Request::Write,
        LockKind::Shared => Request::Read,
    }
}

fn span(range: Range<u64>) -> Span {
    Span {
        offset: range.start,
        // An empty range would be "to the end" to the kernel.
        len: range.end.saturating_sub(range.start).max(1),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use super::*;

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn a_file_has_one_exclusive_user_or_several_shared_ones() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (host, path) = (Host::system(), file.path());
        let lock = |file: &File, kind| host.lock_file(file, path, kind, None);
        let (a, b, c) = (open(path), open(path), open(path));
        lock(&a, LockKind::Exclusive).unwrap();
        let error = lock(&b, LockKind::Exclusive).unwrap_err();
        let FileLockError::InUse {
            holder: Some(holder),
            ..
        } = &error
        else {
            panic!("{error:?}")
        };
        assert_eq!(holder.pid, std::process::id());
        assert!(error.to_string().contains("in use by process"), "{error}");
        lock(&b, LockKind::Shared).unwrap_err();
        drop(a);
        lock(&b, LockKind::Shared).unwrap();
        lock(&c, LockKind::Shared).unwrap();
        drop(b);
        lock(&open(path), LockKind::Exclusive).unwrap_err();
    }

    #[test]
    fn parts_of_a_file_are_apart() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (host, path) = (Host::system(), file.path());
        let lock =
            |file: &File, range| host.lock_file(file, path, LockKind::Exclusive, Some(range));
        let (a, b) = (open(path), open(path));
        let is_locked = |range| host.is_locked(&b, LockKind::Exclusive, range).unwrap();
        assert!(!is_locked(0..8192));
        lock(&a, 0..4096).unwrap();
        assert!(is_locked(0..8192) && !is_locked(4096..8192));
        lock(&b, 4096..8192).unwrap();
        lock(&b, 4095..8192).unwrap_err();
    }

    #[test]
    fn a_file_that_is_not_open_for_writing_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read_only = File::open(file.path()).unwrap();
        let error = Host::system()
            .lock_file(&read_only, file.path(), LockKind::Exclusive, None)
            .unwrap_err();
        assert!(matches!(error, FileLockError::Refused { .. }), "{error:?}");
    }
}
