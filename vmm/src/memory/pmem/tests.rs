use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::{NamedTempFile, TempDir};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::memory::snapshot::Snapshot;

const GIB: u64 = 1 << 30;

fn file(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn spec(file: &Path) -> PmemSpec {
    PmemSpec {
        id: "p0".into(),
        file: file.to_owned(),
        ..PmemSpec::default()
    }
}

fn open(spec: &PmemSpec) -> Result<PmemBacking, PmemOpenError> {
    PmemBacking::open(&Host::system(), spec)
}

fn refusal(spec: &PmemSpec) -> String {
    let error = open(spec).unwrap_err();
    let source = std::error::Error::source(&error);
    let text = format!(
        "{error}: {}",
        source.map(ToString::to_string).unwrap_or_default()
    );
    assert!(text.starts_with("pmem p0"), "{text}");
    text
}

fn guest(region: &Region) -> Snapshot {
    Snapshot::of(vec![region.guest_region()]).unwrap()
}

/// Where a host's files are. Its device's memory is `/dev/zero`, of which there is one: tests that lock ranges of it come one
/// after the other.
struct Root {
    dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Root {
    fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        Self {
            _alone: ALONE.lock().unwrap_or_else(PoisonError::into_inner),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// A host with one dax device, whose memory is `/dev/zero`.
fn dax_host(align: u64, size: u64, nd: bool) -> (Root, Host, PathBuf) {
    let root = Root::new();
    let (sys, dev) = (root.path().join("sys"), root.path().join("dev"));
    let parent = if nd {
        "devices/ndbus0/region0/dax0.0"
    } else {
        "devices/platform/hmem.0"
    };
    let device = sys.join(parent).join("dax0.0");
    fs::create_dir_all(&dev).unwrap();
    fs::create_dir_all(sys.join("dev/char")).unwrap();
    fs::create_dir_all(&device).unwrap();
    let region = sys.join(parent).join("dax_region");
    fs::create_dir_all(&region).unwrap();
    for (dir, name, text) in [
        (&device, "dev", "1:5".to_owned()),
        (&device, "size", size.to_string()),
        (&device, "align", align.to_string()),
        (&region, "id", "0".to_owned()),
        (&region, "size", size.to_string()),
    ] {
        fs::write(dir.join(name), text + "\n").unwrap();
    }
    if nd {
        let nd_region = sys.join("devices/ndbus0/region0");
        symlink(sys.join("bus/nd"), nd_region.join("subsystem")).unwrap();
        fs::write(nd_region.join("persistence_domain"), "memory_controller\n").unwrap();
        fs::write(nd_region.join("deep_flush"), "1\n").unwrap();
    }
    symlink(sys.join("bus/dax"), device.join("subsystem")).unwrap();
    symlink(
        sys.join("bus/dax/drivers/device_dax"),
        device.join("driver"),
    )
    .unwrap();
    symlink(&device, sys.join("dev/char/1:5")).unwrap();
    let node = dev.join("dax0.0");
    symlink("/dev/zero", &node).unwrap();
    let host = Host::at(sys, dev, "/proc");
    (root, host, node)
}

#[test]
fn a_file_is_guest_memory_and_keeps_what_the_guest_wrote() {
    let file = file(4 * MIB);
    let mut backing = open(&PmemSpec {
        offset: 2 * MIB,
        ..spec(file.path())
    })
    .unwrap();
    assert_eq!((backing.size(), backing.align()), (2 * MIB, 2 * MIB));
    assert_eq!(backing.placement_align(), 128 * MIB);
    let region = backing.map(Gpa(4 * GIB)).unwrap();
    assert_eq!((region.zone(), region.gpa()), ("p0", Gpa(4 * GIB)));
    assert_eq!(region.host_address() % (2 * MIB), 0);
    let written = b"acknowledged";
    guest(&region)
        .write_slice(written, GuestAddress(4 * GIB + 4096))
        .unwrap();
    backing.flusher().flush().unwrap();
    let mut found = [0; 12];
    file.as_file()
        .read_exact_at(&mut found, 2 * MIB + 4096)
        .unwrap();
    assert_eq!(&found, written);
    region.release().unwrap();
}

#[test]
fn discarded_writes_do_not_reach_the_file() {
    let file = file(2 * MIB);
    let mut backing = open(&PmemSpec {
        discard_writes: true,
        ..spec(file.path())
    })
    .unwrap();
    let region = backing.map(Gpa(GIB)).unwrap();
    guest(&region).write_obj(7u8, GuestAddress(GIB)).unwrap();
    backing.flusher().flush().unwrap();
    let mut found = [0xff];
    file.as_file().read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, [0]);
}

#[test]
fn a_file_has_one_writer_or_several_that_discard() {
    let file = file(8 * MIB);
    let half = |offset| PmemSpec {
        size: Some(4 * MIB),
        offset,
        ..spec(file.path())
    };
    let discarding = PmemSpec {
        discard_writes: true,
        ..half(0)
    };
    let writer = open(&half(0)).unwrap();
    assert!(refusal(&half(0)).contains("in use by process"));
    assert!(refusal(&discarding).contains("in use by process"));
    let _other_half = open(&half(4 * MIB)).unwrap();
    drop(writer);
    let _one = open(&discarding).unwrap();
    let _two = open(&discarding).unwrap();
    assert!(refusal(&half(0)).contains("in use"));
}

#[test]
fn the_lock_lives_as_long_as_the_mapping() {
    let file = file(2 * MIB);
    let mut backing = open(&spec(file.path())).unwrap();
    let region = backing.map(Gpa(GIB)).unwrap();
    drop(backing);
    refusal(&spec(file.path()));
    region.release().unwrap();
    open(&spec(file.path())).unwrap();
}

#[test]
fn a_file_of_memory_works_too() {
    let memfd = super::super::mapping::memfd(2 * MIB, None).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd));
    let mut backing = open(&spec(Path::new(&path))).unwrap();
    backing.map(Gpa(GIB)).unwrap().release().unwrap();
    backing.flusher().flush().unwrap();
}

#[test]
fn what_is_not_memory_is_named_with_what_mends_it() {
    let dir = tempfile::tempdir().unwrap();
    let missing = refusal(&spec(&dir.path().join("none")));
    assert!(missing.contains("does not exist"), "{missing}");
    assert!(missing.contains("truncate -s 1G"), "{missing}");
    let directory = refusal(&spec(dir.path()));
    assert!(directory.contains("is a directory"), "{directory}");
    let other = refusal(&spec(Path::new("/dev/null")));
    assert!(
        other.contains("another driver's character device"),
        "{other}"
    );
}

#[test]
fn sizes_and_offsets_that_can_not_be_are_refused() {
    let (empty, odd, good) = (file(0), file(3 * MIB), file(4 * MIB));
    let text = refusal(&spec(empty.path()));
    assert!(text.contains("nothing of"), "{text}");
    let text = refusal(&spec(odd.path()));
    assert!(
        text.contains("the size 3M") && text.contains("truncate -s %2M"),
        "{text}"
    );
    for (size, offset, says) in [
        (Some(0), 0, "nothing of"),
        (None, 4 * MIB, "nothing of"),
        (None, u64::MAX, "nothing of"),
        (Some(6 * MIB), 0, "past the end"),
        (Some(4 * MIB), 2 * MIB, "past the end"),
        (Some(u64::MAX), 2 * MIB, "past the end"),
        (Some(MIB), 0, "the size 1M"),
        (Some(2 * MIB), MIB, "the offset 1M"),
    ] {
        let text = refusal(&PmemSpec {
            size,
            offset,
            ..spec(good.path())
        });
        assert!(text.contains(says), "size {size:?} offset {offset}: {text}");
        assert_eq!(good.as_file().metadata().unwrap().len(), 4 * MIB);
    }
}

#[test]
fn a_file_that_can_not_be_written_is_for_discarding_guests() {
    // Read-only for root too.
    let file = Path::new("/sys/kernel/uevent_seqnum");
    let text = refusal(&spec(file));
    assert!(text.contains("give discard_writes=on"), "{text}");
    // Taken for what it is: its size is the next complaint.
    let text = refusal(&PmemSpec {
        discard_writes: true,
        ..spec(file)
    });
    assert!(text.contains("the size 4K"), "{text}");
}

#[test]
fn device_dax_is_mapped_with_its_alignment_and_flushed_deep() {
    for (align, placement) in [(2 * MIB, 128 * MIB), (4096, 128 * MIB), (GIB, GIB)] {
        let (root, host, node) = dax_host(align, 3 * GIB, true);
        let part = PmemSpec {
            size: Some(GIB),
            ..spec(&node)
        };
        let mut backing = PmemBacking::open(&host, &part).unwrap();
        assert_eq!((backing.size(), backing.align()), (GIB, align));
        assert_eq!(backing.placement_align(), placement);
        let region = backing.map(Gpa(4 * GIB)).unwrap();
        assert!(matches!(region.mapping(), Mapping::Dax(_)));
        assert_eq!(region.host_address() % align, 0);
        let attribute = root.path().join("sys/devices/ndbus0/region0/deep_flush");
        fs::write(&attribute, "?").unwrap();
        backing.flusher().flush().unwrap();
        assert_eq!(fs::read_to_string(&attribute).unwrap(), "1");
        region.release().unwrap();
    }
}

#[test]
fn a_whole_device_is_as_many_units_as_it_has() {
    let (_root, host, node) = dax_host(4096, 64 * MIB + 4096, true);
    let backing = PmemBacking::open(&host, &spec(&node)).unwrap();
    assert_eq!(backing.size(), 64 * MIB);
}

#[test]
fn a_range_of_a_device_is_had_once() {
    let (_root, host, node) = dax_host(2 * MIB, GIB, false);
    let mut backing = PmemBacking::open(&host, &spec(&node)).unwrap();
    let _region = backing.map(Gpa(4 * GIB)).unwrap();
    let error = backing.map(Gpa(8 * GIB)).unwrap_err();
    assert!(matches!(error, PmemMapError::Lock { .. }), "{error:?}");
}

#[test]
fn a_range_of_a_pool_is_held_from_the_moment_it_was_taken() {
    let (_root, host, node) = super::super::testing::dax_host("/dev/null");
    let pool = daxhund_dax::Pool::new("p", vec![node]);
    let before = pool.take(&host, Wanted::bytes(4 * MIB)).unwrap();
    let lock = pool.take(&host, PmemBacking::wanted(8 * MIB)).unwrap();
    let (device, range) = (lock.opened(), lock.range());
    let backing = PmemBacking::of_range("p0", lock, None).unwrap();
    assert_eq!((backing.size(), range.offset()), (8 * MIB, 4 * MIB));
    drop(before);
    device.lock(range, LockKind::Exclusive).unwrap_err();
    drop(backing);
    drop(device.lock(range, LockKind::Exclusive).unwrap());
}

#[test]
fn ranges_a_device_can_not_give_are_refused() {
    let (_root, host, node) = dax_host(4096, GIB, false);
    let refused = |spec: PmemSpec| PmemBacking::open(&host, &spec).unwrap_err();
    let error = refused(PmemSpec {
        discard_writes: true,
        ..spec(&node)
    });
    assert!(error.to_string().contains("always shared"), "{error}");
    for (size, offset) in [
        (Some(2 * GIB), 0),
        (Some(0), 0),
        (None, GIB),
        (None, u64::MAX - 4095),
        (Some(2 * MIB), 100),
    ] {
        let error = refused(PmemSpec {
            size,
            offset,
            ..spec(&node)
        });
        assert!(matches!(error, PmemOpenError::Range { .. }), "{error:?}");
    }
    // What the device could give, but no guest takes.
    let error = refused(PmemSpec {
        size: Some(2 * MIB + 4096),
        ..spec(&node)
    });
    assert!(
        error.to_string().contains("not a multiple of 2M"),
        "{error}"
    );
    let error = refused(PmemSpec {
        size: Some(2 * MIB),
        offset: 4096,
        ..spec(&node)
    });
    assert!(error.to_string().contains("the offset 4K"), "{error}");
}

#[test]
fn an_fsync_error_is_reported_and_stays() {
    // A write to /dev/full fails, and it has no fsync: EINVAL, as a device-dax device would answer.
    let full = Arc::new(File::options().write(true).open("/dev/full").unwrap());
    let flush = FileFlush::new(full);
    let error = flush.flush().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    let mended = FileFlush {
        file: Arc::new(tempfile::tempfile().unwrap()),
        failed: flush.failed,
    };
    let error = mended.flush().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn what_is_lent_is_seen_for_what_it_is() {
    let host = Host::system();
    let lent = |file: &File, size, offset| {
        let spec = PmemSpec {
            size: Some(size),
            offset,
            ..spec(Path::new("lent"))
        };
        PmemBacking::lent(&host, &spec, file.try_clone().unwrap())
    };
    let good = file(4 * MIB);
    let mut backing = lent(good.as_file(), 2 * MIB, 2 * MIB).unwrap();
    let region = backing.map(Gpa(4 * GIB)).unwrap();
    // What the lender has locked is ours as well, and nobody else's.
    assert_eq!(region.shared_file().unwrap().1, 2 * MIB);
    let theirs = File::options().read(true).write(true).open(good.path());
    let error = lent(&theirs.unwrap(), 2 * MIB, 2 * MIB).unwrap_err();
    assert!(matches!(error, PmemOpenError::Lock { .. }), "{error:?}");
    region.release().unwrap();

    for (size, offset, says) in [
        (8 * MIB, 0, "past the end"),
        (2 * MIB, 4 * MIB, "nothing of"),
        (u64::MAX - MIB, 2 * MIB, "past the end"),
        (MIB, 0, "the size 1M"),
        (2 * MIB, MIB, "the offset 1M"),
    ] {
        let error = lent(good.as_file(), size, offset).unwrap_err().to_string();
        assert!(error.contains(says), "{size:#x} at {offset:#x}: {error}");
    }
    for (path, says) in [("/dev/null", "character device"), ("/", "a directory")] {
        let error = lent(&File::open(path).unwrap(), 2 * MIB, 0).unwrap_err();
        let error = crate::chain(&error);
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn what_is_lent_for_reading_is_the_guests_alone_and_shared_with_other_readers() {
    let host = Host::system();
    let (_root, dax, node) = dax_host(2 * MIB, GIB, false);
    let file = file(4 * MIB);
    for (host, path) in [(&host, file.path()), (&dax, &node)] {
        let spec = PmemSpec {
            size: Some(4 * MIB),
            dma: Some(true),
            ..spec(path)
        };
        let read = || {
            let mut backing = PmemBacking::lent(host, &spec, File::open(path).unwrap()).unwrap();
            backing.map(Gpa(4 * GIB)).unwrap()
        };
        let readers = [read(), read()];
        for region in &readers {
            assert!(region.is_read_only() && !region.dma().is_reachable());
            let devices = Snapshot::of(vec![region.guest_region()]).unwrap();
            let at = GuestAddress(4 * GIB);
            devices.read_obj::<u8>(at).unwrap_err();
            devices.write_obj(1u8, at).unwrap_err();
            devices.get_host_address(at).unwrap_err();
        }
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        for region in readers {
            let start = format!("{:x}-", region.host_address());
            let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
            assert!(line.contains(" r--s "), "{line}");
            region.release().unwrap();
        }
    }
}

#[test]
fn a_part_of_device_dax_that_is_lent_is_device_dax_and_stays_locked() {
    let (_root, host, node) = dax_host(2 * MIB, GIB, false);
    let open = || {
        let file = File::options().read(true).write(true).open(&node);
        file.unwrap()
    };
    let part = |size, offset| PmemSpec {
        size: Some(size),
        offset,
        ..spec(Path::new("lent"))
    };
    let lent =
        |file: &File, spec: &PmemSpec| PmemBacking::lent(&host, spec, file.try_clone().unwrap());
    let lender = open();
    let mut backing = lent(&lender, &part(64 * MIB, 0)).unwrap();
    let region = backing.map(Gpa(4 * GIB)).unwrap();
    assert!(matches!(region.mapping(), Mapping::Dax(_)));
    drop(backing);
    region.release().unwrap();
    // Ours is gone, and the lender still has what it has locked.
    let mut other = lent(&open(), &part(64 * MIB, 0)).unwrap();
    let error = other.map(Gpa(4 * GIB)).unwrap_err();
    assert!(matches!(error, PmemMapError::Lock { .. }), "{error:?}");
    drop(lender);
    let region = other.map(Gpa(4 * GIB)).unwrap();
    region.release().unwrap();
    for spec in [part(2 * GIB, 0), part(2 * MIB, GIB), part(2 * MIB, 4096)] {
        let error = lent(&open(), &spec).unwrap_err();
        assert!(matches!(error, PmemOpenError::Range { .. }), "{error:?}");
    }
}
