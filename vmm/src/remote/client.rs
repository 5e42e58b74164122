//! One request over a unix socket, and its answer.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::header::{ACCEPT, CONTENT_TYPE, HOST};
use axum::http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime;
use tokio::time::timeout;

use super::watch::METRICS;
use crate::api::PREFIX;
use crate::api::stream::FdStream;
use crate::config::LONGEST_REMOVAL_TIMEOUT;
use crate::metrics;

/// Longer than the server makes anybody wait.
const PATIENCE: Duration = Duration::from_secs(90);
/// The same for a drain, in which a guest has its time.
const PATIENCE_FOR_DRAIN: Duration = LONGEST_REMOVAL_TIMEOUT.saturating_add(PATIENCE);

fn patience_for(name: &str) -> Duration {
    match name {
        "vm.drain" => PATIENCE_FOR_DRAIN,
        _ => PATIENCE,
    }
}

/// More than the description of the largest guest.
const LONGEST_ANSWER: usize = 16 << 20;

/// How something is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// For something that changes nothing.
    Get,
    /// For everything else.
    Put,
}

/// What was answered, when it was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// 200, or 204 for an empty body.
    pub status: u16,
    /// JSON, or nothing.
    pub body: Vec<u8>,
}

/// What was answered, when it was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status, with its name.
    pub status: u16,
    /// The messages, outermost first; may be empty when not daxhund has answered.
    pub chain: Vec<String>,
}

/// A request that was not made or not done.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("can't connect to {}; does a daxhund run with --api-socket {}?", path.display(), path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The event loop.
    #[error("can't make an event loop")]
    Runtime(#[source] io::Error),
    /// The name is no path.
    #[error("can't make a request for {name}")]
    Request {
        /// What was to be asked.
        name: String,
        /// What is wrong.
        #[source]
        source: axum::http::Error,
    },
    /// The connection broke, or the other side does not speak HTTP.
    #[error("{name} was asked, but there is no answer that can be read")]
    Exchange {
        /// What was asked.
        name: String,
        /// What happened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer.
    #[error("{name} was not answered within {} s; the daxhund may still do it", patience_for(name).as_secs())]
    TimedOut {
        /// What was asked.
        name: String,
    },
    /// It was answered that it was not done.
    #[error("{name} was not done: {refusal}")]
    Refused {
        /// What was asked.
        name: String,
        /// Why not.
        refusal: Refusal,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match StatusCode::from_u16(self.status) {
            Ok(status) => write!(f, "{status}")?,
            Err(_) => write!(f, "{}", self.status)?,
        }
        for line in &self.chain {
            write!(f, "\n  {line}")?;
        }
        Ok(())
    }
}

/// Asks one daxhund, over a new connection for each request.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Asks the daxhund that listens on `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks for `name` (such as `vm.info`) and waits for the answer, at most 90 s (a drain: as long as
    /// the guest may have, and that). `descriptors` go beside the
    /// request; only `vm.add-net` takes any.
    pub fn call(
        &self,
        method: Method,
        name: &str,
        body: Option<Vec<u8>>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Response, ClientError> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ClientError::Runtime)?;
        let exchange = async {
            match timeout(
                patience_for(name),
                self.exchange(method, name, body, descriptors),
            )
            .await
            {
                Ok(answer) => answer,
                Err(_) => Err(ClientError::TimedOut { name: name.into() }),
            }
        };
        let response = runtime.block_on(exchange)?;
        if matches!(response.status, 200..=299) {
            return Ok(response);
        }
        Err(ClientError::Refused {
            name: name.into(),
            refusal: Refusal {
                status: response.status,
                chain: chain(&response.body),
            },
        })
    }

    async fn exchange(
        &self,
        method: Method,
        name: &str,
        body: Option<Vec<u8>>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Response, ClientError> {
        let broken = |source| ClientError::Exchange {
            name: name.into(),
            source,
        };
        let mut request = Request::builder()
            .uri(format!("{PREFIX}{name}"))
            .method(match method {
                Method::Get => "GET",
                Method::Put => "PUT",
            })
            .header(HOST, "localhost")
            .header(
                ACCEPT,
                match name {
                    METRICS => metrics::CONTENT_TYPE,
                    _ => "application/json",
                },
            );
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|source| ClientError::Request {
                name: name.into(),
                source,
            })?;
        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|source| ClientError::Connect {
                    path: self.socket.clone(),
                    source,
                })?;
        let stream = TokioIo::new(FdStream::sending(stream, descriptors));
        let (mut sender, connection) = http1::handshake(stream)
            .await
            .map_err(|error| broken(error.into()))?;
        // Ends with the runtime; what is wrong with it reaches the request.
        tokio::spawn(connection);
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| broken(error.into()))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), LONGEST_ANSWER)
            .collect()
            .await
            .map_err(broken)?
            .to_bytes()
            .to_vec();
        Ok(Response { status, body })
    }
}

/// The messages of an error's body; a body that is something else is one message.
fn chain(body: &[u8]) -> Vec<String> {
    if body.is_empty() {
        return Vec::new();
    }
    serde_json::from_slice(body)
        .unwrap_or_else(|_| vec![String::from_utf8_lossy(body).into_owned()])
}
