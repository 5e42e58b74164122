//! How fast memory is copied: within the guest's RAM, and between RAM and a file, by mapping or by direct I/O.
//!
//! One pass over everything comes first and is not counted: it brings the pages in.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use lab_agent::guest_protocol::RateReport;

use super::block::{Aligned, open_direct};
use crate::memory::Words;

/// Bytes of one direct I/O.
const DIRECT_BYTES: usize = 1 << 20;

/// Copies `bytes` again and again for some time. `what` says from where to where.
pub(crate) fn measure(
    what: &str,
    path: &str,
    bytes: u64,
    seconds: u64,
) -> Result<RateReport, String> {
    let length = usize::try_from(bytes).map_err(|_| "too long")?;
    match what {
        "ram" => {
            let from = filled(length)?;
            let mut to = Words::anonymous(length)?;
            repeat(bytes, seconds, || {
                from.copy_to(&mut to);
                Ok(())
            })
        }
        "map-write" => {
            let from = filled(length)?;
            let mut to = Words::of_device(path, length)?;
            repeat(bytes, seconds, || {
                from.copy_to(&mut to);
                Ok(())
            })
        }
        "map-read" => {
            let from = Words::of_device(path, length)?;
            let mut to = Words::anonymous(length)?;
            repeat(bytes, seconds, || {
                from.copy_to(&mut to);
                Ok(())
            })
        }
        "direct-write" | "direct-read" => {
            let file = open_direct(path, what == "direct-write")?;
            let mut buffer = Aligned::new(DIRECT_BYTES);
            let failed = |error| format!("direct I/O on {path}: {error}");
            repeat(bytes, seconds, || {
                let mut at = 0;
                while at < bytes {
                    let chunk = buffer.slice(DIRECT_BYTES.min(length));
                    if what == "direct-write" {
                        file.write_all_at(chunk, at).map_err(failed)?;
                    } else {
                        file.read_exact_at(chunk, at).map_err(failed)?;
                    }
                    at += chunk.len() as u64;
                }
                Ok(())
            })
        }
        other => Err(format!(
            "not one of ram, map-write, map-read, direct-write, direct-read: {other}"
        )),
    }
}

fn filled(bytes: usize) -> Result<Words, String> {
    let mut words = Words::anonymous(bytes)?;
    for index in 0..words.len() {
        words.set(index, index as u64);
    }
    Ok(words)
}

fn repeat(
    bytes: u64,
    seconds: u64,
    mut pass: impl FnMut() -> Result<(), String>,
) -> Result<RateReport, String> {
    pass()?;
    let began = Instant::now();
    let end = began + Duration::from_secs(seconds);
    let mut operations = 0;
    loop {
        pass()?;
        operations += 1;
        if Instant::now() >= end {
            return Ok(RateReport {
                operations,
                bytes: operations * bytes,
                seconds: began.elapsed().as_secs_f64(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_least_one_pass_is_counted() {
        let report = measure("ram", "-", 8192, 0).unwrap();
        assert_eq!((report.operations, report.bytes), (1, 8192));
        assert!(measure("tape", "-", 8192, 0).unwrap_err().contains("tape"));
    }
}
