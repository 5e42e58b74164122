//! Kinds of devices beside disks: what the guest is offered of them, and what their backends are told.

use super::*;
use crate::virtio::net::{Mac, Offers};

pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const MQ: u64 = 1 << 22;
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const RINGS: u64 = 1 << 32 | 1 << 30 | 1 << 28;

/// As virtiofsd has it: no configuration space, nothing in flight that would outlive it.
fn fs_manners() -> Manners {
    Manners {
        features: RINGS,
        protocol: PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_MEM_SLOTS,
        ..Manners::default()
    }
}

fn file_system(queues: u16) -> (Class, Shape) {
    let mut tag = [0; fs::TAG_BYTES];
    tag[..5].copy_from_slice(b"share");
    (fs::file_system(&tag, &shape(queues)), shape(queues))
}

fn network(offers: Offers) -> (Class, Shape) {
    let mac = Mac::new([2, 0, 0, 0, 0, 9]).unwrap();
    let class = net::interface(mac, Some(1500), offers, 1);
    (class, shape(net::QUEUES))
}

pub(super) fn several_pairs(pairs: u16) -> (Class, Shape) {
    let mac = Mac::new([2, 0, 0, 0, 0, 9]).unwrap();
    let class = net::interface(mac, None, ALL, pairs);
    (class, shape(pairs * net::QUEUES))
}

const ALL: Offers = Offers {
    tso: true,
    ufo: true,
    csum: true,
};

#[test]
fn a_file_systems_configuration_space_is_not_asked_for() {
    let mut fake = Fake::new();
    fake.serve(fs_manners());
    let (class, shape) = file_system(2);
    let (backend, _) = open_as(&fake, class, shape).unwrap();
    backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    assert_eq!((device.kind(), device.features()), (Kind::FileSystem, 0));
    assert_eq!(device.queue_sizes(), [128; 2]);
    let mut config = [0xff; 44];
    device.config_read(0, &mut config);
    assert_eq!(config[..6], *b"share\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    let mut driver = Driver::new(&device);
    driver.start(&device, 1 << 32).unwrap();
    until("both rings are enabled", || {
        fake.bodies(SET_VRING_ENABLE).len() == 2
    });
    for never in [GET_CONFIG, GET_QUEUE_NUM, GET_INFLIGHT_FD] {
        assert!(fake.bodies(never).is_empty(), "{never}");
    }
    driver.stop();
    backend.close();
}

#[test]
fn request_queues_are_counted_without_the_one_beside_them() {
    let mut fake = Fake::new();
    fake.serve(fs_manners());
    let (class, shape) = file_system(6);
    let error = open_as(&fake, class, shape).err().unwrap();
    let words = "has 4 queue(s), num_queues=5 asks for more; give num_queues=3 or fewer";
    assert!(crate::chain(&error).contains(words), "{error}");
    let (class, shape) = file_system(4);
    assert!(open_as(&fake, class, shape).is_ok());
    let mut fake = Fake::new();
    fake.serve(Manners {
        protocol: PROTOCOL_REPLY_ACK,
        ..fs_manners()
    });
    let (class, shape) = file_system(3);
    let error = crate::chain(&open_as(&fake, class, shape).err().unwrap());
    assert!(error.contains("give num_queues=1 or fewer"), "{error}");
}

#[test]
fn who_serves_a_file_system_is_named_where_nobody_does() {
    let (class, shape) = file_system(2);
    let error = open_as(&Fake::new(), class, shape).err().unwrap();
    let error = crate::chain(&error);
    assert!(
        error.contains("device d0") && error.contains("(for one: virtiofsd"),
        "{error}"
    );
}

#[test]
fn a_network_is_what_the_backend_can_and_this_sides_address() {
    let mut fake = Fake::new();
    let manners = || Manners {
        features: RINGS | CSUM | GUEST_CSUM | HOST_TSO4 | MRG_RXBUF | STATUS | CTRL_VQ | MQ,
        protocol: PROTOCOL_REPLY_ACK,
        queues: 1,
        ..Manners::default()
    };
    fake.serve(manners());
    let (class, shape) = network(ALL);
    let (backend, _) = open_as(&fake, class, shape).unwrap();
    backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    let offered = MAC | MTU | CSUM | GUEST_CSUM | HOST_TSO4 | MRG_RXBUF;
    assert_eq!((device.kind(), device.features()), (Kind::Net, offered));
    let mut config = [0; 12];
    device.config_read(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0xdc, 5]);
    let mut driver = Driver::new(&device);
    driver.start(&device, 1 << 32 | offered).unwrap();
    // Each of the two, and the next backend as well: it hears of nothing that it does not have itself.
    for round in 0..2 {
        until("both rings are enabled", || {
            fake.bodies(SET_VRING_ENABLE).len() == 2
        });
        let features = fake.bodies(SET_FEATURES).pop().unwrap();
        let told = 1 << 32 | 1 << 30 | CSUM | GUEST_CSUM | HOST_TSO4 | MRG_RXBUF;
        assert_eq!(numbers(&features), [told]);
        assert!(
            fake.bodies(GET_QUEUE_NUM).is_empty(),
            "one pair is no question"
        );
        if round == 0 {
            fake.die();
            fake.serve(manners());
        }
    }
    until("it is served on", || backend.status().lost.is_none());
    assert_eq!(device.features(), offered);
    driver.stop();
    backend.close();
}

#[test]
fn pairs_are_counted_as_the_backend_may_count_them() {
    let refused = |manners: Manners, pairs| {
        let mut fake = Fake::new();
        fake.serve(manners);
        let (class, shape) = several_pairs(pairs);
        crate::chain(&open_as(&fake, class, shape).err().unwrap())
    };
    let manners = |features, protocol, queues| Manners {
        features,
        protocol,
        queues,
        ..Manners::default()
    };
    let (several, protocol) = (RINGS | MQ, PROTOCOL_REPLY_ACK | PROTOCOL_MQ);
    let error = refused(manners(several, protocol, 2), 3);
    let words = "has 4 queue(s), num_queues=6 asks for more; give num_queues=4 or fewer";
    assert!(error.contains(words), "{error}");
    for one in [
        manners(RINGS, protocol, 8),
        manners(several, PROTOCOL_REPLY_ACK, 8),
    ] {
        let error = refused(one, 2);
        assert!(error.contains("give num_queues=2 or fewer"), "{error}");
    }
    let mut fake = Fake::new();
    fake.serve(manners(several, protocol, 2));
    let (class, shape) = several_pairs(2);
    let (backend, _) = open_as(&fake, class, shape).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    assert_eq!(device.features(), MAC | MQ | CTRL_VQ, "whatever it serves");
    assert_eq!(device.queue_sizes(), [128, 128, 128, 128, 64]);
    let mut space = [0xff; 12];
    device.config_read(0, &mut space);
    assert_eq!(space[8..10], [2, 0]);
    backend.close();
}

#[test]
fn offloads_that_are_off_are_not_offered() {
    let mut fake = Fake::new();
    fake.serve(Manners {
        features: RINGS | CSUM | GUEST_CSUM | HOST_TSO4 | MAC,
        protocol: PROTOCOL_REPLY_ACK,
        ..Manners::default()
    });
    let none = Offers { csum: false, ..ALL };
    let (class, shape) = network(none);
    let (backend, _) = open_as(&fake, class, shape).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    assert_eq!(device.features(), MAC | MTU);
    backend.close();
}
