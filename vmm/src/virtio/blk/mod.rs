//! A disk (virtio 1.2, section 5.2): a raw image file or a block device.
//!
//! ```text
//!   Device: Disk ──▶ a Worker for each queue ──▶ Chain ─▶ Job ─▶ Engine (io_uring, or system calls at once)
//!                     all of them on one Image
//! ```
//! Invariants:
//! - A flush that is answered "ok" came after a sync of the host that began after the answers to all earlier writes.
//!   With the write cache off, or a driver that knows of none, each write is on storage before its answer.
//! - A request that can't be done right is answered with an error; it is never done in part and called done.
//! - Guest memory is reached by the kernel only, through a snapshot that each request holds until the host is done with
//!   it; it is never pinned. What the host has lost of it is an error of that request.
//! - What a guest can have allocated for it is bounded: a job for each descriptor, and 256 KiB for a request whose
//!   memory direct I/O can't take.

mod counters;
mod engine;
mod error;
mod image;
mod job;
mod pieces;
mod request;
mod space;
#[allow(
    unsafe_code,
    reason = "wraps the transfers between image and guest memory"
)]
mod syscalls;
#[allow(unsafe_code, reason = "gives guest memory to io_uring")]
mod uring;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use daxhund_virtio_blk::SECTOR;
pub use error::{DiskOpenError, DiskResizeError};
use virtio_bindings::virtio_blk as spec;
pub use worker::Worker;

use self::counters::Counters;
use self::image::{Image, Storage};
use self::uring::AtOnce;
use self::worker::Caching;
use super::device::{LastSignals, read_space};
use super::worker as workers;
use super::{ActivateError, Activation, Device, Kind};

/// In one request: 2 GiB are given back, 32 MiB are zeroed.
const MOST_DISCARD_SECTORS: u32 = 4 << 20;
const MOST_ZEROES_SECTORS: u32 = 64 << 10;

/// How the host is asked to move data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// `io_uring`, or system calls where the kernel does not let it be; what needs no waiting is done at once.
    #[default]
    Auto,
    /// `io_uring` for everything.
    IoUring,
    /// System calls that wait, on the thread of the queue.
    Sync,
}

/// One `--disk`, checked for shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// The device's name.
    pub id: String,
    /// A raw image file or a block device.
    pub path: PathBuf,
    /// The guest can't write.
    pub readonly: bool,
    /// Around the host's page cache.
    pub direct: bool,
    /// Blocks that the guest has no use for are given back to the file system or device.
    pub sparse: bool,
    /// How many queues, each with a thread.
    pub num_queues: u16,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// What the guest sees as serial number; made of the image's identity when absent.
    pub serial: Option<String>,
    /// How data is moved.
    pub engine: EngineChoice,
}

impl DiskSpec {
    /// With the defaults of the command line.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            readonly: false,
            direct: false,
            sparse: true,
            num_queues: 1,
            queue_size: 128,
            serial: None,
            engine: EngineChoice::Auto,
        }
    }

    fn check_queues(&self) -> Result<(), DiskOpenError> {
        let refused = |what, value, range| {
            Err(DiskOpenError::Queues {
                id: self.id.clone(),
                what,
                value,
                range,
            })
        };
        if !(1..=MOST_QUEUES).contains(&self.num_queues) {
            return refused("num_queues", self.num_queues, "1 to 256");
        }
        if !self.queue_size.is_power_of_two() || !(4..=32768).contains(&self.queue_size) {
            let range = "a power of two from 4 to 32768";
            return refused("queue_size", self.queue_size, range);
        }
        Ok(())
    }
}

const MOST_QUEUES: u16 = 256;

/// A disk.
#[derive(Debug)]
pub struct Disk {
    spec: DiskSpec,
    image: Arc<Image>,
    space: [u8; space::LEN],
    /// The write cache, as the driver last set it; on until it does.
    writeback: Arc<AtomicBool>,
    counters: Arc<Counters>,
    signals: LastSignals,
}

impl Disk {
    /// Opens and locks the image, and sees that it can be what is asked for.
    pub fn open(spec: &DiskSpec) -> Result<Self, DiskOpenError> {
        spec.check_queues()?;
        let image = Image::open(spec)?;
        Ok(Self {
            space: space::build(&image, spec),
            spec: spec.clone(),
            image: Arc::new(image),
            writeback: Arc::new(AtomicBool::new(true)),
            counters: Arc::default(),
            signals: LastSignals::default(),
        })
    }

    /// Bytes the guest has.
    pub fn size(&self) -> u64 {
        self.image.len()
    }

    /// The workers, for a caller that runs them itself.
    pub fn workers(&self, activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let flush = activation.has(spec::VIRTIO_BLK_F_FLUSH);
        let switch = activation.has(spec::VIRTIO_BLK_F_CONFIG_WCE);
        let Activation {
            memory,
            queues,
            signals,
            ..
        } = activation;
        self.signals.set(&signals);
        let mut workers = Vec::new();
        for queue in queues.into_iter().flatten() {
            workers.push(Worker::new(worker::Parts {
                name: thread_name(&self.spec.id, queue.index()),
                memory: memory.clone(),
                engine: self.engine(queue.size())?,
                queue,
                image: Arc::clone(&self.image),
                readonly: self.spec.readonly,
                caching: Caching::agreed(flush, switch, &self.writeback),
                counters: Arc::clone(&self.counters),
                signals: Arc::clone(&signals),
            })?);
        }
        if workers.is_empty() {
            return Err(ActivateError::MissingQueue { index: 0 });
        }
        Ok(workers)
    }

    fn engine(&self, queue_size: u16) -> Result<Box<dyn engine::Engine>, ActivateError> {
        let (room, file) = (usize::from(queue_size), || Arc::clone(self.image.file()));
        let at_once = match self.spec.engine {
            EngineChoice::Sync => return Ok(Box::new(engine::Sync::new(file(), room))),
            EngineChoice::IoUring => AtOnce::Never,
            EngineChoice::Auto if self.image.storage() == Storage::Memory => AtOnce::Always,
            // Direct I/O always waits for the storage.
            EngineChoice::Auto if self.spec.direct => AtOnce::Never,
            EngineChoice::Auto => AtOnce::IfReady,
        };
        match uring::Uring::new(file(), room, at_once) {
            Ok(uring) => Ok(Box::new(uring)),
            Err(error) if self.spec.engine == EngineChoice::Auto => {
                tracing::info!(
                    disk = self.spec.id, %error,
                    "the host has no io_uring for this process; its disks wait for each request"
                );
                Ok(Box::new(engine::Sync::new(file(), room)))
            }
            Err(source) => Err(ActivateError::Host {
                what: "an io_uring can't be set up",
                source,
            }),
        }
    }
}

impl Device for Disk {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            spec::VIRTIO_BLK_F_SEG_MAX,
            spec::VIRTIO_BLK_F_BLK_SIZE,
            spec::VIRTIO_BLK_F_TOPOLOGY,
            spec::VIRTIO_BLK_F_FLUSH,
            spec::VIRTIO_BLK_F_CONFIG_WCE,
        ];
        if self.spec.num_queues > 1 {
            bits.push(spec::VIRTIO_BLK_F_MQ);
        }
        if self.spec.readonly {
            bits.push(spec::VIRTIO_BLK_F_RO);
        } else {
            bits.push(spec::VIRTIO_BLK_F_WRITE_ZEROES);
        }
        if self.image.can_discard() {
            bits.push(spec::VIRTIO_BLK_F_DISCARD);
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.spec.queue_size; usize::from(self.spec.num_queues)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut space = self.space;
        let sectors = self.image.len() / u64::from(SECTOR);
        space[space::CAPACITY].copy_from_slice(&sectors.to_le_bytes());
        space[space::WRITEBACK] = u8::from(self.writeback.load(Ordering::SeqCst));
        read_space(&space, offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        if let (Ok(space::WRITEBACK), [on, ..]) = (usize::try_from(offset), data) {
            self.writeback.store(*on != 0, Ordering::SeqCst);
        }
    }

    fn activate(
        &self,
        activation: Activation,
    ) -> Result<Vec<Box<dyn workers::Worker>>, ActivateError> {
        let workers = self.workers(activation)?;
        Ok(workers
            .into_iter()
            .map(|worker| Box::new(worker) as Box<dyn workers::Worker>)
            .collect())
    }

    fn resize(&self, bytes: u64) -> Result<(), DiskResizeError> {
        self.image.resize(bytes, self.spec.readonly)?;
        self.signals.config_changed();
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.all()
    }
}

/// `_ID_qN`, with as much of the id as fits a thread's name; an id with an underscore in front is not given another.
fn thread_name(id: &str, queue: u16) -> String {
    const LONGEST: usize = 15;
    let tail = format!("_q{queue}");
    let mut name = format!("_{}", id.strip_prefix('_').unwrap_or(id));
    name.truncate(name.floor_char_boundary(LONGEST - tail.len()));
    name + &tail
}

#[cfg(test)]
mod tests;
