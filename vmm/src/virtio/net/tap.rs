//! A tap of the host: the system calls.
//!
//! A tap that did not exist is made, configured as asked and brought up, and the kernel removes it when its last
//! descriptor is closed. One that exists, or whose descriptors are handed over, belongs to somebody else: its address,
//! MTU and state are left alone.
//!
//! Only this file makes ioctls for the network.

use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use thiserror::Error;

use super::link::{Link, Offloads};
use super::mac::Mac;
use super::vectors::Vectors;

/// Longest name of an interface.
pub(super) const LONGEST_NAME: usize = libc::IFNAMSIZ - 1;
const TUN: &str = "/dev/net/tun";
/// What a frame begins with: `struct virtio_net_hdr_v1`.
const HEADER_BYTES: c_int = 12;
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A tap can't be had.
#[derive(Debug, Error)]
pub enum TapError {
    /// The kernel has no tun driver.
    #[error("{TUN} is missing, which taps come from: `modprobe tun`")]
    NoTun {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is there but closed to us.
    #[error("can't open {TUN}: make it readable and writable for this user")]
    OpenTun {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No interface can have this name.
    #[error(
        "tap={name:?} is no name of an interface: 1 to 15 bytes without `/`, `:` and spaces, and not `.` or `..`"
    )]
    BadName {
        /// What was given.
        name: String,
    },
    /// Only the administrator makes taps.
    #[error(
        "tap {name} does not exist, and making it needs CAP_NET_ADMIN: make it for this user with \
         `ip tuntap add dev {name} mode tap user $USER{multi_queue}`"
    )]
    MayNotCreate {
        /// The tap.
        name: String,
        /// What the command needs for more than one queue pair.
        multi_queue: &'static str,
    },
    /// The tap belongs to another user.
    #[error(
        "tap {name} belongs to another user, and taking it needs CAP_NET_ADMIN: give it to this user with `ip tuntap \
         del dev {name} mode tap{multi_queue} && ip tuntap add dev {name} mode tap user $USER{multi_queue}`"
    )]
    MayNotAttach {
        /// The tap.
        name: String,
        /// What the command needs for more than one queue pair.
        multi_queue: &'static str,
    },
    /// Somebody else has it.
    #[error("tap {name} is in use by another process: give this guest a tap of its own")]
    Busy {
        /// The tap.
        name: String,
    },
    /// It has one queue.
    #[error(
        "tap {name} has one queue and {pairs} are asked for: make it with `ip tuntap add dev {name} mode tap user \
         $USER multi_queue`, or ask for num_queues=2"
    )]
    NotMultiQueue {
        /// The tap.
        name: String,
        /// Queue pairs asked for.
        pairs: usize,
    },
    /// It is another kind of interface.
    #[error("{name} exists and is no tap: name a tap (`ip tuntap show`), or a name that is free")]
    NotATap {
        /// The interface.
        name: String,
    },
    /// A step of the set-up.
    #[error("can't {what} tap {name}")]
    Host {
        /// The step.
        what: &'static str,
        /// The tap.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A descriptor that is not a tap's.
    #[error(
        "file descriptor {fd} is no tap: hand over descriptors of {TUN} on which TUNSETIFF was done, whose tap still \
         exists"
    )]
    FdNotATap {
        /// The descriptor.
        fd: RawFd,
        /// What the kernel said, or that it is a tun.
        #[source]
        source: Option<io::Error>,
    },
    /// A descriptor of a tap whose frames have another form.
    #[error(
        "file descriptor {fd} is tap {name} without {missing}: open it with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR \
         (and IFF_MULTI_QUEUE for more than one queue pair)"
    )]
    FdForm {
        /// The descriptor.
        fd: RawFd,
        /// Its tap.
        name: String,
        /// The flag.
        missing: &'static str,
    },
    /// Descriptors of two taps.
    #[error(
        "file descriptor {fd} is tap {name} and the first one is tap {first}: they must be queues of one tap"
    )]
    FdsOfTwoTaps {
        /// The descriptor.
        fd: RawFd,
        /// Its tap.
        name: String,
        /// The tap of the first.
        first: String,
    },
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    /// The kernel refuses to do it twice.
    attached: Mutex<bool>,
}

/// What to set on a tap that is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostSide {
    /// The host's address on it.
    pub ip: Option<IpAddr>,
    /// Its network; /24 or /64 when there is none.
    pub mask: Option<IpAddr>,
    /// The host's Ethernet address on it.
    pub mac: Option<Mac>,
    /// Largest packet.
    pub mtu: Option<u16>,
}

impl Tap {
    /// All queues of the tap `name`, which is made when there is none. Without a name, the kernel numbers a new one.
    pub fn open(
        name: Option<&str>,
        pairs: usize,
        host_side: &HostSide,
    ) -> Result<Vec<Self>, TapError> {
        let asked = name.unwrap_or("vmtap%d");
        check_name(asked)?;
        let existed = index_of(asked)?.is_some();
        let first = Self::first_queue(asked, existed, pairs)?;
        let name = first.name.clone();
        let mut queues = vec![first];
        while queues.len() < pairs {
            let queue = Self::queue(&name, FLAGS | libc::IFF_MULTI_QUEUE)?
                .map_err(|source| attach_error(&name, true, pairs, source))?;
            queues.push(queue);
        }
        for queue in &queues {
            queue.set_form()?;
        }
        if existed {
            if host_side.ip.is_some() || host_side.mac.is_some() {
                tracing::info!(tap = %name, "the tap exists: its addresses stay as they are");
            }
        } else {
            queues[0].configure(host_side)?;
        }
        Ok(queues)
    }

    /// Queues of a tap that somebody else has opened, one descriptor for each pair.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Vec<Self>, TapError> {
        let several = fds.len() > 1;
        let mut queues: Vec<Self> = Vec::with_capacity(fds.len());
        for fd in fds {
            let number = fd.as_raw_fd();
            let mut request = request("");
            ifreq_call(fd.as_fd(), libc::TUNGETIFF, &mut request).map_err(|source| {
                TapError::FdNotATap {
                    fd: number,
                    source: Some(source),
                }
            })?;
            let (name, flags) = (name_in(&request), flags_in(&request));
            if flags & libc::IFF_TAP == 0 {
                return Err(TapError::FdNotATap {
                    fd: number,
                    source: None,
                });
            }
            let mut needed = vec![
                (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
                (libc::IFF_NO_PI, "IFF_NO_PI"),
            ];
            if several {
                needed.push((libc::IFF_MULTI_QUEUE, "IFF_MULTI_QUEUE"));
            }
            for (flag, missing) in needed {
                if flags & flag == 0 {
                    return Err(TapError::FdForm {
                        fd: number,
                        name,
                        missing,
                    });
                }
            }
            if let Some(first) = queues.first()
                && first.name != name
            {
                return Err(TapError::FdsOfTwoTaps {
                    fd: number,
                    name,
                    first: first.name.clone(),
                });
            }
            // Detached by the machine that had it before.
            let attached = flags & libc::IFF_DETACH_QUEUE == 0;
            let queue = Self {
                file: File::from(fd),
                name,
                attached: Mutex::new(attached),
            };
            rustix::io::ioctl_fionbio(&queue.file, true)
                .map_err(|source| queue.error("stop blocking on", source.into()))?;
            queue.set_form()?;
            queues.push(queue);
        }
        Ok(queues)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether this kernel can be asked for UDP fragmentation. It leaves all offloads off.
    pub fn probe_ufo(&self) -> Result<bool, TapError> {
        let ufo = self.offload(libc::TUN_F_CSUM | libc::TUN_F_UFO).is_ok();
        self.offload(0)
            .map_err(|source| self.error("set the offloads of", source))?;
        Ok(ufo)
    }

    fn first_queue(name: &str, existed: bool, pairs: usize) -> Result<Self, TapError> {
        let (wanted, other) = if pairs > 1 {
            (FLAGS | libc::IFF_MULTI_QUEUE, FLAGS)
        } else {
            (FLAGS, FLAGS | libc::IFF_MULTI_QUEUE)
        };
        let refused = match Self::queue(name, wanted)? {
            Ok(queue) => return Ok(queue),
            Err(source) => source,
        };
        if !existed || refused.raw_os_error() != Some(libc::EINVAL) {
            return Err(attach_error(name, existed, pairs, refused));
        }
        // It differs in the number of queues, or it is no tap at all. One queue of a tap of several is one queue.
        let name = name.to_owned();
        match Self::queue(&name, other)? {
            Ok(queue) if pairs == 1 => Ok(queue),
            Ok(_) => Err(TapError::NotMultiQueue { name, pairs }),
            Err(source) if source.raw_os_error() == Some(libc::EINVAL) => {
                Err(TapError::NotATap { name })
            }
            Err(_) if pairs > 1 => Err(TapError::NotMultiQueue { name, pairs }),
            Err(source) => Err(attach_error(&name, existed, pairs, source)),
        }
    }

    /// One more queue; what the kernel says of the tap is inside.
    fn queue(name: &str, flags: c_int) -> Result<io::Result<Self>, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun { source },
                _ => TapError::OpenTun { source },
            })?;
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = low_flags(flags);
        if let Err(source) = ifreq_call(file.as_fd(), libc::TUNSETIFF, &mut request) {
            return Ok(Err(source));
        }
        Ok(Ok(Self {
            file,
            name: name_in(&request),
            attached: Mutex::new(true),
        }))
    }

    /// The form of its frames, whatever somebody set before.
    fn set_form(&self) -> Result<(), TapError> {
        let mut bytes = HEADER_BYTES;
        // SAFETY: TUNSETVNETHDRSZ reads an int from the address, which is that of a live variable.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw mut bytes) };
        checked(result).map_err(|source| self.error("set the header size of", source))?;
        self.offload(0)
            .map_err(|source| self.error("set the offloads of", source))
    }

    fn offload(&self, bits: u32) -> io::Result<()> {
        let argument = libc::c_ulong::from(bits);
        // SAFETY: the argument of TUNSETOFFLOAD is a number; no memory is accessed.
        checked(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, argument) })
    }

    fn set_queue(&self, attach: bool) -> io::Result<()> {
        let mut attached = self
            .attached
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if *attached == attach {
            return Ok(());
        }
        let mut request = request("");
        let flag = if attach {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = low_flags(flag);
        ifreq_call(self.file.as_fd(), libc::TUNSETQUEUE, &mut request)?;
        *attached = attach;
        Ok(())
    }

    /// Sets what was asked for on a new tap, and brings it up.
    fn configure(&self, side: &HostSide) -> Result<(), TapError> {
        let name = self.name.as_str();
        let inet = control_socket(AddressFamily::INET)
            .map_err(|source| self.error("get a socket to configure", source))?;
        let call = |what, number, request: &mut libc::ifreq| {
            ifreq_call(inet.as_fd(), number, request).map_err(|source| self.error(what, source))
        };
        if let Some(mac) = side.mac {
            let mut request = request(name);
            let mut address = [0; 14];
            for (to, from) in address.iter_mut().zip(mac.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
                sa_family: libc::ARPHRD_ETHER,
                sa_data: address,
            };
            call(
                "set the Ethernet address of",
                libc::SIOCSIFHWADDR,
                &mut request,
            )?;
        }
        if let Some(mtu) = side.mtu {
            let mut request = request(name);
            request.ifr_ifru.ifru_mtu = c_int::from(mtu);
            call("set the MTU of", libc::SIOCSIFMTU, &mut request)?;
        }
        match (side.ip, side.mask) {
            (None, _) | (Some(IpAddr::V6(_)), Some(IpAddr::V4(_))) => {}
            (Some(IpAddr::V4(ip)), mask) => {
                let mask = match mask {
                    Some(IpAddr::V4(mask)) => mask,
                    _ => Ipv4Addr::new(255, 255, 255, 0),
                };
                for (what, number, address) in [
                    ("set the address of", libc::SIOCSIFADDR, ip),
                    ("set the network mask of", libc::SIOCSIFNETMASK, mask),
                ] {
                    let mut request = request(name);
                    request.ifr_ifru.ifru_addr = inet_address(address);
                    call(what, number, &mut request)?;
                }
            }
            (Some(IpAddr::V6(ip)), mask) => {
                let prefix = match mask {
                    Some(IpAddr::V6(mask)) => mask.to_bits().leading_ones(),
                    _ => 64,
                };
                self.set_inet6(ip.octets(), prefix)?;
            }
        }
        let mut request = request(name);
        call("read the state of", libc::SIOCGIFFLAGS, &mut request)?;
        request.ifr_ifru.ifru_flags = low_flags(flags_in(&request) | libc::IFF_UP);
        call("bring up", libc::SIOCSIFFLAGS, &mut request)
    }

    fn set_inet6(&self, address: [u8; 16], prefix: u32) -> Result<(), TapError> {
        let failed = |source| self.error("set the IPv6 address of", source);
        let index = index_of(&self.name)?
            .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ENODEV)))?;
        let socket = control_socket(AddressFamily::INET6).map_err(failed)?;
        let mut request = libc::in6_ifreq {
            ifr6_addr: libc::in6_addr { s6_addr: address },
            ifr6_prefixlen: prefix,
            ifr6_ifindex: index,
        };
        // SAFETY: SIOCSIFADDR on an AF_INET6 socket reads a `struct in6_ifreq`, which `request` is.
        let result =
            unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw mut request) };
        checked(result).map_err(failed)
    }

    fn error(&self, what: &'static str, source: io::Error) -> TapError {
        TapError::Host {
            what,
            name: self.name.clone(),
            source,
        }
    }
}

impl Link for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn read_frame(&self, into: &mut Vectors<'_>, overflow: &mut [u8]) -> io::Result<usize> {
        into.read_from(self.file.as_fd(), overflow)
    }

    fn write_frame(&self, frame: &Vectors<'_>) -> io::Result<usize> {
        frame.write_to(self.file.as_fd())
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.offload(offloads.bits())
    }

    fn attach(&self) -> io::Result<()> {
        self.set_queue(true)
    }

    fn detach(&self) -> io::Result<()> {
        self.set_queue(false)
    }
}

/// Refuses what the kernel would refuse with a bare `EINVAL`, or take for something else.
fn check_name(name: &str) -> Result<(), TapError> {
    let pattern = name.strip_suffix("%d").unwrap_or(name);
    let bad = name.is_empty()
        || name.len() > LONGEST_NAME
        || name == "."
        || name == ".."
        || pattern
            .bytes()
            .any(|b| matches!(b, b'/' | b':' | b'%' | 0) || b.is_ascii_whitespace() || b == 0x0b);
    if bad {
        return Err(TapError::BadName {
            name: name.to_owned(),
        });
    }
    Ok(())
}

fn attach_error(name: &str, existed: bool, pairs: usize, source: io::Error) -> TapError {
    let name = name.to_owned();
    let multi_queue = if pairs > 1 { " multi_queue" } else { "" };
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if existed => TapError::MayNotAttach { name, multi_queue },
        Some(libc::EPERM | libc::EACCES) => TapError::MayNotCreate { name, multi_queue },
        Some(libc::EBUSY) => TapError::Busy { name },
        _ => TapError::Host {
            what: "attach to",
            name,
            source,
        },
    }
}

/// The number of an interface; in the network namespace of this process, which /sys may not show.
fn index_of(name: &str) -> Result<Option<c_int>, TapError> {
    let failed = |source| TapError::Host {
        what: "look for",
        name: name.to_owned(),
        source,
    };
    let socket = control_socket(AddressFamily::INET).map_err(failed)?;
    let mut request = request(name);
    match ifreq_call(socket.as_fd(), libc::SIOCGIFINDEX, &mut request) {
        // SAFETY: SIOCGIFINDEX has filled in this member of the union; any bits are a number.
        Ok(()) => Ok(Some(unsafe { request.ifr_ifru.ifru_ifindex })),
        Err(source) if source.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(source) => Err(failed(source)),
    }
}

fn control_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(socket_with(
        family,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// A request about an interface; `name` has at most [`LONGEST_NAME`] bytes.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: `struct ifreq` is a name and a union of numbers, addresses and a pointer, for all of which zero is a
    // value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: the kernel wants the name to end.
    for (to, from) in request.ifr_name[..LONGEST_NAME]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from.cast_signed();
    }
    request
}

fn name_in(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|c| c.cast_unsigned())
        .take_while(|b| *b != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn flags_in(request: &libc::ifreq) -> c_int {
    // SAFETY: every request of this file is made from zeros, so all bytes of the union are initialised, and any bits
    // are a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    c_int::from(flags.cast_unsigned())
}

/// The kernel keeps 16 of the bits.
fn low_flags(flags: c_int) -> libc::c_short {
    let [a, b, ..] = flags.to_le_bytes();
    libc::c_short::from_le_bytes([a, b])
}

fn inet_address(ip: Ipv4Addr) -> libc::sockaddr {
    // A `sockaddr_in` is the family, a port, the address and zeros.
    let mut data = [0; 14];
    for (to, from) in data[2..].iter_mut().zip(ip.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr {
        sa_family: u16::try_from(libc::AF_INET).unwrap_or_default(),
        sa_data: data,
    }
}

/// A call whose argument is a `struct ifreq`: the `SIOC*IF*` of an `AF_INET` socket, and `TUNSETIFF`, `TUNGETIFF` and
/// `TUNSETQUEUE` of a descriptor of /dev/net/tun.
fn ifreq_call(
    fd: BorrowedFd<'_>,
    number: libc::Ioctl,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: the callers, all in this file, pass only numbers of the calls listed above; they read and write one
    // `struct ifreq`, which `request` is, and none of them is given one with a pointer in it. Only TUNGETIFF is made on
    // a descriptor that may be of any kind (one handed over); the kernel's register of ioctl numbers gives its range,
    // T 0xc0 to 0xdf, to if_tun.h alone, so others refuse it.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(request)) })
}

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_becomes_what_to_do() {
        let error = |errno, existed, pairs| {
            attach_error("t0", existed, pairs, io::Error::from_raw_os_error(errno)).to_string()
        };
        let create = error(libc::EPERM, false, 1);
        assert!(create.contains("CAP_NET_ADMIN"), "{create}");
        assert!(
            create.ends_with("`ip tuntap add dev t0 mode tap user $USER`"),
            "{create}"
        );
        let several = error(libc::EPERM, false, 2);
        assert!(several.ends_with("user $USER multi_queue`"), "{several}");
        let foreign = error(libc::EPERM, true, 1);
        assert!(foreign.contains("belongs to another user"), "{foreign}");
        let busy = error(libc::EBUSY, true, 1);
        assert!(busy.contains("in use by another process"), "{busy}");
        let other = error(libc::ENOMEM, true, 1);
        assert!(other.contains("attach to tap t0"), "{other}");
    }

    #[test]
    fn requests_hold_names_and_addresses_where_the_kernel_looks() {
        let longest = "fifteen-bytes-x";
        assert_eq!(longest.len(), LONGEST_NAME);
        assert_eq!(name_in(&request(longest)), longest);
        assert_eq!(
            name_in(&request("a-name-that-is-too-long")).len(),
            LONGEST_NAME
        );
        let mut flags = request("t0");
        flags.ifr_ifru.ifru_flags = low_flags(FLAGS | libc::IFF_MULTI_QUEUE);
        assert_eq!(flags_in(&flags), 0x5102);
        let address = inet_address(Ipv4Addr::new(192, 168, 249, 1));
        assert_eq!(address.sa_data[..6], [0, 0, -64, -88, -7, 1]);
    }
}
