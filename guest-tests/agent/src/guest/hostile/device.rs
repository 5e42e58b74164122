//! A virtio device on a PCI function, and its queues in memory that the guest's kernel leaves alone.
//!
//! ```text
//! memory + n * QUEUE_SPACE:  0 descriptors | 0x1000 driver area | 0x2000 device area | 0x4000 buffers
//! ```

use std::time::Duration;

use super::function::{Function, Place, halves};
use crate::memory::Physical;
use crate::wait;

/// Entries of every queue.
pub(super) const QUEUE_SIZE: u16 = 8;
/// Queues that are used of a device that has more.
const MOST_QUEUES: u16 = 4;
const QUEUE_SPACE: u64 = 0x1_0000;
const DRIVER_AREA: u64 = 0x1000;
const DEVICE_AREA: u64 = 0x2000;
pub(super) const BUFFERS: u64 = 0x4000;
pub(super) const BUFFER_BYTES: u32 = 0x4000;

pub(super) const FLAG_NEXT: u16 = 1;
pub(super) const FLAG_WRITE: u16 = 2;

/// Offsets in the common structure.
const FEATURE_SELECT: usize = 8;
const FEATURES: usize = 12;
const CONFIG_VECTOR: usize = 16;
const QUEUE_COUNT: usize = 18;
const STATUS: usize = 20;
const SELECT: usize = 22;
const SIZE: usize = 24;
const VECTOR: usize = 26;
const ENABLE: usize = 28;
const NOTIFY_OFFSET: usize = 30;
const DESCRIPTORS: usize = 32;
const DRIVER: usize = 40;
const DEVICE: usize = 48;

const ACKNOWLEDGE: u8 = 1;
const DRIVER_IS_THERE: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;

/// A device may take its time, but not for ever: its queues are served by a thread that shares one emulated processor.
const RESET_DEADLINE: Duration = Duration::from_secs(10);
/// How long a device may look at what it was given. It is no failure when nothing comes of it.
const REACTION: Duration = Duration::from_millis(100);

/// A descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

/// Where a queue's parts are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Areas {
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

pub(super) struct Device {
    pub(super) function: Function,
    memory: Physical,
    start: u64,
}

impl Device {
    pub(super) fn take(address: &str, start: u64) -> Result<Self, String> {
        let bytes = QUEUE_SPACE * u64::from(MOST_QUEUES);
        Ok(Self {
            function: Function::take(address)?,
            memory: Physical::map(start, bytes, true)?,
            start,
        })
    }

    /// Where a queue belongs.
    pub(super) fn areas(&self, queue: u16) -> Areas {
        let base = self.start + u64::from(queue) * QUEUE_SPACE;
        Areas {
            descriptors: base,
            driver: base + DRIVER_AREA,
            device: base + DEVICE_AREA,
        }
    }

    /// Address of a queue's buffers.
    pub(super) fn buffers(&self, queue: u16) -> u64 {
        self.areas(queue).descriptors + BUFFERS
    }

    pub(super) fn status(&mut self) -> Result<u8, String> {
        let Place { bar, offset } = self.function.common;
        Ok(self.function.registers(bar)?.read8(offset + STATUS))
    }

    fn set_status(&mut self, status: u8) -> Result<(), String> {
        let Place { bar, offset } = self.function.common;
        self.function
            .registers(bar)?
            .write8(offset + STATUS, status);
        Ok(())
    }

    /// Resets the device and waits until it says that it is.
    pub(super) fn reset(&mut self) -> Result<(), String> {
        self.set_status(0)?;
        let Place { bar, offset } = self.function.common;
        let registers = self.function.registers(bar)?;
        wait::until(RESET_DEADLINE, || {
            (registers.read8(offset + STATUS) == 0).then_some(())
        })
        .ok_or_else(|| "the device does not come out of its reset".to_owned())
    }

    /// Queues that there are, up to as many as there is memory for.
    pub(super) fn queues(&mut self) -> Result<u16, String> {
        let count = self.common16(QUEUE_COUNT)?;
        Ok(count.min(MOST_QUEUES))
    }

    /// Resets the device, agrees on nothing but virtio 1, and makes its queues; `areas` says where they are.
    pub(super) fn start(
        &mut self,
        size: u16,
        areas: impl Fn(&Self, u16) -> Areas,
    ) -> Result<(), String> {
        self.reset()?;
        for word in 0..self.memory.words().len() {
            self.memory.words().set(word, 0);
        }
        self.set_status(ACKNOWLEDGE)?;
        self.set_status(ACKNOWLEDGE | DRIVER_IS_THERE)?;
        for (page, features) in [(0, 0), (1, 1)] {
            self.set_common32(FEATURE_SELECT, page)?;
            self.set_common32(FEATURES, features)?;
        }
        let agreed = ACKNOWLEDGE | DRIVER_IS_THERE | FEATURES_OK;
        self.set_status(agreed)?;
        if self.status()? & FEATURES_OK == 0 {
            return Err("the device does not agree on virtio 1 alone".to_owned());
        }
        for queue in 0..self.queues()? {
            let areas = areas(self, queue);
            self.set_common16(SELECT, queue)?;
            self.set_common16(SIZE, size)?;
            for (offset, address) in [
                (DESCRIPTORS, areas.descriptors),
                (DRIVER, areas.driver),
                (DEVICE, areas.device),
            ] {
                let [low, high] = halves(address);
                self.set_common32(offset, low)?;
                self.set_common32(offset + 4, high)?;
            }
            self.set_common16(ENABLE, 1)?;
        }
        self.set_status(agreed | DRIVER_OK)
    }

    /// Has the device use vector 0 of MSI-X for everything.
    pub(super) fn use_first_vector(&mut self) -> Result<(), String> {
        self.set_common16(CONFIG_VECTOR, 0)?;
        for queue in 0..self.queues()? {
            self.set_common16(SELECT, queue)?;
            self.set_common16(VECTOR, 0)?;
        }
        Ok(())
    }

    /// Writes descriptors from the first on.
    pub(super) fn describe(&mut self, queue: u16, descriptors: &[Descriptor]) {
        let base = usize::from(queue) * words(QUEUE_SPACE);
        for (index, one) in descriptors.iter().enumerate() {
            let second =
                u64::from(one.length) | u64::from(one.flags) << 32 | u64::from(one.next) << 48;
            self.memory.words().set(base + 2 * index, one.address);
            self.memory.words().set(base + 2 * index + 1, second);
        }
    }

    /// Offers chains that start at these descriptors, as the first since the start; says that there are `index` of them.
    pub(super) fn offer(&mut self, queue: u16, heads: &[u16], index: u16) -> Result<(), String> {
        let base = usize::from(queue) * words(QUEUE_SPACE) + words(DRIVER_AREA);
        // Flags, index, then the ring: 16 bits each. The first word has the index and goes last.
        let mut ring: Vec<u16> = vec![0, index];
        ring.extend(heads);
        ring.resize(ring.len().next_multiple_of(4), 0);
        let packed: Vec<u64> = ring
            .chunks_exact(4)
            .map(|four| {
                let halves = four.iter().rev();
                halves.fold(0, |word, half| word << 16 | u64::from(*half))
            })
            .collect();
        for (at, word) in packed.iter().enumerate().rev() {
            self.memory.words().set(base + at, *word);
        }
        self.kick(queue)
    }

    /// Notifies the device of a queue.
    pub(super) fn kick(&mut self, queue: u16) -> Result<(), String> {
        self.set_common16(SELECT, queue)?;
        let slot = usize::from(self.common16(NOTIFY_OFFSET)?);
        let Place { bar, offset } = self.function.notify;
        let at = offset + slot * self.function.notify_multiplier;
        let registers = self.function.registers(bar)?;
        // What a device says about a queue that it does not have may lie outside.
        if registers.has::<u16>(at) {
            registers.write16(at, queue);
        }
        Ok(())
    }

    /// What the device has given back on a queue since its start.
    pub(super) fn used(&mut self, queue: u16) -> u64 {
        let base = usize::from(queue) * words(QUEUE_SPACE) + words(DEVICE_AREA);
        self.memory.words().get(base) >> 16 & 0xffff
    }

    /// Gives the device a while to react on a queue; then tells its status.
    pub(super) fn reaction(&mut self, queue: u16) -> Result<u8, String> {
        let reacted = wait::until(REACTION, || match self.status() {
            Ok(status) if status & NEEDS_RESET == 0 && self.used(queue) == 0 => None,
            outcome => Some(outcome),
        });
        reacted.unwrap_or_else(|| self.status())
    }

    pub(super) fn common16(&mut self, at: usize) -> Result<u16, String> {
        let Place { bar, offset } = self.function.common;
        Ok(self.function.registers(bar)?.read16(offset + at))
    }

    pub(super) fn set_common16(&mut self, at: usize, value: u16) -> Result<(), String> {
        let Place { bar, offset } = self.function.common;
        self.function.registers(bar)?.write16(offset + at, value);
        Ok(())
    }

    fn set_common32(&mut self, at: usize, value: u32) -> Result<(), String> {
        let Place { bar, offset } = self.function.common;
        self.function.registers(bar)?.write32(offset + at, value);
        Ok(())
    }
}

fn words(bytes: u64) -> usize {
    usize::try_from(bytes / 8).unwrap_or(usize::MAX)
}
