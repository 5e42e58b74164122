//! The guard at work: the loop around the core.
//!
//! ```text
//!   files opened ──> visitors ──┐                       ┌──> answers to the kernel
//!   connections  ──> peers ─────┼──> core ──> actions ──┼──> messages to the holders
//!   processes, locks, time ─────┘                       └──> removals of its own
//! ```
//! One thread does all of it but the removals, which block. It must never wait for what it answers itself: it opens no
//! watched file, and what it reads of sysfs and procfs is not watched. (The removals' thread opens one: that opening is
//! recognised as the guard's own and passes.)

#![forbid(unsafe_code)]

mod holders;
mod peers;
#[cfg(test)]
mod tests;
mod visitors;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use daxhund_listen::Place;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use tracing::{error, info, warn};
use vmm_sys_util::timerfd::TimerFd;

use crate::core::{Action, Core, HolderId, OpenerId};
use crate::group::{Gate, Group, GroupError, Inode};
use crate::host::Host;
use crate::lineage::{DeviceName, Lineage};
use crate::listener::{ListenError, Listener};
use crate::peer::Peer;
use crate::policy::UnknownPolicy;
use crate::removals::Removals;
use crate::sources::{Source, Sources};
use crate::uevents::Uevents;
use crate::watched::{WatchedFile, watched};
use holders::HolderProcess;
use visitors::Waiter;

/// How the daemon is run.
#[derive(Debug)]
pub struct DaemonConfig {
    /// Where clients connect.
    pub listener: Listener,
    /// What is done about those whose target can't be told.
    pub unknown: UnknownPolicy,
}

/// Why the guard can't begin, or go on.
#[derive(Debug, Error)]
pub enum ServeError {
    /// No fanotify.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// No socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The inherited descriptor is no connection.
    #[error(
        "the inherited descriptor is not one end of a connected unix stream socket: the helper is started by a VMM, not \
         by hand (`daxhund-guardd` is the daemon)"
    )]
    NotConnected(#[source] io::Error),
    /// Something of the loop.
    #[error("cannot {what}")]
    Loop {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// epoll.
    #[error("cannot wait for events: {0:?}")]
    Events(event_manager::Error),
}

/// Serves everybody who connects, until SIGTERM or SIGINT. Then those who wait are turned away, and nobody is let through by
/// the end itself.
pub fn serve_daemon(config: DaemonConfig) -> Result<(), ServeError> {
    let (listener, place) = config.listener.into_parts();
    let group = Group::new()?;
    let mut server = Server::new(Host::system(), group, config.unknown)?;
    server.listener = Some(listener);
    server.place = place;
    server.signal = Some(end_signals().map_err(failed("handle signals"))?);
    server.run(None)
}

/// Serves the one connection that was inherited, as the helper of the VMM at its other end. Ends by itself when the
/// connection is closed, nothing of it is held and nobody waits. Signals that end a session or a service are ignored:
/// it is when the VMM is being killed that the guard is needed.
pub fn serve_inherited(connection: OwnedFd, unknown: UnknownPolicy) -> Result<(), ServeError> {
    // Fails when the process leads a session already, which is as good.
    let _ = rustix::process::setsid();
    // It must keep no file system from being unmounted. Not done by the one who starts it: the library would fork for that, and a
    // fork holds up every thread that allocates memory.
    std::env::set_current_dir("/").map_err(failed("change to the root directory"))?;
    ignore_signals().map_err(failed("ignore signals"))?;
    let stream = UnixStream::from(connection);
    stream.peer_addr().map_err(ServeError::NotConnected)?;
    let group = Group::new()?;
    let mut server = Server::new(Host::system(), group, unknown)?;
    server.let_go_of_log = Some(let_go_of_standard_error);
    server.run(Some(stream))
}

/// It was the VMM's: whoever reads that to its end waits for the VMM, not for those to whom it lent memory.
fn let_go_of_standard_error() -> io::Result<()> {
    let nothing = File::options().write(true).open("/dev/null")?;
    Ok(rustix::stdio::dup2_stderr(&nothing)?)
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> ServeError {
    move |source| ServeError::Loop { what, source }
}

fn end_signals() -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

fn ignore_signals() -> io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        // A handler that does nothing, whose flag nobody reads.
        signal_hook::flag::register(signal, std::sync::Arc::default())?;
    }
    Ok(())
}

/// The guard.
struct Server<G> {
    host: Host,
    gate: G,
    core: Core,
    sources: Sources,
    listener: Option<UnixListener>,
    place: Option<Place>,
    /// Connections, by the number under which they hold.
    peers: BTreeMap<HolderId, Peer>,
    /// The processes of connections, and of those that are closed and hold still.
    processes: BTreeMap<HolderId, HolderProcess>,
    waiters: BTreeMap<OpenerId, Waiter>,
    lineages: BTreeMap<DeviceName, Lineage>,
    files: BTreeMap<PathBuf, WatchedFile>,
    inodes: BTreeMap<Inode, PathBuf>,
    removals: Removals,
    uevents: Option<Uevents>,
    timer: TimerFd,
    /// When locks of the dead are looked at again.
    next_look: Option<Instant>,
    signal: Option<UnixStream>,
    /// What a helper does once when its VMM has ended and something of it is still lent.
    let_go_of_log: Option<fn() -> io::Result<()>>,
    last_id: u64,
    ended: Option<Result<(), ServeError>>,
}

impl<G: Gate> Server<G> {
    fn new(host: Host, gate: G, unknown: UnknownPolicy) -> Result<Self, ServeError> {
        let uevents = match Uevents::open() {
            Ok(uevents) => Some(uevents),
            Err(error) => {
                warn!(%error, "no news from the kernel: what a held device stands on is only looked at when it is held");
                None
            }
        };
        let timer = TimerFd::new().map_err(|error| failed("make a timer")(error.into()))?;
        Ok(Self {
            host,
            gate,
            core: Core::new(unknown),
            sources: Sources::default(),
            listener: None,
            place: None,
            peers: BTreeMap::new(),
            processes: BTreeMap::new(),
            waiters: BTreeMap::new(),
            lineages: BTreeMap::new(),
            files: BTreeMap::new(),
            inodes: BTreeMap::new(),
            removals: Removals::new().map_err(failed("make an event counter"))?,
            uevents,
            timer,
            next_look: None,
            signal: None,
            let_go_of_log: None,
            last_id: 0,
            ended: None,
        })
    }

    /// Serves until the end.
    fn run(self, connection: Option<UnixStream>) -> Result<(), ServeError> {
        let mut manager = EventManager::new().map_err(ServeError::Events)?;
        let id = manager.add_subscriber(Loop {
            server: self,
            connection,
        });
        loop {
            let server = &mut manager
                .subscriber_mut(id)
                .map_err(ServeError::Events)?
                .server;
            if let Some(outcome) = server.ended.take() {
                return outcome;
            }
            manager.run().map_err(ServeError::Events)?;
        }
    }

    fn start(
        &mut self,
        ops: &mut EventOps<'_>,
        connection: Option<UnixStream>,
    ) -> Result<(), ServeError> {
        let mut add = |source, fd| {
            self.sources
                .add(ops, source, fd)
                .map_err(ServeError::Events)
        };
        add(Source::Gate, self.gate.as_raw_fd())?;
        add(Source::Timer, self.timer.as_raw_fd())?;
        add(Source::Removals, self.removals.as_raw_fd())?;
        if let Some(uevents) = &self.uevents {
            add(Source::Uevents, uevents.as_raw_fd())?;
        }
        if let Some(listener) = &self.listener {
            add(Source::Listener, listener.as_raw_fd())?;
        }
        if let Some(signal) = &self.signal {
            add(Source::Signal, signal.as_raw_fd())?;
        }
        if let Some(stream) = connection {
            self.welcome(stream, ops)
                .map_err(ServeError::NotConnected)?;
        }
        Ok(())
    }

    fn on_event(&mut self, source: Source, ops: &mut EventOps<'_>) {
        match source {
            Source::Gate => self.on_gate(ops),
            Source::Listener => self.on_listener(ops),
            Source::Peer(id) => self.on_peer(id, ops),
            Source::Process(id) => self.on_process_end(id, ops),
            Source::OpenerProcess(id) => self.core.opener_gone(id),
            Source::Uevents => self.on_uevents(),
            Source::Removals => self.on_removals(ops),
            Source::Timer => self.core.tick(Instant::now()),
            Source::Signal => self.on_signal(ops),
        }
        self.settle(ops);
    }

    /// Does what the core says, until it says nothing more, and sets the alarm.
    fn settle(&mut self, ops: &mut EventOps<'_>) {
        self.look_at_locks();
        self.let_go_when_orphaned();
        while let Some(action) = self.core.next_action() {
            match action {
                Action::Allow { opener, grounds } => self.allow(opener, &grounds, ops),
                Action::Deny { opener, denial } => self.deny(opener, &denial, ops),
                Action::Ask {
                    holder,
                    question,
                    device,
                    opener,
                } => self.ask(holder, question, &device, opener, ops),
                Action::Withdraw { holder, question } => self.withdraw(holder, question, ops),
                Action::Forget { holder } => self.forget(holder, ops),
            }
        }
        self.stop_watching_when_idle();
        let next = [self.core.next_deadline(), self.next_look]
            .into_iter()
            .flatten()
            .min();
        let set = match next {
            // A timer of no time at all would never ring.
            Some(next) => {
                let left = next.saturating_duration_since(Instant::now());
                self.timer.reset(left.max(Duration::from_millis(1)), None)
            }
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            error!(%error, "deadlines can't be kept");
        }
        let is_helper = self.listener.is_none();
        if is_helper
            && self.peers.is_empty()
            && !self.core.anything_held()
            && !self.core.anybody_waits()
        {
            self.ended.get_or_insert(Ok(()));
        }
    }

    /// Reads anew what held devices stand on, and watches it.
    fn watch_all(&mut self) -> Result<(), crate::group::MarkError> {
        let held: Vec<DeviceName> = self
            .core
            .claims()
            .map(|(_, device)| device.clone())
            .collect();
        self.lineages.retain(|device, _| held.contains(device));
        for device in held {
            match Lineage::read(&self.host, &device) {
                Ok(lineage) => drop(self.lineages.insert(device, lineage)),
                // It was taken away past the guard; what was known of it stays true of what is left.
                Err(error) => warn!(%device, %error, "a held device can't be found"),
            }
        }
        self.files = watched(self.lineages.values());
        let mut outcome = Ok(());
        for path in self.files.keys() {
            match self.gate.watch(path) {
                Ok(inode) => drop(self.inodes.insert(inode, path.clone())),
                Err(error) => outcome = Err(error),
            }
        }
        outcome
    }

    fn stop_watching_when_idle(&mut self) {
        if self.files.is_empty() || self.core.anything_held() || self.core.anybody_waits() {
            return;
        }
        self.lineages.clear();
        self.files.clear();
        self.inodes.clear();
        if let Err(error) = self.gate.watch_nothing() {
            warn!(%error, "files are still watched, though nothing is held");
        }
    }

    fn on_uevents(&mut self) {
        let matters = self.uevents.as_ref().is_some_and(Uevents::read);
        if matters
            && self.core.anything_held()
            && let Err(error) = self.watch_all()
        {
            // The file may be gone by now, with its device: then it threatens nothing.
            warn!(%error, cause = ?std::error::Error::source(&error), "a file of a held device is not watched");
        }
    }

    /// Nobody passes by the guard's end: who waits is turned away, and so is who comes until the group is closed.
    fn on_signal(&mut self, ops: &mut EventOps<'_>) {
        info!("ending; those who wait are turned away");
        self.core.ends();
        self.settle(ops);
        if let Err(error) = self.gate.watch_nothing() {
            warn!(%error, "files are still watched at the end");
        }
        self.turn_away_the_rest();
        self.ended.get_or_insert(Ok(()));
    }

    fn let_go_when_orphaned(&mut self) {
        let Some(let_go) = self.let_go_of_log else {
            return;
        };
        let left = self.core.left_by_the_dead();
        if left.is_empty() {
            return;
        }
        self.let_go_of_log = None;
        let devices: Vec<_> = left.iter().map(DeviceName::as_str).collect();
        let devices = devices.join(", ");
        info!(%devices, "somebody still has memory locked: its removal is held, without another word, until they let go");
        if let Err(error) = let_go() {
            warn!(%error, "the VMM's standard error stays open");
        }
    }

    fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

/// What the event manager owns.
struct Loop<G> {
    server: Server<G>,
    /// To be welcomed at the start.
    connection: Option<UnixStream>,
}

impl<G: Gate> MutEventSubscriber for Loop<G> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.server.ended.is_some() {
            return;
        }
        if let Some(source) = self.server.sources.of(&events) {
            self.server.on_event(source, ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.server.start(ops, self.connection.take()) {
            self.server.ended = Some(Err(error));
        }
    }
}
