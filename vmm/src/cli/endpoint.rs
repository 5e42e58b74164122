//! `--api-socket` and `--event-monitor`: where the process, not the guest, talks to others.

use std::path::PathBuf;

use crate::config::{Expected, Key, Word, WordError};
use crate::monitor::Form;

/// Where the REST server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiSocket {
    /// A unix socket to make there.
    Path(PathBuf),
    /// A unix socket that listens already, inherited under this number.
    Descriptor(i32),
}

/// Where events are written to, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventMonitor {
    /// Where.
    pub place: EventPlace,
    /// Form of the objects.
    pub form: Form,
}

/// Where events are written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventPlace {
    /// A file or a FIFO there.
    Path(PathBuf),
    /// An open file, inherited under this number.
    Descriptor(i32),
}

#[derive(Default)]
pub(crate) struct EndpointDraft {
    path: Option<PathBuf>,
    fd: Option<i32>,
    form: Form,
}

enum Endpoint {
    Path(PathBuf),
    Descriptor(i32),
}

const API_SOCKET: Word<EndpointDraft> = Word {
    flag: "--api-socket",
    about: "Serve the REST API; the guest may then come by it. PATH, or one of these",
    keys: &[
        Key::new(
            "path",
            "PATH",
            "a unix socket to listen on",
            |draft, value| {
                draft.path = Some(value.path()?);
                Ok(())
            },
        ),
        Key::new(
            "fd",
            "N",
            "an inherited one that listens already",
            |draft, value| {
                draft.fd = Some(value.descriptor()?);
                Ok(())
            },
        ),
    ],
};

const EVENT_MONITOR: Word<EndpointDraft> = Word {
    flag: "--event-monitor",
    about: "Write events as JSON, to one of these",
    keys: &[
        Key::new("path", "PATH", "a file or a FIFO", |draft, value| {
            draft.path = Some(value.path()?);
            Ok(())
        }),
        Key::new("fd", "N", "an inherited open file", |draft, value| {
            draft.fd = Some(value.descriptor()?);
            Ok(())
        }),
        Key::new(
            "format",
            "ch|jsonl",
            "Cloud Hypervisor's objects over several lines (the default), or one object a line",
            |draft, value| {
                draft.form = value.text()?.parse().map_err(|_| Expected("ch or jsonl"))?;
                Ok(())
            },
        ),
    ],
};

fn read(word: &Word<EndpointDraft>, text: &str) -> Result<(Endpoint, Form), WordError> {
    let mut draft = EndpointDraft::default();
    word.fill(text, &mut draft)?;
    match (draft.path, draft.fd) {
        (Some(path), None) => Ok((Endpoint::Path(path), draft.form)),
        (None, Some(fd)) => Ok((Endpoint::Descriptor(fd), draft.form)),
        _ => Err(WordError::Mode {
            flag: word.flag,
            value: text.to_owned(),
            expected: "either path=PATH or fd=N",
        }),
    }
}

impl ApiSocket {
    /// Reads the value of `--api-socket`: keys, or a path as it is.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let keys = ["path=", "fd="];
        if !text.is_empty() && !keys.iter().any(|key| text.starts_with(key)) {
            return Ok(Self::Path(text.into()));
        }
        let (endpoint, _) = read(&API_SOCKET, text)?;
        Ok(match endpoint {
            Endpoint::Path(path) => Self::Path(path),
            Endpoint::Descriptor(fd) => Self::Descriptor(fd),
        })
    }

    pub(super) fn help() -> String {
        API_SOCKET.help()
    }
}

impl EventMonitor {
    /// Reads the value of `--event-monitor`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let (endpoint, form) = read(&EVENT_MONITOR, text)?;
        let place = match endpoint {
            Endpoint::Path(path) => EventPlace::Path(path),
            Endpoint::Descriptor(fd) => EventPlace::Descriptor(fd),
        };
        Ok(Self { place, form })
    }

    pub(super) fn help() -> String {
        EVENT_MONITOR.help()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_socket_is_a_path_or_a_descriptor() {
        let path = |text: &str| Ok(ApiSocket::Path(text.into()));
        assert_eq!(ApiSocket::parse("/run/s"), path("/run/s"));
        assert_eq!(ApiSocket::parse("/run/a=b,c"), path("/run/a=b,c"));
        assert_eq!(ApiSocket::parse("path=/run/s"), path("/run/s"));
        assert_eq!(ApiSocket::parse("fd=5"), Ok(ApiSocket::Descriptor(5)));
        for (text, words) in [
            ("", "--api-socket has an empty value"),
            ("path=", "path= is not a path"),
            ("fd=2", "fd=2 is not the number of an open file descriptor"),
            ("fd=-1", "fd=-1 is not"),
            ("fd=x", "fd=x is not"),
            ("path=/s,fd=5", "expected either path=PATH or fd=N"),
            ("path=/s,mode=1", "unknown key \"mode\""),
        ] {
            let error = ApiSocket::parse(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn an_event_monitor_says_which() {
        let path = || EventPlace::Path("/run/events".into());
        for (text, place, form) in [
            ("path=/run/events", path(), Form::Ch),
            ("path=/run/events,format=ch", path(), Form::Ch),
            ("format=jsonl,path=/run/events", path(), Form::JsonLines),
            ("fd=9", EventPlace::Descriptor(9), Form::Ch),
        ] {
            let expected = EventMonitor { place, form };
            assert_eq!(EventMonitor::parse(text), Ok(expected), "{text}");
        }
        for (text, words) in [
            (
                "/run/events",
                "--event-monitor: \"/run/events\" is not key=value",
            ),
            ("fd=0", "fd=0 is not"),
            ("format=jsonl", "expected either path=PATH or fd=N"),
            ("fd=9,format=xml", "format=xml is not ch or jsonl"),
        ] {
            let error = EventMonitor::parse(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }
}
