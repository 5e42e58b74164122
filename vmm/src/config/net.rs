//! `--net`: a network interface of the guest and its other end, a tap or a vhost-user backend.
//!
//! File descriptors never come by JSON: a number there would name any file of the VMM that a client likes. They come
//! from the command line, or beside an API request (`SCM_RIGHTS`), and whoever received them fills
//! [`NetConfig::fds`].

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::backend::{self, BackendError, VhostMode};
use super::device::{
    IdAllocator, IdError, Naming, OnPci, PciFields, Place, PlaceError, id_key, number_key,
    segment_key,
};
use super::json::{JsonObject, NotBuilt, Shape};
use super::keyvalue::Expected;
use super::queues::{self, QueuesError};
use super::schema::{as_sent, ip_address, never};
use super::{Key, MacAddr, Word, WordError, on};

/// Smallest MTU: the one IPv6 needs, as in the contract.
pub const MIN_MTU: u16 = 1280;

/// Longest name of a host interface, in bytes (`IFNAMSIZ` without the NUL).
pub const MAX_INTERFACE_NAME: usize = 15;

const DEFAULT_NUM_QUEUES: u32 = 2;
const DEFAULT_QUEUE_SIZE: u32 = 256;

/// What the contract's schema gives as the defaults of `ip` and `mask`. Client libraries fill them in by themselves.
const SCHEMA_ADDRESS: (IpAddr, IpAddr) = (
    IpAddr::V4(Ipv4Addr::new(192, 168, 249, 1)),
    IpAddr::V4(Ipv4Addr::new(255, 255, 255, 0)),
);

/// One virtio-net device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the contract's schema"
)]
#[schemars(transform = as_sent::<Self>)]
pub struct NetConfig {
    /// The tap by name; it is made when it is not there. Absent, together with `fds`, means a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Address of the host's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "ip_address")]
    pub ip: Option<IpAddr>,
    /// Network mask that goes with `ip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "ip_address")]
    pub mask: Option<IpAddr>,
    /// Ethernet address of the guest's end; a random one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Ethernet address of the host's end; left as it is when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<MacAddr>,
    /// Longest packet; left to both ends when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Whether another process serves the network.
    #[serde(default, skip_serializing_if = "is_off")]
    #[schemars(skip_serializing_if = "never")]
    pub vhost_user: bool,
    /// Where that process listens, or this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Who of the two listens there.
    #[serde(default, skip_serializing_if = "VhostMode::is_client")]
    #[schemars(skip_serializing_if = "never")]
    pub vhost_mode: VhostMode,
    /// Open descriptors of the tap, one for each pair of queues.
    #[serde(skip)]
    pub fds: Vec<i32>,
    /// How many queues: receive and transmit together.
    #[serde(default = "default_num_queues")]
    pub num_queues: u32,
    /// How long each of them is.
    #[serde(default = "default_queue_size")]
    pub queue_size: u32,
    /// Whether TCP segments may be longer than the MTU.
    #[serde(default = "on")]
    pub offload_tso: bool,
    /// Whether UDP datagrams may be longer than the MTU.
    #[serde(default = "on")]
    pub offload_ufo: bool,
    /// Whether checksums may be left to the other end.
    #[serde(default = "on")]
    pub offload_csum: bool,
    /// Name of the device, unique in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// The device number on the segment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // As serde calls it.
fn is_off(switch: &bool) -> bool {
    !switch
}

fn default_num_queues() -> u32 {
    DEFAULT_NUM_QUEUES
}

fn default_queue_size() -> u32 {
    DEFAULT_QUEUE_SIZE
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::default(),
            fds: Vec::new(),
            num_queues: DEFAULT_NUM_QUEUES,
            queue_size: DEFAULT_QUEUE_SIZE,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
            id: None,
            pci_segment: 0,
            pci_device_id: None,
        }
    }
}

/// A virtio-net device, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidNet {
    /// Its name.
    pub id: String,
    /// The host's end.
    pub source: NetSource,
    /// Ethernet address of the guest's end, unicast; `None` is a random one.
    pub mac: Option<MacAddr>,
    /// Longest packet, at least [`MIN_MTU`].
    pub mtu: Option<u16>,
    /// How many pairs of queues: 1 to half of [`super::MAX_QUEUES`].
    pub queue_pairs: u16,
    /// How long each queue is: a power of two from 2 to [`super::MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// What one end may leave to the other.
    pub offloads: Offloads,
    /// Where it sits.
    pub place: Place,
}

/// The host's end of a network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetSource {
    /// A tap, which this process reads and writes.
    Tap(Tap),
    /// A process that serves the pairs of queues.
    VhostUser {
        /// Where that listens, or this process.
        socket: PathBuf,
        /// Which of the two.
        mode: VhostMode,
    },
}

/// A tap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tap {
    /// A tap that the VMM opens, or makes.
    Interface {
        /// Its name, at most [`MAX_INTERFACE_NAME`] bytes; `None` is a new one that the kernel names.
        name: Option<String>,
        /// Address and network mask to give it, of one family.
        address: Option<(IpAddr, IpAddr)>,
        /// Ethernet address to give it, unicast.
        mac: Option<MacAddr>,
    },
    /// A tap that somebody else opened and configured: as many descriptors as pairs of queues, all different, none of
    /// them a standard stream.
    Descriptors(Vec<i32>),
}

/// What one end of a network interface may leave to the other. Without `csum` there is none of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// Cutting TCP segments to the MTU.
    pub tso: bool,
    /// Cutting UDP datagrams to the MTU.
    pub ufo: bool,
    /// Checksums.
    pub csum: bool,
}

/// A network interface that no guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NetError {
    /// A name no interface can have.
    #[error(
        "{device}: tap={name:?} can't be the name of an interface: give 1 to {MAX_INTERFACE_NAME} \
         bytes without spaces, slashes and colons"
    )]
    Name {
        /// The device.
        device: String,
        /// The name given.
        name: String,
    },
    /// An address without a mask, or the other way round.
    #[error("{device} has {given}= but no {missing}=; give both or neither")]
    HalfAnAddress {
        /// The device.
        device: String,
        /// The key that is there.
        given: &'static str,
        /// The key that is not.
        missing: &'static str,
    },
    /// The mask does not go with the address.
    #[error(
        "{device}: mask={mask} is no network mask for ip={ip}: give one such as 255.255.255.0 for IPv4, \
         ffff:ffff:ffff:ffff:: for IPv6"
    )]
    Mask {
        /// The device.
        device: String,
        /// The address given.
        ip: IpAddr,
        /// The mask given.
        mask: IpAddr,
    },
    /// Zero or a group's.
    #[error("{device}: {key}={mac} is not the address of one interface; give a unicast one")]
    NotUnicast {
        /// The device.
        device: String,
        /// The key.
        key: &'static str,
        /// The address given.
        mac: MacAddr,
    },
    /// Too short for IP.
    #[error("{device}: mtu={mtu} is too small: give {MIN_MTU} or more")]
    Mtu {
        /// The device.
        device: String,
        /// The MTU given.
        mtu: u16,
    },
    /// Segments that one end is to cut without computing their checksums.
    #[error(
        "{device}: offload_csum=off leaves offload_tso and offload_ufo without checksums; add \
         offload_tso=off,offload_ufo=off"
    )]
    OffloadsWithoutChecksum {
        /// The device.
        device: String,
    },
    /// A tap given twice over.
    #[error(
        "{device}: {key}= together with fd=: who opened the tap has named and configured it; \
         remove one of the two"
    )]
    KeyWithDescriptors {
        /// The device.
        device: String,
        /// The key.
        key: &'static str,
    },
    /// More or fewer descriptors than pairs of queues.
    #[error(
        "{device}: {given} file descriptors for num_queues={queues}; each pair of queues has one: \
         give num_queues={}", given * 2
    )]
    DescriptorCount {
        /// The device.
        device: String,
        /// How many there are.
        given: usize,
        /// How many queues there are.
        queues: u32,
    },
    /// A descriptor that is no tap's.
    #[error("{device}: fd={fd} is a standard stream or no descriptor at all; give that of a tap")]
    Descriptor {
        /// The device.
        device: String,
        /// The descriptor given.
        fd: i32,
    },
    /// One descriptor for two pairs of queues.
    #[error("{device}: fd={fd} is given twice; each pair of queues has a descriptor of its own")]
    DescriptorTwice {
        /// The device.
        device: String,
        /// The descriptor given.
        fd: i32,
    },
    /// Who serves it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Its queues.
    #[error(transparent)]
    Queues(#[from] QueuesError),
    /// Where it sits.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its name.
    #[error(transparent)]
    Id(#[from] IdError),
}

impl JsonObject for NetConfig {
    const SHAPE: Shape = Shape {
        not_built: &[
            NotBuilt::switch("iommu", false),
            NotBuilt::empty("fds"),
            NotBuilt::object(
                "rate_limiter_config",
                &[NotBuilt::empty("bandwidth"), NotBuilt::empty("ops")],
            ),
        ],
        ..Shape::WHOLE
    };
}

impl OnPci for NetConfig {
    fn pci(&mut self) -> PciFields<'_> {
        PciFields {
            id: &mut self.id,
            segment: &mut self.pci_segment,
            number: &mut self.pci_device_id,
        }
    }
}

impl NetConfig {
    pub(crate) const WORD: Word<Self> = Word {
        flag: "--net",
        about: "A network interface of the guest; repeat for more",
        keys: &[
            Key::new(
                "tap",
                "NAME",
                "the host's end, made if missing [default: a new one]",
                |net, value| {
                    net.tap = Some(value.text()?);
                    Ok(())
                },
            ),
            Key::new(
                "fd",
                "[N,..]",
                "open descriptors of a tap instead",
                |net, value| {
                    net.fds = value
                        .list()?
                        .into_iter()
                        .map(super::Value::descriptor)
                        .collect::<Result<_, _>>()?;
                    Ok(())
                },
            ),
            Key::new(
                "ip",
                "ADDRESS",
                "address of the host's end",
                |net, value| {
                    net.ip = Some(value.parsed("an IPv4 or IPv6 address")?);
                    Ok(())
                },
            ),
            Key::new(
                "mask",
                "MASK",
                "its network mask, such as 255.255.255.0",
                |net, value| {
                    net.mask = Some(value.parsed("a network mask such as 255.255.255.0")?);
                    Ok(())
                },
            ),
            Key::new(
                "mac",
                "ADDRESS",
                "Ethernet address of the guest's end [default: random]",
                |net, value| {
                    net.mac = Some(value.parsed(MacAddr::EXPECTED)?);
                    Ok(())
                },
            ),
            Key::new(
                "host_mac",
                "ADDRESS",
                "Ethernet address of the host's end",
                |net, value| {
                    net.host_mac = Some(value.parsed(MacAddr::EXPECTED)?);
                    Ok(())
                },
            ),
            Key::new("mtu", "N", "longest packet, 1280 or more", |net, value| {
                net.mtu = Some(value.integer()?);
                Ok(())
            }),
            Key::new(
                "num_queues",
                "N",
                "queues, two for each pair [default: 2]",
                |net, value| {
                    net.num_queues = value.integer()?;
                    Ok(())
                },
            ),
            Key::new(
                "queue_size",
                "N",
                "packets in a queue, a power of two [default: 256]",
                |net, value| {
                    net.queue_size = value.integer()?;
                    Ok(())
                },
            ),
            Key::new(
                "offload_tso",
                "on|off",
                "TCP segments beyond the MTU [default: on]",
                |net, value| {
                    net.offload_tso = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "offload_ufo",
                "on|off",
                "UDP datagrams beyond the MTU [default: on]",
                |net, value| {
                    net.offload_ufo = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "offload_csum",
                "on|off",
                "checksums left to the other end [default: on]",
                |net, value| {
                    net.offload_csum = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "vhost_user",
                "on|off",
                "a backend at socket= serves the network [default: off]",
                |net, value| {
                    net.vhost_user = value.switch()?;
                    Ok(())
                },
            ),
            Key::new(
                "socket",
                "PATH",
                "where the vhost-user backend listens, or the VMM",
                |net, value| {
                    net.vhost_socket = Some(value.path()?);
                    Ok(())
                },
            ),
            Key::new(
                "vhost_mode",
                "client|server",
                "whether the VMM connects to the socket, or makes it and waits [default: client]",
                |net, value| {
                    net.vhost_mode = match value.text()?.as_str() {
                        "client" => VhostMode::Client,
                        "server" => VhostMode::Server,
                        _ => return Err(Expected("client or server")),
                    };
                    Ok(())
                },
            ),
            id_key(),
            segment_key(),
            number_key(),
            Key::not_built("iommu"),
            Key::not_built("bw_size"),
            Key::not_built("bw_one_time_burst"),
            Key::not_built("bw_refill_time"),
            Key::not_built("ops_size"),
            Key::not_built("ops_one_time_burst"),
            Key::not_built("ops_refill_time"),
        ],
    };

    const NAMING: Naming = Naming::Numbered("_net");

    /// Reads the value of one `--net`.
    pub fn parse(text: &str) -> Result<Self, WordError> {
        let mut net = Self::default();
        Self::WORD.fill(text, &mut net)?;
        Ok(net)
    }

    /// The device as errors name it.
    fn label(&self) -> String {
        let flag = Self::WORD.flag;
        match (&self.id, &self.tap, &self.mac) {
            (Some(id), ..) => format!("{flag} id={id}"),
            (None, Some(tap), _) => format!("{flag} tap={tap}"),
            (None, None, Some(mac)) => format!("{flag} mac={mac}"),
            (None, None, None) => flag.to_owned(),
        }
    }

    /// Checks what can be told of this device by itself in a guest with `segments` PCI segments, and takes its id.
    pub fn validate(&self, segments: u16, ids: &mut IdAllocator) -> Result<ValidNet, NetError> {
        let device = self.label();
        for (key, mac) in [("mac", self.mac), ("host_mac", self.host_mac)] {
            if let Some(mac) = mac
                && !mac.is_unicast()
            {
                return Err(NetError::NotUnicast { device, key, mac });
            }
        }
        if let Some(mtu) = self.mtu
            && mtu < MIN_MTU
        {
            return Err(NetError::Mtu { device, mtu });
        }
        if !self.offload_csum && (self.offload_tso || self.offload_ufo) {
            return Err(NetError::OffloadsWithoutChecksum { device });
        }
        let queue_pairs = queues::pairs(&device, self.num_queues)?;
        let queue_size = queues::size(&device, self.queue_size)?;
        let source = if let Some(socket) = self.backend(&device)? {
            let mode = self.vhost_mode;
            NetSource::VhostUser { socket, mode }
        } else if self.fds.is_empty() {
            NetSource::Tap(self.interface(&device)?)
        } else {
            NetSource::Tap(self.descriptors(&device, queue_pairs)?)
        };
        let place = Place::check(&device, self.pci_segment, self.pci_device_id, segments)?;
        Ok(ValidNet {
            id: ids.take(&device, self.id.as_deref(), Self::NAMING)?,
            source,
            mac: self.mac,
            mtu: self.mtu,
            queue_pairs,
            queue_size,
            offloads: Offloads {
                tso: self.offload_tso,
                ufo: self.offload_ufo,
                csum: self.offload_csum,
            },
            place,
        })
    }

    /// Where a backend listens, if one serves the network.
    fn backend(&self, device: &str) -> Result<Option<PathBuf>, NetError> {
        let told = self.of_a_tap().into_iter();
        let told = told.chain([("fd", !self.fds.is_empty())]);
        let socket = self.vhost_socket.as_deref();
        let socket = backend::socket((device, "network"), self.vhost_user, socket, told)?;
        if socket.is_none() && self.vhost_mode == VhostMode::Server {
            let device = device.to_owned();
            return Err(BackendError::ServerAlone { device }.into());
        }
        Ok(socket)
    }

    /// What only a tap that the VMM opens can be told, and whether it is. At the schema's defaults nobody asked for an address.
    fn of_a_tap(&self) -> [(&'static str, bool); 4] {
        let (ip, mask) = SCHEMA_ADDRESS;
        [
            ("tap", self.tap.is_some()),
            ("ip", self.ip.is_some_and(|given| given != ip)),
            ("mask", self.mask.is_some_and(|given| given != mask)),
            ("host_mac", self.host_mac.is_some()),
        ]
    }

    fn interface(&self, device: &str) -> Result<Tap, NetError> {
        let device = device.to_owned();
        if let Some(name) = self.tap.clone()
            && !is_interface_name(&name)
        {
            return Err(NetError::Name { device, name });
        }
        let address = match (self.ip, self.mask) {
            (None, None) => None,
            (Some(ip), Some(mask)) if is_mask_for(mask, ip) => Some((ip, mask)),
            (Some(ip), Some(mask)) => return Err(NetError::Mask { device, ip, mask }),
            (Some(_), None) => {
                return Err(NetError::HalfAnAddress {
                    device,
                    given: "ip",
                    missing: "mask",
                });
            }
            (None, Some(_)) => {
                return Err(NetError::HalfAnAddress {
                    device,
                    given: "mask",
                    missing: "ip",
                });
            }
        };
        Ok(Tap::Interface {
            name: self.tap.clone(),
            address,
            mac: self.host_mac,
        })
    }

    fn descriptors(&self, device: &str, queue_pairs: u16) -> Result<Tap, NetError> {
        let device = device.to_owned();
        if let Some((key, _)) = self.of_a_tap().into_iter().find(|(_, given)| *given) {
            return Err(NetError::KeyWithDescriptors { device, key });
        }
        if self.fds.len() != usize::from(queue_pairs) {
            return Err(NetError::DescriptorCount {
                device,
                given: self.fds.len(),
                queues: self.num_queues,
            });
        }
        for (at, &fd) in self.fds.iter().enumerate() {
            if fd <= 2 {
                return Err(NetError::Descriptor { device, fd });
            }
            if self.fds[..at].contains(&fd) {
                return Err(NetError::DescriptorTwice { device, fd });
            }
        }
        Ok(Tap::Descriptors(self.fds.clone()))
    }
}

/// What the kernel takes as the name of an interface (`dev_valid_name`).
fn is_interface_name(name: &str) -> bool {
    (1..=MAX_INTERFACE_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && !name
            .chars()
            .any(|c| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
}

fn is_mask_for(mask: IpAddr, ip: IpAddr) -> bool {
    match (mask, ip) {
        (IpAddr::V4(mask), IpAddr::V4(_)) => {
            mask.to_bits().leading_ones() + mask.to_bits().trailing_zeros() == u32::BITS
        }
        (IpAddr::V6(mask), IpAddr::V6(_)) => {
            mask.to_bits().leading_ones() + mask.to_bits().trailing_zeros() == u128::BITS
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
