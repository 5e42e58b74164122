//! The daemon as a process, driven by the vhost crate's own frontend: real sockets, memory, rings and signals.

mod driver;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use daxhund_vhost_user::testing::{self, Daemon, counted, refuses};
use driver::frontend::{Driver, OK, Reach};
use tempfile::{NamedTempFile, TempDir};

const PROGRAM: &str = env!("CARGO_BIN_EXE_daxhund-vhost-user-pmem");

const MIB: u64 = 1 << 20;

struct Scene {
    memory: NamedTempFile,
    directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        let memory = NamedTempFile::new().unwrap();
        memory.as_file().set_len(8 * MIB).unwrap();
        Self {
            memory,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("pmem.sock")
    }

    fn words(&self) -> [String; 4] {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (socket, memory) = (text(&self.socket()), text(self.memory.path()));
        ["--socket-path".into(), socket, "--file".into(), memory]
    }

    fn start(&self, more: &[&str]) -> Daemon {
        let words = self.words();
        Daemon::start(
            PROGRAM,
            &[&words.each_ref().map(String::as_str)[..], more].concat(),
        )
    }

    fn refuses(&self, more: &[&str]) -> String {
        let words = self.words();
        refuses(
            PROGRAM,
            &[&words.each_ref().map(String::as_str)[..], more].concat(),
        )
    }

    /// A frontend that has been lent the memory.
    fn connect(&self) -> Driver {
        let mut driver = Driver::connect(&self.socket(), Reach::Shmem);
        driver.take_the_loan();
        driver.set_up();
        driver
    }
}

#[test]
fn memory_is_lent_and_made_durable() {
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    let mut driver = scene.connect();
    assert_eq!(
        driver.config(0, 16),
        [0u64.to_le_bytes(), (8 * MIB).to_le_bytes()].concat()
    );
    assert_eq!(driver.regions(), (1, 8 * MIB));
    let (asked, file) = driver.loan();
    let (offset, at, len, flags) = asked;
    assert_eq!((offset, at, len, flags), (0, 0, 8 * MIB, 1));
    let (ours, theirs) = (scene.memory.as_file().metadata(), file.metadata());
    assert_eq!(ours.unwrap().ino(), theirs.unwrap().ino());
    file.write_all_at(b"kept", 4096).unwrap();
    assert_eq!(driver.flush(), OK);
    assert_eq!(driver.request(7), 1, "no such request");
    assert_eq!(driver.flush(), OK);
    drop((driver, file));
    daemon.ends_well();
    assert!(!scene.socket().exists(), "the socket goes with the daemon");
    let mut found = [0; 4];
    scene
        .memory
        .as_file()
        .read_exact_at(&mut found, 4096)
        .unwrap();
    assert_eq!(&found, b"kept");
}

#[test]
fn a_frontend_without_shared_memory_regions_is_told_and_let_go() {
    let scene = Scene::new();
    let mut daemon = scene.start(&[]);
    for (reach, expected, more) in [
        (
            Reach::Nothing,
            "takes no shared memory regions",
            "VHOST_USER_PROTOCOL_F_SHMEM",
        ),
        (
            Reach::ChannelOnly,
            "does not map",
            "SHMEM feature not negotiated",
        ),
    ] {
        let mut driver = Driver::connect(&scene.socket(), reach);
        driver.is_let_go();
        daemon.says(expected).and(more);
    }
    let mut driver = scene.connect();
    assert_eq!(driver.flush(), OK);
    drop(driver);
    daemon.ends_well();
}

#[test]
fn a_frontend_that_refuses_the_range_is_let_go() {
    let scene = Scene::new();
    let mut daemon = scene.start(&[]);
    let mut driver = Driver::connect(&scene.socket(), Reach::Shmem);
    driver.refuse_the_loan();
    daemon.says("does not map");
    driver.is_let_go();
    daemon.ends_well();
}

#[test]
fn a_frontend_after_another_gets_the_same_and_nothing_is_left_of_the_first() {
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    let mut before = None;
    for round in 0..10u8 {
        let mut driver = scene.connect();
        let (_, file) = driver.loan();
        file.write_all_at(&[round], 0).unwrap();
        assert_eq!(driver.flush(), OK);
        let now = daemon.descriptors_and_threads(Some("lend"));
        assert_eq!(*before.get_or_insert(now), now, "round {round}");
    }
    daemon.ends_well();
}

#[test]
fn a_range_that_a_frontend_keeps_is_lent_to_nobody_else() {
    let scene = Scene::new();
    let mut daemon = scene.start(&[]);
    let mut first = scene.connect();
    let (_, kept) = first.loan();
    drop(first);
    daemon.says("kept by whom it was lent to");
    let mut second = Driver::connect(&scene.socket(), Reach::Shmem);
    daemon.says("nothing is lent to this frontend");
    second.is_let_go();
    daemon
        .says("can't be lent the memory")
        .and("is in use by process");
    drop(second);
    // The one that has it shows it, by its memory table.
    let mut again = Driver::connect(&scene.socket(), Reach::Shmem);
    daemon.says("nothing is lent to this frontend");
    again.show(&kept, 0, 8 * MIB);
    again.take_the_loan();
    again.set_up();
    assert_eq!(again.flush(), OK);
    drop((again, kept));
    let mut third = scene.connect();
    assert_eq!(third.flush(), OK);
    drop(third);
    daemon.ends_well();
}

#[test]
fn a_guest_outlives_the_daemon_that_lent_to_it() {
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    let mut driver = scene.connect();
    let (_, kept) = driver.loan();
    driver.ask();
    driver.wait_for_all();
    daemon.dies();
    // Asked of nobody, and answered by the next.
    driver.ask();
    let error = scene.refuses(&[]);
    assert!(
        error.contains("is in use by process") && error.contains("--rejoin"),
        "{error}"
    );
    let mut daemon = scene.start(&["--rejoin"]);
    driver.reconnect(&scene.socket());
    driver.show(&kept, 0, 8 * MIB);
    driver.take_the_loan();
    driver.set_up();
    driver.wait_for_all();
    daemon.says("it is served again");
    // Of the same open file description: the lock is nobody else's.
    let (_, file) = driver.loan();
    let same = rustix::fs::seek(&kept, rustix::fs::SeekFrom::Start(77))
        .and_then(|_| rustix::fs::tell(&file));
    assert_eq!(same, Ok(77));
    drop((driver, kept, file));
    daemon.ends_well();
}

#[test]
fn what_is_lent_for_reading_is_lent_by_several_and_can_t_be_written() {
    let scene = Scene::new();
    let one = scene.start(&["--read-only"]);
    let other = Scene {
        memory: scene.memory,
        directory: tempfile::tempdir().unwrap(),
    };
    let two = other.start(&["--read-only"]);
    let mut driver = other.connect();
    let ((.., flags), file) = driver.loan();
    assert_eq!(flags, 0);
    file.write_all_at(b"x", 0).unwrap_err();
    assert_eq!(driver.flush(), OK);
    let error = other.refuses(&[]);
    assert!(error.contains("is in use by process"), "{error}");
    drop((driver, file));
    one.ends_well();
    two.ends_well();
}

#[test]
fn one_daemon_lends_to_many_that_read_at_once_and_a_writer_is_told_who_they_are() {
    let scene = Scene::new();
    let daemon = scene.start(&["--read-only"]);
    scene.memory.as_file().write_all_at(b"read", 0).unwrap();
    let mut readers = [scene.connect(), scene.connect(), scene.connect()];
    for driver in &mut readers {
        let ((.., flags), file) = driver.loan();
        assert_eq!(flags, 0);
        let mut found = [0; 4];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(&found, b"read");
        assert_eq!(driver.flush(), OK);
    }
    let other = tempfile::tempdir().unwrap();
    let (socket, memory) = (other.path().join("pmem.sock"), scene.memory.path());
    let words = [socket.as_path(), memory].map(|path| path.to_str().unwrap());
    let error = refuses(PROGRAM, &["--socket-path", words[0], "--file", words[1]]);
    assert!(error.contains("is in use by process"), "{error}");
    // One that goes takes nothing from the others.
    let [first, mut second, third] = readers;
    drop((first, third));
    assert_eq!(second.flush(), OK);
    let mut fourth = scene.connect();
    assert_eq!((fourth.flush(), second.flush()), (OK, OK));
    drop((second, fourth));
    daemon.ends_well();
}

#[test]
fn what_happens_is_told_and_counted() {
    let scene = Scene::new();
    let place = |name: &str| scene.directory.path().join(name);
    let (events, metrics) = (place("events"), place("metrics"));
    let word = format!("path={}", events.display());
    let metrics_word = metrics.to_str().unwrap();
    let daemon = scene.start(&["--event-monitor", &word, "--metrics-socket", metrics_word]);
    let count = |name: &str| counted(&metrics, &format!("daxhund_vhost_user_pmem_{name}"));
    assert_eq!((count("sessions"), count("requests")), (0, 0));
    let mut driver = scene.connect();
    assert_eq!((driver.flush(), driver.request(7)), (OK, 1));
    let names = ["sessions", "requests", "errors", "flushes"];
    assert_eq!(names.map(count), [1, 2, 1, 1]);
    drop(driver);
    // The daemon serves one after the other: when the second one is served, the first has gone.
    let mut driver = scene.connect();
    assert_eq!(driver.flush(), OK);
    assert_eq!(names.map(count), [2, 3, 1, 2]);
    daemon.ends_well();
    assert!(!metrics.exists(), "the socket goes with the daemon");
    let told = std::fs::read_to_string(&events).unwrap();
    let one = ["frontend-connected", "frontend-gone"];
    let expected = [&["listening"][..], &one, &one[..1], &["ending"]].concat();
    assert_eq!(testing::told(&told), expected, "{told}");
    assert!(told.contains("\"source\": \"vhost-user-pmem\""), "{told}");
}

#[test]
fn what_is_no_vhost_user_ends_its_own_session_only() {
    use std::io::Write;
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        &[1, 0, 0],
        &[],
    ] {
        let mut stream = UnixStream::connect(scene.socket()).unwrap();
        // The daemon may have hung up by then.
        let _ = stream.write_all(garbage);
    }
    let mut driver = scene.connect();
    assert_eq!(driver.flush(), OK);
    drop(driver);
    daemon.ends_well();
}

#[test]
fn a_socket_can_come_from_systemd() {
    let scene = Scene::new();
    let listener = UnixListener::bind(scene.socket()).unwrap();

    // As systemd does it: descriptor 3, and the process's own id.
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" --file \"$1\"";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, PROGRAM, scene.memory.path().to_str().unwrap()])
        .stdin(Stdio::from(OwnedFd::from(listener)));
    let daemon = Daemon::spawn(&mut command);
    let mut driver = scene.connect();
    assert_eq!(driver.flush(), OK);
    drop(driver);
    daemon.ends_well();
    assert!(scene.socket().exists(), "systemd's socket stays");
}

#[test]
fn what_can_t_be_lent_is_an_error_before_anything_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("pmem.sock");
    let words = |memory: [&'static str; 2]| {
        refuses(
            PROGRAM,
            &[&["--socket-path", socket.to_str().unwrap()][..], &memory].concat(),
        )
    };
    let error = words(["--file", "/dev/zero"]);
    assert!(error.contains("is not a file"), "{error}");
    let error = words(["--dax", "/nonexistent"]);
    assert!(error.contains("/nonexistent does not exist"), "{error}");
    let error = words(["--dax", "/dev/dax0.0,size=much"]);
    assert!(error.contains("`size=much` is not a number"), "{error}");
    File::open(&socket).unwrap_err();
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    let other = tempfile::tempdir().unwrap();
    let another = other.path().join("pmem.sock");
    let memory = scene.memory.path().to_str().unwrap();
    let error = refuses(
        PROGRAM,
        &["--socket-path", another.to_str().unwrap(), "--file", memory],
    );
    assert!(
        error.contains("is in use by process"),
        "a second writer: {error}"
    );
    daemon.ends_well();
}
