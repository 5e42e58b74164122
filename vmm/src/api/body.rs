//! From the bytes of a body to a [`Request`]: the one place where a client's JSON is read.

use std::os::fd::OwnedFd;

use serde::Deserialize;

use super::request::{ApiError, ErrorKind, Request};
use crate::config::{JsonObject, Shape, from_json};

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

pub(super) fn create(received: Received<'_>) -> Result<Request, ApiError> {
    received.read().map(Box::new).map(Request::Create)
}

pub(super) fn add_pmem(received: Received<'_>) -> Result<Request, ApiError> {
    received.read().map(Box::new).map(Request::AddPmem)
}

pub(super) fn add_disk(received: Received<'_>) -> Result<Request, ApiError> {
    received.read().map(Box::new).map(Request::AddDisk)
}

pub(super) fn add_net(mut received: Received<'_>) -> Result<Request, ApiError> {
    let descriptors = std::mem::take(&mut received.descriptors);
    let config = received.read()?;
    Ok(Request::AddNet(Box::new(config), descriptors))
}

pub(super) fn add_fs(received: Received<'_>) -> Result<Request, ApiError> {
    received.read().map(Box::new).map(Request::AddFs)
}

pub(super) fn add_generic_vhost_user(received: Received<'_>) -> Result<Request, ApiError> {
    let config = received.read().map(Box::new);
    config.map(Request::AddGenericVhostUser)
}

pub(super) fn add_vsock(received: Received<'_>) -> Result<Request, ApiError> {
    received.read().map(Box::new).map(Request::AddVsock)
}

pub(super) fn add_device(received: Received<'_>) -> Result<Request, ApiError> {
    received.read().map(Box::new).map(Request::AddDevice)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    id: String,
}

impl JsonObject for Named {
    const SHAPE: Shape = Shape::WHOLE;
}

pub(super) fn remove_device(received: Received<'_>) -> Result<Request, ApiError> {
    let Named { id } = received.read()?;
    Ok(Request::RemoveDevice { id })
}

pub(super) fn drain(received: Received<'_>) -> Result<Request, ApiError> {
    let Named { id } = received.read()?;
    Ok(Request::Drain { id })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizeDisk {
    id: String,
    desired_size: u64,
}

impl JsonObject for ResizeDisk {
    const SHAPE: Shape = Shape::WHOLE;
}

pub(super) fn resize_disk(received: Received<'_>) -> Result<Request, ApiError> {
    let ResizeDisk { id, desired_size } = received.read()?;
    Ok(Request::ResizeDisk {
        id,
        bytes: desired_size,
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    #[serde(rename = "desired_vcpus")]
    vcpus: Option<u32>,
    #[serde(rename = "desired_ram")]
    ram: Option<u64>,
    #[serde(rename = "desired_balloon")]
    balloon: Option<u64>,
}

impl JsonObject for Resize {
    const SHAPE: Shape = Shape::WHOLE;
}

pub(super) fn resize(received: Received<'_>) -> Result<Request, ApiError> {
    let resize: Resize = received.read()?;
    Ok(Request::Resize {
        vcpus: resize.vcpus,
        ram: resize.ram,
        balloon: resize.balloon,
    })
}
