//! Holds a host-side removal of device-dax memory until those who use the memory have let go.
//!
//! The kernel does not ask: it unbinds a dax device under long-term pins within a tenth of a second, and a device that
//! does DMA goes on writing into memory that may be somebody else's by then. But every removal by a person or a tool begins
//! with the opening of a file in sysfs, and fanotify lets a privileged process hold that. This crate does: the opener
//! waits in the kernel, the holders of the device are asked, and with their word it passes, or it gets `EPERM`.
//!
//! ```text
//!   daxctl, ndctl, a shell ──open──> unbind        VMM ──hold──┐
//!                                      │                       v
//!                                      └──permission──> guard (daxhund-guardd, or a VMM's helper)
//!                                                         │  ^
//!                                                  wanted │  │ released / refused
//!                                                         v  │
//!                                                         VMM
//! ```
//! The guard is a process of its own, because closing the fanotify group lets everybody through: a VMM that crashes must
//! not be the one that closes it. It is `daxhund-guardd` ([`serve_daemon`]) for many VMMs, also unprivileged ones, or a
//! [`Helper`] ([`serve_inherited`]) of one privileged VMM. VMMs use [`Guard`].
//!
//! # Invariants
//! - No removal passes while a holder of its target lives that has not released it. Silence is no release.
//! - A holder that dies has released when no copy of the descriptor it locked the device through is left.
//! - What can't be told which device it means does not pass while something it can mean is held ([`UnknownPolicy`]).
//! - Who holds a device has it open: an unprivileged user can't hold what it can't use.
//!
//! # What is held
//! The opening for writing of: `unbind` of each driver that is bound to the device or to anything it stands on
//! (`device_dax`; `dax_pmem`, `nd_region` and `nfit` for persistent memory; the CXL drivers), `delete` of its dax region,
//! `delete_region` and `commit` of CXL, `remove` of PCI functions and `eject` of ACPI devices it stands on. Files that threaten nothing held are not
//! watched, and who opens one for reading only passes.
//!
//! Where each tool is caught first, and what it says when it is refused (Linux 6.12 and 6.1; ndctl and daxctl of Debian 12):
//!
//! | tool | caught at the opening of | refused, it says |
//! |---|---|---|
//! | `echo dax1.0 > .../unbind` in `sh -c` | dax `device_dax/unbind` | Operation not permitted |
//! | `daxctl disable-device`, `reconfigure-device -m system-ram` | dax `device_dax/unbind` | Device or resource busy |
//! | `ndctl disable-namespace` | nd `dax_pmem/unbind` | "disabled 1 namespace", status 0: it does not look |
//! | `ndctl destroy-namespace -f` | nd `dax_pmem/unbind`, and again | it can't zero the info block; nothing is destroyed |
//! | `ndctl disable-region` | nd `dax_pmem/unbind`, then `nd_region/unbind` | |
//! | the whole bus, by its driver | acpi `nfit/unbind` | Operation not permitted |
//!
//! A tool that is refused may ask again by another file, and the holder is asked again. One that is killed while it waits
//! ends at once.
//!
//! # What can't be held
//! - A module that is removed, memory that is pulled out, what firmware does, and what the kernel decides by itself.
//! - Writes through a file that was opened before the device was held, or that is opened and written between the answer
//!   and the registration of a newcomer.
//! - Another mount of sysfs (a container with a sysfs of its own: other superblocks have other inodes). A bind mount is
//!   the same superblock and is held.
//! - A writer whose arguments lie about its target: a process named `daxctl` that means something else.
//! - PCI slots' `power`, and memory devices of CXL that are found by no `targetN` of a region.
//! - Anything while no guard runs: at its end openers are turned away, but a guard that is killed lets them through.
//!
//! For those there is what comes after: the device's driver is gone from sysfs, mappings fault, and the VMM has to see it.
#![forbid(unsafe_code)]

mod client;
mod core;
mod group;
mod helper;
mod host;
mod lineage;
mod listener;
mod locks;
mod opener;
mod peer;
mod policy;
mod process;
mod proof;
mod protocol;
mod release;
mod removals;
mod search;
mod server;
mod sources;
mod target;
#[cfg(test)]
mod testing;
mod uevents;
mod watched;

pub use client::{
    ANSWER_DEADLINE, ConnectError, Guard, HoldError, LostError, Notice, RequestId, Verdict,
};
pub use group::GroupError;
pub use helper::{Helper, SpawnError, connection_of_helper};
pub use host::Host;
pub use listener::{DEFAULT_SOCKET, ListenError, Listener};
pub use opener::Opener;
pub use policy::UnknownPolicy;
pub use protocol::{HeldDevice, Listing, WaitingOpener};
pub use release::{ListError, ReleaseError, list, release};
pub use search::Search;
pub use server::{DaemonConfig, ServeError, serve_daemon, serve_inherited};

/// An error and what caused it, in one line: from the outermost to the innermost, with colons between.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Transparent wrappers say the same as what they wrap.
        let this = error.to_string();
        if this != last {
            text.push_str(": ");
            text.push_str(&this);
            last = this;
        }
        cause = error.source();
    }
    text
}
