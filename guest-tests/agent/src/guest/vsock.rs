//! Sockets between the guest and its host: address family `AF_VSOCK`, for which the standard library has no type.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketType, accept, bind, connect, listen, socket};

use crate::sockets;

/// The host's number.
const HOST: u32 = 2;
/// Whatever number this guest has.
const ANY: u32 = u32::MAX;
const FAMILY: u16 = 40;
const ADDRESS_BYTES: SocketAddrLen = 16;
const _: () = assert!(size_of::<Address>() == 16);

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

impl Address {
    fn new(cid: u32, port: u32) -> Self {
        Self {
            family: FAMILY,
            reserved: 0,
            port,
            cid,
            flags: 0,
            zero: [0; 3],
        }
    }
}

// SAFETY: the structure is the kernel's `sockaddr_vm`, initialised throughout and without padding, and it outlives the call.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(
        &self,
        call: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        call(std::ptr::from_ref(self).cast(), ADDRESS_BYTES)
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::VSOCK, SocketType::STREAM, None)?)
}

/// Echoes connections from the host for as long as this process lives.
pub(crate) fn serve_echo(port: u32) -> Result<(), String> {
    let open = || {
        let socket = stream_socket()?;
        bind(&socket, &Address::new(ANY, port))?;
        listen(&socket, 8)?;
        Ok::<_, io::Error>(socket)
    };
    let socket = open().map_err(|error| format!("cannot listen on vsock port {port}: {error}"))?;
    thread::spawn(move || {
        while let Ok(connection) = accept(&socket) {
            thread::spawn(move || {
                let stream = File::from(connection);
                sockets::echo(&mut &stream, &mut &stream)
            });
        }
    });
    Ok(())
}

/// Says a line to who listens on the host's port and gives the line that comes back.
pub(crate) fn ask(port: u32, text: &str) -> Result<String, String> {
    let talk = || {
        let socket = stream_socket()?;
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, direction, Some(sockets::SILENCE))?;
        }
        connect(&socket, &Address::new(HOST, port))?;
        sockets::ask(&mut File::from(socket), text)
    };
    talk().map_err(|error| format!("vsock port {port} of the host: {error}"))
}
