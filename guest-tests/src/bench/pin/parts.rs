//! Whether two threads map memory faster than one, on a host with two processors. No guest runs there.

use comfy_table::Table;
use lab_agent::pin_protocol::{BareAttach, Interface};
use serde::Serialize;

use super::{GIB, Memory, Versus, interfaces, milliseconds, new_table, ratio, tell};
use crate::bench::boot::{BenchError, MeasureError};
use crate::host::Host;
use crate::host::cards::Card;
use crate::progress::step;

/// Only the bare program's memory is ordinary memory.
pub(super) const HOST_MEMORY: u64 = 4 * GIB;
const REGIONS: u64 = 8;
const THREADS: u32 = 2;

/// All rounds of one kind of memory by one interface.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    memory: Memory,
    gib: u64,
    interface: Interface,
    regions: u64,
    threads: u32,
    /// Several threads against one: below one, they gain.
    map: Versus,
    /// Nanoseconds, by several threads and by one.
    samples: Vec<(u64, u64)>,
}

/// Measures each kind by each interface.
pub(super) fn run(host: &Host, repeat: u32) -> Result<Vec<Outcome>, BenchError> {
    let failed = |error| BenchError::measure("the bare program", host, error);
    let dax = host.dax().first().ok_or(BenchError::NoDax)?;
    let device = host
        .bind_vfio(Card::Disk)
        .map_err(|error| failed(error.into()))?;
    let mut outcomes = Vec::new();
    for interface in interfaces(host).map_err(|error| failed(error.into()))? {
        for memory in Memory::ALL {
            let gib = gib(memory);
            let (bytes, regions) = ((gib * GIB).to_string(), REGIONS.to_string());
            let map = |threads: u32| -> Result<u64, MeasureError> {
                let (path, by) = (device.path(), interface.word());
                let (word, threads) = (memory.word(&dax.path), threads.to_string());
                let words = ["pin-parts", &path, word, &bytes, by, &regions, &threads];
                Ok(tell::<BareAttach>(host, &words)?.map_ns)
            };
            let measure = || {
                memory.reserve(host, gib * GIB)?;
                let mut samples = Vec::new();
                for round in 0..=repeat {
                    samples.push(if round % 2 == 0 {
                        let many = map(THREADS)?;
                        (many, map(1)?)
                    } else {
                        let one = map(1)?;
                        (map(THREADS)?, one)
                    });
                }
                memory.reserve(host, 0)?;
                // The first is the unmeasured one.
                Ok(samples.split_off(1))
            };
            let name = memory.name();
            let what = format!("{gib} GiB of {name} in parts, {}", interface.word());
            let samples = step(&what, measure).map_err(failed)?;
            outcomes.push(Outcome {
                memory,
                gib,
                interface,
                regions: REGIONS,
                threads: THREADS,
                map: Versus::of(&samples).ok_or(BenchError::NoSamples)?,
                samples,
            });
        }
    }
    Ok(outcomes)
}

fn gib(memory: Memory) -> u64 {
    match memory {
        Memory::Dax => 4,
        Memory::Hugetlb | Memory::Anonymous => 2,
    }
}

pub(super) fn table(outcomes: &[Outcome]) -> Table {
    let mut table = new_table(&[
        "map in parts (min / median / max)",
        "by several threads, ms",
        "by one, ms",
        "ratio",
    ]);
    for outcome in outcomes {
        let Outcome {
            gib,
            memory,
            interface,
            map,
            ..
        } = outcome;
        table.add_row([
            format!("{gib} GiB {}, {}", memory.name(), interface.word()),
            milliseconds(&map.first_seconds),
            milliseconds(&map.second_seconds),
            ratio(&map.ratio),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_multiples_of_huge_pages() {
        for memory in Memory::ALL {
            assert_eq!((gib(memory) * GIB / REGIONS) % (2 << 20), 0, "{memory:?}");
        }
    }

    #[test]
    fn the_gain_of_threads_is_a_ratio_below_one() {
        let samples = vec![(50, 100), (60, 100)];
        let outcome = Outcome {
            memory: Memory::Dax,
            gib: 4,
            interface: Interface::Iommufd,
            regions: REGIONS,
            threads: THREADS,
            map: Versus::of(&samples).unwrap(),
            samples,
        };
        let text = table(&[outcome]).to_string();
        assert!(
            text.contains("4 GiB dax, iommufd") && text.contains("0.50 / 0.55 / 0.60"),
            "{text}"
        );
    }
}
