//! A kernel for the emulated host and its guests: the image in both its forms, and the modules.
//!
//! A kernel comes from an unpacked Debian package, from a directory of the same shape (`boot/vmlinuz-RELEASE`,
//! `lib/modules/RELEASE`), or is a single bzImage with everything built in. Releases are compared number by number.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use goblin::elf::Elf;

use super::cache::{Cache, CacheError};
use super::vmlinux::{self, ExtractError};

/// A kernel that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No image.
    #[error("no kernel in {path}: expected boot/vmlinuz-* there, or a bzImage")]
    NoImage {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image is not what it should be.
    #[error("cannot get the ELF image out of {path}")]
    Extract {
        /// The bzImage.
        path: PathBuf,
        /// Why.
        source: ExtractError,
    },
    /// A module is neither there nor built in.
    #[error("kernel {release} has no module `{module}`")]
    NoModule {
        /// The kernel.
        release: String,
        /// The module.
        module: String,
    },
    /// A module is damaged.
    #[error("{path} is no kernel module: {reason}")]
    BadModule {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// A kernel, ready to boot.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// What it is asked for by: the first two numbers of the release, as in `6.12`; or the name of the lab's own.
    pub name: String,
    /// What `uname -r` says on it.
    pub release: String,
    /// The image as distributed.
    pub bzimage: PathBuf,
    /// The ELF image inside it, with a PVH entry: starts without decompressing itself.
    pub vmlinux: PathBuf,
    /// `lib/modules/RELEASE`, unless everything is built in.
    modules: Option<PathBuf>,
}

/// A module's file name, its contents, and what it is to be loaded with.
#[derive(Clone, Debug)]
pub struct Module {
    /// Name with underscores.
    pub name: String,
    /// Not compressed.
    pub data: Vec<u8>,
}

impl Kernel {
    /// A directory or a bzImage.
    pub fn from_path(cache: &Cache, path: &Path) -> Result<Self, KernelError> {
        if path.is_dir() {
            return Self::from_tree(cache, path);
        }
        let release = vmlinux::release_of(&read(path)?).map_err(|source| KernelError::Extract {
            path: path.to_owned(),
            source,
        })?;
        Self::new(cache, release, path.to_owned(), None)
    }

    /// A directory with `boot` and `lib/modules`.
    pub fn from_tree(cache: &Cache, root: &Path) -> Result<Self, KernelError> {
        let boot = root.join("boot");
        let entries = fs::read_dir(&boot).map_err(|_| KernelError::NoImage {
            path: root.to_owned(),
        })?;
        let mut images: Vec<(String, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                Some((name.strip_prefix("vmlinuz-")?.to_owned(), entry.path()))
            })
            .collect();
        images.sort_by_key(|(release, _)| numbers(release));
        let (release, image) = images.pop().ok_or_else(|| KernelError::NoImage {
            path: root.to_owned(),
        })?;
        let places =
            ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(&release));
        let modules = places.into_iter().find(|path| path.is_dir());
        Self::new(cache, release, image, modules)
    }

    fn new(
        cache: &Cache,
        release: String,
        bzimage: PathBuf,
        modules: Option<PathBuf>,
    ) -> Result<Self, KernelError> {
        let numbers = numbers(&release);
        let name = numbers
            .iter()
            .take(2)
            .map(u64::to_string)
            .collect::<Vec<_>>()
            .join(".");
        let vmlinux = extract(cache, &release, &bzimage)?;
        Ok(Self {
            name,
            release,
            bzimage,
            vmlinux,
            modules,
        })
    }

    /// What says which modules are built in, by file name: nothing for a single image, of which nobody knows.
    pub fn built_in_lists(&self) -> Result<Vec<(&'static str, Vec<u8>)>, KernelError> {
        let Some(root) = &self.modules else {
            return Ok(Vec::new());
        };
        let names = ["modules.builtin", "modules.builtin.modinfo"];
        let present = names.into_iter().filter(|name| root.join(name).is_file());
        present
            .map(|name| Ok((name, read(&root.join(name))?)))
            .collect()
    }

    /// The named modules and what they depend on, in an order in which they can be loaded. What is built in is left out.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>, KernelError> {
        let Some(root) = &self.modules else {
            return Ok(Vec::new());
        };
        let mut files = BTreeMap::new();
        index_modules(&root.join("kernel"), &mut files);
        let built_in = built_in_modules(root)?;
        let mut ordered: Vec<Module> = Vec::new();
        for name in names {
            self.add_module(name, &files, &built_in, &mut ordered)?;
        }
        Ok(ordered)
    }

    fn add_module(
        &self,
        name: &str,
        files: &BTreeMap<String, PathBuf>,
        built_in: &BTreeSet<String>,
        ordered: &mut Vec<Module>,
    ) -> Result<(), KernelError> {
        let name = name.replace('-', "_");
        if built_in.contains(&name) || ordered.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let path = files.get(&name).ok_or_else(|| KernelError::NoModule {
            release: self.release.clone(),
            module: name.clone(),
        })?;
        let data = read_module(path)?;
        let needed = dependencies(&data).map_err(|reason| KernelError::BadModule {
            path: path.clone(),
            reason,
        })?;
        for dependency in needed {
            self.add_module(&dependency, files, built_in, ordered)?;
        }
        ordered.push(Module { name, data });
        Ok(())
    }
}

/// Finds every module below a directory by its name.
fn index_modules(directory: &Path, files: &mut BTreeMap<String, PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let file_name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            index_modules(&path, files);
        } else if let Some((stem, _)) = file_name.split_once(".ko") {
            files.insert(stem.replace('-', "_"), path);
        }
    }
}

fn built_in_modules(root: &Path) -> Result<BTreeSet<String>, KernelError> {
    let path = root.join("modules.builtin");
    let text = String::from_utf8_lossy(&read(&path)?).into_owned();
    let stem = |line: &str| {
        Some(
            Path::new(line)
                .file_stem()?
                .to_string_lossy()
                .replace('-', "_"),
        )
    };
    Ok(text.lines().filter_map(stem).collect())
}

/// Reads a module's file and undoes its compression.
fn read_module(path: &Path) -> Result<Vec<u8>, KernelError> {
    let packed = read(path)?;
    let extension = path
        .extension()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let failed = |source| KernelError::Read {
        path: path.to_owned(),
        source,
    };
    let mut data = Vec::new();
    match extension.as_str() {
        "ko" => data = packed,
        "xz" => {
            lzma_rust2::XzReader::new(packed.as_slice(), false)
                .read_to_end(&mut data)
                .map_err(failed)?;
        }
        "zst" => {
            let reader = ruzstd::decoding::StreamingDecoder::new(packed.as_slice())
                .map_err(io::Error::other);
            reader
                .map_err(failed)?
                .read_to_end(&mut data)
                .map_err(failed)?;
        }
        other => {
            let reason = format!("unknown compression `{other}`");
            return Err(KernelError::BadModule {
                path: path.to_owned(),
                reason,
            });
        }
    }
    Ok(data)
}

/// What a module says that it needs, from its `.modinfo` section.
fn dependencies(data: &[u8]) -> Result<Vec<String>, String> {
    let elf = Elf::parse(data).map_err(|error| error.to_string())?;
    let section = elf
        .section_headers
        .iter()
        .find(|section| elf.shdr_strtab.get_at(section.sh_name) == Some(".modinfo"))
        .and_then(|section| data.get(section.file_range()?))
        .ok_or("it has no .modinfo section")?;
    Ok(parse_dependencies(section))
}

fn parse_dependencies(modinfo: &[u8]) -> Vec<String> {
    let fields = modinfo
        .split(|byte| *byte == 0)
        .map(String::from_utf8_lossy);
    let lists = fields.filter_map(|field| field.strip_prefix("depends=").map(str::to_owned));
    let names = lists.flat_map(|list| list.split(',').map(str::to_owned).collect::<Vec<_>>());
    names.filter(|name| !name.is_empty()).collect()
}

/// The ELF image of a bzImage, from the cache or made now.
fn extract(cache: &Cache, release: &str, bzimage: &Path) -> Result<PathBuf, KernelError> {
    let packed = read(bzimage)?;
    let key = super::super::image::digest(&[&packed]);
    let place = cache
        .path("images")
        .join(format!("vmlinux-{release}-{key}"));
    if !place.is_file() {
        let image = vmlinux::extract(&packed).map_err(|source| KernelError::Extract {
            path: bzimage.to_owned(),
            source,
        })?;
        cache.write(&place, &image)?;
    }
    Ok(place)
}

fn read(path: &Path) -> Result<Vec<u8>, KernelError> {
    fs::read(path).map_err(|source| KernelError::Read {
        path: path.to_owned(),
        source,
    })
}

/// The numbers of a release or version, for comparing.
pub(super) fn numbers(release: &str) -> Vec<u64> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// The release in the name of a plain amd64 kernel's package, as in `linux-image-6.1.0-52-amd64`.
/// Packages for clouds, real time, debugging and signing, and those that only depend on another, have none.
fn release_in(name: &str) -> Option<&str> {
    let release = name.strip_prefix("linux-image-")?;
    let version = release.strip_suffix("-amd64")?;
    let plain = !["cloud", "rt", "unsigned", "dbg"]
        .iter()
        .any(|flavour| version.split('-').any(|part| part == *flavour));
    (plain && numbers(version).len() >= 3).then_some(release)
}

/// The series of a release.
fn series_of(release: &str) -> Option<String> {
    match numbers(release).as_slice() {
        [major, minor, ..] => Some(format!("{major}.{minor}")),
        _ => None,
    }
}

/// The newest package of a series.
pub fn newest<'a>(names: impl Iterator<Item = &'a str>, series: &str) -> Option<String> {
    names
        .filter_map(|name| Some((release_in(name)?, name)))
        .filter(|(release, _)| series_of(release).as_deref() == Some(series))
        .max_by_key(|(release, _)| numbers(release))
        .map(|(_, name)| name.to_owned())
}

/// The series that packages exist for.
pub fn series_in<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let found: BTreeSet<String> = names.filter_map(release_in).filter_map(series_of).collect();
    found.into_iter().collect()
}

/// Where the newest kernel of a series is unpacked.
pub fn newest_cached(cache: &Cache, series: &str) -> Option<PathBuf> {
    let roots = cache.package_roots();
    let package = |root: &PathBuf| {
        root.file_name()?
            .to_str()?
            .split_once('_')
            .map(|(name, _)| name.to_owned())
    };
    let names: Vec<String> = roots.iter().filter_map(package).collect();
    let wanted = newest(names.iter().map(String::as_str), series)?;
    // Of several builds of one release the last in order of version is taken.
    roots
        .into_iter()
        .rfind(|root| package(root).as_deref() == Some(wanted.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 9] = [
        "linux-image-6.1.0-9-amd64",
        "linux-image-6.1.0-52-amd64",
        "linux-image-6.1.0-53-rt-amd64",
        "linux-image-6.1.0-54-cloud-amd64",
        "linux-image-6.1.0-55-amd64-unsigned",
        "linux-image-6.12.9+deb12-amd64",
        "linux-image-6.12.117+deb12-amd64",
        "linux-image-6.12-amd64",
        "linux-image-amd64",
    ];

    #[test]
    fn the_newest_plain_kernel_is_chosen_by_number() {
        let newest = |series| newest(NAMES.into_iter(), series);
        assert_eq!(newest("6.1").as_deref(), Some("linux-image-6.1.0-52-amd64"));
        assert_eq!(
            newest("6.12").as_deref(),
            Some("linux-image-6.12.117+deb12-amd64")
        );
        assert_eq!(newest("6"), None);
        assert_eq!(series_in(NAMES.into_iter()), ["6.1", "6.12"]);
    }

    #[test]
    fn the_cache_is_asked_by_series() {
        let place = tempfile::tempdir().unwrap();
        let cache = Cache::at(place.path().to_owned()).unwrap();
        for name in [
            "linux-image-6.1.0-9-amd64_6.1.1-1",
            "linux-image-6.1.0-52-amd64_6.1.180-1",
            "kmod_30",
        ] {
            fs::create_dir(cache.path("packages").join(name)).unwrap();
        }
        let root = newest_cached(&cache, "6.1").unwrap();
        assert!(root.ends_with("linux-image-6.1.0-52-amd64_6.1.180-1"));
        assert_eq!(newest_cached(&cache, "6.12"), None);
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let modinfo = b"license=GPL\0depends=kvm,irqbypass,ccp\0retpoline=Y\0";
        assert_eq!(parse_dependencies(modinfo), ["kvm", "irqbypass", "ccp"]);
        assert_eq!(parse_dependencies(b"depends=\0"), Vec::<String>::new());
    }
}
