//! The hotplug registers between an owner and a guest that writes anything: nothing is lost, no eject counts twice or hits
//! a device that the guest did not know.
#![no_main]

use std::sync::{Arc, Mutex};

use daxhund::bus::BusDevice;
use daxhund::pci::{Ejected, Hotplug, Slot, Slots};
use daxhund_fuzz_support::input::Input;
use libfuzzer_sys::fuzz_target;

const SEGMENTS: u16 = 2;
const CHECK: u64 = 0x0;
const EJECT_REQUEST: u64 = 0x4;
const PRESENT: u64 = 0x8;
const EJECT: u64 = 0xc;

fn read(hotplug: &Hotplug, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    hotplug.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn block(segment: u16) -> u64 {
    0x20 * (u64::from(segment) + 1)
}

#[derive(Clone, Copy)]
struct Device {
    slot: Slot,
    /// The guest has seen that it came.
    known: bool,
    present: bool,
}

struct Owner {
    slots: Slots,
    devices: [Option<Device>; 32],
    gone: Vec<Slot>,
}

impl Owner {
    fn bits(&self, holds: impl Fn(&Device) -> bool) -> u32 {
        (0..)
            .zip(&self.devices)
            .filter(|(_, device)| device.as_ref().is_some_and(&holds))
            .fold(0, |bits, (number, _): (u32, _)| bits | 1 << number)
    }

    fn gone(&mut self, slot: Slot) {
        let device = self.devices[usize::from(slot.number())].take();
        assert_eq!(device.map(|device| device.slot), Some(slot));
        assert!(self.slots.free(slot));
        self.gone.push(slot);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let ejected = Arc::<Mutex<Vec<Ejected>>>::default();
    let events = Arc::clone(&ejected);
    let hotplug = Hotplug::new(
        SEGMENTS,
        Arc::new(move |event| events.lock().unwrap().push(event)),
        Arc::new(|| {}),
    );
    let mut owners = [0, 1].map(|segment| Owner {
        slots: Slots::new(segment),
        devices: [None; 32],
        gone: Vec::new(),
    });
    while !input.is_empty() {
        let deed = input.u8();
        let segment = u16::from(deed >> 7);
        let owner = &mut owners[usize::from(segment)];
        let number = input.u8() % 32;
        let device = owner.devices[usize::from(number)];
        match (deed % 8, device) {
            (0 | 1, None) => {
                if let Ok(slot) = owner.slots.reserve(Some(number), "device") {
                    let known = deed % 8 == 0;
                    let done = if known {
                        hotplug.set_present(segment, slot)
                    } else {
                        hotplug.announce(segment, slot)
                    };
                    assert!(done);
                    owner.devices[usize::from(number)] = Some(Device {
                        slot,
                        known,
                        present: true,
                    });
                }
            }
            (2, Some(device)) => assert!(hotplug.request_eject(segment, device.slot)),
            (3, Some(device)) => {
                assert!(hotplug.withdraw(segment, device.slot));
                owner.devices[usize::from(number)] = Some(Device {
                    known: true,
                    present: false,
                    ..device
                });
            }
            (4, Some(device)) => {
                assert!(hotplug.clear(segment, device.slot));
                owner.gone(device.slot);
            }
            (5, _) => {
                let (offset, data) = (input.u16(), input.store());
                // What is no register of a segment changes nothing; what is one is done below.
                if offset < 0x20 || offset >= 0x60 || offset % 4 != 0 || data.len() != 4 {
                    hotplug.write(offset.into(), &data);
                }
            }
            (6 | 7, _) => {
                let register = u64::from(number % 8) * 4;
                let bits = input.u32();
                hotplug.write(block(segment) + register, &bits.to_le_bytes());
                if register == CHECK {
                    for device in owner.devices.iter_mut().flatten() {
                        device.known |= bits & 1 << device.slot.number() != 0;
                    }
                }
                if register == EJECT_REQUEST {
                    let left = read(&hotplug, block(segment) + EJECT_REQUEST);
                    assert_eq!(left & bits, 0);
                }
                if register == EJECT {
                    let all = owner.bits(|device| device.known) & bits;
                    let posted = ejected.lock().unwrap().iter().fold(0, |bits, event| {
                        assert_eq!(event.segment, segment);
                        bits | 1 << event.slot.number()
                    });
                    assert_eq!(posted, all, "an eject was lost or made up");
                }
            }
            _ => {}
        }
        for event in std::mem::take(&mut *ejected.lock().unwrap()) {
            let owner = &mut owners[usize::from(event.segment)];
            let device = owner.devices[usize::from(event.slot.number())];
            assert!(device.is_some_and(|device| device.known));
            owner.gone(event.slot);
        }
        let mut pending = 0;
        for (segment, owner) in (0..SEGMENTS).zip(&owners) {
            let base = block(segment);
            let checks = read(&hotplug, base + CHECK);
            assert_eq!(checks, owner.bits(|device| !device.known));
            assert_eq!(
                read(&hotplug, base + PRESENT),
                owner.bits(|device| device.present)
            );
            let requests = read(&hotplug, base + EJECT_REQUEST);
            assert_eq!(requests & !owner.bits(|_| true), 0);
            if let Some(slot) = owner.gone.last() {
                assert!(!hotplug.request_eject(segment, *slot), "it is gone");
            }
            pending |= u32::from(checks | requests != 0) << segment;
        }
        assert_eq!(read(&hotplug, 0), pending);
    }
});
