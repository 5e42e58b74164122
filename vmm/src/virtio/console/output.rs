//! The guest's output, and what happens when nobody takes it.
//!
//! ```text
//!             takes nothing               PATIENCE is over
//!   Flowing ────────────────▶ Waiting ─────────────────────▶ Losing
//!      ▲                         │ takes again                 │ takes again
//!      └─────────────────────────┴─────────────────────────────┘
//! ```
//! Linux spins in the kernel until the device has taken what `hvc0` prints: a terminal or pipe whose reader has
//! stopped must not hold it for ever, and one that is slow must not lose anything. Pseudo terminal and socket never
//! make it wait.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use event_manager::{EventOps, EventSet};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tracing::warn;

use super::input::{add, remove};
use super::worker::Token;
use crate::devices::console::{ConsoleOutput, Written};

/// How long the other end may take nothing before what comes is lost.
const PATIENCE: Duration = Duration::from_secs(1);
const BUFFER: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Flowing,
    Waiting(RawFd),
    Losing(RawFd),
}

/// What of the output is waited for.
#[derive(Debug)]
pub(super) struct OutputFlow {
    flow: Flow,
    patience: OwnedFd,
}

/// What became of a chain, or of its part that was this turn's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    /// Bytes the other end has, or that went as on a wire nobody listens to.
    pub(super) taken: usize,
    /// Bytes given up after waiting.
    pub(super) lost: usize,
    /// Nothing of the chain is left.
    pub(super) all: bool,
}

impl OutputFlow {
    pub(super) fn new() -> io::Result<Self> {
        let patience = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        Ok(Self {
            flow: Flow::Flowing,
            patience,
        })
    }

    pub(super) fn init(&self, ops: &mut EventOps<'_>) {
        add(
            ops,
            self.patience.as_raw_fd(),
            Token::Impatience,
            EventSet::IN,
        );
    }

    /// Whether the other end has been asked to say when it takes something.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.flow, Flow::Waiting(_))
    }

    /// Moves at most `share` bytes.
    pub(super) fn send(
        &mut self,
        from: &mut impl Read,
        share: usize,
        output: &mut ConsoleOutput,
        ops: &mut EventOps<'_>,
    ) -> Sent {
        let mut sent = Sent {
            taken: 0,
            lost: 0,
            all: false,
        };
        while sent.taken + sent.lost < share {
            let mut buffer = [0; BUFFER];
            // It fails only where guest memory does; what was read before is all there is.
            let n = from.read(&mut buffer).unwrap_or(0);
            if n == 0 {
                sent.all = true;
                break;
            }
            let mut left = &buffer[..n];
            while !left.is_empty() {
                if let Flow::Losing(_) = self.flow {
                    sent.lost += left.len();
                    break;
                }
                match output.write_now(left) {
                    Written::Bytes(n) => {
                        sent.taken += n;
                        left = left.get(n..).unwrap_or_default();
                    }
                    Written::Later => {
                        if self.wait(output, ops) {
                            return sent;
                        }
                        sent.lost += left.len();
                        break;
                    }
                }
            }
        }
        sent
    }

    /// `false`: it can't be waited for.
    fn wait(&mut self, output: &ConsoleOutput, ops: &mut EventOps<'_>) -> bool {
        let Some(fd) = output.fd() else { return false };
        if !add(ops, fd, Token::Writable, EventSet::OUT) {
            return false;
        }
        self.flow = Flow::Waiting(fd);
        self.arm(PATIENCE);
        true
    }

    /// The other end takes something.
    pub(super) fn on_writable(&mut self, ops: &mut EventOps<'_>) {
        if let Flow::Waiting(fd) | Flow::Losing(fd) = self.flow {
            remove(ops, fd, Token::Writable);
            self.arm(Duration::ZERO);
            self.flow = Flow::Flowing;
        }
    }

    /// The timer is over.
    pub(super) fn on_impatience(&mut self) {
        let mut count = [0; 8];
        let over = rustix::io::read(&self.patience, &mut count).is_ok();
        if let (true, Flow::Waiting(fd)) = (over, self.flow) {
            warn!(
                "nobody takes the console's output: it is lost until its terminal or pipe is read again"
            );
            self.flow = Flow::Losing(fd);
        }
    }

    /// Zero disarms.
    fn arm(&self, after: Duration) {
        let it_value = Timespec::try_from(after).unwrap_or_default();
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value,
        };
        if let Err(error) = timerfd_settime(&self.patience, TimerfdTimerFlags::empty(), &once) {
            // Never for a valid descriptor and time.
            warn!(%error, "the console's timer is not set");
        }
    }
}
