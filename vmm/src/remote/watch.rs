//! `daxhund-remote watch`: the metrics again and again, with what has come in between as a rate.
//!
//! ```text
//!   vmm.metrics ──▶ Samples ──┬──▶ Frame ──▶ a screen that is redrawn, a line, or an object of JSON
//!   those of before ──────────┘
//! ```
//! It ends when it has shown as many as it was asked for, or when the VM that it has seen is there no more.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use console::{Term, truncate_str};
use indicatif::BinaryBytes;
use serde::Serialize;
use thiserror::Error;

use super::client::{Client, ClientError, Method};
use super::samples::{ParseError, Sample, Samples};

/// What is asked for.
pub(super) const METRICS: &str = "vmm.metrics";

/// The state in which there is nothing to watch.
const NO_VM: &str = "NoVm";

/// How it is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Watch {
    pub(super) interval: Duration,
    /// How many are shown; `None`: no end.
    pub(super) count: Option<u64>,
    pub(super) json: bool,
}

/// It can't go on.
#[derive(Debug, Error)]
pub(super) enum WatchError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Parse(#[from] ParseError),
    #[error("what is watched can't be written as JSON")]
    Json(#[from] serde_json::Error),
    #[error("what is watched can't be shown")]
    Output(#[from] io::Error),
}

/// Something that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Count {
    total: f64,
    /// `None`: there is nothing to compare with yet.
    per_second: Option<f64>,
}

/// What is shown at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Frame {
    state: String,
    /// Since the first.
    elapsed_ms: u64,
    /// How old what the VMM's owner has told is.
    view_age_ms: u64,
    /// Of all vCPUs, by reason.
    exits: BTreeMap<String, Count>,
    /// By device and name.
    devices: BTreeMap<String, BTreeMap<String, Count>>,
    /// Bytes by state.
    memory: BTreeMap<String, f64>,
    poisoned_bytes: f64,
    pinned_bytes: f64,
    /// Of a pin that is under way.
    pinning_done_bytes: f64,
    pinning_total_bytes: f64,
    /// By outcome.
    removals: BTreeMap<String, f64>,
    removals_waiting: f64,
}

/// Samples and when they were taken.
struct Taken {
    at: Instant,
    samples: Samples,
}

impl Watch {
    /// Watches to the end. A terminal is redrawn; else each frame is a line of `output`.
    pub(super) fn run(
        self,
        client: &Client,
        output: &mut dyn Write,
        terminal: Option<&Term>,
    ) -> Result<(), WatchError> {
        let title = format!("daxhund at {}", client.socket().display());
        let mut screen = terminal.filter(|_| !self.json).map(Screen::new);
        let start = Instant::now();
        let mut before: Option<Taken> = None;
        let mut has_seen_vm = false;
        let mut shown = 0;
        loop {
            let response = match client.call(Method::Get, METRICS, None, Vec::new()) {
                Ok(response) => response,
                // It has ended since.
                Err(ClientError::Connect { .. } | ClientError::Exchange { .. })
                    if before.is_some() =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            };
            let samples = Samples::parse(&String::from_utf8_lossy(&response.body))?;
            let at = Instant::now();
            let now = Taken { at, samples };
            let frame = Frame::of(&now, before.as_ref(), at - start);
            if let Some(screen) = &mut screen {
                screen.draw(&frame.page(&title))?;
            } else {
                let line = if self.json {
                    serde_json::to_string(&frame)?
                } else {
                    frame.line()
                };
                writeln!(output, "{line}")?;
                output.flush()?;
            }
            shown += 1;
            let is_gone = has_seen_vm && frame.state == NO_VM;
            has_seen_vm |= frame.state != NO_VM;
            if is_gone || self.count.is_some_and(|count| shown >= count) {
                return Ok(());
            }
            before = Some(now);
            thread::sleep(self.interval);
        }
    }
}

impl Frame {
    fn of(now: &Taken, before: Option<&Taken>, elapsed: Duration) -> Self {
        let samples = &now.samples;
        let count = |sample: &Sample| Count {
            total: sample.value,
            per_second: before.and_then(|before| {
                let seconds = (now.at - before.at).as_secs_f64();
                // One that came since has begun at 0, and one that began anew has, too.
                let was = before.samples.same(sample).unwrap_or(0.0);
                let since = if was <= sample.value { was } else { 0.0 };
                (seconds > 0.0).then(|| (sample.value - since) / seconds)
            }),
        };
        let mut exits = BTreeMap::new();
        for sample in samples.of("daxhund_vcpu_exits_total") {
            add(&mut exits, sample.label("reason").to_owned(), count(sample));
        }
        let mut devices: BTreeMap<String, BTreeMap<String, Count>> = BTreeMap::new();
        for (name, sample) in samples.between("daxhund_device_", "_total") {
            let device = devices.entry(sample.label("id").to_owned()).or_default();
            add(device, name.to_owned(), count(sample));
        }
        let sums = |name: &str, label: &str| {
            let mut sums: BTreeMap<String, f64> = BTreeMap::new();
            for sample in samples.of(name) {
                *sums.entry(sample.label(label).to_owned()).or_default() += sample.value;
            }
            sums
        };
        let mut states = samples.of("daxhund_vm_state");
        let state = states.find(|state| state.value > 0.0);
        Self {
            state: state.map_or(NO_VM, |state| state.label("state")).to_owned(),
            elapsed_ms: millis(elapsed),
            view_age_ms: millis(
                Duration::try_from_secs_f64(samples.sum("daxhund_view_age_seconds"))
                    .unwrap_or_default(),
            ),
            exits,
            devices,
            memory: sums("daxhund_region_bytes", "state"),
            poisoned_bytes: samples.sum("daxhund_region_poisoned_bytes"),
            pinned_bytes: samples.sum("daxhund_pinned_bytes"),
            pinning_done_bytes: samples.sum("daxhund_pinning_done_bytes"),
            pinning_total_bytes: samples.sum("daxhund_pinning_total_bytes"),
            removals: sums("daxhund_removals_total", "outcome"),
            removals_waiting: samples.sum("daxhund_removals_waiting"),
        }
    }

    /// For who keeps lines.
    fn line(&self) -> String {
        let mut parts = vec![self.state.clone(), self.memory(), self.pins()];
        parts.push(format!("exits {}", rate("", self.exits_per_second())));
        for (id, counters) in &self.devices {
            let moving = counters.iter().filter(|(_, count)| count.is_moving());
            let rates: Vec<String> = moving
                .map(|(name, count)| format!("{name} {}", rate(name, count.per_second)))
                .collect();
            if !rates.is_empty() {
                parts.push(format!("{id}: {}", rates.join(", ")));
            }
        }
        if self.removals_waiting > 0.0 {
            parts.push(format!("{} removals wait", self.removals_waiting));
        }
        parts.join("; ")
    }

    /// For a screen: a few lines about the whole, and a table of what is counted.
    fn page(&self, title: &str) -> Vec<String> {
        let seconds = self.elapsed_ms / 1000;
        let mut lines = vec![
            format!("{title}: {}, watched for {seconds} s", self.state),
            format!("memory    {}; {}", self.memory(), self.pins()),
        ];
        let outcomes = self.removals.iter();
        let outcomes: Vec<String> = outcomes
            .map(|(outcome, count)| format!("{outcome} {count}"))
            .collect();
        lines.push(format!(
            "removals  {}; {} wait",
            outcomes.join(", "),
            self.removals_waiting
        ));
        if self.view_age_ms >= 1000 {
            let age = self.view_age_ms / 1000;
            lines.push(format!("busy: this was so {age} s ago"));
        }
        lines.push(String::new());
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["", "COUNTER", "PER SECOND", "IN ALL"]);
        let exits = ("vCPUs", &self.exits);
        let devices = self.devices.iter().map(|(id, counters)| (&**id, counters));
        for (whose, counters) in std::iter::once(exits).chain(devices) {
            for (name, count) in counters.iter().filter(|(_, count)| count.total > 0.0) {
                let per_second = rate(name, count.per_second);
                let total = amount(name, count.total);
                table.add_row([whose, name, &per_second, &total]);
            }
        }
        lines.extend(table.lines().map(|line| line.trim_end().to_owned()));
        lines
    }

    fn memory(&self) -> String {
        let states = self.memory.iter();
        let mut parts: Vec<String> = states
            .map(|(state, size)| format!("{} {state}", bytes(*size)))
            .collect();
        if parts.is_empty() {
            parts.push("no memory".to_owned());
        }
        if self.poisoned_bytes > 0.0 {
            parts.push(format!("{} poisoned", bytes(self.poisoned_bytes)));
        }
        parts.join(", ")
    }

    fn pins(&self) -> String {
        let pinned = format!("{} pinned", bytes(self.pinned_bytes));
        if self.pinning_total_bytes > 0.0 {
            let (done, total) = (self.pinning_done_bytes, self.pinning_total_bytes);
            return format!("{pinned}, pinning {} of {}", bytes(done), bytes(total));
        }
        pinned
    }

    fn exits_per_second(&self) -> Option<f64> {
        let mut exits = self.exits.values();
        exits.try_fold(0.0, |sum, count| Some(sum + count.per_second?))
    }
}

impl Count {
    fn is_moving(&self) -> bool {
        self.per_second.is_some_and(|rate| rate > 0.0)
    }
}

/// Several vCPUs count as one.
fn add(counts: &mut BTreeMap<String, Count>, name: String, more: Count) {
    let sum = counts.entry(name).or_insert(Count {
        total: 0.0,
        per_second: more.per_second.map(|_| 0.0),
    });
    sum.total += more.total;
    sum.per_second = sum
        .per_second
        .zip(more.per_second)
        .map(|(sum, more)| sum + more);
}

/// By its name, a counter is of bytes or of things.
fn amount(name: &str, value: f64) -> String {
    if name.ends_with("bytes") {
        bytes(value)
    } else {
        format!("{value:.0}")
    }
}

fn rate(name: &str, per_second: Option<f64>) -> String {
    per_second.map_or_else(|| "-".to_owned(), |rate| amount(name, rate) + "/s")
}

fn bytes(value: f64) -> String {
    let whole = Duration::try_from_secs_f64(value).map_or(0, |whole| whole.as_secs());
    BinaryBytes(whole).to_string()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A terminal on which each page takes the place of the one before.
struct Screen<'a> {
    terminal: &'a Term,
    /// Lines of the last page.
    height: usize,
}

impl<'a> Screen<'a> {
    fn new(terminal: &'a Term) -> Self {
        Self {
            terminal,
            height: 0,
        }
    }

    /// As much of a page as there is room for: a line that is wrapped, or scrolled away, could not be drawn over.
    fn draw(&mut self, page: &[String]) -> io::Result<()> {
        let (rows, columns) = self.terminal.size();
        self.terminal.move_cursor_up(self.height)?;
        self.terminal.clear_to_end_of_screen()?;
        let page = page.iter().take(usize::from(rows).saturating_sub(1).max(1));
        self.height = page.len();
        for line in page {
            let line = truncate_str(line, usize::from(columns).saturating_sub(1), "");
            self.terminal.write_line(&line)?;
        }
        self.terminal.flush()
    }
}

#[cfg(test)]
mod tests;
