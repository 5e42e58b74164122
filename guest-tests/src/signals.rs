//! What happens on ^C and when the lab is told to end: the terminal is restored, the run's directory removed.
//!
//! Children need nothing: the kernel ends them with the lab (see [`crate::child`]).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

static TO_REMOVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static TERMINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// Starts to watch for the signals that end the lab.
pub fn watch() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                restore_terminal();
                for path in lock(&TO_REMOVE).iter() {
                    // What cannot be removed now is removed by the next run.
                    drop(fs::remove_dir_all(path));
                }
                eprintln!("\nlab: ended by signal {signal}");
                std::process::exit(128 + signal);
            }
        })?;
    Ok(())
}

/// Has a directory removed when a signal ends the lab.
pub fn remove_at_end(path: &Path) {
    lock(&TO_REMOVE).push(path.to_owned());
}

/// Makes the terminal pass every key on, until [`restore_terminal`].
pub fn make_terminal_raw() -> io::Result<()> {
    let stdin = io::stdin();
    let mut modes = tcgetattr(&stdin)?;
    lock(&TERMINAL).get_or_insert_with(|| modes.clone());
    modes.make_raw();
    Ok(tcsetattr(&stdin, OptionalActions::Now, &modes)?)
}

/// Gives the terminal back its modes.
pub fn restore_terminal() {
    if let Some(modes) = lock(&TERMINAL).take() {
        // The terminal may be gone; nothing is left to restore then.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &modes);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
