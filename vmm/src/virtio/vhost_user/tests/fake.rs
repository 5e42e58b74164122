//! A backend that keeps to the protocol, or breaks it where a test wants it to.

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_OWNER: u32 = 3;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_CALL: u32 = 13;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const SET_BACKEND_REQ_FD: u32 = 21;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const SET_CONFIG: u32 = 25;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;
pub(super) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(super) const ADD_MEM_REG: u32 = 37;
pub(super) const REM_MEM_REG: u32 = 38;
pub(super) const GET_SHMEM_CONFIG: u32 = 44;

pub(super) const PROTOCOL_MQ: u64 = 1;
pub(super) const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
pub(super) const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
pub(super) const PROTOCOL_CONFIG: u64 = 1 << 9;
pub(super) const PROTOCOL_BACKEND_SEND_FD: u64 = 1 << 10;
pub(super) const PROTOCOL_INFLIGHT: u64 = 1 << 12;
pub(super) const PROTOCOL_MEM_SLOTS: u64 = 1 << 15;
pub(super) const PROTOCOL_SHMEM: u64 = 1 << 22;
pub(super) const LENDING: u64 = PROTOCOL_BACKEND_REQ | PROTOCOL_BACKEND_SEND_FD | PROTOCOL_SHMEM;
pub(super) const ALL_PROTOCOL: u64 =
    PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG | PROTOCOL_INFLIGHT | PROTOCOL_MEM_SLOTS;

const NEED_REPLY: u32 = 8;
const REPLY: u32 = 0b101;
const DEADLINE: Duration = Duration::from_secs(20);

/// What comes of a message instead of the right answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Misdeed {
    /// Nothing, and nothing of what follows.
    Silence,
    /// The end of the connection.
    End,
    /// These bytes.
    Bytes(Vec<u8>),
    /// The right kind of answer that says no.
    No,
}

/// What a backend is like.
#[derive(Debug, Clone)]
pub(super) struct Manners {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    pub(super) slots: u64,
    /// At this message.
    pub(super) misdeed: Option<(u32, Misdeed)>,
    /// Bytes of shared memory region 0.
    pub(super) shared: u64,
    /// What it says by itself once it can: bytes, and a file with them.
    pub(super) asks: Option<(Vec<u8>, Option<Arc<File>>)>,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            // VERSION_1, PROTOCOL_FEATURES, indirect descriptors; FLUSH and MQ of a disk, and CONFIG_WCE.
            features: 1 << 32 | 1 << 30 | 1 << 28 | 1 << 9 | 1 << 12 | 1 << 11,
            protocol: ALL_PROTOCOL,
            queues: 4,
            slots: 8,
            misdeed: None,
            shared: 0,
            asks: None,
        }
    }
}

/// A message that came: what it was, its body, and whether a descriptor came with it.
pub(super) type Message = (u32, Vec<u8>, bool);

/// What comes with a descriptor that a backend keeps: its kind, its body, and what the descriptor is of.
pub(super) type Kept = (u32, Vec<u8>, Arc<File>);

#[derive(Default)]
struct Seen {
    messages: Vec<Message>,
    kept: Vec<Kept>,
    stream: Option<UnixStream>,
    channel: Option<UnixStream>,
    dead: bool,
}

pub(super) struct Fake {
    place: TempDir,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    pub(super) fn new() -> Self {
        Self {
            place: tempfile::tempdir().unwrap(),
            seen: Arc::default(),
            thread: None,
        }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.place.path().join("socket")
    }

    /// Begins to serve one connection after the other; what an earlier one saw is forgotten.
    pub(super) fn serve(&mut self, manners: Manners) {
        let _ = std::fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).unwrap();
        self.seen = Arc::default();
        let seen = Arc::clone(&self.seen);
        self.thread = Some(std::thread::spawn(move || {
            loop {
                let (stream, _) = listener.accept().unwrap();
                {
                    let mut seen = seen.lock().unwrap();
                    if seen.dead {
                        return;
                    }
                    seen.messages.clear();
                    seen.kept.clear();
                    seen.stream = Some(stream.try_clone().unwrap());
                }
                converse(&stream, &manners, &seen);
                let _ = stream.shutdown(Shutdown::Both);
            }
        }));
    }

    /// Connects to whoever listens, and serves that one.
    pub(super) fn call(&mut self, manners: Manners) {
        self.seen = Arc::default();
        let (seen, socket) = (Arc::clone(&self.seen), self.socket());
        self.thread = Some(std::thread::spawn(move || {
            let mut met = None;
            until("somebody listens", || {
                met = UnixStream::connect(&socket).ok();
                met.is_some()
            });
            let stream = met.unwrap();
            seen.lock().unwrap().stream = Some(stream.try_clone().unwrap());
            converse(&stream, &manners, &seen);
            let _ = stream.shutdown(Shutdown::Both);
        }));
    }

    /// Goes away, as a process that is killed.
    pub(super) fn die(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        {
            let mut seen = self.seen.lock().unwrap();
            seen.dead = true;
            if let Some(stream) = seen.stream.take() {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        // Wakes one that waits for a client.
        let _ = UnixStream::connect(self.socket());
        thread.join().unwrap();
    }

    /// By which it says something by itself.
    pub(super) fn channel(&self) -> UnixStream {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.channel.as_ref().unwrap().try_clone().unwrap()
    }

    pub(super) fn messages(&self) -> Vec<Message> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.messages.clone()
    }

    /// Messages of a kind that came with a descriptor, since this connection began.
    pub(super) fn kept(&self, request: u32) -> Vec<Kept> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let of_kind = seen.kept.iter().filter(|(kind, ..)| *kind == request);
        of_kind.cloned().collect()
    }

    /// Bodies of the messages of a kind.
    pub(super) fn bodies(&self, request: u32) -> Vec<Vec<u8>> {
        let of_kind = |(kind, body, _): Message| (kind == request).then_some(body);
        self.messages().into_iter().filter_map(of_kind).collect()
    }

    pub(super) fn await_message(&self, request: u32) -> Vec<u8> {
        let mut found = None;
        until(&format!("message {request} comes"), || {
            found = self.bodies(request).pop();
            found.is_some()
        });
        found.unwrap()
    }
}

pub(super) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

/// Reads so many bytes; `None` at the end of the connection.
fn receive(stream: &UnixStream, len: usize) -> Option<(Vec<u8>, Option<File>)> {
    let (mut bytes, mut file) = (vec![0; len], None);
    let mut read = 0;
    while read < len {
        let (count, came) = stream.recv_with_fd(&mut bytes[read..]).ok()?;
        if count == 0 {
            return None;
        }
        file = file.or(came);
        read += count;
    }
    Some((bytes, file))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn converse(mut stream: &UnixStream, manners: &Manners, seen: &Mutex<Seen>) {
    while let Some((header, file)) = receive(stream, 12) {
        let (request, flags, size) = (word(&header, 0), word(&header, 4), word(&header, 8));
        let Some((body, _)) = receive(stream, size as usize) else {
            return;
        };
        let message = (request, body.clone(), file.is_some());
        {
            let mut seen = seen.lock().unwrap();
            if let (ADD_MEM_REG | SET_VRING_KICK | SET_VRING_CALL, Some(file)) = (request, &file) {
                let kept = Arc::new(file.try_clone().unwrap());
                seen.kept.push((request, body.clone(), kept));
            }
            seen.messages.push(message);
        }
        let right = match request {
            GET_FEATURES => Some(manners.features.to_le_bytes().to_vec()),
            GET_PROTOCOL_FEATURES => Some(manners.protocol.to_le_bytes().to_vec()),
            GET_QUEUE_NUM => Some(manners.queues.to_le_bytes().to_vec()),
            GET_MAX_MEM_SLOTS => Some(manners.slots.to_le_bytes().to_vec()),
            GET_VRING_BASE => Some([&body[..4], &7u32.to_le_bytes()].concat()),
            GET_CONFIG => {
                let mut body = body;
                for (index, byte) in body[12..].iter_mut().enumerate() {
                    *byte = u8::try_from(index).unwrap();
                }
                Some(body)
            }
            GET_SHMEM_CONFIG => {
                let mut answer = vec![0; 8 + 256 * 8];
                answer[0] = 1;
                answer[8..16].copy_from_slice(&manners.shared.to_le_bytes());
                Some(answer)
            }
            GET_INFLIGHT_FD => {
                let mut answer = 4096u64.to_le_bytes().to_vec();
                answer.extend(&body[8..]);
                Some(answer)
            }
            _ if flags & NEED_REPLY != 0 => Some(vec![0; 8]),
            _ => None,
        };
        let answer = match &manners.misdeed {
            Some((at, misdeed)) if *at == request => match misdeed {
                Misdeed::Silence => {
                    while receive(stream, 1).is_some() {}
                    return;
                }
                Misdeed::End => return,
                Misdeed::Bytes(bytes) => {
                    let _ = stream.write_all(bytes);
                    continue;
                }
                Misdeed::No => Some(vec![1, 0, 0, 0, 0, 0, 0, 0]),
            },
            _ => right,
        };
        let Some(answer) = answer else { continue };
        let size = u32::try_from(answer.len()).unwrap();
        let header = [request, REPLY, size].map(u32::to_le_bytes).concat();
        let whole = [header, answer].concat();
        let sent = if request == GET_INFLIGHT_FD {
            let file = tempfile::tempfile().unwrap();
            stream
                .send_with_fd(whole.as_slice(), file.as_raw_fd())
                .is_ok()
        } else {
            stream.write_all(&whole).is_ok()
        };
        if !sent {
            return;
        }
        if let (SET_BACKEND_REQ_FD, Some(file)) = (request, file) {
            let channel = UnixStream::from(OwnedFd::from(file));
            match &manners.asks {
                Some((bytes, Some(file))) if !bytes.is_empty() => {
                    let sent = channel.send_with_fd(bytes.as_slice(), file.as_raw_fd());
                    sent.unwrap();
                }
                Some((bytes, _)) => (&channel).write_all(bytes).unwrap(),
                None => {}
            }
            seen.lock().unwrap().channel = Some(channel);
        }
    }
}
