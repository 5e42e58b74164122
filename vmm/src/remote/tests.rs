use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;
use crate::api::{ApiError, Call, ErrorKind, Gone, Listener, Reply, Request, Server};
use crate::metrics::{Metrics, View, VmPhase};

struct Ran {
    status: u8,
    output: String,
    errors: String,
}

fn run_as(program: &str, words: &[&str], input: &str) -> Ran {
    let argv = std::iter::once(program).chain(words.iter().copied());
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    let mut input = input.as_bytes();
    let status = run(
        argv.map(OsString::from),
        &mut input,
        &mut output,
        &mut errors,
        None,
    );
    Ran {
        status,
        output: String::from_utf8(output).unwrap(),
        errors: String::from_utf8(errors).unwrap(),
    }
}

fn run_words(words: &[&str]) -> Ran {
    run_as("daxhund-remote", words, "")
}

/// A daxhund that notes what it is asked.
struct Daxhund {
    folder: tempfile::TempDir,
    asked: Arc<Mutex<Vec<String>>>,
    metrics: Metrics,
    _server: Server,
}

impl Daxhund {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::at(&folder.path().join("api.sock")).unwrap();
        let (sender, calls) = channel();
        let sink = move |call| sender.send(call).map_err(|_| Gone);
        let metrics = Metrics::default();
        let server = Server::start(listener, sink, metrics.clone()).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&asked);
        thread::spawn(move || {
            for Call { request, reply } in calls {
                notes.lock().unwrap().push(format!("{request:?}"));
                let _ = reply.send(match request {
                    Request::Info => Ok(Reply::Json(json!({"state": "Running"}))),
                    Request::Regions => Reply::json(&table::tests::two_regions()),
                    Request::AddDisk(_) => Ok(Reply::Json(json!({"id": "d", "bdf": "x"}))),
                    Request::Pause => {
                        let error = ApiError::new(ErrorKind::WrongState, "it does not run");
                        Err(error.context("can't pause the guest"))
                    }
                    _ => Ok(Reply::Empty),
                });
            }
        });
        Self {
            folder,
            asked,
            metrics,
            _server: server,
        }
    }

    fn run(&self, words: &[&str]) -> Ran {
        self.run_with(words, "")
    }

    fn run_with(&self, words: &[&str], input: &str) -> Ran {
        let socket = self.folder.path().join("api.sock");
        let socket = ["--api-socket", socket.to_str().unwrap()];
        run_as("daxhund-remote", &[&socket, words].concat(), input)
    }

    /// Runs what is done without a word and tells what was asked.
    fn asks(&self, words: &[&str], input: &str) -> String {
        let ran = self.run_with(words, input);
        assert_eq!((ran.status, ran.errors.as_str()), (0, ""), "{words:?}");
        assert_eq!(ran.output, "", "{words:?}");
        self.asked.lock().unwrap().pop().unwrap()
    }
}

#[test]
fn subcommands_ask_for_what_they_say() {
    let daxhund = Daxhund::new();
    for (words, asked) in [
        (&["boot"] as &[_], "Boot"),
        (&["delete"], "Delete"),
        (&["shutdown"], "Shutdown"),
        (&["shutdown-vmm"], "VmmShutdown"),
        (&["reboot"], "Reboot"),
        (&["resume"], "Resume"),
        (&["power-button"], "PowerButton"),
        (&["nmi"], "Nmi"),
        (
            &["resize-disk", "--disk", "d0", "--size", "1G"],
            "ResizeDisk { id: \"d0\", bytes: 1073741824 }",
        ),
        (&["counters"], "Counters"),
        (&["drain", "p0"], "Drain { id: \"p0\" }"),
        (
            &["remove-device", "d\"1"],
            "RemoveDevice { id: \"d\\\"1\" }",
        ),
        (
            &["resize", "--balloon", "64M"],
            "Resize { vcpus: None, ram: None, balloon: Some(67108864) }",
        ),
        (
            &["resize", "--cpus", "2", "--memory", "1G"],
            "Resize { vcpus: Some(2), ram: Some(1073741824), balloon: None }",
        ),
    ] {
        assert_eq!(daxhund.asks(words, ""), asked);
    }
}

#[test]
fn words_are_sent_as_they_are_read_on_the_command_line() {
    let daxhund = Daxhund::new();
    let word = "file=/dev/dax1.0,size=2M,id=p";
    let config = Box::new(PmemConfig::parse(word).unwrap());
    assert_eq!(
        daxhund.asks(&["add-pmem", word], ""),
        format!("{:?}", Request::AddPmem(config))
    );
    let word = "cid=3,socket=/run/v";
    let config = Box::new(VsockConfig::parse(word).unwrap());
    assert_eq!(
        daxhund.asks(&["add-vsock", word], ""),
        format!("{:?}", Request::AddVsock(config))
    );
    let word = "tag=t,socket=/run/f";
    let config = Box::new(FsConfig::parse(word).unwrap());
    assert_eq!(
        daxhund.asks(&["add-fs", word], ""),
        format!("{:?}", Request::AddFs(config))
    );
    let word = "device_type=block,socket=/run/b,queue_sizes=[128,64]";
    let config = Box::new(GenericVhostUserConfig::parse(word).unwrap());
    assert_eq!(
        daxhund.asks(&["add-generic-vhost-user", word], ""),
        format!("{:?}", Request::AddGenericVhostUser(config))
    );
    let word = "tap=tap3,num_queues=4,mac=52:54:00:02:d9:01";
    let config = Box::new(NetConfig::parse(word).unwrap());
    assert_eq!(
        daxhund.asks(&["add-net", word], ""),
        format!("{:?}", Request::AddNet(config, Vec::new()))
    );
}

#[test]
fn a_taps_descriptor_goes_beside_the_request() {
    let daxhund = Daxhund::new();
    let (read, _write) = std::io::pipe().unwrap();
    let fd = inherited::tests::leave_open(&read);
    let asked = daxhund.asks(&["add-net", &format!("fd={fd}")], "");
    assert!(asked.starts_with("AddNet(NetConfig"), "{asked}");
    assert!(asked.contains("[OwnedFd"), "{asked}");
    assert!(asked.contains("fds: []"), "{asked}");
    // It was given away.
    let again = daxhund.run(&["add-net", "fd=2000000000"]);
    assert_eq!(again.status, 1);
    assert!(again.errors.contains("is not open"), "{}", again.errors);
}

#[test]
fn a_guest_is_defined_from_a_file_or_standard_input() {
    let daxhund = Daxhund::new();
    let text = r#"{"payload": {"kernel": "/vmlinuz"}}"#;
    let path = daxhund.folder.path().join("config.json");
    std::fs::write(&path, text).unwrap();
    for words in [
        &["create"] as &[_],
        &["create", "-"],
        &["create", path.to_str().unwrap()],
    ] {
        let asked = daxhund.asks(words, text);
        assert!(asked.starts_with("Create(VmConfig"), "{asked}");
    }
    let ran = daxhund.run(&["create", "/no/such/file"]);
    assert_eq!(ran.status, 1);
    assert_eq!(
        ran.errors,
        "daxhund-remote: the configuration can't be read from /no/such/file\n  \
         No such file or directory (os error 2)\n"
    );
}

#[test]
fn answers_are_printed() {
    let daxhund = Daxhund::new();
    let ran = daxhund.run(&["info"]);
    assert_eq!(ran.output, "{\n  \"state\": \"Running\"\n}\n");
    let ran = daxhund.run(&["add-disk", "path=/img"]);
    assert_eq!(ran.output, "{\"bdf\":\"x\",\"id\":\"d\"}\n");
    let ran = daxhund.run(&["ping"]);
    assert_eq!(ran.status, 0);
    assert!(ran.output.contains("\"pid\""), "{}", ran.output);
}

#[test]
fn a_refusal_is_told_line_by_line() {
    let ran = Daxhund::new().run(&["pause"]);
    assert_eq!((ran.status, ran.output.as_str()), (1, ""));
    assert_eq!(
        ran.errors,
        "daxhund-remote: vm.pause was not done: 409 Conflict\n  can't pause the guest\n  it does not run\n"
    );
}

#[test]
fn what_is_wrong_is_told_before_anybody_is_asked() {
    for (words, status, text) in [
        (
            &["--api-socket", "/s", "add-disk", "x=1"] as &[_],
            1,
            "unknown key",
        ),
        (
            &["--api-socket", "/s", "resize", "--balloon", "2X"],
            1,
            "not a size",
        ),
        (&["--api-socket", "/s", "resize"], 1, "nothing to resize"),
        (
            &["--api-socket", "/s", "snapshot", "file:///x"],
            1,
            "not supported by daxhund: snapshot",
        ),
        (&["coredump"], 1, "not supported by daxhund: coredump"),
        (&["boot"], 1, "give --api-socket PATH"),
        (
            &["--api-socket", "/no/such/socket", "ping"],
            1,
            "can't connect to /no/such/socket",
        ),
        (&["--api-socket", "/s", "bot"], 2, "unrecognized subcommand"),
        (&["--api-socket", "/s", "remove-device"], 2, "<ID>"),
        (&["--api-socket", "/s"], 2, "Usage:"),
        (&[], 2, "Usage:"),
    ] {
        let ran = run_words(words);
        assert_eq!(ran.status, status, "{words:?}: {}", ran.errors);
        assert!(ran.errors.contains(text), "{words:?}: {}", ran.errors);
        assert_eq!(ran.output, "", "{words:?}");
    }
}

#[test]
fn help_and_version() {
    let ran = run_words(&["--help"]);
    assert_eq!(ran.status, 0);
    assert!(ran.output.contains("add-pmem") && !ran.output.contains("snapshot"));
    let ran = run_words(&["add-pmem", "--help"]);
    assert!(ran.output.contains("file=PATH"), "{}", ran.output);
    let own = env!("CARGO_PKG_VERSION");
    assert_eq!(
        run_words(&["--version"]).output,
        format!("daxhund-remote {own}\n")
    );
    let ran = run_as("/usr/bin/ch-remote", &["-V"], "");
    assert_eq!(ran.output, format!("ch-remote v53.0.0 (daxhund {own})\n"));
}

#[test]
fn what_only_looks_prints_one_line_of_json_when_asked_to() {
    let daxhund = Daxhund::new();
    let ran = daxhund.run(&["info", "--json"]);
    assert_eq!(ran.output, "{\"state\":\"Running\"}\n");
    let ran = daxhund.run(&["ping", "--json"]);
    assert_eq!((ran.status, ran.output.lines().count()), (0, 1));
    let ran = daxhund.run(&["regions", "--json"]);
    let regions: Value = serde_json::from_str(&ran.output).unwrap();
    assert_eq!(regions["regions"][0]["id"], "z0");
    assert_eq!(ran.output.lines().count(), 1);
    let ran = daxhund.run(&["regions"]);
    assert!(ran.output.starts_with(" ID"), "{}", ran.output);
    assert!(
        ran.output.contains("/dev/dax0.0+0x80000000"),
        "{}",
        ran.output
    );
    // What has JSON only when it says something at all takes no such flag.
    assert_eq!(daxhund.run(&["boot", "--json"]).status, 2);
}

#[test]
fn metrics_are_printed_whole() {
    let ran = Daxhund::new().run(&["metrics"]);
    assert_eq!(ran.status, 0, "{}", ran.errors);
    assert!(ran.output.contains("daxhund_vm_state{state=\"NoVm\"} 1\n"));
    assert!(ran.output.ends_with("# EOF\n"), "{}", ran.output);
}

#[test]
fn a_watch_ends_by_its_count_or_with_the_vm() {
    let daxhund = Daxhund::new();
    let every = ["watch", "--interval", "0.1"];
    let of_state = |state| View {
        state,
        ..View::default()
    };
    daxhund.metrics.publish(of_state(VmPhase::Running));
    let ran = daxhund.run(&[&every[..], &["--count", "2", "--json"]].concat());
    assert_eq!((ran.status, &*ran.errors), (0, ""));
    let frames: Vec<Value> = ran
        .output
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(frames.len(), 2);
    assert!(frames.iter().all(|frame| frame["state"] == "Running"));

    // The VM goes when it has been seen.
    let metrics = daxhund.metrics.clone();
    let asked = Arc::clone(&daxhund.asked);
    let goes = thread::spawn(move || {
        let seen = || asked.lock().unwrap().len() >= 4;
        while !seen() {
            thread::yield_now();
        }
        metrics.publish(of_state(VmPhase::NoVm));
    });
    let ran = daxhund.run(&every);
    goes.join().unwrap();
    assert_eq!((ran.status, &*ran.errors), (0, ""));
    assert!(ran.output.starts_with("Running; "), "{}", ran.output);
    let last = ran.output.lines().last().unwrap();
    assert!(last.starts_with("NoVm; no memory"), "{last}");

    for words in [
        &["--interval", "0"][..],
        &["--interval", "x"],
        &["--count", "0"],
    ] {
        let ran = daxhund.run(&[&["watch"], words].concat());
        assert_eq!(ran.status, 2, "{words:?}: {}", ran.errors);
    }
    let ran = run_words(&["--api-socket", "/no/such/socket", "watch"]);
    assert_eq!(ran.status, 1);
    assert!(ran.errors.contains("can't connect"), "{}", ran.errors);
}

#[test]
fn a_watch_ends_with_the_process_that_is_watched() {
    let daxhund = Daxhund::new();
    let socket = daxhund.folder.path().join("api.sock");
    let asked = Arc::clone(&daxhund.asked);
    let watching = thread::spawn(move || {
        let socket = socket.to_str().unwrap();
        run_words(&["--api-socket", socket, "watch", "--interval", "0.1"])
    });
    while asked.lock().unwrap().is_empty() {
        thread::yield_now();
    }
    drop(daxhund);
    let ran = watching.join().unwrap();
    assert_eq!((ran.status, &*ran.errors), (0, ""));
}
