//! What a backend is to have and to do, and whether one is there that does it. Lives on the caller's thread.
//!
//! ```text
//!                attach, detach, start, stop: done at once            the same: noted for the next one
//!    meet ──▶ connected ──────────────────────────────▶ lost ───────────────────────┐
//!                 ▲        hung up, garbage, no answer    │                          │
//!                 └────── met again, with a back-off ◀────┴──────────────────────────┘
//!                       memory, rings, requests under way given anew
//! ```
//! A backend that is lost is nobody's error: what was asked of it is what the next one is told.

use std::fmt;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use thiserror::Error;
use tracing::{debug, info, warn};
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::connection::{
    CallError, ConnectError, Connection, Inflight, StartError, TooManyRegions,
};
use super::lending::{Asked, Known, Loan, Message};
use super::shared::Shared;
use super::table::{SharedRegion, Table};
use crate::memory::ram::GuestView;
use crate::virtio::device::Signals;
use crate::virtio::queue::Ring;

/// Memory that a backend does not take.
#[derive(Debug, Error)]
pub enum AttachError {
    /// Too much of it.
    #[error(transparent)]
    Regions(#[from] TooManyRegions),
    /// It says no.
    #[error("the backend refuses the memory{}", if *device { OF_NO_SIZE } else { "" })]
    Refused {
        /// Whether it is a device's.
        device: bool,
        /// What it said.
        #[source]
        source: CallError,
    },
    /// The thread that talks to it.
    #[error(transparent)]
    NoAnswer(#[from] super::caller::NoAnswer),
}

/// Seen with DPDK 24.11 and virtiofsd 1.13, whose versions of DPDK's `vhost_user.c` and of `vm-memory` look at the size first.
const OF_NO_SIZE: &str = "; one that goes by the size of the file refuses every device-dax device, whose size is 0 there: start \
                          another version of it, or give the guest memory with shared=on and no file=";

/// What the driver wants served, until it resets the device.
pub struct Service {
    pub(super) features: u64,
    pub(super) rings: Vec<Ring>,
    /// The rings of the first so many queues are in use, which the driver can change.
    pub(super) used: u16,
    pub(super) memory: GuestView,
    pub(super) signals: Arc<dyn Signals>,
    pub(super) inflight: Option<Inflight>,
    /// Whether a backend has had these rings.
    pub(super) was_served: bool,
}

impl Service {
    /// From which request on a ring is served. Not the first one, when a backend had it before: what that one has taken and
    /// not finished is in the memory for requests under way, if there is one. Without, those between the used index and the
    /// available one are served again, which is right for a backend that finishes requests in order.
    fn base(&self, ring: &Ring) -> Result<u16, StartError> {
        if !self.was_served {
            return Ok(0);
        }
        let index = GuestAddress(ring.used.saturating_add(2));
        let index = self.memory.memory().load::<u16>(index, Ordering::Acquire);
        index
            .map(u16::from_le)
            .map_err(|_| StartError::Ring { index: ring.index })
    }

    fn give_to(&mut self, connection: &mut Connection, table: &Table) -> Result<(), StartError> {
        // The one before may have kept such memory and this one does not, or the other way round.
        if !self.was_served || self.inflight.is_none() || !connection.keeps_inflight() {
            self.inflight = connection.new_inflight(&self.rings)?;
        }
        let mut rings = Vec::with_capacity(self.rings.len());
        for ring in &self.rings {
            rings.push((ring, self.base(ring)?));
        }
        let rings = (&rings[..], self.used);
        connection.start(self.features, table, rings, self.inflight.as_ref())?;
        if self.was_served {
            for ring in &self.rings {
                // The one before may have taken a bell and died before it did what it rang for, in both directions. Only a
                // full counter gives an error, and then it rings anyway.
                let _ = ring.kick.write(1);
                let _ = ring.call.write(1);
            }
        }
        self.was_served = true;
        Ok(())
    }
}

/// One backend.
pub(super) struct Session {
    shared: Arc<Shared>,
    connection: Option<Connection>,
    /// One that has said what it is, and knows of no memory yet.
    met: Option<Connection>,
    table: Table,
    service: Option<Service>,
    /// Features that the guest was offered.
    promised: Option<u64>,
    /// What the first backend has lent, until the owner takes it.
    loan: Option<Loan>,
    /// The memory that the guest has of a backend's.
    borrowed: Borrowed,
}

/// How it stands with memory that is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Borrowed {
    /// Nothing was, so far.
    Not,
    /// This, from now on.
    This(Known),
    /// The host took it away: nothing is lent again.
    TakenAway,
}

impl Session {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            connection: None,
            met: None,
            table: Table::default(),
            service: None,
            promised: None,
            loan: None,
            borrowed: Borrowed::Not,
        }
    }

    /// Finds a backend, and gives it everything. Without an effect when there is one.
    pub(super) fn connect(&mut self) -> Result<(), ConnectError> {
        self.meet()?;
        self.provide()
    }

    /// Finds a backend and asks what it is. Without an effect when there is one. [`Session::provide`] comes next.
    pub(super) fn meet(&mut self) -> Result<(), ConnectError> {
        if self.connection.is_some() || self.shared.is_closed() {
            return Ok(());
        }
        let met = self.try_meet();
        self.met = Some(self.or_hang_up(met)?);
        Ok(())
    }

    /// Gives the backend that was met everything. Without an effect when none was.
    pub(super) fn provide(&mut self) -> Result<(), ConnectError> {
        let (Some(connection), Some(promised)) = (self.met.take(), self.promised) else {
            return Ok(());
        };
        let provided = self.try_provide(connection, promised);
        self.or_hang_up(provided)
    }

    fn or_hang_up<T>(&self, outcome: Result<T, ConnectError>) -> Result<T, ConnectError> {
        outcome.inspect_err(|error| {
            self.shared.line.hang_up();
            self.shared.not_connected(error);
        })
    }

    fn try_meet(&mut self) -> Result<Connection, ConnectError> {
        let shared = Arc::clone(&self.shared);
        let Shared {
            socket,
            class,
            shape,
            ..
        } = shared.as_ref();
        let stream = shared.meet()?;
        let own = stream.try_clone().map_err(|source| ConnectError::Socket {
            socket: socket.display().to_string(),
            example: class.example,
            source,
        })?;
        self.shared.line.set(own);
        if self.shared.is_closed() {
            // Whoever closed it may not have seen this line.
            self.shared.line.cut();
        }
        let connection = Connection::open(stream, socket, class, shape.queues())?;
        let features = connection.features & (class.features | super::RING_FEATURES);
        let promised = *self.promised.get_or_insert(features);
        if promised & !features != 0 {
            return Err(ConnectError::Changed {
                socket: socket.display().to_string(),
                missing: promised & !features,
            });
        }
        Ok(connection)
    }

    fn try_provide(
        &mut self,
        mut connection: Connection,
        promised: u64,
    ) -> Result<(), ConnectError> {
        let shared = Arc::clone(&self.shared);
        let failed = |source| ConnectError::Call {
            socket: shared.socket.display().to_string(),
            source,
        };
        connection.fits(self.table.len())?;
        connection
            .add(&self.table, self.table.regions())
            .map_err(failed)?;
        self.borrow(&mut connection)?;
        let config = shared
            .class
            .config(std::mem::take(&mut connection.config), &shared.shape);
        let changed = shared.set_config(config, promised);
        if let Some(service) = &mut self.service {
            match service.give_to(&mut connection, &self.table) {
                Ok(()) => {}
                Err(StartError::Call(error)) => return Err(failed(error)),
                Err(error @ StartError::Ring { .. }) => {
                    service.signals.needs_reset(&error);
                    self.service = None;
                }
            }
        }
        self.connection = Some(connection);
        info!(device = shared.id, socket = %shared.socket.display(), "a vhost-user backend serves the device");
        shared.connected();
        if changed && let Some(service) = &self.service {
            service.signals.config_changed();
        }
        Ok(())
    }

    /// What a backend lends: the first one's is for the owner to map, a later one's has to be the same.
    fn borrow(&mut self, connection: &mut Connection) -> Result<(), ConnectError> {
        let Some(lending) = &mut connection.lending else {
            return Ok(());
        };
        let socket = || self.shared.socket.display().to_string();
        let failed = |source: io::Error| ConnectError::Socket {
            socket: socket(),
            example: self.shared.class.example,
            source,
        };
        if self.borrowed == Borrowed::TakenAway {
            return Err(ConnectError::TakenAway { socket: socket() });
        }
        let nothing = || ConnectError::NothingLent { socket: socket() };
        let line = self.shared.line.get().ok_or_else(nothing)?;
        let loan = lending.loan(&line).map_err(|error| {
            debug!(device = self.shared.id, %error, "nothing is lent");
            nothing()
        })?;
        let loan = loan.map_err(|source| ConnectError::Loan {
            socket: socket(),
            source,
        })?;
        let known = loan.known().map_err(failed)?;
        match self.borrowed {
            Borrowed::This(before) if before == known => {
                lending.settle(true).map_err(failed)?;
            }
            Borrowed::This(before) => {
                lending.settle(false).map_err(failed)?;
                return Err(ConnectError::OtherLoan {
                    socket: socket(),
                    lent: known.size,
                    kept: before.size,
                });
            }
            Borrowed::Not | Borrowed::TakenAway => {
                self.borrowed = Borrowed::This(known);
                self.loan = Some(loan);
            }
        }
        self.shared.set_channel(Some(lending.channel.stream()));
        Ok(())
    }

    /// What was lent, for the one who maps it.
    pub(super) fn take_loan(&mut self) -> Option<Loan> {
        self.loan.take()
    }

    /// It is mapped: the guest's from now on. The backend hears of it.
    pub(super) fn loan_is_mapped(&mut self) {
        let lending = self.connection.as_mut().and_then(|it| it.lending.as_mut());
        if let Some(Err(error)) = lending.map(|lending| lending.settle(true)) {
            self.lose(&error);
        }
    }

    /// The guest has it no more, and gets nothing instead. When this returns no backend serves it.
    pub(super) fn borrow_no_more(&mut self) {
        self.stop();
        self.borrowed = Borrowed::TakenAway;
    }

    /// A backend says something by itself. Memory stays where it is, whatever it wants: one that wants it back is told of, and its
    /// device is removed as the host's wish has any device removed.
    pub(super) fn asked(&mut self) {
        let Some(lending) = self.connection.as_mut().and_then(|it| it.lending.as_mut()) else {
            return;
        };
        // As much as one look is good for; there is another when there is more.
        for _ in 0..16 {
            let error = match lending.channel.receive() {
                Ok(None) => return,
                Ok(Some(Message { asked, reply })) => {
                    let wants_back = matches!(asked, Asked::Unmap);
                    if wants_back && !std::mem::replace(&mut lending.is_wanted_back, true) {
                        self.shared.wanted_back();
                    }
                    // Once: it may ask as often as it likes.
                    if !wants_back && !std::mem::replace(&mut lending.is_told, true) {
                        warn!(
                            device = self.shared.id,
                            ?asked,
                            "the backend asks for what is not done while a guest has its memory"
                        );
                    }
                    match lending.channel.answer(reply, false) {
                        Ok(()) => continue,
                        Err(error) => error.into(),
                    }
                }
                Err(error) => error,
            };
            self.shared.set_channel(None);
            if !error.is_end() {
                self.lose(&error);
            }
            return;
        }
    }

    /// The backend can't be used any more.
    fn lose(&mut self, why: &dyn fmt::Display) {
        self.connection = None;
        self.shared.set_channel(None);
        let gave_up = self.shared.line.hang_up();
        let why = if gave_up {
            format!("it did not answer in time ({why})")
        } else {
            why.to_string()
        };
        if self.shared.is_closed() {
            debug!(device = self.shared.id, why, "the backend is let go of");
            return;
        }
        warn!(device = self.shared.id, socket = %self.shared.socket.display(), why, "the vhost-user backend is lost; the device waits for one");
        self.shared.lost(why);
    }

    /// The other side has closed the connection, if it is still this one.
    pub(super) fn hung_up(&mut self, connections: u64) {
        if self.connection.is_some() && self.shared.line.count() == connections {
            self.lose(&"it closed the connection");
        }
    }

    /// More memory. When this returns a backend that is there has it.
    pub(super) fn attach(&mut self, regions: &[SharedRegion]) -> Result<(), AttachError> {
        if let Some(connection) = &self.connection {
            connection.fits(self.table.len() + regions.len())?;
        }
        self.table.add(regions);
        let began = Instant::now();
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        if let Err(error) = connection.add(&self.table, regions) {
            if error.is_refusal() {
                // What of it the backend has taken goes with the connection.
                for region in regions {
                    self.table.take(region.gpa);
                }
                self.lose(&error);
                let mut files = regions.iter().map(|region| region.file.metadata());
                return Err(AttachError::Refused {
                    device: files.any(|it| it.is_ok_and(|it| it.file_type().is_char_device())),
                    source: error,
                });
            }
            self.lose(&error);
            return Ok(());
        }
        let elapsed_us = began.elapsed().as_micros();
        info!(
            device = self.shared.id,
            regions = regions.len(),
            elapsed_us,
            "a vhost-user backend has more memory"
        );
        Ok(())
    }

    /// Less memory. When this returns no backend has it: one that does not let go is cut off.
    pub(super) fn detach(&mut self, gpa: u64) {
        let Some(region) = self.table.take(gpa) else {
            return;
        };
        if let Some(connection) = &mut self.connection {
            match connection.remove(&self.table, &region) {
                Ok(true) => {}
                Ok(false) => self.lose(&"its last memory was taken away"),
                Err(error) => self.lose(&error),
            }
        }
    }

    /// The driver is ready.
    pub(super) fn start(&mut self, mut service: Service) {
        if let Some(connection) = &mut self.connection {
            match service.give_to(connection, &self.table) {
                Ok(()) => {}
                Err(StartError::Call(error)) => self.lose(&error),
                Err(error @ StartError::Ring { .. }) => {
                    service.signals.needs_reset(&error);
                    return;
                }
            }
        }
        self.service = Some(service);
    }

    /// The driver has stored something in the configuration space.
    pub(super) fn write_config(&mut self, offset: u32, data: &[u8]) {
        let (Some(connection), Some(promised)) = (&mut self.connection, self.promised) else {
            return;
        };
        match connection.write_config(offset, data) {
            Ok(Some(config)) => {
                self.shared.set_config(config, promised);
            }
            Ok(None) => {}
            Err(error) => self.lose(&error),
        }
    }

    /// The driver uses the first so many queues from now on.
    pub(super) fn use_queues(&mut self, after: u16) {
        let Some(service) = &mut self.service else {
            return;
        };
        let before = std::mem::replace(&mut service.used, after);
        if let Some(connection) = &mut self.connection
            && let Err(error) = connection.change_used(&service.rings, before, after)
        {
            self.lose(&error);
        }
    }

    /// The driver has reset the device. When this returns no backend serves it: one that does not stop is cut off.
    pub(super) fn stop(&mut self) {
        let Some(service) = self.service.take() else {
            return;
        };
        if let Some(connection) = &mut self.connection
            && service.was_served
            && let Err(error) = connection.stop(&service.rings)
        {
            self.lose(&error);
        }
    }
}
