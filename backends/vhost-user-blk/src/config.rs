//! What to serve and where: checked once, nothing after this parses anything.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use daxhund_vhost_user::policy::{Policy, PolicyError};
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
    /// Of removals, events, metrics and system calls.
    pub policy: Policy,
}

/// The command line makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not a disk.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// What is said of removals or events.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// No such queues.
    #[error("--num-queues {asked}: give 1 to {MOST_QUEUES}")]
    Queues {
        /// What was asked for.
        asked: u16,
    },
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let (disk, more) = DiskSource::with_more(args.dax.as_deref(), args.file)?;
        let policy = Policy::new(args.policy, &more)?;
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
            policy,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;
    use daxhund_monitor::Form;
    use daxhund_vhost_user::event::Place;
    use daxhund_vhost_user::policy::{
        OnRemoval, REMOVAL_TIMEOUT, RemovalGuard, RemovalPolicy, Seccomp,
    };

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
            policy: Policy {
                removal: RemovalPolicy {
                    on_removal: OnRemoval::Stop,
                    timeout: REMOVAL_TIMEOUT,
                },
                removal_guard: RemovalGuard::Auto,
                seccomp: Seccomp::True,
                events: None,
                metrics_socket: None,
            },
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
        assert_eq!(config.policy.removal.on_removal, OnRemoval::Refuse);
        assert_eq!(config.policy.removal.timeout, Duration::ZERO);
        assert_eq!(config.policy.removal_guard, RemovalGuard::Daemon);
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
        for (word, path, form) in [
            ("path=/e=1", "/e=1", Form::Ch),
            ("path=/e,format=jsonl", "/e", Form::JsonLines),
        ] {
            let path = path.into();
            let place = Some(Place { path, form });
            assert_eq!(with(word).unwrap().policy.events, place);
        }
        for word in ["/e", "path=", "fd=3", "path=/e,format=xml"] {
            assert!(
                matches!(
                    with(word),
                    Err(ConfigError::Policy(PolicyError::Events { .. }))
                ),
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
