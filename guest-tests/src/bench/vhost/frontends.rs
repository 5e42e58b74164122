//! One disk on device-dax, and guests of several VMMs on it, one after the other.

use super::{Bed, DISK_BYTES, MIB, MODULES};
use crate::bench::boot::{BenchError, MeasureError};
use crate::bench::peer::{DiskWord, Vmm};
use crate::guest::{Guest, LEAVE_DEADLINE};
use crate::progress::step;

const DISK: &str = "/dev/vda";
/// Written at both ends of the disk.
const PIECE: u64 = 2 * MIB;
const PLACES: [u64; 2] = [0, DISK_BYTES - PIECE];

/// Gives the names of those whose guests could use it.
pub(super) fn run(bed: &Bed<'_>, vmms: &[Vmm]) -> Result<Vec<String>, BenchError> {
    let mut names = Vec::new();
    for (seed, vmm) in (1..).zip(vmms) {
        bed.host.forget_programs();
        let what = format!("a guest of {} uses a disk on device-dax", vmm.name);
        step(&what, || once(bed, vmm, seed))
            .map_err(|error| BenchError::measure(&vmm.name, bed.host, error))?;
        names.push(vmm.name.clone());
    }
    Ok(names)
}

fn once(bed: &Bed<'_>, vmm: &Vmm, seed: u64) -> Result<(), MeasureError> {
    let disks = [DiskWord::Served(bed.daemons.dax.socket.clone())];
    let start = || Guest::start(bed.host, vmm.spawn_spec_with_disks(&bed.work, &disks));
    let mut guest = start()?;
    guest.wait_ready()?;
    finds(&mut guest)?;
    if seed > 1 {
        keeps(&mut guest, seed - 1)?;
    }
    for place in PLACES {
        guest.fill_blocks(DISK, place, PIECE, seed)?;
    }
    keeps(&mut guest, seed)?;
    guest.leave("reboot")?;
    if !vmm.resets() {
        guest.vmm().wait(LEAVE_DEADLINE)?;
        guest = start()?;
    }
    guest.wait_ready()?;
    finds(&mut guest)?;
    keeps(&mut guest, seed)?;
    guest.leave("poweroff")?;
    guest.vmm().wait(LEAVE_DEADLINE)?;
    Ok(())
}

fn finds(guest: &mut Guest) -> Result<(), MeasureError> {
    guest.modprobe(&MODULES)?;
    guest.await_path(DISK)?;
    is_the_dax_disk(guest)
}

/// The first disk says that it is the one on device-dax.
pub(super) fn is_the_dax_disk(guest: &mut Guest) -> Result<(), MeasureError> {
    let serial = guest.cat("/sys/block/vda/serial")?;
    if serial.starts_with("dax") {
        return Ok(());
    }
    Err(MeasureError::Wrong {
        what: "vda is the disk on device-dax",
        found: format!("its serial number is {serial:?}"),
    })
}

fn keeps(guest: &mut Guest, seed: u64) -> Result<(), MeasureError> {
    for place in PLACES {
        let report = guest.compare_blocks(DISK, place, PIECE, seed)?;
        if report.wrong_words != 0 || report.words != PIECE / 8 {
            return Err(MeasureError::Wrong {
                what: "what was written is read",
                found: format!("at {place}, {report:?}"),
            });
        }
    }
    Ok(())
}
