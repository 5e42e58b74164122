//! Several devices of which anybody takes what is free, by size: memory for those who don't name a device.
//!
//! Nobody keeps a book of what is taken. The locks on the devices are the book: they end with whoever held them, also one
//! that was killed, and two who want the same range are told apart by the kernel. So a pool is only a name and a list, and
//! every process that has the same list sees the same pool.
//!
//! # Invariants
//! - What is taken is one piece of one device: the first that fits, in the order in which the devices are listed.
//! - A device that can't be used is passed over; why is part of the error when no other has room.
//!
//! # Not here
//! What is in the memory: it is what its last user left there (see [`DaxMapping::zero`](crate::DaxMapping::zero)).

#![forbid(unsafe_code)]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::device::DeviceFacts;
use crate::host::Host;
use crate::lock::{LockError, RangeLock};
use crate::open::{DaxDevice, OpenError};
use crate::room::{Room, RoomError, Taken};
use crate::size::ByteSize;

/// So many users are named; there is a command for all of them.
const NAMED_AT_MOST: usize = 4;

/// A name for devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    name: Arc<String>,
    devices: Vec<PathBuf>,
}

/// What somebody wants of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Bytes.
    pub size: u64,
    /// The node that the memory has to be of; any without one.
    pub node: Option<u32>,
    /// A power of two that offset and size have to be multiples of, beside the device's own alignment.
    pub align: u64,
}

impl Wanted {
    /// So many bytes, wherever they are.
    pub fn bytes(size: u64) -> Self {
        Self {
            size,
            node: None,
            align: 1,
        }
    }
}

/// Why one device of a pool did not give what was wanted.
#[derive(Debug)]
pub enum Why {
    /// It can't be used.
    Unusable(OpenError),
    /// It is memory of another node.
    OtherNode(Option<u32>),
    /// It gives multiples of this only.
    Misaligned(ByteSize),
    /// So much is not free in one piece.
    Full(Room),
}

/// A device of a pool that did not give what was wanted.
#[derive(Debug)]
pub struct Miss {
    /// The device.
    pub path: PathBuf,
    /// Why.
    pub why: Why,
}

/// Why nothing was had of a pool.
#[derive(Debug, Error)]
pub enum PoolError {
    /// A size of zero was asked for.
    #[error("size 0 was asked for of pool {pool}: give a size")]
    ZeroSize {
        /// The pool.
        pool: String,
    },
    /// No device gives ranges of this size.
    #[error(
        "size {size} is not a multiple of {align}, which is what {} of pool {pool} gives: use size={}",
        path.display(), choices(*size, *align)
    )]
    Misaligned {
        /// The pool.
        pool: String,
        /// The size asked for.
        size: ByteSize,
        /// The device with the smallest alignment.
        path: PathBuf,
        /// Its alignment.
        align: ByteSize,
    },
    /// No device is of the node.
    #[error(
        "pool {pool} has no memory of host node {node} ({}): leave host_numa_node= out, name another node, or give the pool a \
         device of that node",
        list(misses)
    )]
    NoNode {
        /// The pool.
        pool: String,
        /// The node asked for.
        node: u32,
        /// What its devices are.
        misses: Vec<Miss>,
    },
    /// So much is not free in one piece.
    #[error(
        "pool {pool} has no {size} free in one piece{}: {}; stop one of its users, ask for less, or give the pool another device \
         (`daxhund pool list` shows who has what)",
        of_node(*node), list(misses)
    )]
    NoRoom {
        /// The pool.
        pool: String,
        /// The size asked for.
        size: ByteSize,
        /// The node asked for.
        node: Option<u32>,
        /// What stands in the way, for each device.
        misses: Vec<Miss>,
    },
    /// The kernel does not say what is taken.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// The kernel refused the lock.
    #[error(transparent)]
    Lock(LockError),
}

/// A device of a pool as it is now.
#[derive(Debug)]
pub struct Member {
    /// Where its node is.
    pub path: PathBuf,
    /// What it is and what is taken of it, or why it can't be used.
    pub state: Result<(DeviceFacts, Room), OpenError>,
}

impl Pool {
    /// A pool of these devices, to be tried in this order.
    pub fn new(name: &str, devices: Vec<PathBuf>) -> Self {
        Self {
            name: Arc::new(name.to_owned()),
            devices,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes the first range that fits, without waiting.
    pub fn take(&self, host: &Host, wanted: Wanted) -> Result<RangeLock, PoolError> {
        self.take_by(wanted, |path| host.open(path))
    }

    /// Looks at every device. Opens it for that, for a moment.
    pub fn members(&self, host: &Host) -> Result<Vec<Member>, RoomError> {
        let member = |path: &PathBuf| {
            let state = match host.open(path) {
                Ok(device) => Ok((device.facts().clone(), device.room()?)),
                Err(error) => Err(error),
            };
            let path = path.clone();
            Ok(Member { path, state })
        };
        self.devices.iter().map(member).collect()
    }

    fn take_by(
        &self,
        wanted: Wanted,
        open: impl Fn(&Path) -> Result<DaxDevice, OpenError>,
    ) -> Result<RangeLock, PoolError> {
        if wanted.size == 0 {
            let pool = self.name.to_string();
            return Err(PoolError::ZeroSize { pool });
        }
        let mut misses = Vec::new();
        for path in &self.devices {
            let taken = match open(path) {
                Ok(device) => take_of(&device, wanted)?,
                Err(error) => Err(Why::Unusable(error)),
            };
            match taken {
                Ok(lock) => return Ok(lock.of_pool(&self.name)),
                Err(why) => misses.push(Miss {
                    path: path.clone(),
                    why,
                }),
            }
        }
        Err(self.refusal(wanted, misses))
    }

    /// The one thing that is to be mended first.
    fn refusal(&self, wanted: Wanted, misses: Vec<Miss>) -> PoolError {
        let (pool, size) = (self.name.to_string(), ByteSize(wanted.size));
        let is_full = |miss: &Miss| matches!(miss.why, Why::Full(_));
        let is_other = |miss: &Miss| matches!(miss.why, Why::OtherNode(_));
        let misaligned = |miss: &Miss| match miss.why {
            Why::Misaligned(align) => Some((align, miss.path.clone())),
            _ => None,
        };
        match (wanted.node, misses.iter().filter_map(misaligned).min()) {
            (_, Some((align, path))) if !misses.iter().any(is_full) => PoolError::Misaligned {
                pool,
                size,
                path,
                align,
            },
            (Some(node), None) if misses.iter().all(is_other) => {
                PoolError::NoNode { pool, node, misses }
            }
            (node, _) => PoolError::NoRoom {
                pool,
                size,
                node,
                misses,
            },
        }
    }
}

fn take_of(device: &DaxDevice, wanted: Wanted) -> Result<Result<RangeLock, Why>, PoolError> {
    let facts = device.facts();
    if wanted.node.is_some() && wanted.node != facts.target_node {
        return Ok(Err(Why::OtherNode(facts.target_node)));
    }
    let align = wanted.align.max(facts.align_bytes);
    if !wanted.size.is_multiple_of(align) {
        return Ok(Err(Why::Misaligned(ByteSize(align))));
    }
    let lock = device
        .lock_first_fit(wanted.size, align)
        .map_err(PoolError::Lock)?;
    match lock {
        Some(lock) => Ok(Ok(lock)),
        None => Ok(Err(Why::Full(device.room()?))),
    }
}

fn of_node(node: Option<u32>) -> String {
    node.map_or_else(String::new, |node| format!(" on host node {node}"))
}

fn choices(size: ByteSize, align: ByteSize) -> String {
    let below = size.0 - size.0 % align.0;
    let above = below.checked_add(align.0).map(ByteSize);
    match (below, above) {
        (0, Some(above)) => above.to_string(),
        (below, Some(above)) => format!("{} or {above}", ByteSize(below)),
        (below, None) => ByteSize(below).to_string(),
    }
}

fn list(misses: &[Miss]) -> String {
    let miss = |Miss { path, why }: &Miss| match why {
        Why::Unusable(error) => error.to_string(),
        Why::OtherNode(Some(node)) => format!("{} is memory of node {node}", path.display()),
        Why::OtherNode(None) => format!("{} is memory of no known node", path.display()),
        Why::Misaligned(align) => format!("{} gives multiples of {align}", path.display()),
        Why::Full(room) => format!(
            "{} has {} free, {} in one piece{}",
            path.display(),
            ByteSize(room.free_bytes()),
            ByteSize(room.largest_free_bytes()),
            users(room.taken())
        ),
    };
    misses.iter().map(miss).collect::<Vec<_>>().join("; ")
}

fn users(taken: &[Taken]) -> String {
    let mut text = String::new();
    for (at, Taken { range, holder }) in taken.iter().take(NAMED_AT_MOST).enumerate() {
        let lead = if at == 0 { ", in use are " } else { ", " };
        let holder = holder.as_ref().map_or(
            "a process that can't be seen".to_owned(),
            ToString::to_string,
        );
        // Into a text, which takes everything.
        let _ = write!(text, "{lead}{range} by {holder}");
    }
    match taken.len().saturating_sub(NAMED_AT_MOST) {
        0 => text,
        more => text + &format!(" and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DeviceFile, FakeDevice, FakeHost};

    const M: u64 = 1 << 20;

    /// Two devices of 8M, by 2M and by 4M; the second is of node 2.
    struct Two {
        files: [DeviceFile; 2],
        pool: Pool,
    }

    impl Two {
        fn new() -> Self {
            let first = DeviceFile::with_align(8 * M, 2 * M);
            let second = DeviceFile::with_align(8 * M, 4 * M).on_node(2);
            let devices = vec!["/dev/dax0.0".into(), "/dev/dax1.0".into()];
            Self {
                files: [first, second],
                pool: Pool::new("ram", devices),
            }
        }

        fn take(&self, wanted: Wanted) -> Result<RangeLock, PoolError> {
            self.pool.take_by(wanted, |path| {
                let first = path == Path::new("/dev/dax0.0");
                Ok(self.files[usize::from(!first)].open())
            })
        }

        fn refused(&self, wanted: Wanted) -> String {
            self.take(wanted).unwrap_err().to_string()
        }
    }

    fn place(lock: &RangeLock) -> (u64, u64, u64) {
        let range = lock.range();
        let align = lock.opened().facts().align_bytes;
        (align / M, range.offset() / M, range.len() / M)
    }

    #[test]
    fn the_first_device_that_has_room_gives_it_and_what_is_let_go_of_is_given_again() {
        let two = Two::new();
        let a = two.take(Wanted::bytes(4 * M)).unwrap();
        let b = two.take(Wanted::bytes(2 * M)).unwrap();
        // Does not fit the first any more.
        let c = two.take(Wanted::bytes(4 * M)).unwrap();
        let d = two.take(Wanted::bytes(2 * M)).unwrap();
        assert_eq!(
            [&a, &b, &c, &d].map(place),
            [(2, 0, 4), (2, 4, 2), (4, 0, 4), (2, 6, 2)]
        );
        assert_eq!(a.pool(), Some("ram"));
        drop(a);
        assert_eq!(place(&two.take(Wanted::bytes(2 * M)).unwrap()), (2, 0, 2));
        let a = two.take(Wanted::bytes(4 * M)).unwrap().map().unwrap();
        assert_eq!((a.range().offset(), a.pool()), (0, Some("ram")));
    }

    #[test]
    fn the_node_is_the_one_that_is_asked_for() {
        let two = Two::new();
        let on = |node| Wanted {
            node: Some(node),
            ..Wanted::bytes(4 * M)
        };
        assert_eq!(place(&two.take(on(2)).unwrap()), (4, 0, 4));
        assert_eq!(place(&two.take(on(1)).unwrap()), (2, 0, 4));
        let text = two.refused(on(7));
        assert!(
            text.starts_with("pool ram has no memory of host node 7"),
            "{text}"
        );
        assert!(text.contains("/dev/dax1.0 is memory of node 2"), "{text}");
        let text = two.refused(Wanted {
            size: 16 * M,
            ..on(2)
        });
        assert!(
            text.contains("no 16M free in one piece on host node 2"),
            "{text}"
        );
    }

    #[test]
    fn a_size_or_a_place_that_is_no_multiple_is_not_given() {
        let two = Two::new();
        assert_eq!(
            two.refused(Wanted::bytes(3 * M)),
            "size 3M is not a multiple of 2M, which is what /dev/dax0.0 of pool ram gives: use size=2M or 4M"
        );
        assert!(two.refused(Wanted::bytes(M)).ends_with("use size=2M"));
        assert!(two.refused(Wanted::bytes(u64::MAX)).contains("use size="));
        let zero = two.take(Wanted::bytes(0)).unwrap_err();
        assert!(matches!(zero, PoolError::ZeroSize { .. }));
        let _odd = two.take(Wanted::bytes(2 * M)).unwrap();
        let wide = Wanted {
            align: 4 * M,
            ..Wanted::bytes(4 * M)
        };
        assert_eq!(place(&two.take(wide).unwrap()), (2, 4, 4));
    }

    #[test]
    fn a_full_pool_says_who_has_it() {
        let two = Two::new();
        let held: Vec<RangeLock> =
            std::iter::from_fn(|| two.take(Wanted::bytes(2 * M)).ok()).collect();
        assert_eq!(held.len(), 4);
        let _all = two.take(Wanted::bytes(8 * M)).unwrap();
        let text = two.refused(Wanted::bytes(4 * M));
        assert!(
            text.starts_with(
                "pool ram has no 4M free in one piece: /dev/dax0.0 has 0 free, 0 in one piece"
            ),
            "{text}"
        );
        let holder = format!("2M at offset 6M by process {} (", std::process::id());
        assert!(text.contains(&holder), "{text}");
        assert!(text.contains("/dev/dax1.0 has 0 free"), "{text}");
        assert!(text.contains("8M at offset 0 by process"), "{text}");
    }

    #[test]
    fn a_device_that_can_not_be_used_is_passed_over_and_named_at_last() {
        let two = Two::new();
        let missing = |path: &Path| {
            Err(OpenError::Missing {
                path: path.to_owned(),
            })
        };
        let open = |path: &Path| {
            if path == Path::new("/dev/dax0.0") {
                missing(path)
            } else {
                Ok(two.files[1].open())
            }
        };
        let lock = two.pool.take_by(Wanted::bytes(8 * M), open).unwrap();
        assert_eq!(place(&lock), (4, 0, 8));
        let error = two.pool.take_by(Wanted::bytes(4 * M), open).unwrap_err();
        assert!(
            error.to_string().contains("/dev/dax0.0 does not exist"),
            "{error}"
        );
        let error = two.pool.take_by(Wanted::bytes(3 * M), missing).unwrap_err();
        assert!(matches!(error, PoolError::NoRoom { .. }), "{error}");
    }

    #[test]
    fn members_are_what_the_host_has() {
        let fake = FakeHost::new();
        fake.add(&FakeDevice::pmem("dax0.0"));
        let node = |name: &str| fake.dev().join(name);
        let pool = Pool::new("ram", vec![node("dax0.0"), node("dax9.0")]);
        let members = pool.members(&fake.host()).unwrap();
        let (facts, room) = members[0].state.as_ref().unwrap();
        assert_eq!((facts.name.region, room.total_bytes()), (0, 2046 * M));
        assert!(matches!(members[1].state, Err(OpenError::Missing { .. })));
        let error = pool.take(&fake.host(), Wanted::bytes(1 << 40)).unwrap_err();
        assert!(
            error.to_string().contains("dax9.0 does not exist"),
            "{error}"
        );
    }
}
