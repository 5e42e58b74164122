//! `--balloon`: memory that the guest lends back to the host.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::device::{
    IdAllocator, IdError, Naming, OnPci, PciFields, Place, PlaceError, id_key, number_key,
    segment_key,
};
use super::json::{JsonObject, NotBuilt, Shape};
use super::schema::as_sent;
use super::{ByteSize, Key, PAGE_SIZE, Word, WordError};

/// The virtio-balloon device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct BalloonConfig {
    /// How much the guest is asked to lend from the start.
    pub size: ByteSize,
    /// Whether the guest takes memory back when it runs out of it.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest tells which of its memory is free.
    #[serde(default)]
    pub free_page_reporting: bool,
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

/// The virtio-balloon device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidBalloon {
    /// Its name.
    pub id: String,
    /// How much the guest is asked to lend from the start, in whole pages. It can be more than there is of RAM only
    /// where RAM is as much as a file has.
    pub size: ByteSize,
    /// Whether the guest takes memory back when it runs out of it.
    pub deflate_on_oom: bool,
    /// Whether the guest tells which of its memory is free.
    pub free_page_reporting: bool,
    /// Where it sits.
    pub place: Place,
}

/// A balloon that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BalloonError {
    /// Not whole pages.
    #[error("--balloon size={size} is not a multiple of 4K; use a multiple of 4K")]
    NotPages {
        /// The size given.
        size: ByteSize,
    },
    /// Nothing would be left.
    #[error("--balloon size={size} leaves nothing of the guest's {ram} of RAM; give less")]
    AllOfRam {
        /// The size given.
        size: ByteSize,
        /// RAM of the guest.
        ram: ByteSize,
    },
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl JsonObject for BalloonConfig {
    const SHAPE: Shape = Shape {
        not_built: &[NotBuilt::switch("iommu", false)],
        ..Shape::WHOLE
    };
}

impl OnPci for BalloonConfig {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl BalloonConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--balloon",
        about: "Memory that the guest lends back to the host",
        keys: &[
            Key::new(
                "size",
                "SIZE",
                "how much from the start [default: 0]",
                |balloon, value| {
                    balloon.size = value.size()?;
                    Ok(())
                },
            ),
            Key::new(
                "deflate_on_oom",
                "on|off",
                "the guest takes it back when it runs out [default: off]",
                |balloon, value| {
                    balloon.deflate_on_oom = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "free_page_reporting",
                "on|off",
                "the guest tells what is free [default: off]",
                |balloon, value| {
                    balloon.free_page_reporting = value.switch()?;
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
        ],
    };

    const NAMING: Naming = Naming::Single("_balloon");

    /// Reads the value of `--balloon`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut balloon = Self::default();
        Self::WORD.fill(text, &mut balloon)?;
        Ok(balloon)
    }

    /// Checks the balloon against all of the guest's RAM.
    pub(super) fn check_ram(&self, ram: ByteSize) -> Result<(), BalloonError> {
        let size = self.size;
        if size >= ram {
            return Err(BalloonError::AllOfRam { size, ram });
        }
        Ok(())
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(
        &self,
        segments: u16,
        ids: &mut IdAllocator,
    ) -> Result<ValidBalloon, BalloonError> {
        let device = Self::WORD.flag;
        let size = self.size;
        if !size.bytes().is_multiple_of(PAGE_SIZE) {
            return Err(BalloonError::NotPages { size });
        }
        let place = Place::check(device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(ValidBalloon {
            id: ids.take(device, self.id.as_deref(), Self::NAMING)?,
            size,
            deflate_on_oom: self.deflate_on_oom,
            free_page_reporting: self.free_page_reporting,
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
        let text = "size=1G,deflate_on_oom=on,free_page_reporting=on,id=b,pci_segment=1,\
                    pci_device_id=7";
        let json = r#"{"size":1073741824,"deflate_on_oom":true,"free_page_reporting":true,
            "id":"b","pci_segment":1,"pci_device_id":7}"#;
        let balloon = BalloonConfig::parse(text).unwrap();
        assert_eq!(balloon, from_json(json.as_bytes()).unwrap());
        assert_eq!(
            balloon.validate(2, &mut IdAllocator::default()),
            Ok(ValidBalloon {
                id: "b".into(),
                size: ByteSize::from_mib(1024),
                deflate_on_oom: true,
                free_page_reporting: true,
                place: Place {
                    segment: 1,
                    device: Some(7)
                },
            })
        );
        let plain = BalloonConfig::parse("free_page_reporting=on").unwrap();
        let valid = plain.validate(1, &mut IdAllocator::default()).unwrap();
        assert_eq!(
            (valid.id.as_str(), valid.size),
            ("_balloon", ByteSize::ZERO)
        );
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        let mut ids = IdAllocator::default();
        let balloon = BalloonConfig::parse("size=1").unwrap();
        let error = balloon.validate(1, &mut ids).unwrap_err();
        assert!(error.to_string().contains("size=1 is not a multiple of 4K"));
        let balloon = BalloonConfig::parse("size=1G").unwrap();
        let error = balloon.check_ram(ByteSize::from_mib(1024)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--balloon size=1G leaves nothing of the guest's 1G of RAM; give less"
        );
        assert_eq!(balloon.check_ram(ByteSize::from_mib(1025)), Ok(()));
        let balloon = BalloonConfig::parse("size=0,pci_device_id=0").unwrap();
        assert!(balloon.validate(1, &mut ids).is_err());
        let error = BalloonConfig::parse("size=0,iommu=on").unwrap_err();
        assert_eq!(
            error.to_string(),
            "not supported by daxhund: --balloon iommu"
        );
        let error = from_json::<BalloonConfig>(b"{}").unwrap_err();
        assert!(error.to_string().contains("missing field `size`"));
    }
}
