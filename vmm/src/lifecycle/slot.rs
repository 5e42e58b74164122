//! The life of a device in a PCI slot, from the guest's being told of it to its end.
//!
//! ```text
//!               asked                        ejected
//!   Present ──────────────▶ Asked ───────────────────────▶ Draining ──────▶ Gone
//!     │ │                  ▲  │ deadline                   ▲  ▲  ▲  drained
//!     │ │            asked │  ▼                   ejected  │  │  │
//!     │ │               Unanswered ────────────────────────┘  │  │
//!     │ └── ejected (the guest's own idea) ───────────────────┘  │
//!     │                                                          │
//!     └ claimed ──▶ Claimed ── ejected in time ──────────────────┤
//!                      │                                         │
//!                      ├ deadline, or lost ──▶ Severed ── ejected┘
//!   any but Draining ──┘ lost
//! ```
//! An operator *asks*: the guest may eject late or unasked, and then the device goes; it may also never answer: then the
//! device stays, whole, and that is said; it can be asked again. The host *claims* what is its own, and so does an operator who
//! drains it: a guest that does not let go in time is cut off. The host can think better of it; an operator who is after it as
//! well still gets it. What is *lost* is cut off at once. A device that is cut off has given everything of the host back; its place in the guest stays
//! taken, so that nothing else comes to be there, until the guest ejects it or is reset.
//!
//! A guest that is reset has let go of everything it was asked for: it does not find the device again. One that was asked in
//! vain keeps the device, until it is asked again.

use std::time::{Duration, Instant};

/// From a request to the guest's eject. Linux takes well under a second; a guest that was not there by then has no
/// driver for hotplug, is paused, or uses the device and does not let it go.
pub const EJECT_DEADLINE: Duration = Duration::from_secs(10);

/// Who can have a guest cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claimant {
    /// The kernel, or whoever waits in it: it can think better of it.
    Host,
    /// Who drains the device.
    Operator,
}

/// Who claims a device, and until when the guest has it: one of them at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claims {
    host: Option<Instant>,
    operator: Option<Instant>,
}

impl Claims {
    const NONE: Self = Self {
        host: None,
        operator: None,
    };

    /// When the guest is cut off: whoever is in the greater hurry.
    fn until(self) -> Option<Instant> {
        self.host.into_iter().chain(self.operator).min()
    }

    fn is_due(self, now: Instant) -> bool {
        self.until().is_some_and(|until| now >= until)
    }

    fn with(mut self, by: Claimant, until: Instant) -> Self {
        let claim = match by {
            Claimant::Host => &mut self.host,
            Claimant::Operator => &mut self.operator,
        };
        *claim = Some(claim.map_or(until, |before| before.min(until)));
        self
    }
}

/// Where a device is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// The guest has it.
    Present,
    /// The guest was asked to let it go, and has until then.
    Asked {
        /// When the wait is over.
        until: Instant,
    },
    /// The guest was asked and did not let go in time. It still has the device.
    Unanswered,
    /// It is wanted back: the guest has until then.
    Claimed(Claims),
    /// Cut off. The guest has not let go of what is left of it: its place.
    Severed,
    /// The guest has let go; what is in flight on the host comes home.
    Draining,
    /// Over.
    Gone,
}

impl SlotState {
    /// In words, for `vm.info`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Asked { .. } => "removal-requested",
            Self::Unanswered => "removal-unanswered",
            Self::Claimed(Claims { host: Some(_), .. }) => "claimed-by-host",
            Self::Claimed(_) => "claimed-by-operator",
            Self::Severed => "cut-off",
            Self::Draining => "draining",
            Self::Gone => "gone",
        }
    }
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotEvent {
    /// Somebody wants it removed.
    Ask {
        /// Now.
        now: Instant,
    },
    /// It is wanted back.
    Claim {
        /// By whom.
        by: Claimant,
        /// When the guest is cut off.
        until: Instant,
    },
    /// The host does not want it back any more.
    Unclaim {
        /// Now.
        now: Instant,
    },
    /// The host has taken it already, or it does not work any more.
    Lost,
    /// The guest has ejected it.
    Ejected,
    /// Time has passed.
    Tick {
        /// Now.
        now: Instant,
    },
    /// Nothing of it is in flight any more.
    Drained,
    /// The guest starts anew: nothing is in flight, and what it was asked for it does not find again.
    Reset,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotAction {
    /// Nothing.
    None,
    /// Tell the guest to let go.
    RequestEject,
    /// Give everything of the host back: its transfers first, then what the guest has mapped, then files. Then tell the
    /// guest to let go, unless it was told.
    CutOff {
        /// Whether the guest has not been told yet.
        tell: bool,
    },
    /// Take it off the bus and stop its workers.
    Withdraw,
    /// Say that the guest did not answer.
    ReportUnanswered,
    /// Give everything back that it still has: memory, slot, host resources, configuration.
    Release,
}

/// Takes an event: the state after it and what is to be done.
#[must_use]
pub fn step(state: SlotState, event: SlotEvent) -> (SlotState, SlotAction) {
    use SlotAction as A;
    use SlotEvent as E;
    use SlotState as S;
    match (state, event) {
        (S::Present | S::Asked { .. } | S::Unanswered, E::Ask { now }) => {
            let until = now + EJECT_DEADLINE;
            (S::Asked { until }, A::RequestEject)
        }
        (S::Claimed(_) | S::Severed, E::Ask { .. }) => (state, A::RequestEject),
        (S::Present | S::Asked { .. } | S::Unanswered, E::Claim { by, until }) => {
            (S::Claimed(Claims::NONE.with(by, until)), A::RequestEject)
        }
        (S::Claimed(claims), E::Claim { by, until }) => {
            (S::Claimed(claims.with(by, until)), A::None)
        }
        (S::Claimed(claims), E::Unclaim { now }) => {
            let left = Claims {
                host: None,
                ..claims
            };
            if left == Claims::NONE {
                // It can't be unasked: the guest may be about to eject.
                let until = now + EJECT_DEADLINE;
                (S::Asked { until }, A::None)
            } else {
                (S::Claimed(left), A::None)
            }
        }
        (S::Claimed(claims), E::Tick { now }) if claims.is_due(now) => {
            (S::Severed, A::CutOff { tell: false })
        }
        (S::Present | S::Asked { .. } | S::Unanswered | S::Claimed(_), E::Lost) => {
            let tell = matches!(state, S::Present | S::Unanswered);
            (S::Severed, A::CutOff { tell })
        }
        (S::Present | S::Asked { .. } | S::Unanswered | S::Claimed(_) | S::Severed, E::Ejected) => {
            (S::Draining, A::Withdraw)
        }
        (S::Asked { until }, E::Tick { now }) if now >= until => {
            (S::Unanswered, A::ReportUnanswered)
        }
        (S::Draining, E::Drained)
        | (S::Asked { .. } | S::Claimed(_) | S::Severed | S::Draining, E::Reset) => {
            (S::Gone, A::Release)
        }
        (S::Unanswered, E::Reset) => (S::Present, A::None),
        (state, _) => (state, A::None),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOST: Claimant = Claimant::Host;

    fn after(events: &[SlotEvent]) -> (SlotState, Vec<SlotAction>) {
        let mut actions = Vec::new();
        let mut state = SlotState::Present;
        for event in events {
            let (next, action) = step(state, *event);
            state = next;
            if action != SlotAction::None {
                actions.push(action);
            }
        }
        (state, actions)
    }

    #[test]
    fn a_guest_that_answers() {
        let now = Instant::now();
        let (state, actions) = after(&[
            SlotEvent::Ask { now },
            SlotEvent::Tick { now },
            SlotEvent::Ejected,
            SlotEvent::Drained,
        ]);
        assert_eq!(state, SlotState::Gone);
        assert_eq!(
            actions,
            [
                SlotAction::RequestEject,
                SlotAction::Withdraw,
                SlotAction::Release
            ]
        );
    }

    #[test]
    fn a_guest_that_is_late() {
        let now = Instant::now();
        let late = now + EJECT_DEADLINE;
        let (state, actions) = after(&[SlotEvent::Ask { now }, SlotEvent::Tick { now: late }]);
        assert_eq!(state, SlotState::Unanswered);
        assert_eq!(actions[1], SlotAction::ReportUnanswered);
        assert_eq!(
            step(state, SlotEvent::Ejected),
            (SlotState::Draining, SlotAction::Withdraw)
        );
        let (again, action) = step(state, SlotEvent::Ask { now: late });
        assert_eq!(action, SlotAction::RequestEject);
        assert_eq!(again.name(), "removal-requested");
    }

    #[test]
    fn a_guest_that_does_not_answer_the_host_is_cut_off() {
        let now = Instant::now();
        let until = now + Duration::from_secs(3);
        let (state, actions) = after(&[
            SlotEvent::Claim { by: HOST, until },
            SlotEvent::Tick { now },
            SlotEvent::Tick { now: until },
            SlotEvent::Tick { now: until },
            SlotEvent::Lost,
        ]);
        assert_eq!(state, SlotState::Severed);
        assert_eq!(
            actions,
            [SlotAction::RequestEject, SlotAction::CutOff { tell: false }]
        );
        let (state, action) = step(state, SlotEvent::Ejected);
        assert_eq!((state, action), (SlotState::Draining, SlotAction::Withdraw));
    }

    #[test]
    fn a_claim_that_is_taken_back_is_a_request() {
        let now = Instant::now();
        let until = now + Duration::from_secs(3);
        let (state, actions) = after(&[
            SlotEvent::Claim { by: HOST, until },
            SlotEvent::Unclaim { now },
            SlotEvent::Tick { now: until },
            SlotEvent::Tick {
                now: now + EJECT_DEADLINE,
            },
        ]);
        assert_eq!(state, SlotState::Unanswered);
        assert_eq!(
            actions,
            [SlotAction::RequestEject, SlotAction::ReportUnanswered]
        );
    }

    #[test]
    fn the_host_calls_off_its_own_claim_only() {
        let now = Instant::now();
        let (soon, late) = (now + Duration::from_secs(3), now + Duration::from_secs(9));
        let operator = SlotEvent::Claim {
            by: Claimant::Operator,
            until: late,
        };
        let host = SlotEvent::Claim {
            by: HOST,
            until: soon,
        };
        let (state, _) = after(&[operator, host, SlotEvent::Unclaim { now }]);
        assert_eq!(state.name(), "claimed-by-operator");
        let (_, action) = step(state, SlotEvent::Tick { now: soon });
        assert_eq!(action, SlotAction::None);
        let (state, action) = step(state, SlotEvent::Tick { now: late });
        assert_eq!(
            (state, action),
            (SlotState::Severed, SlotAction::CutOff { tell: false })
        );
        let (state, _) = after(&[host, operator]);
        assert_eq!(state.name(), "claimed-by-host");
        let (state, _) = step(state, SlotEvent::Tick { now: soon });
        assert_eq!(state, SlotState::Severed);
    }

    #[test]
    fn a_guest_that_starts_anew_does_not_find_what_it_was_asked_for() {
        let now = Instant::now();
        let ask = SlotEvent::Ask { now };
        for wanted in [
            &[ask] as &[_],
            &[SlotEvent::Claim {
                by: HOST,
                until: now,
            }],
            &[SlotEvent::Lost],
            &[ask, SlotEvent::Ejected],
        ] {
            let (state, _) = after(wanted);
            let end = (SlotState::Gone, SlotAction::Release);
            assert_eq!(step(state, SlotEvent::Reset), end, "{wanted:?}");
        }
        let late = now + EJECT_DEADLINE;
        for kept in [&[] as &[_], &[ask, SlotEvent::Tick { now: late }]] {
            let (state, _) = after(kept);
            let present = (SlotState::Present, SlotAction::None);
            assert_eq!(step(state, SlotEvent::Reset), present);
        }
    }

    #[test]
    fn what_is_lost_is_cut_off_and_the_guest_told() {
        let (state, actions) = after(&[SlotEvent::Lost, SlotEvent::Lost]);
        assert_eq!(state, SlotState::Severed);
        assert_eq!(actions, [SlotAction::CutOff { tell: true }]);
    }

    proptest! {
        /// In whatever order things happen: cut off, withdrawn and released at most once each; nothing is
        /// cut off after the guest has let go; one that is claimed and never let go is cut off by its deadline.
        #[test]
        fn whatever_happens(events in prop::collection::vec((0u8..9, 0u64..30), 0..60)) {
            let start = Instant::now();
            let (mut state, mut cut, mut withdrawn, mut released) = (SlotState::Present, 0, 0, 0);
            for (kind, seconds) in events {
                let now = start + Duration::from_secs(seconds);
                let event = match kind {
                    0 => SlotEvent::Ask { now },
                    1 => SlotEvent::Ejected,
                    2 => SlotEvent::Tick { now },
                    3 => SlotEvent::Claim { by: HOST, until: now },
                    4 => SlotEvent::Unclaim { now },
                    5 => SlotEvent::Lost,
                    6 => SlotEvent::Drained,
                    7 => SlotEvent::Claim { by: Claimant::Operator, until: now },
                    _ => SlotEvent::Reset,
                };
                let (next, action) = step(state, event);
                if let SlotAction::CutOff { .. } = action {
                    prop_assert_eq!(withdrawn, 0);
                    cut += 1;
                }
                withdrawn += u32::from(action == SlotAction::Withdraw);
                released += u32::from(action == SlotAction::Release);
                prop_assert!(cut <= 1 && withdrawn <= 1 && released <= 1);
                prop_assert_eq!(released == 1, next == SlotState::Gone);
                if withdrawn == 1 {
                    prop_assert!(action != SlotAction::RequestEject);
                }
                if let (SlotState::Claimed(claims), SlotEvent::Tick { now }) = (next, event) {
                    prop_assert!(!claims.is_due(now) && claims != Claims::NONE);
                }
                state = next;
            }
        }
    }
}
