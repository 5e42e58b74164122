//! A guest that is left no peace: storage comes and goes under its writes, by turns of the operator's and the host's, until the
//! time is over or something is wrong.
//!
//! Meanwhile fio, stress-ng and downloads keep it busy, and check what they read (`loads.rs`).
//!
//! What must hold after every step: a record that the guest's kernel has called durable is there when its store comes back;
//! neither kernel complains; and with nothing attached the VMM is as it was. Every wait has a deadline, so that a hang is a
//! failure too. The order of events follows from the seed (`plan.rs`); how far the guest's writer has got at each does not.

mod loads;
mod plan;
mod world;

use std::time::{Duration, Instant};

use super::{Lab, TestError};
use crate::host::machine::Machine;
use crate::progress::{note, step};
use crate::setup::{Setup, StartError};
use crate::suite::chain;
use std::sync::Arc;

use plan::Dice;
use world::World;

/// After so many steps everything is taken away and the accounts are looked at.
const STEPS_PER_ROUND: u32 = 12;

/// A soak that went wrong.
#[derive(Debug, thiserror::Error)]
pub enum SoakError {
    /// No host.
    #[error(transparent)]
    Start(#[from] StartError),
    /// What was to hold does not.
    #[error(
        "step {step}, {what}: {said}\n{evidence}\nthe same again: cargo lab test --soak MINUTES --seed {seed} --host-kernel {kernel}"
    )]
    Broken {
        /// Which kernel.
        kernel: String,
        /// The seed.
        seed: u64,
        /// The number of the step.
        step: u32,
        /// What was done.
        what: String,
        /// What was found.
        said: String,
        /// What explains it.
        evidence: String,
    },
}

/// Soaks each kernel for `minutes`.
pub fn run(setup: Setup, minutes: u64, seed: u64) -> Result<(), SoakError> {
    let setup = Arc::new(setup);
    for kernel in setup.provisioned.kernels.clone() {
        note(&format!("{}: seed {seed}, {minutes} minutes", kernel.name));
        let host = setup.boot(&kernel, Machine::default())?;
        let lab = Lab {
            host,
            kernel,
            full: true,
            setup: Arc::clone(&setup),
        };
        soak(&lab, Duration::from_secs(60 * minutes), seed)?;
    }
    Ok(())
}

fn soak(lab: &Lab, time: Duration, seed: u64) -> Result<(), SoakError> {
    let end = Instant::now() + time;
    let broken = |step, what: &str, error: &TestError| SoakError::Broken {
        kernel: lab.kernel.name.clone(),
        seed,
        step,
        what: what.to_owned(),
        said: chain(error),
        evidence: lab.host.evidence(),
    };
    let mut world = World::begin(lab, seed).map_err(|error| broken(0, "the start", &error))?;
    let mut dice = Dice::new(seed);
    let mut number = 0;
    while Instant::now() < end {
        for _ in 0..STEPS_PER_ROUND {
            number += 1;
            let next = dice.next(&world.present());
            let what = format!("{next:?}");
            step(&format!("step {number}: {what}"), || world.act(next))
                .map_err(|error| broken(number, &what, &error))?;
        }
        let what = "everything is removed";
        step(&format!("after step {number}: {what}"), || world.settle())
            .map_err(|error| broken(number, what, &error))?;
    }
    let promised = world.promised();
    world
        .end()
        .map_err(|error| broken(number, "the end", &error))?;
    note(&format!(
        "{}: {number} steps, {promised} records promised and found",
        lab.kernel.name
    ));
    Ok(())
}
