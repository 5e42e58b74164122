//! `--device`: a PCI function of the host that becomes the guest's.

use std::collections::BTreeMap;
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

/// Base address registers of a function.
const BARS: u32 = 6;

/// One passed-through device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct DeviceConfig {
    /// Where sysfs has it: `/sys/bus/pci/devices/0000:01:00.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// An open VFIO device file (`/dev/vfio/devices/vfioN`) that this process inherits. Its number means nothing to a client.
    #[serde(skip)]
    pub fd: Option<i32>,
    /// BARs the guest reaches by traps only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub x_exclude_mmap_bars: Vec<u32>,
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

/// Which function of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceSource {
    /// Where sysfs has it.
    Path(PathBuf),
    /// An open VFIO device file that this process inherits.
    Descriptor(i32),
}

/// A passed-through device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidDevice {
    /// Its name.
    pub id: String,
    /// Which function of the host.
    pub source: DeviceSource,
    /// BARs the guest reaches by traps only, 0 to 5.
    pub exclude_mmap_bars: Vec<u8>,
    /// Where it sits.
    pub place: Place,
}

/// A passed-through device that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// Neither a path nor a descriptor.
    #[error(
        "{device} names no device: give path=/sys/bus/pci/devices/0000:01:00.0, or fd=N of an open VFIO device file"
    )]
    NoSource {
        /// The device.
        device: String,
    },
    /// Both.
    #[error("{device} has path= and fd=: give one of them")]
    TwoSources {
        /// The device.
        device: String,
    },
    /// The path is the empty text.
    #[error("{device}: path= is empty: give path=/sys/bus/pci/devices/0000:01:00.0")]
    EmptyPath {
        /// The device.
        device: String,
    },
    /// No such BAR.
    #[error("{device}: x_exclude_mmap_bars has {bar}: a function has BARs 0 to {}", BARS - 1)]
    NoBar {
        /// The device.
        device: String,
        /// The number given.
        bar: u32,
    },
    /// Two devices of one guest are one function of the host.
    #[error("{device} and {other} are both {}: a function can be one device only", path.display())]
    Twice {
        /// The later device.
        device: String,
        /// The device before it.
        other: String,
        /// Where sysfs has it.
        path: PathBuf,
    },
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl JsonObject for DeviceConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::switch("iommu", false),
            NotBuilt::presence("x_nv_gpudirect_clique"),
        ],
        ..Shape::WHOLE
    };
}

impl OnPci for DeviceConfig {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl DeviceConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--device",
        about: "A PCI function of the host, passed through by VFIO; repeat for more",
        keys: &[
            Key::new(
                "path",
                "PATH",
                "where sysfs has it, /sys/bus/pci/devices/BDF",
                |device, value| {
                    device.path = Some(value.path()?);
                    Ok(())
                },
            ),
            Key::new(
                "fd",
                "N",
                "an open VFIO device file instead of path",
                |device, value| {
                    device.fd = Some(value.descriptor()?);
                    Ok(())
                },
            ),
            Key::new(
                "x_exclude_mmap_bars",
                "[N,..]",
                "BARs the guest reaches by traps only [default: none]",
                |device, value| {
                    device.x_exclude_mmap_bars = value.integers_up_to(BARS - 1)?;
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
            Key::not_built("x_nv_gpudirect_clique"),
        ],
    };

    const NAMING: Naming = Naming::Numbered("_vfio");

    /// Reads the value of one `--device`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut device = Self::default();
        Self::WORD.fill(text, &mut device)?;
        if device.path.is_none() && device.fd.is_none() {
            return Err(WordError::MissingKey {
                flag: Self::WORD.flag,
                key: "path",
            });
        }
        Ok(device)
    }

    /// The device as errors name it.
    fn label(&self) -> String {
        let flag = Self::WORD.flag;
        match (&self.id, &self.path, self.fd) {
            (Some(id), ..) => format!("{flag} id={id}"),
            (None, Some(path), _) => format!("{flag} path={}", path.display()),
            (None, None, Some(fd)) => format!("{flag} fd={fd}"),
            (None, None, None) => flag.to_owned(),
        }
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(
        &self,
        segments: u16,
        ids: &mut IdAllocator,
    ) -> Result<ValidDevice, DeviceError> {
        let device = self.label();
        let source = match (&self.path, self.fd) {
            (None, None) => return Err(DeviceError::NoSource { device }),
            (Some(_), Some(_)) => return Err(DeviceError::TwoSources { device }),
            (Some(path), None) if path.as_os_str().is_empty() => {
                return Err(DeviceError::EmptyPath { device });
            }
            (Some(path), None) => DeviceSource::Path(path.clone()),
            (None, Some(fd)) => DeviceSource::Descriptor(fd),
        };
        let mut exclude_mmap_bars = Vec::new();
        for bar in &self.x_exclude_mmap_bars {
            match u8::try_from(*bar) {
                Ok(number) if *bar < BARS => exclude_mmap_bars.push(number),
                _ => return Err(DeviceError::NoBar { device, bar: *bar }),
            }
        }
        let place = Place::check(&device, self.pci_segment, self.pci_device_id, segments)?;
        let id = ids.take(&device, self.id.as_deref(), Self::NAMING)?;
        Ok(ValidDevice {
            id,
            source,
            exclude_mmap_bars,
            place,
        })
    }
}

/// Checks that no function of the host is asked for twice, as far as its path tells.
pub(super) fn check_functions(devices: &[ValidDevice]) -> Result<(), DeviceError> {
    let mut seen: BTreeMap<&PathBuf, &str> = BTreeMap::new();
    for device in devices {
        let DeviceSource::Path(path) = &device.source else {
            continue;
        };
        if let Some(other) = seen.insert(path, &device.id) {
            let flag = DeviceConfig::WORD.flag;
            return Err(DeviceError::Twice {
                device: format!("{flag} id={}", device.id),
                other: format!("{flag} id={other}"),
                path: path.clone(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

    const PATH: &str = "/sys/bus/pci/devices/0000:01:00.0";

    fn check(text: &str) -> Result<ValidDevice, DeviceError> {
        DeviceConfig::parse(text)
            .unwrap()
            .validate(1, &mut IdAllocator::default())
    }

    #[test]
    fn a_device_is_a_path_or_a_descriptor() {
        let valid = check(&format!("path={PATH},x_exclude_mmap_bars=[0,2-3]")).unwrap();
        assert_eq!(valid.id, "_vfio0");
        assert_eq!(valid.source, DeviceSource::Path(PATH.into()));
        assert_eq!(valid.exclude_mmap_bars, [0, 2, 3]);
        let valid = check("fd=7,id=nic,pci_device_id=5").unwrap();
        assert_eq!(valid.source, DeviceSource::Descriptor(7));
        assert_eq!((valid.id.as_str(), valid.place.device), ("nic", Some(5)));
    }

    #[test]
    fn devices_that_cannot_be_are_named() {
        for (text, words) in [
            (
                "path=/a,fd=5",
                "--device path=/a has path= and fd=: give one",
            ),
            ("path=/a,pci_segment=1", "the guest's segments end at 0"),
        ] {
            let error = check(text).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        for (text, words) in [
            ("id=a", "path"),
            ("path=/a,fd=1", "3 or more"),
            ("path=/a,x_exclude_mmap_bars=[6]", "in range"),
            ("path=/a,iommu=on", "not supported by daxhund"),
        ] {
            let error = DeviceConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let config = DeviceConfig {
            x_exclude_mmap_bars: vec![6],
            path: Some(PATH.into()),
            ..DeviceConfig::default()
        };
        let error = config
            .validate(1, &mut IdAllocator::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("BARs 0 to 5"), "{error}");
    }

    #[test]
    fn json_has_no_descriptor() {
        let device: DeviceConfig =
            from_json(br#"{"path":"/a","iommu":false,"x_exclude_mmap_bars":[1]}"#).unwrap();
        assert_eq!(device.x_exclude_mmap_bars, [1]);
        assert!(from_json::<DeviceConfig>(br#"{"fd":5}"#).is_err());
        let device: DeviceConfig = from_json(b"{}").unwrap();
        let error = device
            .validate(1, &mut IdAllocator::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("--device names no device"), "{error}");
    }

    #[test]
    fn a_function_is_one_device() {
        let mut ids = IdAllocator::default();
        let mut device = |text: &str| {
            DeviceConfig::parse(text)
                .unwrap()
                .validate(1, &mut ids)
                .unwrap()
        };
        let devices = [device("path=/a,id=x"), device("path=/b"), device("fd=5")];
        assert_eq!(check_functions(&devices), Ok(()));
        let devices = [device("path=/a,id=y"), device("path=/a,id=z")];
        let error = check_functions(&devices).unwrap_err().to_string();
        assert!(
            error.contains("--device id=z and --device id=y are both /a"),
            "{error}"
        );
    }
}
