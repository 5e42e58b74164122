//! Bytes as what a hostile driver does to a queue.

use daxhund::virtio::testing::{Driver, MEMORY, Piece};
use daxhund_fuzz_support::input::Input;

/// Near what is special about guest memory, as often as not.
fn address(input: &mut Input<'_>) -> u64 {
    let near = u64::from(input.u16());
    match input.u8() % 6 {
        0 => near << 12,
        1 => MEMORY - near,
        2 => MEMORY + near,
        3 => u64::MAX - near,
        // The rings of the first queue.
        4 => 0x10_0000 + near,
        _ => near << 48,
    }
}

fn len(input: &mut Input<'_>) -> u32 {
    let len = u32::from(input.u16());
    match input.u8() % 4 {
        0 => len % 64,
        1 => len % 64 * 512,
        2 => len,
        _ => len << 16,
    }
}

/// Descriptors that may wait at a time: fewer than the smallest queue has.
const MOST_WAITING: usize = 48;
/// Chains in one run: their buffers must fit the driver's memory, which is never reused.
const MOST_CHAINS: usize = 400;

/// What the driver has made available.
#[derive(Default)]
pub struct Offered {
    waiting: usize,
    chains: usize,
    given_back: usize,
    /// It has said that there is what it never offered, or led the device to where the rings are.
    has_lied: bool,
}

impl Offered {
    /// One move of the driver: `true` when the device should serve next. `request` makes the bytes of a request, now
    /// and then of a good one.
    pub fn play(
        &mut self,
        driver: &mut Driver,
        input: &mut Input<'_>,
        request: impl Fn(&mut Input<'_>) -> Vec<u8>,
    ) -> bool {
        let chosen = input.u8();
        if chosen == 0xff {
            driver.set_available_index(0, input.u16());
            self.has_lied = true;
            return true;
        }
        let count = 1 + usize::from(chosen % 6);
        if self.chains == MOST_CHAINS || self.waiting + count > MOST_WAITING {
            return true;
        }
        let pieces: Vec<_> = (0..count)
            .map(|_| match input.u8() % 8 {
                0..=2 => Piece::Readable(request(input)),
                3 => {
                    let len = usize::from(input.u8());
                    Piece::Readable(input.bytes(len).to_vec())
                }
                4..=6 => Piece::Writable(len(input) % 0x8000),
                _ => {
                    self.has_lied = true;
                    Piece::Raw(address(input), len(input), input.u16() % 8, input.u16())
                }
            })
            .collect();
        driver.offer(0, &pieces);
        self.waiting += count;
        self.chains += 1;
        chosen >= 0xc0
    }

    /// After the device has served: a driver that is only odd has every chain back, once.
    pub fn check(&mut self, driver: &mut Driver) {
        self.waiting = 0;
        if self.has_lied {
            // The used ring may say anything by now: the device may have been told to write there.
            return;
        }
        self.given_back += std::iter::from_fn(|| driver.used_now(0)).count();
        assert_eq!(self.given_back, self.chains);
    }
}
