//! Real SIGBUS: a file is cut off under its mapping.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use super::testing::{BUS_MCEERR_AO, BUS_MCEERR_AR, poison as forge_poison, signal_stack};
use super::{Mapping, Region};
use crate::memory::incidents::{Cause, Incident};
use crate::memory::layout::Gpa;
use crate::memory::loss::{Epoch, Lost};
use crate::memory::mapping::{HostMapping, Source, memfd};
use crate::memory::sigbus::{Incidents, OnVcpuThread};
use crate::memory::snapshot::{Snapshot, SnapshotRegion};

const MIB: u64 = 1 << 20;

fn region(size: u64) -> (Arc<File>, Region) {
    let file = Arc::new(memfd(size, None).unwrap());
    let source = Source::File {
        file: Arc::clone(&file),
        offset: 0,
        shared: true,
    };
    let mapping = Mapping::Host(HostMapping::new(source, size, 4096).unwrap());
    (file, Region::new("z0", Gpa(0), mapping).unwrap())
}

/// The handler's notes are the process's: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn noted(at: u64) -> Vec<Incident> {
    let taken = Incidents::open().unwrap().take().incidents;
    taken.into_iter().filter(|i| i.host_address == at).collect()
}

/// A reader or writer that has begun: it has its slice, and looks at no mark any more.
fn begun(region: &Arc<SnapshotRegion>) -> VolatileSlice<'_> {
    region.as_volatile_slice().unwrap()
}

fn load(slice: &VolatileSlice<'_>, offset: u64) -> u8 {
    slice.read_obj(usize::try_from(offset).unwrap()).unwrap()
}

fn store(slice: &VolatileSlice<'_>, offset: u64, byte: u8) {
    let offset = usize::try_from(offset).unwrap();
    slice.write_obj(byte, offset).unwrap();
}

/// Where loads of a region's first byte go.
fn address(slice: &VolatileSlice<'_>) -> u64 {
    slice.ptr_guard().as_ptr() as u64
}

#[test]
fn a_touch_of_what_is_gone_is_survived_and_marked() {
    let _alone = alone();
    let (file, gone) = region(2 * MIB);
    let (_other_file, other) = region(2 * MIB);
    let (guest, other_guest) = (gone.guest_region(), other.guest_region());
    let (in_gone, in_other) = (begun(&guest), begun(&other_guest));
    store(&in_gone, MIB, 7);
    store(&in_other, MIB, 8);
    let epoch = Epoch::now();
    file.set_len(0).unwrap();
    assert!(!gone.mark().is_lost(), "nobody has touched it");

    assert_eq!(load(&in_gone, MIB + 5), 0, "scratch");
    assert!(gone.mark().is_lost());
    assert_eq!(epoch.unbroken(), Err(Lost));
    assert!(!other.mark().is_lost());
    assert_eq!(load(&in_other, MIB), 8);
    let at = address(&in_gone) + MIB + 5;
    assert_eq!(gone.offset_of(at), Some(MIB + 5));
    assert_eq!(gone.offset_of(gone.host_address() + 3), Some(3));
    assert_eq!(other.offset_of(at), None);
    let expected = Incident {
        host_address: at,
        cause: Cause::Gone,
        vcpu: None,
    };
    assert_eq!(noted(at), [expected], "one for the whole region");
    guest.as_volatile_slice().unwrap_err();
    guest.get_host_address(MemoryRegionAddress(0)).unwrap_err();

    // All of it is scratch: nothing else in it faults, and nothing reaches a file that has grown again.
    store(&in_gone, 0, 1);
    store(&in_gone, 2 * MIB - 1, 1);
    file.set_len(2 * MIB).unwrap();
    store(&in_gone, 4096, 1);
    assert!(is_zero(&file));
    drop((guest, other_guest));
    gone.release().unwrap();
    other.release().unwrap();
}

/// What KVM and system calls have of a region is never scratch.
#[test]
fn the_kernel_finds_nothing_where_a_load_found_scratch() {
    let _alone = alone();
    let (file, gone) = region(MIB);
    let snapshot = Snapshot::of(vec![gone.guest_region()]).unwrap();
    let mut system = snapshot.system_slices(GuestAddress(0), 16);
    let slice = system.next().unwrap().unwrap();
    drop(system);
    let system = slice;
    let guest = gone.guest_region();
    store(&begun(&guest), 0, 0x5a);
    let (mut read, write) = std::io::pipe().unwrap();
    let slice = [&system];
    let sent = |slice: [&VolatileSlice<'_>; 1]| {
        let mut write = File::from(std::os::fd::OwnedFd::from(write.try_clone().unwrap()));
        slice[0].write_volatile_to(0, &mut write, 16)
    };
    assert_eq!(sent(slice).unwrap(), 16);
    let mut bytes = [0; 16];
    read.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[0], 0x5a);

    let in_gone = begun(&guest);
    file.set_len(0).unwrap();
    assert_eq!(load(&in_gone, 0), 0, "scratch");
    assert!(sent(slice).is_err());
    drop(write);
    assert_eq!(read.read(&mut bytes).unwrap(), 0, "nothing came");
    drop((guest, snapshot));
    gone.release().unwrap();
}

fn is_zero(file: &File) -> bool {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![1; usize::try_from(2 * MIB).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.iter().all(|byte| *byte == 0)
}

#[test]
fn many_threads_lose_many_regions_at_once() {
    const THREADS: usize = 8;
    let _alone = alone();
    let regions: Vec<_> = (0..4).map(|_| region(MIB)).collect();
    let ready = std::sync::Barrier::new(THREADS + 1);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (regions, ready) = (&regions, &ready);
            scope.spawn(move || {
                let guests: Vec<_> = regions.iter().map(|(_, r)| r.guest_region()).collect();
                let slices: Vec<_> = guests.iter().map(begun).collect();
                ready.wait();
                for round in 0..2000u64 {
                    for slice in &slices {
                        store(slice, (round * 4096 + thread as u64) % MIB, 1);
                        load(slice, (round * 4096) % MIB);
                    }
                }
            });
        }
        ready.wait();
        for (file, _) in &regions {
            file.set_len(0).unwrap();
        }
    });
    for (_, region) in regions {
        assert!(region.mark().is_lost());
        region.release().unwrap();
    }
}

/// Regions come and go while others are lost: the handler never works on one that is not there any more.
#[test]
fn the_table_can_change_while_memory_is_lost() {
    let _alone = alone();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..300 {
                    let (file, region) = region(64 << 10);
                    let guest = region.guest_region();
                    let slice = begun(&guest);
                    store(&slice, 4096, 1);
                    if round % 2 == 0 {
                        file.set_len(0).unwrap();
                        load(&slice, 8192);
                    }
                    drop(guest);
                    assert_eq!(region.mark().is_lost(), round % 2 == 0);
                    let mark = region.mark().clone();
                    region.release().unwrap();
                    assert_eq!(mark.holders(), 1);
                }
            });
        }
    });
}

#[test]
fn what_happens_on_a_vcpu_s_thread_says_so() {
    let _alone = alone();
    let (file, gone) = region(MIB);
    file.set_len(0).unwrap();
    let guest = gone.guest_region();
    let slice = begun(&guest);
    let on_vcpu = OnVcpuThread::enter(3);
    load(&slice, 9);
    drop(on_vcpu);
    let at = address(&slice) + 9;
    assert_eq!(noted(at).first().and_then(|i| i.vcpu), Some(3));
    forge_poison(BUS_MCEERR_AO, at, 12);
    assert_eq!(noted(at).first().map(|i| i.vcpu), Some(None), "no more");
    drop(guest);
    gone.release().unwrap();
}

/// The signals are forged: no page of the machine is poisoned for a test.
#[test]
fn poison_is_scratch_where_it_was_loaded_and_known_for_good() {
    let _alone = alone();
    let (_file, region) = region(8 * MIB);
    let guest = region.guest_region();
    let slice = begun(&guest);
    let (loads, system) = (address(&slice) + 2 * MIB, region.host_address() + 4 * MIB);
    for page in 0..2048 {
        store(&slice, page * 4096, 0x5a);
    }
    let poison = |at, touched, vcpu| Incident {
        host_address: at,
        cause: Cause::Poison { order: 12, touched },
        vcpu,
    };

    // Found by the host; nobody has touched it.
    forge_poison(BUS_MCEERR_AO, loads, 12);
    assert_eq!(noted(loads), [poison(loads, false, None)]);
    assert_eq!(load(&slice, 2 * MIB), 0x5a);
    assert_eq!(region.mark().check(2 * MIB, 1), Err(Lost));

    // KVM's guest has touched it, or a system call: no scratch for them.
    let on_vcpu = OnVcpuThread::enter(1);
    assert!(!on_vcpu.takes_poison());
    forge_poison(BUS_MCEERR_AR, system, 12);
    assert!(on_vcpu.takes_poison());
    assert!(!on_vcpu.takes_poison(), "once");
    drop(on_vcpu);
    forge_poison(BUS_MCEERR_AR, system, 12);
    let expected = [poison(system, true, Some(1)), poison(system, true, None)];
    assert_eq!(noted(system), expected);
    assert_eq!(load(&slice, 4 * MIB), 0x5a);
    assert_eq!(region.mark().check(4 * MIB, 1), Err(Lost));

    // A load of this process.
    forge_poison(BUS_MCEERR_AR, loads, 12);
    assert_eq!(noted(loads), [poison(loads, true, None)]);
    assert_eq!(load(&slice, 2 * MIB), 0, "scratch");
    assert_eq!(load(&slice, 2 * MIB + 4096), 0x5a);
    assert_eq!(load(&slice, 2 * MIB - 4096), 0x5a);
    assert!(!region.mark().is_lost());
    region.mark().check(0, 2 * MIB).unwrap();
    region.mark().check(2 * MIB + 4096, MIB).unwrap();
    guest
        .get_slice(MemoryRegionAddress(2 * MIB), 1)
        .unwrap_err();
    guest.get_slice(MemoryRegionAddress(0), 4096).unwrap();
    drop(guest);
    region.release().unwrap();
}

#[test]
fn poison_of_a_device_is_the_whole_entry_of_the_page_table() {
    let _alone = alone();
    let (_file, region) = region(8 * MIB);
    let guest = region.guest_region();
    let slice = begun(&guest);
    let start = address(&slice);
    assert_eq!(start % (2 * MIB), 0);
    let chunk = 2 * MIB;
    for at in [chunk - 4096, chunk, chunk + 2 * MIB] {
        store(&slice, at, 0x5a);
    }
    forge_poison(BUS_MCEERR_AR, start + chunk, 21);
    assert_eq!(load(&slice, chunk - 4096), 0x5a);
    assert_eq!(load(&slice, chunk), 0);
    assert_eq!(load(&slice, chunk + 2 * MIB), 0x5a);
    region.mark().check(0, chunk).unwrap();
    region.mark().check(chunk + 2 * MIB, 4096).unwrap();
    for at in [chunk, chunk + 2 * MIB - 1] {
        assert_eq!(region.mark().check(at, 1), Err(Lost));
    }
    drop(guest);
    region.release().unwrap();
}

#[test]
fn threads_have_a_stack_for_signals() {
    let size = std::thread::spawn(signal_stack).join().unwrap();
    assert!(
        size.is_some_and(|size| size >= libc::MINSIGSTKSZ),
        "{size:?}"
    );
}

/// What the next tests run: with this in its environment the test binary dies of it.
const CHILD: &str = "DAXHUND_TEST_SIGBUS";

/// How a process ends that does what `how` says.
fn end_of_child(how: &str) -> std::process::ExitStatus {
    let test = "memory::region::tests::a_sigbus_elsewhere_ends_the_process_as_ever";
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, how)
        .output()
        .unwrap()
        .status
}

fn die_of(how: &str) {
    let (_file, guarded) = region(MIB);
    load(&begun(&guarded.guest_region()), 0);
    match how {
        "touch" => {
            let file = memfd(MIB, None).unwrap();
            let offset = Some(vm_memory::FileOffset::new(file, 0));
            let memory = vm_memory::GuestRegionMmap::<()>::from_range(
                vm_memory::GuestAddress(0),
                4096,
                offset,
            )
            .unwrap();
            memory
                .get_mmap()
                .file_offset()
                .unwrap()
                .file()
                .set_len(0)
                .unwrap();
            let _: u8 = memory.read_obj(MemoryRegionAddress(0)).unwrap();
        }
        "raise" => signal_hook::low_level::raise(libc::SIGBUS).unwrap(),
        _ => unreachable!(),
    }
    // Never reached: what is checked is that the process has ended.
    std::process::exit(77);
}

#[test]
fn a_sigbus_elsewhere_ends_the_process_as_ever() {
    if let Ok(how) = std::env::var(CHILD) {
        die_of(&how);
    }
    for how in ["touch", "raise"] {
        let status = end_of_child(how);
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{how}: {status}");
    }
}
