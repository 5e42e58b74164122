//! The command line as it is typed; [`Config`](crate::config::Config) is what it means.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::{ArgAction, Parser};
use daxhund_vhost_user::policy::PolicyArgs;

/// Lends a range of device-dax memory, or a file, to a guest as persistent memory over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "daxhund-vhost-user-pmem", version)]
#[command(group = clap::ArgGroup::new("memory").required(true))]
pub struct Args {
    /// Where the VMM connects; made here and removed at the end. Not with a socket that systemd hands over
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,
    /// The memory is this part of a device-dax device; all of it without offset= and size= (K, M, G, T). When the host wants the
    /// device back: the frontend has the timeout's 10 seconds to give it back (stop), or refuse
    #[arg(
        long,
        group = "memory",
        value_name = "DEVICE[,offset=BYTES][,size=BYTES][,on_removal=stop|refuse][,removal_timeout=SECONDS]"
    )]
    pub dax: Option<String>,
    /// The memory is this file
    #[arg(long, group = "memory", value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Lend it for reading, to many guests at once; several may lend the same range or file then
    #[arg(long)]
    pub read_only: bool,
    /// Start although the range is in use, and lend it to the one that has it: to the guest of a daemon that was killed
    #[arg(long)]
    pub rejoin: bool,
    /// Of removals, events, metrics and system calls
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// Say more of what is done; twice for everything
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}
