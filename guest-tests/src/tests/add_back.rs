//! What the host took away comes back under the same name, again and again, and the VMM is as it was.

use super::passthrough::{is_driven, keeps_blocks, word};
use super::remote::Remote;
use super::removal::{REMOVAL_DEADLINE, bind, unbind_goes_through};
use super::support::{
    self, MIB, comes_back_to, dax_zone, eventually, no_complaints, power_off, scratch, spec_on,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::bench::removal::scene::NO_LATE_ZEROS;
use crate::guest::Guest;
use crate::host::account::{
    DmaWatch, Memlock, Pins, descriptors, kernel_says, mappings, memlock, pins, threads,
};
use crate::host::cards::Card;
use crate::host::figures::rss_anon_of_small_pages;
use crate::host::passthrough::Binding;
use crate::share::Initramfs;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "pmem_that_was_taken_away_is_added_back_again_and_again",
        run: pmem,
    },
    GuestTest {
        name: "passthrough_device_that_was_taken_away_is_added_back_again_and_again",
        run: device,
    },
];

const USUAL_CYCLES: u32 = 3;
const FULL_CYCLES: u32 = 100;
const PMEM_BYTES: u64 = 256 * MIB;
const PAGE_BYTES: u64 = 4096;
/// The allocator's own affair; a leak of a kilobyte in each of a hundred cycles is above it.
const RSS_ROOM_BYTES: u64 = 96 * 1024;
/// Has the allocator keep nothing for later by size: seven pieces of each of 64 sizes for each thread, which fill up over a
/// hundred cycles to more than that room.
const WITHOUT_CACHE: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0");
pub(super) const COMPLAINTS: [&str; 4] = ["WARNING:", "BUG:", "Bad page state", "Call Trace"];

/// What must not grow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Account {
    memlock: Memlock,
    descriptors: u64,
    mappings: u64,
    threads: u64,
    dma_bytes: u64,
}

impl support::Account for Account {
    fn is_back_to(&self, before: &Self) -> bool {
        self.memlock == before.memlock
            && self.dma_bytes == before.dma_bytes
            && self.descriptors <= before.descriptors
            && self.mappings <= before.mappings
            && self.threads <= before.threads
    }
}

struct Story<'a> {
    lab: &'a Lab,
    remote: Remote,
    guest: Guest,
    watch: DmaWatch,
    complaints: usize,
    /// After the first cycle.
    first: Option<(Account, u64)>,
}

impl<'a> Story<'a> {
    /// A guest with RAM on the first dax device and these devices.
    fn begin(lab: &'a Lab, bindings: &[&Binding]) -> Result<Self, TestError> {
        scratch(lab)?;
        let remote = Remote::new();
        let mut spec = spec_on(lab, &[&dax_zone(lab, "z0", 0, 512 * MIB, 0)]);
        spec.initramfs = Initramfs::Tools;
        let (name, value) = WITHOUT_CACHE;
        spec.env.push((name.to_owned(), value.to_owned()));
        let words = ["--api-socket", remote.socket()].map(str::to_owned);
        spec.arguments.extend(words);
        for binding in bindings {
            spec.arguments
                .extend(["--device".to_owned(), word(binding)]);
        }
        let watch = DmaWatch::begin(&lab.host)?;
        let complaints = kernel_says(&lab.host, &COMPLAINTS)?.len();
        let mut guest = Guest::boot(&lab.host, &spec)?;
        guest.modprobe_pmem()?;
        guest.modprobe(&["nvme"])?;
        guest.sh("mkdir -p /mnt")?;
        Ok(Self {
            lab,
            remote,
            guest,
            watch,
            complaints,
            first: None,
        })
    }

    fn account(&mut self) -> Result<Account, TestError> {
        let (host, pid) = (&self.lab.host, self.guest.vmm().pid());
        Ok(Account {
            memlock: memlock(host, pid)?,
            descriptors: descriptors(host, pid)?,
            mappings: mappings(host, pid)?,
            threads: threads(host, pid)?,
            dma_bytes: self.watch.read()?.live_bytes(),
        })
    }

    /// With nothing of the device left, all is as after the first cycle.
    fn is_as_before(&mut self, cycle: u32) -> Result<(), TestError> {
        let pid = self.guest.vmm().pid();
        let Some((first, rss)) = self.first else {
            self.first = Some((
                self.account()?,
                rss_anon_of_small_pages(&self.lab.host, pid)?,
            ));
            return Ok(());
        };
        let what = format!("cycle {cycle}: the accounts are as after the first one");
        comes_back_to(&what, &first, || self.account())?;
        let now = rss_anon_of_small_pages(&self.lab.host, pid)?;
        claim(now <= rss + RSS_ROOM_BYTES, || {
            format!(
                "cycle {cycle}: the VMM's own memory was {rss} bytes after the first one, it is {now}"
            )
        })
    }

    fn is_forgotten(&self, id: &str) -> Result<(), TestError> {
        eventually(&format!("{id} is no part of the VM any more"), || {
            Ok(!self.remote.knows(self.lab, id)?)
        })
    }

    fn end(mut self) -> Result<(), TestError> {
        no_complaints(&mut self.guest)?;
        power_off(self.guest)?;
        self.watch.end()?;
        let said = kernel_says(&self.lab.host, &COMPLAINTS)?;
        claim(said.len() == self.complaints, || {
            format!("the host's kernel complains: {said:?}")
        })
    }
}

fn cycles(lab: &Lab) -> u32 {
    if lab.full { FULL_CYCLES } else { USUAL_CYCLES }
}

/// With a drive that reaches it each time: memory is pinned as often as it comes, and what was synced is there each time.
fn pmem(lab: &mut Lab) -> Result<(), TestError> {
    let drive = lab.host.bind_vfio(Card::Disk)?;
    let dax = lab.host.dax()[1].clone();
    let mut story = Story::begin(lab, &[&drive])?;
    let pages = PMEM_BYTES / PAGE_BYTES;
    for cycle in 0..cycles(lab) {
        let before = pins(&lab.host)?;
        let word = format!("file={},size={PMEM_BYTES},id=p0", dax.path);
        let address = story.remote.add(lab, "add-pmem", &word)?;
        pinned_once(before, pins(&lab.host)?, pages)?;
        let guest = &mut story.guest;
        guest.await_path("/dev/pmem0")?;
        if cycle == 0 {
            guest.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 -E {NO_LATE_ZEROS} /dev/pmem0"
            ))?;
        }
        guest.sh("mount -t ext4 -o dax /dev/pmem0 /mnt")?;
        if let Some(last) = cycle.checked_sub(1) {
            let found = guest.cat("/mnt/cycle")?;
            claim(found.trim() == last.to_string(), || {
                format!("cycle {last} was synced, cycle {cycle} finds {found}")
            })?;
        }
        guest.sh(&format!("echo {cycle} > /mnt/cycle && sync && umount /mnt"))?;

        unbind_goes_through(lab, guest, &dax)?;
        bind(lab, &dax.name)?;
        guest.await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
        story.is_forgotten("p0")?;
        story.is_as_before(cycle)?;
    }
    story.end()?;
    Ok(drive.release()?)
}

/// Each page of it once, however the kernel counts huge ones. Whether they are let go of one by one is the kernel's
/// affair (type1 does not with device-dax), and no use of a VMM's can change it.
fn pinned_once(before: Pins, after: Pins, pages: u64) -> Result<(), TestError> {
    /// Others pin a page for a moment: the VMM's own look at whether its memory is there does.
    const BY_OTHERS: u64 = 256;
    let acquired = after.acquired - before.acquired;
    claim((1..=pages + BY_OTHERS).contains(&acquired), || {
        format!("{pages} pages came, {acquired} were pinned")
    })
}

fn device(lab: &mut Lab) -> Result<(), TestError> {
    let drive = lab.host.bind_vfio(Card::Disk)?;
    let place = drive.device().address.clone();
    let mut story = Story::begin(lab, &[])?;
    for cycle in 0..cycles(lab) {
        let address = story.remote.add(lab, "add-device", &word(&drive))?;
        let guest = &mut story.guest;
        guest.await_path(&format!("/sys/bus/pci/devices/{address}"))?;
        is_driven(guest, Card::Disk)?;
        keeps_blocks(guest, "/dev/nvme0n1", MIB, u64::from(cycle))?;

        let unbind = format!("echo {place} > /sys/bus/pci/drivers/vfio-pci/unbind");
        let gone = lab
            .host
            .run_within(&["sh", "-c", &unbind], REMOVAL_DEADLINE)?;
        claim(gone.status.success(), || {
            format!("cycle {cycle}: {place} does not go: {gone:?}")
        })?;
        let bind = format!("echo {place} > /sys/bus/pci/drivers/vfio-pci/bind");
        lab.host.sh(&bind)?;
        guest.await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
        story.is_forgotten(Card::Disk.id())?;
        story.is_as_before(cycle)?;
    }
    story.end()?;
    Ok(drive.release()?)
}
