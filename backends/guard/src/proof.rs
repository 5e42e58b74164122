//! The proof that somebody may use a device: an open descriptor of it, looked at and closed at once.
//!
//! Without it any user could hold any device. The guard keeps no descriptor of a device: it would be one more user of
//! the memory whose users it waits for.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, major, minor};

/// What a descriptor was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// An open character device.
    Device { major: u32, minor: u32 },
    /// Something else. A descriptor of the path alone (`O_PATH`) is no open device: it needs no permission.
    Nothing,
}

impl Proof {
    /// Looks at the descriptor and closes it.
    pub(crate) fn of(descriptor: OwnedFd) -> Self {
        let is_open = fcntl_getfl(&descriptor).is_ok_and(|flags| !flags.contains(OFlags::PATH));
        let stat = fstat(&descriptor);
        drop(descriptor);
        match stat {
            Ok(stat)
                if is_open
                    && FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice =>
            {
                Self::Device {
                    major: major(stat.st_rdev),
                    minor: minor(stat.st_rdev),
                }
            }
            _ => Self::Nothing,
        }
    }

    pub(crate) fn is_of(self, number: (u32, u32)) -> bool {
        let (major, minor) = number;
        self == Self::Device { major, minor }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn only_an_open_device_proves_anything() {
        let zero = Proof::of(File::open("/dev/zero").unwrap().into());
        assert!(zero.is_of((1, 5)));
        assert!(!zero.is_of((1, 3)));
        let path = i32::try_from(OFlags::PATH.bits()).unwrap();
        let path_only = File::options()
            .read(true)
            .custom_flags(path)
            .open("/dev/zero")
            .unwrap();
        assert_eq!(Proof::of(path_only.into()), Proof::Nothing);
        assert_eq!(
            Proof::of(tempfile::tempfile().unwrap().into()),
            Proof::Nothing
        );
    }
}
