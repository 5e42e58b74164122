//! Devices of the host that a guest has for itself.
//!
//! Stories are told twice where the kernel's two interfaces could differ: by groups, which every kernel has, and by iommufd, which only
//! the lab's own kernel has. Bindings outlive guests: vfio-pci gives no device up that somebody uses.

mod chosen;
mod coming_and_going;
mod descriptor;
mod devices;
mod groups;
mod killed;
mod other_hosts;
mod pmem;
mod reach;
mod refusals;
mod wanted_back;

use lab_agent::guest_protocol::{DmaReport, InterruptKind, PciFunction, Transfer};
use lab_agent::host_protocol::SpawnSpec;

use super::support::{MIB, dax_zone, eventually, refused_as, spec_on};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::{Guest, GuestSpec};
use crate::host::account::{kernel_says, vfio_interrupts};
use crate::host::cards::{Card, ECHO_ADDRESS, LEASED_PREFIX};
use crate::host::passthrough::Binding;
use crate::provision::lab_kernel;
use crate::share::Initramfs;

/// Drivers of what is passed through, for the guest.
const DRIVERS: [&str; 2] = ["nvme", "e1000e"];

/// What the host's kernel says when something is wrong with it, or when a device reaches for what it should not.
const COMPLAINTS: [&str; 5] = [
    "WARNING:",
    "BUG:",
    "Bad page state",
    "Call Trace",
    "DMAR: [DMA",
];

/// By groups, on a kernel of this name.
pub(super) fn tests(kernel: &str) -> Vec<GuestTest> {
    // The lab's own kernel has no drivers for what only they drive.
    let with_drivers = if kernel == lab_kernel::NAME {
        &[]
    } else {
        devices::TESTS_WITH_ATA
    };
    [
        devices::TESTS,
        with_drivers,
        reach::TESTS,
        pmem::TESTS,
        coming_and_going::TESTS,
        wanted_back::TESTS,
        killed::TESTS,
        groups::TESTS,
        refusals::TESTS,
        other_hosts::TESTS,
    ]
    .concat()
}

/// On a kernel with iommufd.
pub(super) fn iommufd_tests() -> Vec<GuestTest> {
    [
        devices::IOMMUFD_TESTS,
        descriptor::IOMMUFD_TESTS,
        chosen::IOMMUFD_TESTS,
        reach::IOMMUFD_TESTS,
        pmem::IOMMUFD_TESTS,
        coming_and_going::IOMMUFD_TESTS,
        wanted_back::IOMMUFD_TESTS,
        killed::IOMMUFD_TESTS,
        groups::IOMMUFD_TESTS,
        refusals::IOMMUFD_TESTS,
        other_hosts::IOMMUFD_TESTS,
    ]
    .concat()
}

/// The kernel's interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum By {
    Groups,
    Iommufd,
}

/// The value of `--device`.
pub(super) fn word(binding: &Binding) -> String {
    let (path, id) = (binding.path(), binding.device().card.id());
    format!("path={path},id={id}")
}

/// A guest with tools, these zones and these devices, before it is started. The devices are the last words.
fn spec(lab: &Lab, by: By, zones: &[&str], bindings: &[&Binding]) -> GuestSpec {
    let said = match by {
        By::Groups => "iommufd=off",
        By::Iommufd => "iommufd=on",
    };
    spec_saying(lab, &["--platform", said], zones, bindings)
}

/// The same, and nobody says which interface is to be used.
fn spec_of_choice(lab: &Lab, zones: &[&str], bindings: &[&Binding]) -> GuestSpec {
    spec_saying(lab, &[], zones, bindings)
}

fn spec_saying(lab: &Lab, said: &[&str], zones: &[&str], bindings: &[&Binding]) -> GuestSpec {
    let mut spec = spec_on(lab, zones);
    spec.initramfs = Initramfs::Tools;
    let said = said.iter().map(|word| (*word).to_owned());
    spec.arguments.extend(said);
    if !bindings.is_empty() {
        spec.arguments.push("--device".to_owned());
    }
    spec.arguments
        .extend(bindings.iter().map(|binding| word(binding)));
    spec
}

/// A guest with these zones and this device has to be refused, and the refusal to say each of `said`.
fn start_refused(
    lab: &Lab,
    by: By,
    zones: &[&str],
    device: &str,
    said: &[&str],
) -> Result<(), TestError> {
    let mut spec = spec(lab, by, zones, &[]);
    spec.arguments
        .extend(["--device", device].map(str::to_owned));
    let argv = spec.argv();
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    refused_as(lab, &argv, None, 1, said)
}

/// A command line as the user without rights runs it, after root has done something in the same process.
fn as_user_after(prelude: &str, argv: Vec<String>) -> SpawnSpec {
    let script = format!(r#"{prelude} && exec su -c 'exec "$0" "$@"' -- lab "$@""#);
    let mut words = ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec();
    words.extend(argv);
    SpawnSpec {
        argv: words,
        stdin: true,
        ..SpawnSpec::default()
    }
}

/// Each was written and read as expected.
fn expect(reports: &[DmaReport], targets: usize, expected: Transfer) -> Result<(), TestError> {
    let as_expected = |report: &DmaReport| report.written == expected && report.read == expected;
    claim(
        reports.len() == targets && reports.iter().all(as_expected),
        || format!("expected {expected:?} for {targets} targets: {reports:x?}"),
    )
}

/// None was written, and none was read. What an access that faults in the IOMMU reads is the device's affair; what is there, it is not.
fn expect_nothing(reports: &[DmaReport], targets: usize) -> Result<(), TestError> {
    let kept_out = |report: &DmaReport| {
        report.written == Transfer::Nothing && report.read != Transfer::Arrived
    };
    claim(
        reports.len() == targets && reports.iter().all(kept_out),
        || format!("the device should reach none of {targets} targets: {reports:x?}"),
    )
}

/// The host's IOMMU has stopped a device at each of these addresses.
fn faults_are_told(lab: &Lab, binding: &Binding, addresses: &[u64]) -> Result<(), TestError> {
    // As in "DMAR: [DMA Write NO_PASID] Request device [00:13.0] fault addr 0x20000000 [fault reason 0x05] ...".
    let place = binding.device().address.trim_start_matches("0000:");
    for address in addresses {
        let address = format!(" {address:#x} ");
        eventually(
            &format!("the host tells of a fault of {place} at{address}"),
            || {
                let faults = kernel_says(&lab.host, &["DMAR: [DMA"])?;
                let it_is = |line: &String| line.contains(place) && line.contains(&address);
                Ok(faults.iter().any(it_is))
            },
        )?;
    }
    Ok(())
}

/// The usual RAM: 512 MiB of the first dax device.
fn ram(lab: &Lab) -> String {
    dax_zone(lab, "z0", 0, 512 * MIB, 0)
}

/// A guest that has these devices, up, its drivers loaded.
fn boot(lab: &Lab, by: By, bindings: &[&Binding]) -> Result<Guest, TestError> {
    let mut guest = Guest::boot(&lab.host, &spec(lab, by, &[&ram(lab)], bindings))?;
    guest.modprobe(&DRIVERS)?;
    Ok(guest)
}

/// The functions of a card's kind that the guest has found, in order of address.
fn functions(guest: &mut Guest, card: Card) -> Result<Vec<PciFunction>, TestError> {
    let mut found = guest.pci()?;
    found.retain(|function| function.id == card.pci_id());
    Ok(found)
}

/// The only function of a card's kind: where orchestrators look, with the class that it has on the host.
fn function(guest: &mut Guest, card: Card) -> Result<PciFunction, TestError> {
    let mut found = functions(guest, card)?;
    match (found.pop(), found.is_empty()) {
        (Some(function), true) => {
            claim(
                function.address.starts_with("0000:00:") && function.class == card.class(),
                || {
                    format!(
                        "{} should be on bus 0 with class {:#x}: {function:?}",
                        card.id(),
                        card.class()
                    )
                },
            )?;
            Ok(function)
        }
        _ => Err(TestError::Claim(format!(
            "expected one {}, the guest has {:?}",
            card.id(),
            guest.pci()?
        ))),
    }
}

/// The guest's driver has the card.
pub(super) fn is_driven(guest: &mut Guest, card: Card) -> Result<PciFunction, TestError> {
    let address = function(guest, card)?.address;
    guest.await_path(&format!("/sys/bus/pci/devices/{address}/driver"))?;
    let function = function(guest, card)?;
    claim(function.driver.as_deref() == card.driver(), || {
        format!(
            "{} should have the driver {:?}: {function:?}",
            card.id(),
            card.driver()
        )
    })?;
    Ok(function)
}

/// Gets an address for the guest's only network card, and sees data come back whole from the far side.
fn carries_data(guest: &mut Guest, bytes: u64) -> Result<(), TestError> {
    guest.await_path("/sys/class/net/eth0")?;
    let address = guest.lease("eth0")?;
    claim(address.starts_with(LEASED_PREFIX), || {
        format!("leased {address}, expected {LEASED_PREFIX}*")
    })?;
    let report = guest.there_and_back(ECHO_ADDRESS, bytes, 5)?;
    claim(report.bytes == bytes, || format!("{report:?}"))
}

/// Writes to a drive and reads back what was written.
pub(super) fn keeps_blocks(
    guest: &mut Guest,
    path: &str,
    bytes: u64,
    seed: u64,
) -> Result<(), TestError> {
    guest.await_path(path)?;
    guest.fill_blocks(path, 0, bytes, seed)?;
    let report = guest.compare_blocks(path, 0, bytes, seed)?;
    claim(report.wrong_words == 0 && report.words == bytes / 8, || {
        format!("{path} does not read back as written: {report:?}")
    })
}

/// Whatever interrupts the host for the guest has interrupted the guest, in the way expected.
fn interrupts_arrive(
    lab: &Lab,
    guest: &mut Guest,
    binding: &Binding,
    kind: InterruptKind,
) -> Result<(), TestError> {
    let card = binding.device().card;
    let address = function(guest, card)?.address;
    let seen = guest.interrupts(&address)?;
    claim(seen.kind == kind && seen.count > 0, || {
        format!(
            "{} should interrupt the guest by {kind:?}: {seen:?}",
            card.id()
        )
    })?;
    let taken = vfio_interrupts(&lab.host, &binding.device().address)?;
    let sum: u64 = taken.iter().map(|(_, count)| count).sum();
    claim(sum > 0, || {
        format!("the guest has {seen:?}, the host has taken none for it: {taken:?}")
    })
}
