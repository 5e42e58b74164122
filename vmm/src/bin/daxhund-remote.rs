//! The `daxhund-remote` binary: one request to a running daxhund.

#![forbid(unsafe_code)]

use std::io;
use std::process::ExitCode;

use console::Term;
use daxhund::remote;

fn main() -> ExitCode {
    // What is drawn on it goes out page by page.
    let terminal = Term::buffered_stdout();
    let status = remote::run(
        std::env::args_os(),
        &mut io::stdin().lock(),
        &mut io::stdout().lock(),
        &mut io::stderr().lock(),
        terminal.is_term().then_some(&terminal),
    );
    ExitCode::from(status)
}
