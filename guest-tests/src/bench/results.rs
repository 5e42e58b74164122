//! Where the results of a bench are kept.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::boot::BenchError;
use crate::progress::note;
use crate::setup::Setup;

/// Keeps results as JSON in the build directory, under this name, and says where.
pub(super) fn keep(
    setup: &Setup,
    name: &str,
    results: &impl Serialize,
) -> Result<PathBuf, BenchError> {
    let place = setup.workspace.target.join("lab/bench");
    let path = place.join(format!("{name}.json"));
    let write = |path: &Path| {
        fs::create_dir_all(&place)?;
        fs::write(path, serde_json::to_vec_pretty(results)?)
    };
    write(&path).map_err(|source| BenchError::Write {
        path: path.clone(),
        source,
    })?;
    note(&format!("results: {}", path.display()));
    Ok(path)
}
