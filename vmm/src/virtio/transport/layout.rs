//! Configuration space of a virtio function: what it is, and the capabilities that say where in its BAR things are
//! (virtio 1.2, 4.1.4).

use std::sync::Arc;

use crate::pci::{
    Bar, BarOffset, BarWidth, Class, ConfigSpace, Identity, MsiRoutes, Msix, MsixLayout,
};
use crate::virtio::device::Kind;

const VENDOR_VIRTIO: u16 = 0x1af4;
/// Device ids of modern devices start here (4.1.2).
const DEVICE_MODERN: u16 = 0x1040;
/// Revision of modern devices: at least 1 (4.1.2.1).
const REVISION: u8 = 1;
const CAPABILITY_VENDOR: u8 = 0x09;
/// Structure types (4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// The one BAR.
pub(super) const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
pub(super) const COMMON: u64 = 0x0000;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
/// A doorbell each, at the queue's index times this.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
pub(super) const MSIX: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x7000;
/// What both the doorbells' page and the MSI-X table have room for.
pub(super) const MAX_QUEUES: usize = 512;

/// The parts that the guest finds by capabilities.
pub(super) struct Configuration {
    pub(super) space: ConfigSpace,
    pub(super) msix: Msix,
    pub(super) msix_capability: u8,
    pub(super) window: Window,
}

impl Configuration {
    /// For a device of this kind, with so many vectors.
    pub(super) fn new(kind: Kind, vectors: u16, routes: Arc<dyn MsiRoutes>) -> Self {
        let device = DEVICE_MODERN + kind.id();
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR_VIRTIO,
            device,
            revision: REVISION,
            class: class(kind),
            subsystem_vendor: VENDOR_VIRTIO,
            subsystem: device,
        });
        space
            .add_bar(Bar {
                index: BAR,
                size: BAR_SIZE,
                width: BarWidth::Bits64,
                prefetchable: false,
            })
            .expect("the first BAR of an empty header");
        let at = |offset: u64| BarOffset {
            bar: BAR,
            offset: u32::try_from(offset).expect("within the BAR"),
        };
        let layout = MsixLayout {
            vectors,
            table: at(MSIX),
            pending: at(MSIX_PENDING),
        };
        let msix = Msix::new(layout, routes).expect("at most MAX_QUEUES + 1 vectors, apart");
        let room = "six short capabilities";
        let msix_capability = msix.add_capability(&mut space).expect(room);
        for (kind, offset, length) in [
            (COMMON_CFG, COMMON, super::common::LENGTH),
            (ISR_CFG, ISR, 1),
            (DEVICE_CFG, DEVICE, NOTIFY - DEVICE),
        ] {
            let body = body(kind, offset, length, &[]);
            space
                .add_capability(CAPABILITY_VENDOR, &body, &[])
                .expect(room);
        }
        let doorbells = MAX_QUEUES as u64 * u64::from(NOTIFY_MULTIPLIER);
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        let notify = body(NOTIFY_CFG, NOTIFY, doorbells, &multiplier);
        space
            .add_capability(CAPABILITY_VENDOR, &notify, &[])
            .expect(room);
        let window = Window::add(&mut space);
        Self {
            space,
            msix,
            msix_capability,
            window,
        }
    }
}

/// Class codes as the guest's tools show them; drivers go by the device id.
fn class(kind: Kind) -> Class {
    let (base, sub) = match kind {
        Kind::Net => (0x02, 0x00),
        Kind::Block | Kind::FileSystem => (0x01, 0x80),
        Kind::Console => (0x07, 0x80),
        Kind::Pmem => (0x05, 0x80),
        Kind::Entropy | Kind::Balloon | Kind::Vsock | Kind::Other(_) => (0xff, 0x00),
    };
    Class {
        base,
        sub,
        interface: 0,
    }
}

/// `struct virtio_pci_cap` after the id and the pointer to the next, with what follows it.
fn body(kind: u8, offset: u64, length: u64, more: &[u8]) -> Vec<u8> {
    let word = |value: u64| u32::try_from(value).expect("within the BAR").to_le_bytes();
    let whole_length = u8::try_from(16 + more.len()).expect("at most 20");
    let mut body = vec![whole_length, kind, BAR, 0, 0, 0];
    body.extend(word(offset));
    body.extend(word(length));
    body.extend(more);
    body
}

/// The capability through which the BAR is reached from configuration space (4.1.4.9): for firmware that maps nothing.
/// The guest writes BAR, offset and length; an access to the data bytes is then an access there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    capability: u16,
}

/// Where an access through the window goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WindowAccess {
    pub(super) bar: u8,
    pub(super) offset: u64,
}

/// Offsets in the capability.
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

impl Window {
    fn add(space: &mut ConfigSpace) -> Self {
        let body = body(PCI_CFG, 0, 0, &[0; 4]);
        let mut writable = vec![0; body.len()];
        writable[usize::from(WINDOW_BAR) - 2] = 0xff;
        for byte in &mut writable[usize::from(WINDOW_OFFSET) - 2..usize::from(WINDOW_DATA) - 2] {
            *byte = 0xff;
        }
        let capability = space
            .add_capability(CAPABILITY_VENDOR, &body, &writable)
            .expect("six short capabilities");
        Self {
            capability: capability.into(),
        }
    }

    /// Where an access of `len` bytes to `register` goes, if it is one to the data bytes: of the length and alignment
    /// that was set.
    pub(super) fn access(
        self,
        space: &ConfigSpace,
        register: u16,
        len: usize,
    ) -> Option<WindowAccess> {
        if register != self.capability + WINDOW_DATA {
            return None;
        }
        let length = space.read_u32(self.capability + WINDOW_LENGTH);
        let offset = space.read_u32(self.capability + WINDOW_OFFSET);
        let fits =
            matches!(length, 1 | 2 | 4) && length as usize == len && offset.is_multiple_of(length);
        let [bar, _] = space.read_u16(self.capability + WINDOW_BAR).to_le_bytes();
        fits.then_some(WindowAccess {
            bar,
            offset: offset.into(),
        })
    }
}
