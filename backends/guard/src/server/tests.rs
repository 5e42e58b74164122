//! The loop with real sockets and processes; sysfs, procfs and the kernel's gate are pretended.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::client::{Guard, HoldError, LostError, Notice, Verdict};
use crate::group::{MarkError, Opening};
use crate::release::{ReleaseError, list, release};
use crate::testing::FakeHost;

const LONG: Duration = Duration::from_mins(1);
const SHORT: Duration = Duration::from_millis(100);

/// Plays the kernel: who comes, and what was answered.
#[derive(Clone)]
struct FakeGate {
    coming: Arc<Mutex<Vec<Opening>>>,
    bell: Arc<EventFd>,
    answers: Sender<(u32, bool)>,
    watches: Arc<Mutex<bool>>,
}

impl Gate for FakeGate {
    fn watch(&self, path: &Path) -> Result<Inode, MarkError> {
        *self.watches.lock().unwrap() = true;
        let metadata = fs::metadata(path).unwrap();
        Ok((metadata.dev(), metadata.ino()))
    }

    fn watch_nothing(&self) -> io::Result<()> {
        *self.watches.lock().unwrap() = false;
        Ok(())
    }

    fn read(&self) -> io::Result<Vec<Opening>> {
        drop(self.bell.read());
        Ok(self.coming.lock().unwrap().drain(..).collect())
    }

    fn answer(&self, opening: &Opening, pass: bool) -> io::Result<()> {
        self.answers.send((opening.thread, pass)).unwrap();
        Ok(())
    }
}

impl AsRawFd for FakeGate {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}

/// A guard on a host with dax0.0, dax1.0 and dax2.0.
struct Scene {
    host: FakeHost,
    directory: tempfile::TempDir,
    gate: FakeGate,
    answers: Receiver<(u32, bool)>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Scene {
    fn new() -> Self {
        Self::with(UnknownPolicy::Deny)
    }

    fn with(policy: UnknownPolicy) -> Self {
        let host = FakeHost::new();
        for n in 0..3 {
            host.add_pmem(n);
            host.make_openable(&format!("dax{n}.0"));
        }
        let directory = tempfile::tempdir().unwrap();
        let (sender, answers) = channel();
        let gate = FakeGate {
            coming: Arc::default(),
            bell: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            answers: sender,
            watches: Arc::default(),
        };
        let (listener, place) = Listener::at(&directory.path().join("sock"))
            .unwrap()
            .into_parts();
        let (signal, stop) = UnixStream::pair().unwrap();
        let (its_host, its_gate) = (host.host().clone(), gate.clone());
        let thread = std::thread::spawn(move || {
            let mut server = Server::new(its_host, its_gate, policy).unwrap();
            server.listener = Some(listener);
            server.place = place;
            server.signal = Some(signal);
            server.run(None)
        });
        Self {
            host,
            directory,
            gate,
            answers,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("sock")
    }

    fn connect(&self, name: &str) -> Guard {
        Guard::connect(&self.socket(), name).unwrap()
    }

    fn holder(&self, name: &str, devices: &[&str], within: Duration) -> Guard {
        let mut guard = self.connect(name);
        for device in devices {
            let node = File::open("/dev/zero").unwrap();
            guard.hold(device, node.as_fd(), within).unwrap();
        }
        guard
    }

    /// A process that opens `device_dax`'s `unbind` with this script.
    fn opener(&self, script: &str) -> Child {
        let child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id();
        self.host
            .write(&format!("proc/{pid}/status"), &format!("Tgid:\t{pid}\n"));
        self.host.write(&format!("proc/{pid}/comm"), "sh\n");
        self.host.write(
            &format!("proc/{pid}/cmdline"),
            &format!("sh\0-c\0{script}\0"),
        );
        let path = self
            .host
            .host()
            .sys()
            .join("bus/dax/drivers/device_dax/unbind");
        let metadata = fs::metadata(&path).unwrap();
        let inode = (metadata.dev(), metadata.ino());
        self.gate
            .coming
            .lock()
            .unwrap()
            .push(Opening::pretended(pid, inode, path));
        self.gate.bell.write(1).unwrap();
        child
    }

    fn answer(&self, of: &Child) -> bool {
        let (pid, pass) = self.answers.recv_timeout(LONG).unwrap();
        assert_eq!(pid, of.id());
        pass
    }

    fn no_answer_yet(&self) {
        // The guard has seen everything that came before this round trip.
        list(&self.socket()).unwrap();
        assert_eq!(self.answers.try_recv().ok(), None);
    }

    fn is_watching(&self) -> bool {
        *self.gate.watches.lock().unwrap()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        drop(self.stop.take());
        let outcome = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            outcome.unwrap().unwrap();
        }
    }
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn notice(guard: &mut Guard) -> Notice {
    let mut notices = Vec::new();
    while notices.is_empty() {
        let minute = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let mut polled = [PollFd::new(guard, PollFlags::IN)];
        assert_eq!(poll(&mut polled, Some(&minute)).unwrap(), 1, "no notice");
        notices = guard.read().unwrap();
    }
    assert_eq!(notices.len(), 1);
    notices.remove(0)
}

fn wanted(guard: &mut Guard) -> crate::client::RequestId {
    match notice(guard) {
        Notice::Wanted { request, .. } => request,
        other @ Notice::Withdrawn { .. } => panic!("{other:?}"),
    }
}

#[test]
fn a_removal_waits_for_the_holder_and_passes_with_its_word() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    assert!(scene.is_watching());
    let opener = scene.opener("echo dax1.0 > unbind");
    let Notice::Wanted {
        request,
        device,
        by,
    } = notice(&mut guard)
    else {
        panic!()
    };
    assert_eq!(
        (device.as_str(), by.pid, by.name.as_str()),
        ("dax1.0", opener.id(), "sh")
    );
    assert!(by.file.ends_with("device_dax/unbind"));
    scene.no_answer_yet();
    let listing = list(&scene.socket()).unwrap();
    assert_eq!(listing.held[0].name, "vm1");
    assert_eq!(listing.held[0].state, "connected");
    assert_eq!(listing.waiting[0].devices, ["dax1.0"]);
    guard.answer(request, Verdict::Released).unwrap();
    assert!(scene.answer(&opener));
    assert_eq!(list(&scene.socket()).unwrap().held, []);
    assert!(!scene.is_watching(), "with nothing held nothing is watched");
    end(opener);
}

#[test]
fn a_refusal_turns_it_away_and_the_device_stays_held() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    for _ in 0..2 {
        let opener = scene.opener("echo dax1.0 > unbind");
        let request = wanted(&mut guard);
        let why = "boot RAM".to_owned();
        guard.answer(request, Verdict::Refused { why }).unwrap();
        assert!(!scene.answer(&opener));
        end(opener);
    }
}

#[test]
fn others_pass_at_once_and_the_unknown_do_not() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    let other = scene.opener("echo dax2.0 > unbind");
    assert!(scene.answer(&other));
    let unknown = scene.opener("echo $1 > unbind");
    assert!(!scene.answer(&unknown));
    assert_eq!(guard.read().unwrap(), []);
    guard.let_go("dax1.0").unwrap();
    scene.no_answer_yet();
    let free = scene.opener("echo dax1.0 > unbind");
    assert!(scene.answer(&free));
    [other, unknown, free].into_iter().for_each(end);
}

#[test]
fn with_hold_all_every_holder_is_asked_about_the_unknown() {
    let scene = Scene::with(UnknownPolicy::HoldAll);
    let mut one = scene.holder("vm1", &["dax1.0"], LONG);
    let mut two = scene.holder("vm2", &["dax0.0"], LONG);
    let opener = scene.opener("cat name > unbind");
    let (first, second) = (wanted(&mut one), wanted(&mut two));
    one.answer(first, Verdict::Released).unwrap();
    scene.no_answer_yet();
    two.answer(second, Verdict::Released).unwrap();
    assert!(scene.answer(&opener));
    end(opener);
}

#[test]
fn an_opener_that_is_killed_is_withdrawn() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    let opener = scene.opener("echo dax1.0 > unbind");
    let request = wanted(&mut guard);
    let pid = opener.id();
    end(opener);
    assert_eq!(notice(&mut guard), Notice::Withdrawn { request });
    assert_eq!(
        scene.answers.recv_timeout(LONG).unwrap(),
        (pid, false),
        "the kernel's event is given back"
    );
    // It was under way already: what is released is let go all the same.
    guard.answer(request, Verdict::Released).unwrap();
    assert_eq!(guard.list().unwrap().held, []);
}

#[test]
fn silence_and_a_lost_connection_are_no_release() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], SHORT);
    let opener = scene.opener("echo dax1.0 > unbind");
    let request = wanted(&mut guard);
    assert!(!scene.answer(&opener));
    assert_eq!(notice(&mut guard), Notice::Withdrawn { request });
    end(opener);
    drop(guard);
    let opener = scene.opener("echo dax1.0 > unbind");
    assert!(!scene.answer(&opener));
    assert_eq!(
        list(&scene.socket()).unwrap().held[0].state,
        "connection lost"
    );
    end(opener);
    // The same process can take its claim up again.
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    assert_eq!(guard.list().unwrap().held.len(), 1);
    guard.let_go("dax1.0").unwrap();
    assert_eq!(guard.list().unwrap().held, []);
}

#[test]
fn only_an_open_device_can_be_held() {
    let scene = Scene::new();
    let mut guard = scene.connect("vm1");
    let path_only = i32::try_from(OFlags::PATH.bits()).unwrap();
    let path_only = File::options()
        .read(true)
        .custom_flags(path_only)
        .open("/dev/zero")
        .unwrap();
    let null = File::open("/dev/null").unwrap();
    for node in [&path_only, &null] {
        let refused = guard.hold("dax1.0", node.as_fd(), LONG);
        let Err(HoldError::Refused { why, .. }) = refused else {
            panic!("{refused:?}")
        };
        assert!(why.contains("no open descriptor of dax1.0"), "{why}");
    }
    let zero = File::open("/dev/zero").unwrap();
    for device in ["dax9.0", "../etc", "dax1.0/.."] {
        assert!(
            matches!(
                guard.hold(device, zero.as_fd(), LONG),
                Err(HoldError::Refused { .. })
            ),
            "{device}"
        );
    }
    guard.hold("dax1.0", zero.as_fd(), LONG).unwrap();
    let twice = guard.hold("dax1.0", zero.as_fd(), LONG).unwrap_err();
    assert!(
        twice
            .to_string()
            .contains("held by this connection already"),
        "{twice}"
    );
}

#[test]
fn who_comes_while_a_removal_waits_comes_too_late() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    let opener = scene.opener("echo dax1.0 > unbind");
    let request = wanted(&mut guard);
    let mut late = scene.connect("vm2");
    let zero = File::open("/dev/zero").unwrap();
    let refused = late.hold("dax1.0", zero.as_fd(), LONG).unwrap_err();
    assert!(refused.to_string().contains("somebody waits"), "{refused}");
    guard.answer(request, Verdict::Released).unwrap();
    assert!(scene.answer(&opener));
    end(opener);
}

#[test]
fn garbage_harms_only_who_sends_it() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    for garbage in [
        &b"\x00\xff\n"[..],
        b"{\"hold\":{\"device\":\"dax1.0\",\"answer_within_ms\":1}}\n",
        b"{\"hello\":{\"version\":1,\"name\":\"x\"}}\n{\"hello\":{\"version\":1,\"name\":\"x\"}}\n",
        b"{\"hello\":{\"version\":2,\"name\":\"x\"}}\n",
        &[b'x'; 5000],
    ] {
        let mut stream = UnixStream::connect(scene.socket()).unwrap();
        stream.write_all(garbage).unwrap();
        let last = BufReader::new(stream)
            .lines()
            .map_while(Result::ok)
            .last()
            .unwrap();
        assert!(last.starts_with("{\"fault\":"), "{last}");
    }
    assert_eq!(guard.list().unwrap().held.len(), 1);
}

#[test]
fn a_release_drains_and_unbinds() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    let socket = scene.socket();
    let releasing = std::thread::spawn(move || release(&socket, "dax1.0"));
    let request = wanted(&mut guard);
    assert_eq!(guard.list().unwrap().waiting[0].by.file, "release");
    guard.answer(request, Verdict::Released).unwrap();
    releasing.join().unwrap().unwrap();
    let unbind = scene
        .host
        .host()
        .sys()
        .join("bus/dax/drivers/device_dax/unbind");
    assert_eq!(fs::read_to_string(unbind).unwrap(), "dax1.0");

    let mut guard = scene.holder("vm1", &["dax2.0"], LONG);
    let socket = scene.socket();
    let releasing = std::thread::spawn(move || release(&socket, "dax2.0"));
    let request = wanted(&mut guard);
    let why = "boot RAM".to_owned();
    guard.answer(request, Verdict::Refused { why }).unwrap();
    let error = releasing.join().unwrap().unwrap_err();
    assert!(
        matches!(&error, ReleaseError::Refused { why, .. } if why.contains("boot RAM")),
        "{error}"
    );
    assert!(release(&scene.socket(), "dax9.9").is_err());
}

#[test]
fn a_notice_that_comes_with_another_answer_is_not_lost() {
    let scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    let opener = scene.opener("echo dax1.0 > unbind");
    while list(&scene.socket()).unwrap().waiting.is_empty() {}
    let zero = File::open("/dev/zero").unwrap();
    guard.hold("dax2.0", zero.as_fd(), LONG).unwrap();
    let request = wanted(&mut guard);
    guard.answer(request, Verdict::Released).unwrap();
    assert!(scene.answer(&opener));
    end(opener);
}

#[test]
fn the_end_of_the_guard_lets_nobody_through() {
    let mut scene = Scene::new();
    let mut guard = scene.holder("vm1", &["dax1.0"], LONG);
    let opener = scene.opener("echo dax1.0 > unbind");
    wanted(&mut guard);
    drop(scene.stop.take());
    assert!(!scene.answer(&opener));
    let lost = loop {
        match guard.read() {
            Ok(_) => {}
            Err(lost) => break lost,
        }
    };
    assert!(matches!(lost, LostError::Closed), "{lost}");
    end(opener);
}

#[test]
fn a_helper_ends_with_what_it_is_for() {
    let host = FakeHost::new();
    let (sender, _answers) = channel();
    let gate = FakeGate {
        coming: Arc::default(),
        bell: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        answers: sender,
        watches: Arc::default(),
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let host = host.host().clone();
    let thread = std::thread::spawn(move || {
        Server::new(host, gate, UnknownPolicy::Deny)
            .unwrap()
            .run(Some(theirs))
    });
    drop(ours);
    thread.join().unwrap().unwrap();
}
