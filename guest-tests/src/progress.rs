//! Says what the lab is doing: a line that moves on a terminal, plain lines elsewhere. Everything goes to standard error.

use std::io::{IsTerminal, stderr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Set while test results are being printed: a moving line would overwrite them.
static PLAIN: AtomicBool = AtomicBool::new(false);

/// From now on prints plain lines only.
pub fn plain_lines_only() {
    PLAIN.store(true, Ordering::Relaxed);
}

/// Shows `what` while `work` runs, and how long it took when that is worth telling.
pub fn step<T, E>(what: &str, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let started = Instant::now();
    if !stderr().is_terminal() || PLAIN.load(Ordering::Relaxed) {
        eprintln!("lab: {what}");
        let outcome = work();
        finish(what, started.elapsed(), outcome.is_ok());
        return outcome;
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("lab: {msg} {spinner} {elapsed}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    let outcome = work();
    bar.finish_and_clear();
    finish(what, started.elapsed(), outcome.is_ok());
    outcome
}

/// A fact that the person at the terminal should know.
pub fn note(text: &str) {
    eprintln!("lab: {text}");
}

fn finish(what: &str, took: Duration, good: bool) {
    let seconds = took.as_secs_f64();
    if !good {
        eprintln!("lab: {what}: failed after {seconds:.1} s");
    } else if seconds >= 1.0 {
        eprintln!("lab: {what}: {seconds:.1} s");
    }
}
