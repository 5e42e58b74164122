//! A device of any type: all that is known of it is what its backend says.

use super::*;

/// Bits of a device type, of rings, and those that are between frontend and backend or nobody's.
const OFFERED: u64 = 1 << 23 | 1 << 5 | 1 << 50 | RINGS | 1 << 30 | 1 << 26 | 1 << 33;
const RINGS: u64 = 1 << 32 | 1 << 28;
const INPUT: u16 = 18;
const INPUT_BYTES: usize = 136;

fn open_generic(
    fake: &Fake,
    device_type: u16,
    sizes: &[u16],
) -> Result<(Arc<Backend>, News), OpenError> {
    let class = generic::device(device_type);
    open_as(fake, class, Shape::of(sizes.to_vec()))
}

#[test]
fn all_that_the_backend_offers_is_the_guests() {
    let mut fake = Fake::new();
    fake.serve(Manners {
        features: OFFERED,
        ..Manners::default()
    });
    let (backend, _) = open_generic(&fake, INPUT, &[64, 16]).unwrap();
    backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    assert_eq!((device.kind(), device.kind().id()), (Kind::Other(18), 18));
    assert_eq!(device.features(), 1 << 23 | 1 << 5 | 1 << 50);
    assert_eq!(device.ring_features(), RINGS);
    assert_eq!(device.queue_sizes(), [64, 16]);
    let mut space = [0xff; INPUT_BYTES + 4];
    device.config_read(0, &mut space);
    assert_eq!((space[0], space[135], space[136]), (0, 135, 0xff));
    let mut driver = Driver::new(&device);
    driver.start(&device, 1 << 32 | 1 << 50).unwrap();
    until("both rings are enabled", || {
        fake.bodies(SET_VRING_ENABLE).len() == 2
    });
    let told = fake.bodies(SET_FEATURES).pop().unwrap();
    assert_eq!(numbers(&told), [1 << 32 | 1 << 50 | 1 << 30]);
    driver.stop();
    backend.close();
    assert_eq!(generic::device(2).kind, Kind::Block);
}

#[test]
fn what_the_driver_stores_is_the_backends_to_hear() {
    let mut fake = Fake::new();
    fake.serve(Manners::default());
    let (backend, _) = open_generic(&fake, INPUT, &[64]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    assert_eq!(fake.bodies(GET_CONFIG).len(), 1);
    device.config_write(1, &[0xab, 0xcd]);
    let told = fake.bodies(SET_CONFIG).pop().unwrap();
    // Offset, length, "the driver's".
    assert_eq!(told, [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0xab, 0xcd]);
    assert_eq!(fake.bodies(GET_CONFIG).len(), 2, "what it is then");
    for (offset, data) in [
        (135, &[1, 2][..]),
        (1 << 33, &[1]),
        (u64::MAX, &[1]),
        (3, &[]),
    ] {
        device.config_write(offset, data);
    }
    assert_eq!(
        fake.bodies(SET_CONFIG).len(),
        1,
        "nothing that is not there"
    );
    assert_eq!(backend.status().losses, 0);
    // A disk's is this side's to decide.
    let (disk_fake, disk, _) = served(Manners::default(), 1);
    VhostUserDevice::new(disk).config_write(32, &[1]);
    assert!(disk_fake.bodies(SET_CONFIG).is_empty());
    // One that is gone hears nothing, and holds nobody up.
    fake.die();
    until("it is missed", || backend.status().lost.is_some());
    device.config_write(0, &[1]);
    // One that refuses a store serves on, one that answers none is cut off.
    fake.serve(Manners {
        misdeed: Some((SET_CONFIG, Misdeed::No)),
        ..Manners::default()
    });
    until("it is found", || backend.status().lost.is_none());
    device.config_write(0, &[1]);
    assert_eq!(backend.status().losses, 1);
    fake.die();
    fake.serve(Manners {
        misdeed: Some((SET_CONFIG, Misdeed::Silence)),
        ..Manners::default()
    });
    until("it is found", || backend.status().connections == 3);
    let begin = Instant::now();
    device.config_write(0, &[1]);
    assert!(begin.elapsed() < CALL * 3);
    assert_eq!(backend.status().losses, 3);
    backend.close();
}

#[test]
fn queues_are_as_many_as_the_backend_says_if_it_says() {
    let mut fake = Fake::new();
    fake.serve(Manners {
        queues: 1,
        ..Manners::default()
    });
    let error = crate::chain(&open_generic(&fake, 2, &[64, 64]).err().unwrap());
    let words = "has 1 queue(s), queue_sizes= lists 2; list 1 or fewer";
    assert!(error.contains(words), "{error}");
    let mut fake = Fake::new();
    fake.serve(Manners {
        protocol: PROTOCOL_REPLY_ACK,
        ..Manners::default()
    });
    // Nor has it a configuration space.
    let (backend, _) = open_generic(&fake, 2, &[64, 64, 64]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    let mut space = [0; 8];
    device.config_read(0, &mut space);
    device.config_write(0, &[1]);
    assert_eq!(space, [0; 8]);
    assert!(fake.bodies(GET_CONFIG).is_empty() && fake.bodies(SET_CONFIG).is_empty());
    backend.close();
}
