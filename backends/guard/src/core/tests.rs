//! Stories of the core, then any order of events.

use proptest::prelude::*;

use super::*;

const A: HolderId = HolderId(1);
const B: HolderId = HolderId(2);
const WITHIN: Duration = Duration::from_secs(10);

fn device(n: u32) -> DeviceName {
    format!("dax{n}.0").parse().unwrap()
}

fn devices(of: &[u32]) -> BTreeSet<DeviceName> {
    of.iter().map(|n| device(*n)).collect()
}

fn target(of: &[u32]) -> Target {
    Target::Devices(devices(of))
}

fn drain(core: &mut Core) -> Vec<Action> {
    std::iter::from_fn(|| core.next_action()).collect()
}

fn asked(holder: HolderId, question: u64, n: u32, opener: u64) -> Action {
    Action::Ask {
        holder,
        question: Question(question),
        device: device(n),
        opener: OpenerId(opener),
    }
}

fn allowed(opener: u64, grounds: Grounds) -> Action {
    Action::Allow {
        opener: OpenerId(opener),
        grounds,
    }
}

fn denied(opener: u64, denial: Denial) -> Action {
    Action::Deny {
        opener: OpenerId(opener),
        denial,
    }
}

fn withdrawn(holder: HolderId, question: u64) -> Action {
    Action::Withdraw {
        holder,
        question: Question(question),
    }
}

fn held_by_a(now: Instant) -> Core {
    let mut core = Core::new(UnknownPolicy::Deny);
    core.hold(A, 100, &device(1), WITHIN).unwrap();
    core.tick(now);
    core
}

#[test]
fn what_nobody_holds_passes_at_once() {
    let now = Instant::now();
    let mut core = held_by_a(now);
    core.opened(OpenerId(1), target(&[0]), now);
    core.opened(OpenerId(2), Target::Others, now);
    let both = [allowed(1, Grounds::NotHeld), allowed(2, Grounds::NotHeld)];
    assert_eq!(drain(&mut core), both);
}

#[test]
fn all_who_hold_it_have_to_release() {
    let now = Instant::now();
    let mut core = held_by_a(now);
    core.hold(B, 200, &device(1), WITHIN).unwrap();
    core.opened(OpenerId(1), target(&[1]), now);
    assert_eq!(drain(&mut core), [asked(A, 1, 1, 1), asked(B, 2, 1, 1)]);
    assert!(core.answered(A, Question(1), Ok(())));
    assert_eq!(drain(&mut core), []);
    assert!(!core.answered(A, Question(1), Ok(())), "answered twice");
    assert!(!core.answered(A, Question(2), Ok(())), "another's question");
    assert!(core.answered(B, Question(2), Ok(())));
    assert_eq!(drain(&mut core), [allowed(1, Grounds::Released)]);
    assert!(!core.anything_held());
}

#[test]
fn one_refusal_denies_and_the_others_hear_of_it() {
    let now = Instant::now();
    let mut core = held_by_a(now);
    core.hold(B, 200, &device(1), WITHIN).unwrap();
    core.opened(OpenerId(1), target(&[1]), now);
    drain(&mut core);
    core.answered(B, Question(2), Err("boot RAM".into()));
    let denial = Denial::Refused {
        holder: B,
        device: device(1),
        why: "boot RAM".into(),
    };
    assert_eq!(drain(&mut core), [denied(1, denial), withdrawn(A, 1)]);
    assert!(!core.answered(A, Question(1), Ok(())), "it was withdrawn");
    assert!(core.is_held(&device(1)));
}

#[test]
fn who_is_silent_is_not_passed_over() {
    let now = Instant::now();
    let mut core = held_by_a(now);
    core.opened(OpenerId(1), target(&[1]), now);
    assert_eq!(core.next_deadline(), Some(now + WITHIN));
    core.opened(OpenerId(2), target(&[1]), now + WITHIN / 2);
    assert_eq!(
        drain(&mut core),
        [asked(A, 1, 1, 1)],
        "one question for two openers"
    );
    core.tick(now + WITHIN);
    let late = || Denial::Late {
        holder: A,
        device: device(1),
    };
    assert_eq!(
        drain(&mut core),
        [denied(1, late()), denied(2, late()), withdrawn(A, 1)]
    );
    core.opened(OpenerId(3), target(&[1]), now + WITHIN);
    assert_eq!(
        drain(&mut core),
        [asked(A, 2, 1, 3)],
        "it gets another chance"
    );
}

#[test]
fn the_dead_have_released_when_no_lock_is_left() {
    let now = Instant::now();
    let mut core = held_by_a(now);
    core.opened(OpenerId(1), target(&[1]), now);
    drain(&mut core);
    core.disconnected(A);
    core.lock_gone(&device(1));
    assert_eq!(drain(&mut core), [], "the process lives, or may live");
    core.exited(A);
    assert_eq!(drain(&mut core), []);
    assert_eq!(core.left_by_the_dead(), devices(&[1]));
    core.lock_gone(&device(1));
    assert_eq!(
        drain(&mut core),
        [allowed(1, Grounds::Released), Action::Forget { holder: A }]
    );
}

#[test]
fn a_lost_connection_is_no_release_and_can_be_made_anew() {
    let now = Instant::now();
    let mut core = held_by_a(now);
    core.opened(OpenerId(1), target(&[1]), now);
    core.disconnected(A);
    drain(&mut core);
    assert_eq!(
        core.hold(HolderId(3), 300, &device(1), WITHIN),
        Err(ClaimRefused::BeingRemoved)
    );
    core.hold(HolderId(4), 100, &device(1), WITHIN).unwrap();
    assert_eq!(
        drain(&mut core),
        [asked(HolderId(4), 2, 1, 1), Action::Forget { holder: A }]
    );
    core.answered(HolderId(4), Question(2), Ok(()));
    assert_eq!(drain(&mut core), [allowed(1, Grounds::Released)]);
    // And without anybody who comes back:
    let mut core = held_by_a(now);
    core.disconnected(A);
    core.opened(OpenerId(1), target(&[1]), now);
    assert_eq!(drain(&mut core), []);
    core.tick(now + WITHIN);
    assert!(matches!(drain(&mut core)[..], [Action::Deny { .. }]));
}

#[test]
fn an_opener_that_is_gone_is_answered_and_the_holder_hears_of_it() {
    let now = Instant::now();
    let mut core = held_by_a(now);
    core.opened(OpenerId(1), target(&[1]), now);
    drain(&mut core);
    core.opener_gone(OpenerId(1));
    assert_eq!(
        drain(&mut core),
        [denied(1, Denial::OpenerGone), withdrawn(A, 1)]
    );
    core.opener_gone(OpenerId(1));
    assert_eq!(drain(&mut core), []);
}

#[test]
fn the_unknown_goes_by_the_policy() {
    let now = Instant::now();
    let unknown = || Target::Unknown(devices(&[0, 1]));
    for (policy, expected) in [
        (
            UnknownPolicy::Deny,
            denied(
                1,
                Denial::Unknown {
                    threatened: devices(&[0, 1]),
                },
            ),
        ),
        (UnknownPolicy::Allow, allowed(1, Grounds::Policy)),
        (UnknownPolicy::HoldAll, asked(A, 1, 1, 1)),
    ] {
        let mut core = Core::new(policy);
        core.opened(OpenerId(9), unknown(), now);
        assert_eq!(
            drain(&mut core),
            [allowed(9, Grounds::NotHeld)],
            "nothing is held"
        );
        core.hold(A, 100, &device(1), WITHIN).unwrap();
        core.opened(OpenerId(1), unknown(), now);
        assert_eq!(drain(&mut core), [expected]);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Hold(usize, u32),
    Open(Vec<u32>),
    OpenUnknown,
    Answer(usize, bool),
    LetGo(usize, u32),
    Disconnect(usize),
    Exit(usize),
    LockGone(u32),
    OpenerGone(usize),
    Wait(u64),
    End,
}

fn step() -> impl Strategy<Value = Step> {
    let (who, what) = (0..4usize, 0..3u32);
    prop_oneof![
        4 => (who.clone(), what.clone()).prop_map(|(who, what)| Step::Hold(who, what)),
        4 => prop::collection::vec(what.clone(), 0..3).prop_map(Step::Open),
        1 => Just(Step::OpenUnknown),
        4 => (0..8usize, any::<bool>()).prop_map(|(n, yes)| Step::Answer(n, yes)),
        1 => (who.clone(), what.clone()).prop_map(|(who, what)| Step::LetGo(who, what)),
        2 => who.clone().prop_map(Step::Disconnect),
        2 => who.prop_map(Step::Exit),
        2 => what.prop_map(Step::LockGone),
        1 => (0..8usize).prop_map(Step::OpenerGone),
        2 => (0..15u64).prop_map(Step::Wait),
        1 => Just(Step::End),
    ]
}

/// The world outside, told apart from the core's own books: who really has what.
#[derive(Default)]
struct World {
    /// By process: its present connection, and every device that it has not given back.
    processes: BTreeMap<usize, (Option<HolderId>, BTreeSet<u32>)>,
    /// Devices of the dead whose lock is not gone.
    locked: BTreeSet<u32>,
    open: BTreeMap<OpenerId, BTreeSet<u32>>,
    questions: BTreeMap<Question, (HolderId, u32)>,
    next: u64,
}

impl World {
    fn owner(&self, holder: HolderId) -> Option<usize> {
        let found = self
            .processes
            .iter()
            .find(|(_, (id, _))| *id == Some(holder));
        found.map(|(process, _)| *process)
    }

    fn is_used(&self, n: u32) -> bool {
        self.locked.contains(&n) || self.processes.values().any(|(_, has)| has.contains(&n))
    }
}

fn number(device: &DeviceName) -> u32 {
    device.as_str()[3..4].parse().unwrap()
}

/// Carries actions out and checks each.
fn settle(core: &mut Core, world: &mut World) -> Result<(), TestCaseError> {
    while let Some(action) = core.next_action() {
        match action {
            Action::Allow { opener, .. } => {
                let wants = world.open.remove(&opener);
                prop_assert!(wants.is_some(), "{opener:?} is answered twice");
                for n in wants.unwrap_or_default() {
                    prop_assert!(!world.is_used(n), "{opener:?} passes, dax{n}.0 is in use");
                }
            }
            Action::Deny { opener, .. } => {
                prop_assert!(
                    world.open.remove(&opener).is_some(),
                    "{opener:?} is answered twice"
                );
            }
            Action::Ask {
                holder,
                question,
                device,
                opener,
            } => {
                prop_assert!(world.owner(holder).is_some(), "asked without a connection");
                prop_assert!(
                    world.open.contains_key(&opener),
                    "asked for one that is answered"
                );
                let n = number(&device);
                let twice = world.questions.values().any(|it| *it == (holder, n));
                prop_assert!(!twice, "asked again before an answer");
                prop_assert!(world.questions.insert(question, (holder, n)).is_none());
            }
            Action::Withdraw { question, .. } => {
                prop_assert!(world.questions.remove(&question).is_some(), "not asked");
            }
            Action::Forget { .. } => {}
        }
    }
    Ok(())
}

fn play(policy: UnknownPolicy, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut core = Core::new(policy);
    let mut world = World::default();
    let mut now = Instant::now();
    for step in steps {
        match step {
            Step::Hold(who, n) => {
                let next = &mut world.next;
                let (connection, has) = world.processes.entry(who).or_default();
                let holder = *connection.get_or_insert_with(|| {
                    *next += 1;
                    HolderId(*next)
                });
                if core
                    .hold(holder, u32::try_from(who).unwrap(), &device(n), WITHIN)
                    .is_ok()
                {
                    has.insert(n);
                }
            }
            Step::Open(of) => {
                world.next += 1;
                let opener = OpenerId(world.next);
                world.open.insert(opener, of.iter().copied().collect());
                core.opened(opener, target(&of), now);
            }
            Step::OpenUnknown => {
                world.next += 1;
                let opener = OpenerId(world.next);
                let all = BTreeSet::from([0, 1, 2]);
                // Who passes by policy is not promised anything about.
                let promised = if policy == UnknownPolicy::Allow {
                    BTreeSet::new()
                } else {
                    all
                };
                world.open.insert(opener, promised);
                core.opened(opener, Target::Unknown(devices(&[0, 1, 2])), now);
            }
            Step::Answer(index, yes) => {
                let Some((question, (holder, n))) =
                    world.questions.iter().nth(index).map(|(q, it)| (*q, *it))
                else {
                    continue;
                };
                world.questions.remove(&question);
                if yes && let Some(process) = world.owner(holder) {
                    world.processes.entry(process).and_modify(|(_, has)| {
                        has.remove(&n);
                    });
                }
                let verdict = if yes { Ok(()) } else { Err("no".to_owned()) };
                prop_assert!(core.answered(holder, question, verdict));
            }
            Step::LetGo(who, n) => {
                let Some((Some(holder), has)) = world.processes.get_mut(&who) else {
                    continue;
                };
                let holder = *holder;
                if !core.claims_of(holder).any(|claimed| *claimed == device(n)) {
                    continue;
                }
                has.remove(&n);
                world.questions.retain(|_, it| *it != (holder, n));
                prop_assert!(core.let_go(holder, &device(n)));
            }
            Step::Disconnect(who) => {
                let Some((connection, _)) = world.processes.get_mut(&who) else {
                    continue;
                };
                let Some(holder) = connection.take() else {
                    continue;
                };
                world.questions.retain(|_, (asked, _)| *asked != holder);
                core.disconnected(holder);
            }
            Step::Exit(who) => {
                let Some((connection, has)) = world.processes.remove(&who) else {
                    continue;
                };
                world.locked.extend(has);
                world
                    .questions
                    .retain(|_, (asked, _)| Some(*asked) != connection);
                let gone: Vec<HolderId> = core
                    .holders
                    .iter()
                    .filter(|(_, it)| it.life != Life::Dead && it.process as usize == who)
                    .map(|(id, _)| *id)
                    .collect();
                for holder in gone {
                    core.disconnected(holder);
                    core.exited(holder);
                }
            }
            Step::LockGone(n) => {
                // The living have their locks.
                if world.processes.values().any(|(_, has)| has.contains(&n)) {
                    continue;
                }
                world.locked.remove(&n);
                core.lock_gone(&device(n));
            }
            Step::OpenerGone(index) => {
                let Some(opener) = world.open.keys().nth(index).copied() else {
                    continue;
                };
                core.opener_gone(opener);
            }
            Step::Wait(seconds) => {
                now += Duration::from_secs(seconds);
                core.tick(now);
            }
            Step::End => core.ends(),
        }
        settle(&mut core, &mut world)?;
        let waiting: BTreeSet<_> = core.waiting.keys().copied().collect();
        let open: BTreeSet<_> = world.open.keys().copied().collect();
        prop_assert_eq!(waiting, open, "who is not answered waits, and nobody else");
    }
    core.ends();
    settle(&mut core, &mut world)?;
    prop_assert!(world.open.is_empty());
    prop_assert!(
        world.questions.is_empty(),
        "{:?} are not withdrawn",
        world.questions
    );
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn nobody_passes_a_holder_in_any_order_of_events(
        steps in prop::collection::vec(step(), 0..60),
        policy in prop_oneof![
            Just(UnknownPolicy::Deny), Just(UnknownPolicy::HoldAll), Just(UnknownPolicy::Allow)
        ],
    ) {
        play(policy, steps)?;
    }
}
