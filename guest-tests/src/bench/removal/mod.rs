//! How long memory that the host takes away stays exposed: to devices, and to a VMM that has not let go.
//!
//! ```text
//!   in each round, on one host:   each case of daxhund's in turn, each with a guest of its own │ the bare program
//!   after that, on a host each:   each peer, whose RAM goes away
//! ```
//! A drive of the guest's writes into the memory in a loop, and a watcher outside the emulated host sees every page that
//! changes ([`watcher`]). How soon a loss is noticed at worst takes more rounds than that: `noticing.rs`. The bare program (`lab-agent loss-bare`) probes and unmaps, and nothing else. All times are an
//! emulator's, and the emulated drive can still finish a transfer that it has begun when its mapping goes: what lands some
//! ten microseconds later is not told apart.

mod log;
mod noticing;
pub mod scene;
pub mod watcher;

use std::path::PathBuf;
use std::slice::from_ref;
use std::time::{Duration, Instant};

use comfy_table::Table;
use comfy_table::presets::ASCII_BORDERS_ONLY_CONDENSED;
use lab_agent::host_protocol::ExitStatus;
use lab_agent::pin_protocol::Interface;
use lab_agent::removal_protocol::{BareLoss, Step, Taken, WatchCost};
use serde::Serialize;

use super::boot::{BenchError, MeasureError};
use super::peer::{Vmm, Workload};
use super::pin::tell;
use super::results::keep;
use super::statistics::{Summary, figure};
use crate::cli::Peer;
use crate::guest::{Guest, GuestSpec};
use crate::host::cards::Card;
use crate::host::passthrough::Binding;
use crate::progress::step;
use crate::setup::Setup;
use crate::share::{ImageForm, Initramfs, initramfs_path, kernel_path};
use crate::suite::is_chosen;
use scene::{BYTES, Kind, Removal, Scene, SceneError};

/// How the removal meets the guest.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What it is called.
    pub name: &'static str,
    /// What goes away.
    pub kind: Kind,
    /// Added to the word of the memory that goes away.
    keys: &'static str,
    /// More arguments.
    arguments: &'static [&'static str],
    /// More for the guest's kernel.
    cmdline: &'static str,
}

const OWN: &str = "daxhund";
const NOT_HELD: &[&str] = &["--removal-guard", "off"];

/// The guest gives persistent memory back when it is asked.
pub const PMEM_HELD: Case = Case {
    name: "pmem, held",
    kind: Kind::Pmem,
    keys: "",
    arguments: &[],
    cmdline: "",
};

/// It knows no way to, and is cut off while its drive goes on.
pub const PMEM_CUT_OFF: Case = Case {
    name: "pmem, held, the guest keeps it",
    kind: Kind::Pmem,
    keys: ",removal_timeout=2",
    arguments: &[],
    cmdline: " acpiphp.disable=1",
};

/// Nobody is asked.
pub const PMEM_NOT_HELD: Case = Case {
    name: "pmem, not held",
    kind: Kind::Pmem,
    keys: "",
    arguments: NOT_HELD,
    cmdline: "",
};

const RAM_REFUSED: Case = Case {
    name: "RAM, held, on_removal=refuse",
    kind: Kind::Ram,
    keys: "",
    arguments: &[],
    cmdline: "",
};

const RAM_STOPPED: Case = Case {
    name: "RAM, held, on_removal=stop",
    kind: Kind::Ram,
    keys: ",on_removal=stop,removal_timeout=2",
    arguments: &[],
    cmdline: "",
};

const RAM_NOT_HELD: Case = Case {
    name: "RAM, not held",
    kind: Kind::Ram,
    keys: "",
    arguments: NOT_HELD,
    cmdline: "",
};

const CASES: [Case; 6] = [
    PMEM_HELD,
    PMEM_CUT_OFF,
    PMEM_NOT_HELD,
    RAM_REFUSED,
    RAM_STOPPED,
    RAM_NOT_HELD,
];

impl Case {
    /// A guest of daxhund's that has the drive.
    pub fn spec(&self, scene: &Scene, release: &str, drive: &Binding) -> GuestSpec {
        let device = format!("path={}", drive.path());
        let mut zone = scene.zone(self.kind);
        let mut words = vec!["--memory-zone".to_owned()];
        match self.kind {
            Kind::Ram => {
                zone.push_str(self.keys);
                words.push(zone);
            }
            Kind::Pmem => {
                let pmem = format!(
                    "file=/dev/{},size={BYTES},id=p0{}",
                    scene.victim(),
                    self.keys
                );
                words.extend([zone, "--pmem".to_owned(), pmem]);
            }
        }
        words.extend(["--device".to_owned(), device]);
        words.extend(self.arguments.iter().map(|word| (*word).to_owned()));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut spec = GuestSpec::new(release, &words);
        spec.initramfs = Initramfs::Tools;
        spec.cmdline = Scene::cmdline() + self.cmdline;
        spec
    }
}

/// One removal in figures. Times are milliseconds after its start.
#[derive(Clone, Debug, Default, Serialize)]
struct Sample {
    /// The last transfer that landed; none when none landed after the start.
    last_write_ms: Option<f64>,
    /// Transfers that landed after the removal had returned.
    writes_after: usize,
    /// Whether any byte of the memory changed after that.
    changed_after: bool,
    /// `unbind` was opened, by the host's clock: what the host's own times are to be compared with.
    opened_ms: Option<f64>,
    /// The removal returned.
    returned_ms: Option<f64>,
    /// The VMM's last descriptor and mapping of the device was gone.
    released_ms: Option<f64>,
    /// The VMM's first sign, by its log.
    noticed_ms: Option<f64>,
    /// Devices did not reach the memory any more, by its log.
    cut_ms: Option<f64>,
    /// What its unmap took.
    unmap_ms: Option<f64>,
    /// The kernel began to take the page array down.
    teardown_ms: Option<f64>,
    /// The longest time without a heartbeat of the guest, from the start on; none when it had none at all.
    silence_ms: Option<f64>,
    /// Middle time between two transfers before the start: what the last one is uncertain by.
    between_writes_ms: Option<f64>,
    /// The watcher's longest gap between two looks, from the start on.
    blink_ms: f64,
    /// What the writer to `unbind` was told.
    refused: Option<String>,
    /// Whether the guest answers in the end.
    alive: bool,
    /// How the VMM has ended.
    ended: Option<String>,
    /// What VMM and guest have said at last, when neither the guest answers nor the VMM has ended.
    said: Option<String>,
}

/// All of a case.
#[derive(Debug, Serialize)]
struct Outcome {
    vmm: String,
    case: &'static str,
    samples: Vec<Sample>,
}

/// The VMM's rounds of a case that is not held, against the bare program's of the same rounds.
#[derive(Debug, Serialize)]
struct Versus {
    case: &'static str,
    /// The VMM's first sign after `unbind` was open against the bare program's.
    noticed_ratio: Option<Summary>,
    /// The same at the 99th percentile of each.
    noticed_p99_ratio: Option<f64>,
    /// The VMM's unmap against the bare unmap of as much.
    unmap_ratio: Option<Summary>,
    /// In how many rounds the unmap was over before the kernel began to take the page array down.
    before_teardown: usize,
    /// Of how many.
    of: usize,
}

/// What is written as JSON.
#[derive(Debug, Serialize)]
struct Results {
    host_kernel: String,
    memory_bytes: u64,
    outcomes: Vec<Outcome>,
    bare: Vec<BareLoss>,
    versus: Vec<Versus>,
    noticing: Option<Noticing>,
}

/// One guest's many losses.
#[derive(Debug, Serialize)]
struct Noticing {
    samples: Vec<Sample>,
    bare: Vec<BareLoss>,
    versus: Versus,
    /// On a host where nothing else runs.
    watch_cost: Vec<WatchCost>,
}

/// Runs the bench, or of its cases those with one of these parts in their names; gives the path of the results.
pub fn run(
    setup: &Setup,
    peers: &[Peer],
    only: &[String],
    repeat: u32,
) -> Result<PathBuf, BenchError> {
    let kernel = setup.kernel();
    let cases = chosen(only)?;
    let mut outcomes = Vec::new();
    let mut bare = Vec::new();
    let mut noticing = None;
    if repeat > 0 && is_chosen(noticing::NAME, only) {
        let mut scene = boot(setup, "noticing")?;
        let rounds = noticing::run(&mut scene, &kernel.release, repeat);
        noticing = Some(rounds.map_err(|error| failed(&scene, OWN, error))?);
        scene.end();
    }
    if repeat > 0 && !cases.is_empty() {
        let mut scene = boot(setup, "removal")?;
        let drive = bind(&scene)?;
        for case in &cases {
            outcomes.push(Outcome {
                vmm: OWN.to_owned(),
                case: case.name,
                samples: Vec::new(),
            });
        }
        for round in 1..=repeat {
            step(&format!("round {round} of {repeat}"), || {
                for (case, outcome) in cases.iter().zip(&mut outcomes) {
                    scene.host.forget_programs();
                    let sample = own(&mut scene, case, &kernel.release, &drive);
                    let sample = sample.map_err(|error| failed(&scene, OWN, error))?;
                    outcome.samples.push(sample);
                }
                let loss = of_bare(&scene, &drive);
                bare.push(loss.map_err(|error| failed(&scene, "the bare program", error))?);
                Ok::<(), BenchError>(())
            })?;
        }
        drive
            .release()
            .map_err(|error| failed(&scene, OWN, error.into()))?;
        scene.end();
    }
    for peer in peers {
        let vmm = Vmm::peer(peer, &setup.share())?;
        let mut samples = Vec::new();
        for round in 1..=repeat {
            // A host for each: what a peer leaves behind may cost it.
            let mut scene = boot(setup, &format!("removal-{}-{round}", vmm.name))?;
            let name = format!("{}, round {round} of {repeat}", vmm.name);
            let sample = step(&name, || {
                let drive = bind(&scene)?;
                let sample = of_peer(&mut scene, &vmm, &kernel.release, &drive);
                // It goes with the host.
                drive.forget();
                sample.map_err(|error| failed(&scene, &vmm.name, error))
            })?;
            samples.push(sample);
            scene.end();
        }
        outcomes.push(Outcome {
            vmm: vmm.name,
            case: RAM_NOT_HELD.name,
            samples,
        });
    }
    let versus = outcomes.iter().filter(|outcome| {
        let is_not_held = [PMEM_NOT_HELD.name, RAM_NOT_HELD.name].contains(&outcome.case);
        is_not_held && outcome.vmm == OWN
    });
    let versus = versus.map(|outcome| compare(outcome.case, &outcome.samples, &bare));
    let results = Results {
        host_kernel: kernel.release.clone(),
        memory_bytes: BYTES,
        versus: versus.collect(),
        outcomes,
        bare,
        noticing,
    };
    if !results.outcomes.is_empty() {
        println!("{}", table(&results.outcomes));
        println!("{}", versus_table(&results.bare, &results.versus));
    }
    if let Some(noticing) = &results.noticing {
        let versus = from_ref(&noticing.versus);
        println!("{}", versus_table(&noticing.bare, versus));
        println!("{}", cost_table(&noticing.watch_cost));
    }
    keep(setup, &format!("removal-{}", kernel.name), &results)
}

/// Those with one of these parts in their names; all when none is asked for.
fn chosen(only: &[String]) -> Result<Vec<Case>, BenchError> {
    let all = CASES.iter().map(|case| case.name).chain([noticing::NAME]);
    let all: Vec<&str> = all.collect();
    let names = |part| all.iter().any(|name| is_chosen(name, from_ref(part)));
    if let Some(asked) = only.iter().find(|part| !names(*part)) {
        return Err(BenchError::NoCase {
            asked: asked.clone(),
            cases: all.join("; "),
        });
    }
    let chosen = CASES.into_iter();
    Ok(chosen.filter(|case| is_chosen(case.name, only)).collect())
}

fn boot(setup: &Setup, name: &str) -> Result<Scene, BenchError> {
    Scene::boot(setup, setup.kernel(), name).map_err(|error| match error {
        SceneError::Start(error) => error.into(),
        SceneError::Measure(source) => BenchError::Measure {
            vmm: "nothing yet".to_owned(),
            evidence: String::new(),
            source,
        },
        SceneError::Host(error) => BenchError::Measure {
            vmm: "nothing yet".to_owned(),
            evidence: String::new(),
            source: error.into(),
        },
    })
}

fn bind(scene: &Scene) -> Result<Binding, BenchError> {
    let drive = scene.host.bind_vfio(Card::Disk);
    drive.map_err(|error| failed(scene, "nothing yet", error.into()))
}

fn failed(scene: &Scene, vmm: &str, source: MeasureError) -> BenchError {
    BenchError::measure(vmm, &scene.host, source)
}

/// One removal under a guest of daxhund's.
fn own(
    scene: &mut Scene,
    case: &Case,
    release: &str,
    drive: &Binding,
) -> Result<Sample, MeasureError> {
    let spec = case.spec(scene, release, drive);
    let guest = scene.boot_guest(&spec)?;
    measure(scene, guest, case.kind)
}

/// One removal under the bare program.
fn of_bare(scene: &Scene, drive: &Binding) -> Result<BareLoss, MeasureError> {
    let bytes = BYTES.to_string();
    let (path, dax) = (drive.path(), format!("/dev/{}", scene.victim()));
    let words = ["loss-bare", &path, &dax, &bytes, Interface::Type1.word()];
    tell(&scene.host, &words)
}

/// The RAM of a peer's guest.
fn of_peer(
    scene: &mut Scene,
    vmm: &Vmm,
    release: &str,
    drive: &Binding,
) -> Result<Sample, MeasureError> {
    let mut spec = GuestSpec::new(release, &[]);
    spec.cmdline = Scene::cmdline();
    let work = Workload {
        kernel: kernel_path(release, ImageForm::BzImage),
        initramfs: initramfs_path(release, Initramfs::Tools),
        cmdline: spec.whole_cmdline(),
        dax: format!("/dev/{}", scene.victim()),
        memory_mib: BYTES >> 20,
        devices: vec![drive.path()],
    };
    let mut guest = Guest::start(&scene.host, vmm.spawn_spec_with(&work, &[]))?;
    guest.wait_ready()?;
    measure(scene, guest, Kind::Ram)
}

fn measure(scene: &mut Scene, guest: Guest, kind: Kind) -> Result<Sample, MeasureError> {
    let busy = scene.set_busy(guest, kind)?;
    let (removal, guest) = scene.take(busy)?;
    let sample = sample(&removal);
    scene.restore(guest)?;
    Ok(sample)
}

fn sample(removal: &Removal) -> Sample {
    let Removal { taken, seen, .. } = removal;
    let Some(start) = removal.start() else {
        return Sample::default();
    };
    let after = |at: Option<Instant>| Some(millis(at?.saturating_duration_since(start)));
    let last = seen.writes.last().copied().filter(|at| *at > start);
    let told = log::told(&removal.said, taken.asked_ns);
    let before: Vec<Instant> = seen
        .writes
        .iter()
        .copied()
        .filter(|at| *at <= start)
        .collect();
    let between = before.windows(2).map(|pair| millis(pair[1] - pair[0]));
    Sample {
        last_write_ms: after(last),
        writes_after: removal.writes_after(Step::Returned),
        changed_after: removal.changed_after,
        returned_ms: after(seen.step(Step::Returned)),
        released_ms: after(seen.step(Step::Released)),
        silence_ms: seen.silence(start).map(millis),
        between_writes_ms: Summary::of(between).map(|summary| summary.median),
        blink_ms: millis(seen.blink(start)),
        refused: taken.refused.clone(),
        alive: removal.alive,
        ended: removal.ended.as_ref().map(ExitStatus::to_string),
        said: (!removal.alive && removal.ended.is_none())
            .then(|| format!("{}\n{}", tail(&removal.said), tail(&removal.console))),
        ..by_the_host(taken, told, removal.teardown)
    }
}

/// What the VMM and the host's kernel tell of a removal.
fn by_the_host(taken: &Taken, told: log::Told, teardown: Option<Duration>) -> Sample {
    Sample {
        opened_ms: taken
            .opened_ns
            .map(|at| figure(at.saturating_sub(taken.asked_ns)) / 1e6),
        noticed_ms: told.noticed.map(millis),
        cut_ms: told.cut.map(millis),
        unmap_ms: told.unmap.map(millis),
        teardown_ms: teardown.map(millis),
        ..Sample::default()
    }
}

/// Its last lines.
fn tail(text: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn compare(case: &'static str, own: &[Sample], bare: &[BareLoss]) -> Versus {
    // From the moment when nothing held the write any more, as the bare program counts.
    let noticed = |sample: &Sample| Some(sample.noticed_ms? - sample.opened_ms?);
    let pairs = || own.iter().zip(bare);
    let noticed_pairs: Vec<(f64, f64)> = pairs()
        .filter_map(|(own, bare)| Some((noticed(own)?, figure(bare.noticed_ns) / 1e6)))
        .collect();
    let unmaps =
        pairs().filter_map(|(own, bare)| Some(own.unmap_ms? / (figure(bare.unmap_ns) / 1e6)));
    let in_time = own.iter().filter(|sample| {
        let times = sample.cut_ms.zip(sample.teardown_ms);
        times.is_some_and(|(cut, teardown)| cut < teardown)
    });
    let p99 = |of: fn(&(f64, f64)) -> f64| percentile(noticed_pairs.iter().map(of), 99);
    Versus {
        case,
        noticed_ratio: Summary::of(noticed_pairs.iter().map(|(own, bare)| own / bare)),
        noticed_p99_ratio: p99(|pair| pair.0)
            .zip(p99(|pair| pair.1))
            .map(|(own, bare)| own / bare),
        unmap_ratio: Summary::of(unmaps),
        before_teardown: in_time.count(),
        of: own
            .iter()
            .filter(|sample| sample.teardown_ms.is_some())
            .count(),
    }
}

/// The least that `percent` of all are not above.
fn percentile(samples: impl Iterator<Item = f64>, percent: usize) -> Option<f64> {
    let mut samples: Vec<f64> = samples.collect();
    samples.sort_by(f64::total_cmp);
    let rank = (samples.len() * percent).div_ceil(100);
    samples.get(rank.checked_sub(1)?).copied()
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_BORDERS_ONLY_CONDENSED);
    table.set_header(header);
    table
}

fn three(summary: Option<Summary>, digits: usize) -> String {
    summary.map_or("-".to_owned(), |Summary { min, median, max }| {
        format!("{min:.digits$} / {median:.digits$} / {max:.digits$}")
    })
}

fn table(outcomes: &[Outcome]) -> Table {
    let mut table = new_table(&[
        "ms after the start (min / median / max)",
        "last DMA",
        "between, blink",
        "removal over",
        "last fd",
        "guest silent",
        "DMA after",
        "guest, VMM",
    ]);
    for Outcome { vmm, case, samples } in outcomes {
        let of = |field: fn(&Sample) -> Option<f64>| Summary::of(samples.iter().filter_map(field));
        let worst = |summary: Option<Summary>| summary.map_or(0.0, |summary| summary.max);
        let after: usize = samples.iter().map(|sample| sample.writes_after).sum();
        let changed = samples.iter().filter(|sample| sample.changed_after).count();
        let alive = samples.iter().filter(|sample| sample.alive).count();
        let mut ends: Vec<String> = samples.iter().map(end).collect();
        ends.sort();
        ends.dedup();
        table.add_row([
            format!("{vmm}: {case}"),
            three(of(|sample| sample.last_write_ms), 1),
            format!(
                "{:.1}, {:.1}",
                worst(of(|sample| sample.between_writes_ms)),
                worst(of(|sample| Some(sample.blink_ms)))
            ),
            three(of(|sample| sample.returned_ms), 1),
            three(of(|sample| sample.released_ms), 1),
            three(of(|sample| sample.silence_ms), 1),
            format!(
                "{after} writes; memory changed in {changed} of {}",
                samples.len()
            ),
            format!("{alive} of {} alive; {}", samples.len(), ends.join(", ")),
        ]);
    }
    table
}

/// How a removal went for who asked, and for the VMM.
fn end(sample: &Sample) -> String {
    match (&sample.refused, &sample.ended) {
        (Some(_), _) => "the removal is refused".to_owned(),
        (None, Some(status)) => status.clone(),
        (None, None) => "runs".to_owned(),
    }
}

fn versus_table(bare: &[BareLoss], versus: &[Versus]) -> Table {
    let of = |field: fn(&BareLoss) -> u64| {
        Summary::of(bare.iter().map(|loss| figure(field(loss)) / 1e6))
    };
    let mut table = new_table(&[
        "min / median / max",
        "noticed",
        "at p99 of each",
        "unmap",
        "before the page array's teardown",
    ]);
    table.add_row([
        "the bare program, ms".to_owned(),
        three(of(|loss| loss.noticed_ns), 1),
        String::new(),
        three(of(|loss| loss.unmap_ns), 1),
        String::new(),
    ]);
    for versus in versus {
        let p99 = versus
            .noticed_p99_ratio
            .map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        table.add_row([
            format!("{OWN}: {}, ratio to it", versus.case),
            three(versus.noticed_ratio, 2),
            p99,
            three(versus.unmap_ratio, 2),
            format!("{} of {}", versus.before_teardown, versus.of),
        ]);
    }
    table
}

fn cost_table(costs: &[WatchCost]) -> Table {
    let mut table = new_table(&["watching one device, idle", "of a processor", "a look"]);
    for cost in costs {
        let by = if cost.is_default { ", as the VMM" } else { "" };
        table.add_row([
            format!("every {} ms{by}", cost.every_ms),
            format!("{:.3} %", cost.percent),
            format!("{:.0} us", cost.look_us),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_that_is_not_there_is_an_error() {
        let chosen =
            |words: &[&str]| chosen(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(chosen(&[]).unwrap().len(), CASES.len());
        assert_eq!(chosen(&["not held"]).unwrap().len(), 2);
        assert!(chosen(&["noticing"]).unwrap().is_empty());
        let error = chosen(&["not held", "typo"]).unwrap_err().to_string();
        assert!(
            error.contains("`typo`") && error.contains(PMEM_NOT_HELD.name),
            "{error}"
        );
    }

    #[test]
    fn a_percentile_is_one_of_the_samples() {
        let samples = || (1_u32..=200).rev().map(f64::from);
        assert_eq!(percentile(samples(), 99), Some(198.0));
        assert_eq!(percentile(samples(), 50), Some(100.0));
        assert_eq!(percentile(std::iter::once(7.0), 99), Some(7.0));
        assert_eq!(percentile(std::iter::empty(), 99), None);
    }

    #[test]
    fn the_vmm_is_compared_with_the_bare_program_of_its_round() {
        let own = |noticed: f64, unmap, teardown| Sample {
            opened_ms: Some(1.0),
            noticed_ms: Some(noticed + 1.0),
            cut_ms: Some(noticed + 1.0 + unmap),
            unmap_ms: Some(unmap),
            teardown_ms: Some(teardown),
            ..Sample::default()
        };
        let bare = BareLoss {
            noticed_ns: 2_000_000,
            unmap_ns: 10_000_000,
            returned_ns: 70_000_000,
        };
        let own = [own(2.0, 11.0, 50.0), own(4.0, 10.0, 5.0)];
        let compared = compare("pmem, not held", &own, &[bare; 2]);
        let noticed = compared.noticed_ratio.unwrap();
        assert!((noticed.min - 1.0).abs() < 1e-9 && (noticed.max - 2.0).abs() < 1e-9);
        assert!((compared.noticed_p99_ratio.unwrap() - 2.0).abs() < 1e-9);
        assert!((compared.unmap_ratio.unwrap().max - 1.1).abs() < 1e-9);
        assert_eq!((compared.before_teardown, compared.of), (1, 2));
        let text = versus_table(&[bare; 2], &[compared]).to_string();
        assert!(
            text.contains("1 of 2") && text.contains("2.0 / 2.0 / 2.0"),
            "{text}"
        );
    }

    #[test]
    fn a_row_tells_who_is_alive() {
        let dead = Sample {
            last_write_ms: Some(12.5),
            ended: Some("exit status 4".to_owned()),
            ..Sample::default()
        };
        let outcome = Outcome {
            vmm: "daxhund".to_owned(),
            case: "RAM, not held",
            samples: vec![dead],
        };
        let text = table(&[outcome]).to_string();
        for word in [
            "12.5 / 12.5 / 12.5",
            "0 of 1 alive; exit status 4",
            "0 writes",
        ] {
            assert!(text.contains(word), "{word} in {text}");
        }
    }
}
