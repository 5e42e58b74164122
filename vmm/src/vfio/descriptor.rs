//! Lends an event's descriptor to a call.
#![allow(
    unsafe_code,
    reason = "vmm-sys-util's event has no safe way to borrow its descriptor"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of `event`, for as long as `event` is borrowed.
pub(super) fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and closes it only when it is dropped or taken apart, which the borrow in the
    // result forbids. It is not -1: an event is made from a descriptor the kernel gave.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
