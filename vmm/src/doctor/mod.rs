//! `daxhund doctor`: whether this host can run guests on device-dax, and what to do when it can't.
//!
//! Each check gives rows of {check, status, found, mend}. A check looks and never changes anything: it reads sysfs
//! and procfs, opens `/dev/kvm`, and asks whether other device nodes could be opened without opening them. It runs
//! without privilege; what it is not allowed to see it says so.
//!
//! What the statuses mean:
//! - `FAIL`: no guest can start on device-dax until this is mended.
//! - `WARN`: something is off, unusable or slow, but a guest on device-dax can start without it: passthrough, huge
//!   entries, one of several devices.
//! - `OK`: as it should be.
//!
//! The command's exit status is 0 without a `FAIL`, else 1.
//!
//! Not here: no measuring, no mending, no look at a running guest.

#![forbid(unsafe_code)]

mod dax;
mod kvm;
mod limits;
mod passthrough;
mod pools;
mod removal;
mod report;
mod roots;
#[cfg(test)]
mod testing;

use std::io::{self, Write};

pub use report::{Row, Status, Verdict};
pub use roots::Roots;

use roots::{Live, ThisProcess};

/// What to print, and about which host.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Print JSON instead of a table.
    pub json: bool,
    /// Where the host's sysfs, procfs and device nodes are.
    pub roots: Roots,
}

/// Runs every check and prints the rows.
pub fn run(options: &Options, out: &mut impl Write) -> io::Result<Verdict> {
    let rows = examine(&options.roots, &ThisProcess);
    if options.json {
        report::write_json(&rows, out)?;
    } else {
        report::write_table(&rows, out)?;
    }
    out.flush()?;
    Ok(Verdict::of(&rows))
}

/// Every check, in the order of a guest's needs.
fn examine(roots: &Roots, live: &dyn Live) -> Vec<Row> {
    let mut rows = Vec::new();
    rows.extend(kvm::check(roots, live));
    rows.extend(dax::check(roots, live));
    rows.extend(pools::check(roots, live));
    rows.extend(limits::check(roots));
    rows.extend(passthrough::check(roots, live));
    rows.push(removal::check(roots, live));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::{FakeHost, FakeLive, row};

    #[test]
    fn a_healthy_host_has_only_ok_rows() {
        let host = FakeHost::healthy();
        let rows = examine(host.roots(), &FakeLive::allowing());
        let bad: Vec<_> = rows.iter().filter(|r| r.status != Status::Ok).collect();
        assert!(bad.is_empty(), "{bad:#?}");
        for check in [
            "kvm",
            "nested-paging",
            "dax",
            "dax0.0",
            "region0",
            "config",
            "numa",
            "memlock",
        ] {
            row(&rows, check);
        }
        for check in [
            "iommu",
            "interrupt-remapping",
            "vfio",
            "hugepages-2M",
            "thp",
            "removal-guard",
        ] {
            row(&rows, check);
        }
        assert_eq!(Verdict::of(&rows).exit_status(), 0);
    }

    #[test]
    fn an_empty_host_fails_without_crashing_and_every_complaint_has_a_mend() {
        let host = FakeHost::empty();
        let rows = examine(host.roots(), &FakeLive::allowing());
        for row in &rows {
            assert_eq!(row.status == Status::Ok, row.mend.is_none(), "{row:#?}");
        }
        assert_eq!(row(&rows, "kvm").status, Status::Fail);
        assert_eq!(row(&rows, "dax").status, Status::Fail);
        assert_eq!(Verdict::of(&rows).exit_status(), 1);
    }

    #[test]
    fn the_machine_this_runs_on_can_be_examined() {
        for json in [false, true] {
            let options = Options {
                json,
                ..Options::default()
            };
            let mut out = Vec::new();
            let verdict = run(&options, &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(text.contains("kvm") && text.contains("memlock"), "{text}");
            assert!([0, 1].contains(&verdict.exit_status()));
        }
    }
}
