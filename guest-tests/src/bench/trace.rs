//! When a VMM on the emulated host was started, first entered its guest, and had its guest's user space running.
//!
//! Seen by the host's kernel, in the same way for every VMM: `sched_process_exec` for the start, the first
//! `kvm_entry` for the guest's first instruction, and the guest agent's mark on I/O port 0x80 in `kvm_pio` for user space.
//! A guest is entered hundreds of thousands of times, so the first *exit* switches the recording of entries off.
//!
//! To trace an event the kernel patches its own code, and an emulator that runs each processor on a thread of its own may
//! execute the breakpoint of such a patch after the kernel has forgotten it (`Oops: int3`). So events are switched on once
//! for a host, while it has one processor online; from then on only recording is switched.

use std::time::Duration;

use lab_agent::guest_protocol::READY_PORT_BYTES;

use crate::host::Host;
use crate::host::channel::HostError;

const ROOT: &str = "/sys/kernel/tracing";
const EVENTS: [&str; 3] = ["sched/sched_process_exec", "kvm/kvm_entry", "kvm/kvm_pio"];
const PORT_FILTER: &str = "port == 0x80 && rw == 1";
const STOP_ENTRIES: &str = "disable_event:kvm:kvm_entry:1";

/// A boot's stages, counted from the start of the VMM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BootTimes {
    /// Until the guest's first instruction.
    pub first_instruction: Duration,
    /// Until the guest's user space.
    pub user_space: Duration,
}

/// A boot that could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A stage is missing from the trace.
    #[error("the trace of process {pid} has no {stage}:\n{trace}")]
    Missing {
        /// The stage.
        stage: &'static str,
        /// The VMM's process.
        pid: u32,
        /// The trace.
        trace: String,
    },
}

/// Tracing of a host, ready to record one boot after another.
#[derive(Debug)]
pub struct Tracer<'a> {
    host: &'a Host,
}

impl<'a> Tracer<'a> {
    /// Prepares a host for good.
    pub fn prepare(host: &'a Host) -> Result<Self, HostError> {
        const SECOND_CPU: &str = "/sys/devices/system/cpu/cpu1/online";
        let tracer = Self { host };
        let two = host.run(&["test", "-e", SECOND_CPU])?.status.success();
        if two {
            host.write_file(SECOND_CPU, b"0")?;
        }
        tracer.write("tracing_on", "0")?;
        tracer.write("trace_clock", "mono")?;
        tracer.write("events/kvm/kvm_pio/filter", PORT_FILTER)?;
        for event in EVENTS {
            tracer.write(&format!("events/{event}/enable"), "1")?;
        }
        tracer.write("events/kvm/kvm_exit/trigger", STOP_ENTRIES)?;
        if two {
            host.write_file(SECOND_CPU, b"1")?;
        }
        Ok(tracer)
    }

    /// The host.
    pub fn host(&self) -> &'a Host {
        self.host
    }

    /// Starts to record.
    pub fn start(&self) -> Result<(), HostError> {
        self.write("trace", "")?;
        // It is still on; this takes back what the trigger did, which is a flag and no patch.
        self.write("events/kvm/kvm_entry/enable", "1")?;
        self.write("tracing_on", "1")
    }

    /// Stops recording and reads the times of a VMM whose guest is up.
    pub fn finish(&self, pid: u32) -> Result<BootTimes, TraceError> {
        parse(&self.stop()?, pid)
    }

    /// Stops recording and reads how long a program took to its guest's first instruction, which may be the last one.
    pub fn finish_early(&self, pid: u32) -> Result<Duration, TraceError> {
        let text = self.stop()?;
        Boot::find(&text, pid).map(|boot| boot.first_instruction)
    }

    fn stop(&self) -> Result<String, HostError> {
        self.write("tracing_on", "0")?;
        let text = self.host.read_file(&format!("{ROOT}/trace"))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn write(&self, name: &str, text: &str) -> Result<(), HostError> {
        self.host
            .write_file(&format!("{ROOT}/{name}"), text.as_bytes())
    }
}

/// The part of a trace that is about one VMM.
struct Boot<'a> {
    start: Duration,
    first_instruction: Duration,
    after: Vec<(Duration, &'a str, &'a str)>,
}

impl<'a> Boot<'a> {
    fn find(trace: &'a str, pid: u32) -> Result<Self, TraceError> {
        let mut events: Vec<(Duration, &str, &str)> =
            trace.lines().filter_map(parse_line).collect();
        let wanted = format!(" pid={pid} ");
        let is_start = |event: &(Duration, &str, &str)| {
            event.1 == "sched_process_exec" && event.2.contains(&wanted)
        };
        let at = events
            .iter()
            .position(is_start)
            .ok_or_else(|| missing("start of the VMM", pid, trace))?;
        let after = events.split_off(at);
        let start = after[0].0;
        let entry = after
            .iter()
            .find(|event| event.1 == "kvm_entry")
            .ok_or_else(|| missing("entry into the guest", pid, trace))?;
        Ok(Self {
            start,
            first_instruction: entry.0.saturating_sub(start),
            after,
        })
    }
}

fn missing(stage: &'static str, pid: u32, trace: &str) -> TraceError {
    TraceError::Missing {
        stage,
        pid,
        trace: trace.to_owned(),
    }
}

fn parse(trace: &str, pid: u32) -> Result<BootTimes, TraceError> {
    let boot = Boot::find(trace, pid)?;
    let events = boot.after.iter();
    let marks: Vec<_> = events.filter(|event| event.1 == "kvm_pio").collect();
    let is_mark = |bytes: &&[&(Duration, &str, &str)]| {
        bytes
            .iter()
            .zip(READY_PORT_BYTES)
            .all(|(event, byte)| event.2.contains(&format!(" val {byte:#x} ")))
    };
    let user_space = marks
        .windows(READY_PORT_BYTES.len())
        .find(is_mark)
        .ok_or_else(|| missing("mark of the guest's user space", pid, trace))?;
    Ok(BootTimes {
        first_instruction: boot.first_instruction,
        user_space: user_space[0].0.saturating_sub(boot.start),
    })
}

/// Reads `TASK-PID [CPU] FLAGS SECONDS: EVENT: FIELDS`.
fn parse_line(line: &str) -> Option<(Duration, &str, &str)> {
    if line.starts_with('#') {
        return None;
    }
    let (seconds, rest) = line.match_indices(": ").find_map(|(at, _)| {
        let word = line[..at].split_whitespace().last()?;
        Some((parse_seconds(word)?, &line[at + 2..]))
    })?;
    let (event, fields) = rest.split_once(':')?;
    Some((seconds, event, fields))
}

/// Seconds and microseconds, exactly.
fn parse_seconds(word: &str) -> Option<Duration> {
    let (seconds, micros) = word.split_once('.')?;
    if micros.len() != 6 {
        return None;
    }
    Some(Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
         sh-99    [000] .....     7.000000: sched_process_exec: filename=/bin/ls pid=99 old_pid=99
         daxhund-123     [000] .....     7.145288: sched_process_exec: filename=/lab/bin/daxhund pid=123 old_pid=123
         vcpu0-128       [001] d....     7.245300: kvm_entry: vcpu 0, rip 0x1000290
         vcpu0-128       [000] .....     8.100000: kvm_pio: pio_write at 0x80 size 1 count 1 val 0x5d 
         vcpu0-128       [000] .....     8.200000: kvm_pio: pio_write at 0x80 size 1 count 1 val 0x0 
         vcpu0-128       [000] .....    12.462185: kvm_pio: pio_write at 0x80 size 1 count 1 val 0x5d 
         vcpu0-128       [000] .....    12.464465: kvm_pio: pio_write at 0x80 size 1 count 1 val 0xa2 
         vcpu0-128       [000] .....    12.464750: kvm_pio: pio_write at 0x80 size 1 count 1 val 0x5e 
";

    #[test]
    fn stages_are_counted_from_the_start_of_the_vmm() {
        let times = parse(TRACE, 123).unwrap();
        assert_eq!(times.first_instruction, Duration::from_micros(100_012));
        assert_eq!(
            times.user_space,
            Duration::from_micros(5_316_897),
            "a lone byte on the port is a delay"
        );
    }

    #[test]
    fn a_missing_stage_is_named() {
        let error = parse(TRACE, 124).unwrap_err();
        assert!(matches!(
            error,
            TraceError::Missing {
                stage: "start of the VMM",
                ..
            }
        ));
        let without_mark = TRACE.replace("0xa2", "0x0");
        let error = parse(&without_mark, 123).unwrap_err();
        assert!(matches!(
            error,
            TraceError::Missing {
                stage: "mark of the guest's user space",
                ..
            }
        ));
    }
}
