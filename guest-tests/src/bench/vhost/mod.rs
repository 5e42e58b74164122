//! Disks that another process serves, against each other and against the VMM's own.
//!
//! ```text
//!   use        each VMM's guest: compares what the one before wrote ─ writes ─ reads back ─ is reset ─ reads back ─ powers off
//!   reads      one guest with all the disks:  vda ◀─ daxhund-vhost-user-blk ◀─ /dev/dax1.0
//!              (a new one in each round)      vdb ◀─ qemu-storage-daemon    ◀─ a file on tmpfs
//!                                             vdc ◀─ the VMM itself         ◀─ another file on tmpfs   (daxhund's only)
//!   exchange   a guest of 1, 2, 4 GiB: a disk of either daemon comes and goes
//! ```
//! The disks have the same size and are read in turn; who is first alternates between rounds. Beside what a guest gets of a disk
//! stands the time that its server spends on a processor. All are an emulator's figures: only ratios count.

mod daemons;
mod exchange;
mod frontends;
mod reads;

use std::path::PathBuf;

use comfy_table::Table;
use comfy_table::presets::ASCII_BORDERS_ONLY_CONDENSED;
use serde::Serialize;

use super::boot::BenchError;
use super::peer::{Vmm, Workload};
use super::results::keep;
use super::statistics::Summary;
use crate::cli::{Peer, VhostPart};
use crate::guest::GuestSpec;
use crate::host::Host;
use crate::host::machine::Machine;
use crate::setup::Setup;
use crate::share::{ImageForm, Initramfs, initramfs_path, kernel_path};

const MIB: u64 = 1 << 20;
/// Each disk's. Small enough for files of this size to stay in the host's memory beside a guest.
const DISK_BYTES: u64 = 64 * MIB;
/// RAM of the guests that read.
const MEMORY_MIB: u64 = 768;
/// What a guest needs for its disks.
const MODULES: [&str; 2] = ["virtio_pci", "virtio_blk"];

/// What is written as JSON.
#[derive(Debug, Serialize)]
struct Results {
    host_kernel: String,
    guest_kernel: String,
    disk_bytes: u64,
    memory_mib: u64,
    used_by: Vec<String>,
    reads: Vec<reads::Outcome>,
    exchange: Vec<exchange::Outcome>,
}

/// Runs the bench, or only some of it; gives the path of the results.
pub fn run(
    setup: &Setup,
    peers: &[Peer],
    only: &[VhostPart],
    repeat: u32,
) -> Result<PathBuf, BenchError> {
    let is_wanted = |part| only.is_empty() || only.contains(&part);
    if repeat == 0 {
        return Err(BenchError::NoSamples);
    }
    let mut vmms = vec![Vmm::daxhund()];
    for peer in peers {
        vmms.push(Vmm::peer(peer, &setup.share())?);
    }
    let kernel = setup.kernel();
    let host = setup.boot(kernel, Machine::default())?;
    let [ram, disk, ..] = host.dax() else {
        return Err(BenchError::NoDax);
    };
    let failed = |error| BenchError::measure("a daemon", &host, error);
    let daemons = daemons::Daemons::start(&host, &disk.path).map_err(failed)?;
    let work = Workload {
        kernel: kernel_path(&kernel.release, ImageForm::Elf),
        initramfs: initramfs_path(&kernel.release, Initramfs::Plain),
        cmdline: GuestSpec::new(&kernel.release, &[]).whole_cmdline(),
        dax: ram.path.clone(),
        memory_mib: MEMORY_MIB,
        devices: Vec::new(),
    };
    let bed = Bed {
        host: &host,
        work,
        daemons,
    };
    let mut results = Results {
        host_kernel: kernel.release.clone(),
        guest_kernel: kernel.release.clone(),
        disk_bytes: DISK_BYTES,
        memory_mib: MEMORY_MIB,
        used_by: Vec::new(),
        reads: Vec::new(),
        exchange: Vec::new(),
    };
    if is_wanted(VhostPart::Use) {
        results.used_by = frontends::run(&bed, &vmms)?;
    }
    if is_wanted(VhostPart::Reads) {
        results.reads = reads::run(&bed, &vmms, repeat)?;
        println!("{}", reads::table(&results.reads));
    }
    if is_wanted(VhostPart::Exchange) {
        results.exchange = exchange::run(&bed, &kernel.release, repeat)?;
        println!("{}", exchange::table(&results.exchange));
    }
    keep(setup, "vhost", &results)
}

/// Where all of it takes place.
struct Bed<'a> {
    host: &'a Host,
    work: Workload,
    daemons: daemons::Daemons,
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_BORDERS_ONLY_CONDENSED);
    table.set_header(header);
    table
}

fn three(summary: &Summary, digits: usize) -> String {
    let Summary { min, median, max } = summary;
    format!("{min:.digits$} / {median:.digits$} / {max:.digits$}")
}
