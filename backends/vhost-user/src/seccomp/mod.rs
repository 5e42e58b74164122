//! The system calls that a daemon makes once it is set up; whatever else it is made to do by a frontend or a guest ends it.
//!
//! One list for all threads: the loop, sessions, and the workers of queues come and go with frontends, and each inherits it. What
//! opens files, makes sockets or maps memory is looked at more closely: files are opened to be read only, sockets are unix
//! sockets (the removal guard's), nothing is made executable, and no program is started.
//!
//! A daemon that needs more says so ([`Rule`]). The list is what the stories of the lab and the tests were seen to make, plus what the C library and the standard library make
//! for the same on other versions.

#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "a signal handler")]
mod trap;

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, Error as FilterError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};
use thiserror::Error;

use crate::policy::Seccomp;

/// The daemon can't be confined.
#[derive(Debug, Error)]
pub enum ConfineError {
    /// The filter makes no program.
    #[error("the system call filter can't be made")]
    Filter(#[source] BackendError),
    /// The kernel refuses it.
    #[error("the kernel takes no system call filter; `--seccomp false` serves without")]
    Apply(#[source] FilterError),
    /// The handler.
    #[error("SIGSYS can't be handled")]
    Trap(#[source] io::Error),
}

/// A system call that one daemon makes and others don't.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Whatever its arguments are.
    Call(c_long),
    /// `openat` of a file that is there, for reading and writing.
    OpenToWrite,
}

/// Every thread that there is and that comes makes only these calls from now on. `program` is named by who is killed.
pub fn confine(mode: Seccomp, program: &'static str, extra: &[Rule]) -> Result<(), ConfineError> {
    let otherwise = match mode {
        Seccomp::False => return Ok(()),
        Seccomp::Log => SeccompAction::Log,
        Seccomp::True => SeccompAction::Trap,
    };
    trap::install(program).map_err(ConfineError::Trap)?;
    let filter = filter(otherwise, extra).map_err(ConfineError::Filter)?;
    apply_filter_all_threads(&filter).map_err(ConfineError::Apply)
}

fn filter(otherwise: SeccompAction, extra: &[Rule]) -> Result<BpfProgram, BackendError> {
    let (mut calls, mut looked_at) = (CALLS.to_vec(), LOOKED_AT.to_vec());
    for rule in extra {
        match rule {
            Rule::Call(call) => calls.push(*call),
            Rule::OpenToWrite => looked_at.push(OPEN_TO_WRITE),
        }
    }
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        calls.iter().map(|call| (*call, Vec::new())).collect();
    for (call, argument, mask, value) in &looked_at {
        let is = SeccompCmpOp::MaskedEq(*mask);
        let condition = SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, is, *value)?;
        let rule = SeccompRule::new(vec![condition])?;
        rules.entry(*call).or_default().push(rule);
    }
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

const ALL: u64 = u32::MAX as u64;
#[allow(clippy::cast_sign_loss, reason = "bits")]
const WRITES: u64 =
    (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY))
        as u64;
#[allow(clippy::cast_sign_loss, reason = "bits")]
const EXECUTABLE: u64 = libc::PROT_EXEC as u64;

/// Call, argument, mask and what is left by it: one of a call's lines has to hold.
type Line = (c_long, u8, u64, u64);

#[allow(clippy::cast_sign_loss, reason = "bits")]
const OPEN_TO_WRITE: Line = (libc::SYS_openat, 2, WRITES, libc::O_RDWR as u64);

#[allow(clippy::cast_sign_loss, reason = "small numbers")]
const LOOKED_AT: &[Line] = &[
    (libc::SYS_openat, 2, WRITES, 0),
    (libc::SYS_socket, 0, ALL, libc::AF_UNIX as u64),
    (libc::SYS_socketpair, 0, ALL, libc::AF_UNIX as u64),
    (libc::SYS_mmap, 2, EXECUTABLE, 0),
    (libc::SYS_mprotect, 2, EXECUTABLE, 0),
    (libc::SYS_prctl, 0, ALL, libc::PR_SET_NAME as u64),
    (libc::SYS_ioctl, 1, ALL, libc::FIONBIO),
];

const CALLS: &[c_long] = &[
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_settime,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    // Sockets.
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    // Descriptors and files.
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_close,
    // The same to programs; glibc 2.36 makes this one, 2.41 the other.
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    // A panic tells where it was.
    libc::SYS_lseek,
    libc::SYS_getcwd,
    // The socket's own file, at the end.
    libc::SYS_unlink,
    // Memory, and the probe of it.
    libc::SYS_brk,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_process_vm_readv,
    // Threads.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
