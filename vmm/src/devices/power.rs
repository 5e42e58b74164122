//! Power control: the sleep and reset registers of hardware-reduced ACPI, and the keyboard controller's reset line.
//!
//! ACPI 6.5, 4.8.3.7 (sleep control and status) and 4.8.3.6 (reset). Linux uses them for `poweroff` and `reboot`;
//! the keyboard controller is the fall-back of `reboot=k`.

use std::sync::Arc;

use crate::bus::BusDevice;

/// What the guest asked of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// S5: end the guest.
    PowerOff,
    /// Start it anew.
    Reset,
}

/// Told on a vCPU thread; must not block.
pub type OnPowerRequest = Arc<dyn Fn(PowerRequest) + Send + Sync>;

/// First port of the three ACPI registers below.
pub const ACPI_PORTS: u16 = 0x600;
/// Number of ports.
pub const ACPI_PORT_COUNT: u16 = 3;
/// Sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = ACPI_PORTS;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = ACPI_PORTS + 1;
/// Reset register.
pub const RESET_PORT: u16 = ACPI_PORTS + 2;
/// What the FADT tells the guest to write to the reset register.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of S5, as the DSDT's `\_S5` says.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// The ACPI registers.
pub struct AcpiPower {
    request: OnPowerRequest,
}

impl AcpiPower {
    /// `request` hears what the guest asks for.
    pub fn new(request: OnPowerRequest) -> Self {
        Self { request }
    }
}

impl BusDevice for AcpiPower {
    /// No wake event is ever pending, and the control registers are write-only.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
        if offset == u64::from(SLEEP_CONTROL_PORT - ACPI_PORTS) {
            if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
                (self.request)(PowerRequest::PowerOff);
            }
        } else if offset == u64::from(RESET_PORT - ACPI_PORTS) && value == RESET_VALUE {
            (self.request)(PowerRequest::Reset);
        }
    }
}

/// Command and status port of the keyboard controller.
pub const KEYBOARD_PORT: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;

/// The reset line of the 8042 keyboard controller, and nothing else of it: the FADT says there is none.
pub struct KeyboardReset {
    request: OnPowerRequest,
}

impl KeyboardReset {
    /// `request` hears of a pulse on the reset line.
    pub fn new(request: OnPowerRequest) -> Self {
        Self { request }
    }
}

impl BusDevice for KeyboardReset {
    /// Status: nothing to read, ready for a command. (All ones would make a guest wait for the input buffer.)
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&PULSE_RESET) {
            (self.request)(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn recorded(act: impl FnOnce(OnPowerRequest)) -> Vec<PowerRequest> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        act(Arc::new(move |request| sink.lock().unwrap().push(request)));
        let seen = seen.lock().unwrap();
        seen.clone()
    }

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let s5 = SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT;
        assert_eq!(
            recorded(|r| AcpiPower::new(r).write(0, &[s5 | SLEEP_ENABLE])),
            [PowerRequest::PowerOff]
        );
        for value in [
            s5,
            SLEEP_ENABLE,
            !SLEEP_ENABLE,
            3 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE,
        ] {
            assert_eq!(
                recorded(|r| AcpiPower::new(r).write(0, &[value])),
                [],
                "{value:#x}"
            );
        }
    }

    #[test]
    fn both_reset_lines_reset() {
        assert_eq!(
            recorded(|r| AcpiPower::new(r).write(2, &[RESET_VALUE])),
            [PowerRequest::Reset]
        );
        assert_eq!(
            recorded(|r| KeyboardReset::new(r).write(0, &[0xfe])),
            [PowerRequest::Reset]
        );
        assert_eq!(recorded(|r| KeyboardReset::new(r).write(0, &[0xed])), []);
    }
}
