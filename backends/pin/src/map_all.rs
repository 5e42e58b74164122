//! Maps several memories, all or none, and tells how far it is.
//!
//! Each memory is one call of the mapper. Where the kernel lets maps run side by side ([`DmaMapper::parallel`]) several
//! threads make them; where it does not, one thread does. The caller's thread watches: what the kernel counts as held
//! moves while a call is under way, on some paths, and nothing is known in between on the others.
//!
//! Nobody waits for a clock: the caller is told when a map starts or ends, and looks at the kernel's count each
//! [`TICK`] that passes in between.

#![forbid(unsafe_code)]

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::mapper::{DmaLease, DmaMapper, DmaRequest, MapError, UnmapError};
use crate::progress::Progress;

/// How often the kernel's count is looked at.
const TICK: Duration = Duration::from_millis(250);

/// Not all memories could be mapped, so none is, but for what is stuck.
#[derive(Debug, Error)]
#[error(
    "not all memory can be reached by devices: {mapped} of {asked} ranges were mapped before one was refused{}",
    left(stuck)
)]
pub struct MapAllError {
    /// Ranges asked for.
    pub asked: usize,
    /// Which was refused, by its index; `None`: all of them together are too much.
    pub refused: Option<usize>,
    /// Ranges that were mapped, and have been given back.
    pub mapped: usize,
    /// Why one was refused.
    #[source]
    pub source: MapError,
    /// What did not let go: devices still reach it.
    pub stuck: Vec<(DmaLease, UnmapError)>,
}

fn left(stuck: &[(DmaLease, UnmapError)]) -> String {
    match stuck {
        [] => String::new(),
        [(_, error), ..] => format!("; {} of them are stuck: {error}", stuck.len()),
    }
}

/// Maps all of `requests`; the leases come in their order. On an error everything is unmapped again, in reverse.
///
/// `progress` is called when a map starts and when it ends, and in between when the kernel shows that it moves.
pub fn map_all(
    mapper: &dyn DmaMapper,
    requests: &[DmaRequest<'_>],
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<DmaLease>, MapAllError> {
    let workers = if mapper.parallel() {
        thread::available_parallelism().map_or(1, NonZero::get)
    } else {
        1
    };
    map_with(workers, mapper, requests, progress)
}

/// The undo: unmaps in reverse, and goes on when one is refused. Gives what did not let go.
#[must_use = "devices still reach what did not let go"]
pub fn unmap_all(mapper: &dyn DmaMapper, leases: Vec<DmaLease>) -> Vec<(DmaLease, UnmapError)> {
    let leases = leases.into_iter().rev();
    leases
        .filter_map(|lease| mapper.unmap(lease).err())
        .collect()
}

/// What a worker tells.
enum Told {
    Started(usize),
    Ended(usize, Result<DmaLease, MapError>),
}

fn map_with(
    workers: usize,
    mapper: &dyn DmaMapper,
    requests: &[DmaRequest<'_>],
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<DmaLease>, MapAllError> {
    mapper.check(requests).map_err(|source| MapAllError {
        refused: None,
        asked: requests.len(),
        mapped: 0,
        source,
        stuck: Vec::new(),
    })?;
    let mut watch = Watch::new(mapper, requests, progress);
    let (next, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = |told: Sender<Told>| {
        while !is_over.load(Ordering::Acquire) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(request) = requests.get(index) else {
                break;
            };
            // Who listens does so until the last worker is gone.
            let _ = told.send(Told::Started(index));
            let result = mapper.map(request);
            if result.is_err() {
                is_over.store(true, Ordering::Release);
            }
            let _ = told.send(Told::Ended(index, result));
        }
    };
    thread::scope(|scope| {
        let (told, listen) = mpsc::channel();
        let mut is_anyone_working = false;
        for _ in 0..workers.min(requests.len()) {
            let told = told.clone();
            let worker = thread::Builder::new().name("pin".to_owned());
            is_anyone_working |= worker.spawn_scoped(scope, || work(told)).is_ok();
        }
        if is_anyone_working {
            drop(told);
        } else {
            // The host has no thread to give: this one does it, and tells afterwards.
            work(told);
        }
        loop {
            match listen.recv_timeout(TICK) {
                Ok(Told::Started(index)) => watch.started(index),
                Ok(Told::Ended(index, result)) => watch.ended(index, result),
                Err(RecvTimeoutError::Timeout) => watch.tick(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    });
    let Watch { leases, failed, .. } = watch;
    let leases: Vec<DmaLease> = leases.into_iter().flatten().collect();
    match failed {
        None => Ok(leases),
        Some((refused, source)) => Err(MapAllError {
            refused: Some(refused),
            asked: requests.len(),
            mapped: leases.len(),
            source,
            stuck: unmap_all(mapper, leases),
        }),
    }
}

/// What is known of the maps, seen from the caller's thread.
struct Watch<'a> {
    mapper: &'a dyn DmaMapper,
    requests: &'a [DmaRequest<'a>],
    progress: &'a mut dyn FnMut(Progress),
    leases: Vec<Option<DmaLease>>,
    /// The first of the requests that were refused, in their order.
    failed: Option<(usize, MapError)>,
    start: Instant,
    total_bytes: u64,
    /// Of maps that have ended.
    ended_bytes: u64,
    /// Of maps that are under way.
    moving_bytes: u64,
    /// The kernel's count before the first map.
    counted_before: Option<u64>,
    /// What was told last.
    told_bytes: u64,
}

impl<'a> Watch<'a> {
    fn new(
        mapper: &'a dyn DmaMapper,
        requests: &'a [DmaRequest<'a>],
        progress: &'a mut dyn FnMut(Progress),
    ) -> Self {
        let sizes = requests.iter().map(|request| request.size);
        Self {
            mapper,
            requests,
            progress,
            leases: requests.iter().map(|_| None).collect(),
            failed: None,
            start: Instant::now(),
            total_bytes: sizes.fold(0, u64::saturating_add),
            ended_bytes: 0,
            moving_bytes: 0,
            counted_before: mapper.counted_bytes(),
            told_bytes: 0,
        }
    }

    fn started(&mut self, index: usize) {
        let size = self.requests[index].size;
        self.moving_bytes = self.moving_bytes.saturating_add(size);
        self.tell();
    }

    fn ended(&mut self, index: usize, result: Result<DmaLease, MapError>) {
        let size = self.requests[index].size;
        self.moving_bytes = self.moving_bytes.saturating_sub(size);
        match result {
            Ok(lease) => {
                self.ended_bytes = self.ended_bytes.saturating_add(size);
                self.leases[index] = Some(lease);
            }
            Err(error) => {
                if self.failed.as_ref().is_none_or(|(first, _)| index < *first) {
                    self.failed = Some((index, error));
                }
            }
        }
        self.tell();
    }

    /// Tells only if the kernel's count has moved.
    fn tick(&mut self) {
        if self.done_bytes() > self.told_bytes {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.told_bytes = self.told_bytes.max(self.done_bytes());
        let elapsed = self.start.elapsed();
        (self.progress)(Progress::at(self.told_bytes, self.total_bytes, elapsed));
    }

    /// What has ended, and what the kernel's count shows beyond it. Memory that is not counted makes this too low, never
    /// too high.
    fn done_bytes(&self) -> u64 {
        let counted = self.mapper.counted_bytes().zip(self.counted_before);
        let moved = counted.map_or(0, |(now, before)| now.saturating_sub(before));
        let beyond = moved.saturating_sub(self.ended_bytes);
        self.ended_bytes
            .saturating_add(beyond.min(self.moving_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapper::{DmaFacts, DmaMemory};
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::io;
    use std::sync::{Barrier, Mutex};

    const SIZE: u64 = 4096;

    /// Refuses what it is told to, and writes down what it is asked.
    #[derive(Debug, Default)]
    struct FakeMapper {
        /// Says no before anything is mapped.
        is_full: bool,
        refuses: BTreeSet<u64>,
        keeps: BTreeSet<u64>,
        mapped: Mutex<Vec<u64>>,
        unmapped: Mutex<Vec<u64>>,
        /// Two maps that wait for each other.
        meet: Option<Barrier>,
        /// A map that waits until it is let go, and the count meanwhile.
        hold: Option<(Barrier, u64)>,
    }

    impl DmaMapper for FakeMapper {
        fn map(&self, request: &DmaRequest<'_>) -> Result<DmaLease, MapError> {
            if let Some(meet) = &self.meet {
                meet.wait();
            }
            if let Some((hold, _)) = &self.hold {
                hold.wait();
            }
            if self.refuses.contains(&request.iova) {
                return Err(MapError::NoDevice {
                    name: request.name.to_owned(),
                });
            }
            self.mapped.lock().unwrap().push(request.iova);
            Ok(DmaLease {
                iova: request.iova,
                size: request.size,
                memory: request.memory,
                took: Duration::ZERO,
            })
        }

        fn unmap(&self, lease: DmaLease) -> Result<(), (DmaLease, UnmapError)> {
            self.unmapped.lock().unwrap().push(lease.iova);
            if self.keeps.contains(&lease.iova) {
                let error = UnmapError::Refused {
                    iova: lease.iova,
                    size: lease.size,
                    source: io::Error::from_raw_os_error(libc::EIO),
                };
                return Err((lease, error));
            }
            Ok(())
        }

        fn facts(&self) -> DmaFacts {
            DmaFacts::default()
        }

        fn check(&self, requests: &[DmaRequest<'_>]) -> Result<(), MapError> {
            match requests.first() {
                Some(first) if self.is_full => Err(MapError::NoEntries {
                    name: first.name.to_owned(),
                    iova: first.iova,
                }),
                _ => Ok(()),
            }
        }

        fn counted_bytes(&self) -> Option<u64> {
            let (_, count) = self.hold.as_ref()?;
            // Before the first map there is nothing; the map under way is then half through.
            let mapped = self.mapped.lock().unwrap().len() as u64;
            Some(count * (mapped + 1))
        }
    }

    fn requests(count: u64) -> Vec<DmaRequest<'static>> {
        (0..count)
            .map(|index| DmaRequest {
                name: "zone",
                iova: index * SIZE,
                host_address: index * SIZE,
                size: SIZE,
                memory: DmaMemory::DeviceDax,
            })
            .collect()
    }

    fn iovas(leases: &[DmaLease]) -> Vec<u64> {
        leases.iter().map(|lease| lease.iova / SIZE).collect()
    }

    #[test]
    fn leases_come_in_the_order_of_the_requests_and_progress_ends_at_all() {
        let fake = FakeMapper::default();
        let mut told = Vec::new();
        let leases = map_all(&fake, &requests(3), &mut |progress| told.push(progress)).unwrap();
        assert_eq!(iovas(&leases), [0, 1, 2]);
        // A start and an end for each.
        assert_eq!(told.len(), 6);
        assert_eq!(told[0].done_bytes, 0);
        assert_eq!(
            (told[5].done_bytes, told[5].total_bytes),
            (3 * SIZE, 3 * SIZE)
        );
        assert!(told.is_sorted_by_key(|progress| progress.done_bytes));
        assert!(unmap_all(&fake, leases).is_empty());
        assert_eq!(*fake.unmapped.lock().unwrap(), [2 * SIZE, SIZE, 0]);
    }

    #[test]
    fn nothing_to_map_is_no_error() {
        let leases = map_all(&FakeMapper::default(), &[], &mut |_| {}).unwrap();
        assert!(leases.is_empty());
    }

    #[test]
    fn what_can_not_all_be_mapped_is_not_begun() {
        let fake = FakeMapper {
            is_full: true,
            ..FakeMapper::default()
        };
        let error = map_all(&fake, &requests(4), &mut |_| {}).unwrap_err();
        assert_eq!((error.asked, error.mapped), (4, 0));
        assert!(fake.mapped.lock().unwrap().is_empty());
    }

    #[test]
    fn a_refusal_gives_everything_back_in_reverse() {
        let fake = FakeMapper {
            refuses: [2 * SIZE].into(),
            ..FakeMapper::default()
        };
        let error = map_all(&fake, &requests(4), &mut |_| {}).unwrap_err();
        assert_eq!(*fake.mapped.lock().unwrap(), [0, SIZE]);
        assert_eq!(*fake.unmapped.lock().unwrap(), [SIZE, 0]);
        assert!(error.stuck.is_empty());
        assert_eq!(
            error.to_string(),
            "not all memory can be reached by devices: 2 of 4 ranges were mapped before one was refused"
        );
        assert!(matches!(error.source, MapError::NoDevice { .. }));
    }

    #[test]
    fn what_does_not_let_go_comes_back() {
        let fake = FakeMapper {
            refuses: [2 * SIZE].into(),
            keeps: [SIZE].into(),
            ..FakeMapper::default()
        };
        let error = map_all(&fake, &requests(4), &mut |_| {}).unwrap_err();
        assert_eq!(*fake.unmapped.lock().unwrap(), [SIZE, 0]);
        assert_eq!(error.stuck.len(), 1);
        assert_eq!(error.stuck[0].0.iova, SIZE);
        assert!(
            error
                .to_string()
                .contains("1 of them are stuck: the IOMMU does not let go of 0x1000")
        );
    }

    #[test]
    fn maps_run_side_by_side_where_they_may() {
        let fake = FakeMapper {
            meet: Some(Barrier::new(2)),
            ..FakeMapper::default()
        };
        let leases = map_with(2, &fake, &requests(4), &mut |_| {}).unwrap();
        assert_eq!(iovas(&leases), [0, 1, 2, 3]);
    }

    #[test]
    fn a_long_map_shows_the_kernel_s_count() {
        let fake = FakeMapper {
            hold: Some((Barrier::new(2), SIZE / 2)),
            ..FakeMapper::default()
        };
        let requests = requests(1);
        let mut seen = Vec::new();
        let mut progress = |told: Progress| seen.push(told.done_bytes);
        let mut watch = Watch::new(&fake, &requests, &mut progress);
        watch.counted_before = Some(0);
        watch.started(0);
        watch.tick();
        thread::scope(|scope| {
            let map = scope.spawn(|| fake.map(&requests[0]));
            let (hold, _) = fake.hold.as_ref().unwrap();
            hold.wait();
            watch.ended(0, map.join().unwrap());
        });
        assert_eq!(seen, [SIZE / 2, SIZE]);
    }

    proptest! {
        #[test]
        fn all_or_none_but_for_what_is_stuck(
            count in 0_u64..8,
            refuses in prop::collection::btree_set(0_u64..8, 0..3),
            keeps in prop::collection::btree_set(0_u64..8, 0..3),
            workers in 1_usize..4,
        ) {
            let scale = |set: &BTreeSet<u64>| set.iter().map(|index| index * SIZE).collect();
            let fake = FakeMapper { refuses: scale(&refuses), keeps: scale(&keeps), ..FakeMapper::default() };
            let mut told = Vec::new();
            let result = map_with(workers, &fake, &requests(count), &mut |p| told.push(p.done_bytes));
            prop_assert!(told.is_sorted());
            let mapped: BTreeSet<u64> = fake.mapped.lock().unwrap().iter().copied().collect();
            let unmapped = fake.unmapped.lock().unwrap().clone();
            match result {
                Ok(leases) => {
                    prop_assert!(refuses.iter().all(|index| *index >= count));
                    prop_assert_eq!(iovas(&leases), (0..count).collect::<Vec<_>>());
                    prop_assert!(unmapped.is_empty());
                }
                Err(error) => {
                    prop_assert!(refuses.iter().any(|index| *index < count));
                    prop_assert!(unmapped.is_sorted_by(|a, b| a > b));
                    prop_assert_eq!(unmapped.into_iter().collect::<BTreeSet<_>>(), mapped.clone());
                    let stuck: BTreeSet<u64> = error.stuck.iter().map(|(lease, _)| lease.iova).collect();
                    prop_assert_eq!(stuck, mapped.intersection(&fake.keeps).copied().collect());
                }
            }
        }
    }
}
