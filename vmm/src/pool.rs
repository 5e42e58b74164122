//! `daxhund pool`: the host's pools of device-dax memory, seen from the command line.
//!
//! What is taken is told by the locks on the devices, so a pool looks the same to whoever may open them, and a look opens
//! each device for a moment.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use daxhund_dax::{
    ByteSize, DaxRange, DeviceFacts, DeviceName, Host, Mode, RangeLock, Taken, Wanted,
};
use rustix::fs::{FileType, fstat};
use serde::Serialize;

use crate::cli::Pool as Asked;
use crate::config::{HostConfig, PoolConfig, Zero};
use crate::host_config;
use crate::memory::pools;

/// Does what was asked, and prints it.
pub fn run(asked: Asked, out: &mut impl Write) -> Result<(), Box<dyn Error>> {
    let (config, host) = (host_config::read()?, Host::system());
    match asked {
        Asked::List { pool, json } => {
            let views = views(&host, &config, pool.as_deref())?;
            print(out, json, &views, list_text)
        }
        Asked::Free { pool, json } => {
            let views = views(&host, &config, pool.as_deref())?;
            print(out, json, &free(&views), |free| free_text(free))
        }
        Asked::Reserve {
            pool,
            size,
            node,
            json,
        } => {
            let wanted = Wanted {
                node,
                ..Wanted::bytes(size.bytes())
            };
            let taken = pools::take(&host, &config, &pool, wanted)?;
            let piece = Piece::of(&pool, &taken.lock);
            print(out, json, &piece, |piece| {
                let Piece { file, place, .. } = piece;
                format!("{} {} {}", file.display(), place.offset, place.size)
            })?;
            hold(taken.lock, io::stdin().lock())
        }
    }
}

fn print<T: Serialize + ?Sized>(
    out: &mut impl Write,
    json: bool,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Box<dyn Error>> {
    let text = if json {
        serde_json::to_string_pretty(value)?
    } else {
        text(value)
    };
    writeln!(out, "{text}")?;
    // Who reserves waits for it.
    Ok(out.flush()?)
}

/// Holds a range until the other end of standard input is closed, if it is a pipe or a socket, or until a signal ends the process:
/// then the kernel lets go of it.
fn hold(lock: RangeLock, mut input: impl Read + std::os::fd::AsFd) -> Result<(), Box<dyn Error>> {
    let kind = FileType::from_raw_mode(fstat(&input)?.st_mode);
    if !matches!(kind, FileType::Fifo | FileType::Socket) {
        // A shell gives what it starts in the background /dev/null, which ends at once.
        loop {
            rustix::event::pause();
        }
    }
    io::copy(&mut input, &mut io::sink())?;
    lock.release().map_err(|(_, error)| error)?;
    Ok(())
}

/// Where in a device.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Place {
    offset: u64,
    size: u64,
}

impl From<DaxRange> for Place {
    fn from(range: DaxRange) -> Self {
        let (offset, size) = (range.offset(), range.len());
        Self { offset, size }
    }
}

/// A device as `daxctl list` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Device {
    chardev: DeviceName,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_node: Option<u32>,
    align: u64,
    mode: Mode,
}

impl From<&DeviceFacts> for Device {
    fn from(facts: &DeviceFacts) -> Self {
        Self {
            chardev: facts.name,
            target_node: facts.target_node,
            align: facts.align_bytes,
            mode: facts.mode(),
        }
    }
}

/// A range of a pool, free or reserved: a device that is as large as the range is.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Piece {
    #[serde(flatten)]
    device: Device,
    #[serde(flatten)]
    place: Place,
    pool: String,
    file: PathBuf,
}

impl Piece {
    fn of(pool: &str, lock: &RangeLock) -> Self {
        let opened = lock.opened();
        Self {
            device: opened.facts().into(),
            place: lock.range().into(),
            pool: pool.to_owned(),
            file: opened.path().to_owned(),
        }
    }
}

/// A pool as it is now.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct View {
    pool: String,
    /// Whether RAM comes from it for which nobody named anything.
    ram: bool,
    zero: Zero,
    devices: Vec<MemberView>,
}

/// A device of a pool as it is now.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct MemberView {
    file: PathBuf,
    #[serde(flatten)]
    state: State,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum State {
    Usable {
        #[serde(flatten)]
        device: Device,
        size: u64,
        free: u64,
        largest_free: u64,
        taken: Vec<TakenView>,
        /// For [`free`].
        #[serde(skip)]
        pieces: Vec<DaxRange>,
    },
    Unusable {
        error: String,
    },
}

/// A range that somebody has.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct TakenView {
    #[serde(flatten)]
    place: Place,
    /// `null`: a process that can't be seen.
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comm: Option<String>,
    /// Where the API of the VM is.
    #[serde(skip_serializing_if = "Option::is_none")]
    api_socket: Option<String>,
}

impl From<&Taken> for TakenView {
    fn from(taken: &Taken) -> Self {
        let holder = taken.holder.as_ref();
        Self {
            place: taken.range.into(),
            pid: holder.map(|holder| holder.pid),
            comm: holder.map(|holder| holder.comm.clone()),
            api_socket: holder.and_then(|holder| {
                let line = fs::read(format!("/proc/{}/cmdline", holder.pid)).ok()?;
                api_socket(&line)
            }),
        }
    }
}

/// By which a VM is told from others: what its command line has for `--api-socket`.
fn api_socket(cmdline: &[u8]) -> Option<String> {
    let mut words = cmdline
        .split(|byte| *byte == 0)
        .map(String::from_utf8_lossy);
    let value = words.find_map(|word| match word.strip_prefix("--api-socket")? {
        "" => Some(None),
        rest => Some(Some(rest.strip_prefix('=')?.to_owned())),
    })?;
    value.or_else(|| Some(words.next()?.into_owned()))
}

/// The pool of this name, or every one.
fn views(
    host: &Host,
    config: &HostConfig,
    name: Option<&str>,
) -> Result<Vec<View>, Box<dyn Error>> {
    match name {
        Some(name) => Ok(vec![view(host, config, name, config.pool(name)?)?]),
        None => config
            .pools()
            .map(|(name, pool)| view(host, config, name, pool))
            .collect(),
    }
}

fn view(
    host: &Host,
    config: &HostConfig,
    name: &str,
    pool: &PoolConfig,
) -> Result<View, Box<dyn Error>> {
    let members = pools::pool(name, pool).members(host)?;
    let devices = members.into_iter().map(|member| MemberView {
        file: member.path,
        state: match member.state {
            Err(error) => State::Unusable {
                error: crate::chain(&error),
            },
            Ok((facts, room)) => State::Usable {
                device: (&facts).into(),
                size: facts.size_bytes,
                free: room.free_bytes(),
                largest_free: room.largest_free_bytes(),
                taken: room.taken().iter().map(TakenView::from).collect(),
                pieces: room.free(),
            },
        },
    });
    Ok(View {
        pool: name.to_owned(),
        ram: config.ram().is_some_and(|ram| ram.pool == name),
        zero: pool.zero,
        devices: devices.collect(),
    })
}

fn free(views: &[View]) -> Vec<Piece> {
    let mut free = Vec::new();
    for View { pool, devices, .. } in views {
        for MemberView { file, state } in devices {
            let State::Usable { device, pieces, .. } = state else {
                continue;
            };
            free.extend(pieces.iter().map(|range| Piece {
                device: device.clone(),
                place: (*range).into(),
                pool: pool.clone(),
                file: file.clone(),
            }));
        }
    }
    free
}

/// A line for each pool, device and range that is taken.
fn list_text(views: &Vec<View>) -> String {
    let mut lines = Vec::new();
    for view in views {
        let zeroed = match view.zero {
            Zero::Before => "RAM of it is zeroed before a guest gets it",
            Zero::Never => "RAM of it is never zeroed",
        };
        let default = if view.ram {
            "; RAM without file= comes from it"
        } else {
            ""
        };
        lines.push(format!("pool {}: {zeroed}{default}", view.pool));
        for MemberView { file, state } in &view.devices {
            let file = file.display();
            match state {
                State::Unusable { error } => lines.push(format!("  can't be used: {error}")),
                State::Usable {
                    device,
                    size,
                    free,
                    largest_free,
                    taken,
                    ..
                } => {
                    let node = device
                        .target_node
                        .map_or("-".to_owned(), |it| it.to_string());
                    lines.push(format!(
                        "  {file}  {}, align {}, node {node}: {} free, {} in one piece",
                        ByteSize(*size),
                        ByteSize(device.align),
                        ByteSize(*free),
                        ByteSize(*largest_free)
                    ));
                    lines.extend(taken.iter().map(taken_text));
                }
            }
        }
    }
    if lines.is_empty() {
        lines.push("this host has no pools".to_owned());
    }
    lines.join("\n")
}

fn taken_text(taken: &TakenView) -> String {
    let Place { offset, size } = taken.place;
    let who = match (taken.pid, &taken.comm) {
        (Some(pid), Some(comm)) => format!("process {pid} ({comm})"),
        _ => "a process that can't be seen".to_owned(),
    };
    let socket = taken.api_socket.as_ref();
    let socket = socket.map_or(String::new(), |socket| format!(", {socket}"));
    format!(
        "    {} at offset {}: {who}{socket}",
        ByteSize(size),
        ByteSize(offset)
    )
}

/// A line for each piece.
fn free_text(free: &[Piece]) -> String {
    let line = |piece: &Piece| {
        format!(
            "{}  {}  {} at offset {}",
            piece.pool,
            piece.file.display(),
            ByteSize(piece.place.size),
            ByteSize(piece.place.offset)
        )
    };
    if free.is_empty() {
        return "nothing is free".to_owned();
    }
    free.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    const M: u64 = 1 << 20;

    fn views() -> Vec<View> {
        let device = Device {
            chardev: "dax0.0".parse().unwrap(),
            target_node: Some(1),
            align: 2 * M,
            mode: Mode::Devdax,
        };
        let taken = |offset, size, pid: Option<u32>| TakenView {
            place: Place { offset, size },
            pid,
            comm: pid.map(|_| "daxhund".to_owned()),
            api_socket: pid.map(|_| "/run/vm1".to_owned()),
        };
        vec![View {
            pool: "ram".to_owned(),
            ram: true,
            zero: Zero::Before,
            devices: vec![
                MemberView {
                    file: "/dev/dax0.0".into(),
                    state: State::Usable {
                        device,
                        size: 8 * M,
                        free: 2 * M,
                        largest_free: 2 * M,
                        taken: vec![taken(0, 4 * M, Some(7)), taken(6 * M, 2 * M, None)],
                        pieces: Vec::new(),
                    },
                },
                MemberView {
                    file: "/dev/dax9.0".into(),
                    state: State::Unusable {
                        error: "/dev/dax9.0 does not exist".to_owned(),
                    },
                },
            ],
        }]
    }

    #[test]
    fn the_list_tells_who_has_what() {
        assert_eq!(list_text(&Vec::new()), "this host has no pools");
        assert_eq!(
            list_text(&views()),
            "pool ram: RAM of it is zeroed before a guest gets it; RAM without file= comes from it\n  \
             /dev/dax0.0  8M, align 2M, node 1: 2M free, 2M in one piece\n    \
             4M at offset 0: process 7 (daxhund), /run/vm1\n    \
             2M at offset 6M: a process that can't be seen\n  \
             can't be used: /dev/dax9.0 does not exist"
        );
    }

    #[test]
    fn json_has_daxctls_names_and_ours() {
        let shown = serde_json::to_value(views()).unwrap();
        let expected = json!([{
            "pool": "ram", "ram": true, "zero": "before",
            "devices": [
                {
                    "chardev": "dax0.0", "size": 8 * M, "target_node": 1, "align": 2 * M, "mode": "devdax",
                    "file": "/dev/dax0.0", "free": 2 * M, "largest_free": 2 * M,
                    "taken": [
                        {"offset": 0, "size": 4 * M, "pid": 7, "comm": "daxhund", "api_socket": "/run/vm1"},
                        {"offset": 6 * M, "size": 2 * M, "pid": null},
                    ],
                },
                {"file": "/dev/dax9.0", "error": "/dev/dax9.0 does not exist"},
            ],
        }]);
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_is_free_is_a_list_of_pieces() {
        let mut views = views();
        assert_eq!(free_text(&free(&views)), "nothing is free");
        let State::Usable { pieces, .. } = &mut views[0].devices[0].state else {
            panic!("{views:?}")
        };
        let (_dir, lock) = locked("/dev/random", 4 * M);
        pieces.push(lock.range());
        let free = free(&views);
        assert_eq!(free_text(&free), "ram  /dev/dax0.0  4M at offset 0");
        assert_eq!(
            serde_json::to_value(&free).unwrap(),
            json!([{
                "chardev": "dax0.0", "size": 4 * M, "target_node": 1, "align": 2 * M, "mode": "devdax",
                "offset": 0, "pool": "ram", "file": "/dev/dax0.0",
            }])
        );
    }

    /// A range of a device that is there.
    fn locked(stand_in: &str, size: u64) -> (tempfile::TempDir, RangeLock) {
        let (dir, host, node) = crate::memory::testing::dax_host(stand_in);
        let config = format!("[pool.ram]\ndevices = [{node:?}]");
        let config = HostConfig::parse(Path::new("/c"), &config).unwrap();
        let taken = pools::take(&host, &config, "ram", Wanted::bytes(size)).unwrap();
        (dir, taken.lock)
    }

    #[test]
    fn a_reservation_ends_when_its_pipe_is_closed() {
        let (_dir, lock) = locked("/dev/urandom", 2 * M);
        let (device, range) = (lock.opened(), lock.range());
        let (reader, mut writer) = io::pipe().unwrap();
        let piece = Piece::of("ram", &lock);
        assert_eq!((piece.pool.as_str(), &piece.place), ("ram", &range.into()));
        let holding = std::thread::spawn(move || hold(lock, reader).map_err(|e| e.to_string()));
        writer.write_all(b"still here\n").unwrap();
        let again = || device.lock(range, daxhund_dax::LockKind::Exclusive);
        again().unwrap_err();
        assert!(!holding.is_finished());
        drop(writer);
        holding.join().unwrap().unwrap();
        drop(again().unwrap());
    }

    #[test]
    fn a_vm_is_told_by_its_socket() {
        for (line, socket) in [
            (&b"daxhund\0--api-socket\0/run/a\0-v\0"[..], Some("/run/a")),
            (b"daxhund\0--api-socket=path=/run/a\0", Some("path=/run/a")),
            (b"daxhund\0--api-sockets\0/run/a\0", None),
            (b"daxhund\0--kernel\0k\0", None),
        ] {
            assert_eq!(api_socket(line).as_deref(), socket);
        }
    }
}
