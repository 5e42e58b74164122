//! The least that attaching a device to memory takes: what a VMM's attach is measured against.
//!
//! ```text
//!   populate │ open ─▶ device ─▶ reset ─▶ map │ release
//!    before  │            the attach          │  after
//! ```
//! It does what an attach must do, in the order in which a VMM does it, and nothing else: no checks, no registers, no
//! interrupts. Memory is mapped into the process page by page beforehand, as a guest's is that has run for a while.
//!
//! Nothing is undone on an error: the process ends, and the kernel closes what it holds.

pub(crate) mod boot;
pub(crate) mod loss;
mod vfio;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use lab_agent::pin_protocol::{BareAttach, Interface};

use crate::memory::Words;
use vfio::Range;

const GIB: u64 = 1 << 30;
/// Where daxhund's guests have no RAM, and the IOMMU none to give: interrupts are there.
const HOLE: std::ops::Range<u64> = 3 * GIB..4 * GIB;

/// What is attached to what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a> {
    /// The device's directory in sysfs; it is bound to vfio-pci.
    pub(crate) path: &'a str,
    /// A device-dax device, `anonymous` or `hugetlb`.
    pub(crate) memory: &'a str,
    /// How much of it.
    pub(crate) bytes: u64,
    /// By which of the kernel's interfaces.
    pub(crate) interface: Interface,
    /// How it is cut.
    pub(crate) cut: Cut,
}

/// How memory is cut into what is mapped with one call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Cut {
    /// As a guest's RAM lies around the hole, one after the other.
    Guest,
    /// Into equal parts, mapped by several threads.
    Parts { regions: u64, threads: usize },
}

/// The files of an attached device, in the order in which they are closed.
struct Attached {
    device: File,
    _group: Option<File>,
    space: Space,
}

enum Space {
    Container(File),
    Iommufd(File, u32),
}

/// Attaches, and takes all of it down again.
pub(crate) fn run(plan: &Plan<'_>) -> Result<BareAttach, String> {
    let start = Instant::now();
    let words = memory(plan.memory, plan.bytes)?;
    let populate_ns = nanoseconds(start);
    let ranges = ranges(plan.cut, words.address(0) as u64, plan.bytes);

    let mut report = attach(plan, &ranges)?;
    report.populate_ns = populate_ns;
    drop(words);
    Ok(report)
}

fn attach(plan: &Plan<'_>, ranges: &[Range]) -> Result<BareAttach, String> {
    let mut report = BareAttach::default();
    let attached = match plan.interface {
        Interface::Type1 => open_type1(plan.path, &mut report)?,
        Interface::Iommufd => open_iommufd(plan.path, &mut report)?,
    };

    let start = Instant::now();
    vfio::reset(&attached.device).map_err(|error| format!("{}: reset: {error}", plan.path))?;
    report.reset_ns = nanoseconds(start);

    let start = Instant::now();
    let threads = match plan.cut {
        Cut::Guest => 1,
        Cut::Parts { threads, .. } => threads,
    };
    map_all(&attached.space, ranges, threads)?;
    report.map_ns = nanoseconds(start);

    let start = Instant::now();
    for range in ranges.iter().rev() {
        attached.space.unmap(*range)?;
    }
    drop(attached);
    report.release_ns = nanoseconds(start);
    Ok(report)
}

fn open_type1(path: &str, report: &mut BareAttach) -> Result<Attached, String> {
    let failed = |what: &str, error: io::Error| format!("{path}: {what}: {error}");
    let group_file = format!("/dev/vfio/{}", last_part(&format!("{path}/iommu_group"))?);
    let start = Instant::now();
    let container = open("/dev/vfio/vfio")?;
    let group = open(&group_file)?;
    vfio::set_container(&group, &container).map_err(|error| failed("container", error))?;
    vfio::set_type1(&container).map_err(|error| failed("type1", error))?;
    report.open_ns = nanoseconds(start);

    let start = Instant::now();
    let device =
        vfio::group_device(&group, address(path)).map_err(|error| failed("device", error))?;
    report.device_ns = nanoseconds(start);
    Ok(Attached {
        device,
        _group: Some(group),
        space: Space::Container(container),
    })
}

fn open_iommufd(path: &str, report: &mut BareAttach) -> Result<Attached, String> {
    let failed = |what: &str, error: io::Error| format!("{path}: {what}: {error}");
    let names = fs::read_dir(format!("{path}/vfio-dev"))
        .map_err(|error| failed("the kernel offers groups only", error))?;
    let name = names
        .flatten()
        .next()
        .ok_or_else(|| format!("{path}: not bound to vfio-pci"))?;
    let file = format!("/dev/vfio/devices/{}", name.file_name().to_string_lossy());
    let start = Instant::now();
    let iommufd = open("/dev/iommu")?;
    let ioas = vfio::ioas_alloc(&iommufd).map_err(|error| failed("address space", error))?;
    let device = open(&file)?;
    report.open_ns = nanoseconds(start);

    let start = Instant::now();
    vfio::bind_iommufd(&device, &iommufd).map_err(|error| failed("bind", error))?;
    vfio::attach_ioas(&device, ioas).map_err(|error| failed("attach", error))?;
    report.device_ns = nanoseconds(start);
    Ok(Attached {
        device,
        _group: None,
        space: Space::Iommufd(iommufd, ioas),
    })
}

impl Space {
    fn map(&self, range: Range) -> Result<(), String> {
        let outcome = match self {
            Self::Container(container) => vfio::type1_map(container, range),
            Self::Iommufd(iommufd, ioas) => vfio::ioas_map(iommufd, *ioas, range),
        };
        outcome.map_err(|error| format!("cannot map {range:x?}: {error}"))
    }

    fn unmap(&self, range: Range) -> Result<(), String> {
        let outcome = match self {
            Self::Container(container) => vfio::type1_unmap(container, range),
            Self::Iommufd(iommufd, ioas) => vfio::ioas_unmap(iommufd, *ioas, range),
        };
        outcome.map_err(|error| format!("cannot unmap {range:x?}: {error}"))
    }
}

/// Each range is one call; a thread that has done one takes the next.
fn map_all(space: &Space, ranges: &[Range], threads: usize) -> Result<(), String> {
    if threads <= 1 {
        return ranges.iter().try_for_each(|range| space.map(*range));
    }
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), String> {
        while let Some(range) = ranges.get(next.fetch_add(1, Ordering::Relaxed)) {
            space.map(*range)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| "a thread panicked".to_owned())?)
    })
}

/// Memory of a kind, every page of it there.
fn memory(kind: &str, bytes: u64) -> Result<Words, String> {
    let count = usize::try_from(bytes).map_err(|_| format!("too much: {bytes} bytes"))?;
    let words = match kind {
        "anonymous" => Words::anonymous(count)?,
        "hugetlb" => Words::hugetlb(count)?,
        path => Words::of_device(path, count)?,
    };
    words.populate()?;
    Ok(words)
}

fn ranges(cut: Cut, host_address: u64, bytes: u64) -> Vec<Range> {
    let range = |iova, from: u64, bytes| Range {
        iova,
        host_address: host_address + from,
        bytes,
    };
    match cut {
        Cut::Guest => {
            let low = bytes.min(HOLE.start);
            let mut ranges = vec![range(0, 0, low)];
            if bytes > low {
                ranges.push(range(HOLE.end, low, bytes - low));
            }
            ranges
        }
        // All above the hole.
        Cut::Parts { regions, .. } => {
            let part = bytes / regions;
            let parts = (0..regions).map(|index| index * part);
            parts
                .map(|from| range(HOLE.end + from, from, part))
                .collect()
        }
    }
}

fn open(path: &str) -> Result<File, String> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).open(path);
    file.map_err(|error| format!("cannot open {path}: {error}"))
}

/// As in `0000:01:00.0`.
fn address(path: &str) -> &str {
    path.trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or(path)
}

fn last_part(link: &str) -> Result<String, String> {
    let target = fs::read_link(link).map_err(|error| format!("cannot read {link}: {error}"))?;
    let name = Path::new(&target).file_name().unwrap_or_default();
    Ok(name.to_string_lossy().into_owned())
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_s_ram_lies_around_the_hole() {
        let whole = ranges(Cut::Guest, 1 << 40, 2 * GIB);
        assert_eq!(whole.len(), 1);
        assert_eq!((whole[0].iova, whole[0].bytes), (0, 2 * GIB));
        let parted = ranges(Cut::Guest, 1 << 40, 4 * GIB);
        assert_eq!(parted.len(), 2);
        assert_eq!((parted[0].iova, parted[0].bytes), (0, 3 * GIB));
        assert_eq!(
            parted[1],
            Range {
                iova: 4 * GIB,
                host_address: (1 << 40) + 3 * GIB,
                bytes: GIB,
            }
        );
    }

    #[test]
    fn parts_are_equal_and_follow_each_other() {
        let cut = Cut::Parts {
            regions: 4,
            threads: 2,
        };
        let parts = ranges(cut, 0, 4 * GIB);
        for (index, part) in (0..).zip(&parts) {
            let expected = Range {
                iova: (4 + index) * GIB,
                host_address: index * GIB,
                bytes: GIB,
            };
            assert_eq!(*part, expected);
        }
        assert_eq!(parts.len(), 4);
    }

    #[test]
    fn the_address_is_the_directory_s_name() {
        let path = "/sys/bus/pci/devices/0000:01:00.0";
        assert_eq!(address(path), "0000:01:00.0");
        assert_eq!(address(&format!("{path}/")), "0000:01:00.0");
    }

    #[test]
    fn a_device_that_is_not_there_is_told() {
        let plan = Plan {
            path: "/nowhere/0000:01:00.0",
            memory: "anonymous",
            bytes: 1 << 21,
            interface: Interface::Type1,
            cut: Cut::Guest,
        };
        let message = run(&plan).unwrap_err();
        assert!(
            message.contains("/nowhere/0000:01:00.0/iommu_group"),
            "{message}"
        );
    }
}
