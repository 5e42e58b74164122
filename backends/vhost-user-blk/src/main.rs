//! `daxhund-vhost-user-blk`: see the crate's documentation.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use daxhund_vhost_user::{program, seccomp};
use daxhund_vhost_user_blk::args::Args;
use daxhund_vhost_user_blk::config::Config;
use daxhund_vhost_user_blk::daemon::{Daemon, NOUNS};

fn main() -> ExitCode {
    let args = Args::parse();
    program::run(NOUNS.program, args.verbose, || serve(args))
}

fn serve(args: Args) -> Result<(), Box<dyn Error>> {
    let config = Config::try_from(args)?;
    let daemon = Daemon::new(&config)?;
    seccomp::confine(config.policy.seccomp, NOUNS.program, &[])?;
    Ok(daemon.run()?)
}
