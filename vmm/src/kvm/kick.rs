//! Bringing a vCPU out of `KVM_RUN`, whatever it is doing there.
//!
//! ```text
//!   owner thread                         vCPU thread
//!   ------------                         -----------
//!   change the wanted state
//!   pthread_kill(vCPU thread, SIGRTMIN) -> handler: kvm_run.immediate_exit = 1
//!                                          KVM_RUN returns EINTR (now, or at once when it is next called)
//!                                          immediate_exit = 0, read the wanted state
//! ```
//! The handler's store is what closes the race between reading the wanted state and entering `KVM_RUN`: a signal
//! that lands between the two makes the next `KVM_RUN` return at once. So one signal is always enough; no retry.
//! The flag is cleared *before* the wanted state is read, never after.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use thiserror::Error;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The kick could not be set up or sent.
#[derive(Debug, Error)]
#[error("can't {what} the signal that takes a vCPU out of KVM_RUN")]
pub struct KickError {
    /// What was tried.
    pub what: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null on every other thread. `const` and without a
    /// destructor, so that reading it in a signal handler neither allocates nor registers anything.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is set by `KickTarget::enter` on this thread, into the `kvm_run` page of the vCPU this
        // thread owns, and taken back in `KickTarget::drop` before the vCPU can be dropped (it borrows it). The
        // kernel reads that byte concurrently and nobody else writes it: a relaxed atomic store is all it takes.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Relaxed);
    }
}

/// Installs the handler, once for the process.
pub(super) fn install() -> Result<(), KickError> {
    static INSTALL: Once = Once::new();
    let mut result = Ok(());
    INSTALL.call_once(|| {
        result = register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| KickError {
            what: "install",
            source: io::Error::from_raw_os_error(e.errno()),
        });
    });
    result
}

/// While it lives, kicks of this thread reach the vCPU it was made for.
#[derive(Debug)]
pub(super) struct Kickable {
    flag: *mut u8,
}

impl Kickable {
    /// Makes the calling thread the one that runs the vCPU with this `kvm_run` page.
    ///
    /// # Safety
    /// `run` stays mapped until the returned value is dropped, and that happens on the calling thread.
    pub(super) unsafe fn enter(run: *mut kvm_run) -> Self {
        // SAFETY: `run` points to a whole `kvm_run` by this function's contract; only the address is taken.
        let flag = unsafe { ptr::addr_of_mut!((*run).immediate_exit) };
        IMMEDIATE_EXIT.set(flag);
        Self { flag }
    }

    /// Forgets kicks that arrived so far; read the wanted state after this, never before.
    pub(super) fn acknowledge(&self) {
        // SAFETY: the page is mapped while `self` lives, by the contract of `enter`.
        unsafe { AtomicU8::from_ptr(self.flag) }.store(0, Ordering::SeqCst);
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// A thread that runs a vCPU.
pub trait KickTarget {
    /// Takes the thread's vCPU out of `KVM_RUN`. Harmless when it is not in it.
    fn kick(&self) -> Result<(), KickError>;
}

impl<T> KickTarget for JoinHandle<T> {
    fn kick(&self) -> Result<(), KickError> {
        // SAFETY: the pthread id is valid until the thread is joined or detached; the handle proves that neither
        // has happened. A thread that ended but was not joined gives 0 or ESRCH.
        let result = unsafe { libc::pthread_kill(self.as_pthread_t(), SIGRTMIN()) };
        match result {
            0 | libc::ESRCH => Ok(()),
            errno => Err(KickError {
                what: "send",
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }
}
