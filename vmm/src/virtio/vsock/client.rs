//! A client of the host's socket that has not said yet which port of the guest it wants: `CONNECT PORT\n`.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{RecvFlags, recv};

/// `CONNECT 4294967295\r\n`, and some room for spaces.
const LONGEST_LINE: usize = 32;

/// What the client has said so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Not all of it.
    Part,
    /// The port.
    Port(u32),
    /// Nothing that is understood, or it went away.
    Nonsense,
}

/// The client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) stream: UnixStream,
    /// Until when it may take to say it.
    pub(super) deadline: Instant,
}

impl Client {
    /// Takes the line, and not a byte of what follows: that is for the guest.
    pub(super) fn listen(&mut self) -> Said {
        let mut line = [0; LONGEST_LINE];
        let len = match recv(&self.stream, &mut line[..], RecvFlags::PEEK) {
            Ok((0, _)) => return Said::Nonsense,
            Ok((len, _)) => len,
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::WouldBlock => {
                return Said::Part;
            }
            Err(_) => return Said::Nonsense,
        };
        let Some(end) = line[..len].iter().position(|b| *b == b'\n') else {
            return if len < LONGEST_LINE {
                Said::Part
            } else {
                Said::Nonsense
            };
        };
        // What was seen is there.
        match (
            port(&line[..end]),
            self.stream.read(&mut [0; LONGEST_LINE][..=end]),
        ) {
            (Some(port), Ok(taken)) if taken == end + 1 => Said::Port(port),
            _ => Said::Nonsense,
        }
    }
}

fn port(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    if words.next().is_some() || !command.eq_ignore_ascii_case("CONNECT") {
        return None;
    }
    // `parse` takes a sign too.
    port.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_line_names_a_port() {
        for line in ["CONNECT 52", "connect 52", "CONNECT 52\r", " CONNECT  52 "] {
            assert_eq!(port(line.as_bytes()), Some(52), "{line:?}");
        }
        for line in [
            "",
            "CONNECT",
            "CONNECT 4294967296",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 1 2",
            "CONNECTED 1",
            "CONNECT ä",
            "CONNECT\u{a0}1",
        ] {
            assert_eq!(port(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(port(&[0xff, b' ', b'1']), None);
    }

    #[test]
    fn a_client_may_say_it_in_pieces_and_go_on_at_once() {
        let (stream, mut peer) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut client = Client {
            stream,
            deadline: Instant::now(),
        };
        assert_eq!(client.listen(), Said::Part);
        peer.write_all(b"CONN").unwrap();
        assert_eq!(client.listen(), Said::Part);
        peer.write_all(b"ECT 7\nhello").unwrap();
        assert_eq!(client.listen(), Said::Port(7));
        let mut rest = [0; 16];
        assert_eq!(client.stream.read(&mut rest).unwrap(), 5);
        assert_eq!(&rest[..5], b"hello");
        peer.write_all(&[b'x'; LONGEST_LINE]).unwrap();
        assert_eq!(client.listen(), Said::Nonsense);
        drop(peer);
    }

    #[test]
    fn a_client_that_goes_away_said_nothing() {
        let (stream, peer) = UnixStream::pair().unwrap();
        drop(peer);
        let mut client = Client {
            stream,
            deadline: Instant::now(),
        };
        assert_eq!(client.listen(), Said::Nonsense);
    }
}
