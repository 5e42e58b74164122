//! The removal guard without a guest: a small program holds a device, and people come to take it away.
//!
//! What is tested is the kernel's part as much as the guard's: which file each tool opens, that the opening waits, and
//! what becomes of those who are killed meanwhile.

pub(super) mod parties;
mod removals;
mod troubles;

use super::GuestTest;

pub(super) fn tests() -> Vec<GuestTest> {
    [removals::TESTS, troubles::TESTS].concat()
}
