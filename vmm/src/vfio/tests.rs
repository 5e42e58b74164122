//! A function in a segment, as a guest uses it.

use std::sync::Arc;

use daxhund_pin::{HostFunction, IrqKind, RegionIndex};
use proptest::prelude::*;

use super::testing::{Asked, Bench, FakeHost, FakeIntx, FakeVectors, FakeWindows, host_address};
use super::{NewError, Parts, VfioPci, vectors_needed};
use crate::bus::BusDevice;
use crate::pci::testing::windows;
use crate::pci::{ConfigAddress, Function, MsiMessage, Segment};

const SLOT: u8 = 3;
const LOW: u64 = 0xc000_0000;
const HIGH: u64 = 256 << 30;
const MESSAGE: MsiMessage = MsiMessage {
    address: 0xfee0_1000,
    data: 0x31,
};

/// A function in a slot.
struct Guest {
    bench: Bench,
    segment: Segment,
}

impl Guest {
    fn new(host: FakeHost) -> Self {
        Self::of(Bench::new(host))
    }

    fn of(bench: Bench) -> Self {
        let segment = Segment::new(windows());
        let function = Arc::clone(&bench.function);
        segment.insert(SLOT, function).unwrap();
        bench.host.asked();
        Self { bench, segment }
    }

    fn at(register: u16) -> ConfigAddress {
        ConfigAddress {
            bus: 0,
            devfn: SLOT << 3,
            register,
        }
    }

    fn read(&self, register: u16) -> u32 {
        let mut data = [0; 4];
        self.segment.config_read(Self::at(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn read_u16(&self, register: u16) -> u16 {
        let mut data = [0; 2];
        self.segment.config_read(Self::at(register), &mut data);
        u16::from_le_bytes(data)
    }

    fn write(&self, register: u16, value: u32) {
        self.store(register, &value.to_le_bytes());
    }

    fn write_u16(&self, register: u16, value: u16) {
        self.store(register, &value.to_le_bytes());
    }

    fn store(&self, register: u16, data: &[u8]) {
        self.segment.config_write(Self::at(register), data);
    }

    fn load_bytes(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        for aperture in self.segment.apertures() {
            let window = aperture.window();
            if window.base() <= address && address < window.end() {
                aperture.read(address - window.base(), data);
            }
        }
    }

    fn load(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.load_bytes(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn save(&self, address: u64, value: u32) {
        for aperture in self.segment.apertures() {
            let window = aperture.window();
            if window.base() <= address && address < window.end() {
                aperture.write(address - window.base(), &value.to_le_bytes());
            }
        }
    }

    /// Fills an entry of an MSI-X table and unmasks it.
    fn unmask(&self, table: u64, vector: u64, data: u32) {
        let entry = table + vector * 16;
        self.save(entry, 0xfee0_1000);
        self.save(entry + 4, 0);
        self.save(entry + 8, data);
        self.save(entry + 12, 0);
    }

    fn mapped(&self) -> Vec<(u64, u64)> {
        let all = self.bench.windows.mapped();
        all.into_iter().map(|(gpa, size, _)| (gpa, size)).collect()
    }
}

#[test]
fn it_is_what_the_host_says_without_its_bridge_and_link() {
    let guest = Guest::new(FakeHost::nvme());
    assert_eq!(guest.read(0), 0x0010_1b36);
    assert_eq!(guest.read(8), 0x0108_0202);
    assert_eq!(guest.read(0x0c), 0, "type 0, one function");
    assert_eq!(guest.read(0x2c), 0x1100_1af4);
    assert_eq!(guest.read_u16(0x3c) >> 8, 1, "INTA");
    assert_eq!(
        guest.bench.capabilities(),
        [(0x11, 0x40), (0x10, 0x80), (1, 0x60)]
    );
    // Express: version 2, an integrated endpoint.
    assert_eq!(guest.read_u16(0x82), 0x92);
    assert_eq!(guest.read(0x84), 0x1000_8027);
    assert_eq!(
        guest.read(0x88),
        0x0005_2e10,
        "control and status are the host's"
    );
    assert_eq!((guest.read(0x8c), guest.read(0x90)), (0, 0), "no link");
    assert_eq!(guest.read(0xa4), 0x1f);
    assert_eq!(guest.read_u16(0xa8), 0);
    // Extended: ARI and SR-IOV are not there.
    let extended = [(0, 0x100), (1, 0x140), (3, 0x200), (0xb, 0x300)];
    assert_eq!(guest.bench.extended(), extended);
    assert_eq!(guest.read(0x100), 0x1400_0000);
    assert_eq!((guest.read(0x104), guest.read(0x224)), (0, 0));
    assert_eq!(guest.read(0x144), 0x1413_1211);
    assert_eq!(guest.read(0x204), 0x2423_2221);
    assert_eq!(guest.read(0x308), 0x4443_4241);
    guest.bench.check();
}

#[test]
fn stores_reach_the_host_only_where_they_may() {
    let guest = Guest::new(FakeHost::nvme());
    let wrote = |at, data: &[u8]| Asked::Wrote(RegionIndex::Config, at, data.to_vec());
    for register in [
        0, 8, 0x2c, 0x80, 0x84, 0x8c, 0x90, 0x140, 0x144, 0x204, 0x220,
    ] {
        let before = guest.read(register);
        guest.write(register, !0);
        assert_eq!(guest.read(register), before, "{register:#x}");
    }
    assert_eq!(guest.bench.host.asked(), []);
    guest.write(0x308, 0x1234_5678);
    guest.write_u16(0x50, 0xabcd);
    guest.write_u16(6, !0);
    // What may not be passed on stays as it is: phantom functions, auxiliary power, ARI.
    guest.write_u16(0x88, 0x7fff & !0x0400);
    guest.write_u16(0x8a, !0);
    guest.write_u16(0xa8, !0);
    let asked = guest.bench.host.asked();
    assert_eq!(
        asked,
        [
            wrote(0x308, &[0x78, 0x56, 0x34, 0x12]),
            wrote(0x50, &[0xcd, 0xab]),
            wrote(7, &[0xf9]),
            wrote(0x88, &[0xff, 0x7f]),
            wrote(0x8a, &[0x0f]),
            wrote(0xa8, &[0x3f]),
        ]
    );
    guest.bench.check();
}

#[test]
fn power_states_are_the_guest_s_own() {
    let guest = Guest::new(FakeHost::nvme());
    assert_eq!(guest.read_u16(0x62), 0x0603 & 0xfe03, "no PME");
    assert_eq!(guest.read(0x64), 8, "D0, no soft reset");
    guest.write_u16(0x64, 0x8103);
    assert_eq!(guest.read(0x64), 0xb);
    assert_eq!(guest.bench.host.asked(), []);
}

#[test]
fn the_pages_of_msix_are_trapped_and_their_neighbours_mapped() {
    let guest = Guest::new(FakeHost::e1000e());
    assert_eq!(guest.mapped(), []);
    guest.write_u16(4, 6);
    let bar = |number: u16| u64::from(guest.read(0x10 + 4 * number) & !0xf);
    assert_eq!(guest.read(0x18), 0, "I/O BARs are hidden");
    guest.write(0x18, !0);
    assert_eq!(guest.read(0x18), 0);
    let (first, second, last) = (bar(0), bar(1), bar(3));
    let mut expected = vec![
        (first, 0x2_0000, host_address(0, 0)),
        (second, 0x2_0000, host_address(1, 0)),
        (last + 0x1000, 0x1000, host_address(3, 0x1000)),
        (last + 0x3000, 0x1000, host_address(3, 0x3000)),
    ];
    expected.sort_unstable();
    assert_eq!(guest.bench.windows.mapped(), expected);
    // The table is ours, the rest of its page the host's.
    guest.bench.host.asked();
    assert_eq!(guest.load(last + 12), 1, "masked");
    assert_eq!(guest.load(last + 0x2000), 0, "nothing is pending");
    assert_eq!(guest.bench.host.asked(), []);
    assert_eq!(guest.load(last + 0x800), 0xb3b3_b3b3);
    guest.save(last + 0x2800, 0x55);
    assert_eq!(
        guest.bench.host.asked(),
        [
            Asked::Read(RegionIndex::Bar(3), 0x800, 4),
            Asked::Wrote(RegionIndex::Bar(3), 0x2800, vec![0x55, 0, 0, 0]),
        ]
    );
    guest.bench.check();
}

#[test]
fn windows_follow_the_bar_and_memory_decode() {
    let guest = Guest::new(FakeHost::nvme());
    guest.write_u16(4, 2);
    assert_eq!(guest.mapped(), [(HIGH, 0x2000)]);
    // Moved while it answers: halfway it is at the low half alone.
    guest.write(0x10, 0x10_0000);
    assert_eq!(guest.mapped(), [(HIGH + 0x10_0000, 0x2000)]);
    guest.write(0x10, !0);
    guest.write(0x14, !0);
    assert_eq!(guest.mapped(), [], "nobody answers at the end of the world");
    guest.write(0x14, 0);
    guest.write(0x10, 0xc000_0000);
    assert_eq!(guest.mapped(), [(LOW, 0x2000)], "a wide BAR may be low");
    guest.bench.host.asked();
    guest.write_u16(4, 0);
    assert_eq!(guest.mapped(), []);
    let off = Asked::Wrote(RegionIndex::Config, 4, vec![0, 0]);
    let asked = guest.bench.host.asked();
    assert!(asked.contains(&off), "{asked:?}");
    assert_eq!(guest.load(LOW), !0);
    guest.write_u16(4, 2);
    assert_eq!(guest.mapped(), [(LOW, 0x2000)]);
    guest.bench.check();
    drop(guest.segment.remove(SLOT));
    assert_eq!(guest.mapped(), []);
    assert_eq!(guest.bench.host.mappings(), 1, "still ours, to come back");
}

#[test]
fn what_can_not_be_mapped_is_trapped() {
    let trapped = |guest: Guest| {
        guest.write_u16(4, 2);
        let bar = u64::from(guest.read(0x10) & !0xf);
        assert_eq!(guest.load(bar), 0xb0b0_b0b0);
        guest.save(bar + 0x1000, 7);
        let stored = Asked::Wrote(RegionIndex::Bar(0), 0x1000, vec![7, 0, 0, 0]);
        assert_eq!(guest.bench.host.asked().last(), Some(&stored));
        guest.bench.check();
        guest
    };
    let guest = trapped(Guest::of(Bench::with(FakeHost::edu(), &[0])));
    assert_eq!((guest.mapped(), guest.bench.host.mappings()), (vec![], 0));
    let guest = trapped(Guest::new(FakeHost::edu().without_mappings()));
    assert_eq!(guest.mapped(), []);
    let guest = Guest::new(FakeHost::edu());
    guest.bench.windows.refuse_map(true);
    let guest = trapped(guest);
    assert_eq!(guest.mapped(), []);
    guest.bench.windows.refuse_map(false);
    guest.write_u16(4, 0);
    guest.write_u16(4, 2);
    assert_eq!(guest.mapped().len(), 1, "asked again with the next move");
    let small = FakeHost::edu().with_region(RegionIndex::Bar(0), 0x800, 0..0x800);
    let guest = Guest::new(small);
    guest.write_u16(4, 2);
    assert_eq!(guest.load(u64::from(guest.read(0x10))), 0xb0b0_b0b0);
    assert_eq!(guest.mapped(), []);
}

#[test]
fn a_rom_is_read_through_the_host() {
    let guest = Guest::new(FakeHost::e1000e());
    let rom = guest.read(0x30);
    assert!(rom.is_multiple_of(0x4_0000) && rom != 0, "{rom:#x}");
    let at = u64::from(rom);
    guest.write(0x30, rom | 1);
    assert_eq!(guest.load(at), !0, "memory decode is off");
    guest.write_u16(4, 2);
    assert_eq!(guest.load(at + 0x3_fffc), 0xaaaa_aaaa);
    guest.bench.host.asked();
    guest.save(at, 0);
    assert_eq!(guest.bench.host.asked(), [], "read-only");
    guest.write(0x30, rom);
    assert_eq!(guest.load(at), !0);
    guest.write(0x30, !0);
    assert_eq!(guest.read(0x30), 0xfffc_0001);
    guest.bench.check();
}

#[test]
fn the_pin_is_connected_while_the_function_is_on() {
    let guest = Guest::new(FakeHost::edu());
    assert!(!guest.bench.intx.is_connected(), "the function is off");
    guest.write_u16(4, 2);
    guest.bench.check();
    assert_eq!(guest.bench.host.enabled(), Some((IrqKind::Intx, vec![0])));
    // Forbidding it is the host's business, and costs no set-up.
    guest.bench.host.asked();
    guest.write_u16(4, 0x402);
    guest.bench.check();
    assert!(guest.bench.intx.is_connected());
    let forwarded = Asked::Wrote(RegionIndex::Config, 4, vec![2, 4]);
    assert_eq!(guest.bench.host.asked(), [forwarded]);
    guest.write_u16(4, 0);
    guest.bench.check();
    assert!(!guest.bench.intx.is_connected());
    guest.write_u16(4, 6);
    guest.bench.check();
    assert!(guest.bench.intx.is_connected());
    // MSI takes its place, in order.
    guest.bench.host.asked();
    guest.write(0x44, 0xfee0_1000);
    guest.write_u16(0x4c, 0x31);
    guest.write_u16(0x42, 1);
    guest.bench.check();
    assert_eq!(
        guest.bench.host.asked(),
        [
            Asked::Disabled(IrqKind::Intx),
            Asked::Irqs(IrqKind::Msi, 0, vec![true]),
        ]
    );
    assert_eq!(guest.bench.vectors.get(0), Some(MESSAGE));
    guest.bench.host.raise(0);
    assert_eq!(guest.bench.vectors.taken(0), 1);
    guest.bench.host.raise(0);
    guest.write_u16(0x42, 0);
    assert_eq!(guest.bench.vectors.taken(0), 0, "it belongs to nobody");
    guest.bench.check();
    assert!(guest.bench.intx.is_connected());
}

#[test]
fn several_vectors_of_msi_are_masked_by_their_routes() {
    let host = FakeHost::edu()
        .with_config(0x42, &0x018au16.to_le_bytes())
        .with_irq(IrqKind::Msi, 32, false)
        .unguarded();
    let guest = Guest::new(host);
    guest.write(0x44, 0xfee0_1000);
    guest.write_u16(0x4c, 0x30);
    guest.write(0x50, 0b10);
    guest.write_u16(0x42, 0x31);
    guest.bench.check();
    assert_eq!(guest.bench.vectors.routed(), [0, 2, 3, 4, 5, 6, 7]);
    guest.bench.host.asked();
    guest.bench.host.raise(1);
    assert_eq!(guest.read(0x54), 0b10, "pending");
    guest.write(0x50, 0);
    assert_eq!(guest.read(0x54), 0, "delivered");
    assert_eq!(guest.bench.vectors.get(1), Some(MESSAGE));
    assert_eq!(guest.bench.host.asked(), [], "no mask costs a call");
    // Another number of vectors is another set in the host.
    guest.write_u16(0x42, 0x11);
    guest.bench.check();
    assert_eq!(guest.bench.vectors.routed(), [0, 1]);
}

#[test]
fn vectors_that_can_be_added_are_enabled_with_their_first_route() {
    let guest = Guest::new(FakeHost::nvme());
    guest.write_u16(4, 6);
    let table = HIGH + 0x2000;
    guest.bench.host.asked();
    guest.write_u16(0x42, 0xc000);
    let set = |start, given| Asked::Irqs(IrqKind::Msix, start, vec![given]);
    assert_eq!(
        guest.bench.host.asked(),
        [Asked::Disabled(IrqKind::Intx), set(0, false)]
    );
    guest.unmask(table, 2, 0x31);
    assert_eq!(guest.bench.host.asked(), [], "the function is masked");
    guest.write_u16(0x42, 0x8000);
    assert_eq!(guest.bench.host.asked(), [set(2, true)]);
    guest.bench.check();
    guest.unmask(table, 0, 0x30);
    assert_eq!(guest.bench.host.asked(), [set(0, true)]);
    guest.save(table + 12, 1);
    guest.bench.host.raise(0);
    assert_eq!(guest.load(HIGH + 0x3000), 1, "pending");
    guest.save(table + 12, 0);
    assert_eq!(guest.load(HIGH + 0x3000), 0);
    assert_eq!(guest.bench.host.asked(), [], "no mask costs a call");
    guest.bench.check();
    guest.write_u16(0x42, 0);
    guest.bench.check();
    assert_eq!(guest.bench.host.asked()[0], Asked::Disabled(IrqKind::Msix));
    // Enabled again, they have to be started again.
    guest.write_u16(0x42, 0x8000);
    guest.bench.check();
    assert_eq!(
        guest.bench.host.enabled(),
        Some((IrqKind::Msix, vec![0, 2]))
    );
}

#[test]
fn vectors_that_can_not_be_added_are_enabled_at_once() {
    let guest = Guest::new(FakeHost::e1000e());
    guest.write_u16(0xa2, 0x8000);
    guest.bench.check();
    let all = Some((IrqKind::Msix, vec![0, 1, 2, 3, 4]));
    assert_eq!(guest.bench.host.enabled(), all);
    // MSI beside it changes nothing, and takes over when it is alone.
    guest.write_u16(0xd2, 1);
    assert_eq!(guest.bench.host.enabled(), all);
    guest.write_u16(0xa2, 0);
    guest.bench.check();
    assert_eq!(guest.bench.host.enabled(), Some((IrqKind::Msi, vec![0])));
}

#[test]
fn a_host_that_refuses_interrupts_is_asked_again_later() {
    let guest = Guest::new(FakeHost::nvme());
    guest.write_u16(4, 6);
    guest.bench.host.refuse_irqs(true);
    guest.write_u16(0x42, 0x8000);
    assert_eq!(guest.bench.host.enabled(), None);
    assert!(!guest.bench.intx.is_connected());
    guest.bench.host.asked();
    guest.write_u16(0x50, 1);
    let asked = guest.bench.host.asked();
    assert_eq!(asked.len(), 1, "only the store: {asked:?}");
    guest.write_u16(0x42, 0);
    assert_eq!(guest.bench.host.enabled(), None);
    assert!(
        !guest.bench.intx.is_connected(),
        "the pin was refused as well"
    );
    guest.bench.host.refuse_irqs(false);
    guest.write_u16(0x42, 0x8000);
    guest.bench.check();
}

#[test]
fn a_reset_by_the_guest_leaves_it_as_after_power_on() {
    for (host, register, bit) in [
        (FakeHost::nvme(), 0x88, 0x8000),
        (FakeHost::nvme(), 0x89, 0x80),
    ] {
        let guest = Guest::new(host);
        guest.write_u16(4, 6);
        guest.write_u16(0x42, 0x8000);
        guest.unmask(HIGH + 0x2000, 1, 0x31);
        guest.bench.host.asked();
        guest.write_u16(register, bit);
        assert_eq!(
            guest.bench.host.asked(),
            [
                Asked::Disabled(IrqKind::Msix),
                Asked::Reset,
                Asked::Wrote(RegionIndex::Config, 4, vec![0, 0]),
            ]
        );
        assert_eq!(guest.read_u16(4), 0);
        assert_eq!((guest.read(0x10), guest.read(0x14)), (0xc & 0x4, 0));
        assert_eq!(guest.read_u16(0x42), 0x40);
        assert_eq!(guest.mapped(), []);
        assert_eq!(guest.load(HIGH), !0);
        guest.bench.check();
        // The driver puts back what it has saved.
        guest.write(0x14, 64);
        guest.write_u16(4, 6);
        assert_eq!(guest.load(HIGH + 0x201c), 1, "masked again");
        guest.bench.check();
    }
}

#[test]
fn advanced_features_reset_as_well_and_only_if_the_host_can() {
    let advanced = |host: FakeHost| {
        host.with_config(0x40, &[0x13, 0, 6, 3])
            .with_irq(IrqKind::Msi, 0, false)
            .unguarded()
    };
    let guest = Guest::new(advanced(FakeHost::edu()));
    assert_eq!(guest.bench.capabilities(), [(0x13, 0x40)]);
    assert_eq!(guest.read(0x40), 0x0306_0013);
    guest.store(0x44, &[1]);
    assert_eq!(guest.bench.host.asked()[0], Asked::Reset);
    let guest = Guest::new(advanced(FakeHost::edu()).without_reset());
    assert_eq!(guest.bench.capabilities(), []);
    assert_eq!(guest.read_u16(6) & 0x10, 0, "there is no list");
    let guest = Guest::new(FakeHost::nvme().without_reset());
    assert_eq!(guest.read(0x84) & 1 << 28, 0);
    guest.write_u16(0x88, 0x8000);
    assert_eq!(guest.bench.host.violations(), [""; 0]);
}

#[test]
fn registers_of_no_capability_are_the_host_s() {
    let guest = Guest::new(FakeHost::edu());
    assert_eq!(guest.read(0x80), 0xd3d2_d1d0);
    guest.write(0x80, 5);
    assert_eq!(guest.bench.host.config_u16(0x80), 5);
    assert_eq!(guest.read(0x100), 0);
    // A capability that is left out takes what follows it along.
    let host = FakeHost::edu().with_config(0x40, &[0x0d, 0, 0xee, 0xee]);
    let guest = Guest::new(host);
    assert_eq!(
        (guest.read(0x34), guest.read(0x40), guest.read(0x80)),
        (0, 0, 0)
    );
}

#[test]
fn a_device_that_is_gone_reads_all_ones() {
    for (host, bar) in [(FakeHost::nvme(), HIGH), (FakeHost::e1000e(), LOW)] {
        let guest = Guest::new(host);
        guest.write_u16(4, 6);
        guest.write(0x30, guest.read(0x30) | 1);
        guest.bench.host.vanish();
        for register in (0..0x1000).step_by(4) {
            assert_eq!(guest.read(register), !0);
            guest.write(register, 0);
        }
        for offset in (0..0x10_0000).step_by(0x404) {
            assert_eq!(guest.load(bar + offset), !0);
            guest.save(bar + offset, 0);
        }
        guest.bench.function.stop().unwrap();
        guest.bench.check_stopped();
    }
}

#[test]
fn a_stop_undoes_everything_and_can_be_repeated() {
    for (host, enable) in [
        (FakeHost::nvme(), (0x42, 0x8000)),
        (FakeHost::edu(), (0x42, 1)),
        (FakeHost::edu(), (0x50, 0)),
    ] {
        let guest = Guest::new(host);
        guest.write_u16(4, 6);
        guest.write_u16(enable.0, enable.1);
        guest.unmask(HIGH + 0x2000, 1, 0x31);
        guest.bench.check();
        guest.bench.function.stop().unwrap();
        guest.bench.check_stopped();
        assert_eq!(guest.bench.host.enabled(), None);
        assert_eq!(guest.bench.host.config_u16(4), 0);
        guest.bench.host.asked();
        guest.write_u16(4, 6);
        guest.write_u16(enable.0, enable.1);
        guest.unmask(HIGH + 0x2000, 1, 0x31);
        guest.bench.function.stop().unwrap();
        drop(guest.segment.remove(SLOT));
        assert_eq!(guest.bench.host.asked(), []);
        guest.bench.check_stopped();
        let host = Arc::clone(&guest.bench.host);
        drop(guest);
        assert_eq!(Arc::strong_count(&host), 1, "one holder is left");
    }
}

#[test]
fn a_window_that_does_not_go_is_kept_and_can_be_asked_for_again() {
    let guest = Guest::new(FakeHost::edu());
    guest.write_u16(4, 2);
    guest.bench.windows.refuse_unmap(true);
    guest.write_u16(4, 0);
    assert_eq!(guest.bench.host.config_u16(4), 2, "decode has to stay on");
    let error = guest.bench.function.stop().unwrap_err();
    assert_eq!(error.windows, 1);
    assert!(error.to_string().contains("fake"), "{error}");
    assert_eq!(guest.bench.host.mappings(), 1);
    guest.bench.windows.refuse_unmap(false);
    guest.bench.function.stop().unwrap();
    assert_eq!(guest.bench.host.config_u16(4), 0);
    guest.bench.check_stopped();
    // Nobody asks again: the mapping outlives the function.
    let guest = Guest::new(FakeHost::edu());
    guest.write_u16(4, 2);
    guest.bench.windows.refuse_unmap(true);
    let host = Arc::clone(&guest.bench.host);
    drop(guest);
    assert_eq!(host.mappings(), 1);
}

fn new(host: FakeHost, vectors: u16) -> Result<VfioPci, NewError> {
    VfioPci::new(Parts {
        id: "fake".to_owned(),
        host: Arc::new(host),
        vectors: Arc::new(FakeVectors::new(vectors)),
        intx: None,
        windows: Arc::<FakeWindows>::default(),
        exclude_mmap_bars: Vec::new(),
    })
}

#[test]
fn functions_that_can_not_be_shown_are_refused() {
    let refused = |host: FakeHost| new(host, 65).unwrap_err();
    let error = refused(FakeHost::nvme().with_config(0, &[0xff; 4]));
    assert!(matches!(error, NewError::Absent), "{error}");
    let error = refused(FakeHost::nvme().with_config(0x0e, &[0x81]));
    assert!(
        matches!(error, NewError::Bridge { header_type: 1 }),
        "{error}"
    );
    let error = refused(FakeHost::nvme().with_region(RegionIndex::Bar(0), 0x3000, 0..0));
    assert!(matches!(error, NewError::Bar(_)), "{error}");
    let error = refused(FakeHost::nvme().with_region(RegionIndex::Bar(0), 0x2000, 0..0));
    assert!(
        matches!(
            error,
            NewError::MsixOutside {
                bar: 0,
                end: 0x2410,
                size: 0x2000
            }
        ),
        "{error}"
    );
    let error = refused(FakeHost::nvme().with_config(0x48, &[0x08, 0x20]));
    assert!(matches!(error, NewError::Msix(_)), "{error}");
    let error = refused(FakeHost::nvme().with_region(RegionIndex::Config, 64, 0..0));
    assert!(matches!(error, NewError::Config(_)), "{error}");
    let gone = FakeHost::nvme();
    gone.vanish();
    assert!(matches!(refused(gone), NewError::Config(_)));
    let error = new(FakeHost::nvme(), 64).unwrap_err();
    assert!(matches!(error, NewError::Vectors { needed: 65 }), "{error}");
    let needed =
        [FakeHost::nvme(), FakeHost::e1000e(), FakeHost::edu()].map(|h| vectors_needed(&h));
    assert_eq!(needed, [65, 5, 1]);
    let none = FakeHost::edu().with_irq(IrqKind::Msi, 0, false);
    assert_eq!(vectors_needed(&none), 1);
}

#[test]
fn there_is_a_pin_only_where_both_sides_have_one() {
    let function = new(FakeHost::edu(), 1).unwrap();
    let mut pin = [0xff];
    function.config_read(0x3d, &mut pin);
    assert_eq!(pin, [0]);
    let guest = Guest::new(FakeHost::edu().with_irq(IrqKind::Intx, 0, false));
    assert_eq!(guest.read_u16(0x3c) >> 8, 0);
    guest.write_u16(4, 2);
    guest.bench.check();
    assert!(!Arc::<FakeIntx>::default().is_connected());
    assert_eq!(guest.bench.host.irq(IrqKind::Intx).count, 0);
}

fn host(which: u8) -> FakeHost {
    match which % 3 {
        0 => FakeHost::nvme(),
        1 => FakeHost::e1000e(),
        _ => FakeHost::edu(),
    }
}

/// Half of the stores where something is.
fn store() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let interesting = prop::sample::select(vec![
        0x04, 0x06, 0x10, 0x14, 0x1c, 0x30, 0x40, 0x42, 0x44, 0x4c, 0x60, 0x64, 0x80, 0x88, 0x89,
        0xa0, 0xa2, 0xa8, 0xcc, 0xd0, 0xd2, 0xd4, 0xe8, 0x100, 0x140, 0x304,
    ]);
    let register = prop_oneof![3 => interesting, 1 => 0u16..0x1000];
    (register, prop::collection::vec(any::<u8>(), 1..9))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Every state is what the registers say, and the fake host counts what it should never see.
    #[test]
    fn a_hostile_guest_gets_what_the_registers_say(
        which in any::<u8>(),
        stores in prop::collection::vec(store(), 0..60),
    ) {
        let guest = Guest::new(host(which));
        for (register, data) in stores {
            guest.store(register, &data);
            guest.bench.check();
        }
        guest.bench.function.stop().unwrap();
        guest.bench.check_stopped();
        prop_assert_eq!(guest.bench.host.enabled(), None);
        prop_assert_eq!(guest.bench.host.violations(), [""; 0]);
    }

    /// A device that says anything at all in its capabilities.
    #[test]
    fn a_hostile_device_is_refused_or_shown(
        capabilities in prop::collection::vec(any::<u8>(), 0xc0),
        extended in prop::collection::vec(any::<u8>(), 0x80),
        stores in prop::collection::vec(store(), 0..20),
    ) {
        let host = FakeHost::nvme()
            .with_config(0x40, &capabilities)
            .with_config(0x100, &extended)
            .unguarded();
        if let Ok(function) = new(host, 65) {
            for (register, data) in stores {
                let data = &data[..data.len().min(4)];
                if usize::from(register) + data.len() <= 4096 {
                    function.config_write(register, data);
                    let mut read = [0; 4];
                    function.config_read(register & !3, &mut read);
                }
            }
            function.stop().unwrap();
        }
    }
}
