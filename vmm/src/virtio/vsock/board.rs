//! The switchboard between the guest and the sockets of the host.
//!
//! ```text
//!   SOCKET   ◀── client ── "CONNECT PORT\n" ──▶ Client ──▶ Peer ── REQUEST ──▶ guest, PORT
//!   SOCKET_P ◀── connect ──────────────────────────────── Peer ◀── REQUEST ── guest, to host's port P
//! ```
//! Invariants: there are at most [`MOST`] clients and peers together; a peer is in `by_fd` exactly while it is in
//! `peers`, and its socket is watched exactly as long. Sockets are watched for changes (edge-triggered), so nothing
//! spins that nobody reads from.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::client::{Client, Said};
use super::connection::{Action, Connection, HostEvent, Owed, PATIENCE};
use super::counters::Counters;
use super::packet::{HEADER_BYTES, HOST_CID, Header, Op, Pieces, STREAM};
use super::peer::{Found, Peer};

/// Connections and clients at one time.
pub(super) const MOST: usize = 1023;
/// Answers to packets that belong to no connection wait for room in the guest; with so many, the guest is heard no more
/// until it makes some.
const MOST_ANSWERS: usize = 256;
/// Clients for one turn.
const BATCH: usize = 64;
/// Where ports for clients of the host begin: above those that guests use for services.
const FIRST_PORT: u32 = 1 << 30;

/// Both ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    host: u32,
    guest: u32,
}

/// Who has a socket.
#[derive(Clone, Copy, Debug)]
enum Owner {
    Client,
    Peer(Ports),
}

/// The clients, the connections, and what the guest is to be told.
pub(super) struct Board {
    guest_cid: u64,
    listener: UnixListener,
    path: PathBuf,
    /// Token of the sockets of clients and peers.
    token: u32,
    /// The listener is watched.
    listening: bool,
    /// The host is out of descriptors: clients are taken again from then on.
    deaf_until: Option<Instant>,
    /// There may be a deadline: looking for the next one takes long.
    timed: bool,
    clients: HashMap<RawFd, Client>,
    peers: HashMap<Ports, Peer>,
    by_fd: HashMap<RawFd, Owner>,
    /// Peers that may owe the guest a packet, in turn.
    owing: VecDeque<Ports>,
    answers: VecDeque<Header>,
    next_port: u32,
    counters: Arc<Counters>,
}

impl Board {
    pub(super) fn new(
        guest_cid: u64,
        listener: UnixListener,
        path: PathBuf,
        token: u32,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            guest_cid,
            listener,
            path,
            token,
            listening: false,
            deaf_until: None,
            timed: false,
            clients: HashMap::new(),
            peers: HashMap::new(),
            by_fd: HashMap::new(),
            owing: VecDeque::new(),
            answers: VecDeque::new(),
            next_port: FIRST_PORT,
            counters,
        }
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Watches the listener, or does not while no clients are taken.
    pub(super) fn listen(
        &mut self,
        ops: &mut EventOps<'_>,
        token: u32,
    ) -> Result<(), event_manager::Error> {
        let wanted = self.deaf_until.is_none();
        if wanted == self.listening {
            return Ok(());
        }
        let events = Events::with_data(&self.listener, token, EventSet::IN);
        if wanted {
            ops.add(events)?;
        } else {
            ops.remove(events)?;
        }
        self.listening = wanted;
        Ok(())
    }

    /// Whether a packet of the guest may be looked at: there is room for an answer.
    pub(super) fn hears_guest(&self) -> bool {
        self.answers.len() < MOST_ANSWERS
    }

    /// Whether the guest is to be told something, perhaps.
    pub(super) fn owes(&self) -> bool {
        !self.answers.is_empty() || !self.owing.is_empty()
    }

    /// The listener is readable.
    pub(super) fn accept(&mut self, ops: &mut EventOps<'_>, now: Instant) {
        for _ in 0..BATCH {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                    _ => {
                        // It stays readable, so looking again at once would never end.
                        tracing::warn!(%error, "vsock: can't take a client; trying again later");
                        self.deaf_until = Some(now + PATIENCE);
                        self.timed = true;
                        return;
                    }
                },
            };
            if self.by_fd.len() >= MOST {
                tracing::warn!(
                    most = MOST,
                    "vsock: too many connections; a client is refused"
                );
                continue;
            }
            if stream.set_nonblocking(true).is_err() || !self.watch(ops, &stream) {
                continue;
            }
            let fd = stream.as_raw_fd();
            self.by_fd.insert(fd, Owner::Client);
            let deadline = now + PATIENCE;
            self.clients.insert(fd, Client { stream, deadline });
            self.timed = true;
            // It may have spoken already.
            self.client_spoke(ops, fd, now);
        }
    }

    /// Something happened to the socket of a client or a peer.
    pub(super) fn socket_event(&mut self, ops: &mut EventOps<'_>, events: Events, now: Instant) {
        let fd = events.fd();
        match self.by_fd.get(&fd) {
            Some(Owner::Client) => self.client_spoke(ops, fd, now),
            Some(Owner::Peer(ports)) => self.peer_event(ops, *ports, events.event_set(), now),
            // One that another event of this round has ended.
            None => {}
        }
    }

    /// A packet of the guest; `data` reads its data.
    pub(super) fn guest_packet<'m>(
        &mut self,
        ops: &mut EventOps<'_>,
        header: &Header,
        data: impl FnOnce() -> Option<Pieces<'m>>,
        now: Instant,
    ) {
        if header.src_cid != self.guest_cid {
            // There is nobody to answer to.
            self.counters.dropped();
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            return self.answer_reset(header);
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let Some(peer) = self.peers.get_mut(&ports) else {
            return if header.op() == Some(Op::Request) {
                self.guest_connects(ops, ports, header);
            } else {
                self.answer_reset(header);
            };
        };
        let action = peer.connection.packet(header);
        if action != Some(Action::Deliver) {
            return self.act(ops, ports, action, now);
        }
        let Some(data) = data() else {
            // It said more than it brought.
            let end = Some(peer.connection.end());
            return self.act(ops, ports, end, now);
        };
        self.counters.data_from_guest(data.len());
        match peer.deliver(&data) {
            Ok(written) => self.host_event(ops, ports, wrote(written), now),
            // Its memory went away in between: what would arrive is not what was sent.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                let end = Some(peer.connection.end());
                self.act(ops, ports, end, now);
            }
            Err(_) => self.host_event(ops, ports, HostEvent::Stopped, now),
        }
    }

    /// The next packet for the guest goes to `room`, which has room for a header and for data; its length. `None`: there
    /// is nothing to tell.
    pub(super) fn fill(
        &mut self,
        ops: &mut EventOps<'_>,
        room: &Pieces<'_>,
        now: Instant,
    ) -> Option<u32> {
        if let Some(answer) = self.answers.pop_front() {
            self.counters.packet_to_guest(0);
            return Some(put(room, &answer));
        }
        while let Some(ports) = self.owing.pop_front() {
            let Some(peer) = self.peers.get_mut(&ports) else {
                continue;
            };
            peer.queued = false;
            let Some(owed) = peer.connection.owes(peer.readable) else {
                continue;
            };
            let (owed, len) = match owed {
                Owed::Packet(..) => (owed, 0),
                Owed::Data(most) => {
                    let mut space = room.system_part(HEADER_BYTES, most as usize);
                    match peer.read(&mut space) {
                        Found::Data(len) => {
                            let len = u32::try_from(len).unwrap_or(most);
                            (Owed::Data(len), len)
                        }
                        Found::Nothing => continue,
                        Found::End => {
                            self.host_event(ops, ports, HostEvent::Ended, now);
                            continue;
                        }
                        Found::Lost => {
                            let end = Some(peer.connection.end());
                            self.act(ops, ports, end, now);
                            continue;
                        }
                    }
                }
            };
            peer.connection.paid(owed);
            let (buf_alloc, fwd_cnt) = peer.connection.own_credit();
            let (op, flags) = match owed {
                Owed::Packet(op, flags) => (op, flags),
                Owed::Data(_) => (Op::Data, 0),
            };
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: ports.host,
                dst_port: ports.guest,
                len,
                kind: STREAM,
                op: op as u16,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            self.counters.packet_to_guest(len as usize);
            self.may_owe(ports);
            return Some(put(room, &header));
        }
        None
    }

    /// When [`Board::expire`] has something to do. All deadlines are equally far away when they are made, so one that is
    /// made later is later too.
    pub(super) fn deadline(&mut self) -> Option<Instant> {
        if !self.timed {
            return None;
        }
        let clients = self.clients.values().map(|client| client.deadline);
        let peers = self.peers.values().filter_map(|p| p.connection.deadline());
        let next = clients.chain(peers).chain(self.deaf_until).min();
        self.timed = next.is_some();
        next
    }

    /// Ends what has taken too long.
    pub(super) fn expire(&mut self, ops: &mut EventOps<'_>, now: Instant) {
        if self.deaf_until.is_some_and(|until| until <= now) {
            self.deaf_until = None;
        }
        let late: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| client.deadline <= now)
            .map(|(fd, _)| *fd)
            .collect();
        for fd in late {
            self.forget_client(ops, fd);
        }
        let late: Vec<_> = self
            .peers
            .iter_mut()
            .filter_map(|(ports, peer)| peer.connection.expire(now).map(|action| (*ports, action)))
            .collect();
        for (ports, action) in late {
            self.act(ops, ports, Some(action), now);
        }
    }

    /// Ends everything, when the guest is heard no more.
    pub(super) fn end_all(&mut self, ops: &mut EventOps<'_>) {
        for fd in self.by_fd.keys() {
            let _ = ops.remove(Events::empty_raw(*fd));
        }
        self.by_fd.clear();
        self.clients.clear();
        self.peers.clear();
        self.owing.clear();
        self.answers.clear();
    }

    fn client_spoke(&mut self, ops: &mut EventOps<'_>, fd: RawFd, now: Instant) {
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        match client.listen() {
            Said::Part => {}
            Said::Nonsense => self.forget_client(ops, fd),
            Said::Port(guest) => {
                let Some(client) = self.clients.remove(&fd) else {
                    return;
                };
                let ports = Ports {
                    host: self.free_port(guest),
                    guest,
                };
                let peer = Peer::new(client.stream, Connection::from_host(now));
                self.counters.opened();
                self.by_fd.insert(fd, Owner::Peer(ports));
                self.peers.insert(ports, peer);
                self.timed = true;
                self.may_owe(ports);
            }
        }
    }

    /// A port of the host that has no connection with this port of the guest.
    fn free_port(&mut self, guest: u32) -> u32 {
        // There are far fewer connections than ports, so this ends.
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.peers.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn guest_connects(&mut self, ops: &mut EventOps<'_>, ports: Ports, request: &Header) {
        if self.by_fd.len() >= MOST {
            tracing::warn!(
                most = MOST,
                "vsock: too many connections; the guest is refused"
            );
            return self.answer_reset(request);
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let stream = match connect_now(Path::new(&path)) {
            Ok(stream) if self.watch(ops, &stream) => stream,
            Ok(_) => return self.answer_reset(request),
            Err(error) => {
                tracing::debug!(%error, ?path, "vsock: the guest reaches nobody");
                return self.answer_reset(request);
            }
        };
        self.counters.opened();
        self.by_fd.insert(stream.as_raw_fd(), Owner::Peer(ports));
        let peer = Peer::new(stream, Connection::from_guest(request));
        self.peers.insert(ports, peer);
        self.may_owe(ports);
    }

    fn peer_event(&mut self, ops: &mut EventOps<'_>, ports: Ports, events: EventSet, now: Instant) {
        let gone = EventSet::HANG_UP | EventSet::ERROR;
        let Some(peer) = self.peers.get_mut(&ports) else {
            return;
        };
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | gone) {
            peer.readable = true;
        }
        let event = if events.intersects(gone) {
            HostEvent::Stopped
        } else if events.contains(EventSet::OUT) {
            match peer.flush() {
                Ok(written) => wrote(written),
                Err(_) => HostEvent::Stopped,
            }
        } else {
            wrote(0)
        };
        self.host_event(ops, ports, event, now);
    }

    fn host_event(&mut self, ops: &mut EventOps<'_>, ports: Ports, event: HostEvent, now: Instant) {
        let Some(peer) = self.peers.get_mut(&ports) else {
            return;
        };
        if event == HostEvent::Stopped {
            peer.discard();
        }
        let action = peer.connection.host(event, now);
        self.timed |= peer.connection.deadline().is_some();
        self.act(ops, ports, action, now);
    }

    fn act(&mut self, ops: &mut EventOps<'_>, ports: Ports, action: Option<Action>, now: Instant) {
        let Some(peer) = self.peers.get_mut(&ports) else {
            return;
        };
        match action {
            // Data is delivered where the packet is.
            None | Some(Action::Deliver) => {}
            Some(Action::TellClient) => {
                if peer.tell_client(ports.host).is_err() {
                    return self.host_event(ops, ports, HostEvent::Stopped, now);
                }
            }
            Some(Action::EndWriting) => peer.end_writing(),
            Some(Action::Reset) => {
                self.forget_peer(ops, ports);
                self.reset(HOST_CID, ports, STREAM);
                return;
            }
            Some(Action::Close) => return self.forget_peer(ops, ports),
        }
        self.may_owe(ports);
    }

    /// Puts a peer in the queue of those that owe the guest something, if it does.
    fn may_owe(&mut self, ports: Ports) {
        if let Some(peer) = self.peers.get_mut(&ports)
            && !peer.queued
            && peer.connection.owes(peer.readable).is_some()
        {
            peer.queued = true;
            self.owing.push_back(ports);
        }
    }

    /// Refuses a packet of the guest.
    fn answer_reset(&mut self, header: &Header) {
        // Else two would tell each other for ever.
        if header.op() == Some(Op::Reset) {
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        self.reset(header.dst_cid, ports, header.kind);
    }

    fn reset(&mut self, src_cid: u64, ports: Ports, kind: u16) {
        self.counters.reset();
        self.answers.push_back(Header {
            src_cid,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind,
            op: Op::Reset as u16,
            ..Header::default()
        });
    }

    fn watch(&self, ops: &mut EventOps<'_>, stream: &UnixStream) -> bool {
        let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        ops.add(Events::with_data(stream, self.token, set))
            .inspect_err(|error| tracing::warn!(%error, "vsock: can't watch a socket"))
            .is_ok()
    }

    fn forget_client(&mut self, ops: &mut EventOps<'_>, fd: RawFd) {
        // Before the descriptor is closed and may be another's.
        let _ = ops.remove(Events::empty_raw(fd));
        self.by_fd.remove(&fd);
        self.clients.remove(&fd);
    }

    fn forget_peer(&mut self, ops: &mut EventOps<'_>, ports: Ports) {
        if let Some(peer) = self.peers.remove(&ports) {
            let fd = peer.stream().as_raw_fd();
            let _ = ops.remove(Events::empty_raw(fd));
            self.by_fd.remove(&fd);
            if peer.queued {
                // A guest that opens and closes all the time must not fill the queue.
                self.owing.retain(|other| *other != ports);
            }
        }
    }
}

fn wrote(bytes: usize) -> HostEvent {
    // A connection keeps far less.
    HostEvent::Wrote(u32::try_from(bytes).unwrap_or(u32::MAX))
}

/// Stores the header of a packet whose data is there; the packet's length. The driver gets an empty chain when its
/// memory is gone.
fn put(room: &Pieces<'_>, header: &Header) -> u32 {
    match room.put(header) {
        Some(()) => u32::try_from(HEADER_BYTES).unwrap_or(0) + header.len,
        None => 0,
    }
}

/// Connects to a socket without waiting for who listens there.
fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}
