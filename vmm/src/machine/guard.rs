//! The guard that holds removals, as a machine's owner uses it.
//!
//! ```text
//!   memory on /dev/dax1.0 ──hold──▶ guard          somebody opens .../unbind ──▶ guard
//!                                                                                  │ wanted
//!   refuse: answered at once ◀── policy of each user of the device ◀───────────────┘
//!   else: the guest is asked, stopped or cut off; when nothing of the device is left: released
//! ```
//! What is held follows what is used: [`Removals::follow`] is called after everything that can change it. So an answer can't
//! be forgotten, and none is given while a mapping is left.
//!
//! A guard that ends unasked is looked for again at once, and then ever less often; so is one that was not there. Without it a
//! removal is found out afterwards, like those that no guard can hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daxhund_guard::{
    ConnectError, DEFAULT_SOCKET, Guard, Helper, HoldError, LostError, Notice, RequestId, Search,
    SpawnError, Verdict,
};
use rustix::thread::CapabilitySet;
use thiserror::Error;
use tracing::{error, info, warn};

use crate::config::RemovalGuard;
use crate::metrics::Outcomes;

/// What a release takes beyond the guest's time: transfers are stopped, memory is unpinned and unmapped.
pub(super) const RELEASE_SLACK: Duration = Duration::from_secs(30);

/// This program, as a helper.
const HELPER_PROGRAM: &str = "/proc/self/exe";
/// Its words; [`Helper::spawn`] adds the descriptor.
const HELPER_WORDS: [&str; 2] = ["guard", "serve"];

/// There is no guard although one was asked for.
#[derive(Debug, Error)]
pub enum GuardError {
    /// The helper.
    #[error(
        "--removal-guard on: leave the flag out to run without where there is none, or `daxhund doctor` tells what is missing"
    )]
    Spawn(#[source] SpawnError),
    /// The way to it.
    #[error("--removal-guard: leave the flag out to run without where there is none")]
    Connect(#[source] ConnectError),
}

/// A device-dax device that guest memory is on.
#[derive(Debug, Clone)]
pub(super) struct Used {
    /// Its open node.
    pub(super) node: Arc<File>,
    /// The longest time that a guest gets to let go of it.
    pub(super) timeout: Duration,
}

/// Somebody wants a device, and waits.
#[derive(Debug)]
struct Waiting {
    request: RequestId,
    device: String,
}

/// What the guard asks.
#[derive(Debug)]
pub(super) enum Asked {
    /// This device is wanted, by whoever this is. Answered by [`Removals::refuse`], or by letting go of it.
    Wanted {
        /// The question.
        request: RequestId,
        /// The device.
        device: String,
        /// Who.
        by: String,
    },
    /// This device is not wanted any more.
    Unwanted(String),
}

/// Removals of what the machine is made of.
pub(super) struct Removals {
    wish: RemovalGuard,
    guard: Option<Guard>,
    /// One that is lost, until nobody waits on its descriptor any more: the next one must not have the same number.
    lost: Option<Guard>,
    held: BTreeSet<String>,
    /// Of them, those that the guard does not hold after all.
    unheld: BTreeSet<String>,
    waiting: Vec<Waiting>,
    /// Given up to somebody who waited, since the last [`Removals::take_granted`].
    granted: Vec<String>,
    pub(super) outcomes: Outcomes,
    search: Search,
    /// Whether there is anything to hold.
    has_use: bool,
}

impl Removals {
    /// A guard that was asked for is there from the start, or it is an error. Otherwise it is looked for when there is
    /// something to hold.
    pub(super) fn new(wish: RemovalGuard) -> Result<Self, GuardError> {
        let guard = match wish {
            RemovalGuard::Auto | RemovalGuard::Off => None,
            RemovalGuard::On => Some(helper()?),
            RemovalGuard::Daemon => Some(daemon().map_err(GuardError::Connect)?),
        };
        Ok(Self {
            wish,
            guard,
            lost: None,
            held: BTreeSet::new(),
            unheld: BTreeSet::new(),
            waiting: Vec::new(),
            granted: Vec::new(),
            outcomes: Outcomes::default(),
            search: Search::default(),
            has_use: false,
        })
    }

    /// To wait on, while there is a guard.
    pub(super) fn fd(&self) -> Option<RawFd> {
        self.guard.as_ref().map(|guard| guard.as_fd().as_raw_fd())
    }

    /// Nobody waits on the descriptor of a guard that is lost any more.
    pub(super) fn forget_lost(&mut self) {
        self.lost = None;
    }

    /// Holds what is used now, and lets everything else go: whoever waits for it goes on.
    pub(super) fn follow(&mut self, used: &BTreeMap<String, Used>) {
        self.has_use = !used.is_empty();
        let now = Instant::now();
        if self.has_use && self.guard.is_none() && self.search.is_due(now) {
            self.find(now);
        }
        let gone: Vec<String> = self
            .held
            .iter()
            .filter(|device| !used.contains_key(*device))
            .cloned()
            .collect();
        for device in gone {
            self.let_go(&device);
        }
        for (device, used) in used {
            if !self.held.contains(device) {
                self.hold(device, used);
            }
        }
    }

    /// Whether somebody holds the removal of what is used. Looks for a guard that is not there yet.
    pub(super) fn are_held(&mut self) -> bool {
        if self.guard.is_none() {
            self.find(Instant::now());
        }
        self.guard.is_some()
    }

    /// When [`Removals::follow`] is to be called although nothing has happened: a guard is looked for again then.
    pub(super) fn looks_again_at(&self) -> Option<Instant> {
        let is_missing = self.has_use && self.guard.is_none() && self.wish != RemovalGuard::Off;
        is_missing.then(|| self.search.next().unwrap_or_else(Instant::now))
    }

    /// Whether somebody waits for a device whose removal is held; `None`: it is not.
    pub(super) fn standing_of(&self, device: &str) -> Option<bool> {
        let is_held = self.held.contains(device) && !self.unheld.contains(device);
        is_held.then(|| self.waiting.iter().any(|waiting| waiting.device == device))
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// What was given up to somebody who waited, since the last call.
    pub(super) fn take_granted(&mut self) -> Vec<String> {
        std::mem::take(&mut self.granted)
    }

    /// Looks for a guard where one may be and none has to.
    fn find(&mut self, now: Instant) {
        if self.wish == RemovalGuard::Off {
            return;
        }
        let daemon_runs = Path::new(DEFAULT_SOCKET).exists();
        let found = if self.wish == RemovalGuard::Daemon || daemon_runs {
            daemon().map_err(GuardError::Connect)
        } else if self.wish == RemovalGuard::On || may_have_helper() {
            helper()
        } else {
            self.not_found(now, None);
            return;
        };
        match found {
            Ok(guard) => {
                self.guard = Some(guard);
                self.search.found(now);
            }
            Err(error) => self.not_found(now, Some(&error)),
        }
    }

    fn not_found(&mut self, now: Instant, error: Option<&GuardError>) {
        if !self.search.failed(now) {
            return;
        }
        let why = error.map_or_else(
            || "no daxhund-guardd runs, and a helper needs CAP_SYS_ADMIN".to_owned(),
            |error| crate::chain(error),
        );
        warn!(
            why,
            "nobody holds the removal of device-dax memory back: \
             `systemctl enable --now daxhund-guardd.socket` has it held; `--removal-guard off` says that it need not be"
        );
    }

    fn hold(&mut self, device: &str, used: &Used) {
        let Some(guard) = &mut self.guard else { return };
        let within = used.timeout + RELEASE_SLACK;
        match guard.hold(device, used.node.as_fd(), within) {
            Ok(()) => {
                info!(device, "its removal is held until it is let go");
                self.held.insert(device.to_owned());
            }
            Err(HoldError::Lost { source, .. }) => self.lost(&source),
            Err(error) => {
                // Not to be asked again at each step.
                self.held.insert(device.to_owned());
                self.unheld.insert(device.to_owned());
                error!(device, %error, "its removal is not held");
            }
        }
    }

    /// Nothing of a device is left here.
    fn let_go(&mut self, device: &str) {
        self.held.remove(device);
        self.unheld.remove(device);
        let requests: Vec<RequestId> = self
            .waiting
            .extract_if(.., |waiting| waiting.device == device)
            .map(|waiting| waiting.request)
            .collect();
        let Some(guard) = &mut self.guard else { return };
        let told = if requests.is_empty() {
            guard.let_go(device)
        } else {
            info!(device, "it is given up; whoever wants it can have it");
            self.granted.push(device.to_owned());
            self.outcomes.let_through += requests.len() as u64;
            requests
                .into_iter()
                .try_for_each(|request| guard.answer(request, Verdict::Released))
        };
        if let Err(error) = told {
            self.lost(&error);
        }
    }

    /// What was asked since the last call.
    pub(super) fn read(&mut self) -> Vec<Asked> {
        let Some(guard) = &mut self.guard else {
            return Vec::new();
        };
        let notices = match guard.read() {
            Ok(notices) => notices,
            Err(error) => {
                self.lost(&error);
                return Vec::new();
            }
        };
        let mut asked = Vec::new();
        for notice in notices {
            match notice {
                Notice::Wanted {
                    request,
                    device,
                    by,
                } => {
                    let by = by.to_string();
                    self.outcomes.held += 1;
                    self.waiting.push(Waiting {
                        request,
                        device: device.clone(),
                    });
                    asked.push(Asked::Wanted {
                        request,
                        device,
                        by,
                    });
                }
                Notice::Withdrawn { request } => {
                    let place = self.waiting.iter().position(|w| w.request == request);
                    let Some(waiting) = place.map(|place| self.waiting.remove(place)) else {
                        continue;
                    };
                    self.outcomes.called_off += 1;
                    if !self.waiting.iter().any(|w| w.device == waiting.device) {
                        asked.push(Asked::Unwanted(waiting.device));
                    }
                }
            }
        }
        asked
    }

    /// It stays.
    pub(super) fn refuse(&mut self, request: RequestId, why: String) {
        self.waiting.retain(|waiting| waiting.request != request);
        self.outcomes.refused += 1;
        let Some(guard) = &mut self.guard else { return };
        if let Err(error) = guard.answer(request, Verdict::Refused { why }) {
            self.lost(&error);
        }
    }

    fn lost(&mut self, error: &LostError) {
        error!(error = %crate::chain(error), "the removal guard is gone; another one is looked for");
        self.search.lost(Instant::now());
        self.lost = self.guard.take();
        self.held.clear();
        self.unheld.clear();
        self.waiting.clear();
    }
}

fn daemon() -> Result<Guard, ConnectError> {
    Guard::connect(Path::new(DEFAULT_SOCKET), &me())
}

fn helper() -> Result<Guard, GuardError> {
    let helper =
        Helper::spawn(Path::new(HELPER_PROGRAM), HELPER_WORDS).map_err(GuardError::Spawn)?;
    Guard::of_helper(helper, &me()).map_err(GuardError::Connect)
}

/// The name that others are shown.
fn me() -> String {
    format!("daxhund {}", std::process::id())
}

fn may_have_helper() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}
