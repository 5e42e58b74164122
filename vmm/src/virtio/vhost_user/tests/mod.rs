//! A frontend against a backend that keeps to the protocol, that breaks it at every message, and that goes and comes.

mod any_type;
mod classes;
mod fake;
mod frames;
mod lending;
mod server;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Instant;

use proptest::prelude::*;

use self::fake::*;
use super::*;
use crate::virtio::testing::{Driver, MEMORY};

const ACCEPTED: u64 = 1 << 32 | 1 << 9;

fn region(gpa: u64, size: u64, offset: u64) -> SharedRegion {
    SharedRegion {
        gpa,
        size,
        host_address: 0x7000_0000_0000 + gpa,
        file: Arc::new(tempfile::tempfile().unwrap()),
        offset,
    }
}

fn shape(queues: u16) -> Shape {
    Shape::even(queues, 128)
}

type News = Arc<Mutex<Vec<Change>>>;

fn open(fake: &Fake, queues: u16) -> Result<(Arc<Backend>, News), OpenError> {
    open_as(fake, blk::DISK, shape(queues))
}

fn open_as(fake: &Fake, class: Class, shape: Shape) -> Result<(Arc<Backend>, News), OpenError> {
    open_by(fake, Mode::Client, class, shape)
}

fn open_by(
    fake: &Fake,
    mode: Mode,
    class: Class,
    shape: Shape,
) -> Result<(Arc<Backend>, News), OpenError> {
    // Nobody tells it to end.
    let (told, _teller) = UnixStream::pair().unwrap();
    open_until(fake, mode, (class, shape), &told)
}

fn open_until(
    fake: &Fake,
    mode: Mode,
    (class, shape): (Class, Shape),
    told: &UnixStream,
) -> Result<(Arc<Backend>, News), OpenError> {
    let news = News::default();
    let heard = Arc::clone(&news);
    let on_change = Box::new(move |change| heard.lock().unwrap().push(change));
    let spec = Spec {
        id: "d0".to_owned(),
        socket: fake.socket(),
        mode,
        class,
        shape,
    };
    Ok((Backend::open(spec, on_change, told.as_fd())?, news))
}

fn served(manners: Manners, queues: u16) -> (Fake, Arc<Backend>, News) {
    let mut fake = Fake::new();
    fake.serve(manners);
    let (backend, news) = open(&fake, queues).unwrap();
    (fake, backend, news)
}

fn kinds(fake: &Fake) -> Vec<u32> {
    fake.messages().iter().map(|(kind, ..)| *kind).collect()
}

fn numbers(body: &[u8]) -> Vec<u64> {
    let of = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    body.chunks_exact(8).map(of).collect()
}

#[test]
fn a_guest_is_offered_what_both_sides_can() {
    let (_fake, backend, _) = served(Manners::default(), 3);
    let device = VhostUserDevice::new(backend);
    assert_eq!(device.features(), 1 << 9 | 1 << 12, "not CONFIG_WCE");
    assert_eq!(device.ring_features(), 1 << 32 | 1 << 28);
    assert_eq!(device.queue_sizes(), [128; 3]);
    let mut config = [0xff; 64];
    device.config_read(0, &mut config);
    assert_eq!(config[..4], [0, 1, 2, 3]);
    assert_eq!(config[34..36], [3, 0]);
    assert_eq!(config[60..], [0xff; 4], "there is no more of it");
    assert_eq!(device.kind(), Kind::Block);
}

#[test]
fn memory_goes_by_descriptor_and_offset_and_comes_back() {
    let (fake, backend, _) = served(Manners::default(), 1);
    backend.attach(vec![region(0, 3 << 30, 2 << 20)]).unwrap();
    backend
        .attach(vec![region(4 << 30, 1 << 30, (3 << 30) + (2 << 20))])
        .unwrap();
    let added = fake.bodies(ADD_MEM_REG);
    // Padding, guest address, size, user address, offset.
    let second = [0, 4 << 30, 1 << 30, 0x7001_0000_0000, (3 << 30) + (2 << 20)];
    assert_eq!(numbers(&added[1]), second);
    assert!(
        fake.messages()
            .iter()
            .all(|(kind, _, fd)| *kind != ADD_MEM_REG || *fd)
    );
    backend.detach(0).unwrap();
    assert_eq!(numbers(&fake.bodies(REM_MEM_REG)[0])[1..3], [0, 3 << 30]);
    backend.detach(0).unwrap();
    assert_eq!(fake.bodies(REM_MEM_REG).len(), 1, "once");
    assert!(fake.bodies(SET_MEM_TABLE).is_empty());
    assert_eq!(backend.status().lost, None);
}

#[test]
fn a_backend_without_slots_gets_the_whole_table_and_is_cut_off_from_the_last_region() {
    let manners = Manners {
        // Nor does it acknowledge anything.
        protocol: PROTOCOL_CONFIG,
        ..Manners::default()
    };
    let (mut fake, backend, _) = served(manners, 1);
    backend
        .attach(vec![region(0, 1 << 20, 0), region(1 << 32, 1 << 20, 0)])
        .unwrap();
    let tables = fake.bodies(SET_MEM_TABLE);
    assert_eq!((tables.len(), tables[0][0]), (1, 2));
    assert_eq!(
        kinds(&fake).last(),
        Some(&GET_FEATURES),
        "it was asked whether it is done"
    );
    backend.detach(1 << 32).unwrap();
    assert_eq!(fake.bodies(SET_MEM_TABLE)[1][0], 1);
    backend.detach(0).unwrap();
    assert_eq!(backend.status().losses, 1);
    fake.die();
    until("nobody is there", || backend.status().lost.is_some());
    let nine = (0..9)
        .map(|number| region(number << 32, 1 << 20, 0))
        .collect();
    // Nobody is there to refuse them; the next one that can't take them is none.
    backend.attach(nine).unwrap();
}

#[test]
fn more_memory_than_fits_is_an_error_and_nothing_of_it_is_sent() {
    let (fake, backend, _) = served(
        Manners {
            slots: 2,
            ..Manners::default()
        },
        1,
    );
    backend.attach(vec![region(0, 1 << 20, 0)]).unwrap();
    let more = vec![region(1 << 32, 1 << 20, 0), region(2 << 32, 1 << 20, 0)];
    let error = backend.attach(more).unwrap_err().to_string();
    assert!(error.contains("takes 2 memory region(s)"), "{error}");
    assert_eq!(fake.bodies(ADD_MEM_REG).len(), 1);
    backend.attach(vec![region(1 << 32, 1 << 20, 0)]).unwrap();
}

#[test]
fn rings_are_given_when_the_driver_is_ready_and_taken_back_at_a_reset() {
    let (fake, backend, _) = served(Manners::default(), 2);
    backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
    let device = VhostUserDevice::new(backend);
    let mut driver = Driver::new(&device);
    for round in 1..3 {
        driver.start(&device, ACCEPTED).unwrap();
        until("both rings are enabled", || {
            fake.bodies(SET_VRING_ENABLE).len() == round * 4 - 2
        });
        let features = fake.bodies(SET_FEATURES).pop().unwrap();
        assert_eq!(numbers(&features), [ACCEPTED | 1 << 30]);
        assert_eq!(fake.bodies(SET_INFLIGHT_FD).len(), round);
        let address = fake.bodies(SET_VRING_ADDR).pop().unwrap();
        // Index and flags, descriptors, used ring, available ring: where the driver of the tests has them.
        let rings = numbers(&address)[1..4].to_vec();
        let place = 0x7000_0000_0000 + 0x11_0000;
        assert_eq!(rings, [place, place + 0xc000, place + 0x8000]);
        for kind in [SET_VRING_KICK, SET_VRING_CALL] {
            let with_fd = fake
                .messages()
                .into_iter()
                .filter(|(k, _, fd)| *k == kind && *fd);
            assert_eq!(with_fd.count(), round * 2);
        }
        driver.stop();
        assert_eq!(
            fake.bodies(GET_VRING_BASE).len(),
            round * 2,
            "stopped when stop returns"
        );
    }
    assert!(
        fake.bodies(SET_VRING_BASE)
            .iter()
            .all(|body| numbers(body)[0] >> 32 == 0)
    );
}

#[test]
fn one_that_is_killed_is_told_of_and_the_next_one_gets_everything() {
    let (mut fake, backend, news) = served(Manners::default(), 1);
    backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    let mut driver = Driver::new(&device);
    driver.start(&device, ACCEPTED).unwrap();
    fake.await_message(SET_VRING_ENABLE);
    fake.die();
    until("the loss is told", || !news.lock().unwrap().is_empty());
    assert!(backend.status().lost.is_some());
    assert!(matches!(&news.lock().unwrap()[..], [Change::Lost { .. }]));
    // What is asked meanwhile is what the next one is told.
    backend.attach(vec![region(1 << 32, 1 << 20, 0)]).unwrap();
    vm_memory::Bytes::write_obj(driver.memory(), 5u16, vm_memory::GuestAddress(0x10_c002)).unwrap();
    fake.serve(Manners::default());
    until("it is served on", || backend.status().lost.is_none());
    let told = || news.lock().unwrap().last() == Some(&Change::Connected);
    until("that is told, too", told);
    assert_eq!(fake.bodies(ADD_MEM_REG).len(), 2);
    assert!(
        fake.bodies(GET_INFLIGHT_FD).is_empty(),
        "the area of the one before"
    );
    assert_eq!(fake.bodies(SET_INFLIGHT_FD).len(), 1);
    assert_eq!(numbers(&fake.bodies(SET_VRING_BASE)[0]), [5 << 32]);
    let order = kinds(&fake);
    let at = |kind| order.iter().position(|k| *k == kind).unwrap();
    assert!(at(ADD_MEM_REG) < at(SET_INFLIGHT_FD) && at(SET_INFLIGHT_FD) < at(SET_VRING_ADDR));
    // One that keeps no such memory takes over from one that did.
    fake.die();
    let protocol = ALL_PROTOCOL & !PROTOCOL_INFLIGHT;
    fake.serve(Manners {
        protocol,
        ..Manners::default()
    });
    fake.await_message(SET_VRING_ENABLE);
    until("it is served on", || news.lock().unwrap().len() == 4);
    assert!(fake.bodies(SET_INFLIGHT_FD).is_empty());
    let status = backend.status();
    assert_eq!((status.connections, status.losses), (3, 2));
    driver.stop();
    assert_eq!(fake.bodies(GET_VRING_BASE).len(), 1);
    drop((driver, device));
    backend.close();
    fake.die();
    assert_eq!(
        news.lock().unwrap().len(),
        4,
        "who closes it is told nothing"
    );
}

#[test]
fn one_that_offers_less_than_before_is_not_taken() {
    let (mut fake, backend, _) = served(Manners::default(), 1);
    fake.die();
    let features = Manners::default().features & !(1 << 9);
    fake.serve(Manners {
        features,
        ..Manners::default()
    });
    until("the reason is known", || {
        backend
            .status()
            .lost
            .is_some_and(|why| why.contains("lacks features 0x200"))
    });
    fake.die();
    fake.serve(Manners::default());
    until("it is served on", || backend.status().lost.is_none());
}

#[test]
fn what_can_not_be_used_is_refused_with_what_mends_it() {
    let fake = Fake::new();
    let said = |fake: &Fake, queues| crate::chain(&open(fake, queues).err().unwrap());
    let error = said(&fake, 1);
    assert!(
        error.contains("device d0") && error.contains("nobody serves"),
        "{error}"
    );
    drop(UnixListenerGone::at(&fake));
    assert!(said(&fake, 1).contains("refused"));
    let plain = Manners::default;
    for (manners, words) in [
        (
            Manners {
                features: 1 << 32,
                ..plain()
            },
            "protocol features",
        ),
        (
            Manners {
                features: 1 << 30,
                ..plain()
            },
            "VIRTIO_F_VERSION_1",
        ),
        (
            Manners {
                protocol: PROTOCOL_MQ,
                ..plain()
            },
            "VHOST_USER_PROTOCOL_F_CONFIG",
        ),
        (
            Manners {
                queues: 1,
                ..plain()
            },
            "num_queues=2 asks for more",
        ),
        (
            Manners {
                protocol: PROTOCOL_CONFIG,
                ..plain()
            },
            "has 1 queue(s)",
        ),
        (
            Manners {
                misdeed: Some((SET_OWNER, Misdeed::End)),
                ..plain()
            },
            "does not talk like a vhost-user backend",
        ),
        (
            Manners {
                misdeed: Some((GET_FEATURES, Misdeed::Silence)),
                ..plain()
            },
            "one guest at a time",
        ),
    ] {
        let mut fake = Fake::new();
        fake.serve(manners);
        let error = said(&fake, 2);
        assert!(error.contains(words), "{words}: {error}");
    }
}

/// A socket that somebody has left behind.
struct UnixListenerGone;

impl UnixListenerGone {
    fn at(fake: &Fake) -> std::os::unix::net::UnixListener {
        std::os::unix::net::UnixListener::bind(fake.socket()).unwrap()
    }
}

/// Whatever a backend does at any message, everything comes back in time and the backend that follows is served by.
fn lives_through(at: u32, misdeed: Misdeed) {
    let mut fake = Fake::new();
    let what = format!("{misdeed:?} at {at}");
    fake.serve(Manners {
        misdeed: Some((at, misdeed)),
        ..Manners::default()
    });
    let begin = Instant::now();
    if let Ok((backend, _)) = open(&fake, 1) {
        let taken = backend.attach(vec![region(0, MEMORY, 0)]);
        if taken.is_err() {
            // It is asked again when nobody is there to refuse it.
            fake.die();
            until(&what, || backend.status().lost.is_some());
            backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
        }
        let device = VhostUserDevice::new(Arc::clone(&backend));
        let mut driver = Driver::new(&device);
        driver.start(&device, ACCEPTED).unwrap();
        backend.attach(vec![region(1 << 32, 1 << 20, 0)]).unwrap();
        backend.detach(1 << 32).unwrap();
        if backend.status().lost.is_some() {
            fake.die();
            fake.serve(Manners::default());
            until(&what, || backend.status().lost.is_none());
            fake.await_message(SET_VRING_ENABLE);
        }
        driver.stop();
        backend.close();
    }
    fake.die();
    assert!(begin.elapsed() < (CALL + HANDSHAKE) * 6, "{what}");
}

const EVERY: [u32; 17] = [
    GET_FEATURES,
    SET_FEATURES,
    SET_OWNER,
    SET_VRING_NUM,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    GET_VRING_BASE,
    SET_VRING_KICK,
    SET_VRING_CALL,
    GET_PROTOCOL_FEATURES,
    SET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    SET_VRING_ENABLE,
    GET_CONFIG,
    GET_INFLIGHT_FD,
    ADD_MEM_REG,
    REM_MEM_REG,
];

#[test]
fn silence_ends_and_refusals_at_any_message_are_lived_through() {
    for at in EVERY {
        for misdeed in [Misdeed::End, Misdeed::No] {
            lives_through(at, misdeed);
        }
    }
    for at in [
        SET_FEATURES,
        SET_VRING_ADDR,
        GET_VRING_BASE,
        ADD_MEM_REG,
        REM_MEM_REG,
    ] {
        lives_through(at, Misdeed::Silence);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn garbage_at_any_message_is_lived_through(
        at in prop::sample::select(&EVERY[..]),
        garbage in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..80),
            // A header of an answer with whatever size, and some of a body.
            (any::<u32>(), prop_oneof![0u32..64, any::<u32>()], prop::collection::vec(any::<u8>(), 0..64), any::<bool>())
                .prop_map(|(request, size, body, _)| {
                    let header = [request % 40, 0b101, size].map(u32::to_le_bytes).concat();
                    [header, body].concat()
                }),
        ],
    ) {
        lives_through(at, Misdeed::Bytes(garbage));
    }
}
