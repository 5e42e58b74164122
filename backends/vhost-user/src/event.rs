//! What happens to a daemon, told to whoever reads `--event-monitor`: objects of the VMM's form ([`daxhund_monitor`]).

#![forbid(unsafe_code)]

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use daxhund_guard::chain;
use daxhund_monitor::{EventMonitor, Form, Monitor, OpenError};

/// The words for a daemon and for what it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nouns {
    /// The program, as in `daxhund-vhost-user-blk`.
    pub program: &'static str,
    /// Where its events are from, as in `vhost-user-blk`.
    pub source: &'static str,
    /// What it serves, as in `disk`.
    pub thing: &'static str,
    /// The event of its loss, as in `disk-lost`.
    pub lost: &'static str,
    /// What is done with it, as in `served as a disk`.
    pub use_of_it: &'static str,
}

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Frontends can connect.
    Listening {
        /// What is served.
        path: &'a str,
        /// Its length.
        bytes: &'a str,
    },
    /// One has.
    FrontendConnected,
    /// It is not served any more.
    FrontendGone,
    /// Somebody on the host wants to take the device away, and waits.
    RemovalRequested {
        /// The device.
        device: &'a str,
        /// Who.
        by: &'a str,
    },
    /// It was refused.
    RemovalRefused {
        /// The device.
        device: &'a str,
    },
    /// Nobody waits for the device any more; it is kept.
    RemovalCalledOff,
    /// The memory is gone: requests fail from now on.
    Lost {
        /// What was served.
        path: &'a str,
        /// Whether it was `given` to the host, or `taken`.
        how: &'a str,
    },
    /// The daemon ends.
    Ending {
        /// An error, or `signal`.
        why: &'a str,
    },
}

/// Where events are written, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// A file or a FIFO.
    pub path: PathBuf,
    /// Form of the objects.
    pub form: Form,
}

/// Tells of events by a daemon's nouns.
#[derive(Clone, Debug)]
pub struct Events {
    monitor: Monitor,
    nouns: Nouns,
    /// What was sent is written before the last of them goes.
    _writer: Option<Arc<EventMonitor>>,
}

impl Events {
    /// To a file or a FIFO; without one they are only logged.
    pub fn open(place: Option<&Place>, nouns: Nouns) -> Result<Self, OpenError> {
        let open = |place: &Place| EventMonitor::open(&place.path, place.form);
        let writer = place.map(open).transpose()?.map(Arc::new);
        let monitor = writer
            .as_deref()
            .map_or_else(Monitor::off, EventMonitor::monitor);
        Ok(Self {
            monitor,
            nouns,
            _writer: writer,
        })
    }

    /// The words.
    pub fn nouns(&self) -> Nouns {
        self.nouns
    }

    /// Never waits.
    pub fn send(&self, event: Event<'_>) {
        self.monitor.send(&Told(self.nouns, event));
    }

    /// The daemon ends: by a signal, or by an error.
    pub fn ending<E: Error>(&self, outcome: &Result<(), E>) {
        let why = match outcome {
            Ok(()) => "signal".to_owned(),
            Err(error) => chain(error),
        };
        self.send(Event::Ending { why: &why });
    }
}

struct Told<'a>(Nouns, Event<'a>);

impl daxhund_monitor::Event for Told<'_> {
    fn source(&self) -> &'static str {
        self.0.source
    }

    fn name(&self) -> &'static str {
        match self.1 {
            Event::Listening { .. } => "listening",
            Event::FrontendConnected => "frontend-connected",
            Event::FrontendGone => "frontend-gone",
            Event::RemovalRequested { .. } => "removal-requested",
            Event::RemovalRefused { .. } => "removal-refused",
            Event::RemovalCalledOff => "removal-called-off",
            Event::Lost { .. } => self.0.lost,
            Event::Ending { .. } => "ending",
        }
    }

    fn properties(&self) -> Vec<(&'static str, &str)> {
        let thing = self.0.thing;
        match self.1 {
            Event::Listening { path, bytes } => vec![(thing, path), ("bytes", bytes)],
            Event::RemovalRequested { device, by } => vec![("device", device), ("by", by)],
            Event::RemovalRefused { device } => vec![("device", device)],
            Event::Lost { path, how } => vec![(thing, path), ("how", how)],
            Event::Ending { why } => vec![("why", why)],
            Event::FrontendConnected | Event::FrontendGone | Event::RemovalCalledOff => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use daxhund_monitor::Event as _;

    use super::*;

    #[test]
    fn a_loss_is_told_by_the_nouns_of_the_daemon() {
        let nouns = Nouns {
            program: "daxhund-vhost-user-blk",
            source: "vhost-user-blk",
            thing: "disk",
            lost: "disk-lost",
            use_of_it: "served as a disk",
        };
        let path = "/dev/dax1.0";
        let told = Told(nouns, Event::Lost { path, how: "given" });
        assert_eq!(
            (told.source(), told.name()),
            ("vhost-user-blk", "disk-lost")
        );
        assert_eq!(told.properties(), [("disk", path), ("how", "given")]);
    }
}
