//! What fuzz crates share: a reader of the fuzzer's bytes, and for those of the daemons a hostile frontend with a hostile guest,
//! at the other end of a session that is made as the daemon makes it.
//!
//! Not here: what a device's handshake and requests look like, and what has to be so afterwards. Those are the target's.

#![forbid(unsafe_code)]

#[cfg(feature = "frontend")]
pub mod frontend;
pub mod input;
#[cfg(feature = "frontend")]
pub mod session;

use std::io;
use std::sync::Once;

/// Runs it on these bytes: as many descriptors have to be there after it as before. What is there once for the whole process comes
/// with a run on `first`.
pub fn leaves_no_descriptor(run: fn(&[u8]), first: &[u8], data: &[u8]) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| run(first));
    let before = descriptors().expect("a list");
    run(data);
    assert_eq!(
        descriptors().expect("a list"),
        before,
        "something of the session is left"
    );
}

/// Descriptors that this process has.
fn descriptors() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

/// Threads that this process has. By the kernel's count: a list of them breaks off at one that ends while it is read.
pub fn threads() -> io::Result<usize> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let count = status
        .lines()
        .find_map(|line| line.strip_prefix("Threads:"));
    let count = count.and_then(|count| count.trim().parse().ok());
    count.ok_or_else(|| io::Error::other("/proc/self/status has no count of threads"))
}
