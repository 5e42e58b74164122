//! What several stories need: guests with RAM of some kind, the host's page statistics, starts that must fail.

use std::time::Duration;

use lab_agent::guest_protocol::PciFunction;
use lab_agent::host_protocol::{ExitStatus, SpawnSpec};

use super::{Lab, TestError, claim};
use crate::guest::{Guest, GuestSpec};
use crate::host::account;
use crate::host::figures::{MappedPages, mapped_pages};
use crate::host::process::Process;
use crate::share::{ImageForm, Initramfs, initramfs_path, kernel_path};
use crate::suite::SCRATCH;
use crate::wait::{self, PATIENCE};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
/// A start that fails does so within a second.
const REFUSAL_DEADLINE: Duration = PATIENCE;
/// What takes a few milliseconds on a real machine.
const EVENTUALLY: Duration = PATIENCE;

/// What Linux says about the emulated processor, whoever the VMM is: mitigations that want microcode, and frequency
/// scaling, for which a guest has no firmware.
const NOT_OF_OUR_MAKING: [&str; 14] = [
    // The emulated host says it of itself: "Marking TSC unstable due to TSCs unsynchronized".
    "Unstable clock detected",
    // The emulator did not get a processor for a while.
    "Long readout interval, skipping watchdog check",
    "excessive read-back delay",
    "hrtimer: interrupt took",
    // 6.12: "workqueue: ... hogged CPU for >10000us N times, consider switching to WQ_UNBOUND".
    "hogged CPU for >",
    "Speculative Return Stack Overflow",
    "Zenbleed",
    "amd_pstate: the _CPC object is not present",
    "Transient Scheduler Attacks",
    // Of any virtio-pmem: a region without DIMMs has no "flushing capability" (`nvdimm_has_flush`, drivers/nvdimm/region_devs.c),
    // although flushes go to the device.
    "unable to guarantee persistence of writes",
    // The agent, which waits for a block device by opening its node, was earlier than the kernel with the device.
    "block device autoloading is deprecated",
    // 6.12 of the emulated drive: "ata1.00: Model 'QEMU HARDDISK', rev '2.5+', applying quirks: bridgeok", and what follows from that.
    "Model 'QEMU HARDDISK'",
    "LPM support broken, forcing max_power",
    // ext4 and xfs of 6.1: "DAX enabled. Warning: EXPERIMENTAL, use at your own risk".
    "DAX enabled. Warning: EXPERIMENTAL",
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

/// The small initramfs for the lab's kernel.
pub(super) fn initramfs(lab: &Lab) -> String {
    initramfs_path(&lab.kernel.release, Initramfs::Plain)
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

/// Whether Linux says this on the emulated processor, whoever the VMM is.
pub(super) fn is_of_others(text: &str) -> bool {
    NOT_OF_OUR_MAKING.iter().any(|known| text.contains(known))
}

/// The guest's kernel has nothing to say against the machine.
pub(super) fn no_complaints(guest: &mut Guest) -> Result<(), TestError> {
    let ours: Vec<String> = guest
        .problems()?
        .into_iter()
        .map(|record| record.text)
        .filter(|text| !is_of_others(text))
        .collect();
    claim(ours.is_empty(), || {
        format!("the guest's kernel complains:\n{}", ours.join("\n"))
    })
}

/// How many of each the VMM has.
pub(super) fn descriptors_and_threads(
    lab: &Lab,
    guest: &mut Guest,
) -> Result<(u64, u64), TestError> {
    let pid = guest.vmm().pid();
    Ok((
        account::descriptors(&lab.host, pid)?,
        account::threads(&lab.host, pid)?,
    ))
}

/// It says that the storage failed.
pub(super) fn says_i_o_error(said: &str) -> Result<(), TestError> {
    claim(
        said.contains("I/O error") || said.contains("Input/output error"),
        || said.to_owned(),
    )
}

/// How often an event has been told to the monitor at `SCRATCH/events`.
pub(super) fn times_told(lab: &Lab, event: &str) -> Result<usize, TestError> {
    let events = lab.host.read_text(&format!("{SCRATCH}/events"))?;
    Ok(events.matches(event).count())
}

/// What a process has. Threads and descriptors that are about to end may be counted the first time, so fewer later is no fault.
pub(super) trait Account: std::fmt::Debug {
    /// Whether nothing is there that was not there before, and all memory is as it was.
    fn is_back_to(&self, before: &Self) -> bool;
}

/// Descriptors and threads.
impl Account for (u64, u64) {
    fn is_back_to(&self, before: &Self) -> bool {
        self.0 <= before.0 && self.1 <= before.1
    }
}

/// Waits until an account is what it was.
pub(super) fn comes_back_to<T: Account>(
    what: &str,
    before: &T,
    mut account: impl FnMut() -> Result<T, TestError>,
) -> Result<(), TestError> {
    let mut now = None;
    let outcome = eventually(what, || Ok(now.insert(account()?).is_back_to(before)));
    outcome.map_err(|error| TestError::Claim(format!("{error}: before {before:?}, now {now:?}")))
}

/// Looks until `is_so`, at least once.
pub(super) fn eventually(
    what: &str,
    is_so: impl FnMut() -> Result<bool, TestError>,
) -> Result<(), TestError> {
    wait::until(EVENTUALLY, is_so, || {
        TestError::Claim(format!("{what}: not within {} s", EVENTUALLY.as_secs()))
    })
}

/// As [`spec_on`] for a guest with devices: its RAM is 512 MiB of the first dax device.
pub(super) fn spec_with(lab: &Lab, devices: &[&str]) -> GuestSpec {
    with_words(
        spec_on(lab, &[&dax_zone(lab, "z0", 0, 512 * MIB, 0)]),
        devices,
    )
}

/// The same with more words.
pub(super) fn with_words(mut spec: GuestSpec, words: &[&str]) -> GuestSpec {
    spec.arguments
        .extend(words.iter().map(|word| (*word).to_owned()));
    spec
}

/// Whether the VMM has this path open or mapped.
pub(super) fn holds(lab: &Lab, guest: &mut Guest, path: &str) -> Result<bool, TestError> {
    let pid = guest.vmm().pid();
    let open = lab
        .host
        .sh(&format!("ls -l /proc/{pid}/fd; cat /proc/{pid}/maps"))?;
    Ok(open.lines().any(|line| line.trim_end().ends_with(path)))
}

/// Makes the directory for a test's files.
pub(super) fn scratch(lab: &Lab) -> Result<(), TestError> {
    lab.host.check(&["mkdir", "-p", SCRATCH])?;
    Ok(())
}

/// The helper of a VMM that was killed. It stays for as long as anybody has memory of the same devices.
pub(super) struct Orphan(String);

/// Kills a VMM, whose end is seen whatever its helper does.
pub(super) fn kill(lab: &Lab, guest: &mut Guest) -> Result<Orphan, TestError> {
    use crate::host::process::SIGKILL;
    let pid = guest.vmm().pid();
    let helper = lab
        .host
        .read_text(&format!("/proc/{pid}/task/{pid}/children"))?;
    let path = format!("/proc/{}", helper.trim());
    claim(lab.host.exists(&path)?, || {
        format!("the children of process {pid} are no helper: {helper}")
    })?;
    guest.vmm().signal(SIGKILL)?;
    guest.wait_end()?;
    Ok(Orphan(path))
}

impl Orphan {
    pub(super) fn is_there(&self, lab: &Lab) -> Result<bool, TestError> {
        Ok(lab.host.exists(&self.0)?)
    }

    pub(super) fn ends(self, lab: &Lab) -> Result<(), TestError> {
        eventually("the helper has ended", || Ok(!self.is_there(lab)?))
    }
}

/// Lets everybody read and write these files for as long as `story` takes.
pub(super) fn open_to_all<T>(
    lab: &Lab,
    paths: &[&str],
    story: impl FnOnce() -> Result<T, TestError>,
) -> Result<T, TestError> {
    let mut modes = Vec::new();
    for path in paths {
        modes.push(lab.host.check(&["stat", "-c", "%a", path])?);
        lab.host.check(&["chmod", "666", path])?;
    }
    let outcome = story();
    for (path, mode) in paths.iter().zip(modes) {
        lab.host.check(&["chmod", mode.trim(), path])?;
    }
    outcome
}

/// Makes a file system of the second dax device, and tells `story` where it is mounted. It is a device again afterwards.
pub(super) fn on_fs_dax<T>(
    lab: &Lab,
    story: impl FnOnce(&str) -> Result<T, TestError>,
) -> Result<T, TestError> {
    let device = lab.host.dax()[1].clone();
    let number = device.name.trim_start_matches("dax");
    let namespace = format!("namespace{number}");
    let block = format!("/dev/pmem{}", number.trim_end_matches(".0"));
    let place = format!("{SCRATCH}/mnt");
    lab.host.sh(&format!(
        "modprobe crc32c_generic && modprobe ext4 && ndctl create-namespace -f -e {namespace} -m fsdax -M mem && \
         mkdir -p {place} && mke2fs -b 4096 {block} && mount -t ext4 -o dax {block} {place}"
    ))?;
    let outcome = story(&place);
    lab.host.sh(&format!(
        "umount {place} && ndctl create-namespace -f -e {namespace} -m devdax -M mem -a 2M && test -c {}",
        device.path
    ))?;
    outcome
}

/// The user without rights.
pub(super) const LAB_USER: u32 = 1000;

/// The functions that are virtio devices of a kind, in order of address.
pub(super) fn virtio_functions(
    guest: &mut Guest,
    kind: VirtioKind,
) -> Result<Vec<PciFunction>, TestError> {
    let mut functions = guest.pci()?;
    functions.retain(|function| function.id == (0x1af4, kind as u16));
    Ok(functions)
}

/// The one function that is a virtio device of a kind.
pub(super) fn virtio_function(
    guest: &mut Guest,
    kind: VirtioKind,
) -> Result<PciFunction, TestError> {
    let mut functions = virtio_functions(guest, kind)?;
    match (functions.pop(), functions.len()) {
        (Some(function), 0) => Ok(function),
        (last, more) => Err(TestError::Claim(format!(
            "expected one virtio device {kind:?}, found {} in {:?}",
            more + usize::from(last.is_some()),
            guest.pci()?
        ))),
    }
}

/// PCI device ids of virtio devices: 0x1040 and the device's type.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum VirtioKind {
    Net = 0x1041,
    Block = 0x1042,
    Console = 0x1043,
    Rng = 0x1044,
    Balloon = 0x1045,
    Vsock = 0x1053,
    FileSystem = 0x105a,
    Pmem = 0x105b,
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
    let initramfs = initramfs(lab);
    let mut argv = vec![
        "daxhund",
        "--kernel",
        &kernel,
        "--initramfs",
        &initramfs,
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

/// Bytes of a device that a process of the host has mapped; aligned as the device wants it, or else.
pub(super) fn mapped(lab: &Lab, process: &Process, device: &str) -> Result<u64, TestError> {
    let maps = lab
        .host
        .read_text(&format!("/proc/{}/maps", process.pid()))?;
    let mut sum = 0;
    for line in maps.lines().filter(|line| line.ends_with(device)) {
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap_or(1);
        let mut words = line.split_whitespace();
        let (start, end) = words
            .next()
            .and_then(|w| w.split_once('-'))
            .unwrap_or_default();
        let offset = words.nth(1).unwrap_or_default();
        let all = [hex(start), hex(end), hex(offset)];
        claim(all.iter().all(|at| at.is_multiple_of(2 * MIB)), || {
            format!("mapped without the alignment of the device: {line}")
        })?;
        sum += hex(end) - hex(start);
    }
    Ok(sum)
}

/// What a script of the guest's prints, as a number.
pub(super) fn count(guest: &mut Guest, script: &str) -> Result<u64, TestError> {
    let text = guest.sh(script)?;
    text.trim()
        .parse()
        .map_err(|_| TestError::Claim(format!("`{script}` prints no number: {text}")))
}
