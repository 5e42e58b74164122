//! What a guest is asked about its devices.

use std::time::Duration;

use lab_agent::guest_protocol::{
    ACKNOWLEDGED_MARK, DmaReport, EduReport, ExecReport, HostileReport, InterruptReport,
    PciFunction, PersistReport, PhysicalReport, RateReport,
};

use super::{ASK_DEADLINE, Guest, GuestError};

/// For a device node to appear or to go once the driver has been asked.
const NODE_SECONDS: u64 = 30;
/// A driver may wait a minute for its device (`nvme`: a command whose interrupt did not come) before it says so.
const MODULE_DEADLINE: Duration = Duration::from_mins(3);
/// Making and mounting file systems, with both levels emulated.
const SCRIPT_DEADLINE: Duration = Duration::from_mins(3);
/// What a hostile driver may take for all attempts of a case.
const HOSTILE_DEADLINE: Duration = Duration::from_mins(2);

impl Guest {
    /// Runs a script that must succeed; gives what it prints. White space between words counts as one blank.
    pub fn sh(&mut self, script: &str) -> Result<String, GuestError> {
        let report = self.try_sh(script)?;
        if report.status == Some(0) {
            return Ok(report.stdout);
        }
        Err(GuestError::Script {
            script: script.to_owned(),
            status: report.status,
            said: report.stderr + &report.stdout,
        })
    }

    /// Runs a script; a failure is a result.
    pub fn try_sh(&mut self, script: &str) -> Result<ExecReport, GuestError> {
        self.ask_for(&format!("sh {script}"), SCRIPT_DEADLINE)
    }

    /// Loads kernel modules with what they depend on.
    pub fn modprobe(&mut self, names: &[&str]) -> Result<(), GuestError> {
        self.ask_within(&format!("modprobe {}", names.join(" ")), MODULE_DEADLINE)
            .map(|_| ())
    }

    /// Loads the drivers of persistent memory, and of ext4 on it.
    pub fn modprobe_pmem(&mut self) -> Result<(), GuestError> {
        self.modprobe(&[
            "virtio_pci",
            "virtio_pmem",
            "nd_pmem",
            "crc32c_generic",
            "ext4",
        ])
    }

    /// Waits until there is something at a path.
    pub fn await_path(&mut self, path: &str) -> Result<(), GuestError> {
        self.ask(&format!("await {path} {NODE_SECONDS}"))
            .map(|_| ())
    }

    /// Waits until there is nothing at a path.
    pub fn await_gone(&mut self, path: &str) -> Result<(), GuestError> {
        self.ask(&format!("await-gone {path} {NODE_SECONDS}"))
            .map(|_| ())
    }

    /// The PCI functions that the guest's kernel has found.
    pub fn pci(&mut self) -> Result<Vec<PciFunction>, GuestError> {
        self.ask_for("pci", ASK_DEADLINE)
    }

    /// Writes the seed's pattern to a block device by direct I/O and flushes.
    pub fn fill_blocks(
        &mut self,
        path: &str,
        offset: u64,
        bytes: u64,
        seed: u64,
    ) -> Result<(), GuestError> {
        let command = format!("blkwrite {path} {offset} {bytes} {seed}");
        self.ask_within(&command, SCRIPT_DEADLINE).map(|_| ())
    }

    /// Compares a block device with the seed's pattern by direct I/O.
    pub fn compare_blocks(
        &mut self,
        path: &str,
        offset: u64,
        bytes: u64,
        seed: u64,
    ) -> Result<PhysicalReport, GuestError> {
        self.ask_for(
            &format!("blkread {path} {offset} {bytes} {seed}"),
            SCRIPT_DEADLINE,
        )
    }

    /// Random reads of 4 KiB for some time, `depth` at once.
    pub fn random_reads(
        &mut self,
        path: &str,
        seconds: u64,
        depth: u64,
    ) -> Result<RateReport, GuestError> {
        let deadline = ASK_DEADLINE + Duration::from_secs(seconds);
        self.ask_for(&format!("iops {path} {seconds} {depth}"), deadline)
    }

    /// Reads one piece after the other for some time, `depth` of `bytes` each at once.
    pub fn sequential_reads(
        &mut self,
        path: &str,
        seconds: u64,
        depth: u64,
        bytes: u64,
    ) -> Result<RateReport, GuestError> {
        let deadline = ASK_DEADLINE + Duration::from_secs(seconds);
        self.ask_for(
            &format!("stream {path} {seconds} {depth} {bytes}"),
            deadline,
        )
    }

    /// Copies for some time; see the agent for what `what` can be.
    pub fn bandwidth(
        &mut self,
        what: &str,
        path: &str,
        bytes: u64,
        seconds: u64,
    ) -> Result<RateReport, GuestError> {
        let deadline = SCRIPT_DEADLINE + Duration::from_secs(seconds);
        self.ask_for(
            &format!("bandwidth {what} {path} {bytes} {seconds}"),
            deadline,
        )
    }

    /// Moves bytes over TCP with a server of the agent's: `tcp-send` or `tcp-receive`.
    pub fn transfer(
        &mut self,
        how: &str,
        address: &str,
        bytes: u64,
    ) -> Result<RateReport, GuestError> {
        self.ask_for(&format!("{how} {address} {bytes}"), SCRIPT_DEADLINE)
    }

    /// Moves a pattern to an echo and back.
    pub fn there_and_back(
        &mut self,
        address: &str,
        bytes: u64,
        seed: u64,
    ) -> Result<RateReport, GuestError> {
        self.ask_for(
            &format!("tcp-return {address} {bytes} {seed}"),
            SCRIPT_DEADLINE,
        )
    }

    /// Reads the start of a drive by direct I/O into a file that is mapped there, and compares the mapping with the seed's pattern.
    pub fn read_into_mapping(
        &mut self,
        path: &str,
        bytes: u64,
        file: &str,
        seed: u64,
    ) -> Result<PhysicalReport, GuestError> {
        self.ask_for(
            &format!("blkmap {path} {bytes} {file} {seed}"),
            SCRIPT_DEADLINE,
        )
    }

    /// How a PCI function interrupts, and how often it has.
    pub fn interrupts(&mut self, address: &str) -> Result<InterruptReport, GuestError> {
        self.ask_for(&format!("interrupts {address}"), ASK_DEADLINE)
    }

    /// Has an edu device write to each target and read from it: an address of a page that the kernel leaves alone, or `file:PATH`
    /// for the start of a file on persistent memory. `home` is one more such page, which the device reaches.
    pub fn edu_dma(
        &mut self,
        address: &str,
        home: u64,
        targets: &[&str],
    ) -> Result<Vec<DmaReport>, GuestError> {
        let command = format!("edu-dma {address} {home:#x} {}", targets.join(" "));
        self.ask_for(&command, SCRIPT_DEADLINE)
    }

    /// Has an edu device interrupt by wire, `count` times and once more.
    pub fn edu_interrupts(&mut self, address: &str, count: u32) -> Result<EduReport, GuestError> {
        self.ask_for(
            &format!("edu-interrupts {address} {count}"),
            SCRIPT_DEADLINE,
        )
    }

    /// Starts to write records and to acknowledge them; the guest is busy with that for the rest of its life.
    pub fn start_records(
        &mut self,
        path: &str,
        seed: u64,
        how: &str,
        count: u64,
    ) -> Result<(), GuestError> {
        self.tell(&format!("persist {path} {seed} {how} {count}"))
    }

    /// Waits until this record, counted from zero, is acknowledged.
    pub fn await_record(&mut self, index: u64) -> Result<(), GuestError> {
        // The end of the line is part of what is waited for by `wait_for`; a longer number would have the shorter as its start.
        let mark = format!("{ACKNOWLEDGED_MARK}{index}\r");
        self.vmm.wait_for(&mark, SCRIPT_DEADLINE)?;
        Ok(())
    }

    /// How many records have been acknowledged by whole lines on the console.
    pub fn acknowledged_records(&self) -> u64 {
        acknowledged(&self.vmm.stdout())
    }

    /// Looks which records are there.
    pub fn check_records(&mut self, path: &str, seed: u64) -> Result<PersistReport, GuestError> {
        self.ask_for(&format!("persist-check {path} {seed}"), ASK_DEADLINE)
    }

    /// Lets a hostile driver loose on a PCI function. `memory` is the start of 1 MiB that the kernel leaves alone.
    pub fn hostile(
        &mut self,
        case: &str,
        address: &str,
        memory: u64,
    ) -> Result<HostileReport, GuestError> {
        let command = format!("hostile {case} {address} {memory:#x}");
        self.ask_for(&command, HOSTILE_DEADLINE)
    }
}

fn acknowledged(console: &str) -> u64 {
    let whole = console
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    let numbers = whole.filter_map(|line| {
        let number = line.strip_prefix(ACKNOWLEDGED_MARK)?;
        number.trim_end().parse::<u64>().ok()
    });
    numbers.max().map_or(0, |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_are_promises() {
        assert_eq!(acknowledged(""), 0);
        assert_eq!(acknowledged("x\r\nDURABLE 8\r\nDURABLE 9\r\nDURABLE 1"), 10);
        assert_eq!(acknowledged("DURABLE 0\r\nDURABLE 1\r"), 1);
    }
}
