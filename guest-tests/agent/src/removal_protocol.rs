//! What the programs on the emulated host tell of a device-dax device that is taken away.
//!
//! Times are nanoseconds of the host's real-time clock, which is also the clock of a VMM's log.

use serde::{Deserialize, Serialize};

/// Steps of a removal as its program marks them in shared memory: the mark of a step is the word of its index, and is set
/// once. Whoever shares that memory sees each step at his own clock.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// About to open `unbind`: from here on somebody may hold it.
    Asked,
    /// It is open: nobody holds it any more.
    Opened,
    /// The name is written, and the kernel has taken the device away, or not.
    Returned,
    /// No process of the user's has the device open or mapped any more.
    Released,
}

impl Step {
    /// All there are, in their order, but that a user may let go before the removal or after it.
    pub const ALL: [Self; 4] = [Self::Asked, Self::Opened, Self::Returned, Self::Released];

    /// Which word is its mark.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// Words that are marks.
pub const MARK_WORDS: usize = Step::ALL.len();

/// Answer of `take`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Taken {
    /// Before `unbind` was opened.
    pub asked_ns: u64,
    /// The same moment by the monotonic clock, which traces are told in.
    pub asked_monotonic_ns: u64,
    /// When it was open.
    pub opened_ns: Option<u64>,
    /// When the removal was over.
    pub returned_ns: u64,
    /// When nothing of the device was left with its user.
    pub released_ns: Option<u64>,
    /// Why the device was not taken away.
    pub refused: Option<String>,
}

/// A line of the answer of `dax-watch-cost`: what a watch takes while nothing happens.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WatchCost {
    /// Milliseconds between two looks.
    pub every_ms: u64,
    /// Whether that is what a VMM does.
    pub is_default: bool,
    /// Of a processor.
    pub percent: f64,
    /// Microseconds.
    pub look_us: f64,
}

/// Answer of `loss-bare`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BareLoss {
    /// From the write to `unbind` to the first probe that found no memory.
    pub noticed_ns: u64,
    /// What unmapping all of it for the device took then.
    pub unmap_ns: u64,
    /// From the write to `unbind` to its return.
    pub returned_ns: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_where_their_steps_are() {
        for (index, step) in Step::ALL.into_iter().enumerate() {
            assert_eq!(step.index(), index);
        }
        assert_eq!(MARK_WORDS, 4);
    }
}
