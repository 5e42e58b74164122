//! The host's own configuration: pools of device-dax devices, and that RAM without a `file=` comes from one of them.
//!
//! What guests are asked to be is written by those who start them; this is written once, by who runs the host, so that a
//! caller that has never heard of device-dax gets it all the same:
//!
//! ```toml
//! [pool.ram]
//! devices = ["/dev/dax0.0", "/dev/dax1.0"]
//! zero = "before"       # the default
//!
//! [ram]
//! pool = "ram"
//! required = true       # the default
//! ```
//!
//! Not done here: the file is found and read by [`crate::host_config`], devices are opened by those who take of a pool.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The host's configuration, checked. The default is that of a host without any: no pools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostConfig {
    file: Option<PathBuf>,
    pools: BTreeMap<String, PoolConfig>,
    ram: Option<RamConfig>,
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    pool: BTreeMap<String, PoolConfig>,
    ram: Option<RamConfig>,
}

/// `[pool.NAME]`: devices of which guests get ranges.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// In the order in which they are tried.
    pub devices: Vec<PathBuf>,
    /// When RAM of it is zeroed.
    #[serde(default)]
    pub zero: Zero,
}

/// When RAM that comes from a pool is zeroed. There is no "after": a VMM that is killed could not do it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Zero {
    /// Before a guest gets it, so that it finds nothing of another's.
    #[default]
    Before,
    /// Never: the guest finds what the last user of the range left. For hosts whose guests may know all of each other.
    Never,
}

/// `[ram]`: where RAM comes from when nobody names a file or a pool for it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamConfig {
    /// The pool.
    pub pool: String,
    /// Whether a guest does not start when the pool can't give it; else it gets what it would get without a pool, and a warning
    /// is logged.
    #[serde(default = "super::on")]
    pub required: bool,
}

/// A configuration of the host that can't be used.
#[derive(Debug, Error)]
pub enum HostConfigError {
    /// Not TOML, or not of this shape.
    #[error("{} can't be understood", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Where, and what was expected there.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A name that no command line could say.
    #[error(
        "{}: a pool is called {name:?}: use letters, digits, - and _ for its name", file.display()
    )]
    BadName {
        /// The file.
        file: PathBuf,
        /// The name.
        name: String,
    },
    /// A pool of nothing.
    #[error(
        "{}: pool {pool} has no devices: give it some (devices = [\"/dev/dax0.0\"]), or take it out", file.display()
    )]
    NoDevices {
        /// The file.
        file: PathBuf,
        /// The pool.
        pool: String,
    },
    /// A path that depends on where a VMM was started.
    #[error(
        "{}: {} of pool {pool} is no absolute path: name a device such as /dev/dax0.0", file.display(), device.display()
    )]
    RelativePath {
        /// The file.
        file: PathBuf,
        /// The pool.
        pool: String,
        /// The path.
        device: PathBuf,
    },
    /// A device is listed twice.
    #[error(
        "{}: {} is in pool {pool} and in pool {other}: a device is in one pool, once", file.display(), device.display()
    )]
    Twice {
        /// The file.
        file: PathBuf,
        /// The device.
        device: PathBuf,
        /// The later pool.
        pool: String,
        /// The pool before it, which can be the same.
        other: String,
    },
    /// RAM is to come from a pool that is not there.
    #[error("{}: [ram]", file.display())]
    Ram {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: UnknownPool,
    },
}

/// There is no pool of this name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("there is no pool {name}: {}", instead(file.as_deref(), pools))]
pub struct UnknownPool {
    /// The name.
    pub name: String,
    /// The file that pools are named in, if there is one.
    pub file: Option<PathBuf>,
    /// Those that there are.
    pub pools: Vec<String>,
}

fn instead(file: Option<&Path>, pools: &[String]) -> String {
    match (file, pools) {
        (None, _) => {
            "this host names none; write [pool.NAME] into /etc/daxhund/config.toml".to_owned()
        }
        (Some(file), []) => format!("{} names none; add [pool.NAME]", file.display()),
        (Some(file), pools) => format!("{} names {}", file.display(), pools.join(", ")),
    }
}

impl HostConfig {
    /// Reads the text of `file`, which is for messages.
    pub fn parse(file: &Path, text: &str) -> Result<Self, HostConfigError> {
        let file = || file.to_owned();
        let written: Written = toml::from_str(text).map_err(|source| HostConfigError::Syntax {
            file: file(),
            source: Box::new(source),
        })?;
        let config = Self {
            file: Some(file()),
            pools: written.pool,
            ram: written.ram,
        };
        let mut seen: BTreeMap<&Path, &str> = BTreeMap::new();
        for (name, pool) in &config.pools {
            let is_sayable = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if name.is_empty() || !name.chars().all(is_sayable) {
                let (file, name) = (file(), name.clone());
                return Err(HostConfigError::BadName { file, name });
            }
            if pool.devices.is_empty() {
                let (file, pool) = (file(), name.clone());
                return Err(HostConfigError::NoDevices { file, pool });
            }
            for device in &pool.devices {
                if !device.is_absolute() {
                    return Err(HostConfigError::RelativePath {
                        file: file(),
                        pool: name.clone(),
                        device: device.clone(),
                    });
                }
                if let Some(other) = seen.insert(device, name) {
                    return Err(HostConfigError::Twice {
                        file: file(),
                        device: device.clone(),
                        pool: name.clone(),
                        other: other.to_owned(),
                    });
                }
            }
        }
        if let Some(ram) = &config.ram {
            config
                .pool(&ram.pool)
                .map_err(|source| HostConfigError::Ram {
                    file: file(),
                    source,
                })?;
        }
        Ok(config)
    }

    /// The file that it was read from; none without one.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Every pool, by name.
    pub fn pools(&self) -> impl Iterator<Item = (&str, &PoolConfig)> {
        self.pools.iter().map(|(name, pool)| (name.as_str(), pool))
    }

    /// The pool of this name.
    pub fn pool(&self, name: &str) -> Result<&PoolConfig, UnknownPool> {
        self.pools.get(name).ok_or_else(|| UnknownPool {
            name: name.to_owned(),
            file: self.file.clone(),
            pools: self.pools.keys().cloned().collect(),
        })
    }

    /// Where RAM comes from for which nobody named anything.
    pub fn ram(&self) -> Option<&RamConfig> {
        self.ram.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    fn parse(text: &str) -> Result<HostConfig, HostConfigError> {
        HostConfig::parse(Path::new("/c.toml"), text)
    }

    #[test]
    fn pools_and_the_one_for_ram_are_read() {
        let config = parse(
            "[pool.ram]\ndevices = [\"/dev/dax0.0\", \"/dev/dax1.0\"]\n\
             [pool.far-away]\ndevices = [\"/dev/dax2.0\"]\nzero = \"never\"\n\
             [ram]\npool = \"ram\"\n",
        )
        .unwrap();
        let names: Vec<&str> = config.pools().map(|(name, _)| name).collect();
        assert_eq!(names, ["far-away", "ram"]);
        let ram = config.pool("ram").unwrap();
        assert_eq!(
            ram.devices,
            ["/dev/dax0.0", "/dev/dax1.0"].map(PathBuf::from)
        );
        assert_eq!(ram.zero, Zero::Before);
        assert_eq!(config.pool("far-away").unwrap().zero, Zero::Never);
        let expected = RamConfig {
            pool: "ram".into(),
            required: true,
        };
        assert_eq!(config.ram(), Some(&expected));
        assert_eq!(config.file(), Some(Path::new("/c.toml")));
        let unknown = config.pool("cxl").unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "there is no pool cxl: /c.toml names far-away, ram"
        );
    }

    #[test]
    fn nothing_written_is_nothing_configured() {
        let empty = parse("").unwrap();
        assert_eq!((empty.pools().count(), empty.ram()), (0, None));
        let text = empty.pool("a").unwrap_err().to_string();
        assert_eq!(
            text,
            "there is no pool a: /c.toml names none; add [pool.NAME]"
        );
        let text = HostConfig::default().pool("a").unwrap_err().to_string();
        assert!(text.contains("write [pool.NAME] into /etc/daxhund/config.toml"));
        let loose = parse("[pool.a]\ndevices=[\"/d\"]\n[ram]\npool=\"a\"\nrequired=false");
        assert!(!loose.unwrap().ram().unwrap().required);
    }

    #[test]
    fn what_can_not_be_meant_is_named() {
        let pool = |name: &str, devices: &str| format!("[pool.{name}]\ndevices = [{devices}]\n");
        for (text, words) in [
            ("[pool", "can't be understood"),
            ("[pools.a]", "unknown field `pools`"),
            ("[ram]\npool = \"a\"\nsize = 1", "unknown field `size`"),
            ("[pool.a]\nzero = \"before\"", "missing field `devices`"),
            (
                &(pool("a", "\"/d\"") + "zero = \"after\""),
                "unknown variant `after`",
            ),
            (&pool("\"a b\"", "\"/d\""), "a pool is called \"a b\""),
            (&pool("\"\"", "\"/d\""), "a pool is called \"\""),
            (&pool("a", ""), "pool a has no devices"),
            (
                &pool("a", "\"dax0.0\""),
                "dax0.0 of pool a is no absolute path",
            ),
            (
                &pool("a", "\"/d\", \"/d\""),
                "/d is in pool a and in pool a",
            ),
            (
                &(pool("a", "\"/d\"") + &pool("b", "\"/d\"")),
                "/d is in pool b and in pool a",
            ),
            (
                &(pool("a", "\"/d\"") + "[ram]\npool = \"b\""),
                "there is no pool b: /c.toml names a",
            ),
        ] {
            let error = parse(text).unwrap_err();
            let source = error.source().map(ToString::to_string);
            let said = format!("{error}: {}", source.unwrap_or_default());
            assert!(
                said.starts_with("/c.toml") && said.contains(words),
                "{text}: {said}"
            );
        }
    }
}
