//! `--fs`: a directory of the host that a vhost-user backend serves as a file system of the guest.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::backend::{self, BackendError};
use super::device::{
    IdAllocator, IdError, Naming, OnPci, PciFields, Place, PlaceError, id_key, number_key,
    segment_key,
};
use super::json::{JsonObject, Shape};
use super::queues::{self, QueuesError};
use super::schema::as_sent;
use super::{Key, MAX_QUEUES, Word, WordError};

/// Longest tag, in bytes (virtio 1.2, 5.11.4).
pub const MAX_FS_TAG: usize = 36;

const DEFAULT_NUM_QUEUES: u32 = 1;
const DEFAULT_QUEUE_SIZE: u32 = 1024;

/// One virtio-fs device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct FsConfig {
    /// By what name the guest mounts it.
    pub tag: String,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// How many request queues; the one for what must not wait is not counted.
    #[serde(default = "default_num_queues")]
    pub num_queues: u32,
    /// How long each of them is.
    #[serde(default = "default_queue_size")]
    pub queue_size: u32,
    /// Name of the device, unique in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// The device number on the segment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

fn default_num_queues() -> u32 {
    DEFAULT_NUM_QUEUES
}

fn default_queue_size() -> u32 {
    DEFAULT_QUEUE_SIZE
}

/// A virtio-fs device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidFs {
    /// Its name.
    pub id: String,
    /// By what name the guest mounts it: not empty, the rest is zeros.
    pub tag: [u8; MAX_FS_TAG],
    /// Where the backend listens, at most [`super::MAX_SOCKET_PATH`] bytes.
    pub socket: PathBuf,
    /// How many request queues: 1 to one less than [`MAX_QUEUES`].
    pub num_queues: u16,
    /// How long each queue is: a power of two from 2 to [`super::MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// Where it sits.
    pub place: Place,
}

/// A file system that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FsError {
    /// A name that a guest can't mount by.
    #[error(
        "{device}: tag={tag:?} has {} bytes, a tag has 1 to {MAX_FS_TAG} and no NUL byte; give another one",
        tag.len()
    )]
    Tag {
        /// The device.
        device: String,
        /// The tag given.
        tag: String,
    },
    /// Where its backend is.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// No room for the queue that is not counted.
    #[error(
        "{device}: num_queues={MAX_QUEUES} request queues and one beside them are too many: give 1 to {}",
        MAX_QUEUES - 1
    )]
    TooManyQueues {
        /// The device.
        device: String,
    },
    /// Its queues.
    #[error(transparent)]
    Queues(#[from] QueuesError),
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl JsonObject for FsConfig {
    const SHAPE: Shape = Shape::WHOLE;
}

#[derive(Default)]
pub(crate) struct FsDraft {
    tag: Option<String>,
    socket: Option<PathBuf>,
    num_queues: Option<u32>,
    queue_size: Option<u32>,
    id: Option<String>,
    pci_segment: u16,
    pci_device_id: Option<u8>,
}

impl OnPci for FsDraft {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl FsConfig {
    pub(crate) const WORD: Word<FsDraft> = Word {
        flag: "--fs",
        about: "A directory of the host, served by virtiofsd or another vhost-user backend; repeat for more",
        keys: &[
            Key::new(
                "tag",
                "NAME",
                "what the guest mounts: mount -t virtiofs NAME DIR (required)",
                |draft, value| {
                    draft.tag = Some(value.text()?);
                    Ok(())
                },
            ),
            Key::new(
                "socket",
                "PATH",
                "where the vhost-user backend listens (required)",
                |draft, value| {
                    draft.socket = Some(value.path()?);
                    Ok(())
                },
            ),
            Key::new(
                "num_queues",
                "N",
                "request queues [default: 1]",
                |draft, value| {
                    draft.num_queues = Some(value.integer()?);
                    Ok(())
                },
            ),
            Key::new(
                "queue_size",
                "N",
                "requests in a queue, a power of two [default: 1024]",
                |draft, value| {
                    draft.queue_size = Some(value.integer()?);
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
        ],
    };

    const NAMING: Naming = Naming::Numbered("_fs");

    /// Reads the value of one `--fs`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut draft = FsDraft::default();
        Self::WORD.fill(text, &mut draft)?;
        let missing = |key| WordError::MissingKey {
            flag: Self::WORD.flag,
            key,
        };
        Ok(Self {
            tag: draft.tag.ok_or(missing("tag"))?,
            socket: draft.socket.ok_or(missing("socket"))?,
            num_queues: draft.num_queues.unwrap_or(DEFAULT_NUM_QUEUES),
            queue_size: draft.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE),
            id: draft.id,
            pci_segment: draft.pci_segment,
            pci_device_id: draft.pci_device_id,
        })
    }

    /// The device as errors name it.
    fn label(&self) -> String {
        let flag = Self::WORD.flag;
        match &self.id {
            Some(id) => format!("{flag} id={id}"),
            None => format!("{flag} tag={}", self.tag),
        }
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(&self, segments: u16, ids: &mut IdAllocator) -> Result<ValidFs, FsError> {
        let device = self.label();
        let mut tag = [0; MAX_FS_TAG];
        match tag.get_mut(..self.tag.len()) {
            Some(place) if !self.tag.is_empty() && !self.tag.contains('\0') => {
                place.copy_from_slice(self.tag.as_bytes());
            }
            _ => {
                let tag = self.tag.clone();
                return Err(FsError::Tag { device, tag });
            }
        }
        let socket = backend::path(&device, &self.socket)?;
        let num_queues = queues::count(&device, self.num_queues)?;
        if self.num_queues == MAX_QUEUES {
            return Err(FsError::TooManyQueues { device });
        }
        let queue_size = queues::size(&device, self.queue_size)?;
        let place = Place::check(&device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(ValidFs {
            id: ids.take(&device, self.id.as_deref(), Self::NAMING)?,
            tag,
            socket,
            num_queues,
            queue_size,
            place,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MAX_SOCKET_PATH, from_json};

    fn validate(text: &str) -> Result<ValidFs, FsError> {
        FsConfig::parse(text)
            .unwrap()
            .validate(2, &mut IdAllocator::default())
    }

    #[test]
    fn every_key_is_stored_and_reaches_the_checked_form() {
        let text =
            "tag=t,socket=/run/f,num_queues=3,queue_size=512,id=f,pci_segment=1,pci_device_id=7";
        let json = r#"{"tag":"t","socket":"/run/f","num_queues":3,"queue_size":512,"id":"f","pci_segment":1,
            "pci_device_id":7}"#;
        assert_eq!(
            FsConfig::parse(text).unwrap(),
            from_json::<FsConfig>(json.as_bytes()).unwrap()
        );
        let mut tag = [0; MAX_FS_TAG];
        tag[0] = b't';
        assert_eq!(
            validate(text),
            Ok(ValidFs {
                id: "f".into(),
                tag,
                socket: "/run/f".into(),
                num_queues: 3,
                queue_size: 512,
                place: Place {
                    segment: 1,
                    device: Some(7)
                },
            })
        );
    }

    #[test]
    fn the_defaults_are_the_contracts() {
        let json = br#"{"tag":"t","socket":"/s"}"#;
        let plain = FsConfig::parse("tag=t,socket=/s").unwrap();
        assert_eq!(plain, from_json::<FsConfig>(json).unwrap());
        let valid = plain.validate(1, &mut IdAllocator::default()).unwrap();
        assert_eq!((valid.num_queues, valid.queue_size), (1, 1024));
        assert_eq!(valid.id, "_fs0");
    }

    #[test]
    fn what_is_missing_or_of_no_schema_is_named() {
        for (text, words) in [
            ("socket=/v", "add tag=VALUE"),
            ("tag=t", "add socket=VALUE"),
            ("tag=t,socket=/s,num_queues=x", "a whole number"),
            ("tag=t,socket=/s,dax=on", "dax"),
            ("tag=t,scoket=/s", "scoket"),
        ] {
            let error = FsConfig::parse(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        let json = br#"{"tag":"t","socket":"/v","cache_size":1}"#;
        let error = from_json::<FsConfig>(json).unwrap_err();
        assert!(error.to_string().contains("cache_size"), "{error}");
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        let long = "t".repeat(MAX_FS_TAG + 1);
        let deep = format!("/{}", "s".repeat(MAX_SOCKET_PATH));
        for (text, words) in [
            (format!("tag={long},socket=/s"), "has 37 bytes"),
            (format!("tag=t,socket={deep}"), "has 108 bytes"),
            (
                "tag=t,socket=/s,num_queues=0".to_owned(),
                "--fs tag=t: num_queues=0 is out of range",
            ),
            ("tag=t,socket=/s,num_queues=256".to_owned(), "give 1 to 255"),
            (
                "tag=t,socket=/s,num_queues=257".to_owned(),
                "num_queues=257",
            ),
            (
                "tag=t,socket=/s,queue_size=100,id=f".to_owned(),
                "--fs id=f: queue size out of range",
            ),
            ("tag=t,socket=/s,pci_segment=2".to_owned(), "pci_segment=2"),
        ] {
            let error = validate(&text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let longest = "t".repeat(MAX_FS_TAG);
        assert!(validate(&format!("tag={longest},socket=/s,num_queues=255")).is_ok());
        let mut fs = FsConfig::parse("tag=t,socket=/s").unwrap();
        for tag in ["", "a\0b"] {
            tag.clone_into(&mut fs.tag);
            let error = fs.validate(1, &mut IdAllocator::default()).unwrap_err();
            assert!(error.to_string().contains("no NUL byte"), "{error}");
        }
        "t".clone_into(&mut fs.tag);
        fs.socket = PathBuf::new();
        let error = fs.validate(1, &mut IdAllocator::default()).unwrap_err();
        assert!(error.to_string().contains("socket= is empty"), "{error}");
    }
}
