//! A function with all its fakes, and what a guest finds out about it.

use std::sync::Arc;

use daxhund_pin::{HostFunction, IrqKind};

use super::{FakeHost, FakeIntx, FakeVectors, FakeWindows, host_address};
use crate::pci::{CONFIG_SPACE, Function};
use crate::vfio::{Parts, VfioPci, vectors_needed};

/// A function with all its fakes.
#[derive(Debug)]
pub struct Bench {
    /// The host's side.
    pub host: Arc<FakeHost>,
    /// Its vectors.
    pub vectors: Arc<FakeVectors>,
    /// Its pin.
    pub intx: Arc<FakeIntx>,
    /// Where its BARs go.
    pub windows: Arc<FakeWindows>,
    /// The guest's side.
    pub function: Arc<VfioPci>,
}

impl Bench {
    /// Of this function, which must be possible.
    pub fn new(host: FakeHost) -> Self {
        Self::with(host, &[])
    }

    /// With BARs that are not mapped.
    pub fn with(host: FakeHost, excluded: &[u8]) -> Self {
        let host = Arc::new(host);
        let vectors = Arc::new(FakeVectors::new(vectors_needed(host.as_ref())));
        let intx = Arc::<FakeIntx>::default();
        let windows = Arc::<FakeWindows>::default();
        let function = VfioPci::new(Parts {
            id: "fake".to_owned(),
            host: Arc::clone(&host) as _,
            vectors: Arc::clone(&vectors) as _,
            intx: Some(Arc::clone(&intx) as _),
            windows: Arc::clone(&windows) as _,
            exclude_mmap_bars: excluded.to_vec(),
        });
        Self {
            host,
            vectors,
            intx,
            windows,
            function: Arc::new(function.expect("the test's own function is sound")),
        }
    }
}

/// What a guest finds out about a function, by its registers only.
impl Bench {
    /// Reads configuration space.
    pub fn config<const N: usize>(&self, register: u16) -> [u8; N] {
        let mut data = [0; N];
        self.function.config_read(register, &mut data);
        data
    }

    fn config_u16(&self, register: u16) -> u16 {
        u16::from_le_bytes(self.config(register))
    }

    /// The list of capabilities: id and offset. A list without an end is an error of the test.
    pub fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut all = Vec::new();
        let [mut at] = self.config(0x34);
        while at != 0 {
            let [id, next] = self.config(at.into());
            all.push((id, at.into()));
            assert!(all.len() < 64 && next.is_multiple_of(4), "{all:x?}");
            at = next;
        }
        all
    }

    /// The list of extended capabilities: id and offset.
    pub fn extended(&self) -> Vec<(u16, u16)> {
        let mut all = Vec::new();
        let mut at = 0x100;
        while at != 0 {
            let header = u32::from_le_bytes(self.config(at));
            let [id_low, id_high, ..] = header.to_le_bytes();
            let id = u16::from_le_bytes([id_low, id_high]);
            if header != 0 {
                all.push((id, at));
            }
            assert!(all.len() < 1024, "{all:x?}");
            at = u16::try_from(header >> 20).expect("12 bits");
        }
        all
    }

    /// The kind of interrupt that the registers mean, and how many vectors it has.
    pub fn meant(&self) -> Option<(IrqKind, u16)> {
        let all = self.capabilities();
        let control = |id| {
            let found = all.iter().find(|(other, _)| *other == id);
            found.map_or(0, |(_, at)| self.config_u16(at + 2))
        };
        let (msix, msi) = (control(0x11), control(0x05));
        let command = self.config_u16(4);
        let [pin] = self.config(0x3d);
        if msix & 0x8000 != 0 {
            Some((IrqKind::Msix, (msix & 0x7ff) + 1))
        } else if msi & 1 != 0 {
            let count = (msi >> 4 & 0b111).min(msi >> 1 & 0b111);
            Some((IrqKind::Msi, 1 << count))
        } else {
            let meant = pin != 0 && command & 0x6 != 0;
            meant.then_some((IrqKind::Intx, 1))
        }
    }

    /// Whether everything is as the registers say. Not for a device that is gone, refuses, or was stopped.
    pub fn check(&self) {
        assert_eq!(self.host.violations(), [""; 0]);
        let meant = self.meant();
        let enabled = self.host.enabled();
        assert_eq!(
            enabled.as_ref().map(|(kind, _)| *kind),
            meant.map(|(kind, _)| kind)
        );
        if let (Some((kind, vectors)), Some((_, count))) = (&enabled, meant) {
            let all: Vec<u32> = (0..count.into()).collect();
            if !self.host.irq(*kind).resizable {
                assert_eq!(*vectors, all);
            }
            let routed = self.vectors.routed();
            let written = |vector: &u16| vectors.contains(&u32::from(*vector));
            assert!(routed.is_empty() || *kind != IrqKind::Intx);
            assert!(routed.iter().all(written), "{routed:?} of {vectors:?}");
        } else {
            assert_eq!(self.vectors.routed(), [0u16; 0]);
        }
        let pin = matches!(enabled, Some((IrqKind::Intx, _)));
        assert_eq!(self.intx.is_connected(), pin);
        assert_eq!(self.host.is_unmasked_by_event(), pin);
        let command = self.config_u16(4);
        assert_eq!(self.host.config_u16(4), command & 0x406);
        let bars = self.function.bars();
        for (gpa, size, host) in self.windows.mapped() {
            let bar = bars.iter().find(|bar| {
                let base = bar.new.unwrap_or(u64::MAX);
                base <= gpa && gpa - base + size <= bar.size
            });
            let bar = bar.expect("a window is where its BAR answers");
            let offset = gpa - bar.new.unwrap_or_default();
            assert_eq!(host, host_address(bar.bar, offset));
        }
    }

    /// Whether nothing is left of it after a stop.
    pub fn check_stopped(&self) {
        assert!(self.function.is_stopped());
        assert_eq!(self.windows.mapped(), []);
        assert_eq!(self.vectors.routed(), [0u16; 0]);
        assert!(!self.intx.is_connected());
        assert_eq!(self.host.mappings(), 0);
        for register in (0..CONFIG_SPACE).step_by(4) {
            let register = u16::try_from(register).expect("below 4096");
            assert_eq!(self.config(register), [0xff; 4]);
        }
    }
}
