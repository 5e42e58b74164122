//! The host's side of one connection: its socket, and what of the guest's data the socket has not taken.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::connection::Connection;
use super::packet::Pieces;
use crate::memory::loss::Lost;

/// One side that is a socket and one that is the guest.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) connection: Connection,
    stream: UnixStream,
    /// The connection bounds it.
    backlog: VecDeque<u8>,
    /// A read may find something. The socket tells only of what is new.
    pub(super) readable: bool,
    /// It is in the queue of those that owe the guest a packet.
    pub(super) queued: bool,
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Data(usize),
    Nothing,
    End,
    /// The guest's memory is gone.
    Lost,
}

impl Peer {
    /// `stream` does not block.
    pub(super) fn new(stream: UnixStream, connection: Connection) -> Self {
        Self {
            connection,
            stream,
            backlog: VecDeque::new(),
            // Data may have come before the socket was watched for it.
            readable: true,
            queued: false,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Tells the client that the guest has accepted.
    pub(super) fn tell_client(&mut self, host_port: u32) -> io::Result<()> {
        // It is the first that is written, so there is room for all of it.
        self.stream
            .write_all(format!("OK {host_port}\n").as_bytes())
    }

    /// Data of the guest for the socket; what it does not take is kept. How much it took at once.
    pub(super) fn deliver(&mut self, data: &Pieces<'_>) -> io::Result<usize> {
        let mut written = 0;
        if self.backlog.is_empty() {
            for slice in data.system() {
                match retry(|| (&self.stream).write_volatile(slice)) {
                    Ok(len) => {
                        written += len;
                        if len < slice.len() {
                            break;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
        let mut rest = Vec::new();
        for slice in data.part(written, usize::MAX) {
            let start = rest.len();
            rest.resize(start + slice.len(), 0);
            slice.copy_to(&mut rest[start..]);
        }
        // What was copied may be scratch; what the socket took by itself never is.
        data.check()
            .map_err(|Lost| io::Error::from_raw_os_error(libc::EFAULT))?;
        self.backlog.extend(rest);
        Ok(written)
    }

    /// Writes what was kept; how much the socket took.
    pub(super) fn flush(&mut self) -> io::Result<usize> {
        let mut written = 0;
        while !self.backlog.is_empty() {
            match self.stream.write(self.backlog.as_slices().0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => {
                    self.backlog.drain(..len);
                    written += len;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // Most connections never need it again.
        self.backlog = VecDeque::new();
        Ok(written)
    }

    /// Forgets what was kept.
    pub(super) fn discard(&mut self) {
        self.backlog = VecDeque::new();
    }

    /// The socket's reader sees the end.
    pub(super) fn end_writing(&self) {
        // It fails when the other side is gone, which is an end too.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Data of the socket into the guest's memory.
    pub(super) fn read(&mut self, into: &mut [VolatileSlice<'_>]) -> Found {
        let mut read = 0;
        for slice in into {
            match retry(|| (&self.stream).read_volatile(slice)) {
                Ok(0) if read > 0 => return Found::Data(read),
                Ok(0) => return Found::End,
                Ok(len) => {
                    read += len;
                    if len < slice.len() {
                        break;
                    }
                }
                // What was read counts; the next read finds the rest, or the error again.
                Err(_) if read > 0 => break,
                Err(error) => {
                    return match error.raw_os_error() {
                        Some(libc::EAGAIN) => {
                            self.readable = false;
                            Found::Nothing
                        }
                        Some(libc::EFAULT) => Found::Lost,
                        _ => Found::End,
                    };
                }
            }
        }
        Found::Data(read)
    }
}

/// An interrupted call is made again.
fn retry(mut call: impl FnMut() -> Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    loop {
        return match call() {
            Ok(len) => Ok(len),
            Err(VolatileMemoryError::IOError(error)) => {
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                Err(error)
            }
            Err(other) => Err(io::Error::other(other)),
        };
    }
}
