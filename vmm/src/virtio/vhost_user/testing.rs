//! A whole conversation with a backend that has said all that it will say before it is asked: nothing waits. For fuzzing.

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::blk::DISK;
use super::class::{Config, Shape};
use super::connection::Connection;
use super::table::{SharedRegion, Table};
use crate::memory::mapping::memfd;
use crate::virtio::queue::Ring;

/// Of each of the two regions.
const REGION: u64 = 2 << 20;
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 64;

/// Everything that a frontend asks of a backend, once, as far as it answers.
pub fn converse(stream: UnixStream) -> Result<(), Box<dyn Error>> {
    let mut connection = Connection::open(stream, Path::new("fuzz"), &DISK, QUEUES)?;
    let config = std::mem::take(&mut connection.config);
    let Config::Backend { bytes, .. } = DISK.config else {
        unreachable!("a disk's configuration space is its backend's");
    };
    assert_eq!(config.len(), bytes as usize, "what the guest is shown");
    DISK.config(config, &Shape::even(QUEUES, QUEUE_SIZE));

    let file = Arc::new(memfd(2 * REGION, None)?);
    let region = |number: u64| SharedRegion {
        gpa: number << 32,
        size: REGION,
        host_address: 0x7000_0000_0000 + (number << 32),
        file: Arc::clone(&file),
        offset: number * REGION,
    };
    let mut table = Table::default();
    for number in 0..2 {
        connection.fits(table.len() + 1)?;
        let region = [region(number)];
        table.add(&region);
        connection.add(&table, &region)?;
    }
    let rings = (0..QUEUES).map(ring).collect::<Result<Vec<_>, _>>()?;
    let inflight = connection.new_inflight(&rings)?;
    let based: Vec<_> = rings.iter().map(|ring| (ring, 0)).collect();
    let features = connection.features & DISK.features;
    connection.start(features, &table, (&based, 1), inflight.as_ref())?;
    connection.change_used(&rings, 1, QUEUES)?;
    connection.stop(&rings)?;
    while let Some(gpa) = table.regions().first().map(|region| region.gpa) {
        if let Some(region) = table.take(gpa) {
            connection.remove(&table, &region)?;
        }
    }
    Ok(())
}

fn ring(index: u16) -> std::io::Result<Ring> {
    let at = u64::from(index) << 16;
    let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
    Ok(Ring {
        index,
        size: QUEUE_SIZE,
        descriptors: at,
        available: at + 0x4000,
        used: at + 0x8000,
        kick: event()?,
        call: event()?,
    })
}
