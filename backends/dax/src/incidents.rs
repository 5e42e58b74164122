//! What the SIGBUS handler has to tell the machine's owner.
//!
//! A signal handler may not lock or allocate, so it leaves notes in a ring that is there before: written by any number of
//! handlers at once, read by one owner. When the owner is slow, old notes are overwritten and counted. Nothing is lost by
//! that but the address: the marks of the memory ([`crate::loss`]) are set all the same.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// How many incidents wait for the owner.
const INCIDENTS: usize = 256;

/// No vCPU.
pub(crate) const NOBODY: u32 = u32::MAX;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Nothing is behind the mapping any more (`BUS_ADRERR`).
    Gone,
    /// The memory is poisoned, `1 << order` bytes as the kernel has it. KVM always says one page.
    Poison {
        /// Log2 of the size.
        order: u8,
        /// It was touched, and whoever touched it can't go on with what was there.
        touched: bool,
    },
}

/// Memory was touched, or found out, that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incident {
    /// Where, as the kernel says: for device-dax poison the start of the 2M or 1G.
    pub host_address: u64,
    /// What.
    pub cause: Cause,
    /// The vCPU whose thread it happened on: its guest touched the memory.
    pub vcpu: Option<u32>,
}

/// What was noted since the last time.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Taken {
    /// In order.
    pub incidents: Vec<Incident>,
    /// How many more there were, whose marks are set all the same.
    pub missed: u64,
}

/// One incident on its way to the owner. `turn` is odd while it is written: `2n + 1`, then `2n + 2` for the `n`th.
struct Note {
    turn: AtomicU64,
    address: AtomicU64,
    /// Bit 0: poison; bit 1: touched; from bit 8: the order.
    cause: AtomicU64,
    vcpu: AtomicU64,
}

/// The ring.
pub(crate) struct Notes {
    ring: [Note; INCIDENTS],
    /// How many incidents there were.
    noted: AtomicU64,
    /// How many of them the owner has seen.
    seen: Mutex<u64>,
}

impl Notes {
    pub(crate) const fn new() -> Self {
        Self {
            ring: [const {
                Note {
                    turn: AtomicU64::new(0),
                    address: AtomicU64::new(0),
                    cause: AtomicU64::new(0),
                    vcpu: AtomicU64::new(0),
                }
            }; INCIDENTS],
            noted: AtomicU64::new(0),
            seen: Mutex::new(0),
        }
    }

    /// Async-signal-safe. Whoever wakes the owner does it after this.
    pub(crate) fn add(&self, incident: &Incident) {
        let nth = self.noted.fetch_add(1, Ordering::SeqCst);
        let note = &self.ring[index(nth)];
        note.turn.store(2 * nth + 1, Ordering::SeqCst);
        let cause = match incident.cause {
            Cause::Gone => 0,
            Cause::Poison { order, touched } => {
                1 | (u64::from(touched) << 1) | (u64::from(order) << 8)
            }
        };
        note.address.store(incident.host_address, Ordering::SeqCst);
        note.cause.store(cause, Ordering::SeqCst);
        let vcpu = u64::from(incident.vcpu.unwrap_or(NOBODY));
        note.vcpu.store(vcpu, Ordering::SeqCst);
        note.turn.store(2 * nth + 2, Ordering::SeqCst);
    }

    /// Everything since the last time.
    pub(crate) fn take(&self) -> Taken {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = Taken::default();
        let noted = self.noted.load(Ordering::SeqCst);
        let oldest = noted.saturating_sub(INCIDENTS as u64);
        if *seen < oldest {
            taken.missed = oldest - *seen;
            *seen = oldest;
        }
        while *seen < noted {
            let note = &self.ring[index(*seen)];
            let turn = 2 * *seen + 2;
            let before = note.turn.load(Ordering::SeqCst);
            if before < turn {
                // Still being written; the owner is woken after it.
                break;
            }
            let incident = note.read();
            let after = note.turn.load(Ordering::SeqCst);
            match incident {
                Some(incident) if before == turn && after == turn => {
                    taken.incidents.push(incident);
                }
                _ => taken.missed += 1,
            }
            *seen += 1;
        }
        taken
    }
}

impl Note {
    fn read(&self) -> Option<Incident> {
        let cause = self.cause.load(Ordering::SeqCst);
        let vcpu = u32::try_from(self.vcpu.load(Ordering::SeqCst)).ok()?;
        Some(Incident {
            host_address: self.address.load(Ordering::SeqCst),
            cause: if cause == 0 {
                Cause::Gone
            } else {
                Cause::Poison {
                    order: u8::try_from(cause >> 8).ok()?,
                    touched: cause & 2 != 0,
                }
            },
            vcpu: (vcpu != NOBODY).then_some(vcpu),
        })
    }
}

#[allow(clippy::cast_possible_truncation, reason = "less than INCIDENTS")]
fn index(nth: u64) -> usize {
    (nth % INCIDENTS as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incident(address: u64) -> Incident {
        Incident {
            host_address: address,
            cause: Cause::Gone,
            vcpu: None,
        }
    }

    #[test]
    fn what_is_noted_is_told_once_and_in_order() {
        let notes = Notes::new();
        assert_eq!(notes.take(), Taken::default());
        let poison = Incident {
            host_address: u64::MAX,
            cause: Cause::Poison {
                order: 21,
                touched: true,
            },
            vcpu: Some(7),
        };
        let advice = Incident {
            cause: Cause::Poison {
                order: 12,
                touched: false,
            },
            ..poison
        };
        for incident in [incident(5), poison, advice] {
            notes.add(&incident);
        }
        assert_eq!(notes.take().incidents, [incident(5), poison, advice]);
        assert_eq!(notes.take(), Taken::default());
    }

    #[test]
    fn more_than_there_is_room_for_is_counted() {
        let notes = Notes::new();
        let all = INCIDENTS as u64 + 10;
        for address in 0..all {
            notes.add(&incident(address));
        }
        let taken = notes.take();
        assert_eq!(taken.missed, 10);
        let expected: Vec<_> = (10..all).map(incident).collect();
        assert_eq!(taken.incidents, expected);
    }

    #[test]
    fn many_write_while_one_reads() {
        const THREADS: u64 = 4;
        const EACH: u64 = 5000;
        let notes = Notes::new();
        let mut told = 0;
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let notes = &notes;
                    scope.spawn(move || {
                        for nth in 0..EACH {
                            notes.add(&incident(thread * EACH + nth));
                        }
                    })
                })
                .collect();
            while told < THREADS * EACH {
                let done = writers
                    .iter()
                    .all(std::thread::ScopedJoinHandle::is_finished);
                let taken = notes.take();
                assert!(
                    taken
                        .incidents
                        .iter()
                        .all(|i| i.host_address < THREADS * EACH)
                );
                told += taken.missed + taken.incidents.len() as u64;
                assert!(!done || told == THREADS * EACH, "{told}");
            }
        });
    }
}
