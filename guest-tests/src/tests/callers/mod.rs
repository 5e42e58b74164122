//! Callers of a VMM's REST interface that were not made for daxhund: orchestrators, each in its own way, and people with curl.
//!
//! What they send is sent byte by byte as they do. Their deadlines are kept as well, [`SLACK`] times longer.

mod by_hand;
mod kata;
mod libvirt;

use std::time::Duration;

use lab_agent::caller_protocol::{Exchange, Exchanged};
use lab_agent::host_protocol::SpawnSpec;
use serde_json::Value;

use super::{GuestTest, Lab, TestError};
use crate::host::process::Process;
use crate::wait::SLACK;

pub(super) const TESTS: &[GuestTest] = &[
    GuestTest {
        name: "kata_calls_in_its_order_are_answered_in_its_time",
        run: kata::calls_in_its_order_are_answered_in_its_time,
    },
    GuestTest {
        name: "libvirt_finds_what_it_relies_on",
        run: libvirt::finds_what_it_relies_on,
    },
    GuestTest {
        name: "requests_by_hand_are_answered_as_the_readme_says",
        run: by_hand::requests_are_answered_as_the_readme_says,
    },
];

/// A program on the emulated host that makes the calls.
struct Caller(Process);

/// An answer, and how long it took on the host.
struct Answer {
    status: u16,
    body: String,
    took: Duration,
}

impl Caller {
    fn start(lab: &Lab, socket: &str) -> Result<Self, TestError> {
        let argv = ["lab-agent", "caller", socket];
        Ok(Self(lab.host.spawn(SpawnSpec {
            argv: argv.map(str::to_owned).to_vec(),
            stdin: true,
            ..SpawnSpec::default()
        })?))
    }

    /// Sends a request; none at all is an answer, too. `limit` is the caller's own.
    fn try_exchange(
        &mut self,
        exchange: &Exchange,
        limit: Duration,
    ) -> Result<Exchanged, TestError> {
        let json = |error: serde_json::Error| TestError::Claim(error.to_string());
        let mut line = serde_json::to_string(exchange).map_err(json)?;
        line.push('\n');
        self.0.send(line.as_bytes())?;
        let told = self.0.wait_for("{", limit * SLACK)?;
        serde_json::from_str(&told).map_err(json)
    }

    /// As [`Caller::try_exchange`], for one that must be answered.
    fn exchange(&mut self, exchange: &Exchange, limit: Duration) -> Result<Answer, TestError> {
        match self.try_exchange(exchange, limit)? {
            Exchanged::Answer {
                status,
                body,
                took_ns,
            } => Ok(Answer {
                status,
                body,
                took: Duration::from_nanos(took_ns),
            }),
            Exchanged::Failure(why) => {
                Err(TestError::Claim(format!("{}: {why}", exchange.request)))
            }
        }
    }
}

/// What is sent over a connection that may be there.
fn plain(request: String) -> Exchange {
    Exchange {
        request,
        tap: None,
        anew: false,
    }
}

/// The JSON of an answer; null without a body.
fn json(answer: &Answer) -> Result<Value, TestError> {
    if answer.body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&answer.body)
        .map_err(|error| TestError::Claim(format!("no JSON: {error}: {}", answer.body)))
}
