//! What a guest has been told is durable is there after its end, however sudden.
//!
//! The guest writes records to a file system on persistent memory and prints, for each, that the kernel has made it durable.
//! Its VMM, or the whole emulated host, is killed at a moment that nobody chose; the next guest looks.

use std::time::{SystemTime, UNIX_EPOCH};

use lab_agent::guest_protocol::pattern_word;

use super::pmem::{boot_with_pmem, make_file_system, mount_file_system};
use super::support::{GIB, MIB, no_complaints, power_off};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::host::machine::{Contents, Dimm, Machine, PageArray};
use crate::host::process::SIGKILL;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "acknowledged_records_outlive_a_killed_vmm",
        run: acknowledged_records_outlive_a_killed_vmm,
    },
    GuestTest {
        name: "acknowledged_records_outlive_the_host",
        run: acknowledged_records_outlive_the_host,
    },
];

/// More records than any round lets be written.
const RECORDS: u64 = 4096;
/// The kill comes somewhere after one of so many records.
const LAST_AWAITED: u64 = 60;
const FILE: &str = "/mnt/records";

/// A file system and a way to write to it.
type Story = (&'static str, &'static str);

const STORIES: [Story; 6] = [
    ("ext4-dax", "map"),
    ("xfs-dax", "append"),
    ("ext4", "append"),
    ("xfs", "map"),
    ("ext4-dax", "append"),
    ("xfs-dax", "map"),
];
/// Of which so many are told by default.
const USUAL_ROUNDS: usize = 4;
const FULL_ROUNDS: usize = 60;

/// What the next guest has to find.
#[derive(Debug)]
struct Promise {
    story: Story,
    seed: u64,
    awaited: u64,
    records: u64,
}

fn acknowledged_records_outlive_a_killed_vmm(lab: &mut Lab) -> Result<(), TestError> {
    let word = format!("file={},size=1G,id=p0", lab.host.dax()[1].path);
    let rounds = if lab.full { FULL_ROUNDS } else { USUAL_ROUNDS };
    let mut promise = None;
    for round in 0..rounds {
        let mut guest = boot_with_pmem(lab, &["--pmem", &word])?;
        if let Some(promise) = promise.take() {
            keeps(&mut guest, &promise)?;
        }
        let story = STORIES[round % STORIES.len()];
        let (seed, awaited) = write_until_some_moment(&mut guest, story)?;
        guest.vmm().signal(SIGKILL)?;
        guest.wait_end()?;
        // All that it has printed is here now.
        promise = Some(Promise {
            story,
            seed,
            awaited,
            records: guest.acknowledged_records(),
        });
    }
    let mut guest = boot_with_pmem(lab, &["--pmem", &word])?;
    if let Some(promise) = promise {
        keeps(&mut guest, &promise)?;
    }
    no_complaints(&mut guest)?;
    power_off(guest)
}

/// The memory module's contents stay in a file of this machine; the emulated host loses power, another one is booted on it.
fn acknowledged_records_outlive_the_host(lab: &mut Lab) -> Result<(), TestError> {
    let file = lab.setup.file(&lab.kernel, "nvdimm");
    let story = ("ext4-dax", "append");
    let power_cycle = || {
        let (host, word) = boot_host(lab, Contents::New(file.clone()))?;
        let mut guest = boot_with_pmem(&host, &["--pmem", &word])?;
        let (seed, awaited) = write_until_some_moment(&mut guest, story)?;
        // What this side has read by now is a part of what was promised.
        let records = guest.acknowledged_records();
        let evidence = host.host.evidence();
        drop(host);
        drop(guest);
        let promise = Promise {
            story,
            seed,
            awaited,
            records,
        };
        claim(promise.records > awaited, || {
            format!("{promise:?}\n{evidence}")
        })?;
        let (host, word) = boot_host(lab, Contents::Kept(file.clone()))?;
        let look = || {
            let mut guest = boot_with_pmem(&host, &["--pmem", &word])?;
            keeps(&mut guest, &promise)?;
            no_complaints(&mut guest)?;
            power_off(guest)
        };
        look().map_err(|error: TestError| {
            TestError::Claim(format!(
                "on the second host: {}\n{}",
                crate::suite::chain(&error),
                host.host.evidence()
            ))
        })
    };
    let outcome = power_cycle();
    // There is none when its host could not be started.
    let _ = std::fs::remove_file(&file);
    outcome
}

/// Another host, with RAM for a guest on its first dax device and the module in question as its second; and the word for it.
fn boot_host(lab: &Lab, contents: Contents) -> Result<(Lab, String), TestError> {
    let dimm = |size_bytes, contents| Dimm {
        size_bytes,
        align_bytes: 2 * MIB,
        page_array: PageArray::Memory,
        contents,
    };
    let name = match contents {
        Contents::Kept(_) => "second-host",
        Contents::Fresh | Contents::New(_) => "first-host",
    };
    let machine = Machine {
        memory_bytes: 2 * GIB,
        dimms: vec![dimm(GIB, Contents::Fresh), dimm(GIB, contents)],
        ..Machine::default()
    };
    let host = lab.setup.boot_beside(&lab.kernel, machine, name)?;
    let word = format!("file={},id=p0", host.dax()[1].path);
    let lab = Lab {
        host,
        kernel: lab.kernel.clone(),
        full: lab.full,
        setup: std::sync::Arc::clone(&lab.setup),
    };
    Ok((lab, word))
}

/// Makes a file system, starts to write, and returns when some number of records is acknowledged: the seed, and the record.
fn write_until_some_moment(guest: &mut Guest, story: Story) -> Result<(u64, u64), TestError> {
    let (kind, how) = story;
    make_file_system(guest, kind)?;
    mount_file_system(guest, kind)?;
    let seed = somewhat_random();
    let awaited = pattern_word(seed, 1) % LAST_AWAITED;
    guest.start_records(FILE, seed, how, RECORDS)?;
    guest.await_record(awaited)?;
    Ok((seed, awaited))
}

fn keeps(guest: &mut Guest, promise: &Promise) -> Result<(), TestError> {
    claim(
        (promise.awaited + 1..RECORDS).contains(&promise.records),
        || format!("the guest was killed too late or too early to tell anything: {promise:?}"),
    )?;
    mount_file_system(guest, promise.story.0)?;
    let found = guest.check_records(FILE, promise.seed)?;
    claim(found.records >= promise.records, || {
        format!("{promise:?}, but the next guest finds {found:?}")
    })?;
    guest.sh("umount /mnt")?;
    Ok(())
}

/// Another number in every round of every run; failures tell it.
fn somewhat_random() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::from(since.subsec_nanos()))
}
