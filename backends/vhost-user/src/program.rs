//! What the `main` of a daemon does around its daemon: logging before, the error after.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use tracing::Level;

/// Logs to standard error (`verbose`: how often `-v` was given), serves, and says what went wrong.
pub fn run(
    name: &str,
    verbose: u8,
    serve: impl FnOnce() -> Result<(), Box<dyn Error>>,
) -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_target(false)
        .with_max_level(level(verbose))
        .with_ansi(io::stderr().is_terminal())
        .init();
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn level(verbose: u8) -> Level {
    match verbose {
        0 => Level::INFO,
        1 => Level::DEBUG,
        _ => Level::TRACE,
    }
}
