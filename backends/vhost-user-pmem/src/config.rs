//! What to lend and where: checked once, nothing after this parses anything.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use daxhund_vhost_user::source::{Source, SourceError};

use crate::args::Args;

/// What the daemon does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where to listen; `None`: on the socket that systemd hands over.
    pub socket_path: Option<PathBuf>,
    /// The memory.
    pub source: Source,
    /// Nobody writes, and the memory is shared with others who lend it so.
    pub read_only: bool,
    /// A range that is in use is no error: whoever has it is waited for.
    pub rejoin: bool,
}

impl TryFrom<Args> for Config {
    type Error = SourceError;

    fn try_from(args: Args) -> Result<Self, SourceError> {
        Ok(Self {
            socket_path: args.socket_path,
            source: Source::new(args.dax.as_deref(), args.file)?,
            read_only: args.read_only,
            rejoin: args.rejoin,
        })
    }
}
