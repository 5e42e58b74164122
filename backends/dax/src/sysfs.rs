//! Reading attributes below one sysfs root.
//!
//! Every read goes through [`Sysfs`], whose root can be a directory of a test. An attribute is absent, forbidden
//! (several of device-dax's are for root only) or malformed, and the three are never confused.
//!
//! Reads only: nothing here writes to sysfs. (`persistence` writes the one attribute that is a command.)

#![forbid(unsafe_code)]

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::{fs, io};

use thiserror::Error;

/// What went wrong in sysfs: the attribute could not be read, or its text is not what the kernel documents.
#[derive(Debug, Error)]
pub enum SysfsError {
    /// A read, readlink or directory listing failed.
    #[error("cannot read {}", path.display())]
    Read {
        /// The attribute, link or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The attribute's text is not a value of its kind.
    #[error("{} says {text:?}, which is not {expected}", path.display())]
    Malformed {
        /// The attribute.
        path: PathBuf,
        /// Its text, trimmed.
        text: String,
        /// What it should have been.
        expected: &'static str,
    },
}

impl SysfsError {
    /// True when the entry is not there: the device went away, or the kernel does not have the attribute.
    pub fn is_missing(&self) -> bool {
        match self {
            // ENXIO and ENODEV are what a read gets from an attribute whose device is being removed.
            Self::Read { source, .. } => {
                source.kind() == ErrorKind::NotFound
                    || matches!(
                        source.raw_os_error(),
                        Some(libc::ENXIO | libc::ENODEV | libc::ENOTDIR)
                    )
            }
            Self::Malformed { .. } => false,
        }
    }

    fn is_forbidden(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == ErrorKind::PermissionDenied)
    }
}

/// One directory of sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sysfs(PathBuf);

impl Sysfs {
    pub(crate) fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: impl AsRef<Path>) -> Self {
        Self(self.0.join(name))
    }

    pub(crate) fn exists(&self) -> bool {
        self.0.exists()
    }

    /// The directory with every link resolved: where the device really sits in the tree.
    pub(crate) fn resolve(&self) -> Result<Self, SysfsError> {
        fs::canonicalize(&self.0)
            .map(Self)
            .map_err(|source| self.read_error(source))
    }

    pub(crate) fn parent(&self) -> Option<Self> {
        self.0.parent().map(|dir| Self(dir.to_owned()))
    }

    pub(crate) fn file_name(&self) -> Option<&str> {
        self.0.file_name().and_then(|name| name.to_str())
    }

    /// The names in the directory, in no order.
    pub(crate) fn entries(&self) -> Result<Vec<String>, SysfsError> {
        let names = fs::read_dir(&self.0).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        Ok(names
            .map_err(|source| self.read_error(source))?
            .into_iter()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect())
    }

    /// The last component of what the link `name` points at (`driver`, `subsystem`); `None` without the link.
    pub(crate) fn link_name(&self, name: &str) -> Result<Option<String>, SysfsError> {
        let link = self.join(name);
        match fs::read_link(&link.0) {
            Ok(target) => Ok(target
                .file_name()
                .map(|base| base.to_string_lossy().into_owned())),
            Err(source) if source.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(link.read_error(source)),
        }
    }

    /// An attribute's text without the trailing newline.
    pub(crate) fn text(&self, name: &str) -> Result<String, SysfsError> {
        let attribute = self.join(name);
        match fs::read_to_string(&attribute.0) {
            Ok(text) => Ok(text.trim_end().to_owned()),
            Err(source) => Err(attribute.read_error(source)),
        }
    }

    /// An attribute parsed by `parse`, whose failure is reported as "not `expected`".
    pub(crate) fn parsed<T>(
        &self,
        name: &str,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, SysfsError> {
        let text = self.text(name)?;
        parse(&text).ok_or_else(|| SysfsError::Malformed {
            path: self.0.join(name),
            text,
            expected,
        })
    }

    pub(crate) fn number<T: Number>(&self, name: &str) -> Result<T, SysfsError> {
        self.parsed(name, "a number", parse_number)
    }

    /// `Ok(None)` when the attribute is absent or for root only.
    pub(crate) fn optional<T>(read: Result<T, SysfsError>) -> Result<Option<T>, SysfsError> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_missing() || error.is_forbidden() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read_error(&self, source: io::Error) -> SysfsError {
        SysfsError::Read {
            path: self.0.clone(),
            source,
        }
    }
}

/// Integers that sysfs prints in decimal or as `0x...`.
pub(crate) trait Number: FromStr + TryFrom<u64> {}
impl Number for u32 {}
impl Number for u64 {}
impl Number for i32 {}

pub(crate) fn parse_number<T: Number>(text: &str) -> Option<T> {
    match text.strip_prefix("0x") {
        Some(hex) => T::try_from(u64::from_str_radix(hex, 16).ok()?).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hex_and_nothing_else() {
        assert_eq!(parse_number::<u64>("0x140000000"), Some(0x1_4000_0000));
        assert_eq!(parse_number::<u64>("2097152"), Some(2 << 20));
        assert_eq!(parse_number::<i32>("-1"), Some(-1));
        assert_eq!(parse_number::<u64>("-1"), None);
        assert_eq!(parse_number::<u32>("0x100000000"), None);
        assert_eq!(parse_number::<u64>("2M"), None);
        assert_eq!(parse_number::<u64>(""), None);
    }

    #[test]
    fn absent_and_malformed_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("size"), "many\n").unwrap();
        let sysfs = Sysfs::new(dir.path());
        assert!(sysfs.number::<u64>("align").unwrap_err().is_missing());
        let error = sysfs.number::<u64>("size").unwrap_err();
        assert!(!error.is_missing());
        assert!(
            error
                .to_string()
                .ends_with("size says \"many\", which is not a number")
        );
        assert!(
            Sysfs::optional(sysfs.number::<u64>("align"))
                .unwrap()
                .is_none()
        );
        Sysfs::optional(sysfs.number::<u64>("size")).unwrap_err();
    }
}
