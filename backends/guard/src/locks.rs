//! Whether anybody still has a lock on a device, and so a descriptor of it that a dead holder lent.
//!
//! `daxhund-dax` locks the range it maps through the open file description of the device, and such a lock lives as long
//! as the last copy of that descriptor, in whatever process. Nobody is told when it goes: the guard looks. The lock is
//! another one through another node of the same device (`mknod`): the guard looks at the one in `/dev`.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::host::Host;
use crate::lineage::DeviceName;

/// A device that is gone, or has no driver, is locked by nobody.
pub(crate) fn is_locked(host: &Host, device: &DeviceName) -> io::Result<bool> {
    let file = match File::open(host.dev().join(device.as_str())) {
        Ok(file) => file,
        Err(error) => {
            return match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Ok(false),
                _ => Err(error),
            };
        }
    };
    let [whole, write] = [libc::SEEK_SET, libc::F_WRLCK];
    let mut lock = libc::flock {
        l_type: libc::c_short::try_from(write).map_err(io::Error::other)?,
        l_whence: libc::c_short::try_from(whole).map_err(io::Error::other)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::testing::FakeHost;

    #[test]
    fn a_lock_lasts_as_long_as_the_last_copy_of_its_descriptor() {
        let host = FakeHost::new();
        let path = host.write("dev/dax1.0", "memory");
        let device = "dax1.0".parse().unwrap();
        assert!(!is_locked(host.host(), &device).unwrap());
        let file = File::options().read(true).write(true).open(path).unwrap();
        let lock = libc::flock {
            l_type: libc::F_WRLCK.try_into().unwrap(),
            l_whence: 0,
            l_start: 4096,
            l_len: 4096,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert!(is_locked(host.host(), &device).unwrap());
        // Another process keeps the descriptor; its input is what ends it.
        let mut other = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        assert!(is_locked(host.host(), &device).unwrap());
        drop(other.stdin.take());
        other.wait().unwrap();
        assert!(!is_locked(host.host(), &device).unwrap());
        assert!(!is_locked(host.host(), &"dax2.0".parse().unwrap()).unwrap());
    }
}
