//! What the exit status of `daxhund` means. Scripts and orchestrators rely on it: a guest that
//! powered itself off is never mistaken for one whose memory was lost.

use std::process::ExitCode;

/// How `daxhund` ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitStatus {
    /// The guest powered itself off; `doctor` found nothing that fails; help or version was printed.
    Success = 0,
    /// The VMM failed, at start or while running; `doctor` found something that fails.
    Failure = 1,
    /// The command line cannot be used.
    Usage = 2,
    /// The guest ended in a triple fault.
    TripleFault = 3,
    /// Guest memory was lost, or a vCPU could not run on it.
    MemoryLost = 4,
    /// The host wanted guest memory back, and `on_removal=stop` gave it.
    MemoryWithdrawn = 5,
    /// Ended by SIGHUP.
    HungUp = 129,
    /// Ended by SIGINT.
    Interrupted = 130,
    /// Ended by SIGTERM.
    Terminated = 143,
}

impl ExitStatus {
    /// Every status with its meaning, as `--help` and the README print them.
    pub const TABLE: [(Self, &'static str); 9] = [
        (
            Self::Success,
            "the guest powered off; doctor found no failure",
        ),
        (
            Self::Failure,
            "the VMM failed, at start or later; doctor found a failure",
        ),
        (Self::Usage, "the command line cannot be used"),
        (Self::TripleFault, "the guest ended in a triple fault"),
        (
            Self::MemoryLost,
            "guest memory was lost or a vCPU could not run on it",
        ),
        (
            Self::MemoryWithdrawn,
            "the host wanted guest memory back and on_removal=stop gave it",
        ),
        (Self::HungUp, "ended by SIGHUP"),
        (Self::Interrupted, "ended by SIGINT"),
        (Self::Terminated, "ended by SIGTERM"),
    ];

    /// The number the shell sees.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// [`Self::TABLE`] as lines of `  CODE  meaning`.
    pub fn table() -> String {
        let lines: Vec<String> = Self::TABLE
            .iter()
            .map(|(status, meaning)| format!("  {:>3}  {meaning}", status.code()))
            .collect();
        lines.join("\n")
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_the_documented_ones() {
        let codes = ExitStatus::TABLE.map(|(status, _)| status.code());
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 129, 130, 143]);
        let table = ExitStatus::table();
        assert_eq!(table.lines().count(), codes.len());
        assert!(
            table.contains("    3  the guest ended in a triple fault"),
            "{table}"
        );
        assert!(table.contains("  143  ended by SIGTERM"), "{table}");
    }
}
