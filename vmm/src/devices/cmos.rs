//! The battery-backed clock and RAM of a PC (MC146818, ports 0x70 and 0x71).
//!
//! The guest reads UTC. It may set the clock: the difference to the host's clock is kept for as long as the VM
//! lives, the host's clock is never touched. There is no alarm and no interrupt: the DSDT names no IRQ.
//! Registers: MC146818 data sheet; the century byte is where ACPI's FADT says (offset 0x32).

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};

use crate::bus::BusDevice;

/// Index port; the data port follows.
pub const PORTS: u16 = 0x70;
/// Number of ports.
pub const PORT_COUNT: u16 = 2;
/// Offset of the century byte.
pub const CENTURY: u8 = 0x32;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

/// 32.768 kHz time base, 1024 Hz rate; never "update in progress": a read is atomic here.
const STATUS_A_VALUE: u8 = 0x26;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const B_SET: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;
/// Bit 7 of the index port masks NMIs and is no part of the index.
const INDEX_MASK: u8 = 0x7f;

/// Seconds since 1970, UTC.
pub type Clock = Box<dyn Fn() -> i64 + Send>;

/// The clock chip.
pub struct Cmos {
    state: Mutex<State>,
}

struct State {
    clock: Clock,
    /// Guest time minus host time, in seconds.
    offset_s: i64,
    index: u8,
    ram: [u8; 128],
    /// Time registers while the guest is setting them (`SET` in status B).
    setting: Option<[u8; 128]>,
}

impl Cmos {
    /// A chip that keeps the host's time.
    pub fn new() -> Self {
        Self::with_clock(Box::new(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .ok()
                .and_then(|d| i64::try_from(d.as_secs()).ok())
                .unwrap_or(0)
        }))
    }

    /// A chip that keeps another time.
    pub fn with_clock(clock: Clock) -> Self {
        let mut ram = [0; 128];
        ram[usize::from(STATUS_B)] = B_24_HOURS;
        Self {
            state: Mutex::new(State {
                clock,
                offset_s: 0,
                index: 0,
                ram,
                setting: None,
            }),
        }
    }
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The index port is write-only and stays at all ones.
        if offset == 1 {
            data[0] = state.read();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, data.first()) {
            (0, Some(value)) => state.index = value & INDEX_MASK,
            (1, Some(value)) => state.write(*value),
            _ => {}
        }
    }
}

impl State {
    fn status_b(&self) -> u8 {
        self.ram[usize::from(STATUS_B)]
    }

    fn read(&self) -> u8 {
        match self.index {
            STATUS_A => STATUS_A_VALUE,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index if is_time(index) => match &self.setting {
                Some(registers) => registers[usize::from(index)],
                None => self.registers()[usize::from(index)],
            },
            index => self.ram[usize::from(index)],
        }
    }

    fn write(&mut self, value: u8) {
        match self.index {
            STATUS_A | STATUS_C | STATUS_D => {}
            STATUS_B => {
                let was_setting = self.setting.is_some();
                // Interrupt enables have nothing behind them; the format bits are kept.
                let format = value & (B_24_HOURS | B_BINARY);
                if value & B_SET != 0 {
                    if !was_setting {
                        self.setting = Some(self.registers());
                    }
                    self.ram[usize::from(STATUS_B)] = format | B_SET;
                } else {
                    self.ram[usize::from(STATUS_B)] = format;
                    if let Some(seconds) = self.setting.take().and_then(|r| self.decode(&r)) {
                        self.offset_s = seconds - (self.clock)();
                    }
                }
            }
            index if is_time(index) => {
                if let Some(registers) = &mut self.setting {
                    registers[usize::from(index)] = value;
                    return;
                }
                // Without SET the chip takes single registers on the fly.
                let mut registers = self.registers();
                registers[usize::from(index)] = value;
                if let Some(seconds) = self.decode(&registers) {
                    self.offset_s = seconds - (self.clock)();
                }
            }
            index => self.ram[usize::from(index)] = value,
        }
    }

    /// All time registers of one instant, in the guest's format.
    fn registers(&self) -> [u8; 128] {
        let now = (self.clock)().saturating_add(self.offset_s);
        let now = OffsetDateTime::from_unix_timestamp(now).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let year = now.year().clamp(0, 9999);
        let hour = now.hour();
        let fields = [
            (SECONDS, now.second()),
            (MINUTES, now.minute()),
            (WEEKDAY, now.weekday().number_from_sunday()),
            (DAY, now.day()),
            (MONTH, u8::from(now.month())),
            (YEAR, two_digits(year % 100)),
            (CENTURY, two_digits(year / 100)),
        ];
        let mut registers = self.ram;
        for (index, value) in fields {
            registers[usize::from(index)] = self.encode(value);
        }
        registers[usize::from(HOURS)] = if self.status_b() & B_24_HOURS != 0 {
            self.encode(hour)
        } else {
            let twelve = if hour.is_multiple_of(12) {
                12
            } else {
                hour % 12
            };
            self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
        };
        registers
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn value(&self, register: u8) -> u8 {
        if self.status_b() & B_BINARY != 0 {
            register
        } else {
            (register >> 4) * 10 + (register & 0xf)
        }
    }

    /// Seconds since 1970, or nothing for a date that does not exist.
    fn decode(&self, registers: &[u8; 128]) -> Option<i64> {
        let field = |index: u8| self.value(registers[usize::from(index)]);
        let raw_hour = registers[usize::from(HOURS)];
        let hour = if self.status_b() & B_24_HOURS != 0 {
            self.value(raw_hour)
        } else {
            self.value(raw_hour & 0x7f) % 12 + if raw_hour & 0x80 != 0 { 12 } else { 0 }
        };
        let year = i32::from(field(CENTURY)) * 100 + i32::from(field(YEAR));
        let date =
            Date::from_calendar_date(year, Month::try_from(field(MONTH)).ok()?, field(DAY)).ok()?;
        let time = Time::from_hms(hour, field(MINUTES), field(SECONDS)).ok()?;
        Some(
            PrimitiveDateTime::new(date, time)
                .assume_utc()
                .unix_timestamp(),
        )
    }
}

/// A part of a year between 0 and 9999.
fn two_digits(value: i32) -> u8 {
    u8::try_from(value).expect("below 100 by the caller's arithmetic")
}

fn is_time(index: u8) -> bool {
    matches!(
        index,
        SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-23 21:05:09 UTC, a Monday.
    const THEN: i64 = 1_795_467_909;

    fn at(seconds: i64) -> Cmos {
        Cmos::with_clock(Box::new(move || seconds))
    }

    fn get(cmos: &Cmos, index: u8) -> u8 {
        cmos.write(0, &[index]);
        let mut data = [0xff];
        cmos.read(1, &mut data);
        data[0]
    }

    fn put(cmos: &Cmos, index: u8, value: u8) {
        cmos.write(0, &[index]);
        cmos.write(1, &[value]);
    }

    fn read_time(cmos: &Cmos) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|i| get(cmos, i))
    }

    #[test]
    fn reads_bcd_utc() {
        assert_eq!(
            read_time(&at(THEN)),
            [0x20, 0x26, 0x11, 0x23, 2, 0x21, 0x05, 0x09]
        );
        assert_eq!(get(&at(THEN), STATUS_D), D_VALID);
    }

    #[test]
    fn twelve_hour_mode_marks_the_afternoon() {
        let cmos = at(THEN);
        put(&cmos, STATUS_B, 0);
        assert_eq!(get(&cmos, HOURS), 0x89);
    }

    #[test]
    fn the_guest_sets_its_own_clock_only() {
        let cmos = at(THEN);
        put(&cmos, STATUS_B, B_24_HOURS | B_SET);
        put(&cmos, YEAR, 0x30);
        put(&cmos, DAY, 0x01);
        assert_eq!(get(&cmos, YEAR), 0x30);
        put(&cmos, STATUS_B, B_24_HOURS);
        assert_eq!(read_time(&cmos)[..4], [0x20, 0x30, 0x11, 0x01]);
    }

    #[test]
    fn a_date_that_does_not_exist_changes_nothing() {
        let cmos = at(THEN);
        let before = read_time(&cmos);
        put(&cmos, MONTH, 0x77);
        assert_eq!(read_time(&cmos), before);
    }

    #[test]
    fn ordinary_bytes_are_kept() {
        let cmos = at(THEN);
        put(&cmos, 0x40, 0xa5);
        assert_eq!(get(&cmos, 0x40), 0xa5);
        // Bit 7 is the NMI mask.
        assert_eq!(get(&cmos, 0xc0), 0xa5);
    }

    proptest! {
        #[test]
        fn whatever_the_guest_writes_the_chip_lives(writes in prop::collection::vec((any::<u8>(), any::<u8>()), 0..64)) {
            let cmos = at(THEN);
            for (index, value) in writes {
                put(&cmos, index, value);
                read_time(&cmos);
            }
        }
    }
}
