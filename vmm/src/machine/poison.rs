//! What the machine does about poison in guest memory.
//!
//! ```text
//!   the handler of SIGBUS ──▶ mark + note ──▶ the owner: remembered, told (event)
//!                                               │ it is to be out
//!                                               ▼
//!     vCPUs held ──▶ KVM's slots made anew around it ──▶ vCPUs go on: an access there is an exit with its address
//! ```
//! vCPUs are held because between the old slot and the new ones the guest has no memory there: a load would be tried again,
//! a store would be lost. A vCPU whose guest touched the poison stands at the access and waits anyway
//! ([`super::vcpus`]); it is the first to get the machine check. What goes out, and when: [`crate::memory::poison`].
//!
//! What the host's kernel does (6.12 in the lab's stories; where it says "source", `mm/memory-failure.c` of 6.1 and 6.12):
//! - Device-dax, found by somebody else (`hard_offline_page`, a scrubber): `BUS_MCEERR_AO` to one thread of each process that
//!   asked for early notice and has the page in its page tables; the oldest such thread, which is the owner's (source). It is
//!   sent for each mapping, and only one arrives while it waits: it may name the mapping for this process or that for KVM.
//!   A page that nobody has touched yet is told to nobody (source).
//! - Device-dax, touched by a process on hardware that says so: `BUS_MCEERR_AR` on the thread that touched it, with the address
//!   of the entry's start (source; the lab has no such hardware). The next touch has the page again.
//! - Anonymous memory, found by somebody else: `BUS_MCEERR_AO`, and then, when a guest touches it, KVM sends
//!   `BUS_MCEERR_AR` for one page to the vCPU's thread.

use std::collections::BTreeSet;
use std::ops::Range;

use tracing::{error, warn};

use super::removal::User;
use super::vm::{PAUSE_DEADLINE, RunningVm};
use crate::memory::incidents::{Cause, Incident};
use crate::memory::layout::Gpa;
use crate::memory::region::Region;

/// Poison that was not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct News {
    /// The zone or the device.
    pub(super) id: String,
    /// Guest-physical addresses.
    pub(super) range: Range<u64>,
    /// Whether somebody has touched it.
    pub(super) touched: bool,
}

/// A poisoned part of a region, and what the notes say of it.
struct Part {
    range: Range<u64>,
    touched: bool,
    /// The page that was touched, where the kernel knows it.
    page: Option<Gpa>,
}

/// What is poisoned of a region: its mark knows all of it, the notes add to that.
fn parts(region: &Region, incidents: &[Incident]) -> Vec<Part> {
    let notes: Vec<(u64, u8, bool)> = incidents
        .iter()
        .filter_map(|incident| {
            let Cause::Poison { order, touched } = incident.cause else {
                return None;
            };
            Some((region.offset_of(incident.host_address)?, order, touched))
        })
        .collect();
    let poisoned = region.mark().poisoned().into_iter();
    let part = |Range { start, end }: Range<u64>| {
        let mut part = Part {
            range: region.gpa().0 + start..region.gpa().0 + end,
            touched: false,
            page: None,
        };
        for (offset, order, touched) in notes.iter().filter(|(at, ..)| (start..end).contains(at)) {
            part.touched |= touched;
            if *touched && *order == 12 {
                part.page = Some(Gpa(region.gpa().0 + offset));
            }
        }
        part
    };
    poisoned.map(part).collect()
}

impl RunningVm {
    /// Remembers poison, takes it out of the guest's reach where that is due, and says what is new.
    pub(super) fn on_poison(&mut self, incidents: &[Incident]) -> Vec<News> {
        let mut news = Vec::new();
        let mut due: Vec<(Gpa, Range<u64>)> = Vec::new();
        for region in self.ram.regions() {
            let Some((.., known)) = self.regions.at(region.gpa()) else {
                continue;
            };
            let user = &known.user;
            for Part {
                range,
                touched,
                page,
            } in parts(region, incidents)
            {
                let is_new = self.host.poison.insert(&range, page);
                let is_due = touched || matches!(user, User::Device(_));
                if is_due && !self.host.poison.is_all_out(range.clone()) {
                    due.push((region.gpa(), range.clone()));
                }
                if is_new {
                    warn!(
                        "{user}: guest memory {:#x}..{:#x} is poisoned; vm.info lists it, `dmesg` on the host tells why",
                        range.start, range.end
                    );
                    let id = user.id().to_owned();
                    news.push(News { id, range, touched });
                }
            }
        }
        if !due.is_empty() {
            self.take_out(&due);
        }
        news
    }

    /// Takes ranges out of the guest's reach, each with the region that it is in.
    fn take_out(&mut self, due: &[(Gpa, Range<u64>)]) {
        if self.machine.hold_vcpus(PAUSE_DEADLINE) {
            for (_, range) in due {
                self.host.poison.take_out(range);
            }
            let regions: BTreeSet<Gpa> = due.iter().map(|(gpa, _)| *gpa).collect();
            for gpa in regions {
                if let Err(error) = self.ram.renew(gpa) {
                    error!(error = %crate::chain(&error), "the guest may reach poisoned memory, or lack what is around it");
                }
            }
        } else {
            error!(
                "a vCPU does not leave the guest: poisoned memory stays in its reach until it is touched again"
            );
        }
        if !self.is_paused() {
            self.machine.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::mapping::{HostMapping, Source};
    use crate::memory::region::Mapping;

    const M: u64 = 1 << 20;

    #[test]
    fn what_the_kernel_named_is_a_part_and_a_page_only_if_it_named_a_page() {
        let source = Source::Anonymous {
            huge_bytes: None,
            thp: false,
        };
        let mapping = Mapping::Host(HostMapping::new(source, 16 * M, 4096).unwrap());
        let region = Region::new("z0", Gpa(64 * M), mapping).unwrap();
        let note = |offset, order, touched| Incident {
            host_address: region.host_address() + offset,
            cause: Cause::Poison { order, touched },
            vcpu: touched.then_some(0),
        };
        let elsewhere = Incident {
            host_address: region.host_address() - 4096,
            ..note(0, 12, true)
        };
        // What a mark knows was heard of once; the notes may be of before, or lost.
        region.mark().poison(2 * M, 21);
        region.mark().poison(6 * M, 21);
        region.mark().poison(9 * M, 12);
        let notes = [
            note(2 * M, 21, true),
            note(9 * M, 12, false),
            note(9 * M, 12, true),
            elsewhere,
        ];
        let parts = parts(&region, &notes);
        let found: Vec<_> = parts
            .into_iter()
            .map(|part| (part.range, part.touched, part.page))
            .collect();
        let expected = [
            (66 * M..68 * M, true, None),
            (70 * M..72 * M, false, None),
            (73 * M..73 * M + 4096, true, Some(Gpa(73 * M))),
        ];
        assert_eq!(found, expected);
        region.release().map_err(|failed| failed.1).unwrap();
    }
}
