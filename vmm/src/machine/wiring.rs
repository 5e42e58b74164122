//! Introduces devices to KVM: interrupts one way, doorbells and registers the other.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use daxhund_pin::{AddressSpace, DmaLease, DmaMapper, DmaMemory, DmaRequest};
use tracing::{error, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{
    Doorbells, Interrupts, MemorySlots, Message, Pins, SlotLease, SlotRange, Vectors, VfioRegistry,
    Vm,
};
use crate::pci::{MsiMessage, MsiRoutes, pin_gsi};
use crate::vfio::{self, Window, WindowError, WindowLease};
use crate::virtio::transport;

/// What devices use of one VM.
pub(super) struct Fabric {
    pub(super) interrupts: Interrupts,
    pub(super) doorbells: Arc<KvmDoorbells>,
    pub(super) pins: Pins,
    pub(super) slots: MemorySlots,
    pub(super) vfio: Arc<VfioRegistry>,
}

impl Fabric {
    pub(super) fn new(vm: &Vm, slots: MemorySlots) -> Self {
        Self {
            interrupts: vm.interrupts(),
            doorbells: Arc::new(KvmDoorbells(vm.doorbells())),
            pins: vm.pins(),
            slots,
            vfio: Arc::new(vm.vfio_registry()),
        }
    }
}

/// A function's MSI-X vectors as KVM raises them.
pub(super) struct KvmRoutes(pub(super) Vectors);

impl MsiRoutes for KvmRoutes {
    fn set(&self, vector: u16, message: Option<MsiMessage>) {
        let done = match message {
            Some(MsiMessage { address, data }) => self.0.route(vector, Message { address, data }),
            None => self.0.mask(vector),
        };
        if let Err(error) = done {
            // The guest sees a device without this interrupt; there is no register to tell it by.
            error!(%error, vector, ?message, "KVM does not take an interrupt route");
        }
    }

    fn signal(&self, vector: u16) {
        self.0.signal(vector);
    }

    fn is_pending(&self, vector: u16) -> bool {
        self.0.is_pending(vector)
    }

    fn event_of(&self, vector: u16) -> io::Result<Option<EventFd>> {
        self.0.event(vector).map(EventFd::try_clone).transpose()
    }
}

impl vfio::Vectors for KvmRoutes {
    fn event(&self, vector: u16) -> Option<&EventFd> {
        self.0.event(vector)
    }
}

/// The interrupt that pin A of a slot raises.
pub(super) struct KvmPin {
    pins: Pins,
    gsi: u32,
}

impl KvmPin {
    pub(super) fn of_slot(pins: &Pins, slot: u8) -> Self {
        Self {
            pins: pins.clone(),
            gsi: pin_gsi(slot),
        }
    }
}

impl vfio::Intx for KvmPin {
    fn connect(&self, trigger: &EventFd, resample: &EventFd) -> io::Result<()> {
        self.pins.connect(self.gsi, trigger, resample)
    }

    fn disconnect(&self, trigger: &EventFd) -> io::Result<()> {
        self.pins.disconnect(self.gsi, trigger)
    }
}

/// Registers of one passed-through function in the guest's address space, and in the reach of other devices.
pub(super) struct KvmWindows {
    slots: MemorySlots,
    /// Whose devices are to reach them; `None`: only the guest does.
    peers: Option<Arc<AddressSpace>>,
    mapped: Mutex<Mapped>,
    /// Whether it was told that they don't.
    said: AtomicBool,
}

#[derive(Default)]
struct Mapped {
    next: u64,
    windows: BTreeMap<u64, (Option<SlotLease>, Option<DmaLease>)>,
}

impl KvmWindows {
    pub(super) fn new(slots: &MemorySlots, peers: Option<Arc<AddressSpace>>) -> Self {
        Self {
            slots: slots.clone(),
            peers,
            mapped: Mutex::default(),
            said: AtomicBool::new(false),
        }
    }

    /// Best effort: devices can do without talking to each other.
    fn reach(&self, window: &Window<'_>) -> Option<DmaLease> {
        let space = self.peers.as_ref()?;
        let request = DmaRequest {
            name: window.name,
            iova: window.gpa,
            host_address: window.host_address,
            size: window.size,
            memory: DmaMemory::Registers,
        };
        let reach = space.map(&request);
        if let Err(error) = &reach
            && !self.said.swap(true, Ordering::Relaxed)
        {
            warn!(%error, "no transfers from other devices to this one");
        }
        reach.ok()
    }
}

impl vfio::BarWindows for KvmWindows {
    fn map(&self, window: &Window<'_>) -> Result<WindowLease, WindowError> {
        let slot = self.slots.create(SlotRange {
            gpa: window.gpa,
            size: window.size,
            host_address: window.host_address,
            read_only: false,
        })?;
        let reach = self.reach(window);
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let token = mapped.next;
        mapped.next += 1;
        mapped.windows.insert(token, (Some(slot), reach));
        Ok(WindowLease {
            gpa: window.gpa,
            size: window.size,
            token,
        })
    }

    /// Other devices first.
    fn unmap(&self, lease: WindowLease) -> Result<(), (WindowLease, WindowError)> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((slot, reach)) = mapped.windows.get_mut(&lease.token) else {
            return Err((lease, "no such window".into()));
        };
        if let (Some(space), Some(pin)) = (&self.peers, reach.take())
            && let Err((pin, error)) = space.unmap(pin)
        {
            *reach = Some(pin);
            return Err((lease, error.into()));
        }
        if let Some(taken) = slot.take()
            && let Err((taken, error)) = self.slots.delete(taken)
        {
            *slot = Some(taken);
            return Err((lease, error.into()));
        }
        mapped.windows.remove(&lease.token);
        Ok(())
    }
}

/// Doorbells that KVM rings without a way through this process.
pub(super) struct KvmDoorbells(pub(super) Doorbells);

impl transport::Doorbells for KvmDoorbells {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.connect(address, event)
    }

    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.0.disconnect(address, event)
    }
}
