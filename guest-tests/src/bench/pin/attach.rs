//! A device comes to a guest that runs and has none; then a second one. In turn with it, the bare program attaches the first to as
//! much memory of the same kind.
//!
//! A device is in one place at a time: the guest gives both back before the bare program has its turn.

use comfy_table::Table;
use lab_agent::pin_protocol::{BareAttach, Interface, RestCall};
use serde::Serialize;

use super::{GIB, Memory, Versus, interfaces, milliseconds, new_table, ratio, seconds, tell};
use crate::bench::boot::{BenchError, MeasureError};
use crate::bench::statistics::{Summary, figure};
use crate::guest::{Guest, GuestSpec};
use crate::host::Host;
use crate::host::cards::Card;
use crate::host::passthrough::Binding;
use crate::progress::{note, step};

const SIZES_GIB: [u64; 3] = [1, 2, 4];
const SOCKET: &str = "/tmp/bench-api.sock";
/// For a guest to give a device up.
const DETACH_SECONDS: &str = "120";
/// What daxhund's log says when the first device has brought memory in, and how it tells the time.
const MAPPED: &str = "guest memory is in reach of devices";
const MAPPED_FIELD: &str = "elapsed_us=";

/// What a device is attached to, and how.
#[derive(Clone, Copy, Debug, Serialize)]
struct Case {
    memory: Memory,
    gib: u64,
    interface: Interface,
}

/// One round.
#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    /// The request that attached the first device, as its client saw it.
    first_ns: u64,
    /// What of it was the map, as the VMM saw it.
    map_ns: u64,
    /// The request that attached a second device.
    second_ns: u64,
    bare: BareAttach,
}

/// All rounds of a case.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    #[serde(flatten)]
    case: Case,
    /// The request against the whole of the bare attach.
    whole: Versus,
    /// The VMM's map against the bare map.
    map: Versus,
    second_device_seconds: Summary,
    samples: Vec<Sample>,
}

/// What a second device costs with the most memory, against the least.
#[derive(Debug, Serialize)]
pub(super) struct Growth {
    memory: Memory,
    interface: Interface,
    least_gib: u64,
    most_gib: u64,
    least_seconds: Summary,
    most_seconds: Summary,
    ratio: Summary,
}

/// Where all of it takes place.
struct Bed<'a> {
    host: &'a Host,
    release: &'a str,
    first: Binding,
    second: Binding,
    own_dax: String,
    bare_dax: String,
}

/// Measures all cases.
pub(super) fn run(host: &Host, release: &str, repeat: u32) -> Result<Vec<Outcome>, BenchError> {
    let [own, bare] = host.dax() else {
        return Err(BenchError::NoDax);
    };
    let failed = |error| BenchError::measure("daxhund", host, error);
    let bind = |card| host.bind_vfio(card).map_err(|error| failed(error.into()));
    let bed = Bed {
        host,
        release,
        first: bind(Card::Disk)?,
        second: bind(Card::SecondDisk)?,
        own_dax: own.path.clone(),
        bare_dax: bare.path.clone(),
    };
    let mut outcomes = Vec::new();
    for interface in interfaces(host).map_err(|error| failed(error.into()))? {
        for memory in Memory::ALL {
            for gib in SIZES_GIB {
                let case = Case {
                    memory,
                    gib,
                    interface,
                };
                let what = format!("{gib} GiB of {}, {}", memory.name(), interface.word());
                host.forget_programs();
                let samples = step(&what, || bed.measure(case, repeat)).map_err(failed)?;
                let outcome = summarise(case, samples).ok_or(BenchError::NoSamples)?;
                note(&format!(
                    "{what}: {} of the bare attach, its map {} of the bare map",
                    ratio(&outcome.whole.ratio),
                    ratio(&outcome.map.ratio)
                ));
                outcomes.push(outcome);
            }
        }
    }
    Ok(outcomes)
}

impl Bed<'_> {
    fn measure(&self, case: Case, repeat: u32) -> Result<Vec<Sample>, MeasureError> {
        // The guest's and the bare program's.
        case.memory.reserve(self.host, 2 * case.gib * GIB)?;
        // The last guest was killed, so it has left its socket.
        self.host.check(&["rm", "-f", SOCKET])?;
        let spec = guest_spec(self.release, case, &self.own_dax);
        let mut guest = Guest::boot(self.host, &spec)?;
        let mut samples = Vec::new();
        for round in 0..=repeat {
            let (own, bare) = if round % 2 == 0 {
                let own = self.own()?;
                (own, self.bare(case)?)
            } else {
                let bare = self.bare(case)?;
                (self.own()?, bare)
            };
            samples.push(Sample {
                first_ns: own.0,
                map_ns: 0,
                second_ns: own.1,
                bare,
            });
        }
        guest.vmm().signal(libc::SIGKILL)?;
        guest.wait_end()?;
        let log = guest.vmm().stderr();
        let maps = map_times(&log);
        if maps.len() != samples.len() {
            return Err(MeasureError::Maps {
                found: maps.len(),
                expected: samples.len(),
                text: log,
            });
        }
        for (sample, map_ns) in samples.iter_mut().zip(maps) {
            sample.map_ns = map_ns;
        }
        drop(guest);
        case.memory.reserve(self.host, 0)?;
        // The first is the unmeasured one.
        Ok(samples.split_off(1))
    }

    /// Both devices come and go; gives what the requests took.
    fn own(&self) -> Result<(u64, u64), MeasureError> {
        let attach = |binding: &Binding, id| {
            let call: RestCall = tell(self.host, &["attach", SOCKET, &binding.path(), id])?;
            Ok::<_, MeasureError>(call.took_ns)
        };
        let took = (attach(&self.first, "d0")?, attach(&self.second, "d1")?);
        for id in ["d1", "d0"] {
            tell::<RestCall>(self.host, &["detach", SOCKET, id, DETACH_SECONDS])?;
        }
        Ok(took)
    }

    fn bare(&self, case: Case) -> Result<BareAttach, MeasureError> {
        let bytes = (case.gib * GIB).to_string();
        let memory = case.memory.word(&self.bare_dax);
        let words = [
            "pin-bare",
            &self.first.path(),
            memory,
            &bytes,
            case.interface.word(),
        ];
        tell(self.host, &words)
    }
}

/// Its memory is there before its device, as the bare program's is.
fn guest_spec(release: &str, case: Case, dax: &str) -> GuestSpec {
    let what = match case.memory {
        Memory::Dax => format!(",file={dax}"),
        Memory::Hugetlb => ",hugepages=on,hugepage_size=2M".to_owned(),
        Memory::Anonymous => String::new(),
    };
    let zone = format!("id=z0,size={}G,prefault=on{what}", case.gib);
    let by = match case.interface {
        Interface::Type1 => "iommufd=off",
        Interface::Iommufd => "iommufd=on",
    };
    let arguments = [
        "-v",
        "--api-socket",
        SOCKET,
        "--platform",
        by,
        "--memory-zone",
        &zone,
    ];
    GuestSpec::new(release, &arguments)
}

/// In nanoseconds, in the order of the log.
fn map_times(log: &str) -> Vec<u64> {
    let micros = |line: &str| {
        let (_, after) = line.split_once(MAPPED_FIELD)?;
        after.split_whitespace().next()?.parse::<u64>().ok()
    };
    let lines = log.lines().filter(|line| line.contains(MAPPED));
    lines
        .filter_map(micros)
        .map(|micros| micros * 1000)
        .collect()
}

fn summarise(case: Case, samples: Vec<Sample>) -> Option<Outcome> {
    let versus =
        |of: fn(&Sample) -> (u64, u64)| Versus::of(&samples.iter().map(of).collect::<Vec<_>>());
    Some(Outcome {
        case,
        whole: versus(|sample| (sample.first_ns, sample.bare.attach_ns()))?,
        map: versus(|sample| (sample.map_ns, sample.bare.map_ns))?,
        second_device_seconds: seconds(samples.iter().map(|sample| sample.second_ns))?,
        samples,
    })
}

/// Compares second devices over sizes.
pub(super) fn growth(outcomes: &[Outcome]) -> Vec<Growth> {
    let of = |least: &Outcome| {
        let kin = outcomes.iter().filter(|other| {
            other.case.memory == least.case.memory && other.case.interface == least.case.interface
        });
        let most = kin.max_by_key(|other| other.case.gib)?;
        let pairs = most.samples.iter().zip(&least.samples);
        let ratios = pairs.map(|(most, least)| figure(most.second_ns) / figure(least.second_ns));
        Some(Growth {
            memory: least.case.memory,
            interface: least.case.interface,
            least_gib: least.case.gib,
            most_gib: most.case.gib,
            least_seconds: least.second_device_seconds,
            most_seconds: most.second_device_seconds,
            ratio: Summary::of(ratios)?,
        })
    };
    let least = outcomes
        .iter()
        .filter(|outcome| outcome.case.gib == SIZES_GIB[0]);
    least.filter_map(of).collect()
}

pub(super) fn table(outcomes: &[Outcome]) -> Table {
    let mut table = new_table(&[
        "memory (min / median / max)",
        "attach, ms",
        "bare, ms",
        "ratio",
        "its map, ms",
        "bare map, ms",
        "ratio",
    ]);
    for Outcome {
        case, whole, map, ..
    } in outcomes
    {
        let interface = case.interface.word();
        table.add_row([
            format!("{} GiB {}, {interface}", case.gib, case.memory.name()),
            milliseconds(&whole.first_seconds),
            milliseconds(&whole.second_seconds),
            ratio(&whole.ratio),
            milliseconds(&map.first_seconds),
            milliseconds(&map.second_seconds),
            ratio(&map.ratio),
        ]);
    }
    table
}

pub(super) fn growth_table(growths: &[Growth]) -> Table {
    let mut table = new_table(&[
        "second device (min / median / max)",
        "least memory, ms",
        "most memory, ms",
        "ratio",
    ]);
    for growth in growths {
        let interface = growth.interface.word();
        let (least, most) = (growth.least_gib, growth.most_gib);
        table.add_row([
            format!(
                "{}, {least} and {most} GiB, {interface}",
                growth.memory.name()
            ),
            milliseconds(&growth.least_seconds),
            milliseconds(&growth.most_seconds),
            ratio(&growth.ratio),
        ]);
    }
    table
}

/// What the curves are drawn of.
impl Outcome {
    pub(super) fn memory(&self) -> Memory {
        self.case.memory
    }

    pub(super) fn interface(&self) -> Interface {
        self.case.interface
    }

    pub(super) fn gib(&self) -> f64 {
        figure(self.case.gib)
    }

    /// Middle seconds of the VMM's map and of the bare map.
    pub(super) fn map_medians(&self) -> (f64, f64) {
        (
            self.map.first_seconds.median,
            self.map.second_seconds.median,
        )
    }

    #[cfg(test)]
    pub(super) fn example(memory: Memory, gib: u64, millis: u64) -> Self {
        let case = Case {
            memory,
            gib,
            interface: Interface::Type1,
        };
        let sample = Sample {
            first_ns: 3_000_000 * millis,
            map_ns: 1_000_000 * millis,
            second_ns: 500 * gib,
            bare: BareAttach {
                map_ns: 1_000_000 * millis,
                reset_ns: 500_000 * millis,
                ..BareAttach::default()
            },
        };
        summarise(case, vec![sample; 2]).expect("there are samples")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vmm_s_maps_are_found_in_its_log() {
        let log = "INFO a device of the host is ours id=\"d0\"\n\
                   2026 INFO daxhund: guest memory is in reach of devices ranges=2 pinned_bytes=1 elapsed_us=1234\n\
                   2026 INFO daxhund: guest memory is in reach of devices elapsed_us=5 ranges=2\n";
        assert_eq!(map_times(log), [1_234_000, 5_000]);
    }

    #[test]
    fn the_whole_is_compared_with_the_whole_and_the_map_with_the_map() {
        let outcome = Outcome::example(Memory::Dax, 1, 10);
        assert!((outcome.whole.ratio.median - 2.0).abs() < 1e-9);
        assert!((outcome.map.ratio.median - 1.0).abs() < 1e-9);
        assert!(table(&[outcome]).to_string().contains("1 GiB dax, type1"));
    }

    #[test]
    fn a_second_device_is_compared_over_sizes_of_one_kind() {
        let outcomes = [
            Outcome::example(Memory::Dax, 1, 10),
            Outcome::example(Memory::Hugetlb, 4, 10),
            Outcome::example(Memory::Dax, 4, 10),
        ];
        let growths = growth(&outcomes);
        assert_eq!(growths.len(), 1);
        assert_eq!((growths[0].least_gib, growths[0].most_gib), (1, 4));
        assert!((growths[0].ratio.median - 4.0).abs() < 1e-9);
    }

    #[test]
    fn kinds_have_zones() {
        let case = |memory| Case {
            memory,
            gib: 2,
            interface: Interface::Type1,
        };
        let zone = |memory| guest_spec("6", case(memory), "/dev/dax0.0").arguments.pop();
        assert_eq!(
            zone(Memory::Dax).unwrap(),
            "id=z0,size=2G,prefault=on,file=/dev/dax0.0"
        );
        assert!(zone(Memory::Hugetlb).unwrap().contains("hugepages=on"));
    }
}
