//! How soon a removal of device-dax is noticed, and what watching for it costs. For the emulated host: takes the driver of
//! a device away and gives it back, again and again.

pub(crate) mod take;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use daxhund_dax::{DaxMapping, Host, LockKind, Pace, Probe, Sign, Watch};
use lab_agent::removal_protocol::WatchCost;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

const DRIVER: &str = "/sys/bus/dax/drivers/device_dax";

/// Longest that a sign may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// What one round saw, after the name was written to `unbind` unless it says otherwise.
#[derive(Default)]
struct Seen {
    /// After `unbind` was opened.
    armed: Option<Duration>,
    driver_gone: Option<Duration>,
    probe_failed: Option<Duration>,
    uevent: Option<Duration>,
    /// A load's own EFAULT, from a thread that does nothing else.
    access_failed: Option<Duration>,
    unbound: Duration,
}

/// Prints a line for each round, all in microseconds, and then medians and worst ones.
pub(crate) fn time_signs(path: &str, rounds: usize) -> Result<(), String> {
    for (name, idle, spin) in [
        ("armed by inotify", 20, false),
        ("armed all the time", 1, false),
        ("a thread that only probes", 3_600_000, true),
    ] {
        let pace = Pace {
            idle: Duration::from_millis(idle),
            ..Pace::default()
        };
        println!("{name}: us after the write to unbind (armed: after its open)");
        let mut all = Vec::new();
        for _ in 0..rounds {
            all.push(round(path, pace, spin).map_err(|error| error.to_string())?);
        }
        print_figures(&all);
    }
    Ok(())
}

fn print_figures(all: &[Seen]) {
    type Figure = fn(&Seen) -> Option<Duration>;
    let figures: [(&str, Figure); 6] = [
        ("armed", |seen| seen.armed),
        ("driver gone", |seen| seen.driver_gone),
        ("access fails", |seen| seen.access_failed),
        ("probe fails", |seen| seen.probe_failed),
        ("uevent", |seen| seen.uevent),
        ("write returns", |seen| Some(seen.unbound)),
    ];
    for (name, figure) in figures {
        let mut times: Vec<u128> = all
            .iter()
            .filter_map(figure)
            .map(|t| t.as_micros())
            .collect();
        times.sort_unstable();
        if let (Some(least), Some(most)) = (times.first(), times.last()) {
            let median = times[times.len() / 2];
            println!(
                "  {name:14} min {least:7} median {median:7} max {most:7}  ({} rounds)",
                times.len()
            );
        } else {
            println!("  {name:14} not seen, or not looked for");
        }
    }
}

fn round(path: &str, pace: Pace, spin: bool) -> Result<Seen, Box<dyn std::error::Error>> {
    let mapping = map(path)?;
    let name = mapping.facts().name.to_string();
    let mut watch = Watch::new(&Host::system(), pace)?;
    for unheard in watch.unheard() {
        println!("  {unheard}");
    }
    watch.add(&mapping)?;
    let mut seen = Seen::default();
    let over = AtomicBool::new(false);
    let (opened, unbound) = thread::scope(|scope| -> Result<_, Box<dyn std::error::Error>> {
        let remover = scope.spawn(|| remove(&name));
        let prober = spin.then(|| scope.spawn(|| spin_on(&mapping, &over)));
        let times = notice(&mut watch, &remover);
        let (opened, written, unbound) = remover.join().map_err(|_| "the remover panicked")??;
        over.store(true, Ordering::SeqCst);
        let after = |from: Instant, time: Option<Instant>| {
            time.map(|time| time.saturating_duration_since(from))
        };
        seen.armed = after(opened, times.armed);
        seen.driver_gone = after(written, times.of(Sign::DriverGone));
        seen.probe_failed = after(written, times.of(Sign::ProbeFailed));
        seen.uevent = after(written, times.of(Sign::Uevent));
        if let Some(prober) = prober {
            let failed = prober.join().map_err(|_| "the prober panicked")?;
            seen.access_failed = after(written, failed);
        }
        Ok((written, unbound))
    })?;
    seen.unbound = unbound.saturating_duration_since(opened);
    drop(watch);
    drop(mapping);
    give_back(&name)?;
    Ok(seen)
}

pub(crate) fn map(path: &str) -> Result<DaxMapping, Box<dyn std::error::Error>> {
    let device = Host::system().open(Path::new(path))?;
    let range = device.range(None, None)?;
    Ok(device.lock(range, LockKind::Exclusive)?.map()?)
}

/// When it was opened, written, and done.
pub(crate) fn remove(name: &str) -> std::io::Result<(Instant, Instant, Instant)> {
    // The watch is at rest by then.
    thread::sleep(Duration::from_millis(100));
    let opened = Instant::now();
    let mut unbind = File::options()
        .write(true)
        .open(format!("{DRIVER}/unbind"))?;
    // What a shell takes from its open to its write, about.
    thread::sleep(Duration::from_millis(5));
    let written = Instant::now();
    unbind.write_all(name.as_bytes())?;
    Ok((opened, written, Instant::now()))
}

/// The undo of [`remove`].
pub(crate) fn give_back(name: &str) -> std::io::Result<()> {
    fs::write(format!("{DRIVER}/bind"), name)
}

fn spin_on(mapping: &DaxMapping, over: &AtomicBool) -> Option<Instant> {
    while !over.load(Ordering::SeqCst) {
        if matches!(mapping.probe(), Ok(Probe::Gone)) {
            return Some(Instant::now());
        }
    }
    None
}

#[derive(Default)]
struct Times {
    armed: Option<Instant>,
    signs: Vec<(Sign, Instant)>,
}

impl Times {
    fn of(&self, sign: Sign) -> Option<Instant> {
        let found = self.signs.iter().find(|(other, _)| *other == sign);
        found.map(|(_, time)| *time)
    }
}

/// Notes when each sign is seen, until all are or nothing more comes.
fn notice<T>(watch: &mut Watch, remover: &thread::ScopedJoinHandle<'_, T>) -> Times {
    let mut times = Times::default();
    let mut end = None;
    while times.signs.len() < 3 {
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let _ = poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&wait));
        let lost = watch.read().unwrap_or_default();
        let now = Instant::now();
        if watch.is_armed() {
            times.armed.get_or_insert(now);
        }
        times.signs.extend(lost.iter().map(|lost| (lost.by, now)));
        if remover.is_finished() && now > *end.get_or_insert(now + PATIENCE) {
            break;
        }
    }
    times
}

/// What a watch takes of a processor at several paces, and one look.
pub(crate) fn cost_of_watching(path: &str) -> Result<Vec<WatchCost>, String> {
    let mut costs = Vec::new();
    let mapping = map(path).map_err(|error| error.to_string())?;
    for millis in [1, 5, 20, 100] {
        let pace = Pace {
            idle: Duration::from_millis(millis),
            ..Pace::default()
        };
        let mut watch = Watch::new(&Host::system(), pace).map_err(|error| error.to_string())?;
        watch.add(&mapping).map_err(|error| error.to_string())?;
        let (start, before) = (Instant::now(), thread_time());
        let mut looks = 0;
        while start.elapsed() < Duration::from_secs(1) {
            let wait = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let _ = poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&wait));
            watch.read().map_err(|error| error.to_string())?;
            looks += 1;
        }
        let (used, wall) = (thread_time().saturating_sub(before), start.elapsed());
        costs.push(WatchCost {
            every_ms: millis,
            is_default: pace.idle == Pace::default().idle,
            percent: 100.0 * used.as_secs_f64() / wall.as_secs_f64(),
            look_us: used.as_secs_f64() * 1e6 / f64::from(looks),
        });
    }
    Ok(costs)
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}
