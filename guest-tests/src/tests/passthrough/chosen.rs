//! Nobody has said which of the kernel's interfaces is to be used.

use super::super::support::{MIB, power_off};
use super::super::{GuestTest, Lab, TestError};
use super::{DRIVERS, is_driven, keeps_blocks, ram, spec_of_choice};
use crate::guest::Guest;
use crate::host::RUN_DEADLINE;
use crate::host::cards::Card;

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_by_iommufd_is_chosen_for_memory_whose_removal_is_held",
    run: chosen,
}];

/// An unpin by iommufd looks at pages that an unannounced removal takes away.
fn chosen(lab: &mut Lab) -> Result<(), TestError> {
    let card = lab.host.bind_vfio(Card::Disk)?;
    for (guard, space) in [("on", "iommufd"), ("off", "type1")] {
        let mut spec = spec_of_choice(lab, &[&ram(lab)], &[&card]);
        let words = ["-v", "--removal-guard", guard];
        spec.arguments.extend(words.map(str::to_owned));
        let mut guest = Guest::boot(&lab.host, &spec)?;
        guest
            .vmm()
            .wait_for_error(&format!("space={space}"), RUN_DEADLINE)?;
        guest.modprobe(&DRIVERS)?;
        is_driven(&mut guest, Card::Disk)?;
        keeps_blocks(&mut guest, "/dev/nvme0n1", MIB, 83)?;
        power_off(guest)?;
    }
    Ok(card.release()?)
}
