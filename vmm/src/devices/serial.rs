//! COM1: a 16550 (vm-superio's) between the guest and a [`ConsoleOutput`].
//!
//! Interrupts go straight into KVM through an irqfd. Output is written on the vCPU thread that stored it, a byte at
//! a time as a UART does; a console that can't take a byte loses it, the guest never waits. Input arrives from the
//! owner's event loop, never more than the FIFO has room for.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::console::ConsoleOutput;
use crate::bus::BusDevice;

/// First port of COM1.
pub const PORTS: u16 = 0x3f8;
/// Number of ports.
pub const PORT_COUNT: u16 = 8;
/// Its interrupt line.
pub const GSI: u32 = 4;

/// Interrupt enable register; with [`LCR_DIVISOR`] a half of the divisor.
const IER: u8 = 1;
/// Interrupt identification register.
const IIR: u8 = 2;
/// Line control register.
const LCR: u8 = 3;
/// Divisor latch access.
const LCR_DIVISOR: u8 = 1 << 7;
/// Line status register.
const LSR: u8 = 5;
/// There is input.
const LSR_DATA: u8 = 1;

/// An eventfd that KVM turns into an interrupt.
struct InterruptLine(EventFd);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the owner that the guest has emptied the input FIFO.
struct Space(EventFd);

impl SerialEvents for Space {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // The counter can't reach its maximum: the owner reads it, and a reader that is gone needs no event.
        let _ = self.0.write(1);
    }
}

type Uart = Serial<InterruptLine, Space, ConsoleOutput>;

/// The serial port.
pub struct SerialPort {
    uart: Mutex<Uart>,
}

/// A 16550 tells of input for as long as there is some. vm-superio forgets it with the first byte that is read, and a driver
/// that asks whether it has read enough (Linux: after 256 bytes, `serial8250_rx_chars`) would leave the rest for good:
/// a full FIFO takes nothing more that it could tell of. Enabling what is enabled reminds it.
fn tell_of_the_rest(uart: &mut Uart) {
    if uart.read(LSR) & LSR_DATA != 0 && uart.read(LCR) & LCR_DIVISOR == 0 {
        let enabled = uart.read(IER);
        if let Err(error) = uart.write(IER, enabled) {
            tracing::trace!(?error, "serial: interrupt lost");
        }
    }
}

/// A serial port and the events it is wired with.
pub struct SerialParts {
    /// The device, for the port bus and for input.
    pub port: Arc<SerialPort>,
    /// To be connected to [`GSI`].
    pub interrupt: EventFd,
    /// Readable when the guest has emptied the input FIFO.
    pub space: EventFd,
}

impl SerialParts {
    /// The undo of [`SerialPort::create`]: the output is the caller's again. `None` while a bus still has the port.
    pub fn into_output(self) -> Option<ConsoleOutput> {
        let port = Arc::into_inner(self.port)?;
        Some(
            port.uart
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner)
                .into_writer(),
        )
    }
}

impl SerialPort {
    /// A serial port whose output goes to `output`.
    pub fn create(output: ConsoleOutput) -> io::Result<SerialParts> {
        let interrupt = EventFd::new(EFD_NONBLOCK)?;
        let space = EventFd::new(EFD_NONBLOCK)?;
        let uart = Serial::with_events(
            InterruptLine(interrupt.try_clone()?),
            Space(space.try_clone()?),
            output,
        );
        Ok(SerialParts {
            port: Arc::new(Self {
                uart: Mutex::new(uart),
            }),
            interrupt,
            space,
        })
    }

    /// How many bytes of input the FIFO has room for.
    pub fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    /// Gives the guest input; the caller has no more than [`SerialPort::room`] bytes. A guest that has switched the
    /// port to loopback gets none of it, as on a real UART.
    pub fn input(&self, bytes: &[u8]) {
        if let Err(error) = self.lock().enqueue_raw_bytes(bytes) {
            tracing::trace!(?error, "serial: input lost");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = u8::try_from(offset) else {
            return;
        };
        let mut uart = self.lock();
        // A repeated string instruction reads the same register again and again.
        for byte in data {
            if offset == IIR {
                tell_of_the_rest(&mut uart);
            }
            *byte = uart.read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else {
            return;
        };
        let mut uart = self.lock();
        for byte in data {
            // Errors are a console that takes nothing more, or an interrupt event whose VM is gone.
            if let Err(error) = uart.write(offset, *byte) {
                tracing::trace!(?error, "serial: byte lost");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Received data.
    const IER_RECEIVED: u8 = 1;

    #[test]
    fn input_is_bounded_by_the_fifo_and_space_is_announced() {
        let parts = SerialPort::create(ConsoleOutput::Null).unwrap();
        let room = parts.port.room();
        assert!(room > 0);
        parts.port.input(&vec![b'x'; room]);
        assert_eq!(parts.port.room(), 0);
        assert!(parts.space.read().is_err(), "nothing was read yet");
        let mut byte = [0];
        for _ in 0..room {
            parts.port.read(0, &mut byte);
            assert_eq!(byte, [b'x']);
        }
        assert!(parts.space.read().is_ok());
        assert_eq!(parts.port.room(), room);
    }

    #[test]
    fn input_that_is_left_in_the_fifo_is_still_told_of() {
        let parts = SerialPort::create(ConsoleOutput::Null).unwrap();
        let port = &parts.port;
        let identification = || {
            let mut byte = [0];
            port.read(u64::from(IIR), &mut byte);
            byte[0]
        };
        port.write(u64::from(IER), &[IER_RECEIVED]);
        assert_eq!(identification() & 1, 1, "nothing is there");
        port.input(b"xyz");
        // Linux reads at most 256 bytes at an interrupt, then asks whether that was all.
        let mut byte = [0];
        for _ in b"xy" {
            assert_eq!(identification() & 0b101, 0b100);
            port.read(0, &mut byte);
        }
        assert_eq!(identification() & 0b101, 0b100, "z is there");
        port.read(0, &mut byte);
        assert_eq!(identification() & 1, 1, "all was read");
        // Who does not want to be told is not, and a divisor is no interrupt's affair.
        port.write(u64::from(IER), &[0]);
        port.input(b"x");
        assert_eq!(identification() & 1, 1);
        port.write(u64::from(LCR), &[LCR_DIVISOR]);
        port.write(u64::from(IER), &[IER_RECEIVED]);
        assert_eq!(identification() & 1, 1);
    }
}
