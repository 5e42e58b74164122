//! A network of the emulated host and one guest: a tap that the VMM makes, two addresses, a server for transfers.

use std::time::Duration;

use lab_agent::host_protocol::SpawnSpec;

use super::{Guest, GuestError};
use crate::host::Host;
use crate::host::channel::HostError;
use crate::host::process::Process;
use crate::wait::PATIENCE;

/// The host's address on the tap.
pub const HOST_ADDRESS: &str = "192.168.77.1";
/// The guest's.
pub const GUEST_ADDRESS: &str = "192.168.77.2";
/// Where the transfer server listens.
pub const SERVER: &str = "192.168.77.1:5201";
/// Requests, 3 s apart, until there is no lease to be had: a link needs a moment to come up.
const LEASE_TRIES: u32 = 10;
/// Makes the program that udhcpc calls with what it was given.
const LEASE_SCRIPT: &str = r#"printf '#!/bin/sh\n[ "$1" = bound ] || exit 0\nip addr flush dev $interface\nip addr add $ip/24 dev $interface\necho $ip > /tmp/leased\n' > /tmp/lease"#;
const SERVING_DEADLINE: Duration = PATIENCE;

/// The value of `--net` for a tap that the VMM makes and gives the host's address; `more` is added.
pub fn tap_word(tap: &str, more: &str) -> String {
    format!("tap={tap},ip={HOST_ADDRESS},mask=255.255.255.0{more}")
}

/// Starts the transfer server on the host; it ends when it is dropped.
pub fn serve(host: &Host) -> Result<Process, HostError> {
    let argv = ["lab-agent", "tcp-serve", SERVER];
    let mut server = host.spawn(SpawnSpec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        ..SpawnSpec::default()
    })?;
    server.wait_for("serving", SERVING_DEADLINE)?;
    Ok(server)
}

impl Guest {
    /// Gives an interface of the guest its address and sees that the host answers.
    pub fn bring_up(&mut self, interface: &str) -> Result<(), GuestError> {
        self.await_path(&format!("/sys/class/net/{interface}"))?;
        self.sh(&format!(
            "ip addr add {GUEST_ADDRESS}/24 dev {interface} && ip link set {interface} up && ip link set lo up"
        ))?;
        self.sh(&format!("ping -c 2 -w 20 {HOST_ADDRESS}"))?;
        Ok(())
    }

    /// Gets an address for an interface by DHCP; gives the address.
    pub fn lease(&mut self, interface: &str) -> Result<String, GuestError> {
        self.await_path(&format!("/sys/class/net/{interface}"))?;
        self.sh(LEASE_SCRIPT)?;
        self.sh(&format!(
            "chmod +x /tmp/lease && ip link set {interface} up && udhcpc -i {interface} -f -q -n -t {LEASE_TRIES} -s /tmp/lease"
        ))?;
        Ok(self.cat("/tmp/leased")?.trim().to_owned())
    }
}
