//! `--serial` and `--console`: where a guest's terminals go on the host.
//!
//! On the wire a console is Cloud Hypervisor's `{mode, file, socket}`; inside it is one enum, so a
//! file mode without a file cannot exist. The virtio console is a PCI device besides, with an id and
//! a place.
//!
//! The VMM has one terminal. Who has it when nobody says is different on the command line and in
//! JSON. On the command line it is the serial port, which works from the guest's first instruction
//! on, and there is no virtio console; `--console tty` alone takes it from the serial port. In JSON
//! it is as the contract's clients know it: the virtio console has it and the serial port is mute;
//! a serial port that is Tty takes it from the console.

use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, json_schema};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::device::{
    IdAllocator, IdError, Naming, OnPci, PciFields, Place, PlaceError, id_key, number_key,
    segment_key,
};
use super::json::{JsonObject, NotBuilt, Shape};
use super::schema::as_sent;
use super::{Key, Word, WordError};

const MODES: &str = "off, null, tty, pty, file=PATH or socket=PATH";

/// Where a guest's terminal goes on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "ConsoleFields", into = "ConsoleFields")]
#[schemars(rename = "SerialConfig", transform = as_sent::<Self>, transform = paths_of_modes)]
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

/// The virtio console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "VirtioConsoleFields", into = "VirtioConsoleFields")]
#[schemars(rename = "ConsoleConfig", transform = as_sent::<Self>, transform = paths_of_modes)]
pub struct VirtioConsoleConfig {
    /// Where it goes; off means that there is none.
    pub output: ConsoleConfig,
    /// Name of the device, unique in the guest.
    pub id: Option<String>,
    /// The PCI segment.
    pub pci_segment: u16,
    /// The device number on the segment.
    pub pci_device_id: Option<u8>,
}

/// The virtio console, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidConsole {
    /// Its name.
    pub id: String,
    /// Where it goes; never off.
    pub output: ConsoleConfig,
    /// Where it sits.
    pub place: Place,
}

/// Consoles that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConsoleError {
    /// One terminal for two consoles.
    #[error(
        "--serial tty and --console tty both want the VMM's one terminal; give one of them another \
         mode"
    )]
    TwoTerminals,
    /// A name or a place for a device that is not there.
    #[error("--console off has no use for {key}=; remove it or give a mode")]
    KeyWithoutDevice {
        /// The key.
        key: &'static str,
    },
    /// One path for two consoles.
    #[error("--serial and --console both go to {}; give each a path of its own", path.display())]
    SamePath {
        /// The path.
        path: PathBuf,
    },
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

#[derive(Default)]
struct ConsoleDraft {
    file: Option<PathBuf>,
    socket: Option<PathBuf>,
    id: Option<String>,
    pci_segment: u16,
    pci_device_id: Option<u8>,
}

impl OnPci for ConsoleDraft {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

const FILE: Key<ConsoleDraft> = Key::new(
    "file",
    "PATH",
    "a file that receives the output",
    |draft, value| {
        draft.file = Some(value.path()?);
        Ok(())
    },
);

const SOCKET: Key<ConsoleDraft> = Key::new(
    "socket",
    "PATH",
    "a unix socket to connect to",
    |draft, value| {
        draft.socket = Some(value.path()?);
        Ok(())
    },
);

impl ConsoleConfig {
    const WORD: Word<ConsoleDraft> = Word {
        flag: "--serial",
        about: "Serial port: off, null, tty, pty or one of these",
        keys: &[FILE, SOCKET],
    };

    /// What `--serial` is when not given: the terminal, unless the virtio console has it.
    pub(crate) fn beside(console: &VirtioConsoleConfig) -> Self {
        match console.output {
            Self::Tty => Self::Null,
            _ => Self::Tty,
        }
    }

    /// What the serial port is when JSON does not say.
    pub(super) fn serial_json_default() -> Self {
        Self::Null
    }

    /// Reads the value of `--serial`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut draft = ConsoleDraft::default();
        read_console(&Self::WORD, text, &mut draft)
    }

    /// Help for `--serial`.
    pub(crate) fn help() -> String {
        format!(
            "{}\n\nThe default is tty, or null with --console tty. Cloud Hypervisor always has null",
            Self::WORD.help()
        )
    }

    fn from_word(word: &str) -> Option<Self> {
        match word {
            "off" => Some(Self::Off),
            "null" => Some(Self::Null),
            "tty" => Some(Self::Tty),
            "pty" => Some(Self::Pty),
            _ => None,
        }
    }

    /// The path of a mode that has one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::Socket(path) => Some(path),
            Self::Off | Self::Null | Self::Tty | Self::Pty => None,
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

/// Reads a mode and, after it, keys; or keys that are the mode.
fn read_console(
    word: &Word<ConsoleDraft>,
    text: &str,
    draft: &mut ConsoleDraft,
) -> Result<ConsoleConfig, WordError> {
    let wrong_mode = || WordError::Mode {
        flag: word.flag,
        value: text.to_owned(),
        expected: MODES,
    };
    let (first, rest) = match text.split_once(',') {
        Some((first, rest)) => (first, Some(rest)),
        None => (text, None),
    };
    let mode = ConsoleConfig::from_word(first);
    match (&mode, rest) {
        (Some(_), None) => {}
        (Some(_), Some(rest)) => word.fill(rest, draft)?,
        (None, _) if !first.contains('=') => return Err(wrong_mode()),
        (None, _) => word.fill(text, draft)?,
    }
    match (mode, draft.file.take(), draft.socket.take()) {
        (Some(mode), None, None) => Ok(mode),
        (None, Some(path), None) => Ok(ConsoleConfig::File(path)),
        (None, None, Some(path)) => Ok(ConsoleConfig::Socket(path)),
        _ => Err(wrong_mode()),
    }
}

impl VirtioConsoleConfig {
    pub(super) const FLAG: &'static str = "--console";

    const WORD: Word<ConsoleDraft> = Word {
        flag: Self::FLAG,
        about: "Virtio console (hvc0): off, null, tty, pty or one of these",
        keys: &[
            FILE,
            SOCKET,
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
        ],
    };

    const NAMING: Naming = Naming::Single("_console");

    /// What the virtio console is when nobody says: the terminal, unless the serial port has it.
    pub(super) fn beside(serial: &ConsoleConfig) -> Self {
        match serial {
            ConsoleConfig::Tty => ConsoleConfig::Off.into(),
            _ => ConsoleConfig::Tty.into(),
        }
    }

    /// Help for `--console`.
    pub(crate) fn help() -> String {
        format!(
            "{}\n\nThe default is off, where Cloud Hypervisor has tty: see --serial",
            Self::WORD.help()
        )
    }

    /// Reads the value of `--console`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut draft = ConsoleDraft::default();
        Ok(Self {
            output: read_console(&Self::WORD, text, &mut draft)?,
            id: draft.id,
            pci_segment: draft.pci_segment,
            pci_device_id: draft.pci_device_id,
        })
    }

    /// Checks the console against the serial port, and in a guest with `segments` PCI segments; takes its id. `None`
    /// is a guest without one.
    pub(super) fn validate(
        &self,
        serial: &ConsoleConfig,
        segments: u16,
        ids: &mut IdAllocator,
    ) -> Result<Option<ValidConsole>, ConsoleError> {
        let device = Self::WORD.flag;
        if self.output == ConsoleConfig::Off {
            let given = [
                ("id", self.id.is_some()),
                ("pci_segment", self.pci_segment != 0),
                ("pci_device_id", self.pci_device_id.is_some()),
            ];
            return match given.into_iter().find(|(_, given)| *given) {
                Some((key, _)) => Err(ConsoleError::KeyWithoutDevice { key }),
                None => Ok(None),
            };
        }
        if self.output == ConsoleConfig::Tty && *serial == ConsoleConfig::Tty {
            return Err(ConsoleError::TwoTerminals);
        }
        if let Some(path) = self.output.path()
            && serial.path() == Some(path)
        {
            return Err(ConsoleError::SamePath {
                path: path.to_owned(),
            });
        }
        let place = Place::check(device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(Some(ValidConsole {
            id: ids.take(device, self.id.as_deref(), Self::NAMING)?,
            output: self.output.clone(),
            place,
        }))
    }
}

impl From<ConsoleConfig> for VirtioConsoleConfig {
    fn from(output: ConsoleConfig) -> Self {
        Self {
            output,
            ..Self::default()
        }
    }
}

// The contract's serial port has no such field; clients that take it for a console send it.
const NO_IOMMU: Shape = Shape {
    not_built: &[NotBuilt::switch("iommu", false)],
    ..Shape::WHOLE
};

impl JsonObject for ConsoleConfig {
    const SHAPE: Shape = NO_IOMMU;
}

impl JsonObject for VirtioConsoleConfig {
    const SHAPE: Shape = NO_IOMMU;
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

#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
enum ConsoleMode {
    Off,
    Pty,
    Tty,
    File,
    Socket,
    Null,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ConsoleFields {
    /// Where it goes.
    mode: ConsoleMode,
    /// What receives the output, for the mode `File`; in an answer also the pseudo terminal, for the mode `Pty`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    /// Where one client at a time can connect to, for the mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
}

/// What [`ConsoleConfig`]'s `try_from` asks beyond the fields: a path for the mode that has it, and for no other.
fn paths_of_modes(schema: &mut Schema) {
    let only = |mode, path: &str, other: &str, otherwise| {
        json_schema!({
            "if": {"properties": {"mode": {"const": mode}}},
            "then": {
                "required": [path],
                "properties": {path: {"type": "string", "minLength": 1}, other: {"maxLength": 0}},
            },
            "else": otherwise,
        })
    };
    // The name of a pseudo terminal, which `vm.info` tells.
    let neither = json_schema!({
        "if": {"properties": {"mode": {"const": "Pty"}}},
        "then": {"properties": {"socket": {"maxLength": 0}}},
        "else": {"properties": {"file": {"maxLength": 0}, "socket": {"maxLength": 0}}},
    });
    let socket = only("Socket", "socket", "file", neither);
    let mut file = only("File", "file", "socket", socket);
    schema.ensure_object().append(file.ensure_object());
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
        // A client that makes a VM of what it was told of another one sends the name of that one's pseudo terminal.
        if file.is_some() && !matches!(console, Self::File(_) | Self::Pty) {
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

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct VirtioConsoleFields {
    /// Where it goes; `Off` means that there is none.
    mode: ConsoleMode,
    /// What receives the output, for the mode `File`; in an answer also the pseudo terminal, for the mode `Pty`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    /// Where one client at a time can connect to, for the mode `Socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
    /// Name of the device, unique in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// The PCI segment.
    #[serde(default)]
    pci_segment: u16,
    /// The device number on the segment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pci_device_id: Option<u8>,
}

impl TryFrom<VirtioConsoleFields> for VirtioConsoleConfig {
    type Error = ConsoleFieldsError;

    fn try_from(fields: VirtioConsoleFields) -> Result<Self, Self::Error> {
        let output = ConsoleFields {
            mode: fields.mode,
            file: fields.file,
            socket: fields.socket,
        };
        Ok(Self {
            output: output.try_into()?,
            id: fields.id,
            pci_segment: fields.pci_segment,
            pci_device_id: fields.pci_device_id,
        })
    }
}

impl From<VirtioConsoleConfig> for VirtioConsoleFields {
    fn from(console: VirtioConsoleConfig) -> Self {
        let ConsoleFields { mode, file, socket } = console.output.into();
        Self {
            mode,
            file,
            socket,
            id: console.id,
            pci_segment: console.pci_segment,
            pci_device_id: console.pci_device_id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

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
            assert_eq!(ConsoleConfig::parse(text), Ok(console.clone()));
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
            let error = ConsoleConfig::parse(text).unwrap_err();
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
        let error = VirtioConsoleConfig::parse("file=").unwrap_err();
        assert_eq!(error.to_string(), "--console: file= is not a path");
        let error = VirtioConsoleConfig::parse("file=/a,iommu=on").unwrap_err();
        assert_eq!(
            error.to_string(),
            "not supported by daxhund: --console iommu"
        );
    }

    #[test]
    fn the_virtio_console_has_a_name_and_a_place() {
        let console = |output, id: Option<&str>, pci_segment, pci_device_id| VirtioConsoleConfig {
            output,
            id: id.map(str::to_owned),
            pci_segment,
            pci_device_id,
        };
        let log = ConsoleConfig::File("/l".into());
        for (text, json, expected) in [
            (
                "pty",
                r#"{"mode":"Pty"}"#,
                console(ConsoleConfig::Pty, None, 0, None),
            ),
            (
                "tty,id=c,pci_segment=1,pci_device_id=9",
                r#"{"mode":"Tty","id":"c","pci_segment":1,"pci_device_id":9,"iommu":false}"#,
                console(ConsoleConfig::Tty, Some("c"), 1, Some(9)),
            ),
            (
                "id=c,file=/l",
                r#"{"mode":"File","file":"/l","socket":null,"id":"c"}"#,
                console(log, Some("c"), 0, None),
            ),
        ] {
            assert_eq!(VirtioConsoleConfig::parse(text), Ok(expected.clone()));
            let read = from_json::<VirtioConsoleConfig>(json.as_bytes());
            assert_eq!(read, Ok(expected.clone()), "{json}");
            let json = serde_json::to_vec(&expected).unwrap();
            assert_eq!(from_json::<VirtioConsoleConfig>(&json), Ok(expected));
        }
        for (text, words) in [
            ("tty,file=/l", "--console tty,file=/l: expected off, null"),
            ("id=c", "--console id=c: expected off, null"),
            ("tty,", "--console has an empty value"),
            ("tty,pty", "\"pty\" is not key=value"),
            ("tty,colour=red", "the keys are file, socket, id"),
        ] {
            let error = VirtioConsoleConfig::parse(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        let error = ConsoleConfig::parse("tty,id=c").unwrap_err();
        assert!(error.to_string().contains("--serial: unknown key \"id\""));
    }

    /// As `vm.info` of a guest that runs tells it.
    #[test]
    fn a_pseudo_terminal_may_have_a_name() {
        let told = r#"{"mode":"Pty","file":"/dev/pts/7"}"#;
        let read = serde_json::from_str::<ConsoleConfig>(told).unwrap();
        assert_eq!(read, ConsoleConfig::Pty);
        let socket = r#"{"mode":"Pty","socket":"/a"}"#;
        assert!(serde_json::from_str::<ConsoleConfig>(socket).is_err());
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
