//! Where downloads and what is made of them are kept: `$DAXHUND_LAB_CACHE`, else `daxhund-lab` in the user's cache directory.
//!
//! Outside the build directory, so that `cargo clean` does not cost a download. Every entry appears whole or not
//! at all: it is made in a scratch directory beside it and renamed. One process fills the cache at a time; one builds a kernel,
//! beside those who fill the rest.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use super::apt::Package;

/// The cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Nowhere to put it.
    #[error("no place for the cache: set DAXHUND_LAB_CACHE, XDG_CACHE_HOME or HOME")]
    NoPlace,
    /// A path in it fails.
    #[error(
        "cannot use {path} in the cache; `rm -rf` it to start afresh, or set DAXHUND_LAB_CACHE to another place"
    )]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// Keeps other processes from doing the same meanwhile.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

impl Cache {
    /// Opens the user's cache, creating it when it is not there.
    pub fn open() -> Result<Self, CacheError> {
        let var = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let root = var("DAXHUND_LAB_CACHE")
            .or_else(|| Some(var("XDG_CACHE_HOME")?.join("daxhund-lab")))
            .or_else(|| Some(var("HOME")?.join(".cache/daxhund-lab")))
            .ok_or(CacheError::NoPlace)?;
        Self::at(root)
    }

    /// Opens a cache at a place.
    pub fn at(root: PathBuf) -> Result<Self, CacheError> {
        for directory in [root.clone(), root.join("packages"), root.join("images")] {
            fs::create_dir_all(&directory).map_err(|source| CacheError::Path {
                path: directory,
                source,
            })?;
        }
        Ok(Self { root })
    }

    /// Waits until no other process fills the cache.
    pub fn lock(&self) -> Result<CacheLock, CacheError> {
        self.lock_by("lock")
    }

    /// Waits until no other process builds a kernel. Taken before [`Cache::lock`].
    pub fn lock_kernel_build(&self) -> Result<CacheLock, CacheError> {
        self.lock_by("kernel-build.lock")
    }

    fn lock_by(&self, name: &str) -> Result<CacheLock, CacheError> {
        let path = self.root.join(name);
        let failed = |source| CacheError::Path {
            path: path.clone(),
            source,
        };
        let file = File::create(&path).map_err(failed)?;
        file.lock().map_err(failed)?;
        Ok(CacheLock { _file: file })
    }

    /// A path in the cache.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Where a package is unpacked.
    pub fn package_root(&self, package: &Package) -> PathBuf {
        self.root.join("packages").join(format!(
            "{}_{}",
            package.name,
            package.version.replace(':', "%3a")
        ))
    }

    /// Names of what is unpacked.
    pub fn package_roots(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.root.join("packages"))
            .into_iter()
            .flatten()
            .flatten();
        let mut roots: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        roots.sort();
        roots
    }

    /// A directory on the cache's file system that goes away by itself.
    pub fn scratch(&self) -> Result<TempDir, CacheError> {
        let made = tempfile::Builder::new()
            .prefix(".scratch-")
            .tempdir_in(&self.root);
        made.map_err(|source| CacheError::Path {
            path: self.root.clone(),
            source,
        })
    }

    /// Moves what was made in a scratch directory to its place.
    pub fn keep(&self, made: &Path, place: &Path) -> Result<(), CacheError> {
        fs::rename(made, place).map_err(|source| CacheError::Path {
            path: place.to_owned(),
            source,
        })
    }

    /// Writes a file whole or not at all.
    pub fn write(&self, path: &Path, data: &[u8]) -> Result<(), CacheError> {
        let scratch = self.scratch()?;
        let made = scratch.path().join("file");
        fs::write(&made, data).map_err(|source| CacheError::Path {
            path: made.clone(),
            source,
        })?;
        self.keep(&made, path)
    }

    /// Writes a value as JSON, whole or not at all.
    pub fn write_json(&self, path: &Path, value: &impl Serialize) -> Result<(), CacheError> {
        let data = serde_json::to_vec_pretty(value).map_err(io::Error::from);
        self.write(
            path,
            &data.map_err(|source| CacheError::Path {
                path: path.to_owned(),
                source,
            })?,
        )
    }

    /// Reads what [`Cache::write_json`] wrote; nothing when it is absent or of another version's form.
    pub fn read_json<T: DeserializeOwned>(&self, path: &Path) -> Option<T> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_keyed_by_exact_version() {
        let place = tempfile::tempdir().unwrap();
        let cache = Cache::at(place.path().to_owned()).unwrap();
        let package = Package {
            name: "kmod".into(),
            version: "1:30-1".into(),
        };
        let root = cache.package_root(&package);
        assert!(root.ends_with("packages/kmod_1%3a30-1"));
        let scratch = cache.scratch().unwrap();
        fs::create_dir(scratch.path().join("tree")).unwrap();
        cache.keep(&scratch.path().join("tree"), &root).unwrap();
        assert_eq!(cache.package_roots(), [root]);
    }

    #[test]
    fn a_damaged_list_counts_as_absent() {
        let place = tempfile::tempdir().unwrap();
        let cache = Cache::at(place.path().to_owned()).unwrap();
        let list = cache.path("tools.json");
        cache.write_json(&list, &["a"]).unwrap();
        assert_eq!(
            cache.read_json::<Vec<String>>(&list),
            Some(vec!["a".to_owned()])
        );
        fs::write(&list, "[\"a").unwrap();
        assert_eq!(cache.read_json::<Vec<String>>(&list), None);
    }
}
