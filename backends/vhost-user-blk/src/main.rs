//! `daxhund-vhost-user-blk`: see the crate's documentation.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::Parser;
use daxhund_vhost_user_blk::args::Args;
use daxhund_vhost_user_blk::config::Config;
use daxhund_vhost_user_blk::daemon::Daemon;
use daxhund_vhost_user_blk::seccomp::confine;

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_target(false)
        .with_max_level(args.level())
        .with_ansi(io::stderr().is_terminal())
        .init();
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("daxhund-vhost-user-blk: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn serve(args: Args) -> Result<(), Box<dyn Error>> {
    let config = Config::try_from(args)?;
    let daemon = Daemon::new(&config)?;
    confine(config.seccomp)?;
    Ok(daemon.run()?)
}
