//! How long it takes until a device reaches guest memory, against the least that it takes.
//!
//! ```text
//!   one processor    attach   a guest of some GiB gets a device, and a second one │ the bare program gets one
//!                    launch   daxhund │ its peers, each with a device from the start
//!   two processors   parts    the bare program, by one thread │ by two
//! ```
//! The bare program (`lab-agent pin-bare`) opens, resets and maps, and nothing else. Contenders alternate within a round, and
//! who is first alternates between rounds; one unmeasured round comes first. All are an emulator's figures: only ratios count.

mod attach;
mod curve;
mod launch;
mod parts;

use std::path::PathBuf;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::ASCII_BORDERS_ONLY_CONDENSED;
use lab_agent::pin_protocol::Interface;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::boot::{self, BenchError, MeasureError};
use super::results::keep;
use super::statistics::{Summary, figure};
use crate::cli::{Peer, PinPart};
use crate::host::Host;
use crate::host::channel::HostError;
use crate::host::machine::{Contents, Dimm, Machine, PageArray};
use crate::progress::note;
use crate::setup::Setup;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The guest's, and as much again for the bare program at the same time, and what the host itself needs.
const HOST_MEMORY: u64 = 10 * GIB;
/// Each holds the largest guest.
const DIMM: u64 = 6 * GIB;
/// Pinning several GiB page by page, and filling them before, on a busy machine.
const DEADLINE: Duration = Duration::from_mins(5);
const NANOS_PER_SECOND: f64 = 1e9;

/// A kind of memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Memory {
    Dax,
    Hugetlb,
    Anonymous,
}

impl Memory {
    const ALL: [Self; 3] = [Self::Dax, Self::Hugetlb, Self::Anonymous];

    fn name(self) -> &'static str {
        match self {
            Self::Dax => "dax",
            Self::Hugetlb => "hugetlb",
            Self::Anonymous => "anonymous",
        }
    }

    /// As the bare program is told.
    fn word(self, dax: &str) -> &str {
        match self {
            Self::Dax => dax,
            Self::Hugetlb | Self::Anonymous => self.name(),
        }
    }

    /// Has the host set as many huge pages aside as `bytes` take; none when it is another kind.
    fn reserve(self, host: &Host, bytes: u64) -> Result<(), HostError> {
        let pages = if self == Self::Hugetlb {
            bytes / (2 * MIB)
        } else {
            0
        };
        host.set_hugepages(u32::try_from(pages).unwrap_or(u32::MAX))
    }
}

/// Figures of two contenders in the same rounds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Versus {
    first_seconds: Summary,
    second_seconds: Summary,
    /// The first's figure divided by the second's of the same round.
    ratio: Summary,
}

impl Versus {
    /// Of pairs in nanoseconds.
    fn of(pairs: &[(u64, u64)]) -> Option<Self> {
        Some(Self {
            first_seconds: seconds(pairs.iter().map(|pair| pair.0))?,
            second_seconds: seconds(pairs.iter().map(|pair| pair.1))?,
            ratio: Summary::of(pairs.iter().map(|(a, b)| figure(*a) / figure((*b).max(1))))?,
        })
    }
}

fn seconds(nanos: impl IntoIterator<Item = u64>) -> Option<Summary> {
    Summary::of(nanos.into_iter().map(|ns| figure(ns) / NANOS_PER_SECOND))
}

/// What is written as JSON.
#[derive(Debug, Serialize)]
struct Results {
    host_kernel: String,
    guest_kernel: String,
    attach: Vec<attach::Outcome>,
    second_device: Vec<attach::Growth>,
    launch: Vec<boot::Results>,
    parts: Vec<parts::Outcome>,
}

/// Runs the bench, or only some of it; gives the path of the results.
pub fn run(
    setup: &Setup,
    peers: &[Peer],
    only: &[PinPart],
    repeat: u32,
) -> Result<PathBuf, BenchError> {
    let is_wanted = |part| only.is_empty() || only.contains(&part);
    let kernel = setup.kernel();
    let mut attach = Vec::new();
    let mut launch = Vec::new();
    if is_wanted(PinPart::Attach) || is_wanted(PinPart::Launch) {
        let host = setup.boot(kernel, machine(1, HOST_MEMORY))?;
        if is_wanted(PinPart::Attach) {
            attach = attach::run(&host, &kernel.release, repeat)?;
            println!("{}", attach::table(&attach));
            println!("{}", attach::growth_table(&attach::growth(&attach)));
        }
        if is_wanted(PinPart::Launch) {
            launch = launch::run(setup, &host, peers, repeat)?;
        }
        for results in &launch {
            println!("{} MiB, a device from the start", results.memory_mib);
            println!("{}", boot::table(results));
        }
    }
    let mut parts = Vec::new();
    if is_wanted(PinPart::Parts) {
        let host = setup.boot(kernel, machine(2, parts::HOST_MEMORY))?;
        parts = parts::run(&host, repeat)?;
        println!("{}", parts::table(&parts));
    }

    let results = Results {
        host_kernel: kernel.release.clone(),
        guest_kernel: kernel.release.clone(),
        second_device: attach::growth(&attach),
        attach,
        launch,
        parts,
    };
    let path = keep(setup, &format!("pin-{}", kernel.name), &results)?;
    if !results.attach.is_empty() {
        let drawing = path.with_extension("svg");
        curve::draw(&drawing, &kernel.release, &results.attach)?;
        note(&format!("curve: {}", drawing.display()));
    }
    Ok(path)
}

/// Two modules: the guest's memory, and the bare program's.
fn machine(cpus: u32, memory_bytes: u64) -> Machine {
    let dimm = Dimm {
        size_bytes: DIMM,
        align_bytes: 2 * MIB,
        page_array: PageArray::Memory,
        contents: Contents::Fresh,
    };
    Machine {
        cpus,
        memory_bytes,
        dimms: vec![dimm.clone(), dimm],
        ..Machine::default()
    }
}

/// Those that the host's kernel has.
fn interfaces(host: &Host) -> Result<Vec<Interface>, HostError> {
    let mut interfaces = vec![Interface::Type1];
    if host.exists("/dev/iommu")? {
        interfaces.push(Interface::Iommufd);
    }
    Ok(interfaces)
}

/// Has the host's agent do something, and reads what it tells.
pub(super) fn tell<T: DeserializeOwned>(host: &Host, words: &[&str]) -> Result<T, MeasureError> {
    let argv: Vec<&str> = std::iter::once("lab-agent")
        .chain(words.iter().copied())
        .collect();
    let command = argv.join(" ");
    let output = host.run_within(&argv, DEADLINE)?.succeeded(&command)?;
    serde_json::from_str(&output.stdout).map_err(|source| MeasureError::Garbled {
        command,
        text: output.stdout,
        source,
    })
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_BORDERS_ONLY_CONDENSED);
    table.set_header(header);
    table
}

fn milliseconds(summary: &Summary) -> String {
    let [min, median, max] = [summary.min, summary.median, summary.max].map(|value| value * 1e3);
    format!("{min:.1} / {median:.1} / {max:.1}")
}

fn ratio(summary: &Summary) -> String {
    let Summary { min, median, max } = summary;
    format!("{min:.2} / {median:.2} / {max:.2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_within_a_round() {
        let versus = Versus::of(&[(100, 50), (300, 100)]).unwrap();
        assert!((versus.ratio.min - 2.0).abs() < 1e-9 && (versus.ratio.max - 3.0).abs() < 1e-9);
        assert!((versus.first_seconds.max - 3e-7).abs() < 1e-12);
        assert!(Versus::of(&[]).is_none());
    }

    #[test]
    fn the_bare_program_is_told_of_a_device_or_a_kind() {
        assert_eq!(Memory::Dax.word("/dev/dax1.0"), "/dev/dax1.0");
        assert_eq!(Memory::Hugetlb.word("/dev/dax1.0"), "hugetlb");
    }
}
