//! `daxhund-guardd`: holds removals of device-dax memory for everybody who uses it. See the crate's documentation.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use daxhund_guard::{
    DEFAULT_SOCKET, DaemonConfig, Listener, UnknownPolicy, connection_of_helper, serve_daemon,
    serve_inherited,
};

/// Holds the removal of device-dax memory until those who use it have let go.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where clients connect; systemd's socket comes first
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// What to do with a removal of which can't be told which device it means, while any is held
    #[arg(long, value_enum, value_name = "POLICY", default_value_t)]
    unknown: UnknownPolicy,
    /// Serve the connection on this descriptor alone, as the helper of one VMM
    #[arg(long, value_name = "0", hide = true, value_parser = clap::value_parser!(u32).range(0..1))]
    fd: Option<u32>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("daxhund-guardd: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    if arguments.fd.is_some() {
        let connection = connection_of_helper()?;
        return Ok(serve_inherited(connection, arguments.unknown)?);
    }
    let listener = match Listener::of_systemd()? {
        Some(listener) => listener,
        None => Listener::at(&arguments.socket)?,
    };
    let unknown = arguments.unknown;
    Ok(serve_daemon(DaemonConfig { listener, unknown })?)
}
