//! What a system call that is not on the list ends in: one line that names it, then death by SIGSYS.

use std::ffi::{c_int, c_void};
use std::io::{self, Write};
use std::mem;
use std::ptr;
use std::sync::OnceLock;

/// Where `si_syscall` is in `siginfo_t` on x86-64 (include/uapi/asm-generic/siginfo.h): after three `int`, their padding and the
/// pointer `si_call_addr`. libc has no name for it.
const CALL_AT: usize = 24;

/// Who tells it. Written before the handler is there; reading it is one load.
static PROGRAM: OnceLock<&str> = OnceLock::new();

/// Has SIGSYS told of.
pub(super) fn install(program: &'static str) -> io::Result<()> {
    PROGRAM.get_or_init(|| program);
    // SAFETY: `sigaction` is plain data, of which zeroes are a value.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_sigsys as *const () as usize;
    // The second one, raised by the handler, kills.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_NODEFER;
    // SAFETY: `action` is a whole `sigaction` with an empty mask, whose handler has the signature that `SA_SIGINFO` asks for
    // and does nothing but what a handler of a synchronous signal may do.
    let set = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

extern "C" fn on_sigsys(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    let call = info.wrapping_byte_add(CALL_AT).cast::<c_int>();
    // SAFETY: the kernel gives a whole `siginfo_t`, of 128 bytes and aligned for a pointer, which stays as it is while the
    // handler runs; `CALL_AT` is a multiple of an `int`'s alignment.
    let call = unsafe { call.read() };
    let mut line = [0; 160];
    let room = line.len();
    let mut rest = &mut line[..];
    let program = PROGRAM.get().copied().unwrap_or_default();
    // Too long it is cut off.
    let _ = writeln!(
        rest,
        "{program}: killed for system call {call}, which it is not to make (`--seccomp log` has the kernel log it)"
    );
    let len = room - rest.len();
    // SAFETY: `len` bytes of the line are there.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len) };
    // SAFETY: raises a signal in this thread, for which nobody is registered any more.
    unsafe { libc::raise(signal) };
}
