//! From a bare machine to something that can boot: packages, binaries, images, the share.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::artifacts::{self, BuildError, Profile, Workspace};
use crate::host::machine::Machine;
use crate::host::{BootError, Host, HostSpec};
use crate::image::{self, ImageError};
use crate::progress::step;
use crate::provision::kernel::Kernel;
use crate::provision::{self, Freshness, ProvisionError, Provisioned};
use crate::share::{self, Initramfs, PeerError, ShareError};
use crate::signals;

/// Packages whose binaries the lab runs.
const PACKAGES: [&str; 5] = [
    "daxhund",
    "daxhund-guard",
    "daxhund-vhost-user-blk",
    "daxhund-vhost-user-pmem",
    "lab-agent",
];
const AGENT: &str = "lab-agent";

/// The lab could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Packages.
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    /// Binaries.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The share.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// Somebody else's programs.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The run's own directory.
    #[error("cannot use {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Everything that hosts are booted from. Its directory goes away with it.
#[derive(Debug)]
pub struct Setup {
    /// The workspace.
    pub workspace: Workspace,
    /// QEMU, kernels, tools.
    pub provisioned: Provisioned,
    agent: PathBuf,
    run: RunDirectory,
}

/// A directory for one run of the lab, named after its process.
#[derive(Debug)]
struct RunDirectory {
    path: PathBuf,
    keep: AtomicBool,
}

impl Setup {
    /// Provides packages, builds the binaries and makes the images.
    pub fn prepare(profile: Profile, wanted: &[String]) -> Result<Self, SetupError> {
        let workspace = artifacts::workspace()?;
        let provisioned = provision::provide(wanted, Freshness::Cached)?;
        let binaries = step("building daxhund", || {
            artifacts::build(&workspace, profile, &PACKAGES)
        })?;
        let agent = artifacts::binary(&binaries, AGENT, &PACKAGES)?.to_owned();
        let run = RunDirectory::new(&workspace.target.join("lab"))?;
        let setup = Self {
            workspace,
            provisioned,
            agent,
            run,
        };
        setup.prepare_share(&binaries)?;
        Ok(setup)
    }

    fn prepare_share(&self, binaries: &BTreeMap<String, PathBuf>) -> Result<(), SetupError> {
        let mut initramfs = Vec::new();
        for kernel in &self.provisioned.kernels {
            for form in [Initramfs::Plain, Initramfs::Tools] {
                let image = image::guest(&self.provisioned, kernel, &self.agent, form)?;
                initramfs.push((kernel.release.clone(), form, image));
            }
        }
        share::prepare(
            &self.share(),
            binaries,
            &self.provisioned.kernels,
            &initramfs,
        )?;
        let load = image::load(&self.provisioned)?;
        let place = share::LOAD_PATH.trim_start_matches("/lab/");
        share::add(&load, &self.share().join(place))?;
        let daemon = self.provisioned.storage_daemon()?;
        let roots = &self.provisioned.peers.roots;
        share::add_peer(&self.share(), "storage-daemon", &daemon, roots)?;
        let daemon = self.provisioned.fs_daemon()?;
        share::add_peer(&self.share(), "virtiofsd", &daemon, roots)?;
        let daemon = self.provisioned.net_daemon()?;
        share::add_peer_with_drivers(&self.share(), "testpmd", &daemon)?;
        let (client, roots) = self.provisioned.http_client()?;
        share::add_peer(&self.share(), "curl", &client, roots)?;
        Ok(())
    }

    /// The kernel of a host that only one is wanted of: the newest.
    pub fn kernel(&self) -> &Kernel {
        let kernels = &self.provisioned.kernels;
        kernels
            .last()
            .expect("provisioning gives at least one kernel or an error")
    }

    /// Directory that hosts see as `/lab`.
    pub fn share(&self) -> PathBuf {
        self.run.path.join("share")
    }

    /// A place for a file that outlives hosts with this kernel, but not the run. Other kernels' hosts run at the same time.
    pub fn file(&self, kernel: &Kernel, name: &str) -> PathBuf {
        self.run.path.join(format!("{name}-{}", kernel.release))
    }

    /// Leaves the run's directory, with its logs, where it is.
    pub fn keep_logs(&self) -> &Path {
        self.run.keep.store(true, Ordering::Relaxed);
        &self.run.path
    }

    /// What a host with this kernel is made of.
    pub fn host_spec(&self, kernel: &Kernel, machine: Machine) -> Result<HostSpec, SetupError> {
        Ok(HostSpec {
            kernel: kernel.clone(),
            initramfs: image::host(&self.provisioned, kernel, &self.agent)?,
            share: self.share(),
            logs: self.file(kernel, "host"),
            machine,
        })
    }

    /// Boots another host beside the one that is up; `name` tells their logs apart. The idle one costs next to nothing.
    pub fn boot_beside(
        &self,
        kernel: &Kernel,
        machine: Machine,
        name: &str,
    ) -> Result<Host, StartError> {
        let mut spec = self.host_spec(kernel, machine)?;
        spec.logs = self.file(kernel, name);
        Ok(Host::boot(&spec)?)
    }

    /// Boots a host with this kernel.
    pub fn boot(&self, kernel: &Kernel, machine: Machine) -> Result<Host, StartError> {
        let spec = self.host_spec(kernel, machine)?;
        Ok(step(
            &format!("booting the emulated host, kernel {}", kernel.release),
            || Host::boot(&spec),
        )?)
    }
}

/// A host could not be set up or booted.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Setting up.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// Booting.
    #[error(transparent)]
    Boot(#[from] BootError),
}

impl RunDirectory {
    fn new(parent: &Path) -> Result<Self, SetupError> {
        let path = parent.join(format!("run-{}", std::process::id()));
        let failed = |source| SetupError::Directory {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(parent).map_err(failed)?;
        remove_abandoned(parent);
        fs::create_dir_all(&path).map_err(failed)?;
        signals::remove_at_end(&path);
        Ok(Self {
            path,
            keep: AtomicBool::new(false),
        })
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        if !self.keep.load(Ordering::Relaxed)
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            eprintln!("lab: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes the directories of runs whose process is gone without having had the time to.
fn remove_abandoned(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name
            .strip_prefix("run-")
            .and_then(|digits| digits.parse::<u32>().ok())
        else {
            continue;
        };
        if !Path::new("/proc").join(pid.to_string()).exists()
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            eprintln!("lab: cannot remove {}: {error}", entry.path().display());
        }
    }
}
