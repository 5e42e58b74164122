//! The device end to end: a guest's queues on one side, real sockets on the other.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::connection::BUFFER;
use super::packet::{HEADER_BYTES, HOST_CID, Header, Op, RECEIVE, SEND, STREAM};
use super::*;
use crate::virtio::testing::{Driver, MEMORY, Piece, Sent};

const RX: usize = 0;
const TX: usize = 1;
const CID: u64 = 3;
const DEADLINE: Duration = Duration::from_secs(20);

/// A guest's driver, without a guest.
struct Guest {
    driver: Driver,
    device: VsockDevice,
    rooms: Vec<Sent>,
    dir: TempDir,
}

fn spec(dir: &TempDir) -> VsockSpec {
    VsockSpec {
        id: "vsock0".into(),
        cid: CID,
        socket: dir.path().join("v"),
    }
}

impl Guest {
    /// One with room for this many packets.
    fn start(rooms: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = VsockDevice::open(spec(&dir)).unwrap();
        let mut driver = Driver::new(&device);
        driver.start(&device, device.features()).unwrap();
        let mut guest = Self {
            driver,
            device,
            rooms: Vec::new(),
            dir,
        };
        guest.make_room(rooms);
        guest
    }

    fn make_room(&mut self, rooms: usize) {
        for _ in 0..rooms {
            let pieces = [Piece::Writable(44), Piece::Writable(4096)];
            self.rooms.push(self.driver.send(RX, &pieces));
        }
    }

    /// The next packet of the host; the room is made again.
    fn recv(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.driver.used(RX);
        self.packet(head, len)
    }

    fn packet(&mut self, head: u16, len: u32) -> (Header, Vec<u8>) {
        let at = self.rooms.iter().position(|r| r.head == head).unwrap();
        let room = self.rooms.remove(at);
        let mut bytes: Vec<u8> = room
            .buffers
            .iter()
            .flat_map(|buffer| self.driver.bytes(*buffer))
            .collect();
        bytes.truncate(len as usize);
        let header = Header::from_bytes(bytes.first_chunk::<HEADER_BYTES>().unwrap());
        let data = bytes.split_off(HEADER_BYTES);
        assert_eq!(header.len as usize, data.len());
        assert_eq!(header.dst_cid, CID);
        self.make_room(1);
        (header, data)
    }

    fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, data) = self.recv();
        assert_eq!(header.op(), Some(op), "{header:?}");
        (header, data)
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let mut pieces = vec![Piece::Readable(header.to_bytes().to_vec())];
        if !data.is_empty() {
            pieces.push(Piece::Readable(data.to_vec()));
        }
        self.send_chain(&pieces);
    }

    fn send_chain(&mut self, pieces: &[Piece]) {
        let sent = self.driver.send(TX, pieces);
        assert_eq!(self.driver.used(TX), (sent.head, 0));
    }

    fn client(&self) -> BufReader<UnixStream> {
        let client = UnixStream::connect(self.device.socket()).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        BufReader::new(client)
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.device.counters();
        counters.iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn listener(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    /// Opens a connection to a port of the host; the host's end, and the header to send with.
    fn open(&mut self, port: u32) -> (UnixStream, Header) {
        let listener = self.listener(port);
        let to_host = header(Op::Request, 1000, port);
        self.send(to_host, b"");
        let (response, _) = self.expect(Op::Response);
        assert_eq!((response.src_port, response.dst_port), (port, 1000));
        assert_eq!(response.src_cid, HOST_CID);
        assert_eq!((response.buf_alloc, response.fwd_cnt), (BUFFER, 0));
        let stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        (stream, to_host)
    }

    /// Opens a connection from a client of the host.
    fn opened_by_client(&mut self, port: u32) -> (BufReader<UnixStream>, Header) {
        let mut client = self.client();
        client
            .get_mut()
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let (request, _) = self.expect(Op::Request);
        assert_eq!(request.dst_port, port);
        let to_host = header(Op::Response, port, request.src_port);
        self.send(to_host, b"");
        let mut line = String::new();
        client.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port));
        (client, to_host)
    }
}

/// A packet of the guest with room for 64 KiB.
fn header(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: STREAM,
        op: op as u16,
        buf_alloc: BUFFER,
        ..Header::default()
    }
}

fn as_op(op: Op, like: Header) -> Header {
    Header {
        op: op as u16,
        ..like
    }
}

fn data(bytes: &[u8], like: Header) -> Header {
    Header {
        len: u32::try_from(bytes.len()).unwrap(),
        ..as_op(Op::Data, like)
    }
}

fn read_exactly(stream: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

#[test]
fn a_client_of_the_host_talks_with_the_guest() {
    let mut guest = Guest::start(8);
    let (mut client, to_host) = guest.opened_by_client(52);
    client.get_mut().write_all(b"hello guest").unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"hello guest");
    guest.send(data(b"hello host", to_host), b"hello host");
    assert_eq!(read_exactly(&mut client, 10), b"hello host");
    assert_eq!(guest.counter("connections"), 1);
    assert_eq!(guest.counter("rx_bytes"), 11);
    assert_eq!(guest.counter("tx_bytes"), 10);
}

#[test]
fn what_a_client_sends_with_its_first_line_is_for_the_guest() {
    let mut guest = Guest::start(8);
    let mut client = guest.client();
    client.get_mut().write_all(b"CONNECT 7\nearly").unwrap();
    let (request, _) = guest.expect(Op::Request);
    guest.send(header(Op::Response, 7, request.src_port), b"");
    assert_eq!(guest.expect(Op::Data).1, b"early");
}

#[test]
fn the_guest_talks_with_a_socket_of_the_host() {
    let mut guest = Guest::start(8);
    let (mut stream, to_host) = guest.open(9000);
    guest.send(data(b"ping", to_host), b"ping");
    assert_eq!(read_exactly(&mut stream, 4), b"ping");
    stream.write_all(b"pong").unwrap();
    let (header, bytes) = guest.expect(Op::Data);
    assert_eq!(bytes, b"pong");
    assert_eq!(header.fwd_cnt, 4, "the ping was passed on");
}

#[test]
fn two_connections_do_not_mix() {
    let mut guest = Guest::start(8);
    let (mut one, to_one) = guest.opened_by_client(1);
    let (mut two, to_two) = guest.opened_by_client(1);
    assert_ne!(to_one.dst_port, to_two.dst_port);
    guest.send(data(b"for two", to_two), b"for two");
    guest.send(data(b"for one", to_one), b"for one");
    assert_eq!(read_exactly(&mut one, 7), b"for one");
    assert_eq!(read_exactly(&mut two, 7), b"for two");
}

#[test]
fn a_port_nobody_listens_on_is_refused() {
    let mut guest = Guest::start(8);
    guest.send(header(Op::Request, 1000, 77), b"");
    let (reset, _) = guest.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (77, 1000));
    // A socket that was left there, and something else.
    drop(guest.listener(78));
    std::fs::write(guest.dir.path().join("v_79"), "").unwrap();
    for port in [78, 79] {
        guest.send(header(Op::Request, 1000, port), b"");
        guest.expect(Op::Reset);
    }
    assert_eq!(guest.counter("connections"), 0);
}

#[test]
fn a_host_that_has_no_time_for_a_connection_refuses_it() {
    let mut guest = Guest::start(8);
    let _listener = guest.listener(80);
    // Nobody accepts: the kernel's queue fills, and connecting must not wait for it.
    let mut port = 1000;
    loop {
        port += 1;
        guest.send(header(Op::Request, port, 80), b"");
        match guest.recv().0.op() {
            Some(Op::Response) => {}
            Some(Op::Reset) => break,
            other => panic!("{other:?}"),
        }
        // The queue's length is the host's setting; so is this device's own limit.
        assert!(port < 1000 + 1023 + 1);
    }
}

#[test]
fn a_guest_that_refuses_ends_the_client() {
    let mut guest = Guest::start(8);
    let mut client = guest.client();
    client.get_mut().write_all(b"CONNECT 52\n").unwrap();
    let (request, _) = guest.expect(Op::Request);
    guest.send(header(Op::Reset, 52, request.src_port), b"");
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"");
}

#[test]
fn a_guest_that_does_not_answer_ends_the_client() {
    let mut guest = Guest::start(8);
    let mut client = guest.client();
    let began = Instant::now();
    client.get_mut().write_all(b"CONNECT 52\n").unwrap();
    guest.expect(Op::Request);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert!(began.elapsed() >= Duration::from_secs(2));
    guest.expect(Op::Reset);
}

#[test]
fn a_client_that_does_not_say_what_it_wants_is_ended() {
    let guest = Guest::start(8);
    let mut silent = guest.client();
    let mut half = guest.client();
    half.get_mut().write_all(b"CONNECT 5").unwrap();
    let mut strange = guest.client();
    strange.get_mut().write_all(b"GET / HTTP/1.1\r\n").unwrap();
    for client in [&mut strange, &mut half, &mut silent] {
        // Closed with what it said unread, which the kernel may call a reset.
        match client.read(&mut [0]) {
            Ok(0) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(guest.counter("connections"), 0);
}

#[test]
fn the_guest_may_end_its_direction_alone() {
    let mut guest = Guest::start(8);
    let (mut stream, to_host) = guest.open(9000);
    guest.send(data(b"last words", to_host), b"last words");
    let end = Header {
        flags: SEND,
        ..as_op(Op::Shutdown, to_host)
    };
    guest.send(end, b"");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last words");
    // The other direction goes on.
    stream.write_all(b"I heard").unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"I heard");
    guest.send(
        Header {
            flags: SEND | RECEIVE,
            ..end
        },
        b"",
    );
    guest.expect(Op::Reset);
    assert!(stream.write_all(b"x").is_err() || stream.read(&mut [0]).unwrap_or(0) == 0);
}

#[test]
fn the_host_may_end_its_direction_alone() {
    let mut guest = Guest::start(8);
    let (mut stream, to_host) = guest.open(9000);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"last words");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SEND);
    guest.send(data(b"I heard", to_host), b"I heard");
    assert_eq!(read_exactly(&mut stream, 7), b"I heard");
    // Then it goes away altogether.
    drop(stream);
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SEND | RECEIVE);
    guest.send(as_op(Op::Reset, to_host), b"");
    // The ports are free again.
    std::fs::remove_file(guest.dir.path().join("v_9000")).unwrap();
    guest.open(9000);
}

#[test]
fn a_guest_that_does_not_end_what_the_host_has_left_is_reset() {
    let mut guest = Guest::start(8);
    let (stream, _) = guest.open(9000);
    drop(stream);
    let mut flags = 0;
    while flags != SEND | RECEIVE {
        flags = guest.expect(Op::Shutdown).0.flags;
    }
    guest.expect(Op::Reset);
}

#[test]
fn the_host_sends_no_more_than_the_guest_takes() {
    let mut guest = Guest::start(8);
    let listener = guest.listener(9000);
    let small = Header {
        buf_alloc: 100,
        ..header(Op::Request, 1000, 9000)
    };
    guest.send(small, b"");
    guest.expect(Op::Response);
    let mut stream = listener.accept().unwrap().0;
    let all = pattern(250);
    stream.write_all(&all).unwrap();
    let mut got = guest.expect(Op::Data).1;
    assert_eq!(got.len(), 100);
    for taken in [100, 200] {
        guest.expect(Op::CreditRequest);
        assert_eq!(guest.driver.used_now(RX), None, "nothing without credit");
        let update = Header {
            fwd_cnt: taken,
            ..as_op(Op::CreditUpdate, small)
        };
        guest.send(update, b"");
        got.extend(guest.expect(Op::Data).1);
    }
    assert_eq!(got, all);
}

#[test]
fn a_host_that_does_not_read_is_waited_for_within_bounds() {
    let mut guest = Guest::start(8);
    let (mut stream, to_host) = guest.open(9000);
    // The socket's buffer and then the connection's own. A guest that keeps to the rules stops in time.
    let part = pattern(4096);
    let (mut sent, mut passed_on) = (0u32, 0u32);
    loop {
        while let Some((head, len)) = guest.driver.used_now(RX) {
            passed_on = guest.packet(head, len).0.fwd_cnt;
        }
        if sent - passed_on + 4096 > BUFFER {
            // Told on request; what was written before is known then.
            guest.send(as_op(Op::CreditRequest, to_host), b"");
            let mut update = guest.recv().0;
            while let Some((head, len)) = guest.driver.used_now(RX) {
                update = guest.packet(head, len).0;
            }
            passed_on = update.fwd_cnt;
            if sent - passed_on + 4096 > BUFFER {
                break;
            }
        }
        guest.send(data(&part, to_host), &part);
        sent += 4096;
    }
    // The host reads: all of it arrives, and the guest is told that there is room.
    let got = read_exactly(&mut stream, sent as usize);
    assert!(got.chunks(4096).all(|chunk| chunk == part));
    let mut known = passed_on;
    while known < sent - BUFFER / 2 {
        known = guest.expect(Op::CreditUpdate).0.fwd_cnt;
    }
    guest.send(data(b"more", to_host), b"more");
    assert_eq!(read_exactly(&mut stream, 4), b"more");
}

#[test]
fn a_guest_that_ignores_credit_loses_that_connection_only() {
    let mut guest = Guest::start(8);
    let (stream, to_host) = guest.open(9000);
    let (mut other, to_other) = guest.opened_by_client(52);
    let part = pattern(32 * 1024);
    loop {
        guest.send(data(&part, to_host), &part);
        if let Some((head, len)) = guest.driver.used_now(RX) {
            let header = guest.packet(head, len).0;
            if header.op() == Some(Op::Reset) {
                assert_eq!(header.dst_port, 1000);
                break;
            }
        }
    }
    drop(stream);
    guest.send(data(b"still here", to_other), b"still here");
    assert_eq!(read_exactly(&mut other, 10), b"still here");
}

#[test]
fn data_in_many_pieces_arrives() {
    let mut guest = Guest::start(8);
    let (mut stream, to_host) = guest.open(9000);
    let all = pattern(3000);
    let mut bytes = data(&all, to_host).to_bytes().to_vec();
    bytes.extend(&all);
    let mut pieces = Vec::new();
    let mut from = 0;
    for to in [1, 40, 50, 51, 1000, bytes.len()] {
        pieces.push(Piece::Readable(bytes[from..to].to_vec()));
        from = to;
    }
    guest.send_chain(&pieces);
    assert_eq!(read_exactly(&mut stream, 3000), all);
}

#[test]
fn hostile_packets_harm_their_connection_only() {
    let mut guest = Guest::start(16);
    let (mut other, to_other) = guest.opened_by_client(52);
    let listener = guest.listener(9000);
    let request = header(Op::Request, 1000, 9000);
    let bad_op = |op| Header { op, ..request };
    let longer = Header {
        len: 100,
        ..as_op(Op::Data, request)
    };
    let whole = |header: Header| Piece::Readable(header.to_bytes().to_vec());
    let hostile = [
        vec![whole(bad_op(0))],
        vec![whole(bad_op(8))],
        vec![whole(bad_op(u16::MAX))],
        vec![whole(request)],
        vec![whole(as_op(Op::Response, request))],
        vec![whole(longer)],
        vec![whole(longer), Piece::Readable(vec![0; 99])],
        vec![whole(longer), Piece::Raw(MEMORY - 50, 100, 0, 0)],
        vec![whole(longer), Piece::Raw(u64::MAX - 50, 100, 0, 0)],
        vec![whole(longer), Piece::Writable(100)],
        vec![whole(Header {
            len: u32::MAX,
            ..longer
        })],
    ];
    for chain in hostile {
        guest.send(request, b"");
        guest.expect(Op::Response);
        let mut stream = listener.accept().unwrap().0;
        guest.send_chain(&chain);
        guest.expect(Op::Reset);
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{chain:?}");
    }
    guest.send(data(b"still here", to_other), b"still here");
    assert_eq!(read_exactly(&mut other, 10), b"still here");
}

#[test]
fn packets_of_no_connection_are_refused_or_dropped() {
    let mut guest = Guest::start(8);
    let nobody = header(Op::Data, 5, 6);
    guest.send(nobody, b"");
    let (reset, _) = guest.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (6, 5));
    // To another guest; of a type that is not offered.
    guest.send(
        Header {
            dst_cid: 99,
            ..nobody
        },
        b"",
    );
    assert_eq!(guest.expect(Op::Reset).0.src_cid, 99);
    guest.send(Header { kind: 2, ..nobody }, b"");
    assert_eq!(guest.expect(Op::Reset).0.kind, 2);
    // A reset is not answered, nor is a packet of somebody else, nor what is no packet.
    guest.send(as_op(Op::Reset, nobody), b"");
    guest.send(
        Header {
            src_cid: 4,
            ..nobody
        },
        b"",
    );
    guest.send_chain(&[Piece::Readable(vec![0; 43])]);
    guest.send_chain(&[Piece::Writable(100)]);
    guest.send_chain(&[Piece::Raw(MEMORY, 44, 0, 0)]);
    guest.send(Header { op: 99, ..nobody }, b"");
    guest.expect(Op::Reset);
    assert_eq!(guest.counter("tx_drops"), 4);
}

#[test]
fn a_guest_without_room_for_answers_is_heard_when_it_makes_some() {
    let mut guest = Guest::start(0);
    let nobody = header(Op::Data, 5, 6);
    let sent: Vec<_> = (0..200)
        .map(|_| {
            let piece = Piece::Readable(nobody.to_bytes().to_vec());
            guest.driver.send(TX, &[piece]).head
        })
        .collect();
    for head in sent {
        assert_eq!(guest.driver.used(TX).0, head);
    }
    // The answers that are kept are bounded: from here on packets wait.
    let sent: Vec<_> = (0..200)
        .map(|_| {
            let piece = Piece::Readable(nobody.to_bytes().to_vec());
            guest.driver.send(TX, &[piece]).head
        })
        .collect();
    for head in &sent[..56] {
        assert_eq!(guest.driver.used(TX).0, *head);
    }
    guest.make_room(100);
    for _ in 0..400 {
        guest.expect(Op::Reset);
    }
    for head in &sent[56..] {
        assert_eq!(guest.driver.used(TX).0, *head);
    }
}

#[test]
fn room_that_is_none_comes_back_empty() {
    let mut guest = Guest::start(0);
    let hostile = [
        vec![Piece::Writable(44)],
        vec![Piece::Readable(vec![0; 4096])],
        vec![Piece::Raw(MEMORY - 50, 4096, 2, 0)],
    ];
    guest.send(header(Op::Data, 5, 6), b"");
    for pieces in hostile {
        let sent = guest.driver.send(RX, &pieces);
        assert_eq!(guest.driver.used(RX), (sent.head, 0));
    }
    guest.make_room(1);
    guest.expect(Op::Reset);
}

#[test]
fn there_are_no_more_connections_than_the_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    // Both ends of each are in this process.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();

    let mut guest = Guest::start(8);
    let mut clients: Vec<_> = (0..1023).map(|_| guest.opened_by_client(52)).collect();
    let mut late = guest.client();
    assert_eq!(late.read(&mut [0]).unwrap(), 0, "refused");
    let _listener = guest.listener(9000);
    let request = header(Op::Request, 1000, 9000);
    guest.send(request, b"");
    guest.expect(Op::Reset);
    // Those that there are go on, and one that ends makes room for another.
    let (client, to_host) = &mut clients[1000];
    guest.send(data(b"still here", *to_host), b"still here");
    assert_eq!(read_exactly(client, 10), b"still here");
    guest.send(as_op(Op::Reset, *to_host), b"");
    guest.send(request, b"");
    guest.expect(Op::Response);
}

#[test]
fn a_broken_ring_is_an_error_of_the_device_once() {
    let mut guest = Guest::start(8);
    let (mut client, _) = guest.opened_by_client(52);
    guest.driver.set_available_index(TX, 5000);
    guest.driver.ring(TX);
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "its connections end");
    guest.driver.ring(TX);
    guest.driver.stop();
    let said = guest.driver.said.resets_needed.load(Ordering::SeqCst);
    assert_eq!(said, 1);
}

#[test]
fn a_reset_ends_connections_and_the_next_driver_has_the_socket() {
    let mut guest = Guest::start(8);
    let (mut client, _) = guest.opened_by_client(52);
    guest.driver.stop();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    // A client of the time in between is served by the next driver.
    let mut early = guest.client();
    early.get_mut().write_all(b"CONNECT 5\n").unwrap();
    guest.driver = Driver::new(&guest.device);
    guest.rooms.clear();
    guest.driver.start(&guest.device, 0).unwrap();
    guest.make_room(4);
    assert_eq!(guest.expect(Op::Request).0.dst_port, 5);
}

#[test]
fn both_data_queues_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    let device = VsockDevice::open(spec(&dir)).unwrap();
    let driver = Driver::new(&device);
    for index in 0..2u16 {
        let mut activation = driver.activation(0);
        activation.queues[usize::from(index)] = None;
        let error = device.activate(activation).err().unwrap();
        assert!(
            matches!(error, ActivateError::MissingQueue { index: i } if i == index),
            "{error}"
        );
    }
    // Events there are none.
    let mut activation = driver.activation(0);
    activation.queues[2] = None;
    assert!(device.activate(activation).is_ok());
}

#[test]
fn configuration_and_name_follow_the_spec() {
    let dir = tempfile::tempdir().unwrap();
    let open = |id: &str, cid, name: &str| {
        let socket = dir.path().join(name);
        VsockDevice::open(VsockSpec {
            id: id.into(),
            cid,
            socket,
        })
        .unwrap()
    };
    let device = open("_vsock7", 0x0102_0304, "a");
    let mut cid = [0; 8];
    device.config_read(0, &mut cid);
    assert_eq!(cid, [4, 3, 2, 1, 0, 0, 0, 0]);
    assert_eq!(device.thread_name(), "_vsock7");
    assert_eq!(open("vs", CID, "b").thread_name(), "_vsockvs");
    assert_eq!(
        open("a-rather-long-name", CID, "c").thread_name(),
        "_vsocka-rather-"
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    for cid in [0, 1, 2, ANY_CID, ANY_CID + 1, u64::MAX] {
        let error = VsockDevice::open(VsockSpec { cid, ..spec(&dir) }).unwrap_err();
        assert!(matches!(error, VsockOpenError::Cid { .. }), "{error}");
        assert!(!path.exists());
    }
    let socket = dir.path().join("x".repeat(100));
    let error = VsockDevice::open(VsockSpec {
        socket,
        ..spec(&dir)
    })
    .unwrap_err();
    assert!(error.to_string().contains("at most 96"), "{error}");
    let error = VsockDevice::open(VsockSpec {
        socket: dir.path().join("no/v"),
        ..spec(&dir)
    })
    .unwrap_err();
    assert!(matches!(error, VsockOpenError::Bind { .. }), "{error}");
}

#[test]
fn a_path_that_is_taken_is_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let refused = || VsockDevice::open(spec(&dir)).unwrap_err();
    std::fs::write(&path, "mine").unwrap();
    let error = refused();
    assert!(
        matches!(error, VsockOpenError::NotASocket { .. }),
        "{error}"
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    std::fs::remove_file(&path).unwrap();

    let listener = UnixListener::bind(&path).unwrap();
    let error = refused();
    assert!(matches!(error, VsockOpenError::InUse { .. }), "{error}");
    drop(listener);
    let error = refused();
    assert!(
        error
            .to_string()
            .contains(&format!("`rm {}`", path.display())),
        "{error}"
    );
    assert!(path.exists());
}

#[test]
fn the_socket_goes_with_the_device_and_nothing_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    drop(VsockDevice::open(spec(&dir)).unwrap());
    assert!(!path.exists());
    let device = VsockDevice::open(spec(&dir)).unwrap();
    std::fs::rename(&path, dir.path().join("moved")).unwrap();
    std::fs::write(&path, "somebody else's").unwrap();
    drop(device);
    assert!(path.exists());
}
