//! The devices a guest starts with, together: their ids, their places and their files.

use super::device::{IdAllocator, Place};
use super::files::FileUse;
use super::passthrough::check_functions;
use super::{
    Backing, BalloonConfig, ConfigError, DeviceConfig, DiskConfig, DiskSource, Extent, FsConfig,
    GenericVhostUserConfig, MemoryZoneConfig, NetConfig, PmemConfig, PmemSource, RngConfig,
    ValidBalloon, ValidConsole, ValidDevice, ValidDisk, ValidFs, ValidGenericVhostUser, ValidNet,
    ValidPmem, ValidRng, ValidVsock, VirtioConsoleConfig, VmConfig, VsockConfig, ZoneSpec,
};

/// The devices a guest starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Devices {
    pub(super) console: Option<ValidConsole>,
    pub(super) disks: Vec<ValidDisk>,
    pub(super) net: Vec<ValidNet>,
    pub(super) rng: ValidRng,
    pub(super) generic_vhost_user: Vec<ValidGenericVhostUser>,
    pub(super) fs: Vec<ValidFs>,
    pub(super) pmem: Vec<ValidPmem>,
    pub(super) vsock: Option<ValidVsock>,
    pub(super) balloon: Option<ValidBalloon>,
    pub(super) passthrough: Vec<ValidDevice>,
}

impl VmConfig {
    pub(super) fn ids_asked_for(&self) -> impl Iterator<Item = &str> {
        let zones = self.memory.zones.iter().map(|zone| zone.id.as_str());
        let rng = self.rng.id.iter();
        let console = self.console.iter().flat_map(|console| &console.id);
        let vsock = self.vsock.iter().flat_map(|vsock| &vsock.id);
        let balloon = self.balloon.iter().flat_map(|balloon| &balloon.id);
        let disks = self.disks.iter().flat_map(|disk| &disk.id);
        let net = self.net.iter().flat_map(|net| &net.id);
        let generic = self.generic_vhost_user.iter();
        let generic = generic.flat_map(|device| &device.id);
        let fs = self.fs.iter().flat_map(|fs| &fs.id);
        let pmem = self.pmem.iter().flat_map(|pmem| &pmem.id);
        let passthrough = self.devices.iter().flat_map(|device| &device.id);
        let devices = rng
            .chain(console)
            .chain(vsock)
            .chain(balloon)
            .chain(disks)
            .chain(net);
        let devices = devices
            .chain(generic)
            .chain(fs)
            .chain(pmem)
            .chain(passthrough);
        zones.chain(devices.map(String::as_str))
    }

    /// The order is the contract's, so that generated ids are what its clients expect.
    pub(super) fn devices(&self, ids: &mut IdAllocator) -> Result<Devices, ConfigError> {
        let segments = self.platform.num_pci_segments;
        let console = match &self.console {
            Some(console) => console.validate(&self.serial, segments, ids)?,
            None => None,
        };
        let disks = self.disks.iter().map(|disk| disk.validate(segments, ids));
        let disks = disks.collect::<Result<_, _>>()?;
        let net = self.net.iter().map(|net| net.validate(segments, ids));
        let net = net.collect::<Result<_, _>>()?;
        let rng = self.rng.validate(segments, ids)?;
        let generic = self.generic_vhost_user.iter();
        let generic = generic.map(|device| device.validate(segments, ids));
        let generic_vhost_user = generic.collect::<Result<_, _>>()?;
        let fs = self.fs.iter().map(|fs| fs.validate(segments, ids));
        let fs = fs.collect::<Result<_, _>>()?;
        let pmem = self.pmem.iter().map(|pmem| pmem.validate(segments, ids));
        let pmem = pmem.collect::<Result<_, _>>()?;
        let vsock = self.vsock.as_ref();
        let vsock = vsock.map(|vsock| vsock.validate(segments, ids));
        let vsock = vsock.transpose()?;
        let balloon = self.balloon.as_ref();
        let balloon = balloon.map(|balloon| balloon.validate(segments, ids));
        let balloon = balloon.transpose()?;
        let devices = self.devices.iter();
        let passthrough = devices.map(|device| device.validate(segments, ids));
        let passthrough = passthrough.collect::<Result<Vec<_>, _>>()?;
        check_functions(&passthrough)?;
        Ok(Devices {
            console,
            disks,
            net,
            rng,
            generic_vhost_user,
            fs,
            pmem,
            vsock,
            balloon,
            passthrough,
        })
    }

    /// Fills in the ids that devices got.
    pub(super) fn name(&mut self, devices: &Devices) {
        self.rng.id = Some(devices.rng.id.clone());
        if let (Some(console), Some(valid)) = (&mut self.console, &devices.console) {
            console.id = Some(valid.id.clone());
        }
        for (disk, valid) in self.disks.iter_mut().zip(&devices.disks) {
            disk.id = Some(valid.id.clone());
        }
        for (net, valid) in self.net.iter_mut().zip(&devices.net) {
            net.id = Some(valid.id.clone());
        }
        let generic = self.generic_vhost_user.iter_mut();
        for (device, valid) in generic.zip(&devices.generic_vhost_user) {
            device.id = Some(valid.id.clone());
        }
        for (fs, valid) in self.fs.iter_mut().zip(&devices.fs) {
            fs.id = Some(valid.id.clone());
        }
        for (pmem, valid) in self.pmem.iter_mut().zip(&devices.pmem) {
            pmem.id = Some(valid.id.clone());
        }
        if let (Some(vsock), Some(valid)) = (&mut self.vsock, &devices.vsock) {
            vsock.id = Some(valid.id.clone());
        }
        if let (Some(balloon), Some(valid)) = (&mut self.balloon, &devices.balloon) {
            balloon.id = Some(valid.id.clone());
        }
        for (device, valid) in self.devices.iter_mut().zip(&devices.passthrough) {
            device.id = Some(valid.id.clone());
        }
    }
}

impl Devices {
    /// Every device's place, with how errors name it.
    pub(super) fn places(&self) -> Vec<(String, Place)> {
        let mut places = Vec::new();
        let mut add = |flag: &str, id: &str, place| places.push((format!("{flag} id={id}"), place));
        if let Some(console) = &self.console {
            add(VirtioConsoleConfig::FLAG, &console.id, console.place);
        }
        for disk in &self.disks {
            add(DiskConfig::WORD.flag, &disk.id, disk.place);
        }
        for net in &self.net {
            add(NetConfig::WORD.flag, &net.id, net.place);
        }
        add(RngConfig::WORD.flag, &self.rng.id, self.rng.place);
        for device in &self.generic_vhost_user {
            add(GenericVhostUserConfig::WORD.flag, &device.id, device.place);
        }
        for fs in &self.fs {
            add(FsConfig::WORD.flag, &fs.id, fs.place);
        }
        for pmem in &self.pmem {
            add(PmemConfig::WORD.flag, &pmem.id, pmem.place);
        }
        if let Some(vsock) = &self.vsock {
            add(VsockConfig::WORD.flag, &vsock.id, vsock.place);
        }
        if let Some(balloon) = &self.balloon {
            add(BalloonConfig::WORD.flag, &balloon.id, balloon.place);
        }
        for device in &self.passthrough {
            add(DeviceConfig::WORD.flag, &device.id, device.place);
        }
        places
    }

    /// Which files zones and devices keep their bytes in.
    pub(super) fn file_uses<'a>(&'a self, zones: &'a [ZoneSpec]) -> Vec<FileUse<'a>> {
        let mut uses = Vec::new();
        let mut add = |flag: &str, id: &str, file, extent, writes| {
            uses.push(FileUse {
                device: format!("{flag} id={id}"),
                file,
                extent,
                writes,
            });
        };
        for zone in zones {
            if let Backing::File {
                path, offset, size, ..
            } = &zone.backing
            {
                let (offset, size) = (*offset, *size);
                let extent = Extent { offset, size };
                add(MemoryZoneConfig::WORD.flag, &zone.id, path, extent, true);
            }
        }
        for disk in &self.disks {
            // What a backend serves is its own to keep from others.
            if let DiskSource::Image(image) = &disk.source {
                let (flag, writes) = (DiskConfig::WORD.flag, !image.readonly);
                add(flag, &disk.id, &image.path, Extent::default(), writes);
            }
        }
        for pmem in &self.pmem {
            if let PmemSource::File {
                file,
                size,
                offset,
                discard_writes,
            } = &pmem.source
            {
                let (offset, size) = (*offset, *size);
                let (extent, writes) = (Extent { offset, size }, !discard_writes);
                add(PmemConfig::WORD.flag, &pmem.id, file, extent, writes);
            }
        }
        uses
    }
}
