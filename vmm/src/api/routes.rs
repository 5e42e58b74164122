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
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Serialize;
use tokio::time::timeout;
use tracing::debug;

use super::body::{self, Received, VmDrain, VmRemoveDevice, VmResize, VmResizeDisk};
use super::info::{VmCounters, VmInfo};
use super::openapi::{self, Document};
use super::request::{Answer, ApiError, Call, CallSink, ErrorKind, Gone, Reply, Request};
use super::server::{Client, Limits};
use super::{PREFIX, stream};
use crate::cli::CONTRACT_VERSION;
use crate::config::{
    DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig, VmConfig,
    VsockConfig,
};
use crate::memory::report::RegionsReport;
use crate::metrics::{self, Metrics};

/// One path.
#[derive(Debug)]
pub(super) struct Endpoint {
    /// Its name, after [`PREFIX`].
    pub(super) name: &'static str,
    pub(super) method: Method,
    /// What it is for, in one sentence.
    pub(super) about: &'static str,
    pub(super) does: Does,
    pub(super) says: Says,
    /// Why it is not done, besides a request that makes no sense and what goes wrong.
    pub(super) refuses: &'static [ErrorKind],
}

#[derive(Debug)]
pub(super) enum Does {
    /// Answered here.
    Ping,
    /// Answered here: what this table says.
    Document,
    /// Answered here, after the owner was given a moment.
    Metrics,
    /// Asked of the owner; there is no body.
    Plain(fn() -> Request),
    /// Asked of the owner, with what the body says.
    WithBody(Reader),
    /// Refused.
    NotBuilt,
}

/// A type of bodies.
#[derive(Debug)]
pub(super) struct Reader {
    read: fn(Received<'_>) -> Result<Request, ApiError>,
    pub(super) schema: SchemaOf,
}

/// The schema of a type.
pub(super) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What a client is told when it was done.
#[derive(Debug)]
pub(super) enum Says {
    /// Nothing.
    Nothing,
    /// This.
    Json(SchemaOf),
    /// Text of this type.
    Text(&'static str),
    /// Where the device is, of a running guest, else nothing.
    Added,
}

const fn takes<T: body::Body>() -> Does {
    Does::WithBody(Reader {
        read: body::read::<T>,
        schema: SchemaGenerator::subschema_for::<T>,
    })
}

const fn json<T: JsonSchema>() -> Says {
    Says::Json(SchemaGenerator::subschema_for::<T>)
}

const fn get(
    name: &'static str,
    does: Does,
    says: Says,
    refuses: &'static [ErrorKind],
    about: &'static str,
) -> Endpoint {
    let method = Method::GET;
    Endpoint {
        name,
        method,
        about,
        does,
        says,
        refuses,
    }
}

const fn put(
    name: &'static str,
    does: Does,
    refuses: &'static [ErrorKind],
    about: &'static str,
) -> Endpoint {
    let (method, says) = (Method::PUT, Says::Nothing);
    Endpoint {
        name,
        method,
        about,
        does,
        says,
        refuses,
    }
}

/// Adds a device.
const fn add<T: body::Body>(name: &'static str, about: &'static str) -> Endpoint {
    Endpoint {
        name,
        method: Method::PUT,
        about,
        does: takes::<T>(),
        says: Says::Added,
        refuses: &[ErrorKind::NotFound, ErrorKind::WrongState],
    }
}

const fn not_built(name: &'static str) -> Endpoint {
    put(name, Does::NotBuilt, &[], "Not built: always refused.")
}

/// What needs no machine.
const ANYTIME: &[ErrorKind] = &[];
/// What needs one that is defined.
const DEFINED: &[ErrorKind] = &[ErrorKind::NotFound];
/// What needs one in a certain state.
const IN_STATE: &[ErrorKind] = &[ErrorKind::NotFound, ErrorKind::WrongState];
/// What can have to wait for another change besides.
const IN_TURN: &[ErrorKind] = &[ErrorKind::NotFound, ErrorKind::WrongState, ErrorKind::Busy];

/// Every path of the contract, and daxhund's own.
pub(super) static ENDPOINTS: &[Endpoint] = &[
    get(
        "vmm.ping",
        Does::Ping,
        json::<VmmPingResponse>(),
        ANYTIME,
        "Tells which VMM this is.",
    ),
    get(
        "openapi.json",
        Does::Document,
        json::<Document>(),
        ANYTIME,
        "Tells what there is to ask, and how: this document.",
    ),
    get(
        "vm.info",
        Does::Plain(|| Request::Info),
        json::<VmInfo<'_>>(),
        DEFINED,
        "Tells what the machine is made of and what it does.",
    ),
    get(
        "vm.counters",
        Does::Plain(|| Request::Counters),
        json::<VmCounters>(),
        IN_STATE,
        "Tells what the machine's devices have counted.",
    ),
    get(
        "vm.regions",
        Does::Plain(|| Request::Regions),
        json::<RegionsReport>(),
        IN_STATE,
        "Tells where guest memory is, how it stands and who has it.",
    ),
    get(
        "vmm.metrics",
        Does::Metrics,
        Says::Text(metrics::CONTENT_TYPE),
        ANYTIME,
        "Tells numbers for a monitoring system, as OpenMetrics text; waits for nobody.",
    ),
    put(
        "vmm.shutdown",
        Does::Plain(|| Request::VmmShutdown),
        ANYTIME,
        "Ends the VMM, and the machine with it.",
    ),
    put(
        "vm.create",
        takes::<VmConfig>(),
        &[ErrorKind::WrongState],
        "Defines the machine; nothing of the host is opened yet.",
    ),
    put(
        "vm.boot",
        Does::Plain(|| Request::Boot),
        IN_STATE,
        "Starts the machine.",
    ),
    put(
        "vm.delete",
        Does::Plain(|| Request::Delete),
        DEFINED,
        "Forgets the machine; it is shut down first if need be.",
    ),
    put(
        "vm.shutdown",
        Does::Plain(|| Request::Shutdown),
        IN_STATE,
        "Takes the machine down; its definition stays.",
    ),
    put(
        "vm.reboot",
        Does::Plain(|| Request::Reboot),
        IN_STATE,
        "Takes the machine down and starts it again.",
    ),
    put(
        "vm.pause",
        Does::Plain(|| Request::Pause),
        IN_STATE,
        "Holds the vCPUs.",
    ),
    put(
        "vm.resume",
        Does::Plain(|| Request::Resume),
        IN_STATE,
        "Lets the vCPUs go on.",
    ),
    put(
        "vm.power-button",
        Does::Plain(|| Request::PowerButton),
        IN_STATE,
        "Presses the power button.",
    ),
    put(
        "vm.nmi",
        Does::Plain(|| Request::Nmi),
        IN_STATE,
        "Sends every vCPU a non-maskable interrupt.",
    ),
    put(
        "vm.resize",
        takes::<VmResize>(),
        IN_TURN,
        "Changes how much the guest has.",
    ),
    put(
        "vm.resize-disk",
        takes::<VmResizeDisk>(),
        IN_STATE,
        "Makes a disk larger.",
    ),
    add::<PmemConfig>("vm.add-pmem", "Adds persistent memory."),
    add::<DiskConfig>("vm.add-disk", "Adds a disk."),
    add::<NetConfig>(
        "vm.add-net",
        "Adds a network interface; descriptors of its tap come beside the request (SCM_RIGHTS).",
    ),
    add::<FsConfig>("vm.add-fs", "Adds a directory of the host."),
    add::<VsockConfig>("vm.add-vsock", "Adds sockets between guest and host."),
    add::<DeviceConfig>("vm.add-device", "Adds a PCI function of the host."),
    add::<GenericVhostUserConfig>(
        "vm.add-generic-vhost-user",
        "Adds a device of whatever type that another process serves.",
    ),
    put(
        "vm.remove-device",
        takes::<VmRemoveDevice>(),
        IN_STATE,
        "Asks for a device to be removed; the event device-removed tells that it is gone.",
    ),
    put(
        "vm.drain",
        takes::<VmDrain>(),
        IN_TURN,
        "Takes a device or a memory zone from the guest; answered when the host may have it.",
    ),
    not_built("vm.add-user-device"),
    not_built("vm.add-vdpa"),
    not_built("vm.coredump"),
    not_built("vm.receive-migration"),
    not_built("vm.resize-zone"),
    not_built("vm.restore"),
    not_built("vm.send-migration"),
    not_built("vm.snapshot"),
];

/// What all requests share.
#[derive(Debug)]
struct Shared<S> {
    sink: S,
    metrics: Metrics,
    limits: Limits,
}

/// The paths, for requests that carry their [`Client`] as an extension.
pub(super) fn router<S: CallSink>(sink: S, metrics: Metrics, limits: Limits) -> Router {
    let shared = Arc::new(Shared {
        sink,
        metrics,
        limits,
    });
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
            Does::Document => {
                without_body(endpoint, &body)?;
                Reply::json(openapi::document())
            }
            Does::Metrics => {
                without_body(endpoint, &body)?;
                Ok(Reply::Metrics(self.metrics().await))
            }
            Does::Plain(request) => {
                without_body(endpoint, &body)?;
                self.ask(endpoint.name, request()).await
            }
            Does::WithBody(reader) => {
                let received = Received {
                    path: endpoint.name,
                    json: &body,
                    descriptors: descriptors.map_err(|stream::TooMany| too_many_descriptors())?,
                };
                self.ask(endpoint.name, (reader.read)(received)?).await
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

    /// What is so by now; what was so, from an owner that is busy: it is not waited for.
    async fn metrics(&self) -> String {
        let (call, published) = Call::new(Request::Metrics);
        if self.sink.submit(call).is_ok() {
            // Whatever it says, the text tells how old it is.
            let _ = timeout(metrics::PATIENCE, published).await;
        }
        self.metrics.text()
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

/// Which VMM it is.
#[derive(Serialize, JsonSchema)]
struct VmmPingResponse {
    /// The version of the contract, and daxhund's own.
    build_version: String,
    /// The version of the contract.
    version: &'static str,
    /// The process.
    pid: u32,
    /// None is told of.
    features: &'static [&'static str],
}

fn ping() -> Answer {
    let contract = CONTRACT_VERSION;
    Reply::json(&VmmPingResponse {
        build_version: format!("{contract} (daxhund {})", env!("CARGO_PKG_VERSION")),
        version: contract.trim_start_matches('v'),
        pid: std::process::id(),
        features: &[],
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

pub(super) fn status(kind: ErrorKind) -> StatusCode {
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
    const JSON: &str = "application/json";
    let (status, body) = match answer {
        Ok(Reply::Empty) => (StatusCode::NO_CONTENT, None),
        Ok(Reply::Json(value)) => (StatusCode::OK, Some((JSON, value.to_string()))),
        Ok(Reply::Metrics(text)) => (StatusCode::OK, Some((metrics::CONTENT_TYPE, text))),
        Err(error) => {
            debug!(name, %error, "a request was refused");
            let chain: Vec<_> = error.chain().iter().map(String::as_str).collect();
            (
                status(error.kind()),
                Some((JSON, serde_json::Value::from(chain).to_string())),
            )
        }
    };
    let mut response = match body {
        Some((kind, text)) => {
            let mut response = Response::new(Body::from(text));
            let kind = HeaderValue::from_static(kind);
            response.headers_mut().insert(CONTENT_TYPE, kind);
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
