//! One guest on device-dax memory, with its console shown and its cost told.

use std::io::{self, Write};

use comfy_table::Table;
use comfy_table::presets::ASCII_BORDERS_ONLY_CONDENSED;

use crate::bench::boot::{BootCost, MeasureError, measure};
use crate::bench::statistics::figure;
use crate::bench::trace::Tracer;
use crate::guest::{Guest, GuestError, GuestSpec, LEAVE_DEADLINE, READY_DEADLINE};
use crate::host::channel::HostError;
use crate::host::figures::MappedPages;
use crate::host::machine::Machine;
use crate::host::{DaxDevice, Host};
use crate::progress::note;
use crate::setup::{Setup, StartError};

const MEMORY_MIB: u64 = 1024;
const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// A demonstration that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// No host.
    #[error(transparent)]
    Start(#[from] StartError),
    /// No DAX device.
    #[error("the emulated host has no device-dax device")]
    NoDax,
    /// The guest.
    #[error("the guest did not come up\n{evidence}")]
    Guest {
        /// Console and program output.
        evidence: String,
        /// What failed.
        source: MeasureError,
    },
    /// The guest's end.
    #[error("the guest was powered off, but the VMM ended with {status}")]
    Status {
        /// How it ended.
        status: String,
    },
}

/// Boots a host and a guest, shows the guest's console, and prints the closing table.
pub fn run(setup: &Setup) -> Result<(), DemoError> {
    let kernel = setup.kernel();
    let host = setup.boot(kernel, Machine::default())?;
    let dax = host.dax().first().ok_or(DemoError::NoDax)?;
    let zone = format!("id=z0,size={MEMORY_MIB}M,file={}", dax.path);
    let mut spec = GuestSpec::new(&kernel.release, &["--memory-zone", &zone]);
    spec.verbose = true;
    note(&format!("on the emulated host: {}", spec.argv().join(" ")));
    host.forget_programs();
    let failed = |source| DemoError::Guest {
        evidence: host.evidence(),
        source,
    };
    let tracer = Tracer::prepare(&host).map_err(|error| failed(error.into()))?;
    let (guest, cost) = measure(&tracer, |host| show_console(host, &spec)).map_err(failed)?;
    let status = guest.power_off().map_err(|error| failed(error.into()))?;
    if !status.success() {
        return Err(DemoError::Status {
            status: status.to_string(),
        });
    }
    println!("\n{}", table(&host, dax, &cost));
    println!(
        "Times are those of an emulated host on an emulated processor; `cargo lab bench boot` compares."
    );
    Ok(())
}

/// Starts the guest and passes its console on until its agent answers.
fn show_console(host: &Host, spec: &GuestSpec) -> Result<Guest, GuestError> {
    let mut guest = Guest::launch(host, spec)?;
    let mut shown = 0;
    let ready = lab_agent::guest_protocol::READY_MARK;
    while !guest.console().contains(ready) {
        let Some(new) = guest.vmm().output_after(shown, READY_DEADLINE)? else {
            let status = guest.vmm().wait(LEAVE_DEADLINE)?;
            return Err(HostError::Ended {
                what: "waiting for the guest".to_owned(),
                status,
            }
            .into());
        };
        shown += new.len();
        let mut out = io::stdout().lock();
        if out.write_all(&new).and_then(|()| out.flush()).is_err() {
            // Whoever watched has gone; the demonstration goes on.
            break;
        }
    }
    println!();
    Ok(guest)
}

fn table(host: &Host, dax: &DaxDevice, cost: &BootCost) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_BORDERS_ONLY_CONDENSED);
    let source = format!(
        "{MEMORY_MIB} MiB of {} (device-dax, {:.1} GiB, aligned to {} MiB)",
        dax.path,
        figure(dax.size_bytes) / GIB,
        dax.align_bytes >> 20
    );
    table.add_row(["RAM source".to_owned(), source]);
    table.add_row(["Mapping size".to_owned(), mapping(cost.mapped)]);
    let millis = figure(cost.first_instruction_us) / 1e3;
    table.add_row([
        "Time to first guest instruction".to_owned(),
        format!("{millis:.1} ms"),
    ]);
    let seconds = figure(cost.user_space_us) / 1e6;
    table.add_row([
        "Time to init".to_owned(),
        format!("{seconds:.2} s, with the console shown"),
    ]);
    let private = figure(cost.rss_anon_bytes) / MIB;
    table.add_row([
        "VMM memory overhead".to_owned(),
        format!("{private:.2} MiB private (RssAnon)"),
    ]);
    table.add_row([
        "Host".to_owned(),
        format!(
            "Linux {}, real KVM, emulated hardware",
            host.hello().release
        ),
    ]);
    table
}

fn mapping(pages: MappedPages) -> String {
    let MappedPages {
        pages_4k,
        pages_2m,
        pages_1g,
    } = pages;
    let sizes = [("1G", pages_1g), ("2M", pages_2m), ("4K", pages_4k)];
    let used = sizes
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(size, count)| format!("{count} x {size}"));
    let text = used.collect::<Vec<_>>().join(", ");
    if text.is_empty() {
        "nothing mapped".to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sizes_in_use_are_told() {
        let pages = MappedPages {
            pages_4k: 3,
            pages_2m: 512,
            pages_1g: 0,
        };
        assert_eq!(mapping(pages), "512 x 2M, 3 x 4K");
        assert_eq!(mapping(MappedPages::default()), "nothing mapped");
    }
}
