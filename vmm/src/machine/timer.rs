//! A timer as a descriptor: the owner looks at removals again while there are any.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tracing::warn;

/// Fires at an interval while it is armed, or once.
#[derive(Debug)]
pub(super) struct Timer {
    fd: OwnedFd,
    armed: bool,
    at: Option<Instant>,
}

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            fd: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            armed: false,
            at: None,
        })
    }

    /// Fires every `interval` from now on, or no more.
    pub(super) fn set(&mut self, interval: Option<Duration>) {
        if interval.is_some() == self.armed {
            return;
        }
        let interval = interval.unwrap_or_default();
        if self.arm(interval, interval) {
            self.armed = !self.armed;
        }
    }

    /// Fires once, then, or not. For a timer that has no interval.
    pub(super) fn set_once(&mut self, at: Option<Instant>) {
        if at == self.at {
            return;
        }
        // Nothing is not a moment from now.
        let soonest = Duration::from_nanos(1);
        let after = at.map(|at| at.saturating_duration_since(Instant::now()).max(soonest));
        if self.arm(after.unwrap_or_default(), Duration::ZERO) {
            self.at = at;
        }
    }

    /// Whether it was done; for a time of nothing, that it does not fire.
    fn arm(&self, first: Duration, interval: Duration) -> bool {
        let time = |duration| {
            Timespec::try_from(duration).unwrap_or(Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            })
        };
        let spec = Itimerspec {
            it_interval: time(interval),
            it_value: time(first),
        };
        let set = timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec);
        if let Err(error) = &set {
            warn!(%error, "a timer can't be set");
        }
        set.is_ok()
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

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn fires(timer: &Timer) -> bool {
        let mut fds = [PollFd::new(&timer.fd, PollFlags::IN)];
        let second = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        let fired = poll(&mut fds, Some(&second)).unwrap() == 1;
        timer.acknowledge();
        fired
    }

    #[test]
    fn an_interval_fires_again_and_a_moment_once() {
        let mut timer = Timer::new().unwrap();
        timer.set(Some(Duration::from_millis(1)));
        assert!(fires(&timer) && fires(&timer));
        timer.set(None);
        assert!(!fires(&timer));
        let mut timer = Timer::new().unwrap();
        let now = Instant::now();
        timer.set_once(Some(now));
        assert!(fires(&timer), "a moment that has passed");
        timer.set_once(Some(now));
        assert!(!fires(&timer), "once");
    }
}
