//! Why a disk can't be had.

use std::io;
use std::path::PathBuf;

use daxhund_dax::FileLockError;
use thiserror::Error;

/// A disk stays as large as it is.
#[derive(Debug, Error)]
pub enum DiskResizeError {
    /// It is no disk, or another process serves it.
    #[error(
        "no image of it is open here: only a disk with path= can be resized, others where they are served"
    )]
    NotHere,
    /// The guest would lose its end.
    #[error(
        "{bytes} bytes are fewer than the {now} that the guest has, which would lose the rest: remove the disk, shrink its image \
         and add it again"
    )]
    Shrinks {
        /// Asked for.
        bytes: u64,
        /// What the guest has.
        now: u64,
    },
    /// It is made of blocks.
    #[error("{bytes} bytes are no whole blocks of {block}; {} is the next smaller size", bytes - bytes % block)]
    NotBlocks {
        /// Asked for.
        bytes: u64,
        /// Bytes in a block.
        block: u64,
    },
    /// A block device, or an image that can't be written, is as large as it is.
    #[error(
        "the image has {there} bytes, not {bytes}, and can't be made larger from here: make it larger first"
    )]
    HasFewer {
        /// Asked for.
        bytes: u64,
        /// What there is.
        there: u64,
    },
    /// The image.
    #[error("the image can't be made larger")]
    File(#[source] io::Error),
}

/// An image can't be a disk.
#[derive(Debug, Error)]
pub enum DiskOpenError {
    /// Nothing is there.
    #[error(
        "disk {id}: {} does not exist: `truncate -s 10G {}` makes an empty disk of 10 GiB",
        path.display(), path.display()
    )]
    Missing {
        /// Which disk.
        id: String,
        /// The path.
        path: PathBuf,
    },
    /// Something that is no disk.
    #[error("disk {id}: {} is {kind}, not a disk: {mend}", path.display())]
    NotADisk {
        /// Which disk.
        id: String,
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// What to do instead.
        mend: &'static str,
    },
    /// The image can be read only.
    #[error(
        "disk {id}: {} can't be opened for writing: `chmod u+w` it, or give readonly=on",
        path.display()
    )]
    ReadOnly {
        /// Which disk.
        id: String,
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The image can't go around the page cache.
    #[error(
        "disk {id}: the file system of {} has no direct I/O: leave direct=on out",
        path.display()
    )]
    NotDirect {
        /// Which disk.
        id: String,
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The image can't be opened or looked at.
    #[error("disk {id}: {} can't be opened", path.display())]
    File {
        /// Which disk.
        id: String,
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is not one block in it.
    #[error(
        "disk {id}: {} has {len} bytes, less than one block of {block}: `truncate -s SIZE {}` makes it larger",
        path.display(), path.display()
    )]
    Empty {
        /// Which disk.
        id: String,
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Bytes in a block.
        block: u32,
    },
    /// Somebody uses the image.
    #[error("disk {id}")]
    Lock {
        /// Which disk.
        id: String,
        /// Why.
        #[source]
        source: FileLockError,
    },
    /// A number that no disk has.
    #[error("disk {id}: {what}={value} can't be: give {range}")]
    Queues {
        /// Which disk.
        id: String,
        /// The key.
        what: &'static str,
        /// Its value.
        value: u16,
        /// What can be.
        range: &'static str,
    },
    /// The name is no text that a guest can be told.
    #[error(
        "disk {id}: a serial number has at most 20 bytes of ASCII, {serial:?} has others or more; shorten it"
    )]
    Serial {
        /// Which disk.
        id: String,
        /// What was asked for.
        serial: String,
    },
}
