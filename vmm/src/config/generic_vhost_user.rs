//! `--generic-vhost-user`: a device of whatever type that a vhost-user backend serves. What it is, is between the backend and the
//! guest's driver.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::backend::{self, BackendError};
use super::device::{
    IdAllocator, IdError, Naming, OnPci, PciFields, Place, PlaceError, id_key, number_key,
    segment_key,
};
use super::json::{JsonObject, NotBuilt, Shape};
use super::keyvalue::Expected;
use super::queues::{self, QueuesError};
use super::schema::as_sent;
use super::{Key, MAX_QUEUES, Value, Word, WordError};

/// The highest device type: a PCI device's number has room for no more (virtio 1.2, 4.1.2.1).
pub const MAX_DEVICE_TYPE: u32 = 63;

/// Device types by the contract's names (virtio 1.3, section 5, and `linux/virtio_ids.h`).
const NAMES: [(&str, u32); 47] = [
    ("net", 1),
    ("block", 2),
    ("console", 3),
    ("rng", 4),
    ("balloon", 5),
    ("iomem", 6),
    ("rpmsg", 7),
    ("scsi", 8),
    ("9p", 9),
    ("mac80211_wlan", 10),
    ("rproc_serial", 11),
    ("caif", 12),
    ("memory_balloon", 13),
    ("gpu", 16),
    ("clock", 17),
    ("input", 18),
    ("vsock", 19),
    ("crypto", 20),
    ("signal_dist", 21),
    ("pstore", 22),
    ("iommu", IOMMU),
    ("mem", 24),
    ("sound", 25),
    ("fs", 26),
    ("pmem", 27),
    ("rpmb", 28),
    ("mac80211_hwsim", 29),
    ("video_encoder", 30),
    ("video_decoder", 31),
    ("scmi", 32),
    ("nitro_sec_mod", 33),
    ("i2c", 34),
    ("watchdog", WATCHDOG),
    ("can", 36),
    ("dmabuf", 37),
    ("param_serv", 38),
    ("audio_policy", 39),
    ("bt", 40),
    ("gpio", 41),
    ("rdma", 42),
    ("camera", 43),
    ("ism", 44),
    ("spi", 45),
    ("tee", 46),
    ("cpu_balloon", 47),
    ("media", 48),
    ("usb", 49),
];

/// The VMM itself would have to translate addresses by it.
const IOMMU: u32 = 23;
/// A backend can't reset the guest.
const WATCHDOG: u32 = 35;

/// One device that a backend serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct GenericVhostUserConfig {
    /// Where the backend listens.
    pub socket: PathBuf,
    /// How long each queue is.
    pub queue_sizes: Vec<u32>,
    /// The number of the device type. The contract's older name of it is understood.
    #[serde(alias = "virtio_id")]
    pub device_type: u32,
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

/// A device that a backend serves, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidGenericVhostUser {
    /// Its name.
    pub id: String,
    /// Where the backend listens, at most [`super::MAX_SOCKET_PATH`] bytes.
    pub socket: PathBuf,
    /// How long each queue is: 1 to [`MAX_QUEUES`] powers of two from 2 to [`super::MAX_QUEUE_SIZE`].
    pub queue_sizes: Vec<u16>,
    /// The number of the device type: 1 to [`MAX_DEVICE_TYPE`].
    pub device_type: u16,
    /// Where it sits.
    pub place: Place,
}

/// A device that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GenericVhostUserError {
    /// No type's number.
    #[error(
        "{device}: device_type={number} is out of range: give a virtio device type's number, 1 to {MAX_DEVICE_TYPE} (2 is a disk)"
    )]
    DeviceType {
        /// The device.
        device: String,
        /// The number given.
        number: u32,
    },
    /// A type that takes more than a backend can do.
    #[error(
        "{device}: device_type={number} is {what}, which the VMM itself would have to be; no backend can serve it"
    )]
    NotOfBackend {
        /// The device.
        device: String,
        /// The number given.
        number: u32,
        /// What it is.
        what: &'static str,
    },
    /// Without a queue.
    #[error("{device}: queue_sizes= lists none; give a size for each queue, such as [128,128]")]
    NoQueues {
        /// The device.
        device: String,
    },
    /// Its queues.
    #[error(transparent)]
    Queues(#[from] QueuesError),
    /// More queues than a device can have.
    #[error("{device}: queue_sizes= lists {count} queues; a device has at most {MAX_QUEUES}")]
    TooManyQueues {
        /// The device.
        device: String,
        /// How many.
        count: usize,
    },
    /// Where its backend is.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl JsonObject for GenericVhostUserConfig {
    const SHAPE: Shape = Shape {
        not_built: &[NotBuilt::switch("iommu", false)],
        ..Shape::WHOLE
    };
}

#[derive(Default)]
pub(crate) struct GenericVhostUserDraft {
    socket: Option<PathBuf>,
    queue_sizes: Option<Vec<u32>>,
    device_type: Option<u32>,
    id: Option<String>,
    pci_segment: u16,
    pci_device_id: Option<u8>,
}

impl OnPci for GenericVhostUserDraft {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl GenericVhostUserDraft {
    fn set_type(&mut self, value: Value<'_>) -> Result<(), Expected> {
        let name = value.text()?;
        let named = NAMES.iter().find(|(known, _)| *known == name);
        let number = match named {
            Some((_, number)) => *number,
            None => value.integer().map_err(|_| {
                Expected("a virtio device type: its number, or a name such as net, block or fs")
            })?,
        };
        match self.device_type.replace(number) {
            None => Ok(()),
            Some(_) => Err(Expected(
                "needed: device_type= and virtio_id= are the same; give device_type= alone",
            )),
        }
    }
}

impl GenericVhostUserConfig {
    pub(crate) const WORD: Word<GenericVhostUserDraft> = Word {
        flag: "--generic-vhost-user",
        about: "A device of whatever type that a vhost-user backend serves; repeat for more",
        keys: &[
            Key::new(
                "device_type",
                "N|NAME",
                "virtio device type: 2 or block, 26 or fs, .. (required)",
                GenericVhostUserDraft::set_type,
            ),
            Key::new(
                "virtio_id",
                "N|NAME",
                "older name of device_type",
                GenericVhostUserDraft::set_type,
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
                "queue_sizes",
                "[N,..]",
                "for each queue how long it is, a power of two (required)",
                |draft, value| {
                    let sizes = value.list()?.into_iter().map(Value::integer);
                    draft.queue_sizes = Some(sizes.collect::<Result<_, _>>()?);
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
        ],
    };

    const NAMING: Naming = Naming::Numbered("_generic_vhost_user");

    /// Reads the value of one `--generic-vhost-user`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut draft = GenericVhostUserDraft::default();
        Self::WORD.fill(text, &mut draft)?;
        let missing = |key| WordError::MissingKey {
            flag: Self::WORD.flag,
            key,
        };
        Ok(Self {
            socket: draft.socket.ok_or(missing("socket"))?,
            queue_sizes: draft.queue_sizes.ok_or(missing("queue_sizes"))?,
            device_type: draft.device_type.ok_or(missing("device_type"))?,
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
            None => format!("{flag} socket={}", self.socket.display()),
        }
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(
        &self,
        segments: u16,
        ids: &mut IdAllocator,
    ) -> Result<ValidGenericVhostUser, GenericVhostUserError> {
        let (device, number) = (self.label(), self.device_type);
        let refused = |device, what| GenericVhostUserError::NotOfBackend {
            device,
            number,
            what,
        };
        let device_type = match (number, u16::try_from(number)) {
            (IOMMU, _) => return Err(refused(device, "an IOMMU")),
            (WATCHDOG, _) => return Err(refused(device, "a watchdog")),
            (1..=MAX_DEVICE_TYPE, Ok(device_type)) => device_type,
            _ => return Err(GenericVhostUserError::DeviceType { device, number }),
        };
        let socket = backend::path(&device, &self.socket)?;
        let count = self.queue_sizes.len();
        if count == 0 {
            return Err(GenericVhostUserError::NoQueues { device });
        }
        if count > MAX_QUEUES as usize {
            return Err(GenericVhostUserError::TooManyQueues { device, count });
        }
        let sizes = self.queue_sizes.iter();
        let queue_sizes = sizes
            .map(|size| queues::size(&device, *size))
            .collect::<Result<_, _>>()?;
        let place = Place::check(&device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(ValidGenericVhostUser {
            id: ids.take(&device, self.id.as_deref(), Self::NAMING)?,
            socket,
            queue_sizes,
            device_type,
            place,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{MAX_SOCKET_PATH, VmConfig, from_json};

    fn validate(text: &str) -> Result<ValidGenericVhostUser, GenericVhostUserError> {
        let mut ids = IdAllocator::default();
        GenericVhostUserConfig::parse(text)
            .unwrap()
            .validate(2, &mut ids)
    }

    #[test]
    fn every_key_is_stored_and_reaches_the_checked_form() {
        let text = "device_type=26,socket=/run/f,queue_sizes=[512,1024],id=g,pci_segment=1,pci_device_id=7";
        let json = r#"{"device_type":26,"socket":"/run/f","queue_sizes":[512,1024],"id":"g","pci_segment":1,
            "pci_device_id":7,"iommu":false}"#;
        let config = GenericVhostUserConfig::parse(text).unwrap();
        assert_eq!(config, from_json(json.as_bytes()).unwrap());
        assert_eq!(
            validate(text),
            Ok(ValidGenericVhostUser {
                id: "g".into(),
                socket: "/run/f".into(),
                queue_sizes: vec![512, 1024],
                device_type: 26,
                place: Place {
                    segment: 1,
                    device: Some(7)
                },
            })
        );
        let plain = validate("device_type=63,socket=/s,queue_sizes=2").unwrap();
        assert_eq!(plain.id, "_generic_vhost_user0");
        assert_eq!((plain.device_type, plain.queue_sizes), (63, vec![2]));
    }

    #[test]
    fn a_type_has_a_number_a_name_and_an_older_key() {
        let of = |text: &str| {
            let text = format!("{text},socket=/s,queue_sizes=[64]");
            GenericVhostUserConfig::parse(&text).map(|config| config.device_type)
        };
        let same = [
            ("device_type=2", 2),
            ("virtio_id=2", 2),
            ("device_type=block", 2),
        ];
        for (text, number) in [("virtio_id=fs", 26), ("device_type=usb", 49)]
            .iter()
            .chain(&same)
        {
            assert_eq!(of(text), Ok(*number), "{text}");
        }
        let json = br#"{"virtio_id":2,"socket":"/s","queue_sizes":[64]}"#;
        let older: GenericVhostUserConfig = from_json(json).unwrap();
        assert_eq!(older.device_type, 2);
        let written = serde_json::to_string(&older).unwrap();
        assert!(written.contains(r#""device_type":2"#), "{written}");
        for (text, words) in [
            ("device_type=2,virtio_id=2", "give device_type= alone"),
            (
                "device_type=disk",
                "device_type=disk is not a virtio device type",
            ),
            ("device_type=-1", "its number"),
        ] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let json = br#"{"virtio_id":2,"device_type":2,"socket":"/s","queue_sizes":[64]}"#;
        let error = from_json::<GenericVhostUserConfig>(json).unwrap_err();
        assert!(error.to_string().contains("device_type"), "{error}");
    }

    #[test]
    fn what_is_missing_or_of_no_schema_is_named() {
        let parse = GenericVhostUserConfig::parse;
        for (text, words) in [
            ("socket=/s,queue_sizes=[2]", "add device_type=VALUE"),
            ("device_type=2,queue_sizes=[2]", "add socket=VALUE"),
            ("device_type=2,socket=/s", "add queue_sizes=VALUE"),
            ("device_type=2,socket=/s,queue_sizes=[x]", "a whole number"),
            (
                "device_type=2,socket=/s,queue_size=[2]",
                "unknown key \"queue_size\"",
            ),
            (
                "device_type=2,socket=/s,iommu=on",
                "not supported by daxhund: --generic-vhost-user iommu",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        let json = br#"{"device_type":2,"socket":"/s","queue_sizes":[2],"queue_size":2}"#;
        let error = from_json::<GenericVhostUserConfig>(json).unwrap_err();
        assert!(error.to_string().contains("queue_size"), "{error}");
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        let many = vec!["2"; 257].join(",");
        let deep = format!("/{}", "s".repeat(MAX_SOCKET_PATH));
        for (text, words) in [
            (
                "device_type=0,socket=/s,queue_sizes=[2]".to_owned(),
                "give a virtio device type's number, 1 to 63",
            ),
            (
                "virtio_id=64,socket=/s,queue_sizes=[2]".to_owned(),
                "device_type=64 is out of range",
            ),
            (
                "device_type=iommu,socket=/s,queue_sizes=[2]".to_owned(),
                "is an IOMMU",
            ),
            (
                "device_type=35,socket=/s,queue_sizes=[2]".to_owned(),
                "is a watchdog",
            ),
            (
                "device_type=2,socket=/s,queue_sizes=[]".to_owned(),
                "lists none",
            ),
            (
                "device_type=2,socket=/s,queue_sizes=[2,3],id=g".to_owned(),
                "--generic-vhost-user id=g: queue size out of range: queue_size=3",
            ),
            (
                "device_type=2,socket=/s,queue_sizes=[65536]".to_owned(),
                "queue_size=65536",
            ),
            (
                format!("device_type=2,socket=/s,queue_sizes=[{many}]"),
                "lists 257 queues",
            ),
            (
                format!("device_type=2,socket={deep},queue_sizes=[2]"),
                "has 108 bytes",
            ),
            (
                "device_type=2,socket=/s,queue_sizes=[2],pci_segment=2".to_owned(),
                "--generic-vhost-user socket=/s: pci_segment=2",
            ),
        ] {
            let error = validate(&text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let many = vec!["2"; 256].join(",");
        assert!(validate(&format!("device_type=2,socket=/s,queue_sizes=[{many}]")).is_ok());
    }

    #[test]
    fn it_is_a_device_among_others() {
        let text = "device_type=2,socket=/s,queue_sizes=[64],pci_device_id=4";
        let device = GenericVhostUserConfig::parse(text).unwrap();
        let json = r#"{"payload":{"kernel":"/k"},"generic_vhost_user":[{"device_type":2,"socket":"/s","queue_sizes":[64],
            "pci_device_id":4}]}"#;
        let mut config: VmConfig = from_json(json.as_bytes()).unwrap();
        assert_eq!(config.generic_vhost_user, std::slice::from_ref(&device));
        let valid = config.clone().validate().unwrap();
        let id = &valid.generic_vhost_user()[0].id;
        assert!(valid.ids().is_taken(id));
        assert_eq!(valid.config().generic_vhost_user[0].id.as_ref(), Some(id));
        config.generic_vhost_user.push(device);
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains("pci_device_id=4 is where"), "{error}");
        let mut config = valid.config().clone();
        assert!(config.remove_device(id) && !config.remove_device(id));
    }

    proptest! {
        #[test]
        fn words_and_json_are_the_same(
            device_type: u32, queue_sizes in proptest::collection::vec(any::<u32>(), 1..5), socket in "/[a-z]{1,9}",
            id in proptest::option::of("[a-z]{1,9}"),
        ) {
            let sizes: Vec<_> = queue_sizes.iter().map(u32::to_string).collect();
            let named = id.map(|id| format!(",id={id}")).unwrap_or_default();
            let text = format!("device_type={device_type},socket={socket},queue_sizes=[{}]{named}", sizes.join(","));
            let config = GenericVhostUserConfig::parse(&text).unwrap();
            let written = serde_json::to_string(&config).unwrap();
            prop_assert_eq!(from_json::<GenericVhostUserConfig>(written.as_bytes()).unwrap(), config);
        }
    }
}
