//! QEMU's monitor protocol: one JSON object per line; commands are answered in order, events come between.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::wait::PATIENCE;

/// QEMU answers from its main loop, which an emulated processor can hold up for a while.
const ANSWER_DEADLINE: Duration = PATIENCE;

/// A command that was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The connection is broken, or the answer is late.
    #[error("QEMU's monitor does not answer `{command}`")]
    Io {
        /// The command.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// QEMU says no.
    #[error("QEMU refuses `{command}`: {message}")]
    Refused {
        /// The command.
        command: String,
        /// Its reason.
        message: String,
    },
}

/// A connection to the monitor.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
    /// Names of devices that have gone, in order, until somebody has waited for them.
    deleted: Vec<String>,
}

impl Qmp {
    pub(super) fn open(socket: UnixStream) -> Result<Self, QmpError> {
        let mut qmp = Self {
            lines: BufReader::new(socket),
            deleted: Vec::new(),
        };
        let failed = |source| QmpError::Io {
            command: "(greeting)".to_owned(),
            source,
        };
        qmp.lines
            .get_ref()
            .set_read_timeout(Some(ANSWER_DEADLINE))
            .map_err(failed)?;
        qmp.lines
            .get_ref()
            .set_write_timeout(Some(ANSWER_DEADLINE))
            .map_err(failed)?;
        let greeting = qmp.read().map_err(failed)?;
        if greeting.get("QMP").is_none() {
            return Err(failed(io::Error::other(format!(
                "unexpected greeting {greeting}"
            ))));
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Takes a device away in the order that hot-unplug has: the machine is asked, and may take its time. See [`Qmp::await_deleted`].
    pub fn unplug(&mut self, id: &str) -> Result<(), QmpError> {
        self.deleted.retain(|name| name != id);
        self.execute("device_del", &json!({ "id": id })).map(|_| ())
    }

    /// Waits until a device is gone that was to be unplugged.
    pub fn await_deleted(&mut self, id: &str) -> Result<(), QmpError> {
        let failed = |source| QmpError::Io {
            command: format!("(the end of {id})"),
            source,
        };
        let end = Instant::now() + ANSWER_DEADLINE;
        while !self.deleted.iter().any(|name| name == id) {
            if Instant::now() >= end {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            self.read().map_err(failed)?;
        }
        self.deleted.retain(|name| name != id);
        Ok(())
    }

    /// Carries out a command and gives what it returns. Events are passed over, but for the end of a device, which is remembered.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let failed = |source| QmpError::Io {
            command: command.to_owned(),
            source,
        };
        let line = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments })
        );
        self.lines
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(failed)?;
        loop {
            let mut answer = self.read().map_err(failed)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let message = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given");
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    message: message.to_owned(),
                });
            }
        }
    }

    fn read(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let message: Value = serde_json::from_str(&line)?;
        if message["event"] == "DEVICE_DELETED"
            && let Some(name) = message["data"]["device"].as_str()
        {
            self.deleted.push(name.to_owned());
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays QEMU: greets, then gives one answer for each line it reads.
    fn monitor(answers: &'static [&'static str]) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut out = far.try_clone().unwrap();
            out.write_all(b"{\"QMP\":{}}\n").unwrap();
            for (answer, _) in answers.iter().zip(BufReader::new(far).lines()) {
                out.write_all(format!("{answer}\n").as_bytes()).unwrap();
            }
        });
        near
    }

    #[test]
    fn the_end_of_a_device_is_waited_for_whenever_it_comes() {
        let socket = monitor(&[
            r#"{"return":{}}"#,
            r#"{"return":{}}"#,
            "{\"event\":\"DEVICE_DELETED\",\"data\":{\"device\":\"a\",\"path\":\"/a\"}}\n{\"return\":{}}\n\
             {\"event\":\"DEVICE_DELETED\",\"data\":{\"path\":\"/b/x\"}}\n\
             {\"event\":\"DEVICE_DELETED\",\"data\":{\"device\":\"b\",\"path\":\"/b\"}}",
        ]);
        let mut qmp = Qmp::open(socket).unwrap();
        qmp.unplug("a").unwrap();
        qmp.unplug("b").unwrap();
        qmp.await_deleted("b").unwrap();
        qmp.await_deleted("a").unwrap();
        assert!(matches!(qmp.await_deleted("a"), Err(QmpError::Io { .. })));
    }

    #[test]
    fn events_are_passed_over_and_errors_are_named() {
        let socket = monitor(&[
            r#"{"return":{}}"#,
            "{\"event\":\"RESUME\"}\n{\"return\":{\"running\":true}}",
            r#"{"error":{"class":"GenericError","desc":"Device 'x' not found"}}"#,
        ]);
        let mut qmp = Qmp::open(socket).unwrap();
        assert_eq!(
            qmp.execute("query-status", &json!({})).unwrap(),
            json!({"running": true})
        );
        let error = qmp
            .execute("device_del", &json!({"id": "x"}))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("device_del") & error.contains("'x' not found"),
            "{error}"
        );
        assert!(matches!(
            qmp.execute("quit", &json!({})),
            Err(QmpError::Io { .. })
        ));
    }
}
