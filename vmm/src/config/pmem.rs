//! `--pmem`: persistent memory of the guest and the file or device that is it.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::device::{
    IdAllocator, IdError, Naming, OnPci, PciFields, Place, PlaceError, id_key, number_key,
    segment_key,
};
use super::json::{JsonObject, NotBuilt, Shape};
use super::removal::{OnRemoval, RemovalTimeout};
use super::schema::as_sent;
use super::{ByteSize, Key, PAGE_SIZE, Word, WordError};

/// One virtio-pmem device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub struct PmemConfig {
    /// What the bytes are: a device-dax device or a file. Empty for memory of a pool, or that a backend lends.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub file: PathBuf,
    /// Where a vhost-user backend listens that lends the memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The pool of the host that gives the memory, instead of `file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Size in bytes; absent means from `offset` to the end of `file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// Where in `file` the memory begins, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<ByteSize>,
    /// Whether what the guest writes is its own and forgotten in the end.
    #[serde(default)]
    pub discard_writes: bool,
    /// Whether passed-through devices can reach the memory; absent is yes, unless it can't or shouldn't be pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dma: Option<bool>,
    /// What a request of the host for the memory does; absent is `eject`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_removal: Option<OnRemoval>,
    /// How long the guest has then, in seconds; absent is 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removal_timeout: Option<RemovalTimeout>,
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

/// What persistent memory is on the host, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PmemSource {
    /// A device-dax device or a file.
    File {
        /// Which.
        file: PathBuf,
        /// Size in bytes, whole pages; `None` is up to the end.
        size: Option<ByteSize>,
        /// Where it begins in `file`, whole pages.
        offset: ByteSize,
        /// Whether what the guest writes is its own and forgotten in the end.
        discard_writes: bool,
    },
    /// A range of some device of a pool of the host.
    Pool {
        /// The pool's name.
        pool: String,
        /// Size in bytes, whole pages.
        size: ByteSize,
    },
    /// What a vhost-user backend lends.
    Lent {
        /// Where it listens.
        socket: PathBuf,
    },
}

/// A virtio-pmem device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidPmem {
    /// Its name.
    pub id: String,
    /// What the bytes are.
    pub source: PmemSource,
    /// Whether passed-through devices can reach the memory; `None` is yes, unless it can't or shouldn't be pinned.
    pub dma: Option<bool>,
    /// Where it sits.
    pub place: Place,
}

/// Persistent memory that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PmemError {
    /// The path is the empty text.
    #[error(
        "--pmem has no file: give file=PATH, a device such as /dev/dax1.0 or a file, pool=NAME for memory of a pool of the host, \
         or socket=PATH for memory that a vhost-user backend lends"
    )]
    EmptyFile,
    /// A key that says something of a file.
    #[error(
        "{device}: {key}= says nothing of memory that a backend lends (socket=): leave it out, or give it to the backend"
    )]
    OfTheBackend {
        /// The device.
        device: String,
        /// The key.
        key: &'static str,
    },
    /// A key that says of the memory what its pool says.
    #[error(
        "{device}: {key} beside pool={pool}: the pool chooses the memory, which is device-dax and shared; remove one of the two"
    )]
    BesidePool {
        /// The device.
        device: String,
        /// The pool given.
        pool: String,
        /// The key.
        key: &'static str,
    },
    /// A part of a pool without a size.
    #[error("{device}: pool={pool} without size=: say how much of the pool it gets with size=SIZE")]
    NoSize {
        /// The device.
        device: String,
        /// The pool given.
        pool: String,
    },
    /// `size=0`.
    #[error("{device}: size=0: it cannot be empty; give a size, or leave it out for all of file")]
    ZeroSize {
        /// The device.
        device: String,
    },
    /// Not whole pages.
    #[error("{device}: {key}={size} is not a multiple of 4K; use a multiple of 4K")]
    NotPages {
        /// The device.
        device: String,
        /// The key.
        key: &'static str,
        /// The size given.
        size: ByteSize,
    },
    /// Nothing has to stop for it.
    #[error(
        "{device}: on_removal=stop: the guest goes on without persistent memory; use eject or refuse"
    )]
    NoStop {
        /// The device.
        device: String,
    },
    /// The end of the range does not fit 64 bits.
    #[error("{device}: offset={offset} plus size={size} exceeds 64 bits; give smaller ones")]
    RangeOverflow {
        /// The device.
        device: String,
        /// The offset given.
        offset: ByteSize,
        /// The size given.
        size: ByteSize,
    },
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl JsonObject for PmemConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::switch("iommu", false),
            NotBuilt::presence("align"),
            NotBuilt::presence("on_loss"),
        ],
        ..Shape::WHOLE
    };
}

impl OnPci for PmemConfig {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl PmemConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--pmem",
        about: "Persistent memory of the guest; repeat for more",
        keys: &[
            Key::new(
                "file",
                "PATH",
                "a device such as /dev/dax1.0, or a file (required, unless pool= or socket= is given)",
                |pmem, value| {
                    pmem.file = value.path()?;
                    Ok(())
                },
            ),
            Key::new(
                "socket",
                "PATH",
                "where a vhost-user backend listens that lends the memory, instead of file",
                |pmem, value| {
                    pmem.socket = Some(value.path()?);
                    Ok(())
                },
            ),
            Key::new(
                "pool",
                "NAME",
                "the host's pool that gives the memory, with what it holds, instead of file",
                |pmem, value| {
                    pmem.pool = Some(value.text()?);
                    Ok(())
                },
            ),
            Key::new(
                "size",
                "SIZE",
                "how much [default: to the end of file]",
                |pmem, value| {
                    pmem.size = Some(value.size()?);
                    Ok(())
                },
            ),
            Key::new(
                "offset",
                "SIZE",
                "where in file it begins [default: 0]",
                |pmem, value| {
                    pmem.offset = Some(value.size()?);
                    Ok(())
                },
            ),
            Key::new(
                "discard_writes",
                "on|off",
                "writes are the guest's own and forgotten [default: off]",
                |pmem, value| {
                    pmem.discard_writes = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "dma",
                "on|off",
                "passed-through devices can reach it [default: on, but off for files]",
                |pmem, value| {
                    pmem.dma = Some(value.switch()?);
                    Ok(())
                },
            ),
            Key::new(
                "on_removal",
                "eject|refuse",
                "when the host wants it back [default: eject]",
                |pmem, value| {
                    pmem.on_removal = Some(value.on_removal_of_pmem()?);
                    Ok(())
                },
            ),
            Key::new(
                "removal_timeout",
                "SECONDS",
                "how long the guest has then [default: 10]",
                |pmem, value| {
                    pmem.removal_timeout = Some(value.removal_timeout()?);
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
            Key::not_built("align"),
            Key::not_built("on_loss"),
        ],
    };

    const NAMING: Naming = Naming::Numbered("_pmem");

    /// Persistent memory that is all of `file`.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self {
            file: file.into(),
            socket: None,
            pool: None,
            size: None,
            offset: None,
            discard_writes: false,
            dma: None,
            on_removal: None,
            removal_timeout: None,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }

    /// Reads the value of one `--pmem`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut pmem = Self::new("");
        Self::WORD.fill(text, &mut pmem)?;
        if is_empty(&pmem.file) && pmem.socket.is_none() && pmem.pool.is_none() {
            // The setter refuses an empty path, so the key was not there.
            return Err(WordError::MissingKey {
                flag: Self::WORD.flag,
                key: "file",
            });
        }
        Ok(pmem)
    }

    /// The device as errors name it.
    fn label(&self) -> String {
        let what = match (&self.id, &self.socket, &self.pool) {
            (Some(id), _, _) => format!("id={id}"),
            (None, Some(socket), _) => format!("socket={}", socket.display()),
            (None, None, Some(pool)) => format!("pool={pool}"),
            (None, None, None) => format!("file={}", self.file.display()),
        };
        format!("{} {what}", Self::WORD.flag)
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(&self, segments: u16, ids: &mut IdAllocator) -> Result<ValidPmem, PmemError> {
        let device = self.label();
        if self.on_removal == Some(OnRemoval::Stop) {
            return Err(PmemError::NoStop { device });
        }
        let source = self.source(&device)?;
        let place = Place::check(&device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(ValidPmem {
            id: ids.take(&device, self.id.as_deref(), Self::NAMING)?,
            source,
            dma: self.dma,
            place,
        })
    }

    fn source(&self, device: &str) -> Result<PmemSource, PmemError> {
        let device = || device.to_owned();
        if let Some(socket) = self.socket.clone() {
            let of_a_file = [
                ("file", !is_empty(&self.file)),
                ("pool", self.pool.is_some()),
                ("size", self.size.is_some()),
                ("offset", self.offset.is_some()),
                ("discard_writes", self.discard_writes),
            ];
            if let Some((key, _)) = of_a_file.into_iter().find(|(_, is_given)| *is_given) {
                let device = device();
                return Err(PmemError::OfTheBackend { device, key });
            }
            return Ok(PmemSource::Lent { socket });
        }
        if let Some(pool) = self.pool.clone() {
            let said_twice = [
                ("file=", !is_empty(&self.file)),
                ("offset=", self.offset.is_some()),
                ("discard_writes=on", self.discard_writes),
            ];
            if let Some((key, _)) = said_twice.into_iter().find(|(_, is_given)| *is_given) {
                let device = device();
                return Err(PmemError::BesidePool { device, pool, key });
            }
        } else if is_empty(&self.file) {
            return Err(PmemError::EmptyFile);
        }
        if self.size == Some(ByteSize::ZERO) {
            return Err(PmemError::ZeroSize { device: device() });
        }
        let offset = self.offset.unwrap_or_default();
        for (key, size) in [("size", self.size.unwrap_or_default()), ("offset", offset)] {
            if !size.bytes().is_multiple_of(PAGE_SIZE) {
                let device = device();
                return Err(PmemError::NotPages { device, key, size });
            }
        }
        if let Some(size) = self.size
            && offset.bytes().checked_add(size.bytes()).is_none()
        {
            return Err(PmemError::RangeOverflow {
                device: device(),
                offset,
                size,
            });
        }
        if let Some(pool) = self.pool.clone() {
            let device = device();
            return match self.size {
                Some(size) => Ok(PmemSource::Pool { pool, size }),
                None => Err(PmemError::NoSize { device, pool }),
            };
        }
        Ok(PmemSource::File {
            file: self.file.clone(),
            size: self.size,
            offset,
            discard_writes: self.discard_writes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_json;

    fn validate(text: &str) -> Result<ValidPmem, PmemError> {
        PmemConfig::parse(text)
            .unwrap()
            .validate(2, &mut IdAllocator::default())
    }

    #[test]
    fn every_key_is_stored_and_reaches_the_checked_form() {
        let text = "file=/dev/dax1.0,size=1G,offset=512M,discard_writes=on,dma=off,id=p,\
                    pci_segment=1,pci_device_id=7";
        let json = r#"{"file":"/dev/dax1.0","size":1073741824,"offset":536870912,
            "discard_writes":true,"dma":false,"id":"p","pci_segment":1,"pci_device_id":7,
            "iommu":false}"#;
        assert_eq!(
            PmemConfig::parse(text).unwrap(),
            from_json::<PmemConfig>(json.as_bytes()).unwrap()
        );
        assert_eq!(
            validate(text),
            Ok(ValidPmem {
                id: "p".into(),
                source: PmemSource::File {
                    file: "/dev/dax1.0".into(),
                    size: Some(ByteSize::from_mib(1024)),
                    offset: ByteSize::from_mib(512),
                    discard_writes: true,
                },
                dma: Some(false),
                place: Place {
                    segment: 1,
                    device: Some(7)
                },
            })
        );
        let plain = validate("file=/f").unwrap();
        let source = PmemSource::File {
            file: "/f".into(),
            size: None,
            offset: ByteSize::ZERO,
            discard_writes: false,
        };
        assert_eq!((plain.id.as_str(), plain.source), ("_pmem0", source));
        assert!(plain.dma.is_none());
        let json = serde_json::to_string(&PmemConfig::new("/f")).unwrap();
        assert_eq!(
            json,
            r#"{"file":"/f","discard_writes":false,"pci_segment":0}"#
        );
    }

    #[test]
    fn a_file_is_required_and_keys_not_built_are_named() {
        let error = PmemConfig::parse("size=1G").unwrap_err();
        assert!(error.to_string().contains("add file=VALUE"), "{error}");
        for key in ["iommu", "align", "on_loss"] {
            let words = format!("not supported by daxhund: --pmem {key}");
            let error = PmemConfig::parse(&format!("file=/f,{key}=on")).unwrap_err();
            assert_eq!(error.to_string(), words);
            let json = format!(r#"{{"file":"/f","{key}":"on"}}"#);
            let error = from_json::<PmemConfig>(json.as_bytes()).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("not supported by daxhund: {key}")
            );
        }
        let nothing: PmemConfig = from_json(b"{}").unwrap();
        let error = nothing.validate(1, &mut IdAllocator::default());
        assert_eq!(error, Err(PmemError::EmptyFile));
    }

    #[test]
    fn memory_can_be_lent_by_a_backend_and_is_the_backends_to_cut() {
        let text = "socket=/run/pmem.sock,id=p,dma=off";
        let json = r#"{"socket":"/run/pmem.sock","dma":false,"id":"p"}"#;
        let config = PmemConfig::parse(text).unwrap();
        assert_eq!(config, from_json::<PmemConfig>(json.as_bytes()).unwrap());
        let socket = "/run/pmem.sock".into();
        assert_eq!(validate(text).unwrap().source, PmemSource::Lent { socket });
        assert!(!serde_json::to_string(&config).unwrap().contains("file"));
        for key in ["file=/f", "size=1G", "offset=1G", "discard_writes=on"] {
            let error = validate(&format!("socket=/s,{key}")).unwrap_err();
            let (name, _) = key.split_once('=').unwrap();
            let expected = format!("--pmem socket=/s: {name}= says nothing");
            assert!(error.to_string().contains(&expected), "{error}");
        }
    }

    #[test]
    fn memory_can_come_from_a_pool_which_chooses_it() {
        let config = PmemConfig::parse("pool=cxl,size=1G").unwrap();
        let json = br#"{"pool":"cxl","size":1073741824}"#;
        assert_eq!(config, from_json::<PmemConfig>(json).unwrap());
        let (pool, size) = ("cxl".to_owned(), ByteSize::from_mib(1024));
        let valid = validate("pool=cxl,size=1G,id=p").unwrap();
        assert_eq!(valid.source, PmemSource::Pool { pool, size });
        for (text, words) in [
            ("pool=cxl", "--pmem pool=cxl: pool=cxl without size="),
            ("pool=cxl,size=1G,file=/f", "file= beside pool=cxl"),
            ("pool=cxl,size=1G,offset=0", "offset= beside pool=cxl"),
            (
                "pool=cxl,size=1G,discard_writes=on",
                "discard_writes=on beside pool=cxl",
            ),
            ("pool=cxl,size=0", "size=0: it cannot be empty"),
            ("pool=cxl,size=1", "size=1 is not a multiple of 4K"),
            ("pool=cxl,socket=/s", "pool= says nothing of memory that"),
        ] {
            let error = validate(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        for (text, words) in [
            (
                "file=/f,size=0",
                "--pmem file=/f: size=0: it cannot be empty",
            ),
            ("file=/f,size=4097", "size=4097 is not a multiple of 4K"),
            ("file=/f,offset=1", "offset=1 is not a multiple of 4K"),
            (
                "file=/f,size=8K,offset=18446744073709547520",
                "exceeds 64 bits",
            ),
            ("file=/f,id=a,pci_segment=2", "--pmem id=a: pci_segment=2"),
            ("file=/f,pci_device_id=0", "is the host bridge's"),
            ("file=/f,id=__a", "two underscores"),
        ] {
            let error = validate(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
        let error = PmemConfig::new("").validate(1, &mut IdAllocator::default());
        assert_eq!(error, Err(PmemError::EmptyFile));
    }

    #[test]
    fn a_refused_device_takes_no_id() {
        let mut ids = IdAllocator::default();
        let pmem = PmemConfig::parse("file=/f,id=a,pci_device_id=0").unwrap();
        assert!(pmem.validate(1, &mut ids).is_err());
        assert!(!ids.is_taken("a"));
    }
}
