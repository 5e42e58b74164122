//! Fakes for unit tests and fuzz targets: a function of BARs, and routes that remember.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    Bar, BarChange, BarWidth, Class, ConfigSpace, Function, Identity, MsiMessage, MsiRoutes,
    SegmentWindows, Window,
};

/// What the fake is.
pub const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    revision: 1,
    class: Class {
        base: 0x01,
        sub: 0x80,
        interface: 0x00,
    },
    subsystem_vendor: 0x1af4,
    subsystem: 2,
};

/// Two windows: 16 MiB from 3 GiB and 64 GiB from 256 GiB.
pub fn windows() -> SegmentWindows {
    let window = |base, size| Window::new(base, size).expect("below 2^64");
    SegmentWindows {
        number: 0,
        mmio32: window(0xc000_0000, 16 << 20),
        mmio64: window(256 << 30, 64 << 30),
    }
}

/// A 32-bit BAR.
pub fn bar32(index: u8, size: u64) -> Bar {
    Bar {
        index,
        size,
        width: BarWidth::Bits32,
        prefetchable: false,
    }
}

/// A 64-bit BAR.
pub fn bar64(index: u8, size: u64) -> Bar {
    Bar {
        index,
        size,
        width: BarWidth::Bits64,
        prefetchable: true,
    }
}

/// What a [`FakeFunction`] was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// [`Function::bar_moved`].
    Moved(BarChange),
    /// [`Function::bar_write`].
    Stored(u8, u64, Vec<u8>),
}

/// A function that has BARs, and answers loads with their number.
#[derive(Debug)]
pub struct FakeFunction {
    space: Mutex<ConfigSpace>,
    told: Mutex<Vec<Told>>,
}

impl FakeFunction {
    /// With these BARs, which must be possible.
    pub fn new(bars: &[Bar]) -> Arc<Self> {
        let mut space = ConfigSpace::new(&IDENTITY);
        for bar in bars {
            space.add_bar(*bar).expect("the test's own BARs are sound");
        }
        Arc::new(Self {
            space: Mutex::new(space),
            told: Mutex::default(),
        })
    }

    /// What it was told since the last call.
    pub fn told(&self) -> Vec<Told> {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Its configuration space.
    pub fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: Told) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.push(what);
    }
}

impl Function for FakeFunction {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.space().read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> Vec<BarChange> {
        self.space().write(register, data)
    }

    fn bars(&self) -> Vec<BarChange> {
        self.space().bars()
    }

    fn bar_moved(&self, change: BarChange) {
        self.tell(Told::Moved(change));
    }

    fn bar_read(&self, bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(bar);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.tell(Told::Stored(bar, offset, data.to_vec()));
    }
}

/// Routes that remember what they were told.
#[derive(Debug, Default)]
pub struct FakeRoutes {
    routes: Mutex<BTreeMap<u16, MsiMessage>>,
    pending: Mutex<Vec<u16>>,
    sets: Mutex<usize>,
}

impl FakeRoutes {
    /// The message of a vector.
    pub fn get(&self, vector: u16) -> Option<MsiMessage> {
        let routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.get(&vector).copied()
    }

    /// How often a route was set.
    pub fn sets(&self) -> usize {
        *self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MsiRoutes for FakeRoutes {
    fn set(&self, vector: u16, message: Option<MsiMessage>) {
        *self.sets.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        match message {
            Some(message) => {
                routes.insert(vector, message);
                let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
                pending.retain(|other| *other != vector);
            }
            None => {
                routes.remove(&vector);
            }
        }
    }

    fn signal(&self, vector: u16) {
        if self.get(vector).is_none() {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            pending.push(vector);
        }
    }

    fn is_pending(&self, vector: u16) -> bool {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.contains(&vector)
    }
}
