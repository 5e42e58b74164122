//! Both ends of the socket.

pub(crate) mod daemon;
pub(crate) mod frontend;
