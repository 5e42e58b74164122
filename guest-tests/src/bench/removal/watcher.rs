//! Watches memory of the emulated host from outside of it, by one clock: what a device writes, the guest's heartbeat, and the
//! marks of who takes the memory away.
//!
//! The memory is that of persistent memory modules that are files of the lab's, mapped and shared by the emulator; a read of
//! such a file gives what is in memory now. Nothing on the host can keep the watcher from seeing it, whoever owns the memory there.
//! A look takes some microseconds, and looks come every `PAUSE` or as often as this machine lets them: the longest gap
//! between two looks is the error of every time here, and is told ([`Seen::blink`]).

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab_agent::removal_protocol::{MARK_WORDS, Step};

const PAUSE: Duration = Duration::from_micros(50);
const PAGE_BYTES: usize = 4096;
const CHUNK_BYTES: usize = 1 << 20;
const WORD_BYTES: usize = 8;

/// Memory that cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// A module's file.
    #[error("cannot read the file of a memory module")]
    Read(#[from] io::Error),
    /// Pages that the guest has marked.
    #[error("the guest has marked {expected} pages, {found} are found in the memory module's file")]
    Pages {
        /// How many are there.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// The watching thread.
    #[error("the watcher panicked")]
    Panic,
}

/// A range of a memory module's file.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file.
    pub file: Arc<File>,
    /// Where in it.
    pub offset: u64,
}

impl Place {
    fn word(&self) -> io::Result<u64> {
        let mut word = [0; WORD_BYTES];
        self.file.read_exact_at(&mut word, self.offset)?;
        Ok(u64::from_le_bytes(word))
    }

    /// The same file, further on.
    #[must_use]
    pub fn at(&self, bytes: u64) -> Self {
        Self {
            file: Arc::clone(&self.file),
            offset: self.offset + bytes,
        }
    }

    /// Tells two states of `bytes` bytes apart.
    pub fn digest(&self, bytes: u64) -> Result<u64, WatchError> {
        let mut hasher = DefaultHasher::new();
        self.for_chunks(bytes, |_, chunk| hasher.write(chunk))?;
        Ok(hasher.finish())
    }

    /// Finds the pages among `bytes` bytes that start with `mark` and the words after it.
    pub fn marked(&self, bytes: u64, mark: u64, count: usize) -> Result<Vec<Self>, WatchError> {
        let marks = mark..mark + count as u64;
        let mut found = Vec::new();
        self.for_chunks(bytes, |at, chunk| {
            for (page, from) in chunk
                .chunks_exact(PAGE_BYTES)
                .zip((at..).step_by(PAGE_BYTES))
            {
                let word = page
                    .first_chunk()
                    .map_or(0, |word| u64::from_le_bytes(*word));
                if marks.contains(&word) {
                    found.push(self.at(from));
                }
            }
        })?;
        if found.len() == count {
            return Ok(found);
        }
        Err(WatchError::Pages {
            found: found.len(),
            expected: count,
        })
    }

    fn for_chunks(&self, bytes: u64, mut work: impl FnMut(u64, &[u8])) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        for at in (0..bytes).step_by(CHUNK_BYTES) {
            let length = usize::try_from(bytes - at).map_or(CHUNK_BYTES, |b| b.min(CHUNK_BYTES));
            let chunk = &mut chunk[..length];
            self.file.read_exact_at(chunk, self.offset + at)?;
            work(at, chunk);
        }
        Ok(())
    }
}

/// What is watched.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Where the steps of the removal are marked.
    pub marks: Place,
    /// The guest's heartbeat.
    pub heart: Place,
    /// First words of the pages that a device writes.
    pub targets: Vec<Place>,
}

/// What was seen, each at the time of the look.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    marks: [Option<Instant>; MARK_WORDS],
    /// The guest's heartbeats.
    pub beats: Vec<Instant>,
    /// Transfers that have changed a page.
    pub writes: Vec<Instant>,
    blinks: Vec<(Instant, Duration)>,
    /// The last look.
    end: Option<Instant>,
}

impl Seen {
    /// When a step was marked.
    pub fn step(&self, step: Step) -> Option<Instant> {
        self.marks[step.index()]
    }

    /// The longest time between two looks that ended after `from`.
    pub fn blink(&self, from: Instant) -> Duration {
        let after = self.blinks.iter().filter(|(end, _)| *end >= from);
        after.map(|(_, gap)| *gap).max().unwrap_or(PAUSE)
    }

    /// The longest time without a heartbeat that ended after `from`, or has not ended.
    pub fn silence(&self, from: Instant) -> Option<Duration> {
        let ends = self.beats.iter().skip(1).chain(&self.end);
        let gaps = self.beats.iter().zip(ends);
        let gaps = gaps.filter(|(_, end)| **end >= from);
        gaps.map(|(start, end)| end.saturating_duration_since(*start))
            .max()
    }
}

/// A thread that watches until it is told to stop.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    thread: JoinHandle<io::Result<Seen>>,
}

impl Watcher {
    /// Watches from now on.
    pub fn start(watched: Watched) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let looks = Arc::new(AtomicU64::new(0));
        let looked = Arc::clone(&looks);
        let thread = thread::spawn(move || watch(&watched, &stopped, &looked));
        Self {
            stop,
            looks,
            thread,
        }
    }

    /// How often it has looked.
    pub fn looks(&self) -> u64 {
        self.looks.load(Ordering::SeqCst)
    }

    /// Stops, and gives what was seen.
    pub fn finish(self) -> Result<Seen, WatchError> {
        self.stop.store(true, Ordering::SeqCst);
        Ok(self.thread.join().map_err(|_| WatchError::Panic)??)
    }
}

fn watch(watched: &Watched, stop: &AtomicBool, looks: &AtomicU64) -> io::Result<Seen> {
    let words = |places: &[Place]| {
        places
            .iter()
            .map(Place::word)
            .collect::<io::Result<Vec<_>>>()
    };
    let marks: Vec<Place> = (0..MARK_WORDS)
        .map(|index| watched.marks.at((index * WORD_BYTES) as u64))
        .collect();
    // Of the last removal, until the next one clears them.
    let old_marks = words(&marks)?;
    let mut heart = watched.heart.word()?;
    let mut targets = words(&watched.targets)?;
    let mut seen = Seen::default();
    let mut last = Instant::now();
    while !stop.load(Ordering::SeqCst) {
        looks.fetch_add(1, Ordering::SeqCst);
        // The marks first: a transfer that came before a mark is seen no later than the mark.
        let new_marks = words(&marks)?;
        let new_targets = words(&watched.targets)?;
        let new_heart = watched.heart.word()?;
        let now = Instant::now();
        let changed = targets.iter().zip(&new_targets).filter(|(a, b)| a != b);
        seen.writes.extend(changed.map(|_| now));
        targets = new_targets;
        if new_heart != heart {
            heart = new_heart;
            seen.beats.push(now);
        }
        for (index, mark) in new_marks.into_iter().enumerate() {
            if mark != 0 && mark != old_marks[index] {
                seen.marks[index].get_or_insert(now);
            }
        }
        let gap = now - last;
        if gap > 4 * PAUSE {
            seen.blinks.push((now, gap));
        }
        last = now;
        thread::sleep(PAUSE);
    }
    seen.end = Some(last);
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(bytes: u64) -> Place {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Place {
            file: Arc::new(file),
            offset: 0,
        }
    }

    fn set(place: &Place, word: u64) {
        place
            .file
            .write_all_at(&word.to_le_bytes(), place.offset)
            .unwrap();
    }

    #[test]
    fn marked_pages_are_found_and_counted() {
        let memory = place(2 << 20).at(4096);
        set(&memory.at(8192), 70);
        set(&memory.at((1 << 20) - 4096), 71);
        set(&memory.at(8), 71);
        let found = memory.marked(1 << 20, 70, 2).unwrap();
        assert_eq!(found[0].offset, 4096 + 8192);
        assert_eq!(found[1].offset, 1 << 20);
        let error = memory.marked(1 << 20, 70, 3).unwrap_err();
        assert!(error.to_string().contains("2 are found"), "{error}");
    }

    #[test]
    fn a_digest_depends_on_every_byte() {
        let memory = place(3 << 20);
        let before = memory.digest(3 << 20).unwrap();
        assert_eq!(memory.digest(3 << 20).unwrap(), before);
        set(&memory.at((3 << 20) - 8), 1 << 56);
        assert_ne!(memory.digest(3 << 20).unwrap(), before);
    }

    #[test]
    fn what_changes_is_seen() {
        let memory = place(4 * 4096);
        set(&memory, 5);
        let watcher = Watcher::start(Watched {
            marks: memory.at(0),
            heart: memory.at(4096),
            targets: vec![memory.at(8192), memory.at(3 * 4096)],
        });
        // A look that has begun after what was set sees it: of two more, the second one has.
        let look = || {
            let enough = watcher.looks() + 2;
            while watcher.looks() < enough {
                assert!(!watcher.thread.is_finished());
                thread::yield_now();
            }
        };
        look();
        set(&memory.at(4096), 1);
        set(&memory.at(8192), 1);
        look();
        set(&memory, 6);
        look();
        let seen = watcher.finish().unwrap();
        assert!(!seen.beats.is_empty() && !seen.writes.is_empty());
        assert!(seen.step(Step::Asked).is_some());
        assert_eq!(seen.step(Step::Opened), None);
    }

    #[test]
    fn silence_lasts_until_the_end() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let seen = Seen {
            beats: vec![at(0), at(50), at(60), at(70)],
            end: Some(at(100)),
            ..Seen::default()
        };
        assert_eq!(seen.silence(at(55)), Some(Duration::from_millis(30)));
        assert_eq!(seen.silence(at(45)), Some(Duration::from_millis(50)));
        assert_eq!(Seen::default().silence(start), None);
    }
}
