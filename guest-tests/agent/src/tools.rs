//! Small programs that tests run on the emulated host: `lab-agent NAME ARGUMENT...`.
//!
//! `connect SOCKET`, `disk SOCKET`, `dax-vanish DEVICE`, `dax-watch DEVICE ROUNDS`, `dax-watch-cost DEVICE`, `await PATH SECONDS`, `await-gone PATH SECONDS`, `await-socket PATH SECONDS`, `unix-echo PATH`, `vsock-ask SOCKET PORT TEXT`,
//! `tcp-ask ADDRESS TEXT`, `tcp-serve ADDRESS`, `loads FILE WORD [OFFSET]`, `vector-loads FILE WORD`, `vector-stores FILE`,
//! `dma-loop DISK HEART GO MARK TARGET...`, `soak-write FILE SEED DURABLE STOP`, `http SOCKET METHOD TARGET [BODY]`,
//! `caller SOCKET`, `listening SOCKET PROGRAM ARGUMENT...`, and what [`crate::guard`] says.
//!
//! For benches: `boot-bare KERNEL INITRAMFS DEVICE BYTES`; and, each telling in JSON what it took: `pin-bare PATH MEMORY BYTES INTERFACE`, `pin-parts PATH MEMORY BYTES INTERFACE REGIONS THREADS`,
//! `attach SOCKET PATH ID`, `attach-disk SOCKET BACKEND ID`, `detach SOCKET ID SECONDS`, `take DEVICE PID MARKS`, `loss-bare PATH DEVICE BYTES INTERFACE`.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use daxhund_dax::{Host, LockKind};
use lab_agent::pin_protocol::{BareAttach, Interface};
use serde::Serialize;

use crate::bare::{self, Cut, Plan, boot, loss};
use crate::guest::page_map::physical_address;
use crate::guest::{exposure, persist};
use crate::removal::take;
use crate::{caller, disk, guard, memory, removal, rest, sockets, wait};

pub(crate) const NAMES: [&str; 31] = [
    "connect",
    "disk",
    "dax-vanish",
    "dax-watch",
    "dax-watch-cost",
    "await",
    "await-gone",
    "await-socket",
    "unix-echo",
    "vsock-ask",
    "tcp-ask",
    "tcp-serve",
    "loads",
    "vector-loads",
    "vector-stores",
    "dma-loop",
    "soak-write",
    "http",
    "caller",
    "listening",
    "boot-bare",
    "pin-bare",
    "pin-parts",
    "attach",
    "attach-disk",
    "detach",
    "take",
    "loss-bare",
    "guard-hold",
    "guard-release",
    "guard-list",
];

/// Runs the program that the arguments name.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["connect", path] => connect(path).map_err(|error| format!("{path}: {error}")),
        ["disk", socket] => disk::run(socket),
        ["dax-vanish", path] => dax_vanish(path),
        ["dax-watch", path, rounds] => {
            number(rounds).and_then(|rounds| removal::time_signs(path, rounds))
        }
        ["dax-watch-cost", path] => {
            removal::cost_of_watching(path).and_then(|costs| print_json(&costs))
        }
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
        ["loads", path, word] => {
            number(word).and_then(|word| loads(path, word, 0, memory::Words::get))
        }
        ["loads", path, word, offset] => number(word).and_then(|word| {
            number(offset).and_then(|offset| loads(path, word, offset, memory::Words::get))
        }),
        ["vector-loads", path, word] => {
            number(word).and_then(|word| loads(path, word, 0, |words, _| words.first_by_vector()))
        }
        ["vector-stores", path] => vector_stores(path),
        ["dma-loop", disk, heart, go, mark, ref targets @ ..] => (|| {
            let (heart, mark) = (number(heart)?, number(mark)?);
            exposure::run(disk, heart, go, mark, targets)
        })(),
        ["soak-write", path, seed, durable, stop] => {
            number(seed).map(|seed| persist::write_until(path, seed, durable, stop))
        }
        ["tcp-serve", address] => sockets::serve_transfers(address),
        ["guard-hold", place, name, device, milliseconds] => number(milliseconds)
            .and_then(|milliseconds| guard::hold(place, name, device, milliseconds)),
        ["guard-release", socket, device] => guard::release(socket, device),
        ["guard-list", socket] => guard::list(socket),
        ["http", path, method, target] => print_http(path, method, target, ""),
        ["http", path, method, target, body] => print_http(path, method, target, body),
        ["caller", socket] => caller::serve(socket),
        ["listening", socket, ref program @ ..] => caller::become_listening(socket, program),
        ["boot-bare", kernel, initramfs, dax, bytes] => {
            number(bytes).and_then(|bytes| boot::run(kernel, initramfs, dax, bytes))
        }
        ["pin-bare", path, memory, bytes, by] => {
            pin_bare(path, memory, bytes, by).and_then(|report| print_json(&report))
        }
        ["pin-parts", path, memory, bytes, ref how @ ..] => {
            pin_parts(path, memory, bytes, how).and_then(|report| print_json(&report))
        }
        ["attach", socket, path, id] => {
            rest::attach(socket, path, id).and_then(|call| print_json(&call))
        }
        ["attach-disk", socket, backend, id] => {
            rest::attach_disk(socket, backend, id).and_then(|call| print_json(&call))
        }
        ["detach", socket, id, seconds] => number(seconds)
            .and_then(|seconds| rest::detach(socket, id, Duration::from_secs(seconds)))
            .and_then(|call| print_json(&call)),
        ["take", name, pid, marks] => number(pid)
            .and_then(|pid| take::take(name, pid, marks))
            .and_then(|taken| print_json(&taken)),
        ["loss-bare", path, dax, bytes, by] => (|| {
            let loss = loss::run(path, dax, number(bytes)?, interface(by)?)?;
            print_json(&loss)
        })(),
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

/// Between two accesses of a program that makes many.
const PAUSE: Duration = Duration::from_millis(5);

/// Loads a word of a mapped file, at an offset that is a multiple of 8, again and again, for as long as it is `expected`.
/// Says when the first one is loaded, and its physical address where that is told. What ends it otherwise is SIGBUS.
fn loads(
    path: &str,
    expected: u64,
    offset: usize,
    load: fn(&memory::Words, usize) -> u64,
) -> Result<(), String> {
    const WORD_BYTES: usize = 8;
    let words = memory::Words::of_device(path, (offset / 4096 + 1) * 4096)?;
    let place = offset / WORD_BYTES;
    let mut told = false;
    loop {
        let found = load(&words, place);
        if found != expected {
            return Err(format!("{path}: loaded {found:#x}, not {expected:#x}"));
        }
        if !told {
            let physical = physical_address(words.address(place)).unwrap_or_default();
            println!("loading {physical:#x}");
            io::stdout().flush().map_err(|error| error.to_string())?;
            told = true;
        }
        thread::sleep(PAUSE);
    }
}

/// Stores the first word of a mapped file again and again, and each time tells how often on a line of its own.
fn vector_stores(path: &str) -> Result<(), String> {
    let mut words = memory::Words::of_device(path, 4096)?;
    for times in 0u64.. {
        words.set_first_by_vector(times);
        println!("{times}");
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn number<T: std::str::FromStr>(word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("not a number: {word}"))
}

fn print_json(value: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_string(value).map_err(|error| error.to_string())?;
    println!("{text}");
    Ok(())
}

/// Maps memory as a guest's RAM lies.
fn pin_bare(path: &str, memory: &str, bytes: &str, by: &str) -> Result<BareAttach, String> {
    bare::run(&Plan {
        path,
        memory,
        bytes: number(bytes)?,
        interface: interface(by)?,
        cut: Cut::Guest,
    })
}

fn interface(word: &str) -> Result<Interface, String> {
    Interface::of_word(word).ok_or_else(|| format!("no interface: {word}"))
}

/// Maps memory in parts; the bytes are a multiple of what the parts and the memory are aligned to.
fn pin_parts(path: &str, memory: &str, bytes: &str, how: &[&str]) -> Result<BareAttach, String> {
    let [by, regions, threads] = how else {
        return Err(format!(
            "pin-parts takes INTERFACE REGIONS THREADS at last, not {how:?}"
        ));
    };
    let interface = interface(by)?;
    let (bytes, regions): (u64, u64) = (number(bytes)?, number(regions)?);
    if regions == 0 || !bytes.is_multiple_of(regions) {
        return Err(format!("{bytes} bytes do not make {regions} equal parts"));
    }
    bare::run(&Plan {
        path,
        memory,
        bytes,
        interface,
        cut: Cut::Parts {
            regions,
            threads: number(threads)?,
        },
    })
}

fn print_http(path: &str, method: &str, target: &str, body: &str) -> Result<(), String> {
    let answer = sockets::http(path, method, target, body, sockets::SILENCE)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_checked_before_anything_is_opened() {
        let refused = |how: &[&str]| pin_parts("/nowhere", "anonymous", "4096", how).unwrap_err();
        assert!(refused(&["type1", "2"]).contains("INTERFACE REGIONS THREADS"));
        assert!(refused(&["type2", "2", "2"]).contains("type2"));
        assert!(refused(&["type1", "3", "2"]).contains("3 equal parts"));
        assert!(refused(&["type1", "0", "2"]).contains("0 equal parts"));
        assert!(refused(&["type1", "2", "many"]).contains("many"));
    }
}
