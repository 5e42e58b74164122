//! Both ends of the socket.

// The lab drives daemons on its emulated host with it, too (`lab-agent disk`).
pub(crate) mod frontend;
