//! How far a long pin is, told to those who watch: metrics, events, and a bar on a terminal.
//!
//! Most pins are over before anybody has looked: nothing is said of those that take less than [`WORTH_SAYING`]. All are counted.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use daxhund_pin::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::metrics::Metrics;
use crate::monitor::{Event, Monitor};

/// From here on somebody may wonder.
const WORTH_SAYING: Duration = Duration::from_secs(1);

const BAR: &str =
    "pinning guest memory {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left";

/// Of one pin.
pub(super) struct PinProgress<'a> {
    monitor: &'a Monitor,
    metrics: &'a Metrics,
    /// As long as was told last; `None`: there was nothing to pin.
    elapsed: Option<Duration>,
    bar: Option<ProgressBar>,
}

impl<'a> PinProgress<'a> {
    pub(super) fn new(monitor: &'a Monitor, metrics: &'a Metrics) -> Self {
        Self {
            monitor,
            metrics,
            elapsed: None,
            bar: None,
        }
    }

    pub(super) fn tell(&mut self, progress: Progress) {
        self.elapsed = Some(progress.elapsed);
        self.metrics
            .pinning(progress.done_bytes, progress.total_bytes);
        if progress.elapsed < WORTH_SAYING {
            return;
        }
        let text = |number: u64| number.to_string();
        let eta_ms = progress.eta.map(|eta| eta.as_millis().to_string());
        self.monitor.send(&Event::PinProgress {
            done_bytes: &text(progress.done_bytes),
            total_bytes: &text(progress.total_bytes),
            bytes_per_second: progress.rate.map(text).as_deref(),
            eta_ms: eta_ms.as_deref(),
        });
        if self.bar.is_none() && stderr().is_terminal() {
            self.bar = Some(bar(progress.total_bytes));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(progress.done_bytes);
        }
    }
}

impl Drop for PinProgress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if let Some(elapsed) = self.elapsed {
            self.metrics.pinned(elapsed);
        }
    }
}

fn bar(total_bytes: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr());
    // The template is a constant that the test below reads.
    if let Ok(style) = ProgressStyle::with_template(BAR) {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_can_be_drawn() {
        ProgressStyle::with_template(BAR).unwrap();
        let bar = bar(100);
        bar.set_draw_target(ProgressDrawTarget::hidden());
        bar.set_position(50);
        assert_eq!((bar.position(), bar.length()), (50, Some(100)));
    }
}
