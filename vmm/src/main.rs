//! The `daxhund` binary: a command line in, an exit status out.
//!
//! The one place where an error is printed (its whole chain, once) and where the process's exit status is chosen.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;

use daxhund::api::Listener;
use daxhund::cli::{self, ApiSocket, Command, EventPlace, ExitStatus, LogLevel, Logging};
use daxhund::config::{RemovalGuard, ValidConfig};
use daxhund::machine::{self, Ending, ResetError, RunError};
use daxhund::monitor::{EventMonitor, Monitor};
use daxhund::{doctor, guard, host_config, inherited, pool};
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let status = match cli::parse(std::env::args_os()) {
        Ok(Command::Run {
            config,
            logging,
            api,
            events,
            guard,
        }) => start(config, &logging, api, events, guard),
        Ok(Command::Guard(asked)) => guard(asked),
        Ok(Command::Pool(asked)) => pool(asked),
        Ok(Command::Doctor { json }) => examine(json),
        Ok(Command::Version(text) | Command::Help(text)) => print(&text),
        Err(error) => {
            complain(&error);
            ExitStatus::Usage
        }
    };
    status.into()
}

fn start(
    config: Option<Box<ValidConfig>>,
    logging: &Logging,
    api: Option<ApiSocket>,
    events: Option<cli::EventMonitor>,
    guard: RemovalGuard,
) -> ExitStatus {
    if let Err(error) = log_to(logging) {
        let path = logging
            .file
            .as_deref()
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        eprintln!("daxhund: the log can't be written to {path}: {error}");
        return ExitStatus::Failure;
    }
    match run(config, api, events, guard) {
        Ok(ending) => ended(&ending),
        Err(error) => {
            complain(error.as_ref());
            let memory_is_stuck = matches!(
                error.downcast_ref(),
                Some(RunError::Reset(ResetError::TakeApart(_)))
            );
            if memory_is_stuck {
                ExitStatus::MemoryLost
            } else {
                ExitStatus::Failure
            }
        }
    }
}

/// Reads what the host has for its guests, takes over what was inherited, then hands everything to the machine's owner.
fn run(
    config: Option<Box<ValidConfig>>,
    api: Option<ApiSocket>,
    events: Option<cli::EventMonitor>,
    guard: RemovalGuard,
) -> Result<Ending, Box<dyn Error>> {
    let pools = host_config::read()?;
    let listener = match api {
        None => None,
        Some(ApiSocket::Path(path)) => Some(Listener::at(&path)?),
        Some(ApiSocket::Descriptor(fd)) => Some(Listener::inherited(inherited::take(fd)?)?),
    };
    // Until the end: its thread writes the last event.
    let events = match events {
        None => None,
        Some(cli::EventMonitor { place, form }) => Some(match place {
            EventPlace::Path(path) => EventMonitor::open(&path, form)?,
            EventPlace::Descriptor(fd) => EventMonitor::inherited(inherited::take(fd)?, form)?,
        }),
    };
    let monitor = events
        .as_ref()
        .map_or_else(Monitor::off, EventMonitor::monitor);
    Ok(machine::run(machine::Options {
        config: config.map(|config| *config),
        pools,
        api: listener,
        monitor,
        guard,
    })?)
}

fn ended(ending: &Ending) -> ExitStatus {
    match ending {
        Ending::PowerOff | Ending::Asked => ExitStatus::Success,
        Ending::TripleFault => {
            eprintln!("daxhund: the guest ended in a triple fault");
            ExitStatus::TripleFault
        }
        Ending::VcpuFailed(fault) => {
            complain(fault);
            if fault.is_memory_gone() {
                ExitStatus::MemoryLost
            } else {
                ExitStatus::Failure
            }
        }
        Ending::MemoryLost(lost) => {
            eprintln!("daxhund: {lost}; the guest can't go on and was ended (on_loss=stop)");
            ExitStatus::MemoryLost
        }
        Ending::MemoryWithdrawn { zone, device } => {
            eprintln!(
                "daxhund: the guest was stopped: the host wanted {device} back, which is its memory zone {zone} \
                 (on_removal=stop)"
            );
            ExitStatus::MemoryWithdrawn
        }
        Ending::VcpuPanicked(id) => {
            eprintln!("daxhund: the thread of vCPU {id} panicked; this is a defect of daxhund");
            ExitStatus::Failure
        }
        Ending::Signal(libc::SIGHUP) => ExitStatus::HungUp,
        Ending::Signal(libc::SIGINT) => ExitStatus::Interrupted,
        Ending::Signal(_) => ExitStatus::Terminated,
    }
}

fn examine(json: bool) -> ExitStatus {
    match doctor::run(
        &doctor::Options {
            json,
            ..Default::default()
        },
        &mut io::stdout().lock(),
    ) {
        Ok(verdict) if verdict.status() == doctor::Status::Fail => ExitStatus::Failure,
        Ok(_) => ExitStatus::Success,
        Err(error) => {
            complain(&error);
            ExitStatus::Failure
        }
    }
}

fn print(text: &str) -> ExitStatus {
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        Ok(()) => ExitStatus::Success,
        Err(error) => {
            complain(&error);
            ExitStatus::Failure
        }
    }
}

fn guard(asked: cli::Guard) -> ExitStatus {
    if let Err(error) = log_to(&Logging::default()) {
        complain(&error);
        return ExitStatus::Failure;
    }
    match guard::run(asked) {
        Ok(text) if text.is_empty() => ExitStatus::Success,
        Ok(text) => print(&text),
        Err(error) => {
            complain(error.as_ref());
            ExitStatus::Failure
        }
    }
}

fn pool(asked: cli::Pool) -> ExitStatus {
    match pool::run(asked, &mut io::stdout().lock()) {
        Ok(()) => ExitStatus::Success,
        Err(error) => {
            complain(error.as_ref());
            ExitStatus::Failure
        }
    }
}

/// An error with what caused it, from the outermost to the innermost.
fn complain(error: &dyn Error) {
    eprintln!("daxhund: {}", daxhund::chain(error));
}

fn log_to(logging: &Logging) -> io::Result<()> {
    let level = match logging.level {
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false);
    match &logging.file {
        None => subscriber
            .with_ansi(io::stderr().is_terminal())
            .with_writer(io::stderr)
            .init(),
        Some(path) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(path)?;
            subscriber.with_ansi(false).with_writer(file).init();
        }
    }
    Ok(())
}
