//! virtio-vsock: streams between the guest and sockets of the host. Virtio 1.2, section 5.10.
//!
//! The host's side is a unix socket, not the host's own vsock: a client connects to it, writes `CONNECT PORT\n` and reads
//! `OK HOSTPORT\n` once the guest has accepted; what the guest opens to port P of the host (context id 2) goes to the
//! socket of the same path with `_P` behind it.
//!
//! Neither side is trusted: a connection keeps at most 64 KiB, there are at most 1023 at a time, and who does not answer
//! or breaks a rule loses that connection. Streams only, no `SEQPACKET`.

mod board;
mod client;
mod connection;
mod counters;
mod packet;
mod peer;
#[cfg(test)]
mod tests;
mod worker;

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::board::Board;
use self::counters::Counters;
use self::worker::{State, Token, VsockWorker};
use super::device::read_space;
use super::{ActivateError, Activation, Device, Kind, Worker};

/// `VIRTIO_VSOCK_F_STREAM`.
const STREAM_FEATURE: u32 = 0;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// The lowest context id of a guest; those below are the hypervisor, the guest itself and the host.
const FIRST_CID: u64 = 3;
/// `VMADDR_CID_ANY`: no guest's.
const ANY_CID: u64 = 0xffff_ffff;
/// The longest path of a unix socket.
const LONGEST_PATH: usize = 107;
/// What is put behind it for a port of the host.
const LONGEST_SUFFIX: usize = "_4294967295".len();

/// One vsock device, as asked for.
#[derive(Clone, Debug)]
pub struct VsockSpec {
    /// Name of the device.
    pub id: String,
    /// The guest's context id.
    pub cid: u64,
    /// The host's socket.
    pub socket: PathBuf,
}

/// A vsock device can't be had.
#[derive(Debug, Error)]
pub enum VsockOpenError {
    /// Not a guest's.
    #[error(
        "vsock device {id}: cid={cid} is no context id of a guest: 0 to 2 are taken; take one from 3 to 4294967294"
    )]
    Cid {
        /// The device.
        id: String,
        /// What was asked for.
        cid: u64,
    },
    /// The kernel has no room for it.
    #[error(
        "vsock device {id}: socket={} is {} bytes long; with the `_PORT` of the host's ports it must fit {LONGEST_PATH}, \
         so take a path of at most {}", .path.display(), .path.as_os_str().len(), LONGEST_PATH - LONGEST_SUFFIX
    )]
    PathTooLong {
        /// The device.
        id: String,
        /// What was asked for.
        path: PathBuf,
    },
    /// Somebody listens there.
    #[error("vsock device {id}: socket={} is in use by another process: take another path", .path.display())]
    InUse {
        /// The device.
        id: String,
        /// What was asked for.
        path: PathBuf,
    },
    /// A socket nobody listens at.
    #[error(
        "vsock device {id}: socket={} was left by a process that is gone: `rm {}`", .path.display(), .path.display()
    )]
    Stale {
        /// The device.
        id: String,
        /// What was asked for.
        path: PathBuf,
    },
    /// Something else.
    #[error("vsock device {id}: socket={} exists and is no socket: take another path", .path.display())]
    NotASocket {
        /// The device.
        id: String,
        /// What was asked for.
        path: PathBuf,
    },
    /// The path, or rights.
    #[error("vsock device {id}: can't make the socket {}: is there such a folder, and may this user write to it?", .path.display())]
    Bind {
        /// The device.
        id: String,
        /// What was asked for.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A vsock device.
#[derive(Debug)]
pub struct VsockDevice {
    id: String,
    cid: u64,
    listener: UnixListener,
    file: SocketFile,
    counters: Arc<Counters>,
}

/// The socket's file, removed with the device.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode: somebody may put another file there.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn identity(path: &Path) -> Option<(u64, u64)> {
        let metadata = fs::symlink_metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && Self::identity(&self.path) == self.identity {
            // All that can be done; a stale socket has an error of its own at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl VsockDevice {
    /// Makes the host's socket. On failure nothing is left behind.
    pub fn open(spec: VsockSpec) -> Result<Self, VsockOpenError> {
        let VsockSpec {
            id,
            cid,
            socket: path,
        } = spec;
        if !(FIRST_CID..ANY_CID).contains(&cid) {
            return Err(VsockOpenError::Cid { id, cid });
        }
        if path.as_os_str().len() + LONGEST_SUFFIX > LONGEST_PATH {
            return Err(VsockOpenError::PathTooLong { id, path });
        }
        let listener = match UnixListener::bind(&path) {
            Ok(listener) => listener,
            Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                return Err(taken(id, path));
            }
            Err(source) => return Err(VsockOpenError::Bind { id, path, source }),
        };
        let file = SocketFile {
            identity: SocketFile::identity(&path),
            path,
        };
        if let Err(source) = listener.set_nonblocking(true) {
            let path = file.path.clone();
            return Err(VsockOpenError::Bind { id, path, source });
        }
        Ok(Self {
            id,
            cid,
            listener,
            file,
            counters: Arc::default(),
        })
    }

    /// The guest's context id.
    pub fn cid(&self) -> u64 {
        self.cid
    }

    /// The host's socket.
    pub fn socket(&self) -> &Path {
        &self.file.path
    }

    /// `_vsock0`: an id may be longer than a thread's name.
    fn thread_name(&self) -> String {
        let mut name = String::from("_vsock");
        let id = self.id.trim_start_matches('_');
        for c in id.strip_prefix("vsock").unwrap_or(id).chars() {
            if name.len() + c.len_utf8() > 15 {
                break;
            }
            name.push(c);
        }
        name
    }
}

/// Tells what stands in the way.
fn taken(id: String, path: PathBuf) -> VsockOpenError {
    let is_socket = fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_socket());
    if !is_socket {
        return VsockOpenError::NotASocket { id, path };
    }
    match UnixStream::connect(&path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            VsockOpenError::Stale { id, path }
        }
        _ => VsockOpenError::InUse { id, path },
    }
}

impl Device for VsockDevice {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn features(&self) -> u64 {
        1 << STREAM_FEATURE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // Packets to the guest, packets of the guest, events. There are no events: the guest is never moved.
        vec![QUEUE_SIZE; 3]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let host = |what| move |source| ActivateError::Host { what, source };
        let mut queues = activation.queues.into_iter();
        let mut queue = |index| {
            queues
                .next()
                .flatten()
                .ok_or(ActivateError::MissingQueue { index })
        };
        let (rx, tx) = (queue(0)?, queue(1)?);
        let listener = self
            .listener
            .try_clone()
            .map_err(host("can't share a vsock device's socket with its worker"))?;
        let turn =
            EventFd::new(EFD_NONBLOCK).map_err(host("can't get an event for a vsock device"))?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )
        .map_err(|errno| host("can't get a timer for a vsock device")(errno.into()))?;
        let board = Board::new(
            self.cid,
            listener,
            self.file.path.clone(),
            Token::Socket as u32,
            Arc::clone(&self.counters),
        );
        Ok(vec![Box::new(VsockWorker {
            name: self.thread_name(),
            memory: activation.memory,
            rx,
            tx,
            signals: activation.signals,
            counters: Arc::clone(&self.counters),
            board,
            timer,
            turn,
            state: State::default(),
        })])
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }
}
