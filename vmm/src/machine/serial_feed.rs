//! From the console's other end to the serial port: input as far as the port has room, clients as they come.

use std::os::fd::{AsRawFd, RawFd};

use event_manager::{EventOps, EventSet};
use tracing::{debug, warn};

use super::owner::Token;
use crate::devices::console::{ConsoleInput, Input};
use crate::devices::serial::SerialParts;

/// What the owner waits on for the serial port of the machine that runs.
#[derive(Debug, Default)]
pub(super) struct SerialFeed {
    /// The descriptor that is waited on for input, when it is.
    waiting: Option<RawFd>,
    /// The listener that is waited on for a client, when it is.
    listening: Option<RawFd>,
    /// The port's own wake-up.
    space: Option<RawFd>,
}

impl SerialFeed {
    /// A machine starts.
    pub(super) fn start(
        &mut self,
        ops: &mut EventOps<'_>,
        serial: Option<&SerialParts>,
        input: &mut ConsoleInput,
    ) {
        let Some(serial) = serial else { return };
        if add(ops, serial.space.as_raw_fd(), Token::SerialSpace) {
            self.space = Some(serial.space.as_raw_fd());
        }
        self.wait_for_input(ops, input);
        if self.waiting.is_none() {
            self.wait_for_client(ops, input);
        }
    }

    /// The undo of [`SerialFeed::start`]; before any of the descriptors is closed.
    pub(super) fn stop(&mut self, ops: &mut EventOps<'_>) {
        if let Some(fd) = self.space.take() {
            remove(ops, fd, Token::SerialSpace);
        }
        self.stop_waiting(ops);
        self.stop_listening(ops);
    }

    /// Moves input to the serial port as far as it has room; without room, waits for it instead of for input.
    pub(super) fn on_input(
        &mut self,
        ops: &mut EventOps<'_>,
        serial: &SerialParts,
        input: &mut ConsoleInput,
    ) {
        loop {
            let mut buffer = [0; 64];
            let room = serial.port.room().min(buffer.len());
            if room == 0 {
                self.stop_waiting(ops);
                return;
            }
            match input.read(&mut buffer[..room]) {
                Input::Bytes(n) => {
                    serial.port.input(&buffer[..n]);
                    // Standard input may be blocking: one read for each time it is readable.
                    if n < room || matches!(input, ConsoleInput::Stdin(_)) {
                        return;
                    }
                }
                Input::Nothing => return,
                Input::End => {
                    self.stop_waiting(ops);
                    input.hang_up();
                    self.wait_for_client(ops, input);
                    return;
                }
            }
        }
    }

    /// The guest has emptied the port's input FIFO.
    pub(super) fn on_space(
        &mut self,
        ops: &mut EventOps<'_>,
        serial: &SerialParts,
        input: &mut ConsoleInput,
    ) {
        // Only the wake-up counts.
        let _ = serial.space.read();
        self.wait_for_input(ops, input);
    }

    /// A client waits at the console's socket.
    pub(super) fn on_client(&mut self, ops: &mut EventOps<'_>, input: &mut ConsoleInput) {
        match input.accept() {
            Ok(true) => {
                // One at a time: the next waits in the socket's backlog until this one is gone.
                self.stop_listening(ops);
                self.wait_for_input(ops, input);
            }
            Ok(false) => {}
            Err(error) => warn!(%error, "console client not accepted"),
        }
    }

    fn wait_for_input(&mut self, ops: &mut EventOps<'_>, input: &mut ConsoleInput) {
        if self.waiting.is_some() {
            return;
        }
        if let Some(fd) = input.fd()
            && add(ops, fd, Token::ConsoleInput)
        {
            self.waiting = Some(fd);
        }
    }

    fn stop_waiting(&mut self, ops: &mut EventOps<'_>) {
        if let Some(fd) = self.waiting.take() {
            remove(ops, fd, Token::ConsoleInput);
        }
    }

    fn wait_for_client(&mut self, ops: &mut EventOps<'_>, input: &mut ConsoleInput) {
        if self.listening.is_none()
            && let Some(fd) = input.listener_fd()
            && add(ops, fd, Token::ConsoleClient)
        {
            self.listening = Some(fd);
        }
    }

    fn stop_listening(&mut self, ops: &mut EventOps<'_>) {
        if let Some(fd) = self.listening.take() {
            remove(ops, fd, Token::ConsoleClient);
        }
    }
}

fn event(fd: RawFd, token: Token) -> event_manager::Events {
    event_manager::Events::with_data_raw(fd, token.data(), EventSet::IN)
}

/// A descriptor that can't be waited on (a regular file as standard input) gives no input.
pub(super) fn add(ops: &mut EventOps<'_>, fd: RawFd, token: Token) -> bool {
    match ops.add(event(fd, token)) {
        Ok(()) => true,
        Err(error) => {
            debug!(?token, %error, "not waited on");
            false
        }
    }
}

pub(super) fn remove(ops: &mut EventOps<'_>, fd: RawFd, token: Token) {
    if let Err(error) = ops.remove(event(fd, token)) {
        warn!(?token, %error, "still waited on");
    }
}
