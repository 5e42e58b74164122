//! Fakes for unit tests and fuzz targets: three functions as VFIO lends them, and what KVM would do for them.
//!
//! [`FakeHost`] keeps VFIO's rules: one kind of interrupt at a time, vectors only where there are some, mappings only of
//! mappable pages. A call that breaks one is refused and counted.

mod bench;
mod kvm;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use daxhund_pin::{HostFunction, IrqInfo, IrqKind, Region, RegionIndex, RegionMapping};

pub use self::bench::Bench;
pub use self::kvm::{FakeIntx, FakeVectors, FakeWindows};
use crate::pci::CONFIG_SPACE;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a [`FakeHost`] was asked, but for reads of configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// A read of a BAR or the ROM: where, how many bytes.
    Read(RegionIndex, u64, usize),
    /// A write.
    Wrote(RegionIndex, u64, Vec<u8>),
    /// Vectors from the first given on; `false`: without an event.
    Irqs(IrqKind, u32, Vec<bool>),
    /// All vectors of a kind off.
    Disabled(IrqKind),
    /// An event unmasks the pin.
    UnmaskedBy,
    /// Reset.
    Reset,
}

#[derive(Debug, Default)]
struct State {
    asked: Vec<Asked>,
    /// The kind that is enabled, with its events.
    enabled: Option<(IrqKind, BTreeMap<u32, Option<File>>)>,
    unmasked: bool,
    gone: bool,
    refuses: bool,
    violations: Vec<String>,
}

/// A function as VFIO lends it.
#[derive(Debug)]
pub struct FakeHost {
    regions: BTreeMap<RegionIndex, Region>,
    irqs: HashMap<IrqKind, IrqInfo>,
    can_reset: bool,
    can_map: bool,
    config: Mutex<Vec<u8>>,
    /// Bytes of configuration space, after the header, that no guest may write.
    off_limits: Vec<Range<usize>>,
    /// The upper byte of device control of the express capability.
    device_control: Option<usize>,
    state: Mutex<State>,
    mappings: Arc<AtomicUsize>,
}

/// Made by tests.
impl FakeHost {
    fn new(config: &[(usize, &[u8])], config_size: u64) -> Self {
        let mut bytes = vec![0; CONFIG_SPACE];
        for (at, part) in config {
            bytes[*at..*at + part.len()].copy_from_slice(part);
        }
        let host = Self {
            regions: BTreeMap::new(),
            irqs: HashMap::new(),
            can_reset: true,
            can_map: true,
            config: Mutex::new(bytes),
            off_limits: Vec::new(),
            device_control: None,
            state: Mutex::default(),
            mappings: Arc::default(),
        };
        host.with_region(RegionIndex::Config, config_size, 0..0)
    }

    /// One 64-bit BAR with MSI-X in it, an express capability, and extended capabilities of which some are not for a guest.
    pub fn nvme() -> Self {
        Self::new(
            &[
                (0x00, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x04, 0x10, 0x00]),
                (0x08, &[0x02, 0x02, 0x08, 0x01, 0x10, 0x20, 0x80, 0x80]),
                (0x10, &[0x04, 0x00, 0x00, 0xfe, 0x01, 0x00, 0x00, 0x00]),
                (0x2c, &[0xf4, 0x1a, 0x00, 0x11]),
                (0x34, &[0x40]),
                (0x3c, &[0x0b, 0x01, 0x00, 0x00]),
                // MSI-X: 65 vectors in BAR 0, table at 0x2000, pending bits at 0x3000.
                (0x40, &[0x11, 0x80, 0x40, 0x80, 0x00, 0x20, 0x00, 0x00]),
                (0x48, &[0x00, 0x30, 0x00, 0x00]),
                // Power management, in D3hot, with PME.
                (0x60, &[0x01, 0x00, 0x03, 0xfe, 0x03, 0x81, 0x00, 0x55]),
                // Express: an endpoint of version 2, with all that can be asked for.
                (0x80, &[0x10, 0x60, 0x02, 0x00, 0xff, 0xff, 0xff, 0x1f]),
                (0x88, &[0x10, 0x2e, 0x05, 0x00, 0x13, 0x04, 0x40, 0x00]),
                (0x90, &[0x42, 0x01, 0x13, 0x10]),
                (0xa4, &[0xff, 0xff, 0xff, 0xff, 0x20, 0x04]),
                // ARI, errors, serial number, SR-IOV, vendor specific.
                (0x100, &[0x0e, 0x00, 0x01, 0x14, 0x01, 0x02, 0x03, 0x04]),
                (0x140, &[0x01, 0x00, 0x02, 0x20, 0x11, 0x12, 0x13, 0x14]),
                (0x200, &[0x03, 0x00, 0x01, 0x22, 0x21, 0x22, 0x23, 0x24]),
                (0x208, &[0x25, 0x26, 0x27, 0x28]),
                (0x220, &[0x10, 0x00, 0x01, 0x30, 0x31, 0x32, 0x33, 0x34]),
                (0x300, &[0x0b, 0x00, 0x01, 0x00, 0x42, 0x00, 0x81, 0x01]),
                (0x308, &[0x41, 0x42, 0x43, 0x44]),
            ],
            4096,
        )
        .with_region(RegionIndex::Bar(0), 0x4000, 0..0x4000)
        .with_irq(IrqKind::Intx, 1, false)
        .with_irq(IrqKind::Msix, 65, true)
        .guarding(
            &[0x40..0x4c, 0x60..0x68, 0x80..0x88, 0x8c..0xa8, 0xaa..0xbc],
            Some(0x89),
        )
        .guarding(&[0x100..0x304, 0x318..0x1000], Some(0x89))
    }

    /// Four 32-bit BARs, one of them in I/O space, a ROM, and each kind of interrupt.
    pub fn e1000e() -> Self {
        Self::new(
            &[
                (0x00, &[0x86, 0x80, 0xd3, 0x10, 0x07, 0x00, 0x10, 0x00]),
                (0x08, &[0x00, 0x00, 0x00, 0x02]),
                (0x10, &[0x00, 0x00, 0x04, 0xfe, 0x00, 0x00, 0x06, 0xfe]),
                (0x18, &[0x41, 0xc0, 0x00, 0x00, 0x00, 0x00, 0x08, 0xfe]),
                (0x2c, &[0x86, 0x80, 0x00, 0x00]),
                (0x34, &[0xc8]),
                (0x3c, &[0x0a, 0x01, 0x00, 0x00]),
                // MSI-X: 5 vectors in BAR 3, table at 0, pending bits at 0x2000.
                (0xa0, &[0x11, 0x00, 0x04, 0x00, 0x03, 0x00, 0x00, 0x00]),
                (0xa8, &[0x03, 0x20, 0x00, 0x00]),
                (0xc8, &[0x01, 0xd0, 0x22, 0xc8]),
                // MSI: one vector, 64-bit.
                (0xd0, &[0x05, 0xe0, 0x80, 0x00]),
                // Express: an endpoint of version 1.
                (0xe0, &[0x10, 0xa0, 0x01, 0x00, 0xc1, 0x8c, 0x00, 0x00]),
                (0x100, &[0x01, 0x00, 0x01, 0x14]),
                (0x140, &[0x03, 0x00, 0x01, 0x00]),
            ],
            4096,
        )
        .with_region(RegionIndex::Bar(0), 0x2_0000, 0..0x2_0000)
        .with_region(RegionIndex::Bar(1), 0x2_0000, 0..0x2_0000)
        .with_region(RegionIndex::Bar(2), 0x20, 0..0)
        .with_region(RegionIndex::Bar(3), 0x4000, 0..0x4000)
        .with_region(RegionIndex::Rom, 0x4_0000, 0..0)
        .with_irq(IrqKind::Intx, 1, false)
        .with_irq(IrqKind::Msi, 1, false)
        .with_irq(IrqKind::Msix, 5, false)
        .guarding(
            &[
                0xa0..0xac,
                0xc8..0xde,
                0xe0..0xe8,
                0xec..0xf4,
                0x100..0x1000,
            ],
            Some(0xe9),
        )
    }

    /// One large BAR, one vector of MSI, no express capability.
    pub fn edu() -> Self {
        Self::new(
            &[
                (0x00, &[0x34, 0x12, 0xe8, 0x11, 0x03, 0x00, 0x10, 0x00]),
                (0x08, &[0x10, 0x00, 0xff, 0x00]),
                (0x10, &[0x00, 0x00, 0x90, 0xfe]),
                (0x2c, &[0xf4, 0x1a, 0x00, 0x11]),
                (0x34, &[0x40]),
                (0x3c, &[0x0b, 0x01, 0x00, 0x00]),
                (0x40, &[0x05, 0x00, 0x80, 0x00]),
                // Registers of its own, in no capability.
                (0x80, &[0xd0, 0xd1, 0xd2, 0xd3]),
            ],
            256,
        )
        .with_region(RegionIndex::Bar(0), 0x10_0000, 0..0x10_0000)
        .with_irq(IrqKind::Intx, 1, false)
        .with_irq(IrqKind::Msi, 1, false)
        .guarding(&[0x40..0x4e, 0x100..0x1000], None)
    }

    fn guarding(mut self, off_limits: &[Range<usize>], device_control: Option<usize>) -> Self {
        self.off_limits.extend_from_slice(off_limits);
        self.device_control = device_control;
        self
    }

    /// With a region; an empty range: nothing of it is mappable.
    #[must_use]
    pub fn with_region(mut self, index: RegionIndex, size: u64, mappable: Range<u64>) -> Self {
        let region = Region {
            size,
            readable: true,
            writable: index != RegionIndex::Rom,
            mappable: Some(mappable)
                .filter(|part| !part.is_empty())
                .into_iter()
                .collect(),
            msix_mappable: true,
        };
        self.regions.insert(index, region);
        self
    }

    /// With interrupts.
    #[must_use]
    pub fn with_irq(mut self, kind: IrqKind, count: u32, resizable: bool) -> Self {
        self.irqs.insert(kind, IrqInfo { count, resizable });
        self
    }

    /// With these bytes of configuration space.
    #[must_use]
    pub fn with_config(self, at: usize, bytes: &[u8]) -> Self {
        lock(&self.config)[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// With anything in configuration space, so that a guest may write anything there too.
    #[must_use]
    pub fn unguarded(mut self) -> Self {
        self.off_limits.clear();
        self.device_control = None;
        self
    }

    /// Can't be reset.
    #[must_use]
    pub fn without_reset(mut self) -> Self {
        self.can_reset = false;
        self
    }

    /// Refuses to map anything.
    #[must_use]
    pub fn without_mappings(mut self) -> Self {
        self.can_map = false;
        self
    }
}

/// Looked at by tests.
impl FakeHost {
    /// What it was asked since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state().asked)
    }

    /// The device vanishes: everything is an error from now on.
    pub fn vanish(&self) {
        self.state().gone = true;
    }

    /// Interrupts can't be enabled from now on, or can again.
    pub fn refuse_irqs(&self, refuses: bool) {
        self.state().refuses = refuses;
    }

    /// The kind that is enabled, and which of its vectors write events.
    pub fn enabled(&self) -> Option<(IrqKind, Vec<u32>)> {
        let state = self.state();
        let (kind, vectors) = state.enabled.as_ref()?;
        let vectors = vectors.iter().filter(|(_, event)| event.is_some());
        Some((*kind, vectors.map(|(vector, _)| *vector).collect()))
    }

    /// Whether the guest's acknowledgement unmasks the pin.
    pub fn is_unmasked_by_event(&self) -> bool {
        self.state().unmasked
    }

    /// The device raises an interrupt.
    pub fn raise(&self, vector: u32) {
        let mut state = self.state();
        let event = state.enabled.as_mut().and_then(|(_, vectors)| {
            let event = vectors.get_mut(&vector)?;
            event.as_mut()
        });
        let event = event.expect("the test has enabled it");
        event
            .write_all(&1u64.to_ne_bytes())
            .expect("an event takes a count");
    }

    /// Rules of VFIO that were broken.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    /// How many mappings are alive.
    pub fn mappings(&self) -> usize {
        self.mappings.load(Ordering::SeqCst)
    }

    /// What it has in configuration space.
    pub fn config_u16(&self, at: usize) -> u16 {
        let config = lock(&self.config);
        u16::from_le_bytes([config[at], config[at + 1]])
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn present(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state();
        if state.gone {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(state)
    }

    /// What is wrong with a write to configuration space: the bytes, or bits of the command register or device control.
    fn off_limits(&self, at: usize, data: &[u8]) -> Option<String> {
        let config = lock(&self.config);
        let wrong = |(at, byte): (usize, &u8)| match at {
            4 => byte & !0x06 != 0,
            5 => byte & !0x04 != 0,
            6 => *byte != 0,
            7 => byte & !0xf9 != 0,
            0..HEADER => true,
            _ if Some(at) == self.device_control => {
                byte & 0x80 != 0 || (byte ^ config[at]) & 0x06 != 0
            }
            _ => self.off_limits.iter().any(|range| range.contains(&at)),
        };
        let all = (at..).zip(data);
        all.clone()
            .any(wrong)
            .then(|| format!("{data:02x?} to {at:#x} of configuration space"))
    }

    fn check(&self, index: RegionIndex, offset: u64, len: usize) -> io::Result<()> {
        let size = self.region(index).map_or(0, |region| region.size);
        let end = offset.checked_add(len as u64);
        if end.is_some_and(|end| end <= size) {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }
}

impl State {
    fn violation<T>(&mut self, what: String) -> io::Result<T> {
        self.violations.push(what);
        Err(io::ErrorKind::InvalidInput.into())
    }
}

/// Where capabilities begin.
const HEADER: usize = 0x40;
/// Status: ones clear the errors.
const STATUS: Range<usize> = 6..8;

impl HostFunction for FakeHost {
    fn region(&self, index: RegionIndex) -> Option<&Region> {
        self.regions.get(&index)
    }

    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0xff);
        let mut state = self.present()?;
        self.check(index, offset, data.len())?;
        match index {
            RegionIndex::Config => {
                let at = usize::try_from(offset).expect("checked");
                data.copy_from_slice(&lock(&self.config)[at..at + data.len()]);
            }
            RegionIndex::Bar(bar) => data.fill(0xb0 | bar),
            RegionIndex::Rom => data.fill(0xaa),
        }
        if index != RegionIndex::Config {
            state.asked.push(Asked::Read(index, offset, data.len()));
        }
        Ok(())
    }

    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.present()?;
        self.check(index, offset, data.len())?;
        if index == RegionIndex::Config {
            let at = usize::try_from(offset).expect("checked");
            if let Some(what) = self.off_limits(at, data) {
                return state.violation(what);
            }
            for (at, (to, from)) in (at..).zip(lock(&self.config)[at..].iter_mut().zip(data)) {
                *to = if STATUS.contains(&at) {
                    *to & !from
                } else {
                    *from
                };
            }
        }
        state.asked.push(Asked::Wrote(index, offset, data.to_vec()));
        Ok(())
    }

    fn map(&self, index: RegionIndex, part: Range<u64>) -> io::Result<Box<dyn RegionMapping>> {
        let mut state = self.present()?;
        if !self.can_map {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let RegionIndex::Bar(bar) = index else {
            return state.violation(format!("a mapping of {index:?}"));
        };
        let whole_pages = part.start.is_multiple_of(4096) && part.end.is_multiple_of(4096);
        let mappable = self.region(index).is_some_and(|region| {
            let mut areas = region.mappable.iter();
            areas.any(|area| area.start <= part.start && part.end <= area.end)
        });
        if part.is_empty() || !whole_pages || !mappable {
            return state.violation(format!("a mapping of {part:x?} of {index:?}"));
        }
        self.mappings.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeMapping {
            host_address: host_address(bar, part.start),
            size: part.end - part.start,
            alive: Arc::clone(&self.mappings),
        }))
    }

    fn irq(&self, kind: IrqKind) -> IrqInfo {
        let none = IrqInfo {
            count: 0,
            resizable: false,
        };
        self.irqs.get(&kind).copied().unwrap_or(none)
    }

    fn set_irqs(
        &self,
        kind: IrqKind,
        start: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let mut state = self.present()?;
        let given = events.iter().map(Option::is_some).collect();
        state.asked.push(Asked::Irqs(kind, start, given));
        let info = self.irq(kind);
        let vectors = start..start + u32::try_from(events.len()).expect("few");
        if vectors.is_empty() || vectors.end > info.count {
            return state.violation(format!("{kind:?} has no vectors {vectors:?}"));
        }
        let known = match &state.enabled {
            Some((other, _)) if *other != kind => {
                let what = format!("{kind:?} while {other:?} is enabled");
                return state.violation(what);
            }
            Some((_, known)) => Some(known.len()),
            None => None,
        };
        if !info.resizable && known.is_some_and(|known| vectors.end as usize > known) {
            return state.violation(format!("{kind:?} can't have vectors added"));
        }
        if state.refuses {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let (_, all) = state.enabled.get_or_insert((kind, BTreeMap::new()));
        for (vector, event) in vectors.zip(events) {
            let event = event.map(|event| event.try_clone_to_owned()).transpose()?;
            all.insert(vector, event.map(File::from));
        }
        Ok(())
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        let mut state = self.present()?;
        state.asked.push(Asked::Disabled(kind));
        match &state.enabled {
            Some((on, _)) if *on == kind => {
                state.enabled = None;
                state.unmasked = false;
                Ok(())
            }
            _ => state.violation(format!("{kind:?} is not enabled")),
        }
    }

    fn unmask_intx_by(&self, _event: BorrowedFd<'_>) -> io::Result<()> {
        let mut state = self.present()?;
        state.asked.push(Asked::UnmaskedBy);
        match &state.enabled {
            Some((IrqKind::Intx, _)) => {
                state.unmasked = true;
                Ok(())
            }
            _ => state.violation("the pin is not enabled".to_owned()),
        }
    }

    fn reset(&self) -> io::Result<()> {
        let mut state = self.present()?;
        state.asked.push(Asked::Reset);
        if self.can_reset {
            Ok(())
        } else {
            state.violation("it can't be reset".to_owned())
        }
    }

    fn can_reset(&self) -> bool {
        self.can_reset
    }
}

/// Where a [`FakeHost`] maps an offset of a BAR.
pub fn host_address(bar: u8, offset: u64) -> u64 {
    0x7000_0000_0000 + (u64::from(bar) << 36) + offset
}

#[derive(Debug)]
struct FakeMapping {
    host_address: u64,
    size: u64,
    alive: Arc<AtomicUsize>,
}

impl RegionMapping for FakeMapping {
    fn host_address(&self) -> u64 {
        self.host_address
    }

    fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for FakeMapping {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}
