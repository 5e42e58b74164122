//! A frontend that keeps to the protocol or does not, as it likes, and the guest whose memory and rings it hands over.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{RecvFlags, recv};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::input::Input;

/// Bytes of the guest's memory, which begins at 0. The frontend has it at [`USER`].
pub const MEMORY: u64 = 1 << 20;
/// Where the frontend says that it has the guest's memory.
pub const USER: u64 = 0x7000_0000_0000;
/// Of the rings of a queue; the next queue's are behind them.
const RINGS: u64 = 0x8000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x6000;
/// Descriptors of a queue that the guest fills by itself.
pub const SIZE: u16 = 16;
/// Where requests lie, [`SLOT`] bytes for each head.
pub const DATA: u64 = 0x2_0000;
/// Bytes of a request's slot.
pub const SLOT: u64 = 64;

/// Messages, by the names and numbers of the specification.
pub mod codes {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const GET_SHMEM_CONFIG: u32 = 44;
}
use codes::*;

/// Flags of a message of version 1.
pub const PLAIN: u32 = 1;
/// The same of one that wants an acknowledgement.
pub const NEED_REPLY: u32 = 9;

/// What a descriptor of a ring says: where, how much, and its flags.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Guest-physical address.
    pub address: u64,
    /// In bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`], or what else there may be.
    pub flags: u16,
}

/// Another descriptor follows.
pub const NEXT: u16 = 1;
/// For the device to write to.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const INDIRECT: u16 = 4;

impl Part {
    /// As it lies in a table of `size` descriptors as the one at `at`: what follows it is the next one.
    pub fn bytes(self, at: u16, size: u16) -> Vec<u8> {
        let mut bytes = self.address.to_le_bytes().to_vec();
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend((at.wrapping_add(1) % size).to_le_bytes());
        bytes
    }
}

/// A file in memory.
pub fn memory(bytes: u64) -> File {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(bytes).expect("room for it");
    file
}

/// One connection to a daemon.
#[derive(Debug)]
pub struct Frontend {
    stream: UnixStream,
    memory: File,
    kicks: Vec<OwnedFd>,
    call: OwnedFd,
    others: [File; 2],
    /// What the daemon has given it.
    lent: Vec<File>,
    /// What each queue has made available.
    available: Vec<u16>,
}

impl Frontend {
    /// Of a guest with so many queues.
    pub fn new(stream: UnixStream, queues: u16) -> Self {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = || eventfd(0, flags).expect("an event");
        Self {
            stream,
            memory: memory(MEMORY),
            kicks: (0..queues).map(|_| event()).collect(),
            call: event(),
            others: [memory(4096), File::open("/dev/null").expect("nothing")],
            lent: Vec::new(),
            available: vec![0; queues.into()],
        }
    }

    /// The same guest at another connection.
    pub fn reconnected(&mut self, stream: UnixStream) {
        self.stream = stream;
    }

    /// Descriptors that it has from the daemon, and sends about.
    pub fn lent(&self) -> &[File] {
        &self.lent
    }

    /// It has one more.
    pub fn keep(&mut self, lent: File) {
        self.lent.push(lent);
    }

    /// It closes those.
    pub fn give_back(&mut self) {
        self.lent.clear();
    }

    /// The socket, to be misused.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Not an error: a daemon that has hung up, or does not read fast enough to take it.
    pub fn send_raw(&self, bytes: &[u8], fds: &[RawFd]) {
        self.hear();
        let _ = self.stream.send_with_fds(&[bytes], fds);
    }

    /// Takes the answers that are there, so that nobody waits for room.
    fn hear(&self) {
        let mut buffer = [0; 4096];
        while recv(&self.stream, &mut buffer, RecvFlags::DONTWAIT).is_ok_and(|(_, len)| len > 0) {}
    }

    /// A message whose body is 64-bit words.
    pub fn send(&self, code: u32, flags: u32, body: &[u64], fds: &[RawFd]) {
        let body: Vec<u8> = body.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send_bytes(code, flags, &body, fds);
    }

    /// A message.
    pub fn send_bytes(&self, code: u32, flags: u32, body: &[u8], fds: &[RawFd]) {
        let len = u32::try_from(body.len()).expect("short");
        let header = [code, flags, len].map(u32::to_le_bytes).concat();
        self.send_raw(&[&header, body].concat(), fds);
    }

    /// The beginning of a connection, as a frontend does that keeps to the protocol.
    pub fn greet(&self, protocol_features: u64) {
        self.send(SET_OWNER, PLAIN, &[], &[]);
        self.send(GET_FEATURES, PLAIN, &[], &[]);
        self.send(GET_PROTOCOL_FEATURES, PLAIN, &[], &[]);
        self.send(SET_PROTOCOL_FEATURES, PLAIN, &[protocol_features], &[]);
    }

    /// `features` and those that make rings of version 1 that can be enabled.
    pub fn accept(&self, features: u64) {
        self.send(SET_FEATURES, PLAIN, &[features | 1 << 32 | 1 << 30], &[]);
    }

    /// Says nothing more, and hears the daemon out.
    pub fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
        // To the end, which comes with the session's.
        let _ = std::io::copy(&mut &self.stream, &mut std::io::sink());
    }

    /// What frontends have in common, by the last digit of the fuzzer's choice. Seeds are written by these numbers, so they stay.
    /// Numbers that are none here are the target's.
    pub fn act(&mut self, deed: u8, how: u8, input: &mut Input<'_>) {
        let queue = u16::from(how) % u16::try_from(self.kicks.len()).expect("few");
        match deed {
            1 => self.share(how >= 8),
            2 => self.start(queue, 1 << (input.u8() % 12)),
            3 => self.start(queue, SIZE),
            4 => self.babble(input),
            5 => {
                let (at, len) = (u64::from(input.u16()) << 4, usize::from(input.u8()));
                self.store(at % MEMORY, input.bytes(len));
            }
            6 => self.kick(queue),
            8 => match how {
                0..=7 => self.send(GET_VRING_BASE, PLAIN, &[queue.into()], &[]),
                8 => self.send(REM_MEM_REG, NEED_REPLY, &[0, 0, MEMORY, USER, 0], &[]),
                9 => drop(self.memory.set_len(u64::from(input.u8()) << 12)),
                _ => self.send(SET_VRING_ENABLE, PLAIN, &[queue.into()], &[]),
            },
            9 => {
                let len = usize::from(input.u8());
                self.send_raw(input.bytes(len), &[]);
            }
            _ => {}
        }
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
        fds.extend(self.lent.iter().map(AsRawFd::as_raw_fd));
        let first = usize::from(which >> 4) % fds.len();
        fds.rotate_left(first);
        fds.truncate(usize::from(which % 8));
        let len = usize::from(input.u8());
        self.send_bytes(code, flags, input.bytes(len), &fds);
    }

    /// Into the guest's memory.
    pub fn store(&self, at: u64, bytes: &[u8]) {
        // The fuzzer may have cut it off: then the file grows, which the daemon has to survive as well.
        let _ = self.memory.write_all_at(bytes, at);
    }

    /// The head that the queue's next chain gets.
    pub fn next_head(&self, queue: u16) -> u16 {
        self.available[usize::from(queue)] % SIZE
    }

    /// The guest's next chain: one descriptor after the other, whatever their flags say.
    pub fn offer(&mut self, queue: u16, parts: &[Part]) {
        let rings = RINGS * u64::from(queue);
        let head = self.next_head(queue);
        for (part, at) in parts.iter().zip(head..) {
            let at = at % SIZE;
            self.store(rings + 16 * u64::from(at), &part.bytes(at, SIZE));
        }
        let next = self.available[usize::from(queue)].wrapping_add(1);
        self.available[usize::from(queue)] = next;
        let available = rings + AVAILABLE;
        self.store(available + 4 + 2 * u64::from(head), &head.to_le_bytes());
        self.store(available + 2, &next.to_le_bytes());
    }

    /// Rings, and waits a little for an answer, which need not come.
    pub fn kick(&self, queue: u16) {
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
