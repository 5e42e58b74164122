//! The filter, in processes of their own: this program again, which is told by a variable what to do there.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use daxhund_vhost_user::policy::Seccomp;
use daxhund_vhost_user::seccomp::{Rule, confine};

const WHAT: &str = "DAXHUND_CONFINED_TEST";

/// Runs the test `confined` with a task.
fn child(what: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "confined", "--nocapture"])
        .env(WHAT, what)
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap()
}

/// Does nothing unless it is the child of another test.
#[test]
fn confined() {
    let Ok(what) = std::env::var(WHAT) else {
        return;
    };
    let (mode, what) = what.split_once(' ').unwrap();
    let mode = match mode {
        "log" => Seccomp::Log,
        "false" => Seccomp::False,
        _ => Seccomp::True,
    };
    let extra = [Rule::Call(libc::SYS_getppid), Rule::OpenToWrite];
    let (extra, what) = match what.strip_prefix("more ") {
        Some(what) => (&extra[..], what),
        None => (&[][..], what),
    };
    confine(mode, "the-test", extra).unwrap();
    // A thread that comes later.
    let what = what.to_owned();
    let outcome = std::thread::spawn(move || match what.as_str() {
        "serve" => {
            let text = fs::read_to_string("/proc/self/stat").unwrap();
            let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
            drop((text, one, other));
        }
        "parent" => drop(rustix::process::getppid()),
        "file" => drop(File::create("/nonexistent/file")),
        "write" => drop(File::options().read(true).write(true).open("/dev/null")),
        "network" => drop(std::net::TcpListener::bind("127.0.0.1:0")),
        "panic" => panic!("asked for"),
        "program" => drop(Command::new("/bin/true").status()),
        other => panic!("{other}"),
    });
    outcome.join().unwrap();
    eprintln!("lives");
}

#[test]
fn a_call_that_is_not_on_the_list_kills_and_is_named() {
    for (what, call) in [
        ("parent", libc::SYS_getppid),
        ("file", libc::SYS_openat),
        ("write", libc::SYS_openat),
        ("more file", libc::SYS_openat),
        ("network", libc::SYS_socket),
    ] {
        let output = child(&format!("true {what}"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{what}: {said}");
        let expected = format!("the-test: killed for system call {call}, ");
        assert!(said.contains(&expected), "{what}: {said}");
        assert!(!said.contains("lives"), "{what}: {said}");
    }
    // It is the child of that one that would have become the program.
    let said = child("true program").stderr;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("killed for system call"), "{said}");
}

#[test]
fn a_panic_is_told_as_ever() {
    let output = child("true panic");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(101), "{said}");
    assert!(
        said.contains("asked for") && said.contains("stack backtrace"),
        "{said}"
    );
}

#[test]
fn what_is_served_with_is_not_forbidden_and_nothing_is_where_asked() {
    for what in [
        "true serve",
        "true more parent",
        "true more write",
        "log parent",
        "log network",
        "false file",
    ] {
        let output = child(what);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.contains("lives"),
            "{what}: {said}"
        );
    }
}
