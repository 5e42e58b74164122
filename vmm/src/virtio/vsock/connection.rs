//! One connection, as a state machine: events in, actions out. No socket, queue or clock.
//!
//! ```text
//!   a client of the host: CONNECT                              the guest: REQUEST, and the host's socket answers
//!            │ (REQUEST)                                                │ (RESPONSE)
//!            ▼            RESPONSE / tell the client                    ▼
//!        Requested ───────────────────────────────────────────────▶   Open  ◀──┐ data, credit, one direction ended
//!            │ late, anything else                                      │ ──────┘
//!            ▼                                                          ▼
//!       Reset or Close ◀── RST; a broken rule; late; both directions ended by the guest and its data is with the host
//! ```
//! (PACKET) is one that the connection owes the guest in a state; it is asked for with [`Connection::owes`] when the guest has
//! room for a packet. *Reset* ends the connection with RST, *Close* without: the guest does not know of it (any more).
//!
//! Each side counts: `buf_alloc` is how much a receiver keeps, `fwd_cnt` how much it has passed on. Here,
//! `received - forwarded` is what waits for the host, never more than [`BUFFER`]: a guest that sends more is reset.
//! `sent - peer_forwarded` is what waits in the guest, never more than the guest said it keeps.

use std::time::{Duration, Instant};

use super::packet::{Header, Op, RECEIVE, SEND};

/// How much of the guest's data is kept for a host that does not read.
pub(super) const BUFFER: u32 = 64 * 1024;
/// How long a side may take to answer when the connection begins or ends.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
const BOTH: u32 = RECEIVE | SEND;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Requested,
    Open,
}

/// What the host's side does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostEvent {
    /// It has taken so much of the guest's data.
    Wrote(u32),
    /// It sends no more.
    Ended,
    /// It takes no more.
    Stopped,
}

/// What is to be done on the host's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Tell the client that the guest has accepted.
    TellClient,
    /// The packet's data is for the host.
    Deliver,
    /// The guest sends no more, and all of it has been written.
    EndWriting,
    /// End the connection and tell the guest.
    Reset,
    /// End the connection; the guest need not be told.
    Close,
}

/// A packet for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owed {
    /// A packet without data, with these flags.
    Packet(Op, u32),
    /// Data from the host, at most so much.
    Data(u32),
}

/// One connection.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    phase: Phase,
    /// The opening packet that the guest has not been sent.
    opening: Option<Op>,
    owes_credit: bool,
    asked_for_credit: bool,
    /// The host's side was told that the guest sends no more.
    ended_writing: bool,
    /// Directions that are over, as flags of a shutdown packet: said by the guest, true of the host, told to the guest.
    guest_done: u32,
    host_done: u32,
    told_done: u32,
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    deadline: Option<Instant>,
}

impl Connection {
    /// A client of the host wants to reach the guest.
    pub(super) fn from_host(now: Instant) -> Self {
        let deadline = Some(now + PATIENCE);
        Self::new(Phase::Requested, Op::Request, deadline)
    }

    /// The guest has reached a socket of the host.
    pub(super) fn from_guest(request: &Header) -> Self {
        let mut connection = Self::new(Phase::Open, Op::Response, None);
        connection.note_credit(request);
        connection
    }

    fn new(phase: Phase, opening: Op, deadline: Option<Instant>) -> Self {
        Self {
            phase,
            opening: Some(opening),
            owes_credit: false,
            asked_for_credit: false,
            ended_writing: false,
            guest_done: 0,
            host_done: 0,
            told_done: 0,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            deadline,
        }
    }

    /// A packet of the guest for this connection.
    pub(super) fn packet(&mut self, header: &Header) -> Option<Action> {
        self.note_credit(header);
        let Some(op) = header.op() else {
            return Some(self.end());
        };
        match (self.phase, op) {
            (_, Op::Reset) => Some(Action::Close),
            (Phase::Requested, Op::Response) if self.opening.is_none() => {
                self.phase = Phase::Open;
                self.deadline = None;
                Some(Action::TellClient)
            }
            (Phase::Open, Op::Data) => self.data(header.len),
            (Phase::Open, Op::Shutdown) => {
                self.guest_done |= header.flags & BOTH;
                self.settle()
            }
            (Phase::Open, Op::CreditRequest) => {
                self.owes_credit = true;
                None
            }
            (Phase::Open, Op::CreditUpdate) => None,
            (_, Op::Request | Op::Response) | (Phase::Requested, _) => Some(self.end()),
        }
    }

    /// Something of the host's side.
    pub(super) fn host(&mut self, event: HostEvent, now: Instant) -> Option<Action> {
        match event {
            HostEvent::Wrote(bytes) => self.forward(bytes),
            HostEvent::Ended => self.host_done |= SEND,
            HostEvent::Stopped => {
                self.host_done |= RECEIVE;
                // Nobody wants it any more.
                self.forward(self.waiting());
            }
        }
        if self.phase == Phase::Requested {
            // The client went away before the guest answered.
            return (self.host_done != 0).then(|| self.end());
        }
        if self.host_done == BOTH && self.deadline.is_none() {
            // The guest's turn to say RST.
            self.deadline = Some(now + PATIENCE);
        }
        self.settle()
    }

    /// When [`Connection::expire`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Time has passed.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Action> {
        let late = self.deadline.is_some_and(|deadline| deadline <= now);
        late.then(|| self.end())
    }

    /// What the guest is to be sent next; `readable`: the host's side may have data.
    pub(super) fn owes(&self, readable: bool) -> Option<Owed> {
        if let Some(op) = self.opening {
            return Some(Owed::Packet(op, 0));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.host_done != self.told_done {
            return Some(Owed::Packet(Op::Shutdown, self.host_done));
        }
        if self.owes_credit {
            return Some(Owed::Packet(Op::CreditUpdate, 0));
        }
        if !readable || self.host_done & SEND != 0 || self.guest_done & RECEIVE != 0 {
            return None;
        }
        match self.credit() {
            0 if self.asked_for_credit => None,
            0 => Some(Owed::Packet(Op::CreditRequest, 0)),
            credit => Some(Owed::Data(credit)),
        }
    }

    /// What was owed is with the guest.
    pub(super) fn paid(&mut self, owed: Owed) {
        match owed {
            Owed::Packet(Op::Shutdown, flags) => self.told_done = flags,
            Owed::Packet(Op::CreditRequest, _) => self.asked_for_credit = true,
            Owed::Packet(Op::Request | Op::Response, _) => self.opening = None,
            Owed::Packet(..) => {}
            Owed::Data(bytes) => self.sent = self.sent.wrapping_add(bytes),
        }
        // Each packet carries it.
        self.owes_credit = false;
        self.told_forwarded = self.forwarded;
    }

    /// `buf_alloc` and `fwd_cnt` of a packet to the guest.
    pub(super) fn own_credit(&self) -> (u32, u32) {
        (BUFFER, self.forwarded)
    }

    /// How much of the guest's data the host has not taken.
    pub(super) fn waiting(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// How to end it: with RST if the guest knows of it.
    pub(super) fn end(&self) -> Action {
        if self.opening == Some(Op::Request) {
            Action::Close
        } else {
            Action::Reset
        }
    }

    /// How much the guest takes. What it says may be anything: nonsense is no credit.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer.saturating_sub(in_flight)
    }

    fn note_credit(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    fn data(&mut self, len: u32) -> Option<Action> {
        if self.guest_done & SEND != 0 || len > BUFFER - self.waiting() {
            return Some(self.end());
        }
        self.received = self.received.wrapping_add(len);
        if self.host_done & RECEIVE != 0 {
            self.forward(len);
            return None;
        }
        (len > 0).then_some(Action::Deliver)
    }

    fn forward(&mut self, bytes: u32) {
        // Never more than there was.
        let bytes = bytes.min(self.waiting());
        self.forwarded = self.forwarded.wrapping_add(bytes);
        // Early enough that a guest which sends all the time never has to wait for it.
        if self.forwarded.wrapping_sub(self.told_forwarded) >= BUFFER / 2 {
            self.owes_credit = true;
        }
    }

    fn settle(&mut self) -> Option<Action> {
        if self.waiting() > 0 {
            return None;
        }
        if self.guest_done == BOTH {
            return Some(self.end());
        }
        let ends = self.guest_done & SEND != 0 && !self.ended_writing;
        ends.then(|| {
            self.ended_writing = true;
            Action::EndWriting
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(op: Op) -> Header {
        Header {
            op: op as u16,
            buf_alloc: 1000,
            ..Header::default()
        }
    }

    fn open() -> Connection {
        let mut connection = Connection::from_guest(&header(Op::Request));
        connection.paid(Owed::Packet(Op::Response, 0));
        connection
    }

    fn data(len: u32) -> Header {
        Header {
            len,
            ..header(Op::Data)
        }
    }

    #[test]
    fn a_client_is_told_when_the_guest_accepts() {
        let now = Instant::now();
        let mut connection = Connection::from_host(now);
        let request = Owed::Packet(Op::Request, 0);
        assert_eq!(connection.owes(true), Some(request));
        // It can't have accepted what it was not asked.
        assert_eq!(
            connection.clone().packet(&header(Op::Response)),
            Some(Action::Close)
        );
        connection.paid(request);
        assert_eq!(connection.owes(true), None);
        assert_eq!(
            connection.packet(&header(Op::Response)),
            Some(Action::TellClient)
        );
        assert_eq!(connection.deadline(), None);
        assert_eq!(connection.owes(true), Some(Owed::Data(1000)));
    }

    #[test]
    fn a_guest_that_does_not_answer_is_reset() {
        let now = Instant::now();
        let mut connection = Connection::from_host(now);
        assert_eq!(connection.expire(now), None);
        assert_eq!(
            connection.clone().expire(now + PATIENCE),
            Some(Action::Close),
            "it was never asked"
        );
        connection.paid(Owed::Packet(Op::Request, 0));
        assert_eq!(connection.expire(now + PATIENCE), Some(Action::Reset));
    }

    #[test]
    fn credit_limits_what_is_sent() {
        let mut connection = open();
        assert_eq!(connection.owes(false), None);
        connection.paid(Owed::Data(1000));
        let ask = Owed::Packet(Op::CreditRequest, 0);
        assert_eq!(connection.owes(true), Some(ask));
        connection.paid(ask);
        assert_eq!(connection.owes(true), None, "asked once");
        let update = Header {
            fwd_cnt: 10,
            ..header(Op::CreditUpdate)
        };
        assert_eq!(connection.packet(&update), None);
        assert_eq!(connection.owes(true), Some(Owed::Data(10)));
        // More forwarded than was ever sent.
        let nonsense = Header {
            fwd_cnt: 1001,
            ..update
        };
        assert_eq!(connection.packet(&nonsense), None);
        assert_eq!(connection.owes(true), Some(ask));
    }

    #[test]
    fn a_guest_that_ignores_credit_is_reset() {
        let mut connection = open();
        assert_eq!(connection.packet(&data(BUFFER)), Some(Action::Deliver));
        assert_eq!(connection.packet(&data(0)), None);
        assert_eq!(connection.packet(&data(1)), Some(Action::Reset));
    }

    #[test]
    fn the_guest_learns_of_room_before_it_has_none() {
        let now = Instant::now();
        let mut connection = open();
        assert_eq!(connection.packet(&data(BUFFER)), Some(Action::Deliver));
        assert_eq!(connection.host(HostEvent::Wrote(BUFFER / 2 - 1), now), None);
        assert_eq!(connection.owes(false), None);
        assert_eq!(connection.host(HostEvent::Wrote(1), now), None);
        let update = Owed::Packet(Op::CreditUpdate, 0);
        assert_eq!(connection.owes(false), Some(update));
        assert_eq!(connection.own_credit(), (BUFFER, BUFFER / 2));
        connection.paid(update);
        assert_eq!(connection.owes(false), None);
    }

    #[test]
    fn directions_end_one_by_one() {
        let now = Instant::now();
        let shutdown = |flags| Header {
            flags,
            ..header(Op::Shutdown)
        };
        let mut connection = open();
        connection.packet(&data(10));
        assert_eq!(connection.packet(&shutdown(SEND)), None, "not written yet");
        assert_eq!(
            connection.host(HostEvent::Wrote(10), now),
            Some(Action::EndWriting)
        );
        assert_eq!(connection.clone().packet(&data(1)), Some(Action::Reset));
        assert_eq!(connection.owes(true), Some(Owed::Data(1000)));
        assert_eq!(connection.host(HostEvent::Ended, now), None);
        let end = Owed::Packet(Op::Shutdown, SEND);
        assert_eq!(connection.owes(true), Some(end));
        connection.paid(end);
        assert_eq!(connection.owes(true), None);
        assert_eq!(connection.packet(&shutdown(BOTH)), Some(Action::Reset));
    }

    #[test]
    fn a_host_that_is_gone_is_told_and_the_guest_has_its_time() {
        let now = Instant::now();
        let mut connection = open();
        connection.packet(&data(10));
        assert_eq!(connection.host(HostEvent::Stopped, now), None);
        assert_eq!(connection.waiting(), 0);
        assert_eq!(
            connection.owes(true),
            Some(Owed::Packet(Op::Shutdown, RECEIVE))
        );
        assert_eq!(connection.host(HostEvent::Ended, now), None);
        assert_eq!(
            connection.owes(true),
            Some(Owed::Packet(Op::Shutdown, BOTH))
        );
        assert_eq!(connection.packet(&data(10)), None, "discarded");
        assert_eq!(connection.expire(now + PATIENCE), Some(Action::Reset));
        assert_eq!(connection.packet(&header(Op::Reset)), Some(Action::Close));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Packet(Header),
        Host(HostEvent),
        Pay(bool, u32),
        Later,
    }

    fn step() -> impl Strategy<Value = Step> {
        let amount = prop_oneof![0..2000u32, Just(BUFFER), any::<u32>()];
        let packet = (
            0..9u16,
            amount.clone(),
            0..5u32,
            amount.clone(),
            amount.clone(),
        )
            .prop_map(|(op, len, flags, buf_alloc, fwd_cnt)| {
                Step::Packet(Header {
                    len,
                    op,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                    ..Header::default()
                })
            });
        prop_oneof![
            8 => packet,
            4 => amount.clone().prop_map(|n| Step::Host(HostEvent::Wrote(n))),
            1 => Just(Step::Host(HostEvent::Ended)),
            1 => Just(Step::Host(HostEvent::Stopped)),
            8 => (any::<bool>(), amount).prop_map(|(readable, n)| Step::Pay(readable, n)),
            1 => Just(Step::Later),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_the_limits_hold(
            by_host in any::<bool>(),
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let mut now = Instant::now();
            let mut connection = if by_host {
                Connection::from_host(now)
            } else {
                Connection::from_guest(&header(Op::Request))
            };
            let mut in_host = 0u64;
            let (mut told, mut ended) = (false, 0);
            for step in steps {
                let action = match step {
                    Step::Packet(header) => {
                        let action = connection.packet(&header);
                        if action == Some(Action::Deliver) {
                            in_host += u64::from(header.len);
                            prop_assert!(header.len > 0);
                        }
                        action
                    }
                    Step::Host(event) => {
                        let before = connection.waiting();
                        let action = connection.host(event, now);
                        in_host -= u64::from(before - connection.waiting());
                        action
                    }
                    Step::Pay(readable, n) => {
                        if let Some(owed) = connection.owes(readable) {
                            let owed = match owed {
                                Owed::Data(most) => {
                                    prop_assert!(readable && most > 0);
                                    prop_assert!(most <= connection.peer_buffer);
                                    prop_assert_eq!(connection.host_done & SEND, 0);
                                    Owed::Data(most.min(n))
                                }
                                packet @ Owed::Packet(..) => packet,
                            };
                            connection.paid(owed);
                        }
                        None
                    }
                    Step::Later => {
                        now += PATIENCE;
                        connection.expire(now)
                    }
                };
                prop_assert!(connection.waiting() <= BUFFER);
                prop_assert_eq!(u64::from(connection.waiting()), in_host);
                match action {
                    Some(Action::Reset | Action::Close) => break,
                    Some(Action::TellClient) => {
                        prop_assert!(by_host && !told);
                        told = true;
                    }
                    Some(Action::EndWriting) => {
                        ended += 1;
                        prop_assert_eq!(connection.waiting(), 0);
                    }
                    _ => {}
                }
                prop_assert!(ended <= 1);
            }
        }

        #[test]
        fn a_stream_of_any_length_arrives(total in 0..2_000_000u32, part in 1..70_000u32) {
            // A guest that keeps to the rules and a host that takes all at once.
            let now = Instant::now();
            let mut connection = open();
            let (mut sent, mut arrived, mut known) = (0u32, 0u32, 0u32);
            while arrived < total {
                let credit = BUFFER - (sent - known);
                let len = part.min(credit).min(total - sent);
                prop_assert!(len > 0, "stuck at {arrived} of {total}");
                prop_assert_eq!(connection.packet(&data(len)), Some(Action::Deliver));
                sent += len;
                prop_assert_eq!(connection.host(HostEvent::Wrote(len), now), None);
                arrived += len;
                while let Some(owed) = connection.owes(false) {
                    connection.paid(owed);
                    known = connection.own_credit().1;
                }
            }
        }
    }
}
