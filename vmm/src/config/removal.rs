//! What happens to memory when the host wants it back: keys of `--memory-zone` and `--pmem`, and the flag
//! `--removal-guard`.

use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::keyvalue::{Expected, Value};

/// From the host's request to the end of the guest's time, unless `removal_timeout=` says otherwise.
pub const DEFAULT_REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// A removal that is held longer than that is as good as refused.
const LONGEST_TIMEOUT: u32 = 3600;
/// As long as a guest can have.
pub const LONGEST_REMOVAL_TIMEOUT: Duration = Duration::from_secs(LONGEST_TIMEOUT as u64);

/// What is done when the host asks for memory that the guest uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnRemoval {
    /// Whoever asked gets an error; the guest goes on.
    Refuse,
    /// The guest is asked to power off, is stopped when it has not by the end of its time, and the memory is let go.
    Stop,
    /// The guest is asked to eject the memory, is cut off from it when it has not by the end of its time, and goes on.
    Eject,
}

/// What is done when the host has taken memory away that the guest can't go on without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnLoss {
    /// The guest is ended, and the process with it.
    #[default]
    Stop,
    /// The guest is held for good: it can be looked at, started anew and deleted, not resumed.
    Pause,
}

/// A number of seconds, as `removal_timeout=` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "u32", into = "u32")]
#[schemars(inline, extend("maximum" = LONGEST_TIMEOUT))]
pub struct RemovalTimeout(u32);

/// Too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("removal_timeout={0} is more than {LONGEST_TIMEOUT} seconds")]
pub struct TimeoutTooLong(u32);

impl TryFrom<u32> for RemovalTimeout {
    type Error = TimeoutTooLong;

    fn try_from(seconds: u32) -> Result<Self, TimeoutTooLong> {
        if seconds > LONGEST_TIMEOUT {
            return Err(TimeoutTooLong(seconds));
        }
        Ok(Self(seconds))
    }
}

impl From<RemovalTimeout> for u32 {
    fn from(timeout: RemovalTimeout) -> Self {
        timeout.0
    }
}

impl From<RemovalTimeout> for Duration {
    fn from(timeout: RemovalTimeout) -> Self {
        Self::from_secs(timeout.0.into())
    }
}

impl Value<'_> {
    pub(crate) fn removal_timeout(self) -> Result<RemovalTimeout, Expected> {
        self.integer()
            .ok()
            .and_then(|seconds: u32| seconds.try_into().ok())
            .ok_or(Expected("a number of seconds up to 3600"))
    }

    /// What boot RAM can do.
    pub(crate) fn on_removal_of_ram(self) -> Result<OnRemoval, Expected> {
        match self.text()?.as_str() {
            "refuse" => Ok(OnRemoval::Refuse),
            "stop" => Ok(OnRemoval::Stop),
            _ => Err(Expected("refuse or stop")),
        }
    }

    pub(crate) fn on_loss(self) -> Result<OnLoss, Expected> {
        match self.text()?.as_str() {
            "stop" => Ok(OnLoss::Stop),
            "pause" => Ok(OnLoss::Pause),
            _ => Err(Expected("stop or pause")),
        }
    }

    /// What persistent memory can do.
    pub(crate) fn on_removal_of_pmem(self) -> Result<OnRemoval, Expected> {
        match self.text()?.as_str() {
            "eject" => Ok(OnRemoval::Eject),
            "refuse" => Ok(OnRemoval::Refuse),
            _ => Err(Expected("eject or refuse")),
        }
    }
}

/// Who holds removals back (`--removal-guard`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RemovalGuard {
    /// The daemon when it runs, else a helper where this process may have one, else nobody, with a warning.
    #[default]
    Auto,
    /// A helper process.
    On,
    /// Nobody.
    Off,
    /// The daemon.
    Daemon,
}

/// Not a value of `--removal-guard`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "--removal-guard {0}: expected on, off or daemon; leave the flag out for what the host has"
)]
pub struct RemovalGuardError(String);

impl FromStr for RemovalGuard {
    type Err = RemovalGuardError;

    fn from_str(text: &str) -> Result<Self, RemovalGuardError> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            "daemon" => Ok(Self::Daemon),
            other => Err(RemovalGuardError(other.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MemoryZoneConfig, PmemConfig};

    #[test]
    fn ram_is_refused_or_stops_and_pmem_is_ejected_or_refused() {
        let zone = |value| MemoryZoneConfig::parse(&format!("id=a,size=1G,on_removal={value}"));
        assert_eq!(zone("stop").unwrap().on_removal, Some(OnRemoval::Stop));
        assert_eq!(zone("refuse").unwrap().on_removal, Some(OnRemoval::Refuse));
        let pmem = |value| PmemConfig::parse(&format!("file=/dev/dax1.0,on_removal={value}"));
        assert_eq!(pmem("eject").unwrap().on_removal, Some(OnRemoval::Eject));
        assert_eq!(pmem("refuse").unwrap().on_removal, Some(OnRemoval::Refuse));
        let error = zone("eject").unwrap_err().to_string();
        assert!(error.contains("refuse or stop"), "{error}");
        let error = pmem("stop").unwrap_err().to_string();
        assert!(error.contains("eject or refuse"), "{error}");
    }

    #[test]
    fn a_guest_without_its_ram_stops_or_is_held() {
        let zone = |value| MemoryZoneConfig::parse(&format!("id=a,size=1G,on_loss={value}"));
        assert_eq!(zone("stop").unwrap().on_loss, Some(OnLoss::Stop));
        assert_eq!(zone("pause").unwrap().on_loss, Some(OnLoss::Pause));
        let error = zone("resume").unwrap_err().to_string();
        assert!(error.contains("stop or pause"), "{error}");
        let json = r#"{"id":"a","size":4096,"on_loss":"pause"}"#;
        let zone: MemoryZoneConfig = serde_json::from_str(json).unwrap();
        assert_eq!(zone.on_loss, Some(OnLoss::Pause));
        serde_json::from_str::<OnLoss>("\"eject\"").unwrap_err();
    }

    #[test]
    fn a_timeout_has_a_limit() {
        let pmem = |value| PmemConfig::parse(&format!("file=/dev/dax1.0,removal_timeout={value}"));
        let timeout = pmem("3600").unwrap().removal_timeout.unwrap();
        assert_eq!(Duration::from(timeout), Duration::from_hours(1));
        for wrong in ["3601", "-1", "1s", ""] {
            let error = pmem(wrong).unwrap_err().to_string();
            assert!(error.contains("seconds up to 3600"), "{error}");
        }
        serde_json::from_str::<RemovalTimeout>("3601").unwrap_err();
    }

    #[test]
    fn the_guard_has_three_words() {
        assert_eq!("daemon".parse(), Ok(RemovalGuard::Daemon));
        let error = "maybe".parse::<RemovalGuard>().unwrap_err().to_string();
        assert!(error.contains("on, off or daemon"), "{error}");
    }
}
