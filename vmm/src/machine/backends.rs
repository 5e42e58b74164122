//! vhost-user backends: who reaches guest memory beside KVM and the host's devices, and news of them for the owner.
//!
//! ```text
//!   open ─▶ found ──join──▶ a consumer of Ram: has what exists, gets what comes ──▶ the device is plugged
//!                               │
//!   close ◀── the line is cut ◀─┴─ leave: everything taken back, one region after the other
//! ```
//! A backend outlives resets of the guest, and so does its memory: only the rings are new.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use thiserror::Error;
use tracing::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::api::{BackendNode, BackendState};
use crate::memory::mapping::Source;
use crate::memory::ram::{
    Consumer, ConsumerId, JoinError, Lease, NotAllAttached, Ram, Rank, Reason,
};
use crate::memory::region::{Mapping, Region};
use crate::memory::report::Holder;
use crate::virtio::vhost_user::{Backend, Change, OpenError, SharedRegion, Spec, VhostUserDevice};

/// Memory that no other process can map.
#[derive(Debug, Error)]
enum Private {
    /// There is no file behind it.
    #[error(
        "it is private to this process, and a vhost-user backend has to map it: give the memory shared=on, or a DAX device \
         (file=/dev/daxX.Y)"
    )]
    Anonymous,
    /// What is stored there does not reach the file.
    #[error(
        "it is a private copy of a file, and a vhost-user backend would not see what the guest stores: give shared=on (a zone), or \
         leave discard_writes= out (pmem)"
    )]
    Copy,
}

/// One of them.
struct Served {
    backend: Arc<Backend>,
    /// Set while it is a consumer of guest memory.
    member: Option<ConsumerId>,
}

/// All of a machine's.
pub(super) struct Backends {
    served: Vec<Served>,
    news: Receiver<(String, Change)>,
    sender: Sender<(String, Change)>,
    /// Written with each piece of news.
    event: Arc<EventFd>,
    /// Readable once this process was told to end: no backend is waited for any longer.
    told: Arc<UnixStream>,
}

impl Backends {
    pub(super) fn new(told: Arc<UnixStream>) -> io::Result<Self> {
        let (sender, news) = channel();
        Ok(Self {
            served: Vec::new(),
            news,
            sender,
            event: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            told,
        })
    }

    /// Finds a backend, and makes the device that it serves. It reaches no memory yet.
    pub(super) fn open(&mut self, spec: Spec) -> Result<VhostUserDevice, OpenError> {
        self.find(spec).map(VhostUserDevice::new)
    }

    /// Finds a backend for a device.
    pub(super) fn find(&mut self, spec: Spec) -> Result<Arc<Backend>, OpenError> {
        let (sender, event, id) = (
            self.sender.clone(),
            Arc::clone(&self.event),
            spec.id.clone(),
        );
        let on_change = move |change| {
            // Nobody hears of it when the machine is being taken down.
            let _ = sender.send((id.clone(), change));
            // Only a full counter gives an error, and then the owner is awake anyway.
            let _ = event.write(1);
        };
        let backend = Backend::open(spec, Box::new(on_change), self.told.as_fd())?;
        self.served.push(Served {
            backend: Arc::clone(&backend),
            member: None,
        });
        Ok(backend)
    }

    /// The undo of [`Backends::find`], before anybody has joined.
    pub(super) fn lose_sight_of(&mut self, id: &str) {
        self.served.retain(|served| {
            let stays = served.backend.id() != id;
            if !stays {
                served.backend.close();
            }
            stays
        });
    }

    /// Has those reach guest memory that don't yet.
    pub(super) fn join(&mut self, ram: &mut Ram) -> Result<(), JoinError> {
        for served in &mut self.served {
            if served.member.is_none() {
                let consumer = BackendMemory(Arc::clone(&served.backend));
                match ram.join(Box::new(consumer)) {
                    Ok(member) => served.member = Some(member),
                    Err(failure) => {
                        served.member = failure.stays;
                        return Err(failure);
                    }
                }
            }
        }
        Ok(())
    }

    /// The undo of [`Backends::open`] and [`Backends::join`], for a device that has one.
    pub(super) fn close(&mut self, id: &str, ram: &mut Ram) {
        let Some(index) = self
            .served
            .iter()
            .position(|served| served.backend.id() == id)
        else {
            return;
        };
        let Served {
            backend, member, ..
        } = self.served.remove(index);
        if let Some(member) = member
            && let Err(error) = ram.leave(member)
        {
            // Whoever does not answer is cut off below.
            error!(id, %error, "the backend has not let go of memory");
        }
        backend.close();
    }

    /// What was told since the last call.
    pub(super) fn drain(&self) -> Vec<(String, Change)> {
        // Nothing to read after a call that had all.
        let _ = self.event.read();
        self.news.try_iter().collect()
    }

    /// By the id of the device that each serves: whether it is there.
    pub(super) fn connected(&self) -> impl Iterator<Item = (String, bool)> {
        self.served.iter().map(|Served { backend, .. }| {
            let is_there = backend.status().lost.is_none();
            (backend.id().to_owned(), is_there)
        })
    }

    /// For `vm.info`: how the backend of a device stands, if it has one.
    pub(super) fn state_of(&self, id: &str) -> Option<BackendNode<'_>> {
        let served = self
            .served
            .iter()
            .find(|served| served.backend.id() == id)?;
        let status = served.backend.status();
        Some(BackendNode {
            socket: served.backend.socket(),
            state: match status.lost {
                Some(_) => BackendState::Lost,
                None => BackendState::Connected,
            },
            because: status.lost,
        })
    }
}

impl AsRawFd for Backends {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// A backend's reach: after the guest, before devices of the host.
struct BackendMemory(Arc<Backend>);

/// Bytes of a region that a backend has: all or none.
struct Has(u64);

/// What becomes a lease.
fn has(region: &Region) -> Lease {
    let bytes = if region.is_read_only() {
        0
    } else {
        region.size()
    };
    Lease(Box::new(Has(bytes)))
}

fn shared(region: &Region) -> Result<SharedRegion, Private> {
    let private = || match region.mapping() {
        Mapping::Host(host) if matches!(host.source(), Source::File { .. }) => Private::Copy,
        _ => Private::Anonymous,
    };
    let (file, offset) = region.shared_file().ok_or_else(private)?;
    Ok(SharedRegion {
        gpa: region.gpa().0,
        size: region.size(),
        host_address: region.host_address(),
        file,
        offset,
    })
}

impl Consumer for BackendMemory {
    fn name(&self) -> &'static str {
        "the vhost-user backend"
    }

    fn rank(&self) -> Rank {
        Rank::Tables
    }

    /// A backend maps memory for writing: what can only be read is not its to reach.
    fn attach(&mut self, region: &Region) -> Result<Lease, Reason> {
        if !region.is_read_only() {
            self.0.attach(vec![shared(region)?])?;
        }
        Ok(has(region))
    }

    /// All at once: a backend without memory slots is sent its whole table each time.
    fn attach_all(&mut self, regions: &[&Region]) -> Result<Vec<Lease>, NotAllAttached> {
        let refused = |region, reason| NotAllAttached {
            region,
            reason,
            kept: Vec::new(),
        };
        let mut all = Vec::with_capacity(regions.len());
        let written = |(_, region): &(usize, &&Region)| !region.is_read_only();
        for (index, region) in regions.iter().enumerate().filter(written) {
            all.push(shared(region).map_err(|why| refused(index, why.into()))?);
        }
        // Of too much in all, the first is as good as any: the reason says what is too much.
        self.0.attach(all).map_err(|why| refused(0, why.into()))?;
        Ok(regions.iter().map(|region| has(region)).collect())
    }

    fn detach(&mut self, region: &Region, lease: Lease) -> Result<(), (Lease, Reason)> {
        self.0
            .detach(region.gpa().0)
            .map_err(|error| (lease, error.into()))
    }

    fn holding(&self, lease: &Lease) -> Option<Holder> {
        let Has(bytes) = *lease.0.downcast_ref()?;
        (bytes > 0).then(|| Holder::VhostUser {
            id: self.0.id().to_owned(),
            socket: self.0.socket().to_owned(),
            connected: self.0.status().lost.is_none(),
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::Gpa;
    use crate::memory::mapping::{HostMapping, memfd};

    fn of(source: Source) -> Result<SharedRegion, Private> {
        let mapping = Mapping::Host(HostMapping::new(source, 0x20_0000, 4096).unwrap());
        let region = Region::new("z0", Gpa(1 << 32), mapping);
        shared(&region.map_err(|(_, error)| error).unwrap())
    }

    #[test]
    fn memory_goes_by_its_file_and_private_memory_by_none() {
        let file = Arc::new(memfd(0x40_0000, None).unwrap());
        let source = |shared| Source::File {
            file: Arc::clone(&file),
            offset: 0x20_0000,
            shared,
        };
        let region = of(source(true)).unwrap();
        assert_eq!(
            (region.gpa, region.size, region.offset),
            (1 << 32, 0x20_0000, 0x20_0000)
        );
        let said = of(source(false)).unwrap_err().to_string();
        assert!(said.contains("discard_writes"), "{said}");
        let anonymous = Source::Anonymous {
            huge_bytes: None,
            thp: false,
        };
        let said = of(anonymous).unwrap_err().to_string();
        assert!(
            said.contains("shared=on") && said.contains("/dev/daxX.Y"),
            "{said}"
        );
    }
}
