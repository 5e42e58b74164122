//! Has a drive write into memory for as long as it is let, and shows that the guest goes on.
//!
//! Each target is one page, of a mapped file or of anonymous memory, into which one thread reads the drive's first blocks one
//! after the other: if these differ, the page changes with every transfer. Nothing here loads from a target after the start, so the
//! loop outlives its memory. The first word of a target is a mark until the loop may go: by it the lab finds the page.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use super::block;
use crate::memory::{Physical, Words};

const PAGE_BYTES: usize = 4096;
/// Of the drive, over and over.
const BLOCKS: u64 = 256;
/// Between two heartbeats, between two looks for the word to go, and after a read that has failed.
const PAUSE: Duration = Duration::from_millis(1);
/// What a target is called that is no file.
const ANONYMOUS: &str = "anonymous";

/// Ends only with an error. `heart` is the address of a page that the kernel leaves alone, whose first word counts up.
pub(crate) fn run(
    disk: &str,
    heart: u64,
    go: &str,
    mark: u64,
    targets: &[&str],
) -> Result<(), String> {
    let mut heart = Physical::map(heart, PAGE_BYTES as u64, true)?;
    let marked = Barrier::new(targets.len() + 1);
    thread::scope(|scope| {
        for (target, mark) in targets.iter().zip(mark..) {
            let marked = &marked;
            scope.spawn(move || {
                // Somebody waits for the word that all are marked, and will not get it.
                if let Err(message) = read_into(disk, go, mark, target, marked) {
                    eprintln!("{target}: {message}");
                }
            });
        }
        marked.wait();
        println!("marked");
        io::stdout().flush().map_err(|error| error.to_string())?;
        for beat in 1_u64.. {
            heart.words().set(0, beat);
            thread::sleep(PAUSE);
        }
        Ok(())
    })
}

fn read_into(
    disk: &str,
    go: &str,
    mark: u64,
    target: &str,
    marked: &Barrier,
) -> Result<(), String> {
    let drive: File = block::open_direct(disk, false)?;
    let mut page = match target {
        ANONYMOUS => Words::plain(PAGE_BYTES)?,
        path => Words::of_device(path, PAGE_BYTES)?,
    };
    page.set(0, mark);
    marked.wait();
    while !Path::new(go).exists() {
        thread::sleep(PAUSE);
    }
    let mut told = false;
    for block in (0..BLOCKS).cycle() {
        if let Err(message) = page.read_from(&drive, block * PAGE_BYTES as u64, PAGE_BYTES) {
            if !told {
                eprintln!("{message}");
                told = true;
            }
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}
