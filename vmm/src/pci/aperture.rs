//! A range of guest-physical addresses in which the BARs of one segment answer.
//!
//! Invariants:
//! - No two BARs answer at one address: the one that came first keeps it, the other does not answer.
//! - A BAR answers with all of its length inside the aperture, or not at all.
//! - When [`Aperture::release`] has returned, no vCPU is in the function for an access to that BAR.
//!
//! The map changes while vCPUs run. An access holds it for reading while the function answers; a function returns at
//! once and never comes back here, so a change waits for that long only.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;

use super::{Function, Window};
use crate::bus::BusDevice;

/// A BAR's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BarId {
    pub(super) slot: u8,
    pub(super) bar: u8,
}

struct Answering {
    id: BarId,
    size: u64,
    function: Arc<dyn Function>,
}

/// A BAR can't answer where the guest put it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum Refused {
    /// Not in this aperture.
    #[error("outside of the apertures")]
    Outside,
    /// Another BAR was there first.
    #[error("BAR {} of slot {} answers there", .0.bar, .0.slot)]
    Taken(BarId),
}

/// One aperture of a segment; for the MMIO bus, at its window.
pub struct Aperture {
    window: Window,
    /// By first address.
    bars: RwLock<BTreeMap<u64, Answering>>,
}

impl fmt::Debug for Aperture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aperture")
            .field("window", &self.window)
            .field("bars", &self.answering())
            .finish()
    }
}

impl Aperture {
    pub(super) fn new(window: Window) -> Self {
        Self {
            window,
            bars: RwLock::new(BTreeMap::new()),
        }
    }

    /// Its addresses.
    pub fn window(&self) -> Window {
        self.window
    }

    /// A BAR of `size` bytes answers at `base` from now on.
    pub(super) fn claim(
        &self,
        base: u64,
        size: u64,
        id: BarId,
        function: &Arc<dyn Function>,
    ) -> Result<(), Refused> {
        let wanted = Window::new(base, size)
            .filter(|wanted| size != 0 && self.window.contains(*wanted))
            .ok_or(Refused::Outside)?;
        let mut bars = self.bars.write().unwrap_or_else(PoisonError::into_inner);
        let last_below = bars.range(..wanted.end()).next_back();
        if let Some((other_base, other)) = last_below
            && other_base + other.size > base
        {
            return Err(Refused::Taken(other.id));
        }
        let function = Arc::clone(function);
        bars.insert(base, Answering { id, size, function });
        Ok(())
    }

    /// The undo of [`Aperture::claim`]: where the BAR answered until now.
    pub(super) fn release(&self, id: BarId) -> Option<u64> {
        let mut bars = self.bars.write().unwrap_or_else(PoisonError::into_inner);
        let base = bars
            .iter()
            .find(|(_, answering)| answering.id == id)
            .map(|(base, _)| *base)?;
        bars.remove(&base);
        Some(base)
    }

    /// Where BARs answer.
    pub(super) fn answering(&self) -> Vec<Window> {
        let bars = self.bars.read().unwrap_or_else(PoisonError::into_inner);
        bars.iter()
            .filter_map(|(base, answering)| Window::new(*base, answering.size))
            .collect()
    }

    /// Calls `access` with the BAR that has all `len` bytes at `offset` of the aperture, if one does.
    fn find(&self, offset: u64, len: usize, access: impl FnOnce(&dyn Function, u8, u64)) {
        let Some(address) = self.window.base().checked_add(offset) else {
            return;
        };
        let bars = self.bars.read().unwrap_or_else(PoisonError::into_inner);
        let Some((base, answering)) = bars.range(..=address).next_back() else {
            return;
        };
        let offset = address - base;
        let end = offset.checked_add(len as u64);
        if end.is_some_and(|end| end <= answering.size) {
            access(answering.function.as_ref(), answering.id.bar, offset);
        }
    }
}

impl BusDevice for Aperture {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.find(offset, data.len(), |function, bar, offset| {
            function.bar_read(bar, offset, data);
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.find(offset, data.len(), |function, bar, offset| {
            function.bar_write(bar, offset, data);
        });
    }
}
