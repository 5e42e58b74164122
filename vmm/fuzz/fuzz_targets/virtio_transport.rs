//! A hostile driver of the transport: any access to configuration space and to the BAR, in any order. The function lives,
//! a reset is always answered, and what the device is started with was offered.

#![no_main]

use std::io;
use std::sync::Arc;

use daxhund::memory::ram::GuestView;
use daxhund::memory::snapshot::Snapshot;
use daxhund::pci::{Function, MsiMessage, MsiRoutes};
use daxhund::virtio::rng::{RngDevice, RngSpec};
use daxhund::virtio::transport::{Doorbells, Parts, VirtioPci};
use daxhund_fuzz_support::input::Input;
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

struct Nobody;

impl MsiRoutes for Nobody {
    fn set(&self, _vector: u16, _message: Option<MsiMessage>) {}
    fn signal(&self, _vector: u16) {}
    fn is_pending(&self, _vector: u16) -> bool {
        false
    }
}

impl Doorbells for Nobody {
    fn connect(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
    fn disconnect(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

const STATUS: u64 = 0x14;

fuzz_target!(|data: &[u8]| {
    let spec = RngSpec {
        id: "fuzz".to_owned(),
        src: "/dev/zero".into(),
    };
    let memory = Snapshot::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("1 MiB");
    let function = VirtioPci::new(Parts {
        id: "fuzz".to_owned(),
        device: Arc::new(RngDevice::open(spec).expect("/dev/zero")),
        routes: Arc::new(Nobody),
        doorbells: Arc::new(Nobody),
        memory: GuestView::new(memory),
    })
    .expect("descriptors");
    let mut input = Input::new(data);
    while !input.is_empty() {
        let kind = input.u8();
        let at = u64::from(input.u16());
        match kind % 6 {
            0 => {
                let bytes = input.store();
                let register = u16::try_from(at & 0xfff).expect("12 bits");
                let len = bytes.len().min(4);
                for change in function.config_write(register, &bytes[..len]) {
                    function.bar_moved(change);
                }
            }
            1 => function.config_read(u16::try_from(at & 0xfff).expect("12 bits"), &mut [0; 4]),
            2 => function.bar_write(0, at & 0x7fff, &input.store()),
            // Where the registers are.
            3 => function.bar_write(0, at & 0x3f, &input.store()),
            4 => function.bar_read(0, at & 0x7fff, &mut [0; 8]),
            _ => {
                // A driver that sets the device up, with rings anywhere.
                for status in [1u8, 3] {
                    function.bar_write(0, STATUS, &[status]);
                }
                function.bar_write(0, 0x08, &1u32.to_le_bytes());
                function.bar_write(0, 0x0c, &1u32.to_le_bytes());
                function.bar_write(0, STATUS, &[11]);
                for register in [0x20, 0x28, 0x30] {
                    function.bar_write(0, register, &(u64::from(input.u16()) << 4).to_le_bytes());
                }
                function.bar_write(0, 0x1c, &1u16.to_le_bytes());
                function.bar_write(0, STATUS, &[15]);
            }
        }
    }
    function.bar_write(0, STATUS, &[0]);
    let mut status = [1];
    while status[0] != 0 {
        // Bounded by what the host has in flight, which here is nothing.
        function.bar_read(0, STATUS, &mut status);
        std::thread::yield_now();
    }
});
