//! What is lent: a range of a device or a file, its lock, and whose it is at the moment.
//!
//! ```text
//!   open ──▶ ours: locked by an open file description that nobody else has
//!              │ a session lends it: the frontend gets a descriptor of it and maps that
//!              ▼
//!            lent ──the session ends──▶ our share is closed, and the range locked anew: ours
//!                                            │ the frontend still has it: so has it the lock
//!                                            ▼
//!                                          kept ──a frontend shows that it is the one──▶ lent, as it was
//!                                            └──── it has let go, which is looked for ──▶ ours
//! ```
//! What the host wants back is *let go of*: our share is closed, for the host or, if it thinks better of it, to be locked anew.
//! A range that the host has taken away, or that can't be had again for another reason than its user, is lost.
//! A lock that is the descriptor's outlives this process in the frontend that has it mapped, so nobody comes between a
//! daemon that was killed and the next one. Whoever kept the range shows it: it is among the guest memory that it shares
//! with the backend, by that very open file description, through which the lock can be had and through no other.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use daxhund_dax::{
    ByteSize, DaxMapping, DaxRange, FileLockError, Flusher, FlusherError, Host, LockError,
    LockKind, MapError, OpenError, RangeError, Watch, WatchError, WatchId,
};
use daxhund_guard::{Guard, HoldError};
use daxhund_vhost_user::source::Source;
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

use crate::config::Config;

/// Linux takes memory of a virtio-pmem device in pieces of this size.
const UNIT: u64 = 2 << 20;

/// There is nothing to lend.
#[derive(Debug, Error)]
pub enum LendError {
    /// Not a usable device.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The range is not in the device.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Somebody else has it.
    #[error("{0}{REJOIN}")]
    Lock(LockError),
    /// Somebody else has the file.
    #[error("{0}{REJOIN}")]
    FileLock(FileLockError),
    /// It can't be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A flush can't be made.
    #[error(transparent)]
    Flusher(#[from] FlusherError),
    /// Not in pieces that a guest takes.
    #[error(
        "{}: the {what} {} is not a multiple of {}, in which a guest takes persistent memory: {mend}",
        path.display(), ByteSize(*value), ByteSize(UNIT)
    )]
    Units {
        /// What it is a part of.
        path: PathBuf,
        /// Offset or size.
        what: &'static str,
        /// Its value in bytes.
        value: u64,
        /// What to do.
        mend: &'static str,
    },
    /// No descriptor to be had.
    #[error("the host has no descriptor left (`ulimit -n`)")]
    Host(#[source] io::Error),
    /// Something else than a file.
    #[error("{} is not a file: name one, or give a /dev/daxX.Y by --dax", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file can't be opened so.
    #[error("cannot open {}{}", path.display(), if *read_only { "" } else { " for writing (--read-only needs less)" })]
    File {
        /// The path.
        path: PathBuf,
        /// For reading only.
        read_only: bool,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

const REJOIN: &str =
    "; if that is the guest of a daemon that was killed, start with --rejoin to serve it again";

impl From<LockError> for LendError {
    fn from(error: LockError) -> Self {
        Self::Lock(error)
    }
}

impl From<FileLockError> for LendError {
    fn from(error: FileLockError) -> Self {
        Self::FileLock(error)
    }
}

impl LendError {
    /// Whether somebody else has it.
    pub fn is_in_use(&self) -> bool {
        matches!(
            self,
            Self::Lock(LockError::InUse { .. }) | Self::FileLock(FileLockError::InUse { .. })
        )
    }
}

/// What a flush is.
#[derive(Debug)]
enum Durable {
    Dax(Flusher),
    /// A sync that has failed is told once by the kernel, which takes the pages for clean then: no later one can be believed.
    File(File, AtomicBool),
}

/// The range, locked by an open file description that can be lent.
#[derive(Debug)]
struct Loan {
    /// Before the file: the mapping is looked at for removals.
    mapping: Option<DaxMapping>,
    file: Arc<File>,
}

#[derive(Debug)]
enum Held {
    Ours(Loan),
    /// Not ours: why.
    Kept(LendError),
    /// For the host.
    LetGo,
    Lost,
}

/// A range and what is to be known of it.
#[derive(Debug)]
pub struct Lender {
    host: Host,
    source: Source,
    /// As in `dax1.0`.
    device: Option<String>,
    offset: u64,
    len: u64,
    read_only: bool,
    durable: Durable,
    held: Mutex<Held>,
    bell: OwnedFd,
}

impl Lender {
    /// Opens and locks it.
    pub fn open(host: &Host, config: &Config) -> Result<Self, LendError> {
        let (device, offset, len, durable) = match &config.source {
            Source::Dax { path, offset, size } => {
                let device = host.open(path)?;
                let offset = offset.unwrap_or(0);
                // A device with 4K alignment can end inside a unit; "the whole device" stops before that.
                let unit = UNIT.max(device.facts().align_bytes);
                let size = size.or_else(|| {
                    let rest = device.facts().size_bytes.saturating_sub(offset);
                    let whole = rest - rest % unit;
                    (whole > 0).then_some(whole)
                });
                let range = device.range(Some(offset), size)?;
                let mend = "give offset= and size= such as 0 and 1G";
                check_units(path, range.offset(), range.len(), mend)?;
                let flusher = Flusher::new(&device)?;
                if let Some(warning) = flusher.warning() {
                    tracing::warn!("{warning}");
                }
                let name = device.facts().name.to_string();
                let durable = Durable::Dax(flusher);
                (Some(name), range.offset(), range.len(), durable)
            }
            Source::File(path) => {
                let (file, len) = open_file(path, true)?;
                check_units(
                    path,
                    0,
                    len,
                    "make the file longer (`truncate -s %2M FILE`)",
                )?;
                (None, 0, len, Durable::File(file, AtomicBool::new(false)))
            }
        };
        let lender = Self {
            host: host.clone(),
            source: config.source.clone(),
            device,
            offset,
            len,
            read_only: config.read_only,
            durable,
            held: Mutex::new(Held::Lost),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| LendError::Host(error.into()))?,
        };
        let held = match lender.take() {
            Ok(loan) => Held::Ours(loan),
            Err(error) if config.rejoin && error.is_in_use() => {
                tracing::warn!(%error, "it is lent to that one only, until it lets go");
                Held::Kept(error)
            }
            Err(error) => return Err(error),
        };
        *lender.held() = held;
        Ok(lender)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are lent.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where in the file they begin.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether it is lent for reading only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What it is a part of.
    pub fn path(&self) -> &Path {
        self.source.path()
    }

    /// The device's name, as in `dax1.0`, if it is one.
    pub fn device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// To give to a frontend; an error is for saying: whoever has it, or that it is gone.
    pub fn lend(&self) -> Result<Arc<File>, String> {
        match &*self.held() {
            Held::Ours(loan) => {
                self.check_is_whole(loan)?;
                Ok(Arc::clone(&loan.file))
            }
            Held::Kept(error) => Err(error.to_string()),
            Held::LetGo => Err(format!("the host wants {} back", self.path().display())),
            Held::Lost => Err(format!("the host has taken {} away", self.path().display())),
        }
    }

    /// A file that is lent for writing can be shortened by whom it is lent to, and then loads of the next one would fault.
    fn check_is_whole(&self, loan: &Loan) -> Result<(), String> {
        if loan.mapping.is_some() {
            return Ok(());
        }
        let path = self.path().display();
        let metadata = loan.file.metadata();
        let len = metadata
            .map_err(|error| format!("cannot look at {path}: {error}"))?
            .len();
        if len < self.len {
            return Err(format!(
                "{path} was shortened to {} of {}, by whom it was lent to or on the host: lengthen it (`truncate -s {} {path}`)",
                ByteSize(len),
                ByteSize(self.len),
                self.len
            ));
        }
        Ok(())
    }

    /// For a frontend that shares this part of a file, if it has the range from a daemon before, and with it its lock: what it
    /// is to map, which is what it has. The range is ours, too, from then on.
    pub fn recognise(&self, file: &File, offset: u64, len: u64) -> Option<Arc<File>> {
        let mut held = self.held();
        if !matches!(&*held, Held::Kept(_)) || !self.is_of_the_range(file, offset, len) {
            return None;
        }
        let loan = file.try_clone().map(|file| self.loan_of(file)).ok()?;
        let loan = loan
            .inspect_err(|error| tracing::warn!(%error, "what the frontend has is not the range"))
            .ok()?;
        let file = Arc::clone(&loan.file);
        *held = Held::Ours(loan);
        self.ring();
        Some(file)
    }

    /// Whether this part of a file is the range, by whichever descriptor.
    pub fn is_of_the_range(&self, file: &File, offset: u64, len: u64) -> bool {
        let is_same_file = match (file.metadata(), std::fs::metadata(self.path())) {
            // Locks are the inode's: another node of the same device has others.
            (Ok(one), Ok(two)) => (one.dev(), one.ino()) == (two.dev(), two.ino()),
            _ => false,
        };
        (offset, len) == (self.offset, self.len) && is_same_file
    }

    /// Something has changed that the daemon is to look at.
    pub fn ring(&self) {
        // Only a full counter gives an error, and then it is readable anyway.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Readable when [`Lender::ring`] was called: the range was recognised, or was given back.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Not readable any more, until the next time.
    pub fn acknowledge_bell(&self) {
        // Nothing to read when it was read before.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// Has removals of the device held; `None` when it is not ours at the moment.
    pub fn hold(&self, by: &mut Guard, answer_within: Duration) -> Option<Result<(), HoldError>> {
        match &*self.held() {
            Held::Ours(Loan {
                mapping: Some(mapping),
                ..
            }) => Some(by.hold(self.device()?, mapping.file().as_fd(), answer_within)),
            _ => None,
        }
    }

    /// Our share is closed, for the host: nothing is lent, and flushes fail. Not while [`Lender::watch`] has it watched.
    pub fn let_go(&self) {
        let mut held = self.held();
        if !matches!(&*held, Held::Lost) {
            *held = Held::LetGo;
        }
    }

    /// Whether it is the host's to have.
    pub fn is_let_go(&self) -> bool {
        matches!(&*self.held(), Held::LetGo)
    }

    /// Whether nobody has a part of the range locked, and so none of it mapped: neither we nor whom it was lent to.
    pub fn is_free(&self) -> io::Result<bool> {
        let file = match File::open(self.path()) {
            Ok(file) => file,
            Err(error) => {
                let is_gone = matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENXIO | libc::ENODEV)
                );
                return if is_gone { Ok(true) } else { Err(error) };
            }
        };
        let range = self.offset..self.offset + self.len;
        let is_locked = self.host.is_locked(&file, LockKind::Exclusive, range)?;
        Ok(!is_locked)
    }

    /// What is so after a session: the range is ours again, or somebody's still. Not while [`Lender::watch`] has it watched.
    pub fn renew(&self) {
        let mut held = self.held();
        if matches!(&*held, Held::Lost) || (self.read_only && matches!(&*held, Held::Ours(_))) {
            return;
        }
        let was_kept = matches!(&*held, Held::Kept(_));
        // Our share goes first: the lock of the new one is to say whether another is left.
        *held = Held::Lost;
        *held = match self.take() {
            Ok(loan) => Held::Ours(loan),
            Err(error) if error.is_in_use() => {
                if !was_kept {
                    tracing::warn!(%error, "the range is kept by whom it was lent to");
                }
                Held::Kept(error)
            }
            // A frontend that let go for the host's sake, and the host was quicker.
            Err(error) => {
                tracing::error!(%error, "the range can't be had again");
                Held::Lost
            }
        };
    }

    /// Has the device watched; `None` when there is none, or it is not ours at the moment.
    pub fn watch(&self, by: &mut Watch) -> Result<Option<WatchId>, WatchError> {
        match &*self.held() {
            Held::Ours(Loan {
                mapping: Some(mapping),
                ..
            }) => by.add(mapping).map(Some),
            _ => Ok(None),
        }
    }

    /// The host takes it away: nothing of it is kept here, and nothing is durable any more.
    pub fn lose(&self) {
        *self.held() = Held::Lost;
    }

    /// Whether somebody has it and nobody is served.
    pub fn is_kept(&self) -> bool {
        matches!(&*self.held(), Held::Kept(_))
    }

    /// Whether it is gone.
    pub fn is_lost(&self) -> bool {
        matches!(&*self.held(), Held::Lost)
    }

    /// What was stored and written back before is durable when this returns.
    pub fn flush(&self) -> io::Result<()> {
        let lost = || io::Error::other("the memory is gone");
        let is_lost = || matches!(&*self.held(), Held::LetGo | Held::Lost);
        if is_lost() {
            return Err(lost());
        }
        if self.read_only {
            return Ok(());
        }
        match &self.durable {
            Durable::Dax(flusher) => flusher.flush()?,
            Durable::File(file, failed) => {
                if let Err(error) = rustix::fs::fdatasync(file) {
                    failed.store(true, Ordering::SeqCst);
                    return Err(error.into());
                }
                if failed.load(Ordering::SeqCst) {
                    return Err(io::Error::other("an earlier sync of the file has failed"));
                }
            }
        }
        // Lost meanwhile: what was made durable is not what the guest has.
        if is_lost() { Err(lost()) } else { Ok(()) }
    }

    fn take(&self) -> Result<Loan, LendError> {
        match &self.source {
            Source::Dax { path, .. } if self.read_only => {
                let device = self.host.open(path)?;
                let range = self.range_of(&device)?;
                let mapping = device.lock(range, LockKind::Shared)?.map()?;
                // What is lent can't be written through.
                let file = open(path, true)?;
                self.lock(&file)?;
                Ok(Loan {
                    mapping: Some(mapping),
                    file: Arc::new(file),
                })
            }
            Source::Dax { path, .. } => self.loan_of(open(path, false)?),
            Source::File(path) => self.loan_of(open_file(path, self.read_only)?.0),
        }
    }

    /// Locked by this open file description, which others may have, too.
    fn loan_of(&self, file: File) -> Result<Loan, LendError> {
        match &self.source {
            Source::Dax { path, .. } => {
                let device = self.host.adopt(file, path)?;
                let range = self.range_of(&device)?;
                let mapping = device.lock(range, LockKind::Exclusive)?.map()?;
                Ok(Loan {
                    file: Arc::clone(mapping.file()),
                    mapping: Some(mapping),
                })
            }
            Source::File(_) => {
                self.lock(&file)?;
                Ok(Loan {
                    mapping: None,
                    file: Arc::new(file),
                })
            }
        }
    }

    fn range_of(&self, device: &daxhund_dax::DaxDevice) -> Result<DaxRange, RangeError> {
        device.range(Some(self.offset), Some(self.len))
    }

    fn lock(&self, file: &File) -> Result<(), FileLockError> {
        let kind = if self.read_only {
            LockKind::Shared
        } else {
            LockKind::Exclusive
        };
        let range = self.offset..self.offset + self.len;
        self.host.lock_file(file, self.path(), kind, Some(range))
    }
}

fn open(path: &Path, read_only: bool) -> Result<File, LendError> {
    let opened = OpenOptions::new().read(true).write(!read_only).open(path);
    opened.map_err(|source| LendError::File {
        path: path.to_owned(),
        read_only,
        source,
    })
}

fn open_file(path: &Path, read_only: bool) -> Result<(File, u64), LendError> {
    let failed = |source| LendError::File {
        path: path.to_owned(),
        read_only,
        source,
    };
    let not_a_file = || LendError::NotAFile {
        path: path.to_owned(),
    };
    // Looked at before it is opened: opening a FIFO would wait, and opening a device can do things.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(not_a_file());
    }
    let file = open(path, read_only)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(not_a_file());
    }
    Ok((file, metadata.len()))
}

fn check_units(path: &Path, offset: u64, len: u64, mend: &'static str) -> Result<(), LendError> {
    for (what, value) in [("offset", offset), ("size", len)] {
        if !value.is_multiple_of(UNIT) || (what == "size" && value == 0) {
            return Err(LendError::Units {
                path: path.to_owned(),
                what,
                value,
                mend,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Args;

    const MIB: u64 = 1 << 20;

    fn config(path: &Path, read_only: bool) -> Config {
        let args = [
            "pmem",
            "--socket-path",
            "/s",
            "--file",
            path.to_str().unwrap(),
        ];
        let mut config = Config::try_from(Args::try_parse_from(args).unwrap()).unwrap();
        config.read_only = read_only;
        config
    }

    fn open(path: &Path, read_only: bool) -> Result<Lender, LendError> {
        Lender::open(&Host::system(), &config(path, read_only))
    }

    fn file(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn what_a_frontend_keeps_is_lent_to_that_one_only() {
        let file = file(4 * MIB);
        let lender = open(file.path(), false).unwrap();
        assert_eq!((lender.offset(), lender.len()), (0, 4 * MIB));
        // The frontend's descriptor is of the same open file description.
        let theirs = lender.lend().unwrap().try_clone().unwrap();
        lender.renew();
        let said = lender.lend().unwrap_err();
        assert!(
            said.contains("in use by process") && said.contains("--rejoin"),
            "{said}"
        );
        let stranger = super::open(file.path(), false).unwrap();
        let other = super::open(self::file(4 * MIB).path(), false).unwrap();
        assert!(lender.recognise(&stranger, 0, 4 * MIB).is_none());
        assert!(lender.recognise(&other, 0, 4 * MIB).is_none());
        assert!(lender.recognise(&theirs, 0, 2 * MIB).is_none());
        assert!(lender.recognise(&theirs, 2 * MIB, 4 * MIB).is_none());
        lender.lend().unwrap_err();
        lender.recognise(&theirs, 0, 4 * MIB).unwrap();
        lender.lend().unwrap();
        // A daemon that comes after a killed one finds the same.
        drop(lender);
        let error = open(file.path(), false).unwrap_err();
        assert!(error.is_in_use(), "{error:?}");
        let rejoining = Config {
            rejoin: true,
            ..config(file.path(), false)
        };
        let lender = Lender::open(&Host::system(), &rejoining).unwrap();
        lender.lend().unwrap_err();
        lender.recognise(&theirs, 0, 4 * MIB).unwrap();
        lender.flush().unwrap();
        drop(theirs);
        lender.renew();
        lender.lend().unwrap();
    }

    #[test]
    fn one_lends_for_writing_or_several_for_reading() {
        let file = file(2 * MIB);
        let writer = open(file.path(), false).unwrap();
        assert!(open(file.path(), true).unwrap_err().is_in_use());
        drop(writer);
        let readers = [open(file.path(), true), open(file.path(), true)].map(Result::unwrap);
        assert!(open(file.path(), false).unwrap_err().is_in_use());
        // What is lent can't be written through.
        let lent = readers[0].lend().unwrap();
        rustix::io::pwrite(&*lent, b"x", 0).unwrap_err();
        readers[0].flush().unwrap();
    }

    #[test]
    fn what_the_host_wants_is_free_when_the_last_one_has_closed_it_and_can_be_had_again() {
        for read_only in [false, true] {
            let file = file(2 * MIB);
            let lender = open(file.path(), read_only).unwrap();
            assert!(!lender.is_free().unwrap(), "we have it");
            let theirs = lender.lend().unwrap().try_clone().unwrap();
            lender.let_go();
            assert!(!lender.is_free().unwrap(), "the frontend has it");
            lender.flush().unwrap_err();
            assert!(lender.lend().unwrap_err().contains("wants"));
            assert!(!lender.is_lost() && !lender.is_kept());
            // The host thinks better of it.
            lender.renew();
            assert_eq!(lender.is_kept(), !read_only);
            lender.flush().unwrap();
            lender.let_go();
            drop(theirs);
            assert!(lender.is_free().unwrap());
            lender.renew();
            lender.lend().unwrap();
            lender.lose();
            lender.let_go();
            assert!(lender.is_lost(), "that was the last of it");
        }
    }

    #[test]
    fn what_is_gone_is_not_durable_and_not_lent() {
        let file = file(2 * MIB);
        let lender = open(file.path(), false).unwrap();
        lender.flush().unwrap();
        lender.lose();
        lender.flush().unwrap_err();
        lender.lend().unwrap_err();
        lender.renew();
        assert!(lender.is_lost());
        open(file.path(), false).unwrap();
    }

    #[test]
    fn what_a_frontend_has_shortened_is_not_lent_on_until_it_is_whole() {
        let file = file(4 * MIB);
        let lender = open(file.path(), false).unwrap();
        lender.lend().unwrap().set_len(2 * MIB).unwrap();
        let said = lender.lend().unwrap_err();
        assert!(
            said.contains("shortened to 2M of 4M") && said.contains("truncate -s 4194304"),
            "{said}"
        );
        file.as_file().set_len(4 * MIB).unwrap();
        lender.lend().unwrap();
    }

    #[test]
    fn what_can_t_be_lent_is_named() {
        let (odd, empty) = (file(3 * MIB), file(0));
        for (path, expected) in [
            (odd.path(), "the size 3M is not a multiple of 2M"),
            (empty.path(), "the size 0 is not"),
            (Path::new("/dev/zero"), "is not a file"),
            (Path::new("/nonexistent"), "cannot open /nonexistent"),
        ] {
            let error = open(path, false).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn what_is_not_there_any_more_is_lost_and_not_kept() {
        let file = file(4 * MIB);
        let lender = open(file.path(), false).unwrap();
        lender.renew();
        assert!(!lender.is_lost() && !lender.is_kept());
        file.close().unwrap();
        lender.renew();
        assert!(lender.is_lost() && !lender.is_kept());
        lender.lend().unwrap_err();
    }
}
