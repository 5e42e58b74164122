//! How often a vCPU has left `KVM_RUN`, and why.
//!
//! One writer, the vCPU's own thread: a count is a load and a store of its own cache line, nothing that other processors would
//! wait for. Whoever reads sees each count as it was a moment ago.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::{Error, VcpuExit};

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// An `in`.
    PortRead,
    /// An `out`.
    PortWrite,
    /// A load outside every memory slot.
    MmioRead,
    /// A store outside every memory slot.
    MmioWrite,
    /// A signal: the owner wants something.
    Interrupted,
    /// No memory behind an access.
    MemoryFault,
    /// A triple fault.
    Shutdown,
    /// KVM gave up on an instruction.
    InternalError,
    /// Anything else.
    Other,
}

impl ExitReason {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::PortRead,
        Self::PortWrite,
        Self::MmioRead,
        Self::MmioWrite,
        Self::Interrupted,
        Self::MemoryFault,
        Self::Shutdown,
        Self::InternalError,
        Self::Other,
    ];

    /// In words, for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::PortRead => "port_read",
            Self::PortWrite => "port_write",
            Self::MmioRead => "mmio_read",
            Self::MmioWrite => "mmio_write",
            Self::Interrupted => "interrupted",
            Self::MemoryFault => "memory_fault",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal_error",
            Self::Other => "other",
        }
    }

    /// That of a return from `KVM_RUN`.
    pub(super) fn of(ran: &Result<VcpuExit<'_>, Error>) -> Self {
        match ran {
            Ok(VcpuExit::IoIn(..)) => Self::PortRead,
            Ok(VcpuExit::IoOut(..)) => Self::PortWrite,
            Ok(VcpuExit::MmioRead(..)) => Self::MmioRead,
            Ok(VcpuExit::MmioWrite(..)) => Self::MmioWrite,
            Ok(VcpuExit::Intr) => Self::Interrupted,
            Ok(VcpuExit::MemoryFault { .. }) => Self::MemoryFault,
            Ok(VcpuExit::Shutdown) => Self::Shutdown,
            Ok(VcpuExit::InternalError) => Self::InternalError,
            Ok(_) => Self::Other,
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => Self::Interrupted,
                libc::EFAULT | libc::EHWPOISON => Self::MemoryFault,
                _ => Self::Other,
            },
        }
    }
}

/// The counts of one vCPU, on cache lines that no other vCPU writes to.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct ExitCounts([AtomicU64; ExitReason::ALL.len()]);

impl ExitCounts {
    /// Counts one. Called by the one thread that runs the vCPU.
    pub(super) fn add(&self, reason: ExitReason) {
        let count = &self.0[reason as usize];
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn of(&self, reason: ExitReason) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_place_of_its_own() {
        let counts = ExitCounts::default();
        for (times, reason) in ExitReason::ALL.into_iter().enumerate() {
            for _ in 0..times {
                counts.add(reason);
            }
        }
        for (times, reason) in (0..).zip(ExitReason::ALL) {
            assert_eq!(counts.of(reason), times, "{reason:?}");
        }
        assert_eq!(align_of::<ExitCounts>(), 64);
    }

    #[test]
    fn what_a_return_was_for() {
        let mut data = [0];
        for (ran, reason) in [
            (Ok(VcpuExit::IoOut(0x80, &[1])), ExitReason::PortWrite),
            (Ok(VcpuExit::MmioRead(0, &mut data)), ExitReason::MmioRead),
            (Ok(VcpuExit::Hlt), ExitReason::Other),
            (Err(Error::new(libc::EINTR)), ExitReason::Interrupted),
            (Err(Error::new(libc::EHWPOISON)), ExitReason::MemoryFault),
            (Err(Error::new(libc::EINVAL)), ExitReason::Other),
        ] {
            assert_eq!(ExitReason::of(&ran), reason, "{ran:?}");
        }
    }
}
