//! What becomes of an instruction that KVM can't emulate, and has told of.
//!
//! Where memory was taken away, it is answered like any other access: a load is a machine check, a store goes nowhere. A
//! program's other one is an invalid instruction to it, as KVM itself has it; the guest's kernel's ends the guest.

use super::instruction;
use super::vcpu::{Beneath, BoundVcpu, Exit, Io, VcpuFault};

/// Privilege level of programs.
const USER: u8 = 3;
/// `#UD`.
const INVALID_INSTRUCTION: u8 = 6;

impl BoundVcpu {
    /// KVM can't emulate every instruction, and fetches none from where there is no memory.
    pub(super) fn internal_error(&mut self, io: &impl Io) -> Result<Exit, VcpuFault> {
        let mut regs = self.fd.get_regs().map_err(|error| self.run_error(error))?;
        if let Some((address, Beneath::Tombstone)) = self.beneath_linear(regs.rip, io) {
            return self.machine_check(address);
        }
        let Some(bytes) = self.unemulated() else {
            return Err(self.internal_fault(regs.rip));
        };
        let sregs = self.fd.get_sregs().map_err(|error| self.run_error(error))?;
        if let Some(effects) = instruction::effects(&bytes, &regs, &sregs) {
            let mut is_dropped = false;
            for touch in &effects.touches {
                match self.beneath_linear(touch.address, io) {
                    Some((address, Beneath::Tombstone)) if touch.loads || !effects.only_stores => {
                        return self.machine_check(address);
                    }
                    Some((_, Beneath::Tombstone)) => is_dropped = true,
                    Some((address, Beneath::Memory)) => {
                        return Err(VcpuFault::MemoryGone {
                            id: self.id,
                            address: Some(address),
                        });
                    }
                    Some((_, Beneath::Device)) | None => {}
                }
            }
            if is_dropped {
                regs.rip = effects.next;
                self.fd
                    .set_regs(&regs)
                    .map_err(|error| self.run_error(error))?;
                return Ok(Exit::Kicked);
            }
        }
        if sregs.ss.dpl == USER {
            // As KVM does where it is not asked to tell: a program can't end its guest.
            return self.invalid_instruction();
        }
        Err(self.internal_fault(regs.rip))
    }

    /// What is at a linear address, as the guest's page tables have it, and its guest-physical address.
    fn beneath_linear(&self, address: u64, io: &impl Io) -> Option<(u64, Beneath)> {
        let found = self.fd.translate_gva(address).ok()?;
        let physical = found.physical_address;
        (found.valid != 0).then(|| (physical, io.beneath(physical)))
    }

    /// Has the guest take `#UD` at the instruction that its registers stand at.
    fn invalid_instruction(&mut self) -> Result<Exit, VcpuFault> {
        let events = self.fd.get_vcpu_events();
        let mut events = events.map_err(|error| self.run_error(error))?;
        events.exception.injected = 1;
        events.exception.nr = INVALID_INSTRUCTION;
        events.exception.has_error_code = 0;
        self.fd
            .set_vcpu_events(&events)
            .map_err(|error| self.run_error(error))?;
        Ok(Exit::Kicked)
    }
}
