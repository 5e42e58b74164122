//! What is done with an opener whose target can't be told.

#![forbid(unsafe_code)]

/// For an opener of which it is not known whether it means a held device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum UnknownPolicy {
    /// It gets EPERM, and the log names the way that works.
    #[default]
    Deny,
    /// Every holder of a device that it could mean is asked, as if it meant all of them.
    HoldAll,
    /// It passes.
    Allow,
}
