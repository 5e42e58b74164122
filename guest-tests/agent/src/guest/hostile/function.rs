//! A PCI function driven from user space: its configuration space and its registers, with no driver of the kernel's in between.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use lab_agent::guest_protocol::PciBar;

use crate::guest::pci::{DEVICES, parse_resources};
use crate::memory::{Physical, Registers};

const COMMAND: u64 = 0x04;
const STATUS: u64 = 0x06;
const CAPABILITIES: u64 = 0x34;
const FIRST_BAR: u64 = 0x10;
const HAS_CAPABILITIES: u16 = 1 << 4;
const MEMORY_AND_MASTER: u16 = 0x6;
const MEMORY: u16 = 0x2;
const VENDOR_SPECIFIC: u8 = 0x09;
const MSI_X: u8 = 0x11;
/// Kinds of virtio capabilities.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
/// The kernel's flag for a BAR that takes two registers.
const WIDE: u64 = 0x10_0000;
/// No function has more: the list would be a loop.
const MOST_CAPABILITIES: usize = 64;

const PAGE: usize = 4096;
/// Offset of the word that has the number of queues in its second 16 bits.
const NUM_QUEUES_WORD: usize = 0x10;

/// A place in a BAR.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) bar: usize,
    pub(super) offset: usize,
}

pub(super) struct Function {
    config: File,
    bars: Vec<PciBar>,
    mapped: BTreeMap<usize, Registers>,
    pub(super) common: Place,
    pub(super) notify: Place,
    pub(super) notify_multiplier: usize,
    /// Offset of the capability in configuration space, and the place of the table.
    pub(super) msi_x: Option<(u64, Place)>,
}

impl Function {
    /// Takes the function from its driver and switches its memory and its DMA on.
    pub(super) fn take(address: &str) -> Result<Self, String> {
        let root = format!("{DEVICES}/{address}");
        let unbind = format!("{root}/driver/unbind");
        if fs::exists(&unbind).unwrap_or(false) {
            fs::write(&unbind, address)
                .map_err(|error| format!("cannot write {unbind}: {error}"))?;
        }
        let path = format!("{root}/config");
        let config = OpenOptions::new().read(true).write(true).open(&path);
        let config = config.map_err(|error| format!("cannot open {path}: {error}"))?;
        let path = format!("{root}/resource");
        let resources =
            fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}"))?;
        let nowhere = Place { bar: 0, offset: 0 };
        let mut function = Self {
            config,
            bars: parse_resources(&resources),
            mapped: BTreeMap::new(),
            common: nowhere,
            notify: nowhere,
            notify_multiplier: 0,
            msi_x: None,
        };
        function.find_capabilities()?;
        function.decode(true)?;
        for bar in function.bars.clone() {
            let path = format!("{root}/resource{}", bar.index);
            let bytes = usize::try_from(bar.end - bar.start + 1).map_err(|e| e.to_string())?;
            if bar.index < 6 {
                let registers = Registers::map(&path, bytes)?;
                function.mapped.insert(bar.index, registers);
            }
        }
        Ok(function)
    }

    /// Looks whether a function's BAR is still where the kernel has put it, without touching anything.
    pub(super) fn look(address: &str, bar: PciBar) -> Result<(), String> {
        let path = format!("{DEVICES}/{address}/config");
        let config = File::open(&path).map_err(|error| format!("cannot open {path}: {error}"))?;
        let mut bytes = [0; 4];
        let at = FIRST_BAR + 4 * bar.index as u64;
        config
            .read_exact_at(&mut bytes, at)
            .map_err(|error| config_failed(at, &error))?;
        let [expected, _] = halves(bar.start);
        let found = u32::from_le_bytes(bytes) & !0xf;
        if found == expected & !0xf {
            return Ok(());
        }
        Err(format!(
            "BAR {} of {address} is at {found:#x} instead of {expected:#x}",
            bar.index
        ))
    }

    fn find_capabilities(&mut self) -> Result<(), String> {
        if self.config16(STATUS)? & HAS_CAPABILITIES == 0 {
            return Err("it has no capabilities".to_owned());
        }
        let mut found = (false, false);
        let mut at = u64::from(self.config8(CAPABILITIES)?);
        for _ in 0..MOST_CAPABILITIES {
            if at == 0 {
                break;
            }
            match self.config8(at)? {
                VENDOR_SPECIFIC => {
                    let place = Place {
                        bar: usize::from(self.config8(at + 4)?),
                        offset: self.offset(at + 8)?,
                    };
                    match self.config8(at + 3)? {
                        COMMON if !found.0 => {
                            self.common = place;
                            found.0 = true;
                        }
                        NOTIFY if !found.1 => {
                            self.notify = place;
                            self.notify_multiplier = self.offset(at + 16)?;
                            found.1 = true;
                        }
                        _ => {}
                    }
                }
                MSI_X => {
                    let word = self.offset(at + 4)?;
                    let place = Place {
                        bar: word & 7,
                        offset: word & !7,
                    };
                    self.msi_x = Some((at, place));
                }
                _ => {}
            }
            at = u64::from(self.config8(at + 1)?);
        }
        if found == (true, true) {
            Ok(())
        } else {
            Err("it is no modern virtio device: common and notification structures are not both there".to_owned())
        }
    }

    fn offset(&self, at: u64) -> Result<usize, String> {
        usize::try_from(self.config32(at)?).map_err(|error| error.to_string())
    }

    /// Registers behind a BAR.
    pub(super) fn registers(&mut self, bar: usize) -> Result<&mut Registers, String> {
        self.mapped
            .get_mut(&bar)
            .ok_or_else(|| format!("BAR {bar} has no memory"))
    }

    /// The BAR that holds the common structure.
    pub(super) fn main_bar(&self) -> Result<PciBar, String> {
        let wanted = self.common.bar;
        let found = self.bars.iter().find(|bar| bar.index == wanted);
        found
            .copied()
            .ok_or_else(|| format!("BAR {wanted} has no address"))
    }

    /// How many queues the common structure of a BAR at this physical address tells of; all ones when nobody answers.
    pub(super) fn queues_at(&self, bar: u64) -> Result<u16, String> {
        let page = bar + (self.common.offset / PAGE * PAGE) as u64;
        let word = (self.common.offset % PAGE + NUM_QUEUES_WORD) / 8;
        let mut memory = Physical::map(page, PAGE as u64, false)?;
        let [_, _, low, high, ..] = memory.words().get(word).to_le_bytes();
        Ok(u16::from_le_bytes([low, high]))
    }

    /// Puts a BAR somewhere else, without asking the kernel.
    pub(super) fn move_bar(&self, bar: PciBar, address: u64) -> Result<(), String> {
        let at = FIRST_BAR + 4 * bar.index as u64;
        let [low, high] = halves(address);
        self.set_config(at, &low.to_le_bytes())?;
        if bar.flags & WIDE != 0 {
            self.set_config(at + 4, &high.to_le_bytes())?;
        }
        Ok(())
    }

    /// Switches memory and DMA on or off.
    pub(super) fn decode(&self, on: bool) -> Result<(), String> {
        let command = self.config16(COMMAND)?;
        let command = if on {
            command | MEMORY_AND_MASTER
        } else {
            command & !MEMORY
        };
        self.set_config(COMMAND, &command.to_le_bytes())
    }

    pub(super) fn config8(&self, at: u64) -> Result<u8, String> {
        let mut bytes = [0; 1];
        self.read(at, &mut bytes)?;
        Ok(bytes[0])
    }

    pub(super) fn config16(&self, at: u64) -> Result<u16, String> {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub(super) fn config32(&self, at: u64) -> Result<u32, String> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), String> {
        self.config
            .read_exact_at(bytes, at)
            .map_err(|error| config_failed(at, &error))
    }

    pub(super) fn set_config(&self, at: u64, bytes: &[u8]) -> Result<(), String> {
        self.config
            .write_all_at(bytes, at)
            .map_err(|error| config_failed(at, &error))
    }
}

fn config_failed(at: u64, error: &io::Error) -> String {
    format!("configuration space at {at:#x}: {error}")
}

/// Low and high half.
#[expect(
    clippy::cast_possible_truncation,
    reason = "each half is taken on purpose"
)]
pub(super) fn halves(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}
