//! What to serve and where: checked once, nothing after this parses anything.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use thiserror::Error;

use crate::args::Args;

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

/// What the disk's bytes are on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A part of a device-dax device.
    Dax {
        /// The device.
        path: PathBuf,
        /// Where the part begins; `None`: at the beginning.
        offset: Option<u64>,
        /// Its length; `None`: to the end.
        size: Option<u64>,
    },
    /// An image file or a block device.
    File(PathBuf),
}

/// The command line makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not one disk.
    #[error("give the disk by either --dax DEVICE or --file PATH")]
    NoDisk,
    /// No such queues.
    #[error("--num-queues {asked}: give 1 to {MOST_QUEUES}")]
    Queues {
        /// What was asked for.
        asked: u16,
    },
    /// `--dax` without a device.
    #[error("--dax {text}: name the device first, as in --dax /dev/dax0.0,offset=0,size=1G")]
    NoDevice {
        /// What was given.
        text: String,
    },
    /// A part of `--dax` that is not known, or is there twice.
    #[error("--dax: `{part}` is not offset=BYTES or size=BYTES, or is given twice")]
    Part {
        /// The part.
        part: String,
    },
    /// A number that is none.
    #[error("--dax: `{part}` is not a number of bytes: write 4096, 512M, 4G or 1T")]
    Bytes {
        /// The part.
        part: String,
    },
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let disk = match (args.dax, args.file) {
            (Some(dax), None) => dax_source(&dax)?,
            (None, Some(path)) => DiskSource::File(path),
            _ => return Err(ConfigError::NoDisk),
        };
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

fn dax_source(text: &str) -> Result<DiskSource, ConfigError> {
    let mut parts = text.split(',');
    let path = parts.next().unwrap_or_default();
    if path.is_empty() || path.contains('=') {
        return Err(ConfigError::NoDevice { text: text.into() });
    }
    let (mut offset, mut size) = (None, None);
    for part in parts {
        let (place, value) = match part.split_once('=') {
            Some(("offset", value)) if offset.is_none() => (&mut offset, value),
            Some(("size", value)) if size.is_none() => (&mut size, value),
            _ => return Err(ConfigError::Part { part: part.into() }),
        };
        *place = Some(bytes(value).ok_or_else(|| ConfigError::Bytes { part: part.into() })?);
    }
    Ok(DiskSource::Dax {
        path: path.into(),
        offset,
        size,
    })
}

/// `4096`, `4K`, `512M`, `4G`, `1T`.
fn bytes(text: &str) -> Option<u64> {
    const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
    let unit = UNITS
        .iter()
        .find(|(letter, _)| text.ends_with(*letter) || text.ends_with(letter.to_ascii_lowercase()));
    let (digits, shift) = unit.map_or((text, 0), |(_, shift)| (&text[..text.len() - 1], *shift));
    // `u64::from_str` would take a leading plus sign.
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = is_number.then(|| digits.parse().ok())??;
    number.checked_mul(1 << shift)
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
        for (dax, expected) in [
            ("", "name the device first"),
            ("size=1G", "name the device first"),
            ("/dev/dax0.0,length=1G", "`length=1G` is not offset="),
            (
                "/dev/dax0.0,size=1G,size=2G",
                "`size=2G` is not offset=BYTES or size=BYTES, or is given twice",
            ),
            ("/dev/dax0.0,size=", "`size=` is not a number"),
            ("/dev/dax0.0,size=+1", "`size=+1` is not a number"),
            ("/dev/dax0.0,size=99999999T", "is not a number"),
            ("/dev/dax0.0,size=1é", "is not a number"),
        ] {
            let error = parse(&["--dax", dax]).unwrap_err().to_string();
            assert!(error.contains(expected), "{dax}: {error}");
        }
        for queues in ["0", "65"] {
            let error = parse(&["--file", "/x", "--num-queues", queues]).unwrap_err();
            assert!(matches!(error, ConfigError::Queues { .. }));
        }
        Args::try_parse_from(["blk", "--socket-path", "/s"]).unwrap_err();
        Args::try_parse_from(["blk", "--file", "/x", "--dax", "/y"]).unwrap_err();
    }
}
