//! A hostile frontend with a hostile guest: the daemon lives, the disk keeps its length, and nothing of a session is left behind.

#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Once;
use std::time::Duration;

use daxhund_vhost_user_blk_fuzz::{DISK_BYTES, QUEUES, Session, descriptors, disk, memory};
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{RecvFlags, recv};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Of the guest. The frontend has it at [`USER`].
const MEMORY: u64 = 1 << 20;
const USER: u64 = 0x7000_0000_0000;
/// Of the rings of a queue; the next queue's are behind them.
const RINGS: u64 = 0x8000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x6000;
/// Where requests lie.
const DATA: u64 = 0x2_0000;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
/// Version 1.
const PLAIN: u32 = 1;
const NEED_REPLY: u32 = 9;

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }
}

struct Frontend {
    stream: UnixStream,
    memory: File,
    kicks: Vec<OwnedFd>,
    call: OwnedFd,
    others: [File; 2],
    /// What each queue has made available.
    available: [u16; QUEUES as usize],
}

impl Frontend {
    fn new(stream: UnixStream) -> Self {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = || eventfd(0, flags).expect("an event");
        Self {
            stream,
            memory: memory(MEMORY),
            kicks: (0..QUEUES).map(|_| event()).collect(),
            call: event(),
            others: [memory(4096), File::open("/dev/null").expect("nothing")],
            available: [0; QUEUES as usize],
        }
    }

    /// Not an error: a daemon that has hung up, or does not read fast enough to take it.
    fn send_raw(&self, bytes: &[u8], fds: &[RawFd]) {
        self.hear();
        let _ = self.stream.send_with_fds(&[bytes], fds);
    }

    /// Takes the answers that are there, so that nobody waits for room.
    fn hear(&self) {
        let mut buffer = [0; 4096];
        while recv(&self.stream, &mut buffer, RecvFlags::DONTWAIT).is_ok_and(|(_, len)| len > 0) {}
    }

    fn send(&self, code: u32, flags: u32, body: &[u64], fds: &[RawFd]) {
        let body: Vec<u8> = body.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send_bytes(code, flags, &body, fds);
    }

    fn send_bytes(&self, code: u32, flags: u32, body: &[u8], fds: &[RawFd]) {
        let len = u32::try_from(body.len()).expect("short");
        let header = [code, flags, len].map(u32::to_le_bytes).concat();
        self.send_raw(&[&header, body].concat(), fds);
    }

    /// As a frontend does that keeps to the protocol.
    fn shake_hands(&self, features: u64) {
        self.send(SET_OWNER, PLAIN, &[], &[]);
        self.send(GET_FEATURES, PLAIN, &[], &[]);
        self.send(GET_PROTOCOL_FEATURES, PLAIN, &[], &[]);
        // MQ, REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS.
        self.send(
            SET_PROTOCOL_FEATURES,
            PLAIN,
            &[1 | 1 << 3 | 1 << 9 | 1 << 15],
            &[],
        );
        self.send(SET_FEATURES, PLAIN, &[features | 1 << 32 | 1 << 30], &[]);
    }

    fn share(&self, by_table: bool) {
        let fd = [self.memory.as_raw_fd()];
        let region = [0, MEMORY, USER, 0];
        if by_table {
            self.send(SET_MEM_TABLE, PLAIN, &[&[1], &region[..]].concat(), &fd);
        } else {
            self.send(ADD_MEM_REG, NEED_REPLY, &[&[0], &region[..]].concat(), &fd);
        }
    }

    fn start(&self, queue: u16, size: u16) {
        let both = |second: u16| u64::from(queue) | u64::from(second) << 32;
        let rings = USER + RINGS * u64::from(queue);
        self.send(SET_VRING_NUM, PLAIN, &[both(size)], &[]);
        self.send(SET_VRING_BASE, PLAIN, &[both(0)], &[]);
        let addresses = [both(0), rings, rings + USED, rings + AVAILABLE, 0];
        self.send(SET_VRING_ADDR, PLAIN, &addresses, &[]);
        let kick = self.kicks[usize::from(queue)].as_raw_fd();
        self.send(
            SET_VRING_CALL,
            PLAIN,
            &[queue.into()],
            &[self.call.as_raw_fd()],
        );
        self.send(SET_VRING_KICK, PLAIN, &[queue.into()], &[kick]);
        self.send(SET_VRING_ENABLE, PLAIN, &[both(1)], &[]);
    }

    /// One that keeps to no protocol.
    fn babble(&self, input: &mut Input<'_>) {
        let code = u32::from(input.u8() % 48);
        let flags = match input.u8() % 8 {
            0 => u32::from(input.u16()),
            1..=3 => NEED_REPLY,
            _ => PLAIN,
        };
        let which = input.u8();
        let mut fds = vec![
            self.memory.as_raw_fd(),
            self.others[0].as_raw_fd(),
            self.others[1].as_raw_fd(),
            self.kicks[0].as_raw_fd(),
            self.stream.as_raw_fd(),
        ];
        fds.rotate_left(usize::from(which >> 4) % 5);
        fds.truncate(usize::from(which % 8).min(5));
        let len = usize::from(input.u8());
        self.send_bytes(code, flags, input.bytes(len), &fds);
    }

    fn store(&self, at: u64, bytes: &[u8]) {
        // The daemon's session may have cut it off: then there is nothing to store to.
        let _ = self.memory.write_all_at(bytes, at);
    }

    /// The guest's next request.
    fn offer(&mut self, queue: u16, input: &mut Input<'_>) {
        const SIZE: u16 = 16;
        let rings = RINGS * u64::from(queue);
        let next = &mut self.available[usize::from(queue)];
        let head = *next % SIZE;
        let kinds = [0u32, 1, 4, 8, 11, 13];
        let kind = kinds[usize::from(input.u8()) % kinds.len()];
        let sector = u64::from(input.u8()) * 9;
        let header = DATA + u64::from(head) * 64;
        let mut request = kind.to_le_bytes().to_vec();
        request.extend([0; 4]);
        request.extend(sector.to_le_bytes());
        // A range to discard or to zero.
        request.extend(sector.to_le_bytes());
        request.extend(u32::from(input.u8()).to_le_bytes());
        request.extend(u32::from(input.u8() % 4).to_le_bytes());
        let with = if kind > 10 { 32 } else { 16 };
        let data = u32::from(input.u8()) * 512;
        let (one, two) = ((head + 1) % SIZE, (head + 2) % SIZE);
        let writes = if kind == 1 { 0 } else { 2 };
        let parts: [(u16, u64, u32, u16, u16); 3] = [
            (head, header, with, 1, one),
            (one, DATA * 2, data, 1 | writes, two),
            (two, header + 63, 1, 2, 0),
        ];
        let memory = &self.memory;
        let store = |at: u64, bytes: &[u8]| drop(memory.write_all_at(bytes, at));
        store(header, &request);
        for (at, address, len, flags, next) in parts {
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend(next.to_le_bytes());
            store(rings + 16 * u64::from(at), &descriptor);
        }
        store(
            rings + AVAILABLE + 4 + 2 * u64::from(head),
            &head.to_le_bytes(),
        );
        *next = next.wrapping_add(1);
        store(rings + AVAILABLE + 2, &next.to_le_bytes());
    }

    /// Rings, and waits a little for an answer, which need not come.
    fn kick(&self, queue: u16) {
        let kick = &self.kicks[usize::from(queue)];
        let _ = rustix::io::write(kick, &1u64.to_ne_bytes());
        let mut fds = [PollFd::new(&self.call, PollFlags::IN)];
        let a_little = Timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        };
        if poll(&mut fds, Some(&a_little)) == Ok(1) {
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
        }
    }
}

fn play(frontend: &mut Frontend, input: &mut Input<'_>) {
    while !input.0.is_empty() {
        let chosen = input.u8();
        let queue = u16::from(chosen >> 4) % QUEUES;
        match chosen % 10 {
            0 => frontend.shake_hands(u64::from(input.u16()) | u64::from(input.u8() % 4) << 28),
            1 => frontend.share(chosen >= 0x80),
            2 => frontend.start(queue, 1 << (input.u8() % 12)),
            3 => frontend.start(queue, 16),
            4 => frontend.babble(input),
            5 => {
                let (at, len) = (u64::from(input.u16()) << 4, usize::from(input.u8()));
                frontend.store(at % MEMORY, input.bytes(len));
            }
            6 => frontend.kick(queue),
            7 => {
                frontend.offer(queue, input);
                frontend.kick(queue);
            }
            8 => match chosen >> 4 {
                0..=7 => frontend.send(GET_VRING_BASE, PLAIN, &[queue.into()], &[]),
                8 => frontend.send(REM_MEM_REG, NEED_REPLY, &[0, 0, MEMORY, USER, 0], &[]),
                9 => drop(frontend.memory.set_len(u64::from(input.u8()) << 12)),
                _ => frontend.send(SET_VRING_ENABLE, PLAIN, &[queue.into()], &[]),
            },
            _ => {
                let len = usize::from(input.u8());
                frontend.send_raw(input.bytes(len), &[]);
            }
        }
    }
}

/// One session from its beginning to its end.
fn run(data: &[u8]) {
    let (session, stream) = Session::start();
    // One that does not read is not waited for.
    stream
        .set_write_timeout(Some(Duration::from_millis(50)))
        .expect("a timeout");
    let mut frontend = Frontend::new(stream);
    play(&mut frontend, &mut Input(data));
    let _ = frontend.stream.shutdown(Shutdown::Write);
    // To the end, which comes with the session's.
    let _ = std::io::copy(&mut &frontend.stream, &mut std::io::sink());
    // However it ended.
    let _ = session.finish();
}

/// A handshake and memory: what is there once for the whole process is there after it.
const FIRST: &[u8] = &[0, 0, 0, 0, 1];

fuzz_target!(|data: &[u8]| {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| run(FIRST));
    let before = descriptors().expect("a list");
    run(data);
    assert_eq!(
        descriptors().expect("a list"),
        before,
        "something of the session is left"
    );
    assert_eq!(disk().1.metadata().expect("a memfd").len(), DISK_BYTES);
});
