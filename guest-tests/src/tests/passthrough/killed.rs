//! A VMM that dies without a word leaves nothing of its devices behind: the next one has them at once.

use lab_agent::host_protocol::ExitStatus;

use super::super::support::{MIB, dax_zone, no_complaints, open_to_all, power_off};
use super::super::{GuestTest, Lab, TestError, claim};
use super::{By, COMPLAINTS, DRIVERS, as_user_after, carries_data, keeps_blocks, spec};
use crate::guest::Guest;
use crate::host::account::{DmaWatch, kernel_says, pins, vfio_interrupts};
use crate::host::cards::Card;
use crate::host::process::SIGKILL;

pub(super) const TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_devices_of_a_killed_vmm_are_free_at_once",
    run: |lab| killed(lab, By::Groups),
}];

pub(super) const IOMMUFD_TESTS: &[GuestTest] = &[GuestTest {
    name: "passthrough_devices_of_a_killed_vmm_are_free_at_once_by_iommufd",
    run: |lab| killed(lab, By::Iommufd),
}];

/// Of each kind of memory.
const ZONE: u64 = 256 * MIB;
/// Enough for one guest, not for two; of a user's memory, all that is pinned counts.
const LIMIT: &str = "ulimit -l 786432";

fn killed(lab: &mut Lab, by: By) -> Result<(), TestError> {
    let disk = lab.host.bind_vfio(Card::Disk)?;
    let network = lab.host.bind_vfio(Card::Network)?;
    let mut files = vec!["/dev/kvm".to_owned(), lab.host.dax()[0].path.clone()];
    files.extend(match by {
        By::Groups => vec![disk.group_file(), network.group_file()],
        By::Iommufd => vec![
            disk.device_file()?,
            network.device_file()?,
            "/dev/iommu".to_owned(),
        ],
    });
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let zones = ["id=z0,size=256M", &dax_zone(lab, "z1", 0, ZONE, 0)];
    let spec = spec(lab, by, &zones, &[&disk, &network]);
    let start = || -> Result<Guest, TestError> {
        let mut guest = Guest::start(&lab.host, as_user_after(LIMIT, spec.argv()))?;
        guest.wait_ready()?;
        guest.modprobe(&DRIVERS)?;
        guest.await_path("/dev/nvme0n1")?;
        Ok(guest)
    };
    let watch = DmaWatch::begin(&lab.host)?;
    let complaints = kernel_says(&lab.host, &COMPLAINTS)?.len();
    let held = || pins(&lab.host).map(|pins| pins.acquired.saturating_sub(pins.released));
    let held_before = held()?;
    open_to_all(lab, &files, || {
        let mut guest = start()?;
        carries_data(&mut guest, MIB)?;
        // The drive is at work when it happens.
        guest.sh(
            "( while dd if=/dev/nvme0n1 of=/dev/null bs=1M count=64 iflag=direct; do echo more > /tmp/more; done ) \
             > /tmp/log 2>&1 &",
        )?;
        guest.await_path("/tmp/more")?;
        guest.vmm().signal(SIGKILL)?;
        let status = guest.wait_end()?;
        claim(status == ExitStatus::Signal(SIGKILL), || {
            format!("killed, it ended with {status}")
        })?;
        let maps = watch.read()?;
        claim(maps.live_bytes() == 0, || {
            format!("the killed VMM's memory is still mapped for DMA: {maps:?}")
        })?;
        for binding in [&disk, &network] {
            let left = vfio_interrupts(&lab.host, &binding.device().address)?;
            claim(left.is_empty(), || {
                format!("the host still takes interrupts for {binding:?}: {left:?}")
            })?;
        }
        // A container does not give back pages of device-dax one by one, whoever closes it.
        let dax_pages = if by == By::Groups { ZONE / 4096 } else { 0 };
        let left = held()?.saturating_sub(held_before);
        claim(left <= dax_pages, || {
            format!("{left} pages are still pinned, expected {dax_pages} at most")
        })?;

        // The same user, within the same limit.
        let mut guest = start()?;
        keeps_blocks(&mut guest, "/dev/nvme0n1", 4 * MIB, 71)?;
        carries_data(&mut guest, MIB)?;
        no_complaints(&mut guest)?;
        power_off(guest)
    })?;
    let maps = watch.read()?;
    claim(maps.live_bytes() == 0, || {
        format!("something is still mapped for DMA: {maps:?}")
    })?;
    watch.end()?;
    let said = kernel_says(&lab.host, &COMPLAINTS)?;
    claim(said.len() == complaints, || {
        format!("the host's kernel complains: {said:?}")
    })?;
    disk.release()?;
    Ok(network.release()?)
}
