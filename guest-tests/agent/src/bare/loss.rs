//! The least that a VMM can do when device-dax memory goes away under a device: notice it, and unmap it.
//!
//! One thread does nothing but probe the memory; when there is none any more, it unmaps it for the device with one call. No
//! signs, no events, no other work: what a VMM's notice and its unmap are measured against.

use std::thread;
use std::time::Instant;

use daxhund_dax::Probe;
use lab_agent::pin_protocol::{BareAttach, Interface};
use lab_agent::removal_protocol::BareLoss;

use super::vfio::Range;
use super::{HOLE, nanoseconds, open_iommufd, open_type1};
use crate::removal::{give_back, map, remove};

/// Takes the device away from under itself, and gives it back.
pub(crate) fn run(
    path: &str,
    dax: &str,
    bytes: u64,
    interface: Interface,
) -> Result<BareLoss, String> {
    let mapping = map(dax).map_err(|error| error.to_string())?;
    let name = mapping.facts().name.to_string();
    let mut unused = BareAttach::default();
    let attached = match interface {
        Interface::Type1 => open_type1(path, &mut unused)?,
        Interface::Iommufd => open_iommufd(path, &mut unused)?,
    };
    let range = Range {
        iova: HOLE.end,
        host_address: mapping.as_ptr() as u64,
        bytes,
    };
    attached.space.map(range)?;

    let (noticed, unmap_ns, times) = thread::scope(|scope| {
        let remover = scope.spawn(|| remove(&name));
        while !matches!(mapping.probe(), Ok(Probe::Gone)) {
            if remover.is_finished() {
                return Err("the device went away and its memory is still there".to_owned());
            }
        }
        let noticed = Instant::now();
        let outcome = attached.space.unmap(range);
        let unmap_ns = nanoseconds(noticed);
        let times = remover.join().map_err(|_| "the remover panicked")?;
        outcome?;
        Ok((noticed, unmap_ns, times))
    })?;
    let (_, written, returned) = times.map_err(|error| format!("{name}: {error}"))?;
    drop(attached);
    drop(mapping);
    give_back(&name).map_err(|error| format!("{name} does not come back: {error}"))?;
    let after = |time: Instant| {
        let since = time.saturating_duration_since(written);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    };
    Ok(BareLoss {
        noticed_ns: after(noticed),
        unmap_ns,
        returned_ns: after(returned),
    })
}
