//! A hostile frontend with a hostile guest: the daemon lives, the disk keeps its length, and nothing of a session is left behind.

#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use daxhund_dax::Host;
use daxhund_fuzz_support::frontend::{DATA, Frontend, NEXT, Part, SLOT, WRITE, memory};
use daxhund_fuzz_support::input::Input;
use daxhund_fuzz_support::{leaves_no_descriptor, session};
use daxhund_vhost_user_blk::backend::Backend;
use daxhund_vhost_user_blk::daemon::NOUNS;
use daxhund_vhost_user_blk::disk::{Disk, FileDisk};
use libfuzzer_sys::fuzz_target;

/// Queues that the daemon offers.
const QUEUES: u16 = 2;
const DISK_BYTES: u64 = 1 << 20;
/// MQ, REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 15;

/// One disk for all runs.
fn disk() -> &'static (Arc<dyn Disk>, File) {
    static DISK: OnceLock<(Arc<dyn Disk>, File)> = OnceLock::new();
    DISK.get_or_init(|| {
        let image = memory(DISK_BYTES);
        let path = format!("/proc/self/fd/{}", image.as_raw_fd());
        let disk = FileDisk::open(&Host::system(), path.as_ref(), false).expect("a disk");
        (Arc::new(disk), image)
    })
}

/// The guest's next request.
fn offer(frontend: &mut Frontend, queue: u16, input: &mut Input<'_>) {
    let kinds = [0u32, 1, 4, 8, 11, 13];
    let kind = kinds[usize::from(input.u8()) % kinds.len()];
    let sector = u64::from(input.u8()) * 9;
    let header = DATA + u64::from(frontend.next_head(queue)) * SLOT;
    let mut request = kind.to_le_bytes().to_vec();
    request.extend([0; 4]);
    request.extend(sector.to_le_bytes());
    // A range to discard or to zero.
    request.extend(sector.to_le_bytes());
    request.extend(u32::from(input.u8()).to_le_bytes());
    request.extend(u32::from(input.u8() % 4).to_le_bytes());
    frontend.store(header, &request);
    let part = |address, len, flags| Part {
        address,
        len,
        flags,
    };
    let data = u32::from(input.u8()) * 512;
    let writes = if kind == 1 { 0 } else { WRITE };
    let parts = [
        part(header, if kind > 10 { 32 } else { 16 }, NEXT),
        part(DATA * 2, data, NEXT | writes),
        part(header + SLOT - 1, 1, WRITE),
    ];
    frontend.offer(queue, &parts);
}

fn play(frontend: &mut Frontend, input: &mut Input<'_>) {
    while !input.is_empty() {
        let chosen = input.u8();
        let how = chosen >> 4;
        match chosen % 10 {
            0 => {
                let features = u64::from(input.u16()) | u64::from(input.u8() % 4) << 28;
                frontend.greet(PROTOCOL);
                frontend.accept(features);
            }
            7 => {
                let queue = u16::from(how) % QUEUES;
                offer(frontend, queue, input);
                frontend.kick(queue);
            }
            deed => frontend.act(deed, how, input),
        }
    }
}

/// One session from its beginning to its end.
fn run(data: &[u8]) {
    let backend = Backend::new(Arc::clone(&disk().0), QUEUES, Arc::default());
    let (session, stream) = session::connect(backend, NOUNS);
    let mut frontend = Frontend::new(stream, QUEUES);
    play(&mut frontend, &mut Input::new(data));
    session::end(session, &frontend);
}

/// A handshake and memory: what is there once for the whole process is there after it.
const FIRST: &[u8] = &[0, 0, 0, 0, 1];

fuzz_target!(|data: &[u8]| {
    leaves_no_descriptor(run, FIRST, data);
    assert_eq!(disk().1.metadata().expect("a memfd").len(), DISK_BYTES);
});
