//! The life of a VM over REST.

use std::time::Duration;

use lab_agent::host_protocol::ExitStatus;
use serde_json::json;

use super::remote::{Remote, waiting_vmm};
use super::support::{LAB_USER, MIB, eventually, has_memory, initramfs, no_complaints, scratch};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::Guest;
use crate::share::{ImageForm, kernel_path};
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "a_vm_lives_and_ends_over_rest",
        run: a_vm_lives_and_ends_over_rest,
    },
    GuestTest {
        name: "a_vm_is_created_without_rights_to_kvm",
        run: a_vm_is_created_without_rights_to_kvm,
    },
];

const END: Duration = PATIENCE;

/// A VM's configuration as a file on the host; gives its path and its text.
fn config(lab: &Lab) -> Result<(String, String), TestError> {
    let path = format!("{SCRATCH}/vm.json");
    let config = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {
            "size": 0,
            "zones": [{"id": "z0", "size": 512 * MIB, "file": lab.host.dax()[0].path, "shared": true}],
        },
        "payload": {
            "kernel": kernel_path(&lab.kernel.release, ImageForm::Elf),
            "initramfs": initramfs(lab),
            "cmdline": "console=ttyS0 panic=-1 quiet",
        },
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    });
    let text = config.to_string();
    lab.host.write_file(&path, text.as_bytes())?;
    Ok((path, text))
}

fn a_vm_lives_and_ends_over_rest(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let remote = Remote::new();
    let (path, text) = config(lab)?;
    let mut guest = Guest::start(&lab.host, waiting_vmm(&remote, &[], None))?;
    remote.ready(lab)?;
    let ping = remote.ok(lab, &["ping"])?;
    claim(ping.contains("version"), || format!("ping says {ping}"))?;
    nothing_is_there_yet(lab, &remote)?;
    let numbers = remote.metrics(lab)?;
    claim(numbers["daxhund_vm_state{state=\"NoVm\"}"] > 0.0, || {
        format!("there is no VM, and its metrics say {numbers:?}")
    })?;

    remote.ok(lab, &["create", &path])?;
    remote.expect_state(lab, "Created")?;
    remote.refused(lab, &["create", &path], &[])?;
    remote.answers(lab, ("PUT", "/api/v1/vm.pause", ""), "409", &[])?;
    remote.ok(lab, &["boot"])?;
    remote.expect_state(lab, "Running")?;
    guest.wait_ready()?;
    has_memory(&mut guest, 512 * MIB)?;
    no_complaints(&mut guest)?;
    memory_is_where_it_is_said_to_be(lab, &remote)?;

    remote.answers(lab, ("PUT", "/api/v1/vm.pause", "{}"), "400", &[])?;
    // What the kernel does about one that it does not know the reason of is to say so and go on.
    let before = nmis(&mut guest)?;
    remote.ok(lab, &["nmi"])?;
    eventually("the guest takes the NMI", || {
        Ok(nmis(&mut guest)? == before + 1)
    })?;
    remote.ok(lab, &["pause"])?;
    remote.ok(lab, &["nmi"])?;
    remote.expect_state(lab, "Paused")?;
    let frame = remote.frame(lab)?;
    claim(frame["state"] == "Paused", || {
        format!("the VM is paused, `watch` says {frame}")
    })?;
    remote.answers(lab, ("PUT", "/api/v1/vm.pause", ""), "409", &[])?;
    remote.ok(lab, &["resume"])?;
    remote.expect_state(lab, "Running")?;
    guest.ask("ping")?;
    eventually(
        "the guest takes the NMI that came while it was held",
        || Ok(nmis(&mut guest)? == before + 2),
    )?;
    remote.ok(lab, &["reboot"])?;
    let uptime = guest.wait_ready()?;
    claim(uptime < 60.0, || {
        format!("after the reboot, the guest is up for {uptime} s")
    })?;

    // Ended and started once more: the configuration is still there.
    remote.ok(lab, &["shutdown"])?;
    remote.expect_state(lab, "Created")?;
    remote.ok(lab, &["boot"])?;
    guest.wait_ready()?;
    remote.ok(lab, &["delete"])?;
    remote.answers(lab, ("GET", "/api/v1/vm.info", ""), "404", &[])?;
    // What held the memory has let go of it: the same VM can be made anew.
    remote.answers(lab, ("PUT", "/api/v1/vm.create", &text), "204", &[])?;
    remote.ok(lab, &["delete"])?;
    remote.ok(lab, &["shutdown-vmm"])?;
    let status = guest.vmm().wait(END)?;
    claim(status == ExitStatus::Code(0), || {
        format!("vmm.shutdown ended the VMM with {status}")
    })?;
    claim(!lab.host.exists(remote.socket())?, || {
        "the socket is left behind".to_owned()
    })
}

/// All RAM is on the one device, nobody but the guest has it, and the metrics say the same.
fn memory_is_where_it_is_said_to_be(lab: &Lab, remote: &Remote) -> Result<(), TestError> {
    let dax = &lab.host.dax()[0].path;
    let regions = remote.regions(lab)?;
    let told = || format!("512 MiB are on {dax}, `regions` says {regions:?}");
    let sizes = regions.iter().map(|region| region["size"].as_u64());
    claim(sizes.sum::<Option<u64>>() == Some(512 * MIB), told)?;
    for region in &regions {
        let backing = &region["backing"];
        let is_there = region["id"] == "z0"
            && region["state"] == "present"
            && backing["kind"] == "device-dax"
            && backing["path"] == **dax;
        let holders = region["holders"].as_array().cloned().unwrap_or_default();
        let has = |by: &str| holders.iter().find(|holder| holder["by"] == by);
        let guest = has("kvm").is_some_and(|kvm| kvm["bytes"] == region["size"]);
        let pinned = has("type1").or_else(|| has("iommufd"));
        claim(is_there && guest && pinned.is_none(), told)?;
    }
    let numbers = remote.metrics(lab)?;
    let sum = |family: &str| -> f64 {
        let of_it = numbers.iter().filter(|(name, _)| name.starts_with(family));
        of_it.map(|(_, value)| value).sum()
    };
    let bytes = regions.iter().filter_map(|region| region["size"].as_f64());
    let is_same = sum("daxhund_region_bytes{").to_bits() == bytes.sum::<f64>().to_bits();
    let exits = sum("daxhund_vcpu_exits_total{");
    claim(is_same && exits > 0.0, || {
        format!("a guest has booted, its metrics say {numbers:?}")
    })
}

/// Non-maskable interrupts that the guest's first processor has taken.
fn nmis(guest: &mut Guest) -> Result<u64, TestError> {
    let table = guest.cat("/proc/interrupts")?;
    let row = table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("NMI:"));
    let count = row.and_then(|row| row.split_whitespace().next()?.parse().ok());
    count.ok_or_else(|| TestError::Claim(format!("no count of NMIs in {table}")))
}

/// Before a VM exists; and requests that nobody should make.
fn nothing_is_there_yet(lab: &Lab, remote: &Remote) -> Result<(), TestError> {
    for request in [
        ("GET", "/api/v1/vm.info", "", "404", ""),
        ("PUT", "/api/v1/vm.boot", "", "404", ""),
        ("GET", "/api/v1/vm.nonsense", "", "404", ""),
        ("PUT", "/api/v1/vm.create", "{", "400", ""),
        (
            "PUT",
            "/api/v1/vm.create",
            r#"{"memroy":{}}"#,
            "400",
            "memroy",
        ),
    ] {
        let (method, target, body, status, said) = request;
        remote.answers(lab, (method, target, body), status, &[said])?;
    }
    remote.ok(lab, &["ping"])?;
    Ok(())
}

fn a_vm_is_created_without_rights_to_kvm(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let (path, _) = config(lab)?;
    lab.host.check(&["chmod", "777", SCRATCH])?;
    let mode = lab.host.check(&["stat", "-c", "%a", "/dev/kvm"])?;
    lab.host.check(&["chmod", "600", "/dev/kvm"])?;
    let story = || {
        let remote = Remote::new();
        let vmm = lab.host.spawn(waiting_vmm(&remote, &[], Some(LAB_USER)))?;
        remote.ready(lab)?;
        remote.ok(lab, &["create", &path])?;
        remote.refused(lab, &["boot"], &["/dev/kvm"])?;
        remote.expect_state(lab, "Created")?;
        remote.ok(lab, &["ping"])?;
        remote.ok(lab, &["shutdown-vmm"])?;
        let status = vmm.wait(END)?;
        claim(status == ExitStatus::Code(0), || {
            format!("vmm.shutdown ended the VMM with {status}")
        })
    };
    let outcome = story();
    lab.host.check(&["chmod", mode.trim(), "/dev/kvm"])?;
    outcome
}
