//! The owner's event loop: every cause of work is a [`Token`], and every one is matched in one place.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use event_manager::{EventManager, EventOps, EventSet, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use tracing::{debug, info, warn};

use super::Ending;
use super::events::{Event, Events};
use crate::devices::console::{ConsoleInput, Input};
use crate::devices::power::PowerRequest;
use crate::devices::serial::SerialParts;

/// The owner can't wait for events.
#[derive(Debug, Error)]
pub enum OwnerError {
    /// A signal handler.
    #[error("signal {signal} can't be handled")]
    Signal {
        /// Its number.
        signal: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The event manager.
    #[error("the event manager failed")]
    EventManager(#[source] event_manager::Error),
}

/// Why the vCPUs are to stop.
#[derive(Debug)]
pub(super) enum Stop {
    /// Build the machine anew.
    Reset,
    /// The guest has ended.
    End(Ending),
}

const ENDING_SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Signals that end the guest in order, as descriptors.
#[derive(Debug)]
pub(super) struct Signals {
    pipes: Vec<(i32, UnixStream)>,
    handlers: Vec<signal_hook::SigId>,
}

impl Signals {
    pub(super) fn install() -> Result<Self, OwnerError> {
        let mut signals = Self {
            pipes: Vec::new(),
            handlers: Vec::new(),
        };
        for signal in ENDING_SIGNALS {
            let failed = |source| OwnerError::Signal { signal, source };
            let (read, write) = UnixStream::pair().map_err(failed)?;
            read.set_nonblocking(true).map_err(failed)?;
            write.set_nonblocking(true).map_err(failed)?;
            let handler = signal_hook::low_level::pipe::register(signal, write).map_err(failed)?;
            signals.handlers.push(handler);
            signals.pipes.push((signal, read));
        }
        Ok(signals)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}

/// Every cause of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    /// A vCPU thread posted something.
    Machine,
    /// The console has input.
    ConsoleInput,
    /// The guest has emptied the serial port's input FIFO.
    SerialSpace,
    /// A client waits at the console's socket.
    ConsoleClient,
    /// A signal; the index into [`Signals`].
    Signal(u32),
}

impl Token {
    fn data(self) -> u32 {
        match self {
            Self::Machine => 0,
            Self::ConsoleInput => 1,
            Self::SerialSpace => 2,
            Self::ConsoleClient => 3,
            Self::Signal(index) => 4 + index,
        }
    }

    fn from_data(data: u32) -> Self {
        match data {
            0 => Self::Machine,
            1 => Self::ConsoleInput,
            2 => Self::SerialSpace,
            3 => Self::ConsoleClient,
            signal => Self::Signal(signal - 4),
        }
    }
}

/// The loop's state while a machine runs.
pub(super) struct Owner<'a> {
    events: &'a Events,
    serial: Option<&'a SerialParts>,
    input: &'a mut ConsoleInput,
    signals: &'a mut Signals,
    /// The descriptor that is waited on for input, when it is.
    waiting: Option<RawFd>,
    stop: Option<Stop>,
}

impl<'a> Owner<'a> {
    pub(super) fn new(
        events: &'a Events,
        serial: Option<&'a SerialParts>,
        input: &'a mut ConsoleInput,
        signals: &'a mut Signals,
    ) -> Self {
        Self {
            events,
            serial,
            input,
            signals,
            waiting: None,
            stop: None,
        }
    }

    /// Serves events until one of them ends or resets the guest.
    pub(super) fn run(self) -> Result<Stop, OwnerError> {
        let mut manager = EventManager::new().map_err(OwnerError::EventManager)?;
        let owner = manager.add_subscriber(self);
        loop {
            manager.run().map_err(OwnerError::EventManager)?;
            let owner = manager
                .subscriber_mut(owner)
                .map_err(OwnerError::EventManager)?;
            if let Some(stop) = owner.stop.take() {
                return Ok(stop);
            }
        }
    }

    /// The first cause to stop wins: a reset that follows a power-off of the same instant is no reset.
    fn stop(&mut self, stop: Stop) {
        self.stop.get_or_insert(stop);
    }

    fn on_machine(&mut self) {
        for event in self.events.drain() {
            debug!(?event, "machine");
            let stop = match event {
                Event::Power(PowerRequest::PowerOff) => Stop::End(Ending::PowerOff),
                Event::Power(PowerRequest::Reset) => Stop::Reset,
                Event::TripleFault => Stop::End(Ending::TripleFault),
                Event::VcpuFailed(fault) => Stop::End(Ending::VcpuFailed(fault)),
                Event::VcpuPanicked(id) => Stop::End(Ending::VcpuPanicked(id)),
            };
            self.stop.get_or_insert(stop);
        }
    }

    fn on_signal(&mut self, index: u32) {
        let Some((signal, pipe)) = self.signals.pipes.get_mut(index as usize) else {
            return;
        };
        let mut bytes = [0; 16];
        if matches!(pipe.read(&mut bytes), Ok(n) if n > 0) {
            info!(signal = *signal, "told to end");
            let signal = *signal;
            self.stop(Stop::End(Ending::Signal(signal)));
        }
    }

    /// Moves input to the serial port as far as it has room; without room, waits for it instead of for input.
    fn on_input(&mut self, ops: &mut EventOps<'_>) {
        let Some(serial) = self.serial else { return };
        loop {
            let mut buffer = [0; 64];
            let room = serial.port.room().min(buffer.len());
            if room == 0 {
                self.stop_waiting(ops);
                return;
            }
            match self.input.read(&mut buffer[..room]) {
                Input::Bytes(n) => {
                    serial.port.input(&buffer[..n]);
                    // Standard input may be blocking: one read for each time it is readable.
                    if n < room || matches!(self.input, ConsoleInput::Stdin(_)) {
                        return;
                    }
                }
                Input::Nothing => return,
                Input::End => {
                    self.stop_waiting(ops);
                    self.input.hang_up();
                    self.wait_for_client(ops);
                    return;
                }
            }
        }
    }

    fn on_space(&mut self, ops: &mut EventOps<'_>) {
        if let Some(serial) = self.serial {
            // Only the wake-up counts.
            let _ = serial.space.read();
        }
        self.wait_for_input(ops);
    }

    fn on_client(&mut self, ops: &mut EventOps<'_>) {
        match self.input.accept() {
            Ok(true) => {
                // One at a time: the next waits in the socket's backlog until this one is gone.
                if let Some(fd) = self.input.listener_fd() {
                    remove(ops, fd, Token::ConsoleClient);
                }
                self.wait_for_input(ops);
            }
            Ok(false) => {}
            Err(error) => warn!(%error, "console client not accepted"),
        }
    }

    fn wait_for_input(&mut self, ops: &mut EventOps<'_>) {
        if self.serial.is_none() || self.waiting.is_some() {
            return;
        }
        if let Some(fd) = self.input.fd()
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

    fn wait_for_client(&mut self, ops: &mut EventOps<'_>) {
        if let Some(fd) = self.input.listener_fd() {
            add(ops, fd, Token::ConsoleClient);
        }
    }
}

impl MutEventSubscriber for Owner<'_> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        add(ops, self.events.as_raw_fd(), Token::Machine);
        for (index, (_, pipe)) in (0u32..).zip(&self.signals.pipes) {
            add(ops, pipe.as_raw_fd(), Token::Signal(index));
        }
        if let Some(serial) = self.serial {
            add(ops, serial.space.as_raw_fd(), Token::SerialSpace);
        }
        self.wait_for_input(ops);
        if self.waiting.is_none() {
            self.wait_for_client(ops);
        }
    }

    fn process(&mut self, events: event_manager::Events, ops: &mut EventOps<'_>) {
        match Token::from_data(events.data()) {
            Token::Machine => self.on_machine(),
            Token::ConsoleInput => self.on_input(ops),
            Token::SerialSpace => self.on_space(ops),
            Token::ConsoleClient => self.on_client(ops),
            Token::Signal(index) => self.on_signal(index),
        }
    }
}

fn event(fd: RawFd, token: Token) -> event_manager::Events {
    event_manager::Events::with_data_raw(fd, token.data(), EventSet::IN)
}

/// A descriptor that can't be waited on (a regular file as standard input) gives no input.
fn add(ops: &mut EventOps<'_>, fd: RawFd, token: Token) -> bool {
    match ops.add(event(fd, token)) {
        Ok(()) => true,
        Err(error) => {
            debug!(?token, %error, "not waited on");
            false
        }
    }
}

fn remove(ops: &mut EventOps<'_>, fd: RawFd, token: Token) {
    if let Err(error) = ops.remove(event(fd, token)) {
        warn!(?token, %error, "still waited on");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_trip_through_epoll() {
        let all = [
            Token::Machine,
            Token::ConsoleInput,
            Token::SerialSpace,
            Token::ConsoleClient,
            Token::Signal(0),
            Token::Signal(2),
        ];
        for token in all {
            assert_eq!(Token::from_data(token.data()), token);
        }
    }
}
