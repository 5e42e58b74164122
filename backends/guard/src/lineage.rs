//! A dax device and everything it stands on: the devices above it in sysfs, whose loss is its loss.
//!
//! For persistent memory that is the dax device of the nd bus, its region, its bus and the firmware's device; for CXL
//! memory also the decoders that the region is made of, their ports and the memory devices behind them, which are not
//! above it in the tree. Every name among them is a name by which somebody can mean the device.
//!
//! Reads only, and never a file that the guard watches.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

use crate::host::Host;

/// The name of a dax device, as in `dax1.0`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct DeviceName(String);

impl DeviceName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The number of its region: X in daxX.Y.
    fn region(&self) -> &str {
        let numbers = self.0.trim_start_matches("dax");
        numbers.split('.').next().unwrap_or_default()
    }
}

/// Not the name of a dax device.
#[derive(Debug, Error)]
#[error("{text:?} is not the name of a dax device: say it as in dax1.0 (`daxctl list` shows them)")]
pub(crate) struct BadName {
    text: String,
}

impl FromStr for DeviceName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let is_number = |text: &str| {
            (1..=9).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        let numbers = text.strip_prefix("dax").and_then(|it| it.split_once('.'));
        match numbers {
            Some((region, id)) if is_number(region) && is_number(id) => Ok(Self(text.to_owned())),
            _ => Err(BadName {
                text: text.chars().take(64).collect(),
            }),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a device's place in sysfs is not known.
#[derive(Debug, Error)]
pub(crate) enum LineageError {
    #[error("there is no device {device}: `daxctl list` shows those there are")]
    Missing { device: DeviceName },
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} says {text:?}, which is no device number", path.display())]
    Number { path: PathBuf, text: String },
}

/// A device and what it stands on, itself first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lineage {
    pub(crate) device: DeviceName,
    /// Major and minor of the character device.
    pub(crate) number: (u32, u32),
    pub(crate) parts: Vec<Part>,
    names: BTreeSet<String>,
}

/// One device of a lineage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Its directory, links resolved.
    pub(crate) dir: PathBuf,
    pub(crate) name: String,
    /// The directory of the driver bound to it.
    pub(crate) driver: Option<PathBuf>,
}

impl Lineage {
    pub(crate) fn read(host: &Host, device: &DeviceName) -> Result<Self, LineageError> {
        let link = host.sys().join("bus/dax/devices").join(device.as_str());
        let dir = fs::canonicalize(&link).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => LineageError::Missing {
                device: device.clone(),
            },
            _ => LineageError::Read { path: link, source },
        })?;
        let number = read_number(&dir.join("dev"))?;
        let mut dirs = Vec::new();
        climb(host, &dir, &mut dirs);
        for region in dirs.clone() {
            for limb in limbs(host, &region) {
                climb(host, &limb, &mut dirs);
            }
        }
        let mut names = BTreeSet::new();
        let mut parts = Vec::new();
        for dir in dirs {
            let Some(name) = dir.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            names.insert(name.to_owned());
            // What ndctl also takes for the device: its namespace, and the bus by its provider.
            for attribute in ["namespace", "provider"] {
                let text = fs::read_to_string(dir.join(attribute)).unwrap_or_default();
                if !text.trim().is_empty() {
                    names.insert(text.trim().to_owned());
                }
            }
            parts.push(Part {
                name: name.to_owned(),
                driver: fs::canonicalize(dir.join("driver")).ok(),
                dir,
            });
        }
        Ok(Self {
            device: device.clone(),
            number,
            parts,
            names,
        })
    }

    /// Whether the word, as people and tools say it, is the device or something that it stands on.
    pub(crate) fn answers_to(&self, word: &str) -> bool {
        let word = word.strip_prefix("/dev/").unwrap_or(word);
        self.names.contains(word)
    }

    /// As [`Lineage::answers_to`], for the tools that also take bare numbers: `1` for region1, `1.0` for namespace1.0.
    pub(crate) fn answers_to_tool(&self, word: &str) -> bool {
        let is_number = word.starts_with(|first: char| first.is_ascii_digit());
        let is_form = |form: &str| self.names.contains(&format!("{form}{word}"));
        self.answers_to(word)
            || (is_number && ["region", "namespace", "dax"].into_iter().any(is_form))
            || (is_number && self.device.region() == word)
    }

    /// Whether the word, as tools say it, is a bus that the device is on.
    pub(crate) fn is_on_bus(&self, word: &str) -> bool {
        self.answers_to(word) || self.names.contains(&format!("ndbus{word}"))
    }
}

/// The directory and all above it that belong to a device, but for those that are there already.
fn climb(host: &Host, from: &Path, into: &mut Vec<PathBuf>) {
    let top = fs::canonicalize(host.sys().join("devices"));
    let top = top.unwrap_or_else(|_| host.sys().join("devices"));
    let mut next = Some(from);
    while let Some(dir) = next.filter(|dir| **dir != top && dir.starts_with(&top)) {
        if !into.iter().any(|known| known == dir) {
            into.push(dir.to_owned());
        }
        next = dir.parent();
    }
}

/// What a CXL region consists of, elsewhere in the tree: `targetN` names a decoder, whose port's `uport` is the memory
/// device.
fn limbs(host: &Host, region: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for index in 0.. {
        let Ok(text) = fs::read_to_string(region.join(format!("target{index}"))) else {
            break;
        };
        let name = text.trim();
        if name.is_empty() || name.contains('/') {
            continue;
        }
        let link = host.sys().join("bus/cxl/devices").join(name);
        let Ok(decoder) = fs::canonicalize(link) else {
            continue;
        };
        let port = decoder.parent().map(|port| port.join("uport"));
        found.extend(port.and_then(|port| fs::canonicalize(port).ok()));
        found.push(decoder);
    }
    found
}

fn read_number(path: &Path) -> Result<(u32, u32), LineageError> {
    let text = fs::read_to_string(path).map_err(|source| LineageError::Read {
        path: path.to_owned(),
        source,
    })?;
    let numbers = text.trim().split_once(':');
    let parsed =
        numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parsed.ok_or_else(|| LineageError::Number {
        path: path.to_owned(),
        text: text.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeHost;

    #[test]
    fn only_names_of_dax_devices_are_names() {
        for good in ["dax0.0", "dax12.3"] {
            assert_eq!(good.parse::<DeviceName>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "dax",
            "dax0",
            "dax0.",
            "dax.0",
            "dax0.0/..",
            "dax-1.0",
            "region0",
            "dax0.0 ",
        ] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_device_answers_to_all_it_stands_on() {
        let host = FakeHost::new();
        host.add_pmem(1);
        let lineage = host.lineage("dax1.0");
        for name in [
            "dax1.0",
            "/dev/dax1.0",
            "region1",
            "ndbus0",
            "namespace1.0",
            "ACPI.NFIT",
        ] {
            assert!(lineage.answers_to(name), "{name}");
        }
        for name in ["dax0.0", "region0", "namespace1.1", "1", "1.0"] {
            assert!(!lineage.answers_to(name), "{name}");
        }
        for number in ["1", "1.0"] {
            assert!(
                lineage.answers_to_tool(number),
                "{number}: region1, namespace1.0"
            );
        }
        assert!(!lineage.answers_to_tool("0") && lineage.is_on_bus("0"));
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_that_says_so() {
        let host = FakeHost::new();
        let device = "dax7.0".parse().unwrap();
        let error = Lineage::read(host.host(), &device).unwrap_err();
        assert!(error.to_string().starts_with("there is no device dax7.0"));
    }

    #[test]
    fn cxl_memory_stands_on_its_memory_devices_too() {
        let host = FakeHost::new();
        host.add_cxl();
        let lineage = host.lineage("dax5.0");
        for name in [
            "dax5.0",
            "dax_region5",
            "region5",
            "decoder0.0",
            "decoder3.0",
            "mem0",
            "0000:35:00.0",
        ] {
            assert!(lineage.answers_to(name), "{name}: {:?}", lineage.names);
        }
    }
}
