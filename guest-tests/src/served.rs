//! Daemons on the emulated host that serve a disk over vhost-user: ours on device-dax, and QEMU's storage daemon on a file.

use std::time::Duration;

use lab_agent::host_protocol::SpawnSpec;

use crate::host::Host;
use crate::host::channel::HostError;
use crate::host::process::Process;

/// Our daemon.
pub const DAEMON: &str = "daxhund-vhost-user-blk";
/// From a daemon's start until it listens.
const LISTENING: Duration = Duration::from_secs(30);
/// Where the storage daemon and its libraries are on the host.
const STORAGE_DAEMON: &str = "/lab/peers/storage-daemon";

/// Starts our daemon at a socket, on `DEVICE[,offset=..][,size=..]`; it listens when this returns.
pub fn serve_dax(
    host: &Host,
    socket: &str,
    disk: &str,
    more: &[&str],
) -> Result<Process, HostError> {
    let words = [DAEMON, "--socket-path", socket, "--dax", disk];
    let daemon = host.spawn(SpawnSpec {
        argv: words.iter().chain(more).map(|&word| word.into()).collect(),
        ..SpawnSpec::default()
    })?;
    daemon.wait_for_error("listening", LISTENING)?;
    Ok(daemon)
}

/// How QEMU's storage daemon is started on a file. It listens as soon as `pid_file` is there.
pub fn storage_daemon(file: &str, socket: &str, pid_file: &str, queues: u16) -> SpawnSpec {
    let argv = [
        format!("{STORAGE_DAEMON}/qemu-storage-daemon"),
        "--blockdev".to_owned(),
        format!("driver=file,node-name=f,filename={file}"),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on,num-queues={queues}"
        ),
        "--pidfile".to_owned(),
        pid_file.to_owned(),
    ];
    SpawnSpec {
        argv: argv.into(),
        env: vec![(
            "LD_LIBRARY_PATH".to_owned(),
            format!("{STORAGE_DAEMON}/lib"),
        )],
        ..SpawnSpec::default()
    }
}
