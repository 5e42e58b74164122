//! From the bytes of a body to a [`Request`]: the one place where a client's JSON is read.

use std::os::fd::OwnedFd;

use schemars::JsonSchema;
use serde::Deserialize;

use super::request::{ApiError, ErrorKind, Request};
use crate::config::{
    DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, JsonObject, NetConfig, PmemConfig,
    Shape, VmConfig, VsockConfig, as_sent, from_json,
};

/// What came with a request.
#[derive(Debug)]
pub(super) struct Received<'a> {
    /// The path's name, for errors.
    pub(super) path: &'static str,
    /// The body.
    pub(super) json: &'a [u8],
    /// What came beside it; closed where nobody asked for it.
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Received<'_> {
    fn read<T: JsonObject>(self) -> Result<T, ApiError> {
        let path = self.path;
        if self.json.is_empty() {
            return Err(ApiError::new(
                ErrorKind::BadRequest,
                format!("{path} wants a JSON object as its body, none came"),
            ));
        }
        from_json(self.json).map_err(|error| {
            ApiError::caused_by(
                ErrorKind::BadRequest,
                format!("the body of {path} can't be used"),
                &error,
            )
        })
    }
}

/// What a client sends, and the request that it is.
pub(super) trait Body: JsonObject + JsonSchema {
    /// `descriptors` came beside it; closed by whoever has no use for them.
    fn request(self, descriptors: Vec<OwnedFd>) -> Request;
}

/// Reads what came as a `T`.
pub(super) fn read<T: Body>(mut received: Received<'_>) -> Result<Request, ApiError> {
    let descriptors = std::mem::take(&mut received.descriptors);
    received.read().map(|body: T| body.request(descriptors))
}

impl Body for VmConfig {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::Create(Box::new(self))
    }
}

impl Body for PmemConfig {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::AddPmem(Box::new(self))
    }
}

impl Body for DiskConfig {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::AddDisk(Box::new(self))
    }
}

impl Body for NetConfig {
    fn request(self, descriptors: Vec<OwnedFd>) -> Request {
        Request::AddNet(Box::new(self), descriptors)
    }
}

impl Body for FsConfig {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::AddFs(Box::new(self))
    }
}

impl Body for GenericVhostUserConfig {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::AddGenericVhostUser(Box::new(self))
    }
}

impl Body for VsockConfig {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::AddVsock(Box::new(self))
    }
}

impl Body for DeviceConfig {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::AddDevice(Box::new(self))
    }
}

/// Which device is to go.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub(super) struct VmRemoveDevice {
    /// Its name.
    id: String,
}

impl JsonObject for VmRemoveDevice {
    const SHAPE: Shape = Shape::WHOLE;
}

impl Body for VmRemoveDevice {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::RemoveDevice { id: self.id }
    }
}

/// Which device or memory zone is to be given up.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub(super) struct VmDrain {
    /// Its name.
    id: String,
}

impl JsonObject for VmDrain {
    const SHAPE: Shape = Shape::WHOLE;
}

impl Body for VmDrain {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::Drain { id: self.id }
    }
}

/// How large a disk is to be.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub(super) struct VmResizeDisk {
    /// Its name.
    id: String,
    /// Bytes that the guest is to have.
    desired_size: u64,
}

impl JsonObject for VmResizeDisk {
    const SHAPE: Shape = Shape::WHOLE;
}

impl Body for VmResizeDisk {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::ResizeDisk {
            id: self.id,
            bytes: self.desired_size,
        }
    }
}

/// How much the guest is to have. What is absent stays as it is.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = as_sent::<Self>)]
pub(super) struct VmResize {
    /// How many vCPUs.
    #[serde(rename = "desired_vcpus")]
    vcpus: Option<u32>,
    /// How much RAM, in bytes.
    #[serde(rename = "desired_ram")]
    ram: Option<u64>,
    /// How much the balloon takes, in bytes.
    #[serde(rename = "desired_balloon")]
    balloon: Option<u64>,
}

impl JsonObject for VmResize {
    const SHAPE: Shape = Shape::WHOLE;
}

impl Body for VmResize {
    fn request(self, _: Vec<OwnedFd>) -> Request {
        Request::Resize {
            vcpus: self.vcpus,
            ram: self.ram,
            balloon: self.balloon,
        }
    }
}
