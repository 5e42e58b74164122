//! The emulated host is what the other tests take it for.

use std::collections::BTreeSet;

use super::support::eventually;
use super::{GuestTest, Lab, TestError, claim};
use crate::host::account::{DmaMaps, DmaWatch};
use crate::host::cards::Card;
use crate::provision::lab_kernel;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "host_has_dax_devices",
        run: host_has_dax_devices,
    },
    GuestTest {
        name: "kvm_is_usable",
        run: kvm_is_usable,
    },
    GuestTest {
        name: "programs_run_and_are_told_apart",
        run: programs_run_and_are_told_apart,
    },
    GuestTest {
        name: "host_has_cards_that_vfio_takes_and_gives_back",
        run: host_has_cards_that_vfio_takes_and_gives_back,
    },
    GuestTest {
        name: "host_cards_are_pulled_out_and_put_in",
        run: host_cards_are_pulled_out_and_put_in,
    },
    GuestTest {
        name: "daxhund_runs_on_a_bare_host",
        run: daxhund_runs_on_a_bare_host,
    },
];

fn host_has_dax_devices(lab: &mut Lab) -> Result<(), TestError> {
    let [big, second, gib_aligned] = lab.host.dax() else {
        return Err(TestError::Claim(format!(
            "expected three devices, found {:?}",
            lab.host.dax()
        )));
    };
    let at_least = [
        (big, 5 * GIB, 2 * MIB),
        (second, GIB, 2 * MIB),
        (gib_aligned, GIB, GIB),
    ];
    for (device, size, align) in at_least {
        claim(
            device.size_bytes >= size && device.align_bytes == align,
            || format!("expected {size} bytes aligned to {align}, found {device:?}"),
        )?;
        let driver = lab.host.check(&[
            "readlink",
            "-f",
            &format!("/sys/bus/dax/devices/{}/driver", device.name),
        ])?;
        claim(driver.trim_end().ends_with("/device_dax"), || {
            format!("{} is bound to {driver}", device.name)
        })?;
        lab.host.check(&["test", "-c", &device.path])?;
    }
    Ok(())
}

fn kvm_is_usable(lab: &mut Lab) -> Result<(), TestError> {
    lab.host.check(&["test", "-c", "/dev/kvm"])?;
    let npt = lab.host.read_text("/sys/module/kvm_amd/parameters/npt")?;
    claim(npt == "Y" || npt == "1", || {
        format!("nested paging is off: npt={npt}")
    })
}

/// It needs no library and no dynamic linker.
fn daxhund_runs_on_a_bare_host(lab: &mut Lab) -> Result<(), TestError> {
    let loader = "/lib64/ld-linux-x86-64.so.2";
    for program in [
        "daxhund",
        "daxhund-remote",
        "daxhund-guardd",
        "daxhund-vhost-user-blk",
        "daxhund-vhost-user-pmem",
    ] {
        let program = format!("/lab/bin/{program}");
        let verified = lab.host.run(&[loader, "--verify", &program])?;
        // glibc, elf/rtld.c: 0 for what it would link, 2 for a program that asks for no dynamic linker, 1 for anything else.
        claim(verified.status.to_string() == "exit status 2", || {
            let list = lab.host.run(&[loader, "--list", &program]);
            format!("{program} links something: {verified:?}, {list:?}")
        })?;
    }
    let version = lab.host.check(&["daxhund", "--version"])?;
    claim(version.starts_with("daxhund "), || version.clone())?;
    // Called by the name of the VMM whose contract it answers, it gives the line that is parsed.
    let script = "mkdir -p /tmp/scratch && ln -s /lab/bin/daxhund /tmp/scratch/cloud-hypervisor && /tmp/scratch/cloud-hypervisor --version";
    let contract = lab.host.check(&["sh", "-c", script])?;
    claim(contract.starts_with("cloud-hypervisor v"), || {
        contract.clone()
    })
}

fn programs_run_and_are_told_apart(lab: &mut Lab) -> Result<(), TestError> {
    let output = lab
        .host
        .run(&["sh", "-c", "echo out; echo err >&2; exit 7"])?;
    let found = (
        output.stdout.as_str(),
        output.stderr.as_str(),
        output.status.to_string(),
    );
    claim(
        found == ("out\n", "err\n", "exit status 7".to_owned()),
        || format!("{found:?}"),
    )?;
    let killed = lab.host.run(&["sh", "-c", "kill -TERM $$"])?;
    claim(killed.status.to_string() == "signal 15", || {
        killed.status.to_string()
    })?;
    let many = lab.host.check(&["seq", "1", "200000"])?;
    claim(
        many.lines().count() == 200_000 && many.ends_with("\n200000\n"),
        || format!("{} bytes", many.len()),
    )?;
    let missing = lab.host.run(&["no-such-program"]);
    claim(
        missing.is_err_and(|error| error.to_string().contains("no-such-program")),
        || "a missing program was run".to_owned(),
    )
}

fn host_has_cards_that_vfio_takes_and_gives_back(lab: &mut Lab) -> Result<(), TestError> {
    let before = lab.host.pci()?;
    let cards: Vec<Card> = before.iter().map(|device| device.card).collect();
    claim(cards == Card::ALL, || {
        format!("not all cards are there: {before:?}")
    })?;
    let groups: BTreeSet<u32> = before.iter().filter_map(|device| device.group).collect();
    let group = |card| lab.host.pci_device(card).map(|device| device.group);
    claim(
        groups.len() == Card::ALL.len() - 1 && group(Card::PairedEdu)? == group(Card::PairedDisk)?,
        || format!("each should be in a group of its own, but for two of one slot: {before:?}"),
    )?;
    let watch = DmaWatch::begin(&lab.host)?;
    for card in Card::ALL {
        let binding = lab.host.bind_vfio(card)?;
        let group = binding.group_file();
        lab.host.check(&["test", "-c", &group])?;
        if lab.kernel.name == lab_kernel::NAME {
            lab.host.check(&["test", "-c", "/dev/iommu"])?;
            lab.host
                .check(&["test", "-d", &format!("{}/vfio-dev", binding.path())])?;
        }
        binding.release()?;
        claim(!lab.host.exists(&group)?, || format!("{group} is left"))?;
    }
    // Nobody but the cards is behind the IOMMU: the host's own devices map nothing.
    let maps = watch.read()?;
    claim(maps == DmaMaps::default(), || {
        format!("the host maps memory for devices that nobody uses: {maps:?}")
    })?;
    watch.end()?;
    let after = lab.host.pci()?;
    claim(after == before, || {
        format!("the cards are not as before: {before:?}, {after:?}")
    })
}

fn host_cards_are_pulled_out_and_put_in(lab: &mut Lab) -> Result<(), TestError> {
    for card in Card::ALL.into_iter().filter(|card| card.has_port()) {
        let before = lab.host.pci_device(card)?;
        lab.host.pull_out(card)?;
        lab.host.await_pulled_out(card)?;
        claim(!lab.host.exists(&before.path())?, || {
            format!("{before:?} is out, the host still has it")
        })?;
        lab.host.put_in(card)?;
        lab.host.await_put_in(&before)?;
        // Its driver is found a moment later where that is built in.
        eventually("the card is as before", || {
            Ok(lab.host.pci_device(card)?.driver == before.driver)
        })?;
    }
    Ok(())
}
