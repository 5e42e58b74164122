//! The MSI-X table and its capability under a guest that writes anything: the routes are what the registers say.
#![no_main]

use std::sync::Arc;

use daxhund::pci::testing::{FakeRoutes, IDENTITY};
use daxhund::pci::{BarOffset, ConfigSpace, MsiMessage, MsiRoutes, Msix, MsixLayout};
use daxhund_fuzz_support::input::Input;
use libfuzzer_sys::fuzz_target;

const VECTORS: u16 = 67;
const BAR: u8 = 1;
const TABLE: u64 = 0x100;
const PENDING: u64 = 0x800;

fn load(msix: &Msix, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    assert!(msix.bar_read(BAR, offset, &mut data));
    u32::from_le_bytes(data)
}

fn check(msix: &Msix, routes: &FakeRoutes, control: u16) {
    for vector in 0..VECTORS {
        let register = |number: u64| load(msix, TABLE + u64::from(vector) * 16 + number * 4);
        let message = MsiMessage {
            address: u64::from(register(1)) << 32 | u64::from(register(0)),
            data: register(2),
        };
        assert_eq!(message.address % 4, 0);
        let open = control >> 14 == 0b10 && register(3) == 0;
        assert_eq!(routes.get(vector), open.then_some(message));
        let pending = load(msix, PENDING + u64::from(vector) / 32 * 4) >> (vector % 32) & 1;
        assert_eq!(pending == 1, routes.is_pending(vector));
    }
    assert_eq!(load(msix, PENDING + 8) >> (VECTORS - 64), 0);
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let routes = Arc::new(FakeRoutes::default());
    let place = |offset: u64| BarOffset {
        bar: BAR,
        offset: u32::try_from(offset).expect("a small offset"),
    };
    let layout = MsixLayout {
        vectors: VECTORS,
        table: place(TABLE),
        pending: place(PENDING),
    };
    let msix = Msix::new(layout, Arc::clone(&routes) as _).expect("sound");
    let mut space = ConfigSpace::new(&IDENTITY);
    let capability = msix.add_capability(&mut space).expect("there is room");
    while !input.is_empty() {
        match input.u8() % 8 {
            0 | 1 => {
                let register = u16::from(capability) + u16::from(input.u8() % 12);
                space.write(register, &input.store());
            }
            2..=4 => {
                let offset = u64::from(input.u16() % 0x1000);
                msix.bar_write(BAR, offset, &input.store());
            }
            5 => {
                let offset = input.u64();
                msix.bar_write(input.u8(), offset, &input.store());
            }
            6 => routes.signal(input.u16() % VECTORS),
            _ => {
                space.set(u16::from(capability) + 2, &(VECTORS - 1).to_le_bytes());
                msix.reset();
            }
        }
        msix.config_written(&space, capability);
        assert_eq!(
            space.read_u16(u16::from(capability) + 2) & 0x7ff,
            VECTORS - 1
        );
        check(
            &msix,
            &routes,
            space.read_u16(u16::from(capability) + 2) & 0xc000,
        );
    }
});
