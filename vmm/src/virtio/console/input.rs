//! The host's input, and when it is waited for.
//!
//! ```text
//!                 buffers                        no buffers
//!            ┌──────────────▶ Reading ──────────────────────▶ Idle, or for a socket's client: Gone?
//!            │                   │ end of input                          │ it hangs up
//!            │                   ▼                                       ▼
//!            └── Idle ◀── hang up, wait for a client ◀── wait for a client, who takes its place
//! ```
//! Input is waited for only while the driver has buffers, so that what nobody reads costs nothing. A client that
//! leaves while there are none keeps its place, and its last words, until another one comes. A descriptor is taken
//! out of the event manager before it is closed.

use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};
use tracing::{debug, warn};

use super::worker::Token;
use crate::devices::console::{ConsoleInput, Input};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watch {
    Idle,
    /// Readable is waited for.
    Reading(RawFd),
    /// Only a hang-up is waited for.
    Gone(RawFd),
}

/// What of the input is waited for.
#[derive(Debug)]
pub(super) struct InputWatch {
    watch: Watch,
    listening: bool,
    /// Standard input or the pseudo terminal has ended; no more comes.
    ended: bool,
}

impl InputWatch {
    pub(super) fn new() -> Self {
        Self {
            watch: Watch::Idle,
            listening: false,
            ended: false,
        }
    }

    /// The driver may have buffers: waits for input, or for somebody who could give some.
    pub(super) fn wait(&mut self, input: &ConsoleInput, ops: &mut EventOps<'_>) {
        if self.ended || matches!(self.watch, Watch::Reading(_)) {
            return;
        }
        self.stop(ops);
        match input.fd() {
            Some(fd) if add(ops, fd, Token::Input, EventSet::IN) => self.watch = Watch::Reading(fd),
            // A regular file as standard input can't be waited on: it gives no input.
            Some(_) => self.ended = true,
            None => self.listen(input, ops),
        }
    }

    /// The driver has no buffers.
    pub(super) fn starve(&mut self, input: &ConsoleInput, ops: &mut EventOps<'_>) {
        self.stop(ops);
        if let (ConsoleInput::Socket { .. }, Some(fd)) = (input, input.fd())
            && add(ops, fd, Token::Input, EventSet::empty())
        {
            self.watch = Watch::Gone(fd);
        }
    }

    /// The input has an event. `true`: there is something to read.
    pub(super) fn on_event(&mut self, input: &ConsoleInput, ops: &mut EventOps<'_>) -> bool {
        if let Watch::Gone(_) = self.watch {
            self.stop(ops);
            self.listen(input, ops);
        }
        matches!(self.watch, Watch::Reading(_))
    }

    /// The input is at its end: parts with the client, and the next one can come.
    pub(super) fn end(&mut self, input: &mut ConsoleInput, ops: &mut EventOps<'_>) {
        self.stop(ops);
        if let ConsoleInput::Socket { .. } = input {
            input.hang_up();
            self.listen(input, ops);
        } else {
            self.ended = true;
        }
    }

    /// Somebody waits at the socket.
    pub(super) fn on_client(&mut self, input: &mut ConsoleInput, ops: &mut EventOps<'_>) {
        if let Watch::Reading(_) = self.watch {
            // What the one before has left is read first; then it ends and its place is free.
            return;
        }
        self.stop(ops);
        input.hang_up();
        match input.accept() {
            Ok(true) => {
                // One at a time: the next waits in the socket's backlog until this one is gone.
                if let Some(fd) = input.listener_fd() {
                    remove(ops, fd, Token::Client);
                }
                self.listening = false;
                self.wait(input, ops);
            }
            Ok(false) => {}
            Err(error) => warn!(%error, "console client not accepted"),
        }
    }

    /// Reads, remembering that standard input may wait: it is read once for each time it is readable.
    pub(super) fn read(input: &mut ConsoleInput, buffer: &mut [u8]) -> (Input, bool) {
        let got = input.read(buffer);
        let once = matches!(input, ConsoleInput::Stdin(_));
        (got, once)
    }

    fn listen(&mut self, input: &ConsoleInput, ops: &mut EventOps<'_>) {
        if let Some(fd) = input.listener_fd()
            && !self.listening
        {
            self.listening = add(ops, fd, Token::Client, EventSet::IN);
        }
    }

    fn stop(&mut self, ops: &mut EventOps<'_>) {
        match std::mem::replace(&mut self.watch, Watch::Idle) {
            Watch::Idle => {}
            Watch::Reading(fd) | Watch::Gone(fd) => remove(ops, fd, Token::Input),
        }
    }
}

pub(super) fn add(ops: &mut EventOps<'_>, fd: RawFd, token: Token, events: EventSet) -> bool {
    match ops.add(Events::with_data_raw(fd, token.data(), events)) {
        Ok(()) => true,
        Err(error) => {
            debug!(?token, %error, "not waited on");
            false
        }
    }
}

pub(super) fn remove(ops: &mut EventOps<'_>, fd: RawFd, token: Token) {
    if let Err(error) = ops.remove(Events::with_data_raw(fd, token.data(), EventSet::IN)) {
        warn!(?token, %error, "still waited on");
    }
}
