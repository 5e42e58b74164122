//! Checks the guest's memory as memtest does: fill with a pattern, read it back, for several patterns.
//!
//! Each pattern word depends on the word's index, so that two guest addresses that reach the same host memory show up,
//! and all of the memory is filled before any is read back. What the kernel itself occupies is not covered: for that,
//! boot with `memtest=N`. Pages whose place the kernel does not tell count as below 4 GiB.

use std::fs::File;
use std::os::unix::fs::FileExt;

use lab_agent::guest_protocol::{PatternReport, WrongWord, pattern_word};

use super::page_map::{FRAME_MASK, physical_address};
use crate::memory::Words;

const PAGE_BYTES: usize = 4096;
const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Wrong words that are reported one by one.
const EXAMPLES: usize = 8;
const FOUR_GIB: u64 = 1 << 32;

/// The word that a pass writes at an index.
type Pattern = fn(u64) -> u64;

/// Index-dependent words, their complement, and a single bit that walks.
const PASSES: [Pattern; 3] = [
    |index| pattern_word(index, 0),
    |index| !pattern_word(index, 0),
    |index| 1 << (index % 64),
];

/// Fills and verifies `bytes` of memory in every pass.
pub(crate) fn check(bytes: u64) -> Result<PatternReport, String> {
    let bytes = usize::try_from(bytes).map_err(|_| "too long")? / PAGE_BYTES * PAGE_BYTES;
    if bytes == 0 {
        return Err("nothing to check: less than a page is free".to_owned());
    }
    let mut words = Words::anonymous(bytes)?;
    let mut report = PatternReport {
        checked_bytes: bytes as u64,
        low_bytes: 0,
        high_bytes: 0,
        passes: 0,
        wrong_words: 0,
        examples: Vec::new(),
    };
    for pattern in PASSES {
        for index in 0..words.len() {
            words.set(index, pattern(index as u64));
        }
        verify(&words, pattern, &mut report);
        report.passes += 1;
    }
    locate(&words, &mut report)?;
    Ok(report)
}

fn verify(words: &Words, pattern: Pattern, report: &mut PatternReport) {
    for index in 0..words.len() {
        let (expected, found) = (pattern(index as u64), words.get(index));
        if expected != found {
            report.wrong_words += 1;
            if report.examples.len() < EXAMPLES {
                let physical = physical_address(words.address(index));
                report.examples.push(WrongWord {
                    physical,
                    expected,
                    found,
                });
            }
        }
    }
}

/// Counts how much of the memory lies on either side of 4 GiB.
fn locate(words: &Words, report: &mut PatternReport) -> Result<(), String> {
    let map = File::open("/proc/self/pagemap")
        .map_err(|error| format!("cannot open /proc/self/pagemap: {error}"))?;
    let first_page = words.address(0) / PAGE_BYTES;
    let pages = words.len() / PAGE_WORDS;
    let mut entries = vec![0; 8 * 4096];
    let mut done = 0;
    while done < pages {
        let count = (pages - done).min(4096);
        let chunk = &mut entries[..count * 8];
        map.read_exact_at(chunk, ((first_page + done) * 8) as u64)
            .map_err(|error| format!("cannot read /proc/self/pagemap: {error}"))?;
        for entry in chunk.chunks_exact(8) {
            let entry = entry.try_into().map(u64::from_ne_bytes).unwrap_or_default();
            if (entry & FRAME_MASK) * PAGE_BYTES as u64 >= FOUR_GIB {
                report.high_bytes += PAGE_BYTES as u64;
            } else {
                report.low_bytes += PAGE_BYTES as u64;
            }
        }
        done += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_memory_passes() {
        let report = check(3 * 1024 * 1024 + 5).unwrap();
        assert_eq!(report.checked_bytes, 3 * 1024 * 1024);
        assert_eq!(report.low_bytes + report.high_bytes, report.checked_bytes);
        assert_eq!((report.passes, report.wrong_words), (3, 0));
    }

    #[test]
    fn two_places_that_share_memory_are_found() {
        // What a wrong memory map does: the second half is the first half again.
        let mut words = Words::anonymous(2 * PAGE_BYTES).unwrap();
        for index in 0..words.len() {
            words.set(index, PASSES[0]((index % PAGE_WORDS) as u64));
        }
        let mut report = PatternReport {
            checked_bytes: 0,
            low_bytes: 0,
            high_bytes: 0,
            passes: 0,
            wrong_words: 0,
            examples: Vec::new(),
        };
        verify(&words, PASSES[0], &mut report);
        assert_eq!(report.wrong_words, PAGE_WORDS as u64);
        assert_eq!(report.examples.len(), EXAMPLES);
    }

    #[test]
    fn less_than_a_page_is_refused() {
        assert!(check(100).unwrap_err().contains("nothing to check"));
    }
}
