//! Another number of vCPUs while the guest runs.
//!
//! ```text
//!   more:   vCPU made, or kept from before ─▶ thread ─▶ the guest is told ─▶ it starts the vCPU when it likes
//!   fewer:  the guest is asked ─▶ it ejects (event) ─▶ thread told to end ─▶ joined, vCPU kept
//! ```
//! What the guest has is what the registers say; threads follow them, and never lead: an event of an eject that comes late
//! finds nothing to do. `lifecycle::vcpus` says when a change is over.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;
use tracing::{info, warn};

use super::vcpus::{SpawnError, Vcpus};
use super::vm::RunningVm;
use crate::config::VcpusOutOfLimits;
use crate::devices::processors::Processors as Registers;
use crate::kvm::{CpuidTemplate, CreateVmError, SetupError, Vcpu, Vm};
use crate::lifecycle::vcpus::{Outcome, Plan, Resizing};
use crate::metrics::Metrics;

/// The guest keeps the vCPUs that it has.
#[derive(Debug, Error)]
pub enum ResizeVcpusError {
    /// The number.
    #[error(transparent)]
    OutOfLimits(#[from] VcpusOutOfLimits),
    /// Another change.
    #[error(
        "the guest was asked to let go of vCPUs and has not done all of it, it has {present}; the event `resized` or \
         `resize-unanswered` tells when that is over"
    )]
    UnderWay {
        /// What it has.
        present: usize,
    },
    /// KVM.
    #[error(transparent)]
    Create(#[from] CreateVmError),
    /// A vCPU's state.
    #[error(transparent)]
    SetUp(#[from] SetupError),
    /// A vCPU's thread.
    #[error(transparent)]
    Thread(#[from] SpawnError),
}

/// The vCPUs of one machine and what its guest knows of them.
pub(super) struct Processors {
    pub(super) vcpus: Vcpus,
    registers: Arc<Registers>,
    resizing: Resizing,
    /// Where exits are counted.
    metrics: Metrics,
}

impl Processors {
    pub(super) fn new(vcpus: Vcpus, registers: Arc<Registers>, metrics: Metrics) -> Self {
        Self {
            vcpus,
            registers,
            resizing: Resizing::default(),
            metrics,
        }
    }

    /// How many the guest has.
    pub(super) fn count(&self) -> usize {
        self.registers.present().len()
    }

    /// What it has when it is reset now, and whether that ends a change.
    pub(super) fn after_reset(&self) -> (Resized, bool) {
        let count = self.resizing.count_after_reset(self.count());
        let resized = Resized {
            count: number(count),
            as_asked: true,
        };
        (resized, self.is_changing())
    }

    /// Whether a change has to be waited for.
    pub(super) fn is_changing(&self) -> bool {
        let threads: BTreeSet<u8> = self.vcpus.threads().collect();
        self.resizing.is_under_way() || threads != self.registers.present()
    }

    /// There is no other change while one is under way.
    pub(super) fn check_settled(&self) -> Result<(), ResizeVcpusError> {
        if self.is_changing() {
            return Err(ResizeVcpusError::UnderWay {
                present: self.count(),
            });
        }
        Ok(())
    }

    /// Gives the guest `count` vCPUs, or asks it for some; not while a change is under way.
    pub(super) fn resize(
        &mut self,
        count: usize,
        (vm, cpuid): (&Vm, &CpuidTemplate),
        now: Instant,
    ) -> Result<(), ResizeVcpusError> {
        // It may have been asked for some in vain before; from here on none of them goes.
        self.registers.keep_all();
        self.check_settled()?;
        match Plan::new(&self.registers.present(), count) {
            Plan::Nothing => {}
            Plan::Add(ids) => {
                info!(vcpus = ?ids, "vCPUs come");
                if let Err(error) = self.begin_all(&ids, vm, cpuid) {
                    // The guest was not told of them.
                    for id in ids {
                        self.vcpus.end(id);
                    }
                    return Err(error);
                }
                self.registers.announce(&ids);
            }
            Plan::Ask(ids) => {
                info!(vcpus = ?ids, "the guest is asked to let go of vCPUs");
                self.resizing.shrink(count, ids.len(), now);
                self.registers.request_eject(&ids);
            }
        }
        Ok(())
    }

    fn begin_all(
        &mut self,
        ids: &[u8],
        vm: &Vm,
        cpuid: &CpuidTemplate,
    ) -> Result<(), ResizeVcpusError> {
        for id in ids {
            let vcpu = self.vcpu(*id, vm, cpuid)?;
            self.vcpus.begin(vcpu)?;
        }
        Ok(())
    }

    /// A vCPU as it is after power-on. KVM makes each once for a VM, and keeps it.
    fn vcpu(&mut self, id: u8, vm: &Vm, cpuid: &CpuidTemplate) -> Result<Vcpu, ResizeVcpusError> {
        let mut vcpu = match self.vcpus.take_kept(id) {
            Some(vcpu) => vcpu,
            None => vm.create_vcpu(id, cpuid.topology())?,
        };
        vcpu.count_exits(self.metrics.exits_of(id));
        match vcpu.set_up_again(cpuid) {
            Ok(()) => Ok(vcpu),
            Err(error) => {
                self.vcpus.keep(vcpu);
                Err(error.into())
            }
        }
    }

    /// Has the threads of ejected vCPUs end, joins those that have, and says what became of a change.
    pub(super) fn settle(&mut self, now: Instant) -> Option<Outcome> {
        let present = self.registers.present();
        let gone: Vec<u8> = self
            .vcpus
            .threads()
            .filter(|vcpu| !present.contains(vcpu))
            .collect();
        for vcpu in gone {
            if self.vcpus.retire(vcpu) {
                info!(vcpu, "ejected by the guest");
                self.resizing.ejected();
            }
        }
        let ends = self.vcpus.join_ended();
        let outcome = self.resizing.look(now, present.len(), ends);
        if outcome == Some(Outcome::Unanswered) {
            warn!(
                present = present.len(),
                "the guest did not let go of vCPUs in time; it keeps them"
            );
        }
        outcome
    }
}

fn number(vcpus: usize) -> u32 {
    u32::try_from(vcpus).unwrap_or(u32::MAX)
}

/// A change of the number of vCPUs that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resized {
    /// What the guest has now.
    pub(super) count: u32,
    /// Whether that is what was asked for.
    pub(super) as_asked: bool,
}

impl RunningVm {
    /// Whether the guest can be given another number of vCPUs, or asked to have it, now.
    pub(super) fn check_vcpus(&self, asked: u32) -> Result<(), ResizeVcpusError> {
        self.config().cpus.resized(asked)?;
        self.machine.processors.check_settled()
    }

    /// Does so. The configuration has the new number from now on, and the guest whenever it starts anew. Whether it has it
    /// already; else [`RunningVm::settle_vcpus`] will tell.
    pub(super) fn resize_vcpus(&mut self, asked: u32) -> Result<bool, ResizeVcpusError> {
        self.check_vcpus(asked)?;
        let count = usize::try_from(asked).unwrap_or(usize::MAX);
        self.machine
            .resize_vcpus(count, &self.host.cpuid, Instant::now())?;
        self.set_vcpus(asked)?;
        Ok(!self.machine.processors.is_changing())
    }

    /// Looks at vCPUs that come and go.
    pub(super) fn settle_vcpus(&mut self) -> Option<Resized> {
        if let Some(resized) = self.resized.take() {
            return Some(resized);
        }
        let outcome = self.machine.processors.settle(Instant::now())?;
        let count = number(self.machine.processors.count());
        if let Err(error) = self.set_vcpus(count) {
            warn!(%error, "the guest has a number of vCPUs that it can't have");
        }
        Some(Resized {
            count,
            as_asked: outcome == Outcome::Resized,
        })
    }
}
