//! The `daxhund-remote` binary: one request to a running daxhund.

#![forbid(unsafe_code)]

use std::io;
use std::process::ExitCode;

use daxhund::remote;

fn main() -> ExitCode {
    let status = remote::run(
        std::env::args_os(),
        &mut io::stdin().lock(),
        &mut io::stdout().lock(),
        &mut io::stderr().lock(),
    );
    ExitCode::from(status)
}
