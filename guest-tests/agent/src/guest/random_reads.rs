//! How many small reads a second a block device brings, with some of them under way at a time.
//!
//! By `io_uring` and one thread: those that come together are followed by as many in one call, as programs do that want
//! much of a disk. A thread for each would measure how fast the guest changes from one to the next.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use lab_agent::guest_protocol::{RateReport, pattern_word};

use super::block::{Aligned, BLOCK_BYTES, open_direct};

/// Reads blocks at random places for some time, `depth` at once.
pub(crate) fn random_reads(path: &str, seconds: u64, depth: u32) -> Result<RateReport, String> {
    let mut file = open_direct(path, false)?;
    let size = file.seek(SeekFrom::End(0));
    let size = size.map_err(|error| format!("cannot tell the size of {path}: {error}"))?;
    let blocks = size / BLOCK_BYTES as u64;
    if blocks == 0 {
        return Err(format!("{path} is smaller than a block"));
    }
    let began = Instant::now();
    let reads = Reader::new(file, blocks, depth).and_then(|mut reader| {
        reader.run_until(began + Duration::from_secs(seconds))?;
        Ok(reader.begun)
    });
    let operations = reads.map_err(|error| format!("cannot read {path}: {error}"))?;
    Ok(RateReport {
        operations,
        bytes: operations * BLOCK_BYTES as u64,
        seconds: began.elapsed().as_secs_f64(),
    })
}

struct Reader {
    file: File,
    blocks: u64,
    ring: IoUring,
    /// One for each read under way.
    buffers: Vec<Aligned>,
    begun: u64,
    under_way: usize,
}

impl Reader {
    fn new(file: File, blocks: u64, depth: u32) -> io::Result<Self> {
        Ok(Self {
            file,
            blocks,
            ring: IoUring::new(depth)?,
            buffers: (0..depth).map(|_| Aligned::new(BLOCK_BYTES)).collect(),
            begun: 0,
            under_way: 0,
        })
    }

    fn run_until(&mut self, end: Instant) -> io::Result<()> {
        for buffer in 0..self.buffers.len() {
            self.begin(buffer)?;
        }
        while self.under_way > 0 {
            self.ring.submit_and_wait(1)?;
            let done: Vec<_> = self.ring.completion().collect();
            for read in done {
                self.under_way -= 1;
                match usize::try_from(read.result()) {
                    Ok(BLOCK_BYTES) => {}
                    Ok(short) => return Err(io::Error::other(format!("{short} bytes only"))),
                    Err(_) => return Err(io::Error::from_raw_os_error(-read.result())),
                }
                if Instant::now() < end {
                    let buffer = usize::try_from(read.user_data()).expect("an index");
                    self.begin(buffer)?;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, buffer: usize) -> io::Result<()> {
        let block = pattern_word(self.begun, 0) % self.blocks;
        let bytes = self.buffers[buffer].slice(BLOCK_BYTES);
        let length = u32::try_from(bytes.len()).expect("a block");
        let read = opcode::Read::new(types::Fd(self.file.as_raw_fd()), bytes.as_mut_ptr(), length)
            .offset(block * BLOCK_BYTES as u64)
            .build()
            .user_data(buffer as u64);
        // SAFETY: the file and the buffer are this reader's; nobody else touches the buffer until the read is done, and
        // dropping the reader leaves it in place while there are reads under way.
        unsafe { self.ring.submission().push(&read) }.map_err(io::Error::other)?;
        self.begun += 1;
        self.under_way += 1;
        Ok(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if self.under_way > 0 {
            // After an error. The kernel may still write to them.
            std::mem::forget(std::mem::take(&mut self.buffers));
        }
    }
}
