//! The paths, and what is done with a request for one of them.
//!
//! [`ENDPOINTS`] is the whole API; the router is made from it.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request as HttpRequest;
use axum::http::header::{CONTENT_TYPE, SERVER};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::Response;
use axum::routing::any;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body as _;
use hyper::ext::ReasonPhrase;
use serde::Serialize;
use tokio::time::timeout;
use tracing::debug;

use super::body::{self, Received};
use super::request::{Answer, ApiError, Call, CallSink, ErrorKind, Gone, Reply, Request};
use super::server::{Client, Limits};
use super::{PREFIX, stream};
use crate::cli::CONTRACT_VERSION;

/// One path.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// Its name, after [`PREFIX`].
    pub(super) name: &'static str,
    pub(super) method: Method,
    does: Does,
}

#[derive(Debug)]
enum Does {
    /// Answered here.
    Ping,
    /// Asked of the owner; there is no body.
    Plain(fn() -> Request),
    /// Asked of the owner, with what the body says.
    WithBody(fn(Received<'_>) -> Result<Request, ApiError>),
    /// Refused.
    NotBuilt,
}

const fn get(name: &'static str, does: Does) -> Endpoint {
    let method = Method::GET;
    Endpoint { name, method, does }
}

const fn put(name: &'static str, does: Does) -> Endpoint {
    let method = Method::PUT;
    Endpoint { name, method, does }
}

/// Every path of the contract.
pub(super) static ENDPOINTS: &[Endpoint] = &[
    get("vmm.ping", Does::Ping),
    get("vm.info", Does::Plain(|| Request::Info)),
    get("vm.counters", Does::Plain(|| Request::Counters)),
    put("vmm.shutdown", Does::Plain(|| Request::VmmShutdown)),
    put("vm.create", Does::WithBody(body::create)),
    put("vm.boot", Does::Plain(|| Request::Boot)),
    put("vm.delete", Does::Plain(|| Request::Delete)),
    put("vm.shutdown", Does::Plain(|| Request::Shutdown)),
    put("vm.reboot", Does::Plain(|| Request::Reboot)),
    put("vm.pause", Does::Plain(|| Request::Pause)),
    put("vm.resume", Does::Plain(|| Request::Resume)),
    put("vm.power-button", Does::Plain(|| Request::PowerButton)),
    put("vm.nmi", Does::Plain(|| Request::Nmi)),
    put("vm.resize", Does::WithBody(body::resize)),
    put("vm.resize-disk", Does::WithBody(body::resize_disk)),
    put("vm.add-pmem", Does::WithBody(body::add_pmem)),
    put("vm.add-disk", Does::WithBody(body::add_disk)),
    put("vm.add-net", Does::WithBody(body::add_net)),
    put("vm.add-fs", Does::WithBody(body::add_fs)),
    put("vm.add-vsock", Does::WithBody(body::add_vsock)),
    put("vm.add-device", Does::WithBody(body::add_device)),
    put("vm.remove-device", Does::WithBody(body::remove_device)),
    put("vm.drain", Does::WithBody(body::drain)),
    put(
        "vm.add-generic-vhost-user",
        Does::WithBody(body::add_generic_vhost_user),
    ),
    put("vm.add-user-device", Does::NotBuilt),
    put("vm.add-vdpa", Does::NotBuilt),
    put("vm.coredump", Does::NotBuilt),
    put("vm.receive-migration", Does::NotBuilt),
    put("vm.resize-zone", Does::NotBuilt),
    put("vm.restore", Does::NotBuilt),
    put("vm.send-migration", Does::NotBuilt),
    put("vm.snapshot", Does::NotBuilt),
];

/// What all requests share.
#[derive(Debug)]
struct Shared<S> {
    sink: S,
    limits: Limits,
}

/// The paths, for requests that carry their [`Client`] as an extension.
pub(super) fn router<S: CallSink>(sink: S, limits: Limits) -> Router {
    let shared = Arc::new(Shared { sink, limits });
    let mut router = Router::new();
    for endpoint in ENDPOINTS {
        let shared = Arc::clone(&shared);
        let serve = move |request: HttpRequest| {
            let shared = Arc::clone(&shared);
            async move { respond(endpoint.name, shared.serve(endpoint, request).await) }
        };
        router = router.route(&format!("{PREFIX}{}", endpoint.name), any(serve));
    }
    router.fallback(|request: HttpRequest| async move {
        let path: String = request.uri().path().chars().take(200).collect();
        respond("a path", Err(unknown(&path)))
    })
}

impl<S: CallSink> Shared<S> {
    async fn serve(&self, endpoint: &'static Endpoint, request: HttpRequest) -> Answer {
        if request.method() != endpoint.method {
            return Err(wrong_method(endpoint, request.method()));
        }
        let (head, body) = request.into_parts();
        let Some(client) = head.extensions.get::<Client>() else {
            // The server puts it into every request.
            return Err(ApiError::new(
                ErrorKind::Internal,
                "the request belongs to no connection",
            ));
        };
        let _in_call = client.begin();
        let body = self.body(endpoint, body).await;
        // Taken in any case, so that what nobody asked for is closed.
        let descriptors = client.received.take();
        let body = body?;
        match &endpoint.does {
            Does::NotBuilt => Err(ApiError::not_supported(endpoint.name)),
            Does::Ping => without_body(endpoint, &body).and_then(|()| ping()),
            Does::Plain(request) => {
                without_body(endpoint, &body)?;
                self.ask(endpoint.name, request()).await
            }
            Does::WithBody(read) => {
                let received = Received {
                    path: endpoint.name,
                    json: &body,
                    descriptors: descriptors.map_err(|stream::TooMany| too_many_descriptors())?,
                };
                self.ask(endpoint.name, read(received)?).await
            }
        }
    }

    /// The whole body, if it is of a size and comes in time.
    async fn body(&self, endpoint: &Endpoint, body: Body) -> Result<Vec<u8>, ApiError> {
        let bad = |message| Err(ApiError::new(ErrorKind::BadRequest, message));
        let name = endpoint.name;
        let most = self.limits.body_bytes;
        let too_long = || {
            bad(format!(
                "the body of {name} is too long: {most} bytes are the most"
            ))
        };
        if body.size_hint().lower() > most as u64 {
            return too_long();
        }
        let collected = Limited::new(body, most).collect();
        match timeout(self.limits.body_timeout, collected).await {
            Ok(Ok(body)) => Ok(body.to_bytes().to_vec()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => too_long(),
            Ok(Err(error)) => bad(format!("the body of {name} ended too early: {error}")),
            Err(_) => bad(format!(
                "the body of {name} did not come within {}; send it whole, or tell its right length",
                Span(self.limits.body_timeout)
            )),
        }
    }

    /// Asks the owner and waits for what it says.
    async fn ask(&self, name: &'static str, request: Request) -> Answer {
        let gone = |cause: &dyn std::error::Error| {
            ApiError::caused_by(ErrorKind::Internal, format!("{name} was not done"), cause)
        };
        let patience = match request {
            Request::Drain { .. } => self.limits.drain_timeout,
            _ => self.limits.call_timeout,
        };
        let (call, answer) = Call::new(request);
        self.sink.submit(call).map_err(|cause| gone(&cause))?;
        match timeout(patience, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(gone(&Gone)),
            Err(_) => Err(ApiError::new(
                ErrorKind::Internal,
                format!(
                    "{name} is not done after {}; it may still be done: look at vm.info",
                    Span(patience)
                ),
            )),
        }
    }
}

#[derive(Serialize)]
struct Ping {
    build_version: String,
    version: &'static str,
    pid: u32,
    features: [&'static str; 0],
}

fn ping() -> Answer {
    let contract = CONTRACT_VERSION;
    Reply::json(&Ping {
        build_version: format!("{contract} (daxhund {})", env!("CARGO_PKG_VERSION")),
        version: contract.trim_start_matches('v'),
        pid: std::process::id(),
        features: [],
    })
}

fn without_body(endpoint: &Endpoint, body: &[u8]) -> Result<(), ApiError> {
    if body.is_empty() {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorKind::BadRequest,
        format!(
            "{} takes no body, {} bytes came; leave it out",
            endpoint.name,
            body.len()
        ),
    ))
}

/// As Cloud Hypervisor, a method that a path does not have is a bad request.
fn wrong_method(endpoint: &Endpoint, method: &Method) -> ApiError {
    let method: String = method.as_str().chars().take(20).collect();
    ApiError::new(
        ErrorKind::BadRequest,
        format!(
            "{} is asked for with {}, not with {method}",
            endpoint.name, endpoint.method
        ),
    )
}

fn too_many_descriptors() -> ApiError {
    ApiError::new(
        ErrorKind::BadRequest,
        format!(
            "not all file descriptors beside the request were received: {} are the most, and daxhund must \
             be able to open as many",
            stream::MOST_DESCRIPTORS
        ),
    )
}

fn unknown(path: &str) -> ApiError {
    let names: Vec<_> = ENDPOINTS.iter().map(|endpoint| endpoint.name).collect();
    ApiError::new(
        ErrorKind::NotFound,
        format!(
            "no such path: {path}; paths are {PREFIX}NAME, with NAME one of {}",
            names.join(", ")
        ),
    )
}

fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::WrongState => StatusCode::CONFLICT,
        ErrorKind::BadRequest => StatusCode::BAD_REQUEST,
        ErrorKind::Busy => StatusCode::TOO_MANY_REQUESTS,
        // The contract has no status of its own for what is not built.
        ErrorKind::NotSupported | ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn respond(name: &str, answer: Answer) -> Response {
    let (status, body) = match answer {
        Ok(Reply::Empty) => (StatusCode::NO_CONTENT, None),
        Ok(Reply::Json(value)) => (StatusCode::OK, Some(value.to_string())),
        Err(error) => {
            debug!(name, %error, "a request was refused");
            let chain: Vec<_> = error.chain().iter().map(String::as_str).collect();
            (
                status(error.kind()),
                Some(serde_json::Value::from(chain).to_string()),
            )
        }
    };
    let mut response = match body {
        Some(text) => {
            let mut response = Response::new(Body::from(text));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            response
        }
        None => Response::new(Body::empty()),
    };
    *response.status_mut() = status;
    // The contract's own client reads everything after the version as a number: no word may follow the status.
    let no_word = ReasonPhrase::from_static(b"");
    response.extensions_mut().insert(no_word);
    let server = HeaderValue::from_static("daxhund");
    response.headers_mut().insert(SERVER, server);
    response
}

/// A time as a sentence has it.
struct Span(Duration);

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} s", self.0.as_secs_f32())
    }
}
