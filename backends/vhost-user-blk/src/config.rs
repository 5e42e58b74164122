//! What to serve and where: checked once, nothing after this parses anything.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use daxhund_vhost_user::source::{SourceError, number};
use thiserror::Error;

use crate::args::Args;

/// What the disk's bytes are on: a device-dax device, an image file or a block device.
pub use daxhund_vhost_user::source::Source as DiskSource;

/// The crate tells queues apart by the bits of a word.
pub const MOST_QUEUES: u16 = 64;
/// How long a frontend has to go by itself when the host wants the device, unless `removal_timeout=` says otherwise.
pub const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// In seconds. A removal that is held longer than that is as good as refused.
const LONGEST_REMOVAL_TIMEOUT: u64 = 3600;

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
    /// What is done when somebody wants the disk's device back.
    pub removal: RemovalPolicy,
    /// Who holds its removals back.
    pub removal_guard: RemovalGuard,
    /// What becomes of system calls that it does not need.
    pub seccomp: Seccomp,
    /// Where events are written.
    pub events: Option<PathBuf>,
    /// Where metrics are given.
    pub metrics_socket: Option<PathBuf>,
}

/// What is done when somebody on the host wants to take the disk's device away, and waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemovalPolicy {
    /// Whether it is given.
    pub on_removal: OnRemoval,
    /// How long a frontend has to go by itself.
    pub timeout: Duration,
}

/// `on_removal=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnRemoval {
    /// Whoever asked gets an error; the disk is served on.
    Refuse,
    /// When the frontend has gone, or its time is up, requests fail and the device is let go of.
    #[default]
    Stop,
}

/// `--removal-guard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum RemovalGuard {
    /// The daemon where there is one, else nobody, with a warning.
    #[default]
    #[value(skip)]
    Auto,
    /// Nobody.
    Off,
    /// The daemon, which has to be there at the start.
    Daemon,
}

/// `--seccomp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Seccomp {
    /// They kill.
    #[default]
    True,
    /// There is no filter.
    False,
    /// The kernel logs them.
    Log,
}

/// The command line makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not a disk.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// `--event-monitor` says no place.
    #[error("--event-monitor {text}: write path=PATH, of a file or a FIFO")]
    Events {
        /// What was given.
        text: String,
    },
    /// No such queues.
    #[error("--num-queues {asked}: give 1 to {MOST_QUEUES}")]
    Queues {
        /// What was asked for.
        asked: u16,
    },
    /// A part of `--dax` that is not known, or is there twice.
    #[error(
        "--dax: `{part}` is not offset=BYTES, size=BYTES, on_removal=stop|refuse or removal_timeout=SECONDS, or is given twice"
    )]
    Part {
        /// The part.
        part: String,
    },
    /// A policy that there is not.
    #[error("--dax: `{part}`: write on_removal=stop or on_removal=refuse")]
    OnRemoval {
        /// The part.
        part: String,
    },
    /// No such time.
    #[error("--dax: `{part}`: write a number of seconds up to {LONGEST_REMOVAL_TIMEOUT}")]
    Timeout {
        /// The part.
        part: String,
    },
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let (disk, more) = DiskSource::with_more(args.dax.as_deref(), args.file)?;
        let removal = RemovalPolicy::parse(&more)?;
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
            removal,
            removal_guard: args.removal_guard.unwrap_or_default(),
            seccomp: args.seccomp,
            events: args.event_monitor.map(events).transpose()?,
            metrics_socket: args.metrics_socket,
        })
    }
}

fn events(text: String) -> Result<PathBuf, ConfigError> {
    match text.strip_prefix("path=") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err(ConfigError::Events { text }),
    }
}

impl RemovalPolicy {
    /// From what is said of the device besides its part.
    fn parse(parts: &[&str]) -> Result<Self, ConfigError> {
        let (mut on_removal, mut timeout) = (None, None);
        for part in parts {
            let text = || (*part).to_owned();
            match part.split_once('=') {
                Some(("on_removal", value)) if on_removal.is_none() => {
                    on_removal = Some(match value {
                        "refuse" => OnRemoval::Refuse,
                        "stop" => OnRemoval::Stop,
                        _ => return Err(ConfigError::OnRemoval { part: text() }),
                    });
                }
                Some(("removal_timeout", value)) if timeout.is_none() => {
                    let seconds = number(value).filter(|it| *it <= LONGEST_REMOVAL_TIMEOUT);
                    let seconds = seconds.ok_or_else(|| ConfigError::Timeout { part: text() })?;
                    timeout = Some(Duration::from_secs(seconds));
                }
                _ => return Err(ConfigError::Part { part: text() }),
            }
        }
        Ok(Self {
            on_removal: on_removal.unwrap_or_default(),
            timeout: timeout.unwrap_or(REMOVAL_TIMEOUT),
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
            removal: RemovalPolicy {
                on_removal: OnRemoval::Stop,
                timeout: REMOVAL_TIMEOUT,
            },
            removal_guard: RemovalGuard::Auto,
            seccomp: Seccomp::True,
            events: None,
            metrics_socket: None,
        };
        assert_eq!(config, Ok(expected));
        let file = parse(&["--file", "/a,b=c", "--read-only"]).unwrap();
        assert_eq!(file.disk, DiskSource::File("/a,b=c".into()));
        assert!(file.read_only);
    }

    #[test]
    fn a_removal_is_answered_as_the_words_say() {
        let config = parse(&[
            "--dax",
            "/dev/dax1.0,on_removal=refuse,removal_timeout=0",
            "--removal-guard",
            "daemon",
        ]);
        let config = config.unwrap();
        assert_eq!(config.removal.on_removal, OnRemoval::Refuse);
        assert_eq!(config.removal.timeout, Duration::ZERO);
        assert_eq!(config.removal_guard, RemovalGuard::Daemon);
        for word in ["on", "auto"] {
            let words = ["blk", "--dax", "/d", "--removal-guard", word];
            Args::try_parse_from(words).unwrap_err();
        }
        // Nobody takes a file away.
        Args::try_parse_from(["blk", "--file", "/f", "--removal-guard", "off"]).unwrap_err();
    }

    #[test]
    fn who_watches_says_where() {
        let with = |word| parse(&["--file", "/f", "--event-monitor", word]);
        assert_eq!(with("path=/e=1").unwrap().events, Some("/e=1".into()));
        for word in ["/e", "path=", "fd=3"] {
            assert!(
                matches!(with(word), Err(ConfigError::Events { .. })),
                "{word}"
            );
        }
    }

    #[test]
    fn nonsense_is_named() {
        let error = parse(&["--dax", "size=1G"]).unwrap_err();
        assert!(matches!(error, ConfigError::Source(_)), "{error:?}");
        for (dax, expected) in [
            ("/dev/dax0.0,length=1G", "`length=1G` is not offset="),
            (
                "/dev/dax0.0,size=1G,size=2G",
                "`size=2G` is not offset=BYTES",
            ),
            ("/dev/dax0.0,on_removal=eject", "on_removal=stop or"),
            ("/dev/dax0.0,removal_timeout=3601", "up to 3600"),
            ("/dev/dax0.0,removal_timeout=1K", "up to 3600"),
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
