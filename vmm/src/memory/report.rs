//! A region of guest memory as it is told to those who ask: what is behind it, how it stands, who has it.
//!
//! The machine's owner fills it in, `vm.regions` sends it as JSON, and `daxhund-remote regions` reads it again: one type for all
//! three. What does not change is noted when the region is made ([`RegionReport::of`]): of a region whose memory has gone back
//! to the host there is nothing left to be asked.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::mapping::{HostMapping, Source};
use super::poison::Poisoned;
use super::region::{Mapping, Region};

/// Where a memory of no name shows up among this process's descriptors.
const MEMFD: &str = "/memfd:";

/// `vm.regions`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RegionsReport {
    /// By guest-physical address.
    pub regions: Vec<RegionReport>,
}

/// One region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RegionReport {
    /// The zone, or the device that brought it. A zone around the MMIO hole is several regions.
    pub id: String,
    /// What it is to the guest.
    pub kind: RegionKind,
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// `present`, `draining`, `leaving`, `lost`, `stuck` or `given-back`.
    pub state: String,
    /// Who keeps what is to go, while somebody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_by: Option<String>,
    /// What is behind it.
    pub backing: Backing,
    /// Bytes that the host maps it by: the alignment of device-dax, the size of a huge page, or 4096.
    pub page_size: u64,
    /// The host's NUMA node: that of the device, or the one that the zone is bound to.
    pub host_numa_node: Option<u32>,
    /// Whether the guest can only load from it.
    pub read_only: bool,
    /// Whether passed-through devices are to reach it, when there are any.
    pub dma: bool,
    /// Who has it now.
    pub holders: Vec<Holder>,
    /// What of it is poisoned.
    pub poison: Vec<Poisoned>,
}

/// What a region is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RegionKind {
    /// RAM of a zone.
    Ram,
    /// Persistent memory.
    Pmem,
    /// Persistent memory that a vhost-user backend lends.
    LentPmem,
}

impl RegionKind {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ram => "ram",
            Self::Pmem => "pmem",
            Self::LentPmem => "lent-pmem",
        }
    }
}

/// What is behind a region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Backing {
    /// Of what kind it is.
    pub kind: BackingKind,
    /// The device or the file, as far as it has a name.
    pub path: Option<PathBuf>,
    /// Where the region begins in it, in bytes.
    pub offset: u64,
    /// The host's pool that it was taken of; absent when it is of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
}

/// Kinds of what is behind a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BackingKind {
    /// A device-dax device.
    DeviceDax,
    /// Memory of this process alone.
    Anonymous,
    /// Memory that others can map, without a name.
    Memfd,
    /// A file, shared.
    File,
    /// A private copy of a file.
    FileCopy,
    /// A file on fs-dax.
    FsDax,
}

impl BackingKind {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeviceDax => "device-dax",
            Self::Anonymous => "anonymous",
            Self::Memfd => "memfd",
            Self::File => "file",
            Self::FileCopy => "file-copy",
            Self::FsDax => "fs-dax",
        }
    }
}

/// Somebody who has a region mapped or pinned, or holds its removal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum Holder {
    /// The guest: KVM's memory slots.
    Kvm {
        /// How many; more than one around poison.
        slots: usize,
        /// Bytes in them.
        bytes: u64,
    },
    /// A vhost-user backend, which maps it too.
    VhostUser {
        /// The device that it serves.
        id: String,
        /// Where it is.
        socket: PathBuf,
        /// Whether it is there now.
        connected: bool,
        /// Bytes that it has.
        bytes: u64,
    },
    /// Passed-through devices, through a VFIO container: pinned.
    Type1(Pinned),
    /// Passed-through devices, through iommufd: pinned.
    Iommufd(Pinned),
    /// The removal guard: whoever wants to take the device away waits.
    Guard {
        /// Whether somebody does.
        wanted: bool,
    },
}

/// Memory that is pinned for devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pinned {
    /// How much.
    pub bytes: u64,
    /// How long it took.
    pub took_us: u64,
    /// Those who reach it, by their addresses on the host.
    pub devices: Vec<String>,
}

impl Holder {
    /// What of it is pinned by this holder.
    pub fn pinned(&self) -> Option<&Pinned> {
        match self {
            Self::Type1(pinned) | Self::Iommufd(pinned) => Some(pinned),
            Self::Kvm { .. } | Self::VhostUser { .. } | Self::Guard { .. } => None,
        }
    }
}

impl RegionReport {
    /// What does not change of a region; it is present, and nobody has it.
    pub fn of(region: &Region, id: &str, kind: RegionKind) -> Self {
        let (backing, page_size, host_numa_node) = match region.mapping() {
            Mapping::Dax(mapping) => {
                let facts = mapping.facts();
                let backing = Backing {
                    kind: BackingKind::DeviceDax,
                    path: Some(mapping.path().to_owned()),
                    offset: mapping.range().offset(),
                    pool: mapping.pool().map(str::to_owned),
                };
                // Memory of a device that is a node of its own is nearest to that.
                let node = facts.numa_node.or(facts.target_node);
                (backing, facts.align_bytes, node)
            }
            Mapping::Host(mapping) => (Backing::of(mapping), mapping.page_bytes() as u64, None),
        };
        Self {
            id: id.to_owned(),
            kind,
            gpa: region.gpa().0,
            size: region.size(),
            state: String::new(),
            held_by: None,
            backing,
            page_size,
            host_numa_node,
            read_only: region.is_read_only(),
            dma: region.dma().is_reachable(),
            holders: Vec::new(),
            poison: Vec::new(),
        }
    }

    /// Address after the last.
    pub fn end(&self) -> u64 {
        self.gpa.saturating_add(self.size)
    }
}

impl Backing {
    fn of(mapping: &HostMapping) -> Self {
        match mapping.source() {
            Source::Anonymous { .. } => Self {
                kind: BackingKind::Anonymous,
                path: None,
                offset: 0,
                pool: None,
            },
            Source::File {
                file,
                offset,
                shared,
            } => {
                let path = name_of(file);
                let kind = match (shared, &path) {
                    (true, None) => BackingKind::Memfd,
                    (true, Some(_)) => BackingKind::File,
                    (false, _) => BackingKind::FileCopy,
                };
                Self {
                    kind,
                    path,
                    offset: *offset,
                    pool: None,
                }
            }
            Source::DaxFile { file, offset } => Self {
                kind: BackingKind::FsDax,
                path: name_of(file),
                offset: *offset,
                pool: None,
            },
        }
    }
}

/// The name by which a file was opened; `None` of memory without one.
fn name_of(file: &File) -> Option<PathBuf> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = std::fs::read_link(link).ok()?;
    (!path
        .as_os_str()
        .as_encoded_bytes()
        .starts_with(MEMFD.as_bytes()))
    .then_some(path)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::memory::layout::Gpa;
    use crate::memory::mapping::memfd;

    const SIZE: u64 = 0x20_0000;

    fn report(source: Source) -> RegionReport {
        let mapping = Mapping::Host(HostMapping::new(source, SIZE, 4096).unwrap());
        let region = Region::new("z0", Gpa(1 << 32), mapping);
        let region = region.map_err(|(_, error)| error).unwrap();
        let report = RegionReport::of(&region, "z0", RegionKind::Ram);
        region.release().map_err(|failed| failed.1).unwrap();
        report
    }

    #[test]
    fn what_is_behind_a_region_has_its_kind_and_its_name() {
        let anonymous = report(Source::Anonymous {
            huge_bytes: None,
            thp: false,
        });
        let Backing {
            kind, path, offset, ..
        } = anonymous.backing;
        assert_eq!((kind, path, offset), (BackingKind::Anonymous, None, 0));
        assert_eq!((anonymous.gpa, anonymous.size), (1 << 32, SIZE));
        assert_eq!((anonymous.page_size, anonymous.dma), (4096, true));
        assert_eq!(anonymous.host_numa_node, None);

        let nameless = |shared| Source::File {
            file: Arc::new(memfd(2 * SIZE, None).unwrap()),
            offset: SIZE,
            shared,
        };
        let memfd = report(nameless(true)).backing;
        assert_eq!((memfd.kind, memfd.path), (BackingKind::Memfd, None));
        assert_eq!(memfd.offset, SIZE);
        assert_eq!(report(nameless(false)).backing.kind, BackingKind::FileCopy);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap().join("ram");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_len(SIZE).unwrap();
        let named = report(Source::File {
            file: Arc::new(file),
            offset: 0,
            shared: true,
        });
        assert_eq!(named.backing.kind, BackingKind::File);
        assert_eq!(named.backing.path, Some(path));
    }

    #[test]
    fn a_report_is_read_again_as_it_was_written() {
        let mut report = report(Source::Anonymous {
            huge_bytes: None,
            thp: false,
        });
        report.state = "present".into();
        report.poison = vec![Poisoned {
            gpa: 1 << 32,
            size: 4096,
            pages: vec![1 << 32],
        }];
        let pinned = Pinned {
            bytes: SIZE,
            took_us: 7,
            devices: vec!["0000:01:00.0".into()],
        };
        report.holders = vec![
            Holder::Kvm {
                slots: 1,
                bytes: SIZE,
            },
            Holder::VhostUser {
                id: "d0".into(),
                socket: "/run/d".into(),
                connected: false,
                bytes: SIZE,
            },
            Holder::Type1(pinned.clone()),
            Holder::Guard { wanted: true },
        ];
        let all = RegionsReport {
            regions: vec![report],
        };
        let value = serde_json::to_value(&all).unwrap();
        assert_eq!(
            serde_json::from_value::<RegionsReport>(value.clone()).unwrap(),
            all
        );
        let region = &value["regions"][0];
        assert_eq!(region["kind"], "ram");
        assert_eq!(region["backing"]["kind"], "anonymous");
        assert_eq!(region.get("held_by"), None);
        let by: Vec<_> = (0..4).map(|at| &region["holders"][at]["by"]).collect();
        assert_eq!(by, ["kvm", "vhost-user", "type1", "guard"]);
        let expected = json!({
            "by": "type1", "bytes": SIZE, "took_us": 7, "devices": ["0000:01:00.0"],
        });
        assert_eq!(region["holders"][2], expected);
        assert_eq!(all.regions[0].holders[2].pinned(), Some(&pinned));
    }
}
