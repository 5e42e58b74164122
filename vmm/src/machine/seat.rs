//! Who sits in a slot: a virtio device, or a function of the host.

use std::sync::Arc;
use std::time::Instant;

use tracing::{error, warn};

use super::passthrough::PassedThrough;
use crate::kvm::VfioRegistry;
use crate::pci::Function;
use crate::vfio::VfioPci;
use crate::virtio::transport::VirtioPci;

/// A function in its slot.
pub(super) enum Seat {
    /// Served by workers of this process.
    Virtio(Arc<VirtioPci>),
    /// Served by the host's own hardware.
    Passthrough {
        function: Arc<VfioPci>,
        host: Arc<PassedThrough>,
        registry: Arc<VfioRegistry>,
    },
}

impl Seat {
    /// Puts a function of the host on KVM's list.
    pub(super) fn passthrough(
        function: Arc<VfioPci>,
        host: Arc<PassedThrough>,
        registry: Arc<VfioRegistry>,
    ) -> Self {
        // KVM learns only how caches are to be kept; the device works without.
        if let Err(error) = host.register(&registry) {
            warn!(id = host.id(), %error, "KVM does not take note of the passed-through device");
        }
        Self::Passthrough {
            function,
            host,
            registry,
        }
    }

    /// For the bus.
    pub(super) fn function(&self) -> Arc<dyn Function> {
        match self {
            Self::Virtio(transport) => Arc::clone(transport) as Arc<_>,
            Self::Passthrough { function, .. } => Arc::clone(function) as Arc<_>,
        }
    }

    /// Whether it stays in its slot, and answers the guest, when everything of the host is taken from it. Drivers of
    /// virtio devices wait for answers without a limit; one of real hardware takes all ones for a card that was pulled.
    pub(super) fn outlives_host(&self) -> bool {
        matches!(self, Self::Virtio(_))
    }

    /// Whether everything of the host can be taken from it while the guest has it.
    pub(super) fn can_be_cut_off(&self) -> bool {
        match self {
            Self::Virtio(transport) => transport.device().outlives_host(),
            Self::Passthrough { .. } => true,
        }
    }

    /// What it is made of is taken back: it answers with errors from now on.
    pub(super) fn sever(&self) {
        if let Self::Virtio(transport) = self {
            transport.device().sever();
        }
    }

    /// Has it stop: no interrupt, no work, no reach into the guest. What is in flight then may take its time:
    /// [`Seat::is_gone`].
    pub(super) fn stop(&self) {
        match self {
            Self::Virtio(transport) => transport.stop(),
            Self::Passthrough { function, host, .. } => {
                if let Err(error) = function.stop() {
                    error!(%error, "a passed-through device is not out of the guest");
                }
                host.quiesce();
            }
        }
    }

    /// Whether nothing is in flight any more.
    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::Virtio(transport) => transport.is_gone(),
            Self::Passthrough { function, .. } => function.stop().is_ok(),
        }
    }

    /// The undo of its making. `false`: somebody else still holds it.
    pub(super) fn release(self) -> bool {
        match self {
            Self::Virtio(transport) => Arc::into_inner(transport).is_some(),
            Self::Passthrough {
                function,
                host,
                registry,
            } => {
                if let Err(error) = host.unregister(&registry) {
                    warn!(id = host.id(), %error, "KVM keeps note of a passed-through device that is gone");
                }
                Arc::into_inner(function).is_some()
            }
        }
    }

    /// Has its workers serve nothing. The host's hardware has no such thing: it works on what the guest has given it,
    /// and a guest whose vCPUs are held gives it nothing new.
    pub(super) fn pause(&self) {
        if let Self::Virtio(transport) = self {
            transport.pause();
        }
    }

    /// Waits for that; `false` when it was not so in time.
    pub(super) fn wait_paused(&self, until: Instant) -> bool {
        match self {
            Self::Virtio(transport) => transport.wait_paused(until),
            Self::Passthrough { .. } => true,
        }
    }

    /// The undo of [`Seat::pause`].
    pub(super) fn resume(&self) {
        if let Self::Virtio(transport) = self {
            transport.resume();
        }
    }
}
