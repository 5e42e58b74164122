//! RAM for guests whose devices other projects' programs serve: on device-dax, where the program takes that.
//!
//! Newer ones look at a file's size before they map it, and a device has none: DPDK since 24.11, and virtiofsd 1.13 of Debian 13.
//! Their guests have shared memory instead, and a story of theirs sees the refusal.

use super::support::{MIB, dax_zone, mapped, refused, spec_on, with_words};
use super::{Lab, TestError};
use crate::guest::GuestSpec;
use crate::host::process::Process;

/// One zone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Zone {
    /// The dax device, and where in it.
    pub(super) device: usize,
    pub(super) offset: u64,
    /// On device-dax, and otherwise: the emulated host has little other memory.
    pub(super) dax_bytes: u64,
    pub(super) other_bytes: u64,
}

/// A guest with this RAM and these words.
pub(super) fn spec_in(lab: &Lab, ram: &PeerRam, words: &[&str]) -> GuestSpec {
    let zones = ram.words(lab);
    let zones: Vec<&str> = zones.iter().map(String::as_str).collect();
    with_words(spec_on(lab, &zones), words)
}

/// All of a guest's.
pub(super) struct PeerRam {
    takes_dax: bool,
    zones: Vec<Zone>,
}

impl PeerRam {
    pub(super) fn new(takes_dax: bool, zones: &[Zone]) -> Self {
        Self {
            takes_dax,
            zones: zones.to_vec(),
        }
    }

    /// 512 MiB, as most guests have.
    pub(super) fn small(takes_dax: bool) -> Self {
        let zone = Zone {
            device: 0,
            offset: 0,
            dax_bytes: 512 * MIB,
            other_bytes: 512 * MIB,
        };
        Self::new(takes_dax, &[zone])
    }

    /// For `--memory-zone`.
    fn words(&self, lab: &Lab) -> Vec<String> {
        let zones = (0..).zip(&self.zones);
        let word = |(n, zone): (usize, &Zone)| {
            let id = format!("z{n}");
            if self.takes_dax {
                dax_zone(lab, &id, zone.device, zone.dax_bytes, zone.offset)
            } else {
                format!("id={id},size={},shared=on", zone.other_bytes)
            }
        };
        zones.map(word).collect()
    }

    /// Whether the program has mapped every zone.
    pub(super) fn is_mapped(&self, lab: &Lab, by: &Process) -> Result<bool, TestError> {
        if self.takes_dax {
            return self.each(lab, by, |mapped, zone| mapped >= zone.dax_bytes);
        }
        Ok(Self::shared_ranges(lab, by)? >= self.zones.len())
    }

    /// Whether it has nothing of them any more.
    pub(super) fn is_let_go(&self, lab: &Lab, by: &Process) -> Result<bool, TestError> {
        if self.takes_dax {
            return self.each(lab, by, |mapped, _| mapped == 0);
        }
        Ok(Self::shared_ranges(lab, by)? == 0)
    }

    /// Whether it is so with what is mapped of each zone's device.
    fn each(
        &self,
        lab: &Lab,
        by: &Process,
        is_so: impl Fn(u64, &Zone) -> bool,
    ) -> Result<bool, TestError> {
        for zone in &self.zones {
            if !is_so(mapped(lab, by, &lab.host.dax()[zone.device].path)?, zone) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The program may have some of its own.
    fn shared_ranges(lab: &Lab, by: &Process) -> Result<usize, TestError> {
        let maps = lab.host.read_text(&format!("/proc/{}/maps", by.pid()))?;
        Ok(maps
            .lines()
            .filter(|line| line.contains("/memfd:daxhund-ram"))
            .count())
    }

    /// One that takes no device-dax says so, and what else to do.
    pub(super) fn sees_refusal(lab: &Lab, device: &[&str]) -> Result<(), TestError> {
        let zone = dax_zone(lab, "z0", 0, 256 * MIB, 0);
        let mut words = vec!["--memory-zone", &zone];
        words.extend(device);
        refused(
            lab,
            &words,
            1,
            &["z0", "refuses the memory", "size is 0", "shared=on"],
        )
    }
}
