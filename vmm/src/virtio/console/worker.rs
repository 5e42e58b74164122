//! Moves a console's bytes between its queues and the host.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;

use super::input::{InputWatch, add, remove};
use super::output::OutputFlow;
use super::{Counters, Loan, Resized};
use crate::devices::console::Input;
use crate::memory::ram::GuestView;
use crate::virtio::device::Signals;
use crate::virtio::queue::{Queue, QueueError, Untorn};
use crate::virtio::worker::Worker;

/// Bytes moved before the event loop looks at other things.
const SHARE_BYTES: usize = 256 << 10;
/// Chains, so that empty ones count too.
const SHARE_CHAINS: usize = 256;
/// Input for one chain.
const INPUT: usize = 4096;

/// Every cause of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// The driver has given buffers for input.
    Receive,
    /// The driver has output.
    Transmit,
    /// The host has input, or the client has left.
    Input,
    /// A client waits at the socket.
    Client,
    /// The host takes output again.
    Writable,
    /// It has not for too long.
    Impatience,
    /// The window has another size.
    Resized,
}

impl Token {
    const ALL: [Self; 7] = [
        Self::Receive,
        Self::Transmit,
        Self::Input,
        Self::Client,
        Self::Writable,
        Self::Impatience,
        Self::Resized,
    ];

    pub(super) fn data(self) -> u32 {
        self as u32
    }

    fn from_data(data: u32) -> Option<Self> {
        Self::ALL.get(data as usize).copied()
    }
}

/// Serves both queues.
pub(super) struct ConsoleWorker {
    pub(super) receive: Queue,
    pub(super) transmit: Queue,
    pub(super) memory: GuestView,
    pub(super) signals: Arc<dyn Signals>,
    pub(super) loan: Loan,
    pub(super) watch: InputWatch,
    pub(super) flow: OutputFlow,
    pub(super) resized: Option<Arc<Resized>>,
    pub(super) counters: Arc<Counters>,
    /// Bytes of the chain at the ring's front that the host has already.
    pub(super) sent: usize,
    /// The driver broke the rules: nothing is served until it resets the device.
    pub(super) broken: bool,
}

impl ConsoleWorker {
    /// Output, as much as the host takes and at most a share.
    fn transmit(&mut self, ops: &mut EventOps<'_>) -> Result<(), QueueError> {
        let Self {
            transmit: queue,
            flow,
            counters,
            ..
        } = self;
        let memory = self.memory.memory();
        let (mut bytes, mut chains) = (SHARE_BYTES, SHARE_CHAINS);
        let mut pushed = false;
        while !flow.is_waiting() {
            if bytes == 0 || chains == 0 {
                queue.kick_again();
                break;
            }
            let Some(chain) = queue.pop(memory.clone())? else {
                if queue.enable_kick(&*memory)? {
                    continue;
                }
                break;
            };
            chains -= 1;
            let head = chain.head_index();
            // What a driver has changed under us since part of it was sent has no rest.
            let rest = chain
                .reader(&memory)
                .ok()
                .and_then(|mut reader| reader.split_at(self.sent).ok());
            if let Some(rest) = rest {
                let output = &mut self.loan.console.output;
                let sent = flow.send(&mut Untorn::new(rest, queue.epoch()), bytes, output, ops);
                count(&counters.output_bytes, sent.taken);
                count(&counters.lost_bytes, sent.lost);
                bytes = bytes.saturating_sub(sent.taken + sent.lost);
                // Torn: what was sent is the guest's own, and the rest is read again.
                if !sent.all || queue.is_torn() {
                    self.sent += sent.taken + sent.lost;
                    queue.unpop();
                    continue;
                }
            } else {
                count(&counters.bad_chains, 1);
            }
            self.sent = 0;
            queue.push(&*memory, head, 0)?;
            pushed = true;
        }
        if pushed {
            queue.notify(&*memory)?;
        }
        Ok(())
    }

    /// Input, as far as the driver has buffers and at most a share.
    fn receive(&mut self, ops: &mut EventOps<'_>) -> Result<(), QueueError> {
        let Self {
            receive: queue,
            counters,
            ..
        } = self;
        let memory = self.memory.memory();
        let input = &mut self.loan.console.input;
        let mut pushed = false;
        // Without more to do after a share: input is still readable then, and the event loop comes back for it.
        for _ in 0..SHARE_CHAINS {
            let Some(chain) = queue.pop(memory.clone())? else {
                if queue.enable_kick(&*memory)? {
                    continue;
                }
                self.watch.starve(input, ops);
                break;
            };
            let head = chain.head_index();
            let writer = chain
                .writer(&memory)
                .ok()
                .filter(|writer| writer.available_bytes() > 0);
            let Some(mut writer) = writer else {
                count(&counters.bad_chains, 1);
                queue.push(&*memory, head, 0)?;
                pushed = true;
                continue;
            };
            let mut buffer = [0; INPUT];
            let room = writer.available_bytes().min(INPUT);
            let (got, once) = InputWatch::read(input, &mut buffer[..room]);
            match got {
                Input::Bytes(n) => {
                    // Fails only where guest memory does, and then the driver has nothing to read.
                    let written = writer.write(&buffer[..n]).unwrap_or(0);
                    count(&counters.input_bytes, written);
                    let len = u32::try_from(written).unwrap_or(0);
                    queue.push(&*memory, head, len)?;
                    pushed = true;
                    if once {
                        break;
                    }
                }
                Input::Nothing => {
                    queue.unpop();
                    break;
                }
                Input::End => {
                    queue.unpop();
                    self.watch.end(input, ops);
                    break;
                }
            }
        }
        if pushed {
            queue.notify(&*memory)?;
        }
        Ok(())
    }

    fn serve(&mut self, token: Token, ops: &mut EventOps<'_>) -> Result<(), QueueError> {
        match token {
            Token::Receive => {
                self.receive.acknowledge_kick();
                self.watch.wait(&self.loan.console.input, ops);
                Ok(())
            }
            Token::Transmit => {
                self.transmit.acknowledge_kick();
                self.transmit(ops)
            }
            Token::Input => {
                if self.watch.on_event(&self.loan.console.input, ops) {
                    self.receive(ops)
                } else {
                    Ok(())
                }
            }
            Token::Client => {
                self.watch.on_client(&mut self.loan.console.input, ops);
                Ok(())
            }
            Token::Writable => {
                self.flow.on_writable(ops);
                self.transmit(ops)
            }
            Token::Impatience => {
                self.flow.on_impatience();
                self.transmit(ops)
            }
            Token::Resized => {
                if let Some(resized) = &self.resized {
                    resized.acknowledge();
                }
                self.signals.config_changed();
                Ok(())
            }
        }
    }
}

impl MutEventSubscriber for ConsoleWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let Self {
            receive,
            transmit,
            flow,
            resized,
            ..
        } = self;
        add(ops, receive.kick_fd(), Token::Receive, EventSet::IN);
        add(ops, transmit.kick_fd(), Token::Transmit, EventSet::IN);
        flow.init(ops);
        if let Some(resized) = resized {
            add(ops, resized.told.as_raw_fd(), Token::Resized, EventSet::IN);
        }
        // The driver may have filled its rings before it said that it is ready.
        receive.kick_again();
        transmit.kick_again();
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let Some(token) = Token::from_data(events.data()) else {
            return;
        };
        if self.broken {
            // Whatever still comes is not listened to any more.
            remove(ops, events.fd(), token);
            return;
        }
        if let Err(error) = self.serve(token, ops) {
            self.broken = true;
            self.signals.needs_reset(&error);
        }
    }
}

impl Worker for ConsoleWorker {
    fn name(&self) -> String {
        "_console".to_owned()
    }
}

fn count(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_trip_through_epoll() {
        for token in Token::ALL {
            assert_eq!(Token::from_data(token.data()), Some(token));
        }
        assert_eq!(Token::from_data(7), None);
    }
}
