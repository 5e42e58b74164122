//! This side listens, and backends connect.

use std::io::Write;
use std::os::unix::net::UnixListener;

use super::classes::{CTRL_VQ, MQ, several_pairs};
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const FEATURES: u64 = 1 << 32 | CTRL_VQ | MQ;

fn manners() -> Manners {
    Manners {
        features: 1 << 32 | 1 << 30 | MQ,
        ..Manners::default()
    }
}

fn listen(fake: &Fake, patience: Duration) -> Result<Arc<Backend>, OpenError> {
    let (class, shape) = several_pairs(2);
    let opened = open_by(fake, Mode::Server { patience }, class, shape);
    opened.map(|(backend, _)| backend)
}

fn refused(fake: &Fake, patience: Duration) -> String {
    crate::chain(&listen(fake, patience).err().unwrap())
}

#[test]
fn a_backend_connects_and_the_next_one_gets_everything() {
    let mut fake = Fake::new();
    fake.call(manners());
    let backend = listen(&fake, PATIENCE).unwrap();
    backend.attach(vec![region(0, MEMORY, 0)]).unwrap();
    let device = VhostUserDevice::new(Arc::clone(&backend));
    let mut driver = Driver::new(&device);
    driver.start(&device, FEATURES).unwrap();
    fake.await_message(SET_VRING_ENABLE);
    for round in 1..4 {
        // Somebody who looks whether anybody listens, too.
        fake.die();
        until("the loss is noticed", || backend.status().losses == round);
        fake.call(manners());
        until("it is served on", || backend.status().lost.is_none());
        assert_eq!(fake.bodies(ADD_MEM_REG).len(), 1);
        assert_eq!(fake.bodies(SET_VRING_ENABLE).len(), 2);
    }
    // One that says nothing is not waited for as one that maps memory is.
    fake.die();
    until("the loss is noticed", || backend.status().losses == 4);
    fake.call(Manners {
        misdeed: Some((GET_FEATURES, Misdeed::Silence)),
        ..manners()
    });
    fake.await_message(GET_FEATURES);
    let mut silent = std::mem::replace(&mut fake, Fake::new());
    std::fs::hard_link(silent.socket(), fake.socket()).unwrap();
    fake.call(manners());
    until("the one after the silent one serves", || {
        backend.status().lost.is_none()
    });
    silent.die();
    // One that comes while another serves has to wait.
    let mut other = Fake::new();
    std::fs::hard_link(fake.socket(), other.socket()).unwrap();
    other.call(manners());
    let before = backend.status().connections;
    backend.attach(vec![region(1 << 32, 1 << 20, 0)]).unwrap();
    assert_eq!(fake.bodies(ADD_MEM_REG).len(), 2);
    assert_eq!(
        (backend.status().connections, other.messages().len()),
        (before, 0)
    );
    fake.die();
    until("the other serves", || {
        backend.status().connections == before + 1
    });
    assert_eq!(other.bodies(ADD_MEM_REG).len(), 2);
    driver.stop();
    backend.close();
    assert!(!silent.socket().exists(), "the socket goes with the device");
    other.die();
}

#[test]
fn who_is_no_backend_is_passed_over() {
    let mut fake = Fake::new();
    let socket = fake.socket();
    let visitors = std::thread::spawn(move || {
        let visit = || {
            let mut visitor = None;
            until("somebody listens", || {
                visitor = UnixStream::connect(&socket).ok();
                visitor.is_some()
            });
            visitor.unwrap()
        };
        drop(visit());
        let _ = visit().write_all(&[0xff; 64]);
        drop(visit());
    });
    let opened = std::thread::scope(|scope| {
        let opened = scope.spawn(|| listen(&fake, PATIENCE));
        visitors.join().unwrap();
        let mut last = Fake::new();
        std::fs::hard_link(fake.socket(), last.socket()).unwrap();
        last.call(manners());
        (opened.join().unwrap(), last)
    });
    let (backend, mut last) = opened;
    let backend = backend.unwrap();
    assert_eq!(backend.status().connections, 1);
    backend.close();
    last.die();
    fake.die();
}

#[test]
fn who_is_told_to_end_waits_no_longer() {
    let fake = Fake::new();
    let (told, mut teller) = UnixStream::pair().unwrap();
    // Before it waits, so that no signal would end the wait.
    teller.write_all(&[1]).unwrap();
    let mode = Mode::Server {
        patience: Duration::from_hours(1),
    };
    let opened = open_until(&fake, mode, several_pairs(2), &told);
    let error = crate::chain(&opened.err().unwrap());
    assert!(error.contains("was ended"), "{error}");
    assert!(!fake.socket().exists());
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_left() {
    let mut fake = Fake::new();
    let error = refused(&fake, Duration::from_millis(50));
    let words = "no backend has connected to the socket";
    assert!(error.contains(words) && error.contains("50ms"), "{error}");
    assert!(!fake.socket().exists());
    // Left by a process that was killed.
    drop(UnixListener::bind(fake.socket()).unwrap());
    fake.call(Manners {
        features: 1 << 30,
        ..manners()
    });
    let error = refused(&fake, PATIENCE);
    assert!(error.contains("VIRTIO_F_VERSION_1"), "{error}");
    assert!(!fake.socket().exists());
    fake.call(Manners {
        misdeed: Some((GET_FEATURES, Misdeed::Silence)),
        ..manners()
    });
    let error = refused(&fake, PATIENCE);
    assert!(error.contains("says nothing"), "{error}");
    let listener = UnixListener::bind(fake.socket()).unwrap();
    let error = refused(&fake, PATIENCE);
    assert!(
        error.contains("device d0") && error.contains("is in use"),
        "{error}"
    );
    assert!(
        UnixStream::connect(fake.socket()).is_ok(),
        "it is left alone"
    );
    drop(listener);
    std::fs::remove_file(fake.socket()).unwrap();
    std::fs::write(fake.socket(), "mine").unwrap();
    let error = refused(&fake, PATIENCE);
    assert!(error.contains("is not a socket"), "{error}");
    assert_eq!(std::fs::read(fake.socket()).unwrap(), b"mine");
}
