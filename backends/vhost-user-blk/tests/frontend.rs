//! The daemon as a process, driven by the vhost crate's own frontend: real sockets, memory, rings and signals.

mod driver;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use daxhund_vhost_user::testing::{self, Daemon, counted, refuses};
use driver::frontend::{Driver, FAR, IO_ERROR, OK, Piece};
use tempfile::{NamedTempFile, TempDir};
use virtio_bindings::virtio_blk as spec;

const PROGRAM: &str = env!("CARGO_BIN_EXE_daxhund-vhost-user-blk");

const MIB: u64 = 1 << 20;

fn image(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

struct Scene {
    image: NamedTempFile,
    directory: TempDir,
}

impl Scene {
    fn new() -> Self {
        Self {
            image: image(8 * MIB),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("blk.sock")
    }

    fn start(&self, options: &[&str]) -> Daemon {
        let socket = self.socket();
        let disk = self.image.path();
        let words = ["--socket-path", path(&socket), "--file", path(disk)];
        Daemon::start(PROGRAM, &[&words[..], options].concat())
    }

    fn byte(&self, at: u64) -> u8 {
        let mut byte = [0];
        self.image.as_file().read_exact_at(&mut byte, at).unwrap();
        byte[0]
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_disk_is_read_and_written_by_several_queues() {
    let scene = Scene::new();
    let daemon = scene.start(&["--num-queues", "2"]);
    let mut driver = Driver::connect(&scene.socket(), 2);
    assert_eq!(driver.config(0, 8), (8 * MIB / 512).to_le_bytes());
    assert_eq!(driver.config(34, 2), 2u16.to_le_bytes());
    let bytes: Vec<u8> = (0..65536u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
    assert_eq!(driver.write(0, 9, &bytes), OK);
    assert_eq!(driver.flush(1), OK);
    let (status, read) = driver.read(1, 9, 65536);
    assert_eq!(status, OK);
    assert!(read == bytes, "the other queue reads what the first wrote");
    let mut on_disk = vec![0; 65536];
    scene
        .image
        .as_file()
        .read_exact_at(&mut on_disk, 9 * 512)
        .unwrap();
    assert!(on_disk == bytes);
    assert_eq!(driver.range(1, spec::VIRTIO_BLK_T_WRITE_ZEROES, 9, 2), OK);
    assert_eq!(
        (scene.byte(10 * 512), scene.byte(11 * 512)),
        (0, bytes[1024])
    );
    assert_eq!(driver.write(0, 8 * MIB / 512, &bytes[..512]), IO_ERROR);
    drop(driver);
    daemon.ends_well();
    assert!(!scene.socket().exists(), "the socket goes with the daemon");
}

#[test]
fn what_happens_is_told_and_counted() {
    let scene = Scene::new();
    let place = |name: &str| scene.directory.path().join(name);
    let (events, metrics) = (place("events"), place("metrics"));
    let word = format!("path={}", path(&events));
    let daemon = scene.start(&["--event-monitor", &word, "--metrics-socket", path(&metrics)]);
    let count = |name: &str| counted(&metrics, &format!("daxhund_vhost_user_blk_{name}"));
    assert_eq!((count("sessions"), count("requests")), (0, 0));
    let mut driver = Driver::connect(&scene.socket(), 1);
    assert_eq!(driver.write(0, 0, &[1; 4096]), OK);
    assert_eq!(driver.read(0, 0, 1024).0, OK);
    assert_eq!(driver.flush(0), OK);
    assert_eq!(driver.write(0, 8 * MIB / 512, &[1; 512]), IO_ERROR);
    let names = [
        "requests",
        "errors",
        "read_bytes",
        "written_bytes",
        "flushes",
    ];
    assert_eq!(names.map(count), [4, 1, 1024, 4096, 1]);
    assert_eq!(count("sessions"), 1);
    drop(driver);
    // The daemon serves one after the other: when the second one is served, the first has gone.
    let mut driver = Driver::connect(&scene.socket(), 1);
    assert_eq!(driver.read(0, 0, 512).0, OK);
    assert_eq!((count("sessions"), count("requests")), (2, 5));
    daemon.ends_well();
    assert!(!metrics.exists(), "the socket goes with the daemon");
    let told = fs::read_to_string(&events).unwrap();
    let expected = [
        "listening",
        "frontend-connected",
        "frontend-gone",
        "frontend-connected",
        "ending",
    ];
    assert_eq!(testing::told(&told), expected, "{told}");
    assert!(told.contains("\"bytes\": \"8388608\"") && told.contains("\"why\": \"signal\""));
}

#[test]
fn a_disk_that_is_only_read_refuses_writes_and_is_shared() {
    let scene = Scene::new();
    let one = scene.start(&["--read-only"]);
    let other = Scene {
        image: scene.image,
        directory: tempfile::tempdir().unwrap(),
    };
    let two = other.start(&["--read-only"]);
    let mut driver = Driver::connect(&other.socket(), 1);
    assert!(driver.offered(spec::VIRTIO_BLK_F_RO) && !driver.offered(spec::VIRTIO_BLK_F_DISCARD));
    assert_eq!(driver.write(0, 0, &[1; 512]), IO_ERROR);
    assert_eq!(driver.read(0, 0, 512), (OK, vec![0; 512]));
    // A third, which would write.
    let words = [
        "--socket-path",
        "/tmp/unused",
        "--file",
        path(other.image.path()),
    ];
    let error = refuses(PROGRAM, &words);
    assert!(error.contains("is in use by process"), "{error}");
    drop(driver);
    one.ends_well();
    two.ends_well();
}

#[test]
fn one_frontend_follows_another_and_nothing_is_left_of_the_first() {
    let scene = Scene::new();
    let daemon = scene.start(&["--num-queues", "4"]);
    let mut before = None;
    for round in 0..20u8 {
        let mut driver = Driver::connect(&scene.socket(), 4);
        assert_eq!(driver.write(3, 1, &[round | 0x80; 512]), OK);
        assert_eq!(driver.read(0, 1, 512), (OK, vec![round | 0x80; 512]));
        // Counted at the same place of each session, when the earlier ones are over: the daemon serves one at a time.
        let now = daemon.descriptors_and_threads(None);
        assert_eq!(*before.get_or_insert(now), now, "round {round}");
    }
    daemon.ends_well();
}

#[test]
fn what_is_no_vhost_user_ends_its_own_session_only() {
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        &[1, 0, 0],
        &[],
    ] {
        let mut stream = UnixStream::connect(scene.socket()).unwrap();
        stream.write_all(garbage).unwrap();
    }
    let mut driver = Driver::connect(&scene.socket(), 1);
    assert_eq!(driver.flush(0), OK);
    drop(driver);
    daemon.ends_well();
}

#[test]
fn a_signal_ends_a_session_and_what_was_taken_is_answered() {
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    let mut driver = Driver::connect(&scene.socket(), 1);
    let bytes = vec![7; 65536];
    let asked = driver.ask_many(&bytes);
    daemon.ends_well();
    // A prefix is answered: each that was taken, and is on the disk; the next daemon goes on behind it.
    let answered = driver.answered(0);
    assert!(answered <= asked);
    for n in 0..u64::from(answered) {
        assert_eq!(scene.byte(n * 65536), 7, "request {n}");
    }
    for n in u64::from(answered)..u64::from(asked) {
        assert_eq!(scene.byte(n * 65536), 0, "request {n}");
    }
    let daemon = scene.start(&[]);
    driver.reconnect(&scene.socket());
    driver.wait_for_all(0);
    for n in 0..u64::from(asked) {
        assert_eq!(scene.byte(n * 65536), 7, "request {n}");
    }
    drop(driver);
    daemon.ends_well();
}

#[test]
fn memory_that_is_taken_back_is_unmapped_before_the_answer() {
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    let mut driver = Driver::connect(&scene.socket(), 1);
    driver.share_far();
    driver.far_write(0, &[9; 4096]);
    assert_eq!(
        driver.request(0, spec::VIRTIO_BLK_T_OUT, 0, &[(FAR, 4096, false)]),
        OK
    );
    assert_eq!(daemon.mappings_of("guest-far"), 1);
    driver.take_far_back();
    assert_eq!(daemon.mappings_of("guest-far"), 0);
    let piece: Piece = (FAR, 4096, false);
    assert_eq!(
        driver.request(0, spec::VIRTIO_BLK_T_OUT, 8, &[piece]),
        IO_ERROR
    );
    assert_eq!((scene.byte(4095), scene.byte(4096)), (9, 0));
    drop(driver);
    daemon.ends_well();
}

#[test]
fn guest_memory_that_goes_away_is_survived_and_no_byte_of_it_is_written() {
    let scene = Scene::new();
    scene
        .image
        .as_file()
        .write_all_at(&vec![3; 65536], 0)
        .unwrap();
    let daemon = scene.start(&[]);
    let mut driver = Driver::connect(&scene.socket(), 1);
    driver.share_far();
    driver.far_write(0, &[9; 4096]);
    assert_eq!(
        driver.request(0, spec::VIRTIO_BLK_T_OUT, 0, &[(FAR, 4096, false)]),
        OK
    );
    driver.cut_far_off();
    for sector in [8, 16] {
        let out = driver.request(0, spec::VIRTIO_BLK_T_OUT, sector, &[(FAR, 4096, false)]);
        let within = driver.request(0, spec::VIRTIO_BLK_T_IN, sector, &[(FAR, 4096, true)]);
        assert_eq!((out, within), (IO_ERROR, IO_ERROR));
    }
    assert_eq!(
        (scene.byte(0), scene.byte(4096), scene.byte(12287)),
        (9, 3, 3)
    );
    // What is there goes on.
    assert_eq!(driver.write(0, 8, &[4; 512]), OK);
    drop(driver);
    daemon.ends_well();
}

#[test]
fn a_socket_in_use_is_an_error_that_says_so() {
    let scene = Scene::new();
    let daemon = scene.start(&[]);
    let image = image(MIB);
    let socket = scene.socket();
    let words = ["--socket-path", path(&socket), "--file", path(image.path())];
    let error = refuses(PROGRAM, &words);
    assert!(
        error.contains("is in use: another process listens"),
        "{error}"
    );
    // The one that is there has lost nothing by it.
    let mut driver = Driver::connect(&scene.socket(), 1);
    assert_eq!(driver.flush(0), OK);
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
        .args(["-c", script, PROGRAM, path(scene.image.path())])
        .stdin(Stdio::from(OwnedFd::from(listener)));
    let daemon = Daemon::spawn(&mut command);
    let mut driver = Driver::connect(&scene.socket(), 1);
    assert_eq!(driver.flush(0), OK);
    drop(driver);
    daemon.ends_well();
    assert!(scene.socket().exists(), "systemd's socket stays");
}

#[test]
fn what_can_t_be_served_is_an_error_before_anything_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("blk.sock");
    let image = image(MIB);
    let words = |disk: [&'static str; 2]| {
        refuses(
            PROGRAM,
            &[&["--socket-path", path(&socket)][..], &disk].concat(),
        )
    };
    let error = words(["--file", "/dev/zero"]);
    assert!(error.contains("is given by --dax"), "{error}");
    let error = words(["--dax", "/nonexistent"]);
    assert!(error.contains("/nonexistent does not exist"), "{error}");
    let error = words(["--dax", "/dev/null"]);
    assert!(error.contains("/dev/null is"), "{error}");
    let error = words(["--dax", "/dev/dax0.0,size=much"]);
    assert!(error.contains("`size=much` is not a number"), "{error}");
    let error = refuses(PROGRAM, &["--file", path(image.path())]);
    assert!(error.contains("nowhere to listen"), "{error}");
    File::open(&socket).unwrap_err();
}
