//! Removals of the device that is served, held back until nothing of it is left here.
//!
//! ```text
//!            found, held              wanted, on_removal=refuse ──▶ refused, and held on
//!   unheld ──────────────▶ held ──────┤
//!     ▲                    │  ▲       wanted, on_removal=stop ──▶ leaving ──▶ frontend gone, or its time is up:
//!     └── guard lost ──────┘  └───────── called off ───────────────┘           let go of, then answered
//! ```
//! A frontend gets the time in which whoever manages it may take the device from the guest; the guest of one that is still there
//! then sees I/O errors.
//!
//! # Invariants
//! - The answer is given by [`Removals::let_go`], which ends this: by whoever has seen that the device is unmapped and closed.
//! - A guard that is lost or not there is looked for again, and is no reason not to serve. Removals that nobody holds are found
//!   out afterwards, by each daemon.
//!
//! # Not here
//! Guest memory that a frontend shares: its frontend holds it, and takes it back from here before it answers.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use daxhund_guard::{
    ConnectError, DEFAULT_SOCKET, Guard, HoldError, LostError, Notice, RequestId, Search, Verdict,
    chain,
};

use crate::event::{Event, Events};
use crate::policy::{OnRemoval, RemovalGuard, RemovalPolicy};

/// What letting go takes beyond the frontend's time: copies end, the memory is unmapped.
const SLACK: Duration = Duration::from_secs(30);
/// When memory that could not be unmapped is unmapped again.
const AGAIN: Duration = Duration::from_secs(1);

/// A device that is served, and whoever wants it.
#[derive(Debug)]
pub struct Removals {
    wish: RemovalGuard,
    policy: RemovalPolicy,
    events: Events,
    guard: Option<Guard>,
    search: Search,
    /// The guard was asked to hold it. One that does not is not asked at each step.
    is_asked: bool,
    waiting: Vec<RequestId>,
    /// Whatever is done with it, it is let go of then.
    until: Option<Instant>,
}

impl Removals {
    /// A guard that was asked for is there from the start, or it is an error.
    pub fn new(
        wish: RemovalGuard,
        policy: RemovalPolicy,
        events: Events,
    ) -> Result<Self, ConnectError> {
        let guard = match wish {
            RemovalGuard::Auto | RemovalGuard::Off => None,
            RemovalGuard::Daemon => Some(connect(events.nouns().program)?),
        };
        Ok(Self {
            wish,
            policy,
            events,
            guard,
            search: Search::default(),
            is_asked: false,
            waiting: Vec::new(),
            until: None,
        })
    }

    /// Readable when [`Removals::read`] has something to do.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.guard.as_ref().map(AsFd::as_fd)
    }

    /// When there is something to do without a sign.
    pub fn wakes_at(&self) -> Option<Instant> {
        let searches = self.guard.is_none() && self.wish != RemovalGuard::Off;
        let search = searches.then(|| self.search.next().unwrap_or_else(Instant::now));
        self.until.into_iter().chain(search).min()
    }

    /// Has removals of the device held, if there is somebody who does. `ask` asks the guard, to be answered within that time
    /// (`None`: there is nothing to hold now).
    pub fn follow(
        &mut self,
        ask: impl FnOnce(&mut Guard, Duration) -> Option<Result<(), HoldError>>,
    ) {
        let now = Instant::now();
        if self.guard.is_none() && self.wish != RemovalGuard::Off && self.search.is_due(now) {
            self.find(now);
        }
        let Some(guard) = self.guard.as_mut().filter(|_| !self.is_asked) else {
            return;
        };
        let thing = self.events.nouns().thing;
        let held = ask(guard, self.policy.timeout + SLACK);
        self.is_asked = held.is_some();
        match held {
            Some(Ok(())) => tracing::info!("the removal of the {thing}'s device is held"),
            Some(Err(HoldError::Lost { source, .. })) => self.lost(&source),
            Some(Err(error)) => {
                tracing::error!(error = %chain(&error), "the removal of the {thing}'s device is not held");
            }
            None => {}
        }
    }

    /// Whether somebody waits for the device, and until when its frontends have time.
    pub fn wanted(&self) -> Option<Instant> {
        self.until
    }

    /// Whether the device is to be let go of now.
    pub fn is_due(&self, has_frontend: bool) -> bool {
        let is_due = |until| !has_frontend || Instant::now() >= until;
        self.until.is_some_and(is_due)
    }

    /// It could not be: it is due again a little later.
    pub fn put_off(&mut self) {
        self.until = Some(Instant::now() + AGAIN);
    }

    /// What the guard has to say.
    pub fn read(&mut self) {
        let Some(guard) = &mut self.guard else { return };
        match guard.read() {
            Ok(notices) => notices.into_iter().for_each(|notice| self.hear(notice)),
            Err(error) => self.lost(&error),
        }
    }

    fn hear(&mut self, notice: Notice) {
        match notice {
            Notice::Wanted {
                request,
                device,
                by,
            } => {
                let by = by.to_string();
                self.events.send(Event::RemovalRequested {
                    device: &device,
                    by: &by,
                });
                if self.policy.on_removal == OnRemoval::Refuse {
                    tracing::warn!(device, by, "the removal is refused");
                    self.events.send(Event::RemovalRefused { device: &device });
                    let use_of_it = self.events.nouns().use_of_it;
                    let why = format!("{device} is {use_of_it}, on_removal=refuse");
                    self.answer(request, Verdict::Refused { why });
                    return;
                }
                let seconds = self.policy.timeout.as_secs();
                tracing::warn!(
                    device,
                    by,
                    seconds,
                    "the host wants the {}'s device: it gets it when the frontend has gone, or its time is up",
                    self.events.nouns().thing
                );
                self.waiting.push(request);
                self.until
                    .get_or_insert_with(|| Instant::now() + self.policy.timeout);
            }
            Notice::Withdrawn { request } => {
                let before = self.waiting.len();
                self.waiting.retain(|waiting| *waiting != request);
                if self.waiting.is_empty() && before > 0 {
                    let thing = self.events.nouns().thing;
                    tracing::info!("the removal was called off: the {thing} is served on");
                    self.until = None;
                    self.events.send(Event::RemovalCalledOff);
                }
            }
        }
    }

    fn answer(&mut self, request: RequestId, verdict: Verdict) {
        let Some(guard) = &mut self.guard else { return };
        if let Err(error) = guard.answer(request, verdict) {
            self.lost(&error);
        }
    }

    /// It is kept after all, and stays held: whoever waits gets an error.
    pub fn refuse(&mut self, device: &str, why: &str) {
        tracing::warn!(device, why, "the removal is refused");
        self.events.send(Event::RemovalRefused { device });
        self.until = None;
        for request in std::mem::take(&mut self.waiting) {
            let why = why.to_owned();
            self.answer(request, Verdict::Refused { why });
        }
    }

    /// Nothing of the device is left here, and whoever waits for it can have it.
    pub fn let_go(mut self, device: &str) {
        if self.waiting.is_empty() {
            let told = self.guard.as_mut().map(|guard| guard.let_go(device));
            if let Some(Err(error)) = told {
                self.lost(&error);
            }
        }
        for request in std::mem::take(&mut self.waiting) {
            self.answer(request, Verdict::Released);
        }
    }

    fn find(&mut self, now: Instant) {
        let is_there = Path::new(DEFAULT_SOCKET).exists();
        let found = (is_there || self.wish == RemovalGuard::Daemon)
            .then(|| connect(self.events.nouns().program));
        let why = match found {
            Some(Ok(guard)) => {
                self.guard = Some(guard);
                return self.search.found(now);
            }
            Some(Err(error)) => chain(&error),
            None => "no daxhund-guardd runs".to_owned(),
        };
        if self.search.failed(now) {
            tracing::warn!(
                why,
                "nobody holds the removal of the {}'s device back: `systemctl enable --now daxhund-guardd.socket` has it held; \
                 `--removal-guard off` says that it need not be",
                self.events.nouns().thing
            );
        }
    }

    fn lost(&mut self, error: &LostError) {
        tracing::error!(error = %chain(error), "the removal guard is gone; another one is looked for");
        self.search.lost(Instant::now());
        self.guard = None;
        self.is_asked = false;
        self.waiting.clear();
        self.until = None;
    }
}

fn connect(program: &str) -> Result<Guard, ConnectError> {
    let me = format!("{program} {}", std::process::id());
    Guard::connect(Path::new(DEFAULT_SOCKET), &me)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Nouns;

    fn nobody() -> Events {
        let nouns = Nouns {
            program: "daxhund-vhost-user-test",
            source: "vhost-user-test",
            thing: "thing",
            lost: "thing-lost",
            use_of_it: "tested",
        };
        Events::open(None, nouns).unwrap()
    }

    fn removals(on_removal: OnRemoval, timeout: Duration) -> Removals {
        let policy = RemovalPolicy {
            on_removal,
            timeout,
        };
        Removals::new(RemovalGuard::Off, policy, nobody()).unwrap()
    }

    #[test]
    fn a_device_that_nobody_wants_is_kept_and_a_wanted_one_waits_for_its_frontend_only() {
        let mut removals = removals(OnRemoval::Stop, Duration::from_hours(1));
        assert!(!removals.is_due(false) && !removals.is_due(true));
        assert_eq!(removals.wakes_at(), None, "nobody is looked for");
        removals.until = Some(Instant::now() + Duration::from_hours(1));
        assert!(removals.is_due(false), "nobody uses it");
        assert!(!removals.is_due(true), "there is time");
        assert_eq!(removals.wakes_at(), removals.until);
        removals.until = Some(Instant::now());
        assert!(removals.is_due(true), "the time is up");
        removals.put_off();
        assert!(!removals.is_due(true));
    }

    #[test]
    fn a_guard_that_is_not_there_is_looked_for_later() {
        let policy = RemovalPolicy {
            on_removal: OnRemoval::Stop,
            timeout: Duration::ZERO,
        };
        let mut removals = Removals::new(RemovalGuard::Auto, policy, nobody()).unwrap();
        assert!(removals.wakes_at().unwrap() <= Instant::now(), "at once");
        removals.search.failed(Instant::now());
        assert!(removals.wakes_at().unwrap() > Instant::now());
    }
}
