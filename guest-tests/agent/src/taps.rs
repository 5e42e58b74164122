//! Taps of the emulated host, made as orchestrators make them: frames with the header that virtio has, one queue.
//!
//! A tap is gone when the last descriptor of it is closed, here and in the VMM that it was given to.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;

use vmm_sys_util::ioctl::{_IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

/// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
const TUNSETIFF: u64 = ioctl_expr(_IOC_WRITE, b'T' as u32, 202, 4);
/// `IFNAMSIZ`, with the zero at the end.
const NAME_BYTES: usize = 16;

/// `struct ifreq` with flags.
#[repr(C)]
struct Request {
    name: [u8; NAME_BYTES],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == 40);

/// Makes a tap.
pub(crate) fn make(name: &str) -> Result<File, String> {
    let failed = |error: io::Error| format!("cannot make the tap {name}: {error}");
    if name.is_empty() || name.len() >= NAME_BYTES {
        return Err(format!("no name of a tap: {name}"));
    }
    let mut request = Request {
        name: [0; NAME_BYTES],
        flags: FLAGS,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(failed)?;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which is what the reference is to; it outlives the call.
    if unsafe { ioctl_with_mut_ref(&file, TUNSETIFF, &mut request) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_interface_has_is_refused_before_anything_is_opened() {
        for name in ["", "sixteen-bytes-ab"] {
            assert!(make(name).unwrap_err().contains("no name"), "{name}");
        }
    }

    #[test]
    fn the_request_is_the_kernels() {
        // linux/if_tun.h: _IOW('T', 202, int).
        assert_eq!(TUNSETIFF, 0x4004_54ca);
    }
}
