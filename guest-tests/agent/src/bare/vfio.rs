//! The ioctls of an attach, one function each, by either interface of the kernel.
//!
//! Nothing is asked first and nothing is kept: who calls does it in the kernel's order. Closing the files undoes all of it.
#![allow(unsafe_code)]

use std::ffi::{CString, c_int, c_uint, c_ulong};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use iommufd_bindings::{
    IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_UNMAP, IOMMUFD_TYPE,
    iommu_ioas_alloc, iommu_ioas_map, iommu_ioas_unmap,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE, VFIO_TYPE1v2_IOMMU,
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap,
};
use vmm_sys_util::ioctl::{
    _IOC_NONE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};

const fn vfio(offset: u32) -> c_ulong {
    ioctl_expr(_IOC_NONE, VFIO_TYPE as c_uint, VFIO_BASE + offset, 0)
}

const fn iommufd(command: u32) -> c_ulong {
    ioctl_expr(_IOC_NONE, IOMMUFD_TYPE as c_uint, command, 0)
}

const SET_IOMMU: c_ulong = vfio(2);
const GROUP_SET_CONTAINER: c_ulong = vfio(4);
const GROUP_GET_DEVICE_FD: c_ulong = vfio(6);
const DEVICE_RESET: c_ulong = vfio(11);
const IOMMU_MAP_DMA: c_ulong = vfio(13);
const IOMMU_UNMAP_DMA: c_ulong = vfio(14);
const DEVICE_BIND_IOMMUFD: c_ulong = vfio(18);
const DEVICE_ATTACH_IOMMUFD_PT: c_ulong = vfio(19);
const IOAS_ALLOC: c_ulong = iommufd(IOMMUFD_CMD_IOAS_ALLOC);
const IOAS_MAP: c_ulong = iommufd(IOMMUFD_CMD_IOAS_MAP);
const IOAS_UNMAP: c_ulong = iommufd(IOMMUFD_CMD_IOAS_UNMAP);

/// A range of this process's memory, and where the device finds it. The memory stays mapped until the range is unmapped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Range {
    pub(crate) iova: u64,
    pub(crate) host_address: u64,
    pub(crate) bytes: u64,
}

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// Puts a group into a container.
pub(crate) fn set_container(group: &File, container: &File) -> io::Result<()> {
    let fd = container.as_raw_fd();
    // SAFETY: the request reads one descriptor number, which is open because the container is borrowed.
    checked(unsafe { ioctl_with_ref(group, GROUP_SET_CONTAINER, &fd) }).map(drop)
}

/// Chooses type1 for a container that has a group.
pub(crate) fn set_type1(container: &File) -> io::Result<()> {
    // SAFETY: the request takes a number.
    checked(unsafe { ioctl_with_val(container, SET_IOMMU, c_ulong::from(VFIO_TYPE1v2_IOMMU)) })
        .map(drop)
}

/// Opens a device of a group.
pub(crate) fn group_device(group: &File, address: &str) -> io::Result<File> {
    let name = CString::new(address)?;
    // SAFETY: the request reads a string that ends in zero.
    let fd = checked(unsafe { ioctl_with_ptr(group, GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor for this call, so nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Resets a device.
pub(crate) fn reset(device: &File) -> io::Result<()> {
    // SAFETY: the request takes nothing.
    checked(unsafe { ioctl_with_val(device, DEVICE_RESET, 0) }).map(drop)
}

/// Has the devices of a container reach memory.
pub(crate) fn type1_map(container: &File, range: Range) -> io::Result<()> {
    let map = vfio_iommu_type1_dma_map {
        argsz: size::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: range.host_address,
        iova: range.iova,
        size: range.bytes,
    };
    // SAFETY: the request reads one `vfio_iommu_type1_dma_map`. The kernel checks that the addresses are this process's, and
    // no Rust reference points to what they hold: it is memory that is only reached through `Words`.
    checked(unsafe { ioctl_with_ref(container, IOMMU_MAP_DMA, &map) }).map(drop)
}

/// The undo of [`type1_map`].
pub(crate) fn type1_unmap(container: &File, range: Range) -> io::Result<()> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size::<vfio_iommu_type1_dma_unmap>(),
        iova: range.iova,
        size: range.bytes,
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `vfio_iommu_type1_dma_unmap`; without a flag it looks at no more.
    checked(unsafe { ioctl_with_mut_ref(container, IOMMU_UNMAP_DMA, &mut unmap) })?;
    all_of(range, unmap.size)
}

/// Makes an address space.
pub(crate) fn ioas_alloc(iommufd: &File) -> io::Result<u32> {
    let mut alloc = iommu_ioas_alloc {
        size: size::<iommu_ioas_alloc>(),
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `iommu_ioas_alloc`.
    checked(unsafe { ioctl_with_mut_ref(iommufd, IOAS_ALLOC, &mut alloc) })?;
    Ok(alloc.out_ioas_id)
}

/// Opens a device's file for use, with an IOMMU file descriptor.
pub(crate) fn bind_iommufd(device: &File, iommufd: &File) -> io::Result<()> {
    let mut bind = vfio_device_bind_iommufd {
        // The length before `token_uuid_ptr` was added, which every kernel knows.
        argsz: u32::try_from(std::mem::offset_of!(
            vfio_device_bind_iommufd,
            token_uuid_ptr
        ))
        .unwrap_or(u32::MAX),
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `vfio_device_bind_iommufd`, of which `argsz` covers a part; the descriptor in
    // it is open because `iommufd` is borrowed.
    checked(unsafe { ioctl_with_mut_ref(device, DEVICE_BIND_IOMMUFD, &mut bind) }).map(drop)
}

/// Puts a bound device into an address space.
pub(crate) fn attach_ioas(device: &File, ioas: u32) -> io::Result<()> {
    let mut attach = vfio_device_attach_iommufd_pt {
        // The length before `pasid` was added.
        argsz: u32::try_from(std::mem::offset_of!(vfio_device_attach_iommufd_pt, pasid))
            .unwrap_or(u32::MAX),
        pt_id: ioas,
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `vfio_device_attach_iommufd_pt`, of which `argsz` covers a part.
    checked(unsafe { ioctl_with_mut_ref(device, DEVICE_ATTACH_IOMMUFD_PT, &mut attach) }).map(drop)
}

/// Has the devices of an address space reach memory.
pub(crate) fn ioas_map(iommufd: &File, ioas: u32, range: Range) -> io::Result<()> {
    let mut map = iommu_ioas_map {
        size: size::<iommu_ioas_map>(),
        flags: FIXED | READABLE | WRITEABLE,
        ioas_id: ioas,
        user_va: range.host_address,
        length: range.bytes,
        iova: range.iova,
        ..Default::default()
    };
    // SAFETY: the request reads and writes one `iommu_ioas_map`; for the memory it names, as in `type1_map`.
    checked(unsafe { ioctl_with_mut_ref(iommufd, IOAS_MAP, &mut map) }).map(drop)
}

/// The undo of [`ioas_map`].
pub(crate) fn ioas_unmap(iommufd: &File, ioas: u32, range: Range) -> io::Result<()> {
    let mut unmap = iommu_ioas_unmap {
        size: size::<iommu_ioas_unmap>(),
        ioas_id: ioas,
        iova: range.iova,
        length: range.bytes,
    };
    // SAFETY: the request reads and writes one `iommu_ioas_unmap`.
    checked(unsafe { ioctl_with_mut_ref(iommufd, IOAS_UNMAP, &mut unmap) })?;
    all_of(range, unmap.length)
}

fn all_of(range: Range, unmapped: u64) -> io::Result<()> {
    if unmapped == range.bytes {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{unmapped} of {} bytes were let go",
        range.bytes
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_the_kernel_s() {
        assert_eq!(SET_IOMMU, 0x3b66);
        assert_eq!(GROUP_GET_DEVICE_FD, 0x3b6a);
        assert_eq!(IOMMU_MAP_DMA, 0x3b71);
        assert_eq!(IOAS_ALLOC, 0x3b81);
        assert_eq!(IOAS_MAP, 0x3b85);
        assert_eq!(IOAS_UNMAP, 0x3b86);
    }

    #[test]
    fn a_file_that_is_no_device_is_an_error() {
        let file = File::open("/dev/null").unwrap();
        let range = Range {
            iova: 0,
            host_address: 0,
            bytes: 4096,
        };
        for outcome in [
            set_container(&file, &file),
            set_type1(&file),
            reset(&file),
            type1_map(&file, range),
            type1_unmap(&file, range),
            bind_iommufd(&file, &file),
            attach_ioas(&file, 1),
            ioas_map(&file, 1, range),
            ioas_unmap(&file, 1, range),
            ioas_alloc(&file).map(drop),
            group_device(&file, "0000:00:00.0").map(drop),
        ] {
            assert_eq!(outcome.unwrap_err().raw_os_error(), Some(25), "ENOTTY");
        }
        assert!(all_of(range, 4096).is_ok() && all_of(range, 0).is_err());
    }
}
