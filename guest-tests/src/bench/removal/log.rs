//! What a VMM's log and the host's kernel tell of a removal, by the host's clock.

use std::time::Duration;

use crate::host::Host;
use crate::host::channel::HostError;

const TRACING: &str = "/sys/kernel/tracing";
/// The kernel's function that takes a device's page structures down, on every version there is.
const TEARDOWN: &str = "arch_remove_memory";
const NANOS_PER_DAY: u64 = 24 * 3600 * 1_000_000_000;

/// What daxhund's log says when it has noticed a loss, and when devices reach the memory no more.
const NOTICED: &str = "a device goes away and nobody asked";
const CUT: &str = "devices do not reach it any more";
/// How it tells how long that took.
const CUT_FIELD: &str = "elapsed_us=";

/// Has the kernel note when it takes page structures down; not on a kernel that cannot.
pub(super) fn trace_teardown(host: &Host) -> Result<(), HostError> {
    let script = format!(
        "cd {TRACING} && echo mono > trace_clock && echo 'p:teardown {TEARDOWN}' >> kprobe_events && \
         echo 1 > events/kprobes/teardown/enable; echo 1 > tracing_on"
    );
    host.run(&["sh", "-c", &script]).map(drop)
}

pub(super) fn clear_trace(host: &Host) -> Result<(), HostError> {
    host.write_file(&format!("{TRACING}/trace"), b"")
}

/// When the page structures began to go, after a moment of the monotonic clock.
pub(super) fn teardown(host: &Host, from_ns: u64) -> Result<Option<Duration>, HostError> {
    Ok(parse_teardown(
        &host.read_text(&format!("{TRACING}/trace"))?,
        from_ns,
    ))
}

/// As in `lab-agent-412 [000] ..... 123.456789: teardown: (arch_remove_memory+0x0/0x90)`.
fn parse_teardown(trace: &str, from_ns: u64) -> Option<Duration> {
    let from = Duration::from_nanos(from_ns);
    let time = |line: &str| {
        let (before, _) = line.split_once(": teardown: ")?;
        let (seconds, micros) = before.split_whitespace().last()?.split_once('.')?;
        let micros = Duration::from_micros(micros.parse().ok()?);
        Some(Duration::from_secs(seconds.parse().ok()?) + micros)
    };
    let mut times = trace.lines().filter_map(time);
    times.find_map(|time| time.checked_sub(from))
}

/// What daxhund says of a loss.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Told {
    /// From a moment of the real-time clock to the first sign.
    pub(super) noticed: Option<Duration>,
    /// To devices not reaching the memory.
    pub(super) cut: Option<Duration>,
    /// What the unmap took.
    pub(super) unmap: Option<Duration>,
}

/// Reads it from the log of a VMM.
pub(super) fn told(log: &str, from_ns: u64) -> Told {
    let line = |text: &str| log.lines().find(|line| line.contains(text));
    let cut = line(CUT);
    let micros = |line: &str| {
        let (_, after) = line.split_once(CUT_FIELD)?;
        let digits = after.split(|c: char| !c.is_ascii_digit()).next()?;
        Some(Duration::from_micros(digits.parse().ok()?))
    };
    Told {
        noticed: line(NOTICED).and_then(|line| after(line, from_ns)),
        cut: cut.and_then(|line| after(line, from_ns)),
        unmap: cut.and_then(micros),
    }
}

/// A line starts with its time, as in `2026-11-28T21:03:02.123456Z`: the time of the day is enough.
fn after(line: &str, from_ns: u64) -> Option<Duration> {
    let (_, rest) = line.split_once('T')?;
    let (time, _) = rest.split_once('Z')?;
    let (clock, fraction) = time.split_once('.')?;
    let mut parts = clock.split(':').map(str::parse::<u64>);
    let [hours, minutes, seconds] = [
        parts.next()?.ok()?,
        parts.next()?.ok()?,
        parts.next()?.ok()?,
    ];
    let nanos = format!("{fraction:0<9}").get(..9)?.parse::<u64>().ok()?;
    let of_day = (hours * 3600 + minutes * 60 + seconds) * 1_000_000_000 + nanos;
    let since = (of_day + NANOS_PER_DAY - from_ns % NANOS_PER_DAY) % NANOS_PER_DAY;
    // A line from before would be a day late.
    (since < NANOS_PER_DAY / 2).then(|| Duration::from_nanos(since))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_s_times_are_times_of_the_day() {
        let day = 20_000 * NANOS_PER_DAY;
        let at = day + (21 * 3600 + 3 * 60 + 2) * 1_000_000_000;
        let line = "2026-11-28T21:03:02.123456Z  WARN a device goes away";
        assert_eq!(after(line, at), Some(Duration::from_micros(123_456)));
        assert_eq!(after(line, at + 500_000_000), None);
        let line = "2026-11-29T00:00:00.5Z  WARN";
        let before_midnight = day + NANOS_PER_DAY - 1_000_000_000;
        assert_eq!(
            after(line, before_midnight),
            Some(Duration::from_millis(1500))
        );
    }

    #[test]
    fn the_first_sign_and_the_unmap_are_found() {
        let log = "1970-01-01T00:00:01.000100Z  WARN a device goes away and nobody asked device=dax1.0 by=DriverGone\n\
                   1970-01-01T00:00:01.000200Z  WARN a device goes away and nobody asked device=dax1.0 by=ProbeFailed\n\
                   1970-01-01T00:00:01.020300Z  WARN devices do not reach it any more ranges=1 elapsed_us=20100\n";
        let expected = Told {
            noticed: Some(Duration::from_micros(100)),
            cut: Some(Duration::from_micros(20_300)),
            unmap: Some(Duration::from_micros(20_100)),
        };
        assert_eq!(told(log, 1_000_000_000), expected);
        assert_eq!(told("nothing", 0), Told::default());
    }

    #[test]
    fn a_teardown_before_the_start_is_another_s() {
        let trace = "# tracer: nop\n\
                     sh-1 [000] d..1. 10.000100: teardown: (arch_remove_memory+0x0/0x90)\n\
                     lab-agent-9 [000] d..1. 12.070100: teardown: (arch_remove_memory+0x0/0x90)\n";
        assert_eq!(
            parse_teardown(trace, 12_000_000_000),
            Some(Duration::from_micros(70_100))
        );
        assert_eq!(parse_teardown(trace, 13_000_000_000), None);
    }
}
