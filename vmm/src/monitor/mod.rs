//! The event monitor: what happens to the guest. Names and form are Cloud Hypervisor's; how it is written, [`daxhund_monitor`] says.

#![forbid(unsafe_code)]

mod event;
mod table;

pub use daxhund_monitor::{EventMonitor, Form, Monitor, OpenError};
pub use event::Event;
pub use table::Row;
