//! Both ends of the socket.

pub(crate) mod frontend;
