//! Both ends of conversations over TCP and unix sockets, on the emulated host and in its guests.
//!
//! Transfers start with a byte that says who sends, and the number of bytes; the server answers what it has received with
//! that number, so the sender's clock stops when everything has arrived and not when it is in a buffer.

use std::fs;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use lab_agent::guest_protocol::{RateReport, pattern_word};

use crate::wait;

/// A peer that says nothing for so long is taken for dead.
pub(crate) const SILENCE: Duration = Duration::from_mins(1);
/// Longest transfer that a server takes part in.
const TRANSFER_LIMIT_BYTES: u64 = 1 << 32;
const CHUNK_BYTES: usize = 64 * 1024;
const WORD_BYTES: u64 = 8;

/// Who sends in a transfer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Sender {
    Client,
    Server,
}

/// Sends back what comes, until the other end has no more.
pub(crate) fn echo(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..length])?;
        to.flush()?;
    }
}

/// Echoes TCP connections for as long as this process lives.
pub(crate) fn serve_tcp_echo(port: u16) -> Result<(), String> {
    let listener = TcpListener::bind(("0.0.0.0", port))
        .map_err(|error| format!("cannot listen on TCP port {port}: {error}"))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || echo(&mut stream.try_clone()?, &mut stream));
        }
    });
    Ok(())
}

/// Says a line on a connection and gives the line that comes back.
pub(crate) fn ask(stream: &mut (impl Read + Write), text: &str) -> io::Result<String> {
    stream.write_all(format!("{text}\n").as_bytes())?;
    stream.flush()?;
    read_line(stream)
}

/// Reads a line byte by byte, so that nothing after it is taken.
fn read_line(stream: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        line.push(byte[0]);
    }
}

pub(crate) fn connect_tcp(address: &str) -> Result<TcpStream, String> {
    let failed = |error: io::Error| format!("cannot connect to {address}: {error}");
    let address = address
        .to_socket_addrs()
        .map_err(failed)?
        .next()
        .ok_or("no address")?;
    let stream = TcpStream::connect_timeout(&address, SILENCE).map_err(failed)?;
    stream.set_read_timeout(Some(SILENCE)).map_err(failed)?;
    stream.set_write_timeout(Some(SILENCE)).map_err(failed)?;
    Ok(stream)
}

/// Moves `bytes` between here and a transfer server.
pub(crate) fn transfer(address: &str, sender: Sender, bytes: u64) -> Result<RateReport, String> {
    let failed = |error: io::Error| format!("the transfer with {address} failed: {error}");
    let mut stream = connect_tcp(address)?;
    let mut head = vec![u8::from(sender == Sender::Server)];
    head.extend(bytes.to_le_bytes());
    let began = Instant::now();
    stream.write_all(&head).map_err(failed)?;
    let arrived = if sender == Sender::Client {
        send(&mut stream, bytes).map_err(failed)?;
        let mut count = [0; 8];
        stream.read_exact(&mut count).map_err(failed)?;
        u64::from_le_bytes(count)
    } else {
        io::copy(&mut stream, &mut io::sink()).map_err(failed)?
    };
    if arrived != bytes {
        return Err(format!("{arrived} of {bytes} bytes have arrived"));
    }
    Ok(RateReport {
        operations: 1,
        bytes,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Sends a pattern to an echo and compares what comes back, both at once.
pub(crate) fn there_and_back(address: &str, bytes: u64, seed: u64) -> Result<RateReport, String> {
    let mut from = connect_tcp(address)?;
    let failed = |error: io::Error| format!("the echo at {address} failed: {error}");
    let mut to = from.try_clone().map_err(failed)?;
    let words = bytes / WORD_BYTES;
    let began = Instant::now();
    let sender = thread::spawn(move || send_words(&mut to, words, seed));
    let mut word = [0; 8];
    let mut buffered = BufReader::with_capacity(CHUNK_BYTES, &mut from);
    for index in 0..words {
        buffered.read_exact(&mut word).map_err(|error| {
            format!("{}: {index} of {words} words have come back", failed(error))
        })?;
        if u64::from_le_bytes(word) != pattern_word(index, seed) {
            return Err(format!(
                "word {index} has come back from {address} as {word:02x?}"
            ));
        }
    }
    let sent = sender.join().map_err(|_| "the sender panicked")?;
    sent.map_err(failed)?;
    Ok(RateReport {
        operations: 1,
        bytes: words * WORD_BYTES,
        seconds: began.elapsed().as_secs_f64(),
    })
}

fn send_words(stream: &mut TcpStream, words: u64, seed: u64) -> io::Result<()> {
    let mut buffered = BufWriter::with_capacity(CHUNK_BYTES, stream);
    (0..words)
        .try_for_each(|index| buffered.write_all(&pattern_word(index, seed).to_le_bytes()))?;
    buffered.flush()
}

fn send(stream: &mut TcpStream, bytes: u64) -> io::Result<()> {
    let chunk = vec![0x5a; CHUNK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let length = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        stream.write_all(&chunk[..length])?;
        left -= length as u64;
    }
    Ok(())
}

fn serve_transfer(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let [sender, count @ ..] = head;
    let bytes = u64::from_le_bytes(count).min(TRANSFER_LIMIT_BYTES);
    if sender == 1 {
        return send(stream, bytes);
    }
    let received = io::copy(&mut stream.try_clone()?.take(bytes), &mut io::sink())?;
    stream.write_all(&received.to_le_bytes())
}

/// Serves transfers for as long as this process lives; says `serving` when it does.
pub(crate) fn serve_transfers(address: &str) -> Result<(), String> {
    let listener = TcpListener::bind(address)
        .map_err(|error| format!("cannot listen on {address}: {error}"))?;
    println!("serving");
    for stream in listener.incoming() {
        let mut stream = stream.map_err(|error| format!("cannot accept on {address}: {error}"))?;
        thread::spawn(move || serve_transfer(&mut stream));
    }
    Ok(())
}

/// Echoes on a unix socket for as long as this process lives; says `serving` when it does.
pub(crate) fn serve_unix_echo(path: &str) -> Result<(), String> {
    let failed = |error: io::Error| format!("cannot listen on {path}: {error}");
    let listener = UnixListener::bind(path).map_err(failed)?;
    println!("serving");
    for stream in listener.incoming() {
        let mut stream = stream.map_err(failed)?;
        thread::spawn(move || echo(&mut stream.try_clone()?, &mut stream));
    }
    Ok(())
}

/// Waits until somebody listens on a unix socket.
pub(crate) fn await_unix(path: &str, deadline: Duration) -> Result<(), String> {
    let mut last = String::new();
    let connected = wait::until(deadline, || match UnixStream::connect(path) {
        Ok(_) => Some(()),
        Err(error) => {
            last = error.to_string();
            None
        }
    });
    connected.ok_or_else(|| {
        let exists = if fs::exists(path).unwrap_or(false) {
            "exists"
        } else {
            "does not exist"
        };
        format!("nobody listens on {path}, which {exists}: {last}")
    })
}

/// Reaches a guest's port through the unix socket of its vsock device, says a line and gives the one that comes back.
pub(crate) fn ask_guest(path: &str, port: u32, text: &str) -> Result<String, String> {
    let failed = |error: io::Error| format!("{path}, port {port}: {error}");
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    stream.set_read_timeout(Some(SILENCE)).map_err(failed)?;
    let greeting = ask(&mut stream, &format!("CONNECT {port}")).map_err(failed)?;
    if !greeting.starts_with("OK ") {
        return Err(format!("{path} answers CONNECT {port} with {greeting:?}"));
    }
    ask(&mut stream, text).map_err(failed)
}

/// One HTTP/1.1 exchange on a unix socket, as it is on the wire: for requests that no well-behaved client makes.
pub(crate) fn http(
    path: &str,
    method: &str,
    target: &str,
    body: &str,
    silence: Duration,
) -> Result<String, String> {
    let failed = |error: io::Error| format!("{path}: {error}");
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    stream.set_read_timeout(Some(silence)).map_err(failed)?;
    let length = body.len();
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = BufReader::new(stream);
    let mut status = String::new();
    answer.read_line(&mut status).map_err(failed)?;
    let mut rest = String::new();
    answer.read_to_string(&mut rest).map_err(failed)?;
    let body = rest.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let status = status.split_whitespace().nth(1).unwrap_or("none");
    Ok(format!("{status}\n{body}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_are_counted_at_the_far_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = thread::spawn(move || {
            for _ in 0..2 {
                serve_transfer(&mut listener.accept().unwrap().0).unwrap();
            }
        });
        for sender in [Sender::Client, Sender::Server] {
            let report = transfer(&address, sender, 300_001).unwrap();
            assert_eq!(report.bytes, 300_001, "{sender:?}");
        }
        server.join().unwrap();
    }

    #[test]
    fn what_comes_back_is_compared() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            echo(&mut stream.try_clone().unwrap(), &mut stream).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[0; 8]).unwrap();
        });
        assert_eq!(there_and_back(&address, 800_000, 3).unwrap().bytes, 800_000);
        let message = there_and_back(&address, 8, 3).unwrap_err();
        assert!(message.contains("word 0"), "{message}");
        server.join().unwrap();
    }

    #[test]
    fn a_line_is_echoed() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || echo(&mut &far, &mut &far));
        assert_eq!(ask(&mut near, "hello").unwrap(), "hello");
        drop(near);
        server.join().unwrap().unwrap();
    }

    #[test]
    fn a_socket_that_nobody_made_is_told() {
        let message = await_unix("/nowhere/socket", Duration::ZERO).unwrap_err();
        assert!(message.contains("does not exist"), "{message}");
    }
}
