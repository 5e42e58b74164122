//! A shell, or one command, on an emulated host.
//!
//! From a terminal it behaves as a local shell would; otherwise standard input is fed to it and its output passed on, so
//! that scripts can be piped in.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use lab_agent::host_protocol::{ExitStatus, SpawnSpec, TerminalSize};
use rustix::termios::tcgetwinsize;
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

use crate::host::Host;
use crate::host::channel::HostError;
use crate::host::process::Process;
use crate::signals;

/// A person may think for a long time.
const SESSION_DEADLINE: Duration = Duration::from_hours(7 * 24);

/// The shell cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// This side's terminal or pipes.
    #[error("cannot use the terminal")]
    Terminal(#[from] io::Error),
}

/// Runs `command`, a shell when it is empty, until it ends.
pub fn run(host: &Host, command: &[String]) -> Result<ExitStatus, ShellError> {
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let argv = if command.is_empty() {
        vec!["sh".to_owned()]
    } else {
        // One stream, in order.
        ["sh", "-c", "exec \"$@\" 2>&1", "sh"]
            .iter()
            .map(|word| (*word).to_owned())
            .chain(command.iter().cloned())
            .collect()
    };
    let pty = terminal.then(terminal_size);
    let env = vec![("PS1".to_owned(), "lab# ".to_owned())];
    let process = Arc::new(host.spawn(SpawnSpec {
        argv,
        env,
        pty,
        stdin: true,
        ..SpawnSpec::default()
    })?);
    if terminal {
        signals::make_terminal_raw()?;
        follow_terminal_size(Arc::clone(&process))?;
    }
    feed_input(Arc::clone(&process));
    let outcome = pass_output(&process);
    signals::restore_terminal();
    outcome?;
    Ok(process.wait(SESSION_DEADLINE)?)
}

/// Reads from this side until it ends. The thread may stay in `read` when the program has ended: it goes with the lab.
fn feed_input(process: Arc<Process>) {
    thread::spawn(move || {
        let mut chunk = vec![0; 4096];
        loop {
            let sent = match io::stdin().read(&mut chunk) {
                Ok(0) => {
                    drop(process.close_stdin());
                    return;
                }
                Ok(length) => process.send(&chunk[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if sent.is_err() {
                return;
            }
        }
    });
}

fn pass_output(process: &Process) -> Result<(), ShellError> {
    let mut out = io::stdout();
    let mut passed = 0;
    while let Some(new) = process.output_after(passed, SESSION_DEADLINE)? {
        out.write_all(&new)?;
        out.flush()?;
        passed += new.len();
    }
    // Without a terminal the two streams are apart.
    io::stderr().write_all(process.stderr().as_bytes())?;
    Ok(())
}

fn follow_terminal_size(process: Arc<Process>) -> io::Result<()> {
    let mut signals = Signals::new([SIGWINCH])?;
    thread::spawn(move || {
        for _ in signals.forever() {
            if process.resize(terminal_size()).is_err() {
                return;
            }
        }
    });
    Ok(())
}

fn terminal_size() -> TerminalSize {
    let size = tcgetwinsize(io::stdout())
        .ok()
        .filter(|size| size.ws_row > 0);
    size.map_or(
        TerminalSize {
            rows: 24,
            columns: 80,
        },
        |size| TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
    )
}
