//! A machine that runs, with what it was taken from: what the owner does to it, each step beside its undo.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tracing::{error, info, warn};

use super::build::{BuildError, Machine};
use super::devices::{Bdf, HostDevice, PlugError, RemoveError, Settled, UnknownDevice};
use super::dma::DaxInReach;
use super::guard::Removals;
use super::host_devices::{self, OpenDeviceError, OpenedDevice};
use super::processors::Resized;
use super::regions::Regions;
use super::removal::{LostRam, User};
use super::resources::{HostResources, PrepareError};
use super::taps::{self, HandedTaps};
use crate::api::{ApiError, DaxMemory, DeviceNode, ErrorKind, VmCounters};
use crate::config::{
    ByteSize, ConfigError, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, HostConfig,
    IdAllocator, NetConfig, PmemConfig, ValidConfig, VcpusOutOfLimits, VmConfig, VsockConfig,
};
use crate::lifecycle::region::RegionEvent;
use crate::memory::poison::Poisoned;
use crate::memory::ram::{AttachFailure, DetachError, JoinError, Ram};
use crate::memory::region::{Mapping, Region};
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::virtio::balloon::BalloonSizeError;
use crate::virtio::blk::DiskResizeError;
use crate::virtio::vhost_user;

/// vCPUs leave the guest at once, workers when the host has answered what they asked of it.
pub(super) const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// Under which name guest memory counts, among the ids of devices: one that none of them can have.
const MEMORY_COUNTERS: &str = "__memory";

/// The guest can't be started.
#[derive(Debug, Error)]
pub enum BootError {
    /// Something of the host is missing, in use or not what was asked for.
    #[error("can't start the guest")]
    Prepare(#[source] Box<PrepareError>),
    /// Memory does not take its place.
    #[error("can't start the guest")]
    Memory(#[source] Box<AttachFailure>),
    /// Backends or passed-through devices can't reach memory.
    #[error("can't start the guest")]
    Join(#[source] Box<JoinError>),
    /// The VM can't be built.
    #[error("can't build the machine")]
    Build(#[source] Box<BuildError>),
}

/// A machine can't be built anew after a reset.
#[derive(Debug, Error)]
pub enum ResetError {
    /// Memory that a consumer does not let go of: it is neither unmapped nor used again.
    #[error("guest memory could not be taken back for a reset")]
    TakeApart(#[source] DetachError),
    /// The number of its vCPUs.
    #[error("can't build the machine")]
    Vcpus(#[source] VcpusOutOfLimits),
    /// The next VM.
    #[error("can't build the machine")]
    Build(#[source] Box<BuildError>),
}

/// The guest can't be held.
#[derive(Debug, Error)]
pub enum PauseError {
    /// A vCPU.
    #[error("a vCPU did not leave the guest within {PAUSE_DEADLINE:?}; the guest runs on")]
    Vcpu,
    /// Workers.
    #[error("{} did not finish what the host has in hand for it within {PAUSE_DEADLINE:?}; the guest runs on", ids.join(", "))]
    Devices {
        /// Whose.
        ids: Vec<String>,
    },
}

/// The balloon can't be resized.
#[derive(Debug, Error)]
pub enum BalloonResizeError {
    /// There is none.
    #[error("the guest has no balloon; --balloon size=0 gives it one")]
    None,
    /// Not a size.
    #[error(transparent)]
    Size(#[from] BalloonSizeError),
    /// More than there is.
    #[error("a balloon of {bytes:#x} bytes is more than the guest's {ram:#x} bytes of RAM")]
    TooLarge {
        /// Asked for.
        bytes: u64,
        /// What there is.
        ram: u64,
    },
}

/// A disk stays as large as it is.
#[derive(Debug, Error)]
pub(super) enum ResizeDiskError {
    /// There is none.
    #[error(transparent)]
    Unknown(#[from] UnknownDevice),
    /// The disk.
    #[error("{id} stays as large as it is")]
    Disk {
        /// Which.
        id: String,
        /// Why.
        #[source]
        source: DiskResizeError,
    },
}

/// A device can't be added.
#[derive(Debug, Error)]
pub enum AddError {
    /// The words.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A guest has one of them only.
    #[error("the guest has a {what} already, {id}; remove it first")]
    Second {
        /// What it has.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// The host.
    #[error(transparent)]
    Open(Box<OpenDeviceError>),
    /// Its memory.
    #[error(transparent)]
    Attach(#[from] Box<AttachFailure>),
    /// The memory that it is to reach.
    #[error("device {id}")]
    Join {
        /// Which device.
        id: String,
        /// Why.
        #[source]
        source: Box<JoinError>,
    },
    /// The machine.
    #[error(transparent)]
    Plug(#[from] PlugError),
}

impl From<OpenDeviceError> for AddError {
    fn from(error: OpenDeviceError) -> Self {
        Self::Open(Box::new(error))
    }
}

/// What to add.
#[derive(Debug)]
pub(super) enum NewDevice {
    Pmem(PmemConfig),
    Disk(DiskConfig),
    Net(NetConfig, Vec<OwnedFd>),
    Fs(FsConfig),
    GenericVhostUser(GenericVhostUserConfig),
    Vsock(VsockConfig),
    Passthrough(DeviceConfig),
}

impl NewDevice {
    /// For a machine that is not up: it gets the device when it boots.
    /// Gives what it has of a tap, for until then.
    pub(super) fn put_into(self, config: &mut VmConfig) -> Result<Vec<OwnedFd>, ApiError> {
        match self {
            Self::Pmem(word) => config.pmem.push(word),
            Self::Disk(word) => config.disks.push(word),
            Self::Fs(word) => config.fs.push(word),
            Self::GenericVhostUser(word) => config.generic_vhost_user.push(word),
            Self::Passthrough(word) => config.devices.push(word),
            Self::Net(mut word, tap) => {
                word.fds = taps::numbers(&tap);
                config.net.push(word);
                return Ok(tap);
            }
            Self::Vsock(word) => {
                if let Some(vsock) = &config.vsock {
                    return Err(ApiError::from_error(
                        ErrorKind::BadRequest,
                        &second_vsock(vsock),
                    ));
                }
                config.vsock = Some(word);
            }
        }
        Ok(Vec::new())
    }

    /// Duplicates of what it has of a tap.
    pub(super) fn tap(&self) -> io::Result<Vec<OwnedFd>> {
        match self {
            Self::Net(_, tap) => taps::duplicates(tap),
            _ => Ok(Vec::new()),
        }
    }
}

fn second_vsock(vsock: &VsockConfig) -> AddError {
    AddError::Second {
        what: "vsock device",
        id: vsock.id.clone().unwrap_or_default(),
    }
}

/// A machine and what it was built on.
pub(super) struct RunningVm {
    /// As asked for, with what came and went since.
    config: VmConfig,
    valid: ValidConfig,
    ids: IdAllocator,
    pub(super) machine: Machine,
    pub(super) ram: Ram,
    pub(super) host: HostResources,
    pub(super) regions: Regions,
    /// Ends of devices that are told of when nothing of their memory is left.
    pub(super) settled: Vec<Settled>,
    /// A change of the number of vCPUs that a reset has ended, and nobody was told of.
    pub(super) resized: Option<Resized>,
    /// RAM that is gone: the guest is held for good.
    pub(super) lost: Vec<LostRam>,
    pub(super) paused: bool,
}

impl RunningVm {
    /// Takes everything from the host, builds the machine and lets the guest run. What has to be waited for is, until `told` is
    /// readable.
    pub(super) fn boot(
        valid: ValidConfig,
        pools: Arc<HostConfig>,
        telling: (&Monitor, &Metrics),
        removals: &mut Removals,
        told: Arc<UnixStream>,
        taps: &HandedTaps,
    ) -> Result<Self, BootError> {
        let (mut host, regions) = HostResources::open(&valid, pools, telling, removals, told, taps)
            .map_err(|e| BootError::Prepare(Box::new(e)))?;
        // From here on it is taken from everybody before the host's resources go.
        let mut ram = Ram::new(vec![host.discard.consumer()]);
        let mut lives = Regions::default();
        for region in regions {
            // A device's memory is named after it, and zones and devices have one name space.
            let id = region.zone().to_owned();
            match host.devices.iter_mut().find(|device| device.id == id) {
                Some(device) => device.memory = Some(lives.begin(&region, User::Device(id))),
                None => drop(lives.begin(&region, User::Zone(id))),
            }
            ram.attach(region).map_err(BootError::Memory)?;
        }
        host.backends
            .join(&mut ram)
            .and_then(|()| host.join_dma(&mut ram))
            .map_err(|e| BootError::Join(Box::new(e)))?;
        let machine = Machine::build(&valid, &mut host, &mut ram)
            .map_err(|e| BootError::Build(Box::new(e)))?;
        let vm = Self {
            config: valid.config().clone(),
            ids: valid.ids().clone(),
            valid,
            machine,
            ram,
            host,
            regions: lives,
            settled: Vec::new(),
            resized: None,
            lost: Vec::new(),
            paused: false,
        };
        vm.machine.start();
        Ok(vm)
    }

    /// The undo of [`RunningVm::boot`]; what could not be given back.
    pub(super) fn shut_down(self) -> Vec<String> {
        let Self {
            mut host,
            mut ram,
            machine,
            ..
        } = self;
        let ((regions, stuck), left) = machine.take_apart(&mut host, &mut ram, Ram::detach_all);
        for error in stuck.iter().chain(left.as_ref().err()) {
            error!(error = %error, "memory is not given back");
        }
        host.close_devices(&mut ram);
        release(regions);
        stuck.iter().map(|error| crate::chain(error)).collect()
    }

    /// Builds the machine anew on the same memory and devices.
    pub(super) fn reset(mut self) -> Result<Self, ResetError> {
        let (resized, is_news) = self.machine.processors.after_reset();
        self.set_vcpus(resized.count).map_err(ResetError::Vcpus)?;
        let Self {
            config,
            valid,
            ids,
            mut host,
            mut ram,
            mut machine,
            regions,
            settled,
            resized: untold,
            lost,
            paused: _,
        } = self;
        let ended = machine.devices.end_for_reset();
        // All others keep what they have: it is the same memory.
        let ((), left) = machine.take_apart(&mut host, &mut ram, |_| ());
        left.map_err(ResetError::TakeApart)?;
        info!("reset");
        let has_ended = |device: &mut HostDevice| ended.iter().any(|ended| ended.id() == device.id);
        let mut leaving: Vec<HostDevice> = host.devices.extract_if(.., has_ended).collect();
        let machine = Machine::build(&valid, &mut host, &mut ram)
            .map_err(|e| ResetError::Build(Box::new(e)))?;
        host.devices.append(&mut leaving);
        let mut vm = Self {
            config,
            valid,
            ids,
            machine,
            ram,
            host,
            regions,
            settled,
            resized: is_news.then_some(resized).or(untold),
            lost,
            paused: false,
        };
        // Before the guest runs; no worker of the time before is left.
        vm.drive_for_reset(&ended);
        vm.after(ended);
        vm.host.tombstones.clear();
        vm.machine.start();
        Ok(vm)
    }

    /// The configuration as it is now.
    pub(super) fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The number of vCPUs that it has, or is to have, now and whenever it starts anew.
    pub(super) fn set_vcpus(&mut self, count: u32) -> Result<(), VcpusOutOfLimits> {
        self.valid.resize_cpus(count)?;
        self.config.cpus.clone_from(self.valid.cpus());
        Ok(())
    }

    /// Consoles, as the configuration calls them, that are pseudo terminals, and the names of these.
    pub(super) fn terminals(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let serial = self.host.serial_input.pty_name();
        let both = [
            ("serial", serial),
            ("console", self.host.console_pty.as_deref()),
        ];
        let named = |(console, name): (_, Option<_>)| Some((console, name?));
        both.into_iter().filter_map(named)
    }

    /// RAM as configured, without other memory.
    pub(super) fn ram_bytes(&self) -> u64 {
        self.host.layout.size()
    }

    /// RAM the guest has now: what the balloon took is not there.
    pub(super) fn memory_actual_bytes(&self) -> u64 {
        let balloon = self.host.balloon.as_ref();
        self.ram_bytes() - balloon.map_or(0, |balloon| balloon.actual_bytes().min(self.ram_bytes()))
    }

    /// Sets how much the balloon is to take.
    pub(super) fn resize_balloon(&mut self, bytes: u64) -> Result<(), BalloonResizeError> {
        let balloon = self.host.balloon.as_ref().ok_or(BalloonResizeError::None)?;
        let ram = self.host.layout.size();
        if bytes > ram {
            return Err(BalloonResizeError::TooLarge { bytes, ram });
        }
        balloon.resize(bytes)?;
        if let Some(word) = &mut self.config.balloon {
            word.size = ByteSize::from_bytes(bytes);
        }
        Ok(())
    }

    /// Gives a disk so many bytes.
    pub(super) fn resize_disk(&mut self, id: &str, bytes: u64) -> Result<(), ResizeDiskError> {
        let devices = &self.host.devices;
        let device = devices.iter().find(|device| device.id == id);
        let id = || id.to_owned();
        let device = device.ok_or_else(|| UnknownDevice { id: id() })?;
        device
            .kind
            .resize(bytes)
            .map_err(|source| ResizeDiskError::Disk { id: id(), source })
    }

    /// For `vm.info`: each device by id.
    pub(super) fn device_tree(&self) -> BTreeMap<String, DeviceNode<'_>> {
        let nodes = self.machine.devices.tree().map(|(id, bdf, state)| {
            let node = DeviceNode {
                id,
                pci_bdf: bdf.to_string(),
                children: &[],
                state,
                backend: self.host.backends.state_of(id),
            };
            (id.to_owned(), node)
        });
        nodes.collect()
    }

    /// For `vm.info`: which device-dax memory the guest has, and which pool it is of, if it is of one.
    pub(super) fn dax_memory(&self) -> Vec<DaxMemory<'_>> {
        let ranges = self.ram.regions().filter_map(|region| {
            let Mapping::Dax(mapping) = region.mapping() else {
                return None;
            };
            Some(DaxMemory {
                id: region.zone(),
                gpa: format!("{:#x}", region.gpa().0),
                size: region.size(),
                file: mapping.path(),
                offset: mapping.range().offset(),
                pool: mapping.pool(),
            })
        });
        ranges.collect()
    }

    /// For `vm.info`: what of guest memory is poisoned.
    pub(super) fn poison(&self) -> Vec<Poisoned> {
        self.host.poison.known()
    }

    /// For `vm.counters`: each device's, by id, and those of guest memory.
    pub(super) fn counters(&self) -> VmCounters {
        let named = |(name, count): (&str, u64)| (name.to_owned(), count);
        let memory = self.host.poison.counters().into_iter().map(named);
        let devices = self.device_counters().map(|(id, counters)| {
            let counters = counters.into_iter().map(named);
            (id, counters.collect())
        });
        let memory = (MEMORY_COUNTERS.to_owned(), memory.collect());
        VmCounters(devices.chain([memory]).collect())
    }

    /// What each device has counted, by its id.
    pub(super) fn device_counters(
        &self,
    ) -> impl Iterator<Item = (String, Vec<(&'static str, u64)>)> {
        let devices = self.host.devices.iter();
        devices.map(|device| (device.id.clone(), device.kind.counters()))
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Holds the vCPUs, then the devices. On failure the guest runs on.
    pub(super) fn pause(&mut self) -> Result<(), PauseError> {
        let until = Instant::now() + PAUSE_DEADLINE;
        let failure = if self.machine.hold_vcpus(PAUSE_DEADLINE) {
            let ids = self.machine.devices.pause(until);
            (!ids.is_empty()).then_some(PauseError::Devices { ids })
        } else {
            Some(PauseError::Vcpu)
        };
        match failure {
            None => {
                self.paused = true;
                Ok(())
            }
            Some(error) => {
                self.resume();
                Err(error)
            }
        }
    }

    /// The undo of [`RunningVm::pause`]; not for a guest whose RAM is gone.
    pub(super) fn resume(&mut self) {
        self.machine.devices.resume();
        self.machine.release();
        self.paused = false;
    }

    /// Adds a device to the running guest. On failure nothing of it is left.
    pub(super) fn add(
        &mut self,
        new: NewDevice,
        removals: &mut Removals,
    ) -> Result<(String, Bdf), AddError> {
        let mut ids = self.ids.clone();
        let segments = self.valid.segments();
        let mut config = self.config.clone();
        // Checked like a word of the command line, against everything the guest has by now.
        let opened = match new {
            NewDevice::Pmem(word) => {
                let valid = word
                    .validate(segments, &mut ids)
                    .map_err(ConfigError::from)?;
                config.pmem.push(PmemConfig {
                    id: Some(valid.id.clone()),
                    ..word
                });
                self.host.open_pmem(&valid)?
            }
            NewDevice::Disk(word) => {
                let valid = word
                    .validate(segments, &mut ids)
                    .map_err(ConfigError::from)?;
                config.disks.push(DiskConfig {
                    id: Some(valid.id.clone()),
                    ..word
                });
                self.host.open_disk(&valid)?
            }
            NewDevice::Net(mut word, fds) => {
                word.fds = taps::numbers(&fds);
                let valid = word
                    .validate(segments, &mut ids)
                    .map_err(ConfigError::from)?;
                config.net.push(NetConfig {
                    id: Some(valid.id.clone()),
                    ..word
                });
                self.host.open_net(&valid, fds, vhost_user::WHILE_RUNNING)?
            }
            NewDevice::Fs(word) => {
                let valid = word
                    .validate(segments, &mut ids)
                    .map_err(ConfigError::from)?;
                config.fs.push(FsConfig {
                    id: Some(valid.id.clone()),
                    ..word
                });
                self.host.open_fs(&valid)?
            }
            NewDevice::GenericVhostUser(word) => {
                let valid = word
                    .validate(segments, &mut ids)
                    .map_err(ConfigError::from)?;
                config.generic_vhost_user.push(GenericVhostUserConfig {
                    id: Some(valid.id.clone()),
                    ..word
                });
                self.host.open_generic_vhost_user(&valid)?
            }
            NewDevice::Vsock(word) => {
                if let Some(vsock) = &config.vsock {
                    return Err(second_vsock(vsock));
                }
                let valid = word
                    .validate(segments, &mut ids)
                    .map_err(ConfigError::from)?;
                config.vsock = Some(VsockConfig {
                    id: Some(valid.id.clone()),
                    ..word
                });
                host_devices::open_vsock(&valid)?
            }
            NewDevice::Passthrough(word) => {
                let valid = word
                    .validate(segments, &mut ids)
                    .map_err(ConfigError::from)?;
                config.devices.push(DeviceConfig {
                    id: Some(valid.id.clone()),
                    ..word
                });
                let dax = DaxInReach::of(self.ram.regions(), removals);
                self.host
                    .open_passthrough(&valid, dax)
                    .map_err(OpenDeviceError::from)?
            }
        };
        let added = self.plug(opened)?;
        self.ids = ids;
        self.config = config;
        Ok(added)
    }

    /// Memory first, then the function, then the guest.
    fn plug(&mut self, opened: OpenedDevice) -> Result<(String, Bdf), AddError> {
        let OpenedDevice { mut device, region } = opened;
        if let Some(region) = region {
            let memory = self.regions.begin(&region, User::Device(device.id.clone()));
            device.memory = Some(memory);
            if let Err(mut failure) = self.ram.attach(region) {
                if let Some(region) = failure.region.take() {
                    self.regions.forget(memory);
                    self.host.unmap_pmem(region);
                } else {
                    // Somebody keeps what he was not to have.
                    self.drive([(memory, RegionEvent::Undone)]);
                }
                self.host.close_device(device, &mut self.ram);
                return Err(failure.into());
            }
        }
        let joined = self.host.backends.join(&mut self.ram);
        if let Err(source) = joined.and_then(|()| self.host.join_dma(&mut self.ram)) {
            let id = device.id.clone();
            self.unplug(device);
            return Err(AddError::Join {
                id,
                source: Box::new(source),
            });
        }
        match self.machine.devices.plug(&mut device) {
            Ok(bdf) => {
                self.machine.devices.announce(bdf);
                let id = device.id.clone();
                self.host.devices.push(device);
                Ok((id, bdf))
            }
            Err(error) => {
                self.unplug(device);
                Err(error.into())
            }
        }
    }

    /// After a failure: the guest never knew of it.
    fn unplug(&mut self, device: HostDevice) {
        self.drive(device.memory.map(|memory| (memory, RegionEvent::Undone)));
        self.host.close_device(device, &mut self.ram);
    }

    /// Asks the guest to let go of a device; it goes when the guest has ejected it.
    pub(super) fn request_removal(&mut self, id: &str) -> Result<(), RemoveError> {
        self.machine.devices.request_removal(id, Instant::now())
    }

    /// Looks at removals under way. Devices that have gone are given back to the host and taken out of the
    /// configuration.
    pub(super) fn settle(&mut self) -> Vec<Settled> {
        let settled = self.machine.devices.settle(Instant::now());
        self.after(settled);
        self.ask_again();
        self.host.ask_for_kept(&mut self.ram);
        self.take_settled()
    }

    /// Whether [`RunningVm::settle`] is to be called again.
    pub(super) fn is_settling(&self) -> bool {
        self.machine.devices.is_settling()
            || self.machine.processors.is_changing()
            || self.regions.is_waiting()
            || self.host.kept().next().is_some()
    }

    /// A device is no part of the configuration any more.
    pub(super) fn forget_word(&mut self, id: &str) {
        self.config.remove_device(id);
        self.ids.release(id);
    }
}

/// The last step of each page's walk.
fn release(regions: Vec<Region>) {
    for region in regions.into_iter().rev() {
        if let Err(failure) = region.release() {
            error!(error = %failure.1, "guest memory is not given back before the process ends");
        }
    }
}

/// A region that was a device's goes the same way.
pub(super) fn release_one(region: Region) {
    if let Err(failure) = region.release() {
        warn!(error = %failure.1, "a device's memory is not given back");
    }
}
