//! Mapped device-dax memory, guarded: copies to and from it survive that it goes away under them.
//!
//! What is written goes by streaming stores, around the caches: what has left for the memory controller is durable on a
//! platform that saves its queues, and nothing has to be written back line by line at a flush. A store fence ends each copy.

use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_set1_epi8, _mm_sfence, _mm_stream_si128};

use daxhund_dax::DaxMapping;
use daxhund_dax::loss::{LossMark, Lost};
use daxhund_dax::sigbus::{Guard, GuardError, Guarded, Touch};
use vm_memory::VolatileSlice;

/// Bytes of one streaming store.
const LANE: usize = size_of::<__m128i>();

/// A mapping.
#[derive(Debug)]
pub(super) struct Mapped {
    mark: LossMark,
    /// Declared before the mapping: dropped first.
    _guard: Guard,
    mapping: DaxMapping,
}

impl Mapped {
    /// Guards a mapping; a touch of what is gone sets the mark.
    pub(super) fn new(mapping: DaxMapping, mark: LossMark) -> Result<Self, GuardError> {
        let guarded = Guarded {
            start: mapping.as_ptr() as usize,
            len: mapping.len(),
            align: usize::try_from(mapping.facts().align_bytes).unwrap_or(1 << 30),
            touch: Touch::Cpu,
        };
        // SAFETY: the range is the one mapping that `mapping` owns, in the same struct and dropped after the guard; it is
        // touched only here, by raw pointers and volatile slices.
        let guard = unsafe { Guard::new(guarded, mark.clone())? };
        Ok(Self {
            mark,
            _guard: guard,
            mapping,
        })
    }

    pub(super) fn mapping(&self) -> &DaxMapping {
        &self.mapping
    }

    /// The mapping, guarded no more: nobody touches it from here on.
    pub(super) fn into_mapping(self) -> DaxMapping {
        self.mapping
    }

    /// Copies to the slices, in order. An error when not all of it was there.
    pub(super) fn read(&self, offset: u64, into: &[VolatileSlice<'_>]) -> Result<(), Lost> {
        let len = into.iter().map(VolatileSlice::len).sum();
        let start = self.place(offset, len);
        let mut at = start;
        for slice in into {
            // SAFETY: `place` has checked that `len` bytes from `start` on are within the mapping, and the slices together
            // are `len` long. The mapping outlives this borrow of it.
            let disk = unsafe { VolatileSlice::new(at, slice.len()) };
            disk.copy_to_volatile_slice(*slice);
            at = at.wrapping_add(slice.len());
        }
        self.mark.check(offset, len as u64)
    }

    /// Copies to the disk; offset and length are multiples of a sector.
    pub(super) fn write(&self, offset: u64, from: &[u8]) -> Result<(), Lost> {
        let to = self.place(offset, from.len());
        assert!(from.len().is_multiple_of(LANE) && to.addr().is_multiple_of(LANE));
        for (lane, bytes) in from.chunks_exact(LANE).enumerate() {
            // SAFETY: `bytes` are `LANE` bytes of a slice; the load needs no alignment.
            let value = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            let at = to.wrapping_add(lane * LANE).cast();
            // SAFETY: `place` has checked that `from.len()` bytes from `to` on are within the mapping, and `to` is aligned
            // for it. `fence` comes before anything else is done.
            unsafe { _mm_stream_si128(at, value) };
        }
        fence();
        self.mark.check(offset, from.len() as u64)
    }

    /// Zeroes on the disk; offset and length are multiples of a sector.
    pub(super) fn zero(&self, offset: u64, len: usize) -> Result<(), Lost> {
        let to = self.place(offset, len);
        assert!(len.is_multiple_of(LANE) && to.addr().is_multiple_of(LANE));
        // SAFETY: every processor that this is built for has SSE2.
        let zero = unsafe { _mm_set1_epi8(0) };
        for at in (0..len).step_by(LANE) {
            // SAFETY: as in `write`.
            unsafe { _mm_stream_si128(to.wrapping_add(at).cast(), zero) };
        }
        fence();
        self.mark.check(offset, len as u64)
    }

    /// The address of `len` bytes at `offset`.
    fn place(&self, offset: u64, len: usize) -> *mut u8 {
        let end = offset.checked_add(len as u64);
        assert!(
            end.is_some_and(|end| end <= self.mapping.len() as u64),
            "requests are checked against the disk's length"
        );
        #[allow(
            clippy::cast_possible_truncation,
            reason = "less than the mapping's length"
        )]
        self.mapping.as_ptr().wrapping_add(offset as usize)
    }
}

/// After streaming stores, before anybody hears of them.
fn fence() {
    // SAFETY: every processor that this is built for has SSE.
    unsafe { _mm_sfence() };
}
