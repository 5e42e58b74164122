//! `--rng`: where the guest's random numbers come from. Every guest has the device.

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

/// Where random numbers come from when nobody says.
pub const DEFAULT_RNG_SOURCE: &str = "/dev/urandom";

/// The virtio-rng device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct RngConfig {
    /// The file that is read.
    pub src: PathBuf,
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

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: DEFAULT_RNG_SOURCE.into(),
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }
}

/// The virtio-rng device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidRng {
    /// Its name.
    pub id: String,
    /// The file that is read.
    pub src: PathBuf,
    /// Where it sits.
    pub place: Place,
}

/// A random number generator that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RngError {
    /// The path is the empty text.
    #[error("--rng src= is empty: give src=PATH, or leave it out for {DEFAULT_RNG_SOURCE}")]
    EmptySource,
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl JsonObject for RngConfig {
    const SHAPE: Shape = Shape {
        not_built: &[NotBuilt::switch("iommu", false)],
        ..Shape::WHOLE
    };
}

impl OnPci for RngConfig {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl RngConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--rng",
        about: "Where the guest's random numbers come from",
        keys: &[
            Key::new(
                "src",
                "PATH",
                "the file to read [default: /dev/urandom]",
                |rng, value| {
                    rng.src = value.path()?;
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
        ],
    };

    const NAMING: Naming = Naming::Single("_rng");

    /// Reads the value of `--rng`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut rng = Self::default();
        Self::WORD.fill(text, &mut rng)?;
        Ok(rng)
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(&self, segments: u16, ids: &mut IdAllocator) -> Result<ValidRng, RngError> {
        let device = Self::WORD.flag;
        if self.src.as_os_str().is_empty() {
            return Err(RngError::EmptySource);
        }
        let place = Place::check(device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(ValidRng {
            id: ids.take(device, self.id.as_deref(), Self::NAMING)?,
            src: self.src.clone(),
            place,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

    #[test]
    fn every_key_is_stored_and_reaches_the_checked_form() {
        let text = "src=/dev/hwrng,id=r,pci_segment=1,pci_device_id=7";
        let json = r#"{"src":"/dev/hwrng","id":"r","pci_segment":1,"pci_device_id":7,
            "iommu":false}"#;
        let rng = RngConfig::parse(text).unwrap();
        assert_eq!(rng, from_json(json.as_bytes()).unwrap());
        assert_eq!(
            rng.validate(2, &mut IdAllocator::default()),
            Ok(ValidRng {
                id: "r".into(),
                src: "/dev/hwrng".into(),
                place: Place {
                    segment: 1,
                    device: Some(7)
                },
            })
        );
        let valid = RngConfig::default().validate(1, &mut IdAllocator::default());
        assert_eq!(valid.unwrap().id, "_rng");
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        let error = RngConfig::parse("src=").unwrap_err();
        assert!(error.to_string().contains("src= is not a path"), "{error}");
        let error = RngConfig::parse("iommu=on").unwrap_err();
        assert_eq!(error.to_string(), "not supported by daxhund: --rng iommu");
        let rng: RngConfig = from_json(br#"{"src":""}"#).unwrap();
        let error = rng.validate(1, &mut IdAllocator::default());
        assert_eq!(error, Err(RngError::EmptySource));
        let rng = RngConfig::parse("pci_segment=1").unwrap();
        assert!(rng.validate(1, &mut IdAllocator::default()).is_err());
    }
}
