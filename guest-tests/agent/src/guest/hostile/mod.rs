//! A driver that means harm: everything that a guest can do to a virtio device through its PCI function.
//!
//! No attempt has a right outcome: a device may ignore it, or say that it needs a reset. Every attempt ends with a reset
//! that has to be answered; what is reported is for people. That the machine, the other devices, and this device in
//! a kernel driver's hands live on, the lab checks afterwards.

mod device;
mod function;

use lab_agent::guest_protocol::HostileReport;

use super::pci;
use device::{Areas, BUFFER_BYTES, Descriptor, Device, FLAG_NEXT, FLAG_WRITE, QUEUE_SIZE};
use function::Function;

/// Beyond what any processor addresses, in canonical form.
const FAR_AWAY: u64 = 0x0000_7fff_ffff_f000;
/// The last page of all: what goes on from here wraps around.
const LAST_PAGE: u64 = 0xffff_ffff_ffff_f000;
const INTERRUPT_CONTROLLERS: [u64; 2] = [0xfec0_0000, 0xfee0_0000];
const RESETS: u32 = 50;
const VIRTIO: u16 = 0x1af4;

/// Descriptors of one attempt, for a queue of the device.
type Chain = fn(&Device, u16) -> Vec<Descriptor>;

pub(crate) const CASES: &str = "descriptors-outside-ram, descriptors-at-mmio, descriptor-loop, bad-avail-index, bad-queues, \
                                reset-mid-request, bad-msix, overlapping-bars";

/// Tries all that belongs to a case on the function. `memory` is the start of 1 MiB that the kernel leaves alone.
pub(crate) fn run(case: &str, address: &str, memory: u64) -> Result<HostileReport, String> {
    let mut attempts = Attempts {
        report: HostileReport {
            case: case.to_owned(),
            statuses: Vec::new(),
            used: 0,
        },
        device: Device::take(address, memory)?,
    };
    match case {
        "descriptors-outside-ram" => {
            for chain in OUTSIDE_RAM {
                attempts.offer(chain, &[0], 1)?;
            }
        }
        "descriptors-at-mmio" => {
            for chain in AT_MMIO {
                attempts.offer(chain, &[0], 1)?;
            }
        }
        "descriptor-loop" => {
            for chain in LOOPS {
                attempts.offer(chain, &[0], 1)?;
            }
        }
        "bad-avail-index" => {
            // More than the queue holds; all at once; backwards; and heads that are no descriptors.
            for index in [QUEUE_SIZE + 1, 0x8000, u16::MAX] {
                attempts.offer(plain, &[0], index)?;
            }
            attempts.offer(plain, &[QUEUE_SIZE], 1)?;
            attempts.offer(plain, &[u16::MAX, 0], 2)?;
        }
        "bad-queues" => attempts.bad_queues()?,
        "reset-mid-request" => attempts.resets()?,
        "bad-msix" => attempts.bad_vectors()?,
        "overlapping-bars" => attempts.move_bars(address)?,
        other => return Err(format!("no such case: {other}; there are {CASES}")),
    }
    attempts.device.reset()?;
    Ok(attempts.report)
}

/// Takes a function from its driver, puts its main BAR elsewhere, as a guest may, sees that it answers there and no longer
/// where it was, and puts it back.
pub(crate) fn move_bar(address: &str, to: u64) -> Result<(), String> {
    let function = Function::take(address)?;
    let bar = function.main_bar()?;
    let expected = function.queues_at(bar.start)?;
    function.decode(false)?;
    function.move_bar(bar, to)?;
    function.decode(true)?;
    let (here, there) = (function.queues_at(to)?, function.queues_at(bar.start)?);
    function.decode(false)?;
    function.move_bar(bar, bar.start)?;
    function.decode(true)?;
    let back = function.queues_at(bar.start)?;
    if (here, there, back) == (expected, u16::MAX, expected) && expected != u16::MAX {
        return Ok(());
    }
    Err(format!(
        "a device with {expected} queues has {here} at {to:#x}, {there} where it was, and {back} when it is back"
    ))
}

struct Attempts {
    device: Device,
    report: HostileReport,
}

impl Attempts {
    /// Starts the device and offers a chain on each of its queues.
    fn offer(&mut self, chain: Chain, heads: &[u16], index: u16) -> Result<(), String> {
        self.device.start(QUEUE_SIZE, Device::areas)?;
        for queue in 0..self.device.queues()? {
            let descriptors = chain(&self.device, queue);
            self.device.describe(queue, &descriptors);
            self.device.offer(queue, heads, index)?;
            self.note(queue)?;
        }
        self.device.reset()
    }

    fn note(&mut self, queue: u16) -> Result<(), String> {
        let status = self.device.reaction(queue)?;
        self.report.statuses.push(status);
        self.report.used += self.device.used(queue);
        Ok(())
    }

    /// Queues of sizes that cannot be, and at places where there is no memory.
    fn bad_queues(&mut self) -> Result<(), String> {
        for size in [0, 3, u16::MAX] {
            self.device.start(size, Device::areas)?;
            self.kick_all()?;
        }
        let places: [fn(&Device, u16) -> Areas; 4] = [
            |_, _| Areas {
                descriptors: FAR_AWAY,
                driver: FAR_AWAY,
                device: FAR_AWAY,
            },
            |_, _| Areas {
                descriptors: LAST_PAGE,
                driver: LAST_PAGE,
                device: LAST_PAGE,
            },
            // Not aligned.
            |device, queue| Areas {
                descriptors: device.areas(queue).descriptors + 1,
                driver: device.areas(queue).driver + 1,
                device: device.areas(queue).device + 1,
            },
            |device, queue| Areas {
                descriptors: INTERRUPT_CONTROLLERS[1],
                driver: device.function.main_bar().map_or(0, |bar| bar.start),
                device: device.areas(queue).device,
            },
        ];
        for areas in places {
            self.device.start(QUEUE_SIZE, areas)?;
            self.kick_all()?;
        }
        Ok(())
    }

    fn kick_all(&mut self) -> Result<(), String> {
        // One more than there are, too.
        for queue in 0..=self.device.queues()? {
            self.device.kick(queue)?;
        }
        self.note(0)
    }

    /// Requests that are good, and a reset before they can be done.
    fn resets(&mut self) -> Result<(), String> {
        for _ in 0..RESETS {
            self.device.start(QUEUE_SIZE, Device::areas)?;
            for queue in 0..self.device.queues()? {
                let descriptors = plain(&self.device, queue);
                self.device.describe(queue, &descriptors);
                self.device.offer(queue, &[0, 0, 0, 0], 4)?;
            }
            self.device.reset()?;
        }
        self.offer(plain, &[0], 1)
    }

    /// Interrupts that go nowhere.
    fn bad_vectors(&mut self) -> Result<(), String> {
        const ENABLE: u16 = 1 << 15;
        let (capability, table) = self.device.function.msi_x.ok_or("it has no MSI-X")?;
        let control = self.device.function.config16(capability + 2)?;
        let set = |device: &Device, control: u16| {
            device
                .function
                .set_config(capability + 2, &control.to_le_bytes())
        };
        for address in [0xdead_beec_u64, FAR_AWAY, LAST_PAGE, 0xfee0_0000] {
            let [low, high] = function::halves(address);
            let registers = self.device.function.registers(table.bar)?;
            for (at, word) in [(0, low), (4, high), (8, u32::MAX), (12, 0)] {
                registers.write32(table.offset + at, word);
            }
            set(&self.device, control | ENABLE)?;
            self.device.start(QUEUE_SIZE, Device::areas)?;
            self.device.use_first_vector()?;
            for queue in 0..self.device.queues()? {
                let descriptors = plain(&self.device, queue);
                self.device.describe(queue, &descriptors);
                self.device.offer(queue, &[0], 1)?;
                self.note(queue)?;
            }
            self.device.reset()?;
            set(&self.device, control & !ENABLE)?;
        }
        Ok(())
    }

    /// BARs over other BARs, over RAM, over the interrupt controllers, and at no address at all.
    fn move_bars(&mut self, address: &str) -> Result<(), String> {
        let others = pci::list()?;
        let other = others
            .iter()
            .find(|other| other.id.0 == VIRTIO && other.address != address)
            .ok_or("there is no second virtio device")?;
        let theirs = other.bars.first().ok_or("the second device has no BAR")?;
        let bar = self.device.function.main_bar()?;
        let queues = self.device.queues()?;
        let places = [
            theirs.start,
            0,
            0x10_0000,
            INTERRUPT_CONTROLLERS[0],
            INTERRUPT_CONTROLLERS[1],
            0xffff_0000,
            FAR_AWAY,
            LAST_PAGE,
        ];
        for place in places {
            self.device.function.move_bar(bar, place)?;
            // Nothing, or whoever is there now.
            let status = self.device.status()?;
            self.report.statuses.push(status);
            self.device.function.move_bar(bar, bar.start)?;
            self.has_queues(queues)?;
        }
        self.device.function.decode(false)?;
        let status = self.device.status()?;
        self.report.statuses.push(status);
        self.device.function.decode(true)?;
        self.has_queues(queues)?;
        // The other one is where it was. It may have a driver, so it is only looked at.
        Function::look(&other.address, *theirs)
    }

    fn has_queues(&mut self, expected: u16) -> Result<(), String> {
        let found = self.device.queues()?;
        if found == expected {
            return Ok(());
        }
        Err(format!(
            "back at its place, the device has {found} queues instead of {expected}"
        ))
    }
}

/// A chain that suits a block device (read sector 0) and does no harm elsewhere: 16 bytes to read, then room to write.
fn plain(device: &Device, queue: u16) -> Vec<Descriptor> {
    let buffers = device.buffers(queue);
    let second = buffers + 0x1000;
    vec![
        Descriptor {
            address: buffers,
            length: 16,
            flags: FLAG_NEXT,
            next: 1,
        },
        Descriptor {
            address: second,
            length: BUFFER_BYTES / 2,
            flags: FLAG_NEXT | FLAG_WRITE,
            next: 2,
        },
        Descriptor {
            address: second + u64::from(BUFFER_BYTES / 2),
            length: 1,
            flags: FLAG_WRITE,
            next: 0,
        },
    ]
}

/// The good chain with another address and length of its second descriptor.
fn with_second(device: &Device, queue: u16, address: u64, length: u32) -> Vec<Descriptor> {
    let mut chain = plain(device, queue);
    chain[1].address = address;
    chain[1].length = length;
    chain
}

const OUTSIDE_RAM: [Chain; 6] = [
    |device, queue| with_second(device, queue, FAR_AWAY, 4096),
    |device, queue| with_second(device, queue, LAST_PAGE, 8192),
    // From RAM to far beyond it.
    |device, queue| with_second(device, queue, device.buffers(queue), u32::MAX),
    |device, queue| with_second(device, queue, device.buffers(queue), 0),
    // The header itself.
    |device, queue| {
        let mut chain = plain(device, queue);
        chain[0].address = FAR_AWAY;
        chain
    },
    // And where the device is to say how it went.
    |device, queue| {
        let mut chain = plain(device, queue);
        chain[2].address = LAST_PAGE + 4095;
        chain
    },
];

const AT_MMIO: [Chain; 3] = [
    |device, queue| {
        let own = device.function.main_bar().map_or(0, |bar| bar.start);
        with_second(device, queue, own, 4096)
    },
    |device, queue| with_second(device, queue, INTERRUPT_CONTROLLERS[0], 4096),
    |device, queue| with_second(device, queue, INTERRUPT_CONTROLLERS[1], 4096),
];

const LOOPS: [Chain; 4] = [
    |device, queue| linked(device, queue, &[0]),
    |device, queue| linked(device, queue, &[1, 0]),
    |device, queue| linked(device, queue, &[1, 2, 3, 4, 5, 6, 7, 1]),
    // To where there is no descriptor.
    |device, queue| linked(device, queue, &[1, QUEUE_SIZE]),
];

/// Descriptors that all go on, each with the one given.
fn linked(device: &Device, queue: u16, next: &[u16]) -> Vec<Descriptor> {
    let address = device.buffers(queue);
    let to = |next: &u16| Descriptor {
        address,
        length: 16,
        flags: FLAG_NEXT,
        next: *next,
    };
    next.iter().map(to).collect()
}
