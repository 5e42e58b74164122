//! The ioctls of `linux/vfio.h` and `linux/iommufd.h` that no crate wraps as this one needs them.
//!
//! vfio-ioctls keeps its group functions private, sets whole kinds of interrupts only, and its device reads sysfs when
//! it is dropped; so group files and device files are handled here, with the structures of vfio-bindings. Structures
//! that end in an array travel as bytes ([`Record`]), and `caps` reads what comes back.
//!
//! Each function is one call: it decides nothing and keeps nothing.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_uint, c_ulong};
use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use iommufd_bindings::{
    IOMMUFD_CMD_IOAS_COPY, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_TYPE, iommu_ioas_copy,
    iommu_ioas_iova_ranges, iommu_iova_range,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, VFIO_TYPE1v2_IOMMU, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt, vfio_device_info, vfio_group_status,
    vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info, vfio_irq_info, vfio_irq_set,
    vfio_pci_dependent_device, vfio_pci_hot_reset, vfio_pci_hot_reset_info, vfio_region_info,
};
use vfio_ioctls::{VfioContainer, VfioError};
use vmm_sys_util::ioctl::{
    _IOC_NONE, ioctl_expr, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref,
    ioctl_with_val,
};

const fn vfio(offset: u32) -> c_ulong {
    ioctl_expr(_IOC_NONE, VFIO_TYPE as c_uint, VFIO_BASE + offset, 0)
}

const SET_IOMMU: c_ulong = vfio(2);
const GROUP_GET_STATUS: c_ulong = vfio(3);
const GROUP_SET_CONTAINER: c_ulong = vfio(4);
const GROUP_UNSET_CONTAINER: c_ulong = vfio(5);
const GROUP_GET_DEVICE_FD: c_ulong = vfio(6);
const DEVICE_GET_INFO: c_ulong = vfio(7);
const DEVICE_GET_REGION_INFO: c_ulong = vfio(8);
const DEVICE_GET_IRQ_INFO: c_ulong = vfio(9);
const DEVICE_SET_IRQS: c_ulong = vfio(10);
const DEVICE_RESET: c_ulong = vfio(11);
const DEVICE_GET_PCI_HOT_RESET_INFO: c_ulong = vfio(12);
const DEVICE_PCI_HOT_RESET: c_ulong = vfio(13);
const DEVICE_BIND_IOMMUFD: c_ulong = vfio(18);
const DEVICE_ATTACH_IOMMUFD_PT: c_ulong = vfio(19);
const DEVICE_DETACH_IOMMUFD_PT: c_ulong = vfio(20);
// The numbers of a container and of a device overlap.
const IOMMU_GET_INFO: c_ulong = vfio(12);
const IOMMU_UNMAP_DMA: c_ulong = vfio(14);

const IOAS_IOVA_RANGES: c_ulong = iommufd(IOMMUFD_CMD_IOAS_IOVA_RANGES);
const IOAS_COPY: c_ulong = iommufd(IOMMUFD_CMD_IOAS_COPY);

const fn iommufd(command: u32) -> c_ulong {
    ioctl_expr(_IOC_NONE, IOMMUFD_TYPE as c_uint, command, 0)
}

/// More than any answer of the kernel has; an answer that wants more is not believed.
const LARGEST_RECORD: usize = 1 << 20;
/// An answer can grow between two calls when devices come and go.
const TRIES: usize = 4;

/// A structure that ends in an array, as bytes that are aligned for it. It starts with its length, `argsz`.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    words: Vec<u64>,
    len: usize,
}

impl Record {
    /// Zeroes, with `argsz` filled in.
    pub(crate) fn new(len: usize) -> Self {
        let mut record = Self {
            words: vec![0; len.max(size_of::<u32>()).div_ceil(size_of::<u64>())],
            len,
        };
        record.set(0, u32::try_from(len).unwrap_or(u32::MAX));
        record
    }

    /// Writes a field of four bytes. Outside of the record nothing is written.
    pub(crate) fn set(&mut self, offset: usize, value: u32) {
        let (word, within) = (offset / size_of::<u64>(), offset % size_of::<u64>());
        if offset.saturating_add(size_of::<u32>()) > self.len || !offset.is_multiple_of(4) {
            return;
        }
        let mut bytes = self.words[word].to_ne_bytes();
        bytes[within..within + 4].copy_from_slice(&value.to_ne_bytes());
        self.words[word] = u64::from_ne_bytes(bytes);
    }

    /// The bytes of the structure.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.truncate(self.len);
        bytes
    }

    fn argsz(&self) -> usize {
        let bytes = self.words[0].to_ne_bytes();
        u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
    }
}

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// `argsz` of a structure.
fn argsz<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// Asks with a structure that grows: the kernel writes into `argsz` how long it wants to be.
fn growing(file: &impl AsRawFd, request: c_ulong, first: Record) -> io::Result<Vec<u8>> {
    let mut record = first;
    for _ in 0..TRIES {
        let mut answer = record.clone();
        // SAFETY: all requests given to this function take a pointer to a structure that begins with its length, and
        // write at most that many bytes; `answer` owns `len` bytes, aligned to eight, and `argsz` is `len`.
        checked(unsafe { ioctl_with_mut_ptr(file, request, answer.words.as_mut_ptr()) })?;
        let wanted = answer.argsz();
        if wanted <= record.len {
            return Ok(answer.bytes());
        }
        if wanted > LARGEST_RECORD {
            break;
        }
        let mut larger = Record::new(wanted);
        for (word, value) in record.words.iter().enumerate() {
            larger.words[word] = *value;
        }
        larger.set(0, u32::try_from(wanted).unwrap_or(u32::MAX));
        record = larger;
    }
    Err(io::Error::other(
        "the kernel's answer does not stop growing",
    ))
}

// The container.

/// Chooses type1v2 for a container that has a group.
pub(crate) fn set_type1(container: &VfioContainer) -> io::Result<()> {
    // SAFETY: the request takes a number, and the container is open.
    let result = unsafe { ioctl_with_val(container, SET_IOMMU, c_ulong::from(VFIO_TYPE1v2_IOMMU)) };
    checked(result).map(drop)
}

/// `struct vfio_iommu_type1_info` with its capabilities.
pub(crate) fn type1_info(container: &VfioContainer) -> io::Result<Vec<u8>> {
    growing(
        container,
        IOMMU_GET_INFO,
        Record::new(size_of::<vfio_iommu_type1_info>()),
    )
}

/// Maps host memory for reading and writing by devices.
///
/// The host memory stays mapped until [`type1_unmap`] of it: the contract of `DmaMapper::map`.
pub(crate) fn type1_map(
    container: &VfioContainer,
    iova: u64,
    host_address: u64,
    size: u64,
) -> io::Result<()> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
    let size = usize::try_from(size).map_err(too_large)?;
    let address = usize::try_from(host_address).map_err(too_large)?;
    // SAFETY: the range is memory that is lent to devices and that nothing in this process holds a Rust reference into:
    // who calls `DmaMapper::map` promises both. The kernel checks that the addresses are this process's.
    let result = unsafe { container.vfio_dma_map(iova, size, address as *mut u8) };
    result.map_err(|error| match error {
        VfioError::IommuDmaMap(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(other),
    })
}

/// Unmaps what was mapped with one call and says how many bytes that were. vfio-ioctls does not tell the number.
pub(crate) fn type1_unmap(container: &VfioContainer, iova: u64, size: u64) -> io::Result<u64> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: argsz::<vfio_iommu_type1_dma_unmap>(),
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `vfio_iommu_type1_dma_unmap`; without a flag it looks at no more.
    checked(unsafe { ioctl_with_mut_ref(container, IOMMU_UNMAP_DMA, &mut unmap) })?;
    Ok(unmap.size)
}

// A group.

/// `VFIO_GROUP_FLAGS_*` of a group.
pub(crate) fn group_flags(group: &File) -> io::Result<u32> {
    let mut status = vfio_group_status {
        argsz: argsz::<vfio_group_status>(),
        flags: 0,
    };
    // SAFETY: the request writes one `vfio_group_status`.
    checked(unsafe { ioctl_with_mut_ref(group, GROUP_GET_STATUS, &mut status) })?;
    Ok(status.flags)
}

/// Puts a group into a container.
pub(crate) fn group_set_container(group: &File, container: &VfioContainer) -> io::Result<()> {
    let fd = container.as_raw_fd();
    // SAFETY: the request reads one descriptor number, which is open because the container is borrowed.
    checked(unsafe { ioctl_with_ref(group, GROUP_SET_CONTAINER, &fd) }).map(drop)
}

/// Takes a group out of its container: the IOMMU forgets what was mapped for it. Refused while a device of it is open.
pub(crate) fn group_unset_container(group: &File) -> io::Result<()> {
    // SAFETY: the request takes nothing.
    checked(unsafe { ioctl_with_val(group, GROUP_UNSET_CONTAINER, 0) }).map(drop)
}

/// Opens a device of a group that is in a container.
pub(crate) fn group_device(group: &File, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the request reads a string that ends in zero.
    let fd = checked(unsafe { ioctl_with_ptr(group, GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor for this call, so nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

// A device.

/// `struct vfio_device_info`, without capabilities.
pub(crate) fn device_info(device: &File) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info {
        argsz: argsz::<vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: the request writes one `vfio_device_info`; capabilities are written only if `argsz` has room for them.
    checked(unsafe { ioctl_with_mut_ref(device, DEVICE_GET_INFO, &mut info) })?;
    Ok(info)
}

/// `struct vfio_region_info` with its capabilities.
pub(crate) fn region_info(device: &File, index: u32) -> io::Result<Vec<u8>> {
    let mut record = Record::new(size_of::<vfio_region_info>());
    record.set(offset_of!(vfio_region_info, index), index);
    growing(device, DEVICE_GET_REGION_INFO, record)
}

/// `struct vfio_irq_info`.
pub(crate) fn irq_info(device: &File, index: u32) -> io::Result<vfio_irq_info> {
    let mut info = vfio_irq_info {
        argsz: argsz::<vfio_irq_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `vfio_irq_info`.
    checked(unsafe { ioctl_with_mut_ref(device, DEVICE_GET_IRQ_INFO, &mut info) })?;
    Ok(info)
}

/// What [`set_irqs`] is to do with vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IrqSet<'a> {
    /// `VFIO_IRQ_SET_*`.
    pub(crate) flags: u32,
    pub(crate) index: u32,
    pub(crate) start: u32,
    /// A descriptor for each vector (-1: none); none at all is a count of zero.
    pub(crate) events: &'a [Option<BorrowedFd<'a>>],
}

impl IrqSet<'_> {
    /// `struct vfio_irq_set`.
    pub(crate) fn record(&self) -> Record {
        let data = offset_of!(vfio_irq_set, data);
        let mut record = Record::new(data + self.events.len() * size_of::<c_int>());
        record.set(offset_of!(vfio_irq_set, flags), self.flags);
        record.set(offset_of!(vfio_irq_set, index), self.index);
        record.set(offset_of!(vfio_irq_set, start), self.start);
        let count = u32::try_from(self.events.len()).unwrap_or(u32::MAX);
        record.set(offset_of!(vfio_irq_set, count), count);
        for (vector, event) in self.events.iter().enumerate() {
            let fd = event.map_or(-1, |event| event.as_raw_fd());
            record.set(data + vector * size_of::<c_int>(), fd.cast_unsigned());
        }
        record
    }
}

/// Sets what vectors do.
pub(crate) fn set_irqs(device: &File, set: IrqSet<'_>) -> io::Result<()> {
    let record = set.record();
    // SAFETY: the request reads `argsz` bytes, which `record` owns, and its count says how many descriptors they hold;
    // the descriptors are open because `set` borrows them.
    checked(unsafe { ioctl_with_ptr(device, DEVICE_SET_IRQS, record.words.as_ptr()) }).map(drop)
}

/// Resets a device that says it can be.
pub(crate) fn reset(device: &File) -> io::Result<()> {
    // SAFETY: the request takes nothing.
    checked(unsafe { ioctl_with_val(device, DEVICE_RESET, 0) }).map(drop)
}

/// `struct vfio_pci_hot_reset_info` with its devices.
pub(crate) fn hot_reset_info(device: &File) -> io::Result<Vec<u8>> {
    let header = offset_of!(vfio_pci_hot_reset_info, devices);
    let mut record = Record::new(header);
    for _ in 0..TRIES {
        let mut answer = record.clone();
        // SAFETY: the request writes at most `argsz` bytes, which `answer` owns.
        let result = unsafe {
            ioctl_with_mut_ptr(
                device,
                DEVICE_GET_PCI_HOT_RESET_INFO,
                answer.words.as_mut_ptr(),
            )
        };
        match checked(result) {
            Ok(_) => return Ok(answer.bytes()),
            // Too small: unlike the others, this request fails, and says in `count` how many devices there are.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                let count = u32::from_ne_bytes(
                    answer.bytes()[offset_of!(vfio_pci_hot_reset_info, count)..][..4]
                        .try_into()
                        .unwrap_or_default(),
                );
                let len = header + count as usize * size_of::<vfio_pci_dependent_device>();
                if len > LARGEST_RECORD {
                    break;
                }
                record = Record::new(len);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other(
        "the kernel's answer does not stop growing",
    ))
}

/// Resets the bus or slot of a device. The groups prove ownership of everything on it; none, where the devices' own
/// files do.
pub(crate) fn hot_reset(device: &File, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
    let fds = offset_of!(vfio_pci_hot_reset, group_fds);
    let mut record = Record::new(fds + groups.len() * size_of::<c_int>());
    let count = u32::try_from(groups.len()).unwrap_or(u32::MAX);
    record.set(offset_of!(vfio_pci_hot_reset, count), count);
    for (place, group) in groups.iter().enumerate() {
        record.set(
            fds + place * size_of::<c_int>(),
            group.as_raw_fd().cast_unsigned(),
        );
    }
    // SAFETY: the request reads the structure and `count` descriptors behind it, all within `record`; the descriptors
    // are open because `groups` borrows them.
    checked(unsafe { ioctl_with_ptr(device, DEVICE_PCI_HOT_RESET, record.words.as_ptr()) })
        .map(drop)
}

/// Gives a device's file to an IOMMU file descriptor; from then on the device can be used.
pub(crate) fn bind_iommufd(device: &File, iommufd: &impl AsRawFd) -> io::Result<u32> {
    let mut bind = vfio_device_bind_iommufd {
        // The length before `token_uuid_ptr` was added, which every kernel knows.
        argsz: u32::try_from(offset_of!(vfio_device_bind_iommufd, token_uuid_ptr))
            .unwrap_or(u32::MAX),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `vfio_device_bind_iommufd`, of which `argsz` covers a part; the
    // descriptor in it is open because `iommufd` is borrowed.
    checked(unsafe { ioctl_with_mut_ref(device, DEVICE_BIND_IOMMUFD, &mut bind) })?;
    Ok(bind.out_devid)
}

/// Puts a bound device into an address space.
pub(crate) fn attach_ioas(device: &File, ioas: u32) -> io::Result<()> {
    let mut attach = vfio_device_attach_iommufd_pt {
        // The length before `pasid` was added.
        argsz: u32::try_from(offset_of!(vfio_device_attach_iommufd_pt, pasid)).unwrap_or(u32::MAX),
        pt_id: ioas,
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `vfio_device_attach_iommufd_pt`, of which `argsz` covers a part.
    checked(unsafe { ioctl_with_mut_ref(device, DEVICE_ATTACH_IOMMUFD_PT, &mut attach) }).map(drop)
}

/// Takes a device out of its address space: it reaches nothing any more.
pub(crate) fn detach_ioas(device: &File) -> io::Result<()> {
    let detach = vfio_device_detach_iommufd_pt {
        argsz: u32::try_from(offset_of!(vfio_device_detach_iommufd_pt, pasid)).unwrap_or(u32::MAX),
        ..Default::default()
    };
    // SAFETY: the request reads one `vfio_device_detach_iommufd_pt`, of which `argsz` covers a part.
    checked(unsafe { ioctl_with_ref(device, DEVICE_DETACH_IOMMUFD_PT, &detach) }).map(drop)
}

// An IOMMU file descriptor.

/// First and last addresses that can be mapped, and the alignment of addresses.
pub(crate) fn ioas_ranges(
    iommufd: &impl AsRawFd,
    ioas: u32,
) -> io::Result<(Vec<iommu_iova_range>, u64)> {
    let mut ranges = vec![iommu_iova_range::default(); 16];
    for _ in 0..TRIES {
        let mut ask = iommu_ioas_iova_ranges {
            size: argsz::<iommu_ioas_iova_ranges>(),
            ioas_id: ioas,
            num_iovas: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            allowed_iovas: ranges.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the request reads and writes one `iommu_ioas_iova_ranges` and writes at most `num_iovas` ranges where
        // `allowed_iovas` points: the vector, which has that many and is not touched in between.
        let result = checked(unsafe { ioctl_with_mut_ref(iommufd, IOAS_IOVA_RANGES, &mut ask) });
        match result {
            Ok(_) => {
                ranges.truncate(ask.num_iovas as usize);
                return Ok((ranges, ask.out_iova_alignment));
            }
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                let wanted = ask.num_iovas as usize;
                if wanted > LARGEST_RECORD / size_of::<iommu_iova_range>() {
                    break;
                }
                ranges.resize(wanted, iommu_iova_range::default());
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other(
        "the kernel's answer does not stop growing",
    ))
}

/// Has the memory of one mapping in a second address space too.
pub(crate) fn ioas_copy(iommufd: &impl AsRawFd, copy: &mut iommu_ioas_copy) -> io::Result<()> {
    copy.size = argsz::<iommu_ioas_copy>();
    // SAFETY: the request reads and writes one `iommu_ioas_copy`, which holds numbers only.
    checked(unsafe { ioctl_with_mut_ref(iommufd, IOAS_COPY, copy) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use vfio_bindings::bindings::vfio::{
        VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX,
    };

    fn word(bytes: &[u8], offset: usize) -> u32 {
        u32::from_ne_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    #[test]
    fn request_numbers_are_the_kernel_s() {
        assert_eq!(SET_IOMMU, 0x3b66);
        assert_eq!(GROUP_GET_DEVICE_FD, 0x3b6a);
        assert_eq!(DEVICE_SET_IRQS, 0x3b6e);
        assert_eq!(DEVICE_BIND_IOMMUFD, 0x3b76);
        assert_eq!(IOMMU_UNMAP_DMA, 0x3b72);
        assert_eq!(IOAS_COPY, 0x3b83);
        assert_eq!(IOAS_IOVA_RANGES, 0x3b84);
    }

    #[test]
    fn a_record_starts_with_its_length_and_takes_no_field_outside() {
        let mut record = Record::new(12);
        record.set(8, 7);
        record.set(12, 9);
        record.set(9, 9);
        let bytes = record.bytes();
        assert_eq!(bytes.len(), 12);
        assert_eq!(
            (word(&bytes, 0), word(&bytes, 4), word(&bytes, 8)),
            (12, 0, 7)
        );
        assert_eq!(Record::new(0).bytes().len(), 0);
    }

    #[test]
    fn a_vector_without_an_event_is_minus_one() {
        let file = File::open("/dev/null").unwrap();
        let set = IrqSet {
            flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
            index: VFIO_PCI_MSIX_IRQ_INDEX,
            start: 3,
            events: &[Some(file.as_fd()), None],
        };
        let bytes = set.record().bytes();
        let fd = file.as_raw_fd().cast_unsigned();
        let words: Vec<u32> = (0..7).map(|i| word(&bytes, i * 4)).collect();
        assert_eq!(words, [28, 0x24, 2, 3, 2, fd, u32::MAX]);
    }

    #[test]
    fn a_file_that_is_no_device_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let code = |error: io::Error| error.raw_os_error();
        assert_eq!(code(region_info(&file, 0).unwrap_err()), Some(libc::ENOTTY));
        assert_eq!(code(hot_reset_info(&file).unwrap_err()), Some(libc::ENOTTY));
        assert_eq!(code(device_info(&file).unwrap_err()), Some(libc::ENOTTY));
        assert_eq!(code(irq_info(&file, 0).unwrap_err()), Some(libc::ENOTTY));
        assert_eq!(code(group_flags(&file).unwrap_err()), Some(libc::ENOTTY));
        assert_eq!(code(reset(&file).unwrap_err()), Some(libc::ENOTTY));
        assert_eq!(
            code(bind_iommufd(&file, &file).unwrap_err()),
            Some(libc::ENOTTY)
        );
    }
}
