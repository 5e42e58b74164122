//! How soon a loss is noticed, often enough to tell the slowest of a hundred: one guest loses its persistent memory again and
//! again and gets it back, while its drive writes into its RAM in a loop.
//!
//! ```text
//!   in each round:   the guest has it ─▶ unbind, not held ─▶ noticed, unmapped ─▶ bind │ the bare program │ add-pmem
//! ```
//! The bare program has a drive of its own. Nobody watches from outside: what lands when is the other cases' affair.

use std::time::Duration;

use super::scene::{BYTES, PMEM, Scene};
use super::{Noticing, PMEM_NOT_HELD, Sample, by_the_host, compare, log, of_bare};
use crate::bench::boot::MeasureError;
use crate::bench::pin::tell;
use crate::guest::Guest;
use crate::host::cards::Card;
use crate::progress::step;
use crate::wait;

/// What it is called.
pub(super) const NAME: &str = "noticing";
const SOCKET: &str = "/tmp/noticing.sock";
const ID: &str = "p0";
/// What a VMM's log, and a guest that gives a device back, may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// All rounds, on a host of their own.
pub(super) fn run(scene: &mut Scene, release: &str, repeat: u32) -> Result<Noticing, MeasureError> {
    let dax = format!("/dev/{}", scene.victim());
    let watch_cost = tell(&scene.host, &["dax-watch-cost", &dax])?;
    let drive = scene.host.bind_vfio(Card::Disk)?;
    let second = scene.host.bind_vfio(Card::SecondDisk)?;
    let mut spec = PMEM_NOT_HELD.spec(scene, release, &drive);
    let words = ["--api-socket", SOCKET].map(str::to_owned);
    spec.arguments.extend(words);
    let mut guest = scene.boot_guest(&spec)?;
    guest.modprobe_pmem()?;
    guest.await_path(PMEM)?;
    scene.set_drive_busy(&mut guest)?;
    let (mut samples, mut bare) = (Vec::new(), Vec::new());
    for round in 1..=repeat {
        step(&format!("{NAME}, round {round} of {repeat}"), || {
            samples.push(lose(scene, &mut guest)?);
            scene.bind()?;
            bare.push(of_bare(scene, &second)?);
            come_back(scene, &mut guest)
        })?;
    }
    scene.restore(guest)?;
    drive.release()?;
    second.release()?;
    let versus = compare(NAME, &samples, &bare);
    Ok(Noticing {
        samples,
        bare,
        versus,
        watch_cost,
    })
}

fn lose(scene: &Scene, guest: &mut Guest) -> Result<Sample, MeasureError> {
    let before = guest.vmm().stderr().len();
    let taken = scene.unbind(guest)?;
    let mut told = log::Told::default();
    let tells = || {
        let said = guest.vmm().stderr();
        told = log::told(said.get(before..).unwrap_or_default(), taken.asked_ns);
        Ok(told.noticed.is_some() && told.cut.is_some())
    };
    wait::until(DEADLINE, tells, || {
        late("it tells that devices do not reach the memory")
    })?;
    let teardown = log::teardown(&scene.host, taken.asked_monotonic_ns)?;
    Ok(by_the_host(&taken, told, teardown))
}

fn come_back(scene: &Scene, guest: &mut Guest) -> Result<(), MeasureError> {
    let remote = ["daxhund-remote", "--api-socket", SOCKET];
    let known = format!("\"{ID}\"");
    let info = [&remote[..], &["info"]].concat();
    let is_gone = || Ok(!scene.host.check(&info)?.contains(&known));
    wait::until(DEADLINE, is_gone, || late("the guest has given it back"))?;
    let word = format!("file=/dev/{},size={BYTES},id={ID}", scene.victim());
    let add = [&remote[..], &["add-pmem", &word]].concat();
    scene.host.check(&add)?;
    Ok(guest.await_path(PMEM)?)
}

fn late(what: &'static str) -> MeasureError {
    MeasureError::Late {
        what,
        within: DEADLINE,
    }
}
