//! One session of a daemon for each run, made as the daemon makes it, and the other end of its socket.

use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use daxhund_vhost_user::event::{Events, Nouns};
use daxhund_vhost_user::events::ready;
use daxhund_vhost_user::metrics::Counter;
use daxhund_vhost_user::session::{Device, Session};
use vhost::vhost_user::Listener;

use crate::frontend::Frontend;

/// How long anything of a session may take on a machine that does something else, too. What takes longer hangs.
pub const LIMIT: Duration = Duration::from_secs(30);
/// A daemon that does not read is not waited for.
const PATIENCE: Duration = Duration::from_millis(50);

/// What outlives all runs: the socket that the daemon listens at, and where it is.
struct Place {
    listener: Mutex<Listener>,
    address: SocketAddr,
}

fn place() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(|| {
        let name = format!("daxhund-fuzz-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let listener = UnixListener::bind_addr(&address).expect("a socket");
        Place {
            listener: Mutex::new(Listener::from(listener)),
            address,
        }
    })
}

/// Connects a frontend to a device.
pub fn connect<D: Device>(device: D, nouns: Nouns) -> (Session<D>, UnixStream) {
    let place = place();
    let stream = UnixStream::connect_addr(&place.address).expect("a connection");
    stream
        .set_write_timeout(Some(PATIENCE))
        .expect("a timeout to write");
    stream
        .set_read_timeout(Some(LIMIT))
        .expect("a timeout to read");
    let mut listener = place
        .listener
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let events = Events::open(None, nouns).expect("nobody is told");
    let session = Session::accept(device, &mut listener, &events, &Counter::default());
    let session = session.expect("the host has what a session needs");
    (session.expect("a session"), stream)
}

/// Says nothing more, and waits until the daemon has done with what was said, however that ends, and nothing is left of the
/// session.
pub fn end<D: Device>(session: Session<D>, frontend: &Frontend) {
    frontend.hang_up();
    let ended = ready(&[session.as_fd()], Some(LIMIT)).expect("a poll");
    assert!(
        ended.contains(&true),
        "the session goes on although its frontend has gone"
    );
    session.finish(LIMIT).expect("it has ended");
}
