//! The command line: from arguments to one [`Command`] or one error. Nothing is printed, opened or
//! started here, so every outcome is a value that a test can look at.
//!
//! Invariants:
//! - A guest in a [`Command::Run`] is checked; what is wrong with a command line is known before
//!   anything of the host is touched. A run without a guest has a REST server, which brings one.
//! - Words of the contract that are not built are refused by name, never ignored.

#![forbid(unsafe_code)]

mod args;
mod endpoint;
mod exit;
#[cfg(test)]
mod tests;
mod unsupported;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use thiserror::Error;

use args::{Args, GuardSub, PoolSub, Sub};
pub use endpoint::{ApiSocket, EventMonitor, EventPlace};
pub use exit::ExitStatus;

use crate::config::{
    BalloonConfig, ByteSize, ConfigError, ConsoleConfig, CpusConfig, DeviceConfig, DiskConfig,
    FsConfig, GenericVhostUserConfig, MemoryConfig, NetConfig, NumaConfig, PayloadConfig,
    PlatformConfig, PmemConfig, RemovalGuard, RemovalGuardError, RngConfig, ValidConfig,
    VirtioConsoleConfig, VmConfig, VsockConfig, WordError,
};

/// The release of the contract that is answered, for those who parse it from `--version`.
pub(crate) const CONTRACT_VERSION: &str = "v53.0.0";
const CONTRACT_NAME: &str = "cloud-hypervisor";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a guest, or wait for one.
    Run {
        /// The guest. `None` only with `api`: the guest comes by it.
        config: Option<Box<ValidConfig>>,
        /// What to log and where.
        logging: Logging,
        /// Where the REST server listens; `None` is no server.
        api: Option<ApiSocket>,
        /// Where events are written to.
        events: Option<EventMonitor>,
        /// Who holds removals of its memory.
        guard: RemovalGuard,
    },
    /// Check the host.
    Doctor {
        /// Print JSON instead of a table.
        json: bool,
    },
    /// Something about the guard of removals.
    Guard(Guard),
    /// Something about the host's pools of memory.
    Pool(Pool),
    /// Print this line to standard output.
    Version(String),
    /// Print this text to standard output.
    Help(String),
}

/// What is wanted of the guard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// What it holds.
    List {
        /// Where it listens.
        socket: PathBuf,
        /// As JSON.
        json: bool,
    },
    /// That it has a device let go of and takes it away.
    Release {
        /// The device.
        device: String,
        /// Where it listens.
        socket: PathBuf,
    },
    /// To be it, for the VMM at the other end of standard input.
    Serve,
}

/// What is wanted of the host's pools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pool {
    /// What they are, and who has what of them.
    List {
        /// Which; every one without it.
        pool: Option<String>,
        /// As JSON.
        json: bool,
    },
    /// What is free of them.
    Free {
        /// Which; every one without it.
        pool: Option<String>,
        /// As JSON.
        json: bool,
    },
    /// A range that nobody else gets until it is let go of.
    Reserve {
        /// Which.
        pool: String,
        /// How much.
        size: ByteSize,
        /// The host node that it is to be of.
        node: Option<u32>,
        /// As JSON.
        json: bool,
    },
}

/// What to log and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Logging {
    /// The most detailed level that is logged.
    pub level: LogLevel,
    /// The file to write to; standard error when absent.
    pub file: Option<PathBuf>,
}

/// How detailed the log is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Errors and warnings.
    #[default]
    Warn,
    /// `-v`.
    Info,
    /// `-vv`.
    Debug,
    /// `-vvv`.
    Trace,
}

impl LogLevel {
    fn from_count(count: u8) -> Self {
        match count {
            0 => Self::Warn,
            1 => Self::Info,
            2 => Self::Debug,
            _ => Self::Trace,
        }
    }
}

/// A command line that cannot be used; the exit status is [`ExitStatus::Usage`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CliError {
    /// An unknown word, a word without its value, a word given too often.
    #[error("{message}")]
    Syntax {
        /// What is wrong, with a hint; more than one line.
        message: String,
    },
    /// No words at all.
    #[error("nothing to do: give --kernel PATH to run a guest, or a command\n\n{}", help.trim_end())]
    NothingToDo {
        /// The short help.
        help: String,
    },
    /// A word of the contract that this version does not build.
    #[error("not supported by daxhund: {word}")]
    NotSupported {
        /// The word as given.
        word: String,
    },
    /// A word about a guest that is not there.
    #[error(
        "{word} is about a guest, but there is no kernel to boot: give --kernel PATH, or leave {word} \
         to the vm.create request"
    )]
    NoGuest {
        /// The word.
        word: String,
    },
    /// Who is to hold removals.
    #[error(transparent)]
    Guard(#[from] RemovalGuardError),
    /// The value of a word.
    #[error(transparent)]
    Word(#[from] WordError),
    /// The words together.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The command with all that it tells of itself.
#[cfg(test)]
pub(crate) fn command() -> clap::Command {
    args::explained(Args::command())
}

/// Reads a command line whose first item is the program's name.
pub fn parse<I>(argv: I) -> Result<Command, CliError>
where
    I: IntoIterator<Item = OsString>,
{
    let argv: Vec<OsString> = argv.into_iter().collect();
    let command = || {
        let command = Args::command();
        if argv.iter().any(|word| word == "--help") {
            args::explained(command)
        } else {
            command
        }
    };
    // Words that are refused make a third of the table, and who starts a guest gives none: they are looked for when a word
    // is not known.
    let mut outcome = command().try_get_matches_from(&argv);
    let unknown = [ErrorKind::UnknownArgument, ErrorKind::InvalidSubcommand];
    if outcome
        .as_ref()
        .is_err_and(|error| unknown.contains(&error.kind()))
    {
        outcome = unsupported::recognise(command()).try_get_matches_from(&argv);
        if let Some(word) = outcome.as_ref().ok().and_then(unsupported::given) {
            return Err(CliError::NotSupported { word });
        }
    }
    let matches = match outcome {
        Ok(matches) => matches,
        Err(error) if error.kind() == ErrorKind::DisplayHelp => {
            return Ok(Command::Help(error.render().to_string()));
        }
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            return Err(CliError::NothingToDo {
                help: error.render().to_string(),
            });
        }
        Err(error) => return Err(syntax(&error)),
    };
    let words = Args::from_arg_matches(&matches).map_err(|error| syntax(&error))?;
    if words.version {
        return Ok(Command::Version(version(argv.first())));
    }
    match words.subcommand {
        Some(Sub::Doctor { json }) => Ok(Command::Doctor { json }),
        Some(Sub::Guard(guard)) => Ok(Command::Guard(match guard {
            GuardSub::List { socket, json } => Guard::List { socket, json },
            GuardSub::Release { device, socket } => Guard::Release { device, socket },
            GuardSub::Serve { fd: _ } => Guard::Serve,
        })),
        Some(Sub::Pool(pool)) => Ok(Command::Pool(match pool {
            PoolSub::List { pool, json } => Pool::List { pool, json },
            PoolSub::Free { pool, json } => Pool::Free { pool, json },
            PoolSub::Reserve {
                pool,
                size,
                node,
                json,
            } => Pool::Reserve {
                pool,
                size,
                node,
                json,
            },
        })),
        None => run(words, &matches),
    }
}

fn run(args: Args, matches: &ArgMatches) -> Result<Command, CliError> {
    if args.seccomp != "false" {
        return Err(CliError::NotSupported {
            word: format!("--seccomp {}", args.seccomp),
        });
    }
    let logging = Logging {
        level: LogLevel::from_count(args.verbose),
        file: args.log_file.clone(),
    };
    let api = args
        .api_socket
        .as_deref()
        .map(ApiSocket::parse)
        .transpose()?;
    let events = args.event_monitor.as_deref();
    let events = events.map(EventMonitor::parse).transpose()?;
    let guard = args.removal_guard.as_deref();
    let guard = guard.map(str::parse).transpose()?.unwrap_or_default();
    let config = if api.is_some() && args.kernel.is_none() {
        if let Some(word) = args::guest_word(matches) {
            return Err(CliError::NoGuest { word });
        }
        None
    } else {
        Some(Box::new(guest(args)?.validate()?))
    };
    Ok(Command::Run {
        config,
        logging,
        api,
        events,
        guard,
    })
}

fn guest(args: Args) -> Result<VmConfig, WordError> {
    let console = one(args.console.as_deref(), VirtioConsoleConfig::parse)?.unwrap_or_default();
    Ok(VmConfig {
        cpus: one(args.cpus.as_deref(), CpusConfig::parse)?.unwrap_or_default(),
        memory: MemoryConfig::parse(args.memory.as_deref(), &args.memory_zone)?,
        payload: PayloadConfig {
            kernel: args.kernel,
            initramfs: args.initramfs,
            cmdline: args.cmdline,
        },
        serial: one(args.serial.as_deref(), ConsoleConfig::parse)?
            .unwrap_or_else(|| ConsoleConfig::beside(&console)),
        console: Some(console),
        disks: each(&args.disk, DiskConfig::parse)?,
        net: each(&args.net, NetConfig::parse)?,
        rng: one(args.rng.as_deref(), RngConfig::parse)?.unwrap_or_default(),
        generic_vhost_user: each(&args.generic_vhost_user, GenericVhostUserConfig::parse)?,
        fs: each(&args.fs, FsConfig::parse)?,
        pmem: each(&args.pmem, PmemConfig::parse)?,
        vsock: one(args.vsock.as_deref(), VsockConfig::parse)?,
        balloon: one(args.balloon.as_deref(), BalloonConfig::parse)?,
        devices: each(&args.device, DeviceConfig::parse)?,
        platform: one(args.platform.as_deref(), PlatformConfig::parse)?.unwrap_or_default(),
        numa: each(&args.numa, NumaConfig::parse)?,
    })
}

/// Reads a word that may be there once.
fn one<T>(
    text: Option<&str>,
    parse: fn(&str) -> Result<T, WordError>,
) -> Result<Option<T>, WordError> {
    text.map(parse).transpose()
}

/// Reads a word that may be there any number of times.
fn each<T>(texts: &[String], parse: fn(&str) -> Result<T, WordError>) -> Result<Vec<T>, WordError> {
    texts.iter().map(|text| parse(text)).collect()
}

/// clap's text without the prefix, which is the printer's to choose.
fn syntax(error: &clap::Error) -> CliError {
    let text = error.render().to_string();
    CliError::Syntax {
        message: text.trim_start_matches("error: ").trim_end().to_owned(),
    }
}

/// Callers that look for another VMM's name get a line they can parse.
fn version(program: Option<&OsString>) -> String {
    let own = concat!("daxhund ", env!("CARGO_PKG_VERSION"));
    let name = program.and_then(|path| Path::new(path).file_name());
    if name.is_some_and(|name| name == CONTRACT_NAME) {
        format!("{CONTRACT_NAME} {CONTRACT_VERSION} ({own})")
    } else {
        own.to_owned()
    }
}
