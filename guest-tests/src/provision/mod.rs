//! Gets what the lab needs onto this machine: QEMU installed, kernels and tools unpacked in a cache.
//!
//! Invariants: everything comes through apt, which checks it against signed lists; what is unpacked is keyed by the
//! package's exact version and never changes; with a filled cache nothing is asked of the network. Packages that
//! only the emulated host needs are unpacked, not installed.

pub mod apt;
pub mod cache;
pub mod kernel;
pub mod lab_kernel;
pub mod libraries;
mod vmlinux;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::progress::{note, step};
use apt::{AptError, Package};
use cache::{Cache, CacheError};
use kernel::{Kernel, KernelError};
use lab_kernel::LabKernelError;

/// Emulates the host.
pub const QEMU: &str = "qemu-system-x86_64";
/// Kernel series that the suite runs on, where the package sources offer them.
pub const SERIES: [&str; 2] = ["6.1", "6.12"];
/// Packages whose programs run on the emulated host and in its guests.
const TOOLS: [&str; 6] = [
    "busybox-static",
    "kmod",
    "ndctl",
    "daxctl",
    "e2fsprogs",
    "xfsprogs",
];
/// Packages with programs that keep a guest busy. They need so many libraries that they go into a disk of their own.
const LOADS: [&str; 2] = ["fio", "stress-ng"];
/// Packages of QEMU's with its storage daemon: Debian 12 has it in the first one, 13 in the second.
const PEERS: [&str; 2] = ["qemu-system-common", "qemu-utils"];
/// Debian 13 has the file system daemon in this one, 12 in the first of [`PEERS`].
const FS_DAEMON_PACKAGE: &str = "virtiofsd";
/// The package with the network daemon, and one that it depends on for a library whose name does not say so.
const NET_DAEMON_PACKAGES: [&str; 2] = ["dpdk-dev", "ibverbs-providers"];
/// What the network daemon loads by itself: how its packages' names start, and its files' names.
const NET_DRIVERS: [(&str, &str); 2] = [
    ("librte-net-vhost", "librte_net_vhost.so"),
    ("librte-mempool-ring", "librte_mempool_ring.so"),
];
/// The package with the HTTP client by which people speak to a VMM.
const HTTP_CLIENT: &str = "curl";
/// Written last, so that their presence says that all is there.
const TOOLS_LIST: &str = "tools.json";
const LOADS_LIST: &str = "loads.json";
const PEERS_LIST: &str = "peers.json";
const NET_DAEMON_LIST: &str = "net-daemon.json";
const HTTP_CLIENT_LIST: &str = "http-client.json";
/// Series that fresh lists of the package sources did not offer.
const ABSENT_LIST: &str = "series-not-offered.json";

/// Something that the lab needs and could not get.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// Packages.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The lab's own kernel.
    #[error(transparent)]
    LabKernel(#[from] LabKernelError),
    /// In neither of QEMU's packages that it is in.
    #[error("the packages {PEERS:?} have no {STORAGE_DAEMON}")]
    NoStorageDaemon,
    /// In none of the packages that it could be in.
    #[error("neither {PEERS:?} nor {FS_DAEMON_PACKAGE} of the package sources has {FS_DAEMON}")]
    NoFsDaemon,
    /// Not in its packages.
    #[error("the packages {NET_DAEMON_PACKAGES:?} and their libraries have no {file}")]
    NoNetDaemon {
        /// What is missing.
        file: &'static str,
    },
    /// Not in its package.
    #[error("the package {HTTP_CLIENT} has no program of that name")]
    NoHttpClient,
    /// Asked for a series that is in neither the cache nor the sources.
    #[error(
        "no kernel {series} in {sources}: this distribution's package sources offer {offered:?}; choose one of those or give a path"
    )]
    NoSuchSeries {
        /// What was asked for.
        series: String,
        /// Where it was looked for.
        sources: &'static str,
        /// What there is.
        offered: Vec<String>,
    },
}

/// Serves disks to VMMs; it comes with QEMU.
const STORAGE_DAEMON: &str = "qemu-storage-daemon";

/// Serves directories to VMMs.
const FS_DAEMON: &str = "virtiofsd";

/// Serves networks to VMMs: DPDK's, for tests.
const NET_DAEMON: &str = "dpdk-testpmd";

/// Everything that the lab runs on.
#[derive(Debug)]
pub struct Provisioned {
    /// Where things are kept.
    pub cache: Cache,
    /// Programs for the emulated host.
    pub tools: Tools,
    /// Programs that keep a guest busy.
    pub loads: Tools,
    /// Other projects' programs that daxhund talks to.
    pub peers: Tools,
    /// Another one of them, with very many libraries.
    net_daemon: Tools,
    /// The HTTP client.
    http_client: Tools,
    /// Kernels, oldest series first; at least one.
    pub kernels: Vec<Kernel>,
}

/// A program and what it loads by itself.
#[derive(Clone, Debug)]
pub struct Daemon<'a> {
    /// The program.
    pub program: PathBuf,
    /// What it loads.
    pub drivers: Vec<PathBuf>,
    /// Where its libraries are.
    pub roots: &'a [PathBuf],
}

/// Unpacked packages with programs and their libraries.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Tools {
    /// The packages, by which the images made of them are keyed.
    pub packages: Vec<Package>,
    /// Where each is unpacked.
    pub roots: Vec<PathBuf>,
}

impl Tools {
    /// Whether every one of these packages is unpacked. A list from before a package was wanted lacks it.
    fn have(&self, names: &[&str]) -> bool {
        let listed = |name: &&str| self.packages.iter().any(|package| package.name == **name);
        names.iter().all(listed) && self.roots.iter().all(|root| root.is_dir())
    }

    /// The packages and their versions: what an image made of them depends on.
    pub fn versions(&self) -> String {
        let packages = self.packages.iter();
        let named = packages.map(|package| format!("{}={}", package.name, package.version));
        named.collect::<Vec<_>>().join(" ")
    }

    /// Finds a program in whichever directory its package puts it.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        let places = [
            "bin",
            "usr/bin",
            "sbin",
            "usr/sbin",
            "usr/lib/qemu",
            "usr/libexec",
        ];
        let candidates = self
            .roots
            .iter()
            .flat_map(|root| places.map(|place| root.join(place).join(name)));
        candidates.into_iter().find(|path| path.is_file())
    }

    /// Finds a library whose file is named so, but for its version.
    fn library(&self, name: &str) -> Option<PathBuf> {
        let name = format!("{name}.");
        let is_so_named = |path: &PathBuf| {
            let file = path.file_name().map(|file| file.to_string_lossy());
            file.is_some_and(|file| file.starts_with(&name)) && path.is_file()
        };
        self.roots
            .iter()
            .filter_map(|root| fs::read_dir(root.join("usr/lib/x86_64-linux-gnu")).ok())
            .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
            .find(is_so_named)
    }
}

/// Whether the package sources are asked for newer versions of what the cache holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Freshness {
    /// What the cache holds will do; without a gap in it, nothing is asked of the network.
    Cached,
    /// The newest there is.
    Newest,
}

/// Provides everything; `wanted` names kernel series or paths, and means all series there are when empty.
pub fn provide(wanted: &[String], freshness: Freshness) -> Result<Provisioned, ProvisionError> {
    let cache = Cache::open()?;
    let _lock = cache.lock()?;
    if freshness == Freshness::Newest {
        fetch_lists()?;
    }
    provide_qemu()?;
    let tools = provide_tools(&cache, &TOOLS, TOOLS_LIST, freshness)?;
    let loads = provide_tools(&cache, &LOADS, LOADS_LIST, freshness)?;
    let peers = provide_peers(&cache, freshness)?;
    let net_daemon = provide_net_daemon(&cache, freshness)?;
    let http_client = provide_tools(&cache, &[HTTP_CLIENT], HTTP_CLIENT_LIST, freshness)?;
    let kernels = provide_kernels(&cache, wanted, freshness)?;
    Ok(Provisioned {
        cache,
        tools,
        loads,
        peers,
        net_daemon,
        http_client,
        kernels,
    })
}

impl Provisioned {
    /// QEMU's storage daemon.
    pub fn storage_daemon(&self) -> Result<PathBuf, ProvisionError> {
        let found = self.peers.program(STORAGE_DAEMON);
        found.ok_or(ProvisionError::NoStorageDaemon)
    }

    /// The daemon of virtio-fs.
    pub fn fs_daemon(&self) -> Result<PathBuf, ProvisionError> {
        let found = self.peers.program(FS_DAEMON);
        found.ok_or(ProvisionError::NoFsDaemon)
    }

    /// The HTTP client, and where its libraries are.
    pub fn http_client(&self) -> Result<(PathBuf, &[PathBuf]), ProvisionError> {
        let program = self.http_client.program(HTTP_CLIENT);
        let program = program.ok_or(ProvisionError::NoHttpClient)?;
        Ok((program, &self.http_client.roots))
    }

    /// The daemon of networks.
    pub fn net_daemon(&self) -> Result<Daemon<'_>, ProvisionError> {
        let missing = |file| move || ProvisionError::NoNetDaemon { file };
        let tools = &self.net_daemon;
        let program = tools.program(NET_DAEMON);
        let drivers = NET_DRIVERS.map(|(_, file)| tools.library(file).ok_or_else(missing(file)));
        Ok(Daemon {
            program: program.ok_or_else(missing(NET_DAEMON))?,
            drivers: drivers.into_iter().collect::<Result<_, _>>()?,
            roots: &tools.roots,
        })
    }
}

/// Builds the lab's own kernel, unless the cache has it.
pub fn build_lab_kernel() -> Result<Kernel, ProvisionError> {
    let cache = Cache::open()?;
    let _building = cache.lock_kernel_build()?;
    // Tests go on while it builds: nobody else touches what a build works on.
    let lock = cache.lock()?;
    fetch_lists()?;
    Ok(lab_kernel::build(&cache, lock)?)
}

fn provide_qemu() -> Result<(), ProvisionError> {
    if apt::program_in_path(QEMU) {
        return Ok(());
    }
    fetch_lists()?;
    step("installing QEMU", || {
        apt::install(&["qemu-system-x86", "seabios", "ipxe-qemu"])
    })?;
    Ok(())
}

/// Packages with their libraries, unpacked; `list` is where it is written that they are there.
fn provide_tools(
    cache: &Cache,
    names: &[&str],
    list: &str,
    freshness: Freshness,
) -> Result<Tools, ProvisionError> {
    let list = cache.path(list);
    if freshness == Freshness::Cached
        && let Some(tools) = cache.read_json::<Tools>(&list)
        && tools.have(names)
    {
        return Ok(tools);
    }
    fetch_lists()?;
    step(&format!("downloading {}", names.join(", ")), || {
        let packages = apt::candidates(&apt::with_libraries(names)?)?;
        let roots = unpack(cache, &packages)?;
        let tools = Tools { packages, roots };
        cache.write_json(&list, &tools)?;
        Ok(tools)
    })
}

/// The package of the file system daemon is asked for where there is one.
fn provide_peers(cache: &Cache, freshness: Freshness) -> Result<Tools, ProvisionError> {
    let peers = provide_tools(cache, &PEERS, PEERS_LIST, freshness)?;
    if peers.program(FS_DAEMON).is_some() {
        return Ok(peers);
    }
    let names = [&PEERS[..], &[FS_DAEMON_PACKAGE]].concat();
    provide_tools(cache, &names, PEERS_LIST, freshness)
}

/// The packages of its drivers are named after the release, so the cache is asked for the files.
fn provide_net_daemon(cache: &Cache, freshness: Freshness) -> Result<Tools, ProvisionError> {
    if freshness == Freshness::Cached
        && let Some(tools) = cache.read_json::<Tools>(&cache.path(NET_DAEMON_LIST))
        && tools.have(&NET_DAEMON_PACKAGES)
        && NET_DRIVERS
            .iter()
            .all(|(_, file)| tools.library(file).is_some())
    {
        return Ok(tools);
    }
    fetch_lists()?;
    let daemon = apt::candidate(NET_DAEMON_PACKAGES[0])?;
    let mut names: Vec<String> = NET_DAEMON_PACKAGES.map(str::to_owned).into();
    for (prefix, _) in NET_DRIVERS {
        names.push(apt::built_with(&daemon, prefix)?);
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    provide_tools(cache, &names, NET_DAEMON_LIST, freshness)
}

fn provide_kernels(
    cache: &Cache,
    wanted: &[String],
    freshness: Freshness,
) -> Result<Vec<Kernel>, ProvisionError> {
    if wanted.is_empty() {
        return provide_all_series(cache, freshness);
    }
    let provide_one = |name: &String| {
        if name == lab_kernel::NAME {
            Ok(lab_kernel::cached(cache)?)
        } else if Path::new(name).exists() {
            Ok(Kernel::from_path(cache, Path::new(name))?)
        } else {
            provide_series(cache, name, freshness)
        }
    };
    wanted.iter().map(provide_one).collect()
}

/// Every series of [`SERIES`] that there is. What the sources lack is remembered, so that a later run need not ask again.
fn provide_all_series(cache: &Cache, freshness: Freshness) -> Result<Vec<Kernel>, ProvisionError> {
    let list = cache.path(ABSENT_LIST);
    let mut absent: Vec<String> = match freshness {
        Freshness::Cached => cache.read_json(&list).unwrap_or_default(),
        Freshness::Newest => Vec::new(),
    };
    let mut kernels = Vec::new();
    for series in SERIES {
        if absent.iter().any(|name| name == series) {
            continue;
        }
        match provide_series(cache, series, freshness) {
            Ok(kernel) => kernels.push(kernel),
            Err(ProvisionError::NoSuchSeries { .. }) => absent.push(series.to_owned()),
            Err(error) => return Err(error),
        }
    }
    if kernels.is_empty() {
        return Err(no_such_series(
            &SERIES.join(" or "),
            &apt::names("linux-image-")?,
        ));
    }
    cache.write_json(&list, &absent)?;
    Ok(kernels)
}

/// The newest kernel of a series that the cache holds, else the newest that the sources offer.
fn provide_series(
    cache: &Cache,
    series: &str,
    freshness: Freshness,
) -> Result<Kernel, ProvisionError> {
    if freshness == Freshness::Cached
        && let Some(root) = kernel::newest_cached(cache, series)
    {
        return Ok(Kernel::from_tree(cache, &root)?);
    }
    fetch_lists()?;
    let name = series_in_sources(series)?;
    let package = apt::candidate(&name)?;
    let packages = std::slice::from_ref(&package);
    let roots = step(&format!("downloading the kernel {name}"), || {
        unpack(cache, packages)
    })?;
    note(&format!(
        "kernel {series}: {} {}",
        package.name, package.version
    ));
    let root = roots.first().ok_or_else(|| no_such_series(series, &[]))?;
    Ok(Kernel::from_tree(cache, root)?)
}

/// The package of the newest kernel of a series.
fn series_in_sources(series: &str) -> Result<String, ProvisionError> {
    let names = apt::names("linux-image-")?;
    let newest = kernel::newest(names.iter().map(String::as_str), series);
    newest.ok_or_else(|| no_such_series(series, &names))
}

/// Before anything is looked up that the cache lacks, once in a process. A machine that was set up from an image has lists
/// that name versions which the archive has replaced since, or none.
fn fetch_lists() -> Result<(), AptError> {
    static FETCHED: Mutex<bool> = Mutex::new(false);
    let mut fetched = FETCHED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*fetched {
        step("fetching package lists", apt::update)?;
        *fetched = true;
    }
    Ok(())
}

fn no_such_series(series: &str, names: &[String]) -> ProvisionError {
    let offered = kernel::series_in(names.iter().map(String::as_str));
    ProvisionError::NoSuchSeries {
        series: series.to_owned(),
        sources: "the cache or the package sources",
        offered,
    }
}

/// Where the packages are unpacked; downloads those that are not.
fn unpack(cache: &Cache, packages: &[Package]) -> Result<Vec<PathBuf>, ProvisionError> {
    let roots: Vec<PathBuf> = packages
        .iter()
        .map(|package| cache.package_root(package))
        .collect();
    let missing: Vec<Package> = packages
        .iter()
        .filter(|package| !cache.package_root(package).is_dir())
        .cloned()
        .collect();
    if !missing.is_empty() {
        let scratch = cache.scratch()?;
        apt::download(&missing, scratch.path())?;
        for package in &missing {
            let tree = scratch.path().join("tree");
            apt::unpack(package, scratch.path(), &tree)?;
            cache.keep(&tree, &cache.package_root(package))?;
        }
    }
    Ok(roots)
}
