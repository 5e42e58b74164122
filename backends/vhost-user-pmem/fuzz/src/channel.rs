//! The other direction of the connection: a frontend that takes what it is lent, or does not, and answers as it likes.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use daxhund_fuzz_support::frontend::codes::SET_BACKEND_REQ_FD;
use daxhund_fuzz_support::frontend::{Frontend, NEED_REPLY};
use daxhund_fuzz_support::input::Input;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const HEADER: usize = 12;
/// Version 1, and an answer.
const REPLY: u32 = 5;
/// How long a daemon is waited for that asks on a thread of its own.
const A_LITTLE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// The frontend's end.
#[derive(Debug)]
pub struct Channel(UnixStream);

impl Channel {
    /// Opens one. Some are none: the daemon gets another descriptor.
    pub fn open(frontend: &Frontend, how: u8) -> Option<Self> {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("a socket");
        let null = File::open("/dev/null").expect("nothing");
        let (fd, is_one) = match how {
            0..=11 => (theirs.as_raw_fd(), true),
            // The daemon talks to itself.
            12 => (frontend.stream().as_raw_fd(), false),
            13 => (ours.as_raw_fd(), true),
            _ => (null.as_raw_fd(), false),
        };
        frontend.send(SET_BACKEND_REQ_FD, NEED_REPLY, &[], &[fd]);
        is_one.then_some(Self(ours))
    }

    /// Takes what the daemon asks, if it does, and answers. What it was lent is the frontend's from then on.
    pub fn answer(&mut self, frontend: &mut Frontend, how: u8, input: &mut Input<'_>) {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        // Not waited for longer: it need not ask.
        let _ = poll(&mut fds, Some(&A_LITTLE));
        let mut header = [0; HEADER];
        let asked = self.0.recv_with_fd(&mut header);
        if let Ok((_, Some(file))) = asked {
            frontend.keep(file);
        }
        let _ = self.0.read(&mut [0; 4096]);
        let code = &header[..4];
        let right = [code, &REPLY.to_le_bytes(), &8u32.to_le_bytes(), &[0; 8]].concat();
        let mut answer = right.clone();
        match how {
            0..=7 => {}
            // No.
            8 => answer[HEADER..].copy_from_slice(&u64::from(input.u8()).to_le_bytes()),
            9 => {
                let at = usize::from(input.u8()) % answer.len();
                answer[at] = input.u8();
            }
            10 => answer.truncate(usize::from(input.u8()) % right.len()),
            11 => {
                let len = usize::from(input.u8());
                answer = input.bytes(len).to_vec();
            }
            12 => {
                let fd = frontend.stream().as_raw_fd();
                let _ = self.0.send_with_fds(&[&right[..]], &[fd]);
                return;
            }
            13 => answer = [&right[..], &right].concat(),
            14 => return,
            _ => {
                let _ = self.0.shutdown(Shutdown::Both);
                return;
            }
        }
        let _ = self.0.write_all(&answer);
    }
}
