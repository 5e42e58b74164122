//! `daxhund-remote`: one subcommand, one request to a daxhund that runs, one exit status.
//!
//! Subcommands, their words and the statuses are those of Cloud Hypervisor's `ch-remote`. A word such as
//! `file=/dev/dax1.0` is read by the same types as on `daxhund`'s command line, so what is wrong with it is said before
//! anybody is asked.
//!
//! What only looks prints JSON, as `ch-remote` does, or what daxhund has of its own: a table (`regions`), `OpenMetrics` text
//! (`metrics`), a screen (`watch`). With `--json` each answer is one object on one line.
//!
//! Exit statuses: 0 it was done; 1 it was not; 2 the command line can't be used.

#![forbid(unsafe_code)]

mod args;
mod client;
mod samples;
mod table;
#[cfg(test)]
mod tests;
mod watch;

use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use console::Term;
use serde::Serialize;
use serde_json::{Value, json};
use thiserror::Error;

pub use client::{Client, ClientError, Method, Refusal, Response};

use crate::cli::CONTRACT_VERSION;
use crate::config::{
    ByteSize, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig,
    VsockConfig, WordError,
};
use crate::inherited::{self, InheritedError};
use crate::memory::report::RegionsReport;
use args::{Args, Form, Sub, UNSUPPORTED};
use watch::Watch;

const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;

/// The name whose callers look for another VMM's version.
const CONTRACT_NAME: &str = "ch-remote";

/// More than any configuration has, and than the server takes.
const LONGEST_CONFIG: u64 = 16 << 20;

/// Why a request was not made.
#[derive(Debug, Error)]
enum RemoteError {
    #[error(
        "there is no --api-socket; give --api-socket PATH, the one the daxhund has that is to be asked"
    )]
    NoSocket,
    #[error("not supported by daxhund: {0}")]
    NotSupported(String),
    #[error(transparent)]
    Word(#[from] WordError),
    #[error("{flag} {value}: not a size; give a number of bytes, or one with K, M, G or T")]
    Size { flag: &'static str, value: String },
    #[error("there is nothing to resize; give --balloon SIZE, --cpus N or --memory SIZE")]
    NothingToResize,
    #[error("the configuration can't be read from {}", path.display())]
    Config {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the configuration in {} is longer than {LONGEST_CONFIG} bytes", path.display())]
    ConfigTooLong { path: PathBuf },
    #[error("the configuration can't be written as JSON")]
    Json(#[from] serde_json::Error),
    #[error("a tap's descriptor can't be handed over")]
    Descriptor(#[from] InheritedError),
}

/// One request.
#[derive(Debug)]
struct Ask {
    method: Method,
    name: &'static str,
    body: Option<Vec<u8>>,
    descriptors: Vec<OwnedFd>,
    shape: Shape,
}

/// The command with all that it tells of itself.
#[cfg(test)]
pub(crate) fn command() -> clap::Command {
    Args::command()
}

/// What becomes of the answer.
#[derive(Clone, Copy, Debug)]
enum Shape {
    /// It is printed as it came.
    AsItCame,
    /// JSON over several lines.
    Pretty,
    /// JSON on one line.
    Line,
    /// A table of regions.
    Regions,
    /// It is asked for again and again.
    Watch(Watch),
}

impl Form {
    /// JSON in the one form or in the other.
    fn json(self) -> Shape {
        self.or(Shape::Pretty)
    }

    fn or(self, shape: Shape) -> Shape {
        if self.json { Shape::Line } else { shape }
    }
}

/// Does what a command line says, whose first item is the program's name, and returns the exit status. `output` is that terminal,
/// if it is one.
pub fn run(
    words: impl IntoIterator<Item = OsString>,
    input: &mut dyn Read,
    output: &mut dyn Write,
    errors: &mut dyn Write,
    terminal: Option<&Term>,
) -> u8 {
    let words: Vec<OsString> = words.into_iter().collect();
    let matches = match args::recognise(Args::command()).try_get_matches_from(&words) {
        Ok(matches) => matches,
        Err(error) => return usage(&error, output, errors),
    };
    let unsupported = matches
        .subcommand_name()
        .filter(|name| UNSUPPORTED.contains(name));
    if let Some(name) = unsupported {
        return complain(&RemoteError::NotSupported(name.to_owned()), errors);
    }
    let args = match Args::from_arg_matches(&matches) {
        Ok(args) => args,
        Err(error) => return usage(&error, output, errors),
    };
    if args.version {
        return print(&version(words.first()), output, errors);
    }
    let Some(sub) = args.subcommand else {
        let help = args::recognise(Args::command()).render_help();
        let _ = write!(errors, "{help}");
        return USAGE;
    };
    // Before the server is asked, so that it does not wait for an input that comes slowly.
    let ask = match args.api_socket.ok_or(RemoteError::NoSocket) {
        Ok(socket) => ask(sub, input).map(|ask| (Client::new(socket), ask)),
        Err(error) => Err(error),
    };
    let (client, ask) = match ask {
        Ok(ask) => ask,
        Err(error) => return complain(&error, errors),
    };
    if let Shape::Watch(watch) = ask.shape {
        return match watch.run(&client, output, terminal) {
            Ok(()) => DONE,
            Err(error) => complain(&error, errors),
        };
    }
    match client.call(ask.method, ask.name, ask.body, ask.descriptors) {
        Ok(response) if response.body.is_empty() => DONE,
        Ok(response) => print(&text(&response, ask.shape), output, errors),
        Err(error) => complain(&error, errors),
    }
}

fn ask(sub: Sub, input: &mut dyn Read) -> Result<Ask, RemoteError> {
    let get = |name, shape| {
        Ok(Ask {
            shape,
            ..Ask::new(Method::Get, name)
        })
    };
    let put = |name| Ok(Ask::new(Method::Put, name));
    match sub {
        Sub::Ping(form) => get("vmm.ping", form.json()),
        Sub::Info(form) => get("vm.info", form.json()),
        Sub::Counters(form) => get("vm.counters", form.json()),
        Sub::Regions(form) => get("vm.regions", form.or(Shape::Regions)),
        Sub::Metrics => get(watch::METRICS, Shape::AsItCame),
        Sub::Watch {
            interval,
            count,
            form,
        } => {
            let watch = Watch {
                interval,
                count,
                json: form.json,
            };
            get(watch::METRICS, Shape::Watch(watch))
        }
        Sub::Boot => put("vm.boot"),
        Sub::Delete => put("vm.delete"),
        Sub::Shutdown => put("vm.shutdown"),
        Sub::ShutdownVmm => put("vmm.shutdown"),
        Sub::Reboot => put("vm.reboot"),
        Sub::Pause => put("vm.pause"),
        Sub::Resume => put("vm.resume"),
        Sub::PowerButton => put("vm.power-button"),
        Sub::Nmi => put("vm.nmi"),
        Sub::Create { path } => {
            let mut ask = Ask::new(Method::Put, "vm.create");
            ask.body = Some(config(&path, input)?);
            Ok(ask)
        }
        Sub::AddDevice { word } => Ask::with("vm.add-device", &DeviceConfig::parse(&word)?),
        Sub::AddPmem { word } => Ask::with("vm.add-pmem", &PmemConfig::parse(&word)?),
        Sub::AddDisk { word } => Ask::with("vm.add-disk", &DiskConfig::parse(&word)?),
        Sub::AddFs { word } => Ask::with("vm.add-fs", &FsConfig::parse(&word)?),
        Sub::AddGenericVhostUser { word } => {
            let config = GenericVhostUserConfig::parse(&word)?;
            Ask::with("vm.add-generic-vhost-user", &config)
        }
        Sub::AddVsock { word } => Ask::with("vm.add-vsock", &VsockConfig::parse(&word)?),
        Sub::AddNet { word } => {
            // The numbers mean nothing to another process: the descriptors themselves are sent.
            let mut config = NetConfig::parse(&word)?;
            let numbers = std::mem::take(&mut config.fds);
            let mut ask = Ask::with("vm.add-net", &config)?;
            ask.descriptors = numbers
                .into_iter()
                .map(inherited::take)
                .collect::<Result<_, _>>()?;
            Ok(ask)
        }
        Sub::Drain { id } => Ask::with("vm.drain", &json!({ "id": id })),
        Sub::RemoveDevice { id } => Ask::with("vm.remove-device", &json!({ "id": id })),
        Sub::ResizeDisk { disk, size: value } => {
            let size = size("--size", value)?;
            Ask::with(
                "vm.resize-disk",
                &json!({ "id": disk, "desired_size": size }),
            )
        }
        Sub::Resize {
            balloon,
            cpus,
            memory,
        } => {
            let mut body = serde_json::Map::new();
            if let Some(value) = balloon {
                body.insert("desired_balloon".into(), size("--balloon", value)?);
            }
            if let Some(value) = cpus {
                body.insert("desired_vcpus".into(), value.into());
            }
            if let Some(value) = memory {
                body.insert("desired_ram".into(), size("--memory", value)?);
            }
            if body.is_empty() {
                return Err(RemoteError::NothingToResize);
            }
            Ask::with("vm.resize", &body)
        }
    }
}

impl Ask {
    fn new(method: Method, name: &'static str) -> Self {
        Self {
            method,
            name,
            body: None,
            descriptors: Vec::new(),
            shape: Shape::AsItCame,
        }
    }

    fn with(name: &'static str, body: &impl Serialize) -> Result<Self, RemoteError> {
        let mut ask = Self::new(Method::Put, name);
        ask.body = Some(serde_json::to_vec(body)?);
        Ok(ask)
    }
}

fn size(flag: &'static str, value: String) -> Result<Value, RemoteError> {
    match ByteSize::parse(&value) {
        Some(size) => Ok(size.bytes().into()),
        None => Err(RemoteError::Size { flag, value }),
    }
}

/// The text of a configuration, as it is: the server tells what is wrong with it.
fn config(path: &Path, input: &mut dyn Read) -> Result<Vec<u8>, RemoteError> {
    let failed = |source| RemoteError::Config {
        path: path.to_owned(),
        source,
    };
    let mut text = Vec::new();
    let read = if path == Path::new("-") {
        input.take(LONGEST_CONFIG + 1).read_to_end(&mut text)
    } else {
        let file = File::open(path).map_err(failed)?;
        file.take(LONGEST_CONFIG + 1).read_to_end(&mut text)
    };
    if read.map_err(failed)? as u64 > LONGEST_CONFIG {
        return Err(RemoteError::ConfigTooLong {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

/// What can't be read is printed as it came.
fn text(response: &Response, shape: Shape) -> String {
    let body = &response.body;
    let value = || serde_json::from_slice::<Value>(body);
    let text = match shape {
        Shape::AsItCame | Shape::Watch(_) => None,
        Shape::Pretty => value()
            .and_then(|value| serde_json::to_string_pretty(&value))
            .ok(),
        Shape::Line => value().map(|value| value.to_string()).ok(),
        Shape::Regions => serde_json::from_slice::<RegionsReport>(body)
            .map(|report| table::of(&report))
            .ok(),
    };
    text.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned())
}

fn version(program: Option<&OsString>) -> String {
    let own = env!("CARGO_PKG_VERSION");
    let name = program.and_then(|path| Path::new(path).file_name());
    if name.is_some_and(|name| name == CONTRACT_NAME) {
        format!("{CONTRACT_NAME} {CONTRACT_VERSION} (daxhund {own})")
    } else {
        format!("daxhund-remote {own}")
    }
}

fn usage(error: &clap::Error, output: &mut dyn Write, errors: &mut dyn Write) -> u8 {
    let text = error.render().to_string();
    if error.kind() == ErrorKind::DisplayHelp {
        return print(&text, output, errors);
    }
    let _ = writeln!(
        errors,
        "daxhund-remote: {}",
        text.trim_start_matches("error: ").trim_end()
    );
    USAGE
}

fn print(text: &str, output: &mut dyn Write, errors: &mut dyn Write) -> u8 {
    match writeln!(output, "{}", text.trim_end()).and_then(|()| output.flush()) {
        Ok(()) => DONE,
        Err(error) => complain(&error, errors),
    }
}

/// An error and what caused it, each on a line of its own.
fn complain(error: &dyn Error, errors: &mut dyn Write) -> u8 {
    let mut lines = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        lines.push(error.to_string());
        cause = error.source();
    }
    // Transparent wrappers say the same as what they wrap.
    lines.dedup();
    let text = lines.join("\n  ");
    // There is nobody else to tell.
    let _ = writeln!(errors, "daxhund-remote: {text}");
    FAILED
}
