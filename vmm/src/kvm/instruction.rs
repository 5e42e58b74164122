//! What an instruction does to memory, for those that KVM can't emulate.
//!
//! An access to where no memory slot is has to be emulated, and KVM emulates few vector instructions: of AVX none. So
//! where memory was taken away, a program's `memcpy` ends in a failed emulation, of which KVM tells the bytes of the
//! instruction but not the address. Here it is worked out from the registers, as the processor would have.
//!
//! Gathers and scatters have addresses in vector registers, which are not looked at: such a touch is not found.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register, UsedMemory,
};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

const PAGE: u64 = 4096;

/// A page that an instruction touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Touch {
    /// Linear address of the first byte touched in it.
    pub(super) address: u64,
    /// Whether it is read.
    pub(super) loads: bool,
}

/// What the instruction at the instruction pointer does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Effects {
    /// Pages that it touches, its own bytes left out.
    pub(super) touches: Vec<Touch>,
    /// Where the next one is.
    pub(super) next: u64,
    /// It changes nothing but memory: without its stores it is no instruction at all.
    pub(super) only_stores: bool,
}

/// Works it out; `None` for bytes that are no instruction.
pub(super) fn effects(bytes: &[u8], regs: &kvm_regs, sregs: &kvm_sregs) -> Option<Effects> {
    let bits = match (sregs.cs.l, sregs.cs.db) {
        (1, _) => 64,
        (_, 1) => 32,
        _ => 16,
    };
    let instruction = Decoder::with_ip(bits, bytes, regs.rip, DecoderOptions::NONE).decode();
    if instruction.is_invalid() {
        return None;
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&instruction);
    let touches = info.used_memory().iter();
    let is_cache_control = controls_caches(&instruction);
    let touches = touches.flat_map(|memory| pages(memory, regs, sregs));
    let touches = touches.map(|touch| Touch {
        loads: touch.loads && !is_cache_control,
        ..touch
    });
    let changes_registers = info
        .used_registers()
        .iter()
        .any(|register| writes(register.access()));
    Some(Effects {
        touches: touches.collect(),
        next: instruction.next_ip(),
        only_stores: !changes_registers && is_plain(&instruction),
    })
}

/// It writes cache lines back or drops them, and takes nothing from memory: where none is, it does nothing. Linux's driver
/// of persistent memory does it after each store.
fn controls_caches(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Clwb | Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Cldemote
    )
}

fn is_plain(instruction: &Instruction) -> bool {
    instruction.rflags_modified() == 0
        && instruction.flow_control() == FlowControl::Next
        && !instruction.has_rep_prefix()
}

fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

fn reads(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// An access of at most some cache lines: one page, or two.
fn pages(memory: &UsedMemory, regs: &kvm_regs, sregs: &kvm_sregs) -> Vec<Touch> {
    let access = memory.access();
    let first = memory.virtual_address(0, |register, _, _| value(register, regs, sregs));
    let Some(first) = first.filter(|_| reads(access) || writes(access)) else {
        return Vec::new();
    };
    let size = (memory.memory_size().size() as u64).max(1);
    let last = first.wrapping_add(size - 1);
    let mut addresses = vec![first];
    if first / PAGE != last / PAGE {
        addresses.push(last / PAGE * PAGE);
    }
    let loads = reads(access);
    let touch = |address| Touch { address, loads };
    addresses.into_iter().map(touch).collect()
}

/// What is in a register that an address is made of; of a segment's, its base.
fn value(register: Register, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<u64> {
    let is_64 = sregs.cs.l == 1;
    let base = |segment: &kvm_segment| Some(segment.base);
    let flat = |segment: &kvm_segment| Some(if is_64 { 0 } else { segment.base });
    match register {
        Register::FS => return base(&sregs.fs),
        Register::GS => return base(&sregs.gs),
        Register::CS => return flat(&sregs.cs),
        Register::DS => return flat(&sregs.ds),
        Register::ES => return flat(&sregs.es),
        Register::SS => return flat(&sregs.ss),
        _ => {}
    }
    let whole = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RBX => regs.rbx,
        Register::RSP => regs.rsp,
        Register::RBP => regs.rbp,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        _ => return None,
    };
    match register.size() {
        8 => Some(whole),
        4 => Some(whole & 0xffff_ffff),
        2 => Some(whole & 0xffff),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIP: u64 = 0x1000;

    fn of(bytes: &[u8]) -> Option<Effects> {
        let regs = kvm_regs {
            rip: RIP,
            rax: 0x7f00_0000_0ff8,
            rdi: 0xffff_ffff_0000_2000,
            rcx: 0x10,
            ..Default::default()
        };
        let mut sregs = kvm_sregs::default();
        sregs.cs.l = 1;
        // Bases that count for FS and GS only in 64-bit mode.
        sregs.ds.base = 0x5000;
        sregs.fs.base = 0x7f11_0000_0000;
        effects(bytes, &regs, &sregs)
    }

    fn load(address: u64) -> Touch {
        Touch {
            address,
            loads: true,
        }
    }

    fn store(address: u64) -> Touch {
        Touch {
            address,
            loads: false,
        }
    }

    #[test]
    fn a_vector_load_across_a_page_touches_both() {
        // vmovdqu ymm0, [rax]
        let effects = of(&[0xc5, 0xfe, 0x6f, 0x00]).unwrap();
        let touches = [load(0x7f00_0000_0ff8), load(0x7f00_0000_1000)];
        assert_eq!(effects.touches, touches);
        assert_eq!((effects.next, effects.only_stores), (RIP + 4, false));
    }

    #[test]
    fn a_vector_store_only_stores() {
        // vmovups [rdi + rcx*4 + 0x20], ymm1
        let effects = of(&[0xc5, 0xfc, 0x11, 0x4c, 0x8f, 0x20]).unwrap();
        assert_eq!(effects.touches, [store(0xffff_ffff_0000_2060)]);
        assert!(effects.only_stores);
        // movlps [rdi], xmm0
        assert!(of(&[0x0f, 0x13, 0x07]).unwrap().only_stores);
    }

    #[test]
    fn segments_and_short_addresses_count() {
        // pxor xmm0, fs:[rcx]
        let effects = of(&[0x64, 0x66, 0x0f, 0xef, 0x01]).unwrap();
        assert_eq!(effects.touches, [load(0x7f11_0000_0010)]);
        // movdqa xmm0, [edi]: an address of 32 bits
        let effects = of(&[0x67, 0x66, 0x0f, 0x6f, 0x07]).unwrap();
        assert_eq!(effects.touches, [load(0x2000)]);
        // paddd xmm0, [rip + 0x10]
        let effects = of(&[0x66, 0x0f, 0xfe, 0x05, 0x10, 0, 0, 0]).unwrap();
        assert_eq!(effects.touches, [load(RIP + 8 + 0x10)]);
    }

    #[test]
    fn writing_a_line_back_is_no_load() {
        for bytes in [
            [0x66, 0x0f, 0xae, 0x37], // clwb [rdi]
            [0x66, 0x0f, 0xae, 0x3f], // clflushopt [rdi]
        ] {
            let effects = of(&bytes).unwrap();
            assert_eq!(effects.touches, [store(0xffff_ffff_0000_2000)]);
            assert!(effects.only_stores);
        }
    }

    #[test]
    fn what_does_more_than_store_is_told() {
        // xadd [rdi], eax: a load, and registers and flags
        let effects = of(&[0x0f, 0xc1, 0x07]).unwrap();
        assert_eq!(effects.touches, [load(0xffff_ffff_0000_2000)]);
        assert!(!effects.only_stores);
        // vpextrd [rdi], xmm0, 1
        assert!(
            of(&[0xc4, 0xe3, 0x79, 0x16, 0x07, 0x01])
                .unwrap()
                .only_stores
        );
    }

    #[test]
    fn gathers_and_nonsense_are_not_found() {
        // vpgatherdd ymm0, [rax + ymm1*4], ymm2
        let effects = of(&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x88]).unwrap();
        assert_eq!(effects.touches, []);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[0xc5]), None, "cut off");
        assert_eq!(of(&[0x06]), None, "none in 64-bit mode");
    }
}
