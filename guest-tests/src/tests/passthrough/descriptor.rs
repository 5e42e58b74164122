//! Whoever starts the VMM opens the device, and the VMM needs no right to it.

use lab_agent::guest_protocol::InterruptKind;

use super::super::support::{LAB_USER, MIB, no_complaints, open_to_all, power_off, refused_as};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{
    DRIVERS, as_user_after, interrupts_arrive, is_driven, keeps_blocks, ram, spec_of_choice,
};
use crate::guest::Guest;
use crate::host::cards::Card;

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_device_can_be_handed_over_open_by_iommufd",
    run: handed_over,
}];

fn handed_over(lab: &mut Lab) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Disk)?;
    let file = card.device_file()?;
    let argv = |device: &str| {
        // The descriptor says how the device is to be had: nothing else asks for iommufd.
        let mut spec = spec_of_choice(lab, &[&ram(lab)], &[]);
        spec.arguments
            .extend(["--device", device].map(str::to_owned));
        spec.argv()
    };
    let dax = lab.host.dax()[0].path.clone();
    open_to_all(lab, &["/dev/kvm", "/dev/iommu", &dax], || {
        // Without it, this user has no way to the device.
        let by_path = format!("path={},id=d0", card.path());
        let words = argv(&by_path);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        refused_as(lab, &words, Some(LAB_USER), 1, &["d0", "no permission"])?;

        let prelude = format!("ulimit -l unlimited && exec 7<>{file}");
        let spawn = as_user_after(&prelude, argv("fd=7,id=nvme0"));
        let mut guest = Guest::start(&lab.host, spawn)?;
        guest.wait_ready()?;
        guest.modprobe(&DRIVERS)?;
        is_driven(&mut guest, Card::Disk)?;
        keeps_blocks(&mut guest, "/dev/nvme0n1", 4 * MIB, 81)?;
        interrupts_arrive(lab, &mut guest, &card, InterruptKind::MsiX)?;
        no_complaints(&mut guest)?;
        // It is as reset, and ours, after a reboot too.
        guest.leave("reboot")?;
        guest.wait_ready()?;
        guest.modprobe(&DRIVERS)?;
        guest.await_path("/dev/nvme0n1")?;
        let report = guest.compare_blocks("/dev/nvme0n1", 0, 4 * MIB, 81)?;
        claim(report.wrong_words == 0, || format!("{report:?}"))?;
        power_off(guest)
    })?;
    not_a_device(lab, &argv("fd=7,id=d0"))?;
    Ok(card.release()?)
}

/// Descriptors that are none, or of something else.
fn not_a_device(lab: &Lab, argv: &[String]) -> Result<(), TestError> {
    for (prelude, said) in [
        ("exec 7</dev/null", "not an open VFIO device file"),
        ("exec 7<&-", "fd=7"),
    ] {
        let spec = as_user_after(prelude, argv.to_vec());
        let words: Vec<&str> = spec.argv.iter().map(String::as_str).collect();
        let dax = lab.host.dax()[0].path.clone();
        open_to_all(lab, &["/dev/kvm", "/dev/iommu", &dax], || {
            refused_as(lab, &words, None, 1, &["d0", said])
        })?;
    }
    Ok(())
}
