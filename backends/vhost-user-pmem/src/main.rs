//! `daxhund-vhost-user-pmem`: see the crate's documentation.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use daxhund_vhost_user::program;
use daxhund_vhost_user_pmem::args::Args;
use daxhund_vhost_user_pmem::config::Config;
use daxhund_vhost_user_pmem::daemon::Daemon;

fn main() -> ExitCode {
    let args = Args::parse();
    program::run("daxhund-vhost-user-pmem", args.verbose, || serve(args))
}

fn serve(args: Args) -> Result<(), Box<dyn Error>> {
    let config = Config::try_from(args)?;
    Ok(Daemon::new(&config)?.run()?)
}
