//! Hears of devices that go away though nobody was asked: the host's administrator, its firmware, a failing card.
//!
//! ```text
//!   somebody opens an unbind file ──inotify──▶ armed: looks every millisecond, for a while
//!                                                 │
//!   timer, idle or armed ────────────────────────▶│ for each device: is its driver still there?
//!                                                 │                  would a load find memory?
//!   the kernel's uevents ──────────────────────▶ Lost
//! ```
//! No single sign is enough. The driver's link is the first to vanish, before the memory does, but only when somebody
//! unbinds; a probe of the memory says what is so whatever the reason, but only from then on; uevents are late, and may
//! be all that a process without a sysfs hears. Each sign of each device is told once.
//!
//! Measured on the emulated host (one processor, TCG; all of the lab's dax0.0; 8 removals for each figure; `lab-agent dax-watch`),
//! milliseconds after the write to `unbind`, median and worst, armed by inotify:
//!
//! | sign                               | 6.1        | 6.12       |
//! |------------------------------------|------------|------------|
//! | the file's open is heard (after it)| 1.1, 5.1   | 1.0, 3.6   |
//! | the driver is gone                 | 3.0, 3.7   | 1.7, 3.1   |
//! | the probe fails                    | 3.0, 3.7   | 3.1, 5.8   |
//! | uevent                             | 71.9, 80.8 | 70.9, 76.2 |
//! | the write returns                  | 70.7, 76.0 | 69.6, 75.8 |
//!
//! A thread that does nothing but read the memory got its first EFAULT after 3.4 (5.8) and 3.3 (6.8), while it shared the
//! processor with the watch. Signs that are nearer to each other than one look (1 ms and what it takes, 0.4 ms there) can't
//! be told apart by this. A look every 1 ms took 36 % of the emulated processor, every 20 ms 4 %, every 100 ms 1.3 %; what
//! it takes on real hardware was not measured, and the idle pace is a guess until it is.
//!
//! The probe has the kernel fault one page in, as a load would, and reads no byte: it leaves poison alone. It goes by the
//! host address only, so a mapping that is about to be unmapped is to be forgotten first ([`Watch::forget`]).
//!
//! One descriptor for the owner's event loop; [`Watch::read`] never blocks. What the watch can't hear with
//! ([`Watch::unheard`]) is no error: the other signs are still there.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::fs::{AtFlags, Mode, OFlags, inotify, openat, statat};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use thiserror::Error;

use crate::device::DeviceName;
use crate::host::Host;
use crate::mapping::DaxMapping;
use crate::pages::{Touched, touch};
use crate::uevent::Uevents;

/// Buses whose drivers, unbound, take device-dax memory away.
const BUSES: [&str; 3] = ["dax", "nd", "cxl"];

/// How often to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// When nothing is known to go on.
    pub idle: Duration,
    /// After somebody has opened a file by which a device can be taken away.
    pub armed: Duration,
    /// For how long after that.
    pub armed_for: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            idle: Duration::from_millis(20),
            armed: Duration::from_millis(1),
            armed_for: Duration::from_secs(5),
        }
    }
}

/// How a device was found to be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sign {
    /// Its driver has let go of it: the memory goes away at any moment.
    DriverGone,
    /// A load would get SIGBUS, and not because of poison.
    ProbeFailed,
    /// The kernel has said so.
    Uevent,
}

/// A device is gone, or going.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// What [`Watch::add`] gave for the mapping.
    pub id: WatchId,
    /// The device.
    pub device: DeviceName,
    /// How it was found out.
    pub by: Sign,
}

/// A mapping that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId(u64);

/// There is no watch.
#[derive(Debug, Error)]
#[error(
    "can't {what} to watch devices with; `ulimit -n` raises how many descriptors a process may have"
)]
pub struct WatchError {
    /// What was tried.
    pub what: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// A sign that will not be seen.
#[derive(Debug, Error)]
#[error("can't hear of removals by {what}; they are noticed later")]
pub struct Unheard {
    /// What does not work.
    pub what: String,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// Watches devices whose memory is mapped.
#[derive(Debug)]
pub struct Watch {
    sys: PathBuf,
    epoll: OwnedFd,
    timer: OwnedFd,
    opens: Option<OwnedFd>,
    uevents: Option<Uevents>,
    unheard: Vec<Unheard>,
    pacing: Pacing,
    devices: Vec<Watched>,
    next_id: u64,
}

#[derive(Debug)]
struct Watched {
    id: WatchId,
    device: DeviceName,
    /// The device's directory in sysfs. That it is open keeps nothing of the device.
    directory: Option<File>,
    /// Where to look whether the memory is there.
    address: usize,
    told: Vec<Sign>,
}

/// When to look next.
#[derive(Debug)]
struct Pacing {
    pace: Pace,
    armed_until: Option<Instant>,
}

impl Pacing {
    fn arm(&mut self, now: Instant) {
        self.armed_until = now.checked_add(self.pace.armed_for);
    }

    fn is_armed(&self, now: Instant) -> bool {
        self.armed_until.is_some_and(|until| now < until)
    }

    fn interval(&self, now: Instant) -> Duration {
        if self.is_armed(now) {
            self.pace.armed
        } else {
            self.pace.idle
        }
    }
}

impl Watch {
    /// Watches nothing yet.
    pub fn new(host: &Host, pace: Pace) -> Result<Self, WatchError> {
        let failed = |what| {
            move |source: rustix::io::Errno| WatchError {
                what,
                source: source.into(),
            }
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("make an epoll"))?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, flags).map_err(failed("make a timer"))?;
        let mut watch = Self {
            sys: host.sys().path().to_owned(),
            epoll,
            timer,
            opens: None,
            uevents: None,
            unheard: Vec::new(),
            pacing: Pacing {
                pace,
                armed_until: None,
            },
            devices: Vec::new(),
            next_id: 0,
        };
        watch
            .listen(watch.timer.as_fd())
            .map_err(failed("listen to a timer"))?;
        watch.listen_to_opens();
        watch.listen_to_uevents();
        Ok(watch)
    }

    fn listen(&self, fd: BorrowedFd<'_>) -> rustix::io::Result<()> {
        epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(0),
            epoll::EventFlags::IN,
        )
    }

    /// Hears of whoever opens a file by which a device can be taken away.
    fn listen_to_opens(&mut self) {
        let made = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .and_then(|opens| self.listen(opens.as_fd()).map(|()| opens));
        let opens = match made {
            Ok(opens) => opens,
            Err(source) => return self.miss("inotify", source.into()),
        };
        for bus in BUSES {
            // A bus that the host does not have is nothing to miss.
            let drivers = fs::read_dir(self.sys.join("bus").join(bus).join("drivers"));
            for driver in drivers.into_iter().flatten().flatten() {
                let file = driver.path().join("unbind");
                let watched = inotify::add_watch(&opens, &file, inotify::WatchFlags::OPEN);
                // Nor is a driver that nobody can unbind by hand.
                if let Err(source) = watched
                    && source != rustix::io::Errno::NOENT
                {
                    self.miss(&file.display().to_string(), source.into());
                }
            }
        }
        self.opens = Some(opens);
    }

    fn listen_to_uevents(&mut self) {
        let made = Uevents::listen().and_then(|uevents| {
            self.listen(uevents.as_fd())?;
            Ok(uevents)
        });
        match made {
            Ok(uevents) => self.uevents = Some(uevents),
            Err(source) => self.miss("uevents", source),
        }
    }

    fn miss(&mut self, what: &str, source: io::Error) {
        self.unheard.push(Unheard {
            what: what.to_owned(),
            source,
        });
    }

    /// What it can't hear with, and why.
    pub fn unheard(&self) -> &[Unheard] {
        &self.unheard
    }

    /// Watches a mapping until [`Watch::forget`], which comes before it is unmapped.
    pub fn add(&mut self, mapping: &DaxMapping) -> Result<WatchId, WatchError> {
        let id = WatchId(self.next_id);
        self.next_id += 1;
        let device = mapping.facts().name;
        let path = self.sys.join("bus/dax/devices").join(device.to_string());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match openat(rustix::fs::CWD, &path, flags, Mode::empty()) {
            Ok(directory) => Some(File::from(directory)),
            Err(source) => {
                self.miss(&path.display().to_string(), source.into());
                None
            }
        };
        self.devices.push(Watched {
            id,
            device,
            directory,
            address: mapping.as_ptr() as usize,
            told: Vec::new(),
        });
        self.set_timer(Instant::now())?;
        Ok(id)
    }

    /// The undo of [`Watch::add`].
    pub fn forget(&mut self, id: WatchId) -> Result<(), WatchError> {
        self.devices.retain(|watched| watched.id != id);
        self.set_timer(Instant::now())
    }

    /// Whether it looks often at the moment.
    pub fn is_armed(&self) -> bool {
        self.pacing.is_armed(Instant::now())
    }

    /// Looks often from now on: for an owner who has a suspicion.
    pub fn arm(&mut self) -> Result<(), WatchError> {
        let now = Instant::now();
        self.pacing.arm(now);
        self.set_timer(now)
    }

    /// What is gone since the last time; called when the descriptor is readable.
    pub fn read(&mut self) -> Result<Vec<Lost>, WatchError> {
        let now = Instant::now();
        let was_armed = self.pacing.is_armed(now);
        let mut ticks = [0; 8];
        let _ = rustix::io::read(&self.timer, &mut ticks);
        if self.is_file_opened() {
            self.pacing.arm(now);
        }
        let mut lost = Vec::new();
        let heard = self.heard();
        for watched in &mut self.devices {
            watched.look(&heard, &mut lost);
        }
        // Both ways: it was armed before this call, and is not any more.
        if was_armed != self.pacing.is_armed(now)
            || self.pacing.armed_until.is_some_and(|t| t <= now)
        {
            if !self.pacing.is_armed(now) {
                self.pacing.armed_until = None;
            }
            self.set_timer(now)?;
        }
        Ok(lost)
    }

    fn is_file_opened(&self) -> bool {
        let mut opened = false;
        if let Some(opens) = &self.opens {
            let mut buffer = [MaybeUninit::uninit(); 1024];
            let mut events = inotify::Reader::new(opens, &mut buffer);
            while let Ok(event) = events.next() {
                opened |= event.events().contains(inotify::ReadFlags::OPEN)
                    || event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW);
            }
        }
        opened
    }

    fn heard(&self) -> Vec<String> {
        let mut heard = Vec::new();
        if let Some(uevents) = &self.uevents {
            // Messages that were lost are no loss: the other signs are looked at right after this.
            uevents.read(|name| heard.push(name.to_owned()));
        }
        heard
    }

    fn set_timer(&self, now: Instant) -> Result<(), WatchError> {
        let interval = if self.devices.is_empty() {
            Duration::ZERO
        } else {
            self.pacing.interval(now)
        };
        let spec = Timespec::try_from(interval).unwrap_or(Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        });
        let spec = Itimerspec {
            it_interval: spec,
            it_value: spec,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec)
            .map(drop)
            .map_err(|source| WatchError {
                what: "set a timer",
                source: source.into(),
            })
    }
}

impl Watched {
    fn look(&mut self, heard: &[String], lost: &mut Vec<Lost>) {
        let name = self.device.to_string();
        let signs = [
            (Sign::DriverGone, self.is_driver_gone()),
            (Sign::ProbeFailed, self.is_memory_gone()),
            (Sign::Uevent, heard.contains(&name)),
        ];
        for (by, seen) in signs {
            if seen && !self.told.contains(&by) {
                self.told.push(by);
                lost.push(Lost {
                    id: self.id,
                    device: self.device,
                    by,
                });
            }
        }
    }

    fn is_driver_gone(&self) -> bool {
        self.directory.as_ref().is_some_and(|directory| {
            matches!(
                statat(directory, "driver", AtFlags::SYMLINK_NOFOLLOW),
                Err(rustix::io::Errno::NOENT)
            )
        })
    }

    fn is_memory_gone(&self) -> bool {
        // Poison has its own way to the owner, and an error is no answer.
        matches!(touch(self.address), Ok(Touched::Gone | Touched::Unmapped))
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::LockKind;
    use crate::testing::{DeviceFile, FakeDevice, FakeHost};

    const M: u64 = 1 << 20;

    const PACE: Pace = Pace {
        idle: Duration::from_hours(1),
        armed: Duration::from_millis(1),
        armed_for: Duration::from_hours(1),
    };

    struct Bench {
        host: FakeHost,
        unbind: PathBuf,
        driver: PathBuf,
        file: DeviceFile,
        mapping: DaxMapping,
    }

    impl Bench {
        fn new() -> Self {
            let host = FakeHost::new();
            let driver = host.add(&FakeDevice::pmem("dax0.0")).join("driver");
            let drivers = host.sys().join("bus/dax/drivers/device_dax");
            fs::create_dir_all(&drivers).unwrap();
            let unbind = drivers.join("unbind");
            fs::write(&unbind, "").unwrap();
            let file = DeviceFile::with_align(4 * M, 2 * M);
            let device = file.open();
            let range = device.range(None, None).unwrap();
            let mapping = device.lock(range, LockKind::Exclusive).unwrap().map();
            Self {
                host,
                unbind,
                driver,
                file,
                mapping: mapping.unwrap(),
            }
        }

        fn watch(&self, pace: Pace) -> (Watch, WatchId) {
            let mut watch = Watch::new(&self.host.host(), pace).unwrap();
            // Whatever comes and goes on the machine that runs the tests.
            watch.uevents = None;
            let id = watch.add(&self.mapping).unwrap();
            (watch, id)
        }
    }

    fn is_readable(watch: &Watch, at_most_ms: u64) -> bool {
        let at_most = Timespec {
            tv_sec: 0,
            tv_nsec: i64::try_from(at_most_ms * 1_000_000).unwrap(),
        };
        poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&at_most)).unwrap() == 1
    }

    fn signs(lost: &[Lost]) -> Vec<Sign> {
        lost.iter().map(|lost| lost.by).collect()
    }

    #[test]
    fn each_sign_is_told_once() {
        let bench = Bench::new();
        let (mut watch, id) = bench.watch(PACE);
        assert_eq!(watch.read().unwrap(), []);
        fs::remove_file(&bench.driver).unwrap();
        let lost = watch.read().unwrap();
        assert_eq!(signs(&lost), [Sign::DriverGone]);
        assert_eq!(
            (lost[0].id, lost[0].device.to_string()),
            (id, "dax0.0".to_owned())
        );
        bench.file.truncate(0);
        assert_eq!(signs(&watch.read().unwrap()), [Sign::ProbeFailed]);
        assert_eq!(watch.read().unwrap(), []);
    }

    #[test]
    fn who_opens_an_unbind_file_makes_it_look_often() {
        let bench = Bench::new();
        let (mut watch, _) = bench.watch(PACE);
        assert!(!watch.is_armed());
        assert!(!is_readable(&watch, 0));
        drop(File::options().write(true).open(&bench.unbind).unwrap());
        assert!(is_readable(&watch, 900));
        assert_eq!(watch.read().unwrap(), []);
        assert!(watch.is_armed());
        bench.file.truncate(0);
        assert!(is_readable(&watch, 900), "by the timer");
        assert_eq!(signs(&watch.read().unwrap()), [Sign::ProbeFailed]);
    }

    #[test]
    fn it_calms_down() {
        let bench = Bench::new();
        let pace = Pace {
            armed_for: Duration::from_millis(5),
            ..PACE
        };
        let (mut watch, _) = bench.watch(pace);
        watch.arm().unwrap();
        let mut looked = 0;
        while is_readable(&watch, 200) {
            watch.read().unwrap();
            looked += 1;
            assert!(looked < 1000, "it looks often for ever");
        }
        assert!(looked > 0 && !watch.is_armed());
    }

    #[test]
    fn what_is_forgotten_is_not_looked_at() {
        let bench = Bench::new();
        let (mut watch, id) = bench.watch(PACE);
        watch.arm().unwrap();
        watch.forget(id).unwrap();
        assert!(!is_readable(&watch, 20), "no timer without a device");
        bench.mapping.unmap().unwrap().release().unwrap();
        assert_eq!(watch.read().unwrap(), []);
    }

    #[test]
    fn the_host_s_own_unbind_files_can_be_listened_to() {
        let watch = Watch::new(&Host::system(), Pace::default()).unwrap();
        // They are root's; whom they are kept from is told.
        let kept = |unheard: &&Unheard| {
            let denied = unheard.source.kind() == io::ErrorKind::PermissionDenied;
            denied && !rustix::process::geteuid().is_root()
        };
        let heard_of = watch.unheard().iter().filter(kept).count();
        assert_eq!(heard_of, watch.unheard().len(), "{:?}", watch.unheard());
    }
}
