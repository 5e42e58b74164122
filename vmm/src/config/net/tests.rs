use super::*;
use crate::config::from_json;

fn validate(text: &str) -> Result<ValidNet, NetError> {
    NetConfig::parse(text)
        .unwrap()
        .validate(2, &mut IdAllocator::default())
}

#[test]
fn every_key_is_stored_and_reaches_the_checked_form() {
    let text = "tap=tap0,ip=10.0.0.1,mask=255.0.0.0,mac=52:54:00:12:34:56,\
                host_mac=52:54:00:12:34:57,mtu=9000,num_queues=4,queue_size=512,\
                offload_tso=off,offload_ufo=off,offload_csum=off,id=n,pci_segment=1,pci_device_id=7";
    let json = r#"{"tap":"tap0","ip":"10.0.0.1","mask":"255.0.0.0",
        "mac":"52:54:00:12:34:56","host_mac":"52:54:00:12:34:57","mtu":9000,"num_queues":4,
        "queue_size":512,"offload_tso":false,"offload_ufo":false,"offload_csum":false,
        "id":"n","pci_segment":1,"pci_device_id":7}"#;
    assert_eq!(
        NetConfig::parse(text).unwrap(),
        from_json::<NetConfig>(json.as_bytes()).unwrap()
    );
    assert_eq!(
        validate(text),
        Ok(ValidNet {
            id: "n".into(),
            source: NetSource::Tap(Tap::Interface {
                name: Some("tap0".into()),
                address: Some((
                    Ipv4Addr::new(10, 0, 0, 1).into(),
                    Ipv4Addr::new(255, 0, 0, 0).into()
                )),
                mac: Some(MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x57])),
            }),
            mac: Some(MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56])),
            mtu: Some(9000),
            queue_pairs: 2,
            queue_size: 512,
            offloads: Offloads {
                tso: false,
                ufo: false,
                csum: false
            },
            place: Place {
                segment: 1,
                device: Some(7)
            },
        })
    );
    let plain = from_json::<NetConfig>(b"{}").unwrap();
    assert_eq!(plain, NetConfig::default());
    let plain = plain.validate(1, &mut IdAllocator::default()).unwrap();
    assert_eq!((plain.queue_pairs, plain.queue_size), (1, 256));
    assert_eq!(plain.id, "_net0");
}

#[test]
fn descriptors_come_from_the_command_line_only() {
    let net = validate("fd=[5,6],num_queues=4").unwrap();
    assert_eq!(net.source, NetSource::Tap(Tap::Descriptors(vec![5, 6])));
    assert_eq!(
        validate("fd=7").unwrap().source,
        NetSource::Tap(Tap::Descriptors(vec![7]))
    );
    let error = from_json::<NetConfig>(br#"{"fds":[5]}"#).unwrap_err();
    assert_eq!(error.to_string(), "not supported by daxhund: fds");
    let json = serde_json::to_string(&NetConfig::parse("fd=[5]").unwrap()).unwrap();
    assert!(!json.contains("fd"), "{json}");
}

#[test]
fn what_client_libraries_fill_in_goes_with_descriptors() {
    let json = r#"{"ip":"192.168.249.1","mask":"255.255.255.0","iommu":false,
        "mac":"52:54:00:12:34:56","num_queues":2,"queue_size":256,"vhost_user":false,
        "vhost_mode":"Client","offload_tso":true,"offload_ufo":true,"offload_csum":true}"#;
    let mut net: NetConfig = from_json(json.as_bytes()).unwrap();
    net.fds = vec![9];
    let valid = net.validate(1, &mut IdAllocator::default()).unwrap();
    assert_eq!(valid.source, NetSource::Tap(Tap::Descriptors(vec![9])));
}

#[test]
fn malformed_words_are_named() {
    for (text, words) in [
        ("mac=52", "mac=52 is not an Ethernet address"),
        ("ip=10.0.0", "ip=10.0.0 is not an IPv4 or IPv6 address"),
        ("mask=x", "a network mask such as"),
        ("fd=[x]", "an open file descriptor"),
        ("fd=[1]", "an open file descriptor"),
        ("mtu=70000", "a whole number in range"),
        (
            "vhost_mode=master",
            "--net: vhost_mode=master is not client or server",
        ),
        ("bw_size=1", "not supported by daxhund: --net bw_size"),
    ] {
        let error = NetConfig::parse(text).unwrap_err();
        assert!(error.to_string().contains(words), "{text}: {error}");
    }
}

#[test]
fn a_backend_has_a_socket_and_nothing_of_a_tap() {
    let text = "vhost_user=on,socket=/s,vhost_mode=client,mac=52:54:00:12:34:56,mtu=9000,id=n";
    let json = r#"{"vhost_user":true,"vhost_socket":"/s","vhost_mode":"Client","mac":"52:54:00:12:34:56",
        "mtu":9000,"id":"n"}"#;
    let net = NetConfig::parse(text).unwrap();
    assert_eq!(net, from_json::<NetConfig>(json.as_bytes()).unwrap());
    let written = serde_json::to_string(&net).unwrap();
    assert!(written.contains(r#""vhost_socket":"/s""#), "{written}");
    let valid = validate(text).unwrap();
    let served = |mode| NetSource::VhostUser {
        socket: "/s".into(),
        mode,
    };
    assert_eq!(valid.source, served(VhostMode::Client));
    let text = "vhost_user=on,socket=/s,vhost_mode=server";
    let json = r#"{"vhost_user":true,"vhost_socket":"/s","vhost_mode":"Server"}"#;
    let net = NetConfig::parse(text).unwrap();
    assert_eq!(net, from_json::<NetConfig>(json.as_bytes()).unwrap());
    assert_eq!(validate(text).unwrap().source, served(VhostMode::Server));
    let written = serde_json::to_string(&net).unwrap();
    assert!(written.contains(r#""vhost_mode":"Server""#), "{written}");
    let error = from_json::<NetConfig>(br#"{"vhost_mode":"server"}"#).unwrap_err();
    assert!(error.to_string().contains("vhost_mode"), "{error}");
    assert_eq!((valid.queue_pairs, valid.mtu), (1, Some(9000)));
    let several = validate("vhost_user=on,socket=/s,num_queues=256").unwrap();
    assert_eq!(several.queue_pairs, 128);
    for (text, words) in [
        (
            "vhost_user=on,id=n",
            "--net id=n: vhost_user=on has no socket",
        ),
        ("socket=/s", "give vhost_user=on as well"),
        (
            "vhost_mode=server",
            "--net: vhost_mode=server is for a device that",
        ),
        ("vhost_user=on,socket=/s,tap=t", "tap= says nothing"),
        ("vhost_user=on,socket=/s,fd=[5]", "fd= says nothing"),
        (
            "vhost_user=on,socket=/s,host_mac=52:54:00:12:34:56",
            "host_mac= says",
        ),
        (
            "vhost_user=on,socket=/s,ip=10.0.0.1,mask=255.0.0.0",
            "ip= says",
        ),
        (
            "vhost_user=on,socket=/s,num_queues=5",
            "num_queues=5, but queues come in pairs",
        ),
        (
            "vhost_user=on,socket=/s,num_queues=258",
            "an even number from 2 to 256",
        ),
        ("vhost_user=on,socket=/s,mac=01:00:5e:00:00:01", "mac="),
    ] {
        let error = validate(text).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    let json =
        r#"{"ip":"192.168.249.1","mask":"255.255.255.0","vhost_user":true,"vhost_socket":"/s"}"#;
    let filled_in: NetConfig = from_json(json.as_bytes()).unwrap();
    assert!(filled_in.validate(1, &mut IdAllocator::default()).is_ok());
}

#[test]
fn what_no_guest_can_have_is_refused() {
    for (text, words) in [
        ("tap=0123456789abcdef", "can't be the name of an interface"),
        ("tap=a/b", "--net tap=a/b: tap=\"a/b\" can't be"),
        ("tap=..", "can't be the name"),
        ("ip=10.0.0.1", "has ip= but no mask=; give both or neither"),
        ("mask=255.0.0.0", "has mask= but no ip="),
        ("ip=10.0.0.1,mask=255.0.255.0", "is no network mask for ip="),
        ("ip=10.0.0.1,mask=ffff::", "mask=ffff:: is no network mask"),
        ("mac=01:00:5e:00:00:01", "mac=01:00:5e:00:00:01 is not the"),
        ("host_mac=00:00:00:00:00:00", "host_mac="),
        ("mtu=1279", "mtu=1279 is too small: give 1280 or more"),
        ("offload_csum=off", "add offload_tso=off,offload_ufo=off"),
        ("num_queues=3", "give an even number from 2 to 256"),
        ("num_queues=0", "give an even number"),
        ("queue_size=300", "queue size out of range"),
        ("fd=[5],tap=t", "tap= together with fd="),
        ("fd=[5],ip=10.0.0.1", "ip= together with fd="),
        ("fd=[5],host_mac=52:54:00:12:34:56", "host_mac= together"),
        (
            "fd=[5,6]",
            "2 file descriptors for num_queues=2; each pair of queues has one: give num_queues=4",
        ),
        ("fd=[5,5],num_queues=4", "fd=5 is given twice"),
        ("pci_segment=2", "--net: pci_segment=2"),
        ("id=__n", "two underscores"),
    ] {
        let error = validate(text).unwrap_err();
        assert!(error.to_string().contains(words), "{text}: {error}");
    }
    let net = NetConfig {
        fds: vec![-1],
        ..NetConfig::default()
    };
    let error = net.validate(1, &mut IdAllocator::default()).unwrap_err();
    assert!(error.to_string().contains("fd=-1 is"), "{error}");
    for text in [
        "ip=10.0.0.1,mask=0.0.0.0",
        "ip=10.0.0.1,mask=255.255.255.255",
        "ip=fd00::1,mask=ffff:ffff:ffff:ffff::",
        "tap=vmtap%d",
    ] {
        assert!(validate(text).is_ok(), "{text}");
    }
}
