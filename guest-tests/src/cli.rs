//! The lab's command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// An emulated host with device-dax memory and KVM, and everything that is run on it.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the lab can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boots a guest on device-dax memory and shows what it costs.
    Demo {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
    },
    /// Runs every test: unit, property, and guest tests on every host kernel that there is.
    Test {
        /// The hosts.
        #[command(flatten)]
        kernels: KernelChoice,
        /// Runs only tests with one of these parts in their names, as in `6.12::boots` or `reboot`.
        /// When guest tests are among them, the unit tests do not run.
        names: Vec<String>,
        /// Opens a shell on the host of the first test that fails, and leaves the logs.
        #[arg(long)]
        keep: bool,
        /// Runs with long repeat counts.
        #[arg(long)]
        full: bool,
        /// Instead of the tests: leaves a guest no peace for so long on each kernel. Storage comes and goes under its writes by
        /// turns of the operator's and the host's; a durable record that is lost, a kernel's complaint, a leak or a hang fails.
        #[arg(long, value_name = "MINUTES", conflicts_with_all = ["names", "keep", "full"])]
        soak: Option<u64>,
        /// Has a soak go as an earlier one went, which has printed this; another one each time when not given.
        #[arg(long, requires = "soak")]
        seed: Option<u64>,
    },
    /// Opens a shell on an emulated host, with the binaries in PATH; or runs a command there.
    Shell {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
        /// The command; a shell when there is none.
        #[arg(trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Builds the lab's own kernel, which `--host-kernel lab` then chooses: with what no Debian kernel has, such as iommufd.
    /// It takes a quarter of an hour and 3 GB in the cache.
    Kernel,
    /// Measures.
    Bench {
        /// What to measure.
        #[command(subcommand)]
        what: Bench,
    },
    /// Only gets onto this machine what the lab needs.
    Provision {
        /// The hosts.
        #[command(flatten)]
        kernels: KernelChoice,
        /// Asks the package sources for newer versions of what the cache holds.
        #[arg(long)]
        newest: bool,
    },
}

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// From the start of the VMM to the guest's first instruction and to its user space, and the VMM's own memory.
    Boot {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
        /// Another VMM to measure in turn, as `ch=PATH` or `qemu=PATH`, after whose syntax it is called; a suffix tells two
        /// of a kind apart, as in `ch-v53=PATH`.
        #[arg(long = "peer", value_name = "NAME=PATH", value_parser = parse_peer)]
        peers: Vec<Peer>,
        /// How often each is started.
        #[arg(long, default_value_t = 10)]
        repeat: u32,
    },
    /// How fast a guest writes and reads persistent memory on device-dax, against copies in its RAM.
    Pmem {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
        /// How often it is measured.
        #[arg(long, default_value_t = 5)]
        repeat: u32,
    },
    /// How long it takes to attach a device to a guest of some GiB, against the least that it takes; whether two threads pin
    /// faster than one; and, with peers, from the start of the VMM to the guest's first instruction with a device attached.
    Pin {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
        /// Another VMM to start in turn, as `ch=PATH` or `qemu=PATH`.
        #[arg(long = "peer", value_name = "NAME=PATH", value_parser = parse_peer)]
        peers: Vec<Peer>,
        /// Measures only this; may be given several times.
        #[arg(long, value_enum)]
        only: Vec<PinPart>,
        /// How often each is measured.
        #[arg(long, default_value_t = 5)]
        repeat: u32,
    },
    /// How long memory that the host takes away stays exposed: from the removal's start to the last transfer of a device that
    /// landed, to the VMM's last descriptor, and what the guest feels of it; held by the removal guard, and not held.
    Removal {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
        /// Another VMM whose guest's RAM is taken away, as `ch=PATH` or `qemu=PATH`.
        #[arg(long = "peer", value_name = "NAME=PATH", value_parser = parse_peer)]
        peers: Vec<Peer>,
        /// Measures only cases with this in their names, as in `pmem, not held`; may be given several times.
        #[arg(long, value_name = "PART")]
        only: Vec<String>,
        /// How often each is measured.
        #[arg(long, default_value_t = 5)]
        repeat: u32,
    },
    /// Random reads of 4 KiB from a disk, and the exits that they cost.
    Blk {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
        /// Another VMM to measure in turn, as `ch=PATH`.
        #[arg(long = "peer", value_name = "NAME=PATH", value_parser = parse_peer)]
        peers: Vec<Peer>,
        /// How often each is measured.
        #[arg(long, default_value_t = 5)]
        repeat: u32,
    },
    /// Disks that another process serves over vhost-user: device-dax memory by `daxhund-vhost-user-blk`, a file by QEMU's storage
    /// daemon, and beside them the VMM's own; reads a second and the CPU time of each, what a guest of some GiB costs when
    /// such a disk comes, and whether other VMMs' guests keep what they write on them.
    Vhost {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
        /// Another VMM whose guest has the same disks, as `ch=PATH` or `qemu=PATH`.
        #[arg(long = "peer", value_name = "NAME=PATH", value_parser = parse_peer)]
        peers: Vec<Peer>,
        /// Measures only this; may be given several times.
        #[arg(long, value_enum)]
        only: Vec<VhostPart>,
        /// How often each is measured.
        #[arg(long, default_value_t = 5)]
        repeat: u32,
    },
    /// TCP between a guest and its host, both ways.
    Net {
        /// The host.
        #[command(flatten)]
        host: HostChoice,
        /// Another VMM to measure in turn, as `ch=PATH`.
        #[arg(long = "peer", value_name = "NAME=PATH", value_parser = parse_peer)]
        peers: Vec<Peer>,
        /// How often each is measured.
        #[arg(long, default_value_t = 5)]
        repeat: u32,
    },
}

/// What `bench pin` is made of.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum PinPart {
    /// A device comes to a guest that runs, and a second one.
    Attach,
    /// A guest has a device from the start, by daxhund and by its peers.
    Launch,
    /// The same memory mapped by one thread and by several.
    Parts,
}

/// What `bench vhost` is made of.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum VhostPart {
    /// Guests of every VMM write, read back, are reset and powered off, on one disk after the other.
    Use,
    /// Random and sequential reads.
    Reads,
    /// A disk comes to guests with more and more memory.
    Exchange,
}

/// One kernel for the emulated host.
#[derive(Args, Debug)]
pub struct HostChoice {
    /// Kernel of the emulated host: a series such as 6.12, `lab` for the lab's own (see `cargo lab kernel`), a directory
    /// with `boot` and `lib/modules`, or a bzImage with everything built in. The newest there is when not given.
    #[arg(long, value_name = "SERIES|PATH")]
    pub host_kernel: Option<String>,
}

/// Kernels for emulated hosts.
#[derive(Args, Debug)]
pub struct KernelChoice {
    /// Kernel of the emulated host: a series such as 6.12, `lab` for the lab's own (see `cargo lab kernel`), a directory
    /// with `boot` and `lib/modules`, or a bzImage with everything built in. May be given several times; all series there are when not given.
    #[arg(long = "host-kernel", value_name = "SERIES|PATH")]
    pub host_kernels: Vec<String>,
}

/// Another VMM.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Peer {
    /// What it is called in the results.
    pub name: String,
    /// Its binary.
    pub path: PathBuf,
}

fn parse_peer(text: &str) -> Result<Peer, String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=PATH")?;
    let path = PathBuf::from(path);
    if !path.is_file() {
        return Err(format!("no file {}", path.display()));
    }
    Ok(Peer {
        name: name.to_owned(),
        path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Command, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"lab").chain(words)).map(|cli| cli.command)
    }

    #[test]
    fn tests_are_chosen_by_name_and_kernel() {
        let command = parse(&[
            "test",
            "boots",
            "--host-kernel",
            "6.1",
            "--host-kernel",
            "6.12",
            "--full",
        ])
        .unwrap();
        let Command::Test {
            kernels,
            names,
            keep,
            full,
            soak: None,
            seed: None,
        } = command
        else {
            panic!()
        };
        assert_eq!(kernels.host_kernels, ["6.1", "6.12"]);
        assert_eq!((names, keep, full), (vec!["boots".to_owned()], false, true));
    }

    #[test]
    fn a_seed_is_a_soak_s() {
        let words = ["test", "--soak", "30", "--seed", "7"];
        let Command::Test { soak, seed, .. } = parse(&words).unwrap() else {
            panic!()
        };
        assert_eq!((soak, seed), (Some(30), Some(7)));
        assert!(parse(&["test", "--seed", "7"]).is_err());
        assert!(parse(&["test", "--soak", "30", "boots"]).is_err());
    }

    #[test]
    fn parts_of_the_pin_bench_are_chosen_by_name() {
        let words = ["bench", "pin", "--only", "parts", "--only", "attach"];
        let Command::Bench {
            what: Bench::Pin { only, repeat, .. },
        } = parse(&words).unwrap()
        else {
            panic!()
        };
        assert_eq!((only, repeat), (vec![PinPart::Parts, PinPart::Attach], 5));
    }

    #[test]
    fn a_shell_command_keeps_its_flags() {
        let Command::Shell { command, .. } = parse(&["shell", "ls", "-l", "/dev"]).unwrap() else {
            panic!()
        };
        assert_eq!(command, ["ls", "-l", "/dev"]);
    }

    #[test]
    fn a_peer_needs_a_name_and_a_file() {
        assert!(parse_peer("/bin/sh").is_err());
        assert!(
            parse_peer("ch=/nowhere/ch")
                .unwrap_err()
                .contains("/nowhere/ch")
        );
        assert_eq!(parse_peer("ch=/bin/sh").unwrap().name, "ch");
    }
}
