//! What can't start says why, what is so and what mends it; and leaves nothing behind (the suite compares).

use lab_agent::host_protocol::SpawnSpec;

use super::support::{
    GIB, MIB, boot_on, dax_zone, has_memory, initramfs, on_fs_dax, power_off, refused, refused_as,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::share::{ImageForm, kernel_path};
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "bad_kernels_are_named",
        run: bad_kernels_are_named,
    },
    GuestTest {
        name: "bad_initramfs_are_named",
        run: bad_initramfs_are_named,
    },
    GuestTest {
        name: "memory_that_does_not_do_is_refused",
        run: memory_that_does_not_do_is_refused,
    },
    GuestTest {
        name: "bad_dax_ranges_are_refused_before_they_are_mapped",
        run: bad_dax_ranges_are_refused_before_they_are_mapped,
    },
    GuestTest {
        name: "what_is_not_device_dax_is_told_apart",
        run: what_is_not_device_dax_is_told_apart,
    },
    GuestTest {
        name: "a_file_on_fs_dax_is_ram_without_dma",
        run: a_file_on_fs_dax_is_ram_without_dma,
    },
    GuestTest {
        name: "a_dax_device_without_driver_is_named",
        run: a_dax_device_without_driver_is_named,
    },
    GuestTest {
        name: "a_dax_device_in_system_ram_mode_is_named",
        run: a_dax_device_in_system_ram_mode_is_named,
    },
    GuestTest {
        name: "a_device_that_vanishes_between_open_and_map_is_an_error",
        run: a_device_that_vanishes_between_open_and_map_is_an_error,
    },
    GuestTest {
        name: "missing_permissions_are_named",
        run: missing_permissions_are_named,
    },
    GuestTest {
        name: "a_host_without_kvm_is_named",
        run: a_host_without_kvm_is_named,
    },
    GuestTest {
        name: "numbers_of_vcpus_that_cannot_be_are_refused",
        run: numbers_of_vcpus_that_cannot_be_are_refused,
    },
    GuestTest {
        name: "what_is_not_built_is_refused_by_name",
        run: what_is_not_built_is_refused_by_name,
    },
    GuestTest {
        name: "the_doctor_sees_this_host",
        run: the_doctor_sees_this_host,
    },
];

const DRIVER: &str = "/sys/bus/dax/drivers/device_dax";

fn shell(lab: &Lab, script: &str) -> Result<String, TestError> {
    Ok(lab.host.check(&["sh", "-c", script])?)
}

fn scratch(lab: &Lab) -> Result<(), TestError> {
    lab.host.check(&["mkdir", "-p", SCRATCH])?;
    Ok(())
}

fn with_kernel(lab: &Lab, kernel: &str, words: &[&str]) -> Result<(), TestError> {
    let argv = [
        "daxhund",
        "--kernel",
        kernel,
        "--memory",
        "size=512M",
        "--serial",
        "null",
    ];
    refused_as(lab, &argv, None, 1, words)
}

fn bad_kernels_are_named(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let release = lab.kernel.release.clone();
    for (form, name) in [(ImageForm::Elf, "elf"), (ImageForm::BzImage, "bzimage")] {
        let whole = kernel_path(&release, form);
        let cut = format!("{SCRATCH}/{name}");
        shell(lab, &format!("head -c 1000000 {whole} > {cut}"))?;
        with_kernel(lab, &cut, &[&cut, "truncated", "the file has 1000000"])?;
    }
    with_kernel(
        lab,
        "/nonexistent",
        &["/nonexistent", "can't be read", "No such file"],
    )?;
    with_kernel(lab, "/etc/passwd", &["/etc/passwd", "not an x86-64 kernel"])?;
    with_kernel(lab, "/bin/busybox", &["/bin/busybox", "can't boot here"])?;
    with_kernel(lab, "/tmp", &["not a regular file"])?;
    refused_as(
        lab,
        &["daxhund", "--memory", "size=512M"],
        None,
        2,
        &["--kernel"],
    )
}

fn bad_initramfs_are_named(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let kernel = kernel_path(&lab.kernel.release, ImageForm::Elf);
    let with = |initramfs: &str, words: &[&str]| {
        let argv = [
            "daxhund",
            "--kernel",
            &kernel,
            "--initramfs",
            initramfs,
            "--memory",
            "size=512M",
            "--serial",
            "null",
        ];
        refused_as(lab, &argv, None, 1, words)
    };
    let cut = format!("{SCRATCH}/initramfs");
    let whole = initramfs(lab);
    shell(
        lab,
        &format!("head -c 300000 {whole} > {cut}; : > {SCRATCH}/empty"),
    )?;
    with(&cut, &[&cut, "truncated", "the file has 300000"])?;
    with("/nonexistent", &["/nonexistent", "can't be read"])?;
    with("/etc/passwd", &["/etc/passwd", "not an initramfs"])?;
    with(&format!("{SCRATCH}/empty"), &["is empty"])
}

fn memory_that_does_not_do_is_refused(lab: &mut Lab) -> Result<(), TestError> {
    refused(lab, &["--memory", "size=0"], 2, &["--memory"])?;
    refused(
        lab,
        &["--memory", "size=32M"],
        1,
        &["guest memory is too small", "need", "more memory"],
    )?;
    refused(
        lab,
        &["--memory", "size=512M,hugepages=on,hugepage_size=2M"],
        1,
        &["256 huge pages", "0 free", "nr_hugepages"],
    )?;
    refused(lab, &["--memory", "size=1000"], 2, &["size=1000", "4K"])?;
    refused(
        lab,
        &["--memory-zone", "id=a,file=/tmp/nowhere,size=1G"],
        1,
        &["/tmp/nowhere", "does not exist"],
    )
}

fn bad_dax_ranges_are_refused_before_they_are_mapped(lab: &mut Lab) -> Result<(), TestError> {
    let device = lab.host.dax()[1].clone();
    let gib_aligned = lab.host.dax()[2].path.clone();
    let path = &device.path;
    let zone = |words: &str| format!("id=a,file={path},{words}");
    let size = device.size_bytes;
    let cases: [(String, &[&str]); 6] = [
        (zone("size=3M"), &[path, "3M", "2M"]),
        (zone("offset=1M,size=2M"), &[path, "1M", "2M"]),
        (zone("size=64G"), &[path, "64G", "does not fit"]),
        (
            zone(&format!("offset={size},size=2M")),
            &[path, "does not fit"],
        ),
        (zone("size=1G,shared=off"), &[path, "always shared"]),
        (
            format!("id=a,file={gib_aligned},size=512M"),
            &[&gib_aligned, "512M", "1G"],
        ),
    ];
    for (zone, words) in &cases {
        refused(lab, &["--memory-zone", zone], 1, words)?;
    }
    // Two zones that share memory: by the same name it is known from the words alone, by another name from the lock.
    let overlapping = [
        zone("size=64M").replace("id=a", "id=b"),
        format!("id=a,size=64M,offset=32M,file={path}"),
    ];
    refused(
        lab,
        &["--memory-zone", &overlapping[0], &overlapping[1]],
        2,
        &["overlap", path],
    )?;
    scratch(lab)?;
    let link = format!("{SCRATCH}/link");
    shell(lab, &format!("ln -s {path} {link}"))?;
    let by_link = format!("id=c,size=64M,file={link}");
    refused(
        lab,
        &["--memory-zone", &overlapping[0], &by_link],
        1,
        &["memory zone c", "in use"],
    )
}

fn what_is_not_device_dax_is_told_apart(lab: &mut Lab) -> Result<(), TestError> {
    // The share is a network file system; the root file system is tmpfs, whose files may be memory.
    let plain = initramfs(lab);
    [
        (plain.as_str(), "a plain file"),
        ("/sys", "a directory"),
        ("/dev/null", "character device"),
        ("/dev/kvm", "character device"),
    ]
    .into_iter()
    .try_for_each(|(path, kind)| {
        let zone = format!("id=a,size=4M,file={path}");
        refused(
            lab,
            &["--memory-zone", &zone],
            1,
            &["memory zone a", path, kind, "not a dax device"],
        )
    })
}

fn a_file_on_fs_dax_is_ram_without_dma(lab: &mut Lab) -> Result<(), TestError> {
    let lab = &*lab;
    on_fs_dax(lab, |place| {
        lab.host
            .sh(&format!("dd if=/dev/zero of={place}/ram bs=1M count=512"))?;
        let zone = format!("id=fs,size=512M,file={place}/ram");
        let mut guest = boot_on(lab, &[&zone])?;
        has_memory(&mut guest, 512 * MIB)?;
        let said = guest.vmm().stderr();
        claim(said.contains("no device can do DMA"), || {
            format!("no warning: {said}")
        })?;
        power_off(guest)?;
        let past = format!("id=fs,size=1G,file={place}/ram");
        refused(
            lab,
            &["--memory-zone", &past],
            1,
            &["past the end", "SIGBUS"],
        )
    })
}

fn a_dax_device_without_driver_is_named(lab: &mut Lab) -> Result<(), TestError> {
    let device = lab.host.dax()[1].clone();
    shell(lab, &format!("echo {} > {DRIVER}/unbind", device.name))?;
    let zone = format!("id=a,size=512M,file={}", device.path);
    // Its node stays; the driver that lets it be mapped is gone.
    let outcome = refused(
        lab,
        &["--memory-zone", &zone],
        1,
        &[&device.path, "no driver", "daxctl enable-device"],
    );
    shell(lab, &format!("echo {} > {DRIVER}/bind", device.name))?;
    outcome
}

fn a_dax_device_in_system_ram_mode_is_named(lab: &mut Lab) -> Result<(), TestError> {
    let device = lab.host.dax()[1].clone();
    let name = &device.name;
    let policy = "/sys/devices/system/memory/auto_online_blocks";
    let before = lab.host.read_text(policy)?;
    shell(
        lab,
        &format!(
            "echo offline > {policy} && daxctl reconfigure-device -m system-ram --no-online {name}"
        ),
    )?;
    let zone = format!("id=a,size=512M,file={}", device.path);
    let words = [
        device.path.as_str(),
        "system-ram",
        "daxctl reconfigure-device -m devdax",
    ];
    let outcome = refused(lab, &["--memory-zone", &zone], 1, &words);
    shell(
        lab,
        &format!("daxctl reconfigure-device -m devdax {name}; echo {before} > {policy}"),
    )?;
    outcome
}

fn a_device_that_vanishes_between_open_and_map_is_an_error(lab: &mut Lab) -> Result<(), TestError> {
    let device = lab.host.dax()[1].clone();
    // The library alone: open, unbind, map. (A VMM gives no chance to get in between.)
    let output = lab.host.run(&["lab-agent", "dax-vanish", &device.path])?;
    shell(lab, &format!("echo {} > {DRIVER}/bind", device.name))?;
    claim(
        output.status.success() && output.stdout.contains("vanished while"),
        || format!("{output:?}"),
    )?;
    power_off(boot_on(lab, &[&dax_zone(lab, "z0", 1, 512 * MIB, 0)])?)
}

const LAB_USER: u32 = 1000;

fn missing_permissions_are_named(lab: &mut Lab) -> Result<(), TestError> {
    let device = lab.host.dax()[1].path.clone();
    let kernel = kernel_path(&lab.kernel.release, ImageForm::Elf);
    let initramfs = initramfs(lab);
    let zone = format!("id=a,size=512M,file={device}");
    let argv = [
        "daxhund",
        "--kernel",
        &kernel,
        "--initramfs",
        &initramfs,
        "--memory-zone",
        &zone,
        "--serial",
        "null",
    ];
    let mode = shell(lab, "stat -c %a /dev/kvm")?;
    shell(lab, "chmod 600 /dev/kvm")?;
    let without_kvm = refused_as(
        lab,
        &argv,
        Some(LAB_USER),
        1,
        &["/dev/kvm", "uid 1000", "mode 600", "usermod"],
    );
    shell(lab, "chmod 666 /dev/kvm")?;
    let without_dax = refused_as(
        lab,
        &argv,
        Some(LAB_USER),
        1,
        &[&device, "uid 1000", "0600", "chmod", "udev"],
    );
    shell(lab, &format!("chmod {} /dev/kvm", mode.trim()))?;
    without_kvm.and(without_dax)
}

fn a_host_without_kvm_is_named(lab: &mut Lab) -> Result<(), TestError> {
    shell(lab, "mv /dev/kvm /dev/kvm.away")?;
    let outcome = refused(
        lab,
        &["--memory", "size=512M"],
        1,
        &["/dev/kvm", "does not exist", "modprobe kvm_amd"],
    )
    .and_then(|()| {
        let doctor = lab.host.run(&["daxhund", "doctor"])?;
        claim(
            !doctor.status.success() && doctor.stdout.contains("modprobe"),
            || format!("{doctor:?}"),
        )
    });
    shell(lab, "mv /dev/kvm.away /dev/kvm")?;
    outcome
}

fn numbers_of_vcpus_that_cannot_be_are_refused(lab: &mut Lab) -> Result<(), TestError> {
    for (cpus, word) in [
        ("boot=0", "boot=0"),
        ("boot=4,max=2", "max is below boot"),
        ("boot=255", "254"),
        ("boot=two", "two"),
    ] {
        refused(
            lab,
            &["--memory", "size=512M", "--cpus", cpus],
            2,
            &["--cpus", word],
        )?;
    }
    Ok(())
}

fn what_is_not_built_is_refused_by_name(lab: &mut Lab) -> Result<(), TestError> {
    for flag in ["--pvpanic", "--user-device", "--vdpa", "--tpm"] {
        let message = format!("not supported by daxhund: {flag}");
        refused(
            lab,
            &["--memory", "size=512M", flag, "path=/x"],
            2,
            &[&message],
        )?;
    }
    refused(
        lab,
        &["--memory", "size=512M,colour=red"],
        2,
        &["colour", "size"],
    )?;
    refused(
        lab,
        &["--memory", "size=512M", "--net", "bw_size=1000"],
        2,
        &["not supported by daxhund", "bw_size"],
    )?;
    refused(lab, &["--no-such-flag"], 2, &["--no-such-flag"])
}

fn the_doctor_sees_this_host(lab: &mut Lab) -> Result<(), TestError> {
    let table = lab.host.run(&["daxhund", "doctor"])?;
    claim(table.status.success(), || format!("{table:?}"))?;
    for device in lab.host.dax() {
        claim(
            table
                .stdout
                .lines()
                .any(|line| line.starts_with("OK") && line.contains(&device.name)),
            || format!("{} is not OK: {}", device.name, table.stdout),
        )?;
    }
    let json = lab.host.check(&["daxhund", "doctor", "--json"])?;
    let rows: serde_json::Value = serde_json::from_str(&json)
        .map_err(|error| TestError::Claim(format!("{error}: {json}")))?;
    claim(rows.to_string().contains(r#""kvm""#), || json.clone())?;
    // Without privilege it says what it can't see, and does not fail by itself.
    let spec = SpawnSpec {
        argv: vec!["daxhund".into(), "doctor".into()],
        uid: Some(LAB_USER),
        ..SpawnSpec::default()
    };
    let plain = lab.host.spawn(spec)?.finish(crate::host::RUN_DEADLINE)?;
    claim(!plain.stdout.is_empty() && plain.stderr.is_empty(), || {
        format!("{plain:?}")
    })?;
    // Root's VMMs hold removals by a helper; a user's need the daemon.
    let guard = |stdout: &str| {
        let mut lines = stdout.lines();
        let row = lines.find(|line| line.contains("removal-guard"));
        row.unwrap_or_default().to_owned()
    };
    claim(
        guard(&table.stdout).starts_with("OK")
            && guard(&plain.stdout).starts_with("WARN")
            && plain.stdout.contains("daxhund-guardd.socket"),
        || format!("{}{}", table.stdout, plain.stdout),
    )?;
    // Two holders of one range can't be; the doctor names the one there is.
    let guest = boot_on(lab, &[&dax_zone(lab, "z0", 0, GIB, 0)])?;
    let busy = lab.host.check(&["daxhund", "doctor"])?;
    claim(
        busy.lines()
            .any(|line| line.contains(&lab.host.dax()[0].name) && line.contains("daxhund")),
        || busy.clone(),
    )?;
    power_off(guest)
}
