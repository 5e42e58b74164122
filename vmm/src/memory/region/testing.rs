//! Signals as the kernel sends them for poison: no page of the machine is poisoned for a test.

use std::ffi::c_int;
use std::{io, mem, ptr};

/// `si_code` values (asm-generic/siginfo.h).
pub(super) const BUS_MCEERR_AR: c_int = 4;
pub(super) const BUS_MCEERR_AO: c_int = 5;

/// The beginning of `siginfo_t` for the signals of a fault (asm-generic/siginfo.h, 64 bit), and the rest of it.
#[repr(C)]
struct Info {
    signo: c_int,
    errno: c_int,
    code: c_int,
    _pad: c_int,
    address: usize,
    address_lsb: i16,
    _rest: [u64; 12],
}

/// The signal as the kernel sends it for poison, sent by this thread to itself.
pub(super) fn poison(code: c_int, address: u64, order: i16) {
    let info = Info {
        signo: libc::SIGBUS,
        errno: 0,
        code,
        _pad: 0,
        address: usize::try_from(address).unwrap(),
        address_lsb: order,
        _rest: [0; 12],
    };
    assert_eq!(mem::size_of::<Info>(), mem::size_of::<libc::siginfo_t>());
    let process = rustix::process::getpid().as_raw_nonzero().get();
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    // SAFETY: `info` is a whole siginfo_t and outlives the call.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            process,
            thread,
            libc::SIGBUS,
            &raw const info,
        )
    };
    assert_eq!(sent, 0, "{}", io::Error::last_os_error());
}

/// How large the calling thread's alternate signal stack is, if it has one.
pub(super) fn signal_stack() -> Option<usize> {
    // SAFETY: `stack_t` is plain data, for which all zeroes is a valid value.
    let mut stack: libc::stack_t = unsafe { mem::zeroed() };
    // SAFETY: nothing is changed without a new stack; the old one is written to `stack`.
    let got = unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) };
    assert_eq!(got, 0);
    (stack.ss_flags & libc::SS_DISABLE == 0).then_some(stack.ss_size)
}
