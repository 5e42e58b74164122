//! A timer as a descriptor: the owner looks at removals again while there are any.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tracing::warn;

/// Fires at an interval while it is armed.
#[derive(Debug)]
pub(super) struct Timer {
    fd: OwnedFd,
    armed: bool,
}

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            fd: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            armed: false,
        })
    }

    /// Fires every `interval` from now on, or no more.
    pub(super) fn set(&mut self, interval: Option<Duration>) {
        if interval.is_some() == self.armed {
            return;
        }
        let time = Timespec::try_from(interval.unwrap_or_default()).unwrap_or(Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        });
        let spec = Itimerspec {
            it_interval: time,
            it_value: time,
        };
        match timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec) {
            Ok(_) => self.armed = interval.is_some(),
            Err(error) => warn!(%error, "a timer can't be set"),
        }
    }

    /// Takes note of its firing.
    pub(super) fn acknowledge(&self) {
        let mut count = [0; 8];
        // Nothing to read after it was disarmed.
        let _ = rustix::io::read(&self.fd, &mut count);
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
