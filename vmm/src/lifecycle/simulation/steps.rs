//! What the world can do, and how likely it does.

use proptest::prelude::*;

/// What the world does next. Numbers choose among what there is.
#[derive(Debug, Clone)]
pub(super) enum Step {
    AddPmem {
        /// A consumer refuses it, and another one does not let go of it again.
        fails: bool,
    },
    AddCard,
    Ask(usize),
    Claim(usize, bool, u64),
    Unclaim(usize),
    /// The guest lets go of a device, whether it was asked or not.
    Eject(usize),
    /// A word of the guest about a device of the past.
    LateEject(usize),
    /// Workers, or the hardware, are in the middle of something.
    Begin(usize),
    Finish(usize),
    /// Devices of the host keep a region this many times; 9 is for ever.
    KeepDma(usize, u8),
    /// The kernel does not unmap a region this many times.
    KeepMapping(usize, u8),
    HostTakes(usize),
    HostBringsBack(usize),
    Look,
    CardFails(usize),
    Wait(u64),
    Pause,
    Resume,
    Reset,
}

/// So many failures never end.
pub(super) const FOR_EVER: u8 = 9;

pub(super) fn steps() -> impl Strategy<Value = Step> {
    let which = 0usize..6;
    let times = prop_oneof![1u8..4, Just(FOR_EVER)];
    let ms = prop_oneof![0u64..50, 900u64..15_000];
    prop_oneof![
        3 => (0u8..5).prop_map(|n| Step::AddPmem { fails: n == 0 }),
        1 => Just(Step::AddCard),
        2 => which.clone().prop_map(Step::Ask),
        3 => (which.clone(), any::<bool>(), 0u64..12_000).prop_map(|(w, h, t)| Step::Claim(w, h, t)),
        2 => which.clone().prop_map(Step::Unclaim),
        3 => which.clone().prop_map(Step::Eject),
        1 => which.clone().prop_map(Step::LateEject),
        3 => which.clone().prop_map(Step::Begin),
        3 => which.clone().prop_map(Step::Finish),
        2 => (which.clone(), times.clone()).prop_map(|(w, t)| Step::KeepDma(w, t)),
        1 => (which.clone(), times).prop_map(|(w, t)| Step::KeepMapping(w, t)),
        2 => which.clone().prop_map(Step::HostTakes),
        1 => which.clone().prop_map(Step::HostBringsBack),
        3 => Just(Step::Look),
        1 => which.prop_map(Step::CardFails),
        5 => ms.prop_map(Step::Wait),
        1 => Just(Step::Pause),
        1 => Just(Step::Resume),
        1 => Just(Step::Reset),
    ]
}
