//! Persistent memory against RAM, and disks and networks against those of other VMMs.
//!
//! All are an emulator's figures: only ratios count. Every round boots its guests anew.

use std::path::PathBuf;

use lab_agent::guest_protocol::RateReport;

use super::boot::{BenchError, MeasureError};
use super::rounds::{self, Base, Figure, Plan};
use super::statistics::figure;
use crate::cli::Peer;
use crate::guest::{Guest, LEAVE_DEADLINE, network};
use crate::host::figures::exits;
use crate::setup::Setup;

const MIB: u64 = 1 << 20;
/// What is copied in one pass.
const COPY_BYTES: u64 = 64 * MIB;
/// Moved over the network in one direction.
const TRANSFER_BYTES: u64 = 64 * MIB;
/// For each measurement of a round.
const SECONDS: u64 = 4;
/// The disk's file, small enough to stay in the host's memory.
const DISK: &str = "/tmp/bench-disk";

/// Bandwidth to a file on persistent memory, to the guest's RAM copy bandwidth.
pub fn pmem(setup: &Setup, repeat: u32) -> Result<PathBuf, BenchError> {
    let plan = Plan {
        name: "pmem",
        peers: &[],
        rounds: repeat,
        base: Base::FirstFigure,
    };
    rounds::run(setup, &plan, |bed, vmm| {
        let dax = bed.host.dax().get(1).map(|device| device.path.clone());
        let word = format!("file={},size=1G,id=p0", dax.unwrap_or_default());
        let mut guest = bed.boot(vmm, &["--pmem", &word])?;
        guest.modprobe(&["virtio_pci", "virtio_pmem", "nd_pmem"])?;
        guest.await_path("/dev/pmem0")?;
        guest.modprobe(&["crc32c_generic", "ext4"])?;
        guest.sh("mkdir -p /mnt && mkfs.ext4 -q -F -b 4096 /dev/pmem0 && mount -t ext4 -o dax /dev/pmem0 /mnt")?;
        guest.sh(&format!(
            "dd if=/dev/zero of=/mnt/file bs=1M count={} conv=fsync",
            COPY_BYTES / MIB
        ))?;
        let mut figures = Vec::new();
        for (what, name) in [
            ("ram", "RAM to RAM"),
            ("map-write", "RAM to mapped pmem"),
            ("map-read", "mapped pmem to RAM"),
            ("direct-write", "direct writes to pmem"),
            ("direct-read", "direct reads from pmem"),
        ] {
            let report = guest.bandwidth(what, "/mnt/file", COPY_BYTES, SECONDS)?;
            figures.push(bandwidth(name, &report));
        }
        end(guest)?;
        Ok(figures)
    })
}

/// Small random reads, and what they cost in exits.
pub fn blk(setup: &Setup, peers: &[Peer], repeat: u32) -> Result<PathBuf, BenchError> {
    let plan = Plan {
        name: "blk",
        peers,
        rounds: repeat,
        base: Base::FirstVmm,
    };
    rounds::run(setup, &plan, |bed, vmm| {
        bed.host.sh(&format!(
            "test -e {DISK} || dd if=/dev/urandom of={DISK} bs=1M count=64"
        ))?;
        let word = format!("path={DISK},image_type=raw");
        let mut guest = bed.boot(vmm, &["--disk", &word])?;
        guest.modprobe(&["virtio_pci", "virtio_blk"])?;
        guest.await_path("/dev/vda")?;
        let pid = guest.vmm().pid();
        let mut figures = Vec::new();
        for (depth, reads, cost) in [
            (1, "4K random reads, 1 at once", "exits per read, 1 at once"),
            (
                16,
                "4K random reads, 16 at once",
                "exits per read, 16 at once",
            ),
        ] {
            // Once unmeasured: caches, and the emulator's translations.
            guest.random_reads("/dev/vda", 1, depth)?;
            let before = exits(&bed.host, pid)?;
            let report = guest.random_reads("/dev/vda", SECONDS, depth)?;
            let after = exits(&bed.host, pid)?;
            let operations = figure(report.operations.max(1));
            figures.push(Figure {
                name: reads,
                unit: "1/s",
                value: operations / report.seconds,
            });
            figures.push(Figure {
                name: cost,
                unit: "count",
                value: figure(after.exits.saturating_sub(before.exits)) / operations,
            });
        }
        end(guest)?;
        Ok(figures)
    })
}

/// TCP between the guest and its host, in both directions.
pub fn net(setup: &Setup, peers: &[Peer], repeat: u32) -> Result<PathBuf, BenchError> {
    let plan = Plan {
        name: "net",
        peers,
        rounds: repeat,
        base: Base::FirstVmm,
    };
    rounds::run(setup, &plan, |bed, vmm| {
        let mut guest = bed.boot(vmm, &["--net", &network::tap_word("lab0", "")])?;
        guest.modprobe(&["virtio_pci", "virtio_net"])?;
        guest.bring_up("eth0")?;
        let server = network::serve(&bed.host)?;
        let pid = guest.vmm().pid();
        let mut figures = Vec::new();
        for (how, name, cost) in [
            ("tcp-send", "guest to host", "exits per MiB, guest to host"),
            (
                "tcp-receive",
                "host to guest",
                "exits per MiB, host to guest",
            ),
        ] {
            guest.transfer(how, network::SERVER, TRANSFER_BYTES / 8)?;
            let before = exits(&bed.host, pid)?;
            let report = guest.transfer(how, network::SERVER, TRANSFER_BYTES)?;
            let after = exits(&bed.host, pid)?;
            figures.push(bandwidth(name, &report));
            figures.push(Figure {
                name: cost,
                unit: "count",
                value: figure(after.exits.saturating_sub(before.exits))
                    / figure(TRANSFER_BYTES / MIB),
            });
        }
        drop(server);
        end(guest)?;
        Ok(figures)
    })
}

fn bandwidth(name: &'static str, report: &RateReport) -> Figure {
    Figure {
        name,
        unit: "MiB/s",
        value: figure(report.bytes) / figure(MIB) / report.seconds,
    }
}

/// Not every VMM ends when its guest is powered off over a terminal, so it is not asked to.
fn end(mut guest: Guest) -> Result<(), MeasureError> {
    guest.vmm().signal(libc::SIGKILL)?;
    guest.vmm().wait(LEAVE_DEADLINE)?;
    Ok(())
}
