//! Taking a device away on purpose: its users are drained as by a removal that is held, then the guard unbinds it.
//!
//! This is the way for those whose target the guard can't tell: `release dax1.0` says it.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::client::{ConnectError, Guard, LostError};
use crate::host::Host;
use crate::lineage::{DeviceName, Lineage, LineageError};
use crate::protocol::Listing;

/// The name by which this program's own requests are shown.
const ME: &str = "daxhund guard";

/// Why a device was not released.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// No guard.
    #[error("cannot release {device}")]
    Connect {
        /// The device.
        device: String,
        /// Why.
        #[source]
        source: ConnectError,
    },
    /// The guard went away meanwhile.
    #[error("it is not known whether {device} was released")]
    Lost {
        /// The device.
        device: String,
        /// Why.
        #[source]
        source: LostError,
    },
    /// Somebody keeps it, or the kernel does.
    #[error("{device} was not released: {why}")]
    Refused {
        /// The device.
        device: String,
        /// The guard's words.
        why: String,
    },
}

/// Why there is no list.
#[derive(Debug, Error)]
pub enum ListError {
    /// No guard.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The guard went away meanwhile.
    #[error("cannot list what is held")]
    Lost(#[from] LostError),
}

/// Has the guard drain a device's users and unbind it from its driver. Returns when that is done, or was refused; it
/// takes as long as the users were given to answer.
pub fn release(socket: &Path, device: &str) -> Result<(), ReleaseError> {
    let device = device.to_owned();
    let mut guard = match Guard::connect(socket, ME) {
        Ok(guard) => guard,
        Err(source) => return Err(ReleaseError::Connect { device, source }),
    };
    match guard.release(&device) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(why)) => Err(ReleaseError::Refused { device, why }),
        Err(source) => Err(ReleaseError::Lost { device, source }),
    }
}

/// What is held, by whom, and who waits.
pub fn list(socket: &Path) -> Result<Listing, ListError> {
    Ok(Guard::connect(socket, ME)?.list()?)
}

/// Why a device is still bound.
#[derive(Debug, Error)]
pub(crate) enum UnbindError {
    #[error(transparent)]
    Lineage(#[from] LineageError),
    #[error("it has no driver, so nobody can use it")]
    NoDriver,
    #[error("the kernel does not unbind it by {}", path.display())]
    Refused {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Takes a device from its driver. Blocks in the opening of a watched file: never on the thread that answers.
pub(crate) fn unbind(host: &Host, device: &DeviceName) -> Result<(), UnbindError> {
    let lineage = Lineage::read(host, device)?;
    let own = lineage.parts.first().and_then(|part| part.driver.as_ref());
    let path = own.ok_or(UnbindError::NoDriver)?.join("unbind");
    fs::write(&path, device.as_str()).map_err(|source| UnbindError::Refused { path, source })
}
