//! The thread that notices that a backend has gone, and looks for the next one.

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::debug;

use super::caller::Caller;
use super::session::Session;
use super::shared::Shared;
use super::socket::Listening;

/// From a loss to the first try; doubled with each that fails.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// For one that is there again, and has said what it is, to map all memory: one that locks its own memory touches every page.
/// Nobody waits for it, and who has something to ask of the thread meanwhile cuts it short.
const PROVIDING: Duration = Duration::from_mins(1);

/// Ends when no backend is wanted any more.
pub(super) fn run(shared: &Shared, caller: &Arc<Caller<Session>>) {
    let mut pause = FIRST_PAUSE;
    while !shared.is_closed() {
        if shared.status().lost.is_none() {
            pause = FIRST_PAUSE;
            let connections = shared.line.count();
            let Signs { hung_up, asked } = wait(
                shared,
                shared.line.get().as_deref(),
                shared.channel().as_deref(),
                None,
            );
            let lose = move |session: &mut Session| session.hung_up(connections);
            if (hung_up && caller.call(super::CALL, lose).is_err())
                || (asked && caller.call(super::CALL, Session::asked).is_err())
            {
                // A thread that does not answer is asked again, with a pause.
                wait(shared, None, None, Some(LONGEST_PAUSE));
            }
            continue;
        }
        wait(shared, None, None, Some(pause));
        if let Some(listening) = shared.listening() {
            await_client(shared, &listening);
        }
        if shared.is_closed() {
            return;
        }
        if let Err(error) = connect(caller) {
            debug!(device = shared.id, %error, "no backend yet");
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One that says nothing is given up soon: the next one may be waiting behind it.
fn connect(caller: &Caller<Session>) -> Result<(), Box<dyn Error + Send + Sync>> {
    caller.call(super::HANDSHAKE, Session::meet)??;
    caller.call(PROVIDING, Session::provide)??;
    Ok(())
}

/// Waits until somebody has connected, or nobody is wanted any more.
fn await_client(shared: &Shared, listening: &Listening) {
    while !shared.is_closed() {
        let mut fds = [
            PollFd::new(&shared.wake, PollFlags::IN),
            PollFd::new(listening, PollFlags::IN),
        ];
        let is_there = poll(&mut fds, None).is_ok() && !fds[1].revents().is_empty();
        settle(shared);
        if is_there {
            return;
        }
    }
}

/// Takes note of having been woken.
fn settle(shared: &Shared) {
    // Nothing to read when nobody woke it.
    let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
}

/// What was noticed.
#[derive(Debug, Default)]
struct Signs {
    /// The connection has ended.
    hung_up: bool,
    /// The backend says something by itself.
    asked: bool,
}

/// Waits until the other side hangs up, which it tells, or says something by itself, or somebody wants a look, or for so long.
fn wait(
    shared: &Shared,
    stream: Option<&UnixStream>,
    channel: Option<&UnixStream>,
    at_most: Option<Duration>,
) -> Signs {
    let at_most = at_most.and_then(|time| Timespec::try_from(time).ok());
    let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
    fds.extend(stream.map(|stream| PollFd::new(stream, PollFlags::RDHUP)));
    fds.extend(channel.map(|channel| PollFd::new(channel, PollFlags::IN)));
    if poll(&mut fds, at_most.as_ref()).is_err() {
        // Interrupted: what there is to see is seen the next time.
        return Signs::default();
    }
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut seen = fds[1..].iter().map(PollFd::revents);
    let signs = Signs {
        hung_up: stream
            .and_then(|_| seen.next())
            .is_some_and(|it| it.intersects(gone)),
        asked: channel
            .and_then(|_| seen.next())
            .is_some_and(|it| !it.is_empty()),
    };
    settle(shared);
    signs
}
