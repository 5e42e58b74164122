//! The command line as clap sees it. Values of words stay text here; `config` reads them.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, CommandFactory, Parser, Subcommand};

use super::endpoint::{ApiSocket, EventMonitor};
use super::exit::ExitStatus;
use super::unsupported;
use crate::config::{
    BalloonConfig, ByteSize, ConsoleConfig, CpusConfig, DeviceConfig, DiskConfig, FsConfig,
    GenericVhostUserConfig, MemoryConfig, MemoryZoneConfig, NetConfig, NumaConfig, PlatformConfig,
    PmemConfig, RngConfig, VirtioConsoleConfig, VsockConfig,
};

const MACHINE: &str = "Machine";
const MEMORY: &str = "Memory";
const DEVICES: &str = "Devices";
const PAYLOAD: &str = "Payload";
const TERMINAL: &str = "Terminal";
/// What is about the process; every other heading is about the guest.
const VMM: &str = "VMM";

#[derive(Debug, Parser)]
#[command(
    name = "daxhund",
    about = "A virtual machine monitor whose guest memory is device-dax",
    disable_version_flag = true,
    disable_help_subcommand = true,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
    after_help = "Sizes take K, M, G or T. --help tells each option's keys, exit statuses and examples."
)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) subcommand: Option<Sub>,

    /// Virtual processors [default: boot=1]
    #[arg(long, value_name = "boot=N,max=N", help_heading = MACHINE)]
    pub(super) cpus: Option<String>,

    /// A guest NUMA node; repeat for more
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = MACHINE, num_args = 1..,
        action = ArgAction::Append)]
    pub(super) numa: Vec<String>,

    /// The machine as a whole
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = MACHINE)]
    pub(super) platform: Option<String>,

    /// RAM of the host's own memory [default: size=512M]
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = MEMORY)]
    pub(super) memory: Option<String>,

    /// A piece of RAM and what backs it; repeat for more
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = MEMORY, num_args = 1..,
        action = ArgAction::Append)]
    pub(super) memory_zone: Vec<String>,

    /// Persistent memory of the guest; repeat for more
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES, num_args = 1..,
        action = ArgAction::Append)]
    pub(super) pmem: Vec<String>,

    /// A PCI function of the host, passed through; repeat for more
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES, num_args = 1..,
        action = ArgAction::Append)]
    pub(super) device: Vec<String>,

    /// A disk of the guest; repeat for more
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES, num_args = 1..,
        action = ArgAction::Append)]
    pub(super) disk: Vec<String>,

    /// A network interface of the guest; repeat for more
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES, num_args = 1..,
        action = ArgAction::Append)]
    pub(super) net: Vec<String>,

    /// A directory of the host; repeat for more
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES, num_args = 1..,
        action = ArgAction::Append)]
    pub(super) fs: Vec<String>,

    /// A device of whatever type that a vhost-user backend serves; repeat for more
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES, num_args = 1..,
        action = ArgAction::Append)]
    pub(super) generic_vhost_user: Vec<String>,

    /// Sockets between guest and host
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES)]
    pub(super) vsock: Option<String>,

    /// Memory that the guest lends back to the host
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES)]
    pub(super) balloon: Option<String>,

    /// Where random numbers come from [default: src=/dev/urandom]
    #[arg(long, value_name = "KEY=VALUE,..", help_heading = DEVICES)]
    pub(super) rng: Option<String>,

    /// Kernel to boot: a bzImage, or an ELF kernel with a PVH entry
    #[arg(long, value_name = "PATH", help_heading = PAYLOAD)]
    pub(super) kernel: Option<PathBuf>,

    /// Initial RAM file system
    #[arg(long, value_name = "PATH", help_heading = PAYLOAD)]
    pub(super) initramfs: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT", help_heading = PAYLOAD, allow_hyphen_values = true)]
    pub(super) cmdline: Option<String>,

    /// Serial port: off, null, tty, pty, file=PATH or socket=PATH [default: tty]
    #[arg(long, value_name = "MODE", help_heading = TERMINAL)]
    pub(super) serial: Option<String>,

    /// Virtio console: off, null, tty, pty, file=PATH or socket=PATH [default: off]
    #[arg(long, value_name = "MODE", help_heading = TERMINAL)]
    pub(super) console: Option<String>,

    /// Serve the REST API on a unix socket; the guest may come by it
    #[arg(long, value_name = "PATH", help_heading = VMM)]
    pub(super) api_socket: Option<String>,

    /// Write events as JSON to path=PATH or fd=N
    #[arg(long, value_name = "KEY=VALUE", help_heading = VMM)]
    pub(super) event_monitor: Option<String>,

    /// Who holds removals of device-dax memory until the guest has let go: on (a helper), off, daemon [default: what there is]
    #[arg(long, value_name = "MODE", help_heading = VMM)]
    pub(super) removal_guard: Option<String>,

    /// System call filter; only false is supported yet
    #[arg(long, value_name = "MODE", help_heading = VMM, default_value = "false",
        hide_possible_values = true,
        value_parser = PossibleValuesParser::new(["true", "false", "log"]))]
    pub(super) seccomp: String,

    /// Write the log to a file instead of standard error
    #[arg(long, value_name = "PATH", help_heading = VMM)]
    pub(super) log_file: Option<PathBuf>,

    /// Log more: -v info, -vv debug, -vvv trace; warnings are always logged
    #[arg(short, action = ArgAction::Count, help_heading = VMM)]
    pub(super) verbose: u8,

    /// Print the version
    #[arg(short = 'V', long)]
    pub(super) version: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum Sub {
    /// Check what this host needs to run guests on device-dax memory
    Doctor {
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// What holds the removal of device-dax memory back
    #[command(subcommand)]
    Guard(GuardSub),
    /// The host's pools of device-dax memory
    #[command(subcommand)]
    Pool(PoolSub),
}

#[derive(Debug, Subcommand)]
pub(super) enum GuardSub {
    /// List what is held, by whom, and who waits
    List {
        /// Where the guard listens
        #[arg(long, value_name = "PATH", default_value = daxhund_guard::DEFAULT_SOCKET)]
        socket: PathBuf,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Have the users of a device let go of it, then take it from its driver
    Release {
        /// The device, such as dax1.0
        device: String,
        /// Where the guard listens
        #[arg(long, value_name = "PATH", default_value = daxhund_guard::DEFAULT_SOCKET)]
        socket: PathBuf,
    },
    /// Serve the VMM that started this
    #[command(hide = true)]
    Serve {
        /// The connection
        #[arg(long, value_name = "0", value_parser = clap::value_parser!(u32).range(0..1))]
        fd: u32,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum PoolSub {
    /// List pools, their devices, and who has what of them
    List {
        /// The pool [default: every one]
        pool: Option<String>,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// List what is free
    Free {
        /// The pool [default: every one]
        pool: Option<String>,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
    /// Take a range, print its device, offset and size in bytes, and hold it: until the pipe or socket that is standard input is
    /// closed at its other end, or until a signal
    Reserve {
        /// The pool
        pool: String,
        /// How much
        #[arg(long, value_name = "SIZE", value_parser = size)]
        size: ByteSize,
        /// The host node that it is to be of [default: any]
        #[arg(long, value_name = "N")]
        node: Option<u32>,
        /// Print JSON instead of text
        #[arg(long)]
        json: bool,
    },
}

fn size(text: &str) -> Result<ByteSize, &'static str> {
    ByteSize::parse(text).ok_or("expected a size such as 512M or 4G")
}

/// The command with its long help. Nobody else builds that: it would be a third of the work of a start.
pub(super) fn explained(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|arg| {
        let help = match arg.get_id().as_str() {
            "cpus" => CpusConfig::WORD.help(),
            "numa" => NumaConfig::WORD.help(),
            "platform" => PlatformConfig::WORD.help(),
            "memory" => MemoryConfig::WORD.help(),
            "memory_zone" => MemoryZoneConfig::WORD.help(),
            "pmem" => PmemConfig::WORD.help(),
            "device" => DeviceConfig::WORD.help(),
            "disk" => DiskConfig::WORD.help(),
            "net" => NetConfig::WORD.help(),
            "fs" => FsConfig::WORD.help(),
            "generic_vhost_user" => GenericVhostUserConfig::WORD.help(),
            "vsock" => VsockConfig::WORD.help(),
            "balloon" => BalloonConfig::WORD.help(),
            "rng" => RngConfig::WORD.help(),
            "serial" => ConsoleConfig::help(),
            "console" => VirtioConsoleConfig::help(),
            "api_socket" => ApiSocket::help(),
            "event_monitor" => EventMonitor::help(),
            _ => return arg,
        };
        arg.long_help(help)
    });
    command.after_long_help(after_long_help())
}

/// A word about the guest that was given, with its dashes.
pub(super) fn guest_word(matches: &ArgMatches) -> Option<String> {
    Args::command()
        .get_arguments()
        .filter(|arg| arg.get_help_heading().is_some_and(|heading| heading != VMM))
        .filter(|arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine))
        .find_map(|arg| Some(format!("--{}", arg.get_long()?)))
}

fn after_long_help() -> String {
    let flags: Vec<String> = unsupported::FLAGS
        .iter()
        .map(|flag| format!("--{flag}"))
        .collect();
    format!(
        "Examples:\n  \
         Boot a kernel on device-dax memory, all of it:\n    \
         daxhund --kernel vmlinuz --initramfs initrd --cmdline console=ttyS0 \\\n      \
         --memory-zone id=ram,file=/dev/dax0.0\n  \
         1 GiB of the device from 512 MiB on, and 2 GiB of huge pages:\n    \
         daxhund --kernel vmlinuz --cpus boot=2 \\\n      \
         --memory-zone id=dax,file=/dev/dax0.0,offset=512M,size=1G \\\n      \
         --memory-zone id=huge,size=2G,hugepages=on\n  \
         Persistent memory and a disk:\n    \
         daxhund --kernel vmlinuz --cmdline \"console=ttyS0 root=/dev/vda\" \\\n      \
         --pmem file=/dev/dax1.0 --disk path=root.img\n  \
         Wait for a guest to come by the REST API:\n    \
         daxhund --api-socket /run/daxhund.sock\n  \
         See what this host's pools of device-dax memory have left:\n    \
         daxhund pool free\n  \
         See what this host lacks:\n    \
         daxhund doctor\n\n\
         Exit status:\n{}\n\n\
         Recognised and refused, not supported yet: {}",
        ExitStatus::table(),
        flags.join(" "),
    )
}
