//! Figures of several VMMs, taken in turn, and how they are told: least, middle and greatest, and ratios within a round.

use std::path::PathBuf;

use comfy_table::Table;
use comfy_table::presets::ASCII_BORDERS_ONLY_CONDENSED;
use serde::Serialize;

use super::boot::{BenchError, MeasureError};
use super::peer::{Vmm, Workload};
use super::results::keep;
use super::statistics::Summary;
use crate::cli::Peer;
use crate::guest::{Guest, GuestSpec};
use crate::host::Host;
use crate::host::machine::Machine;
use crate::progress::step;
use crate::setup::Setup;
use crate::share::{ImageForm, Initramfs, initramfs_path, kernel_path};

/// RAM of the measured guests.
const MEMORY_MIB: u64 = 768;

/// One figure of one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// What was measured.
    pub name: &'static str,
    /// In what.
    pub unit: &'static str,
    /// How much.
    pub value: f64,
}

/// What a figure is divided by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Base {
    /// The first VMM's same figure.
    FirstVmm,
    /// The first figure of the same VMM.
    FirstFigure,
}

/// What is measured, and on what.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Name of the results.
    pub name: &'static str,
    /// VMMs beside daxhund.
    pub peers: &'a [Peer],
    /// How often each is measured.
    pub rounds: u32,
    /// What ratios are to.
    pub base: Base,
}

/// What is written as JSON.
#[derive(Debug, Serialize)]
struct Results {
    host_kernel: String,
    guest_kernel: String,
    memory_mib: u64,
    ratio_to: &'static str,
    vmms: Vec<VmmResults>,
}

#[derive(Debug, Serialize)]
struct VmmResults {
    name: String,
    figures: Vec<Series>,
}

#[derive(Debug, Serialize)]
struct Series {
    name: &'static str,
    unit: &'static str,
    summary: Summary,
    ratio: Summary,
    samples: Vec<f64>,
}

/// A host on which guests of several VMMs are measured.
#[derive(Debug)]
pub struct Bed {
    /// The host.
    pub host: Host,
    work: Workload,
}

impl Bed {
    /// Starts a guest with these devices, and waits for it. A terminal is what every VMM takes the console's input from.
    pub fn boot(&self, vmm: &Vmm, devices: &[&str]) -> Result<Guest, MeasureError> {
        let spec = vmm.spawn_spec_with(&self.work, devices);
        let mut guest = Guest::start(&self.host, spec)?;
        guest.wait_ready()?;
        Ok(guest)
    }
}

/// Boots a host, has `once` measure every VMM in every round, and tells the results; gives their path.
pub fn run(
    setup: &Setup,
    plan: &Plan<'_>,
    once: impl Fn(&Bed, &Vmm) -> Result<Vec<Figure>, MeasureError>,
) -> Result<PathBuf, BenchError> {
    let mut vmms = vec![Vmm::daxhund()];
    for peer in plan.peers {
        let vmm = Vmm::peer(peer, &setup.share())?;
        vmm.takes_devices()?;
        vmms.push(vmm);
    }
    let kernel = setup.kernel();
    let host = setup.boot(kernel, Machine::default())?;
    let dax = host.dax().first().ok_or(BenchError::NoDax)?;
    let work = Workload {
        kernel: kernel_path(&kernel.release, ImageForm::Elf),
        initramfs: initramfs_path(&kernel.release, Initramfs::Tools),
        cmdline: GuestSpec::new(&kernel.release, &[]).whole_cmdline(),
        dax: dax.path.clone(),
        memory_mib: MEMORY_MIB,
        devices: Vec::new(),
    };
    let bed = Bed { host, work };
    let mut samples: Vec<Vec<Vec<Figure>>> = vec![Vec::new(); vmms.len()];
    for round in 1..=plan.rounds {
        step(&format!("round {round} of {}", plan.rounds), || {
            for (vmm, samples) in vmms.iter().zip(&mut samples) {
                bed.host.forget_programs();
                let figures = once(&bed, vmm)
                    .map_err(|error| BenchError::measure(&vmm.name, &bed.host, error))?;
                samples.push(figures);
            }
            Ok::<(), BenchError>(())
        })?;
    }
    let results = Results {
        host_kernel: kernel.release.clone(),
        guest_kernel: kernel.release.clone(),
        memory_mib: MEMORY_MIB,
        ratio_to: match plan.base {
            Base::FirstVmm => "daxhund's figure of the same round",
            Base::FirstFigure => "the first figure of the same round",
        },
        vmms: summarise(&vmms, &samples, plan.base).ok_or(BenchError::NoSamples)?,
    };
    println!("{}", table(&results));
    keep(setup, plan.name, &results)
}

/// Samples are by VMM, round and figure.
fn summarise(vmms: &[Vmm], samples: &[Vec<Vec<Figure>>], base: Base) -> Option<Vec<VmmResults>> {
    let first_vmm = samples.first()?;
    let series = |rounds: &[Vec<Figure>], at: usize| {
        let of_round = |round: usize| {
            let figure = rounds.get(round)?.get(at)?;
            let base = match base {
                Base::FirstVmm => first_vmm.get(round)?.get(at)?,
                Base::FirstFigure => rounds.get(round)?.first()?,
            };
            Some((figure.value, figure.value / base.value))
        };
        let values = (0..rounds.len())
            .map(of_round)
            .collect::<Option<Vec<_>>>()?;
        let figure = rounds.first()?.get(at)?;
        Some(Series {
            name: figure.name,
            unit: figure.unit,
            summary: Summary::of(values.iter().map(|(value, _)| *value))?,
            ratio: Summary::of(values.iter().map(|(_, ratio)| *ratio))?,
            samples: values.iter().map(|(value, _)| *value).collect(),
        })
    };
    let of_vmm = |(vmm, rounds): (&Vmm, &Vec<Vec<Figure>>)| {
        let count = rounds.first()?.len();
        let figures = (0..count).map(|at| series(rounds, at));
        Some(VmmResults {
            name: vmm.name.clone(),
            figures: figures.collect::<Option<Vec<_>>>()?,
        })
    };
    vmms.iter().zip(samples).map(of_vmm).collect()
}

fn table(results: &Results) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_BORDERS_ONLY_CONDENSED);
    let ratio = format!("ratio to {}", results.ratio_to);
    table.set_header(["VMM", "figure", "min / median / max", &ratio]);
    let three = |summary: &Summary, digits: usize| {
        let Summary { min, median, max } = summary;
        format!("{min:.digits$} / {median:.digits$} / {max:.digits$}")
    };
    for vmm in &results.vmms {
        for series in &vmm.figures {
            table.add_row([
                vmm.name.clone(),
                format!("{}, {}", series.name, series.unit),
                three(&series.summary, 1),
                three(&series.ratio, 2),
            ]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(name: &'static str, value: f64) -> Figure {
        Figure {
            name,
            unit: "MiB/s",
            value,
        }
    }

    #[test]
    fn ratios_are_within_a_round_and_to_what_is_asked() {
        let vmms = [Vmm::daxhund(), Vmm::daxhund()];
        let own = vec![vec![figure("ram", 100.0), figure("pmem", 50.0)]];
        let peer = vec![vec![figure("ram", 200.0), figure("pmem", 20.0)]];
        let samples = [own, peer];
        let ratio = |base, figure: usize| {
            let results = summarise(&vmms, &samples, base).unwrap();
            results[1].figures[figure].ratio.median
        };
        assert!((ratio(Base::FirstVmm, 1) - 0.4).abs() < 1e-9);
        assert!((ratio(Base::FirstFigure, 1) - 0.1).abs() < 1e-9);
    }

    #[test]
    fn no_rounds_are_no_results() {
        assert!(summarise(&[Vmm::daxhund()], &[Vec::new()], Base::FirstVmm).is_none());
    }
}
