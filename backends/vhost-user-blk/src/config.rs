//! What to serve and where: checked once, nothing after this parses anything.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use daxhund_vhost_user::source::SourceError;
use thiserror::Error;

use crate::args::Args;

/// What the disk's bytes are on: a device-dax device, an image file or a block device.
pub use daxhund_vhost_user::source::Source as DiskSource;

/// The crate tells queues apart by the bits of a word.
pub const MOST_QUEUES: u16 = 64;

/// What the daemon does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where to listen; `None`: on the socket that systemd hands over.
    pub socket_path: Option<PathBuf>,
    /// The disk.
    pub disk: DiskSource,
    /// Writes are refused, and the disk is shared with others who do the same.
    pub read_only: bool,
    /// 1 to [`MOST_QUEUES`].
    pub num_queues: u16,
}

/// The command line makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No such queues.
    #[error("--num-queues {asked}: give 1 to {MOST_QUEUES}")]
    Queues {
        /// What was asked for.
        asked: u16,
    },
    /// Not a device with a part of it.
    #[error(transparent)]
    Source(#[from] SourceError),
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let disk = DiskSource::new(args.dax.as_deref(), args.file)?;
        if !(1..=MOST_QUEUES).contains(&args.num_queues) {
            return Err(ConfigError::Queues {
                asked: args.num_queues,
            });
        }
        Ok(Self {
            socket_path: args.socket_path,
            disk,
            read_only: args.read_only,
            num_queues: args.num_queues,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn parse(words: &[&str]) -> Result<Config, ConfigError> {
        let all = [&["blk", "--socket-path", "/s"], words].concat();
        Config::try_from(Args::try_parse_from(all).unwrap())
    }

    #[test]
    fn a_part_of_a_device_is_read_once() {
        let config = parse(&[
            "--dax",
            "/dev/dax1.0,size=2G,offset=4m",
            "--num-queues",
            "4",
        ]);
        let expected = Config {
            socket_path: Some("/s".into()),
            disk: DiskSource::Dax {
                path: "/dev/dax1.0".into(),
                offset: Some(4 << 20),
                size: Some(2 << 30),
            },
            read_only: false,
            num_queues: 4,
        };
        assert_eq!(config, Ok(expected));
        let file = parse(&["--file", "/a,b=c", "--read-only"]).unwrap();
        assert_eq!(file.disk, DiskSource::File("/a,b=c".into()));
        assert!(file.read_only);
    }

    #[test]
    fn nonsense_is_named() {
        let error = parse(&["--dax", "size=1G"]).unwrap_err();
        assert!(matches!(error, ConfigError::Source(_)), "{error:?}");
        for queues in ["0", "65"] {
            let error = parse(&["--file", "/x", "--num-queues", queues]).unwrap_err();
            assert!(matches!(error, ConfigError::Queues { .. }));
        }
        Args::try_parse_from(["blk", "--socket-path", "/s"]).unwrap_err();
        Args::try_parse_from(["blk", "--file", "/x", "--dax", "/y"]).unwrap_err();
    }
}
