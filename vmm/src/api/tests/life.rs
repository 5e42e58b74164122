//! Waiting for the owner, and the end.

use std::os::unix::net::UnixListener;
use std::time::Instant;

use super::*;

#[test]
fn a_long_operation_holds_up_nobody_else() {
    let api = Api::start(Limits::default());
    let client = api.client();
    let booting = thread::spawn(move || put(&client, "vm.boot"));
    let boot = api.call();
    api.is_well();
    let client = api.client();
    let asking = thread::spawn(move || get(&client, "vm.info"));
    let info = api.call();
    info.reply.send(Ok(Reply::Json(json!({})))).unwrap();
    assert_eq!(asking.join().unwrap().unwrap().status, 200);
    boot.reply.send(Ok(Reply::Empty)).unwrap();
    assert_eq!(booting.join().unwrap().unwrap().status, 204);
}

#[test]
fn an_owner_that_takes_too_long_is_named() {
    let api = Api::start(Limits {
        call_timeout: Duration::from_millis(50),
        ..Limits::default()
    });
    let refusal = refusal(put(&api.client(), "vm.pause"));
    assert_eq!(refusal.status, 500);
    assert!(refusal.chain[0].contains("vm.pause is not done after 0.05 s"));
    // Its answer comes too late and finds nobody.
    assert!(api.call().reply.send(Ok(Reply::Empty)).is_err());
    api.is_well();
}

#[test]
fn a_drain_has_the_guests_time_and_holds_up_nobody() {
    let api = Api::start(Limits {
        call_timeout: Duration::from_millis(50),
        ..Limits::default()
    });
    let client = api.client();
    let draining = thread::spawn(move || {
        let body = br#"{"id":"p0"}"#.to_vec();
        client.call(Method::Put, "vm.drain", Some(body), Vec::new())
    });
    let drain = api.call();
    assert!(matches!(&drain.request, Request::Drain { id } if id == "p0"));
    // Longer than anything else may take.
    let refusal = refusal(put(&api.client(), "vm.pause"));
    assert_eq!(refusal.status, 500);
    drop(api.call());
    api.is_well();
    drain.reply.send(Ok(Reply::Empty)).unwrap();
    assert_eq!(draining.join().unwrap().unwrap().status, 204);
}

#[test]
fn an_owner_that_drops_a_call_has_gone() {
    let api = Api::start(Limits::default());
    let client = api.client();
    let asking = thread::spawn(move || put(&client, "vm.boot"));
    drop(api.call());
    let refusal = refusal(asking.join().unwrap());
    assert_eq!(refusal.status, 500);
    assert!(refusal.chain[1].contains("daxhund is ending"));
}

#[test]
fn a_client_that_has_gone_is_not_missed() {
    let api = Api::start(Limits::default());
    let mut raw = api.raw();
    raw.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    let call = api.call();
    drop(raw);
    let _ = call.reply.send(Ok(Reply::Empty));
    api.is_well();
}

#[test]
fn the_answer_that_ends_the_server_still_goes_out() {
    for _ in 0..20 {
        let mut api = Api::start(Limits::default());
        let client = api.client();
        let asking = thread::spawn(move || put(&client, "vmm.shutdown"));
        api.call().reply.send(Ok(Reply::Empty)).unwrap();
        api.server.take().unwrap().stop();
        assert_eq!(asking.join().unwrap().unwrap().status, 204);
        assert!(!api.path().exists());
        let error = get(&api.client(), "vmm.ping").unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    }
}

#[test]
fn the_end_waits_for_nobody_for_long() {
    let mut api = Api::start(Limits {
        stop_timeout: Duration::from_millis(200),
        ..Limits::default()
    });
    let mut silent = api.raw();
    let mut half = api.raw();
    half.send("PUT /api/v1/vm.cre");
    let mut asking = api.raw();
    asking.send("PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    let call = api.call();
    let start = Instant::now();
    drop(api.server.take());
    assert!(start.elapsed() < DEADLINE / 2);
    for raw in [&mut silent, &mut half, &mut asking] {
        assert_eq!(raw.rest(), "");
    }
    assert!(call.reply.send(Ok(Reply::Empty)).is_err());
}

#[test]
fn calls_that_are_dropped_at_the_end_are_answered() {
    let mut api = Api::start(Limits::default());
    let client = api.client();
    let asking = thread::spawn(move || put(&client, "vm.boot"));
    let call = api.call();
    let ending = thread::spawn(move || drop(call));
    drop(api.server.take());
    ending.join().unwrap();
    assert_eq!(refusal(asking.join().unwrap()).status, 500);
}

#[test]
fn a_socket_that_was_handed_over_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("theirs");
    let theirs = UnixListener::bind(&path).unwrap();
    let number = crate::inherited::tests::leave_open(&theirs);
    let descriptor = crate::inherited::take(number).unwrap();
    drop(theirs);
    let listener = Listener::inherited(descriptor).unwrap();
    let server = Server::start(listener, |_| Err(Gone), Metrics::default()).unwrap();
    assert_eq!(get(&Client::new(&path), "vmm.ping").unwrap().status, 200);
    server.stop();
    assert!(path.exists(), "the path is theirs");
}

#[test]
fn a_second_server_at_one_path_is_refused() {
    let api = Api::start(Limits::default());
    let error = Listener::at(&api.path()).unwrap_err();
    assert!(matches!(error, ListenError::InUse { .. }), "{error}");
    api.is_well();
}
