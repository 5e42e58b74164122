//! `--serial` and `--console`: where a guest's terminal goes on the host.
//!
//! On the wire a console is Cloud Hypervisor's `{mode, file, socket}`; inside it is one enum, so a
//! file mode without a file cannot exist.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Key, Word, WordError};

const MODES: &str = "off, null, tty, pty, file=PATH or socket=PATH";

/// Where a guest's terminal goes on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ConsoleFields", into = "ConsoleFields")]
pub enum ConsoleConfig {
    /// The guest has no such device.
    #[default]
    Off,
    /// The device is there; what it prints is dropped.
    Null,
    /// The VMM's own terminal.
    Tty,
    /// A new pseudo-terminal.
    Pty,
    /// A file that receives the output.
    File(PathBuf),
    /// A unix socket one client at a time can connect to.
    Socket(PathBuf),
}

#[derive(Default)]
pub(crate) struct ConsoleDraft {
    file: Option<PathBuf>,
    socket: Option<PathBuf>,
}

impl ConsoleConfig {
    const KEYS: &'static [Key<ConsoleDraft>] = &[
        Key::new(
            "file",
            "PATH",
            "a file that receives the output",
            |draft, value| {
                draft.file = Some(value.path()?);
                Ok(())
            },
        ),
        Key::new(
            "socket",
            "PATH",
            "a unix socket to connect to",
            |draft, value| {
                draft.socket = Some(value.path()?);
                Ok(())
            },
        ),
        Key::not_built("iommu"),
    ];

    /// What `--serial` is when not given: with no virtio console, the serial port is the one place
    /// where the guest can be seen.
    pub fn serial_default() -> Self {
        Self::Tty
    }

    /// Reads the value of `flag`, which is `--serial` or `--console`.
    pub fn parse(flag: &'static str, text: &str) -> Result<Self, WordError> {
        match text {
            "off" => return Ok(Self::Off),
            "null" => return Ok(Self::Null),
            "tty" => return Ok(Self::Tty),
            "pty" => return Ok(Self::Pty),
            _ => {}
        }
        let wrong_mode = || WordError::Mode {
            flag,
            value: text.to_owned(),
            expected: MODES,
        };
        if !text.contains('=') {
            return Err(wrong_mode());
        }
        let word = Word {
            flag,
            about: "",
            keys: Self::KEYS,
        };
        let mut draft = ConsoleDraft::default();
        word.fill(text, &mut draft)?;
        match (draft.file, draft.socket) {
            (Some(path), None) => Ok(Self::File(path)),
            (None, Some(path)) => Ok(Self::Socket(path)),
            _ => Err(wrong_mode()),
        }
    }

    /// The mode as the command line writes it.
    pub fn mode_name(&self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Null => "null",
            Self::Tty => "tty",
            Self::Pty => "pty",
            Self::File(_) => "file",
            Self::Socket(_) => "socket",
        }
    }
}

/// A console's JSON fields contradict its mode.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConsoleFieldsError {
    /// The mode needs a path that is not there.
    #[error("console mode {mode} needs the field \"{field}\"; add \"{field}\": PATH")]
    Missing {
        /// The mode.
        mode: &'static str,
        /// The field it needs.
        field: &'static str,
    },
    /// A path is there that the mode does not use.
    #[error("console mode {mode} does not use the field \"{field}\"; remove it or change the mode")]
    Unused {
        /// The mode.
        mode: &'static str,
        /// The field it does not use.
        field: &'static str,
    },
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum ConsoleMode {
    Off,
    Pty,
    Tty,
    File,
    Socket,
    Null,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsoleFields {
    mode: ConsoleMode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
}

impl TryFrom<ConsoleFields> for ConsoleConfig {
    type Error = ConsoleFieldsError;

    fn try_from(fields: ConsoleFields) -> Result<Self, Self::Error> {
        let ConsoleFields { mode, file, socket } = fields;
        let present = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
        let (file, socket) = (present(file), present(socket));
        let missing = |mode, field| ConsoleFieldsError::Missing { mode, field };
        let console = match mode {
            ConsoleMode::Off => Self::Off,
            ConsoleMode::Pty => Self::Pty,
            ConsoleMode::Tty => Self::Tty,
            ConsoleMode::Null => Self::Null,
            ConsoleMode::File => Self::File(file.clone().ok_or(missing("file", "file"))?),
            ConsoleMode::Socket => Self::Socket(socket.clone().ok_or(missing("socket", "socket"))?),
        };
        let unused = |field| ConsoleFieldsError::Unused {
            mode: console.mode_name(),
            field,
        };
        if file.is_some() && !matches!(console, Self::File(_)) {
            return Err(unused("file"));
        }
        if socket.is_some() && !matches!(console, Self::Socket(_)) {
            return Err(unused("socket"));
        }
        Ok(console)
    }
}

impl From<ConsoleConfig> for ConsoleFields {
    fn from(console: ConsoleConfig) -> Self {
        let (mode, file, socket) = match console {
            ConsoleConfig::Off => (ConsoleMode::Off, None, None),
            ConsoleConfig::Null => (ConsoleMode::Null, None, None),
            ConsoleConfig::Tty => (ConsoleMode::Tty, None, None),
            ConsoleConfig::Pty => (ConsoleMode::Pty, None, None),
            ConsoleConfig::File(path) => (ConsoleMode::File, Some(path), None),
            ConsoleConfig::Socket(path) => (ConsoleMode::Socket, None, Some(path)),
        };
        Self { mode, file, socket }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_is_read_and_survives_json() {
        for (text, console) in [
            ("off", ConsoleConfig::Off),
            ("null", ConsoleConfig::Null),
            ("tty", ConsoleConfig::Tty),
            ("pty", ConsoleConfig::Pty),
            ("file=/tmp/log", ConsoleConfig::File("/tmp/log".into())),
            ("file=\"/tmp/a,b\"", ConsoleConfig::File("/tmp/a,b".into())),
            ("socket=/run/s", ConsoleConfig::Socket("/run/s".into())),
        ] {
            assert_eq!(ConsoleConfig::parse("--serial", text), Ok(console.clone()));
            let json = serde_json::to_string(&console).unwrap();
            assert_eq!(
                serde_json::from_str::<ConsoleConfig>(&json).unwrap(),
                console
            );
        }
        let json = serde_json::to_string(&ConsoleConfig::File("/l".into())).unwrap();
        assert_eq!(json, r#"{"mode":"File","file":"/l"}"#);
    }

    #[test]
    fn a_wrong_mode_names_the_modes() {
        for text in ["", "stdio", "TTY", "file=/a,socket=/b"] {
            let error = ConsoleConfig::parse("--serial", text).unwrap_err();
            assert!(
                matches!(
                    error,
                    WordError::Mode {
                        flag: "--serial",
                        ..
                    }
                ),
                "{text}"
            );
            assert!(error.to_string().contains("off, null, tty, pty, file=PATH"));
        }
        let error = ConsoleConfig::parse("--console", "file=").unwrap_err();
        assert_eq!(error.to_string(), "--console: file= is not a path");
        let error = ConsoleConfig::parse("--console", "file=/a,iommu=on").unwrap_err();
        assert_eq!(
            error.to_string(),
            "not supported by daxhund: --console iommu"
        );
    }

    #[test]
    fn json_fields_must_fit_the_mode() {
        for (json, words) in [
            (r#"{"mode":"File"}"#, "needs the field \"file\""),
            (
                r#"{"mode":"Socket","socket":""}"#,
                "needs the field \"socket\"",
            ),
            (
                r#"{"mode":"Tty","file":"/a"}"#,
                "does not use the field \"file\"",
            ),
            (
                r#"{"mode":"File","file":"/a","socket":"/b"}"#,
                "does not use the field \"socket\"",
            ),
            (r#"{"mode":"Off","x":1}"#, "unknown field `x`"),
            (r#"{"mode":"Loud"}"#, "unknown variant `Loud`"),
        ] {
            let error = serde_json::from_str::<ConsoleConfig>(json).unwrap_err();
            assert!(error.to_string().contains(words), "{json}: {error}");
        }
    }
}
