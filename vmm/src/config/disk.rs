//! `--disk`: a disk of the guest, and the raw image or block device that is it, or the vhost-user backend that serves it.

use std::path::{Path, PathBuf};

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
use super::schema::{as_sent, never};
use super::{Key, Value, Word, WordError};

/// Longest serial number a guest can read, in bytes (virtio 1.3, 5.2.6: `VIRTIO_BLK_T_GET_ID`).
pub const MAX_DISK_SERIAL: usize = 20;

const DEFAULT_NUM_QUEUES: u32 = 1;
const DEFAULT_QUEUE_SIZE: u32 = 128;

/// One virtio-blk device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct DiskConfig {
    /// What the sectors are: a raw image or a block device. Empty for a disk that a backend serves.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub path: PathBuf,
    /// Whether another process serves the disk.
    #[serde(default, skip_serializing_if = "is_off")]
    #[schemars(skip_serializing_if = "never")]
    pub vhost_user: bool,
    /// Where that process listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Whether the guest can only read.
    #[serde(default)]
    pub readonly: bool,
    /// Whether the host's page cache is passed by (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// How many request queues.
    #[serde(default = "default_num_queues")]
    pub num_queues: u32,
    /// How long each of them is.
    #[serde(default = "default_queue_size")]
    pub queue_size: u32,
    /// The serial number the guest reads; left to the device when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// What the image is said to be.
    #[serde(default)]
    pub image_type: ImageType,
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

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

#[allow(clippy::trivially_copy_pass_by_ref)] // As serde calls it.
fn is_off(switch: &bool) -> bool {
    !switch
}

fn default_num_queues() -> u32 {
    DEFAULT_NUM_QUEUES
}

fn default_queue_size() -> u32 {
    DEFAULT_QUEUE_SIZE
}

/// What an image is said to be. It is raw in both cases: the format is never guessed from bytes the guest can write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImageType {
    /// Raw, and whoever asks knows it.
    Raw,
    /// Nothing was said.
    #[default]
    Unknown,
}

/// A virtio-blk device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidDisk {
    /// Its name.
    pub id: String,
    /// What it is on the host.
    pub source: DiskSource,
    /// How many request queues: 1 to [`super::MAX_QUEUES`].
    pub num_queues: u16,
    /// How long each of them is: a power of two from 2 to [`super::MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// Where it sits.
    pub place: Place,
}

/// What a disk is on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A file that this process reads and writes.
    Image(ValidImage),
    /// A process that serves it.
    VhostUser {
        /// Where that listens.
        socket: PathBuf,
    },
}

/// A raw image or a block device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidImage {
    /// What the sectors are.
    pub path: PathBuf,
    /// Whether the guest can only read.
    pub readonly: bool,
    /// Whether the host's page cache is passed by (`O_DIRECT`).
    pub direct: bool,
    /// The serial number the guest reads: at most [`MAX_DISK_SERIAL`] bytes, none of them NUL.
    pub serial: Option<String>,
    /// What the image is said to be.
    pub image_type: ImageType,
}

/// A disk that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DiskError {
    /// No path, or the empty text.
    #[error(
        "--disk has no path: give path=PATH, a raw image or a block device, or vhost_user=on,socket=PATH for one that a backend \
         serves"
    )]
    EmptyPath,
    /// Who serves it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The serial number does not fit.
    #[error(
        "{device}: serial={serial} has {} bytes, a guest can read {MAX_DISK_SERIAL}; give a shorter one",
        serial.len()
    )]
    SerialTooLong {
        /// The device.
        device: String,
        /// The serial number given.
        serial: String,
    },
    /// The guest would read the serial number only up to the NUL.
    #[error("{device}: serial has a NUL byte, where a guest stops reading; remove it")]
    NulInSerial {
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

impl JsonObject for DiskConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::switch("iommu", false),
            NotBuilt::object(
                "rate_limiter_config",
                &[NotBuilt::empty("bandwidth"), NotBuilt::empty("ops")],
            ),
            NotBuilt::empty("rate_limit_group"),
            NotBuilt::empty("queue_affinity"),
            NotBuilt::switch("backing_files", false),
            NotBuilt::switch("sparse", true),
            NotBuilt::text("lock_granularity", "ByteRange"),
            NotBuilt::switch("disable_io_uring", false),
            NotBuilt::switch("disable_aio", false),
        ],
        values: &[("image_type", &["FixedVhd", "FlatVmdk", "Qcow2", "Vhdx"])],
        ..Shape::WHOLE
    };
}

impl OnPci for DiskConfig {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl DiskConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--disk",
        about: "A disk of the guest; repeat for more",
        keys: &[
            Key::new(
                "path",
                "PATH",
                "a raw image or a block device (required, unless vhost_user=on)",
                |disk, value| {
                    disk.path = value.path()?;
                    Ok(())
                },
            ),
            Key::new(
                "readonly",
                "on|off",
                "the guest can only read [default: off]",
                |disk, value| {
                    disk.readonly = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "direct",
                "on|off",
                "pass the host's page cache by [default: off]",
                |disk, value| {
                    disk.direct = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "num_queues",
                "N",
                "request queues [default: 1]",
                |disk, value| {
                    disk.num_queues = value.integer()?;
                    Ok(())
                },
            ),
            Key::new(
                "queue_size",
                "N",
                "requests in a queue, a power of two [default: 128]",
                |disk, value| {
                    disk.queue_size = value.integer()?;
                    Ok(())
                },
            ),
            Key::new(
                "serial",
                "TEXT",
                "serial number the guest reads, up to 20 bytes",
                |disk, value| {
                    disk.serial = Some(value.text()?);
                    Ok(())
                },
            ),
            Key::new(
                "image_type",
                "raw",
                "the format; only raw is built",
                |disk, value| {
                    disk.image_type = value.image_type()?;
                    Ok(())
                },
            ),
            Key::new(
                "vhost_user",
                "on|off",
                "a backend at socket= serves the disk [default: off]",
                |disk, value| {
                    disk.vhost_user = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "socket",
                "PATH",
                "where the vhost-user backend listens",
                |disk, value| {
                    disk.vhost_socket = Some(value.path()?);
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
            Key::not_built("bw_size"),
            Key::not_built("bw_one_time_burst"),
            Key::not_built("bw_refill_time"),
            Key::not_built("ops_size"),
            Key::not_built("ops_one_time_burst"),
            Key::not_built("ops_refill_time"),
            Key::not_built("rate_limit_group"),
            Key::not_built("queue_affinity"),
            Key::not_built("backing_files"),
            Key::not_built("sparse"),
            Key::not_built("lock_granularity"),
            Key::not_built("_disable_io_uring"),
            Key::not_built("_disable_aio"),
        ],
    };

    const NAMING: Naming = Naming::Numbered("_disk");

    /// A disk that is `path`, everything else as it is when nobody says otherwise.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            vhost_user: false,
            vhost_socket: None,
            readonly: false,
            direct: false,
            num_queues: DEFAULT_NUM_QUEUES,
            queue_size: DEFAULT_QUEUE_SIZE,
            serial: None,
            image_type: ImageType::Unknown,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }

    /// Reads the value of one `--disk`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut disk = Self::new("");
        Self::WORD.fill(text, &mut disk)?;
        if is_empty(&disk.path) && !disk.vhost_user && disk.vhost_socket.is_none() {
            // The setter refuses an empty path, so the key was not there.
            return Err(WordError::MissingKey {
                flag: Self::WORD.flag,
                key: "path",
            });
        }
        Ok(disk)
    }

    /// The device as errors name it.
    fn label(&self) -> String {
        match &self.id {
            Some(id) => format!("{} id={id}", Self::WORD.flag),
            None => match &self.vhost_socket {
                Some(socket) => format!("{} socket={}", Self::WORD.flag, socket.display()),
                None => format!("{} path={}", Self::WORD.flag, self.path.display()),
            },
        }
    }

    fn source(&self, device: String) -> Result<DiskSource, DiskError> {
        let told = [
            ("path", !is_empty(&self.path)),
            ("readonly", self.readonly),
            ("direct", self.direct),
            ("serial", self.serial.is_some()),
        ];
        let socket = self.vhost_socket.as_deref();
        match backend::socket((&device, "disk"), self.vhost_user, socket, told)? {
            Some(socket) => Ok(DiskSource::VhostUser { socket }),
            None => self.image(device).map(DiskSource::Image),
        }
    }

    fn image(&self, device: String) -> Result<ValidImage, DiskError> {
        if is_empty(&self.path) {
            return Err(DiskError::EmptyPath);
        }
        if let Some(serial) = self.serial.clone() {
            if serial.len() > MAX_DISK_SERIAL {
                return Err(DiskError::SerialTooLong { device, serial });
            }
            if serial.contains('\0') {
                return Err(DiskError::NulInSerial { device });
            }
        }
        Ok(ValidImage {
            path: self.path.clone(),
            readonly: self.readonly,
            direct: self.direct,
            serial: self.serial.clone(),
            image_type: self.image_type,
        })
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(&self, segments: u16, ids: &mut IdAllocator) -> Result<ValidDisk, DiskError> {
        let device = self.label();
        let source = self.source(device.clone())?;
        let num_queues = queues::count(&device, self.num_queues)?;
        let queue_size = queues::size(&device, self.queue_size)?;
        let place = Place::check(&device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(ValidDisk {
            id: ids.take(&device, self.id.as_deref(), Self::NAMING)?,
            source,
            num_queues,
            queue_size,
            place,
        })
    }
}

impl Value<'_> {
    fn image_type(self) -> Result<ImageType, Expected> {
        match self.text().as_deref() {
            Ok("raw") => Ok(ImageType::Raw),
            Ok("unknown") => Ok(ImageType::Unknown),
            _ => Err(Expected(
                "raw; other formats are not supported by daxhund: convert with \
                 `qemu-img convert -O raw`",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

    fn validate(text: &str) -> Result<ValidDisk, DiskError> {
        DiskConfig::parse(text)
            .unwrap()
            .validate(2, &mut IdAllocator::default())
    }

    #[test]
    fn every_key_is_stored_and_reaches_the_checked_form() {
        let text = "path=/d,readonly=on,direct=on,num_queues=4,queue_size=256,serial=s1,\
                    image_type=raw,id=d,pci_segment=1,pci_device_id=7";
        let json = r#"{"path":"/d","readonly":true,"direct":true,"num_queues":4,"queue_size":256,
            "serial":"s1","image_type":"Raw","id":"d","pci_segment":1,"pci_device_id":7}"#;
        assert_eq!(
            DiskConfig::parse(text).unwrap(),
            from_json::<DiskConfig>(json.as_bytes()).unwrap()
        );
        assert_eq!(
            validate(text),
            Ok(ValidDisk {
                id: "d".into(),
                source: DiskSource::Image(ValidImage {
                    path: "/d".into(),
                    readonly: true,
                    direct: true,
                    serial: Some("s1".into()),
                    image_type: ImageType::Raw,
                }),
                num_queues: 4,
                queue_size: 256,
                place: Place {
                    segment: 1,
                    device: Some(7)
                },
            })
        );
        let plain = validate("path=/d").unwrap();
        assert_eq!((plain.num_queues, plain.queue_size), (1, 128));
        assert_eq!(plain.id, "_disk0");
    }

    #[test]
    fn a_client_that_sends_the_whole_schema_is_understood() {
        let json = r#"{"path":"/d","readonly":false,"direct":false,"iommu":false,"num_queues":1,
            "queue_size":128,"vhost_user":false,"vhost_socket":null,"rate_limiter_config":null,
            "pci_segment":0,"id":null,"serial":null,"rate_limit_group":"","queue_affinity":[],
            "backing_files":false,"sparse":true,"image_type":"Unknown",
            "lock_granularity":"ByteRange"}"#;
        let disk: DiskConfig = from_json(json.as_bytes()).unwrap();
        assert_eq!(disk, DiskConfig::new("/d"));
        for (member, name) in [
            (r#""sparse":false"#, "sparse"),
            (
                r#""rate_limiter_config":{"bandwidth":{"size":1,"refill_time":1}}"#,
                "rate_limiter_config.bandwidth",
            ),
            (r#""image_type":"Qcow2""#, "image_type=Qcow2"),
            (r#""lock_granularity":"Full""#, "lock_granularity"),
        ] {
            let json = format!(r#"{{"path":"/d",{member}}}"#);
            let error = from_json::<DiskConfig>(json.as_bytes()).unwrap_err();
            let words = format!("not supported by daxhund: {name}");
            assert_eq!(error.to_string(), words);
        }
    }

    #[test]
    fn a_path_is_required_and_keys_not_built_are_named() {
        let error = DiskConfig::parse("readonly=on").unwrap_err();
        assert!(error.to_string().contains("add path=VALUE"), "{error}");
        for key in [
            "iommu",
            "bw_size",
            "ops_refill_time",
            "rate_limit_group",
            "queue_affinity",
            "backing_files",
            "sparse",
            "lock_granularity",
        ] {
            let error = DiskConfig::parse(&format!("path=/d,{key}=on")).unwrap_err();
            let words = format!("not supported by daxhund: --disk {key}");
            assert_eq!(error.to_string(), words);
        }
        let error = DiskConfig::parse("path=/d,image_type=qcow2").unwrap_err();
        let words = "--disk: image_type=qcow2 is not raw; other formats are not supported";
        assert!(error.to_string().starts_with(words), "{error}");
    }

    #[test]
    fn a_backend_has_a_socket_and_nothing_of_a_file() {
        let text = "vhost_user=on,socket=/s,num_queues=2,queue_size=256,image_type=raw,id=d";
        let json = r#"{"vhost_user":true,"vhost_socket":"/s","num_queues":2,"queue_size":256,
            "image_type":"Raw","id":"d"}"#;
        let disk = DiskConfig::parse(text).unwrap();
        assert_eq!(disk, from_json::<DiskConfig>(json.as_bytes()).unwrap());
        let written = serde_json::to_string(&disk).unwrap();
        assert!(!written.contains("path") && written.contains(r#""vhost_socket":"/s""#));
        let valid = validate(text).unwrap();
        let socket = "/s".into();
        assert_eq!(valid.source, DiskSource::VhostUser { socket });
        for (text, words) in [
            ("vhost_user=on", "give socket=PATH"),
            ("path=/d,vhost_user=on", "give socket=PATH"),
            ("socket=/s", "give vhost_user=on as well"),
            ("path=/d,socket=/s,id=d", "--disk id=d: socket=/s"),
            ("path=/d,vhost_user=on,socket=/s", "path= says nothing"),
            ("vhost_user=on,socket=/s,readonly=on", "readonly= says"),
            ("vhost_user=on,socket=/s,direct=on", "direct= says"),
            ("vhost_user=on,socket=/s,serial=x", "serial= says"),
            (
                "vhost_user=on,socket=/s,num_queues=0",
                "--disk socket=/s: num",
            ),
        ] {
            let error = validate(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        for (text, words) in [
            (
                "path=/d,queue_size=100",
                "--disk path=/d: queue size out of range: queue_size=100",
            ),
            ("path=/d,num_queues=0", "num_queues=0 is out of range"),
            ("path=/d,num_queues=257", "give 1 to 256"),
            (
                "path=/d,serial=012345678901234567890",
                "has 21 bytes, a guest can read 20",
            ),
            ("path=/d,pci_segment=2", "pci_segment=2"),
            ("path=/d,pci_device_id=32", "pci_device_id=32"),
            ("path=/d,id=__d", "two underscores"),
        ] {
            let error = validate(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        let mut ids = IdAllocator::default();
        let error = DiskConfig::new("").validate(1, &mut ids);
        assert_eq!(error, Err(DiskError::EmptyPath));
        let mut disk = DiskConfig::new("/d");
        disk.serial = Some("a\0b".into());
        let error = disk.validate(1, &mut ids).unwrap_err();
        assert!(error.to_string().contains("NUL byte"), "{error}");
    }
}
