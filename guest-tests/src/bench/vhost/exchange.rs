//! A disk of each daemon comes to a guest that runs, and goes, with more and more memory in the table that the daemon is given.
//!
//! The VMM tells how long the daemon took for the table (`ADD_MEM_REG` for each region, each acknowledged); the whole request is
//! as its client saw it. A guest of more than 3 GiB has two regions: one below the hole for devices, one above 4 GiB.

use comfy_table::Table;
use lab_agent::pin_protocol::RestCall;
use serde::Serialize;

use super::{Bed, new_table, three};
use crate::bench::boot::{BenchError, MeasureError};
use crate::bench::pin;
use crate::bench::statistics::{Summary, figure};
use crate::guest::{Guest, GuestSpec};
use crate::progress::step;

const SIZES_GIB: [u64; 3] = [1, 2, 4];
const SOCKET: &str = "/tmp/bench-api.sock";
/// For a guest to give a disk up.
const DETACH_SECONDS: &str = "120";
/// What daxhund's log says when a backend has the memory, and how it tells the time.
const SHARED: &str = "a vhost-user backend has more memory";
const MEMORY_FIELD: &str = "elapsed_us=";
const REGIONS_FIELD: &str = "regions=";

/// Whose disk it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Server {
    Dax,
    StorageDaemon,
}

impl Server {
    const ALL: [Self; 2] = [Self::Dax, Self::StorageDaemon];

    fn name(self) -> &'static str {
        match self {
            Self::Dax => "daxhund-vhost-user-blk",
            Self::StorageDaemon => "qemu-storage-daemon",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Sample {
    /// The request.
    whole_us: f64,
    /// Of which the daemon took for the memory.
    memory_us: f64,
}

/// All rounds of a size.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    server: Server,
    gib: u64,
    regions: u64,
    whole_us: Summary,
    memory_us: Summary,
    /// For a GiB.
    memory_us_per_gib: Summary,
    /// Divided by that of the smallest guest in the same round.
    memory_ratio: Summary,
    samples: Vec<Sample>,
}

/// Measures all sizes.
pub(super) fn run(bed: &Bed<'_>, release: &str, repeat: u32) -> Result<Vec<Outcome>, BenchError> {
    let failed = |error| BenchError::measure("daxhund", bed.host, error);
    let mut outcomes: Vec<Outcome> = Vec::new();
    for gib in SIZES_GIB {
        bed.host.forget_programs();
        let what = format!("disks come to a guest of {gib} GiB");
        let measured = step(&what, || measure(bed, release, gib, repeat)).map_err(failed)?;
        for (server, (regions, samples)) in Server::ALL.into_iter().zip(measured) {
            let least = outcomes
                .iter()
                .find(|outcome| outcome.server == server)
                .map_or(&samples, |outcome| &outcome.samples);
            let outcome = summarise(server, gib, regions, samples.clone(), least);
            outcomes.push(outcome.ok_or(BenchError::NoSamples)?);
        }
    }
    Ok(outcomes)
}

/// For each daemon: the number of regions, and samples without the first, unmeasured one.
fn measure(
    bed: &Bed<'_>,
    release: &str,
    gib: u64,
    repeat: u32,
) -> Result<[(u64, Vec<Sample>); 2], MeasureError> {
    // The last guest was killed, so it has left its socket.
    bed.host.check(&["rm", "-f", SOCKET])?;
    let zone = format!("id=z0,size={gib}G,file={}", bed.work.dax);
    let words = ["-v", "--api-socket", SOCKET, "--memory-zone", &zone];
    let mut guest = Guest::boot(bed.host, &GuestSpec::new(release, &words))?;
    let mut whole = Vec::new();
    for _ in 0..=repeat {
        for server in Server::ALL {
            let socket = match server {
                Server::Dax => &bed.daemons.dax.socket,
                Server::StorageDaemon => &bed.daemons.storage.socket,
            };
            let call: RestCall = pin::tell(bed.host, &["attach-disk", SOCKET, socket, "d0"])?;
            whole.push(figure(call.took_ns) / 1e3);
            pin::tell::<RestCall>(bed.host, &["detach", SOCKET, "d0", DETACH_SECONDS])?;
        }
    }
    guest.vmm().signal(libc::SIGKILL)?;
    guest.wait_end()?;
    let log = guest.vmm().stderr();
    let told = told(&log);
    if told.len() != whole.len() {
        return Err(MeasureError::Maps {
            found: told.len(),
            expected: whole.len(),
            text: log,
        });
    }
    let mut measured = [(0, Vec::new()), (0, Vec::new())];
    for (n, (whole_us, (regions, memory_us))) in whole.into_iter().zip(told).enumerate() {
        if n < Server::ALL.len() {
            continue;
        }
        let (of, samples) = &mut measured[n % Server::ALL.len()];
        *of = regions;
        samples.push(Sample {
            whole_us,
            memory_us: figure(memory_us),
        });
    }
    Ok(measured)
}

/// Regions and microseconds, in the order of the log.
fn told(log: &str) -> Vec<(u64, u64)> {
    let field = |line: &str, name: &str| {
        let (_, after) = line.split_once(name)?;
        after.split_whitespace().next()?.parse::<u64>().ok()
    };
    let lines = log.lines().filter(|line| line.contains(SHARED));
    lines
        .filter_map(|line| Some((field(line, REGIONS_FIELD)?, field(line, MEMORY_FIELD)?)))
        .collect()
}

fn summarise(
    server: Server,
    gib: u64,
    regions: u64,
    samples: Vec<Sample>,
    least: &[Sample],
) -> Option<Outcome> {
    let of = |part: fn(&Sample) -> f64| Summary::of(samples.iter().map(part));
    let pairs = samples.iter().zip(least);
    Some(Outcome {
        server,
        gib,
        regions,
        whole_us: of(|sample| sample.whole_us)?,
        memory_us: of(|sample| sample.memory_us)?,
        memory_us_per_gib: Summary::of(samples.iter().map(|s| s.memory_us / figure(gib)))?,
        memory_ratio: Summary::of(pairs.map(|(sample, least)| sample.memory_us / least.memory_us))?,
        samples,
    })
}

pub(super) fn table(outcomes: &[Outcome]) -> Table {
    let mut table = new_table(&[
        "a disk comes (min / median / max)",
        "regions",
        "the memory table, us",
        "a GiB, us",
        "to the least guest's",
        "the whole request, ms",
    ]);
    for outcome in outcomes {
        let whole = Summary {
            min: outcome.whole_us.min / 1e3,
            median: outcome.whole_us.median / 1e3,
            max: outcome.whole_us.max / 1e3,
        };
        table.add_row([
            format!("{} GiB, {}", outcome.gib, outcome.server.name()),
            outcome.regions.to_string(),
            three(&outcome.memory_us, 0),
            three(&outcome.memory_us_per_gib, 0),
            three(&outcome.memory_ratio, 2),
            three(&whole, 1),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_regions_and_time() {
        let log = "INFO a vhost-user backend has more memory device=\"d0\" regions=2 elapsed_us=431\nINFO other\n";
        assert_eq!(told(log), [(2, 431)]);
    }

    #[test]
    fn ratios_are_to_the_smallest_guest_in_the_same_round() {
        let sample = |memory_us| Sample {
            whole_us: 5000.0,
            memory_us,
        };
        let least = [sample(100.0), sample(200.0)];
        let samples = vec![sample(200.0), sample(200.0)];
        let outcome = summarise(Server::Dax, 2, 1, samples, &least).unwrap();
        assert!((outcome.memory_ratio.median - 1.5).abs() < 1e-9);
        assert!((outcome.memory_us_per_gib.max - 100.0).abs() < 1e-9);
    }
}
