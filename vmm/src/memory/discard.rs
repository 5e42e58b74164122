//! Gives host pages back that the guest does not use: what a balloon is for, and only where it loses nothing else.
//!
//! ```text
//!   balloon's thread ──discard──▶ read lock ─▶ madvise / fallocate
//!   owner            ──attach───▶ write lock      a range is in the table only while it is mapped:
//!                      detach───▶                 no discard can meet an unmap
//!   passthrough      ──forbid───▶                 pinned pages stay: the device would go on with the old ones
//! ```
//! | memory                                           | what becomes of it                       |
//! |--------------------------------------------------|------------------------------------------|
//! | anonymous, ordinary or huge pages                | given back (`MADV_DONTNEED`)             |
//! | a memory file without a name, shared             | given back (a hole is punched)           |
//! | a memory file without a name, private            | given back (`MADV_DONTNEED`)             |
//! | device-dax, fs-dax, any file that has a name     | kept: it may be, or become, user data    |
//!
//! A memory file is one of tmpfs or hugetlbfs; memfd is both. Only whole pages of the backing are given back, never
//! one that reaches out of the range that was asked for. The guest's addresses are checked here, by nobody before.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FallocateFlags, fallocate, fstat, fstatfs};
use rustix::mm::Advice;
use tracing::warn;

use super::mapping::{HostMapping, Source};
use super::ram::{Consumer, Lease, Rank, Reason};
use super::region::{Mapping, Region};

const PAGE: u64 = 4096;

/// What became of a range of guest memory that was to be given back, in bytes. Together they are its length.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Discarded {
    /// The host has them back; the guest reads zeroes, or what is in a private file.
    pub done: u64,
    /// Untouched: the backing can't or must not be given back.
    pub kept: u64,
    /// No guest memory is there.
    pub outside: u64,
}

/// Gives guest memory back to the host.
pub trait Discard: Send + Sync {
    /// Gives back what can be of `len` bytes at guest address `gpa`, any numbers at all.
    fn discard(&self, gpa: u64, len: u64) -> Discarded;
}

/// The ranges of one machine's guest memory, and how each is given back.
#[derive(Debug, Default)]
pub struct DiscardTable {
    table: RwLock<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// By first guest address; disjoint, as `memory::ram` sees to.
    ranges: BTreeMap<u64, Range>,
    forbidden: usize,
}

#[derive(Debug)]
struct Range {
    zone: String,
    gpa: u64,
    len: u64,
    way: Way,
    /// Whether it was said that this zone's memory is kept. Shared by the zone's ranges.
    said: Arc<AtomicBool>,
}

/// How a range is given back. Pages are of the backing, in bytes.
#[derive(Debug)]
enum Way {
    /// Private memory at a host address.
    Private { host: u64, page: u64 },
    /// A file that is nothing but this memory.
    Hole {
        file: Arc<File>,
        offset: u64,
        page: u64,
    },
    /// Not at all, and why.
    Keep(&'static str),
}

impl DiscardTable {
    /// No memory yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Keeps the table as memory comes and goes.
    pub fn consumer(self: &Arc<Self>) -> Box<dyn Consumer> {
        Box::new(TableConsumer(Arc::clone(self)))
    }

    /// From now on nothing is discarded while the guard lives; what was going on is over. For memory that is pinned:
    /// a device keeps the page it was given, the guest would get another.
    pub fn forbid(self: &Arc<Self>) -> Forbidden {
        self.write().forbidden += 1;
        Forbidden(Arc::clone(self))
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While it lives, no guest memory is discarded.
#[derive(Debug)]
#[must_use = "discarding is allowed again when this is dropped"]
pub struct Forbidden(Arc<DiscardTable>);

impl Drop for Forbidden {
    fn drop(&mut self) {
        self.0.write().forbidden -= 1;
    }
}

impl Discard for DiscardTable {
    fn discard(&self, gpa: u64, len: u64) -> Discarded {
        let table = self.read();
        let end = gpa.saturating_add(len);
        let mut sum = Discarded::default();
        let below_end = table.ranges.range(..end).rev().map(|(_, range)| range);
        for range in below_end.take_while(|range| range.gpa + range.len > gpa) {
            let from = gpa.max(range.gpa) - range.gpa;
            let to = end.min(range.gpa + range.len) - range.gpa;
            let done = if table.forbidden == 0 {
                range.discard(from, to)
            } else {
                0
            };
            sum.done += done;
            sum.kept += to - from - done;
        }
        sum.outside = len - sum.done - sum.kept;
        sum
    }
}

impl Range {
    /// Gives back the whole pages in `from..to`, offsets in the range. Tells how many bytes that were.
    fn discard(&self, from: u64, to: u64) -> u64 {
        let result = match &self.way {
            Way::Private { host, page } => {
                let (from, to) = whole_pages(from, to, *page);
                if from < to {
                    dont_need(host + from, to - from).map(|()| to - from)
                } else {
                    Ok(0)
                }
            }
            Way::Hole { file, offset, page } => {
                let (from, to) = whole_pages(from, to, *page);
                if from < to {
                    punch(file, offset + from, to - from).map(|()| to - from)
                } else {
                    Ok(0)
                }
            }
            Way::Keep(why) => {
                self.say_once(why);
                Ok(0)
            }
        };
        result.unwrap_or_else(|error| {
            self.say_once(&format!("the kernel does not take it back: {error}"));
            0
        })
    }

    fn say_once(&self, why: &str) {
        if !self.said.swap(true, Ordering::Relaxed) {
            warn!(
                zone = self.zone,
                why, "memory the guest gives up stays as it is: nothing of this zone is discarded"
            );
        }
    }
}

/// The part of `from..to` that is whole pages. Every range starts at one.
fn whole_pages(from: u64, to: u64, page: u64) -> (u64, u64) {
    let from = from.checked_next_multiple_of(page).unwrap_or(to);
    (from, to - to % page)
}

fn dont_need(host: u64, len: u64) -> io::Result<()> {
    let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let address = std::ptr::with_exposed_provenance_mut::<libc::c_void>(
        usize::try_from(host).map_err(|_| io::ErrorKind::InvalidInput)?,
    );
    // SAFETY: the addresses are whole pages of a range in the table. The caller holds the table's lock, and a range is
    // in the table only while `memory::ram` has it attached, so it is mapped. It is guest memory: nothing in this
    // process holds a Rust reference into it, and its contents may change at any time.
    unsafe { rustix::mm::madvise(address, len, Advice::LinuxDontNeed) }.map_err(io::Error::from)
}

fn punch(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, offset, len).map_err(io::Error::from)
}

impl Way {
    fn of(mapping: &Mapping) -> Self {
        match mapping {
            Mapping::Dax(_) => Self::Keep("device-dax memory may hold data that is to stay"),
            Mapping::Host(mapping) => Self::of_host(mapping),
        }
    }

    fn of_host(mapping: &HostMapping) -> Self {
        let host = mapping.as_ptr().expose_provenance() as u64;
        match mapping.source() {
            Source::Anonymous { huge_bytes, .. } => Self::Private {
                host,
                page: huge_bytes.unwrap_or(PAGE),
            },
            Source::File {
                file,
                offset,
                shared,
            } => match memory_file_page(file) {
                Some(page) if *shared => Self::Hole {
                    file: Arc::clone(file),
                    offset: *offset,
                    page,
                },
                Some(page) => Self::Private { host, page },
                None => Self::Keep("it is a file that has a name, so it may be somebody's data"),
            },
            Source::DaxFile { .. } => Self::Keep("fs-dax memory is a file's data"),
        }
    }
}

/// Page size of a file that is nothing but memory: on tmpfs or hugetlbfs, and without a name by which it could be more
/// to somebody. `None` for all others, and when in doubt.
fn memory_file_page(file: &File) -> Option<u64> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    if fstat(file).ok()?.st_nlink != 0 {
        return None;
    }
    let system = fstatfs(file).ok()?;
    match system.f_type {
        TMPFS_MAGIC => Some(PAGE),
        HUGETLBFS_MAGIC => u64::try_from(system.f_bsize)
            .ok()
            .filter(|page| page.is_power_of_two()),
        _ => None,
    }
}

/// Puts regions into the table and takes them out.
struct TableConsumer(Arc<DiscardTable>);

impl Consumer for TableConsumer {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn rank(&self) -> Rank {
        Rank::Tables
    }

    fn attach(&mut self, region: &Region) -> Result<Lease, Reason> {
        let mut table = self.0.write();
        let said = table
            .ranges
            .values()
            .find(|range| range.zone == region.zone())
            .map(|range| Arc::clone(&range.said))
            .unwrap_or_default();
        let gpa = region.gpa().0;
        let range = Range {
            zone: region.zone().to_owned(),
            gpa,
            len: region.size(),
            way: Way::of(region.mapping()),
            said,
        };
        table.ranges.insert(gpa, range);
        Ok(Lease(Box::new(gpa)))
    }

    /// Returns when no discard touches the region any more.
    fn detach(&mut self, _region: &Region, lease: Lease) -> Result<(), (Lease, Reason)> {
        match lease.0.downcast::<u64>() {
            Ok(gpa) => {
                self.0.write().ranges.remove(&gpa);
                Ok(())
            }
            Err(other) => Err((Lease(other), "not a lease of the table of discards".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::memory::layout::Gpa;
    use crate::memory::mapping::memfd;
    use crate::memory::ram::Ram;
    use crate::memory::snapshot::Snapshot;

    const MIB: u64 = 1 << 20;

    fn region(zone: &str, gpa: u64, size: u64, source: Source) -> Region {
        let mapping = Mapping::Host(HostMapping::new(source, size, PAGE).unwrap());
        Region::new(zone, Gpa(gpa), mapping)
            .map_err(|(_, e)| e)
            .unwrap()
    }

    fn anonymous() -> Source {
        Source::Anonymous {
            huge_bytes: None,
            thp: false,
        }
    }

    fn of_file(file: File, offset: u64, shared: bool) -> Source {
        Source::File {
            file: Arc::new(file),
            offset,
            shared,
        }
    }

    /// A machine's memory, every byte of it 0x5a.
    fn ram(regions: impl IntoIterator<Item = Region>) -> (Arc<DiscardTable>, Ram) {
        let table = DiscardTable::new();
        let mut ram = Ram::new(vec![table.consumer()]);
        for region in regions {
            let (gpa, len) = (region.gpa(), usize::try_from(region.size()).unwrap());
            ram.attach(region).unwrap();
            let memory = ram.view().memory();
            memory.write_slice(&vec![0x5a; len], gpa.into()).unwrap();
        }
        (table, ram)
    }

    fn byte(memory: &Snapshot, gpa: u64) -> u8 {
        memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    fn done(done: u64) -> Discarded {
        Discarded {
            done,
            ..Discarded::default()
        }
    }

    fn kept(kept: u64) -> Discarded {
        Discarded {
            kept,
            ..Discarded::default()
        }
    }

    #[test]
    fn memory_without_a_name_is_given_back_and_only_what_was_asked_for() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let unnamed = || {
            let file = tempfile::tempfile_in(dir.path()).unwrap();
            file.set_len(2 * MIB).unwrap();
            file
        };
        let sources = [
            anonymous(),
            of_file(memfd(2 * MIB, None).unwrap(), MIB, true),
            of_file(unnamed(), MIB, true),
            of_file(unnamed(), MIB, false),
        ];
        for source in sources {
            let words = format!("{source:?}");
            let (table, ram) = ram([region("z0", 0x10_0000, MIB, source)]);
            let gpa = 0x10_0000 + 8 * PAGE;
            assert_eq!(table.discard(gpa, 2 * PAGE), done(2 * PAGE), "{words}");
            let memory = ram.view().memory();
            for at in [gpa, gpa + 2 * PAGE - 1] {
                assert_eq!(byte(&memory, at), 0, "{words}");
            }
            for at in [gpa - 1, gpa + 2 * PAGE] {
                assert_eq!(byte(&memory, at), 0x5a, "{words}");
            }
            // It is memory as before.
            memory.write_obj(7u8, GuestAddress(gpa)).unwrap();
            assert_eq!(byte(&memory, gpa), 7, "{words}");
        }
    }

    #[test]
    fn a_hole_is_seen_by_all_who_share_the_file() {
        let file = memfd(MIB, None).unwrap();
        let other = file.try_clone().unwrap();
        let (table, _ram) = ram([region("z0", 0, MIB, of_file(file, 0, true))]);
        let blocks = || fstat(&other).unwrap().st_blocks;
        let before = blocks();
        assert_eq!(table.discard(0, MIB), done(MIB));
        assert!(blocks() < before, "the host has the memory back");
    }

    #[test]
    fn a_file_with_a_name_is_not_touched() {
        for dir in [
            tempfile::tempdir().unwrap(),
            tempfile::tempdir_in("/dev/shm").unwrap(),
        ] {
            let path = dir.path().join("data");
            for shared in [true, false] {
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(&path)
                    .unwrap();
                file.set_len(MIB).unwrap();
                let (table, ram) = ram([region("pmem0", 0, MIB, of_file(file, 0, shared))]);
                assert_eq!(table.discard(0, MIB), kept(MIB));
                let memory = ram.view().memory();
                for at in [0, MIB / 2, MIB - 1] {
                    assert_eq!(byte(&memory, at), 0x5a);
                }
                let holds_it = std::fs::read(&path).unwrap().iter().all(|b| *b == 0x5a);
                assert_eq!(holds_it, shared);
            }
        }
    }

    #[test]
    fn parts_of_pages_are_kept() {
        let (table, ram) = ram([region("z0", 0, MIB, anonymous())]);
        assert_eq!(table.discard(1, PAGE), kept(PAGE));
        assert_eq!(
            table.discard(PAGE - 1, 2 * PAGE),
            Discarded {
                done: PAGE,
                kept: PAGE,
                outside: 0
            }
        );
        let memory = ram.view().memory();
        assert_eq!(byte(&memory, PAGE - 1), 0x5a);
        assert_eq!(byte(&memory, PAGE), 0);
        assert_eq!(byte(&memory, 2 * PAGE), 0x5a);
        assert_eq!(table.discard(0, 0), Discarded::default());
    }

    #[test]
    fn addresses_outside_are_counted_and_harmless() {
        let (table, _ram) = ram([
            region("z0", 0, MIB, anonymous()),
            region("z0", 2 * MIB, MIB, anonymous()),
        ]);
        let outside = |outside| Discarded {
            outside,
            ..Discarded::default()
        };
        assert_eq!(table.discard(MIB, MIB), outside(MIB));
        assert_eq!(table.discard(u64::MAX - 5, 100), outside(100));
        assert_eq!(table.discard(u64::MAX, u64::MAX), outside(u64::MAX));
        // Across both, and what lies between and behind.
        let all = table.discard(0, u64::MAX);
        assert_eq!(all.done, 2 * MIB);
        assert_eq!(all.outside, u64::MAX - 2 * MIB);
    }

    #[test]
    fn huge_pages_are_given_back_whole_or_not() {
        let huge = 2 * MIB;
        assert_eq!(whole_pages(PAGE, huge, huge), (huge, huge));
        assert_eq!(whole_pages(0, huge - 1, huge), (0, 0));
        assert_eq!(whole_pages(PAGE, 3 * huge + PAGE, huge), (huge, 3 * huge));
        let (from, to) = whole_pages(u64::MAX - 1, u64::MAX, huge);
        assert!(from >= to);
    }

    #[test]
    fn nothing_is_discarded_while_it_is_forbidden() {
        let (table, ram) = ram([region("z0", 0, MIB, anonymous())]);
        let (first, second) = (table.forbid(), table.forbid());
        assert_eq!(table.discard(0, PAGE), kept(PAGE));
        drop(first);
        assert_eq!(table.discard(0, PAGE), kept(PAGE));
        assert_eq!(byte(&ram.view().memory(), 0), 0x5a);
        drop(second);
        assert_eq!(table.discard(0, PAGE), done(PAGE));
    }

    #[test]
    fn a_region_that_is_gone_is_outside() {
        let (table, mut ram) = ram([region("z0", 0, MIB, anonymous())]);
        let region = ram.detach(Gpa(0)).unwrap();
        assert_eq!(table.discard(0, PAGE).outside, PAGE);
        assert_eq!(region.holders(), 1);
        region.release().unwrap();
    }

    #[test]
    fn somebody_elses_lease_comes_back() {
        let table = DiscardTable::new();
        let mut consumer = table.consumer();
        let region = region("z0", 0, MIB, anonymous());
        let _ = consumer.attach(&region).unwrap();
        let wrong = Lease(Box::new("not mine"));
        assert!(consumer.detach(&region, wrong).is_err());
        assert_eq!(table.discard(0, PAGE), done(PAGE));
    }

    #[test]
    fn memory_comes_and_goes_while_it_is_discarded() {
        let table = DiscardTable::new();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    table.discard(0, 2 * MIB);
                }
            });
            let mut ram = Ram::new(vec![table.consumer()]);
            for _ in 0..200 {
                ram.attach(region("z0", 0, MIB, anonymous())).unwrap();
                ram.attach(region("z1", MIB, MIB, anonymous())).unwrap();
                let (regions, stuck) = ram.detach_all();
                assert!(stuck.is_empty());
                for region in regions {
                    region.release().unwrap();
                }
            }
            over.store(true, Ordering::Relaxed);
        });
    }

    proptest! {
        /// Whatever is asked for: the parts add up, and exactly the whole pages inside of what was asked are zero.
        #[test]
        fn the_parts_add_up(gpa in 0..8 * PAGE, len in 0..8 * PAGE) {
            let (table, ram) = ram([
                region("z0", PAGE, 2 * PAGE, anonymous()),
                region("z1", 4 * PAGE, 2 * PAGE, anonymous()),
            ]);
            let told = table.discard(gpa, len);
            prop_assert_eq!(told.done + told.kept + told.outside, len);
            let memory = ram.view().memory();
            let mut zeroed = 0;
            for page in [1, 2, 4, 5].map(|n| n * PAGE) {
                let whole = gpa <= page && page + PAGE <= gpa + len;
                zeroed += u64::from(whole) * PAGE;
                for at in [page, page + PAGE - 1] {
                    prop_assert_eq!(byte(&memory, at) == 0, whole);
                }
            }
            prop_assert_eq!(told.done, zeroed);
        }
    }
}
