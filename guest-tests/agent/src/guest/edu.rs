//! QEMU's `edu` device, driven from user space (registers: QEMU's `docs/specs/edu.rst`): its DMA engine moves a pattern to and from
//! any guest-physical address, and its interrupt comes through the kernel's `uio_pci_generic`.
//!
//! The engine works between the machine's memory and a buffer of the device's, which no processor sees. So a page at home, that
//! the device certainly reaches, carries patterns into the buffer and out of it again. Every transfer takes 100 ms.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use lab_agent::guest_protocol::{DmaReport, EduReport, Transfer, pattern_word};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::page_map::physical_address;
use super::pci::DEVICES;
use crate::memory::{Physical, Registers, Words};
use crate::wait;

const BAR_BYTES: usize = 1 << 20;
const IDENTIFICATION: usize = 0x00;
const FACTORIAL: usize = 0x08;
const STATUS: usize = 0x20;
const INTERRUPT_STATUS: usize = 0x24;
const RAISE: usize = 0x60;
const ACKNOWLEDGE: usize = 0x64;
const DMA_SOURCE: usize = 0x80;
const DMA_DESTINATION: usize = 0x88;
const DMA_COUNT: usize = 0x90;
const DMA_COMMAND: usize = 0x98;
/// Minor and major version are above.
const IDENTITY: u32 = 0x00ed;
const IDENTITY_MASK: u32 = 0xffff;
/// Status: an interrupt at the end of a factorial.
const TELL_FACTORIAL: u32 = 0x80;
/// Interrupt status: a factorial has been computed.
const FACTORIAL_DONE: u32 = 1;
const START: u64 = 1;
const TO_MEMORY: u64 = 2;
/// Where the engine sees the device's buffer.
const BUFFER: u64 = 0x4_0000;
/// What one transfer moves: half the buffer, whose last byte QEMU takes for one past the end.
const TRANSFER_BYTES: u64 = 2048;
const TRANSFER_WORDS: usize = 256;
const PAGE_BYTES: u64 = 4096;
/// A transfer takes 100 ms; emulated twice, and on a busy machine, longer.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(20);
const INTERRUPT_DEADLINE_SECONDS: i64 = 20;

/// PCI's command register, and what is switched in it.
const COMMAND: u64 = 0x04;
const MEMORY_AND_MASTER: u16 = 0x6;
const NO_INTX: u16 = 1 << 10;

const UIO_DRIVER: &str = "uio_pci_generic";

struct Edu {
    registers: Registers,
    config: File,
}

impl Edu {
    fn open(address: &str) -> Result<Self, String> {
        let root = format!("{DEVICES}/{address}");
        let path = format!("{root}/config");
        let config = OpenOptions::new().read(true).write(true).open(&path);
        let config = config.map_err(|error| format!("cannot open {path}: {error}"))?;
        let edu = Self {
            registers: Registers::map(&format!("{root}/resource0"), BAR_BYTES)?,
            config,
        };
        edu.set_command(MEMORY_AND_MASTER, 0)?;
        let found = edu.registers.read32(IDENTIFICATION);
        if found & IDENTITY_MASK == IDENTITY {
            Ok(edu)
        } else {
            Err(format!(
                "{address} is no edu device: it identifies itself as {found:#x}"
            ))
        }
    }

    /// Switches bits of the command register on and off.
    fn set_command(&self, on: u16, off: u16) -> Result<(), String> {
        let failed = |error| format!("the command register: {error}");
        let mut bytes = [0; 2];
        self.config
            .read_exact_at(&mut bytes, COMMAND)
            .map_err(failed)?;
        let command = (u16::from_le_bytes(bytes) | on) & !off;
        self.config
            .write_all_at(&command.to_le_bytes(), COMMAND)
            .map_err(failed)
    }

    /// From memory into the device's buffer.
    fn load(&mut self, address: u64) -> Result<(), String> {
        self.transfer(address, BUFFER, START)
    }

    /// From the device's buffer into memory.
    fn store(&mut self, address: u64) -> Result<(), String> {
        self.transfer(BUFFER, address, START | TO_MEMORY)
    }

    fn transfer(&mut self, source: u64, destination: u64, command: u64) -> Result<(), String> {
        self.registers.write64(DMA_SOURCE, source);
        self.registers.write64(DMA_DESTINATION, destination);
        self.registers.write64(DMA_COUNT, TRANSFER_BYTES);
        self.registers.write64(DMA_COMMAND, command);
        let done = || (self.registers.read64(DMA_COMMAND) & START == 0).then_some(());
        wait::until(TRANSFER_DEADLINE, done).ok_or_else(|| {
            format!(
                "the transfer from {source:#x} to {destination:#x} is not done after {} s",
                TRANSFER_DEADLINE.as_secs()
            )
        })
    }
}

/// Memory that the device is to reach.
enum Target {
    /// A page that the kernel leaves alone.
    Reserved(Physical),
    /// The first page of a file on persistent memory, mapped.
    Mapped(Words),
}

impl Target {
    /// `file:PATH` or an address; gives its place in guest-physical space as well.
    fn parse(word: &str) -> Result<(Self, u64), String> {
        if let Some(path) = word.strip_prefix("file:") {
            let mut words = Words::of_device(
                path,
                usize::try_from(PAGE_BYTES).map_err(|e| e.to_string())?,
            )?;
            // Only a page that was touched has a place.
            words.set(0, 0);
            let address = physical_address(words.address(0))
                .ok_or_else(|| format!("the kernel does not say where {path} lies"))?;
            return Ok((Self::Mapped(words), address));
        }
        let address = super::commands::number(word)?;
        let physical = Physical::map(address, PAGE_BYTES, true)?;
        Ok((Self::Reserved(physical), address))
    }

    fn words(&mut self) -> &mut Words {
        match self {
            Self::Reserved(physical) => physical.words(),
            Self::Mapped(words) => words,
        }
    }
}

/// Has the device write to each target and read from it. `home` is a page that it reaches.
pub(crate) fn dma(address: &str, home: u64, targets: &[&str]) -> Result<Vec<DmaReport>, String> {
    let mut edu = Edu::open(address)?;
    let mut page = Physical::map(home, PAGE_BYTES, true)?;
    let mut reports = Vec::new();
    for (number, word) in (1..).zip(targets) {
        let (mut target, place) = Target::parse(word)?;
        let seed = |step: u64| number << 32 | step << 24;

        fill(page.words(), seed(1));
        edu.load(home)?;
        fill(target.words(), seed(2));
        edu.store(place)?;
        let written = judge(target.words(), seed(1), seed(2));

        fill(target.words(), seed(3));
        fill(page.words(), seed(4));
        edu.load(home)?;
        edu.load(place)?;
        fill(page.words(), seed(5));
        edu.store(home)?;
        let read = judge(page.words(), seed(3), seed(4));
        reports.push(DmaReport {
            target: (*word).to_owned(),
            address: place,
            written,
            read,
        });
    }
    Ok(reports)
}

fn fill(words: &mut Words, seed: u64) {
    for index in 0..TRANSFER_WORDS {
        words.set(index, pattern_word(index as u64, seed));
    }
}

fn judge(words: &Words, sent: u64, before: u64) -> Transfer {
    let holds = |seed| {
        (0..TRANSFER_WORDS).all(|index| words.get(index) == pattern_word(index as u64, seed))
    };
    if holds(sent) {
        Transfer::Arrived
    } else if holds(before) {
        Transfer::Nothing
    } else {
        Transfer::Damaged
    }
}

/// Raises interrupts one by one, each after the one before was acknowledged; then has a factorial computed, which ends with
/// another one. All of them come by wire, through `uio_pci_generic`.
pub(crate) fn interrupts(address: &str, count: u32) -> Result<EduReport, String> {
    let mut uio = open_uio(address)?;
    let mut edu = Edu::open(address)?;
    let first = 1;
    let mut seen = None;
    for value in first..=count {
        // The kernel has switched the wire off when it handled the one before.
        edu.set_command(0, NO_INTX)?;
        edu.registers.write32(RAISE, value);
        await_interrupt(&mut uio, &mut seen)?;
        acknowledge(&mut edu, value)?;
    }
    edu.set_command(0, NO_INTX)?;
    edu.registers.write32(STATUS, TELL_FACTORIAL);
    edu.registers.write32(FACTORIAL, 10);
    await_interrupt(&mut uio, &mut seen)?;
    let factorial = edu.registers.read32(FACTORIAL);
    acknowledge(&mut edu, FACTORIAL_DONE)?;
    edu.registers.write32(STATUS, 0);
    Ok(EduReport {
        interrupts: u64::from(count) + 1,
        factorial,
    })
}

/// Gives the function to the kernel's driver for drivers in user space, unless that has it.
fn open_uio(address: &str) -> Result<File, String> {
    let root = format!("{DEVICES}/{address}");
    let write = |path: String, text: &str| {
        fs::write(&path, text).map_err(|error| format!("cannot write {text} to {path}: {error}"))
    };
    write(format!("{root}/driver_override"), UIO_DRIVER)?;
    write("/sys/bus/pci/drivers_probe".to_owned(), address)?;
    let entries = fs::read_dir(format!("{root}/uio"));
    let entries =
        entries.map_err(|error| format!("{UIO_DRIVER} does not take {address}: {error}"))?;
    let node = entries.flatten().next().ok_or("no uio node")?;
    let path = format!("/dev/{}", node.file_name().to_string_lossy());
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    opened.map_err(|error| format!("cannot open {path}: {error}"))
}

/// The kernel counts interrupts; the count must be one more than the last one seen.
fn await_interrupt(uio: &mut File, seen: &mut Option<u32>) -> Result<(), String> {
    let deadline = Timespec {
        tv_sec: INTERRUPT_DEADLINE_SECONDS,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(uio, PollFlags::IN)], Some(&deadline));
    if ready.map_err(|error| format!("cannot wait for an interrupt: {error}"))? == 0 {
        return Err(format!(
            "no interrupt within {INTERRUPT_DEADLINE_SECONDS} s; the last one seen was number {seen:?}"
        ));
    }
    let mut bytes = [0; 4];
    uio.read_exact(&mut bytes)
        .map_err(|error| format!("cannot read the count of interrupts: {error}"))?;
    let number = u32::from_ne_bytes(bytes);
    match *seen {
        Some(last) if last.wrapping_add(1) != number => {
            Err(format!("interrupt {number} follows interrupt {last}"))
        }
        _ => {
            *seen = Some(number);
            Ok(())
        }
    }
}

/// The device says why it interrupts, until it is told that this is known.
fn acknowledge(edu: &mut Edu, expected: u32) -> Result<(), String> {
    let status = edu.registers.read32(INTERRUPT_STATUS);
    if status != expected {
        return Err(format!(
            "the interrupt's status is {status:#x}, expected {expected:#x}"
        ));
    }
    edu.registers.write32(ACKNOWLEDGE, status);
    let status = edu.registers.read32(INTERRUPT_STATUS);
    if status == 0 {
        Ok(())
    } else {
        Err(format!(
            "the interrupt's status is {status:#x} after it was acknowledged"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_become_of_a_transfer_is_told_apart() {
        let mut words = Words::anonymous(4096).unwrap();
        fill(&mut words, 1 << 24);
        assert_eq!(judge(&words, 1 << 24, 2 << 24), Transfer::Arrived);
        assert_eq!(judge(&words, 2 << 24, 1 << 24), Transfer::Nothing);
        words.set(TRANSFER_WORDS - 1, 0);
        assert_eq!(judge(&words, 1 << 24, 2 << 24), Transfer::Damaged);
    }
}
