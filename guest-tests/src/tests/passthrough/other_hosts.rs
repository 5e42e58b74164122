//! Hosts that lack what passthrough takes: it is named, and a guest without devices does not miss it.
//!
//! Each host is another one, booted beside the one that is up.

use std::sync::Arc;

use super::super::support::{GIB, MIB, boot_on, power_off};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{By, boot, keeps_blocks, ram, start_refused, word};
use crate::host::cards::Card;
use crate::host::inventory::differences;
use crate::host::machine::{Contents, Dimm, Iommu, Machine, PageArray};
use crate::suite::chain;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "passthrough_without_an_iommu_is_refused",
        run: without_iommu,
    },
    GuestTest {
        name: "passthrough_wants_remapped_interrupts_and_memory_within_reach",
        run: |lab| poor_iommu(lab, By::Groups),
    },
];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_wants_remapped_interrupts_and_memory_within_reach_by_iommufd",
    run: |lab| poor_iommu(lab, By::Iommufd),
}];

/// Boots a host with this IOMMU and one drive to give away, and tells `story` on it. It has to leave the host as it was.
fn on_another_host(
    lab: &Lab,
    iommu: Option<Iommu>,
    story: impl FnOnce(&Lab) -> Result<(), TestError>,
) -> Result<(), TestError> {
    let machine = Machine {
        memory_bytes: 2 * GIB,
        dimms: vec![Dimm {
            size_bytes: GIB,
            align_bytes: 2 * MIB,
            page_array: PageArray::Memory,
            contents: Contents::Fresh,
        }],
        iommu,
        cards: vec![Card::Disk],
        ..Machine::default()
    };
    let host = lab
        .setup
        .boot_beside(&lab.kernel, machine, "other-iommu-host")?;
    let other = Lab {
        host,
        kernel: lab.kernel.clone(),
        full: lab.full,
        setup: Arc::clone(&lab.setup),
    };
    let before = other.host.inventory()?;
    let outcome = story(&other).and_then(|()| {
        let changes = differences(&before, &other.host.inventory()?);
        claim(changes.is_empty(), || {
            format!("the host is not as it was:\n{}", changes.join("\n"))
        })
    });
    outcome.map_err(|error| {
        TestError::Claim(format!(
            "on a host with {iommu:?}: {}\n{}",
            chain(&error),
            other.host.evidence()
        ))
    })
}

fn without_iommu(lab: &mut Lab) -> Result<(), TestError> {
    on_another_host(lab, None, |lab| {
        let disk = lab.host.pci_device(Card::Disk)?;
        claim(disk.group.is_none(), || {
            format!("without an IOMMU there are no groups: {disk:?}")
        })?;
        // VFIO takes no such device, so whoever tries to bind it ends here as well.
        let word = format!("path={},id=d0", disk.path());
        let said = [disk.address.as_str(), "no IOMMU group", "intel_iommu=on"];
        start_refused(lab, By::Groups, &[&ram(lab)], &word, &said)?;
        power_off(boot_on(lab, &[&ram(lab)])?)
    })
}

/// No remapping of interrupts, which the kernel takes for a reason to refuse until it is told not to; and addresses of 39 bits,
/// as IOMMUs of desktops have them.
fn poor_iommu(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let iommu = Iommu {
        remaps_interrupts: false,
        address_bits: 39,
    };
    on_another_host(lab, Some(iommu), |lab| {
        let module = match by {
            By::Groups => "vfio_iommu_type1",
            By::Iommufd => "iommufd",
        };
        let parameter = format!("/sys/module/{module}/parameters/allow_unsafe_interrupts");
        let card = lab.host.bind_vfio(Card::Disk)?;
        let (address, zone) = (card.device().address.as_str(), ram(lab));
        let said = [address, "interrupt remapping", &parameter];
        start_refused(lab, by, &[&zone], &word(&card), &said)?;
        power_off(boot_on(lab, &[&zone])?)?;

        // The risk is accepted, in the way that the refusal tells.
        lab.host.sh(&format!("echo 1 > {parameter}"))?;
        let mut guest = boot(lab, by, &[&card])?;
        keeps_blocks(&mut guest, "/dev/nvme0n1", MIB, 17)?;
        power_off(guest)?;

        // From 512 MiB to the hole, and on above it beyond 512 GiB. Nothing of it is pinned: there is not that much.
        let far = "id=far,size=512G,shared=on";
        let said = ["far", "0x8000000000", "out of the IOMMU's reach"];
        start_refused(lab, by, &[&zone, far], &word(&card), &said)?;
        Ok(card.release()?)
    })
}
