//! How many reads a second a block device brings, with some of them under way at a time.
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

/// Which block is next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Order {
    /// Any.
    Random,
    /// The following one; the first again after the last.
    Sequential,
}

/// How a device is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reads {
    pub(crate) order: Order,
    /// Bytes of one read: a multiple of what direct I/O wants.
    pub(crate) block_bytes: usize,
    /// How many at once.
    pub(crate) depth: u32,
}

impl Reads {
    /// Single blocks anywhere.
    pub(crate) fn random(depth: u32) -> Self {
        Self {
            order: Order::Random,
            block_bytes: BLOCK_BYTES,
            depth,
        }
    }

    /// One large piece after the other.
    pub(crate) fn sequential(depth: u32, block_bytes: usize) -> Self {
        Self {
            order: Order::Sequential,
            block_bytes,
            depth,
        }
    }

    /// Reads for some time.
    pub(crate) fn measure(self, path: &str, seconds: u64) -> Result<RateReport, String> {
        if self.block_bytes == 0 || !self.block_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(format!(
                "{} is not a multiple of {BLOCK_BYTES}",
                self.block_bytes
            ));
        }
        let mut file = open_direct(path, false)?;
        let size = file.seek(SeekFrom::End(0));
        let size = size.map_err(|error| format!("cannot tell the size of {path}: {error}"))?;
        let blocks = size / self.block_bytes as u64;
        if blocks == 0 {
            return Err(format!("{path} is smaller than a block"));
        }
        let began = Instant::now();
        let reads = Reader::new(file, blocks, self).and_then(|mut reader| {
            reader.run_until(began + Duration::from_secs(seconds))?;
            Ok(reader.begun)
        });
        let operations = reads.map_err(|error| format!("cannot read {path}: {error}"))?;
        Ok(RateReport {
            operations,
            bytes: operations * self.block_bytes as u64,
            seconds: began.elapsed().as_secs_f64(),
        })
    }
}

struct Reader {
    file: File,
    blocks: u64,
    how: Reads,
    ring: IoUring,
    /// One for each read under way.
    buffers: Vec<Aligned>,
    begun: u64,
    under_way: usize,
}

impl Reader {
    fn new(file: File, blocks: u64, how: Reads) -> io::Result<Self> {
        Ok(Self {
            file,
            blocks,
            how,
            ring: IoUring::new(how.depth)?,
            buffers: (0..how.depth)
                .map(|_| Aligned::new(how.block_bytes))
                .collect(),
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
                    Ok(bytes) if bytes == self.how.block_bytes => {}
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
        let next = match self.how.order {
            Order::Random => pattern_word(self.begun, 0),
            Order::Sequential => self.begun,
        };
        let block = next % self.blocks;
        let bytes = self.buffers[buffer].slice(self.how.block_bytes);
        let length = u32::try_from(bytes.len()).expect("a block");
        let read = opcode::Read::new(types::Fd(self.file.as_raw_fd()), bytes.as_mut_ptr(), length)
            .offset(block * self.how.block_bytes as u64)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_whole_blocks() {
        for bytes in [0, 512, BLOCK_BYTES + 1] {
            let message = Reads::sequential(1, bytes).measure("/dev/null", 0);
            assert!(message.unwrap_err().contains("multiple of 4096"));
        }
    }
}
