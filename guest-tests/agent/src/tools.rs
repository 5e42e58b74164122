//! Small programs that tests run on the emulated host: `lab-agent NAME ARGUMENT...`.
//!
//! `connect SOCKET`, `dax-vanish DEVICE`, `await PATH SECONDS`, `await-gone PATH SECONDS`, `await-socket PATH SECONDS`, `unix-echo PATH`, `vsock-ask SOCKET PORT TEXT`,
//! `tcp-ask ADDRESS TEXT`, `tcp-serve ADDRESS`, `http SOCKET METHOD TARGET [BODY]`.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use daxhund_dax::{Host, LockKind};

use crate::{sockets, wait};

pub(crate) const NAMES: [&str; 10] = [
    "connect",
    "dax-vanish",
    "await",
    "await-gone",
    "await-socket",
    "unix-echo",
    "vsock-ask",
    "tcp-ask",
    "tcp-serve",
    "http",
];

/// Runs the program that the arguments name.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["connect", path] => connect(path).map_err(|error| format!("{path}: {error}")),
        ["dax-vanish", path] => dax_vanish(path),
        ["await", path, seconds] => number(seconds)
            .and_then(|seconds| wait::for_path(path, Duration::from_secs(seconds), true)),
        ["await-gone", path, seconds] => number(seconds)
            .and_then(|seconds| wait::for_path(path, Duration::from_secs(seconds), false)),
        ["await-socket", path, seconds] => number(seconds)
            .and_then(|seconds| sockets::await_unix(path, Duration::from_secs(seconds))),
        ["unix-echo", path] => sockets::serve_unix_echo(path),
        ["vsock-ask", path, port, text] => number(port)
            .and_then(|port| sockets::ask_guest(path, port, text))
            .map(|line| println!("{line}")),
        ["tcp-ask", address, text] => sockets::connect_tcp(address)
            .and_then(|mut stream| {
                sockets::ask(&mut stream, text).map_err(|error| format!("{address}: {error}"))
            })
            .map(|line| println!("{line}")),
        ["tcp-serve", address] => sockets::serve_transfers(address),
        ["http", path, method, target] => print_http(path, method, target, ""),
        ["http", path, method, target, body] => print_http(path, method, target, body),
        _ => Err(format!("wrong arguments: {words:?}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("lab-agent: {message}");
            ExitCode::FAILURE
        }
    }
}

fn number<T: std::str::FromStr>(word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("not a number: {word}"))
}

fn print_http(path: &str, method: &str, target: &str, body: &str) -> Result<(), String> {
    let answer = sockets::http(path, method, target, body)?;
    println!("{answer}");
    Ok(())
}

/// Standard input and output are the two directions of a unix socket. Ends when either end does.
fn connect(path: &str) -> io::Result<()> {
    let mut from = UnixStream::connect(path)?;
    let mut to = from.try_clone()?;
    thread::spawn(move || {
        let copied = io::copy(&mut io::stdin(), &mut to);
        // Ends the other direction too; nothing is left to be done when that fails.
        let _ = to.shutdown(Shutdown::Both);
        copied
    });
    let mut buffer = [0; 4096];
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(&buffer[..read])?;
        out.flush()?;
    }
}

/// Opens and locks a dax device, takes its driver away, and maps it. That has to be an error that says so; it is
/// printed on standard output.
fn dax_vanish(path: &str) -> Result<(), String> {
    let chain = |error: &dyn std::error::Error| error.to_string();
    let device = Host::system()
        .open(Path::new(path))
        .map_err(|e| chain(&e))?;
    let range = device.range(None, None).map_err(|e| chain(&e))?;
    let lock = device
        .lock(range, LockKind::Exclusive)
        .map_err(|e| chain(&e))?;
    let name = device.facts().name.to_string();
    fs::write("/sys/bus/dax/drivers/device_dax/unbind", &name).map_err(|e| chain(&e))?;
    match lock.map() {
        Ok(_) => Err("the device is gone, and it was mapped".to_owned()),
        Err(error) => {
            println!("{error}");
            Ok(())
        }
    }
}
