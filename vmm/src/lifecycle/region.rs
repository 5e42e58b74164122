//! The life of a region of guest memory, from the day everybody has it to the day its place is free again.
//!
//! ```text
//!            lost, given up          DMA is off         given up          all have let go          unmapped, closed
//!   Present ───────────────▶ Cutting ──────────▶ Cut ───────────▶ Leaving ───────────────▶ Closing ────────────────▶ Buried
//!                              │  ▲                                │  ▲                     │  ▲                      │
//!                              └──┘ a device keeps it              └──┘ somebody keeps it   └──┘ the kernel does      │
//!                                   (again)                             (again)                  (again)              ▼
//!                                                                                        the guest has let go ──────▶ Gone
//! ```
//! What is *lost* has its transfers stopped at once; the rest follows when whoever used it has heard of it and *gives it up*.
//! What is given up without loss walks through `Cut` without a stop. The guest *lets go* of its place whenever it likes, before
//! or after: the place is free when the guest knows nothing of it and nobody on the host has it.
//!
//! Somebody who does not let go is asked again, ever less often, for ever. A region that waits for that is *stuck*: it is
//! reported once, is shown with who keeps it, and is reported again when it has gone all the same.
//!
//! Invariants, whatever happens in whatever order:
//! - Nothing else of a region is given up before DMA to it is off.
//! - A tombstone is on its place before the guest can find nothing there.
//! - Each step is done once, in order; what comes late or twice changes nothing. A later region at the same place is another
//!   [`RegionId`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A worker in the middle of a batch lets go within milliseconds, one that waits for a disk may take longer. After that it is
/// worth a word.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// From the first failure to the next try; then twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Everybody has it.
    Present,
    /// Devices of the host are to let go first.
    Cutting,
    /// No device of the host reaches it. All others have it until it is given up.
    Cut,
    /// All others are to let go.
    Leaving,
    /// Only this process has it mapped.
    Closing,
    /// The host has it back. The guest may still look where it was.
    Buried,
    /// Its place is free.
    Gone,
}

/// Somebody did not let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wait {
    since: Instant,
    again: Instant,
    pause: Duration,
}

/// What the guest knows of a region's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// It has memory there.
    Knows,
    /// It had, and has let go of it; a program of it may still look there.
    HasLetGo,
    /// It has never heard of it.
    IsNew,
}

/// A region's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionState {
    stage: Stage,
    given_up: bool,
    guest: Guest,
    wait: Option<Wait>,
    reported: bool,
}

impl RegionState {
    /// Everybody has it, the guest too.
    pub const PRESENT: Self = Self {
        stage: Stage::Present,
        given_up: false,
        guest: Guest::Knows,
        wait: None,
        reported: false,
    };

    /// How far it is.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether the host has everything of it back.
    pub fn is_given_back(&self) -> bool {
        self.stage >= Stage::Buried
    }

    /// Whether somebody keeps it beyond what is usual, and that was reported.
    pub fn is_stuck(&self) -> bool {
        self.reported && !self.is_given_back()
    }

    /// Whether it is to be looked at again: [`RegionEvent::Tick`].
    pub fn is_waiting(&self) -> bool {
        self.wait.is_some()
    }

    /// In words, for `vm.info`.
    pub fn name(&self) -> &'static str {
        match self.stage {
            _ if self.is_stuck() => "stuck",
            Stage::Present => "present",
            Stage::Cutting | Stage::Leaving | Stage::Closing => "leaving",
            Stage::Cut => "lost",
            Stage::Buried => "given-back",
            Stage::Gone => "gone",
        }
    }

    fn at(self, stage: Stage) -> Self {
        let wait = None;
        Self {
            stage,
            wait,
            ..self
        }
    }

    fn known_as(self, guest: Guest) -> Self {
        // A guest that is new does not let go of what it never had.
        let guest = if self.guest == Guest::IsNew {
            self.guest
        } else {
            guest
        };
        Self { guest, ..self }
    }

    /// Waits, twice as long as the last time.
    fn waiting(self, now: Instant) -> Self {
        let wait = match self.wait {
            None => Wait {
                since: now,
                again: now + FIRST_PAUSE,
                pause: FIRST_PAUSE,
            },
            Some(Wait { since, pause, .. }) => {
                let pause = (pause * 2).min(LONGEST_PAUSE);
                let again = now + pause;
                Wait {
                    since,
                    again,
                    pause,
                }
            }
        };
        Self {
            wait: Some(wait),
            ..self
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.wait.is_some_and(|wait| now >= wait.again)
    }

    fn has_waited_long(&self, now: Instant) -> bool {
        self.wait
            .is_some_and(|wait| now.saturating_duration_since(wait.since) >= PATIENCE)
    }

    fn report_once(self) -> (Self, Vec<RegionAction>) {
        let action = (!self.reported).then_some(RegionAction::ReportStuck);
        let reported = true;
        (Self { reported, ..self }, action.into_iter().collect())
    }
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionEvent {
    /// The host has taken the memory away, or is about to whoever uses it.
    Lost,
    /// It is to go back to the host, whatever the guest thinks.
    GiveUp,
    /// The guest has let go of it, and never comes back to its place.
    LetGo,
    /// It was never to be: the guest was not told of it.
    Undone,
    /// The guest starts anew: it knows nothing of what it does not find.
    Reset,
    /// No device of the host reaches it any more.
    DmaOff,
    /// One does.
    DmaStays {
        /// Now.
        now: Instant,
    },
    /// All have let go.
    Detached,
    /// Somebody has not.
    Held {
        /// Now.
        now: Instant,
    },
    /// It is unmapped, unlocked and closed.
    Closed,
    /// The kernel does not unmap it.
    NotClosed {
        /// Now.
        now: Instant,
    },
    /// Time has passed.
    Tick {
        /// Now.
        now: Instant,
    },
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionAction {
    /// Have devices of the host let go of it: [`RegionEvent::DmaOff`] or [`RegionEvent::DmaStays`] follows.
    CutDma,
    /// What was read of it since is not to be believed.
    MarkLost,
    /// Put a tombstone on its place.
    Bury,
    /// Have all let go of it: [`RegionEvent::Detached`] or [`RegionEvent::Held`] follows.
    Detach,
    /// Unmap, unlock and close it: [`RegionEvent::Closed`] or [`RegionEvent::NotClosed`] follows.
    Close,
    /// Say that somebody keeps it, and who.
    ReportStuck,
    /// Say that it has gone all the same.
    ReportFree,
    /// Its place is free for another region.
    FreePlace,
}

/// Takes an event: the state after it and what is to be done, in this order.
#[must_use]
pub fn step(state: RegionState, event: RegionEvent) -> (RegionState, Vec<RegionAction>) {
    use RegionAction as A;
    use RegionEvent as E;
    use Stage as S;
    match (state.stage, event) {
        (S::Present, E::Lost) => (state.at(S::Cutting), vec![A::CutDma, A::MarkLost]),
        (S::Cutting | S::Cut | S::Leaving, E::Lost) => (state, vec![A::MarkLost]),
        (_, E::GiveUp) => give_up(state),
        (S::Present, E::Reset) => (state, Vec::new()),
        (_, E::LetGo) => give_up(state.known_as(Guest::HasLetGo)),
        (_, E::Reset | E::Undone) => give_up(state.known_as(Guest::IsNew)),
        (S::Cutting, E::DmaOff) if state.given_up => leave(state),
        (S::Cutting, E::DmaOff) => (state.at(S::Cut), Vec::new()),
        // Never in the usual course of things.
        (S::Cutting, E::DmaStays { now }) | (S::Closing, E::NotClosed { now }) => {
            state.waiting(now).report_once()
        }
        (S::Leaving, E::Detached) => (state.at(S::Closing), vec![A::Close]),
        (S::Leaving, E::Held { now }) => {
            let state = state.waiting(now);
            if state.has_waited_long(now) {
                state.report_once()
            } else {
                (state, Vec::new())
            }
        }
        (S::Closing, E::Closed) => {
            let free = state.reported.then_some(A::ReportFree);
            let (state, ended) = end(state);
            (state, free.into_iter().chain(ended).collect())
        }
        (S::Cutting, E::Tick { now }) if state.is_due(now) => (state, vec![A::CutDma]),
        (S::Leaving, E::Tick { now }) if state.is_due(now) => (state, vec![A::Detach]),
        (S::Closing, E::Tick { now }) if state.is_due(now) => (state, vec![A::Close]),
        // What comes late.
        _ => (state, Vec::new()),
    }
}

fn give_up(state: RegionState) -> (RegionState, Vec<RegionAction>) {
    let given_up = true;
    let state = RegionState { given_up, ..state };
    match state.stage {
        Stage::Present => (state.at(Stage::Cutting), vec![RegionAction::CutDma]),
        Stage::Cut => leave(state),
        Stage::Buried => end(state),
        Stage::Cutting | Stage::Leaving | Stage::Closing | Stage::Gone => (state, Vec::new()),
    }
}

fn leave(state: RegionState) -> (RegionState, Vec<RegionAction>) {
    let tombstone = (state.guest != Guest::IsNew).then_some(RegionAction::Bury);
    let actions = tombstone.into_iter().chain([RegionAction::Detach]);
    (state.at(Stage::Leaving), actions.collect())
}

/// The host has it; what the guest knows decides about the place.
fn end(state: RegionState) -> (RegionState, Vec<RegionAction>) {
    if state.guest == Guest::Knows {
        (state.at(Stage::Buried), Vec::new())
    } else {
        (state.at(Stage::Gone), vec![RegionAction::FreePlace])
    }
}

/// One region, and no other that is at its place later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RegionId(u64);

/// All regions that are not gone, each with what its owner knows of it.
#[derive(Debug)]
pub struct Regions<T> {
    next: u64,
    regions: BTreeMap<RegionId, (RegionState, T)>,
}

impl<T> Default for Regions<T> {
    fn default() -> Self {
        Self {
            next: 0,
            regions: BTreeMap::new(),
        }
    }
}

impl<T> Regions<T> {
    /// A region is present from now on.
    pub fn begin(&mut self, known: T) -> RegionId {
        let id = RegionId(self.next);
        self.next += 1;
        self.regions.insert(id, (RegionState::PRESENT, known));
        id
    }

    /// Takes an event. One that means a region of the past changes nothing.
    #[must_use]
    pub fn step(&mut self, id: RegionId, event: RegionEvent) -> Vec<RegionAction> {
        let Some((state, _)) = self.regions.get_mut(&id) else {
            return Vec::new();
        };
        let (next, actions) = step(*state, event);
        *state = next;
        actions
    }

    /// It is gone, or was never anybody's.
    pub fn end(&mut self, id: RegionId) -> Option<T> {
        self.regions.remove(&id).map(|(_, known)| known)
    }

    /// Its state; `None` when it is gone.
    pub fn state(&self, id: RegionId) -> Option<RegionState> {
        self.regions.get(&id).map(|(state, _)| *state)
    }

    /// What is known of it.
    pub fn get_mut(&mut self, id: RegionId) -> Option<&mut T> {
        self.regions.get_mut(&id).map(|(_, known)| known)
    }

    /// All of them, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, RegionState, &T)> {
        self.regions
            .iter()
            .map(|(id, (state, known))| (*id, *state, known))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is done when everybody does as asked at once.
    fn walk(events: &[RegionEvent]) -> (RegionState, Vec<RegionAction>) {
        let (mut state, mut done) = (RegionState::PRESENT, Vec::new());
        for event in events {
            let mut queue = vec![*event];
            while let Some(event) = queue.pop() {
                let (next, actions) = step(state, event);
                state = next;
                for action in actions {
                    done.push(action);
                    queue.extend(match action {
                        RegionAction::CutDma => Some(RegionEvent::DmaOff),
                        RegionAction::Detach => Some(RegionEvent::Detached),
                        RegionAction::Close => Some(RegionEvent::Closed),
                        _ => None,
                    });
                }
            }
        }
        (state, done)
    }

    const WHOLE_WALK: [RegionAction; 4] = [
        RegionAction::CutDma,
        RegionAction::Bury,
        RegionAction::Detach,
        RegionAction::Close,
    ];

    #[test]
    fn a_guest_that_lets_go_frees_the_place() {
        let (state, done) = walk(&[RegionEvent::LetGo]);
        assert_eq!(state.stage(), Stage::Gone);
        assert_eq!(done[..4], WHOLE_WALK);
        assert_eq!(done[4..], [RegionAction::FreePlace]);
    }

    #[test]
    fn a_guest_that_is_cut_off_keeps_the_place_until_it_lets_go() {
        let (state, done) = walk(&[RegionEvent::GiveUp, RegionEvent::GiveUp]);
        assert_eq!((state.stage(), &done[..]), (Stage::Buried, &WHOLE_WALK[..]));
        for end in [RegionEvent::LetGo, RegionEvent::Reset] {
            let (state, done) = walk(&[RegionEvent::GiveUp, end]);
            assert_eq!(state.stage(), Stage::Gone);
            assert_eq!(done.last(), Some(&RegionAction::FreePlace));
        }
    }

    #[test]
    fn what_is_lost_has_dma_off_and_waits_for_the_rest() {
        let (state, done) = walk(&[RegionEvent::Lost]);
        assert_eq!(state.stage(), Stage::Cut);
        assert_eq!(done, [RegionAction::CutDma, RegionAction::MarkLost]);
        let (state, done) = walk(&[RegionEvent::Lost, RegionEvent::GiveUp]);
        assert_eq!(state.stage(), Stage::Buried);
        assert_eq!(done[2..], WHOLE_WALK[1..]);
    }

    #[test]
    fn a_reset_leaves_what_is_there_alone() {
        let (state, done) = walk(&[RegionEvent::Reset]);
        assert_eq!((state, done), (RegionState::PRESENT, Vec::new()));
    }

    #[test]
    fn who_does_not_let_go_is_asked_again_ever_less_often_and_named_once() {
        let start = Instant::now();
        let (mut state, _) = step(RegionState::PRESENT, RegionEvent::GiveUp);
        (state, _) = step(state, RegionEvent::DmaOff);
        let (mut tries, mut reports) = (1, 0);
        for elapsed_ms in (0..60_000).step_by(5) {
            let now = start + Duration::from_millis(elapsed_ms);
            if elapsed_ms == 0 {
                (state, _) = step(state, RegionEvent::Held { now });
            }
            let (next, actions) = step(state, RegionEvent::Tick { now });
            state = next;
            if actions == [RegionAction::Detach] {
                tries += 1;
                let (next, actions) = step(state, RegionEvent::Held { now });
                state = next;
                if actions == [RegionAction::ReportStuck] {
                    assert!(now - start >= PATIENCE);
                    reports += 1;
                }
            }
        }
        assert_eq!(reports, 1);
        assert!((60..80).contains(&tries), "{tries} tries in a minute");
        assert!(state.is_stuck());
        (state, _) = step(state, RegionEvent::Detached);
        let (state, actions) = step(state, RegionEvent::Closed);
        assert_eq!(actions, [RegionAction::ReportFree]);
        assert!(!state.is_stuck() && state.is_given_back());
    }

    #[test]
    fn a_device_that_keeps_memory_is_named_at_once() {
        let now = Instant::now();
        let (state, _) = step(RegionState::PRESENT, RegionEvent::Lost);
        let (state, actions) = step(state, RegionEvent::DmaStays { now });
        assert_eq!(actions, [RegionAction::ReportStuck]);
        assert_eq!((state.stage(), state.name()), (Stage::Cutting, "stuck"));
        // Nothing else of it is given up meanwhile.
        let (state, actions) = step(state, RegionEvent::LetGo);
        assert_eq!((state.stage(), actions), (Stage::Cutting, Vec::new()));
    }

    #[test]
    fn a_word_about_a_region_of_the_past_changes_nothing() {
        let mut regions = Regions::default();
        let old = regions.begin("old");
        assert_eq!(regions.end(old), Some("old"));
        let new = regions.begin("new");
        assert_eq!(regions.step(old, RegionEvent::LetGo), []);
        assert_eq!(regions.state(new), Some(RegionState::PRESENT));
        assert_eq!(regions.state(old), None);
    }

    proptest! {
        /// Events in any order, also ones that nobody asked for: steps come once each and in order, tries apart.
        #[test]
        fn whatever_happens(events in prop::collection::vec((0u8..12, 0u64..5_000), 0..60)) {
            let start = Instant::now();
            let mut state = RegionState::PRESENT;
            let (mut buried, mut freed, mut reports) = (0, 0, 0);
            for (kind, elapsed_ms) in events {
                let now = start + Duration::from_millis(elapsed_ms);
                let event = match kind {
                    0 => RegionEvent::Lost,
                    1 => RegionEvent::GiveUp,
                    2 => RegionEvent::LetGo,
                    3 => RegionEvent::Reset,
                    4 => RegionEvent::DmaOff,
                    5 => RegionEvent::DmaStays { now },
                    6 => RegionEvent::Detached,
                    7 => RegionEvent::Held { now },
                    8 => RegionEvent::Closed,
                    9 => RegionEvent::NotClosed { now },
                    10 => RegionEvent::Undone,
                    _ => RegionEvent::Tick { now },
                };
                let (next, actions) = step(state, event);
                prop_assert!(next.stage() >= state.stage());
                for action in actions {
                    match action {
                        RegionAction::CutDma => prop_assert_eq!(next.stage(), Stage::Cutting),
                        RegionAction::Bury => buried += 1,
                        RegionAction::Detach => {
                            prop_assert_eq!(next.stage(), Stage::Leaving);
                            prop_assert!(buried == 1 || next.guest == Guest::IsNew);
                        }
                        RegionAction::Close => prop_assert_eq!(next.stage(), Stage::Closing),
                        RegionAction::FreePlace => {
                            prop_assert_eq!(next.stage(), Stage::Gone);
                            freed += 1;
                        }
                        RegionAction::ReportStuck => reports += 1,
                        RegionAction::MarkLost | RegionAction::ReportFree => {}
                    }
                }
                prop_assert!(buried <= 1 && freed <= 1 && reports <= 1);
                state = next;
            }
            prop_assert_eq!(freed == 1, state.stage() == Stage::Gone);
        }
    }
}
