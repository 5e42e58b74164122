//! Passed-through devices come to a running guest and go again, and the host's accounts are as they were.

use super::super::remote::Remote;
use super::super::support::{
    self, MIB, comes_back_to, eventually, no_complaints, power_off, scratch,
};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{By, COMPLAINTS, DRIVERS, is_driven, keeps_blocks, ram, spec, word};
use crate::guest::Guest;
use crate::host::account::{
    DmaWatch, Memlock, Pins, descriptors, kernel_says, memlock, pins, vfio_interrupts,
};
use crate::host::cards::Card;
use crate::host::passthrough::Binding;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_devices_come_and_go_on_dax_memory",
        run: |lab| on_dax(lab, By::Groups),
    },
    GuestTest {
        name: "passthrough_devices_come_and_go_on_plain_memory",
        run: |lab| on_plain_memory(lab, By::Groups),
    },
];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_devices_come_and_go_on_dax_memory_by_iommufd",
        run: |lab| on_dax(lab, By::Iommufd),
    },
    GuestTest {
        name: "passthrough_devices_come_and_go_on_plain_memory_by_iommufd",
        run: |lab| on_plain_memory(lab, By::Iommufd),
    },
];

/// What must be as before when no device is there any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Account {
    memlock: Memlock,
    descriptors: u64,
    mapped_bytes: u64,
}

impl support::Account for Account {
    fn is_back_to(&self, before: &Self) -> bool {
        self.memlock == before.memlock
            && self.mapped_bytes == before.mapped_bytes
            && self.descriptors <= before.descriptors
    }
}

struct Story<'a> {
    lab: &'a Lab,
    remote: Remote,
    guest: Guest,
    watch: DmaWatch,
    /// How often the host's kernel had complained before.
    complaints: usize,
}

impl<'a> Story<'a> {
    /// A guest without passed-through devices.
    fn begin(lab: &'a Lab, by: By, zone: &str) -> Result<Self, TestError> {
        scratch(lab)?;
        let remote = Remote::new();
        let mut spec = spec(lab, by, &[zone], &[]);
        spec.arguments
            .extend(["--api-socket", remote.socket()].map(str::to_owned));
        let watch = DmaWatch::begin(&lab.host)?;
        let complaints = kernel_says(&lab.host, &COMPLAINTS)?.len();
        let mut guest = Guest::boot(&lab.host, &spec)?;
        guest.modprobe(&DRIVERS)?;
        Ok(Self {
            lab,
            remote,
            guest,
            watch,
            complaints,
        })
    }

    fn account(&mut self) -> Result<Account, TestError> {
        let pid = self.guest.vmm().pid();
        Ok(Account {
            memlock: memlock(&self.lab.host, pid)?,
            descriptors: descriptors(&self.lab.host, pid)?,
            mapped_bytes: self.watch.read()?.live_bytes(),
        })
    }

    /// A card comes; gives its address in the guest.
    fn add(&mut self, binding: &Binding) -> Result<String, TestError> {
        let card = binding.device().card;
        let address = self.remote.add(self.lab, "add-device", &word(binding))?;
        self.guest
            .await_path(&format!("/sys/bus/pci/devices/{address}"))?;
        let function = is_driven(&mut self.guest, card)?;
        claim(function.address == address, || {
            format!("{} should be at {address}: {function:?}", card.id())
        })?;
        Ok(address)
    }

    /// A card goes: for the guest, for `vm.info`, and for the host.
    fn remove(&mut self, binding: &Binding, address: &str) -> Result<(), TestError> {
        let id = binding.device().card.id();
        self.remote.ok(self.lab, &["remove-device", id])?;
        self.guest
            .await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
        let (lab, remote) = (self.lab, &self.remote);
        eventually(&format!("{id} is no part of the VM any more"), || {
            Ok(!remote.knows(lab, id)?)
        })?;
        let left = vfio_interrupts(&lab.host, &binding.device().address)?;
        claim(left.is_empty(), || {
            format!("{id} is gone, the host still takes its interrupts: {left:?}")
        })
    }

    /// Waits until the accounts are what they were.
    fn is_as_before(&mut self, before: Account, round: u32) -> Result<(), TestError> {
        let what = format!("round {round}: the accounts are as before");
        comes_back_to(&what, &before, || self.account())
    }

    fn end(self) -> Result<(), TestError> {
        let Self {
            lab,
            mut guest,
            watch,
            complaints,
            ..
        } = self;
        no_complaints(&mut guest)?;
        power_off(guest)?;
        let maps = watch.read()?;
        claim(maps.live_bytes() == 0, || {
            format!("something is still mapped for DMA: {maps:?}")
        })?;
        watch.end()?;
        let said = kernel_says(&lab.host, &COMPLAINTS)?;
        claim(said.len() == complaints, || {
            format!("the host's kernel complains: {said:?}")
        })
    }
}

fn rounds(lab: &Lab) -> u32 {
    if lab.full { 50 } else { 5 }
}

/// Bytes that are pinned, by `daxhund-remote regions`, by its metrics, and in all of RAM.
fn pinned(story: &Story<'_>) -> Result<(u64, f64, u64), TestError> {
    let (lab, remote) = (story.lab, &story.remote);
    let (mut pinned, mut size) = (0, 0);
    for region in remote.regions(lab)? {
        size += region["size"].as_u64().unwrap_or_default();
        let holders = region["holders"].as_array().cloned().unwrap_or_default();
        let pins = holders
            .iter()
            .filter(|holder| holder["by"] == "type1" || holder["by"] == "iommufd");
        pinned += pins.filter_map(|pin| pin["bytes"].as_u64()).sum::<u64>();
    }
    let numbers = remote.metrics(lab)?;
    let spaces = numbers
        .iter()
        .filter(|(name, _)| name.starts_with("daxhund_pinned_bytes{"));
    Ok((pinned, spaces.map(|(_, bytes)| bytes).sum(), size))
}

/// A drive and a network card by turns and together; RAM on device-dax counts against nobody's limit.
fn on_dax(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let disk = lab.host.bind_vfio(Card::Disk)?;
    let network = lab.host.bind_vfio(Card::Network)?;
    let mut story = Story::begin(lab, by, &ram(lab))?;
    let before = story.account()?;
    claim(before.mapped_bytes == 0, || {
        format!("nothing is passed through, yet memory is mapped for DMA: {before:?}")
    })?;
    for round in 0..rounds(lab) {
        let disk_at = story.add(&disk)?;
        let with_one = story.account()?;
        claim(with_one.mapped_bytes >= 512 * MIB, || {
            format!("round {round}: not all RAM is mapped for DMA: {with_one:?}")
        })?;
        let (by_region, in_all, ram) = pinned(&story)?;
        claim(by_region == ram && in_all > 511.0 * 1_048_576.0, || {
            format!(
                "round {round}: of {ram} bytes {by_region} are told to be pinned, {in_all} in all"
            )
        })?;
        keeps_blocks(&mut story.guest, "/dev/nvme0n1", MIB, u64::from(round))?;
        let network_at = story.add(&network)?;
        super::carries_data(&mut story.guest, MIB)?;
        // The first one goes first: what both share has to stay.
        story.remove(&disk, &disk_at)?;
        super::carries_data(&mut story.guest, MIB)?;
        story.remove(&network, &network_at)?;
        story.is_as_before(before, round)?;
        let (by_region, in_all, _) = pinned(&story)?;
        claim(by_region == 0 && in_all < 1.0, || {
            format!(
                "round {round}: no device is left, {by_region} bytes are told to be pinned, {in_all} in all"
            )
        })?;
    }
    let refused = format!("path={},id={}", disk.path(), Card::Disk.id());
    story.add(&disk)?;
    let (remote, lab) = (&story.remote, story.lab);
    remote.refused(lab, &["add-device", &refused], &[Card::Disk.id()])?;
    story.end()?;
    disk.release()?;
    Ok(network.release()?)
}

/// Plain memory is counted while it is pinned, and every page of it is let go of again.
fn on_plain_memory(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let disk = lab.host.bind_vfio(Card::Disk)?;
    let mut story = Story::begin(lab, by, "id=z0,size=512M")?;
    let (before, pinned_before) = (story.account()?, held(lab)?);
    for round in 0..rounds(lab) {
        let address = story.add(&disk)?;
        let pid = story.guest.vmm().pid();
        let during = memlock(&lab.host, pid)?;
        let counted = during.locked_bytes + during.pinned_bytes;
        claim(by == By::Iommufd || counted >= 512 * MIB, || {
            format!("round {round}: 512 MiB are pinned, {during:?} are counted")
        })?;
        let pinned = held(lab)?;
        claim(pinned >= pinned_before + 512 * MIB / 4096, || {
            format!("round {round}: {pinned} pages are pinned, {pinned_before} were before")
        })?;
        keeps_blocks(&mut story.guest, "/dev/nvme0n1", MIB, u64::from(round))?;
        story.remove(&disk, &address)?;
        story.is_as_before(before, round)?;
        eventually(
            "every page is let go of",
            || Ok(held(lab)? == pinned_before),
        )?;
    }
    story.end()?;
    Ok(disk.release()?)
}

/// Pages that are pinned now.
fn held(lab: &Lab) -> Result<u64, TestError> {
    let Pins { acquired, released } = pins(&lab.host)?;
    Ok(acquired.saturating_sub(released))
}
