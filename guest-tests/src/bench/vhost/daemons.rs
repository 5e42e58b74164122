//! Two daemons that serve a disk of the same size each, and a file for the VMM's own.

use std::time::Duration;

use super::DISK_BYTES;
use crate::bench::boot::MeasureError;
use crate::host::Host;
use crate::host::channel::HostError;
use crate::host::process::Process;
use crate::{served, wait};

/// From the storage daemon's start until it listens.
const LISTENING: Duration = Duration::from_secs(30);

/// A daemon and its socket.
pub(super) struct Daemon {
    pub(super) process: Process,
    pub(super) socket: String,
}

/// All of them; they end when this is dropped.
pub(super) struct Daemons {
    pub(super) dax: Daemon,
    pub(super) storage: Daemon,
    /// As long, on the same file system as the storage daemon's.
    pub(super) file: String,
}

impl Daemons {
    pub(super) fn start(host: &Host, dax: &str) -> Result<Self, MeasureError> {
        let [served, own] = ["served", "own"].map(|name| format!("/tmp/bench-{name}"));
        let [dax_socket, storage_socket] =
            ["dax", "storage"].map(|name| format!("/tmp/bench-{name}.sock"));
        for file in [&served, &own] {
            let size = DISK_BYTES >> 20;
            host.sh(&format!("dd if=/dev/zero of={file} bs=1M count={size}"))?;
        }
        let disk = format!("{dax},size={DISK_BYTES}");
        let process = served::serve_dax(host, &dax_socket, &disk, &[])?;
        let dax = Daemon {
            process,
            socket: dax_socket,
        };
        let pid_file = "/tmp/bench-storage.pid";
        let spec = served::storage_daemon(&served, &storage_socket, pid_file, 1);
        let process = host.spawn(spec)?;
        let listens = || Ok::<_, HostError>(process.has_ended() || host.exists(pid_file)?);
        wait::until(LISTENING, listens, || HostError::Refused {
            what: "starting the storage daemon".to_owned(),
            message: process.stderr(),
        })?;
        let storage = Daemon {
            process,
            socket: storage_socket,
        };
        Ok(Self {
            dax,
            storage,
            file: own,
        })
    }
}
