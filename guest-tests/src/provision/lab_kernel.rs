//! The lab's own kernel: what no Debian kernel has (iommufd, VFIO by character devices, injectors of errors), everything built in.
//!
//! Debian's source of one series, its `x86_64_defconfig`, and `resources/lab-kernel.config` on top, of which every line is checked
//! afterwards. Source and objects stay in the cache, so that a changed line costs a partial build; the kernel itself is keyed by
//! the source's version and the fragment. It is only built when it is asked for: that takes a quarter of an hour.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::apt::{self, AptError, Package};
use super::cache::{Cache, CacheError, CacheLock};
use super::kernel::{Kernel, KernelError};
use crate::child;
use crate::command::{CommandError, describe, text_of};
use crate::image::digest;
use crate::progress::{note, step};

/// What it is called where a series is expected.
pub const NAME: &str = "lab";
const SOURCE_PACKAGE: &str = "linux-source-6.12";
/// The name of the archive's only directory, and of the archive.
const SOURCE: &str = "linux-source-6.12";
const FRAGMENT: &str = include_str!("../../../resources/lab-kernel.config");
/// Programs and headers that the build takes, and the packages that have them.
const TOOLS: [(&str, &str); 9] = [
    ("gcc", "gcc"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("xz", "xz-utils"),
    ("/usr/include/stdlib.h", "libc6-dev"),
    ("/usr/include/gelf.h", "libelf-dev"),
    ("/usr/include/openssl/ssl.h", "libssl-dev"),
];
const TAIL_LINES: usize = 30;

/// The lab's kernel cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LabKernelError {
    /// Packages.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A program of this machine.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The kernel that was built.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Nobody has built it.
    #[error(
        "the lab's own kernel is not in the cache, or it was built with other options; `cargo lab kernel` builds it, which takes a quarter of an hour"
    )]
    NotBuilt,
    /// The source did not take the options.
    #[error("{source_version} does not take the options of resources/lab-kernel.config as they stand:\n{}", .lost.join("\n"))]
    Lost {
        /// The source's version.
        source_version: String,
        /// Each of them, and what became of it.
        lost: Vec<String>,
    },
    /// The build failed.
    #[error("`{command}` failed; all it said is in {log}, which ends:\n{tail}")]
    Build {
        /// The command.
        command: String,
        /// Its output.
        log: PathBuf,
        /// The end of that.
        tail: String,
    },
    /// A file cannot be read or written.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The newest one in the cache that has today's options.
pub fn cached(cache: &Cache) -> Result<Kernel, LabKernelError> {
    let suffix = format!("-{}", digest(&[FRAGMENT.as_bytes()]));
    let entries = fs::read_dir(cache.path("kernels")).into_iter().flatten();
    let places = entries.flatten().map(|entry| entry.path());
    let newest = places
        .filter(|path| path.to_string_lossy().ends_with(&suffix))
        .max_by_key(|path| super::kernel::numbers(&path.to_string_lossy()));
    let place = newest.ok_or(LabKernelError::NotBuilt)?;
    Ok(named(Kernel::from_tree(cache, &place)?))
}

/// Builds it, unless the newest source there is was built with today's options already. `lock` is held until the packages are there.
pub fn build(cache: &Cache, lock: CacheLock) -> Result<Kernel, LabKernelError> {
    let package = apt::candidate(SOURCE_PACKAGE)?;
    let key = digest(&[FRAGMENT.as_bytes()]);
    let place = cache
        .path("kernels")
        .join(format!("{}-{key}", package.version));
    if !place.is_dir() {
        install_tools()?;
        let workshop = Workshop::open(cache, &package)?;
        drop(lock);
        workshop.configure()?;
        workshop.compile()?;
        let made = cache.scratch()?;
        let tree = made.path().join("tree");
        workshop.collect(&tree)?;
        directory(&cache.path("kernels"))?;
        cache.keep(&tree, &place)?;
        note(&format!(
            "source and objects stay in {}, for the next change of an option",
            workshop.root.display()
        ));
    }
    Ok(named(Kernel::from_tree(cache, &place)?))
}

fn named(mut kernel: Kernel) -> Kernel {
    NAME.clone_into(&mut kernel.name);
    kernel
}

fn install_tools() -> Result<(), LabKernelError> {
    let missing: Vec<&str> = TOOLS
        .into_iter()
        .filter(|(what, _)| !Path::new(what).is_file() && !apt::program_in_path(what))
        .map(|(_, package)| package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    step(&format!("installing {}", missing.join(" ")), || {
        apt::install(&missing)
    })?;
    Ok(())
}

/// Where one version of the source is built.
struct Workshop {
    version: String,
    root: PathBuf,
    source: PathBuf,
    /// Objects, beside the source.
    objects: PathBuf,
}

impl Workshop {
    /// Unpacks the source, unless it is there.
    fn open(cache: &Cache, package: &Package) -> Result<Self, LabKernelError> {
        let name = cache.package_root(package);
        let name = name.file_name().unwrap_or_default();
        let root = cache.path("kernel-build").join(name);
        let source = root.join(SOURCE);
        if !source.is_dir() {
            directory(&root)?;
            step(
                &format!("unpacking {} {}", package.name, package.version),
                || {
                    let scratch = cache.scratch()?;
                    let packages = std::slice::from_ref(package);
                    apt::download(packages, scratch.path())?;
                    let tree = scratch.path().join("tree");
                    apt::unpack(package, scratch.path(), &tree)?;
                    let archive = tree.join(format!("usr/src/{SOURCE}.tar.xz"));
                    let mut command = Command::new("tar");
                    command.arg("-xJf").arg(archive).arg("-C").arg(&tree);
                    text_of(&mut command)?;
                    cache.keep(&tree.join(SOURCE), &source)?;
                    Ok::<_, LabKernelError>(())
                },
            )?;
        }
        let objects = root.join("build");
        directory(&objects)?;
        Ok(Self {
            version: format!("{} {}", package.name, package.version),
            root,
            source,
            objects,
        })
    }

    /// The defaults, the fragment on top, and a look at what has become of it.
    fn configure(&self) -> Result<(), LabKernelError> {
        let fragment = self.objects.join("lab.config");
        write(&fragment, FRAGMENT)?;
        self.run(make(&["x86_64_defconfig"]))?;
        let mut merge = Command::new("scripts/kconfig/merge_config.sh");
        merge.args(["-m", "-O"]).arg(&self.objects);
        merge.arg(self.objects.join(".config")).arg(&fragment);
        self.run(merge)?;
        self.run(make(&["olddefconfig"]))?;
        let lost = lost_options(FRAGMENT, &read(&self.objects.join(".config"))?);
        if lost.is_empty() {
            return Ok(());
        }
        Err(LabKernelError::Lost {
            source_version: self.version.clone(),
            lost,
        })
    }

    fn compile(&self) -> Result<(), LabKernelError> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        step(
            &format!("building {}, which takes a while", self.version),
            || self.run(make(&["bzImage", &format!("-j{jobs}")])),
        )
    }

    /// A tree like that of a kernel's package, without modules.
    fn collect(&self, tree: &Path) -> Result<(), LabKernelError> {
        let release = read(&self.objects.join("include/config/kernel.release"))?;
        let release = release.trim();
        let modules = format!("lib/modules/{release}");
        for (from, to) in [
            ("arch/x86/boot/bzImage", format!("boot/vmlinuz-{release}")),
            (".config", format!("boot/config-{release}")),
            ("System.map", format!("boot/System.map-{release}")),
            ("modules.builtin", format!("{modules}/modules.builtin")),
            (
                "modules.builtin.modinfo",
                format!("{modules}/modules.builtin.modinfo"),
            ),
        ] {
            let (from, to) = (self.objects.join(from), tree.join(to));
            directory(to.parent().unwrap_or(tree))?;
            fs::copy(&from, &to).map_err(|source| LabKernelError::File { path: from, source })?;
        }
        Ok(())
    }

    /// Runs a command in the source, its output going to a log.
    fn run(&self, mut command: Command) -> Result<(), LabKernelError> {
        let log = self.root.join("build.log");
        let failed = |source| LabKernelError::File {
            path: log.clone(),
            source,
        };
        let out = File::create(&log).map_err(failed)?;
        let err = out.try_clone().map_err(failed)?;
        // What the kernel says of its making has nothing of this machine in it.
        command
            .current_dir(&self.source)
            .envs([
                ("KBUILD_BUILD_USER", "daxhund"),
                ("KBUILD_BUILD_HOST", "lab"),
            ])
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err);
        child::die_with_parent(&mut command, Vec::new());
        let words = describe(&command);
        let status = command.status().map_err(|source| CommandError::Start {
            command: words.clone(),
            source,
        })?;
        if status.success() {
            return Ok(());
        }
        let text = fs::read(&log).map_err(failed)?;
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        Err(LabKernelError::Build {
            command: words,
            log,
            tail: lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n"),
        })
    }
}

/// Make, told of the objects by a path relative to the source: with an absolute one, all are made again when the cache moves.
fn make(words: &[&str]) -> Command {
    let mut command = Command::new("make");
    command.arg("O=../build").args(words);
    command
}

/// Lines of a fragment that do not hold in a configuration, and what is there instead.
fn lost_options(fragment: &str, config: &str) -> Vec<String> {
    let mut lost = Vec::new();
    for line in fragment.lines() {
        if let Some(name) = line
            .strip_prefix("# CONFIG_")
            .and_then(|rest| rest.strip_suffix(" is not set"))
        {
            // A symbol whose conditions do not hold is not in the file at all.
            if let Some(set) = config.lines().find(|set| is_of(set, name)) {
                lost.push(format!("{line}: it is {set}"));
            }
        } else if let Some((name, _)) = line
            .strip_prefix("CONFIG_")
            .and_then(|rest| rest.split_once('='))
        {
            match config.lines().find(|set| is_of(set, name)) {
                Some(set) if set == line => {}
                Some(set) => lost.push(format!("{line}: it is {set}")),
                None => lost.push(format!("{line}: it is not set; what does it depend on?")),
            }
        }
    }
    lost
}

/// Whether a line sets this symbol.
fn is_of(line: &str, name: &str) -> bool {
    line.strip_prefix("CONFIG_")
        .and_then(|rest| rest.strip_prefix(name))
        .is_some_and(|rest| rest.starts_with('='))
}

fn directory(path: &Path) -> Result<(), LabKernelError> {
    fs::create_dir_all(path).map_err(|source| LabKernelError::File {
        path: path.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<String, LabKernelError> {
    fs::read_to_string(path).map_err(|source| LabKernelError::File {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, text: &str) -> Result<(), LabKernelError> {
    fs::write(path, text).map_err(|source| LabKernelError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_fragment_says_something() {
        for line in FRAGMENT.lines().filter(|line| !line.is_empty()) {
            let option = line.starts_with("CONFIG_") && line.contains('=');
            let off = line.starts_with("# CONFIG_") && line.ends_with(" is not set");
            assert!(option || off || !line.contains("CONFIG_"), "{line}");
        }
        assert_eq!(lost_options(FRAGMENT, FRAGMENT), Vec::<String>::new());
    }

    #[test]
    fn options_that_did_not_stick_are_named() {
        let config = "CONFIG_KVM=y\nCONFIG_KVM_AMD=m\nCONFIG_VT=y\n# CONFIG_USB is not set\n";
        let lost = lost_options(
            "CONFIG_KVM=y\nCONFIG_KVM_AMD=y\n# CONFIG_VT is not set\n# CONFIG_USB is not set\nCONFIG_DAX=y\n",
            config,
        );
        assert_eq!(
            lost,
            [
                "CONFIG_KVM_AMD=y: it is CONFIG_KVM_AMD=m",
                "# CONFIG_VT is not set: it is CONFIG_VT=y",
                "CONFIG_DAX=y: it is not set; what does it depend on?",
            ]
        );
    }

    #[test]
    fn a_kernel_of_other_options_is_none() {
        let place = tempfile::tempdir().unwrap();
        let cache = Cache::at(place.path().to_owned()).unwrap();
        assert!(matches!(cached(&cache), Err(LabKernelError::NotBuilt)));
        directory(&cache.path("kernels").join("6.12.117-1-0123456789abcdef")).unwrap();
        assert!(matches!(cached(&cache), Err(LabKernelError::NotBuilt)));
    }
}
