//! `daxhund-vhost-user-pmem`: see the crate's documentation.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use daxhund_vhost_user::program;
use daxhund_vhost_user::seccomp::{self, Rule};
use daxhund_vhost_user_pmem::args::Args;
use daxhund_vhost_user_pmem::config::Config;
use daxhund_vhost_user_pmem::daemon::{Daemon, NOUNS};

/// A range is opened anew after each frontend; who has it instead is looked for in `/proc`.
const RULES: [Rule; 3] = [
    Rule::OpenToWrite,
    Rule::Call(libc::SYS_getdents64),
    Rule::Call(libc::SYS_getsockopt),
];

fn main() -> ExitCode {
    let args = Args::parse();
    program::run(NOUNS.program, args.verbose, || serve(args))
}

fn serve(args: Args) -> Result<(), Box<dyn Error>> {
    let config = Config::try_from(args)?;
    let daemon = Daemon::new(&config)?;
    seccomp::confine(config.policy.seccomp, NOUNS.program, &RULES)?;
    Ok(daemon.run()?)
}
