//! What KVM would do for a function.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::lock;
use crate::pci::testing::FakeRoutes;
use crate::pci::{MsiMessage, MsiRoutes};
use crate::vfio::{BarWindows, Intx, Vectors, Window, WindowError, WindowLease};

/// The guest's address space.
#[derive(Debug, Default)]
pub struct FakeWindows {
    state: Mutex<WindowState>,
}

#[derive(Debug, Default)]
struct WindowState {
    /// By guest-physical address: length and host address.
    mapped: BTreeMap<u64, (u64, u64)>,
    next_token: u64,
    refuses_map: bool,
    refuses_unmap: bool,
}

impl FakeWindows {
    /// What is mapped: guest-physical address, length, host address.
    pub fn mapped(&self) -> Vec<(u64, u64, u64)> {
        let state = lock(&self.state);
        let all = state.mapped.iter();
        all.map(|(gpa, (size, host))| (*gpa, *size, *host))
            .collect()
    }

    /// Nothing can be mapped, or can again.
    pub fn refuse_map(&self, refuses: bool) {
        lock(&self.state).refuses_map = refuses;
    }

    /// Nothing can be unmapped, or can again.
    pub fn refuse_unmap(&self, refuses: bool) {
        lock(&self.state).refuses_unmap = refuses;
    }
}

impl BarWindows for FakeWindows {
    fn map(&self, window: &Window<'_>) -> Result<WindowLease, WindowError> {
        let mut state = lock(&self.state);
        let Window { gpa, size, .. } = *window;
        if state.refuses_map {
            return Err("no slots are left".into());
        }
        let below = state.mapped.range(..gpa + size).next_back();
        assert!(
            below.is_none_or(|(other, (length, _))| other + length <= gpa),
            "two windows at {gpa:#x}"
        );
        state.mapped.insert(gpa, (size, window.host_address));
        state.next_token += 1;
        Ok(WindowLease {
            gpa,
            size,
            token: state.next_token,
        })
    }

    fn unmap(&self, lease: WindowLease) -> Result<(), (WindowLease, WindowError)> {
        let mut state = lock(&self.state);
        if state.refuses_unmap {
            return Err((lease, "KVM does not let go".into()));
        }
        assert!(state.mapped.remove(&lease.gpa).is_some());
        Ok(())
    }
}

/// Vectors whose events nobody listens to: what is raised stays.
#[derive(Debug)]
pub struct FakeVectors {
    routes: FakeRoutes,
    events: Vec<EventFd>,
}

impl FakeVectors {
    /// So many.
    pub fn new(count: u16) -> Self {
        let event = |_| EventFd::new(EFD_NONBLOCK).expect("a test may have descriptors");
        Self {
            routes: FakeRoutes::default(),
            events: (0..count).map(event).collect(),
        }
    }

    /// The message of a vector.
    pub fn get(&self, vector: u16) -> Option<MsiMessage> {
        self.routes.get(vector)
    }

    /// Which vectors have routes.
    pub fn routed(&self) -> Vec<u16> {
        let count = u16::try_from(self.events.len()).unwrap_or(u16::MAX);
        (0..count)
            .filter(|vector| self.get(*vector).is_some())
            .collect()
    }

    /// What was raised since the last call.
    pub fn taken(&self, vector: u16) -> u64 {
        self.events[usize::from(vector)].read().unwrap_or(0)
    }
}

impl MsiRoutes for FakeVectors {
    fn set(&self, vector: u16, message: Option<MsiMessage>) {
        self.routes.set(vector, message);
    }

    fn signal(&self, vector: u16) {
        if let Some(event) = self.event(vector) {
            event.write(1).expect("a count far from full");
        }
    }

    fn is_pending(&self, vector: u16) -> bool {
        let count = self.event(vector).and_then(|event| {
            let count = event.read().ok()?;
            event.write(count).ok()
        });
        self.get(vector).is_none() && count.is_some()
    }
}

impl Vectors for FakeVectors {
    fn event(&self, vector: u16) -> Option<&EventFd> {
        self.events.get(usize::from(vector))
    }
}

/// A pin that remembers whether somebody is connected.
#[derive(Debug, Default)]
pub struct FakeIntx {
    connected: Mutex<bool>,
}

impl FakeIntx {
    /// Whether somebody is.
    pub fn is_connected(&self) -> bool {
        *lock(&self.connected)
    }
}

impl Intx for FakeIntx {
    fn connect(&self, _trigger: &EventFd, _resample: &EventFd) -> io::Result<()> {
        let was = std::mem::replace(&mut *lock(&self.connected), true);
        assert!(!was, "connected twice");
        Ok(())
    }

    fn disconnect(&self, _trigger: &EventFd) -> io::Result<()> {
        let was = std::mem::replace(&mut *lock(&self.connected), false);
        assert!(was, "disconnected twice");
        Ok(())
    }
}
