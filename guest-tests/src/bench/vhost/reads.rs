//! What a guest gets of each disk, and what it costs the disk's server.

use comfy_table::Table;
use lab_agent::guest_protocol::RateReport;
use serde::Serialize;

use super::{Bed, MIB, MODULES, new_table, three};
use crate::bench::boot::{BenchError, MeasureError};
use crate::bench::peer::{DiskWord, Vmm};
use crate::bench::statistics::{Summary, figure};
use crate::guest::{Guest, LEAVE_DEADLINE};
use crate::host::figures::{cpu_ticks, cpu_ticks_beside_vcpus};
use crate::progress::step;

/// For each load on each disk in a round.
const SECONDS: u64 = 4;
/// Before it, unmeasured: caches, and the emulator's translations.
const WARM_UP_SECONDS: u64 = 1;
/// The kernel tells processor time in ticks of so much.
const MICROS_PER_TICK: u64 = 10_000;
const PIECE_BYTES: u64 = 128 << 10;

/// Who serves a disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Server {
    /// `daxhund-vhost-user-blk`, on device-dax.
    Dax,
    /// `qemu-storage-daemon`, on a file. What the others are compared with.
    StorageDaemon,
    /// The VMM itself, on a file.
    Vmm,
}

impl Server {
    fn name(self) -> &'static str {
        match self {
            Self::Dax => "daxhund-vhost-user-blk on DAX",
            Self::StorageDaemon => "qemu-storage-daemon on tmpfs",
            Self::Vmm => "the VMM on tmpfs",
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Load {
    Random { depth: u64 },
    Sequential { depth: u64 },
}

impl Load {
    const ALL: [Self; 3] = [
        Self::Random { depth: 1 },
        Self::Random { depth: 16 },
        Self::Sequential { depth: 4 },
    ];

    fn name(self) -> String {
        match self {
            Self::Random { depth } => format!("4K random reads, {depth} at once"),
            Self::Sequential { depth } => format!("128K sequential reads, {depth} at once"),
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Random { .. } => "1/s",
            Self::Sequential { .. } => "MiB/s",
        }
    }

    fn run(self, guest: &mut Guest, disk: &str, seconds: u64) -> Result<RateReport, MeasureError> {
        Ok(match self {
            Self::Random { depth } => guest.random_reads(disk, seconds, depth)?,
            Self::Sequential { depth } => {
                guest.sequential_reads(disk, seconds, depth, PIECE_BYTES)?
            }
        })
    }

    fn rate(self, report: &RateReport) -> f64 {
        let amount = match self {
            Self::Random { .. } => figure(report.operations),
            Self::Sequential { .. } => figure(report.bytes) / figure(MIB),
        };
        amount / report.seconds
    }
}

/// One disk in one round under one load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Sample {
    rate: f64,
    /// The server's time on a processor for a request, in microseconds.
    cpu_us: f64,
}

/// All rounds of one disk of one VMM under one load.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    vmm: String,
    server: Server,
    load: String,
    unit: &'static str,
    rate: Summary,
    /// Divided by that of the storage daemon's disk in the same guest.
    rate_ratio: Summary,
    cpu_us_per_request: Summary,
    cpu_ratio: Summary,
    samples: Vec<Sample>,
}

/// Rounds of samples of each load and each disk.
type Table3 = Vec<Vec<Vec<Sample>>>;

/// Measures every VMM in every round.
pub(super) fn run(bed: &Bed<'_>, vmms: &[Vmm], repeat: u32) -> Result<Vec<Outcome>, BenchError> {
    let mut rounds: Vec<Table3> = vec![Vec::new(); vmms.len()];
    for round in 1..=repeat {
        step(&format!("reads, round {round} of {repeat}"), || {
            for (vmm, rounds) in vmms.iter().zip(&mut rounds) {
                bed.host.forget_programs();
                let samples = once(bed, vmm, round % 2 == 0)
                    .map_err(|error| BenchError::measure(&vmm.name, bed.host, error))?;
                rounds.push(samples);
            }
            Ok::<(), BenchError>(())
        })?;
    }
    let outcomes = vmms.iter().zip(&rounds).map(|(vmm, rounds)| {
        let servers = servers(vmm);
        summarise(&vmm.name, &servers, rounds)
    });
    let outcomes = outcomes.collect::<Option<Vec<_>>>();
    let outcomes = outcomes.ok_or(BenchError::NoSamples)?;
    Ok(outcomes.into_iter().flatten().collect())
}

/// What a VMM's guest has, in the order of its disks. Processor time of a peer's own disk can't be told from its guest's.
fn servers(vmm: &Vmm) -> Vec<Server> {
    let mut servers = vec![Server::Dax, Server::StorageDaemon];
    if vmm.name == Vmm::daxhund().name {
        servers.push(Server::Vmm);
    }
    servers
}

/// Boots a guest with all the disks; gives samples by load and disk.
fn once(bed: &Bed<'_>, vmm: &Vmm, backwards: bool) -> Result<Vec<Vec<Sample>>, MeasureError> {
    let servers = servers(vmm);
    let daemons = &bed.daemons;
    let word = |server: &Server| match server {
        Server::Dax => DiskWord::Served(daemons.dax.socket.clone()),
        Server::StorageDaemon => DiskWord::Served(daemons.storage.socket.clone()),
        Server::Vmm => DiskWord::File(daemons.file.clone()),
    };
    let words: Vec<_> = servers.iter().map(word).collect();
    let mut guest = Guest::start(bed.host, vmm.spawn_spec_with_disks(&bed.work, &words))?;
    guest.wait_ready()?;
    guest.modprobe(&MODULES)?;
    let disks = ["/dev/vda", "/dev/vdb", "/dev/vdc"];
    guest.await_path(disks[servers.len() - 1])?;
    super::frontends::is_the_dax_disk(&mut guest)?;
    let pid = guest.vmm().pid();
    let ticks = |server| match server {
        Server::Dax => cpu_ticks(bed.host, daemons.dax.process.pid()),
        Server::StorageDaemon => cpu_ticks(bed.host, daemons.storage.process.pid()),
        Server::Vmm => cpu_ticks_beside_vcpus(bed.host, pid),
    };
    let mut samples = Vec::new();
    for load in Load::ALL {
        let mut of_load = Vec::new();
        let mut order: Vec<_> = servers.iter().zip(disks).collect();
        if backwards {
            order.reverse();
        }
        for (server, disk) in order {
            load.run(&mut guest, disk, WARM_UP_SECONDS)?;
            let before = ticks(*server)?;
            let report = load.run(&mut guest, disk, SECONDS)?;
            let spent = ticks(*server)?.saturating_sub(before) * MICROS_PER_TICK;
            of_load.push(Sample {
                rate: load.rate(&report),
                cpu_us: figure(spent) / figure(report.operations.max(1)),
            });
        }
        if backwards {
            of_load.reverse();
        }
        samples.push(of_load);
    }
    guest.vmm().signal(libc::SIGKILL)?;
    guest.vmm().wait(LEAVE_DEADLINE)?;
    Ok(samples)
}

/// One outcome for each load and server.
fn summarise(vmm: &str, servers: &[Server], rounds: &Table3) -> Option<Vec<Outcome>> {
    let base = servers
        .iter()
        .position(|server| *server == Server::StorageDaemon)?;
    let mut outcomes = Vec::new();
    for (l, load) in Load::ALL.iter().enumerate() {
        for (s, server) in servers.iter().enumerate() {
            let of = |s: usize| {
                let of_round = |round: &Vec<Vec<Sample>>| round.get(l)?.get(s).copied();
                rounds.iter().map(of_round).collect::<Option<Vec<_>>>()
            };
            let (samples, base) = (of(s)?, of(base)?);
            let figures = |part: fn(&Sample) -> f64| Summary::of(samples.iter().map(part));
            let ratio = |part: fn(&Sample) -> f64| {
                let pairs = samples.iter().zip(&base);
                Summary::of(pairs.map(|(sample, base)| part(sample) / part(base)))
            };
            outcomes.push(Outcome {
                vmm: vmm.to_owned(),
                server: *server,
                load: load.name(),
                unit: load.unit(),
                rate: figures(|sample| sample.rate)?,
                rate_ratio: ratio(|sample| sample.rate)?,
                cpu_us_per_request: figures(|sample| sample.cpu_us)?,
                cpu_ratio: ratio(|sample| sample.cpu_us)?,
                samples,
            });
        }
    }
    Some(outcomes)
}

pub(super) fn table(outcomes: &[Outcome]) -> Table {
    let mut table = new_table(&[
        "VMM: load (min / median / max)",
        "served by",
        "a second",
        "to the storage daemon's",
        "server's CPU, us a request",
        "to the storage daemon's",
    ]);
    for outcome in outcomes {
        table.add_row([
            format!("{}: {}, {}", outcome.vmm, outcome.load, outcome.unit),
            outcome.server.name().to_owned(),
            three(&outcome.rate, 1),
            three(&outcome.rate_ratio, 2),
            three(&outcome.cpu_us_per_request, 1),
            three(&outcome.cpu_ratio, 2),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_to_the_storage_daemon_in_the_same_round() {
        let servers = servers(&Vmm::daxhund());
        assert_eq!(servers.len(), 3);
        let sample = |rate, cpu_us| Sample { rate, cpu_us };
        let round = |faster| {
            let of_load = || {
                vec![
                    sample(100.0 * faster, 5.0),
                    sample(100.0, 10.0),
                    sample(50.0, 20.0),
                ]
            };
            Load::ALL.iter().map(|_| of_load()).collect::<Vec<_>>()
        };
        let outcomes = summarise("daxhund", &servers, &vec![round(2.0), round(4.0)]).unwrap();
        assert_eq!(outcomes.len(), 9);
        let dax = &outcomes[0];
        assert!((dax.rate_ratio.median - 3.0).abs() < 1e-9);
        assert!((dax.cpu_ratio.max - 0.5).abs() < 1e-9);
        let table = table(&outcomes).to_string();
        assert!(table.contains("2.00 / 3.00 / 4.00"), "{table}");
        assert!(summarise("daxhund", &servers, &Vec::new()).is_none());
    }
}
