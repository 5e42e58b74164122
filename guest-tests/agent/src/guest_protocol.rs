//! Questions to the agent inside a guest, and its answers: lines on the guest's serial console.
//!
//! A question is a line of words, `#NUMBER COMMAND [ARGUMENT...]`; the answer is one line that starts with
//! [`ANSWER_MARK`], so that kernel messages around it do no harm. The agent answers in order, one at a time.

use serde::{Deserialize, Serialize};

/// Starts the line that says that the guest's user space is up; the guest's uptime in seconds follows.
pub const READY_MARK: &str = "GUEST-READY";
/// Starts every answer.
pub const ANSWER_MARK: &str = "@@ ";
/// Starts the line that says that a record is durable; its number follows.
pub const ACKNOWLEDGED_MARK: &str = "DURABLE ";
/// Bytes written to I/O port 0x80, one by one, when user space is up: a mark that the host's `kvm_pio`
/// tracepoint sees. Kernels write to that port as a delay, so one value alone would not do.
pub const READY_PORT_BYTES: [u8; 3] = [0x5d, 0xa2, 0x5e];

/// An answer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Answer {
    /// The question's number.
    pub id: u64,
    /// What was asked for, or why not.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What became of a question.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The answer, its shape according to the command.
    Ok(serde_json::Value),
    /// Why there is none.
    Err(String),
}

/// Answer to `meminfo`, in bytes.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct MemInfo {
    /// What the kernel manages.
    pub total_bytes: u64,
    /// What nobody uses.
    pub free_bytes: u64,
    /// What can be had without swapping.
    pub available_bytes: u64,
}

/// Answer to `pattern`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct PatternReport {
    /// Memory that was written and read back in every pass.
    pub checked_bytes: u64,
    /// Of which lies below 4 GiB of guest-physical space.
    pub low_bytes: u64,
    /// Of which lies above.
    pub high_bytes: u64,
    /// Patterns written and verified.
    pub passes: u32,
    /// Words that did not read back as written, over all passes.
    pub wrong_words: u64,
    /// The first of them.
    pub examples: Vec<WrongWord>,
}

/// A word that did not read back as written.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct WrongWord {
    /// Guest-physical address, when the kernel gave it.
    pub physical: Option<u64>,
    /// What was written.
    pub expected: u64,
    /// What was read.
    pub found: u64,
}

/// Answer to `physread`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct PhysicalReport {
    /// Words compared.
    pub words: u64,
    /// Words that hold something else than the seed's pattern.
    pub wrong_words: u64,
    /// Offset of the first of them.
    pub first_wrong_offset: Option<u64>,
}

/// Answer to `persist-check`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PersistReport {
    /// Whole records from the start of the file.
    pub records: u64,
    /// Size of the file.
    pub file_bytes: u64,
}

/// Answer to what measures a rate.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct RateReport {
    /// How often it was done.
    pub operations: u64,
    /// What that moved.
    pub bytes: u64,
    /// How long it took by the guest's clock.
    pub seconds: f64,
}

/// Answer to `pci`: one for each function.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PciFunction {
    /// As in `0000:00:02.0`.
    pub address: String,
    /// Vendor and device.
    pub id: (u16, u16),
    /// Class, subclass and programming interface.
    pub class: u32,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Its BARs that have an address.
    pub bars: Vec<PciBar>,
    /// Message-signalled interrupts that the driver has been given.
    pub vectors: usize,
}

/// A BAR as the guest's kernel has placed it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PciBar {
    /// Which of the six; ROM is 6.
    pub index: usize,
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
    /// The kernel's flags.
    pub flags: u64,
}

/// Answer to `interrupts`: what has come from a PCI function, for the driver that has it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct InterruptReport {
    /// How it comes.
    pub kind: InterruptKind,
    /// How often, on all vectors and processors.
    pub count: u64,
}

/// How a PCI function interrupts.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InterruptKind {
    /// A vector for each cause.
    MsiX,
    /// A message.
    Msi,
    /// A wire, which may be shared.
    IntX,
}

/// Answer to `edu-dma`: one for each target.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DmaReport {
    /// As it was asked for.
    pub target: String,
    /// Guest-physical address.
    pub address: u64,
    /// What the device has written there.
    pub written: Transfer,
    /// What the device has read from there.
    pub read: Transfer,
}

/// What has become of a transfer by DMA.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Transfer {
    /// Every word is as it was sent.
    Arrived,
    /// Every word is what it was before.
    Nothing,
    /// Anything else.
    Damaged,
}

/// Answer to `edu-interrupts`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct EduReport {
    /// Interrupts that have come, each of them raised, seen in the device's status, and acknowledged.
    pub interrupts: u64,
    /// The factorial of 10 as the device has computed it, the end of which it announces by one more interrupt.
    pub factorial: u32,
}

/// Answer to `hostile`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct HostileReport {
    /// What was done.
    pub case: String,
    /// The device's status after each attempt.
    pub statuses: Vec<u8>,
    /// How many buffers the device has given back.
    pub used: u64,
}

/// A record of the kernel's log.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct LogRecord {
    /// Syslog level: 0 emergency to 4 warning.
    pub level: u8,
    /// The text.
    pub text: String,
}

/// Answer to `exec`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ExecReport {
    /// Exit status, or none when a signal ended it.
    pub status: Option<i32>,
    /// Standard output, undecodable bytes replaced.
    pub stdout: String,
    /// Standard error, undecodable bytes replaced.
    pub stderr: String,
}

/// Answer to `numa`: one for each node that is online.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct NumaNode {
    /// Number of the node.
    pub node: u32,
    /// Its processors, in the kernel's list form.
    pub cpus: String,
    /// Distances to the nodes in order.
    pub distances: Vec<u32>,
    /// Its memory.
    pub total_bytes: u64,
}

/// The word that a pattern holds at an index: every bit depends on the index and the seed, and neighbours differ.
pub fn pattern_word(index: u64, seed: u64) -> u64 {
    // SplitMix64's output function.
    let mut word = index.wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word ^ (word >> 27)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_one_form() {
        let ok = Answer {
            id: 3,
            outcome: Outcome::Ok(serde_json::json!({"cpus": 2})),
        };
        let text = serde_json::to_string(&ok).unwrap();
        assert_eq!(text, r#"{"id":3,"ok":{"cpus":2}}"#);
        assert_eq!(serde_json::from_str::<Answer>(&text).unwrap(), ok);
        let err: Answer = serde_json::from_str(r#"{"id":4,"err":"no such file"}"#).unwrap();
        assert_eq!(err.outcome, Outcome::Err("no such file".into()));
    }

    #[test]
    fn neighbouring_words_and_seeds_differ() {
        let words: std::collections::HashSet<u64> = (0..4096)
            .flat_map(|i| [pattern_word(i, 1 << 40), pattern_word(i, 1 << 41)])
            .collect();
        assert_eq!(words.len(), 8192);
    }
}
