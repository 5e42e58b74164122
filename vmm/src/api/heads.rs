//! How long the head of a request may take, from its first byte on.
//!
//! A connection on which nothing is under way stays open: some clients make one when they start the VMM and use it for as
//! long as that lives. What must not stay is a head that was begun and does not end.
//!
//! ```text
//!   nothing ──bytes──▶ begun ──whole──▶ in a call ──answered──▶ nothing
//!                        └──too late──▶ the connection is closed
//! ```

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::sleep;

/// The head that a connection is at.
#[derive(Debug, Default)]
pub(super) struct Head {
    begun: Mutex<Option<Instant>>,
    /// One was begun.
    news: Notify,
}

impl Head {
    fn begun(&self) -> MutexGuard<'_, Option<Instant>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes have come while no request was being served.
    fn bytes(&self) {
        let mut begun = self.begun();
        if begun.is_none() {
            *begun = Some(Instant::now());
            self.news.notify_one();
        }
    }

    /// All of it is there.
    pub(super) fn whole(&self) {
        *self.begun() = None;
    }

    /// Ends when one has taken longer than `limit`.
    pub(super) async fn late(&self, limit: Duration) {
        loop {
            let begun = *self.begun();
            let Some(since) = begun else {
                self.news.notified().await;
                continue;
            };
            sleep(limit.saturating_sub(since.elapsed())).await;
            if *self.begun() == Some(since) && since.elapsed() >= limit {
                return;
            }
        }
    }
}

/// A connection that tells when a head begins; `busy` says whether bytes are a request's that is being served.
#[derive(Debug)]
pub(super) struct Watched<S, B> {
    stream: S,
    head: Arc<Head>,
    busy: B,
}

impl<S, B: Fn() -> bool> Watched<S, B> {
    pub(super) fn new(stream: S, head: Arc<Head>, busy: B) -> Self {
        Self { stream, head, busy }
    }
}

impl<S: AsyncRead + Unpin, B: Fn() -> bool + Unpin> AsyncRead for Watched<S, B> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut this.stream).poll_read(cx, buffer));
        if buffer.filled().len() > before && !(this.busy)() {
            this.head.bytes();
        }
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin, B: Unpin> AsyncWrite for Watched<S, B> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
