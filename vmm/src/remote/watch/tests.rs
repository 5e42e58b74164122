use std::fs::File;
use std::io::{Read, Seek};

use super::*;

const FIRST: &str = "daxhund_vm_state{state=\"NoVm\"} 0\ndaxhund_vm_state{state=\"Running\"} 1\n\
                     daxhund_vcpu_exits_total{vcpu=\"0\",reason=\"mmio_read\"} 100\n\
                     daxhund_vcpu_exits_total{vcpu=\"1\",reason=\"mmio_read\"} 10\n\
                     daxhund_device_read_bytes_total{id=\"d0\"} 0\n\
                     daxhund_region_bytes{id=\"z0\",gpa=\"0x0\",state=\"present\"} 1073741824\n\
                     daxhund_region_bytes{id=\"z0\",gpa=\"0x100000000\",state=\"present\"} 1073741824\n\
                     daxhund_pinned_bytes{space=\"type1\"} 2147483648\n\
                     daxhund_removals_total{outcome=\"refused\"} 2\ndaxhund_removals_waiting 1\n\
                     daxhund_view_age_seconds 0.25\n# EOF\n";

fn frames() -> (Frame, Frame) {
    let start = Instant::now();
    let first = Taken {
        at: start,
        samples: Samples::parse(FIRST).unwrap(),
    };
    let later = FIRST
        .replace("reason=\"mmio_read\"} 100", "reason=\"mmio_read\"} 140")
        .replace("{id=\"d0\"} 0", "{id=\"d0\"} 4194304")
        .replace("reason=\"mmio_read\"} 10\n", "reason=\"mmio_read\"} 4\n");
    let second = Taken {
        at: start + Duration::from_secs(2),
        samples: Samples::parse(&later).unwrap(),
    };
    let elapsed = Duration::from_secs(2);
    (
        Frame::of(&first, None, Duration::ZERO),
        Frame::of(&second, Some(&first), elapsed),
    )
}

#[test]
fn what_came_in_between_is_a_rate() {
    let (first, second) = frames();
    assert_eq!(first.state, "Running");
    let count = |total, per_second| Count { total, per_second };
    assert_eq!(first.exits["mmio_read"], count(110.0, None));
    let of_memory = (first.memory["present"], first.pinned_bytes);
    assert_eq!(of_memory, (2_147_483_648.0, 2_147_483_648.0));
    assert_eq!((first.view_age_ms, first.removals["refused"]), (250, 2.0));
    // 40 of the first vCPU, and 4 of the second, whose count has begun anew.
    assert_eq!(second.exits["mmio_read"], count(144.0, Some(22.0)));
    let read = second.devices["d0"]["read_bytes"];
    assert_eq!(read, count(4_194_304.0, Some(2_097_152.0)));
    let value = serde_json::to_value(&second).unwrap();
    assert_eq!(value["devices"]["d0"]["read_bytes"]["total"], 4_194_304.0);
    assert_eq!(value["pinned_bytes"], 2_147_483_648.0);
    assert_eq!(value["elapsed_ms"], 2000);
}

#[test]
fn a_line_says_what_moves() {
    let (first, second) = frames();
    let line = first.line();
    assert!(line.starts_with("Running; 2.00 GiB present; 2.00 GiB pinned; exits -"));
    assert!(!line.contains("d0"), "{line}");
    let line = second.line();
    assert!(
        line.contains("exits 22/s; d0: read_bytes 2.00 MiB/s"),
        "{line}"
    );
    assert!(line.ends_with("1 removals wait"), "{line}");
}

#[test]
fn where_there_is_nothing_that_is_said() {
    let samples = Samples::parse("daxhund_vm_state{state=\"Created\"} 1\n# EOF\n").unwrap();
    let at = Instant::now();
    let frame = Frame::of(&Taken { at, samples }, None, Duration::ZERO);
    assert_eq!(frame.line(), "Created; no memory; 0 B pinned; exits 0/s");
    let text = serde_json::to_string(&frame).unwrap();
    assert!(!text.contains("-0"), "{text}");
}

#[test]
fn a_page_takes_the_place_of_the_one_before() {
    let (_, second) = frames();
    let page = second.page("daxhund at /s");
    assert_eq!(page[0], "daxhund at /s: Running, watched for 2 s");
    let row = page.last().unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(row.join(" "), "d0 read_bytes 2.00 MiB/s 4.00 MiB");

    let mut file: File = tempfile::tempfile().unwrap();
    let terminal =
        Term::read_write_pair(File::open("/dev/null").unwrap(), file.try_clone().unwrap());
    let mut screen = Screen::new(&terminal);
    let long = "x".repeat(500);
    screen.draw(&[long, "second".into()]).unwrap();
    assert_eq!(screen.height, 2);
    screen.draw(&["third".into()]).unwrap();
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].trim_start_matches(|c| c != 'x').len() < 500);
    assert!(lines[1].ends_with("second"), "{text:?}");
    assert!(lines[2].ends_with("third"), "{text:?}");
}
