//! The command line as it is typed; [`Config`](crate::config::Config) is what it means.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::{ArgAction, Parser};
use daxhund_vhost_user::policy::PolicyArgs;

/// Serves a range of device-dax memory, or a file, as a virtio disk over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "daxhund-vhost-user-blk", version)]
#[command(group = clap::ArgGroup::new("disk").required(true))]
pub struct Args {
    /// Where the VMM connects; made here and removed at the end. Not with a socket that systemd hands over
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,
    /// The disk is this part of a device-dax device; all of it without offset= and size= (K, M, G, T). When the host wants the
    /// device back: serve no longer than its frontend or the timeout's 10 seconds (stop), or refuse
    #[arg(
        long,
        group = "disk",
        value_name = "DEVICE[,offset=BYTES][,size=BYTES][,on_removal=stop|refuse][,removal_timeout=SECONDS]"
    )]
    pub dax: Option<String>,
    /// The disk is this image file or block device
    #[arg(long, group = "disk", value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Refuse writes; several may serve the same range or file then
    #[arg(long)]
    pub read_only: bool,
    /// Queues that are offered, each served by a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_queues: u16,
    /// Of removals, events, metrics and system calls
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// Say more of what is done; twice for everything
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}
