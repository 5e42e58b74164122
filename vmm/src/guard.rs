//! `daxhund guard`: what holds removals of device-dax memory, seen from the command line.

use std::error::Error;
use std::path::Path;

use daxhund_guard::{Listing, UnknownPolicy};
use tracing::info;

use crate::cli::Guard;

/// Does what was asked. What there is to be printed comes back.
pub fn run(asked: Guard) -> Result<String, Box<dyn Error>> {
    match asked {
        Guard::List { socket, json } => list(&socket, json),
        Guard::Release { device, socket } => {
            daxhund_guard::release(&socket, &device)?;
            Ok(format!("{device} is free of users and of its driver"))
        }
        Guard::Serve => {
            info!("holding removals for the VMM that started this");
            daxhund_guard::serve_inherited(
                daxhund_guard::connection_of_helper()?,
                UnknownPolicy::default(),
            )?;
            Ok(String::new())
        }
    }
}

fn list(socket: &Path, json: bool) -> Result<String, Box<dyn Error>> {
    let listing = daxhund_guard::list(socket)?;
    if json {
        return Ok(serde_json::to_string_pretty(&listing)?);
    }
    Ok(table(&listing))
}

/// One line for each device and holder, then one for each who waits.
fn table(listing: &Listing) -> String {
    let mut lines = Vec::new();
    for held in &listing.held {
        lines.push(format!(
            "{:12}  held by {} (process {}, user {}): {}",
            held.device, held.name, held.pid, held.uid, held.state
        ));
    }
    for waiting in &listing.waiting {
        lines.push(format!(
            "{:12}  wanted by {} (process {}) through {}",
            waiting.devices.join(","),
            waiting.by.name,
            waiting.by.pid,
            waiting.by.file
        ));
    }
    if lines.is_empty() {
        lines.push("nothing is held".to_owned());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use daxhund_guard::{HeldDevice, Opener, WaitingOpener};

    use super::*;

    #[test]
    fn who_holds_and_who_waits_is_listed() {
        assert_eq!(table(&Listing::default()), "nothing is held");
        let listing = Listing {
            held: vec![HeldDevice {
                device: "dax1.0".to_owned(),
                name: "vm1".to_owned(),
                pid: 7,
                uid: 1000,
                state: "connected".to_owned(),
            }],
            waiting: vec![WaitingOpener {
                by: Opener {
                    pid: 9,
                    name: "daxctl".to_owned(),
                    file: "/sys/unbind".to_owned(),
                },
                devices: vec!["dax1.0".to_owned()],
            }],
        };
        assert_eq!(
            table(&listing),
            "dax1.0        held by vm1 (process 7, user 1000): connected\n\
             dax1.0        wanted by daxctl (process 9) through /sys/unbind"
        );
    }
}
