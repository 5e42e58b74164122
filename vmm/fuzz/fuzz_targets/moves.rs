//! Bytes as the moves of a hostile driver, on any queue of a device that runs without threads.

use daxhund::virtio::Device;
use daxhund::virtio::testing::{Driver, EVENT_IDX, MEMORY, Piece};
use daxhund_fuzz_support::input::Input;

/// What the driver does, and what its requests say.
pub struct Moves<'a>(Input<'a>);

/// Chains in one run: the driver's memory is never reused.
const MOST_CHAINS: usize = 500;
/// Rounds of the event loop after a move; a driver that lies may never be done.
const ROUNDS: usize = 16;

impl<'a> Moves<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(Input::new(bytes))
    }

    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        self.0.bytes(len)
    }

    pub fn u8(&mut self) -> u8 {
        self.0.u8()
    }

    pub fn u16(&mut self) -> u16 {
        self.0.u16()
    }

    /// Near what is special about guest memory, as often as not.
    fn address(&mut self) -> u64 {
        let near = u64::from(self.u16());
        match self.u8() % 6 {
            0 => near << 12,
            1 => MEMORY - near,
            2 => MEMORY + near,
            3 => u64::MAX - near,
            // The rings themselves.
            4 => 0x10_0000 + near * 4,
            _ => near << 48,
        }
    }

    fn len(&mut self) -> u32 {
        let len = u32::from(self.u16());
        match self.u8() % 4 {
            0 => len % 64,
            1 => len % 32 * 512,
            2 => len % 0x4000,
            _ => len << 16,
        }
    }

    fn piece(&mut self) -> Piece {
        match self.u8() % 4 {
            0 => {
                let len = usize::from(self.u8());
                Piece::Readable(self.bytes(len).to_vec())
            }
            1 => Piece::Writable(self.len() % 0x4000),
            _ => Piece::Raw(self.address(), self.len(), self.u16() % 8, self.u16() % 300),
        }
    }

    /// Plays all moves on `device`, which `between` may do something of the host's with.
    pub fn play(mut self, device: &dyn Device, mut between: impl FnMut(&mut Self)) {
        let queues = device.queue_sizes().len();
        let mut driver = Driver::new(device);
        let mut chains = 0;
        while !self.0.is_empty() && chains < MOST_CHAINS {
            let features = device.features() | if self.u8() % 2 == 0 { EVENT_IDX } else { 0 };
            driver.start_here(device, features).expect("all queues");
            // Until the driver resets the device, or has no more moves.
            while !self.0.is_empty() && chains < MOST_CHAINS {
                let queue = usize::from(self.u8()) % queues;
                match self.u8() % 16 {
                    0 => break,
                    1 => driver.set_available_index(queue, self.u16()),
                    2 => {
                        let mut space = [0; 16];
                        device
                            .config_read(self.address(), &mut space[..usize::from(self.u8() % 9)]);
                    }
                    3 => {
                        let (offset, len) = (self.address() % 16, usize::from(self.u8() % 9));
                        device.config_write(offset, self.bytes(len));
                    }
                    4..=6 => between(&mut self),
                    _ => {
                        let count = 1 + usize::from(self.u8() % 5);
                        let pieces: Vec<_> = (0..count).map(|_| self.piece()).collect();
                        driver.offer(queue, &pieces);
                        chains += 1;
                    }
                }
                driver.ring(queue);
                driver.turn(ROUNDS);
            }
            driver.stop();
        }
    }
}
