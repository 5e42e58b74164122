//! A PCI function that VFIO has lent to this process: its device file.
//!
//! # Invariants
//! - The device file is closed before its group leaves the container, and that before the container is closed: the fields
//!   are in this order, and [`VfioFunction::close`] walks it.
//! - What the device offers is read once, when it is attached. Nothing re-reads the host when it is let go.
//!
//! # Not here
//! Nothing of what the guest sees. Bus mastering is off until the guest switches it on: vfio-pci sees to that.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use iommufd_ioctls::IommufdIoas;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_NORESIZE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_DEVID_NOT_OWNED,
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ROM_REGION_INDEX,
};

use crate::address::PciAddress;
use crate::attach::{AttachError, Claim, DetachError};
use crate::caps::{self, HotReset};
use crate::function::{HostFunction, IrqInfo, IrqKind, Region, RegionIndex, RegionMapping};
use crate::locate::PciFunction;
use crate::pages::{Pages, Part};
use crate::sys::{self, IrqSet};
use crate::type1::Group;

/// Regions of a PCI function that are looked at; VGA and what vendors add come behind.
const REGIONS: u32 = VFIO_PCI_CONFIG_REGION_INDEX + 1;
const IRQS: usize = VFIO_PCI_NUM_IRQS as usize;
const PAGE: u64 = 4096;
/// The command register of configuration space.
const COMMAND: u64 = 4;
const BUS_MASTER: u16 = 1 << 2;

/// Who keeps the function's address space.
pub(crate) enum Owner {
    Group(Arc<Group>),
    Ioas(Arc<IommufdIoas>),
    #[cfg(test)]
    Nobody,
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Group(group) => write!(f, "group {}", group.id()),
            Self::Ioas(ioas) => write!(f, "IOAS {}", ioas.id()),
            #[cfg(test)]
            Self::Nobody => f.write_str("nobody"),
        }
    }
}

/// A function in this process's hands.
///
/// Given back by [`VfioFunction::close`]; dropping it does the same and keeps the errors for itself. Mappings of its
/// registers hold it, so they go first.
#[derive(Debug)]
pub struct VfioFunction {
    device: File,
    owner: Owner,
    claim: Claim,
    function: PciFunction,
    /// By VFIO's number, with their place in the device file.
    regions: Vec<Option<(Region, u64)>>,
    irqs: [IrqInfo; IRQS],
    resets_alone: bool,
    /// Kinds of interrupts that are enabled, a bit each. Held across the system call.
    enabled: Mutex<u8>,
}

impl VfioFunction {
    /// Reads what an attached device offers.
    pub(crate) fn new(
        device: File,
        owner: Owner,
        claim: Claim,
        function: PciFunction,
    ) -> Result<Self, AttachError> {
        // On an error these go in reverse: the device file is closed before its group leaves.
        let claim = claim;
        let owner = owner;
        let device = device;
        let address = function.address;
        let step = |what| {
            move |source| AttachError::Step {
                address,
                what,
                source,
            }
        };
        let info = sys::device_info(&device).map_err(step("read what VFIO offers of"))?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(AttachError::NotPci { address });
        }
        let regions = (0..REGIONS.min(info.num_regions))
            .map(|index| region(&device, index).map_err(step("read the regions of")))
            .collect::<Result<Vec<_>, _>>()?;
        let mut irqs = [NO_IRQ; IRQS];
        for (index, irq) in (0..info.num_irqs).zip(&mut irqs) {
            *irq = irq_info(&device, index).map_err(step("read the interrupts of"))?;
        }
        Ok(Self {
            device,
            owner,
            claim,
            function,
            regions,
            irqs,
            resets_alone: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            enabled: Mutex::new(0),
        })
    }

    /// What sysfs said of it when it was attached.
    pub fn facts(&self) -> &PciFunction {
        &self.function
    }

    /// Whether the function was reset when it was attached: the kernel resets what it gives out first, and says of a function
    /// that it can be reset only if that went well (`drivers/vfio/pci/vfio_pci_core.c`, `vfio_pci_core_enable`). Nobody but
    /// its attacher can have used it since.
    pub fn was_reset(&self) -> bool {
        self.resets_alone
    }

    /// Where it is.
    pub fn address(&self) -> PciAddress {
        self.function.address
    }

    /// The file that KVM is told of (`KVM_DEV_VFIO_FILE_ADD`): the group's (type1) or the device's (iommufd). Functions of
    /// one group have one. KVM keeps it open until it is told to forget it, which comes before [`VfioFunction::close`].
    pub fn kvm_file(&self) -> BorrowedFd<'_> {
        match &self.owner {
            Owner::Group(group) => group.file().as_fd(),
            Owner::Ioas(_) => self.device.as_fd(),
            #[cfg(test)]
            Owner::Nobody => self.device.as_fd(),
        }
    }

    /// Switches bus mastering off, so that the function starts no transfer any more: the quickest way to keep it from
    /// memory, before anything is unmapped. Says whether it was on. Nothing here keeps the guest from switching it on
    /// again.
    pub fn stop_transfers(&self) -> io::Result<bool> {
        let mut command = [0; 2];
        self.read(RegionIndex::Config, COMMAND, &mut command)?;
        let stopped = u16::from_le_bytes(command) & !BUS_MASTER;
        let was_on = stopped.to_le_bytes() != command;
        if was_on {
            self.write(RegionIndex::Config, COMMAND, &stopped.to_le_bytes())?;
            // What the function has sent before has arrived when this is answered.
            self.read(RegionIndex::Config, COMMAND, &mut command)?;
        }
        Ok(was_on)
    }

    /// Gives the function back: the kernel resets it and it reaches no memory any more. Its group leaves with the last of
    /// its functions, and with the last group everything that was mapped with type1.
    pub fn close(self) -> Result<(), DetachError> {
        let Self {
            device,
            owner,
            claim,
            function,
            ..
        } = self;
        let result = match owner {
            Owner::Group(group) => {
                let id = group.id();
                Group::close_device(group, device).map_err(|source| DetachError {
                    address: function.address,
                    group: id,
                    source,
                })
            }
            Owner::Ioas(ioas) => {
                // Closing the file detaches as well; a device that is gone refuses to be detached.
                if let Err(error) = sys::detach_ioas(&device) {
                    tracing::debug!(address = %function.address, %error, "closed without a detach");
                }
                drop(device);
                drop(ioas);
                Ok(())
            }
            #[cfg(test)]
            Owner::Nobody => Ok(()),
        };
        drop(claim);
        result
    }

    fn place(&self, index: RegionIndex) -> Option<&(Region, u64)> {
        let index = match index {
            RegionIndex::Bar(bar @ 0..=5) => u32::from(bar),
            RegionIndex::Bar(_) => return None,
            RegionIndex::Rom => VFIO_PCI_ROM_REGION_INDEX,
            RegionIndex::Config => VFIO_PCI_CONFIG_REGION_INDEX,
        };
        self.regions.get(index as usize)?.as_ref()
    }

    /// A region, and where `len` bytes from `offset` on are in the device file.
    fn span(&self, index: RegionIndex, offset: u64, len: u64) -> io::Result<(&Region, u64)> {
        let address = self.address();
        let (region, start) = self
            .place(index)
            .ok_or_else(|| invalid(format!("{address} has no region {index:?}")))?;
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= region.size);
        let place = start.checked_add(offset).filter(|_| inside);
        let place = place.ok_or_else(|| {
            invalid(format!(
                "{len:#x} bytes at {offset:#x} are not in region {index:?} of {address}, which has {:#x}",
                region.size
            ))
        })?;
        Ok((region, place))
    }

    fn set(&self, kind: IrqKind, set: IrqSet<'_>, change: Option<bool>) -> io::Result<()> {
        let mut enabled = self.enabled.lock().unwrap_or_else(PoisonError::into_inner);
        let bit = 1 << irq_index(kind);
        if change == Some(false) && *enabled & bit == 0 {
            return Ok(());
        }
        sys::set_irqs(&self.device, set)?;
        match change {
            Some(true) => *enabled |= bit,
            Some(false) => *enabled &= !bit,
            None => {}
        }
        Ok(())
    }

    /// What a hot reset would reach, and the first of it that is not this process's.
    fn hot_reset_reach(&self) -> io::Result<(HotReset, Option<PciAddress>)> {
        let bytes = sys::hot_reset_info(&self.device)?;
        let reach = caps::hot_reset(&bytes).ok_or_else(|| {
            io::Error::other("VFIO's list of what a hot reset reaches is cut off")
        })?;
        let foreign = match &self.owner {
            Owner::Group(group) => reach.foreign(|id| group.neighbour(id).is_some()),
            Owner::Ioas(_) => reach.foreign(|_| false),
            #[cfg(test)]
            Owner::Nobody => reach.foreign(|_| false),
        };
        Ok((reach, foreign))
    }

    fn hot_reset(&self) -> io::Result<()> {
        let address = self.address();
        let (reach, foreign) = self.hot_reset_reach()?;
        if let Some(other) = foreign {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "{address} can only be reset together with its bus, where {other} is not this guest's: give the guest \
                     {other} too, or a function that can be reset alone (`cat /sys/bus/pci/devices/{address}/reset_method`)"
                ),
            ));
        }
        match &self.owner {
            Owner::Group(group) => {
                let mut ids: Vec<u32> = reach.devices.iter().map(|device| device.owner).collect();
                ids.sort_unstable();
                ids.dedup();
                let groups: Vec<_> = ids.iter().filter_map(|id| group.neighbour(*id)).collect();
                let files: Vec<_> = groups.iter().map(|group| group.file().as_fd()).collect();
                sys::hot_reset(&self.device, &files)
            }
            Owner::Ioas(_) => sys::hot_reset(&self.device, &[]),
            #[cfg(test)]
            Owner::Nobody => sys::hot_reset(&self.device, &[]),
        }
    }
}

impl HotReset {
    /// The first device that is not ours; `owns` tells of groups.
    fn foreign(&self, owns: impl Fn(u32) -> bool) -> Option<PciAddress> {
        let not_owned = VFIO_PCI_DEVID_NOT_OWNED.cast_unsigned();
        let device = if self.by_device {
            if self.all_owned {
                return None;
            }
            // When the kernel names none, it is one that it does not show: the function itself stands for it.
            let named = self.devices.iter().find(|device| device.owner == not_owned);
            named.or(self.devices.first())
        } else {
            self.devices.iter().find(|device| !owns(device.owner))
        }?;
        Some(PciAddress::of_devfn(
            device.domain,
            device.bus,
            device.devfn,
        ))
    }
}

impl AsFd for VfioFunction {
    /// The device file.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl HostFunction for VfioFunction {
    fn region(&self, index: RegionIndex) -> Option<&Region> {
        self.place(index).map(|(region, _)| region)
    }

    fn read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let result = self
            .span(index, offset, data.len() as u64)
            .and_then(|(_, place)| self.device.read_exact_at(data, place));
        if result.is_err() {
            data.fill(0xff);
        }
        result
    }

    fn write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        let (_, place) = self.span(index, offset, data.len() as u64)?;
        self.device.write_all_at(data, place)
    }

    fn map(&self, index: RegionIndex, part: Range<u64>) -> io::Result<Box<dyn RegionMapping>> {
        let len = part.end.saturating_sub(part.start);
        let (region, place) = self.span(index, part.start, len)?;
        let pages = part.start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len != 0;
        let inside = |area: &Range<u64>| area.start <= part.start && part.end <= area.end;
        if !pages || !region.mappable.iter().any(inside) {
            return Err(invalid(format!(
                "{part:#x?} of region {index:?} of {} can't be mapped: {:#x?} can",
                self.address(),
                region.mappable
            )));
        }
        let part = Part {
            offset: place,
            len,
            readable: region.readable,
            writable: region.writable,
        };
        Ok(Box::new(Pages::map(&self.device, part)?))
    }

    fn irq(&self, kind: IrqKind) -> IrqInfo {
        self.irqs[irq_index(kind) as usize]
    }

    fn set_irqs(
        &self,
        kind: IrqKind,
        start: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        let count = u64::from(self.irq(kind).count);
        let end = u64::from(start).saturating_add(events.len() as u64);
        if events.is_empty() || end > count {
            return Err(invalid(format!(
                "vectors {start}..{end} of {kind:?} of {}: it has {count}",
                self.address()
            )));
        }
        let set = IrqSet {
            flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
            index: irq_index(kind),
            start,
            events,
        };
        self.set(kind, set, Some(true))
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        let set = IrqSet {
            flags: VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
            index: irq_index(kind),
            start: 0,
            events: &[],
        };
        self.set(kind, set, Some(false))
    }

    fn unmask_intx_by(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        let set = IrqSet {
            flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK,
            index: irq_index(IrqKind::Intx),
            start: 0,
            events: &[Some(event)],
        };
        self.set(IrqKind::Intx, set, None)
    }

    fn reset(&self) -> io::Result<()> {
        if self.resets_alone {
            sys::reset(&self.device)
        } else {
            self.hot_reset()
        }
    }

    fn can_reset(&self) -> bool {
        self.resets_alone || matches!(self.hot_reset_reach(), Ok((_, None)))
    }
}

const NO_IRQ: IrqInfo = IrqInfo {
    count: 0,
    resizable: false,
};

fn irq_index(kind: IrqKind) -> u32 {
    match kind {
        IrqKind::Intx => VFIO_PCI_INTX_IRQ_INDEX,
        IrqKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        IrqKind::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
        IrqKind::Error => VFIO_PCI_ERR_IRQ_INDEX,
        IrqKind::Request => VFIO_PCI_REQ_IRQ_INDEX,
    }
}

/// `None`: the function has no such region, which VFIO says with a size of zero or `EINVAL`.
fn region(device: &File, index: u32) -> io::Result<Option<(Region, u64)>> {
    match sys::region_info(device, index) {
        Ok(bytes) => Ok(caps::region(&bytes)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

fn irq_info(device: &File, index: u32) -> io::Result<IrqInfo> {
    match sys::irq_info(device, index) {
        Ok(info) => Ok(IrqInfo {
            count: info.count,
            resizable: info.flags & VFIO_IRQ_INFO_NORESIZE == 0,
        }),
        // Errors are reported by PCI Express functions only.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(NO_IRQ),
        Err(error) => Err(error),
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::Claims;
    use crate::caps::Dependent;
    use crate::testing::{FakeFunction, FakeHost};

    const BAR: u64 = 0x1_0000;
    const BAR_SIZE: u64 = 0x4000;
    const CONFIG: u64 = 0x2_0000;

    /// A file that plays the device file: BAR 0 and configuration space, three MSI-X vectors.
    fn function() -> (VfioFunction, File) {
        let fake = FakeHost::new();
        fake.add(&FakeFunction::vfio("0000:01:00.0", 5));
        let function = fake.host().locate(&fake.path("0000:01:00.0")).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(CONFIG + 256).unwrap();
        let region = |size, mappable: &[Range<u64>]| Region {
            size,
            readable: true,
            writable: true,
            mappable: mappable.to_vec(),
            msix_mappable: false,
        };
        let mut regions: Vec<_> = (0..REGIONS).map(|_| None).collect();
        regions[0] = Some((region(BAR_SIZE, &[0..0x1000, 0x2000..0x4000]), BAR));
        regions[7] = Some((region(256, &[]), CONFIG));
        let mut irqs = [NO_IRQ; IRQS];
        irqs[2].count = 3;
        let vfio = VfioFunction {
            device: file.try_clone().unwrap(),
            owner: Owner::Nobody,
            claim: Claims::default().claim(function.address).unwrap(),
            function,
            regions,
            irqs,
            resets_alone: false,
            enabled: Mutex::new(0),
        };
        (vfio, file)
    }

    fn is_invalid(result: io::Result<()>) -> bool {
        result.is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput)
    }

    #[test]
    fn registers_are_where_the_region_is() {
        let (vfio, file) = function();
        vfio.write(RegionIndex::Bar(0), 0x10, &[1, 2, 3, 4])
            .unwrap();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, BAR + 0x10).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        file.write_all_at(&[9, 8], CONFIG).unwrap();
        let mut id = [0; 2];
        vfio.read(RegionIndex::Config, 0, &mut id).unwrap();
        assert_eq!(id, [9, 8]);
        assert_eq!(vfio.region(RegionIndex::Bar(0)).unwrap().size, BAR_SIZE);
    }

    #[test]
    fn what_can_not_be_read_is_all_ones() {
        let (vfio, file) = function();
        let read = |index, offset| {
            let mut bytes = [0; 4];
            let result = vfio.read(index, offset, &mut bytes);
            assert_eq!(bytes, [0xff; 4]);
            result
        };
        assert!(is_invalid(read(RegionIndex::Bar(0), BAR_SIZE - 2)));
        assert!(is_invalid(read(RegionIndex::Bar(0), u64::MAX)));
        assert!(is_invalid(read(RegionIndex::Bar(1), 0)));
        assert!(is_invalid(read(RegionIndex::Bar(6), 0)));
        assert!(is_invalid(read(RegionIndex::Rom, 0)));
        assert!(is_invalid(vfio.write(RegionIndex::Config, 256, &[0])));
        // The device is gone.
        file.set_len(0).unwrap();
        read(RegionIndex::Bar(0), 0).unwrap_err();
    }

    #[test]
    fn whole_pages_that_are_mappable_are_mapped() {
        let (vfio, file) = function();
        let map = |part| vfio.map(RegionIndex::Bar(0), part);
        let mapping = map(0x2000..0x4000).unwrap();
        assert_eq!(mapping.size(), 0x2000);
        drop(file);
        for bad in [
            0x1000..0x2000,
            0..0x2000,
            0..0x800,
            0x2800..0x3800,
            0..0,
            0x4000..0x5000,
        ] {
            assert!(is_invalid(map(bad).map(drop)));
        }
        let config = vfio.map(RegionIndex::Config, 0..0x1000);
        assert!(is_invalid(config.map(drop)));
    }

    #[test]
    fn vectors_are_within_what_the_function_has() {
        let (vfio, file) = function();
        let event = Some(file.as_fd());
        let set = |kind, start, count| vfio.set_irqs(kind, start, &vec![event; count]);
        assert!(is_invalid(set(IrqKind::Msix, 2, 2)));
        assert!(is_invalid(set(IrqKind::Msix, u32::MAX, 2)));
        assert!(is_invalid(set(IrqKind::Msix, 0, 0)));
        assert!(is_invalid(set(IrqKind::Msi, 0, 1)));
        // The file that plays the device takes no requests; so nothing was enabled.
        let error = set(IrqKind::Msix, 0, 3).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        vfio.disable_irqs(IrqKind::Msix).unwrap();
        *vfio.enabled.lock().unwrap() = 1 << 2;
        vfio.disable_irqs(IrqKind::Msix).unwrap_err();
        vfio.disable_irqs(IrqKind::Request).unwrap();
    }

    #[test]
    fn stopping_leaves_the_rest_of_the_command_register() {
        let (vfio, file) = function();
        file.write_all_at(&[0x06, 0x04], CONFIG + COMMAND).unwrap();
        assert!(vfio.stop_transfers().unwrap());
        let mut command = [0; 2];
        file.read_exact_at(&mut command, CONFIG + COMMAND).unwrap();
        assert_eq!(command, [0x02, 0x04]);
        assert!(!vfio.stop_transfers().unwrap());
        file.set_len(0).unwrap();
        vfio.stop_transfers().unwrap_err();
    }

    #[test]
    fn a_function_that_can_not_be_reset_says_so() {
        let (vfio, _file) = function();
        assert!(!vfio.can_reset());
        vfio.reset().unwrap_err();
        vfio.close().unwrap();
    }

    #[test]
    fn a_hot_reset_is_for_those_who_own_all_of_it() {
        let device = |owner, devfn| Dependent {
            domain: 0,
            bus: 1,
            devfn,
            owner,
        };
        let groups = HotReset {
            by_device: false,
            all_owned: false,
            devices: vec![device(5, 0), device(6, 1)],
        };
        let name = |foreign: Option<PciAddress>| foreign.map(|address| address.to_string());
        assert_eq!(
            name(groups.foreign(|id| id == 5)).as_deref(),
            Some("0000:01:00.1")
        );
        assert_eq!(groups.foreign(|_| true), None);

        let not_owned = VFIO_PCI_DEVID_NOT_OWNED.cast_unsigned();
        let mut devices = HotReset {
            by_device: true,
            all_owned: false,
            devices: vec![device(7, 0), device(0, 1), device(not_owned, 2)],
        };
        assert_eq!(
            name(devices.foreign(|_| true)).as_deref(),
            Some("0000:01:00.2")
        );
        devices.all_owned = true;
        assert_eq!(devices.foreign(|_| false), None);
    }
}
