//! A hostile driver of the balloon: the device lives, what is asked to be discarded adds up, and nothing that has to
//! stay is touched.

#![no_main]

mod moves;

use std::sync::Arc;

use daxhund::memory::discard::{Discard, DiscardTable, Discarded};
use daxhund::memory::layout::Gpa;
use daxhund::memory::mapping::{HostMapping, Source, memfd};
use daxhund::memory::ram::Ram;
use daxhund::memory::region::{Mapping, Region};
use daxhund::virtio::balloon::{BalloonDevice, BalloonSpec};
use libfuzzer_sys::fuzz_target;
use moves::Moves;

const SIZE: u64 = 1 << 20;

/// Looks at every answer of the table.
struct Checked(Arc<DiscardTable>);

impl Discard for Checked {
    fn discard(&self, gpa: u64, len: u64) -> Discarded {
        let told = self.0.discard(gpa, len);
        assert_eq!(told.done + told.kept + told.outside, len);
        assert_eq!(told.done % 4096, 0);
        told
    }
}

fn region(gpa: u64, source: Source) -> Region {
    let mapping = Mapping::Host(HostMapping::new(source, SIZE, 4096).expect("memory"));
    Region::new("fuzz", Gpa(gpa), mapping)
        .map_err(|(_, e)| e)
        .expect("a region")
}

fuzz_target!(|data: &[u8]| {
    let table = DiscardTable::new();
    let mut ram = Ram::new(vec![table.consumer()]);
    let anonymous = Source::Anonymous {
        huge_bytes: None,
        thp: false,
    };
    let shared = Source::File {
        file: Arc::new(memfd(SIZE, None).expect("a memfd")),
        offset: 0,
        shared: true,
    };
    ram.attach(region(0, anonymous))
        .expect("no consumer refuses");
    ram.attach(region(4 * SIZE, shared))
        .expect("no consumer refuses");
    let spec = BalloonSpec {
        id: "fuzz".to_owned(),
        size: 0,
        deflate_on_oom: true,
        free_page_reporting: true,
    };
    let discard = Arc::new(Checked(Arc::clone(&table)));
    let device = BalloonDevice::new(spec, discard).expect("a size");
    let mut forbidden = None;
    Moves::new(data).play(&device, |moves| {
        forbidden = match forbidden.take() {
            Some(_) => None,
            None if moves.u8() % 8 == 0 => Some(table.forbid()),
            None => {
                let _ = device.resize(u64::from(moves.u16()) << (moves.u8() % 40));
                None
            }
        };
    });
});
