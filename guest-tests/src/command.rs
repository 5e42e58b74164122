//! Runs a program of this machine to its end and says what went wrong in terms of that program.

use std::io;
use std::process::{Command, ExitStatus, Output};

/// A program that could not be run, or that failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It did not start.
    #[error("cannot run `{command}`")]
    Start {
        /// Program and arguments.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// It ended with a failure.
    #[error("`{command}` failed: {status}\n{stderr}")]
    Failed {
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
}

/// Runs `command` and gives its standard output.
pub fn output_of(command: &mut Command) -> Result<Vec<u8>, CommandError> {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().map_err(|source| CommandError::Start {
        command: describe(command),
        source,
    })?;
    if status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
    Err(CommandError::Failed {
        command: describe(command),
        status,
        stderr,
    })
}

/// As [`output_of`], for text.
pub fn text_of(command: &mut Command) -> Result<String, CommandError> {
    Ok(String::from_utf8_lossy(&output_of(command)?).into_owned())
}

/// Program and arguments as a person would type them.
pub fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command_and_what_it_said() {
        let error =
            output_of(Command::new("sh").args(["-c", "echo no room >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("sh -c") && text.contains("no room") && text.contains('3'),
            "{text}"
        );
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output_of(&mut Command::new("/nowhere/tool")).unwrap_err();
        assert!(
            matches!(&error, CommandError::Start { command, .. } if command == "/nowhere/tool")
        );
    }
}
