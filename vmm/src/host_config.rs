//! Finds and reads the file that [`HostConfig`] is written in.
//!
//! It says which memory guests get, so it is believed only when nobody can have written it but root and who runs the VMM.
//! A host without it is a host as before, and costs one open that fails. It is read once, when a process starts.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::process::geteuid;
use thiserror::Error;

use crate::config::{HostConfig, HostConfigError};

/// Where the file is, unless [`VARIABLE`] says otherwise.
pub const DEFAULT_FILE: &str = "/etc/daxhund/config.toml";
/// The variable that names another file, which has to be there then.
pub const VARIABLE: &str = "DAXHUND_CONFIG";

/// No list of pools is longer.
const LONGEST: u64 = 1 << 20;

/// The host's configuration is there and can't be had.
#[derive(Debug, Error)]
pub enum ReadError {
    /// It can't be opened or read.
    #[error("the host's configuration {} can't be read{}", file.display(), named_by(*is_named))]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Whether the variable names it.
        is_named: bool,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("the host's configuration {} is no regular file: name one in ${VARIABLE}", file.display())]
    NoFile {
        /// What is there.
        file: PathBuf,
    },
    /// Somebody else could have written it.
    #[error(
        "the host's configuration {0} belongs to uid {owner}, and is believed when it is root's or uid {uid}'s: `chown root {0}`",
        file.display()
    )]
    Owner {
        /// The file.
        file: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who asks.
        uid: u32,
    },
    /// Others can write it.
    #[error(
        "the host's configuration {0} can be written by others (mode {mode:04o}): `chmod go-w {0}`", file.display()
    )]
    Writable {
        /// The file.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is not what it should be.
    #[error("the host's configuration can't be used")]
    Content(#[from] HostConfigError),
}

fn named_by(is_named: bool) -> String {
    if is_named {
        format!(", which ${VARIABLE} names: make it readable, or unset the variable")
    } else {
        String::new()
    }
}

/// Reads the configuration of the host that this runs on.
pub fn read() -> Result<HostConfig, ReadError> {
    read_of(std::env::var_os(VARIABLE), Path::new(DEFAULT_FILE))
}

/// `named` is the variable's value.
pub(crate) fn read_of(named: Option<OsString>, default: &Path) -> Result<HostConfig, ReadError> {
    let is_named = named.is_some();
    let file = named.map_or_else(|| default.to_owned(), PathBuf::from);
    let unreadable = |source| ReadError::Unreadable {
        file: file.clone(),
        is_named,
        source,
    };
    // A fifo is not waited at.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let opened = match OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(&file)
    {
        Ok(opened) => opened,
        Err(error) if !is_named && error.kind() == io::ErrorKind::NotFound => {
            return Ok(HostConfig::default());
        }
        Err(error) => return Err(unreadable(error)),
    };
    check(&file, &opened)?;
    let mut text = String::new();
    opened
        .take(LONGEST)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    Ok(HostConfig::parse(&file, &text)?)
}

/// Sees of what was opened that nobody else could have written it.
fn check(path: &Path, opened: &File) -> Result<(), ReadError> {
    let file = || path.to_owned();
    let metadata = opened.metadata().map_err(|source| ReadError::Unreadable {
        file: file(),
        is_named: false,
        source,
    })?;
    if !metadata.is_file() {
        return Err(ReadError::NoFile { file: file() });
    }
    let (owner, uid) = (metadata.uid(), geteuid().as_raw());
    if owner != 0 && owner != uid {
        let file = file();
        return Err(ReadError::Owner { file, owner, uid });
    }
    if metadata.len() > LONGEST {
        return Err(ReadError::Unreadable {
            file: file(),
            is_named: false,
            source: io::ErrorKind::FileTooLarge.into(),
        });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(ReadError::Writable { file: file(), mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const POOL: &str = "[pool.ram]\ndevices = [\"/dev/dax0.0\"]\n";

    fn written(dir: &Path, mode: u32) -> PathBuf {
        let file = dir.join("config.toml");
        fs::write(&file, POOL).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn a_host_without_the_file_has_no_pools_and_a_name_wants_one() {
        let dir = tempfile::tempdir().unwrap();
        let absent = dir.path().join("absent.toml");
        assert_eq!(read_of(None, &absent).unwrap(), HostConfig::default());
        for named in [absent.as_os_str(), "".as_ref()] {
            let error = read_of(Some(named.to_owned()), Path::new("/none")).unwrap_err();
            assert!(
                error.to_string().contains("$DAXHUND_CONFIG names"),
                "{error}"
            );
        }
    }

    #[test]
    fn the_variable_wins_and_the_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = written(dir.path(), 0o644);
        let named = read_of(Some(file.clone().into()), Path::new("/none")).unwrap();
        let default = read_of(None, &file).unwrap();
        assert_eq!(named, default);
        assert_eq!(named.pools().count(), 1);
        fs::write(&file, "[pool.ram]").unwrap();
        let error = read_of(None, &file).unwrap_err();
        assert!(
            crate::chain(&error).contains("missing field `devices`"),
            "{error:?}"
        );
    }

    #[test]
    fn what_others_could_have_written_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o664, 0o646, 0o620] {
            let error = read_of(None, &written(dir.path(), mode)).unwrap_err();
            assert!(
                error.to_string().contains("chmod go-w"),
                "{mode:o}: {error}"
            );
        }
        assert!(matches!(
            read_of(None, dir.path()),
            Err(ReadError::NoFile { .. })
        ));
        // Whoever runs the tests may not be able to give a file away.
        let file = written(dir.path(), 0o600);
        if std::os::unix::fs::chown(&file, Some(65534), None).is_ok() && geteuid().is_root() {
            let error = read_of(None, &file).unwrap_err();
            assert!(
                error.to_string().contains("belongs to uid 65534"),
                "{error}"
            );
        }
    }
}
