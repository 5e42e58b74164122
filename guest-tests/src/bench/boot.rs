//! Boots a guest on device-dax memory again and again and measures it; with peers, in turn on the same host. Beside them a bare
//! program does what no start can do without (`lab-agent boot-bare`).
//!
//! One unmeasured round comes first: it fills the host's cache of the share. The figures are an emulator's: the
//! ratios between VMMs in one run are what counts, and the absolute times only compare runs on one machine.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::ASCII_BORDERS_ONLY_CONDENSED;
use lab_agent::host_protocol::SpawnSpec;
use serde::Serialize;

use super::peer::{PeerError, Vmm, Workload};
use super::removal::watcher::WatchError;
use super::results::keep;
use super::statistics::{Summary, figure};
use super::trace::{BootTimes, TraceError, Tracer};
use crate::cli::Peer;
use crate::guest::{Guest, GuestError, GuestSpec};
use crate::host::channel::HostError;
use crate::host::figures::{FiguresError, MappedPages, mapped_pages, rss_anon};
use crate::host::machine::Machine;
use crate::host::{Host, RUN_DEADLINE};
use crate::progress::step;
use crate::setup::{Setup, StartError};
use crate::share::{ImageForm, Initramfs, initramfs_path, kernel_path};

/// Memory of the measured guests.
const MEMORY_MIB: u64 = 1024;
const MICROS_PER_SECOND: f64 = 1e6;

/// What one boot costs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BootCost {
    /// From the start of the VMM to the guest's first instruction.
    pub first_instruction_us: u64,
    /// From the start of the VMM to the guest's user space.
    pub user_space_us: u64,
    /// The VMM's private memory when the guest is up.
    pub rss_anon_bytes: u64,
    /// How KVM maps the guest's memory then.
    #[serde(flatten)]
    pub mapped: MappedPages,
}

/// A bench that could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// No host.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A peer.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The guest.
    #[error("{vmm} could not be measured\n{evidence}")]
    Measure {
        /// The VMM.
        vmm: String,
        /// Console and program output.
        evidence: String,
        /// What failed.
        source: MeasureError,
    },
    /// No DAX device.
    #[error("the emulated host has no device-dax device")]
    NoDax,
    /// A case that is not there.
    #[error("no case has `{asked}` in its name; there are: {cases}")]
    NoCase {
        /// What was asked for.
        asked: String,
        /// What there is.
        cases: String,
    },
    /// Nothing to summarise.
    #[error("nothing was measured: --repeat is 0")]
    NoSamples,
    /// The results cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The curve cannot be drawn.
    #[error("cannot draw {path}")]
    Draw {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl BenchError {
    /// A VMM could not be measured on a host, which tells what it knows.
    pub(super) fn measure(vmm: &str, host: &Host, source: MeasureError) -> Self {
        Self::Measure {
            vmm: vmm.to_owned(),
            evidence: host.evidence(),
            source,
        }
    }
}

/// A boot that could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The VMM's figures.
    #[error(transparent)]
    Figures(#[from] FiguresError),
    /// Memory could not be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The host's agent tells no figures.
    #[error("`{command}` tells no figures: {text}")]
    Garbled {
        /// What was run.
        command: String,
        /// What it printed.
        text: String,
        /// Why it cannot be read.
        source: serde_json::Error,
    },
    /// The VMM has not said, or not done, what it should.
    #[error("{what}: not within {} s", within.as_secs())]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long.
        within: Duration,
    },
    /// A guest has other data or another disk than it should.
    #[error("{what}: {found}")]
    Wrong {
        /// What should be so.
        what: &'static str,
        /// What is.
        found: String,
    },
    /// The VMM did not tell every map.
    #[error("the VMM told of {found} maps of guest memory, there were {expected}:\n{text}")]
    Maps {
        /// How often its log says so.
        found: usize,
        /// How often guest memory was mapped.
        expected: usize,
        /// Its log.
        text: String,
    },
}

/// What is written as JSON.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    host_kernel: String,
    guest_kernel: String,
    pub(super) memory_mib: u64,
    vmms: Vec<VmmResults>,
    /// The least a start takes, where no devices are passed through.
    bare: Option<BareResults>,
}

/// The bare program's time to its guest's first instruction.
#[derive(Debug, Serialize)]
struct BareResults {
    first_instruction_seconds: Summary,
    /// Divided by daxhund's in the same round.
    first_instruction_ratio: Summary,
    samples_us: Vec<u64>,
}

#[derive(Debug, Serialize)]
struct VmmResults {
    name: String,
    first_instruction_seconds: Summary,
    user_space_seconds: Summary,
    rss_anon_bytes: Summary,
    /// This VMM's time in a round divided by daxhund's in the same round.
    first_instruction_ratio: Summary,
    user_space_ratio: Summary,
    samples: Vec<BootCost>,
}

/// Starts a VMM, waits for its guest, and gives both the guest and what its boot cost.
pub fn measure(
    tracer: &Tracer<'_>,
    start: impl FnOnce(&Host) -> Result<Guest, GuestError>,
) -> Result<(Guest, BootCost), MeasureError> {
    let host = tracer.host();
    tracer.start()?;
    let mut guest = start(host)?;
    guest.wait_ready()?;
    let pid = guest.vmm().pid();
    let rss_anon_bytes = rss_anon(host, pid)?;
    let mapped = mapped_pages(host, pid)?;
    let BootTimes {
        first_instruction,
        user_space,
    } = tracer.finish(pid)?;
    let cost = BootCost {
        first_instruction_us: micros(first_instruction),
        user_space_us: micros(user_space),
        rss_anon_bytes,
        mapped,
    };
    Ok((guest, cost))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Runs the bench; gives the path of the results.
pub fn run(setup: &Setup, peers: &[Peer], repeat: u32) -> Result<PathBuf, BenchError> {
    let mut vmms = vec![Vmm::daxhund()];
    for peer in peers {
        vmms.push(Vmm::peer(peer, &setup.share())?);
    }
    let kernel = setup.kernel();
    let host = setup.boot(kernel, Machine::default())?;
    let dax = host.dax().first().ok_or(BenchError::NoDax)?;
    let tracer = Tracer::prepare(&host)
        .map_err(|error| BenchError::measure("nothing yet", &host, error.into()))?;
    let work = Workload {
        kernel: kernel_path(&kernel.release, ImageForm::BzImage),
        initramfs: initramfs_path(&kernel.release, Initramfs::Plain),
        cmdline: GuestSpec::new(&kernel.release, &[]).whole_cmdline(),
        dax: dax.path.clone(),
        memory_mib: MEMORY_MIB,
        devices: Vec::new(),
    };
    let results = compare(&tracer, &kernel.release, &vmms, &work, repeat)?;
    println!("{}", table(&results));
    keep(setup, "boot", &results)
}

/// Boots the same guest by every VMM in turn.
pub(super) fn compare(
    tracer: &Tracer<'_>,
    release: &str,
    vmms: &[Vmm],
    work: &Workload,
    repeat: u32,
) -> Result<Results, BenchError> {
    fix_addresses(tracer.host())
        .map_err(|error| BenchError::measure("nothing yet", tracer.host(), error.into()))?;
    let mut samples: Vec<Vec<BootCost>> = vec![Vec::new(); vmms.len()];
    let mut bare = Vec::new();
    for round in 0..=repeat {
        let what = if round == 0 {
            "warming up".to_owned()
        } else {
            format!("round {round} of {repeat}")
        };
        step(&what, || {
            for (vmm, samples) in vmms.iter().zip(&mut samples) {
                let cost = boot_once(tracer, vmm, work)?;
                if round > 0 {
                    samples.push(cost);
                }
            }
            if work.devices.is_empty() {
                let micros = start_bare(tracer, work)?;
                if round > 0 {
                    bare.push(micros);
                }
            }
            Ok::<(), BenchError>(())
        })?;
    }
    summarise(release, vmms, work.memory_mib, samples, &bare).ok_or(BenchError::NoSamples)
}

/// Starts a guest with the bare program; gives the microseconds to its first instruction.
fn start_bare(tracer: &Tracer<'_>, work: &Workload) -> Result<u64, BenchError> {
    let host = tracer.host();
    host.forget_programs();
    let start = || -> Result<u64, MeasureError> {
        scrub(host, work)?;
        tracer.start()?;
        let bytes = work.memory_bytes().to_string();
        let words = [
            "lab-agent",
            "boot-bare",
            &work.kernel,
            &work.initramfs,
            &work.dax,
            &bytes,
        ];
        let spec = SpawnSpec {
            argv: words.map(str::to_owned).into(),
            ..SpawnSpec::default()
        };
        let program = host.spawn(spec)?;
        let pid = program.pid();
        let output = program.finish(RUN_DEADLINE)?;
        output.succeeded(&words.join(" "))?;
        Ok(micros(tracer.finish_early(pid)?))
    };
    start().map_err(|error| BenchError::measure("the bare program", host, error))
}

fn boot_once(tracer: &Tracer<'_>, vmm: &Vmm, work: &Workload) -> Result<BootCost, BenchError> {
    let host = tracer.host();
    host.forget_programs();
    let failed = |error| BenchError::measure(&vmm.name, host, error);
    scrub(host, work).map_err(|error| failed(error.into()))?;
    let outcome = measure(tracer, |host| Guest::start(host, vmm.spawn_spec(work)));
    let outcome = outcome.and_then(|(mut guest, cost)| {
        // Not every VMM takes console input from a pipe, so the guest is not asked.
        guest.vmm().signal(libc::SIGKILL)?;
        guest.wait_end()?;
        Ok(cost)
    });
    outcome.map_err(failed)
}

/// Has every process of the host loaded where the last one of its program was. The emulator finds its translations by
/// address: with random ones it translates each program anew at each start, which took five times as long as running it,
/// and the bench compared how much code there is to translate.
fn fix_addresses(host: &Host) -> Result<(), HostError> {
    host.write_file("/proc/sys/kernel/randomize_va_space", b"0")
}

/// Clears the guest's memory. The emulator keeps translations of the code that the last guest ran there, and every
/// store over such code is slow: without this the next VMM would pay for it while it loads its kernel.
fn scrub(host: &Host, work: &Workload) -> Result<(), HostError> {
    let bytes = work.memory_bytes().to_string();
    host.check(&["lab-agent", "scrub", &work.dax, &bytes])
        .map(|_| ())
}

fn summarise(
    release: &str,
    vmms: &[Vmm],
    memory_mib: u64,
    samples: Vec<Vec<BootCost>>,
    bare: &[u64],
) -> Option<Results> {
    let own = samples.first()?.clone();
    let in_seconds = |micros: u64| figure(micros) / MICROS_PER_SECOND;
    let ratios = bare.iter().zip(&own);
    let ratios = ratios.map(|(bare, own)| figure(*bare) / figure(own.first_instruction_us));
    let bare = Summary::of(ratios).and_then(|first_instruction_ratio| {
        Some(BareResults {
            first_instruction_seconds: Summary::of(bare.iter().map(|bare| in_seconds(*bare)))?,
            first_instruction_ratio,
            samples_us: bare.to_vec(),
        })
    });
    let summarise_one = |(vmm, samples): (&Vmm, Vec<BootCost>)| {
        let of = |part: fn(&BootCost) -> u64| {
            Summary::of(samples.iter().map(|cost| in_seconds(part(cost))))
        };
        let ratio = |part: fn(&BootCost) -> u64| {
            let pairs = samples.iter().zip(&own);
            Summary::of(pairs.map(|(cost, own)| figure(part(cost)) / figure(part(own))))
        };
        Some(VmmResults {
            name: vmm.name.clone(),
            first_instruction_seconds: of(|cost| cost.first_instruction_us)?,
            user_space_seconds: of(|cost| cost.user_space_us)?,
            rss_anon_bytes: Summary::of(samples.iter().map(|cost| figure(cost.rss_anon_bytes)))?,
            first_instruction_ratio: ratio(|cost| cost.first_instruction_us)?,
            user_space_ratio: ratio(|cost| cost.user_space_us)?,
            samples,
        })
    };
    let vmms = vmms
        .iter()
        .zip(samples)
        .map(summarise_one)
        .collect::<Option<Vec<_>>>()?;
    let release = release.to_owned();
    Some(Results {
        host_kernel: release.clone(),
        guest_kernel: release,
        memory_mib,
        vmms,
        bare,
    })
}

pub(super) fn table(results: &Results) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_BORDERS_ONLY_CONDENSED);
    table.set_header([
        "VMM (min / median / max)",
        "first instruction, ms",
        "ratio",
        "user space, s",
        "ratio",
        "private memory, MiB",
    ]);
    let three = |summary: &Summary, scale: f64, digits: usize| {
        let [min, median, max] =
            [summary.min, summary.median, summary.max].map(|value| value * scale);
        format!("{min:.digits$} / {median:.digits$} / {max:.digits$}")
    };
    for vmm in &results.vmms {
        table.add_row([
            vmm.name.clone(),
            three(&vmm.first_instruction_seconds, 1e3, 1),
            three(&vmm.first_instruction_ratio, 1.0, 2),
            three(&vmm.user_space_seconds, 1.0, 2),
            three(&vmm.user_space_ratio, 1.0, 2),
            three(&vmm.rss_anon_bytes, 1.0 / f64::from(1 << 20), 2),
        ]);
    }
    if let Some(bare) = &results.bare {
        table.add_row([
            "the least it takes".to_owned(),
            three(&bare.first_instruction_seconds, 1e3, 1),
            three(&bare.first_instruction_ratio, 1.0, 2),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_a_round() {
        let cost = |first_instruction_us| BootCost {
            first_instruction_us,
            user_space_us: 10,
            rss_anon_bytes: 1 << 20,
            mapped: MappedPages::default(),
        };
        let samples = vec![vec![cost(100), cost(200)], vec![cost(300), cost(400)]];
        let results = summarise(
            "6.1",
            &[Vmm::daxhund(), Vmm::daxhund()],
            1024,
            samples,
            &[50, 100],
        )
        .unwrap();
        let ratio = results.vmms[1].first_instruction_ratio;
        assert_eq!(
            ratio,
            Summary {
                min: 2.0,
                median: 2.5,
                max: 3.0
            }
        );
        let table = table(&results).to_string();
        assert!(table.contains("2.00 / 2.50 / 3.00"));
        assert!(table.contains("0.50 / 0.50 / 0.50"), "{table}");
    }

    #[test]
    fn nothing_measured_is_no_result() {
        assert!(summarise("6.1", &[Vmm::daxhund()], 1024, vec![Vec::new()], &[]).is_none());
    }
}
