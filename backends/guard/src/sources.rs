//! Everything the guard waits on: one closed list of causes, each behind a number that is never used again.
//!
//! The kernel's events of one batch can be about descriptors that were closed while the batch was worked through, and
//! whose numbers others have by then. A number of this list is gone with its source.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};

use crate::core::{HolderId, OpenerId};

/// Why the guard wakes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// Somebody opens a watched file.
    Gate,
    /// Somebody connects.
    Listener,
    /// A connection has something to say, or room.
    Peer(HolderId),
    /// The process of a connection has ended.
    Process(HolderId),
    /// The process of an opener has ended.
    OpenerProcess(OpenerId),
    /// The kernel has news of devices.
    Uevents,
    /// A removal that the guard itself performs is done.
    Removals,
    /// A deadline has come, or it is time to look at locks.
    Timer,
    /// The guard is to end.
    Signal,
}

/// The list.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    last: u32,
    by_number: BTreeMap<u32, (Source, RawFd)>,
}

impl Sources {
    /// Waits on a descriptor, until [`Sources::remove`], which comes before it is closed.
    pub(crate) fn add(
        &mut self,
        ops: &mut EventOps<'_>,
        source: Source,
        fd: RawFd,
    ) -> Result<(), event_manager::Error> {
        // A daemon that sees one each microsecond comes round after an hour, to numbers that are long gone.
        self.last = self.last.wrapping_add(1);
        ops.add(Events::with_data_raw(fd, self.last, EventSet::IN))?;
        self.by_number.insert(self.last, (source, fd));
        Ok(())
    }

    /// Waits for room as well, or not any more.
    pub(crate) fn want_room(&self, ops: &EventOps<'_>, source: Source, wanted: bool) {
        let events = if wanted {
            EventSet::IN | EventSet::OUT
        } else {
            EventSet::IN
        };
        if let Some((number, fd)) = self.find(source) {
            // Fails for a descriptor that is not waited on only.
            drop(ops.modify(Events::with_data_raw(fd, number, events)));
        }
    }

    pub(crate) fn remove(&mut self, ops: &mut EventOps<'_>, source: Source) {
        if let Some((number, fd)) = self.find(source) {
            self.by_number.remove(&number);
            drop(ops.remove(Events::with_data_raw(fd, number, EventSet::IN)));
        }
    }

    /// Whose event it is; `None` when that is gone.
    pub(crate) fn of(&self, events: &Events) -> Option<Source> {
        self.by_number
            .get(&events.data())
            .map(|(source, _)| *source)
    }

    fn find(&self, source: Source) -> Option<(u32, RawFd)> {
        let found = self.by_number.iter().find(|(_, (it, _))| *it == source);
        found.map(|(number, (_, fd))| (*number, *fd))
    }
}
