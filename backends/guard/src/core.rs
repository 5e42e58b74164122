//! Who may pass: the guard's decisions, without clock, descriptor or thread.
//!
//! ```text
//!                          nobody holds it; only others are meant
//!   opened ───────────────────────────────────────────────────────────────────────> allowed
//!     │                                                                                ^
//!     ├── target unknown ── as the policy says: allowed, denied, or every holder asked │
//!     v                                                                                │
//!   waiting ── each claim on a target is released, let go, or dead with no lock left ──┘
//!     │
//!     ├── a holder refuses ───────────────────────────────┐
//!     ├── a holder has not answered by its deadline ──────┼──> denied, the other holders hear "withdrawn"
//!     ├── the guard ends ─────────────────────────────────┤
//!     └── the opener is gone ─────────────────────────────┘
//!
//!   a claim (holder, device):
//!
//!     hold ──> held ──ask──> asked ──released──> (gone)
//!               │ ^            │ refused, late, withdrawn: held again
//!               │ └────────────┘
//!               ├── connection closed ──> detached ── same process holds anew ──> held, by the newcomer
//!               │                            │
//!               └── process exited ──────────┴──> dead ── the device's last lock is gone ──> (gone)
//! ```
//! A claim that is not gone stops every opener that means its device. Detached and dead claims can't be asked: their openers
//! wait for what may still happen, up to the same deadline.
//!
//! # Invariants
//! - No opener is allowed while a claim on its target is there.
//! - Every opener is answered exactly once, and every question is withdrawn, answered or expires with its claim.
//! - Numbers (holders, openers, requests) are never used again, so a late word can't reach a newcomer.
//! - A claim on a device whose removal waits is not accepted: the newcomer would never be asked.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::lineage::DeviceName;
use crate::policy::UnknownPolicy;
use crate::target::Target;

/// A connection that holds devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HolderId(pub(crate) u64);

/// An opening that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OpenerId(pub(crate) u64);

/// A question to a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Question(pub(crate) u64);

/// Why an opener passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Grounds {
    /// Nobody holds what it means.
    NotHeld,
    /// All who held it have let go.
    Released,
    /// It is not known what it means, and the policy lets it pass.
    Policy,
}

/// Why an opener does not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Denial {
    Refused {
        holder: HolderId,
        device: DeviceName,
        why: String,
    },
    Late {
        holder: HolderId,
        device: DeviceName,
    },
    Unknown {
        threatened: BTreeSet<DeviceName>,
    },
    OpenerGone,
    GuardEnds,
}

/// What the world has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Allow {
        opener: OpenerId,
        grounds: Grounds,
    },
    Deny {
        opener: OpenerId,
        denial: Denial,
    },
    Ask {
        holder: HolderId,
        question: Question,
        device: DeviceName,
        opener: OpenerId,
    },
    Withdraw {
        holder: HolderId,
        question: Question,
    },
    /// Nothing of a holder is left.
    Forget {
        holder: HolderId,
    },
}

/// Why a claim is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClaimRefused {
    /// The device's removal waits.
    BeingRemoved,
    /// The holder has it already.
    Twice,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Connected,
    Detached,
    Dead,
}

#[derive(Debug)]
struct Holder {
    /// Tells apart processes that live at the same time.
    process: u32,
    life: Life,
    claims: BTreeMap<DeviceName, Claim>,
}

#[derive(Debug)]
struct Claim {
    answer_within: Duration,
    asked: Option<Question>,
}

#[derive(Debug)]
struct Waiting {
    /// What it means; `None` is anything.
    means: Option<BTreeSet<DeviceName>>,
    /// What has to be gone, and until when.
    claims: BTreeMap<(HolderId, DeviceName), Instant>,
}

/// The guard's mind.
#[derive(Debug)]
pub(crate) struct Core {
    policy: UnknownPolicy,
    holders: BTreeMap<HolderId, Holder>,
    waiting: BTreeMap<OpenerId, Waiting>,
    questions: u64,
    actions: VecDeque<Action>,
}

impl Core {
    pub(crate) fn new(policy: UnknownPolicy) -> Self {
        Self {
            policy,
            holders: BTreeMap::new(),
            waiting: BTreeMap::new(),
            questions: 0,
            actions: VecDeque::new(),
        }
    }

    /// What to do next, in order.
    pub(crate) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// A connection of `process` claims a device. A claim of the same process that lost its connection is the newcomer's now.
    pub(crate) fn hold(
        &mut self,
        holder: HolderId,
        process: u32,
        device: &DeviceName,
        answer_within: Duration,
    ) -> Result<(), ClaimRefused> {
        if self.claims_of(holder).any(|claimed| claimed == device) {
            return Err(ClaimRefused::Twice);
        }
        let is_own = |other: &Holder| other.process == process && other.life == Life::Detached;
        let detached = self
            .holders
            .iter()
            .find(|(_, other)| is_own(other) && other.claims.contains_key(device))
            .map(|(id, _)| *id);
        let means = |it: &Waiting| it.means.as_ref().is_none_or(|of| of.contains(device));
        let waits = self.waiting.values().any(means);
        if waits && detached.is_none() {
            return Err(ClaimRefused::BeingRemoved);
        }
        let newcomer = self.holders.entry(holder).or_insert(Holder {
            process,
            life: Life::Connected,
            claims: BTreeMap::new(),
        });
        newcomer.claims.insert(
            device.clone(),
            Claim {
                answer_within,
                asked: None,
            },
        );
        if let Some(old) = detached {
            self.inherit(old, holder, device);
        }
        Ok(())
    }

    /// Openers that wait for a lost connection's claim wait for the new one's; it is asked.
    fn inherit(&mut self, old: HolderId, new: HolderId, device: &DeviceName) {
        let (from, to) = ((old, device.clone()), (new, device.clone()));
        let mut first = None;
        for (opener, waiting) in &mut self.waiting {
            if let Some(deadline) = waiting.claims.remove(&from) {
                waiting.claims.insert(to.clone(), deadline);
                first = first.or(Some(*opener));
            }
        }
        if let Some(opener) = first {
            self.ask(new, device, opener);
        }
        self.drop_claim(old, device);
    }

    /// Somebody opens a file by which `target` can be taken away.
    pub(crate) fn opened(&mut self, opener: OpenerId, target: Target, now: Instant) {
        let is_unknown = matches!(target, Target::Unknown(_));
        let devices = match target {
            Target::Others => BTreeSet::new(),
            Target::Devices(devices) => devices,
            Target::Unknown(threatened) => match self.policy {
                _ if !threatened.iter().any(|device| self.is_held(device)) => BTreeSet::new(),
                UnknownPolicy::HoldAll => threatened,
                UnknownPolicy::Allow => {
                    let grounds = Grounds::Policy;
                    return self.actions.push_back(Action::Allow { opener, grounds });
                }
                UnknownPolicy::Deny => {
                    let denial = Denial::Unknown { threatened };
                    return self.actions.push_back(Action::Deny { opener, denial });
                }
            },
        };
        let mut claims = BTreeMap::new();
        for (id, holder) in &self.holders {
            for (device, claim) in &holder.claims {
                if devices.contains(device) {
                    claims.insert((*id, device.clone()), now + claim.answer_within);
                }
            }
        }
        if claims.is_empty() {
            let grounds = Grounds::NotHeld;
            return self.actions.push_back(Action::Allow { opener, grounds });
        }
        let asked: Vec<_> = claims.keys().cloned().collect();
        // Who was asked on behalf of an earlier opener is not given more time by a later one.
        for (claim, deadline) in &mut claims {
            let earlier = self.waiting.values().filter_map(|it| it.claims.get(claim));
            *deadline = earlier.min().copied().unwrap_or(*deadline);
        }
        let means = (!is_unknown).then_some(devices);
        self.waiting.insert(opener, Waiting { means, claims });
        for (holder, device) in asked {
            self.ask(holder, &device, opener);
        }
    }

    /// A holder answers a question. Gives false when the question is not its, or not asked any more.
    pub(crate) fn answered(
        &mut self,
        holder: HolderId,
        question: Question,
        verdict: Result<(), String>,
    ) -> bool {
        let Some(device) = self.holders.get(&holder).and_then(|it| {
            let asked = |claim: &Claim| claim.asked == Some(question);
            let found = it.claims.iter().find(|(_, claim)| asked(claim));
            found.map(|(device, _)| device.clone())
        }) else {
            return false;
        };
        self.clear_question(holder, &device);
        match verdict {
            Ok(()) => self.release(holder, &device),
            Err(why) => {
                let claim = (holder, device.clone());
                let waits = |(_, it): &(&OpenerId, &Waiting)| it.claims.contains_key(&claim);
                let openers: Vec<_> = self
                    .waiting
                    .iter()
                    .filter(waits)
                    .map(|(id, _)| *id)
                    .collect();
                for opener in openers {
                    let (device, why) = (device.clone(), why.clone());
                    self.deny(
                        opener,
                        Denial::Refused {
                            holder,
                            device,
                            why,
                        },
                    );
                }
            }
        }
        true
    }

    /// A holder lets go by itself. Gives false when it does not hold the device.
    pub(crate) fn let_go(&mut self, holder: HolderId, device: &DeviceName) -> bool {
        let held = self.claims_of(holder).any(|claimed| claimed == device);
        if held {
            self.clear_question(holder, device);
            self.release(holder, device);
        }
        held
    }

    /// A connection is closed. That is no release.
    pub(crate) fn disconnected(&mut self, holder: HolderId) {
        if let Some(it) = self.holders.get_mut(&holder) {
            if it.life == Life::Connected {
                it.life = Life::Detached;
            }
            for claim in it.claims.values_mut() {
                claim.asked = None;
            }
        }
        self.forget_if_empty(holder);
    }

    /// A holder's process has ended. What it lent may live on: see [`Core::lock_gone`].
    pub(crate) fn exited(&mut self, holder: HolderId) {
        if let Some(it) = self.holders.get_mut(&holder) {
            it.life = Life::Dead;
            for claim in it.claims.values_mut() {
                claim.asked = None;
            }
        }
        self.forget_if_empty(holder);
    }

    /// Nobody has a lock on the device any more. Only for the dead that counts.
    pub(crate) fn lock_gone(&mut self, device: &DeviceName) {
        let dead = |(_, it): &(&HolderId, &Holder)| {
            it.life == Life::Dead && it.claims.contains_key(device)
        };
        let holders: Vec<_> = self
            .holders
            .iter()
            .filter(dead)
            .map(|(id, _)| *id)
            .collect();
        for holder in holders {
            self.release(holder, device);
        }
    }

    /// An opener has ended while it waited.
    pub(crate) fn opener_gone(&mut self, opener: OpenerId) {
        self.deny(opener, Denial::OpenerGone);
    }

    /// The guard ends: nobody is let through by that.
    pub(crate) fn ends(&mut self) {
        let openers: Vec<_> = self.waiting.keys().copied().collect();
        for opener in openers {
            self.deny(opener, Denial::GuardEnds);
        }
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Instant) {
        let mut late = Vec::new();
        for (opener, waiting) in &self.waiting {
            let overdue = waiting
                .claims
                .iter()
                .find(|(_, deadline)| **deadline <= now);
            if let Some(((holder, device), _)) = overdue {
                late.push((*opener, *holder, device.clone()));
            }
        }
        for (opener, holder, device) in late {
            self.deny(opener, Denial::Late { holder, device });
        }
    }

    /// When [`Core::tick`] has something to do.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let deadlines = self.waiting.values().flat_map(|it| it.claims.values());
        deadlines.min().copied()
    }

    pub(crate) fn is_waiting(&self, opener: OpenerId) -> bool {
        self.waiting.contains_key(&opener)
    }

    pub(crate) fn anybody_waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(crate) fn is_held(&self, device: &DeviceName) -> bool {
        self.holders
            .values()
            .any(|it| it.claims.contains_key(device))
    }

    pub(crate) fn anything_held(&self) -> bool {
        self.holders.values().any(|it| !it.claims.is_empty())
    }

    pub(crate) fn claims_of(&self, holder: HolderId) -> impl Iterator<Item = &DeviceName> {
        self.holders
            .get(&holder)
            .into_iter()
            .flat_map(|it| it.claims.keys())
    }

    /// Every claim, by device.
    pub(crate) fn claims(&self) -> impl Iterator<Item = (HolderId, &DeviceName)> {
        let all = self.holders.iter();
        all.flat_map(|(id, it)| it.claims.keys().map(|device| (*id, device)))
    }

    /// Devices of the dead: somebody has to look whether their locks are gone.
    pub(crate) fn left_by_the_dead(&self) -> BTreeSet<DeviceName> {
        let dead = self.holders.values().filter(|it| it.life == Life::Dead);
        dead.flat_map(|it| it.claims.keys().cloned()).collect()
    }

    /// Devices an opener waits for.
    pub(crate) fn awaited(&self, opener: OpenerId) -> BTreeSet<DeviceName> {
        let claims = self
            .waiting
            .get(&opener)
            .into_iter()
            .flat_map(|it| it.claims.keys());
        claims.map(|(_, device)| device.clone()).collect()
    }

    /// Asks for a claim that can be asked for and was not yet.
    fn ask(&mut self, holder: HolderId, device: &DeviceName, opener: OpenerId) {
        let Some(it) = self.holders.get_mut(&holder) else {
            return;
        };
        let Some(claim) = it.claims.get_mut(device) else {
            return;
        };
        if it.life != Life::Connected || claim.asked.is_some() {
            return;
        }
        self.questions += 1;
        let question = Question(self.questions);
        claim.asked = Some(question);
        let device = device.clone();
        self.actions.push_back(Action::Ask {
            holder,
            question,
            device,
            opener,
        });
    }

    fn clear_question(&mut self, holder: HolderId, device: &DeviceName) -> Option<Question> {
        let claim = self.holders.get_mut(&holder)?.claims.get_mut(device)?;
        claim.asked.take()
    }

    /// A claim is given up; who waited for nothing else passes.
    fn release(&mut self, holder: HolderId, device: &DeviceName) {
        let claim = (holder, device.clone());
        let mut passing = Vec::new();
        for (opener, waiting) in &mut self.waiting {
            if waiting.claims.remove(&claim).is_some() && waiting.claims.is_empty() {
                passing.push(*opener);
            }
        }
        for opener in passing {
            self.waiting.remove(&opener);
            let grounds = Grounds::Released;
            self.actions.push_back(Action::Allow { opener, grounds });
        }
        self.drop_claim(holder, device);
    }

    fn drop_claim(&mut self, holder: HolderId, device: &DeviceName) {
        if let Some(it) = self.holders.get_mut(&holder) {
            it.claims.remove(device);
        }
        self.forget_if_empty(holder);
    }

    /// A connection may claim again; what is no connection any more and claims nothing is nothing.
    fn forget_if_empty(&mut self, holder: HolderId) {
        let is_nothing = |it: &Holder| it.life != Life::Connected && it.claims.is_empty();
        if self.holders.get(&holder).is_some_and(is_nothing) {
            self.holders.remove(&holder);
            self.actions.push_back(Action::Forget { holder });
        }
    }

    fn deny(&mut self, opener: OpenerId, denial: Denial) {
        let Some(waiting) = self.waiting.remove(&opener) else {
            return;
        };
        self.actions.push_back(Action::Deny { opener, denial });
        for (holder, device) in waiting.claims.into_keys() {
            let claim = (holder, device);
            if self
                .waiting
                .values()
                .any(|it| it.claims.contains_key(&claim))
            {
                continue;
            }
            if let Some(question) = self.clear_question(holder, &claim.1) {
                self.actions
                    .push_back(Action::Withdraw { holder, question });
            }
        }
    }
}

#[cfg(test)]
mod tests;
