//! What to lend and where: checked once, nothing after this parses anything.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use daxhund_vhost_user::policy::{Policy, PolicyError};
use daxhund_vhost_user::source::{Source, SourceError};
use thiserror::Error;

use crate::args::Args;

/// What the daemon does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where to listen; `None`: on the socket that systemd hands over.
    pub socket_path: Option<PathBuf>,
    /// The memory.
    pub source: Source,
    /// Nobody writes, and the memory is shared with others who lend it so.
    pub read_only: bool,
    /// A range that is in use is no error: whoever has it is waited for.
    pub rejoin: bool,
    /// Of removals, events, metrics and system calls.
    pub policy: Policy,
}

/// The command line makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not memory.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// What is said of removals or events.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

impl TryFrom<Args> for Config {
    type Error = ConfigError;

    fn try_from(args: Args) -> Result<Self, ConfigError> {
        let (source, more) = Source::with_more(args.dax.as_deref(), args.file)?;
        let policy = Policy::new(args.policy, &more)?;
        Ok(Self {
            socket_path: args.socket_path,
            source,
            read_only: args.read_only,
            rejoin: args.rejoin,
            policy,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;
    use daxhund_vhost_user::policy::{OnRemoval, RemovalGuard};

    use super::*;

    fn parse(words: &[&str]) -> Result<Config, ConfigError> {
        Config::try_from(Args::try_parse_from([&["pmem"], words].concat()).unwrap())
    }

    #[test]
    fn a_part_of_a_device_and_what_becomes_of_it_are_read_once() {
        let dax = "/dev/dax1.0,removal_timeout=3,size=2G,on_removal=refuse";
        let config = parse(&["--dax", dax, "--removal-guard", "daemon"]).unwrap();
        let source = Source::Dax {
            path: "/dev/dax1.0".into(),
            offset: None,
            size: Some(2 << 30),
        };
        assert_eq!(config.source, source);
        assert_eq!(config.policy.removal.on_removal, OnRemoval::Refuse);
        assert_eq!(config.policy.removal.timeout, Duration::from_secs(3));
        assert_eq!(config.policy.removal_guard, RemovalGuard::Daemon);
        let error = parse(&["--dax", "/d,length=1G"]).unwrap_err().to_string();
        assert!(error.contains("`length=1G`"), "{error}");
        let error = parse(&["--file", "/f", "--event-monitor", "/e"]).unwrap_err();
        assert!(matches!(error, ConfigError::Policy(_)), "{error:?}");
        // Nobody takes a file away.
        Args::try_parse_from(["pmem", "--file", "/f", "--removal-guard", "off"]).unwrap_err();
    }
}
