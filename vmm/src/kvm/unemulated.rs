//! What becomes of an instruction that KVM can't emulate, and has told of.
//!
//! Where memory was taken away, it is answered like any other access: a load is a machine check, a store goes nowhere, as
//! it does where memory can only be read. A
//! program's other one is an invalid instruction to it, as KVM itself has it; the guest's kernel's ends the guest.

use kvm_bindings::kvm_regs;
use tracing::debug;

use super::instruction::{self, Effects};
use super::vcpu::{Beneath, BoundVcpu, Exit, Io, VcpuFault};

/// Privilege level of programs.
const USER: u8 = 3;
/// `#UD`.
const INVALID_INSTRUCTION: u8 = 6;
/// `RFLAGS.AC`.
const ACCESS_TO_USER_PAGES: u64 = 1 << 18;

/// What is at a linear address, as the guest's page tables have it, and its guest-physical address.
type Found = Option<(u64, Beneath)>;

impl BoundVcpu {
    /// KVM can't emulate every instruction, and fetches none from where there is no memory.
    pub(super) fn internal_error(&mut self, io: &impl Io) -> Result<Exit, VcpuFault> {
        let regs = self.fd.get_regs().map_err(|error| self.run_error(error))?;
        if let [Some((address, Beneath::Tombstone))] =
            self.look_beneath(&[regs.rip], &regs, io)?[..]
        {
            return self.machine_check(io, address);
        }
        let Some(bytes) = self.unemulated() else {
            return Err(self.internal_fault(regs.rip));
        };
        let sregs = self.fd.get_sregs().map_err(|error| self.run_error(error))?;
        if let Some(effects) = instruction::effects(&bytes, &regs, &sregs)
            && let Some(exit) = self.touched(&effects, &regs, io)?
        {
            return Ok(exit);
        }
        if sregs.ss.dpl == USER {
            // As KVM does where it is not asked to tell: a program can't end its guest.
            return self.invalid_instruction();
        }
        Err(self.internal_fault(regs.rip))
    }

    /// What comes of an instruction with these effects; `None` when no memory that it touches is gone.
    fn touched(
        &mut self,
        effects: &Effects,
        regs: &kvm_regs,
        io: &impl Io,
    ) -> Result<Option<Exit>, VcpuFault> {
        let addresses: Vec<u64> = effects.touches.iter().map(|touch| touch.address).collect();
        let found = self.look_beneath(&addresses, regs, io)?;
        debug!(vcpu = self.id, rip = %format_args!("{:#x}", regs.rip), ?effects, ?found, "can't be emulated");
        let mut is_dropped = false;
        for (touch, found) in effects.touches.iter().zip(found) {
            match found {
                Some((address, Beneath::Tombstone)) if touch.loads || !effects.only_stores => {
                    return self.machine_check(io, address).map(Some);
                }
                Some((_, Beneath::ReadOnly)) if !touch.loads && effects.only_stores => {
                    is_dropped = true;
                }
                Some((address, Beneath::Tombstone)) => {
                    io.store_dropped(address);
                    is_dropped = true;
                }
                Some((address, Beneath::Memory)) => {
                    return Err(VcpuFault::MemoryGone {
                        id: self.id,
                        address: Some(address),
                    });
                }
                Some((_, Beneath::Device | Beneath::ReadOnly)) | None => {}
            }
        }
        if !is_dropped {
            return Ok(None);
        }
        let after = kvm_regs {
            rip: effects.next,
            ..*regs
        };
        self.fd
            .set_regs(&after)
            .map_err(|error| self.run_error(error))?;
        Ok(Some(Exit::Kicked))
    }

    /// Looks up linear addresses. KVM translates as the guest's kernel would, which may not reach its programs' pages
    /// (SMAP) unless a flag says that it means to.
    fn look_beneath(
        &self,
        addresses: &[u64],
        regs: &kvm_regs,
        io: &impl Io,
    ) -> Result<Vec<Found>, VcpuFault> {
        let meaning_to = kvm_regs {
            rflags: regs.rflags | ACCESS_TO_USER_PAGES,
            ..*regs
        };
        let failed = |error| self.run_error(error);
        self.fd.set_regs(&meaning_to).map_err(failed)?;
        let look = |address: &u64| -> Found {
            let found = self.fd.translate_gva(*address).ok()?;
            let physical = found.physical_address;
            (found.valid != 0).then(|| (physical, io.beneath(physical)))
        };
        let found = addresses.iter().map(look).collect();
        self.fd.set_regs(regs).map_err(failed)?;
        Ok(found)
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
