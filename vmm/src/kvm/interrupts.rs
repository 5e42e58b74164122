//! Message-signalled interrupts: vectors with a route each, raised by writing an event descriptor.
//!
//! ```text
//!            route(message)                    mask
//!   Masked ───────────────────▶ Routed ───────────────────▶ Masked
//!    the event's count stays:    KVM has the event (irqfd):
//!    it is what is pending       a write is an interrupt
//! ```
//! A vector is a global interrupt number above those of the interrupt controllers' pins, and an event descriptor. While
//! it is masked KVM does not listen to the descriptor, so what is signalled stays in its count; when KVM gets it back it
//! finds the count and raises the interrupt (virt/kvm/eventfd.c, `kvm_irqfd_assign`).
//!
//! `KVM_SET_GSI_ROUTING` takes the whole table, so one table serves the VM and holds the controllers' pins as well.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use tracing::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Pins of KVM's I/O APIC.
const PINS: u32 = 24;
/// Pins of both 8259s.
const PIC_PINS: u32 = 16;
/// `KVM_MAX_IRQ_ROUTES` (`arch/x86/include/asm/kvm_host.h`).
const MAX_ROUTES: u32 = 4096;

/// Vectors could not be had.
#[derive(Debug, Error)]
pub enum VectorsError {
    /// The table is full.
    #[error(
        "no {asked} interrupt vectors are free: a VM has {MAX_ROUTES}; use fewer queues or devices"
    )]
    Exhausted {
        /// How many were asked for.
        asked: u16,
    },
    /// No descriptor.
    #[error(
        "no event descriptor could be made for an interrupt; `ulimit -n` raises how many a process may have"
    )]
    Event(#[source] io::Error),
}

/// A message: a write of `data` to `address` in the range of the local APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// A number above the pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Free,
    Taken,
    Routed(Message),
}

#[derive(Debug)]
struct Table {
    vm: Arc<VmFd>,
    /// By number above the pins.
    vectors: Vec<Number>,
}

impl Table {
    fn allocate(&mut self, count: u16) -> Result<Vec<u32>, VectorsError> {
        let room = (MAX_ROUTES - PINS - PIC_PINS) as usize;
        let mut numbers = Vec::with_capacity(count.into());
        for index in 0..room {
            if numbers.len() == usize::from(count) {
                break;
            }
            if matches!(self.vectors.get(index), None | Some(Number::Free)) {
                numbers.push(index);
            }
        }
        if numbers.len() < usize::from(count) {
            return Err(VectorsError::Exhausted { asked: count });
        }
        for index in &numbers {
            if self.vectors.len() <= *index {
                self.vectors.resize(index + 1, Number::Free);
            }
            self.vectors[*index] = Number::Taken;
        }
        Ok(numbers
            .into_iter()
            .map(|index| PINS + u32::try_from(index).expect("below MAX_ROUTES"))
            .collect())
    }

    fn slot(&mut self, gsi: u32) -> &mut Number {
        &mut self.vectors[(gsi - PINS) as usize]
    }

    /// Gives KVM the whole table.
    fn commit(&self) -> io::Result<()> {
        let mut entries = Vec::with_capacity((PINS + PIC_PINS) as usize + self.vectors.len());
        for pin in 0..PINS {
            if pin < PIC_PINS {
                let (chip, pin_of_chip) = if pin < 8 {
                    (KVM_IRQCHIP_PIC_MASTER, pin)
                } else {
                    (KVM_IRQCHIP_PIC_SLAVE, pin - 8)
                };
                entries.push(pin_entry(pin, chip, pin_of_chip));
            }
            entries.push(pin_entry(pin, KVM_IRQCHIP_IOAPIC, pin));
        }
        for (gsi, vector) in (PINS..).zip(&self.vectors) {
            if let Number::Routed(message) = vector {
                entries.push(message_entry(gsi, *message));
            }
        }
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
        self.vm.set_gsi_routing(&table).map_err(io::Error::from)
    }
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn message_entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let [low, high] = [message.address, message.address >> 32]
        .map(|half| u32::try_from(half & 0xffff_ffff).expect("32 bits"));
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: low,
        address_hi: high,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// The routing table of one VM.
#[derive(Debug, Clone)]
pub struct Interrupts(Arc<Mutex<Table>>);

impl Interrupts {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        let vectors = Vec::new();
        Self(Arc::new(Mutex::new(Table { vm, vectors })))
    }

    /// `count` vectors, all masked. Dropping them gives their numbers back.
    pub fn vectors(&self, count: u16) -> Result<Vectors, VectorsError> {
        let events = (0..count)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<Vec<_>, _>>()
            .map_err(VectorsError::Event)?;
        let numbers = self.table().allocate(count)?;
        let vectors = numbers
            .into_iter()
            .zip(events)
            .map(|(gsi, event)| {
                let state = Vector {
                    gsi,
                    message: None,
                    live: false,
                };
                (Mutex::new(state), event)
            })
            .collect();
        Ok(Vectors {
            interrupts: self.clone(),
            vectors,
        })
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Vector {
    gsi: u32,
    /// The route KVM has for it.
    message: Option<Message>,
    /// Whether KVM listens to the event.
    live: bool,
}

/// The vectors of one device.
///
/// Lock order: a vector, then the table.
#[derive(Debug)]
pub struct Vectors {
    interrupts: Interrupts,
    vectors: Vec<(Mutex<Vector>, EventFd)>,
}

impl Vectors {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Makes `vector` this message, and delivers what is pending.
    pub fn route(&self, vector: u16, message: Message) -> io::Result<()> {
        let Some((state, event)) = self.get(vector) else {
            return Ok(());
        };
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.message != Some(message) {
            let mut table = self.interrupts.table();
            *table.slot(state.gsi) = Number::Routed(message);
            table.commit()?;
            state.message = Some(message);
        }
        if !state.live {
            let vm = Arc::clone(&self.interrupts.table().vm);
            vm.register_irqfd(event, state.gsi)?;
            state.live = true;
        }
        Ok(())
    }

    /// Keeps `vector` from the guest until it is routed again.
    pub fn mask(&self, vector: u16) -> io::Result<()> {
        let Some((state, event)) = self.get(vector) else {
            return Ok(());
        };
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.live {
            let vm = Arc::clone(&self.interrupts.table().vm);
            vm.unregister_irqfd(event, state.gsi)?;
            state.live = false;
        }
        Ok(())
    }

    /// Raises `vector`; pending while it is masked.
    pub fn signal(&self, vector: u16) {
        if let Some((_, event)) = self.get(vector) {
            // Only a full counter gives an error, and then it is pending all the same.
            let _ = event.write(1);
        }
    }

    /// Whether `vector` was signalled while masked.
    pub fn is_pending(&self, vector: u16) -> bool {
        let Some((state, event)) = self.get(vector) else {
            return false;
        };
        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
        !state.live && readable(event)
    }

    /// The event behind `vector`, for those who raise it from outside this process.
    pub fn event(&self, vector: u16) -> Option<&EventFd> {
        self.get(vector).map(|(_, event)| event)
    }

    fn get(&self, vector: u16) -> Option<&(Mutex<Vector>, EventFd)> {
        self.vectors.get(usize::from(vector))
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        for index in 0..self.vectors.len() {
            let vector = u16::try_from(index).expect("made from a u16");
            if let Err(error) = self.mask(vector) {
                error!(%error, vector, "KVM still listens to an interrupt that is gone");
            }
        }
        let mut table = self.interrupts.table();
        for (state, _) in &self.vectors {
            let gsi = state.lock().unwrap_or_else(PoisonError::into_inner).gsi;
            *table.slot(gsi) = Number::Free;
        }
        // Stale routes do no harm: nothing raises them any more, and the next commit drops them.
    }
}

fn readable(event: &EventFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the descriptor is open for as long as `event` is borrowed, and the borrow ends with this call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready == 1)
}
