//! Clients that are wrong, slow or worse.

use std::net::Shutdown;
use std::time::Instant;

use super::*;

const PING: &str = "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";

fn short() -> Limits {
    Limits {
        connections: 4,
        head_timeout: Duration::from_millis(200),
        body_timeout: Duration::from_millis(200),
        idle: Duration::from_millis(5),
        ..Limits::default()
    }
}

#[test]
fn what_is_no_http_is_refused() {
    let api = Api::start(Limits::default());
    for bytes in [
        b"garbage\r\n\r\n".as_slice(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /api/v1/vmm.ping HTTP/9.9\r\n\r\n",
        b"GET\0/api/v1/vmm.ping HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"PUT /api/v1/vm.boot HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    ] {
        let mut raw = api.raw();
        raw.send(bytes);
        let rest = raw.rest();
        let refused = rest.starts_with("HTTP/1.1 400 ") || rest.is_empty();
        assert!(refused, "{:?}: {rest}", String::from_utf8_lossy(bytes));
    }
    api.is_well();
}

#[test]
fn a_head_has_a_size() {
    let api = Api::start(Limits::default());
    let long = "x".repeat(100 << 10);
    for head in [
        format!("GET /{long} HTTP/1.1\r\n\r\n"),
        format!("GET /api/v1/vmm.ping HTTP/1.1\r\nX-Long: {long}\r\n\r\n"),
        format!(
            "GET /api/v1/vmm.ping HTTP/1.1\r\n{}\r\n",
            "A: b\r\n".repeat(2000)
        ),
    ] {
        let mut raw = api.raw();
        // The server may close before all is sent.
        let _ = raw.0.get_mut().write_all(head.as_bytes());
        let rest = raw.rest();
        assert!(rest.starts_with("HTTP/1.1 4") || rest.is_empty(), "{rest}");
    }
    api.is_well();
}

#[test]
fn a_body_has_a_size() {
    let api = Api::start(Limits::default());
    // Nothing of it is waited for when the length is told.
    let http = api.exchange("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n");
    assert_eq!(http.status, 400);
    assert!(http.chain()[0].contains("the body of vm.create is too long: 1048576 bytes"));
    let http = api.exchange(
        "PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n\r\n",
    );
    assert_eq!(http.status, 400, "not 100");

    let mut raw = api.raw();
    raw.send("PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    for _ in 0..20 {
        let _ = raw.0.get_mut().write_all(chunk.as_bytes());
    }
    assert_eq!(raw.answer().status, 400);
    api.is_well();
}

#[test]
fn a_client_that_waits_to_be_told_to_go_on() {
    let api = Api::answering(|request| {
        assert!(matches!(request, Request::RemoveDevice { .. }));
        Ok(Reply::Empty)
    });
    let mut raw = api.raw();
    raw.send("PUT /api/v1/vm.remove-device HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n");
    assert_eq!(raw.answer().status, 100);
    raw.send("{\"id\":\"a\"}");
    assert_eq!(raw.answer().status, 204);
}

#[test]
fn a_head_that_comes_slowly_is_not_waited_for() {
    let api = Api::start(short());
    let start = Instant::now();
    let mut slow = api.raw();
    slow.send("GET /api/v1/vm");
    assert_eq!(slow.rest(), "");
    // Nor is a second one.
    let mut slow = api.raw();
    slow.send(PING);
    assert_eq!(slow.answer().status, 200);
    slow.send("GET /api/v1/vm");
    assert_eq!(slow.rest(), "");
    assert!(start.elapsed() < DEADLINE / 2);
    api.is_well();
}

/// Some clients connect once and come back after hours.
#[test]
fn a_connection_may_be_silent() {
    let api = Api::start(short());
    let silent = api.raw();
    let mut between = api.raw();
    between.send("GET /nowhere HTTP/1.1\r\n\r\n");
    assert_eq!(between.answer().status, 404);
    // Longer than a head may take: by then the server has closed one that was begun after both.
    let mut slow = api.raw();
    slow.send("GET /api/v1/vm");
    assert_eq!(slow.rest(), "");
    for mut client in [silent, between] {
        client.send(PING);
        assert_eq!(client.answer().status, 200);
    }
}

#[test]
fn a_body_that_comes_slowly_is_not_waited_for() {
    let api = Api::start(short());
    let http = api.exchange("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 10\r\n\r\n{");
    assert_eq!(http.status, 400);
    assert!(
        http.chain()[0].contains("did not come within 0.2 s"),
        "{http:?}"
    );
    let http =
        api.exchange("PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{");
    assert_eq!(http.status, 400);
}

#[test]
fn a_client_that_has_no_more_to_send_gets_its_answer() {
    let api = Api::answering(|_| Ok(Reply::Empty));
    let mut raw = api.raw();
    raw.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    raw.0.get_ref().shutdown(Shutdown::Write).unwrap();
    assert_eq!(raw.answer().status, 204);
    assert_eq!(raw.rest(), "");

    // Half of a request is none.
    let mut raw = api.raw();
    raw.send("PUT /api/v1/vm.boot HT");
    raw.0.get_ref().shutdown(Shutdown::Write).unwrap();
    let rest = raw.rest();
    assert!(
        rest.is_empty() || rest.starts_with("HTTP/1.1 400"),
        "{rest}"
    );
    let mut raw = api.raw();
    raw.send("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 10\r\n\r\n{");
    raw.0.get_ref().shutdown(Shutdown::Write).unwrap();
    let http = raw.answer();
    assert_eq!(http.status, 400);
    assert!(http.chain()[0].contains("ended too early"), "{http:?}");
}

#[test]
fn requests_in_a_row_are_answered_in_their_order() {
    let api = Api::answering(|request| match request {
        Request::Info => Ok(Reply::Json(json!("info"))),
        _ => Ok(Reply::Empty),
    });
    let mut raw = api.raw();
    raw.send(format!(
        "{PING}GET /api/v1/vm.info HTTP/1.1\r\n\r\n\
         PUT /api/v1/vm.boot HTTP/1.1\r\n\r\nGET /nowhere HTTP/1.1\r\nConnection: close\r\n\r\n"
    ));
    assert!(raw.answer().body.contains("build_version"));
    assert_eq!(raw.answer().body, "\"info\"");
    assert_eq!(raw.answer().status, 204);
    assert_eq!(raw.answer().status, 404);
    assert_eq!(raw.rest(), "");
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody() {
    let big = "x".repeat(1 << 20);
    let api = Api::answering_within(short(), move |_| Ok(Reply::Json(json!(big))));
    let mut deaf: Vec<_> = (0..6).map(|_| api.raw()).collect();
    for raw in &mut deaf {
        // Those whose place was taken are closed.
        let request = "GET /api/v1/vm.info HTTP/1.1\r\n\r\n".repeat(10);
        let _ = raw.0.get_mut().write_all(request.as_bytes());
    }
    api.is_well();
}

#[test]
fn the_65th_connection_takes_the_place_of_an_idle_one() {
    let api = Api::start(Limits::default());
    let mut idle: Vec<_> = (0..64).map(|_| api.raw()).collect();
    for raw in &mut idle {
        raw.send(PING);
        assert_eq!(raw.answer().status, 200);
    }
    // The first has been without a request for longest, unless it asks again.
    idle[0].send(PING);
    assert_eq!(idle[0].answer().status, 200);
    assert_eq!(api.exchange(PING).status, 200);
    assert_eq!(idle[1].rest(), "");
    idle[0].send(PING);
    assert_eq!(idle[0].answer().status, 200);
}

#[test]
fn connections_in_calls_keep_their_places() {
    let api = Api::start(short());
    let mut asking: Vec<_> = (0..4).map(|_| api.raw()).collect();
    let mut calls = Vec::new();
    for raw in &mut asking {
        raw.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
        calls.push(api.call());
    }
    let mut newcomer = api.raw();
    newcomer.send(PING);
    // It is served once one of the others is done, and each of them has its answer.
    for call in calls {
        call.reply.send(Ok(Reply::Empty)).unwrap();
    }
    for mut raw in asking {
        assert_eq!(raw.answer().status, 204);
    }
    assert_eq!(newcomer.answer().status, 200);
}

#[test]
fn many_clients_at_once_are_all_served() {
    let api = Api::answering(|_| Ok(Reply::Json(json!({"state": "Created"}))));
    let client = api.client();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    get(&client, "vm.info").unwrap();
                }
            });
        }
    });
}
