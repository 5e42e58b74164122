//! One connection to a backend: what both sides can do, the memory table, the rings. The messages are `vhost`'s.
//!
//! Every call here blocks for as long as the backend likes: who calls is on a thread of its own and given up on
//! ([`super::caller`]). After an error nothing is known of the other side any more, but for a plain no
//! ([`CallError::is_refusal`]): the connection is to be dropped.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use thiserror::Error;
use tracing::warn;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::class::{Class, Config};
use super::lending::{Channel, Lending, LoanError};
use super::table::{SharedRegion, Table};
use crate::virtio::queue::Ring;

/// What is asked of a backend's protocol features, where it has them.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// What lends memory has to have besides: a channel of its own, by which it asks for it to be mapped, and is answered.
const LENDING: [(VhostUserProtocolFeatures, &str); 4] = [
    (
        VhostUserProtocolFeatures::SHMEM,
        "shared memory regions (VHOST_USER_PROTOCOL_F_SHMEM)",
    ),
    (
        VhostUserProtocolFeatures::BACKEND_REQ,
        "requests of its own (VHOST_USER_PROTOCOL_F_BACKEND_REQ)",
    ),
    (
        VhostUserProtocolFeatures::BACKEND_SEND_FD,
        "requests with descriptors (VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD)",
    ),
    (
        VhostUserProtocolFeatures::REPLY_ACK,
        "answers to requests (VHOST_USER_PROTOCOL_F_REPLY_ACK)",
    ),
];

/// As many regions as a backend without memory slots has to take (vhost-user specification, `VHOST_USER_SET_MEM_TABLE`).
const TABLE_REGIONS: usize = 8;

/// There is no connection that could be used.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Nobody to connect to.
    #[error(
        "nobody serves the socket {socket}: {source}; start the backend first (for one: {example})"
    )]
    Socket {
        /// Where it was looked for.
        socket: String,
        /// Who could serve it.
        example: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// This side listens, and nobody is there.
    #[error("no backend has connected to the socket {socket}")]
    Nobody {
        /// Where it could.
        socket: String,
    },
    /// It says something else than it should, or nothing.
    #[error("what serves the socket {socket} does not talk like a vhost-user backend")]
    Call {
        /// Where it is.
        socket: String,
        /// What was asked.
        #[source]
        source: CallError,
    },
    /// It can't do what is needed.
    #[error("the backend at {socket} does not offer {what}, which a {class} device needs")]
    Lacks {
        /// Where it is.
        socket: String,
        /// The device.
        class: &'static str,
        /// What is missing.
        what: &'static str,
    },
    /// Fewer queues.
    #[error(
        "the backend at {socket} has {offered} queue(s), num_queues={asked} asks for more; give num_queues={most} or fewer, or \
         start the backend with more"
    )]
    Queues {
        /// Where it is.
        socket: String,
        /// What it has.
        offered: u64,
        /// Asked for.
        asked: u16,
        /// What could be asked for.
        most: u64,
    },
    /// Fewer queues than are listed.
    #[error(
        "the backend at {socket} has {offered} queue(s), queue_sizes= lists {asked}; list {offered} or fewer, or start the backend \
         with more"
    )]
    ListedQueues {
        /// Where it is.
        socket: String,
        /// What it has.
        offered: u64,
        /// Asked for.
        asked: u16,
    },
    /// Another one than before.
    #[error(
        "the backend that serves the socket {socket} now lacks features {missing:#x} that the guest was offered"
    )]
    Changed {
        /// Where it is.
        socket: String,
        /// Feature bits.
        missing: u64,
    },
    /// Too much memory.
    #[error(transparent)]
    Regions(#[from] TooManyRegions),
    /// It lends nothing.
    #[error(
        "the backend at {socket} lends no memory; its own messages say why (for one: another guest has it, or it serves somebody \
         else already: a backend serves one guest at a time)"
    )]
    NothingLent {
        /// Where it is.
        socket: String,
    },
    /// What it lends is of no use.
    #[error("what the backend at {socket} lends can't be the device's memory")]
    Loan {
        /// Where it is.
        socket: String,
        /// Why.
        #[source]
        source: LoanError,
    },
    /// Another one than before.
    #[error(
        "the backend that serves the socket {socket} now lends other memory ({lent:#x} bytes) than the guest has ({kept:#x} \
         bytes); start it with the range that it had"
    )]
    OtherLoan {
        /// Where it is.
        socket: String,
        /// What it lends, in bytes.
        lent: u64,
        /// What the guest has.
        kept: u64,
    },
    /// The memory was taken away by the host.
    #[error("the memory that the backend at {socket} lends was taken away from the guest")]
    TakenAway {
        /// Where it is.
        socket: String,
    },
}

/// A call that failed.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub struct CallError {
    /// The message.
    pub what: &'static str,
    /// Why.
    #[source]
    pub source: vhost::Error,
}

impl CallError {
    /// Whether the backend said no, and is otherwise as before.
    pub fn is_refusal(&self) -> bool {
        use vhost::vhost_user::Error::BackendInternalError;
        matches!(
            self.source,
            vhost::Error::VhostUserProtocol(BackendInternalError)
        )
    }
}

/// The backend has no room for a region.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "the backend takes {most} memory region(s) and the guest has more; give it fewer zones and pmem devices"
)]
pub struct TooManyRegions {
    /// What it takes.
    pub most: usize,
}

/// Rings that a backend can't be given.
#[derive(Debug, Error)]
pub(super) enum StartError {
    /// They lie where the backend has no memory.
    #[error("a ring of queue {index} is not in memory that the backend has")]
    Ring {
        /// The queue.
        index: u16,
    },
    /// The backend.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Where the backend finds it: `None` when a part of it is not in its memory.
fn addresses(ring: &Ring, table: &Table) -> Option<VringConfigData> {
    let size = u64::from(ring.size);
    Some(VringConfigData {
        queue_max_size: ring.size,
        queue_size: ring.size,
        flags: 0,
        desc_table_addr: table.user_address(ring.descriptors, 16 * size)?,
        avail_ring_addr: table.user_address(ring.available, 6 + 2 * size)?,
        used_ring_addr: table.user_address(ring.used, 6 + 8 * size)?,
        log_addr: None,
    })
}

/// What a backend keeps of requests under way, in memory that outlives it.
pub(super) struct Inflight {
    area: VhostUserInflight,
    file: File,
}

/// A connection after the handshake.
pub(super) struct Connection {
    frontend: Frontend,
    protocol: VhostUserProtocolFeatures,
    /// Virtio features.
    pub(super) features: u64,
    /// The device's configuration space, where it is the backend's.
    pub(super) config: Vec<u8>,
    /// How long that is.
    config_bytes: u32,
    max_regions: usize,
    /// Of a backend that lends memory.
    pub(super) lending: Option<Lending>,
}

impl Connection {
    /// Finds out what the other side is. `queues`: how many are wanted.
    pub(super) fn open(
        stream: UnixStream,
        socket: &Path,
        class: &Class,
        queues: u16,
    ) -> Result<Self, ConnectError> {
        let socket = || socket.display().to_string();
        let failed = |what| {
            move |source| ConnectError::Call {
                socket: socket(),
                source: CallError { what, source },
            }
        };
        let lacks = |what| ConnectError::Lacks {
            socket: socket(),
            class: class.name,
            what,
        };
        let paired = class.in_pairs.then(|| stream.try_clone()).transpose();
        let paired = paired.map_err(|source| ConnectError::Socket {
            socket: socket(),
            example: class.example,
            source,
        })?;
        let mut frontend = Frontend::from_stream(stream, queues.into());
        frontend.set_owner().map_err(failed("SET_OWNER"))?;
        let features = frontend.get_features().map_err(failed("GET_FEATURES"))?;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(lacks("protocol features"));
        }
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(lacks("virtio 1 (VIRTIO_F_VERSION_1)"));
        }
        let protocol = frontend
            .get_protocol_features()
            .map_err(failed("GET_PROTOCOL_FEATURES"))?
            & if class.lends {
                LENDING.iter().fold(PROTOCOL, |all, (one, _)| all | *one)
            } else {
                PROTOCOL
            };
        let lending = LENDING.iter().filter(|_| class.lends);
        for (feature, what) in lending {
            if !protocol.contains(*feature) {
                return Err(lacks(what));
            }
        }
        let is_theirs = matches!(class.config, Config::Backend { .. });
        if is_theirs && !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(lacks(
                "its configuration space (VHOST_USER_PROTOCOL_F_CONFIG)",
            ));
        }
        frontend
            .set_protocol_features(protocol)
            .map_err(failed("SET_PROTOCOL_FEATURES"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if queues > class.always {
            let has_more = features & class.more_by == class.more_by;
            let offered = if has_more && protocol.contains(VhostUserProtocolFeatures::MQ) {
                let said = match &paired {
                    Some(stream) => pairs(stream).map(|pairs| pairs.saturating_mul(2)),
                    None => frontend.get_queue_num(),
                };
                said.map_err(failed("GET_QUEUE_NUM"))?
            } else {
                class.unsaid.into()
            };
            let is_listed = matches!(class.config, Config::Passed { .. });
            if u64::from(queues) > offered && is_listed {
                return Err(ConnectError::ListedQueues {
                    socket: socket(),
                    offered,
                    asked: queues,
                });
            }
            if u64::from(queues) > offered {
                let least = class.always.max(1).into();
                return Err(ConnectError::Queues {
                    socket: socket(),
                    offered,
                    asked: queues - class.uncounted,
                    most: offered.max(least) - u64::from(class.uncounted),
                });
            }
        }
        let bytes = match class.config {
            Config::Own(_) => 0,
            Config::Backend { bytes, .. } => bytes,
            Config::Passed { bytes } if protocol.contains(VhostUserProtocolFeatures::CONFIG) => {
                bytes
            }
            Config::Passed { bytes } => {
                if bytes != 0 {
                    warn!(
                        socket = socket(),
                        "the backend can't say the device's configuration space; the guest reads zeros"
                    );
                }
                0
            }
        };
        let config = read_config(&mut frontend, bytes).map_err(failed("GET_CONFIG"))?;
        let lending = if class.lends {
            let (channel, theirs) = Channel::pair().map_err(|source| ConnectError::Socket {
                socket: socket(),
                example: class.example,
                source,
            })?;
            frontend
                .set_backend_request_fd(&theirs)
                .map_err(failed("SET_BACKEND_REQ_FD"))?;
            let said = frontend
                .get_shmem_config()
                .map_err(failed("GET_SHMEM_CONFIG"))?;
            let lending = Lending::new(channel, said.nregions, said.memory_sizes[0]);
            Some(lending.map_err(|source| ConnectError::Loan {
                socket: socket(),
                source,
            })?)
        } else {
            None
        };
        let mut max_regions = TABLE_REGIONS;
        if protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let slots = frontend
                .get_max_mem_slots()
                .map_err(failed("GET_MAX_MEM_SLOTS"))?;
            max_regions = usize::try_from(slots).unwrap_or(usize::MAX);
        }
        Ok(Self {
            frontend,
            protocol,
            features,
            config,
            config_bytes: bytes,
            max_regions,
            lending,
        })
    }

    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// Tells it what the driver stores in the configuration space; what that is then. `None`: it is not the backend's, or
    /// does not go so far.
    pub(super) fn write_config(
        &mut self,
        offset: u32,
        data: &[u8],
    ) -> Result<Option<Vec<u8>>, CallError> {
        let end = offset as usize + data.len();
        if data.is_empty() || end > self.config_bytes as usize {
            return Ok(None);
        }
        // In the specification 0 is a driver's store and 1 a migration's, whatever `vhost` calls them; QEMU's backends look.
        let flags = VhostUserConfigFlags::empty();
        match self
            .frontend
            .set_config(offset, flags, data)
            .map_err(called("SET_CONFIG"))
        {
            // It may say no to a store, and the guest reads what it has.
            Err(error) if !error.is_refusal() => return Err(error),
            _ => {}
        }
        let config = read_config(&mut self.frontend, self.config_bytes);
        config.map(Some).map_err(called("GET_CONFIG"))
    }

    /// Whether it has room for so many regions.
    pub(super) fn fits(&self, regions: usize) -> Result<(), TooManyRegions> {
        let most = self.max_regions;
        if regions > most {
            return Err(TooManyRegions { most });
        }
        Ok(())
    }

    /// Gives the backend regions that `table` has already. When this returns the backend has them.
    pub(super) fn add(&mut self, table: &Table, new: &[SharedRegion]) -> Result<(), CallError> {
        if new.is_empty() {
            return Ok(());
        }
        if !self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            return self.replace(table);
        }
        for region in new {
            self.frontend
                .add_mem_region(&region.message())
                .map_err(called("ADD_MEM_REG"))?;
        }
        self.settle()
    }

    /// Takes a region back that `table` has no more. When this returns the backend has let go of it; `false`: it can't be
    /// made to, because it is the last one, and the table of this backend can't be empty.
    pub(super) fn remove(&mut self, table: &Table, old: &SharedRegion) -> Result<bool, CallError> {
        if self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            self.frontend
                .remove_mem_region(&old.message())
                .map_err(called("REM_MEM_REG"))?;
            self.settle()?;
        } else if table.is_empty() {
            return Ok(false);
        } else {
            self.replace(table)?;
        }
        Ok(true)
    }

    fn replace(&mut self, table: &Table) -> Result<(), CallError> {
        self.frontend
            .set_mem_table(&table.messages())
            .map_err(called("SET_MEM_TABLE"))?;
        self.settle()
    }

    /// Waits until what was sent is done: where each message is not acknowledged, by asking something that is answered.
    fn settle(&mut self) -> Result<(), CallError> {
        if !self.has(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend
                .get_features()
                .map_err(called("GET_FEATURES"))?;
        }
        Ok(())
    }

    /// Whether it keeps what it has under way in memory that outlives it.
    pub(super) fn keeps_inflight(&self) -> bool {
        self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// An area for requests under way, for rings that start from the beginning; `None`: this backend keeps no such thing.
    pub(super) fn new_inflight(&mut self, rings: &[Ring]) -> Result<Option<Inflight>, CallError> {
        if !self.keeps_inflight() {
            return Ok(None);
        }
        let queues = rings.iter().map(|ring| ring.index + 1).max().unwrap_or(1);
        let size = rings.iter().map(|ring| ring.size).max().unwrap_or(1);
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        let (area, file) = self
            .frontend
            .get_inflight_fd(&wanted)
            .map_err(called("GET_INFLIGHT_FD"))?;
        Ok(Some(Inflight { area, file }))
    }

    /// Has the backend serve these rings, each from an index on; in use are those of the first so many queues.
    pub(super) fn start(
        &mut self,
        features: u64,
        table: &Table,
        (rings, used): (&[(&Ring, u16)], u16),
        inflight: Option<&Inflight>,
    ) -> Result<(), StartError> {
        // Those that it does not know are this side's own.
        let known = features & self.features;
        let features = known | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend
            .set_features(features)
            .map_err(called("SET_FEATURES"))?;
        if let Some(Inflight { area, file }) = inflight {
            self.frontend
                .set_inflight_fd(area, file.as_raw_fd())
                .map_err(called("SET_INFLIGHT_FD"))?;
        }
        for (ring, base) in rings {
            let addresses = addresses(ring, table).ok_or(StartError::Ring { index: ring.index })?;
            let (index, frontend) = (usize::from(ring.index), &mut self.frontend);
            frontend
                .set_vring_num(index, ring.size)
                .map_err(called("SET_VRING_NUM"))?;
            frontend
                .set_vring_base(index, *base)
                .map_err(called("SET_VRING_BASE"))?;
            frontend
                .set_vring_addr(index, &addresses)
                .map_err(called("SET_VRING_ADDR"))?;
            frontend
                .set_vring_call(index, &ring.call)
                .map_err(called("SET_VRING_CALL"))?;
            frontend
                .set_vring_kick(index, &ring.kick)
                .map_err(called("SET_VRING_KICK"))?;
        }
        for (ring, _) in rings.iter().filter(|(ring, _)| ring.index < used) {
            self.enable(ring, true)?;
        }
        Ok(self.settle()?)
    }

    fn enable(&mut self, ring: &Ring, is_used: bool) -> Result<(), CallError> {
        self.frontend
            .set_vring_enable(ring.index.into(), is_used)
            .map_err(called("SET_VRING_ENABLE"))
    }

    /// In use were the rings of the first `before` queues; from now on those of the first `after`. When this returns it is so.
    pub(super) fn change_used(
        &mut self,
        rings: &[Ring],
        before: u16,
        after: u16,
    ) -> Result<(), CallError> {
        for ring in rings {
            let (was, is) = (ring.index < before, ring.index < after);
            if was != is {
                self.enable(ring, is)?;
            }
        }
        self.settle()
    }

    /// Has the backend serve them no more. When this returns it has stopped.
    pub(super) fn stop(&mut self, rings: &[Ring]) -> Result<(), CallError> {
        for ring in rings {
            self.enable(ring, false)?;
            self.frontend
                .get_vring_base(ring.index.into())
                .map_err(called("GET_VRING_BASE"))?;
        }
        Ok(())
    }
}

/// The first so many bytes of a backend's configuration space.
fn read_config(frontend: &mut Frontend, bytes: u32) -> vhost::Result<Vec<u8>> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let empty = vec![0; bytes as usize];
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = frontend.get_config(0, bytes, flags, &empty)?;
    Ok(config)
}

/// `GET_QUEUE_NUM` of a device whose queues come in pairs. `vhost` takes the answer for the most queues there are and names no
/// others from then on, but the answer may be a number of pairs.
fn pairs(mut stream: &UnixStream) -> vhost::Result<u64> {
    const ASK: [u32; 3] = [17, 1, 0];
    const ANSWER: [u32; 3] = [17, 0b101, 8];
    let mut answer = [0; 20];
    stream
        .write_all(&ASK.map(u32::to_le_bytes).concat())
        .and_then(|()| stream.read_exact(&mut answer))
        .map_err(vhost::vhost_user::Error::SocketBroken)?;
    let (header, number) = answer.split_at(12);
    match number.try_into() {
        Ok(number) if *header == ANSWER.map(u32::to_le_bytes).concat() => {
            Ok(u64::from_le_bytes(number))
        }
        _ => Err(vhost::vhost_user::Error::InvalidMessage.into()),
    }
}

fn called(what: &'static str) -> impl Fn(vhost::Error) -> CallError {
    move |source| CallError { what, source }
}
