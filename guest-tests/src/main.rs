//! `cargo lab`: see `cargo lab help`.

#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use guest_tests::artifacts::{self, Profile};
use guest_tests::cli::{Bench, Cli, Command, HostChoice, KernelChoice};
use guest_tests::host::machine::Machine;
use guest_tests::progress::note;
use guest_tests::provision::{self, Freshness};
use guest_tests::setup::Setup;
use guest_tests::suite::{self, Selection, chain};
use guest_tests::tests::soak;
use guest_tests::{bench, demo, shell, signals};
use lab_agent::host_protocol::ExitStatus;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match signals::watch()
        .map_err(Into::into)
        .and_then(|()| run(cli.command))
    {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Box<dyn Error>> {
    match command {
        Command::Test {
            kernels,
            soak: Some(minutes),
            seed,
            ..
        } => {
            let setup = Setup::prepare(Profile::Lab, &kernels.host_kernels)?;
            soak::run(setup, minutes, seed.unwrap_or_else(somewhat_random))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Test {
            kernels,
            names,
            keep,
            full,
            ..
        } => test(&kernels, &Selection { names, full, keep }),
        Command::Shell { host, command } => open_shell(&host, &command),
        Command::Provision { kernels, newest } => {
            let freshness = if newest {
                Freshness::Newest
            } else {
                Freshness::Cached
            };
            for kernel in provision::provide(&kernels.host_kernels, freshness)?.kernels {
                note(&format!("host kernel {}: {}", kernel.name, kernel.release));
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Kernel => {
            let kernel = provision::build_lab_kernel()?;
            note(&format!(
                "kernel {}: {}; choose it with `--host-kernel {}`",
                kernel.name, kernel.release, kernel.name
            ));
            Ok(ExitCode::SUCCESS)
        }
        Command::Demo { host } => {
            demo::run(&Setup::prepare(Profile::Release, &one(&host))?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench { what } => {
            measure(what)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn measure(what: Bench) -> Result<(), Box<dyn Error>> {
    let on = |host| Setup::prepare(Profile::Release, &one(host));
    match what {
        Bench::Boot {
            host,
            peers,
            repeat,
        } => bench::boot::run(&on(&host)?, &peers, repeat)?,
        Bench::Pmem { host, repeat } => bench::devices::pmem(&on(&host)?, repeat)?,
        Bench::Pin {
            host,
            peers,
            only,
            repeat,
        } => bench::pin::run(&on(&host)?, &peers, &only, repeat)?,
        Bench::Removal {
            host,
            peers,
            only,
            repeat,
        } => {
            // What is measured is the kernel's work, and the emulator's.
            let setup = Setup::prepare(Profile::Lab, &one(&host))?;
            bench::removal::run(&setup, &peers, &only, repeat)?
        }
        Bench::Blk {
            host,
            peers,
            repeat,
        } => bench::devices::blk(&on(&host)?, &peers, repeat)?,
        Bench::Vhost {
            host,
            peers,
            only,
            repeat,
        } => bench::vhost::run(&on(&host)?, &peers, &only, repeat)?,
        Bench::Net {
            host,
            peers,
            repeat,
        } => bench::devices::net(&on(&host)?, &peers, repeat)?,
    };
    Ok(())
}

fn test(kernels: &KernelChoice, selection: &Selection) -> Result<ExitCode, Box<dyn Error>> {
    let setup = Setup::prepare(Profile::Lab, &kernels.host_kernels)?;
    let guest_tests = suite::any_guest_test(selection, &setup.provisioned.kernels);
    let workspace = if selection.names.is_empty() {
        Some(suite::run_workspace_tests(&artifacts::workspace()?))
    } else if guest_tests {
        note("unit and property tests do not run: guest tests were chosen by name");
        None
    } else {
        return Err(format!(
            "no guest test has any of these in its name: {}",
            selection.names.join(", ")
        )
        .into());
    };
    let conclusion = suite::run(setup, selection, workspace);
    Ok(conclusion.exit_code())
}

/// Another number each time; a soak that fails tells it.
fn somewhat_random() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::from(since.subsec_nanos()))
}

fn open_shell(choice: &HostChoice, command: &[String]) -> Result<ExitCode, Box<dyn Error>> {
    let setup = Setup::prepare(Profile::Lab, &one(choice))?;
    let host = setup.boot(setup.kernel(), Machine::default())?;
    let status = shell::run(&host, command)?;
    Ok(match status {
        ExitStatus::Code(code) => u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from),
        ExitStatus::Signal(_) => ExitCode::FAILURE,
    })
}

fn one(choice: &HostChoice) -> Vec<String> {
    choice.host_kernel.iter().cloned().collect()
}
