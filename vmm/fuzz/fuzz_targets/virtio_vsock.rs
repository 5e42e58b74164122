//! A guest that sends any packets, clients that come and go, and a service of the host that answers: the device lives.
//!
//! Packets are made here, because bytes alone are seldom one for a connection that there is.

#![no_main]

mod moves;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::OnceLock;

use daxhund::virtio::Device;
use daxhund::virtio::testing::{Driver, EVENT_IDX, MEMORY, Piece};
use daxhund::virtio::vsock::{VsockDevice, VsockSpec};
use libfuzzer_sys::fuzz_target;
use moves::Moves;

const CID: u64 = 3;
/// The service's port.
const PORT: u32 = 5;
/// Chains in one run: the driver's memory is never reused.
const MOST_CHAINS: usize = 400;
/// Rounds of the event loop after a move.
const ROUNDS: usize = 16;
/// Sockets of one side at a time.
const MOST_SOCKETS: usize = 16;

/// One device and one service for all runs.
struct Host {
    device: VsockDevice,
    service: UnixListener,
}

fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| {
        // The fuzzer's own `main` leaves the signal as it is; that of a Rust program ignores it.
        // SAFETY: no handler is installed, so nothing runs in one.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        let path = std::env::temp_dir().join(format!("daxhund-fuzz-vsock-{}", std::process::id()));
        let service = UnixListener::bind(format!("{}_{PORT}", path.display())).expect("a socket");
        service.set_nonblocking(true).expect("a socket");
        let device = VsockDevice::open(VsockSpec {
            id: "fuzz".to_owned(),
            cid: CID,
            socket: path,
        });
        Host {
            device: device.expect("a device"),
            service,
        }
    })
}

/// A header of 44 bytes and so much data: mostly of a connection that may be there, and such that it lives on.
fn header(moves: &mut Moves<'_>, data: usize) -> Vec<u8> {
    let odd = moves.u8();
    let honest = odd < 0xd0;
    let src_cid = if odd == 0xff {
        u64::from(moves.u8())
    } else {
        CID
    };
    let dst_cid = if odd == 0xfe {
        u64::from(moves.u8())
    } else {
        2
    };
    // Those of clients are counted up from 1 << 30.
    let host_port = match moves.u8() % 3 {
        0 => PORT,
        1 => (1 << 30) + u32::from(moves.u8()),
        _ => u32::from(moves.u8()),
    };
    let op = if honest {
        [5, 5, 5, 5, 6, 7, 4, 1, 2, 3][usize::from(moves.u8()) % 10]
    } else {
        u16::from(moves.u8())
    };
    let len = match (op, honest) {
        (5, true) => u32::try_from(data).expect("16 bits"),
        (_, true) => 0,
        _ => u32::from(moves.u16()) << (moves.u8() % 17),
    };
    let buffer = if honest {
        1 << 16
    } else {
        u32::from(moves.u16()) << 4
    };
    let flags = u32::from(moves.u8() % 4);
    let mut bytes = Vec::with_capacity(44 + data);
    bytes.extend(src_cid.to_le_bytes());
    bytes.extend(dst_cid.to_le_bytes());
    bytes.extend(u32::from(moves.u8() % 4).to_le_bytes());
    bytes.extend(host_port.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(u16::from(odd != 0xfd).to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(buffer.to_le_bytes());
    // More than was ever sent is no credit.
    let forwarded = if honest { 0 } else { u32::from(moves.u16()) };
    bytes.extend(forwarded.to_le_bytes());
    bytes
}

fn packet(moves: &mut Moves<'_>) -> Vec<Piece> {
    let (data, cut) = (usize::from(moves.u16()), usize::from(moves.u8()));
    let mut bytes = header(moves, data);
    match moves.u8() % 16 {
        0 => {
            bytes.truncate(cut);
            vec![Piece::Readable(bytes)]
        }
        1 => vec![
            Piece::Readable(bytes),
            Piece::Raw(MEMORY - cut as u64, 256, 0, 0),
        ],
        2 => vec![Piece::Readable(bytes), Piece::Writable(256)],
        3..=6 => {
            let rest = bytes.split_off(cut.min(bytes.len()));
            vec![
                Piece::Readable(bytes),
                Piece::Readable(rest),
                Piece::Readable(vec![1; data]),
            ]
        }
        _ => {
            bytes.extend(vec![2; data]);
            vec![Piece::Readable(bytes)]
        }
    }
}

/// What a socket's other side does: sends, reads, ends a direction, goes.
fn use_one(sockets: &mut Vec<UnixStream>, moves: &mut Moves<'_>) {
    if sockets.is_empty() {
        return;
    }
    let at = usize::from(moves.u8()) % sockets.len();
    let mut stream = &sockets[at];
    // What can't be done now is not done.
    match moves.u8() % 6 {
        0 | 1 => {
            let len = usize::from(moves.u16());
            let _ = stream.write(&vec![3; len]);
        }
        2 | 3 => {
            let mut bytes = vec![0; 1 + usize::from(moves.u16())];
            let _ = stream.read(&mut bytes);
        }
        4 => {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        _ => drop(sockets.swap_remove(at)),
    }
}

fuzz_target!(|data: &[u8]| {
    let Host { device, service } = host();
    let mut moves = Moves::new(data);
    let mut driver = Driver::new(device);
    let features = device.features() | if moves.u8() % 2 == 0 { EVENT_IDX } else { 0 };
    driver.start_here(device, features).expect("all queues");
    let (mut clients, mut served) = (Vec::new(), Vec::new());
    let mut chains = 0;
    while let (Some(action), true) = (moves.bytes(1).first(), chains < MOST_CHAINS) {
        match action % 8 {
            0 | 1 => {
                let pieces = packet(&mut moves);
                driver.offer(1, &pieces);
                driver.ring(1);
                chains += 1;
            }
            2 => {
                let room = u32::from(moves.u16() % 5000);
                driver.offer(0, &[Piece::Writable(room)]);
                driver.ring(0);
                chains += 1;
            }
            3 if clients.len() < MOST_SOCKETS => {
                if let Ok(stream) = UnixStream::connect(device.socket()) {
                    stream.set_nonblocking(true).expect("a socket");
                    let line = format!("CONNECT {}\n", moves.u8() % 4);
                    // Now and then its beginning is missing.
                    let cut = usize::from(moves.u8()).min(line.len());
                    let _ = (&stream).write(&line.as_bytes()[line.len() - cut..]);
                    clients.push(stream);
                }
            }
            4 => {
                if let Ok((stream, _)) = service.accept()
                    && served.len() < MOST_SOCKETS
                {
                    stream.set_nonblocking(true).expect("a socket");
                    served.push(stream);
                }
            }
            5 => use_one(&mut clients, &mut moves),
            _ => use_one(&mut served, &mut moves),
        }
        driver.turn(ROUNDS);
    }
    driver.stop();
    // Nothing is left for the next run.
    while service.accept().is_ok() {}
});
