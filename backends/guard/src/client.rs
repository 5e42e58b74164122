//! The side of a process that holds devices: a VMM.
//!
//! ```no_run
//! # use std::{fs::File, os::fd::AsFd, path::Path, time::Duration};
//! # use daxhund_guard::{DEFAULT_SOCKET, Guard, Notice, Verdict};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let node = File::options().read(true).write(true).open("/dev/dax1.0")?;
//! let mut guard = Guard::connect(Path::new(DEFAULT_SOCKET), "vm1")?;
//! guard.hold("dax1.0", node.as_fd(), Duration::from_secs(10))?;
//! // ... when guard.as_fd() is readable:
//! for notice in guard.read()? {
//!     if let Notice::Wanted { request, device, by } = notice {
//!         println!("{} (process {}) wants {device}", by.name, by.pid);
//!         // ... give everything of the device up, then:
//!         guard.answer(request, Verdict::Released)?;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//! # Invariants
//! - [`Guard::hold`] returns success only when removals are held.
//! - Every call is bounded in time by [`ANSWER_DEADLINE`].
//! - Losing the guard is no permission to do anything, and releases nothing; what was held is no longer guarded.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use thiserror::Error;

use crate::helper::Helper;
use crate::opener::Opener;
use crate::protocol::{
    LineError, Lines, Listing, MESSAGE_LIMIT_BYTES, Message, Request, Said, VERSION,
    WHY_LIMIT_CHARS, line, tidy,
};

/// How long the guard may take to answer what it answers at once.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// A question by the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// What the guard has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Somebody wants to take a held device away and waits.
    Wanted {
        /// To be answered with [`Guard::answer`], within the time given to [`Guard::hold`].
        request: RequestId,
        /// Which device.
        device: String,
        /// Who wants it.
        by: Opener,
    },
    /// Nobody waits for that answer any more: the opener is gone, or was turned away. The device stays held.
    Withdrawn {
        /// Which question.
        request: RequestId,
    },
}

/// The answer to [`Notice::Wanted`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything of the device is given up: mappings, pins, descriptors. It is not held any more.
    Released,
    /// It is kept, and stays held. The opener gets EPERM.
    Refused {
        /// For the guard's log.
        why: String,
    },
}

/// Why there is no guard.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Nobody listens there.
    #[error(
        "no removal guard listens on {}: start it with `systemctl enable --now daxhund-guardd.socket`",
        path.display()
    )]
    Nobody {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket is not for everybody.
    #[error("the socket {} of the removal guard may not be used", path.display())]
    Forbidden {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection failed.
    #[error("cannot connect to the removal guard")]
    Socket(#[source] io::Error),
    /// It said something else, or nothing.
    #[error("the removal guard did not say hello")]
    Hello(#[source] LostError),
    /// It is another version of it.
    #[error(
        "the removal guard speaks version {version} of the protocol, this is version {VERSION}: run the daxhund-guardd \
         of the same release"
    )]
    Version {
        /// Its version.
        version: u32,
    },
}

/// Why removals of a device are not held.
#[derive(Debug, Error)]
pub enum HoldError {
    /// The guard says no.
    #[error("the removal guard does not hold {device}: {why}")]
    Refused {
        /// The device.
        device: String,
        /// Its words.
        why: String,
    },
    /// The guard is lost.
    #[error("removals of {device} are not held")]
    Lost {
        /// The device.
        device: String,
        /// Why.
        #[source]
        source: LostError,
    },
}

/// The guard is lost: nothing is held by it any more.
#[derive(Debug, Error)]
pub enum LostError {
    /// It has ended.
    #[error(
        "the removal guard has closed the connection: is it running? (`systemctl status daxhund-guardd`)"
    )]
    Closed,
    /// It does not answer or does not read.
    #[error("the removal guard did not answer within {} s", ANSWER_DEADLINE.as_secs())]
    Silent,
    /// It has something against this client.
    #[error("the removal guard ended the connection: {why}")]
    Fault {
        /// Its words.
        why: String,
    },
    /// It says what it should not.
    #[error("the removal guard says something unexpected: {what}")]
    Unexpected {
        /// What.
        what: String,
    },
    /// The socket.
    #[error("the socket to the removal guard failed")]
    Socket(#[source] io::Error),
}

/// A connection to the guard. Its descriptor is readable when [`Guard::read`] has something to give.
///
/// Dropping it releases nothing: removals of what is held wait, and are refused in the end, until this process ends or
/// holds the devices anew.
#[derive(Debug)]
pub struct Guard {
    stream: UnixStream,
    lines: Lines,
    notices: VecDeque<Notice>,
    /// Questions without an answer, by number, and their devices.
    asked: BTreeMap<u64, String>,
    /// Readable while there are notices that came in between other answers.
    pending: OwnedFd,
    /// Of the stream and `pending`.
    either: OwnedFd,
    /// The process that serves this connection alone.
    _helper: Option<Helper>,
}

impl Guard {
    /// Connects to the daemon. `me` is the name that it shows: the VM's.
    pub fn connect(path: &Path, me: &str) -> Result<Self, ConnectError> {
        let stream = open(path).map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ConnectError::Nobody { path, source }
                }
                io::ErrorKind::PermissionDenied => ConnectError::Forbidden { path, source },
                _ => ConnectError::Socket(source),
            }
        })?;
        Self::greet(stream, None, me)
    }

    /// Uses a helper of this process's own.
    pub fn of_helper(mut helper: Helper, me: &str) -> Result<Self, ConnectError> {
        let stream = helper.take_stream();
        let stream =
            stream.ok_or_else(|| ConnectError::Socket(io::ErrorKind::NotConnected.into()))?;
        Self::greet(stream, Some(helper), me)
    }

    /// Says hello and waits for the answer.
    fn greet(stream: UnixStream, helper: Option<Helper>, me: &str) -> Result<Self, ConnectError> {
        let make = || -> io::Result<(OwnedFd, OwnedFd)> {
            stream.set_nonblocking(true)?;
            let pending = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let either = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let data = epoll::EventData::new_u64(0);
            epoll::add(&either, &stream, data, epoll::EventFlags::IN)?;
            epoll::add(&either, &pending, data, epoll::EventFlags::IN)?;
            Ok((pending, either))
        };
        let (pending, either) = make().map_err(ConnectError::Socket)?;
        let mut guard = Self {
            stream,
            lines: Lines::new(MESSAGE_LIMIT_BYTES),
            notices: VecDeque::new(),
            asked: BTreeMap::new(),
            pending,
            either,
            _helper: helper,
        };
        let hello = Request::Hello {
            version: VERSION,
            name: me.to_owned(),
        };
        guard.send(&hello, None).map_err(ConnectError::Hello)?;
        match guard
            .next_answer(Some(ANSWER_DEADLINE))
            .map_err(ConnectError::Hello)?
        {
            Message::Hello { version: VERSION } => Ok(guard),
            Message::Hello { version } => Err(ConnectError::Version { version }),
            other => Err(ConnectError::Hello(unexpected(&other))),
        }
    }

    /// Has removals of a device held. `node` is an open descriptor of it, which proves that it may be used; whoever ends
    /// with the device in use is waited for by its lock (see `daxhund-dax`), so the range in use has to be locked
    /// through it. A removal that is not answered within `answer_within` is refused.
    pub fn hold(
        &mut self,
        device: &str,
        node: BorrowedFd<'_>,
        answer_within: Duration,
    ) -> Result<(), HoldError> {
        let request = Request::Hold {
            device: device.to_owned(),
            answer_within_ms: u64::try_from(answer_within.as_millis()).unwrap_or(u64::MAX),
        };
        let lost = |source| HoldError::Lost {
            device: device.to_owned(),
            source,
        };
        self.send(&request, Some(node)).map_err(lost)?;
        match self.next_answer(Some(ANSWER_DEADLINE)).map_err(lost)? {
            Message::Held { device: held } if held == device => Ok(()),
            Message::NotHeld { device, why } => Err(HoldError::Refused { device, why }),
            other => Err(lost(unexpected(&other))),
        }
    }

    /// Lets a device go that nobody asked for. Everything of it must be given up already.
    pub fn let_go(&mut self, device: &str) -> Result<(), LostError> {
        let device = device.to_owned();
        self.send(&Request::LetGo { device }, None)
    }

    /// What there is to be told, without waiting.
    pub fn read(&mut self) -> Result<Vec<Notice>, LostError> {
        while let Some(message) = self.next_message()? {
            self.note(message)?;
        }
        // It fails when the counter is not set.
        let _ = rustix::io::read(&self.pending, &mut [0; 8]);
        Ok(self.notices.drain(..).collect())
    }

    /// Answers [`Notice::Wanted`]. The question may be withdrawn meanwhile: what is released is let go all the same.
    pub fn answer(&mut self, request: RequestId, verdict: Verdict) -> Result<(), LostError> {
        let device = self.asked.remove(&request.0);
        let gone = device.filter(|_| verdict == Verdict::Released);
        let verdict = match verdict {
            Verdict::Released => Said::Released,
            Verdict::Refused { why } => Said::Refused {
                why: tidy(&why, WHY_LIMIT_CHARS),
            },
        };
        let request = request.0;
        self.send(&Request::Answer { request, verdict }, None)?;
        // Nothing to the guard when the answer was in time.
        gone.map_or(Ok(()), |device| self.let_go(&device))
    }

    /// What is held, by whom, and who waits.
    pub fn list(&mut self) -> Result<Listing, LostError> {
        self.send(&Request::List, None)?;
        match self.next_answer(Some(ANSWER_DEADLINE))? {
            Message::Listing(listing) => Ok(listing),
            other => Err(unexpected(&other)),
        }
    }

    /// Drains the users of a device and takes it away; returns when that is done or was refused, whenever that is.
    pub(crate) fn release(&mut self, device: &str) -> Result<Result<(), String>, LostError> {
        let request = Request::Release {
            device: device.to_owned(),
        };
        self.send(&request, None)?;
        match self.next_answer(None)? {
            Message::Released { .. } => Ok(Ok(())),
            Message::NotReleased { why, .. } => Ok(Err(why)),
            other => Err(unexpected(&other)),
        }
    }

    /// The next message that is no notice. Notices that come before it are kept for [`Guard::read`].
    fn next_answer(&mut self, within: Option<Duration>) -> Result<Message, LostError> {
        let deadline = within.map(|within| Instant::now() + within);
        loop {
            while let Some(message) = self.next_message()? {
                if !matches!(message, Message::Wanted { .. } | Message::Withdrawn { .. }) {
                    return Ok(message);
                }
                self.note(message)?;
                rustix::io::write(&self.pending, &1u64.to_ne_bytes())
                    .map_err(|errno| LostError::Socket(errno.into()))?;
            }
            self.wait(PollFlags::IN, deadline)?;
        }
    }

    fn note(&mut self, message: Message) -> Result<(), LostError> {
        self.notices.push_back(match message {
            Message::Wanted {
                request,
                device,
                by,
            } => {
                self.asked.retain(|_, asked| *asked != device);
                self.asked.insert(request, device.clone());
                Notice::Wanted {
                    request: RequestId(request),
                    device,
                    by,
                }
            }
            Message::Withdrawn { request } => Notice::Withdrawn {
                request: RequestId(request),
            },
            other => return Err(unexpected(&other)),
        });
        Ok(())
    }

    /// A message that is there, without waiting.
    fn next_message(&mut self) -> Result<Option<Message>, LostError> {
        loop {
            match self.lines.next() {
                Ok(Some(Message::Fault { why })) => return Err(LostError::Fault { why }),
                Ok(Some(message)) => return Ok(Some(message)),
                Ok(None) => {}
                Err(error) => return Err(not_understood(&error)),
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(LostError::Closed),
                Ok(length) => self.lines.push(&bytes[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(LostError::Closed);
                }
                Err(error) => return Err(LostError::Socket(error)),
            }
        }
    }

    fn send(&mut self, request: &Request, with: Option<BorrowedFd<'_>>) -> Result<(), LostError> {
        let deadline = Some(Instant::now() + ANSWER_DEADLINE);
        let line = line(request);
        let descriptors: Vec<BorrowedFd<'_>> = with.into_iter().collect();
        let mut sent = 0;
        while sent < line.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // With the first byte; the space is for one descriptor, and there is one at most.
            if sent == 0 && !descriptors.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&descriptors));
            }
            let rest = [IoSlice::new(&line[sent..])];
            match sendmsg(&self.stream, &rest, &mut control, SendFlags::NOSIGNAL) {
                Ok(length) => sent += length,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(Errno::INTR) => {}
                // What it said before it hung up says why.
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.last_words()),
                Err(errno) => return Err(LostError::Socket(errno.into())),
            }
        }
        Ok(())
    }

    fn last_words(&mut self) -> LostError {
        loop {
            match self.next_message() {
                Ok(Some(_)) => {}
                Ok(None) => return LostError::Closed,
                Err(error) => return error,
            }
        }
    }

    fn wait(&self, flags: PollFlags, deadline: Option<Instant>) -> Result<(), LostError> {
        let mut polled = [PollFd::new(&self.stream, flags)];
        let left = match deadline {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let left = Timespec::try_from(left)
                    .map_err(|error| LostError::Socket(io::Error::other(error)))?;
                Some(left)
            }
            None => None,
        };
        match poll(&mut polled, left.as_ref()) {
            Ok(0) => Err(LostError::Silent),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(LostError::Socket(errno.into())),
        }
    }
}

impl AsFd for Guard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.either.as_fd()
    }
}

/// Connects without waiting: a listener whose queue is full is one that does not answer.
fn open(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn unexpected(message: &Message) -> LostError {
    LostError::Unexpected {
        what: tidy(&format!("{message:?}"), WHY_LIMIT_CHARS),
    }
}

fn not_understood(error: &LineError) -> LostError {
    LostError::Unexpected {
        what: error.to_string(),
    }
}
