//! What such daemons are told alike: what is done when the host wants a device back, who holds its removal, what becomes of
//! system calls that are not needed, and where is told what happens.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use daxhund_monitor::Form;
use thiserror::Error;

use crate::event::Place;
use crate::source::number;

/// How long a frontend has to go by itself when the host wants the device, unless `removal_timeout=` says otherwise.
pub const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// In seconds. A removal that is held longer than that is as good as refused.
const LONGEST_REMOVAL_TIMEOUT: u64 = 3600;

/// What is done when somebody on the host wants to take the device away, and waits.
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
    /// Whoever asked gets an error; the device is served on.
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

/// The words that every such daemon takes, as they are typed. A daemon whose device can't be taken away has `--file`.
#[derive(Debug, Args)]
pub struct PolicyArgs {
    /// Who holds removals of the device back until it is let go of: daxhund-guardd, or nobody; without the flag the daemon
    /// when its socket is there
    #[arg(long, value_enum, value_name = "WHO", conflicts_with = "file")]
    pub removal_guard: Option<RemovalGuard>,
    /// Tell what happens as JSON objects in this file or FIFO
    #[arg(long, value_name = "path=PATH[,format=ch|jsonl]")]
    pub event_monitor: Option<String>,
    /// Give counts of what was done to whoever connects to this unix socket
    #[arg(long, value_name = "PATH")]
    pub metrics_socket: Option<PathBuf>,
    /// System call filter: a call that is not on the list kills (true) or is logged by the kernel (log)
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pub seccomp: Seccomp,
}

/// What they mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What is done when somebody wants the device back.
    pub removal: RemovalPolicy,
    /// Who holds its removals back.
    pub removal_guard: RemovalGuard,
    /// What becomes of system calls that are not needed.
    pub seccomp: Seccomp,
    /// Where events are written.
    pub events: Option<Place>,
    /// Where metrics are given.
    pub metrics_socket: Option<PathBuf>,
}

/// What is typed makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PolicyError {
    /// `--event-monitor` says no place, or none of the forms.
    #[error(
        "--event-monitor {text}: write path=PATH, of a file or a FIFO, and format=ch or format=jsonl after it"
    )]
    Events {
        /// What was given.
        text: String,
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

impl Policy {
    /// `parts`: what is said of the device besides its part ([`crate::source::Source::with_more`]).
    pub fn new(args: PolicyArgs, parts: &[&str]) -> Result<Self, PolicyError> {
        Ok(Self {
            removal: RemovalPolicy::parse(parts)?,
            removal_guard: args.removal_guard.unwrap_or_default(),
            seccomp: args.seccomp,
            events: args.event_monitor.map(events).transpose()?,
            metrics_socket: args.metrics_socket,
        })
    }
}

impl RemovalPolicy {
    fn parse(parts: &[&str]) -> Result<Self, PolicyError> {
        let (mut on_removal, mut timeout) = (None, None);
        for part in parts {
            let text = || (*part).to_owned();
            match part.split_once('=') {
                Some(("on_removal", value)) if on_removal.is_none() => {
                    on_removal = Some(match value {
                        "refuse" => OnRemoval::Refuse,
                        "stop" => OnRemoval::Stop,
                        _ => return Err(PolicyError::OnRemoval { part: text() }),
                    });
                }
                Some(("removal_timeout", value)) if timeout.is_none() => {
                    let seconds = number(value).filter(|it| *it <= LONGEST_REMOVAL_TIMEOUT);
                    let seconds = seconds.ok_or_else(|| PolicyError::Timeout { part: text() })?;
                    timeout = Some(Duration::from_secs(seconds));
                }
                _ => return Err(PolicyError::Part { part: text() }),
            }
        }
        Ok(Self {
            on_removal: on_removal.unwrap_or_default(),
            timeout: timeout.unwrap_or(REMOVAL_TIMEOUT),
        })
    }
}

/// The place in `--event-monitor path=PATH[,format=FORM]`.
fn events(text: String) -> Result<Place, PolicyError> {
    let (place, form) = match text.rsplit_once(",format=") {
        Some((place, form)) => (place, form.parse().ok()),
        None => (text.as_str(), Some(Form::default())),
    };
    match (place.strip_prefix("path="), form) {
        (Some(path), Some(form)) if !path.is_empty() => Ok(Place {
            path: path.into(),
            form,
        }),
        _ => Err(PolicyError::Events { text }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_is_answered_as_the_words_say() {
        let policy = RemovalPolicy::parse(&["on_removal=refuse", "removal_timeout=0"]).unwrap();
        assert_eq!(policy.on_removal, OnRemoval::Refuse);
        assert_eq!(policy.timeout, Duration::ZERO);
        let usual = RemovalPolicy::parse(&[]).unwrap();
        assert_eq!(usual.on_removal, OnRemoval::Stop);
        assert_eq!(usual.timeout, REMOVAL_TIMEOUT);
        for (parts, expected) in [
            (&["length=1G"][..], "`length=1G` is not offset="),
            (&["on_removal=eject"], "on_removal=stop or"),
            (&["on_removal=stop", "on_removal=stop"], "given twice"),
            (&["removal_timeout=3601"], "up to 3600"),
            (&["removal_timeout=1K"], "up to 3600"),
            (&["removal_timeout=+1"], "up to 3600"),
        ] {
            let error = RemovalPolicy::parse(parts).unwrap_err().to_string();
            assert!(error.contains(expected), "{parts:?}: {error}");
        }
    }

    #[test]
    fn who_watches_says_where() {
        let place = |path: &str, form| {
            let path = path.into();
            Ok(Place { path, form })
        };
        assert_eq!(events("path=/e=1".into()), place("/e=1", Form::Ch));
        let lines = events("path=/e,format=jsonl".into());
        assert_eq!(lines, place("/e", Form::JsonLines));
        for word in ["/e", "path=", "fd=3"] {
            let error = events(word.into()).unwrap_err();
            assert!(matches!(error, PolicyError::Events { .. }), "{word}");
        }
    }
}
