//! What passthrough holds on the host: locked and pinned memory, descriptors, DMA mappings, interrupts; and what the kernel says.
//!
//! Everything is read from the kernel, nothing from the VMM. What is counted for the whole host is compared before and after:
//! nothing else pins memory or maps it for DMA there, since the host's own devices go past the IOMMU.

use super::channel::HostError;
use super::figures::FiguresError;
use super::{Host, check};
use crate::host::channel::Channel;

/// The IOMMU's tracepoints, and what a summary of each adds up.
const MAP_EVENT: &str = "/sys/kernel/tracing/events/iommu/map";
const UNMAP_EVENT: &str = "/sys/kernel/tracing/events/iommu/unmap";

/// Memory of a process that the kernel keeps in place.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Memlock {
    /// Counted against the process's limit: `VmLck`.
    pub locked_bytes: u64,
    /// Pinned and counted elsewhere: `VmPin`.
    pub pinned_bytes: u64,
}

/// How often pages were pinned for DMA and the like, and let go of again, since the host started.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Pins {
    /// `nr_foll_pin_acquired`.
    pub acquired: u64,
    /// `nr_foll_pin_released`.
    pub released: u64,
}

/// What the IOMMU has been told since a [`DmaWatch`] began.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DmaMaps {
    /// Mappings made.
    pub maps: u64,
    /// Their bytes.
    pub mapped_bytes: u64,
    /// Mappings taken away; one call may take several.
    pub unmaps: u64,
    /// Their bytes.
    pub unmapped_bytes: u64,
}

impl DmaMaps {
    /// Bytes that are mapped now, if nothing was at the beginning.
    pub fn live_bytes(&self) -> u64 {
        self.mapped_bytes.saturating_sub(self.unmapped_bytes)
    }
}

/// A process's locked and pinned memory.
pub fn memlock(host: &Host, pid: u32) -> Result<Memlock, FiguresError> {
    let path = format!("/proc/{pid}/status");
    let text = host.read_text(&path)?;
    let bytes = |name: &str, what: &'static str| {
        status_kib(&text, name)
            .map(|kib| kib * 1024)
            .ok_or_else(|| FiguresError::Missing {
                path: path.clone(),
                what,
                text: text.clone(),
            })
    };
    Ok(Memlock {
        locked_bytes: bytes("VmLck:", "VmLck")?,
        pinned_bytes: bytes("VmPin:", "VmPin")?,
    })
}

/// How many descriptors a process has open.
pub fn descriptors(host: &Host, pid: u32) -> Result<u64, FiguresError> {
    let text = host.sh(&format!("ls /proc/{pid}/fd | wc -l"))?;
    text.trim().parse().map_err(|_| FiguresError::Missing {
        path: format!("/proc/{pid}/fd"),
        what: "how many descriptors there are",
        text,
    })
}

/// How many mappings a process has: lines of its map.
pub fn mappings(host: &Host, pid: u32) -> Result<u64, FiguresError> {
    counted(host, &format!("/proc/{pid}/maps"), |text| {
        Some(text.lines().count() as u64)
    })
}

/// How many threads a process has.
pub fn threads(host: &Host, pid: u32) -> Result<u64, FiguresError> {
    counted(host, &format!("/proc/{pid}/status"), |text| {
        let line = text.lines().find_map(|line| line.strip_prefix("Threads:"));
        line?.trim().parse().ok()
    })
}

fn counted(
    host: &Host,
    path: &str,
    count: impl FnOnce(&str) -> Option<u64>,
) -> Result<u64, FiguresError> {
    let text = host.read_text(path)?;
    count(&text).ok_or_else(|| FiguresError::Missing {
        path: path.to_owned(),
        what: "how many there are",
        text: text.clone(),
    })
}

/// The kernel's count of pins.
pub fn pins(host: &Host) -> Result<Pins, FiguresError> {
    // Each processor keeps a part of the counts to itself for a while (mm/vmstat.c); reading this file gathers them.
    host.check(&["cat", "/proc/sys/vm/stat_refresh"])?;
    let path = "/proc/vmstat";
    let text = host.read_text(path)?;
    let count = |name: &str, what: &'static str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        line.ok_or_else(|| FiguresError::Missing {
            path: path.to_owned(),
            what,
            text: text.clone(),
        })
    };
    Ok(Pins {
        acquired: count("nr_foll_pin_acquired ", "nr_foll_pin_acquired")?,
        released: count("nr_foll_pin_released ", "nr_foll_pin_released")?,
    })
}

/// The interrupts that vfio-pci has taken on behalf of a device: its name for each, and how often it came.
pub fn vfio_interrupts(host: &Host, address: &str) -> Result<Vec<(String, u64)>, FiguresError> {
    Ok(parse_interrupts(
        &host.read_text("/proc/interrupts")?,
        address,
    ))
}

/// What the kernel has said that has one of these words in it, oldest first.
pub fn kernel_says(host: &Host, words: &[&str]) -> Result<Vec<String>, FiguresError> {
    let log = host.check(&["dmesg", "-r"])?;
    let wanted = |line: &&str| words.iter().any(|word| line.contains(word));
    Ok(log.lines().filter(wanted).map(str::to_owned).collect())
}

/// The kernel's warnings, and worse.
pub fn kernel_warnings(host: &Host) -> Result<Vec<String>, FiguresError> {
    let log = host.check(&["dmesg", "-r"])?;
    Ok(log
        .lines()
        .filter(|line| is_warning(line))
        .map(str::to_owned)
        .collect())
}

/// Adds up what the IOMMU is told, until this goes.
#[derive(Debug)]
pub struct DmaWatch {
    channel: Channel,
    watching: bool,
}

impl DmaWatch {
    /// Begins to add up. One at a time.
    pub fn begin(host: &Host) -> Result<Self, HostError> {
        let watch = Self {
            channel: host.channel.clone(),
            watching: true,
        };
        watch.trigger("")?;
        Ok(watch)
    }

    /// What has been mapped and unmapped since.
    pub fn read(&self) -> Result<DmaMaps, FiguresError> {
        let (maps, mapped_bytes) = self.sums(MAP_EVENT)?;
        let (unmaps, unmapped_bytes) = self.sums(UNMAP_EVENT)?;
        Ok(DmaMaps {
            maps,
            mapped_bytes,
            unmaps,
            unmapped_bytes,
        })
    }

    /// Stops.
    pub fn end(mut self) -> Result<(), HostError> {
        self.undo()
    }

    fn sums(&self, event: &str) -> Result<(u64, u64), FiguresError> {
        let path = format!("{event}/hist");
        let text = check(&self.channel, &["cat", &path])?;
        parse_sums(&text).ok_or(FiguresError::Missing {
            path,
            what: "the sum of one kind of event",
            text,
        })
    }

    /// All events of a kind under one key; `!` before it takes it away.
    fn trigger(&self, sign: &str) -> Result<(), HostError> {
        let map = format!("echo '{sign}hist:keys=common_type:vals=size' > {MAP_EVENT}/trigger");
        let unmap = format!(
            "echo '{sign}hist:keys=common_type:vals=unmapped_size' > {UNMAP_EVENT}/trigger"
        );
        check(&self.channel, &["sh", "-c", &format!("{map} && {unmap}")]).map(|_| ())
    }

    fn undo(&mut self) -> Result<(), HostError> {
        if std::mem::take(&mut self.watching) {
            self.trigger("!")?;
        }
        Ok(())
    }
}

impl Drop for DmaWatch {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            eprintln!("lab: the IOMMU is still being watched: {error}");
        }
    }
}

fn status_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The numbers of all processors are added; the name is everything from `vfio-` on, as in `vfio-msix[0](0000:01:00.0)`.
fn parse_interrupts(text: &str, address: &str) -> Vec<(String, u64)> {
    let parse = |line: &str| {
        let (numbers, name) = line.split_at(line.find("vfio-")?);
        let counts = numbers
            .split_whitespace()
            .skip(1)
            .map_while(|word| word.parse::<u64>().ok());
        name.contains(address)
            .then(|| (name.trim().to_owned(), counts.sum()))
    };
    text.lines().filter_map(parse).collect()
}

/// `<4>[ 1.0] text`: the level is the priority's last three bits. Only the kernel's own words count.
fn is_warning(line: &str) -> bool {
    let priority = line
        .strip_prefix('<')
        .and_then(|rest| rest.split_once('>'))
        .and_then(|(digits, _)| digits.parse::<u32>().ok());
    priority.is_some_and(|priority| priority <= 4)
}

/// `{ common_type: 42 } hitcount: 3 size: 8192`, at most once; nothing has come when it is not there.
fn parse_sums(text: &str) -> Option<(u64, u64)> {
    let mut lines = text.lines().filter(|line| line.starts_with('{'));
    let Some(line) = lines.next() else {
        return text.contains("Totals:").then_some((0, 0));
    };
    let (_, values) = line.split_once('}')?;
    let mut numbers = values
        .split_whitespace()
        .filter_map(|word| word.parse().ok());
    let sums = (numbers.next()?, numbers.next()?);
    lines.next().is_none().then_some(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_of_one_device_are_added_over_processors() {
        let text = "           CPU0       CPU1\n\
                    \x20 24:       7     5   IR-PCI-MSIX-0000:01:00.0    0-edge      vfio-msix[0](0000:01:00.0)\n\
                    \x20 25:       1     0   IR-PCI-MSIX-0000:02:00.0    0-edge      vfio-msix[0](0000:02:00.0)\n\
                    LOC:       9     9   Local timer interrupts\n";
        assert_eq!(
            parse_interrupts(text, "0000:01:00.0"),
            [("vfio-msix[0](0000:01:00.0)".to_owned(), 12)]
        );
    }

    #[test]
    fn a_summary_has_one_line_or_none() {
        let empty = "# event histogram\n\n\nTotals:\n    Hits: 0\n    Entries: 0\n    Dropped: 0\n";
        assert_eq!(parse_sums(empty), Some((0, 0)));
        let one = "{ common_type:        470 } hitcount:          3  size:       8192\n\nTotals:\n";
        assert_eq!(parse_sums(one), Some((3, 8192)));
        assert_eq!(parse_sums(""), None);
    }

    #[test]
    fn only_the_kernels_own_warnings_count() {
        assert!(
            is_warning("<3>[    1.0] DMAR: [DMA Write] Request device")
                && is_warning("<4>[ 2.0] x")
        );
        assert!(!is_warning("<6>[    1.0] x") && !is_warning("<12>[    1.0] init: x"));
    }

    #[test]
    fn locked_memory_is_read_in_kib() {
        assert_eq!(
            status_kib("VmLck:\t    2048 kB\nVmPin:\t 0 kB\n", "VmLck:"),
            Some(2048)
        );
        assert_eq!(status_kib("VmPin:\t 0 kB\n", "VmLck:"), None);
    }
}
