use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

use super::*;

/// Name and properties.
struct Sample<'a>(&'static str, &'a [(&'static str, &'a str)]);

impl Event for Sample<'_> {
    fn source(&self) -> &'static str {
        "vmm"
    }

    fn name(&self) -> &'static str {
        self.0
    }

    fn properties(&self) -> Vec<(&'static str, &str)> {
        self.1.to_vec()
    }
}

fn read_all(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.ends_with("}\n\n"), "{text:?}");
    text.split_terminator("\n\n")
        .map(|object| serde_json::from_str(object).unwrap())
        .collect()
}

fn fifo(folder: &tempfile::TempDir) -> PathBuf {
    let path = folder.path().join("events");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    path
}

#[test]
fn events_are_objects_in_the_order_they_were_sent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events");
    std::fs::write(&path, "what an earlier guest left").unwrap();
    let monitor = EventMonitor::open(&path, Form::Ch).unwrap();
    let send = monitor.monitor();
    send.send(&Sample("starting", &[]));
    send.clone().send(&Sample(
        "device-removed",
        &[("id", "disk{0}\""), ("bdf", "0000:00:05.0")],
    ));
    drop(monitor);
    // After the end there is nobody to tell.
    send.send(&Sample("shutdown", &[]));

    let events = read_all(&path);
    assert_eq!(events.len(), 2);
    let keys: Vec<_> = events[0].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["event", "properties", "source", "timestamp"]);
    assert_eq!(events[0]["source"], "vmm");
    assert_eq!(events[0]["event"], "starting");
    assert_eq!(events[0]["properties"], Value::Null);
    assert!(events[0]["timestamp"]["secs"].is_u64());
    assert!(events[0]["timestamp"]["nanos"].is_u64());
    assert_eq!(events[1]["event"], "device-removed");
    assert_eq!(events[1]["properties"]["id"], "disk(0)\"");
    assert_eq!(events[1]["properties"]["bdf"], "0000:00:05.0");
}

#[test]
fn braces_are_those_of_objects_only() {
    let text = event::text(
        &Sample("panic", &[("event", "}{{}")]),
        Duration::new(3, 7),
        Form::Ch,
    );
    assert_eq!(text.matches('{').count(), 3);
    assert_eq!(text.matches('}').count(), 3);
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        value["timestamp"],
        serde_json::json!({"secs": 3, "nanos": 7})
    );
    assert_eq!(value["properties"]["event"], ")(()");
    // The order a reader sees.
    let at = |key: &str| text.find(&format!("\"{key}\":")).unwrap();
    assert!(at("timestamp") < at("source"));
    assert!(at("source") < at("properties"));
}

#[test]
fn a_fifo_needs_no_reader_to_be_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = fifo(&folder);
    let monitor = EventMonitor::open(&path, Form::Ch).unwrap();
    monitor.monitor().send(&Sample("booted", &[]));
    // The reader comes late and finds what was said before.
    let mut lines = BufReader::new(File::open(&path).unwrap()).lines();
    let first = lines
        .by_ref()
        .find(|line| line.as_ref().unwrap().contains("event\""));
    assert_eq!(first.unwrap().unwrap(), "  \"event\": \"booted\",");
}

#[test]
fn without_a_reader_nothing_waits_and_the_queue_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let path = fifo(&folder);
    let monitor = EventMonitor::open(&path, Form::Ch).unwrap();
    let send = monitor.monitor();
    let id = "x".repeat(1000);
    for _ in 0..QUEUE * 2 {
        send.send(&Sample("reset", &[("id", &id)]));
    }
    let shared = Arc::clone(&monitor.shared);
    assert!(shared.queue().events.len() <= QUEUE);
    assert!(shared.queue().warned);
    drop(monitor);
    assert!(
        !shared.queue().events.is_empty(),
        "what nobody read is lost"
    );
}

#[test]
fn a_descriptor_that_is_open_already() {
    let (mut read, write) = std::io::pipe().unwrap();
    let monitor = EventMonitor::inherited(write.into(), Form::Ch).unwrap();
    let send = monitor.monitor();
    send.send(&Sample("paused", &[]));
    drop(monitor);
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"paused\""), "{text}");
}

#[test]
fn a_reader_that_goes_away_ends_the_events_and_nothing_else() {
    let (read, mut write) = std::io::pipe().unwrap();
    let copy = write.as_fd().try_clone_to_owned().unwrap();
    let monitor = EventMonitor::inherited(copy, Form::Ch).unwrap();
    drop(read);
    assert!(write.write_all(b"x").is_err(), "nobody reads any more");
    let send = monitor.monitor();
    send.send(&Sample("paused", &[]));
    send.send(&Sample("resumed", &[]));
    drop(monitor);
    let shared = send.0.unwrap();
    assert!(shared.queue().ended && shared.queue().events.is_empty());
}

#[test]
fn what_no_events_can_be_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let error = EventMonitor::open(&folder.path().join("no/folder"), Form::Ch).unwrap_err();
    assert!(error.to_string().contains("no/folder"), "{error}");
    assert!(EventMonitor::open(folder.path(), Form::Ch).is_err());
    let (read, _write) = std::io::pipe().unwrap();
    let error = EventMonitor::inherited(read.into(), Form::Ch).unwrap_err();
    assert!(matches!(error, OpenError::ReadOnly), "{error}");
}

#[test]
fn an_event_monitor_that_is_off_takes_everything() {
    Monitor::off().send(&Sample("booting", &[]));
}

#[test]
fn json_lines_are_the_same_objects_each_on_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events");
    let monitor = EventMonitor::open(&path, Form::JsonLines).unwrap();
    let send = monitor.monitor();
    send.send(&Sample("starting", &[]));
    send.send(&Sample("backend-lost", &[("why", "two\nlines {")]));
    drop(monitor);
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.matches('\n').count(), 2, "{text:?}");
    let events: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(events[0]["event"], "starting");
    assert_eq!(events[0]["properties"], Value::Null);
    assert_eq!(events[1]["properties"]["why"], "two\nlines (");
    for (name, form) in [("ch", Form::Ch), ("jsonl", Form::JsonLines)] {
        assert_eq!(
            (name.parse(), form.to_string()),
            (Ok(form), name.to_owned())
        );
    }
    assert_eq!("json".parse::<Form>(), Err(UnknownForm));
}
