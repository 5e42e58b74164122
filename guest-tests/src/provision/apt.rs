//! Debian packages, by the distribution's own tools. apt checks what it downloads against its signed lists.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::command::{CommandError, output_of, text_of};

/// Libraries that the emulated host takes from this machine, where the release binaries were linked.
const OWN_LIBRARIES: [&str; 4] = ["libc6", "libgcc-s1", "libcrypt1", "libc-bin"];

/// A package that could not be found, downloaded or installed.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// Not a Debian system.
    #[error(
        "the lab gets QEMU, kernels and tools as Debian packages, and `{program}` is not here: run it on Debian 12 or 13"
    )]
    NotDebian {
        /// The tool that is missing.
        program: &'static str,
    },
    /// The sources do not have it.
    #[error("no package `{name}` in the package sources; try `apt-get update`")]
    Unknown {
        /// Name of the package.
        name: String,
    },
    /// What is built with another package is not there.
    #[error(
        "no package `{prefix}...` of version {} in the package sources, which `{}` needs; try `apt-get update`", package.version, package.name
    )]
    NotBuilt {
        /// How its name would start.
        prefix: String,
        /// What it would be built with.
        package: Package,
    },
    /// Installing takes rights.
    #[error(
        "cannot install {packages}: neither root nor sudo; run `apt-get install --no-install-recommends {packages}` as root"
    )]
    NoRights {
        /// What was to be installed.
        packages: String,
    },
    /// A tool failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The download is not where it should be.
    #[error("apt-get has downloaded `{name}`, but there is no package file in {directory}")]
    NoFile {
        /// Name of the package.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// A directory cannot be used.
    #[error("cannot use {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A package at an exact version.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Package {
    /// Name.
    pub name: String,
    /// Version, with epoch.
    pub version: String,
}

/// Whether a program can be run by its name.
pub fn program_in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(name).is_file())
}

/// Names of the packages that start so.
pub fn names(prefix: &str) -> Result<Vec<String>, AptError> {
    let text = text_of(tool("apt-cache")?.args(["pkgnames", prefix]))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// The version of a package that apt would install.
pub fn candidate(name: &str) -> Result<Package, AptError> {
    let found = candidates(&[name.to_owned()])?.into_iter().next();
    found.ok_or_else(|| AptError::Unknown {
        name: name.to_owned(),
    })
}

/// The versions of several packages that apt would install; asking for all at once saves apt reading its lists again.
pub fn candidates(names: &[String]) -> Result<Vec<Package>, AptError> {
    let text = text_of(tool("apt-cache")?.arg("policy").args(names))?;
    let found = parse_candidates(&text);
    match names
        .iter()
        .find(|name| !found.iter().any(|package| package.name == **name))
    {
        Some(name) => Err(AptError::Unknown { name: name.clone() }),
        None => Ok(found),
    }
}

/// Reads `NAME:` lines and the `Candidate:` lines below them.
fn parse_candidates(policy: &str) -> Vec<Package> {
    let mut found = Vec::new();
    let mut name = "";
    for line in policy.lines() {
        if let Some(version) = line.trim().strip_prefix("Candidate:") {
            let version = version.trim();
            if version != "(none)" {
                found.push(Package {
                    name: name.to_owned(),
                    version: version.to_owned(),
                });
            }
        } else if !line.starts_with(' ') {
            name = line.trim_end_matches(':');
        }
    }
    found
}

/// The name of the package that starts so and is of the same version as another one. Of a library that is built with a program
/// there may be several, named after the interfaces of their releases.
pub fn built_with(package: &Package, prefix: &str) -> Result<String, AptError> {
    let names = names(prefix)?;
    let mut found = Vec::new();
    // Asked about nothing, it would tell of everything.
    if !names.is_empty() {
        found = parse_candidates(&text_of(tool("apt-cache")?.arg("policy").args(names))?);
    }
    found
        .into_iter()
        .find(|other| other.version == package.version)
        .map(|other| other.name)
        .ok_or_else(|| AptError::NotBuilt {
            prefix: prefix.to_owned(),
            package: package.clone(),
        })
}

/// Fetches the package lists.
pub fn update() -> Result<(), AptError> {
    as_root("apt-get", &["update", "-q"], "(package lists)")
}

/// Installs packages on this machine.
pub fn install(packages: &[&str]) -> Result<(), AptError> {
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(packages);
    as_root("apt-get", &arguments, &packages.join(" "))
}

/// Downloads packages into `scratch`, without installing them.
pub fn download(packages: &[Package], scratch: &Path) -> Result<(), AptError> {
    let wanted = packages
        .iter()
        .map(|package| format!("{}={}", package.name, package.version));
    let mut command = tool("apt-get")?;
    // The sandbox user could not write here, and apt would only warn about it.
    command
        .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
        .args(wanted);
    output_of(command.current_dir(scratch))?;
    Ok(())
}

/// Unpacks a package that was downloaded into `scratch`.
pub fn unpack(package: &Package, scratch: &Path, tree: &Path) -> Result<(), AptError> {
    let prefix = format!("{}_{}_", package.name, package.version.replace(':', "%3a"));
    let failed = |source| AptError::Directory {
        path: scratch.to_owned(),
        source,
    };
    let file = fs::read_dir(scratch)
        .map_err(failed)?
        .flatten()
        // The case of the escape differs between versions of apt.
        .find(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .to_lowercase()
                .starts_with(&prefix.to_lowercase())
        })
        .ok_or_else(|| AptError::NoFile {
            name: package.name.clone(),
            directory: scratch.to_owned(),
        })?;
    output_of(
        tool("dpkg-deb")?
            .arg("--extract")
            .arg(file.path())
            .arg(tree),
    )?;
    Ok(())
}

/// The packages and the libraries they depend on, directly or not, except those that this machine provides.
pub fn with_libraries(packages: &[&str]) -> Result<Vec<String>, AptError> {
    let text = text_of(
        tool("apt-cache")?
            .args(["depends", "--recurse", "--important"])
            .args(packages),
    )?;
    Ok(follow_libraries(packages, &text))
}

/// Follows libraries only: a program that a package depends on is not needed to run it here.
fn follow_libraries(packages: &[&str], depends: &str) -> Vec<String> {
    let mut blocks: BTreeMap<&str, String> = BTreeMap::new();
    let mut name = "";
    for line in depends.lines() {
        if line.starts_with([' ', '|']) {
            let block = blocks.entry(name).or_default();
            block.push_str(line);
            block.push('\n');
        } else {
            name = line;
        }
    }
    let mut found: Vec<String> = packages.iter().map(|name| (*name).to_owned()).collect();
    let mut next = 0;
    while let Some(name) = found.get(next) {
        let block = blocks.get(name.as_str()).map_or("", String::as_str);
        for dependency in parse_libraries(block) {
            if !found.contains(&dependency) {
                found.push(dependency);
            }
        }
        next += 1;
    }
    found
}

/// Names of libraries in the output of `apt-cache depends`. `<name>` is virtual and `|Depends` has an alternative below it.
fn parse_libraries(depends: &str) -> Vec<String> {
    depends
        .lines()
        .filter_map(|line| {
            let (kind, name) = line.trim().split_once(": ")?;
            let kind = kind.trim_start_matches('|');
            (kind == "Depends" || kind == "PreDepends").then_some(name)
        })
        .filter(|name| name.starts_with("lib") || name.starts_with("zlib"))
        // What programs are built with; none needs it to run.
        .filter(|name| !name.ends_with("-dev"))
        .filter(|name| !OWN_LIBRARIES.contains(name))
        .map(str::to_owned)
        .collect()
}

fn tool(program: &'static str) -> Result<Command, AptError> {
    if !program_in_path(program) {
        return Err(AptError::NotDebian { program });
    }
    let mut command = Command::new(program);
    command
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}

fn as_root(program: &'static str, arguments: &[&str], packages: &str) -> Result<(), AptError> {
    let mut command = tool(program)?;
    if !rustix::process::geteuid().is_root() {
        if !program_in_path("sudo") {
            return Err(AptError::NoRights {
                packages: packages.to_owned(),
            });
        }
        command = tool("sudo")?;
        command.args(["DEBIAN_FRONTEND=noninteractive", program]);
    }
    output_of(command.args(arguments))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_read_from_the_policy() {
        let policy = "ndctl:\n  Installed: (none)\n  Candidate: 1:76.1-1\n  Version table:\n     76 500\n\
                      gone:\n  Installed: (none)\n  Candidate: (none)\n";
        let found = parse_candidates(policy);
        assert_eq!(
            found,
            [Package {
                name: "ndctl".into(),
                version: "1:76.1-1".into()
            }]
        );
        assert!(parse_candidates("").is_empty());
    }

    #[test]
    fn libraries_of_programs_that_are_only_depended_on_are_not_followed() {
        let depends = "ndctl\n  Depends: libndctl6\n  Depends: perl\nlibndctl6\n  Depends: libuuid1\nperl\n  Depends: libperl5\n";
        assert_eq!(
            follow_libraries(&["ndctl"], depends),
            ["ndctl", "libndctl6", "libuuid1"]
        );
    }

    #[test]
    fn only_real_libraries_of_others_are_followed() {
        let depends = "ndctl\n  Depends: libc6\n |Depends: libjson-c5\n  PreDepends: zlib1g\n  Depends: libbuilt-dev\n  Depends: <libvirtual>\n    libreal\n  \
                       Depends: init-system-helpers\n  Suggests: libextra\n";
        assert_eq!(parse_libraries(depends), ["libjson-c5", "zlib1g"]);
    }
}
