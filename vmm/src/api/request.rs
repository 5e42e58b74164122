//! What a client can ask of the machine's owner, and what it is answered. Nothing here knows of sockets or HTTP.
//!
//! ```text
//!   server ──Call { request, reply }──▶ CallSink ──▶ the owner's loop
//!      ◀───────────── Answer ─────────── reply
//! ```
//! Invariants:
//! - Each [`Call`] is answered once; a call that is dropped tells the client that the owner has gone.
//! - What a client asked for is checked for its shape before it gets here; whether it makes sense now is the owner's.
//! - A ping is not here: it is answered without the owner.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::os::fd::OwnedFd;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serialize;
use serde_json::Value;
use thiserror::Error;
use tokio::sync::oneshot;

use crate::config::{
    DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig, VmConfig,
    VsockConfig,
};

/// Everything that reaches the owner.
#[derive(Debug)]
pub enum Request {
    /// Configuration, state and devices.
    Info,
    /// What the devices have counted.
    Counters,
    /// Where guest memory is, and who has it.
    Regions,
    /// Publish what is so by now, for metrics.
    Metrics,
    /// End the process.
    VmmShutdown,
    /// Define the machine; nothing of the host is opened yet.
    Create(Box<VmConfig>),
    /// Start what was defined.
    Boot,
    /// Forget the machine; it is shut down first if need be.
    Delete,
    /// Take the machine down; its definition stays.
    Shutdown,
    /// Take the machine down and start it again.
    Reboot,
    /// Hold the vCPUs.
    Pause,
    /// The undo of [`Request::Pause`].
    Resume,
    /// Press the power button.
    PowerButton,
    /// Send every vCPU a non-maskable interrupt.
    Nmi,
    /// Add persistent memory.
    AddPmem(Box<PmemConfig>),
    /// Add a disk.
    AddDisk(Box<DiskConfig>),
    /// Add a network device, with the tap descriptors that came beside the request.
    AddNet(Box<NetConfig>, Vec<OwnedFd>),
    /// Add a directory of the host.
    AddFs(Box<FsConfig>),
    /// Add a device of whatever type that another process serves.
    AddGenericVhostUser(Box<GenericVhostUserConfig>),
    /// Add a vsock device.
    AddVsock(Box<VsockConfig>),
    /// Add a PCI function of the host.
    AddDevice(Box<DeviceConfig>),
    /// Ask for a device to be removed.
    RemoveDevice {
        /// Its name.
        id: String,
    },
    /// Take a device or a memory zone from the guest; answered when the host may have it.
    Drain {
        /// Its name.
        id: String,
    },
    /// Make a disk larger.
    ResizeDisk {
        /// Its name.
        id: String,
        /// Bytes that the guest is to have.
        bytes: u64,
    },
    /// Change how much the guest has. What is absent stays as it is.
    Resize {
        /// How many vCPUs.
        vcpus: Option<u32>,
        /// How much RAM, in bytes.
        ram: Option<u64>,
        /// How much the balloon takes, in bytes.
        balloon: Option<u64>,
    },
}

/// What a client is told.
pub type Answer = Result<Reply, ApiError>;

/// It was done.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// There is nothing to say.
    Empty,
    /// This is to say.
    Json(Value),
    /// These are the metrics.
    Metrics(String),
}

impl Reply {
    /// Says `value`.
    pub fn json(value: &impl Serialize) -> Answer {
        serde_json::to_value(value)
            .map(Self::Json)
            .map_err(|error| {
                ApiError::caused_by(
                    ErrorKind::Internal,
                    "the answer can't be written as JSON",
                    &error,
                )
            })
    }
}

/// A device that was added to a running guest, as a client is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "PciDeviceInfo")]
pub struct DeviceAdded {
    /// Its name.
    pub id: String,
    /// Where it sits: `0000:00:05.0`.
    pub bdf: String,
}

/// Why something was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no machine, no such device or no such path.
    NotFound,
    /// The machine is in another state, or what is to be added is there already.
    WrongState,
    /// What was asked for makes no sense.
    BadRequest,
    /// Another change is under way.
    Busy,
    /// daxhund does not build it.
    NotSupported,
    /// The host, or daxhund itself.
    Internal,
}

impl ErrorKind {
    /// All of them.
    pub(super) const ALL: [Self; 6] = [
        Self::NotFound,
        Self::WrongState,
        Self::BadRequest,
        Self::Busy,
        Self::NotSupported,
        Self::Internal,
    ];
}

/// An error as a client reads it: the chain of causes, outermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    kind: ErrorKind,
    chain: Vec<String>,
}

impl ApiError {
    /// An error of one message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            chain: vec![message.into()],
        }
    }

    /// An error and what caused it.
    pub fn from_error(kind: ErrorKind, error: &dyn Error) -> Self {
        let mut chain = vec![error.to_string()];
        let mut cause = error.source();
        while let Some(error) = cause {
            let message = error.to_string();
            // Transparent wrappers say the same as what they wrap.
            if chain.last() != Some(&message) {
                chain.push(message);
            }
            cause = error.source();
        }
        Self { kind, chain }
    }

    /// A message and the error that caused it.
    pub fn caused_by(kind: ErrorKind, message: impl Into<String>, error: &dyn Error) -> Self {
        Self::from_error(kind, error).context(message)
    }

    /// What daxhund does not build.
    pub fn not_supported(what: &str) -> Self {
        Self::new(
            ErrorKind::NotSupported,
            format!("not supported by daxhund: {what}"),
        )
    }

    /// The same error with a cause below it.
    #[must_use]
    pub fn because(mut self, cause: impl Into<String>) -> Self {
        self.chain.push(cause.into());
        self
    }

    /// The same error with a message around it.
    #[must_use]
    pub fn context(mut self, message: impl Into<String>) -> Self {
        self.chain.insert(0, message.into());
        self
    }

    /// Why it was not done.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The messages, outermost first; at least one.
    pub fn chain(&self) -> &[String] {
        &self.chain
    }
}

/// What a client reads of it.
impl JsonSchema for ApiError {
    fn schema_name() -> Cow<'static, str> {
        "ErrorChain".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Why it was not done: the chain of causes, outermost first.",
            "type": "array",
            "items": {"type": "string"},
            "minItems": 1,
        })
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.chain.join(": "))
    }
}

impl Error for ApiError {}

/// One request and where its answer goes.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes. A client that has not waited for it needs none.
    pub reply: oneshot::Sender<Answer>,
}

impl Call {
    /// A call and where its answer comes.
    pub fn new(request: Request) -> (Self, oneshot::Receiver<Answer>) {
        let (reply, answer) = oneshot::channel();
        (Self { request, reply }, answer)
    }
}

/// The owner takes no more calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the machine's owner takes no more requests: daxhund is ending")]
pub struct Gone;

/// Brings calls to the owner. Never waits: it is called on the server's one thread.
pub trait CallSink: Clone + Send + Sync + 'static {
    /// Posts a call.
    fn submit(&self, call: Call) -> Result<(), Gone>;
}

impl<F> CallSink for F
where
    F: Fn(Call) -> Result<(), Gone> + Clone + Send + Sync + 'static,
{
    fn submit(&self, call: Call) -> Result<(), Gone> {
        self(call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Error)]
    #[error("outer")]
    struct Outer(#[source] Middle);
    #[derive(Debug, Error)]
    #[error(transparent)]
    struct Middle(#[from] Inner);
    #[derive(Debug, Error)]
    #[error("inner")]
    struct Inner;

    #[test]
    fn the_chain_is_outermost_first_and_says_nothing_twice() {
        let error = ApiError::from_error(ErrorKind::Internal, &Outer(Inner.into()));
        assert_eq!(error.chain(), ["outer", "inner"]);
        let error = error.context("vm.boot");
        assert_eq!(error.chain(), ["vm.boot", "outer", "inner"]);
        assert_eq!(error.to_string(), "vm.boot: outer: inner");
        assert_eq!(error.kind(), ErrorKind::Internal);
    }

    #[test]
    fn what_is_not_built_is_named() {
        let error = ApiError::not_supported("vm.snapshot");
        assert_eq!(error.chain(), ["not supported by daxhund: vm.snapshot"]);
    }

    #[test]
    fn a_device_is_told_by_name_and_place() {
        let added = DeviceAdded {
            id: "disk7".into(),
            bdf: "0000:00:07.0".into(),
        };
        let Ok(Reply::Json(value)) = Reply::json(&added) else {
            panic!("no JSON");
        };
        assert_eq!(value["id"], "disk7");
        assert_eq!(value["bdf"], "0000:00:07.0");
    }
}
