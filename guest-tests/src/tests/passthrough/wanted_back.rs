//! The host wants a device back that a guest has: the guest is asked, and cut off if it keeps the device.

use lab_agent::host_protocol::SpawnSpec;

use super::super::remote::Remote;
use super::super::support::{MIB, eventually, no_complaints, power_off, scratch};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{By, COMPLAINTS, DRIVERS, is_driven, keeps_blocks, ram, spec, word};
use crate::guest::Guest;
use crate::host::RUN_DEADLINE;
use crate::host::account::kernel_says;
use crate::host::cards::Card;
use crate::host::passthrough::Binding;
use crate::host::process::Process;
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_device_that_the_host_wants_back_is_given_back",
    run: |lab| wanted_back(lab, By::Groups),
}];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_device_that_the_host_wants_back_is_given_back_by_iommufd",
    run: |lab| wanted_back(lab, By::Iommufd),
}];

const CARD: Card = Card::Disk;
const SEED: u64 = 51;

struct Story {
    remote: Remote,
    guest: Guest,
}

impl Story {
    /// A guest without devices, whose events go to a file.
    fn begin(lab: &Lab, by: By) -> Result<Self, TestError> {
        scratch(lab)?;
        lab.host.sh(&format!(": > {SCRATCH}/events"))?;
        let remote = Remote::new();
        let mut spec = spec(lab, by, &[&ram(lab)], &[]);
        let events = format!("path={SCRATCH}/events");
        spec.arguments.extend(
            ["--api-socket", remote.socket(), "--event-monitor", &events].map(str::to_owned),
        );
        let mut guest = Guest::boot(&lab.host, &spec)?;
        guest.modprobe(&DRIVERS)?;
        Ok(Self { remote, guest })
    }

    fn add(&mut self, lab: &Lab, binding: &Binding) -> Result<String, TestError> {
        let address = self.remote.add(lab, "add-device", &word(binding))?;
        self.guest
            .await_path(&format!("/sys/bus/pci/devices/{address}"))?;
        is_driven(&mut self.guest, CARD)?;
        self.guest.await_path("/dev/nvme0n1")?;
        Ok(address)
    }

    /// The guest does as it is asked, without an operator.
    fn lets_go(&mut self, lab: &Lab, address: &str) -> Result<(), TestError> {
        self.guest
            .await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
        let remote = &self.remote;
        eventually("the device is no part of the VM any more", || {
            Ok(!remote.knows(lab, CARD.id())?)
        })
    }

    fn still_has_it(&mut self) -> Result<(), TestError> {
        let report = self
            .guest
            .compare_blocks("/dev/nvme0n1", 0, 4 * MIB, SEED)?;
        claim(report.wrong_words == 0, || {
            format!("the guest's drive does not have what was written: {report:?}")
        })
    }
}

/// How often the VMM has told that the host wants the device. Each wish is told at once, and again every ten seconds.
fn wishes(lab: &Lab) -> Result<usize, TestError> {
    let events = lab.host.read_text(&format!("{SCRATCH}/events"))?;
    let told = events.split("\n\n").filter(|event| {
        event.contains("\"device-requested\"") && event.contains(&format!("\"{}\"", CARD.id()))
    });
    Ok(told.count())
}

fn wanted_back(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let complaints = kernel_says(&lab.host, &COMPLAINTS)?.len();
    let mut story = Story::begin(lab, by)?;
    let card = lab.host.bind_vfio(CARD)?;
    let address = story.add(lab, &card)?;
    keeps_blocks(&mut story.guest, "/dev/nvme0n1", 4 * MIB, SEED)?;
    claim(wishes(lab)? == 0, || {
        "nobody wants the device, but it was said".to_owned()
    })?;

    // Somebody presses the button of the card's slot.
    lab.host.pull_out(CARD)?;
    eventually("the guest's owner is told", || Ok(wishes(lab)? > 0))?;
    story.lets_go(lab, &address)?;
    lab.host.await_pulled_out(CARD)?;
    claim(!lab.host.exists(&card.path())?, || {
        format!("the host still has {card:?}")
    })?;

    // It comes back, to the host and to the guest.
    lab.host.put_in(CARD)?;
    lab.host.await_put_in(card.device())?;
    // Its driver is found a moment later where that is built in.
    let driver = card.device().driver.clone();
    eventually("the host has the card as before", || {
        Ok(lab.host.pci_device(CARD)?.driver == driver)
    })?;
    card.forget();
    let card = lab.host.bind_vfio(CARD)?;
    let address = story.add(lab, &card)?;
    story.still_has_it()?;

    // The host's administrator takes it from VFIO.
    let told = wishes(lab)?;
    let unbinding = unbind(lab, &card)?;
    eventually(
        "the guest's owner is told again",
        || Ok(wishes(lab)? > told),
    )?;
    story.lets_go(lab, &address)?;
    let output = unbinding.finish(RUN_DEADLINE)?;
    let driver = lab.host.pci_device(CARD)?.driver;
    claim(output.status.success() && driver.is_none(), || {
        format!("the device's driver is {driver:?} after {output:?}")
    })?;
    card.release()?;

    let card = lab.host.bind_vfio(CARD)?;
    story.add(lab, &card)?;
    story.still_has_it()?;
    no_complaints(&mut story.guest)?;
    power_off(story.guest)?;
    is_taken_from_a_guest_that_keeps_it(lab, by, &card)?;
    card.release()?;
    let said = kernel_says(&lab.host, &COMPLAINTS)?;
    claim(said.len() == complaints, || {
        format!("the host's kernel complains: {said:?}")
    })
}

/// A guest without hotplug is cut off: its driver finds nobody any more, and the guest lives on.
fn is_taken_from_a_guest_that_keeps_it(lab: &Lab, by: By, card: &Binding) -> Result<(), TestError> {
    lab.host.sh(&format!(": > {SCRATCH}/events"))?;
    let mut spec = spec(lab, by, &[&ram(lab)], &[card]);
    let events = format!("path={SCRATCH}/events");
    spec.arguments
        .extend(["--event-monitor", &events].map(str::to_owned));
    "acpiphp.disable=1".clone_into(&mut spec.cmdline);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.modprobe(&DRIVERS)?;
    guest.await_path("/dev/nvme0n1")?;
    let output = unbind(lab, card)?.finish(RUN_DEADLINE)?;
    claim(output.status.success(), || {
        format!("the device is not given back: {output:?}")
    })?;
    // The host goes on as soon as the device's file is closed.
    eventually("it is told that the guest was cut off", || {
        let events = lab.host.read_text(&format!("{SCRATCH}/events"))?;
        Ok(events.contains("\"device-cut-off\""))
    })?;
    let read = guest.try_sh("dd if=/dev/nvme0n1 of=/dev/null bs=4096 count=1 iflag=direct")?;
    claim(read.status != Some(0), || {
        format!("the guest reads from a drive that it does not have: {read:?}")
    })?;
    power_off(guest)
}

fn unbind(lab: &Lab, card: &Binding) -> Result<Process, TestError> {
    let address = &card.device().address;
    let script = format!("echo {address} > /sys/bus/pci/drivers/vfio-pci/unbind");
    Ok(lab.host.spawn(SpawnSpec {
        argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
        ..SpawnSpec::default()
    })?)
}
