//! The project's own binaries, built by cargo, and where the build directory is.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::child;
use crate::command::{CommandError, describe, output_of};

/// Cargo's messages on standard output, one JSON object per line; only this kind matters here.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Metadata {
    target_directory: PathBuf,
    workspace_root: PathBuf,
}

/// How binaries are built.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Profile {
    /// Close to release, quick to rebuild.
    Lab,
    /// As shipped.
    Release,
}

/// Binaries that could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Cargo.
    #[error(transparent)]
    Cargo(#[from] CommandError),
    /// Its answer.
    #[error("cargo metadata says something unintelligible")]
    Metadata(#[from] serde_json::Error),
    /// A binary is missing.
    #[error("cargo has built the packages {packages:?}, but no binary `{name}`")]
    NoBinary {
        /// The binary.
        name: String,
        /// What was built.
        packages: Vec<String>,
    },
}

/// Directories of the workspace.
#[derive(Clone, Debug)]
pub struct Workspace {
    /// Where the top `Cargo.toml` is.
    pub root: PathBuf,
    /// Where cargo builds.
    pub target: PathBuf,
}

/// Finds the workspace that the lab was built from.
pub fn workspace() -> Result<Workspace, BuildError> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let mut command = Command::new(cargo());
    command
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(manifest);
    let metadata: Metadata = serde_json::from_slice(&output_of(&mut command)?)?;
    Ok(Workspace {
        root: metadata.workspace_root,
        target: metadata.target_directory,
    })
}

/// Cargo, ready to be told what to do in the workspace. It ends with the lab.
pub fn cargo_in(workspace: &Workspace) -> Command {
    let mut command = Command::new(cargo());
    command.current_dir(&workspace.root).stdin(Stdio::null());
    child::die_with_parent(&mut command, Vec::new());
    command
}

/// Builds packages' binaries; gives them by name.
pub fn build(
    workspace: &Workspace,
    profile: Profile,
    packages: &[&str],
) -> Result<BTreeMap<String, PathBuf>, BuildError> {
    let mut command = cargo_in(workspace);
    let profile = match profile {
        Profile::Lab => "lab",
        Profile::Release => "release",
    };
    // Diagnostics go to standard error in words, the list of binaries to standard output.
    command.args([
        "build",
        "--bins",
        "--message-format",
        "json-render-diagnostics",
        "--profile",
        profile,
    ]);
    for package in packages {
        command.args(["--package", package]);
    }
    let text = output_of(&mut command)?;
    let messages = text
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Message>(line).ok());
    let named = messages.filter_map(|message| {
        let path = message.executable?;
        Some((path.file_name()?.to_string_lossy().into_owned(), path))
    });
    Ok(named.collect())
}

/// One of the binaries that [`build`] gave.
pub fn binary<'a>(
    binaries: &'a BTreeMap<String, PathBuf>,
    name: &str,
    packages: &[&str],
) -> Result<&'a Path, BuildError> {
    binaries
        .get(name)
        .map(PathBuf::as_path)
        .ok_or_else(|| BuildError::NoBinary {
            name: name.to_owned(),
            packages: packages
                .iter()
                .map(|package| (*package).to_owned())
                .collect(),
        })
}

/// Runs the workspace's unit and property tests, their output going where the lab's goes.
pub fn test(workspace: &Workspace) -> Result<(), CommandError> {
    let mut command = cargo_in(workspace);
    command.args([
        "test",
        "--quiet",
        "--workspace",
        "--no-fail-fast",
        "--profile",
        "lab",
    ]);
    let words = describe(&command);
    let status = command.status().map_err(|source| CommandError::Start {
        command: words.clone(),
        source,
    })?;
    if status.success() {
        return Ok(());
    }
    Err(CommandError::Failed {
        command: words,
        status,
        stderr: "(its output is above)".to_owned(),
    })
}

fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
