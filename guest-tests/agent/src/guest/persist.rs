//! Records that are acknowledged one by one as they become durable, and the search for them after the machine's death.
//!
//! Every byte of a record follows from the seed and the record's number, so the search compares all of them. An
//! acknowledgement is a line of its own on the console, printed after the kernel has said that the record is durable; it is
//! the only promise: whoever kills the machine looks which lines came out whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use lab_agent::guest_protocol::{ACKNOWLEDGED_MARK, PersistReport, pattern_word};

use crate::memory::Words;

const RECORD_WORDS: usize = 128;
const RECORD_BYTES: usize = RECORD_WORDS * 8;

/// How records get to the medium.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum How {
    /// Appended by `write`, each followed by `fdatasync`: the file's size is part of the promise.
    Append,
    /// Stored into a mapping of a file that has its blocks already, each followed by `msync`.
    Map,
}

impl How {
    pub(crate) fn parse(word: &str) -> Result<Self, String> {
        match word {
            "append" => Ok(Self::Append),
            "map" => Ok(Self::Map),
            other => Err(format!(
                "records are written by `append` or `map`, not by `{other}`"
            )),
        }
    }
}

/// Writes `count` records and says of each when it is durable; nobody expects it to get to the end.
pub(crate) fn write(
    path: &str,
    seed: u64,
    how: How,
    count: u64,
    mut durable: impl FnMut(u64) -> Result<(), String>,
) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("cannot {what} {path}: {error}");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(|error| failed("create", error))?;
    match how {
        How::Append => {
            for index in 0..count {
                file.write_all_at(&record(index, seed), index * RECORD_BYTES as u64)
                    .map_err(|error| failed("write to", error))?;
                file.sync_data().map_err(|error| failed("sync", error))?;
                durable(index)?;
            }
        }
        How::Map => {
            let bytes = usize::try_from(count).map_err(|_| "too many")? * RECORD_BYTES;
            // Zeros, and not a hole: a record must need no block of its own.
            for index in 0..count {
                file.write_all_at(&[0; RECORD_BYTES], index * RECORD_BYTES as u64)
                    .map_err(|error| failed("write to", error))?;
            }
            file.sync_all().map_err(|error| failed("sync", error))?;
            let mut words = Words::of_device(path, bytes)?;
            for index in 0..count {
                let first = usize::try_from(index).map_err(|_| "too many")? * RECORD_WORDS;
                for (at, word) in (first..).zip(words_of(index, seed)) {
                    words.set(at, word);
                }
                words.sync(first, RECORD_WORDS)?;
                durable(index)?;
            }
        }
    }
    Ok(())
}

/// Appends records until there is something at `stop`, or writing fails: that is what a store does that goes away, and no error
/// here. How many are durable is in `durable`, which is on other storage.
pub(crate) fn write_until(path: &str, seed: u64, durable: &str, stop: &str) {
    /// More would fill the store.
    const MOST: u64 = 16 * 1024;
    let note = |index: u64| {
        fs::write(durable, (index + 1).to_string())
            .map_err(|error| format!("cannot write {durable}: {error}"))?;
        if Path::new(stop).exists() {
            return Err(format!("there is {stop}"));
        }
        Ok(())
    };
    if let Err(message) = write(path, seed, How::Append, MOST, note) {
        println!("ended: {message}");
    }
}

/// Counts the whole records from the start of the file.
pub(crate) fn check(path: &str, seed: u64) -> Result<PersistReport, String> {
    let failed = |error: io::Error| format!("cannot read {path}: {error}");
    let mut file = File::open(path).map_err(failed)?;
    let file_bytes = file.metadata().map_err(failed)?.len();
    let mut found = [0; RECORD_BYTES];
    let mut records = 0;
    loop {
        match file.read_exact(&mut found) {
            Ok(()) if found == record(records, seed) => records += 1,
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(PersistReport {
        records,
        file_bytes,
    })
}

fn words_of(index: u64, seed: u64) -> impl Iterator<Item = u64> {
    let first = index * RECORD_WORDS as u64;
    (first..first + RECORD_WORDS as u64).map(move |at| pattern_word(at, seed))
}

fn record(index: u64, seed: u64) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words_of(index, seed)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Prints an acknowledgement.
pub(crate) fn acknowledge(index: u64) -> Result<(), String> {
    let mut console = io::stdout();
    // One write, so that the line is whole or cut short, never mixed with another one.
    console
        .write_all(format!("{ACKNOWLEDGED_MARK}{index}\n").as_bytes())
        .and_then(|()| console.flush())
        .map_err(|error| format!("the console fails: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_goes_on_until_it_is_stopped() {
        let place = std::env::temp_dir().join(format!("lab-agent-until-{}", std::process::id()));
        fs::create_dir_all(&place).unwrap();
        let at = |name: &str| place.join(name).to_str().unwrap().to_owned();
        fs::write(at("stop"), "").unwrap();
        write_until(&at("records"), 3, &at("durable"), &at("stop"));
        assert_eq!(fs::read_to_string(at("durable")).unwrap(), "1");
        assert_eq!(check(&at("records"), 3).unwrap().records, 1);
        // No store, no promise.
        write_until(&at("nowhere/records"), 3, &at("none"), &at("stop"));
        assert!(!Path::new(&at("none")).exists());
        fs::remove_dir_all(place).unwrap();
    }

    #[test]
    fn records_are_found_up_to_the_first_that_is_not_whole() {
        let path = std::env::temp_dir().join(format!("lab-agent-persist-{}", std::process::id()));
        let path = path.to_str().unwrap();
        for how in [How::Append, How::Map] {
            let mut durable = Vec::new();
            let note = |index| {
                durable.push(index);
                Ok(())
            };
            write(path, 7, how, 5, note).unwrap();
            assert_eq!(durable, [0, 1, 2, 3, 4]);
            let whole = PersistReport {
                records: 5,
                file_bytes: 5 * RECORD_BYTES as u64,
            };
            assert_eq!(check(path, 7).unwrap(), whole, "{how:?}");
            assert_eq!(check(path, 8).unwrap().records, 0);
        }
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&[0], 2 * RECORD_BYTES as u64 + 1000)
            .unwrap();
        assert_eq!(check(path, 7).unwrap().records, 2);
        file.set_len(RECORD_BYTES as u64 + 1).unwrap();
        assert_eq!(check(path, 7).unwrap().records, 1);
        std::fs::remove_file(path).unwrap();
    }
}
