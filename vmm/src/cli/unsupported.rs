//! Words of the Cloud Hypervisor contract, and of daxhund's own, that this version refuses.
//!
//! They are recognised so that the answer is "not supported" and not "unknown": who drives daxhund
//! with another VMM's command line learns at once which word is in the way. A word leaves this list
//! in the change that builds it.

use clap::{Arg, ArgAction, ArgMatches, Command};

/// Flags, without dashes.
pub(super) const FLAGS: &[&str] = &[
    "dbus-object-path",
    "dbus-service-name",
    "dbus-system-bus",
    "debug-console",
    "firmware",
    "fw-cfg-config",
    "gdb",
    "host-data",
    "igvm",
    "ivshmem",
    "landlock",
    "landlock-rules",
    "log-format",
    "no-shutdown",
    "pci-segment",
    "pvmemcontrol",
    "pvpanic",
    "rate-limit-group",
    "restore",
    "rtc",
    "tpm",
    "unknown",
    "user-device",
    "vdpa",
    "watchdog",
];

/// Subcommands.
pub(super) const SUBCOMMANDS: &[&str] = &["pin"];

/// Makes `command` recognise the words, hidden from its help.
pub(super) fn recognise(command: Command) -> Command {
    let flags = FLAGS.iter().map(|flag| {
        Arg::new(*flag)
            .long(*flag)
            .num_args(0..)
            .action(ArgAction::Append)
            .hide(true)
    });
    let subcommands = SUBCOMMANDS.iter().map(|name| {
        let rest = Arg::new("rest")
            .num_args(0..)
            .trailing_var_arg(true)
            .allow_hyphen_values(true);
        Command::new(*name)
            .hide(true)
            .disable_help_flag(true)
            .arg(rest)
    });
    command.args(flags).subcommands(subcommands)
}

/// The first refused word that was given, as the user wrote it.
pub(super) fn given(matches: &ArgMatches) -> Option<String> {
    if let Some(name) = matches.subcommand_name()
        && SUBCOMMANDS.contains(&name)
    {
        return Some(name.to_owned());
    }
    FLAGS
        .iter()
        .filter_map(|flag| Some((matches.indices_of(flag)?.next(), flag)))
        .min()
        .map(|(_, flag)| format!("--{flag}"))
}
