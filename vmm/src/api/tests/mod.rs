//! The server over its real socket, with an owner that does what a test says.

mod bodies;
mod descriptors;
mod hostile;
mod life;
mod openapi;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::routes::ENDPOINTS;
use super::*;
use crate::metrics::{Metrics, View, VmPhase};
use crate::remote::{Client, ClientError, Method, Refusal, Response};

/// Nothing takes this long unless it is wrong.
const DEADLINE: Duration = Duration::from_secs(20);

/// A server and the end of what its clients ask.
struct Api {
    folder: tempfile::TempDir,
    metrics: Metrics,
    calls: Option<Receiver<Call>>,
    server: Option<Server>,
}

impl Api {
    fn start(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::at(&folder.path().join("api.sock")).unwrap();
        let (sender, calls) = channel();
        let sink = move |call| sender.send(call).map_err(|_| Gone);
        let metrics = Metrics::default();
        let server = Server::start_with(listener, sink, metrics.clone(), limits);
        Self {
            server: Some(server.unwrap()),
            folder,
            metrics,
            calls: Some(calls),
        }
    }

    /// A server whose owner answers everything by `answer`.
    fn answering(answer: impl FnMut(Request) -> Answer + Send + 'static) -> Self {
        Self::answering_within(Limits::default(), answer)
    }

    fn answering_within(
        limits: Limits,
        mut answer: impl FnMut(Request) -> Answer + Send + 'static,
    ) -> Self {
        let mut api = Self::start(limits);
        let calls = api.calls.take().unwrap();
        // Ends with the server, which holds the other end.
        thread::spawn(move || {
            for Call { request, reply } in calls {
                let _ = reply.send(answer(request));
            }
        });
        api
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    fn client(&self) -> Client {
        Client::new(self.path())
    }

    /// The next call that reached the owner.
    fn call(&self) -> Call {
        let calls = self.calls.as_ref().expect("nobody else takes them");
        calls.recv_timeout(DEADLINE).expect("a call")
    }

    fn raw(&self) -> Raw {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Raw(BufReader::new(stream))
    }

    /// Sends `bytes` over a new connection and reads one answer.
    fn exchange(&self, bytes: impl AsRef<[u8]>) -> Http {
        let mut raw = self.raw();
        raw.send(bytes);
        raw.answer()
    }

    /// The server still serves.
    fn is_well(&self) {
        assert_eq!(get(&self.client(), "vmm.ping").unwrap().status, 200);
    }
}

/// A connection without a library in between.
struct Raw(BufReader<UnixStream>);

/// One answer.
#[derive(Debug)]
struct Http {
    status: u16,
    head: String,
    body: String,
}

impl Raw {
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    fn answer(&mut self) -> Http {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(self.0.read_line(&mut head).unwrap(), 0, "closed: {head:?}");
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        // In the one spelling the contract's client knows.
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.0.read_exact(&mut body).unwrap();
        let body = String::from_utf8(body).unwrap();
        Http { status, head, body }
    }

    /// What comes until the server closes.
    fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        // A reset is a close, too.
        let _ = self.0.read_to_end(&mut rest);
        String::from_utf8(rest).unwrap()
    }
}

impl Http {
    fn chain(&self) -> Vec<String> {
        serde_json::from_str(&self.body).unwrap()
    }
}

fn get(client: &Client, name: &str) -> Result<Response, ClientError> {
    client.call(Method::Get, name, None, Vec::new())
}

fn put(client: &Client, name: &str) -> Result<Response, ClientError> {
    client.call(Method::Put, name, None, Vec::new())
}

fn put_json(client: &Client, name: &str, body: &Value) -> Result<Response, ClientError> {
    let body = body.to_string().into_bytes();
    client.call(Method::Put, name, Some(body), Vec::new())
}

/// What a request was refused with.
fn refusal(answer: Result<Response, ClientError>) -> Refusal {
    match answer {
        Err(ClientError::Refused { refusal, .. }) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// The commands themselves are run by the guest tests.
#[test]
fn the_readme_has_a_request_for_every_path() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    let readme = std::fs::read_to_string(path).unwrap();
    let (_, section) = readme.split_once("## REST by hand").unwrap();
    let shown: BTreeSet<String> = section
        .lines()
        .filter_map(|line| line.strip_prefix("call "))
        .map(|words| {
            let name = words.split_whitespace().next().unwrap();
            let method = if words.contains(" -X PUT") {
                "PUT"
            } else {
                "GET"
            };
            format!("{method} {name}")
        })
        .collect();
    let paths = ENDPOINTS
        .iter()
        .map(|endpoint| format!("{} {}", endpoint.method, endpoint.name));
    assert_eq!(shown, paths.collect());
}

#[test]
fn the_paths_are_those_of_the_contract() {
    let contract = [
        // daxhund's own.
        "GET openapi.json",
        "GET vm.counters",
        "GET vm.info",
        // daxhund's own.
        "GET vm.regions",
        "GET vmm.metrics",
        "GET vmm.ping",
        "PUT vm.add-device",
        "PUT vm.add-disk",
        "PUT vm.add-fs",
        "PUT vm.add-generic-vhost-user",
        "PUT vm.add-net",
        "PUT vm.add-pmem",
        "PUT vm.add-user-device",
        "PUT vm.add-vdpa",
        "PUT vm.add-vsock",
        "PUT vm.boot",
        "PUT vm.coredump",
        "PUT vm.create",
        "PUT vm.delete",
        "PUT vm.nmi",
        "PUT vm.pause",
        "PUT vm.power-button",
        "PUT vm.reboot",
        "PUT vm.receive-migration",
        "PUT vm.remove-device",
        // daxhund's own.
        "PUT vm.drain",
        "PUT vm.resize",
        "PUT vm.resize-disk",
        "PUT vm.resize-zone",
        "PUT vm.restore",
        "PUT vm.resume",
        "PUT vm.send-migration",
        "PUT vm.shutdown",
        "PUT vm.snapshot",
        "PUT vmm.shutdown",
    ];
    let ours: BTreeSet<String> = ENDPOINTS
        .iter()
        .map(|endpoint| format!("{} {}", endpoint.method, endpoint.name))
        .collect();
    assert_eq!(ours, contract.map(str::to_owned).into());
    assert_eq!(ours.len(), ENDPOINTS.len(), "no path is there twice");

    // And each of them is really served.
    let api = Api::answering(|_| Ok(Reply::Empty));
    for endpoint in ENDPOINTS {
        let request = format!(
            "{} /api/v1/{} HTTP/1.1\r\n\r\n",
            endpoint.method, endpoint.name
        );
        assert_ne!(api.exchange(request).status, 404, "{}", endpoint.name);
    }
}

#[test]
fn requests_without_a_body_reach_the_owner() {
    let api = Api::start(Limits::default());
    for (name, request) in [
        ("vmm.shutdown", "VmmShutdown"),
        ("vm.boot", "Boot"),
        ("vm.delete", "Delete"),
        ("vm.shutdown", "Shutdown"),
        ("vm.reboot", "Reboot"),
        ("vm.pause", "Pause"),
        ("vm.resume", "Resume"),
        ("vm.power-button", "PowerButton"),
        ("vm.nmi", "Nmi"),
    ] {
        let client = api.client();
        let asking = thread::spawn(move || put(&client, name));
        let Call {
            request: got,
            reply,
        } = api.call();
        assert_eq!(format!("{got:?}"), request);
        reply.send(Ok(Reply::Empty)).unwrap();
        let response = asking.join().unwrap().unwrap();
        assert_eq!((response.status, response.body.len()), (204, 0), "{name}");
    }
}

#[test]
fn what_there_is_to_say_is_json() {
    let info = json!({"state": "Running", "config": {"é": 1}});
    let answer = info.clone();
    let api = Api::answering(move |request| match request {
        Request::Info => Ok(Reply::Json(answer.clone())),
        Request::Counters => Reply::json(&[1, 2]),
        other => panic!("{other:?}"),
    });
    let http = api.exchange("GET /api/v1/vm.info HTTP/1.1\r\n\r\n");
    assert_eq!(http.status, 200);
    assert!(http.head.contains("Content-Type: application/json\r\n"));
    assert_eq!(serde_json::from_str::<Value>(&http.body).unwrap(), info);
    assert_eq!(get(&api.client(), "vm.counters").unwrap().body, b"[1,2]");
}

#[test]
fn the_contracts_own_client_can_read_the_head() {
    let api = Api::answering(|request| match request {
        Request::Info => Ok(Reply::Json(json!({}))),
        _ => Ok(Reply::Empty),
    });
    for (request, status) in [
        ("GET /api/v1/vm.info", 200),
        ("PUT /api/v1/vm.boot", 204),
        ("GET /api/v1/vm.boot", 400),
        ("GET /nowhere", 404),
        ("PUT /api/v1/vm.snapshot", 500),
    ] {
        let http = api.exchange(format!("{request} HTTP/1.1\r\nAccept: */*\r\n\r\n"));
        let first = http.head.lines().next().unwrap();
        let number = first.strip_prefix("HTTP/1.1 ").unwrap().trim();
        assert_eq!(number.parse(), Ok(status), "{first:?}");
        let told = http.head.contains("\r\nContent-Length: ");
        assert_eq!(told, !http.body.is_empty());
    }
}

#[test]
fn every_kind_of_error_has_its_status_and_tells_its_chain() {
    let kinds = [
        (ErrorKind::NotFound, 404),
        (ErrorKind::WrongState, 409),
        (ErrorKind::BadRequest, 400),
        (ErrorKind::Busy, 429),
        (ErrorKind::NotSupported, 500),
        (ErrorKind::Internal, 500),
    ];
    let mut left = kinds.into_iter();
    let api = Api::answering(move |_| {
        let kind = left.next().unwrap().0;
        Err(ApiError::new(kind, "inner \"quoted\"").context("outer"))
    });
    for (_, status) in kinds {
        let refusal = refusal(put(&api.client(), "vm.boot"));
        assert_eq!(refusal.status, status);
        assert_eq!(refusal.chain, ["outer", "inner \"quoted\""]);
    }
}

#[test]
fn a_ping_needs_no_owner() {
    let mut api = Api::start(Limits::default());
    // Nobody takes calls any more.
    api.calls = None;
    let pong: Value =
        serde_json::from_slice(&get(&api.client(), "vmm.ping").unwrap().body).unwrap();
    assert_eq!(pong["pid"], std::process::id());
    assert_eq!(pong["version"], "53.0.0");
    assert!(pong["build_version"].as_str().unwrap().contains("daxhund"));
    assert_eq!(pong["features"], json!([]));

    let refusal = refusal(put(&api.client(), "vm.boot"));
    assert_eq!(refusal.status, 500);
    assert_eq!(refusal.chain[0], "vm.boot was not done");
    assert!(refusal.chain[1].contains("daxhund is ending"));
}

#[test]
fn metrics_are_of_now_and_an_owner_that_is_busy_is_not_waited_for() {
    let mut api = Api::start(Limits::default());
    let get = "GET /api/v1/vmm.metrics HTTP/1.1\r\n\r\n";
    let state = |http: &Http, state: &str| {
        assert_eq!(http.status, 200);
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        assert!(
            http.head.contains(&format!("Content-Type: {kind}\r\n")),
            "{}",
            http.head
        );
        let line = format!("daxhund_vm_state{{state=\"{state}\"}} 1\n");
        assert!(http.body.contains(&line), "{}", http.body);
        assert!(http.body.ends_with("# EOF\n"), "{}", http.body);
    };
    // Nobody answers: what is known is told, before there is anything.
    state(&api.exchange(get), "NoVm");
    // The first question is still in the queue.
    let _ = api.call();
    let mut raw = api.raw();
    raw.send(get);
    let Call { request, reply } = api.call();
    assert!(matches!(request, Request::Metrics), "{request:?}");
    api.metrics.publish(View {
        state: VmPhase::Running,
        ..View::default()
    });
    reply.send(Ok(Reply::Empty)).unwrap();
    state(&raw.answer(), "Running");
    // The owner has gone.
    api.calls = None;
    state(&api.exchange(get), "Running");
    let body = "GET /api/v1/vmm.metrics HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
    assert_eq!(api.exchange(body).status, 400);
}

#[test]
fn what_is_not_built_says_so() {
    let api = Api::start(Limits::default());
    for name in ["vm.snapshot", "vm.resize-zone", "vm.add-vdpa"] {
        for answer in [
            put(&api.client(), name),
            put_json(&api.client(), name, &json!({"id": "x"})),
        ] {
            let refusal = refusal(answer);
            assert_eq!(refusal.status, 500);
            assert_eq!(refusal.chain, [format!("not supported by daxhund: {name}")]);
        }
    }
}

#[test]
fn unknown_paths_and_wrong_methods() {
    let api = Api::start(Limits::default());
    for path in [
        "/",
        "/api/v1/",
        "/api/v1/vm.infos",
        "/api/v1/vm.info/",
        "/api/v1/vm%2einfo",
        "/api/v2/vm.info",
        "/api/v1/../v1/vm.info",
    ] {
        let http = api.exchange(format!("GET {path} HTTP/1.1\r\n\r\n"));
        assert_eq!(http.status, 404, "{path}");
        assert!(http.chain()[0].contains(&format!("no such path: {path};")));
    }
    for (method, name, right) in [
        ("GET", "vm.boot", "PUT"),
        ("PUT", "vm.info", "GET"),
        ("POST", "vm.create", "PUT"),
        ("DELETE", "vm.delete", "PUT"),
        ("MADEUP", "vmm.ping", "GET"),
    ] {
        let http = api.exchange(format!("{method} /api/v1/{name} HTTP/1.1\r\n\r\n"));
        assert_eq!(http.status, 400, "{method} {name}");
        assert_eq!(
            http.chain(),
            [format!(
                "{name} is asked for with {right}, not with {method}"
            )]
        );
    }
}
