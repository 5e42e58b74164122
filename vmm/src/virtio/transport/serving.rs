//! Whether anybody serves the queues, and the way from one to the other.
//!
//! ```text
//!            DRIVER_OK                     0 written to the status
//!   Idle ──────────────▶ Live(crew) ────────────────────────────▶ Stopping(crew)
//!     ▲                                                                │ the crew is gone
//!     └────────────────────────────────────────────────────────────────┘
//! ```
//! A reset does not wait: the vCPU that asks for it goes on, and reads 0 from the status when the crew is gone.

use std::sync::Arc;

use tracing::error;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use super::common::CommonRegisters;
use super::signals::{QueueWire, Wires};
use crate::chain;
use crate::memory::ram::GuestView;
use crate::virtio::device::{Activation, Device, Signals};
use crate::virtio::queue::Queue;
use crate::virtio::worker::Crew;

#[derive(Debug)]
pub(super) enum Serving {
    Idle,
    Live(Crew),
    Stopping(Crew),
}

impl Serving {
    /// The driver is ready. What is wrong with its set-up is the device's `NEEDS_RESET`.
    pub(super) fn start(
        &mut self,
        device: &dyn Device,
        registers: &CommonRegisters,
        memory: &GuestView,
        wires: &Arc<Wires>,
        kicks: &[EventFd],
    ) {
        let started = queues(registers, memory, wires, kicks)
            .and_then(|queues| {
                let activation = Activation {
                    memory: memory.clone(),
                    features: registers.features(),
                    queues,
                    signals: Arc::clone(wires) as Arc<dyn Signals>,
                };
                device.activate(activation).map_err(|error| chain(&error))
            })
            .and_then(|workers| Crew::spawn(workers).map_err(|error| error.to_string()));
        match started {
            Ok(crew) => *self = Self::Live(crew),
            Err(why) => wires.needs_reset(&why),
        }
    }

    /// Asks the crew to go.
    pub(super) fn stop(&mut self) {
        *self = match std::mem::replace(self, Self::Idle) {
            Self::Live(crew) | Self::Stopping(crew) => {
                if crew.has_failed() {
                    error!("a device's worker had ended by itself");
                }
                crew.stop();
                Self::Stopping(crew)
            }
            Self::Idle => Self::Idle,
        };
    }

    /// Whether nobody serves; takes note of a crew that has gone.
    pub(super) fn is_idle(&mut self) -> bool {
        if let Self::Stopping(crew) = self
            && crew.is_gone()
        {
            *self = Self::Idle;
        }
        matches!(self, Self::Idle)
    }

    pub(super) fn is_stopping(&self) -> bool {
        matches!(self, Self::Stopping(_))
    }

    pub(super) fn crew(&self) -> Option<&Crew> {
        match self {
            Self::Live(crew) => Some(crew),
            _ => None,
        }
    }
}

/// The queues that the driver enabled. Their rings have to lie in guest memory.
fn queues(
    registers: &CommonRegisters,
    memory: &GuestView,
    wires: &Arc<Wires>,
    kicks: &[EventFd],
) -> Result<Vec<Option<Queue>>, String> {
    let snapshot = memory.memory();
    let event_index =
        registers.features() & (1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX) != 0;
    let mut queues = Vec::with_capacity(registers.queues.len());
    for (index, (set_up, kick)) in registers.queues.iter().zip(kicks).enumerate() {
        if !set_up.enabled {
            queues.push(None);
            continue;
        }
        let wrong = |what: &dyn std::fmt::Display| format!("queue {index}: {what}");
        let mut rings = virtio_queue::Queue::new(set_up.max_size).map_err(|e| wrong(&e))?;
        rings.try_set_size(set_up.size).map_err(|e| wrong(&e))?;
        rings
            .try_set_desc_table_address(GuestAddress(set_up.descriptors))
            .map_err(|e| wrong(&e))?;
        rings
            .try_set_avail_ring_address(GuestAddress(set_up.available))
            .map_err(|e| wrong(&e))?;
        rings
            .try_set_used_ring_address(GuestAddress(set_up.used))
            .map_err(|e| wrong(&e))?;
        rings.set_event_idx(event_index);
        rings.set_ready(true);
        if !rings.is_valid(&*snapshot) {
            return Err(wrong(&"its rings are not in guest memory"));
        }
        let kick = kick
            .try_clone()
            .map_err(|e| wrong(&format_args!("no descriptor for its doorbell: {e}")))?;
        let interrupt = Arc::new(QueueWire {
            wires: Arc::clone(wires),
            index,
        });
        let number = u16::try_from(index).expect("registers count queues in 16 bits");
        queues.push(Some(Queue::new(number, rings, kick, interrupt)));
    }
    Ok(queues)
}
