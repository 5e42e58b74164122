//! `--memory-zone`: one piece of guest RAM and what backs it.
//!
//! Zones are placed in the guest in the order they are given.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::json::{JsonObject, NotBuilt, Shape};
use super::removal::{OnLoss, OnRemoval, RemovalTimeout};
use super::schema::as_sent;
use super::{ByteSize, Extent, Key, Word, WordError};

/// One piece of guest RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct MemoryZoneConfig {
    /// Name of the zone, unique in the guest.
    pub id: String,
    /// Size in bytes; absent means from `offset` to the end of `file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// The memory: a device-dax device or a file on fs-dax. Absent means the host's own memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Where in `file` the zone begins, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<ByteSize>,
    /// The pool of the host that gives the memory, instead of `file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Whether the host may merge equal pages; only off is supported.
    #[serde(default)]
    pub mergeable: bool,
    /// Whether another process can map the zone. Kept as given: device-dax is always shared, so
    /// only an explicit off contradicts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<bool>,
    /// Whether the zone comes from the host's reserved huge pages (hugetlb).
    #[serde(default)]
    pub hugepages: bool,
    /// Which of the host's huge pages; the host's default size when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<ByteSize>,
    /// The host NUMA node to take the memory from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// Whether every page is faulted in before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// Whether passed-through devices can reach the zone; absent is yes, unless it can't or shouldn't be pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dma: Option<bool>,
    /// What a request of the host for the memory does; absent is `refuse`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_removal: Option<OnRemoval>,
    /// How long the guest has then, in seconds; absent is 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removal_timeout: Option<RemovalTimeout>,
    /// What becomes of the guest when the memory is gone; absent is `stop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_loss: Option<OnLoss>,
}

/// A zone that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ZoneError {
    /// The name is the empty text.
    #[error("--memory-zone number {number} has an empty id; give it a name with id=NAME")]
    EmptyId {
        /// Which zone, counted from 1.
        number: usize,
    },
    /// Two zones have one name.
    #[error("--memory-zone id={id} is used for two zones; give each zone an id of its own")]
    DuplicateId {
        /// The name.
        id: String,
    },
    /// No size and nothing to take it from.
    #[error("--memory-zone id={id} has neither size= nor file=; say how big it is with size=SIZE")]
    NoSize {
        /// The zone.
        id: String,
    },
    /// `size=0`.
    #[error("--memory-zone id={id},size=0: a zone cannot be empty; give it a size or remove it")]
    ZeroSize {
        /// The zone.
        id: String,
    },
    /// The path is the empty text.
    #[error("--memory-zone id={id} names an empty file; give file=PATH or leave it out")]
    EmptyFile {
        /// The zone.
        id: String,
    },
    /// An offset into nothing.
    #[error(
        "--memory-zone id={id},offset={offset} has no file=; an offset is a place in a file: add file=PATH or remove offset"
    )]
    OffsetWithoutFile {
        /// The zone.
        id: String,
        /// The offset given.
        offset: ByteSize,
    },
    /// Huge pages of the host and a file at once.
    #[error(
        "--memory-zone id={id} has both hugepages=on and file={}: hugepages takes the host's own \
         memory; remove one of the two",
        file.display()
    )]
    HugePagesWithFile {
        /// The zone.
        id: String,
        /// The file given.
        file: PathBuf,
    },
    /// A key that says of the memory what its pool says.
    #[error(
        "--memory-zone id={id}: {key} beside pool={pool}: the pool chooses the memory, which is device-dax and shared; remove \
         one of the two"
    )]
    BesidePool {
        /// The zone.
        id: String,
        /// The pool given.
        pool: String,
        /// The key.
        key: &'static str,
    },
    /// RAM can't be ejected.
    #[error(
        "--memory-zone id={id}: on_removal=eject: a guest can't give RAM up that it was started with; \
         use refuse or stop"
    )]
    NoEject {
        /// The zone.
        id: String,
    },
    /// The end of the range does not fit 64 bits.
    #[error(
        "--memory-zone id={id}: offset={offset} plus size={size} exceeds 64 bits; give smaller ones"
    )]
    RangeOverflow {
        /// The zone.
        id: String,
        /// The offset given.
        offset: ByteSize,
        /// The size given.
        size: ByteSize,
    },
    /// Two zones take the same bytes of one file.
    #[error(
        "--memory-zone id={id} and id={other} overlap in {}: {id} has {}, {other} has {}; \
         give offset= and size= so that they do not",
        file.display(), range, other_range
    )]
    Overlap {
        /// The later zone.
        id: String,
        /// The zone before it.
        other: String,
        /// The file both name.
        file: PathBuf,
        /// What the later zone has of it.
        range: Extent,
        /// What the zone before it has.
        other_range: Extent,
    },
}

impl JsonObject for MemoryZoneConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::number("hotplug_size", 0),
            NotBuilt::number("hotplugged_size", 0),
            NotBuilt::switch("reserve", false),
            NotBuilt::presence("align"),
        ],
        ..Shape::WHOLE
    };
}

impl MemoryZoneConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--memory-zone",
        about: "A piece of RAM and what backs it; repeat for more, placed in this order",
        keys: &[
            Key::new(
                "id",
                "NAME",
                "its name, unique (required)",
                |zone, value| {
                    zone.id = value.text()?;
                    Ok(())
                },
            ),
            Key::new(
                "size",
                "SIZE",
                "how much [default: to the end of file]",
                |zone, value| {
                    zone.size = Some(value.size()?);
                    Ok(())
                },
            ),
            Key::new(
                "file",
                "PATH",
                "a device such as /dev/dax0.0 [default: host memory]",
                |zone, value| {
                    zone.file = Some(value.path()?);
                    Ok(())
                },
            ),
            Key::new(
                "offset",
                "SIZE",
                "where in file it begins [default: 0]",
                |zone, value| {
                    zone.offset = Some(value.size()?);
                    Ok(())
                },
            ),
            Key::new(
                "pool",
                "NAME",
                "the host's pool that gives it, instead of file",
                |zone, value| {
                    zone.pool = Some(value.text()?);
                    Ok(())
                },
            ),
            Key::new(
                "shared",
                "on|off",
                "other processes can map it [default: off; device-dax: always on]",
                |zone, value| {
                    zone.shared = Some(value.switch()?);
                    Ok(())
                },
            ),
            Key::new(
                "hugepages",
                "on|off",
                "from reserved huge pages [default: off]",
                |zone, value| {
                    zone.hugepages = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "hugepage_size",
                "2M|1G",
                "which of them [default: the host's]",
                |zone, value| {
                    zone.hugepage_size = Some(value.size()?);
                    Ok(())
                },
            ),
            Key::new(
                "host_numa_node",
                "N",
                "host node to take it from [default: any]",
                |zone, value| {
                    zone.host_numa_node = Some(value.integer()?);
                    Ok(())
                },
            ),
            Key::new(
                "prefault",
                "on|off",
                "fault all pages in first [default: off]",
                |zone, value| {
                    zone.prefault = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "dma",
                "on|off",
                "passed-through devices can reach it [default: on, but off for files]",
                |zone, value| {
                    zone.dma = Some(value.switch()?);
                    Ok(())
                },
            ),
            Key::new(
                "on_removal",
                "refuse|stop",
                "when the host wants it back [default: refuse]",
                |zone, value| {
                    zone.on_removal = Some(value.on_removal_of_ram()?);
                    Ok(())
                },
            ),
            Key::new(
                "removal_timeout",
                "SECONDS",
                "how long the guest has then [default: 10]",
                |zone, value| {
                    zone.removal_timeout = Some(value.removal_timeout()?);
                    Ok(())
                },
            ),
            Key::new(
                "on_loss",
                "stop|pause",
                "what becomes of the guest when it is gone [default: stop]",
                |zone, value| {
                    zone.on_loss = Some(value.on_loss()?);
                    Ok(())
                },
            ),
            Key::new("mergeable", "off", "accepted as off only", |zone, value| {
                zone.mergeable = value.switch()?;
                Ok(())
            }),
            Key::not_built("hotplug_size"),
            Key::not_built("hotplugged_size"),
            Key::not_built("reserve"),
            Key::not_built("align"),
        ],
    };

    /// Reads the value of one `--memory-zone`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut zone = Self::default();
        Self::WORD.fill(text, &mut zone)?;
        if zone.id.is_empty() {
            // The setter refuses an empty text, so the key was not there.
            return Err(WordError::MissingKey {
                flag: Self::WORD.flag,
                key: "id",
            });
        }
        Ok(zone)
    }

    /// The zone as errors name it.
    pub(super) fn flag(&self) -> String {
        format!("{} id={}", Self::WORD.flag, self.id)
    }

    /// Checks one zone by itself; `number` counts from 1.
    pub(super) fn check(&self, number: usize) -> Result<(), ZoneError> {
        if self.id.is_empty() {
            return Err(ZoneError::EmptyId { number });
        }
        let id = self.id.clone();
        if self.on_removal == Some(OnRemoval::Eject) {
            return Err(ZoneError::NoEject { id });
        }
        if self.size == Some(ByteSize::ZERO) {
            return Err(ZoneError::ZeroSize { id });
        }
        if let Some(pool) = self.pool.clone() {
            let said_twice = [
                ("file=", self.file.is_some()),
                ("offset=", self.offset.is_some()),
                ("shared=off", self.shared == Some(false)),
                ("hugepages=on", self.hugepages),
                ("hugepage_size=", self.hugepage_size.is_some()),
            ];
            if let Some((key, _)) = said_twice.into_iter().find(|(_, is_given)| *is_given) {
                return Err(ZoneError::BesidePool { id, pool, key });
            }
        }
        let Some(file) = &self.file else {
            return match (self.size, self.offset) {
                (_, Some(offset)) => Err(ZoneError::OffsetWithoutFile { id, offset }),
                (None, None) => Err(ZoneError::NoSize { id }),
                (Some(_), None) => Ok(()),
            };
        };
        if file.as_os_str().is_empty() {
            return Err(ZoneError::EmptyFile { id });
        }
        if self.hugepages {
            let file = file.clone();
            return Err(ZoneError::HugePagesWithFile { id, file });
        }
        let offset = self.offset.unwrap_or_default();
        match self.size {
            Some(size) if offset.bytes().checked_add(size.bytes()).is_none() => {
                Err(ZoneError::RangeOverflow { id, offset, size })
            }
            _ => Ok(()),
        }
    }

    /// Checks a zone, already sound by itself, against one that comes before it. Files are compared
    /// by path; two paths to one device are for the lock on the device to tell.
    pub(super) fn check_against(&self, earlier: &Self) -> Result<(), ZoneError> {
        if self.id == earlier.id {
            return Err(ZoneError::DuplicateId {
                id: self.id.clone(),
            });
        }
        let (Some(file), Some(other_file)) = (&self.file, &earlier.file) else {
            return Ok(());
        };
        let (range, other_range) = (self.extent(), earlier.extent());
        if file != other_file || !range.overlaps(other_range) {
            return Ok(());
        }
        Err(ZoneError::Overlap {
            id: self.id.clone(),
            other: earlier.id.clone(),
            file: file.clone(),
            range,
            other_range,
        })
    }

    fn extent(&self) -> Extent {
        Extent {
            offset: self.offset.unwrap_or_default(),
            size: self.size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(text: &str) -> MemoryZoneConfig {
        MemoryZoneConfig::parse(text).unwrap()
    }

    #[test]
    fn every_key_is_stored() {
        let parsed = zone(
            "id=z0,size=1G,file=/dev/dax0.0,offset=512M,shared=on,hugepages=off,\
             hugepage_size=2M,host_numa_node=1,prefault=on,mergeable=off,dma=off,on_removal=stop,removal_timeout=30,on_loss=pause",
        );
        let expected = MemoryZoneConfig {
            id: "z0".into(),
            size: Some(ByteSize::from_mib(1024)),
            file: Some("/dev/dax0.0".into()),
            offset: Some(ByteSize::from_mib(512)),
            pool: None,
            mergeable: false,
            shared: Some(true),
            hugepages: false,
            hugepage_size: Some(ByteSize::from_mib(2)),
            host_numa_node: Some(1),
            prefault: true,
            dma: Some(false),
            on_removal: Some(OnRemoval::Stop),
            removal_timeout: Some(30.try_into().unwrap()),
            on_loss: Some(OnLoss::Pause),
        };
        assert_eq!(parsed, expected);
        let json = serde_json::to_string(&parsed).unwrap();
        assert_eq!(
            serde_json::from_str::<MemoryZoneConfig>(&json).unwrap(),
            parsed
        );
    }

    #[test]
    fn the_id_is_required_and_keys_not_built_are_named() {
        let error = MemoryZoneConfig::parse("size=1G").unwrap_err();
        assert_eq!(
            error,
            WordError::MissingKey {
                flag: "--memory-zone",
                key: "id"
            }
        );
        assert!(error.to_string().contains("add id=VALUE"));
        for key in ["align", "hotplug_size", "hotplugged_size", "reserve"] {
            let error = MemoryZoneConfig::parse(&format!("id=a,{key}=x")).unwrap_err();
            let words = format!("not supported by daxhund: --memory-zone {key}");
            assert_eq!(error.to_string(), words);
        }
    }

    #[test]
    fn a_zone_must_make_sense_by_itself() {
        for text in [
            "id=a,size=1G",
            "id=a,file=/dev/dax0.0",
            "id=a,file=/d,offset=2M,size=2M",
            "id=a,pool=p,size=2M,shared=on,host_numa_node=1,prefault=on",
        ] {
            assert_eq!(zone(text).check(1), Ok(()), "{text}");
        }
        for (text, words) in [
            ("id=a", "neither size= nor file="),
            ("id=a,size=0", "cannot be empty"),
            ("id=a,size=0,file=/d", "cannot be empty"),
            ("id=a,size=1G,offset=0", "add file=PATH or remove offset"),
            (
                "id=a,size=1G,file=/d,hugepages=on",
                "both hugepages=on and file=/d",
            ),
            ("id=a,pool=p", "neither size= nor file="),
            ("id=a,size=1G,pool=p,file=/d", "file= beside pool=p"),
            ("id=a,size=1G,pool=p,offset=0", "offset= beside pool=p"),
            ("id=a,size=1G,pool=p,shared=off", "shared=off beside pool=p"),
            (
                "id=a,size=1G,pool=p,hugepages=on",
                "hugepages=on beside pool=p",
            ),
            (
                "id=a,size=1G,pool=p,hugepage_size=2M",
                "hugepage_size= beside pool=p",
            ),
            (
                "id=a,size=4K,file=/d,offset=18446744073709551615",
                "exceeds 64 bits",
            ),
        ] {
            let error = zone(text).check(1).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
            assert!(error.to_string().contains("id=a"), "{text}: {error}");
        }
        let unnamed = MemoryZoneConfig::default().check(3).unwrap_err();
        assert_eq!(unnamed, ZoneError::EmptyId { number: 3 });
        assert!(unnamed.to_string().contains("number 3 has an empty id"));
        let mut empty = zone("id=a,size=1G");
        empty.file = Some(PathBuf::new());
        let error = empty.check(1).unwrap_err();
        assert!(error.to_string().contains("empty file"), "{error}");
    }

    #[test]
    fn zones_have_names_and_bytes_of_their_own() {
        let first = zone("id=a,file=/dev/dax0.0,offset=1G,size=1G");
        for text in [
            "id=b,size=1G",
            "id=b,file=/dev/dax0.0,size=1G",
            "id=b,file=/dev/dax0.0,offset=2G",
            "id=b,file=/dev/dax1.0,offset=1G",
        ] {
            assert_eq!(zone(text).check_against(&first), Ok(()), "{text}");
        }
        for text in [
            "id=b,file=/dev/dax0.0",
            "id=b,file=/dev/dax0.0,offset=1536M",
            "id=b,file=/dev/dax0.0,size=1025M",
            "id=b,file=/dev/dax0.0,offset=1G,size=2M",
        ] {
            let error = zone(text).check_against(&first).unwrap_err();
            assert!(
                matches!(&error, ZoneError::Overlap { id, other, .. } if id == "b" && other == "a")
            );
            assert!(
                error.to_string().contains("overlap in /dev/dax0.0"),
                "{error}"
            );
            assert!(
                error.to_string().contains("a has 1G from offset 1G"),
                "{error}"
            );
        }
        let error = zone("id=a,size=1G").check_against(&first).unwrap_err();
        assert_eq!(error, ZoneError::DuplicateId { id: "a".into() });
        assert!(error.to_string().contains("an id of its own"));
    }
}
