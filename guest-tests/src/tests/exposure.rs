//! What devices reach of memory that the host takes away, seen from outside of the host.
//!
//! A host of their own: its memory modules are files that the lab reads while a drive of the guest's writes into them.

use lab_agent::removal_protocol::Step;

use super::{GuestTest, Lab, TestError, claim};
use crate::bench::removal::scene::{Removal, Scene, SceneError};
use crate::bench::removal::{Case, PMEM_CUT_OFF, PMEM_HELD, PMEM_NOT_HELD};
use crate::host::account::kernel_says;
use crate::host::cards::Card;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "removal_held_lets_no_dma_through",
        run: removal_held_lets_no_dma_through,
    },
    GuestTest {
        name: "removal_not_held_ends_dma",
        run: removal_not_held_ends_dma,
    },
];

/// Fewer transfers than this before the removal would show nothing.
const TRANSFERS: usize = 50;
/// What the host's kernel says when memory was used that it had given to somebody else.
const COMPLAINTS: [&str; 4] = ["WARNING:", "BUG:", "Bad page state", "Call Trace"];

impl From<SceneError> for TestError {
    fn from(error: SceneError) -> Self {
        match error {
            SceneError::Start(error) => error.into(),
            SceneError::Measure(error) => error.into(),
            SceneError::Host(error) => error.into(),
        }
    }
}

/// The drive goes on all the time; where the guest does not eject, it is even told to write there after the removal.
fn removal_held_lets_no_dma_through(lab: &mut Lab) -> Result<(), TestError> {
    on_scene(lab, |scene| {
        for case in [PMEM_HELD, PMEM_CUT_OFF] {
            removed(lab, scene, case, |removal| {
                claim(removal.writes_after(Step::Opened) == 0, || {
                    format!(
                        "{}: the device was given up, and {} transfers landed on it later",
                        case.name,
                        removal.writes_after(Step::Opened)
                    )
                })?;
                // Found out by looking now and then, so that it does not say when.
                claim(removal.taken.released_ns.is_some(), || {
                    format!("{}: somebody still has the device", case.name)
                })
            })?;
        }
        Ok(())
    })
}

/// For a while the drive reaches memory that is not the guest's any more; then it does not.
fn removal_not_held_ends_dma(lab: &mut Lab) -> Result<(), TestError> {
    on_scene(lab, |scene| {
        removed(lab, scene, PMEM_NOT_HELD, |removal| {
            let released = removal.seen.step(Step::Released).is_some();
            claim(
                released && removal.writes_after(Step::Released) == 0,
                || {
                    format!(
                        "released: {released}, transfers after that: {}",
                        removal.writes_after(Step::Released)
                    )
                },
            )
        })
    })
}

fn on_scene(
    lab: &Lab,
    story: impl FnOnce(&mut Scene) -> Result<(), TestError>,
) -> Result<(), TestError> {
    let mut scene = Scene::boot(&lab.setup, &lab.kernel, "exposure")?;
    let told = |scene: &mut Scene| {
        // A kernel says some of these words of its processor when it starts.
        let before = kernel_says(&scene.host, &COMPLAINTS)?.len();
        story(scene)?;
        let complaints = kernel_says(&scene.host, &COMPLAINTS)?.split_off(before);
        claim(complaints.is_empty(), || {
            format!("the host's kernel complains: {complaints:?}")
        })
    };
    let outcome = told(&mut scene).map_err(|error: TestError| {
        let (said, evidence) = (crate::suite::chain(&error), scene.host.evidence());
        TestError::Claim(format!("{said}\n{evidence}"))
    });
    scene.end();
    outcome
}

/// One removal of persistent memory, which must succeed, leave the memory alone, and the guest and its drive at work.
fn removed(
    lab: &Lab,
    scene: &mut Scene,
    case: Case,
    so: impl FnOnce(&Removal) -> Result<(), TestError>,
) -> Result<(), TestError> {
    let drive = scene.host.bind_vfio(Card::Disk)?;
    let guest = scene.boot_guest(&case.spec(scene, &lab.kernel.release, &drive))?;
    let busy = scene.set_busy(guest, case.kind)?;
    let (removal, mut guest) = scene.take(busy)?;
    let name = case.name;
    claim(removal.writes_before() >= TRANSFERS, || {
        format!(
            "{name}: only {} transfers before the removal",
            removal.writes_before()
        )
    })?;
    claim(removal.taken.refused.is_none(), || {
        format!("{name}: {:?}", removal.taken)
    })?;
    so(&removal)?;
    claim(!removal.changed_after, || {
        format!("{name}: bytes of the memory have changed after it was taken away")
    })?;
    claim(removal.alive && removal.ended.is_none(), || {
        format!(
            "{name}: the guest answers: {}, ended: {:?}",
            removal.alive, removal.ended
        )
    })?;
    // The drive works for the guest, at other places.
    guest.fill_blocks("/dev/nvme0n1", 0, 1 << 20, 77)?;
    let report = guest.compare_blocks("/dev/nvme0n1", 0, 1 << 20, 77)?;
    claim(report.wrong_words == 0, || {
        format!("{name}: the drive is damaged: {report:?}")
    })?;
    scene.restore(guest)?;
    Ok(drive.release()?)
}
