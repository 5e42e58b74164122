//! `--kernel`, `--initramfs`, `--cmdline`: what the guest boots.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::json::{JsonObject, NotBuilt, Shape};
use super::schema::as_sent;

/// What the guest boots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct PayloadConfig {
    /// A bzImage or an ELF kernel with a PVH entry (`--kernel`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// An initial RAM file system (`--initramfs`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line (`--cmdline`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

impl JsonObject for PayloadConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::empty("firmware"),
            NotBuilt::empty("igvm"),
            NotBuilt::empty("host_data"),
        ],
        ..Shape::WHOLE
    };
}

/// A payload that cannot be booted, whatever the files hold.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PayloadError {
    /// No kernel is named.
    #[error("no kernel to boot: give --kernel PATH (a bzImage, or an ELF kernel with a PVH entry)")]
    NoKernel,
    /// A path is the empty text.
    #[error("{flag} names an empty path: give {flag} PATH or leave it out")]
    EmptyPath {
        /// The word.
        flag: &'static str,
    },
    /// The kernel would read the command line only up to the NUL.
    #[error(
        "--cmdline has a NUL byte at position {position}: the kernel would stop reading there; remove it"
    )]
    NulInCmdline {
        /// Where it is, in bytes.
        position: usize,
    },
}

impl PayloadConfig {
    /// The kernel's path, once the payload is known to be sound.
    pub(super) fn check(&self) -> Result<PathBuf, PayloadError> {
        let kernel = self.kernel.as_ref().ok_or(PayloadError::NoKernel)?;
        if kernel.as_os_str().is_empty() {
            return Err(PayloadError::EmptyPath { flag: "--kernel" });
        }
        if self
            .initramfs
            .as_ref()
            .is_some_and(|path| path.as_os_str().is_empty())
        {
            return Err(PayloadError::EmptyPath {
                flag: "--initramfs",
            });
        }
        if let Some(position) = self.cmdline.as_ref().and_then(|line| line.find('\0')) {
            return Err(PayloadError::NulInCmdline { position });
        }
        Ok(kernel.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_needed_and_empty_paths_are_refused() {
        let none = PayloadConfig::default();
        assert_eq!(none.check(), Err(PayloadError::NoKernel));
        assert!(PayloadError::NoKernel.to_string().contains("--kernel PATH"));

        let kernel = PayloadConfig {
            kernel: Some("/boot/vmlinuz".into()),
            ..PayloadConfig::default()
        };
        assert_eq!(kernel.check(), Ok("/boot/vmlinuz".into()));

        let empty = PayloadConfig {
            initramfs: Some(PathBuf::new()),
            ..kernel.clone()
        };
        let error = empty.check().unwrap_err();
        assert_eq!(
            error,
            PayloadError::EmptyPath {
                flag: "--initramfs"
            }
        );
        assert!(
            error
                .to_string()
                .contains("--initramfs PATH or leave it out")
        );

        let empty = PayloadConfig {
            kernel: Some(PathBuf::new()),
            ..PayloadConfig::default()
        };
        assert_eq!(
            empty.check(),
            Err(PayloadError::EmptyPath { flag: "--kernel" })
        );

        let nul = PayloadConfig {
            cmdline: Some("ro\0quiet".into()),
            ..kernel
        };
        let error = nul.check().unwrap_err();
        assert_eq!(error, PayloadError::NulInCmdline { position: 2 });
        assert!(error.to_string().contains("NUL byte at position 2"));
    }
}
