//! What several stories need: guests with RAM of some kind, the host's page statistics, starts that must fail.

use std::time::Duration;

use lab_agent::host_protocol::{ExitStatus, SpawnSpec};

use super::{Lab, TestError, claim};
use crate::guest::{Guest, GuestSpec};
use crate::host::figures::{MappedPages, mapped_pages};
use crate::share::{GUEST_INITRAMFS, ImageForm, kernel_path};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
/// A start that fails does so within a second; emulated and on a busy machine, within this.
const REFUSAL_DEADLINE: Duration = Duration::from_mins(1);

/// What Linux says about the emulated processor, whoever the VMM is: mitigations that want microcode, and frequency
/// scaling, for which a guest has no firmware.
const NOT_OF_OUR_MAKING: [&str; 5] = [
    // The emulated host says it of itself: "Marking TSC unstable due to TSCs unsynchronized".
    "Unstable clock detected",
    "Speculative Return Stack Overflow",
    "Zenbleed",
    "amd_pstate: the _CPC object is not present",
    "Transient Scheduler Attacks",
];

/// Entries of each size by which KVM maps the memory of a guest now.
pub(super) fn kvm_pages(lab: &Lab, guest: &mut Guest) -> Result<MappedPages, TestError> {
    Ok(mapped_pages(&lab.host, guest.vmm().pid())?)
}

/// `id=ID,size=SIZE,file=DEVICE,offset=OFFSET` on the lab's device number `device`.
pub(super) fn dax_zone(lab: &Lab, id: &str, device: usize, size: u64, offset: u64) -> String {
    let path = &lab.host.dax()[device].path;
    format!("id={id},size={size},file={path},offset={offset}")
}

/// A guest with these zones, up.
pub(super) fn boot_on(lab: &Lab, zones: &[&str]) -> Result<Guest, TestError> {
    Ok(Guest::boot(&lab.host, &spec_on(lab, zones))?)
}

/// As [`boot_on`], before it is started.
pub(super) fn spec_on(lab: &Lab, zones: &[&str]) -> GuestSpec {
    let mut arguments = vec!["--memory-zone"];
    arguments.extend(zones);
    GuestSpec::new(&lab.kernel.release, &arguments)
}

/// Powers a guest off and sees that both sides agree on that.
pub(super) fn power_off(guest: Guest) -> Result<(), TestError> {
    let status = guest.power_off()?;
    claim(status == ExitStatus::Code(0), || {
        format!("the VMM ended with {status} after the guest's power-off")
    })
}

/// The guest's kernel has nothing to say against the machine.
pub(super) fn no_complaints(guest: &mut Guest) -> Result<(), TestError> {
    let ours: Vec<String> = guest
        .problems()?
        .into_iter()
        .map(|record| record.text)
        .filter(|text| !NOT_OF_OUR_MAKING.iter().any(|known| text.contains(known)))
        .collect();
    claim(ours.is_empty(), || {
        format!("the guest's kernel complains:\n{}", ours.join("\n"))
    })
}

/// The guest has the memory it was given, but for what its kernel keeps for itself.
pub(super) fn has_memory(guest: &mut Guest, given: u64) -> Result<(), TestError> {
    let total = guest.meminfo()?.total_bytes;
    // Page structures take 1/64, the kernel's image and reservations some 100 MiB.
    let least = given - given / 32 - 128 * MIB;
    claim((least..=given).contains(&total), || {
        format!("given {given} bytes, the guest's kernel manages {total}")
    })
}

/// RAM as the guest's kernel was told: (first address, last address).
pub(super) fn ram_ranges(guest: &mut Guest) -> Result<Vec<(u64, u64)>, TestError> {
    let iomem = guest.iomem()?;
    let parse = |text: &str| u64::from_str_radix(text.trim(), 16).ok();
    let ranges: Vec<(u64, u64)> = iomem
        .lines()
        .filter(|line| line.trim_end().ends_with(": System RAM") && !line.starts_with(' '))
        .filter_map(|line| {
            let (first, last) = line.split_once(" : ")?.0.split_once('-')?;
            Some((parse(first)?, parse(last)?))
        })
        .collect();
    claim(!ranges.is_empty(), || format!("no RAM in {iomem}"))?;
    Ok(ranges)
}

/// Runs daxhund with a kernel, an initramfs and these words; it must refuse to start with `status` and say each of `words`.
pub(super) fn refused(
    lab: &Lab,
    arguments: &[&str],
    status: i32,
    words: &[&str],
) -> Result<(), TestError> {
    let kernel = kernel_path(&lab.kernel.release, ImageForm::Elf);
    let mut argv = vec![
        "daxhund",
        "--kernel",
        &kernel,
        "--initramfs",
        GUEST_INITRAMFS,
        "--serial",
        "null",
    ];
    argv.extend(arguments);
    refused_as(lab, &argv, None, status, words)
}

/// As [`refused`], with a whole command line and a user.
pub(super) fn refused_as(
    lab: &Lab,
    argv: &[&str],
    uid: Option<u32>,
    status: i32,
    words: &[&str],
) -> Result<(), TestError> {
    let spec = SpawnSpec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        uid,
        ..SpawnSpec::default()
    };
    let output = lab.host.spawn(spec)?.finish(REFUSAL_DEADLINE)?;
    let command = argv.join(" ");
    claim(output.status == ExitStatus::Code(status), || {
        format!(
            "`{command}` ended with {}, expected {status}: {}",
            output.status, output.stderr
        )
    })?;
    for word in words {
        claim(output.stderr.contains(word), || {
            format!(
                "`{command}` should say {word:?}, it says: {}",
                output.stderr
            )
        })?;
    }
    claim(output.stderr.lines().count() <= 5, || {
        format!("`{command}` says too much: {}", output.stderr)
    })
}
