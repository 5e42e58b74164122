//! What the guard and its clients say to each other: JSON objects, one to a line, over a unix stream socket.
//!
//! ```text
//! client                                         guard
//! {"hello":{"version":1,"name":"vm1"}}
//!                                                {"hello":{"version":1}}
//! {"hold":{"device":"dax1.0",...}} + descriptor
//!                                                {"held":{"device":"dax1.0"}} | {"not_held":{...}}
//!                                                {"wanted":{"request":7,"device":"dax1.0","by":{...}}}
//! {"answer":{"request":7,"verdict":"released"}}
//!                                                {"withdrawn":{"request":7}}     instead, when it is moot
//! {"let_go":{"device":"dax1.0"}}
//! {"release":{"device":"dax1.0"}}
//!                                                {"released":{...}} | {"not_released":{...}}
//! "list"
//!                                                {"listing":{...}}
//! ```
//! Neither side trusts the other's lines: their length is bounded, unknown words are refused, and what is wrong ends the
//! connection after a `fault`.

#![forbid(unsafe_code)]

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::opener::Opener;

/// The one version there is.
pub(crate) const VERSION: u32 = 1;
/// Longest line to the guard, its end included.
pub(crate) const REQUEST_LIMIT_BYTES: usize = 4096;
/// Longest line to a client: a listing of everything.
pub(crate) const MESSAGE_LIMIT_BYTES: usize = 1 << 20;
/// Longest name of a client, and longest reason for a refusal.
pub(crate) const NAME_LIMIT_CHARS: usize = 64;
pub(crate) const WHY_LIMIT_CHARS: usize = 512;

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// First of all.
    Hello {
        version: u32,
        name: String,
    },
    /// With a descriptor of the device.
    Hold {
        device: String,
        answer_within_ms: u64,
    },
    LetGo {
        device: String,
    },
    Answer {
        request: u64,
        verdict: Said,
    },
    /// Drain and take away. For root and the guard's own user.
    Release {
        device: String,
    },
    List,
}

/// A holder's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Said {
    Released,
    Refused { why: String },
}

/// What the guard says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Message {
    Hello {
        version: u32,
    },
    Held {
        device: String,
    },
    NotHeld {
        device: String,
        why: String,
    },
    Wanted {
        request: u64,
        device: String,
        by: Opener,
    },
    Withdrawn {
        request: u64,
    },
    Released {
        device: String,
    },
    NotReleased {
        device: String,
        why: String,
    },
    Listing(Listing),
    /// The connection ends.
    Fault {
        why: String,
    },
}

/// What is held, by whom, and who waits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listing {
    /// Each device that is held, and by whom.
    pub held: Vec<HeldDevice>,
    /// Everybody who waits.
    pub waiting: Vec<WaitingOpener>,
}

/// A device and one of those who hold it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldDevice {
    /// As in `dax1.0`.
    pub device: String,
    /// The name it gave itself: the VM's.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// `connected`, `connection lost` or `ended, memory lent`.
    pub state: String,
}

/// One who waits for a removal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitingOpener {
    /// Who, and through which file; `release` is no file.
    pub by: Opener,
    /// What has to be released first.
    pub devices: Vec<String>,
}

/// A line that is not understood.
#[derive(Debug, Error)]
pub(crate) enum LineError {
    #[error("a line is longer than {limit} bytes")]
    TooLong { limit: usize },
    #[error("a line is not understood")]
    NotUnderstood(#[source] serde_json::Error),
}

/// One line, its end included.
pub(crate) fn line(message: &impl Serialize) -> Vec<u8> {
    // Nothing here has a map with keys that are no strings, the one thing that JSON can't say.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Bytes that came, cut into lines.
#[derive(Debug)]
pub(crate) struct Lines {
    bytes: Vec<u8>,
    limit: usize,
}

impl Lines {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
        }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line, if it is there.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, LineError> {
        let limit = self.limit;
        let end = self
            .bytes
            .iter()
            .take(limit)
            .position(|byte| *byte == b'\n');
        match end {
            Some(end) => {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(LineError::NotUnderstood)
            }
            None if self.bytes.len() >= limit => Err(LineError::TooLong { limit }),
            None => Ok(None),
        }
    }
}

/// Printable and short, for logs and listings.
pub(crate) fn tidy(text: &str, limit_chars: usize) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(limit_chars).map(printable).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_what_the_page_says() {
        let hold = Request::Hold {
            device: "dax1.0".into(),
            answer_within_ms: 10_000,
        };
        assert_eq!(
            line(&hold),
            b"{\"hold\":{\"device\":\"dax1.0\",\"answer_within_ms\":10000}}\n"
        );
        assert_eq!(line(&Request::List), b"\"list\"\n");
        let answer = Request::Answer {
            request: 7,
            verdict: Said::Released,
        };
        assert_eq!(
            line(&answer),
            b"{\"answer\":{\"request\":7,\"verdict\":\"released\"}}\n"
        );
    }

    #[test]
    fn lines_come_in_pieces() {
        let mut lines = Lines::new(REQUEST_LIMIT_BYTES);
        lines.push(b"\"list\"\n{\"let_go\":");
        assert_eq!(lines.next().unwrap(), Some(Request::List));
        assert_eq!(lines.next::<Request>().unwrap(), None);
        lines.push(b"{\"device\":\"dax0.0\"}}\n");
        let let_go = Request::LetGo {
            device: "dax0.0".into(),
        };
        assert_eq!(lines.next().unwrap(), Some(let_go));
    }

    #[test]
    fn garbage_and_endless_lines_are_errors() {
        for garbage in [
            "\n",
            "{}\n",
            "{\"hello\":{}}\n",
            "{\"let_go\":{\"device\":\"x\",\"y\":1}}\n",
            "\u{0}\n",
        ] {
            let mut lines = Lines::new(REQUEST_LIMIT_BYTES);
            lines.push(garbage.as_bytes());
            assert!(
                matches!(lines.next::<Request>(), Err(LineError::NotUnderstood(_))),
                "{garbage:?}"
            );
        }
        let mut lines = Lines::new(16);
        lines.push(&[b' '; 16]);
        assert!(matches!(
            lines.next::<Request>(),
            Err(LineError::TooLong { limit: 16 })
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut lines = Lines::new(64);
            lines.push(&bytes);
            while let Ok(Some(_)) = lines.next::<Request>() {}
        }
    }
}
