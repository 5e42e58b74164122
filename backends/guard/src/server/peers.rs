//! Connections and what they say. Nobody here is trusted: what is wrong ends the connection, and nothing else.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use event_manager::EventOps;
use tracing::{debug, info, warn};

use super::Server;
use super::holders::HolderProcess;
use super::visitors::Waiter;
use crate::chain;
use crate::core::{ClaimRefused, HolderId, OpenerId, Question};
use crate::group::Gate;
use crate::lineage::{DeviceName, Lineage};
use crate::opener::Opener;
use crate::peer::{Peer, PeerError};
use crate::process::Process;
use crate::protocol::{
    Listing, Message, NAME_LIMIT_CHARS, Request, Said, VERSION, WHY_LIMIT_CHARS, tidy,
};
use crate::sources::Source;
use crate::target::Target;

/// Connections in all, and of one user without privilege.
const PEERS_LIMIT: usize = 512;
const PEERS_OF_A_USER_LIMIT: usize = 64;
/// Devices that one connection holds.
const CLAIMS_LIMIT: usize = 64;
/// A holder may take this long to answer.
const SHORTEST_ANSWER: Duration = Duration::from_millis(100);
const LONGEST_ANSWER: Duration = Duration::from_hours(1);
/// The word for a release in the place of a file.
const RELEASE: &str = "release";

impl<G: Gate> Server<G> {
    pub(super) fn on_listener(&mut self, ops: &mut EventOps<'_>) {
        let accepted = match &self.listener {
            Some(listener) => listener.accept(),
            None => return,
        };
        let outcome = match accepted {
            Ok((stream, _)) => self.welcome(stream, ops),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => {}
            // It has looked whether anybody listens.
            Err(error) if is_gone(&error) => debug!(%error, "who connected is gone already"),
            Err(error) => warn!(%error, "a connection is not accepted"),
        }
    }

    pub(super) fn welcome(&mut self, stream: UnixStream, ops: &mut EventOps<'_>) -> io::Result<()> {
        let process = Process::of_peer(&stream)?;
        let of_user = self
            .processes
            .values()
            .filter(|it| it.process.uid == process.uid)
            .count();
        let is_privileged = is_privileged(process.uid);
        if self.processes.len() >= PEERS_LIMIT
            || (!is_privileged && of_user >= PEERS_OF_A_USER_LIMIT)
        {
            return Err(io::Error::other(format!(
                "user {} has too many",
                process.uid
            )));
        }
        let peer = Peer::new(stream)?;
        let id = HolderId(self.new_id());
        let event = |error| io::Error::other(format!("{error:?}"));
        self.sources
            .add(ops, Source::Peer(id), peer.as_raw_fd())
            .map_err(event)?;
        if let Err(error) = self
            .sources
            .add(ops, Source::Process(id), process.pidfd.as_raw_fd())
        {
            self.sources.remove(ops, Source::Peer(id));
            return Err(event(error));
        }
        debug!(pid = process.pid, uid = process.uid, "connected");
        self.peers.insert(id, peer);
        let name = format!("process {}", process.pid);
        let has_ended = false;
        self.processes.insert(
            id,
            HolderProcess {
                process,
                name,
                has_ended,
            },
        );
        Ok(())
    }

    pub(super) fn on_peer(&mut self, id: HolderId, ops: &mut EventOps<'_>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let received = peer.flush().and_then(|()| peer.receive());
        let wants_room = peer.has_unsent();
        self.sources.want_room(ops, Source::Peer(id), wants_room);
        // What came before the end counts.
        let worked_off = self.work_off(id, ops);
        if let Err(error) = received.and(worked_off) {
            self.end_connection(id, &error, ops);
        }
    }

    fn work_off(&mut self, id: HolderId, ops: &mut EventOps<'_>) -> Result<(), PeerError> {
        // Bounded by what one look at the socket takes.
        loop {
            let Some(peer) = self.peers.get_mut(&id) else {
                return Ok(());
            };
            let Some(request) = peer.next_request()? else {
                return Ok(());
            };
            let is_hello = matches!(request, Request::Hello { .. });
            if is_hello == peer.name.is_some() {
                self.fault(id, "hello comes first, and once", ops);
                return Ok(());
            }
            self.on_request(id, request, ops);
        }
    }

    fn on_request(&mut self, id: HolderId, request: Request, ops: &mut EventOps<'_>) {
        match request {
            Request::Hello { version, name } => self.on_hello(id, version, &name, ops),
            Request::Hold {
                device,
                answer_within_ms,
            } => {
                let within = Duration::from_millis(answer_within_ms);
                let message =
                    match self.hold(id, &device, within.clamp(SHORTEST_ANSWER, LONGEST_ANSWER)) {
                        Ok(()) => Message::Held { device },
                        Err(why) => {
                            info!(
                                vm = self.vm(id),
                                device = tidy(&device, NAME_LIMIT_CHARS),
                                why,
                                "not held"
                            );
                            Message::NotHeld { device, why }
                        }
                    };
                self.tell(id, &message, ops);
            }
            Request::LetGo { device } => {
                // Said of a device that it does not hold, it is about an answer that was in time.
                if let Ok(device) = device.parse::<DeviceName>()
                    && self.core.let_go(id, &device)
                {
                    info!(vm = self.vm(id), %device, "let go");
                }
            }
            Request::Answer { request, verdict } => {
                let verdict = match verdict {
                    Said::Released => Ok(()),
                    Said::Refused { why } => Err(tidy(&why, WHY_LIMIT_CHARS)),
                };
                if !self.core.answered(id, Question(request), verdict) {
                    debug!(
                        vm = self.vm(id),
                        request, "an answer to what is not asked any more"
                    );
                }
            }
            Request::Release { device } => self.on_release(id, &device, ops),
            Request::List => {
                let listing = Listing {
                    held: self.held_list(),
                    waiting: self.waiting_list(),
                };
                self.tell(id, &Message::Listing(listing), ops);
            }
        }
    }

    fn on_hello(&mut self, id: HolderId, version: u32, name: &str, ops: &mut EventOps<'_>) {
        if version != VERSION {
            let why = format!("this guard speaks version {VERSION} of the protocol, not {version}");
            return self.fault(id, &why, ops);
        }
        let name = tidy(name, NAME_LIMIT_CHARS);
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.name = Some(name.clone());
        }
        if let Some(it) = self.processes.get_mut(&id) {
            it.name = name;
        }
        self.tell(id, &Message::Hello { version: VERSION }, ops);
    }

    /// Holds a device, from the moment on that this returns.
    fn hold(&mut self, id: HolderId, device: &str, within: Duration) -> Result<(), String> {
        // Whatever else is wrong: the proof belongs to this request.
        let proof = self.peers.get_mut(&id).and_then(Peer::next_proof);
        let device: DeviceName = device.parse().map_err(|error| format!("{error}"))?;
        let lineage = Lineage::read(&self.host, &device).map_err(|error| chain(&error))?;
        if !proof.is_some_and(|proof| proof.is_of(lineage.number)) {
            return Err(format!(
                "no open descriptor of {device} came with the request"
            ));
        }
        if self.core.claims_of(id).count() >= CLAIMS_LIMIT {
            return Err(format!(
                "one connection holds {CLAIMS_LIMIT} devices at most"
            ));
        }
        let pid = self.processes.get(&id).map_or(0, |it| it.process.pid);
        self.core.hold(id, pid, &device, within).map_err(|refused| match refused {
            ClaimRefused::BeingRemoved => {
                format!("somebody waits to take {device} away; try again when that is decided (`daxhund guard list`)")
            }
            ClaimRefused::Twice => format!("{device} is held by this connection already"),
        })?;
        // Between the look at the device and the watch it may have gone: then it is not the same afterwards.
        let still_there = self
            .watch_all()
            .map_err(|error| chain(&error))
            .and_then(|()| {
                let same = self
                    .lineages
                    .get(&device)
                    .is_some_and(|now| now.parts == lineage.parts);
                let now = Lineage::read(&self.host, &device).map_err(|error| chain(&error))?;
                if same
                    && now.parts == lineage.parts
                    && now.parts.first().is_some_and(|it| it.driver.is_some())
                {
                    Ok(())
                } else {
                    Err(format!("{device} is being taken away or changed just now"))
                }
            });
        match still_there {
            Ok(()) => {
                info!(vm = self.vm(id), pid, %device, "held");
                Ok(())
            }
            Err(why) => {
                self.core.let_go(id, &device);
                Err(why)
            }
        }
    }

    fn on_release(&mut self, id: HolderId, device: &str, ops: &mut EventOps<'_>) {
        let refuse = |why: String| Message::NotReleased {
            device: device.to_owned(),
            why,
        };
        let Some(it) = self.processes.get(&id) else {
            return;
        };
        let (pid, uid) = (it.process.pid, it.process.uid);
        if !is_privileged(uid) {
            let why = "only root may take devices away".to_owned();
            return self.tell(id, &refuse(why), ops);
        }
        let name = match device.parse::<DeviceName>() {
            Ok(name) => name,
            Err(error) => return self.tell(id, &refuse(error.to_string()), ops),
        };
        let by = Opener {
            pid,
            name: self.vm(id).to_owned(),
            file: RELEASE.to_owned(),
        };
        let opener = OpenerId(self.new_id());
        let target = Target::Devices([name.clone()].into());
        self.waiters.insert(opener, Waiter::release(by, id, name));
        self.come(opener, target, ops);
    }

    /// A removal of the guard's own is done.
    pub(super) fn on_removals(&mut self, ops: &mut EventOps<'_>) {
        while let Some(done) = self.removals.next_done() {
            let device = done.device.to_string();
            let message = match done.outcome {
                Ok(()) => {
                    info!(device, "released and unbound");
                    Message::Released { device }
                }
                Err(error) => {
                    let why = chain(&error);
                    warn!(device, why, "released, but not unbound");
                    Message::NotReleased { device, why }
                }
            };
            self.tell(done.peer, &message, ops);
        }
    }

    /// Sends a message to a connection, if there is still one. One that does not take it is closed.
    pub(super) fn tell(&mut self, id: HolderId, message: &Message, ops: &mut EventOps<'_>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let sent = peer.send(message);
        let wants_room = peer.has_unsent();
        self.sources.want_room(ops, Source::Peer(id), wants_room);
        if let Err(error) = sent {
            self.end_connection(id, &error, ops);
        }
    }

    fn fault(&mut self, id: HolderId, why: &str, ops: &mut EventOps<'_>) {
        let why = why.to_owned();
        warn!(vm = self.vm(id), why, "the connection is closed");
        self.tell(id, &Message::Fault { why }, ops);
        self.hang_up(id, ops);
    }

    fn end_connection(&mut self, id: HolderId, error: &PeerError, ops: &mut EventOps<'_>) {
        match error {
            PeerError::Closed => self.hang_up(id, ops),
            PeerError::Unsent | PeerError::Socket(_) => {
                warn!(
                    vm = self.vm(id),
                    error = chain(error),
                    "the connection is closed"
                );
                self.hang_up(id, ops);
            }
            PeerError::Line(_) | PeerError::Proofs => self.fault(id, &chain(error), ops),
        }
    }

    /// Closes a connection. What it holds is held still.
    pub(super) fn hang_up(&mut self, id: HolderId, ops: &mut EventOps<'_>) {
        self.sources.remove(ops, Source::Peer(id));
        if self.peers.remove(&id).is_none() {
            return;
        }
        let releases: Vec<OpenerId> = self
            .waiters
            .iter()
            .filter(|(_, waiter)| waiter.is_release_of(id))
            .map(|(opener, _)| *opener)
            .collect();
        for opener in releases {
            self.core.opener_gone(opener);
        }
        let held: Vec<String> = self.core.claims_of(id).map(DeviceName::to_string).collect();
        self.core.disconnected(id);
        if held.is_empty() {
            self.forget(id, ops);
        } else {
            let devices = held.join(", ");
            warn!(
                vm = self.vm(id),
                devices, "the connection is lost; the devices are held until the process ends"
            );
        }
    }

    fn vm(&self, id: HolderId) -> &str {
        self.processes.get(&id).map_or("?", |it| it.name.as_str())
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotConnected || error.raw_os_error() == Some(nix::libc::ESRCH)
}

/// Who runs the guard may do with it what it can do itself.
fn is_privileged(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}
