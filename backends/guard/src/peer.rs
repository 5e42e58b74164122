//! One connection to the guard: its lines, the proofs that came with them, and what waits to be sent.
//!
//! Everything it can make the guard keep is bounded; whoever exceeds a bound loses the connection, which is no release.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use thiserror::Error;

use crate::proof::Proof;
use crate::protocol::{LineError, Lines, Message, REQUEST_LIMIT_BYTES, Request, line};

/// Descriptors in one message; the kernel closes what does not fit.
const DESCRIPTORS: usize = 4;
/// Proofs that no line has asked for yet.
const PROOFS_LIMIT: usize = 4;
/// Bytes that the other end has not taken.
const UNSENT_LIMIT_BYTES: usize = 2 << 20;

/// Why a connection is over.
#[derive(Debug, Error)]
pub(crate) enum PeerError {
    #[error("it hung up")]
    Closed,
    #[error(transparent)]
    Line(#[from] LineError),
    #[error("it sends descriptors that nothing asks for")]
    Proofs,
    #[error("it does not read what it is sent")]
    Unsent,
    #[error("its socket failed")]
    Socket(#[source] io::Error),
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Peer {
    stream: UnixStream,
    lines: Lines,
    proofs: VecDeque<Proof>,
    unsent: Vec<u8>,
    /// The name it gave itself, once it has said hello.
    pub(crate) name: Option<String>,
}

impl Peer {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            lines: Lines::new(REQUEST_LIMIT_BYTES),
            proofs: VecDeque::new(),
            unsent: Vec::new(),
            name: None,
        })
    }

    /// Takes some of what is there. The rest is there the next time: one peer never keeps the others waiting.
    pub(crate) fn receive(&mut self) -> Result<(), PeerError> {
        let mut bytes = [0; REQUEST_LIMIT_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(
            &self.stream,
            &mut into,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let length = match received {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(Errno::CONNRESET) => return Err(PeerError::Closed),
            Err(errno) => return Err(PeerError::Socket(errno.into())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.proofs.extend(descriptors.map(Proof::of));
            }
        }
        if self.proofs.len() > PROOFS_LIMIT {
            return Err(PeerError::Proofs);
        }
        if length == 0 {
            return Err(PeerError::Closed);
        }
        self.lines.push(&bytes[..length]);
        Ok(())
    }

    pub(crate) fn next_request(&mut self) -> Result<Option<Request>, PeerError> {
        Ok(self.lines.next()?)
    }

    pub(crate) fn next_proof(&mut self) -> Option<Proof> {
        self.proofs.pop_front()
    }

    /// Sends, or keeps for later what does not go out now.
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), PeerError> {
        self.unsent.extend(line(message));
        self.flush()?;
        if self.unsent.len() > UNSENT_LIMIT_BYTES {
            return Err(PeerError::Unsent);
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), PeerError> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return Err(PeerError::Closed),
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_hung_up(&error) => return Err(PeerError::Closed),
                Err(error) => return Err(PeerError::Socket(error)),
            }
        }
        Ok(())
    }

    pub(crate) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }
}

impl AsRawFd for Peer {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

fn is_hung_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
