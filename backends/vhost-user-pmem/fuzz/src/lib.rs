//! What a frontend of this daemon has besides its connection, and what the host does meanwhile.

pub mod channel;
pub mod requests;
