//! The server: one thread, its connections, and the end of both.
//!
//! ```text
//!   accept ──▶ open ──request──▶ in a call ──answer──▶ open ──▶ closed by the client, by a timeout, or for a newcomer
//! ```
//! Invariants:
//! - At most [`Limits::connections`] are open. A newcomer beyond that takes the place of the one that has been without
//!   a request for longest; only calls that wait for the owner make it wait, and those end.
//! - A connection that is in a call is closed by nothing but the end of the server, and one that is silent by nothing but
//!   that or a newcomer.
//! - [`Server::stop`] is bounded: it lets answers that are under way go out, then closes everything.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use axum::Router;
use daxhund_listen::Place;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{self, Runtime};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, warn};

use crate::config::LONGEST_REMOVAL_TIMEOUT;
use crate::metrics::Metrics;

use super::heads::{Head, Watched};
use super::listener::Listener;
use super::request::CallSink;
use super::routes;
use super::stream::{FdStream, Received};

/// How long the accept loop rests when the process can't open another descriptor.
const NO_DESCRIPTORS: Duration = Duration::from_millis(100);
/// A connection that says nothing more gets this long to close when the server stops.
const SILENT: Duration = Duration::from_millis(100);

/// What no client can exceed.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Bytes of a request's line and headers; at least 8192.
    pub head_bytes: usize,
    /// Bytes of a body.
    pub body_bytes: usize,
    /// How long a head may take from its first byte on.
    pub head_timeout: Duration,
    /// How long a body may take.
    pub body_timeout: Duration,
    /// How long a client waits for the owner before it is told that it waits in vain.
    pub call_timeout: Duration,
    /// The same for a drain, in which a guest has its time.
    pub drain_timeout: Duration,
    /// How long a connection is without a request before a newcomer may take its place.
    pub idle: Duration,
    /// How long answers that are under way have when the server stops.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            head_bytes: 16 << 10,
            body_bytes: 1 << 20,
            head_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(10),
            call_timeout: Duration::from_mins(1),
            drain_timeout: LONGEST_REMOVAL_TIMEOUT + Duration::from_mins(1),
            idle: Duration::from_millis(100),
            stop_timeout: Duration::from_secs(2),
        }
    }
}

/// The server can't be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// No event loop.
    #[error("the API's event loop can't be made")]
    Runtime(#[source] io::Error),
    /// The event loop does not take the socket.
    #[error("the API's socket can't be listened on")]
    Listen(#[source] io::Error),
    /// No thread.
    #[error("the API's thread can't be started")]
    Thread(#[source] io::Error),
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<()>,
    patience: Duration,
    // Removed last, when nobody accepts any more.
    _place: Option<Place>,
}

impl Server {
    /// Serves `listener`'s clients on a thread of its own; what they ask goes to `sink`, but for `metrics`, which it tells itself.
    pub fn start(
        listener: Listener,
        sink: impl CallSink,
        metrics: Metrics,
    ) -> Result<Self, StartError> {
        Self::start_with(listener, sink, metrics, Limits::default())
    }

    /// As [`Server::start`], with other limits.
    pub fn start_with(
        listener: Listener,
        sink: impl CallSink,
        metrics: Metrics,
        limits: Limits,
    ) -> Result<Self, StartError> {
        let (socket, place) = listener.into_parts();
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(StartError::Runtime)?;
        let socket = listen(&runtime, socket).map_err(StartError::Listen)?;
        let router = routes::router(sink, metrics, limits);
        let (stop, stopping) = watch::channel(false);
        let (end, ended) = channel::<()>();
        let thread = Builder::new()
            .name("http-server".to_owned())
            .spawn(move || {
                // Dropped when the thread ends in whatever way, which is what `ended` waits for.
                let _end: Sender<()> = end;
                let connections = Arc::new(Connections::new(limits));
                runtime.block_on(connections.accept(socket, router, stopping));
                // Drops the connections that are left.
                runtime.shutdown_background();
            })
            .map_err(StartError::Thread)?;
        Ok(Self {
            stop,
            thread: Some(thread),
            ended,
            patience: limits.stop_timeout + Duration::from_secs(1),
            _place: place,
        })
    }

    /// Accepts nothing more, lets answers that are under way go out and closes all connections. Calls whose answer
    /// has not come by then are abandoned, so answer or drop them first.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let _ = self.stop.send(true);
        match self.ended.recv_timeout(self.patience) {
            // Only a sink that waits, which it must not, keeps the thread.
            Err(RecvTimeoutError::Timeout) => {
                error!("the API's thread does not end; it is left behind");
            }
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                if thread.join().is_err() {
                    error!("the API's thread panicked; this is a defect of daxhund");
                }
            }
        }
    }
}

fn listen(runtime: &Runtime, socket: StdListener) -> io::Result<UnixListener> {
    let _inside = runtime.enter();
    UnixListener::from_std(socket)
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // A server that is gone without a word has stopped, too.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// What a handler knows of the connection its request came by.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) received: Received,
    activity: Arc<Activity>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Activity {
    calls: AtomicUsize,
    since: Mutex<Instant>,
}

impl Activity {
    fn since(&self) -> MutexGuard<'_, Instant> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_call(&self) -> bool {
        self.calls.load(Ordering::Relaxed) > 0
    }
}

impl Client {
    /// Keeps the connection open until what is returned is dropped.
    pub(super) fn begin(&self) -> InCall<'_> {
        self.activity.calls.fetch_add(1, Ordering::Relaxed);
        InCall(self)
    }
}

/// A request that is being served.
#[derive(Debug)]
pub(super) struct InCall<'a>(&'a Client);

impl Drop for InCall<'_> {
    fn drop(&mut self) {
        *self.0.activity.since() = Instant::now();
        self.0.activity.calls.fetch_sub(1, Ordering::Relaxed);
        self.0.changed.notify_one();
    }
}

/// The connections that are open.
#[derive(Debug)]
struct Connections {
    limits: Limits,
    open: Mutex<HashMap<u64, Open>>,
    /// One closed, or is without a request now.
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Open {
    task: AbortHandle,
    activity: Arc<Activity>,
}

impl Connections {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            open: Mutex::new(HashMap::new()),
            changed: Arc::new(Notify::new()),
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server's life.
    async fn accept(
        self: Arc<Self>,
        socket: UnixListener,
        router: Router,
        mut stopping: watch::Receiver<bool>,
    ) {
        let server_stops = stopping.clone();
        let serve = async {
            let mut number = 0;
            let mut warned = false;
            loop {
                match socket.accept().await {
                    Ok((stream, _)) => {
                        warned = false;
                        self.make_room().await;
                        self.serve(number, stream, router.clone(), server_stops.clone());
                        number += 1;
                    }
                    Err(error) => {
                        if !warned {
                            warn!(%error, "the API can't accept a connection");
                            warned = true;
                        }
                        // What an idle connection holds may be what is lacking.
                        self.close_idle();
                        sleep(NO_DESCRIPTORS).await;
                    }
                }
            }
        };
        tokio::select! {
            () = serve => {}
            () = stopped(&mut stopping) => {}
        }
        drop(socket);
        let all_closed = async {
            while !self.open().is_empty() {
                self.changed.notified().await;
            }
        };
        if timeout(self.limits.stop_timeout, all_closed).await.is_err() {
            debug!("connections are closed with calls still under way");
        }
    }

    /// Waits until there is room for one more.
    async fn make_room(&self) {
        while self.open().len() >= self.limits.connections && !self.close_idle() {
            // A connection that has just become idle may still be writing its answer.
            let _ = timeout(self.limits.idle, self.changed.notified()).await;
        }
    }

    /// Closes the connection that has been without a request for longest.
    fn close_idle(&self) -> bool {
        let now = Instant::now();
        let mut open = self.open();
        let longest = open
            .iter()
            .filter(|(_, open)| !open.activity.in_call())
            .map(|(number, open)| (*open.activity.since(), *number))
            .filter(|(since, _)| now.saturating_duration_since(*since) >= self.limits.idle)
            .min();
        let Some(closed) = longest.and_then(|(_, number)| open.remove(&number)) else {
            return false;
        };
        closed.task.abort();
        true
    }

    fn serve(
        self: &Arc<Self>,
        number: u64,
        stream: UnixStream,
        router: Router,
        mut stopping: watch::Receiver<bool>,
    ) {
        let activity = Arc::new(Activity {
            calls: AtomicUsize::new(0),
            since: Mutex::new(Instant::now()),
        });
        let stream = FdStream::new(stream);
        let client = Client {
            received: stream.received(),
            activity: Arc::clone(&activity),
            changed: Arc::clone(&self.changed),
        };
        let router = TowerToHyperService::new(router.layer(axum::Extension(client)));
        let head = Arc::new(Head::default());
        let received = Arc::clone(&head);
        let service = service_fn(move |request| {
            received.whole();
            router.call(request)
        });
        let in_call = Arc::clone(&activity);
        let stream = Watched::new(stream, Arc::clone(&head), move || in_call.in_call());
        let connection = http1::Builder::new()
            // Its own would close connections that are only silent.
            .header_read_timeout(None)
            .max_buf_size(self.limits.head_bytes)
            // A client that has nothing more to send still wants its answer.
            .half_close(true)
            // The contract's own client looks for `Content-Length` in this spelling only.
            .title_case_headers(true)
            .serve_connection(TokioIo::new(stream), service);
        let ours = Arc::clone(&activity);
        let this = Arc::clone(self);
        let task = async move {
            // Also when the task is aborted or panics.
            let _closed = Closed {
                connections: &this,
                number,
            };
            let mut connection = pin!(connection);
            let ended = tokio::select! {
                ended = &mut connection => ended,
                () = head.late(this.limits.head_timeout) => {
                    debug!("a connection of the API is closed: the head of a request did not end");
                    Ok(())
                }
                () = stopped(&mut stopping) => {
                    connection.as_mut().graceful_shutdown();
                    let patience = if ours.in_call() { this.limits.stop_timeout } else { SILENT };
                    timeout(patience, connection).await.unwrap_or(Ok(()))
                }
            };
            if let Err(error) = ended {
                debug!(%error, "a connection of the API ended");
            }
        };
        // Spawned while the map is locked, so that the entry is there before the task can remove it.
        let mut open = self.open();
        let task = tokio::spawn(task).abort_handle();
        open.insert(number, Open { task, activity });
    }
}

struct Closed<'a> {
    connections: &'a Connections,
    number: u64,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.connections.open().remove(&self.number);
        self.connections.changed.notify_one();
    }
}
