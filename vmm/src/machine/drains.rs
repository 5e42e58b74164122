//! Drains: an operator wants what a guest uses, and waits until the host may take it.
//!
//! ```text
//!   vm.drain p0 ──▶ claimed until p0's removal_timeout ──▶ ejected, or cut off ──▶ nothing left ──▶ the guard lets go ──▶ answered
//!                                                                                     │ somebody keeps it for too long
//!                                                                                     └──▶ answered with who it is
//! ```
//! The answer is kept here, so that a drain holds up nobody else. It can't be called off: one whose client has gone goes on.

use std::time::Instant;

use tokio::sync::oneshot;
use tracing::info;

use super::guard::RELEASE_SLACK;
use super::owner::{Owner, State};
use super::removal::User;
use super::requests::Stopping;
use super::vm::RunningVm;
use crate::api::{Answer, ApiError, ErrorKind, Reply};
use crate::config::OnRemoval;
use crate::lifecycle::slot::Claimant;
use crate::monitor::Event as Happened;

/// At once. Each keeps a connection of the API open.
const MOST: usize = 16;

/// Somebody waits.
#[derive(Debug)]
pub(super) struct Drain {
    user: User,
    /// When that ends in any case.
    until: Instant,
    reply: oneshot::Sender<Answer>,
}

impl Owner {
    /// Begins a drain. It is answered by [`Owner::answer_drains`].
    pub(super) fn drain(&mut self, id: &str, reply: oneshot::Sender<Answer>) {
        match self.claim_for_drain(id) {
            Ok((user, until)) => {
                info!(%user, "it is drained");
                self.monitor
                    .send(&Happened::DrainRequested { id: user.id() });
                self.drains.push(Drain { user, until, reply });
                self.settle();
            }
            Err(error) => {
                // A client that has gone needs none.
                let _ = reply.send(Err(error));
            }
        }
    }

    fn claim_for_drain(&mut self, id: &str) -> Result<(User, Instant), ApiError> {
        if self.drains.len() >= MOST {
            let why = format!("{MOST} drains are under way; wait for one of them");
            return Err(ApiError::new(ErrorKind::Busy, why));
        }
        let vm = self.up()?;
        let user = vm.user_named(id).ok_or_else(|| {
            let why = format!(
                "the guest has neither a device nor a memory zone with id {id}; vm.info lists them"
            );
            ApiError::new(ErrorKind::NotFound, why)
        })?;
        let (policy, timeout) = vm.removal_policy(&user);
        if policy == OnRemoval::Refuse {
            let way = match user {
                User::Zone(_) => "stop has the guest powered off for it",
                User::Device(_) => "eject has the guest let go of it",
            };
            let why = format!("{user} stays where it is: on_removal=refuse; on_removal={way}");
            return Err(ApiError::new(ErrorKind::WrongState, why));
        }
        let until = Instant::now() + timeout;
        match &user {
            User::Device(id) => vm.machine.devices.drain(id, until, Instant::now()),
            User::Zone(zone) => {
                let (zone, device) = (zone.clone(), vm.device_of(&user));
                self.stop_guest(Stopping {
                    until,
                    by: Claimant::Operator,
                    zone,
                    device,
                });
            }
        }
        Ok((user, until + RELEASE_SLACK))
    }

    /// Answers drains that are over. To be called when the guard has been told of what is used by now: whoever is answered may
    /// take the device at once.
    pub(super) fn answer_drains(&mut self) {
        for drain in std::mem::take(&mut self.drains) {
            match self.answer_of(&drain) {
                None => self.drains.push(drain),
                Some(answer) => {
                    // A client that has gone needs none.
                    let _ = drain.reply.send(answer);
                }
            }
        }
    }

    fn answer_of(&self, drain: &Drain) -> Option<Answer> {
        let user = &drain.user;
        let keepers = match &self.state {
            State::Up(vm) if vm.has_nothing_of(user) => Vec::new(),
            State::Up(vm) if vm.machine.devices.is_kept(user.id()) => {
                let why = format!(
                    "the guest did not let go of {user} in time and keeps it; it can be asked again, and goes with a \
                     vm.shutdown"
                );
                return Some(Err(ApiError::new(ErrorKind::WrongState, why)));
            }
            State::Up(_) if Instant::now() < drain.until => return None,
            State::Up(vm) => vm.keepers_of(user),
            // A guest that is down has nothing, but for what could not be taken from it.
            State::NoVm | State::Created(_) if self.left_behind.is_empty() => Vec::new(),
            State::NoVm | State::Created(_) => self.left_behind.clone(),
        };
        if keepers.is_empty() {
            return Some(Ok(Reply::Empty));
        }
        let why = keepers.into_iter().fold(
            ApiError::new(ErrorKind::Internal, format!("{user} is not given up")),
            ApiError::because,
        );
        Some(Err(why))
    }
}

impl RunningVm {
    /// Whose name that is.
    fn user_named(&self, id: &str) -> Option<User> {
        let is_zone = self.config().memory.zones.iter().any(|zone| zone.id == id);
        let is_device = self.machine.devices.tree().any(|(device, ..)| device == id)
            || self.host.devices.iter().any(|device| device.id == id);
        let user = if is_zone {
            User::Zone(id.to_owned())
        } else {
            User::Device(id.to_owned())
        };
        (is_zone || is_device || !self.has_nothing_of(&user)).then_some(user)
    }

    /// The host's device under a user's memory, or its name.
    pub(super) fn device_of(&self, user: &User) -> String {
        let device = self.regions.iter().find(|(.., known)| known.user == *user);
        device
            .and_then(|(.., known)| known.device.clone())
            .unwrap_or_else(|| user.to_string())
    }

    /// Whether the host has everything back that a user had: memory, files, the function itself.
    fn has_nothing_of(&self, user: &User) -> bool {
        let has_memory = self
            .regions
            .iter()
            .any(|(_, state, known)| known.user == *user && !state.is_given_back());
        let id = user.id();
        let is_open = self.host.devices.iter().any(|device| device.id == id);
        !has_memory && !is_open && !self.host.kept().any(|kept| kept == id)
    }

    /// Who is in the way of that.
    fn keepers_of(&self, user: &User) -> Vec<String> {
        let mut keepers = self.regions.holders(user);
        if self.host.kept().any(|kept| kept == user.id()) {
            keepers.push("memory of the guest is still mapped for it in the IOMMU".to_owned());
        }
        if keepers.is_empty() {
            keepers.push("what it has asked of the host is still under way".to_owned());
        }
        keepers
    }
}
