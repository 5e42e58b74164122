//! From the start of a VMM to its guest's first instruction, with a device that it has from the start: daxhund's and its peers'.

use super::super::boot::{BenchError, Results, compare};
use super::super::peer::{Vmm, Workload};
use super::super::trace::Tracer;
use crate::cli::Peer;
use crate::guest::GuestSpec;
use crate::host::Host;
use crate::host::cards::Card;
use crate::setup::Setup;
use crate::share::{ImageForm, Initramfs, initramfs_path, kernel_path};

/// RAM of the guests, all of it device-dax.
const SIZES_MIB: [u64; 2] = [1024, 4096];

/// One comparison for each size; none without peers.
pub(super) fn run(
    setup: &Setup,
    host: &Host,
    peers: &[Peer],
    repeat: u32,
) -> Result<Vec<Results>, BenchError> {
    if peers.is_empty() {
        return Ok(Vec::new());
    }
    let mut vmms = vec![Vmm::daxhund()];
    for peer in peers {
        vmms.push(Vmm::peer(peer, &setup.share())?);
    }
    let release = &setup.kernel().release;
    let dax = host.dax().first().ok_or(BenchError::NoDax)?;
    let failed = |error| BenchError::measure("nothing yet", host, error);
    let tracer = Tracer::prepare(host).map_err(|error| failed(error.into()))?;
    let device = host
        .bind_vfio(Card::Disk)
        .map_err(|error| failed(error.into()))?;
    let of_size = |memory_mib| {
        let work = Workload {
            kernel: kernel_path(release, ImageForm::BzImage),
            initramfs: initramfs_path(release, Initramfs::Plain),
            cmdline: GuestSpec::new(release, &[]).whole_cmdline(),
            dax: dax.path.clone(),
            memory_mib,
            devices: vec![device.path()],
        };
        compare(&tracer, release, &vmms, &work, repeat)
    };
    SIZES_MIB.into_iter().map(of_size).collect()
}
