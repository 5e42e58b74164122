//! `daxhund-vhost-user-blk`: see the crate's documentation.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use daxhund_vhost_user::program;
use daxhund_vhost_user_blk::args::Args;
use daxhund_vhost_user_blk::config::Config;
use daxhund_vhost_user_blk::daemon::Daemon;
use daxhund_vhost_user_blk::seccomp::confine;

fn main() -> ExitCode {
    let args = Args::parse();
    program::run("daxhund-vhost-user-blk", args.verbose, || serve(args))
}

fn serve(args: Args) -> Result<(), Box<dyn Error>> {
    let config = Config::try_from(args)?;
    let daemon = Daemon::new(&config)?;
    confine(config.seccomp)?;
    Ok(daemon.run()?)
}
