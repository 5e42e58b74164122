//! A connection that carries file descriptors beside its bytes (`SCM_RIGHTS`), for both ends.
//!
//! Invariants:
//! - At most [`MOST_DESCRIPTORS`] that were received are held for a connection. They are close-on-exec, and closed when
//!   nobody takes them.
//! - Descriptors to send go out with the first bytes that do.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

/// Enough for a network device of as many queue pairs as any guest here has.
pub(crate) const MOST_DESCRIPTORS: usize = 64;

const SPACE: usize = rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS));

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct FdStream {
    stream: UnixStream,
    received: Received,
    to_send: Vec<OwnedFd>,
}

/// What came beside the bytes. Its clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Received(Arc<Mutex<Descriptors>>);

#[derive(Debug, Default)]
struct Descriptors {
    held: Vec<OwnedFd>,
    too_many: bool,
}

/// More descriptors than are held for a connection, or than this process can have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

impl Received {
    /// Takes what has come until now.
    pub(crate) fn take(&self) -> Result<Vec<OwnedFd>, TooMany> {
        let Descriptors { held, too_many } = std::mem::take(&mut *self.lock());
        if too_many { Err(TooMany) } else { Ok(held) }
    }

    fn lock(&self) -> MutexGuard<'_, Descriptors> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, control: &mut RecvAncillaryBuffer<'_>, truncated: bool) {
        let mut descriptors = self.lock();
        descriptors.too_many |= truncated;
        for message in control.drain() {
            let RecvAncillaryMessage::ScmRights(rights) = message else {
                continue;
            };
            for descriptor in rights {
                if descriptors.held.len() < MOST_DESCRIPTORS {
                    descriptors.held.push(descriptor);
                } else {
                    descriptors.too_many = true;
                }
            }
        }
    }
}

impl FdStream {
    /// The end that receives, or sends nothing but bytes.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self::sending(stream, Vec::new())
    }

    /// The end that sends `to_send` with its first bytes.
    pub(crate) fn sending(stream: UnixStream, to_send: Vec<OwnedFd>) -> Self {
        Self {
            stream,
            received: Received::default(),
            to_send,
        }
    }

    /// Where received descriptors are found.
    pub(crate) fn received(&self) -> Received {
        self.received.clone()
    }
}

impl AsyncRead for FdStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(this.stream.poll_read_ready(cx))?;
            let into = buffer.initialize_unfilled();
            let read = this.stream.try_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); SPACE];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let message = recvmsg(
                    &this.stream,
                    &mut [IoSliceMut::new(into)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )?;
                let truncated = message.flags.contains(ReturnFlags::CTRUNC);
                this.received.add(&mut control, truncated);
                Ok(message.bytes)
            });
            match read {
                Ok(bytes) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if again(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for FdStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.to_send.is_empty() || bytes.is_empty() {
            return Pin::new(&mut this.stream).poll_write(cx, bytes);
        }
        loop {
            ready!(this.stream.poll_write_ready(cx))?;
            let sent = this.stream.try_io(Interest::WRITABLE, || {
                let descriptors: Vec<BorrowedFd<'_>> =
                    this.to_send.iter().map(AsFd::as_fd).collect();
                let mut space = [MaybeUninit::uninit(); SPACE];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        format!("at most {MOST_DESCRIPTORS} descriptors can be sent"),
                    ));
                }
                let bytes = [IoSlice::new(bytes)];
                Ok(sendmsg(
                    &this.stream,
                    &bytes,
                    &mut control,
                    SendFlags::NOSIGNAL,
                )?)
            });
            match sent {
                Ok(sent) => {
                    this.to_send.clear();
                    return Poll::Ready(Ok(sent));
                }
                Err(error) if again(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// Nothing happened: wait for readiness once more.
fn again(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
