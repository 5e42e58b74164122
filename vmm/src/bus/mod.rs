//! Where the guest's port and memory-mapped accesses find their device.
//!
//! A bus is filled while the machine is built and only read while it runs, so a lookup takes no lock; each device
//! guards itself. Addresses that belong to nobody read as all ones and ignore writes, as on a PC.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use thiserror::Error;

/// A device's registers. `offset` counts from the start of the range it was given.
///
/// The guest chooses everything here: any offset within the range, any length from 1 to 8 (longer for a repeated
/// string instruction), at any time, from several vCPUs.
pub trait BusDevice: Send + Sync {
    /// Fills `data`, which starts as all ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The range is not free.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("bus range {start:#x}..{end:#x} overlaps {other_start:#x}..{other_end:#x}")]
pub struct Overlap {
    /// First address asked for.
    pub start: u64,
    /// End (exclusive) asked for.
    pub end: u64,
    /// The range that is taken.
    pub other_start: u64,
    /// Its end.
    pub other_end: u64,
}

/// One address space: ports or memory-mapped registers.
#[derive(Default, Clone)]
pub struct Bus {
    /// By first address; the length beside the device.
    devices: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Gives `size` addresses from `start` to a device.
    pub fn insert(
        &mut self,
        start: u64,
        size: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let end = start.saturating_add(size);
        let below = self.devices.range(..end).next_back();
        if let Some((&other_start, (other_size, _))) = below
            && other_start + other_size > start
        {
            return Err(Overlap {
                start,
                end,
                other_start,
                other_end: other_start + other_size,
            });
        }
        self.devices.insert(start, (size, device));
        Ok(())
    }

    /// An access of `data.len()` bytes that begins in no device, or runs over the end of one, reads all ones there.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// The counterpart of [`Bus::read`].
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn BusDevice)> {
        let (start, (size, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - start;
        (offset < *size).then_some((offset, device.as_ref()))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.devices.iter().map(|(start, (size, _))| (start, size)))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
            data[0] = 0x5a;
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    #[test]
    fn nobody_reads_as_all_ones() {
        let bus = Bus::default();
        let mut data = [0; 4];
        bus.read(0xcf8, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn a_device_sees_offsets_and_only_its_own_range() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x3f8, 8, device.clone()).unwrap();
        let mut data = [0; 1];
        bus.read(0x3ff, &mut data);
        assert_eq!(data, [0x5a]);
        bus.read(0x400, &mut data);
        assert_eq!(data, [0xff]);
        bus.write(0x3f7, &[1]);
        assert_eq!(*device.0.lock().unwrap(), [(7, 1)]);
    }

    #[test]
    fn ranges_do_not_overlap() {
        let mut bus = Bus::default();
        bus.insert(0x70, 2, Arc::new(Recorder::default())).unwrap();
        for (start, size) in [(0x70, 1), (0x71, 1), (0x6f, 2), (0x60, 0x20)] {
            let error = bus
                .insert(start, size, Arc::new(Recorder::default()))
                .unwrap_err();
            assert_eq!((error.other_start, error.other_end), (0x70, 0x72));
        }
        bus.insert(0x72, 1, Arc::new(Recorder::default())).unwrap();
        bus.insert(0x6f, 1, Arc::new(Recorder::default())).unwrap();
    }
}
