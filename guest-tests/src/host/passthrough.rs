//! The host's side of passthrough: which cards there are, binding one to vfio-pci and back, pulling one out.
//!
//! A binding is undone when its value goes: the card has the driver again that it had before, or none. A card that somebody
//! still uses is not given up by vfio-pci, so a binding has to outlive the guest.

use super::cards::Card;
use super::channel::{Channel, HostError};
use super::qmp::QmpError;
use super::{Host, check};

const DEVICES: &str = "/sys/bus/pci/devices";
/// What passing a device through takes on the host. An image that is all there is of a kernel has nothing to load.
const LOAD: &str =
    "for m in vfio_pci vfio_iommu_type1; do test -e /sys/module/$m || modprobe $m || exit 1; done";
/// For a device to come or go after the slot was asked.
const SLOT_SECONDS: &str = "30";

/// A card as the host's kernel sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PciDevice {
    /// Which.
    pub card: Card,
    /// As in `0000:01:00.0`.
    pub address: String,
    /// Number of its IOMMU group.
    pub group: Option<u32>,
    /// The driver that has it.
    pub driver: Option<String>,
}

impl PciDevice {
    /// Its directory, as `--device path=` takes it.
    pub fn path(&self) -> String {
        format!("{DEVICES}/{}", self.address)
    }
}

/// A card that vfio-pci has, until this goes.
#[derive(Debug)]
pub struct Binding {
    channel: Channel,
    device: PciDevice,
    /// Whether it is still to be undone.
    bound: bool,
}

impl Binding {
    /// The card.
    pub fn device(&self) -> &PciDevice {
        &self.device
    }

    /// As `--device` takes it.
    pub fn path(&self) -> String {
        self.device.path()
    }

    /// Its group's file.
    pub fn group_file(&self) -> String {
        let group = self
            .device
            .group
            .map_or("none".to_owned(), |n| n.to_string());
        format!("/dev/vfio/{group}")
    }

    /// Its own device file, where the kernel makes one.
    pub fn device_file(&self) -> Result<String, HostError> {
        let names = check(&self.channel, &["ls", &format!("{}/vfio-dev", self.path())])?;
        Ok(format!("/dev/vfio/devices/{}", names.trim()))
    }

    /// Gives the card back to the driver that it had before, or to none.
    pub fn release(mut self) -> Result<(), HostError> {
        self.undo()
    }

    /// Forgets the card, which has been pulled out.
    pub fn forget(mut self) {
        self.bound = false;
    }

    fn undo(&mut self) -> Result<(), HostError> {
        if std::mem::take(&mut self.bound) {
            let (address, driver) = (&self.device.address, self.device.driver.as_deref());
            check(
                &self.channel,
                &["sh", "-c", &unbind_script(address, driver)],
            )?;
        }
        Ok(())
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        // The host is looked at after each test, so whatever is left behind is noticed there.
        if let Err(error) = self.undo() {
            eprintln!("lab: {} stays with vfio-pci: {error}", self.device.address);
        }
    }
}

impl Host {
    /// The cards that there are, in the order of [`Card::ALL`].
    pub fn pci(&self) -> Result<Vec<PciDevice>, HostError> {
        let script = format!(
            "for d in {DEVICES}/*; do \
             name() {{ if test -e $d/$1; then basename $(readlink $d/$1); else echo -; fi; }}; \
             echo $(readlink -f $d) $(name iommu_group) $(name driver); done"
        );
        Ok(parse_listing(&self.sh(&script)?))
    }

    /// One card.
    pub fn pci_device(&self, card: Card) -> Result<PciDevice, HostError> {
        let found = self.pci()?.into_iter().find(|device| device.card == card);
        found.ok_or_else(|| HostError::Refused {
            what: format!("looking for the card {}", card.id()),
            message: format!("there is none at or behind {}", card.root_address()),
        })
    }

    /// Takes a card from the driver that has it and gives it to vfio-pci.
    pub fn bind_vfio(&self, card: Card) -> Result<Binding, HostError> {
        let device = self.pci_device(card)?;
        // Undone from here on, whatever of it comes about.
        let binding = Binding {
            channel: self.channel.clone(),
            device,
            bound: true,
        };
        self.sh(&format!("{LOAD}; {}", bind_script(&binding.device.address)))?;
        let driver = self.pci_device(card)?.driver;
        if driver.as_deref() == Some("vfio-pci") {
            return Ok(binding);
        }
        Err(HostError::Refused {
            what: format!("binding {} to vfio-pci", binding.device.address),
            message: format!("its driver is {driver:?} afterwards"),
        })
    }

    /// Asks for a card to be pulled out of its slot, as a person does who presses the slot's button: the host lets go of it first.
    pub fn pull_out(&mut self, card: Card) -> Result<(), QmpError> {
        self.qmp().unplug(card.id())
    }

    /// Waits until a card is out that was to be pulled out.
    pub fn await_pulled_out(&mut self, card: Card) -> Result<(), QmpError> {
        self.qmp().await_deleted(card.id())
    }

    /// Puts a card that was pulled out into its slot again.
    pub fn put_in(&mut self, card: Card) -> Result<(), QmpError> {
        self.qmp().execute("device_add", &card.device()).map(|_| ())
    }

    /// Waits until the host has found a card that was put in.
    pub fn await_put_in(&self, device: &PciDevice) -> Result<(), HostError> {
        self.check(&["lab-agent", "await", &device.path(), SLOT_SECONDS])
            .map(|_| ())
    }
}

/// The override first, so that no other driver gets the device in between.
fn bind_script(address: &str) -> String {
    format!(
        "cd {DEVICES}/{address} && echo vfio-pci > driver_override && \
         if test -e driver; then echo {address} > driver/unbind; else {QUIET}; fi && \
         echo {address} > /sys/bus/pci/drivers_probe"
    )
}

/// Turns the network card's receiver and transmitter off. The emulator's takes no notice of a reset by power management,
/// which is what the host's kernel resets it by: with the last guest's rings it would write to wherever they say now, as
/// soon as the next guest's driver made it bus master ("DMAR: ... Access beyond MGAW"). A driver of the host's leaves it off.
const QUIET: &str = "if test $(cat device) = 0x10d3; then \
     echo 1 > enable && bar=$(head -n 1 resource | cut -d' ' -f1) && \
     devmem $((bar + 0x100)) 32 0 && devmem $((bar + 0x400)) 32 0 && echo 0 > enable; fi";

fn unbind_script(address: &str, driver: Option<&str>) -> String {
    let again = driver.map_or(String::new(), |driver| {
        format!(" && echo {address} > /sys/bus/pci/drivers/{driver}/bind")
    });
    format!(
        "cd {DEVICES}/{address} && echo > driver_override && \
         if test -e driver; then echo {address} > driver/unbind; fi{again}"
    )
}

/// Lines of `PATH GROUP DRIVER`, the path with all bridges on the way.
fn parse_listing(text: &str) -> Vec<PciDevice> {
    let parse = |card: Card, line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [path, group, driver] = words[..] else {
            return None;
        };
        let mut names = path.rsplit('/');
        let (address, above) = (names.next()?, names.next()?);
        let place = if card.has_port() { above } else { address };
        (place == card.root_address()).then(|| PciDevice {
            card,
            address: address.to_owned(),
            group: group.parse().ok(),
            driver: (driver != "-").then(|| driver.to_owned()),
        })
    };
    let find = |card: Card| text.lines().find_map(|line| parse(card, line));
    Card::ALL.into_iter().filter_map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_found_behind_their_ports() {
        let text = "/sys/devices/pci0000:00/0000:00:00.0 0 -\n\
                    /sys/devices/pci0000:00/0000:00:10.0 6 pcieport\n\
                    /sys/devices/pci0000:00/0000:00:11.0 7 pcieport\n\
                    /sys/devices/pci0000:00/0000:00:13.0 8 -\n\
                    /sys/devices/pci0000:00/0000:00:10.0/0000:01:00.0 10 e1000e\n";
        let found = parse_listing(text);
        let expected = |card, address: &str, group, driver: Option<&str>| PciDevice {
            card,
            address: address.to_owned(),
            group: Some(group),
            driver: driver.map(str::to_owned),
        };
        assert_eq!(
            found,
            [
                expected(Card::Network, "0000:01:00.0", 10, Some("e1000e")),
                expected(Card::Edu, "0000:00:13.0", 8, None),
            ]
        );
    }

    #[test]
    fn the_driver_of_before_comes_back() {
        assert!(!unbind_script("0000:00:13.0", None).contains("/bind"));
        let script = unbind_script("0000:01:00.0", Some("e1000e"));
        assert!(script.ends_with("echo 0000:01:00.0 > /sys/bus/pci/drivers/e1000e/bind"));
    }
}
