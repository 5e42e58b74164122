//! The command line as clap sees it. Words stay text here; `config` reads them.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, Args as Flags, Command, Parser, Subcommand};

use crate::config::{
    DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig, VsockConfig,
};

/// Subcommands of `ch-remote` that daxhund does not build, so that they are refused by name.
pub(super) const UNSUPPORTED: &[&str] = &[
    "add-user-device",
    "add-vdpa",
    "coredump",
    "receive-migration",
    "resize-zone",
    "restore",
    "send-migration",
    "snapshot",
];

#[derive(Debug, Parser)]
#[command(
    name = "daxhund-remote",
    about = "Ask something of a daxhund that runs",
    disable_version_flag = true,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    after_help = "Exit status: 0 it was done; 1 it was not; 2 the command line can't be used."
)]
pub(super) struct Args {
    /// The socket it listens on
    #[arg(long, value_name = "PATH")]
    pub(super) api_socket: Option<PathBuf>,

    /// Print the version
    #[arg(short = 'V', long)]
    pub(super) version: bool,

    #[command(subcommand)]
    pub(super) subcommand: Option<Sub>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Sub {
    /// Add a PCI function of the host
    #[command(long_about = DeviceConfig::WORD.help())]
    AddDevice {
        /// Its keys and values
        #[arg(value_name = "KEY=VALUE,..")]
        word: String,
    },
    /// Add a disk
    #[command(long_about = DiskConfig::WORD.help())]
    AddDisk {
        /// Its keys and values
        #[arg(value_name = "KEY=VALUE,..")]
        word: String,
    },
    /// Add a directory of the host
    #[command(long_about = FsConfig::WORD.help())]
    AddFs {
        /// Its keys and values
        #[arg(value_name = "KEY=VALUE,..")]
        word: String,
    },
    /// Add a device of whatever type that a vhost-user backend serves
    #[command(long_about = GenericVhostUserConfig::WORD.help())]
    AddGenericVhostUser {
        /// Its keys and values
        #[arg(value_name = "KEY=VALUE,..")]
        word: String,
    },
    /// Add a network device
    #[command(long_about = NetConfig::WORD.help())]
    AddNet {
        /// Its keys and values
        #[arg(value_name = "KEY=VALUE,..")]
        word: String,
    },
    /// Add persistent memory
    #[command(long_about = PmemConfig::WORD.help())]
    AddPmem {
        /// Its keys and values
        #[arg(value_name = "KEY=VALUE,..")]
        word: String,
    },
    /// Add a vsock device
    #[command(long_about = VsockConfig::WORD.help())]
    AddVsock {
        /// Its keys and values
        #[arg(value_name = "KEY=VALUE,..")]
        word: String,
    },
    /// Start the guest that was created
    Boot,
    /// Print what the guest's devices have counted
    Counters(Form),
    /// Define a guest
    Create {
        /// The configuration as JSON; - is standard input
        #[arg(value_name = "FILE", default_value = "-")]
        path: PathBuf,
    },
    /// Forget the guest
    Delete,
    /// Take a device or a memory zone from the guest, and wait until the host may have it
    Drain {
        /// The device's or the zone's name
        #[arg(value_name = "ID")]
        id: String,
    },
    /// Print the guest's configuration and state
    Info(Form),
    /// Print numbers for a monitoring system
    Metrics,
    /// Send the guest a non-maskable interrupt, as for a dump of its memory
    Nmi,
    /// Hold the guest
    Pause,
    /// Print who answers
    Ping(Form),
    /// Press the guest's power button
    PowerButton,
    /// Take the guest down and start it again
    Reboot,
    /// Print where the guest's memory is, and who has it
    Regions(Form),
    /// Ask the guest to give up a device
    RemoveDevice {
        /// The device's name
        #[arg(value_name = "ID")]
        id: String,
    },
    /// Change how much the guest has
    Resize {
        /// How much the balloon takes
        #[arg(long, value_name = "SIZE")]
        balloon: Option<String>,
        /// How many vCPUs
        #[arg(long, value_name = "N")]
        cpus: Option<u32>,
        /// How much RAM
        #[arg(long, value_name = "SIZE")]
        memory: Option<String>,
    },
    /// Make a disk of the guest larger
    ResizeDisk {
        /// The disk's name
        #[arg(long, value_name = "ID")]
        disk: String,
        /// How much the guest is to have
        #[arg(long, value_name = "SIZE")]
        size: String,
    },
    /// Let the guest go on
    Resume,
    /// Take the guest down
    Shutdown,
    /// End the daxhund
    ShutdownVmm,
    /// Show what the guest does, again and again, until it goes
    Watch {
        /// From one time to the next
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
        interval: Duration,
        /// End when it was shown so often
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        #[command(flatten)]
        form: Form,
    },
}

/// How what there is to say is printed.
#[derive(Clone, Copy, Debug, Flags)]
pub(super) struct Form {
    /// Print JSON, one object on one line
    #[arg(long)]
    pub(super) json: bool,
}

/// A tenth of a second to an hour.
fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok();
    let interval = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let fits =
        |time: &Duration| (Duration::from_millis(100)..=Duration::from_hours(1)).contains(time);
    interval
        .filter(fits)
        .ok_or_else(|| "give seconds, from 0.1 to 3600".to_owned())
}

/// Makes `command` recognise what is not built, hidden from its help.
pub(super) fn recognise(command: Command) -> Command {
    command.subcommands(UNSUPPORTED.iter().map(|name| {
        let rest = Arg::new("rest")
            .num_args(0..)
            .trailing_var_arg(true)
            .allow_hyphen_values(true);
        Command::new(*name)
            .hide(true)
            .disable_help_flag(true)
            .arg(rest)
    }))
}
