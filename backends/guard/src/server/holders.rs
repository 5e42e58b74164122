//! Those who hold devices, beyond their connections: their processes, and the locks that the dead have lent.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use event_manager::EventOps;
use tracing::{info, warn};

use super::Server;
use crate::core::{HolderId, OpenerId, Question};
use crate::group::Gate;
use crate::lineage::DeviceName;
use crate::locks::is_locked;
use crate::opener::Opener;
use crate::process::Process;
use crate::protocol::{HeldDevice, Message};
use crate::sources::Source;

/// Nobody is told when a lock goes. This is how often the guard looks while somebody waits for that, and otherwise.
const LOOK_WHEN_AWAITED: Duration = Duration::from_millis(20);
const LOOK_OTHERWISE: Duration = Duration::from_secs(1);

/// The process behind a connection.
#[derive(Debug)]
pub(super) struct HolderProcess {
    pub(super) process: Process,
    /// The VM's.
    pub(super) name: String,
    pub(super) has_ended: bool,
}

impl<G: Gate> Server<G> {
    pub(super) fn ask(
        &mut self,
        holder: HolderId,
        question: Question,
        device: &DeviceName,
        opener: OpenerId,
        ops: &mut EventOps<'_>,
    ) {
        let by = self.waiters.get(&opener).map_or_else(
            || Opener {
                pid: 0,
                name: "?".to_owned(),
                file: "?".to_owned(),
            },
            |waiter| waiter.by.clone(),
        );
        let name = self
            .processes
            .get(&holder)
            .map_or("?", |it| it.name.as_str());
        info!(pid = by.pid, name = by.name, file = by.file, %device, vm = name, "asking the holder");
        let message = Message::Wanted {
            request: question.0,
            device: device.to_string(),
            by,
        };
        self.tell(holder, &message, ops);
    }

    pub(super) fn withdraw(
        &mut self,
        holder: HolderId,
        question: Question,
        ops: &mut EventOps<'_>,
    ) {
        self.tell(
            holder,
            &Message::Withdrawn {
                request: question.0,
            },
            ops,
        );
    }

    pub(super) fn forget(&mut self, holder: HolderId, ops: &mut EventOps<'_>) {
        self.sources.remove(ops, Source::Process(holder));
        self.processes.remove(&holder);
    }

    pub(super) fn on_process_end(&mut self, holder: HolderId, ops: &mut EventOps<'_>) {
        self.sources.remove(ops, Source::Process(holder));
        self.hang_up(holder, ops);
        if let Some(it) = self.processes.get_mut(&holder) {
            it.has_ended = true;
            info!(
                vm = it.name,
                pid = it.process.pid,
                "the holder's process has ended"
            );
        }
        self.core.exited(holder);
        self.next_look = Some(Instant::now());
    }

    /// Looks whether what the dead have lent is given back, when it is time to.
    pub(super) fn look_at_locks(&mut self) {
        let now = Instant::now();
        let devices = self.core.left_by_the_dead();
        if devices.is_empty() {
            self.next_look = None;
            return;
        }
        if self.next_look.is_some_and(|next| next > now) && !self.look_is_urgent(now) {
            return;
        }
        for device in devices {
            match is_locked(&self.host, &device) {
                Ok(false) => self.core.lock_gone(&device),
                Ok(true) => {}
                // It counts as locked.
                Err(error) => warn!(%device, %error, "can't see whether anybody has a lock on it"),
            }
        }
        let again = !self.core.left_by_the_dead().is_empty();
        let interval = if self.core.anybody_waits() {
            LOOK_WHEN_AWAITED
        } else {
            LOOK_OTHERWISE
        };
        self.next_look = again.then(|| now + interval);
    }

    /// Somebody waits now who did not when the next look was planned.
    fn look_is_urgent(&self, now: Instant) -> bool {
        let planned = self.next_look;
        self.core.anybody_waits() && planned.is_some_and(|next| next > now + LOOK_WHEN_AWAITED)
    }

    pub(super) fn held_list(&self) -> Vec<HeldDevice> {
        let claims = self.core.claims();
        let mut list: Vec<HeldDevice> = claims
            .filter_map(|(holder, device)| {
                let it = self.processes.get(&holder)?;
                let state = if it.has_ended {
                    "ended, memory lent"
                } else if self.peers.contains_key(&holder) {
                    "connected"
                } else {
                    "connection lost"
                };
                Some(HeldDevice {
                    device: device.to_string(),
                    name: it.name.clone(),
                    pid: it.process.pid,
                    uid: it.process.uid,
                    state: state.to_owned(),
                })
            })
            .collect();
        list.sort_by(|one, other| one.device.cmp(&other.device));
        list
    }
}
