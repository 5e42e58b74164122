//! The pieces of guest memory that one request reads into or writes from, in the form the host's kernel takes them.
//!
//! Invariants:
//! - Every vector lies in the memory snapshot that the same value holds, or the value has no vectors. The snapshot goes
//!   only when the vectors go, so whoever holds the value may hand them to the kernel.
//! - Nothing here reads or writes through a vector; copies go through the snapshot, by guest address.
//! - Vectors are addresses for system calls: memory that goes away is `EFAULT` there, and never scratch.

use std::mem::{align_of, offset_of, size_of};
use std::sync::Arc;

use daxhund_virtio_blk::NotMemory;

use crate::memory::snapshot::Snapshot;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// The most vectors of one system call (`IOV_MAX`).
pub(super) const MOST_VECTORS: usize = 1024;

/// A `struct iovec` whose address is a number: it is for the kernel, and may go to another thread.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Vector {
    base: usize,
    len: usize,
}

const _: () = assert!(
    size_of::<Vector>() == size_of::<libc::iovec>()
        && align_of::<Vector>() == align_of::<libc::iovec>()
        && offset_of!(Vector, base) == offset_of!(libc::iovec, iov_base)
        && offset_of!(Vector, len) == offset_of!(libc::iovec, iov_len)
);

impl Vector {
    /// The whole of a buffer that whoever makes the vector keeps.
    pub(super) fn of(buffer: &mut [u8]) -> Self {
        Self {
            base: buffer.as_mut_ptr().expose_provenance(),
            len: buffer.len(),
        }
    }
}

/// Vectors as the kernel reads them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vectors {
    /// The first.
    pub(super) first: *const libc::iovec,
    /// How many, at most [`MOST_VECTORS`].
    pub(super) count: u32,
}

impl Vectors {
    pub(super) fn of(vectors: &[Vector]) -> Self {
        let count = vectors.len().min(MOST_VECTORS);
        Self {
            first: vectors.as_ptr().cast(),
            // At most 1024.
            #[allow(clippy::cast_possible_truncation)]
            count: count as u32,
        }
    }
}

/// The data of one request, and how much of it has been moved.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    memory: Option<Arc<Snapshot>>,
    spans: Vec<(GuestAddress, usize)>,
    vectors: Vec<Vector>,
    /// The first vector that is not moved in full.
    first: usize,
    moved: usize,
}

impl Pieces {
    /// Lets go of everything but the room for the next request's.
    pub(super) fn clear(&mut self) {
        self.vectors.clear();
        self.spans.clear();
        self.memory = None;
        self.first = 0;
        self.moved = 0;
    }

    /// Starts over with these pieces of `memory`.
    pub(super) fn fill(
        &mut self,
        memory: &Arc<Snapshot>,
        pieces: impl Iterator<Item = (GuestAddress, usize)>,
    ) -> Result<(), NotMemory> {
        self.clear();
        for (address, len) in pieces {
            self.spans.push((address, len));
            let is_there = memory.check(address, len).is_ok();
            if !is_there || self.resolve(memory, address, len).is_err() {
                self.clear();
                return Err(NotMemory);
            }
        }
        self.memory = Some(Arc::clone(memory));
        Ok(())
    }

    fn resolve(
        &mut self,
        memory: &Snapshot,
        mut address: GuestAddress,
        mut len: usize,
    ) -> Result<(), NotMemory> {
        while len > 0 {
            let (region, at) = memory.to_region_addr(address).ok_or(NotMemory)?;
            let in_region = region.len() - at.0;
            let part = usize::try_from(in_region).map_or(len, |room| room.min(len));
            // The last byte too: what the region says of itself, not what the sums above make of it.
            let last = MemoryRegionAddress(at.0 + (part as u64 - 1));
            region.get_host_address(last).map_err(|_| NotMemory)?;
            let start = region.get_host_address(at).map_err(|_| NotMemory)?;
            self.vectors.push(Vector {
                base: start.expose_provenance(),
                len: part,
            });
            len -= part;
            if len > 0 {
                let next = address.0.checked_add(part as u64).ok_or(NotMemory)?;
                address = GuestAddress(next);
            }
        }
        Ok(())
    }

    /// What has not been moved yet.
    pub(super) fn vectors(&self) -> Vectors {
        Vectors::of(&self.vectors[self.first..])
    }

    /// Whether every vector begins at a multiple of `align` and is a multiple of it long.
    pub(super) fn is_aligned(&self, align: usize) -> bool {
        self.vectors
            .iter()
            .all(|vector| vector.base.is_multiple_of(align) && vector.len.is_multiple_of(align))
    }

    /// So many bytes more have been moved.
    pub(super) fn advance(&mut self, mut bytes: usize) {
        self.moved += bytes;
        while let Some(vector) = self.vectors.get_mut(self.first) {
            if bytes < vector.len {
                vector.base += bytes;
                vector.len -= bytes;
                return;
            }
            bytes -= vector.len;
            self.first += 1;
        }
    }

    /// Copies the next bytes out of guest memory.
    pub(super) fn copy_to(&self, buffer: &mut [u8]) -> Result<(), NotMemory> {
        let mut rest = buffer;
        self.each(rest.len(), |memory, address, len| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            memory.read_slice(part, address)
        })
    }

    /// Copies bytes to where the next ones belong in guest memory.
    pub(super) fn copy_from(&self, buffer: &[u8]) -> Result<(), NotMemory> {
        let mut rest = buffer;
        self.each(buffer.len(), |memory, address, len| {
            let (part, after) = rest.split_at(len);
            rest = after;
            memory.write_slice(part, address)
        })
    }

    /// Calls `copy` for each part of the next `len` bytes.
    fn each<E>(
        &self,
        len: usize,
        mut copy: impl FnMut(&Snapshot, GuestAddress, usize) -> Result<(), E>,
    ) -> Result<(), NotMemory> {
        let memory = self.memory.as_ref().ok_or(NotMemory)?;
        let (mut skip, mut left) = (self.moved, len);
        for (address, len) in &self.spans {
            if skip >= *len {
                skip -= len;
                continue;
            }
            let part = (len - skip).min(left);
            if part == 0 {
                break;
            }
            let at = address.0.checked_add(skip as u64).ok_or(NotMemory)?;
            copy(memory, GuestAddress(at), part).map_err(|_| NotMemory)?;
            skip = 0;
            left -= part;
        }
        if left == 0 { Ok(()) } else { Err(NotMemory) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: usize = 4096;

    /// Two regions with a hole between them, and two that touch.
    fn memory() -> Arc<Snapshot> {
        let regions = [(0, PAGE), (0x10000, PAGE), (0x11000, PAGE)];
        let regions = regions.map(|(at, len)| (GuestAddress(at), len));
        Arc::new(Snapshot::from_ranges(&regions).unwrap())
    }

    fn filled(pieces: &[(u64, usize)]) -> Result<Pieces, NotMemory> {
        let mut filled = Pieces::default();
        let pieces = pieces.iter().map(|(at, len)| (GuestAddress(*at), *len));
        filled.fill(&memory(), pieces).map(|()| filled)
    }

    #[test]
    fn a_piece_may_cross_from_one_region_into_the_next() {
        let pieces = filled(&[(0x10f00, 0x200)]).unwrap();
        assert_eq!(pieces.vectors.len(), 2);
        assert_eq!(pieces.vectors[0].len, 0x100);
        assert_eq!(pieces.vectors[1].len, 0x100);
    }

    #[test]
    fn what_is_not_memory_is_refused_and_nothing_is_kept() {
        for piece in [
            (0x1000, 1),
            (0xfff, 2),
            (0x11fff, 2),
            (u64::MAX, 1),
            (u64::MAX - 1, 8),
            (0x8000, PAGE),
            (0, usize::MAX),
        ] {
            assert_eq!(
                filled(&[(0, 16), piece]).unwrap_err(),
                NotMemory,
                "{piece:x?}"
            );
        }
        let memory = memory();
        let mut pieces = Pieces::default();
        let bad = [(GuestAddress(0), 16), (GuestAddress(0x5000), 1)];
        pieces.fill(&memory, bad.into_iter()).unwrap_err();
        assert_eq!(pieces.vectors().count, 0);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn the_snapshot_is_held_until_it_is_cleared() {
        let memory = memory();
        let mut pieces = Pieces::default();
        pieces
            .fill(&memory, [(GuestAddress(0), 16)].into_iter())
            .unwrap();
        assert_eq!(Arc::strong_count(&memory), 2);
        pieces.clear();
        assert_eq!(Arc::strong_count(&memory), 1);
        assert_eq!(pieces.vectors().count, 0);
    }

    #[test]
    fn alignment_is_of_address_and_length() {
        assert!(filled(&[(512, 1024)]).unwrap().is_aligned(512));
        assert!(!filled(&[(512, 1000), (2048, 24)]).unwrap().is_aligned(512));
        assert!(!filled(&[(8, 512)]).unwrap().is_aligned(512));
    }

    #[test]
    fn no_call_gets_more_vectors_than_the_kernel_takes() {
        let pieces = filled(&vec![(0, 1); MOST_VECTORS + 3]).unwrap();
        assert_eq!(pieces.vectors().count as usize, MOST_VECTORS);
    }

    proptest! {
        /// However a transfer is cut up, each byte goes to its place.
        #[test]
        fn copies_follow_the_advances(
            spans in prop::collection::vec((0u64..8, 0usize..300), 1..8),
            cuts in prop::collection::vec(0usize..200, 0..20),
        ) {
            let spans: Vec<_> = spans.iter().map(|(slot, len)| (slot * 512, *len)).collect();
            let total: usize = spans.iter().map(|span| span.1).sum();
            let memory = memory();
            let pattern: Vec<u8> = (0..=250).cycle().take(PAGE).collect();
            memory.write_slice(&pattern, GuestAddress(0)).unwrap();
            let expected: Vec<u8> = spans
                .iter()
                .flat_map(|(at, len)| {
                    let at = usize::try_from(*at).unwrap();
                    pattern[at..at + len].to_vec()
                })
                .collect();
            let mut pieces = Pieces::default();
            let guest = spans.iter().map(|(at, len)| (GuestAddress(*at), *len));
            pieces.fill(&memory, guest).unwrap();
            let (mut found, mut left) = (Vec::new(), total);
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let mut part = vec![0; cut.min(left)];
                pieces.copy_to(&mut part).unwrap();
                pieces.copy_from(&part).unwrap();
                pieces.advance(part.len());
                left -= part.len();
                let in_vectors: usize = pieces.vectors[pieces.first..].iter().map(|v| v.len).sum();
                prop_assert_eq!(in_vectors, left);
                found.extend(part);
            }
            prop_assert_eq!(found, expected);
            prop_assert_eq!(pieces.copy_to(&mut [0]), Err(NotMemory));
        }
    }
}
