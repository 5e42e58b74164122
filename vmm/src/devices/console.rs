//! Where a console's bytes come from and go to: nothing, the terminal, a pseudo terminal, a file, a socket.
//!
//! Everything a console opens is closed, removed or restored when it is dropped: the terminal's mode, the socket's
//! path. Output never blocks a guest on a reader that went away: pseudo terminal and socket take what they can and
//! the rest is lost, as on a wire. Standard output is waited for, as other programs do; a device with a thread of its
//! own writes with [`ConsoleOutput::write_now`] and decides for how long.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use thiserror::Error;

use crate::config::ConsoleConfig;

/// A console could not be opened.
#[derive(Debug, Error)]
pub enum OpenConsoleError {
    /// The file for its output.
    #[error("console output can't be written to {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something is at the socket's path already.
    #[error(
        "console socket {} exists already; if no other VMM listens on it, remove it (`rm {}`)",
        path.display(), path.display()
    )]
    SocketExists {
        /// The path.
        path: PathBuf,
    },
    /// The socket.
    #[error("no console socket can be made at {}", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The pseudo terminal.
    #[error("no pseudo terminal for the console: {what}")]
    Pty {
        /// The step.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The terminal of standard input.
    #[error("the terminal's mode can't be set")]
    Terminal(#[source] io::Error),
}

/// A console's two ends.
#[derive(Debug)]
pub struct Console {
    /// What the guest writes; for the device.
    pub output: ConsoleOutput,
    /// What the guest reads; for the owner's event loop.
    pub input: ConsoleInput,
}

/// The guest's output.
#[derive(Debug)]
pub enum ConsoleOutput {
    /// Thrown away.
    Null,
    /// To standard output.
    Stdout(Stdout),
    /// To a file.
    File(File),
    /// To a pseudo terminal; what its reader does not take in time is lost.
    Pty(File),
    /// To whoever is connected.
    Socket(Peer),
}

/// Standard output, twice.
#[derive(Debug)]
pub struct Stdout {
    /// As it came: writing waits.
    blocking: io::Stdout,
    /// The same terminal or pipe opened again, so that not waiting is not forced on all others who have it.
    own: Option<OwnedFd>,
}

impl Stdout {
    fn open() -> Self {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let kind = rustix::fs::fstat(io::stdout()).map(|s| FileType::from_raw_mode(s.st_mode));
        let own = match kind {
            Ok(FileType::CharacterDevice | FileType::Fifo) => {
                rustix::fs::open("/proc/self/fd/1", flags, Mode::empty()).ok()
            }
            // Nothing else can be opened again (a socket) or has need of it (a file).
            _ => None,
        };
        Self {
            blocking: io::stdout(),
            own,
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.own {
            Some(fd) => fd.as_fd(),
            None => self.blocking.as_fd(),
        }
    }
}

/// The one client of a console socket, if there is one.
pub type Peer = Arc<Mutex<Option<UnixStream>>>;

/// The guest's input.
#[derive(Debug)]
pub enum ConsoleInput {
    /// There is none.
    None,
    /// Standard input: a terminal in raw mode, or a pipe.
    Stdin(Option<RawTerminal>),
    /// A pseudo terminal.
    Pty {
        /// Our side.
        main: File,
        /// The other side, kept open so that ours does not report a hang-up while nobody is attached.
        other: OwnedFd,
        /// Name of the other side, for the user.
        name: String,
    },
    /// A socket that takes one client at a time.
    Socket {
        /// Removed when this is dropped.
        listener: SocketPath,
        /// Shared with the output.
        peer: Peer,
    },
}

impl Console {
    /// A console that leads nowhere.
    pub fn nowhere() -> Self {
        Self {
            output: ConsoleOutput::Null,
            input: ConsoleInput::None,
        }
    }

    /// Opens what the configuration names.
    pub fn open(mode: &ConsoleConfig) -> Result<Self, OpenConsoleError> {
        let (output, input) = match mode {
            ConsoleConfig::Off | ConsoleConfig::Null => (ConsoleOutput::Null, ConsoleInput::None),
            ConsoleConfig::Tty => {
                let raw = if io::stdin().is_terminal() {
                    Some(RawTerminal::enter().map_err(OpenConsoleError::Terminal)?)
                } else {
                    None
                };
                (
                    ConsoleOutput::Stdout(Stdout::open()),
                    ConsoleInput::Stdin(raw),
                )
            }
            ConsoleConfig::File(path) => {
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .mode(0o600)
                    .custom_flags(OFlags::NOCTTY.bits().cast_signed())
                    .open(path)
                    .map_err(|source| OpenConsoleError::File {
                        path: path.clone(),
                        source,
                    })?;
                (ConsoleOutput::File(file), ConsoleInput::None)
            }
            ConsoleConfig::Pty => open_pty()?,
            ConsoleConfig::Socket(path) => {
                let listener = SocketPath::bind(path)?;
                let peer = Peer::default();
                (
                    ConsoleOutput::Socket(Arc::clone(&peer)),
                    ConsoleInput::Socket { listener, peer },
                )
            }
        };
        Ok(Self { output, input })
    }
}

fn open_pty() -> Result<(ConsoleOutput, ConsoleInput), OpenConsoleError> {
    let failed = |what| {
        move |e: rustix::io::Errno| OpenConsoleError::Pty {
            what,
            source: e.into(),
        }
    };
    let main = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .map_err(failed("/dev/ptmx can't be opened"))?;
    rustix::pty::unlockpt(&main).map_err(failed("it can't be unlocked"))?;
    let name = rustix::pty::ptsname(&main, Vec::new()).map_err(failed("it has no name"))?;
    let name = name.to_string_lossy().into_owned();
    let other = open_other_side(&name).map_err(|source| OpenConsoleError::Pty {
        what: "its other side can't be opened",
        source,
    })?;
    rustix::fs::fcntl_setfl(&main, OFlags::NONBLOCK)
        .map_err(failed("it can't be made non-blocking"))?;
    let main = File::from(main);
    let output = main.try_clone().map_err(|source| OpenConsoleError::Pty {
        what: "its descriptor can't be copied",
        source,
    })?;
    Ok((
        ConsoleOutput::Pty(output),
        ConsoleInput::Pty { main, other, name },
    ))
}

/// The side that a terminal program opens, in raw mode: what the guest sends is not echoed back to it.
fn open_other_side(name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let other = rustix::fs::open(name, flags, Mode::empty())?;
    let mut mode = tcgetattr(&other)?;
    mode.make_raw();
    tcsetattr(&other, OptionalActions::Now, &mode)?;
    Ok(other)
}

impl Write for ConsoleOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Null => Ok(bytes.len()),
            Self::Stdout(stdout) => stdout.blocking.write(bytes),
            Self::File(file) => file.write(bytes),
            Self::Pty(file) => lossy(file.write(bytes), bytes.len()),
            Self::Socket(peer) => {
                let mut peer = peer.lock().unwrap_or_else(PoisonError::into_inner);
                match peer.as_mut().map(|stream| stream.write(bytes)) {
                    None => Ok(bytes.len()),
                    Some(result) => lossy(result, bytes.len()),
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            // The others have no buffer in this process.
            Self::Stdout(stdout) => stdout.blocking.flush(),
            _ => Ok(()),
        }
    }
}

/// What became of bytes given to [`ConsoleOutput::write_now`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// This many are taken, or lost for good.
    Bytes(usize),
    /// None: the other end takes nothing now. Wait for [`ConsoleOutput::fd`] to be writable.
    Later,
}

/// What a pipe takes in one piece when it says that it is writable: more might wait.
const ATOMIC: usize = 4096;

impl ConsoleOutput {
    /// Writes what can be written without waiting for a reader. What fails for good is lost, as on a wire.
    pub fn write_now(&mut self, bytes: &[u8]) -> Written {
        let result = match self {
            Self::Stdout(stdout) => write_if_ready(stdout.fd(), bytes),
            Self::File(file) => write_if_ready(file.as_fd(), bytes),
            // These never wait by themselves.
            other => return Written::Bytes(other.write(bytes).unwrap_or(bytes.len())),
        };
        match result {
            Ok(n) if n > 0 => Written::Bytes(n),
            Err(Errno::AGAIN) => Written::Later,
            Ok(_) | Err(_) => Written::Bytes(bytes.len()),
        }
    }

    /// The descriptor to wait on when [`ConsoleOutput::write_now`] says [`Written::Later`].
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Stdout(stdout) => Some(stdout.fd().as_raw_fd()),
            Self::File(file) => Some(file.as_raw_fd()),
            Self::Null | Self::Pty(_) | Self::Socket(_) => None,
        }
    }
}

fn write_if_ready(fd: BorrowedFd<'_>, bytes: &[u8]) -> rustix::io::Result<usize> {
    let now = Timespec::default();
    let mut fds = [PollFd::new(&fd, PollFlags::OUT)];
    if retry_on_intr(|| poll(&mut fds, Some(&now)))? == 0 {
        return Err(Errno::AGAIN);
    }
    let bytes = bytes.get(..ATOMIC).unwrap_or(bytes);
    retry_on_intr(|| rustix::io::write(fd, bytes))
}

/// Bytes that nobody takes are gone, and that is no error.
fn lossy(result: io::Result<usize>, all: usize) -> io::Result<usize> {
    match result {
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
            ) =>
        {
            Ok(all)
        }
        other => other,
    }
}

/// What reading a console's input gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// This many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The other end is closed.
    End,
}

impl ConsoleInput {
    /// The descriptor to wait on for input, where there is one.
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Self::None => None,
            Self::Stdin(_) => Some(io::stdin().as_raw_fd()),
            Self::Pty { main, .. } => Some(main.as_raw_fd()),
            Self::Socket { peer, .. } => peer
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .as_ref()
                .map(AsRawFd::as_raw_fd),
        }
    }

    /// The descriptor to wait on for a client.
    pub fn listener_fd(&self) -> Option<RawFd> {
        match self {
            Self::Socket { listener, .. } => Some(listener.listener.as_raw_fd()),
            _ => None,
        }
    }

    /// The terminal whose window the guest's output is seen in, as a descriptor of its own: its size is the console's.
    pub fn terminal(&self) -> Option<OwnedFd> {
        match self {
            Self::Stdin(Some(_)) => io::stdin().as_fd().try_clone_to_owned().ok(),
            Self::Pty { main, .. } => main.as_fd().try_clone_to_owned().ok(),
            Self::None | Self::Stdin(None) | Self::Socket { .. } => None,
        }
    }

    /// Name of the pseudo terminal.
    pub fn pty_name(&self) -> Option<&str> {
        match self {
            Self::Pty { name, .. } => Some(name),
            _ => None,
        }
    }

    /// Takes the client that waits at the socket, if one does.
    pub fn accept(&mut self) -> io::Result<bool> {
        let Self::Socket { listener, peer } = self else {
            return Ok(false);
        };
        match listener.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                *peer.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Parts with the client.
    pub fn hang_up(&mut self) {
        if let Self::Socket { peer, .. } = self {
            peer.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    /// Reads what is there, at most `buffer.len()` bytes; called when the descriptor is readable.
    pub fn read(&mut self, buffer: &mut [u8]) -> Input {
        let result = match self {
            Self::None => return Input::End,
            // Unbuffered: `io::Stdin` would read ahead of what the FIFO has room for.
            Self::Stdin(_) => rustix::io::read(io::stdin(), buffer).map_err(io::Error::from),
            Self::Pty { main, other, name } => match main.read(buffer) {
                // Somebody's session that had the terminal as its own has ended, and the kernel hung up every
                // descriptor of it, ours included (tty_vhangup_session). The next user gets a fresh one.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                    return match open_other_side(name) {
                        Ok(fresh) => {
                            *other = fresh;
                            Input::Nothing
                        }
                        Err(error) => {
                            tracing::warn!(%error, name, "the console's pseudo terminal is lost");
                            Input::End
                        }
                    };
                }
                other => other,
            },
            Self::Socket { peer, .. } => {
                match peer.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                    Some(stream) => stream.read(buffer),
                    None => return Input::Nothing,
                }
            }
        };
        match result {
            Ok(0) => Input::End,
            Ok(n) => Input::Bytes(n),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Input::Nothing
            }
            Err(error) => {
                tracing::debug!(%error, "console input ends");
                Input::End
            }
        }
    }
}

/// Standard input's terminal in raw mode until dropped.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &self.before) {
            tracing::warn!(%error, "the terminal's mode could not be restored; `stty sane` does it");
        }
    }
}

/// A listening socket whose path goes when it does.
#[derive(Debug)]
pub struct SocketPath {
    listener: UnixListener,
    path: PathBuf,
}

impl SocketPath {
    fn bind(path: &Path) -> Result<Self, OpenConsoleError> {
        let failed = |source| OpenConsoleError::Socket {
            path: path.to_owned(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                return Err(OpenConsoleError::SocketExists {
                    path: path.to_owned(),
                });
            }
            other => other.map_err(failed)?,
        };
        let socket = Self {
            listener,
            path: path.to_owned(),
        };
        socket.listener.set_nonblocking(true).map_err(failed)?;
        Ok(socket)
    }
}

impl AsFd for SocketPath {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "console socket could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_console_serves_one_client_and_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let mut console = Console::open(&ConsoleConfig::Socket(path.clone())).unwrap();
        console.output.write_all(b"nobody hears this").unwrap();
        assert!(!console.input.accept().unwrap());

        let mut client = UnixStream::connect(&path).unwrap();
        assert!(console.input.accept().unwrap());
        console.output.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");

        client.write_all(b"abc").unwrap();
        let mut buffer = [0; 2];
        assert_eq!(console.input.read(&mut buffer), Input::Bytes(2));
        assert_eq!(&buffer, b"ab");
        drop(client);
        assert_eq!(console.input.read(&mut buffer), Input::Bytes(1));
        assert_eq!(console.input.read(&mut buffer), Input::End);
        console.input.hang_up();
        console.output.write_all(b"nobody again").unwrap();

        drop(console);
        assert!(!path.exists());
    }

    #[test]
    fn a_taken_socket_path_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        std::fs::write(&path, "mine").unwrap();
        let error = Console::open(&ConsoleConfig::Socket(path.clone())).unwrap_err();
        assert!(
            matches!(error, OpenConsoleError::SocketExists { .. }),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_pty_console_never_blocks_the_guest() {
        let mut console = Console::open(&ConsoleConfig::Pty).unwrap();
        assert!(console.input.pty_name().unwrap().starts_with("/dev/pts/"));
        // Far more than a terminal buffers, and nobody reads.
        for _ in 0..64 {
            console.output.write_all(&[b'x'; 4096]).unwrap();
        }
    }

    #[test]
    fn a_pty_console_carries_whole_lines_both_ways() {
        let mut console = Console::open(&ConsoleConfig::Pty).unwrap();
        let name = console.input.pty_name().unwrap().to_owned();
        let mut user = OpenOptions::new()
            .read(true)
            .write(true)
            .open(name)
            .unwrap();
        for byte in b"GUEST-READY 1\r\n" {
            console.output.write_all(&[*byte]).unwrap();
        }
        let mut heard = Vec::new();
        while heard.last() != Some(&b'\n') {
            let mut byte = [0];
            user.read_exact(&mut byte).unwrap();
            heard.push(byte[0]);
        }
        assert_eq!(heard, b"GUEST-READY 1\r\n");
        user.write_all(b"ping\n").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(console.input.read(&mut buffer), Input::Bytes(5));
        assert_eq!(&buffer[..5], b"ping\n");
    }

    #[test]
    fn file_output_is_private_and_truncated() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut console = Console::open(&ConsoleConfig::File(path.clone())).unwrap();
        console.output.write_all(b"line").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"line");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let error = Console::open(&ConsoleConfig::File(dir.path().join("no/such"))).unwrap_err();
        assert!(matches!(error, OpenConsoleError::File { .. }));
    }
}
