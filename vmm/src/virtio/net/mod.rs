//! virtio-net: a network interface whose other side is a tap of the host. Virtio 1.2, section 5.1.
//!
//! ```text
//!   guest's driver ── receive queue N  ◀── worker N ◀── readv  ── tap, queue N ── the host's network
//!                  ── transmit queue N ──▶          ──▶ writev ──▶
//!                  ── control queue    ──▶ worker 0
//! ```
//! Frames move between guest memory and the tap by one system call each; nothing is copied in between. Offloads are the
//! kernel's: the 12-byte header before each frame passes through, and the kernel checks it.
//!
//! It does not filter (MAC and VLAN filter commands are refused, the driver then does it itself) and does not announce
//! itself after a migration.

mod control;
mod counters;
mod link;
mod mac;
mod offers;
mod pairs;
mod rx;
#[allow(unsafe_code, reason = "wraps the ioctls of taps")]
mod tap;
#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod tx;
#[allow(unsafe_code, reason = "wraps readv and writev on guest memory")]
mod vectors;
mod worker;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::control::{CONTROL_SIZE, Control, Orders};
pub use self::link::{Link, Offloads};
pub use self::mac::{Mac, MacError};
pub use self::offers::Offers;
pub use self::tap::{HostSide, Tap, TapError};
pub use self::vectors::Vectors;

use self::counters::Counters;
use self::pairs::Pairs;
use self::rx::Rx;
use self::tx::Tx;
use self::worker::{PairWorker, State};
use super::device::read_space;
use super::{ActivateError, Activation, Device, Kind, Worker};

/// The virtio-net header, section 5.1.6.
const HEADER_BYTES: usize = 12;
/// The largest frame, with its header: the largest IP packet and an Ethernet header, section 5.1.6.3.1.
const LARGEST_FRAME: usize = 65562;
/// The kernel's limit for a tap.
const MOST_PAIRS: u16 = 256;
/// Smallest MTU that IPv4 can live with; the specification takes no less.
const LEAST_MTU: u16 = 68;
const LARGEST_QUEUE: u16 = 32768;

/// One network device, as asked for.
#[derive(Debug)]
pub struct NetSpec {
    /// Name of the device.
    pub id: String,
    /// A tap by name; made when there is none of that name.
    pub tap: Option<String>,
    /// The host's address on a tap that is made. Ignored for one that exists: Kata sends CH's default with every tap.
    pub ip: Option<IpAddr>,
    /// Its network mask; /24 or /64 when absent.
    pub mask: Option<IpAddr>,
    /// The guest's Ethernet address; random when absent.
    pub mac: Option<Mac>,
    /// The host's Ethernet address on a tap that is made.
    pub host_mac: Option<Mac>,
    /// Largest packet, told to the guest and set on a tap that is made.
    pub mtu: Option<u16>,
    /// Receive and transmit queues together, without the control queue.
    pub num_queues: u16,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// Queues of a tap that somebody else has opened, one for each pair; instead of `tap`.
    pub fds: Vec<OwnedFd>,
    /// Offer TCP segmentation.
    pub offload_tso: bool,
    /// Offer UDP fragmentation.
    pub offload_ufo: bool,
    /// Offer checksums. The other two mean nothing without it and are off then.
    pub offload_csum: bool,
}

impl Default for NetSpec {
    fn default() -> Self {
        Self {
            id: String::new(),
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            fds: Vec::new(),
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }
}

/// A network device can't be had.
#[derive(Debug, Error)]
pub enum NetOpenError {
    /// Not pairs, none, or too many.
    #[error(
        "network device {id}: num_queues={num_queues} is not an even number from 2 to {}: each pair is a receive and a \
         transmit queue",
        MOST_PAIRS * 2
    )]
    Queues {
        /// The device.
        id: String,
        /// What was asked for.
        num_queues: u16,
    },
    /// Not a size of a virtqueue.
    #[error(
        "network device {id}: queue_size={queue_size} is not a power of two from 2 to {LARGEST_QUEUE}"
    )]
    QueueSize {
        /// The device.
        id: String,
        /// What was asked for.
        queue_size: u16,
    },
    /// Fewer or more descriptors than pairs.
    #[error(
        "network device {id}: {fds} file descriptors are given for num_queues={num_queues}: give one for each pair of \
         queues, {}",
        num_queues / 2
    )]
    FdCount {
        /// The device.
        id: String,
        /// Descriptors given.
        fds: usize,
        /// Queues asked for.
        num_queues: u16,
    },
    /// Both a name and descriptors.
    #[error(
        "network device {id}: both tap={tap} and fd= are given: the descriptors are the tap, leave out one of the two"
    )]
    TapAndFds {
        /// The device.
        id: String,
        /// The name.
        tap: String,
    },
    /// Too small for IP.
    #[error(
        "network device {id}: mtu={mtu} is less than {LEAST_MTU}, the least that IP works with"
    )]
    Mtu {
        /// The device.
        id: String,
        /// What was asked for.
        mtu: u16,
    },
    /// A mask for nothing.
    #[error("network device {id}: mask={mask} is given without ip=")]
    MaskWithoutIp {
        /// The device.
        id: String,
        /// The mask.
        mask: IpAddr,
    },
    /// Not a mask of this address.
    #[error(
        "network device {id}: mask={mask} is no network mask for ip={ip}: ones followed by zeros, of the same version of IP"
    )]
    Mask {
        /// The device.
        id: String,
        /// The address.
        ip: IpAddr,
        /// The mask.
        mask: IpAddr,
    },
    /// The two ends of one cable.
    #[error(
        "network device {id}: mac and host_mac are both {mac}: the guest's and the host's end need addresses of their own"
    )]
    SameMac {
        /// The device.
        id: String,
        /// The address.
        mac: Mac,
    },
    /// The host's side.
    #[error("network device {id} gets no tap")]
    Tap {
        /// The device.
        id: String,
        /// What is wrong.
        #[source]
        source: TapError,
    },
}

/// A network device.
pub struct NetDevice {
    id: String,
    mac: Mac,
    mtu: Option<u16>,
    queue_size: u16,
    features: u64,
    links: Vec<Arc<dyn Link>>,
    link_up: Arc<AtomicBool>,
    counters: Arc<Counters>,
}

impl NetDevice {
    /// Checks what was asked for and takes it from the host. On failure nothing is left behind.
    pub fn open(mut spec: NetSpec) -> Result<Self, NetOpenError> {
        spec.check()?;
        let links = spec
            .open_tap()
            .map_err(|source| NetOpenError::Tap {
                id: spec.id.clone(),
                source,
            })?
            .into_iter()
            .map(|queue| Arc::new(queue) as Arc<dyn Link>)
            .collect();
        Ok(Self::with_links(spec, links))
    }

    fn with_links(spec: NetSpec, links: Vec<Arc<dyn Link>>) -> Self {
        Self {
            mac: spec.mac.unwrap_or_else(Mac::random),
            mtu: spec.mtu,
            queue_size: spec.queue_size,
            features: spec.features(),
            id: spec.id,
            links,
            link_up: Arc::new(AtomicBool::new(true)),
            counters: Arc::default(),
        }
    }

    /// The guest's Ethernet address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// `_net0_qp1`: an id may be longer than a thread's name.
    fn thread_name(&self, pair: usize) -> String {
        let suffix = format!("_qp{pair}");
        let mut name = String::from(if self.id.starts_with('_') { "" } else { "_" });
        for c in self.id.chars() {
            if name.len() + c.len_utf8() + suffix.len() > 15 {
                break;
            }
            name.push(c);
        }
        name + &suffix
    }
}

impl NetSpec {
    /// The queues of the tap. What the kernel can't do is no longer asked for.
    fn open_tap(&mut self) -> Result<Vec<Tap>, TapError> {
        let queues = if self.fds.is_empty() {
            let side = HostSide {
                ip: self.ip,
                mask: self.mask,
                mac: self.host_mac,
                mtu: self.mtu,
            };
            Tap::open(self.tap.as_deref(), usize::from(self.num_queues / 2), &side)?
        } else {
            Tap::from_fds(std::mem::take(&mut self.fds))?
        };
        if let Some(first) = queues.first() {
            self.offload_ufo &= first.probe_ufo()?;
        }
        Ok(queues)
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CTRL_VQ,
        ];
        if self.offload_csum {
            bits.push(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
        }
        if self.num_queues > 2 {
            bits.push(VIRTIO_NET_F_MQ);
        }
        if self.mtu.is_some() {
            bits.push(VIRTIO_NET_F_MTU);
        }
        let offers = Offers {
            tso: self.offload_tso,
            ufo: self.offload_ufo,
            csum: self.offload_csum,
        };
        bits.into_iter()
            .fold(offers.features(), |features, bit| features | 1 << bit)
    }

    fn check(&self) -> Result<(), NetOpenError> {
        let id = self.id.clone();
        let &Self {
            num_queues,
            queue_size,
            ..
        } = self;
        if num_queues == 0 || num_queues % 2 != 0 || num_queues / 2 > MOST_PAIRS {
            return Err(NetOpenError::Queues { id, num_queues });
        }
        if !queue_size.is_power_of_two() || !(2..=LARGEST_QUEUE).contains(&queue_size) {
            return Err(NetOpenError::QueueSize { id, queue_size });
        }
        if !self.fds.is_empty() {
            if let Some(tap) = self.tap.clone() {
                return Err(NetOpenError::TapAndFds { id, tap });
            }
            let fds = self.fds.len();
            if fds != usize::from(num_queues / 2) {
                return Err(NetOpenError::FdCount {
                    id,
                    fds,
                    num_queues,
                });
            }
        }
        if let Some(mtu) = self.mtu
            && mtu < LEAST_MTU
        {
            return Err(NetOpenError::Mtu { id, mtu });
        }
        match (self.ip, self.mask) {
            (None, Some(mask)) => return Err(NetOpenError::MaskWithoutIp { id, mask }),
            (Some(ip), Some(mask)) if !is_mask_of(mask, ip) => {
                return Err(NetOpenError::Mask { id, ip, mask });
            }
            _ => {}
        }
        if let (Some(mac), Some(host_mac)) = (self.mac, self.host_mac)
            && mac == host_mac
        {
            return Err(NetOpenError::SameMac { id, mac });
        }
        Ok(())
    }
}

fn is_mask_of(mask: IpAddr, ip: IpAddr) -> bool {
    match (mask, ip) {
        (IpAddr::V4(mask), IpAddr::V4(_)) => {
            let bits = mask.to_bits();
            bits.leading_ones() == bits.count_ones()
        }
        (IpAddr::V6(mask), IpAddr::V6(_)) => {
            let bits = mask.to_bits();
            bits.leading_ones() == bits.count_ones()
        }
        _ => false,
    }
}

impl Device for NetDevice {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.queue_size; self.links.len() * 2];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        // mac, status, max_virtqueue_pairs, mtu: section 5.1.4.
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac.bytes());
        let up = u8::from(self.link_up.load(Ordering::SeqCst));
        space[6] = up * u8::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or_default();
        let pairs = u16::try_from(self.links.len()).unwrap_or(MOST_PAIRS);
        space[8..10].copy_from_slice(&pairs.to_le_bytes());
        space[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        read_space(&space, offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let features = activation.features;
        let mergeable = activation.has(VIRTIO_NET_F_MRG_RXBUF);
        let large = [
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_UFO,
        ]
        .into_iter()
        .any(|bit| activation.has(bit));
        let host = |what| move |source| ActivateError::Host { what, source };

        let mut queues = activation.queues;
        let mut control = Control::split_off(&mut queues, features, self.links.len());
        let mut parts = Vec::new();
        let mut queues = queues.into_iter();
        // A driver may leave out pairs at the end, but not the first.
        while let (Some(rx), Some(tx)) = (queues.next(), queues.next()) {
            match (rx, tx) {
                (Some(rx), Some(tx)) => parts.push((rx, tx)),
                (None, _) if parts.is_empty() => {
                    return Err(ActivateError::MissingQueue { index: 0 });
                }
                (_, None) if parts.is_empty() => {
                    return Err(ActivateError::MissingQueue { index: 1 });
                }
                _ => break,
            }
        }
        let Some(first) = self.links.first() else {
            return Err(ActivateError::MissingQueue { index: 0 });
        };

        let wakes = parts
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()
            .map_err(host("can't get an event for a network device's worker"))?;
        if self.link_up.load(Ordering::SeqCst) {
            first
                .set_offloads(Offloads::from_features(features))
                .map_err(host("can't set the offloads of a tap"))?;
        }
        let pairs = Pairs::new(self.links.clone(), wakes.clone())
            .map_err(host("can't detach the queues of a tap that are not in use"))?;
        let pairs = Arc::new(pairs);
        let workers = parts.into_iter().zip(&self.links).zip(wakes).enumerate();
        Ok(workers
            .map(|(pair, (((rx, tx), link), turn))| {
                Box::new(PairWorker {
                    name: self.thread_name(pair),
                    pair,
                    memory: activation.memory.clone(),
                    link: Arc::clone(link),
                    counters: Arc::clone(&self.counters),
                    link_up: Arc::clone(&self.link_up),
                    signals: Arc::clone(&activation.signals),
                    pairs: Arc::clone(&pairs),
                    turn,
                    rx: Rx::new(rx, mergeable, large),
                    tx: Tx::new(tx),
                    control: control.take(),
                    state: State::default(),
                }) as Box<dyn Worker>
            })
            .collect())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }
}
