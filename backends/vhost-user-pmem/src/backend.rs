//! The device as the vhost crate drives it: rings, memory and features of one session. A new one for each connection.
//!
//! ```text
//!   SET_BACKEND_REQ_FD ─▶ is the range ours? ─yes─▶ SHMEM_MAP, on a thread of its own ─▶ mapped: lent
//!                            │ no: kept                          ▲       └─▶ refused: the session ends
//!                            └─▶ memory tables: does one show it? ┘
//!   the host wants it ─▶ SHMEM_UNMAP, on a thread of its own ─▶ unmapped, or no memory table shows it any more: given back
//!   SET_FEATURES ─▶ nothing was lent, or could be: that is said, and the session ends
//!   kick ─▶ take all that wait ─▶ one flush for all of them ─▶ answer all
//! ```

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use daxhund_dax::loss::Epoch;
use daxhund_vhost_user::guest::GuestMemory;
use daxhund_vhost_user::session::{Connection, Device};
use daxhund_virtio_pmem::{Asked, Request, Response};
use vhost::vhost_user::message::{
    VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Backend as Channel, VhostUserFrontendReqHandler};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::{virtio_config, virtio_ring};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;

use crate::lender::Lender;
use crate::metrics::Metrics;

/// `VIRTIO_PMEM_F_SHMEM_REGION`: the memory is the device's shared memory region 0.
const SHMEM_REGION: u32 = 0;
/// The region.
const SHMID: u8 = 0;
/// The one queue's.
const QUEUE_SIZE: usize = 256;
/// The crate's own token is 1, behind the queue's.
const EXIT: u64 = 2;

/// One session's device.
#[derive(Debug)]
pub struct Backend {
    lender: Arc<Lender>,
    metrics: Arc<Metrics>,
    line: Arc<Line>,
    stopping: AtomicBool,
    /// It was said that the ring makes no sense.
    is_told: AtomicBool,
    /// Held for reading for a batch, and taken before the lock of the ring.
    guest: RwLock<GuestMemory>,
}

/// The other direction of the connection: what is said to the frontend by itself.
#[derive(Debug, Default)]
struct Line {
    state: Mutex<State>,
    connection: Mutex<Ending>,
    /// The frontend's memory table has shown the range.
    is_shown: AtomicBool,
    /// It does not have it any more.
    is_back: AtomicBool,
}

#[derive(Default)]
enum State {
    /// The frontend has not opened it.
    #[default]
    Closed,
    /// Nothing was lent yet: the range is kept by somebody.
    Open(Channel),
    /// The frontend was asked to map it, and may have.
    Asked(Channel),
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Closed => "Closed",
            Self::Open(_) => "Open",
            Self::Asked(_) => "Asked",
        })
    }
}

/// Whether the session is to end, which can be known before it can be ended.
#[derive(Debug, Default)]
struct Ending {
    connection: Option<Connection>,
    is_wanted: bool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Line {
    fn connected(&self, connection: Connection) {
        let mut ending = locked(&self.connection);
        if ending.is_wanted {
            connection.shut();
        }
        ending.connection = Some(connection);
    }

    fn end(&self) {
        let mut ending = locked(&self.connection);
        ending.is_wanted = true;
        if let Some(connection) = &ending.connection {
            connection.shut();
        }
    }
}

impl Backend {
    /// For a range.
    pub fn new(lender: Arc<Lender>, metrics: Arc<Metrics>) -> Self {
        Self {
            lender,
            metrics,
            line: Arc::default(),
            stopping: AtomicBool::new(false),
            is_told: AtomicBool::new(false),
            guest: RwLock::default(),
        }
    }

    /// Asks the frontend to map what `file` has of the range. Not waited for here: a frontend may answer messages only
    /// when its own are answered. A frontend that answers nothing keeps a thread for as long as it is there.
    fn lend(&self, channel: Channel, file: Arc<File>) {
        let request = self.request();
        *locked(&self.line.state) = State::Asked(channel.clone());
        let (line, path) = (
            Arc::clone(&self.line),
            self.lender.path().display().to_string(),
        );
        let loans = self.metrics.loans.clone();
        let ask = move || match channel.shmem_map(&request, &*file) {
            Ok(_) => {
                loans.inc();
                tracing::info!(path, "lent: the frontend has mapped it");
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    "the frontend does not map {path} (SHMEM_MAP): its own messages say why; it has to take shared memory regions"
                );
                line.end();
            }
        };
        let spawned = std::thread::Builder::new().name("lend".into()).spawn(ask);
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to lend the memory by");
            self.line.end();
        }
    }

    /// All of the range, as all of the region.
    fn request(&self) -> VhostUserMMap {
        VhostUserMMap {
            shmid: SHMID,
            padding: [0; 7],
            fd_offset: self.lender.offset(),
            shm_offset: 0,
            len: self.lender.len(),
            flags: if self.lender.is_read_only() {
                VhostUserMMapFlags::default().bits()
            } else {
                VhostUserMMapFlags::WRITABLE.bits()
            },
        }
    }

    /// The host wants the memory: the frontend is asked for it. One that has none, or can't be asked, is not. The answer is not
    /// waited for, and "no" may mean "not yet": what counts is whether it has the range mapped ([`Backend::has_given_back`]).
    pub fn ask_back(&self) {
        let channel = match &*locked(&self.line.state) {
            State::Asked(channel) => channel.clone(),
            State::Closed | State::Open(_) => return,
        };
        let request = VhostUserMMap {
            fd_offset: 0,
            flags: 0,
            ..self.request()
        };
        let (line, lender) = (Arc::clone(&self.line), Arc::clone(&self.lender));
        let ask = move || match channel.shmem_unmap(&request) {
            Ok(_) => {
                tracing::info!("the frontend has unmapped the memory");
                line.is_back.store(true, Ordering::SeqCst);
                lender.ring();
            }
            Err(error) => {
                tracing::info!(%error, "the frontend has not unmapped the memory (SHMEM_UNMAP), or not yet");
            }
        };
        let spawned = std::thread::Builder::new().name("lend".into()).spawn(ask);
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to ask for the memory by");
        }
    }

    /// Whether the frontend has nothing of the memory, as far as it says: it was lent nothing, has unmapped it, or has taken it
    /// from its guest's memory.
    pub fn has_given_back(&self) -> bool {
        let was_asked = matches!(&*locked(&self.line.state), State::Asked(_));
        !was_asked || self.line.is_back.load(Ordering::SeqCst)
    }

    /// The range was let go of and is to be had again: the frontend's memory may show it.
    pub fn look_again(&self) {
        let guest = self.guest.read().unwrap_or_else(PoisonError::into_inner);
        // What comes of it is the lender's; the frontend has it.
        let _ = self.recognise(&guest);
    }

    fn recognise(&self, guest: &GuestMemory) -> Option<Arc<File>> {
        guest.iter().find_map(|region| {
            let part = region.file_offset()?;
            self.lender
                .recognise(part.file(), part.start(), region.len())
        })
    }

    /// The frontend may be the one that has kept the range.
    fn look_for_the_range(&self, guest: &GuestMemory) {
        let channel = match &*locked(&self.line.state) {
            State::Open(channel) => channel.clone(),
            State::Closed | State::Asked(_) => return,
        };
        if let Some(file) = self.recognise(guest) {
            tracing::info!("the frontend has the range already: it is served again");
            self.lend(channel, file);
        }
    }

    /// Whether the table still shows what it has shown. Only a frontend that gives the range up takes it out.
    fn look_at_the_table(&self, guest: &GuestMemory) {
        let shows = guest.iter().any(|region| {
            region.file_offset().is_some_and(|part| {
                self.lender
                    .is_of_the_range(part.file(), part.start(), region.len())
            })
        });
        let was_shown = self.line.is_shown.swap(shows, Ordering::SeqCst);
        if was_shown != shows {
            self.line.is_back.store(was_shown, Ordering::SeqCst);
            self.lender.ring();
        }
    }

    fn serve(&self, vring: &VringMutex) -> Result<(), virtio_queue::Error> {
        loop {
            let guest = self.guest.read().unwrap_or_else(PoisonError::into_inner);
            let mut state = vring.get_mut();
            let is_on = state.is_enabled() && state.get_queue().ready();
            if !is_on || self.stopping.load(Ordering::SeqCst) {
                return Ok(());
            }
            let batch = take_all(state.get_queue_mut(), &guest)?;
            if batch.is_empty() {
                if state.get_queue_mut().enable_notification(&*guest)? {
                    continue;
                }
                return Ok(());
            }
            drop(state);
            let wanted = batch.iter().any(|request| request.asked() == Asked::Flush);
            let flushed = !wanted || self.flush();
            let mut state = vring.get_mut();
            let queue = state.get_queue_mut();
            for request in batch {
                let response = match request.asked() {
                    Asked::Flush if flushed => Response::Done,
                    Asked::Flush | Asked::Unknown => Response::Failed,
                };
                self.metrics.requests.inc();
                if response == Response::Failed {
                    self.metrics.errors.inc();
                }
                let written = request.respond(&*guest, response);
                queue.add_used(&*guest, request.head(), written)?;
            }
            // Rings that can't be read any more: the driver is told rather than not.
            if queue.needs_notification(&*guest).unwrap_or(true)
                && let Err(error) = state.signal_used_queue()
            {
                tracing::debug!(%error, "the driver can't be told");
            }
        }
    }

    fn flush(&self) -> bool {
        let flushed = self.lender.flush();
        if let Err(error) = &flushed {
            tracing::error!(%error, "a flush failed; the guest is told");
        }
        if flushed.is_ok() {
            self.metrics.flushes.inc();
        }
        flushed.is_ok()
    }
}

/// What is available now. When guest memory was lost meanwhile it is read again: what is lost is an error from then on.
fn take_all(queue: &mut Queue, guest: &GuestMemory) -> Result<Vec<Request>, virtio_queue::Error> {
    let first = queue.next_avail();
    loop {
        let epoch = Epoch::now();
        let mut batch = Vec::new();
        let read = loop {
            match queue.avail_idx(guest, Ordering::Acquire) {
                // A driver has no more chains than descriptors; one that makes the ring turn faster waits.
                Ok(available)
                    if available.0 == queue.next_avail()
                        || batch.len() == usize::from(queue.size()) =>
                {
                    break Ok(());
                }
                Ok(_) => {}
                Err(error) => break Err(error),
            }
            // The crate's iterator ends both at the end of the ring and where the ring can't be read.
            match queue.iter(guest).map(|mut chains| chains.next()) {
                Ok(Some(chain)) => batch.push(Request::parse(chain)),
                Ok(None) => break Err(virtio_queue::Error::InvalidAvailRingIndex),
                Err(error) => break Err(error),
            }
        };
        if epoch.unbroken().is_ok() {
            return read.map(|()| batch);
        }
        queue.set_next_avail(first);
    }
}

impl Device for Backend {
    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    fn exit_token(&self) -> u64 {
        EXIT
    }

    fn connected(&self, connection: Connection) {
        self.line.connected(connection);
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << virtio_config::VIRTIO_F_VERSION_1
            | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC
            | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX
            | 1 << SHMEM_REGION
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// By now a frontend has said how it can be lent anything.
    fn acked_features(&self, _: u64) {
        match &*locked(&self.line.state) {
            State::Asked(_) => return,
            State::Closed => tracing::error!(
                "the frontend wants persistent memory and takes no shared memory regions (VHOST_USER_PROTOCOL_F_SHMEM with \
                 SET_BACKEND_REQ_FD), by which this daemon lends it; connect a VMM that does: daxhund --pmem socket=PATH"
            ),
            State::Open(_) => {
                let why = self.lender.lend().err().unwrap_or_default();
                tracing::error!("the frontend can't be lent the memory: {why}");
            }
        }
        self.line.end();
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::SHMEM
    }

    /// The rings themselves are told by the crate.
    fn set_event_idx(&self, _: bool) {}

    /// Start and size. Where the guest has it is the frontend's to say.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = [[0; 8], self.lender.len().to_le_bytes()].concat();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let len = usize::try_from(size).unwrap_or(0);
        let there = space.into_iter().skip(from);
        there.chain(std::iter::repeat(0)).take(len).collect()
    }

    fn set_config(&self, _: u32, _: &[u8]) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "nothing of the device's configuration can be written",
        ))
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[self.lender.len()]))
    }

    fn set_backend_req_fd(&self, channel: Channel) {
        if matches!(&*locked(&self.line.state), State::Asked(_)) {
            tracing::warn!("the frontend opens another channel: the first has what is lent");
            return;
        }
        match self.lender.lend() {
            Ok(file) => self.lend(channel, file),
            Err(why) => {
                tracing::warn!(
                    "nothing is lent to this frontend unless it shows that it has the range already: {why}"
                );
                *locked(&self.line.state) = State::Open(channel);
            }
        }
    }

    /// When this returns, nobody touches what is not shared any more, and it is unmapped here.
    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let mut guest = self.guest.write().unwrap_or_else(PoisonError::into_inner);
        let following = GuestMemory::following(&guest, &memory.memory());
        *guest = following.map_err(io::Error::other)?;
        drop(guest);
        let guest = self.guest.read().unwrap_or_else(PoisonError::into_inner);
        self.look_for_the_range(&guest);
        self.look_at_the_table(&guest);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![1]
    }

    /// When this returns, every request that was taken is answered.
    fn stop_vring(&self, _: u32) -> io::Result<()> {
        drop(self.guest.write().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// An error ends the worker, so it is given for nothing but the end of the session.
    fn handle_event(
        &self,
        event: u16,
        _: EventSet,
        vrings: &[VringMutex],
        _: usize,
    ) -> io::Result<()> {
        if u64::from(event) == EXIT {
            return Err(io::Error::new(
                io::ErrorKind::Interrupted,
                "the session is over",
            ));
        }
        if let Some(vring) = vrings.get(usize::from(event))
            && let Err(error) = self.serve(vring)
            && !self.is_told.swap(true, Ordering::SeqCst)
        {
            tracing::warn!(%error, "the rings make no sense, or their memory is gone");
        }
        Ok(())
    }
}
