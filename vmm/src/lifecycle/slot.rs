//! The life of a device in a PCI slot, from the guest's being told of it to its end.
//!
//! ```text
//!                 asked                       ejected
//!   Present ───────────────▶ Asked ─────────────────────▶ Draining ──────▶ Gone
//!      │                    ▲  │ deadline                  ▲   ▲   drained
//!      │              asked │  ▼                  ejected  │   │
//!      │                 Unanswered ────────────────────────┘   │
//!      └──────────────── ejected (the guest's own idea) ────────┘
//! ```
//! The guest may eject late or unasked: once it has, it does not use the device any more and the device goes. It may
//! also never answer: then the device stays, whole, and that is said; it can be asked again.

use std::time::{Duration, Instant};

/// From a request to the guest's eject. Linux takes well under a second; a guest that was not there by then has no
/// driver for hotplug, is paused, or uses the device and does not let it go.
pub const EJECT_DEADLINE: Duration = Duration::from_secs(10);

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
    /// The guest has ejected it.
    Ejected,
    /// Time has passed.
    Tick {
        /// Now.
        now: Instant,
    },
    /// Nothing of it is in flight any more.
    Drained,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotAction {
    /// Nothing.
    None,
    /// Tell the guest to let go.
    RequestEject,
    /// Take it off the bus and stop its workers.
    Withdraw,
    /// Say that the guest did not answer.
    ReportUnanswered,
    /// Give everything back: memory, slot, host resources, configuration.
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
        (S::Present | S::Asked { .. } | S::Unanswered, E::Ejected) => (S::Draining, A::Withdraw),
        (S::Asked { until }, E::Tick { now }) if now >= until => {
            (S::Unanswered, A::ReportUnanswered)
        }
        (S::Draining, E::Drained) => (S::Gone, A::Release),
        (state, _) => (state, A::None),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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

    proptest! {
        /// In whatever order things happen: withdrawn at most once, released at most once, and never before it.
        #[test]
        fn whatever_happens(events in prop::collection::vec((0u8..4, 0u64..30), 0..40)) {
            let start = Instant::now();
            let (mut state, mut withdrawn, mut released) = (SlotState::Present, 0, 0);
            for (kind, seconds) in events {
                let now = start + Duration::from_secs(seconds);
                let event = match kind {
                    0 => SlotEvent::Ask { now },
                    1 => SlotEvent::Ejected,
                    2 => SlotEvent::Tick { now },
                    _ => SlotEvent::Drained,
                };
                let (next, action) = step(state, event);
                withdrawn += u32::from(action == SlotAction::Withdraw);
                released += u32::from(action == SlotAction::Release);
                prop_assert!(withdrawn <= 1 && released <= withdrawn);
                if withdrawn == 1 {
                    prop_assert!(action != SlotAction::RequestEject);
                }
                state = next;
            }
        }
    }
}
