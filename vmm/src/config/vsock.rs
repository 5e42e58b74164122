//! `--vsock`: sockets between the guest and the host, on the host's side as unix sockets.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::device::{
    IdAllocator, IdError, Naming, OnPci, PciFields, Place, PlaceError, id_key, number_key,
    segment_key,
};
use super::json::{JsonObject, NotBuilt, Shape};
use super::schema::as_sent;
use super::{Key, Word, WordError};

/// Smallest context id a guest can have; those below are the hypervisor's, the local one and the host's.
pub const MIN_GUEST_CID: u32 = 3;

/// Longest path of a unix socket, in bytes (`sun_path` without the NUL).
pub const MAX_SOCKET_PATH: usize = 107;

/// The virtio-vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct VsockConfig {
    /// The guest's context id.
    pub cid: u64,
    /// The unix socket that host programs connect to.
    pub socket: PathBuf,
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

/// The virtio-vsock device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidVsock {
    /// Its name.
    pub id: String,
    /// The guest's context id: [`MIN_GUEST_CID`] or more, and not the one that means any.
    pub cid: u32,
    /// The unix socket that host programs connect to, at most [`MAX_SOCKET_PATH`] bytes.
    pub socket: PathBuf,
    /// Where it sits.
    pub place: Place,
}

/// A vsock device that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VsockError {
    /// Somebody else's context id, or none.
    #[error(
        "--vsock cid={cid} is not a guest's: give {MIN_GUEST_CID} to {}, and to each guest of the host another one",
        u32::MAX - 1
    )]
    Cid {
        /// The context id given.
        cid: u64,
    },
    /// The path is the empty text.
    #[error("--vsock socket= is empty: give socket=PATH, where host programs are to connect")]
    EmptySocket,
    /// The path does not fit a socket address.
    #[error(
        "--vsock socket={} has {} bytes, a socket's path can have {MAX_SOCKET_PATH}; give a shorter one",
        socket.display(), socket.as_os_str().len()
    )]
    SocketTooLong {
        /// The path given.
        socket: PathBuf,
    },
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl JsonObject for VsockConfig {
    const SHAPE: Shape = Shape {
        not_built: &[NotBuilt::switch("iommu", false)],
        ..Shape::WHOLE
    };
}

#[derive(Default)]
pub(crate) struct VsockDraft {
    cid: Option<u64>,
    socket: Option<PathBuf>,
    id: Option<String>,
    pci_segment: u16,
    pci_device_id: Option<u8>,
}

impl OnPci for VsockDraft {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl VsockConfig {
    pub(crate) const WORD: Word<VsockDraft> = Word {
        flag: "--vsock",
        about: "Sockets between guest and host",
        keys: &[
            Key::new(
                "cid",
                "N",
                "the guest's context id, from 3 (required)",
                |draft, value| {
                    draft.cid = Some(value.integer()?);
                    Ok(())
                },
            ),
            Key::new(
                "socket",
                "PATH",
                "unix socket for host programs (required)",
                |draft, value| {
                    draft.socket = Some(value.path()?);
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
        ],
    };

    const NAMING: Naming = Naming::Numbered("_vsock");

    /// Reads the value of `--vsock`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut draft = VsockDraft::default();
        Self::WORD.fill(text, &mut draft)?;
        let missing = |key| WordError::MissingKey {
            flag: Self::WORD.flag,
            key,
        };
        Ok(Self {
            cid: draft.cid.ok_or(missing("cid"))?,
            socket: draft.socket.ok_or(missing("socket"))?,
            id: draft.id,
            pci_segment: draft.pci_segment,
            pci_device_id: draft.pci_device_id,
        })
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(&self, segments: u16, ids: &mut IdAllocator) -> Result<ValidVsock, VsockError> {
        let device = Self::WORD.flag;
        let cid = u32::try_from(self.cid)
            .ok()
            .filter(|cid| (MIN_GUEST_CID..u32::MAX).contains(cid))
            .ok_or(VsockError::Cid { cid: self.cid })?;
        let socket = self.socket.clone();
        match socket.as_os_str().len() {
            0 => return Err(VsockError::EmptySocket),
            length if length > MAX_SOCKET_PATH => {
                return Err(VsockError::SocketTooLong { socket });
            }
            _ => {}
        }
        let place = Place::check(device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(ValidVsock {
            id: ids.take(device, self.id.as_deref(), Self::NAMING)?,
            cid,
            socket,
            place,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

    fn validate(text: &str) -> Result<ValidVsock, VsockError> {
        VsockConfig::parse(text)
            .unwrap()
            .validate(2, &mut IdAllocator::default())
    }

    #[test]
    fn every_key_is_stored_and_reaches_the_checked_form() {
        let text = "cid=3,socket=/run/v,id=v,pci_segment=1,pci_device_id=7";
        let json = r#"{"cid":3,"socket":"/run/v","id":"v","pci_segment":1,"pci_device_id":7,
            "iommu":false}"#;
        assert_eq!(
            VsockConfig::parse(text).unwrap(),
            from_json::<VsockConfig>(json.as_bytes()).unwrap()
        );
        assert_eq!(
            validate(text),
            Ok(ValidVsock {
                id: "v".into(),
                cid: 3,
                socket: "/run/v".into(),
                place: Place {
                    segment: 1,
                    device: Some(7)
                },
            })
        );
        assert_eq!(validate("cid=9,socket=/v").unwrap().id, "_vsock0");
    }

    #[test]
    fn what_is_missing_or_not_built_is_named() {
        for (text, words) in [
            ("socket=/v", "add cid=VALUE"),
            ("cid=3", "add socket=VALUE"),
            ("cid=x,socket=/v", "a whole number"),
            (
                "cid=3,socket=/v,iommu=on",
                "not supported by daxhund: --vsock iommu",
            ),
        ] {
            let error = VsockConfig::parse(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        let json = br#"{"cid":3,"socket":"/v","iommu":true}"#;
        let error = from_json::<VsockConfig>(json).unwrap_err();
        assert_eq!(error.to_string(), "not supported by daxhund: iommu");
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        for cid in ["0", "1", "2", "4294967295", "4294967296"] {
            let error = validate(&format!("cid={cid},socket=/v")).unwrap_err();
            let words = format!("--vsock cid={cid} is not a guest's: give 3 to 4294967294");
            assert!(error.to_string().starts_with(&words), "{error}");
        }
        let long = format!("cid=3,socket=/{}", "v".repeat(MAX_SOCKET_PATH));
        let error = validate(&long).unwrap_err();
        assert!(error.to_string().contains("has 108 bytes"), "{error}");
        let error = validate("cid=3,socket=/v,pci_segment=2").unwrap_err();
        assert!(error.to_string().contains("--vsock: pci_segment=2"));
        let mut empty = VsockConfig::parse("cid=3,socket=/v").unwrap();
        empty.socket = PathBuf::new();
        let error = empty.validate(1, &mut IdAllocator::default());
        assert_eq!(error, Err(VsockError::EmptySocket));
    }
}
