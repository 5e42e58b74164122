//! The BARs of a function: what kind they are, which parts the guest reaches without an exit, and where those are now.
//!
//! ```text
//!   BAR 0  |  mapped  |  MSI-X table  |  mapped  |      whole pages; the rest is trapped
//!             window                     window
//! ```
//! Invariants:
//! - A window holds no byte of the MSI-X table and of its pending bits, and is whole pages of what VFIO lets map.
//! - A window is in the guest only while the BAR answers there and the function's memory decode is on.
//! - A host mapping lives at least as long as the lease of its window; a lease that is not taken back keeps it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use daxhund_pin::{HostFunction, Region, RegionIndex, RegionMapping};
use tracing::{error, info, warn};

use super::needs::{BarWindows, Window, WindowLease};
use super::snapshot::Snapshot;
use crate::pci::{
    BAR_64, BAR_IO, BAR_PREFETCHABLE, BARS, Bar, BarChange, BarWidth, FIRST_BAR, MsixLayout,
};

const PAGE: u64 = 4096;

/// The memory BARs, as the host's registers and regions tell. I/O BARs are left out.
pub(super) fn memory_bars(id: &str, host: &dyn HostFunction, snapshot: &Snapshot) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut hidden = Vec::new();
    let mut index = 0;
    while index < BARS {
        let register = snapshot.u32(FIRST_BAR + 4 * u16::from(index));
        let size = host
            .region(RegionIndex::Bar(index))
            .map_or(0, |region| region.size);
        let wide = register & BAR_IO == 0 && register & BAR_64 != 0;
        if size != 0 && register & BAR_IO != 0 {
            hidden.push(index);
        } else if size != 0 {
            bars.push(Bar {
                index,
                size,
                width: if wide {
                    BarWidth::Bits64
                } else {
                    BarWidth::Bits32
                },
                prefetchable: register & BAR_PREFETCHABLE != 0,
            });
        }
        index += if wide { 2 } else { 1 };
    }
    if !hidden.is_empty() {
        info!(
            device = id,
            bars = ?hidden,
            "the guest does not see BARs in I/O space; drivers of today use the others"
        );
    }
    bars
}

/// The parts of a BAR that can be windows: what is mappable, without the pages that hold `trapped`.
pub(super) fn window_parts(region: &Region, trapped: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut from = 0;
    for mappable in &region.mappable {
        // Whole pages, in order, each once.
        let start = mappable.start.max(from).checked_next_multiple_of(PAGE);
        let end = mappable.end.min(region.size) / PAGE * PAGE;
        let Some(start) = start.filter(|start| *start < end) else {
            continue;
        };
        from = end;
        parts.push(start..end);
    }
    for trapped in trapped {
        let start = trapped.start / PAGE * PAGE;
        let end = trapped.end.div_ceil(PAGE).saturating_mul(PAGE);
        parts = parts
            .into_iter()
            .flat_map(|part| {
                let below = part.start..part.end.min(start);
                let above = part.start.max(end)..part.end;
                [below, above]
            })
            .filter(|part| part.start < part.end)
            .collect();
    }
    parts
}

/// Bytes of a BAR that MSI-X's emulation answers.
fn msix_ranges(layout: &MsixLayout, bar: u8) -> Vec<Range<u64>> {
    let table = (layout.table, MsixLayout::table_size(layout.vectors));
    let pending = (layout.pending, MsixLayout::pending_size(layout.vectors));
    [table, pending]
        .into_iter()
        .filter(|(place, _)| place.bar == bar)
        .map(|(place, size)| place.offset.into()..u64::from(place.offset) + size)
        .collect()
}

/// A part of a BAR that is mapped into this process.
struct Part {
    bar: u8,
    /// Name in messages.
    name: String,
    /// Offset in the BAR.
    offset: u64,
    mapping: Box<dyn RegionMapping>,
    /// It is in the guest.
    lease: Option<WindowLease>,
}

/// All windows of a function.
pub(super) struct Windows {
    id: String,
    lender: Arc<dyn BarWindows>,
    parts: Vec<Part>,
    /// A refusal was told of.
    complained: bool,
    stopped: bool,
}

impl fmt::Debug for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Windows")
            .field("parts", &self.parts.len())
            .field("leases", &self.leases())
            .finish_non_exhaustive()
    }
}

impl Windows {
    /// Maps what can be mapped of the BARs into this process; nothing of it is in the guest yet. What can't be mapped is
    /// trapped.
    pub(super) fn new(
        id: &str,
        host: &dyn HostFunction,
        lender: Arc<dyn BarWindows>,
        bars: &[Bar],
        msix: Option<&MsixLayout>,
        excluded: &[u8],
    ) -> Self {
        let mut windows = Self {
            id: id.to_owned(),
            lender,
            parts: Vec::new(),
            complained: false,
            stopped: false,
        };
        for bar in bars.iter().map(|bar| bar.index) {
            let index = RegionIndex::Bar(bar);
            let Some(region) = host.region(index).filter(|_| !excluded.contains(&bar)) else {
                continue;
            };
            let trapped = msix.map_or_else(Vec::new, |layout| msix_ranges(layout, bar));
            for part in window_parts(region, &trapped) {
                let offset = part.start;
                match host.map(index, part) {
                    Ok(mapping) => windows.parts.push(Part {
                        bar,
                        name: format!("BAR {bar} of {id}"),
                        offset,
                        mapping,
                        lease: None,
                    }),
                    Err(error) => windows.complain(bar, &error),
                }
            }
        }
        windows
    }

    /// How many windows are in the guest.
    pub(super) fn leases(&self) -> usize {
        let parts = self.parts.iter();
        parts.filter(|part| part.lease.is_some()).count()
    }

    /// The BAR answers elsewhere now.
    pub(super) fn moved(&mut self, change: &BarChange) {
        let mut refused = None;
        for part in &mut self.parts {
            if part.bar != change.bar {
                continue;
            }
            let gpa = change.new.and_then(|base| base.checked_add(part.offset));
            if part.lease.as_ref().map(|lease| lease.gpa) == gpa
                || !part.withdraw(self.lender.as_ref())
                || self.stopped
            {
                continue;
            }
            if let Some(gpa) = gpa
                && let Err(error) = part.show(self.lender.as_ref(), gpa)
            {
                refused = Some(error);
            }
        }
        if let Some(error) = refused {
            self.complain(change.bar, error.as_ref());
        }
    }

    /// Takes all windows out of the guest: the function's memory decode goes off. Tells how many did not go.
    pub(super) fn withdraw(&mut self) -> usize {
        for part in &mut self.parts {
            part.withdraw(self.lender.as_ref());
        }
        self.leases()
    }

    /// Takes all windows out of the guest for good, and lets go of the host mappings. Tells how many did not go.
    pub(super) fn stop(&mut self) -> usize {
        self.stopped = true;
        let stuck = self.withdraw();
        self.parts.retain(|part| part.lease.is_some());
        stuck
    }

    fn complain(&mut self, bar: u8, error: &(dyn std::error::Error + 'static)) {
        if !std::mem::replace(&mut self.complained, true) {
            warn!(
                device = self.id,
                bar,
                error,
                "a BAR can't be mapped into the guest; each access to it leaves guest mode, which is slow"
            );
        }
    }
}

impl Part {
    fn show(&mut self, lender: &dyn BarWindows, gpa: u64) -> Result<(), super::needs::WindowError> {
        self.lease = Some(lender.map(&Window {
            name: &self.name,
            gpa,
            host_address: self.mapping.host_address(),
            size: self.mapping.size(),
        })?);
        Ok(())
    }

    /// `false`: it is still in the guest.
    fn withdraw(&mut self, lender: &dyn BarWindows) -> bool {
        let Some(lease) = self.lease.take() else {
            return true;
        };
        match lender.unmap(lease) {
            Ok(()) => true,
            Err((lease, error)) => {
                error!(
                    window = self.name,
                    gpa = format_args!("{:#x}", lease.gpa),
                    error,
                    "a BAR can't be taken out of the guest"
                );
                self.lease = Some(lease);
                false
            }
        }
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        if self.stop() > 0 {
            // The guest still reaches these addresses: they must not become other memory of this process.
            for part in self.parts.drain(..) {
                error!(
                    window = part.name,
                    "its host mapping is kept until this process ends"
                );
                std::mem::forget(part.mapping);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::single_range_in_vec_init,
        reason = "a list of ranges may have one"
    )]

    use proptest::prelude::*;

    use super::*;
    use crate::pci::BarOffset;

    fn region(size: u64, mappable: Vec<Range<u64>>) -> Region {
        Region {
            size,
            readable: true,
            writable: true,
            mappable,
            msix_mappable: true,
        }
    }

    #[test]
    fn pages_of_msix_are_left_out() {
        let layout = MsixLayout {
            vectors: 65,
            table: BarOffset {
                bar: 0,
                offset: 0x2000,
            },
            pending: BarOffset {
                bar: 0,
                offset: 0x3ff8,
            },
        };
        let region = region(0x8000, vec![0..0x8000]);
        // 65 entries take 0x410 bytes, their pending bits 16: into a third page.
        let parts = window_parts(&region, &msix_ranges(&layout, 0));
        assert_eq!(parts, [0..0x2000, 0x5000..0x8000]);
        let parts = window_parts(&region, &msix_ranges(&layout, 1));
        assert_eq!(parts, [0..0x8000]);
    }

    #[test]
    fn less_than_a_page_is_trapped() {
        let parts = |size, mappable| window_parts(&region(size, vec![mappable]), &[]);
        assert_eq!(parts(0x800, 0..0x800), []);
        assert_eq!(parts(0x4000, 0x800..0x17ff), []);
        assert_eq!(parts(0x4000, 0x800..0x2fff), [0x1000..0x2000]);
    }

    proptest! {
        #[test]
        fn windows_are_whole_mappable_pages_without_what_is_trapped(
            pages in 1u64..32,
            mappable in prop::collection::vec((0u64..0x2_0000, 0u64..0x1_0000), 0..5),
            trapped in prop::collection::vec((0u64..0x2_0000, 1u64..0x3000), 0..3),
        ) {
            let size = pages * PAGE;
            let mappable: Vec<_> = mappable.into_iter().map(|(at, len)| at..at + len).collect();
            let trapped: Vec<_> = trapped.into_iter().map(|(at, len)| at..at + len).collect();
            let parts = window_parts(&region(size, mappable.clone()), &trapped);
            let mut last = 0;
            for part in &parts {
                prop_assert!(last <= part.start && part.start < part.end && part.end <= size);
                last = part.end;
                for page in part.clone().step_by(4096) {
                    prop_assert!(page.is_multiple_of(PAGE));
                    let page = page..page + PAGE;
                    prop_assert!(mappable.iter().any(|m| m.start <= page.start && page.end <= m.end));
                    prop_assert!(trapped.iter().all(|t| t.end <= page.start || page.end <= t.start));
                }
            }
        }
    }
}
