//! SIGBUS: memory that was not there when it was touched.
//!
//! ```text
//!   a load or store in guest memory ──▶ SIGBUS ──▶ on_sigbus, on the thread that touched it
//!        ▲                                          1. finds the mapping in the table, by si_addr
//!        │                                          2. sets its mark: all lost, or a part poisoned
//!        │                                          3. maps scratch memory over it, so that the access can end
//!        └───────── the access is done again ◀────  4. notes the incident and wakes the owner
//! ```
//! The mark is set before scratch memory is there: who reads scratch bytes and then looks at the mark sees it set
//! ([`crate::loss`]). Nothing is chained: a SIGBUS that is not about a mapping in the table gets the default action, and
//! the process dies of it as it would have.
//!
//! What is lost:
//! - `BUS_ADRERR` (the device is gone, the file was cut off): scratch memory covers the whole mapping. A part would do,
//!   but a device goes away whole, and a part for each touch would use the process's mappings up (`vm.max_map_count`).
//! - `BUS_MCEERR_AR` (poison was touched): the chunk that the kernel names, widened to what the mapping can be split at:
//!   device-dax at 2M or 1G only.
//! - `BUS_MCEERR_AO` (poison was found, nobody touched it): marked and noted, nothing is mapped.
//!
//! A mapping that only the kernel touches, KVM or a system call, is `Touch::Kernel`: a system call answers `EFAULT`
//! instead, and KVM sends the vCPU's thread `BUS_MCEERR_AR` and leaves `KVM_RUN`. It is marked and noted and never replaced,
//! so neither a guest nor a disk ever gets a scratch byte by that way. The vCPU's thread asks [`OnVcpuThread::takes_poison`]
//! before it enters the guest again.
//!
//! `BUS_MCEERR_AO` is sent only to who asked for it (`PR_MCE_KILL_EARLY`): the thread that calls [`Incidents::open`] does, and
//! with it those that it starts.
//!
//! The stack: Rust's runtime gives the main thread and each thread it starts an alternate signal stack (for its own
//! SIGSEGV handler), and `SA_ONSTACK` uses it. A thread without one runs the handler on its own stack, which does as
//! well: no SIGBUS here comes from a stack that has run out.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::process::{
    MachineCheckMemoryCorruptionKillPolicy as KillPolicy,
    set_machine_check_memory_corruption_kill_policy,
};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::incidents::{Cause, Incident, NOBODY, Notes, Taken};
use crate::loss::{LossMark, Mark};

/// How many mappings can be guarded at once: more than KVM has any use for here.
const MAPPINGS: usize = 512;

const PAGE: usize = 4096;

/// `si_code` values (asm-generic/siginfo.h).
const BUS_MCEERR_AR: c_int = 4;
const BUS_MCEERR_AO: c_int = 5;

/// Memory can't be guarded, so it must not be used.
#[derive(Debug, Error)]
pub enum GuardError {
    /// The handler can't be set up.
    #[error("can't {what} the handler for memory that goes away (SIGBUS)")]
    Install {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Too many mappings.
    #[error(
        "{MAPPINGS} mappings of guest memory are in use, no more can be guarded: use fewer, larger zones"
    )]
    Full,
}

/// Who touches a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// This process, by loads and stores.
    Cpu,
    /// KVM and system calls only.
    Kernel,
}

/// A mapping to guard.
#[derive(Debug, Clone, Copy)]
pub struct Guarded {
    /// First host address.
    pub start: usize,
    /// Length in bytes.
    pub len: usize,
    /// What it can be split at, in bytes: a power of two, and `start` and `len` are multiples of it.
    pub align: usize,
    /// Who touches it.
    pub touch: Touch,
}

/// A mapping in the handler's table. It may be unmapped after [`Guard::disarm`], or when this has been dropped.
#[derive(Debug)]
#[must_use = "the mapping is guarded only while this lives"]
pub struct Guard {
    index: usize,
    /// Boxed so that a region stays small enough to be handed back in an error.
    mapping: Box<Guarded>,
    mark: LossMark,
}

/// One entry of the handler's table.
///
/// Free: `start` is 0. Writers hold `WRITERS`. A handler counts itself in `users` before it reads anything but `start`,
/// and reads `start` again afterwards; a writer clears `start` and then waits for `users` to be 0 before it changes the
/// rest or lets go of the mark. All of it is sequentially consistent: either the handler sees the cleared `start`, or
/// the writer sees the handler.
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    align: AtomicUsize,
    kernel_only: AtomicU8,
    mark: AtomicPtr<Mark>,
    users: AtomicUsize,
}

static TABLE: [Entry; MAPPINGS] = [const {
    Entry {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        align: AtomicUsize::new(0),
        kernel_only: AtomicU8::new(0),
        mark: AtomicPtr::new(ptr::null_mut()),
        users: AtomicUsize::new(0),
    }
}; MAPPINGS];

/// Which entries are somebody's, armed or not.
static WRITERS: Mutex<[bool; MAPPINGS]> = Mutex::new([false; MAPPINGS]);

/// What the owner is to hear.
static NOTES: Notes = Notes::new();

/// The descriptor that wakes the owner; never closed, so the number is never somebody else's.
static WAKE: AtomicI32 = AtomicI32::new(-1);

thread_local! {
    /// The vCPU that this thread runs. `const` and without a destructor, so that reading it in the handler neither
    /// allocates nor registers anything.
    static VCPU: Cell<u32> = const { Cell::new(NOBODY) };
    /// This thread's guest has touched poison.
    static TOUCHED: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, what happens on this thread is said to be vCPU `id`'s.
#[derive(Debug)]
pub struct OnVcpuThread(std::marker::PhantomData<*const ()>);

impl OnVcpuThread {
    /// The calling thread runs vCPU `id`. Such a thread touches guest memory in `KVM_RUN` only.
    pub fn enter(id: u32) -> Self {
        VCPU.set(id);
        Self(std::marker::PhantomData)
    }

    /// Whether the guest has touched poison on this thread since the last time. Then it stands at the access, and the
    /// incident is noted.
    #[allow(
        clippy::unused_self,
        reason = "only a thread that runs a vCPU may ask, and of itself"
    )]
    pub fn takes_poison(&self) -> bool {
        TOUCHED.replace(false)
    }
}

impl Drop for OnVcpuThread {
    fn drop(&mut self) {
        VCPU.set(NOBODY);
    }
}

/// What the handler has to tell: readable (as a descriptor) when there is something.
#[derive(Debug, Clone, Copy)]
pub struct Incidents(&'static EventFd);

impl Incidents {
    /// Sets the handler up, the first time. Also done for the first mapping that is guarded. Poison that nobody has touched
    /// is told to the calling thread and to those that it starts from now on.
    pub fn open() -> Result<Self, GuardError> {
        let incidents = install().map(Self)?;
        // A kernel without CONFIG_MEMORY_FAILURE takes the wish, and has nothing to tell.
        if let Err(error) = set_machine_check_memory_corruption_kill_policy(Some(KillPolicy::Early))
        {
            tracing::warn!(%error, "poison in guest memory is noticed only when it is touched");
        }
        Ok(incidents)
    }

    /// All incidents since the last time; called when the descriptor is readable.
    pub fn take(&self) -> Taken {
        // Nothing to read after a spurious wake-up: the notes decide.
        let _ = self.0.read();
        NOTES.take()
    }
}

impl AsFd for Incidents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the process lives.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

impl AsRawFd for Incidents {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Guard {
    /// Puts a mapping into the table, armed.
    ///
    /// # Safety
    /// The range is one mapping of the caller's own, all of it mapped for as long as it is armed: until [`Guard::disarm`]
    /// or the drop. There is no Rust reference into it: what is there can be replaced at any time.
    pub unsafe fn new(mapping: Guarded, mark: LossMark) -> Result<Self, GuardError> {
        install()?;
        let index = {
            let mut taken = WRITERS.lock().unwrap_or_else(PoisonError::into_inner);
            let free = taken.iter().position(|taken| !taken);
            let index = free.ok_or(GuardError::Full)?;
            taken[index] = true;
            index
        };
        let guard = Self {
            index,
            mapping: Box::new(mapping),
            mark,
        };
        // SAFETY: by this function's contract.
        unsafe { guard.arm() };
        Ok(guard)
    }

    /// The undo of [`Guard::disarm`], when the mapping stays after all.
    ///
    /// # Safety
    /// As for [`Guard::new`].
    pub unsafe fn arm(&self) {
        let entry = &TABLE[self.index];
        let Guarded {
            start,
            len,
            align,
            touch,
        } = *self.mapping;
        // Not armed, so no handler reads these: see `Entry`.
        let mark = Arc::as_ptr(self.mark.shared()).cast_mut();
        entry.mark.store(mark, Ordering::SeqCst);
        entry.end.store(start + len, Ordering::SeqCst);
        entry.align.store(align, Ordering::SeqCst);
        let kernel_only = u8::from(touch == Touch::Kernel);
        entry.kernel_only.store(kernel_only, Ordering::SeqCst);
        entry.start.store(start, Ordering::SeqCst);
    }

    /// Takes the mapping out of the table; nobody may touch it any more. When this returns, no handler works on it,
    /// so it can be unmapped.
    pub fn disarm(&self) {
        let entry = &TABLE[self.index];
        entry.start.store(0, Ordering::SeqCst);
        // Bounded: a handler on another thread, which waits for nothing. Never this thread's own: a handler returns
        // before the code it interrupted goes on.
        while entry.users.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.disarm();
        let mut taken = WRITERS.lock().unwrap_or_else(PoisonError::into_inner);
        taken[self.index] = false;
    }
}

/// Sets the handler up, once for the process.
fn install() -> Result<&'static EventFd, GuardError> {
    static INSTALLED: OnceLock<EventFd> = OnceLock::new();
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(wake) = INSTALLED.get() {
        return Ok(wake);
    }
    let failed = |what| move |source| GuardError::Install { what, source };
    let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed("make a descriptor for"))?;
    WAKE.store(wake.as_raw_fd(), Ordering::SeqCst);
    set_action(on_sigbus as *const () as usize).map_err(failed("install"))?;
    Ok(INSTALLED.get_or_init(|| wake))
}

/// Async-signal-safe.
fn set_action(handler: usize) -> io::Result<()> {
    // SAFETY: `sigaction` is plain data, for which all zeroes is a valid value (SIG_DFL, no flags, an empty mask).
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the mask is this frame's own and valid; filling it touches nothing else.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    // SAFETY: `action` is whole and outlives the call; the handler, if it is one, has the signature that SA_SIGINFO
    // asks for and is async-signal-safe: see `on_sigbus`.
    let set = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The beginning of `siginfo_t` for the signals of a fault (asm-generic/siginfo.h, 64 bit).
#[repr(C)]
struct Fault {
    signo: c_int,
    errno: c_int,
    code: c_int,
    _pad: c_int,
    address: usize,
    address_lsb: i16,
}

/// Uses atomics in statics, a thread-local without initialisation or destructor, and raw system calls (sigaction, mmap,
/// write, tgkill): no lock, no allocation, no libc state but `errno`, which is put back. It touches no guest memory.
extern "C" fn on_sigbus(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a whole `siginfo_t` (128 bytes, aligned to 8) that lives until
    // it returns. `Fault` is its beginning, and every bit pattern is valid for its integers: for a signal that is no
    // fault they are meaningless, which `is_fault` tells first.
    let fault = unsafe { &*info.cast::<Fault>() };
    // SAFETY: the C library's per-thread errno is valid on every thread, also in a handler.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else has a thread's errno.
    let saved = unsafe { *errno };
    let is_fault = fault.code > 0;
    if !(is_fault && is_handled(fault)) {
        die(is_fault && fault.code != BUS_MCEERR_AO);
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// The default action, for a SIGBUS that is not about guest memory. Async-signal-safe.
fn die(comes_again: bool) {
    // Cannot fail for SIGBUS; if it did, the signal would come again.
    let _ = set_action(libc::SIG_DFL);
    if !comes_again {
        // SAFETY: async-signal-safe by POSIX; SIGBUS is blocked while its handler runs, so the signal waits for the return.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

/// Whether the fault was in guest memory, and is dealt with. Async-signal-safe.
fn is_handled(fault: &Fault) -> bool {
    let mut handled = false;
    for entry in &TABLE {
        if entry.start.load(Ordering::SeqCst) == 0 {
            continue;
        }
        entry.users.fetch_add(1, Ordering::SeqCst);
        let start = entry.start.load(Ordering::SeqCst);
        if start != 0 && fault.address >= start && fault.address < entry.end.load(Ordering::SeqCst)
        {
            handled = deal_with(fault, start, entry);
        }
        entry.users.fetch_sub(1, Ordering::SeqCst);
    }
    handled
}

/// Marks, replaces and notes. Async-signal-safe. The caller is counted in `entry.users` and has seen it armed.
fn deal_with(fault: &Fault, start: usize, entry: &Entry) -> bool {
    let end = entry.end.load(Ordering::SeqCst);
    let kernel_only = entry.kernel_only.load(Ordering::SeqCst) != 0;
    // SAFETY: the entry is armed and this handler counted in `users`, so `disarm` has not returned: the `Guard` lives,
    // and holds a share of the mark. Marks are atomics, shared references to them are all there are.
    let mark = unsafe { &*entry.mark.load(Ordering::SeqCst) };
    let vcpu = VCPU.get();
    let touched = fault.code != BUS_MCEERR_AO;
    let (cause, done) = match fault.code {
        BUS_MCEERR_AR | BUS_MCEERR_AO => {
            let order = u8::try_from(fault.address_lsb).unwrap_or(12).clamp(12, 40);
            let chunk = (1usize << order).max(entry.align.load(Ordering::SeqCst));
            // Chunks are counted from the mapping's start, which is aligned to what it can be split at; what the kernel
            // names is aligned in the file, and the mapping is congruent with that.
            let from = ((fault.address / chunk) * chunk).max(start);
            let to = (from + chunk).min(end);
            #[allow(clippy::cast_possible_truncation, reason = "less than 64")]
            let chunk_order = chunk.trailing_zeros() as u8;
            if (from - start).is_multiple_of(chunk) {
                mark.poison((from - start) as u64, chunk_order);
            } else {
                // Never for mappings made here; every page says the same.
                for page in (from..to).step_by(PAGE) {
                    mark.poison((page - start) as u64, 12);
                }
            }
            // KVM sends this for its guest's touch, and a system call that met poison has ended with an error: nothing is
            // done again.
            let is_over = !touched || kernel_only || vcpu != NOBODY;
            if touched && vcpu != NOBODY {
                TOUCHED.set(true);
            }
            let done = is_over || is_replaced(from, to) || {
                mark.lose();
                is_replaced(start, end)
            };
            (Cause::Poison { order, touched }, done)
        }
        _ => {
            mark.lose();
            let chunk = entry.align.load(Ordering::SeqCst);
            let from = start + (fault.address - start) / chunk * chunk;
            // The part alone, should there be no room for the whole (strict overcommit). A mapping for the kernel gets
            // nothing: it must never hold scratch bytes, and no code here touches it.
            let done = !kernel_only && (is_replaced(start, end) || is_replaced(from, from + chunk));
            (Cause::Gone, done)
        }
    };
    note(&Incident {
        host_address: fault.address as u64,
        cause,
        vcpu: (vcpu != NOBODY).then_some(vcpu),
    });
    done
}

/// Whether scratch memory is now where `from..to` was. Async-signal-safe.
fn is_replaced(from: usize, to: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range is (a part of) one armed mapping, which can't be disarmed meanwhile: by the contract of `Guard::new`
    // it is mapped, the process's own, and no Rust reference into it exists that this could break. The system call itself, because the C library's mmap may take locks (musl's does for MAP_FIXED).
    let at = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            from,
            to - from,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    usize::try_from(at) == Ok(from)
}

/// Tells the owner. Async-signal-safe.
fn note(incident: &Incident) {
    NOTES.add(incident);
    let one = 1u64;
    // SAFETY: the descriptor is open for as long as the process lives and the eight bytes are this frame's own. A full
    // counter gives an error, and then the owner is awake anyway.
    unsafe {
        libc::write(
            WAKE.load(Ordering::SeqCst),
            (&raw const one).cast(),
            mem::size_of::<u64>(),
        )
    };
}
