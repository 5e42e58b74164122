//! What bodies become.

use super::*;
use crate::config::{ByteSize, VmConfig};

/// The request a body becomes.
fn becomes(name: &'static str, body: &Value) -> Request {
    let api = Api::start(Limits::default());
    let (client, body) = (api.client(), body.clone());
    let asking = thread::spawn(move || put_json(&client, name, &body));
    let Call { request, reply } = api.call();
    let added = DeviceAdded {
        id: "d".into(),
        bdf: "0000:00:01.0".into(),
    };
    reply.send(Reply::json(&added)).unwrap();
    let response = asking.join().unwrap().unwrap();
    assert_eq!(response.status, 200);
    assert_eq!(response.body, br#"{"bdf":"0000:00:01.0","id":"d"}"#);
    request
}

#[test]
fn a_guest_is_defined() {
    let body = json!({
        "payload": {"kernel": "/vmlinuz"},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 1 << 30},
        "disks": null,
    });
    let Request::Create(config) = becomes("vm.create", &body) else {
        panic!("another request");
    };
    let expected: VmConfig = crate::config::from_json(body.to_string().as_bytes()).unwrap();
    assert_eq!(*config, expected);
    assert_eq!(config.memory.size, ByteSize::from_mib(1024));
}

#[test]
fn devices_are_added_and_removed() {
    let body = json!({"file": "/dev/dax1.0", "id": "p"});
    let Request::AddPmem(pmem) = becomes("vm.add-pmem", &body) else {
        panic!("another request");
    };
    assert_eq!(pmem.id.as_deref(), Some("p"));
    let Request::AddDisk(disk) = becomes("vm.add-disk", &json!({"path": "/img"})) else {
        panic!("another request");
    };
    assert_eq!(disk.path, PathBuf::from("/img"));
    let Request::AddNet(net, descriptors) = becomes("vm.add-net", &json!({"tap": "tap0"})) else {
        panic!("another request");
    };
    assert_eq!(net.tap.as_deref(), Some("tap0"));
    assert!(descriptors.is_empty());
    let body = json!({"tag": "t", "socket": "/run/fs", "num_queues": 1, "queue_size": 1024});
    let Request::AddFs(fs) = becomes("vm.add-fs", &body) else {
        panic!("another request");
    };
    assert_eq!(fs.tag, "t");
    let body = json!({"device_type": 2, "socket": "/run/b", "queue_sizes": [128]});
    let request = becomes("vm.add-generic-vhost-user", &body);
    let Request::AddGenericVhostUser(generic) = request else {
        panic!("another request");
    };
    assert_eq!((generic.device_type, generic.queue_sizes.len()), (2, 1));
    let body = json!({"cid": 3, "socket": "/run/vsock"});
    let Request::AddVsock(vsock) = becomes("vm.add-vsock", &body) else {
        panic!("another request");
    };
    assert_eq!(vsock.cid, 3);
    let Request::RemoveDevice { id } = becomes("vm.remove-device", &json!({"id": "p"})) else {
        panic!("another request");
    };
    assert_eq!(id, "p");
}

#[test]
fn a_resize_names_what_changes() {
    let body = json!({"desired_balloon": 1 << 20, "desired_ram": null});
    let request = becomes("vm.resize", &body);
    let expected = Request::Resize {
        vcpus: None,
        ram: None,
        balloon: Some(1 << 20),
    };
    assert_eq!(format!("{request:?}"), format!("{expected:?}"));
}

#[test]
fn a_disk_is_resized_to_a_number_of_bytes() {
    let body = json!({"id": "d0", "desired_size": 1u64 << 40});
    let request = becomes("vm.resize-disk", &body);
    let expected = Request::ResizeDisk {
        id: "d0".to_owned(),
        bytes: 1 << 40,
    };
    assert_eq!(format!("{request:?}"), format!("{expected:?}"));
}

#[test]
fn a_body_that_can_not_be_used_says_why() {
    let api = Api::start(Limits::default());
    for (name, body, words) in [
        ("vm.create", "", "wants a JSON object as its body"),
        ("vm.create", "{}", "payload"),
        ("vm.create", "{\"payload\":{},\"typo\":1}", "typo"),
        ("vm.create", "{\"payload\":{\"kernel\":7}}", "kernel"),
        ("vm.create", "[1]", "not an object"),
        ("vm.create", "{\"payload\":", "not usable as JSON"),
        ("vm.resize-disk", "{\"id\":\"d0\"}", "desired_size"),
        ("vm.add-disk", "{\"path\":\"/a\",\"paht\":\"/b\"}", "paht"),
        ("vm.add-disk", "{\"path\":\"/a\",\"path\":\"/b\"}", "path"),
        ("vm.add-net", "{\"num_queues\":-1}", "num_queues"),
        ("vm.add-fs", "{\"tag\":\"t\"}", "socket"),
        (
            "vm.add-generic-vhost-user",
            "{\"socket\":\"/s\",\"queue_sizes\":[2]}",
            "device_type",
        ),
        ("vm.add-vsock", "{\"cid\":3}", "socket"),
        ("vm.add-pmem", "\u{fffd}", "not usable as JSON"),
        ("vm.remove-device", "{}", "id"),
        ("vm.remove-device", "{\"id\":\"a\",\"x\":1}", "x"),
        (
            "vm.resize",
            "{\"desired_balloon\":\"1G\"}",
            "desired_balloon",
        ),
        ("vm.resize", "{\"desired_vcpus\":-1}", "desired_vcpus"),
    ] {
        let body = body.as_bytes().to_vec();
        let answer = api.client().call(Method::Put, name, Some(body), Vec::new());
        let refusal = refusal(answer);
        assert_eq!(refusal.status, 400, "{name}: {refusal}");
        assert!(refusal.chain[0].contains(name), "{name}: {refusal}");
        let last = refusal.chain.last().unwrap();
        assert!(last.contains(words), "{name}: {words}: {refusal}");
    }
    let deep = "[".repeat(100_000);
    let answer = api.exchange(format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{deep}",
        deep.len()
    ));
    assert_eq!(answer.status, 400);
    api.is_well();
}

#[test]
fn a_body_where_none_belongs_is_refused() {
    let api = Api::answering(|request| panic!("{request:?}"));
    for body in [
        "Content-Length: 2\r\n\r\n{}",
        "Content-Length: 1\r\n\r\n ",
        "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ] {
        for request in ["PUT /api/v1/vm.boot", "GET /api/v1/vmm.ping"] {
            let http = api.exchange(format!("{request} HTTP/1.1\r\n{body}"));
            assert_eq!(http.status, 400, "{request} {body}");
            assert!(http.chain()[0].contains("takes no body"), "{http:?}");
        }
    }
}

#[test]
fn an_empty_body_is_no_body() {
    let api = Api::answering(|_| Ok(Reply::Empty));
    for body in [
        "Content-Length: 0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        let http = api.exchange(format!("PUT /api/v1/vm.boot HTTP/1.1\r\n{body}"));
        assert_eq!(http.status, 204, "{body}");
    }
}
