//! Registers of which some bits are ours and some are the host's.
//!
//! Pure. Each byte says which of its bits are read from the host, and which bits of a guest's store go there; all others
//! live in a [`ConfigSpace`]. What is in neither reads as zero and can't be written.
//!
//! Invariant: a bit that was not passed on ([`RegisterFile::pass`], [`RegisterFile::forward`]) never reaches the host from
//! the guest, whatever is written where and in which width.

use crate::pci::{BarChange, CONFIG_SPACE, ConfigSpace};

/// What a byte has to do with the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Access {
    /// Bits that are read from the host.
    live: u8,
    /// Bits that the guest's stores give to the host.
    passed: u8,
    /// Bits that keep what the host has when others of the byte are stored; the rest is stored as zero.
    kept: u8,
}

impl Access {
    /// All of it is the host's.
    const FORWARDED: Self = Self {
        live: 0xff,
        passed: 0xff,
        kept: 0,
    };
}

/// A store to the host: 1, 2 or 4 bytes, aligned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Forward {
    /// Where to.
    pub(super) register: u16,
    bytes: Vec<u8>,
    kept: Vec<u8>,
}

impl Forward {
    /// How many bytes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has to know what the host has now.
    pub(super) fn is_merged(&self) -> bool {
        self.kept.iter().any(|bits| *bits != 0)
    }

    /// What to store where the host has `now`.
    pub(super) fn merge(&self, now: &[u8]) -> Vec<u8> {
        let stored = self.bytes.iter().zip(&self.kept).zip(now);
        stored
            .map(|((byte, kept), now)| byte | (now & kept))
            .collect()
    }
}

/// Configuration space with the host behind it.
#[derive(Debug)]
pub(super) struct RegisterFile {
    space: ConfigSpace,
    access: Vec<Access>,
}

/// Made by whoever makes the function.
impl RegisterFile {
    /// Nothing is the host's yet.
    pub(super) fn new(space: ConfigSpace) -> Self {
        Self {
            space,
            access: vec![Access::default(); CONFIG_SPACE],
        }
    }

    /// Our part.
    pub(super) fn space(&self) -> &ConfigSpace {
        &self.space
    }

    /// Our part, to be changed.
    pub(super) fn space_mut(&mut self) -> &mut ConfigSpace {
        &mut self.space
    }

    /// All of these bytes are the host's.
    pub(super) fn forward(&mut self, at: u16, len: u16) {
        self.fill(at, len, Access::FORWARDED);
    }

    /// None of these bytes is.
    pub(super) fn hide(&mut self, at: u16, len: u16) {
        self.fill(at, len, Access::default());
    }

    /// These bits are read from the host.
    pub(super) fn live(&mut self, at: u16, bits: &[u8]) {
        for (access, bits) in self.access.iter_mut().skip(at.into()).zip(bits) {
            access.live = *bits;
        }
    }

    /// Stores to these bits reach the host, which keeps those of `kept` as they are.
    pub(super) fn pass(&mut self, at: u16, bits: u16, kept: u16) {
        let bits = bits.to_le_bytes().into_iter().zip(kept.to_le_bytes());
        for (access, (passed, kept)) in self.access.iter_mut().skip(at.into()).zip(bits) {
            access.passed = passed;
            access.kept = kept & !passed;
        }
    }

    fn fill(&mut self, at: u16, len: u16, with: Access) {
        let bytes = self.access.iter_mut().skip(at.into());
        bytes.take(len.into()).for_each(|access| *access = with);
    }
}

/// Used by the guest.
impl RegisterFile {
    /// Reads; `host` fills what is to be read there.
    pub(super) fn read(&self, register: u16, data: &mut [u8], host: impl Fn(u16, &mut [u8])) {
        self.space.read(register, data);
        for (at, len) in self.pieces(register, data.len(), |access| access.live != 0) {
            let mut fresh = [0; 4];
            host(at, &mut fresh[..len]);
            let from = usize::from(at - register);
            let access = &self.access[usize::from(at)..];
            let bytes = data[from..from + len].iter_mut().zip(fresh).zip(access);
            for ((byte, fresh), Access { live, .. }) in bytes {
                *byte = (*byte & !live) | (fresh & live);
            }
        }
    }

    /// Writes our part, and tells which BARs moved and what has to be stored to the host.
    pub(super) fn write(&mut self, register: u16, data: &[u8]) -> (Vec<BarChange>, Vec<Forward>) {
        let changes = self.space.write(register, data);
        let forwards = self
            .pieces(register, data.len(), |access| access.passed != 0)
            .map(|(at, len)| {
                let from = usize::from(at - register);
                let access = &self.access[usize::from(at)..][..len];
                let stored = data[from..].iter().zip(access);
                Forward {
                    register: at,
                    bytes: stored.map(|(byte, access)| byte & access.passed).collect(),
                    kept: access.iter().map(|access| access.kept).collect(),
                }
            })
            .collect();
        (changes, forwards)
    }

    /// The bytes of an access that are `wanted`, as aligned accesses of 4, 2 or 1 bytes.
    fn pieces(
        &self,
        register: u16,
        len: usize,
        wanted: impl Fn(&Access) -> bool,
    ) -> impl Iterator<Item = (u16, usize)> {
        let end = (usize::from(register) + len).min(CONFIG_SPACE);
        let mut at = usize::from(register);
        std::iter::from_fn(move || {
            while at < end && !wanted(&self.access[at]) {
                at += 1;
            }
            if at >= end {
                return None;
            }
            let fits = |len: &usize| {
                at.is_multiple_of(*len)
                    && at + len <= end
                    && self.access[at..at + len].iter().all(&wanted)
            };
            let len = [4, 2].into_iter().find(fits).unwrap_or(1);
            let piece = (u16::try_from(at).ok()?, len);
            at += len;
            Some(piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::testing::IDENTITY;

    fn file() -> RegisterFile {
        RegisterFile::new(ConfigSpace::new(&IDENTITY))
    }

    #[test]
    fn an_access_of_the_host_keeps_its_width() {
        let mut file = file();
        file.forward(0x40, 8);
        let seen = |register: u16, len: usize| {
            let seen = std::cell::RefCell::new(Vec::new());
            file.read(register, &mut vec![0; len], |at, data| {
                seen.borrow_mut().push((at, data.len()));
                data.fill(0xab);
            });
            seen.into_inner()
        };
        assert_eq!(seen(0x40, 4), [(0x40, 4)]);
        assert_eq!(seen(0x42, 2), [(0x42, 2)]);
        assert_eq!(seen(0x41, 4), [(0x41, 1), (0x42, 2), (0x44, 1)]);
        assert_eq!(seen(0x3e, 4), [(0x40, 2)]);
        assert_eq!(seen(0x46, 4), [(0x46, 2)]);
        assert_eq!(seen(0x00, 4), []);
    }

    #[test]
    fn bits_are_merged_both_ways() {
        let mut file = file();
        file.live(0x50, &[0xf0]);
        file.pass(0x50, 0x003c, 0x00c3);
        file.space_mut().set(0x50, &[0x0a]);
        let mut read = [0; 2];
        file.read(0x50, &mut read, |_, data| data.fill(0x5f));
        assert_eq!(read, [0x5a, 0]);
        let (changes, forwards) = file.write(0x50, &[0xff, 0xff]);
        assert_eq!(changes, []);
        assert_eq!(forwards.len(), 1, "the second byte has nothing to pass");
        let forward = &forwards[0];
        assert!(forward.is_merged());
        assert_eq!((forward.register, forward.len()), (0x50, 1));
        assert_eq!(forward.merge(&[0x81]), [0xbd]);
    }

    proptest! {
        #[test]
        fn nothing_is_passed_on_that_may_not_be(
            passes in prop::collection::vec((any::<u8>(), any::<u16>(), any::<u16>()), 0..20),
            stores in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..5)), 0..20),
        ) {
            let mut file = file();
            for (at, bits, kept) in passes {
                file.pass(at.into(), bits, kept);
            }
            for (at, data) in stores {
                let (_, forwards) = file.write(at.into(), &data);
                let mut covered = vec![false; data.len()];
                for forward in forwards {
                    prop_assert!(usize::from(forward.register).is_multiple_of(forward.len()));
                    let stored = forward.merge(&[0; 4]);
                    for (index, byte) in stored.into_iter().enumerate() {
                        let register = usize::from(forward.register) + index;
                        let from = register - usize::from(at);
                        prop_assert!(!std::mem::replace(&mut covered[from], true));
                        prop_assert_eq!(byte, data[from] & file.access[register].passed);
                    }
                }
                for (from, covered) in covered.into_iter().enumerate() {
                    let passed = file.access[usize::from(at) + from].passed;
                    prop_assert_eq!(covered, passed != 0);
                }
            }
        }
    }
}
