//! Those who open watched files, and their answers. One line of log for each decision.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use event_manager::EventOps;
use tracing::{debug, error, info, warn};

use super::Server;
use crate::core::{Denial, Grounds, HolderId, OpenerId};
use crate::group::{Gate, Opening};
use crate::lineage::{DeviceName, Lineage};
use crate::opener::{Opener, Visitor};
use crate::process::pidfd_of;
use crate::protocol::{Message, WaitingOpener};
use crate::sources::Source;
use crate::target::{Target, resolve};

/// Who waits for an answer.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) by: Opener,
    pub(super) kind: WaiterKind,
    /// Of the process that waits, while it is waited on.
    pidfd: Option<OwnedFd>,
}

#[derive(Debug)]
pub(super) enum WaiterKind {
    /// In the kernel, in the opening of a file.
    Opening(Opening),
    /// A connection that asks for a release.
    Release { peer: HolderId, device: DeviceName },
}

impl Waiter {
    pub(super) fn release(by: Opener, peer: HolderId, device: DeviceName) -> Self {
        Self {
            by,
            kind: WaiterKind::Release { peer, device },
            pidfd: None,
        }
    }

    pub(super) fn is_release_of(&self, of: HolderId) -> bool {
        matches!(self.kind, WaiterKind::Release { peer, .. } if peer == of)
    }
}

impl<G: Gate> Server<G> {
    pub(super) fn on_gate(&mut self, ops: &mut EventOps<'_>) {
        let openings = match self.gate.read() {
            Ok(openings) => openings,
            Err(error) => {
                info!(%error, "the kernel has turned an opener away, because its file is gone");
                return;
            }
        };
        for opening in openings {
            self.on_opening(opening, ops);
        }
    }

    fn on_opening(&mut self, opening: Opening, ops: &mut EventOps<'_>) {
        let process = Visitor::process_of(&self.host, opening.thread);
        if process == Some(std::process::id()) {
            return self.answer(&opening, true);
        }
        let path = opening.path.display().to_string();
        let visitor = Visitor::look(&self.host, process.unwrap_or(0), opening.thread, &path);
        let file = self
            .inodes
            .get(&opening.inode)
            .and_then(|path| self.files.get(path));
        let Some(file) = file.filter(|_| !visitor.only_reads) else {
            debug!(
                pid = visitor.opener.pid,
                file = path,
                "passes: threatens nothing"
            );
            return self.answer(&opening, true);
        };
        let held: Vec<&Lineage> = self.lineages.values().collect();
        let target = resolve(file, &held, &visitor.words, &|name| {
            self.host.has_device(name)
        });
        debug!(?visitor, ?target, "at the door");
        let id = OpenerId(self.new_id());
        self.waiters.insert(
            id,
            Waiter {
                by: visitor.opener,
                kind: WaiterKind::Opening(opening),
                pidfd: None,
            },
        );
        self.come(id, target, ops);
    }

    /// Somebody is at the door: the core hears of it, and the guard of its end.
    pub(super) fn come(&mut self, id: OpenerId, target: Target, ops: &mut EventOps<'_>) {
        self.core.opened(id, target, Instant::now());
        if !self.core.is_waiting(id) {
            return;
        }
        let Some(waiter) = self.waiters.get_mut(&id) else {
            return;
        };
        if !matches!(waiter.kind, WaiterKind::Opening(_)) || waiter.by.pid == 0 {
            return;
        }
        let pidfd = i32::try_from(waiter.by.pid)
            .map_err(io::Error::other)
            .and_then(pidfd_of);
        match pidfd {
            Ok(pidfd) => {
                let added = self
                    .sources
                    .add(ops, Source::OpenerProcess(id), pidfd.as_raw_fd());
                if let Err(error) = added {
                    warn!(
                        ?error,
                        pid = waiter.by.pid,
                        "it will not be known whether it ends while it waits"
                    );
                }
                waiter.pidfd = Some(pidfd);
            }
            // It is gone already.
            Err(_) => self.core.opener_gone(id),
        }
    }

    pub(super) fn allow(&mut self, id: OpenerId, grounds: &Grounds, ops: &mut EventOps<'_>) {
        let Some(waiter) = self.dismiss(id, ops) else {
            return;
        };
        let by = waiter.by;
        match grounds {
            Grounds::NotHeld => info!(
                pid = by.pid,
                name = by.name,
                file = by.file,
                "passes: not held"
            ),
            Grounds::Released => info!(
                pid = by.pid,
                name = by.name,
                file = by.file,
                "passes: released"
            ),
            Grounds::Policy => {
                warn!(
                    pid = by.pid,
                    name = by.name,
                    file = by.file,
                    "passes: what it means is not known (--unknown=allow)"
                );
            }
        }
        match waiter.kind {
            WaiterKind::Opening(opening) => self.answer(&opening, true),
            WaiterKind::Release { peer, device } => self.removals.begin(&self.host, peer, device),
        }
    }

    pub(super) fn deny(&mut self, id: OpenerId, denial: &Denial, ops: &mut EventOps<'_>) {
        let why = self.in_words(denial);
        let Some(waiter) = self.dismiss(id, ops) else {
            return;
        };
        let by = waiter.by;
        if *denial == Denial::OpenerGone {
            info!(pid = by.pid, name = by.name, file = by.file, "gone: {why}");
        } else {
            warn!(
                pid = by.pid,
                name = by.name,
                file = by.file,
                "refused: {why}"
            );
        }
        match waiter.kind {
            WaiterKind::Opening(opening) => self.answer(&opening, false),
            WaiterKind::Release { peer, device } => {
                let device = device.to_string();
                self.tell(peer, &Message::NotReleased { device, why }, ops);
            }
        }
    }

    /// Takes one that waits off the books. Its process is not waited on any more.
    fn dismiss(&mut self, id: OpenerId, ops: &mut EventOps<'_>) -> Option<Waiter> {
        let waiter = self.waiters.remove(&id);
        self.sources.remove(ops, Source::OpenerProcess(id));
        if waiter.is_none() {
            error!(?id, "an answer for nobody");
        }
        waiter
    }

    fn answer(&self, opening: &Opening, pass: bool) {
        if let Err(error) = self.gate.answer(opening, pass) {
            warn!(%error, file = %opening.path.display(), pass, "the kernel does not take the answer");
        }
    }

    /// At the end: who has come since the last look is turned away, unless nothing is threatened by it.
    pub(super) fn turn_away_the_rest(&mut self) {
        while let Ok(openings) = self.gate.read() {
            if openings.is_empty() {
                return;
            }
            for opening in openings {
                let own =
                    Visitor::process_of(&self.host, opening.thread) == Some(std::process::id());
                self.answer(&opening, own || !self.core.anything_held());
            }
        }
    }

    pub(super) fn waiting_list(&self) -> Vec<WaitingOpener> {
        let all = self.waiters.iter();
        all.map(|(id, waiter)| WaitingOpener {
            by: waiter.by.clone(),
            devices: self
                .core
                .awaited(*id)
                .iter()
                .map(DeviceName::to_string)
                .collect(),
        })
        .collect()
    }

    /// Why an opener is turned away, for the log and for who asked for a release.
    fn in_words(&self, denial: &Denial) -> String {
        match denial {
            Denial::Refused {
                holder,
                device,
                why,
            } => {
                format!("{} keeps {device}: {why}", self.called(*holder))
            }
            Denial::Late { holder, device } => {
                format!(
                    "{} holds {device} and did not answer in time",
                    self.called(*holder)
                )
            }
            Denial::Unknown { threatened } => {
                let names: Vec<String> = threatened.iter().map(DeviceName::to_string).collect();
                let first = names.first().map_or("DEVICE", String::as_str);
                format!(
                    "it is not known which device it means, and {} is held; say which with `daxhund guard release {first}`",
                    names.join(", ")
                )
            }
            Denial::OpenerGone => "it ended while it waited".to_owned(),
            Denial::GuardEnds => "the guard ends".to_owned(),
        }
    }

    fn called(&self, holder: HolderId) -> impl fmt::Display + use<G> {
        let process = self.processes.get(&holder);
        process.map_or_else(
            || "a holder".to_owned(),
            |it| format!("{} (process {})", it.name, it.process.pid),
        )
    }
}
