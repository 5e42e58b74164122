//! What a guest asks: flushes, and what else may be in a ring.

use daxhund_fuzz_support::frontend::{DATA, Frontend, INDIRECT, NEXT, Part, SLOT, WRITE};
use daxhund_fuzz_support::input::Input;

/// Where tables of descriptors lie.
const TABLES: u64 = DATA * 2;
/// Descriptors of a table.
const TABLE: u16 = 8;
/// Bytes from a slot's beginning to where the response lies in it.
const RESPONSE: u64 = 32;

/// The guest's next request: one that is right, or one of parts as the fuzzer likes, in the ring or in a table.
pub fn offer(frontend: &mut Frontend, how: u8, input: &mut Input<'_>) {
    let slot = DATA + u64::from(frontend.next_head(0)) * SLOT;
    frontend.store(slot, &[0; 4]);
    frontend.store(slot + RESPONSE, &[0xff; 4]);
    let part = |address, len, flags| Part {
        address,
        len,
        flags,
    };
    let right = vec![part(slot, 4, NEXT), part(slot + RESPONSE, 4, WRITE)];
    let parts = match how {
        0..=7 => right,
        // It is told what kind of request it is.
        8..=9 => {
            frontend.store(slot, &[input.u8()]);
            right
        }
        _ => odd(slot, input),
    };
    if how.is_multiple_of(2) {
        frontend.offer(0, &parts);
        return;
    }
    let table: Vec<u8> = (0..)
        .zip(&parts)
        .flat_map(|(at, part)| part.bytes(at, TABLE))
        .collect();
    frontend.store(TABLES, &table);
    let len = u32::try_from(table.len()).expect("short") + u32::from(how == 15);
    frontend.offer(0, &[part(TABLES, len, INDIRECT)]);
}

/// Up to four parts, each with an address in or near the slot or far off, a length about that of a field, and any flags.
fn odd(slot: u64, input: &mut Input<'_>) -> Vec<Part> {
    let parts = 1 + input.u8() % 4;
    let part = |_| {
        let (place, flags) = (input.u8(), input.u8());
        let near = slot + u64::from(place % 64);
        let (address, len) = match place >> 6 {
            0 | 1 => (near, u32::from(input.u8() % 8)),
            2 => (u64::from(input.u16()) << 8, u32::from(input.u16())),
            _ => (u64::MAX - u64::from(input.u8()), u32::MAX),
        };
        Part {
            address,
            len,
            flags: u16::from(flags % 8),
        }
    };
    (0..parts).map(part).collect()
}
