//! A caller of a VMM's REST interface that the lab tells what to send, and one that starts a VMM with its socket: the ways
//! of orchestrators, of which a client of the project's own would have none.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

use lab_agent::caller_protocol::{Exchange, Exchanged};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::taps;

/// A body that is longer is nonsense.
const BODY_LIMIT_BYTES: usize = 16 << 20;

/// Sends what comes on standard input and tells what came of it, until there is no more. For how long is the lab's to say.
pub(crate) fn serve(socket: &str) -> Result<(), String> {
    let mut caller = Caller {
        socket,
        connection: None,
        taps: HashMap::new(),
    };
    for line in io::stdin().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let exchange: Exchange = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        let begun = Instant::now();
        let told = match caller.exchange(&exchange) {
            Ok((status, body)) => Exchanged::Answer {
                status,
                body,
                took_ns: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
            },
            Err(message) => {
                caller.connection = None;
                Exchanged::Failure(message)
            }
        };
        println!(
            "{}",
            serde_json::to_string(&told).map_err(|error| error.to_string())?
        );
    }
    Ok(())
}

/// Listens at `socket` and becomes the program of `words`, which inherits that: `{fd}` among them is its number. One
/// connection waits at most until it is accepted.
pub(crate) fn become_listening(socket: &str, words: &[&str]) -> Result<(), String> {
    let failed = |error: io::Error| format!("cannot listen on {socket}: {error}");
    let listener = UnixListener::bind(socket).map_err(failed)?;
    rustix::net::listen(&listener, 1).map_err(|error| failed(error.into()))?;
    // A duplicate stays open in the program that this becomes.
    let inherited = rustix::io::dup(&listener).map_err(|error| failed(error.into()))?;
    let number = inherited.as_raw_fd().to_string();
    let [program, arguments @ ..] = words else {
        return Err("no program to become".to_owned());
    };
    let arguments = arguments.iter().map(|word| word.replace("{fd}", &number));
    let error = Command::new(program).args(arguments).exec();
    Err(format!("cannot become {program}: {error}"))
}

struct Caller<'a> {
    socket: &'a str,
    connection: Option<BufReader<UnixStream>>,
    taps: HashMap<String, File>,
}

impl Caller<'_> {
    fn exchange(&mut self, exchange: &Exchange) -> Result<(u16, String), String> {
        let failed = |error: io::Error| format!("{}: {error}", self.socket);
        let tap = match &exchange.tap {
            None => None,
            Some(name) => Some(&*match self.taps.entry(name.clone()) {
                Entry::Occupied(made) => made.into_mut(),
                Entry::Vacant(place) => place.insert(taps::make(name)?),
            }),
        };
        let open = self.connection.take().filter(|connection| {
            !exchange.anew && matches!(is_open(connection.get_ref()), Ok(true))
        });
        let mut connection = match open {
            Some(connection) => connection,
            None => BufReader::new(UnixStream::connect(self.socket).map_err(failed)?),
        };
        send(connection.get_ref(), exchange.request.as_bytes(), tap).map_err(failed)?;
        let answer = answer(&mut connection).map_err(failed)?;
        self.connection = Some(connection);
        Ok(answer)
    }
}

/// Whether the other end has not closed it meanwhile. It has nothing to say before it is asked.
fn is_open(stream: &UnixStream) -> io::Result<bool> {
    stream.set_nonblocking(true)?;
    let mut reader = stream;
    let read = reader.read(&mut [0]);
    stream.set_nonblocking(false)?;
    Ok(matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock))
}

/// All of a request at once, with a descriptor beside its first byte.
fn send(stream: &UnixStream, request: &[u8], beside: Option<&File>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = beside.map(|file| [file.as_fd()]);
    if let Some(descriptors) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let sent = sendmsg(
        stream,
        &[IoSlice::new(request)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    let mut rest = stream;
    rest.write_all(&request[sent..])
}

/// One answer, of which no more is read than it says that it has.
fn answer(from: &mut impl BufRead) -> io::Result<(u16, String)> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut line = String::new();
    from.read_line(&mut line)?;
    // A number after the version, and it may be all there is.
    let words: Vec<&str> = line.split_whitespace().collect();
    let status = match words[..] {
        [version, status, ..] if version.starts_with("HTTP/1.") => status.parse().ok(),
        _ => None,
    };
    let status: u16 = status.ok_or_else(|| wrong(format!("no status line: {line:?}")))?;
    let mut length = None;
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Err(wrong("the head ends too early".to_owned()));
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        match line.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().ok();
            }
            _ => {}
        }
    }
    let length = match (status, length) {
        (204, _) => 0,
        (_, Some(length)) if length <= BODY_LIMIT_BYTES => length,
        _ => {
            return Err(wrong(format!(
                "an answer with status {status} and no length"
            )));
        }
    };
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    let body = String::from_utf8(body).map_err(|error| wrong(error.to_string()))?;
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn answers_follow_each_other_on_a_connection() {
        let text = "HTTP/1.1 204 \r\nServer: x\r\n\r\nHTTP/1.1 200\r\nCONTENT-LENGTH: 3\r\n\r\nabcHTTP/1.1 500 \r\nA: b\r\n\r\n";
        let mut from = text.as_bytes();
        assert_eq!(answer(&mut from).unwrap(), (204, String::new()));
        assert_eq!(answer(&mut from).unwrap(), (200, "abc".to_owned()));
        assert!(
            answer(&mut from)
                .unwrap_err()
                .to_string()
                .contains("no length")
        );
        assert!(
            answer(&mut from)
                .unwrap_err()
                .to_string()
                .contains("no status line")
        );
    }

    #[test]
    fn a_connection_that_was_closed_is_made_anew() {
        let directory =
            std::env::temp_dir().join(format!("lab-agent-caller-{}", std::process::id()));
        let _ = std::fs::remove_file(&directory);
        let listener = UnixListener::bind(&directory).unwrap();
        // The first connection has two requests, the second one.
        let server = thread::spawn(move || {
            for requests in [2, 1] {
                let (mut stream, _) = listener.accept().unwrap();
                for _ in 0..requests {
                    let mut request = [0; 4];
                    stream.read_exact(&mut request).unwrap();
                    stream.write_all(b"HTTP/1.1 204 \r\n\r\n").unwrap();
                }
            }
        });
        let socket = directory.to_str().unwrap();
        let mut caller = Caller {
            socket,
            connection: None,
            taps: HashMap::new(),
        };
        let exchange = Exchange {
            request: "PING".to_owned(),
            tap: None,
            anew: false,
        };
        for _ in 0..2 {
            assert_eq!(caller.exchange(&exchange).unwrap().0, 204);
        }
        // Looked at again until the other end's close is here.
        let connection = caller.connection.as_ref().unwrap();
        while is_open(connection.get_ref()).unwrap() {
            thread::yield_now();
        }
        assert_eq!(caller.exchange(&exchange).unwrap().0, 204);
        server.join().unwrap();
        std::fs::remove_file(socket).unwrap();
    }
}
