//! daxhund's REST interface, by `daxhund-remote` and by hand.

use std::collections::BTreeMap;

use lab_agent::host_protocol::SpawnSpec;
use serde_json::Value;

use super::{Lab, TestError, claim};
use crate::host::Output;
use crate::suite::SCRATCH;

/// A VMM's control socket.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    socket: String,
}

impl Remote {
    /// A socket among the test's files; nobody need listen yet.
    pub(super) fn new() -> Self {
        Self::at("api.sock")
    }

    /// As [`Remote::new`], by a name.
    pub(super) fn at(name: &str) -> Self {
        Self {
            socket: format!("{SCRATCH}/{name}"),
        }
    }

    pub(super) fn socket(&self) -> &str {
        &self.socket
    }

    /// Waits until the VMM listens.
    pub(super) fn ready(&self, lab: &Lab) -> Result<(), TestError> {
        let argv = ["lab-agent", "await-socket", &self.socket, "30"];
        lab.host.check(&argv)?;
        Ok(())
    }

    /// Runs `daxhund-remote` with these words; a failure is a result.
    pub(super) fn run(&self, lab: &Lab, words: &[&str]) -> Result<Output, TestError> {
        let mut argv = vec!["daxhund-remote", "--api-socket", &self.socket];
        argv.extend(words);
        Ok(lab.host.run(&argv)?)
    }

    /// As [`Remote::run`]; a failure is an error. Gives what is printed.
    pub(super) fn ok(&self, lab: &Lab, words: &[&str]) -> Result<String, TestError> {
        let output = self.run(lab, words)?;
        claim(output.status.success(), || {
            format!(
                "`daxhund-remote {}` ended with {}: {}{}",
                words.join(" "),
                output.status,
                output.stderr,
                output.stdout
            )
        })?;
        Ok(output.stdout)
    }

    /// As [`Remote::run`]; it must fail and say each of `expected`.
    pub(super) fn refused(
        &self,
        lab: &Lab,
        words: &[&str],
        expected: &[&str],
    ) -> Result<(), TestError> {
        let output = self.run(lab, words)?;
        let command = words.join(" ");
        claim(!output.status.success(), || {
            format!(
                "`daxhund-remote {command}` should be refused: {}",
                output.stdout
            )
        })?;
        let said = output.stderr + &output.stdout;
        for word in expected {
            claim(said.contains(word), || {
                format!("`daxhund-remote {command}` should say {word:?}, it says: {said}")
            })?;
        }
        Ok(())
    }

    /// `vm.info`.
    pub(super) fn info(&self, lab: &Lab) -> Result<Value, TestError> {
        self.json(lab, &["info"])
    }

    /// What a subcommand prints as JSON.
    fn json(&self, lab: &Lab, words: &[&str]) -> Result<Value, TestError> {
        let text = self.ok(lab, words)?;
        serde_json::from_str(&text).map_err(|error| {
            TestError::Claim(format!(
                "`{}` prints no JSON: {error}: {text}",
                words.join(" ")
            ))
        })
    }

    /// How often a backend of a device has connected.
    pub(super) fn connections(&self, lab: &Lab, id: &str) -> Result<u64, TestError> {
        let counters = self.json(lab, &["counters"])?;
        Ok(counters[id]["backend_connections"].as_u64().unwrap_or(0))
    }

    /// `vm.regions`: each by its place.
    pub(super) fn regions(&self, lab: &Lab) -> Result<Vec<Value>, TestError> {
        let report = self.json(lab, &["regions", "--json"])?;
        let regions = report["regions"].as_array().cloned();
        regions.ok_or_else(|| TestError::Claim(format!("no regions: {report}")))
    }

    /// What `daxhund-remote watch` shows once.
    pub(super) fn frame(&self, lab: &Lab) -> Result<Value, TestError> {
        self.json(lab, &["watch", "--count", "1", "--json"])
    }

    /// The metrics, each by its name and labels as they are written.
    pub(super) fn metrics(&self, lab: &Lab) -> Result<BTreeMap<String, f64>, TestError> {
        let text = self.ok(lab, &["metrics"])?;
        let broken = |line: &str| TestError::Claim(format!("no metric: {line:?} in {text}"));
        if !text.ends_with("# EOF\n") {
            return Err(broken("the end"));
        }
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').ok_or_else(|| broken(line))?;
                let value = value.parse().map_err(|_| broken(line))?;
                Ok((name.to_owned(), value))
            })
            .collect()
    }

    /// The VM's state as `vm.info` has it.
    pub(super) fn state(&self, lab: &Lab) -> Result<String, TestError> {
        let info = self.info(lab)?;
        Ok(info["state"].as_str().unwrap_or_default().to_owned())
    }

    /// The VM must be in a state.
    pub(super) fn expect_state(&self, lab: &Lab, expected: &str) -> Result<(), TestError> {
        let state = self.state(lab)?;
        claim(state == expected, || {
            format!("the VM should be {expected}, it is {state}")
        })
    }

    /// Adds a device to a running guest; gives its address.
    pub(super) fn add(&self, lab: &Lab, command: &str, word: &str) -> Result<String, TestError> {
        let text = self.ok(lab, &[command, word])?;
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        let address = answer["bdf"].as_str().unwrap_or_default().to_owned();
        claim(
            answer["id"].as_str().is_some_and(|id| !id.is_empty())
                && address.starts_with("0000:00:"),
            || format!("`{command} {word}` should give id and bdf, it gives {text}"),
        )?;
        Ok(address)
    }

    /// Whether `vm.info` has a device of this name anywhere.
    pub(super) fn knows(&self, lab: &Lab, id: &str) -> Result<bool, TestError> {
        Ok(has_text(&self.info(lab)?, id))
    }

    /// Sends a request as it is; gives the status and the body.
    pub(super) fn http(
        &self,
        lab: &Lab,
        method: &str,
        target: &str,
        body: &str,
    ) -> Result<(String, String), TestError> {
        let argv = ["lab-agent", "http", &self.socket, method, target, body];
        let text = lab.host.check(&argv)?;
        let (status, body) = text.split_once('\n').unwrap_or((&text, ""));
        Ok((status.to_owned(), body.to_owned()))
    }

    /// Sends a request as it is; the answer must have this status and say each of `expected`.
    pub(super) fn answers(
        &self,
        lab: &Lab,
        request: (&str, &str, &str),
        status: &str,
        expected: &[&str],
    ) -> Result<(), TestError> {
        let (method, target, body) = request;
        let (found, answer) = self.http(lab, method, target, body)?;
        let told = || format!("{method} {target} {body}: status {found}, {answer}");
        claim(found == status, || {
            format!("expected status {status}: {}", told())
        })?;
        expected.iter().try_for_each(|word| {
            claim(answer.contains(word), || {
                format!("expected {word:?}: {}", told())
            })
        })
    }
}

/// How a VMM that waits for orders is started; its serial console is its standard input and output.
pub(super) fn waiting_vmm(remote: &Remote, more: &[&str], uid: Option<u32>) -> SpawnSpec {
    let mut argv = vec!["daxhund", "--api-socket", remote.socket()];
    argv.extend(more);
    SpawnSpec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        uid,
        stdin: true,
        ..SpawnSpec::default()
    }
}

/// Whether a text or a key is somewhere in a value.
fn has_text(value: &Value, wanted: &str) -> bool {
    match value {
        Value::String(text) => text == wanted,
        Value::Array(items) => items.iter().any(|item| has_text(item, wanted)),
        Value::Object(fields) => fields
            .iter()
            .any(|(name, value)| name == wanted || has_text(value, wanted)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_its_name_wherever_it_stands() {
        let info = serde_json::json!({
            "config": {"disks": [{"id": "d0"}]}, "device_tree": {"p0": {"pci_bdf": "0000:00:04.0"}},
        });
        assert!(has_text(&info, "d0") && has_text(&info, "p0"));
        assert!(!has_text(&info, "d"));
    }
}
