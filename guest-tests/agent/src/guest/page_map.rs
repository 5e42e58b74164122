//! Where memory of this process lies in guest-physical space, as the kernel tells root.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bits of a page map entry that are the page's frame number.
pub(super) const FRAME_MASK: u64 = (1 << 55) - 1;
/// Bit of a page map entry that says that the page is in memory.
const PRESENT: u64 = 1 << 63;
const PAGE_BYTES: usize = 4096;

/// The guest-physical address behind an address of this process; nothing when no page is there or the kernel does not tell.
pub(crate) fn physical_address(address: usize) -> Option<u64> {
    let mut entry = [0; 8];
    let map = File::open("/proc/self/pagemap").ok()?;
    map.read_exact_at(&mut entry, (address / PAGE_BYTES * 8) as u64)
        .ok()?;
    translate(u64::from_ne_bytes(entry), address)
}

fn translate(entry: u64, address: usize) -> Option<u64> {
    let frame = entry & FRAME_MASK;
    (entry & PRESENT != 0 && frame != 0)
        .then(|| frame * PAGE_BYTES as u64 + (address % PAGE_BYTES) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_not_there_has_no_address() {
        assert_eq!(translate(PRESENT | 5, 0x7f00_0123), Some(0x5123));
        assert_eq!(translate(5, 0x7f00_0123), None);
        // What others than root are told.
        assert_eq!(translate(PRESENT, 0x7f00_0123), None);
    }
}
