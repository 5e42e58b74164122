//! `--platform`: what is about the machine as a whole.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::device::MAX_PCI_SEGMENTS;
use super::json::{JsonObject, NotBuilt, Shape};
use super::schema::{as_sent, never};
use super::{Key, Word, WordError, is_on, on};

/// The machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct PlatformConfig {
    /// How many PCI segments there are.
    #[serde(default = "one")]
    pub num_pci_segments: u16,
    /// Whether passed-through devices reach memory by iommufd (`true`) or by a VFIO container (`false`); absent is the
    /// machine's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iommufd: Option<bool>,
    /// Whether passed-through devices reach each other's registers, where the host can.
    #[serde(default = "on", skip_serializing_if = "is_on")]
    #[schemars(skip_serializing_if = "never")]
    pub vfio_p2p_dma: bool,
}

fn one() -> u16 {
    1
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            num_pci_segments: 1,
            iommufd: None,
            vfio_p2p_dma: true,
        }
    }
}

/// A machine that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlatformError {
    /// No PCI segment, or too many.
    #[error("--platform num_pci_segments={segments} is out of range: give 1 to {MAX_PCI_SEGMENTS}")]
    Segments {
        /// The number asked for.
        segments: u16,
    },
}

impl JsonObject for PlatformConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::empty("iommu_segments"),
            NotBuilt::number("iommu_address_width_bits", 64),
            NotBuilt::empty("system_serial_number"),
            NotBuilt::empty("serial_number"),
            NotBuilt::empty("system_uuid"),
            NotBuilt::empty("uuid"),
            NotBuilt::empty("oem_strings"),
            NotBuilt::empty("system_manufacturer"),
            NotBuilt::empty("system_product_name"),
            NotBuilt::empty("system_version"),
            NotBuilt::empty("system_family"),
            NotBuilt::empty("system_sku_number"),
            NotBuilt::empty("chassis_asset_tag"),
            NotBuilt::switch("tdx", false),
            NotBuilt::switch("sev_snp", false),
            NotBuilt::presence("iommufd_fd"),
        ],
        ..Shape::WHOLE
    };
}

impl PlatformConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--platform",
        about: "The machine as a whole",
        keys: &[
            Key::new(
                "num_pci_segments",
                "N",
                "PCI segments, 1 to 16 [default: 1]",
                |platform, value| {
                    platform.num_pci_segments = value.integer()?;
                    Ok(())
                },
            ),
            Key::new(
                "iommufd",
                "on|off",
                "devices reach memory by iommufd, or by a VFIO container [default: iommufd where the host has it, but not for device-dax memory whose removal nobody holds]",
                |platform, value| {
                    platform.iommufd = Some(value.switch()?);
                    Ok(())
                },
            ),
            Key::new(
                "vfio_p2p_dma",
                "on|off",
                "devices reach each other's registers [default: on]",
                |platform, value| {
                    platform.vfio_p2p_dma = value.switch()?;
                    Ok(())
                },
            ),
            Key::not_built("iommu_segments"),
            Key::not_built("iommu_address_width"),
            Key::not_built("serial_number"),
            Key::not_built("uuid"),
            Key::not_built("oem_strings"),
            Key::not_built("system_serial_number"),
            Key::not_built("system_uuid"),
            Key::not_built("system_manufacturer"),
            Key::not_built("system_product_name"),
            Key::not_built("system_version"),
            Key::not_built("system_family"),
            Key::not_built("system_sku_number"),
            Key::not_built("chassis_asset_tag"),
            Key::not_built("tdx"),
            Key::not_built("sev_snp"),
            Key::not_built("iommufd_fd"),
        ],
    };

    /// Reads the value of `--platform`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut platform = Self::default();
        Self::WORD.fill(text, &mut platform)?;
        Ok(platform)
    }

    pub(super) fn check(&self) -> Result<(), PlatformError> {
        let segments = self.num_pci_segments;
        if (1..=MAX_PCI_SEGMENTS).contains(&segments) {
            return Ok(());
        }
        Err(PlatformError::Segments { segments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

    #[test]
    fn segments_are_one_to_sixteen() {
        for (text, good) in [("0", false), ("1", true), ("16", true), ("17", false)] {
            let platform = PlatformConfig::parse(&format!("num_pci_segments={text}")).unwrap();
            let outcome = platform.check();
            assert_eq!(outcome.is_ok(), good, "{text}");
            if let Err(error) = outcome {
                assert!(error.to_string().contains("give 1 to 16"), "{error}");
            }
        }
        assert_eq!(PlatformConfig::default().check(), Ok(()));
    }

    #[test]
    fn what_is_not_built_is_taken_at_its_default_and_named_otherwise() {
        let json = br#"{"num_pci_segments":2,"iommu_segments":null,"iommu_address_width_bits":64,
            "serial_number":"","uuid":null,"oem_strings":[],"tdx":false,"sev_snp":false,
            "iommufd":false,"vfio_p2p_dma":true}"#;
        let platform: PlatformConfig = from_json(json).unwrap();
        assert_eq!(platform.num_pci_segments, 2);
        let error = from_json::<PlatformConfig>(br#"{"uuid":"x"}"#).unwrap_err();
        assert_eq!(error.to_string(), "not supported by daxhund: uuid");
        let error = PlatformConfig::parse("oem_strings=[a]").unwrap_err();
        assert_eq!(
            error.to_string(),
            "not supported by daxhund: --platform oem_strings"
        );
    }
}
