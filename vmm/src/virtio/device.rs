//! What a virtio device is to the transport that shows it to the guest.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::blk::DiskResizeError;
use super::queue::Queue;
use super::worker::Worker;
use crate::memory::ram::GuestView;

/// Device types, virtio 1.2, section 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Network interface.
    Net,
    /// Disk.
    Block,
    /// Console.
    Console,
    /// Random numbers.
    Entropy,
    /// Memory balloon.
    Balloon,
    /// Sockets to the host.
    Vsock,
    /// Directory of the host.
    FileSystem,
    /// Persistent memory.
    Pmem,
    /// One that another process knows, by its number.
    Other(u16),
}

impl Kind {
    /// The number in the PCI device id, and in the specification.
    pub fn id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Console => 3,
            Self::Entropy => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
            Self::FileSystem => 26,
            Self::Pmem => 27,
            Self::Other(number) => number,
        }
    }

    /// The one of this number.
    pub fn of(number: u16) -> Self {
        let known = [
            Self::Net,
            Self::Block,
            Self::Console,
            Self::Entropy,
            Self::Balloon,
            Self::Vsock,
            Self::FileSystem,
            Self::Pmem,
        ];
        let found = known.into_iter().find(|kind| kind.id() == number);
        found.unwrap_or(Self::Other(number))
    }
}

/// How a device tells the driver something that is not about one queue.
pub trait Signals: Send + Sync {
    /// The configuration space has changed: raise the configuration interrupt.
    fn config_changed(&self);
    /// The queues can't be served, because the driver broke the rules or set them up where they can't be: `DEVICE_NEEDS_RESET` and the
    /// configuration interrupt. The worker that calls it serves nothing any more until it is stopped.
    fn needs_reset(&self, why: &dyn fmt::Display);
}

/// The signals of a device's last activation; gone with its workers. For a device that changes by itself.
#[derive(Default)]
pub struct LastSignals(Mutex<Option<Weak<dyn Signals>>>);

impl LastSignals {
    fn held(&self) -> MutexGuard<'_, Option<Weak<dyn Signals>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another activation's.
    pub fn set(&self, signals: &Arc<dyn Signals>) {
        *self.held() = Some(Arc::downgrade(signals));
    }

    /// [`Signals::config_changed`], if a driver is there to hear of it. One that comes reads the configuration anyway.
    pub fn config_changed(&self) {
        let signals = self.held().as_ref().and_then(Weak::upgrade);
        if let Some(signals) = signals {
            signals.config_changed();
        }
    }
}

impl fmt::Debug for LastSignals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LastSignals")
    }
}

/// What a device gets when the driver has set `DRIVER_OK`.
pub struct Activation {
    /// Guest memory. Take `memory.memory()` for one batch of work, never for longer.
    pub memory: GuestView,
    /// Feature bits that device and driver agreed on.
    pub features: u64,
    /// By queue index; `None` for one that the driver did not enable.
    pub queues: Vec<Option<Queue>>,
    /// Configuration interrupt and device error.
    pub signals: Arc<dyn Signals>,
}

impl Activation {
    /// Whether the driver took this feature bit.
    pub fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// A device can't serve its queues.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device can't do without.
    #[error("the driver did not enable queue {index}")]
    MissingQueue {
        /// Its index.
        index: u16,
    },
    /// Something of the host.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A virtio device. It lives as long as the slot it sits in; its workers come and go with the driver.
///
/// Called from vCPU threads (configuration space) and, serialised by the transport, from whoever activates it. It
/// guards its own state. Nothing here blocks, but for [`Device::config_write`] of a device whose configuration space is another
/// process's, and that for a bounded time.
pub trait Device: Send + Sync {
    /// What it is.
    fn kind(&self) -> Kind;

    /// Offered feature bits of the device type. The transport adds `VERSION_1`, `RING_EVENT_IDX` and
    /// `RING_INDIRECT_DESC`.
    fn features(&self) -> u64;

    /// Which of the transport's own feature bits the device's queues can be served with: all, where it is served here.
    fn ring_features(&self) -> u64 {
        u64::MAX
    }

    /// Largest size of each queue, a power of two up to 32768. Its length is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads the device's configuration space, little-endian. Bytes that do not exist are left as they come, zero.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// Writes it. Most devices have nothing to write.
    fn config_write(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: the workers that serve the queues, each gets a thread of its own. Called again after a
    /// reset, when all workers of the time before are gone.
    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError>;

    /// Whether it can go on in its slot, without anything of the host, until the guest lets go of it: [`Device::sever`].
    /// Others stay whole until then.
    fn outlives_host(&self) -> bool {
        false
    }

    /// What it is made of is taken back by the host: nothing of it is touched any more, and requests end in errors.
    fn sever(&self) {}

    /// Gives a disk so many bytes, from now on.
    fn resize(&self, bytes: u64) -> Result<(), DiskResizeError> {
        let _ = bytes;
        Err(DiskResizeError::NotHere)
    }

    /// Counters for `vm.counters`, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Copies the part of `space` that begins at `offset` over `data`: the whole of [`Device::config_read`] for a device
/// whose configuration is a byte array.
pub fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..))
        .unwrap_or_default();
    for (to, from) in data.iter_mut().zip(from) {
        *to = *from;
    }
}
