//! The devices that the emulated host has to give away: what they are, and where they sit.
//!
//! Most are alone in their IOMMU group: behind a root port of their own, or on the root bus. Two are functions of one slot, which the
//! IOMMU can't keep apart; and the drive of the chipset's own controller, which shares its slot with parts of the chipset that have
//! no driver here. Places are fixed, so that addresses mean the same on every host. What stands behind them is made new with each host: sparse files as disks, and a network that reaches
//! nothing but what QEMU itself answers (DHCP, and an echo on TCP).

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::machine::with_path;

/// What a disk's file pretends to hold.
const DISK_BYTES: u64 = 256 << 20;
/// Where the network's echo is.
pub const ECHO_ADDRESS: &str = "10.0.2.100:7";
/// QEMU's user network gives out addresses of this network.
pub const LEASED_PREFIX: &str = "10.0.2.";

/// A device to pass through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Card {
    /// An e1000e on the user network: MSI-X, a BAR of I/O ports, a ROM.
    Network,
    /// An `NVMe` drive: MSI-X whose table shares the BAR with the registers.
    Disk,
    /// Another one.
    SecondDisk,
    /// QEMU's `edu`: a DMA engine and `INTx` or MSI, small enough to be driven from user space. It can address all memory.
    Edu,
    /// Another one, the first function of a slot that has two.
    PairedEdu,
    /// An `NVMe` drive, the second function of that slot.
    PairedDisk,
    /// A drive on the chipset's AHCI controller, which has MSI and no MSI-X and can't be reset by itself.
    Sata,
}

impl Card {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Network,
        Self::Disk,
        Self::SecondDisk,
        Self::Edu,
        Self::PairedEdu,
        Self::PairedDisk,
        Self::Sata,
    ];

    /// Its name in QEMU's monitor.
    pub fn id(self) -> &'static str {
        match self {
            Self::Network => "net0",
            Self::Disk => "nvme0",
            Self::SecondDisk => "nvme1",
            Self::Edu => "edu0",
            Self::PairedEdu => "edu1",
            Self::PairedDisk => "nvme2",
            Self::Sata => "sata0",
        }
    }

    /// Vendor and device.
    pub fn pci_id(self) -> (u16, u16) {
        match self {
            Self::Network => (0x8086, 0x10d3),
            Self::Disk | Self::SecondDisk | Self::PairedDisk => (0x1b36, 0x0010),
            Self::Edu | Self::PairedEdu => (0x1234, 0x11e8),
            Self::Sata => (0x8086, 0x2922),
        }
    }

    /// Class, subclass and programming interface.
    pub fn class(self) -> u32 {
        match self {
            Self::Network => 0x02_0000,
            Self::Disk | Self::SecondDisk | Self::PairedDisk => 0x01_0802,
            Self::Edu | Self::PairedEdu => 0x00_ff00,
            Self::Sata => 0x01_0601,
        }
    }

    /// The driver that Linux has for it.
    pub fn driver(self) -> Option<&'static str> {
        match self {
            Self::Network => Some("e1000e"),
            Self::Disk | Self::SecondDisk | Self::PairedDisk => Some("nvme"),
            Self::Sata => Some("ahci"),
            Self::Edu | Self::PairedEdu => None,
        }
    }

    /// Address on the root bus: of its root port, or its own.
    pub fn root_address(self) -> String {
        format!("0000:00:{:02x}.{}", self.slot(), self.function())
    }

    /// Whether it is alone behind a root port, which is also where it can be pulled out.
    pub fn has_port(self) -> bool {
        matches!(self, Self::Network | Self::Disk | Self::SecondDisk)
    }

    fn slot(self) -> u8 {
        match self {
            Self::Network => 0x10,
            Self::Disk => 0x11,
            Self::SecondDisk => 0x12,
            Self::Edu => 0x13,
            Self::PairedEdu | Self::PairedDisk => 0x14,
            // Where a Q35 has it.
            Self::Sata => 0x1f,
        }
    }

    fn function(self) -> u8 {
        match self {
            Self::PairedDisk => 1,
            Self::Sata => 2,
            _ => 0,
        }
    }

    /// On the root bus, as QEMU takes it.
    fn place(self) -> String {
        format!("{:x}.{}", self.slot(), self.function())
    }

    fn port(self) -> String {
        format!("port-{}", self.id())
    }

    fn disk(self, directory: &Path) -> Option<PathBuf> {
        match self {
            Self::Disk | Self::SecondDisk | Self::PairedDisk | Self::Sata => {
                Some(directory.join(format!("{}.raw", self.id())))
            }
            Self::Network | Self::Edu | Self::PairedEdu => None,
        }
    }

    /// Makes the file that the card's medium is, if it has one; what an earlier host has left in it is gone.
    pub(super) fn make_disk(self, directory: &Path) -> io::Result<()> {
        match self.disk(directory) {
            Some(path) => File::create(path)?.set_len(DISK_BYTES),
            None => Ok(()),
        }
    }

    /// What QEMU is told to have the card from the start.
    pub(super) fn arguments(self, disks: &Path) -> Vec<(&'static str, OsString)> {
        let mut arguments: Vec<(&'static str, OsString)> = Vec::new();
        if self == Self::Network {
            let (address, id) = (ECHO_ADDRESS, self.id());
            let word = format!("user,restrict=on,id=lan-{id},guestfwd=tcp:{address}-cmd:cat");
            arguments.push(("-netdev", word.into()));
        }
        if let Some(path) = self.disk(disks) {
            let prefix = format!("driver=file,node-name=medium-{},filename=", self.id());
            arguments.push(("-blockdev", with_path(&prefix, &path)));
        }
        if self.has_port() {
            let port = json!({
                "driver": "pcie-root-port", "id": self.port(), "bus": "pcie.0", "addr": format!("{:x}", self.slot()),
                "chassis": self.slot(), "slot": self.slot(),
            });
            arguments.push(("-device", port.to_string().into()));
        }
        arguments.push(("-device", self.device().to_string().into()));
        arguments
    }

    /// The card itself, in the form of the command line and of the monitor's `device_add`.
    pub(super) fn device(self) -> Value {
        let id = self.id();
        match self {
            // Without its boot ROM, which the firmware would run.
            Self::Network => json!({
                "driver": "e1000e", "id": id, "bus": self.port(), "netdev": format!("lan-{id}"), "romfile": "",
            }),
            Self::Disk | Self::SecondDisk => json!({
                "driver": "nvme", "id": id, "bus": self.port(), "drive": format!("medium-{id}"), "serial": id,
            }),
            Self::Edu => json!({
                "driver": "edu", "id": id, "bus": "pcie.0", "addr": self.place(), "dma_mask": u64::MAX,
            }),
            Self::PairedEdu => json!({
                "driver": "edu", "id": id, "bus": "pcie.0", "addr": self.place(), "dma_mask": u64::MAX, "multifunction": true,
            }),
            Self::PairedDisk => json!({
                "driver": "nvme", "id": id, "bus": "pcie.0", "addr": self.place(), "drive": format!("medium-{id}"), "serial": id,
            }),
            // The controller is there in any case.
            Self::Sata => json!({
                "driver": "ide-hd", "id": id, "bus": "ide.0", "drive": format!("medium-{id}"), "serial": id,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_card_has_a_name_and_a_place_of_its_own() {
        let names: BTreeSet<_> = Card::ALL.iter().map(|card| card.id()).collect();
        let places: BTreeSet<_> = Card::ALL.iter().map(|card| card.root_address()).collect();
        assert_eq!((names.len(), places.len()), (7, 7));
    }

    #[test]
    fn disks_are_sparse_and_start_empty() {
        use std::os::unix::fs::MetadataExt;
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("nvme0.raw"), "old").unwrap();
        for card in Card::ALL {
            card.make_disk(place.path()).unwrap();
        }
        let facts = std::fs::metadata(place.path().join("nvme0.raw")).unwrap();
        assert_eq!((facts.len(), facts.blocks()), (DISK_BYTES, 0));
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 4);
    }

    #[test]
    fn what_is_put_in_later_is_what_was_there() {
        let told = Card::Disk.arguments(Path::new("/a,b"));
        assert!(
            told.contains(&(
                "-blockdev",
                "driver=file,node-name=medium-nvme0,filename=/a,,b/nvme0.raw".into()
            )),
            "{told:?}"
        );
        assert!(told.contains(&("-device", Card::Disk.device().to_string().into())));
    }
}
