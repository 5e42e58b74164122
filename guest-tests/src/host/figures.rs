//! What a VMM costs the host, as the host's kernel tells it.

use serde::Serialize;

use super::Host;
use super::channel::HostError;

/// KVM's count of mapped pages of each size.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct MappedPages {
    /// Of 4 KiB.
    pub pages_4k: u64,
    /// Of 2 MiB.
    pub pages_2m: u64,
    /// Of 1 GiB.
    pub pages_1g: u64,
}

/// A figure that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum FiguresError {
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A figure is missing.
    #[error("{path} does not say {what}:\n{text}")]
    Missing {
        /// Where it was looked for.
        path: String,
        /// What.
        what: &'static str,
        /// What is there.
        text: String,
    },
}

/// A process's private memory.
pub fn rss_anon(host: &Host, pid: u32) -> Result<u64, FiguresError> {
    size_in(host, format!("/proc/{pid}/status"), "RssAnon")
}

/// The same without what is in transparent huge pages. Kernels before 6.7 put one beneath a thread's stack when it happens to
/// be aligned, of which the thread may use some kilobytes.
pub fn rss_anon_of_small_pages(host: &Host, pid: u32) -> Result<u64, FiguresError> {
    let huge = size_in(host, format!("/proc/{pid}/smaps_rollup"), "AnonHugePages")?;
    Ok(rss_anon(host, pid)?.saturating_sub(huge))
}

/// Bytes of a line `NAME:   N kB`.
fn size_in(host: &Host, path: String, name: &'static str) -> Result<u64, FiguresError> {
    let text = host.read_text(&path)?;
    let kib = text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(':')?
            .split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()
    });
    kib.map(|kib| kib * 1024).ok_or(FiguresError::Missing {
        path,
        what: name,
        text,
    })
}

/// Time on a processor that a process has used, in the kernel's ticks of a hundredth of a second.
pub fn cpu_ticks(host: &Host, pid: u32) -> Result<u64, FiguresError> {
    let path = format!("/proc/{pid}/stat");
    let text = host.read_text(&path)?;
    let (_, ticks) = stat_line(&text).ok_or(FiguresError::Missing {
        path,
        what: "the time on a processor",
        text: text.clone(),
    })?;
    Ok(ticks)
}

/// As [`cpu_ticks`], of a VMM's threads that are there now and run no guest: their names begin otherwise than with `vcpu`.
pub fn cpu_ticks_beside_vcpus(host: &Host, pid: u32) -> Result<u64, FiguresError> {
    // A thread that ends meanwhile is not there.
    let text = host.sh(&format!("cat /proc/{pid}/task/*/stat 2>/dev/null; true"))?;
    let threads = text.lines().filter_map(stat_line);
    let ticks = threads.filter(|(name, _)| !name.starts_with("vcpu"));
    Ok(ticks.map(|(_, ticks)| ticks).sum())
}

/// Name and ticks of a line of `stat` (proc(5): fields 2, 14 and 15). The name may have spaces and brackets in it.
fn stat_line(line: &str) -> Option<(&str, u64)> {
    let (before, after) = line.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let mut fields = after.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((name, user + system))
}

/// Exits from a guest.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Exits {
    /// All of them.
    pub exits: u64,
    /// For access to I/O ports that the VMM answers.
    pub io_exits: u64,
    /// For access to memory that the VMM answers.
    pub mmio_exits: u64,
}

/// How often a VMM's guest has been left, as KVM counts.
pub fn exits(host: &Host, pid: u32) -> Result<Exits, FiguresError> {
    match *kvm_counters(host, pid, &["exits", "io_exits", "mmio_exits"])?.as_slice() {
        [exits, io_exits, mmio_exits] => Ok(Exits {
            exits,
            io_exits,
            mmio_exits,
        }),
        _ => Err(missing("the numbers of exits", String::new())),
    }
}

fn missing(what: &'static str, text: String) -> FiguresError {
    FiguresError::Missing {
        path: KVM_COUNTERS.to_owned(),
        what,
        text,
    }
}

/// Named after the thread that made the VM.
const KVM_COUNTERS: &str = "/sys/kernel/debug/kvm/THREAD-*";

/// KVM's counters of a VMM's machine, in the order asked for.
fn kvm_counters(host: &Host, pid: u32, names: &[&str]) -> Result<Vec<u64>, FiguresError> {
    let files: Vec<String> = names.iter().map(|name| format!("$d/{name}")).collect();
    let script = format!(
        "for t in /proc/{pid}/task/*; do for d in /sys/kernel/debug/kvm/${{t##*/}}-*; do \
         if test -d $d; then cat {}; fi; done; done",
        files.join(" ")
    );
    let text = host.check(&["sh", "-c", &script])?;
    let numbers: Vec<u64> = text
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    if numbers.len() == names.len() {
        Ok(numbers)
    } else {
        Err(missing("the counters of one machine", text))
    }
}

/// How KVM maps the memory of a VMM's guest just now.
pub fn mapped_pages(host: &Host, pid: u32) -> Result<MappedPages, FiguresError> {
    match *kvm_counters(host, pid, &["pages_4k", "pages_2m", "pages_1g"])?.as_slice() {
        [small, huge, giant] => Ok(MappedPages {
            pages_4k: small,
            pages_2m: huge,
            pages_1g: giant,
        }),
        _ => Err(missing("the numbers of pages", String::new())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_name() {
        let line = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 30 12 0 0 20 0 1";
        assert_eq!(stat_line(line), Some(("a) b (c", 42)));
        assert_eq!(stat_line("7 (a) S 1 2"), None);
    }
}
