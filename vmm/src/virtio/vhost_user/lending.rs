//! The other direction of a connection: a backend asks for its memory to be mapped into the guest.
//!
//! ```text
//!   SET_BACKEND_REQ_FD ──▶ channel ──SHMEM_MAP, with a file──▶ Loan: is it all of the region?
//!        (ours, the other end)            ▲                      │ the owner opens, checks and maps it; a later backend's
//!                                         └── answer ◀───────────┘ is compared with the first one's and not mapped
//! ```
//! Only then is the answer sent. Nothing else that a backend asks for is done: above all memory is not unmapped under a guest
//! because a backend wants it back. [`Asked::Unmap`] is answered with "no", for "not yet", and told of: the memory leaves as all
//! memory does, by a removal of its device.
//!
//! `vhost` has such a channel, too; its receiver waits for whole messages without a limit, and can't be told to stop.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use daxhund_dax::is_for_writing;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use thiserror::Error;

const SHMEM_MAP: u32 = 9;
const SHMEM_UNMAP: u32 = 10;
const HEADER: usize = 12;
const BODY: usize = 40;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const WRITABLE: u64 = 1;
/// More of them than a message has.
const MOST_FILES: usize = 4;

/// What a backend lends: a part of a file, which is to be checked.
#[derive(Debug)]
pub struct Loan {
    /// The file; its lock is the open file description's.
    pub file: File,
    /// Where in it the memory begins.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Whether the guest may store there.
    pub writable: bool,
}

/// What is kept of a loan: no descriptor, which would outlive the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    device: u64,
    inode: u64,
    offset: u64,
    writable: bool,
    pub(super) size: u64,
}

impl Loan {
    pub(super) fn known(&self) -> io::Result<Known> {
        let metadata = self.file.metadata()?;
        Ok(Known {
            device: metadata.dev(),
            inode: metadata.ino(),
            offset: self.offset,
            writable: self.writable,
            size: self.size,
        })
    }
}

/// A loan that can't be the device's memory.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LoanError {
    /// The backend has no such region, or says too much.
    #[error("its shared memory region 0 has {size} bytes, which is no memory")]
    Region {
        /// What it says.
        size: u64,
    },
    /// Another region.
    #[error("it wants shared memory region {shmid} mapped, and the device's memory is region 0")]
    OtherRegion {
        /// Which.
        shmid: u8,
    },
    /// Less or more than all of it.
    #[error(
        "it wants {len:#x} bytes at {at:#x} mapped, and the device's memory are {size:#x} bytes at 0"
    )]
    NotWhole {
        /// Where in the region.
        at: u64,
        /// How much.
        len: u64,
        /// How much there is.
        size: u64,
    },
    /// It says one thing and sends another.
    #[error(
        "it lends memory {}, by a descriptor that is for {}",
        if *writable { "for writing" } else { "for reading only" }, if *writable { "reading only" } else { "writing, too" }
    )]
    Mode {
        /// What it says.
        writable: bool,
    },
}

/// A channel that makes no sense.
#[derive(Debug, Error)]
pub(super) enum ChannelError {
    #[error("the backend's channel ends or fails")]
    Io(#[from] io::Error),
    #[error(
        "a message of the backend that is none: request {request}, flags {flags:#x}, {size} bytes, {files} file(s)"
    )]
    Nonsense {
        request: u32,
        flags: u32,
        size: u32,
        files: usize,
    },
    #[error("the connection has ended")]
    Cut,
}

impl ChannelError {
    /// The backend has closed it: it has nothing more to say, and may serve on.
    pub(super) fn is_end(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof)
    }
}

/// What a backend asks for.
#[derive(Debug)]
pub(super) enum Asked {
    Map {
        shmid: u8,
        at: u64,
        loan: Loan,
    },
    /// Memory back.
    Unmap,
    /// Something that this device has nothing of.
    Other,
}

/// A request, which is to be answered if the backend wants it.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) asked: Asked,
    pub(super) reply: Option<Reply>,
}

/// Where an answer goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reply(u32);

/// Our end.
#[derive(Debug)]
pub(super) struct Channel {
    stream: Arc<UnixStream>,
    /// Of a message that has not come whole.
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Channel {
    /// Ours and the backend's.
    pub(super) fn pair() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let channel = Self {
            stream: Arc::new(ours),
            bytes: Vec::new(),
            files: Vec::new(),
        };
        Ok((channel, theirs))
    }

    /// Readable when there is something to receive.
    pub(super) fn stream(&self) -> Arc<UnixStream> {
        Arc::clone(&self.stream)
    }

    /// The next request, waited for until the line is cut.
    pub(super) fn wait(&mut self, line: &UnixStream) -> Result<Message, ChannelError> {
        loop {
            if let Some(message) = self.receive()? {
                return Ok(message);
            }
            let mut fds = [
                PollFd::new(&*self.stream, PollFlags::IN),
                PollFd::new(line, PollFlags::RDHUP),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(ChannelError::Io(error.into())),
            }
            let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
            if fds[1].revents().intersects(gone) {
                return Err(ChannelError::Cut);
            }
        }
    }

    /// The next request, if there is one whole.
    pub(super) fn receive(&mut self) -> Result<Option<Message>, ChannelError> {
        loop {
            let wanted = match self.size()? {
                Some(size) if self.bytes.len() == HEADER + size => return self.take().map(Some),
                Some(size) => HEADER + size,
                None => HEADER,
            };
            if !self.read(wanted - self.bytes.len())? {
                return Ok(None);
            }
        }
    }

    fn word(&self, at: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(word)
    }

    fn nonsense(&self) -> ChannelError {
        ChannelError::Nonsense {
            request: self.word(0),
            flags: self.word(4),
            size: self.word(8),
            files: self.files.len(),
        }
    }

    /// How long the body is, when the header is there.
    fn size(&self) -> Result<Option<usize>, ChannelError> {
        if self.bytes.len() < HEADER {
            return Ok(None);
        }
        let (flags, size) = (self.word(4), self.word(8) as usize);
        if flags & !NEED_REPLY != VERSION || size > BODY {
            return Err(self.nonsense());
        }
        Ok(Some(size))
    }

    /// Whether there was something.
    fn read(&mut self, most: usize) -> Result<bool, ChannelError> {
        let mut bytes = [0; HEADER + BODY];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut part = [IoSliceMut::new(&mut bytes[..most])];
        let received = match recvmsg(&*self.stream, &mut part, &mut control, flags) {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::AGAIN) => return Ok(false),
            Err(rustix::io::Errno::INTR) => return Ok(true),
            Err(error) => return Err(ChannelError::Io(error.into())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        if received == 0 {
            return Err(ChannelError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        self.bytes.extend_from_slice(&bytes[..received]);
        if self.files.len() > 1 {
            self.bytes.resize(HEADER.max(self.bytes.len()), 0);
            return Err(self.nonsense());
        }
        Ok(true)
    }

    /// A message that is whole.
    fn take(&mut self) -> Result<Message, ChannelError> {
        let (request, flags, size) = (self.word(0), self.word(4), self.word(8) as usize);
        let number = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&self.bytes[HEADER + at..HEADER + at + 8]);
            u64::from_le_bytes(number)
        };
        let file = self.files.pop();
        let asked = match (request, size, file) {
            (SHMEM_MAP, BODY, Some(file)) => Asked::Map {
                shmid: self.bytes[HEADER],
                at: number(16),
                loan: Loan {
                    file: File::from(file),
                    offset: number(8),
                    size: number(24),
                    writable: number(32) == WRITABLE,
                },
            },
            (SHMEM_UNMAP, BODY, None) => Asked::Unmap,
            (SHMEM_MAP | SHMEM_UNMAP, ..) | (_, _, Some(_)) => return Err(self.nonsense()),
            (..) => Asked::Other,
        };
        self.bytes.clear();
        Ok(Message {
            asked,
            reply: (flags & NEED_REPLY != 0).then_some(Reply(request)),
        })
    }

    /// Says yes or no. A backend that does not read its answers is none.
    pub(super) fn answer(&self, reply: Option<Reply>, is_done: bool) -> io::Result<()> {
        let Some(Reply(request)) = reply else {
            return Ok(());
        };
        let header = [request, VERSION | REPLY, 8].map(u32::to_le_bytes).concat();
        let message = [header, u64::from(!is_done).to_le_bytes().to_vec()].concat();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = send(&*self.stream, &message, flags)?;
        if sent != message.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}

/// What the backend has been heard to say of its memory, and the channel for it.
#[derive(Debug)]
pub(super) struct Lending {
    pub(super) channel: Channel,
    /// Of shared memory region 0, as it says.
    pub(super) size: u64,
    /// Mapping it is answered later.
    owed: Option<Reply>,
    /// It was said that it asks for what is not done.
    pub(super) is_told: bool,
    /// It was said that it wants its memory back.
    pub(super) is_wanted_back: bool,
}

impl Lending {
    pub(super) fn new(channel: Channel, regions: u32, size: u64) -> Result<Self, LoanError> {
        if regions == 0 || size == 0 {
            return Err(LoanError::Region { size });
        }
        Ok(Self {
            channel,
            size,
            owed: None,
            is_told: false,
            is_wanted_back: false,
        })
    }

    /// Waits for what is lent; `Err` within: it was refused.
    pub(super) fn loan(
        &mut self,
        line: &UnixStream,
    ) -> Result<Result<Loan, LoanError>, ChannelError> {
        loop {
            let Message { asked, reply } = self.channel.wait(line)?;
            let Asked::Map { shmid, at, loan } = asked else {
                self.channel.answer(reply, false)?;
                continue;
            };
            let (len, size) = (loan.size, self.size);
            let refused = if shmid != 0 {
                LoanError::OtherRegion { shmid }
            } else if (at, len) != (0, size) {
                LoanError::NotWhole { at, len, size }
            } else if loan.writable != is_for_writing(&loan.file) {
                LoanError::Mode {
                    writable: loan.writable,
                }
            } else {
                self.owed = reply;
                return Ok(Ok(loan));
            };
            self.channel.answer(reply, false)?;
            return Ok(Err(refused));
        }
    }

    /// Whether what was lent is mapped.
    pub(super) fn settle(&mut self, is_mapped: bool) -> io::Result<()> {
        let owed = self.owed.take();
        self.channel.answer(owed, is_mapped)
    }
}
