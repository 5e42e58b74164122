//! `--memory`: guest RAM that the host's own memory backs, and the settings all RAM shares.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::json::{JsonObject, NotBuilt, Shape};
use super::schema::as_sent;
use super::{ByteSize, HugePageSize, Key, MemoryZoneConfig, PAGE_SIZE, Word, WordError, on};

/// Guest RAM when nobody says how much.
pub const DEFAULT_MEMORY_SIZE: ByteSize = ByteSize::from_mib(512);

/// Guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an independent switch of the command line and of the JSON schema"
)]
#[schemars(transform = as_sent::<Self>)]
pub struct MemoryConfig {
    /// RAM of the host's own memory; zero when zones describe all of it.
    pub size: ByteSize,
    /// How RAM would grow; kept for the orchestrators that always send it.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// How much RAM could grow; kept for the orchestrators that always send it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<ByteSize>,
    /// Whether the host may merge equal pages; only off is supported.
    #[serde(default)]
    pub mergeable: bool,
    /// Whether another process can map the RAM (a memfd).
    #[serde(default)]
    pub shared: bool,
    /// Whether the RAM comes from the host's reserved huge pages (hugetlb).
    #[serde(default)]
    pub hugepages: bool,
    /// Which of the host's huge pages; the host's default size when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<ByteSize>,
    /// Whether every page is faulted in before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// Whether the host may back anonymous RAM with transparent huge pages.
    #[serde(default = "on")]
    pub thp: bool,
    /// User-defined zones (`--memory-zone`); empty when `size` says it all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<MemoryZoneConfig>,
}

impl JsonObject for MemoryConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::number("hotplugged_size", 0),
            NotBuilt::switch("reserve", false),
        ],
        nested: &[("zones", MemoryZoneConfig::SHAPE)],
        ..Shape::WHOLE
    };
}

/// How RAM would grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HotplugMethod {
    /// ACPI memory devices.
    #[default]
    Acpi,
    /// A virtio-mem device.
    VirtioMem,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: DEFAULT_MEMORY_SIZE,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            mergeable: false,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            thp: true,
            zones: Vec::new(),
        }
    }
}

/// Memory settings that no guest can have. `flag` tells `--memory` from a named `--memory-zone`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MemoryError {
    /// No RAM at all.
    #[error(
        "--memory size=0 and no --memory-zone: a guest needs RAM; give --memory size=512M or a zone"
    )]
    NoMemory,
    /// Both a size and zones.
    #[error(
        "--memory size={size} together with {zones} --memory-zone: zones describe all of the \
         RAM; leave --memory size= out, or give 0"
    )]
    SizeWithZones {
        /// The size given.
        size: ByteSize,
        /// How many zones there are.
        zones: usize,
    },
    /// A key of `--memory` that belongs on the zones.
    #[error(
        "--memory {key} has no effect on zones; move {key} to each --memory-zone that wants it"
    )]
    KeyWithZones {
        /// The key.
        key: &'static str,
    },
    /// A key that is built for one of its values only.
    #[error("not supported by daxhund: {flag} mergeable=on")]
    Mergeable {
        /// The word, with the zone's name.
        flag: String,
    },
    /// Not whole pages.
    #[error("{flag}: {key}={size} is not a multiple of {unit}; use a multiple of {unit}")]
    NotMultiple {
        /// The word, with the zone's name.
        flag: String,
        /// The key.
        key: &'static str,
        /// The size given.
        size: ByteSize,
        /// What it has to be a multiple of.
        unit: ByteSize,
    },
    /// A huge page size without huge pages.
    #[error("{flag}: hugepage_size={size} without hugepages=on; add hugepages=on or remove it")]
    HugePageSizeAlone {
        /// The word, with the zone's name.
        flag: String,
        /// The huge page size given.
        size: ByteSize,
    },
    /// Not a size x86-64 has huge pages of.
    #[error("{flag}: hugepage_size={size}, but huge pages are 2M or 1G; give one of these")]
    HugePageSize {
        /// The word, with the zone's name.
        flag: String,
        /// The huge page size given.
        size: ByteSize,
    },
    /// `hotplug_size=0`.
    #[error("--memory hotplug_size=0: leave hotplug_size out when RAM is not to grow")]
    ZeroHotplugSize,
}

impl MemoryConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--memory",
        about: "RAM of the host's own memory",
        keys: &[
            Key::new(
                "size",
                "SIZE",
                "how much [default: 512M; 0 beside zones]",
                |memory, value| {
                    memory.size = value.size()?;
                    Ok(())
                },
            ),
            Key::new(
                "shared",
                "on|off",
                "other processes can map it [default: off]",
                |memory, value| {
                    memory.shared = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "hugepages",
                "on|off",
                "from reserved huge pages [default: off]",
                |memory, value| {
                    memory.hugepages = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "hugepage_size",
                "2M|1G",
                "which of them [default: the host's]",
                |memory, value| {
                    memory.hugepage_size = Some(value.size()?);
                    Ok(())
                },
            ),
            Key::new(
                "prefault",
                "on|off",
                "fault all pages in first [default: off]",
                |memory, value| {
                    memory.prefault = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "thp",
                "on|off",
                "transparent huge pages [default: on]",
                |memory, value| {
                    memory.thp = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "mergeable",
                "off",
                "accepted as off only",
                |memory, value| {
                    memory.mergeable = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "hotplug_method",
                "acpi|virtio-mem",
                "kept; RAM does not grow yet [default: acpi]",
                |memory, value| {
                    memory.hotplug_method = value.hotplug_method()?;
                    Ok(())
                },
            ),
            Key::new(
                "hotplug_size",
                "SIZE",
                "kept; RAM does not grow yet",
                |memory, value| {
                    memory.hotplug_size = Some(value.size()?);
                    Ok(())
                },
            ),
            Key::not_built("hotplugged_size"),
            Key::not_built("reserve"),
        ],
    };

    /// Reads the value of `--memory` and those of every `--memory-zone`.
    pub fn parse<S: AsRef<str>>(memory: Option<&str>, zones: &[S]) -> Result<Self, WordError> {
        let mut config = Self::default();
        if !zones.is_empty() {
            config.size = ByteSize::ZERO;
        }
        if let Some(text) = memory {
            Self::WORD.fill(text, &mut config)?;
        }
        config.zones = zones
            .iter()
            .map(|text| MemoryZoneConfig::parse(text.as_ref()))
            .collect::<Result<_, _>>()?;
        Ok(config)
    }

    /// Checks what is not about a single zone.
    pub(super) fn check(&self) -> Result<(), MemoryError> {
        if self.mergeable {
            return Err(MemoryError::Mergeable {
                flag: Self::WORD.flag.to_owned(),
            });
        }
        if self.hotplug_size == Some(ByteSize::ZERO) {
            return Err(MemoryError::ZeroHotplugSize);
        }
        if self.zones.is_empty() {
            if self.size == ByteSize::ZERO {
                return Err(MemoryError::NoMemory);
            }
            return check_pages(Self::WORD.flag, "size", self.size);
        }
        if self.size != ByteSize::ZERO {
            return Err(MemoryError::SizeWithZones {
                size: self.size,
                zones: self.zones.len(),
            });
        }
        let misplaced = [
            ("shared", self.shared),
            ("hugepages", self.hugepages),
            ("hugepage_size", self.hugepage_size.is_some()),
            ("prefault", self.prefault),
        ];
        match misplaced.iter().find(|(_, given)| *given) {
            Some((key, _)) => Err(MemoryError::KeyWithZones { key }),
            None => Ok(()),
        }
    }
}

impl super::Value<'_> {
    fn hotplug_method(self) -> Result<HotplugMethod, super::keyvalue::Expected> {
        match self.text().as_deref() {
            Ok("acpi") => Ok(HotplugMethod::Acpi),
            Ok("virtio-mem") => Ok(HotplugMethod::VirtioMem),
            _ => Err(super::keyvalue::Expected("acpi or virtio-mem")),
        }
    }
}

/// Guest memory comes in whole pages.
pub(super) fn check_pages(
    flag: &str,
    key: &'static str,
    size: ByteSize,
) -> Result<(), MemoryError> {
    check_multiple(flag, key, size, ByteSize::from_bytes(PAGE_SIZE))
}

fn check_multiple(
    flag: &str,
    key: &'static str,
    size: ByteSize,
    unit: ByteSize,
) -> Result<(), MemoryError> {
    if size.bytes().is_multiple_of(unit.bytes()) {
        return Ok(());
    }
    Err(MemoryError::NotMultiple {
        flag: flag.to_owned(),
        key,
        size,
        unit,
    })
}

/// Which huge pages back `size` bytes of anonymous memory; `None` for base pages.
pub(super) fn huge_pages(
    flag: &str,
    size: ByteSize,
    hugepages: bool,
    hugepage_size: Option<ByteSize>,
) -> Result<Option<HugePageSize>, MemoryError> {
    let Some(wanted) = hugepage_size else {
        return Ok(hugepages.then_some(HugePageSize::HostDefault));
    };
    if !hugepages {
        return Err(MemoryError::HugePageSizeAlone {
            flag: flag.to_owned(),
            size: wanted,
        });
    }
    let page = [HugePageSize::TwoMiB, HugePageSize::OneGiB]
        .into_iter()
        .find(|page| page.bytes() == Some(wanted))
        .ok_or_else(|| MemoryError::HugePageSize {
            flag: flag.to_owned(),
            size: wanted,
        })?;
    check_multiple(flag, "size", size, wanted)?;
    Ok(Some(page))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

    const NONE: [&str; 0] = [];

    #[test]
    fn the_size_defaults_to_512m_and_to_zero_beside_zones() {
        assert_eq!(
            MemoryConfig::parse(None, &NONE),
            Ok(MemoryConfig::default())
        );
        let memory = MemoryConfig::parse(Some("shared=on"), &NONE).unwrap();
        assert_eq!((memory.size, memory.shared), (DEFAULT_MEMORY_SIZE, true));
        let memory = MemoryConfig::parse(Some("thp=off"), &["id=a,size=1G"]).unwrap();
        assert_eq!((memory.size, memory.zones.len()), (ByteSize::ZERO, 1));
        assert_eq!(memory.check(), Ok(()));
    }

    #[test]
    fn every_key_is_stored() {
        let memory = MemoryConfig::parse(
            Some(
                "size=4G,shared=on,hugepages=on,hugepage_size=1G,prefault=on,thp=off,\
                 mergeable=off,hotplug_method=virtio-mem,hotplug_size=8G",
            ),
            &NONE,
        )
        .unwrap();
        assert_eq!(
            memory,
            MemoryConfig {
                size: ByteSize::from_mib(4096),
                hotplug_method: HotplugMethod::VirtioMem,
                hotplug_size: Some(ByteSize::from_mib(8192)),
                mergeable: false,
                shared: true,
                hugepages: true,
                hugepage_size: Some(ByteSize::from_mib(1024)),
                prefault: true,
                thp: false,
                zones: Vec::new(),
            }
        );
        let json = serde_json::to_string(&memory).unwrap();
        assert!(json.contains(r#""hotplug_method":"VirtioMem""#), "{json}");
        assert_eq!(serde_json::from_str::<MemoryConfig>(&json).unwrap(), memory);
        let error = MemoryConfig::parse(Some("hotplug_method=dimm"), &NONE).unwrap_err();
        assert!(error.to_string().contains("acpi or virtio-mem"), "{error}");
    }

    #[test]
    fn contradictions_are_refused() {
        let zone = ["id=a,size=1G"];
        for (text, zones, words) in [
            ("size=0", &zone[..0], "a guest needs RAM"),
            ("size=4097", &zone[..0], "size=4097 is not a multiple of 4K"),
            ("size=1G", &zone[..], "zones describe all of the RAM"),
            ("shared=on", &zone[..], "move shared to each --memory-zone"),
            ("hugepages=on", &zone[..], "move hugepages to"),
            ("hugepage_size=2M", &zone[..], "move hugepage_size to"),
            ("prefault=on", &zone[..], "move prefault to"),
            (
                "mergeable=on",
                &zone[..0],
                "not supported by daxhund: --memory mergeable=on",
            ),
            ("hotplug_size=0", &zone[..0], "leave hotplug_size out"),
        ] {
            let error = MemoryConfig::parse(Some(text), zones)
                .unwrap()
                .check()
                .unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        for key in ["hotplugged_size", "reserve"] {
            let error = MemoryConfig::parse(Some(&format!("{key}=1")), &NONE).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("not supported by daxhund: --memory {key}")
            );
        }
    }

    #[test]
    fn huge_pages_are_2m_or_1g_and_divide_the_size() {
        let mib = ByteSize::from_mib;
        let pages = |size, on, huge| huge_pages("--memory", size, on, huge);
        assert_eq!(pages(mib(512), false, None), Ok(None));
        assert_eq!(
            pages(mib(512), true, None),
            Ok(Some(HugePageSize::HostDefault))
        );
        assert_eq!(
            pages(mib(512), true, Some(mib(2))),
            Ok(Some(HugePageSize::TwoMiB))
        );
        assert_eq!(
            pages(mib(1024), true, Some(mib(1024))),
            Ok(Some(HugePageSize::OneGiB))
        );

        let error = pages(mib(512), false, Some(mib(2))).unwrap_err();
        assert!(error.to_string().contains("add hugepages=on"), "{error}");
        let error = pages(mib(512), true, Some(mib(4))).unwrap_err();
        assert!(matches!(error, MemoryError::HugePageSize { size, .. } if size == mib(4)));
        assert!(error.to_string().contains("2M or 1G"), "{error}");
        let error = pages(mib(512), true, Some(mib(1024))).unwrap_err();
        assert!(matches!(error, MemoryError::NotMultiple { unit, .. } if unit == mib(1024)));
        assert!(
            error.to_string().contains("not a multiple of 1G"),
            "{error}"
        );
    }

    #[test]
    fn json_needs_a_size_takes_null_zones_and_refuses_unknown_fields() {
        let memory: MemoryConfig =
            from_json(br#"{"size":1073741824,"zones":null,"reserve":false}"#).unwrap();
        assert!(memory.thp && memory.zones.is_empty());
        for (json, words) in [
            ("{}", "missing field `size`"),
            (r#"{"size":1,"x":1}"#, "unknown field `x`"),
        ] {
            let error = from_json::<MemoryConfig>(json.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn what_orchestrators_always_send_is_kept() {
        let json = br#"{"size":0,"hotplug_size":1073741824,"hotplugged_size":0,"thp":true,
            "hotplug_method":"Acpi","mergeable":false,"reserve":false,"hugepages":false,
            "prefault":false,"shared":false,"zones":[{"id":"a","size":4096,"hotplug_size":0,
            "hotplugged_size":null,"reserve":false,"dma":true}]}"#;
        let memory: MemoryConfig = from_json(json).unwrap();
        assert_eq!(memory.hotplug_size, Some(ByteSize::from_mib(1024)));
        assert_eq!(memory.zones[0].id, "a");
        for (json, name) in [
            (r#"{"size":0,"reserve":true}"#, "reserve"),
            (r#"{"size":0,"hotplugged_size":1}"#, "hotplugged_size"),
            (
                r#"{"size":0,"zones":[{"id":"a"},{"id":"b","hotplug_size":1}]}"#,
                "zones[1].hotplug_size",
            ),
            (
                r#"{"size":0,"zones":[{"id":"a","align":4096}]}"#,
                "zones[0].align",
            ),
        ] {
            let error = from_json::<MemoryConfig>(json.as_bytes()).unwrap_err();
            let words = format!("not supported by daxhund: {name}");
            assert_eq!(error.to_string(), words);
        }
    }
}
