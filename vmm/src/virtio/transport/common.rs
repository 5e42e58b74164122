//! The common configuration structure (virtio 1.2, 4.1.4.3): registers in, what to do out. Pure.
//!
//! ```text
//!              status bits, set one after the other by the driver
//!   0 ──▶ ACKNOWLEDGE ──▶ DRIVER ──▶ FEATURES_OK ──▶ DRIVER_OK: Activate
//!   ▲                                    │ not offered: the bit does not stick
//!   └────────── 0 written: Reset ◀───────┴──────────────────┘
//! ```
//! Registers of queues can be written until `DRIVER_OK` only; what a driver writes afterwards is ignored until it resets.

/// No vector: the source raises no interrupt.
pub(super) const NO_VECTOR: u16 = 0xffff;
/// Length of the structure.
pub(super) const LENGTH: u64 = 64;

/// Device status bits (2.1).
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;

/// One queue as the driver set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

/// What a write asks of the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    None,
    /// The driver is ready.
    Activate,
    /// The driver wants the device as it was in the beginning.
    Reset,
}

/// The registers.
#[derive(Debug)]
pub(super) struct CommonRegisters {
    offered: u64,
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    accepted: u64,
    status: u8,
    pub(super) generation: u8,
    pub(super) config_vector: u16,
    queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
}

/// Registers by offset and length.
mod at {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
}

impl CommonRegisters {
    /// After power-on: `offered` feature bits, queues of these largest sizes, so many MSI-X vectors.
    pub(super) fn new(offered: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered,
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            accepted: 0,
            status: 0,
            generation: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .map(|size| QueueRegisters::new(*size))
                .collect(),
        }
    }

    /// As after power-on, but for the generation, which only counts.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self {
            generation: self.generation,
            ..Self::new(self.offered, &sizes, self.vectors)
        };
    }

    /// Feature bits both sides took.
    pub(super) fn features(&self) -> u64 {
        self.accepted & self.offered
    }

    #[cfg(test)]
    fn status(&self) -> u8 {
        self.status
    }

    /// The device can't go on.
    pub(super) fn set_needs_reset(&mut self) {
        self.status |= NEEDS_RESET;
    }

    fn live(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// Reads any 1, 2, 4 or 8 bytes. A register that is wider than the access is read in parts.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data.iter_mut()) {
            *byte = self.byte(at);
        }
    }

    fn byte(&self, at: u64) -> u8 {
        let part = |start: u64, value: u64| {
            let shift = (at - start) * 8;
            (value >> shift).to_le_bytes()[0]
        };
        let queue = self.queues.get(usize::from(self.queue_select));
        let of_queue = |f: fn(&QueueRegisters) -> u64| queue.map_or(0, f);
        match at {
            0x00..0x04 => part(at::DEVICE_FEATURE_SELECT, self.device_feature_select.into()),
            0x04..0x08 => part(
                at::DEVICE_FEATURE,
                word(self.offered, self.device_feature_select).into(),
            ),
            0x08..0x0c => part(at::DRIVER_FEATURE_SELECT, self.driver_feature_select.into()),
            0x0c..0x10 => part(
                at::DRIVER_FEATURE,
                word(self.accepted, self.driver_feature_select).into(),
            ),
            0x10..0x12 => part(at::CONFIG_VECTOR, self.config_vector.into()),
            0x12..0x14 => part(at::NUM_QUEUES, self.queues.len() as u64),
            at::STATUS => self.status,
            at::GENERATION => self.generation,
            0x16..0x18 => part(at::QUEUE_SELECT, self.queue_select.into()),
            0x18..0x1a => part(at::QUEUE_SIZE, of_queue(|q| q.size.into())),
            0x1a..0x1c => part(
                at::QUEUE_VECTOR,
                queue.map_or(NO_VECTOR, |q| q.vector).into(),
            ),
            0x1c..0x1e => part(at::QUEUE_ENABLE, of_queue(|q| q.enabled.into())),
            // A queue's doorbell is at its index times the multiplier.
            0x1e..0x20 => part(
                at::QUEUE_NOTIFY_OFF,
                if queue.is_some() {
                    self.queue_select.into()
                } else {
                    0
                },
            ),
            0x20..0x28 => part(at::QUEUE_DESC, of_queue(|q| q.descriptors)),
            0x28..0x30 => part(at::QUEUE_DRIVER, of_queue(|q| q.available)),
            0x30..0x38 => part(at::QUEUE_DEVICE, of_queue(|q| q.used)),
            // queue_notify_data and queue_reset: not offered.
            _ => 0,
        }
    }

    /// Takes a write. Registers are written whole, the 64-bit ones also by halves, as the specification has it; any
    /// other access changes nothing.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else {
            return Action::None;
        };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let [low, high] =
            [value, value >> 32].map(|v| u32::try_from(v & 0xffff_ffff).expect("32 bits"));
        let half = u16::try_from(value & 0xffff).expect("16 bits");
        match (offset, data.len()) {
            (at::STATUS, 1) => return self.write_status(bytes[0]),
            (at::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = low,
            (at::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = low,
            (at::DRIVER_FEATURE, 4) => self.accept(low),
            (at::CONFIG_VECTOR, 2) => self.config_vector = self.vector(half),
            (at::QUEUE_SELECT, 2) => self.queue_select = half,
            (at::QUEUE_VECTOR, 2) => {
                // Not behind the rule for the others: harmless while live, and drivers do it.
                let vector = self.vector(half);
                if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
                    queue.vector = vector;
                }
            }
            (at::QUEUE_SIZE, 2) => self.change_queue(|queue| {
                // A size that is none leaves the register as it is, and the driver sees that.
                if half.is_power_of_two() && half <= queue.max_size {
                    queue.size = half;
                }
            }),
            (at::QUEUE_ENABLE, 2) => self.change_queue(|queue| queue.enabled |= half == 1),
            (at::QUEUE_DESC..0x38, 4 | 8) => {
                let (register, upper) = (offset & !7, offset & 4 != 0);
                self.change_queue(|queue| {
                    let address = match register {
                        at::QUEUE_DESC => &mut queue.descriptors,
                        at::QUEUE_DRIVER => &mut queue.available,
                        _ => &mut queue.used,
                    };
                    let (old_low, old_high) = (*address & 0xffff_ffff, *address >> 32);
                    *address = match (upper, data.len()) {
                        (false, 8) => u64::from(low) | u64::from(high) << 32,
                        (false, _) => u64::from(low) | old_high << 32,
                        (true, _) => old_low | u64::from(low) << 32,
                    };
                });
            }
            _ => {}
        }
        Action::None
    }

    fn vector(&self, asked: u16) -> u16 {
        if asked < self.vectors {
            asked
        } else {
            NO_VECTOR
        }
    }

    fn accept(&mut self, half: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let half = u64::from(half);
        match self.driver_feature_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | half,
            1 => self.accepted = self.accepted & 0xffff_ffff | half << 32,
            _ => {}
        }
    }

    fn change_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        if self.live() {
            return;
        }
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && !queue.enabled
        {
            change(queue);
        }
    }

    fn write_status(&mut self, new: u8) -> Action {
        if new == 0 {
            return Action::Reset;
        }
        let was_live = self.live();
        // The driver sets bits and never takes one back but by a reset; NEEDS_RESET is the device's own.
        let mut set = self.status | (new & !NEEDS_RESET);
        let features_asked = set & FEATURES_OK != 0 && self.status & FEATURES_OK == 0;
        if features_asked && !self.acceptable() {
            set &= !FEATURES_OK;
        }
        // DRIVER_OK means nothing before the features are agreed on.
        if set & FEATURES_OK == 0 {
            set &= !DRIVER_OK;
        }
        self.status = set;
        if self.live() && !was_live && set & FAILED == 0 {
            Action::Activate
        } else {
            Action::None
        }
    }

    /// Only what was offered, and a driver of virtio 1.
    fn acceptable(&self) -> bool {
        let version_1 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
        self.accepted & !self.offered == 0 && self.accepted & version_1 != 0
    }
}

/// The half of a feature word that is selected; 0 past its end.
fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => u32::try_from(features & 0xffff_ffff).expect("32 bits"),
        1 => u32::try_from(features >> 32).expect("32 bits"),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VERSION_1: u64 = 1 << 32;

    fn registers() -> CommonRegisters {
        CommonRegisters::new(VERSION_1 | 0b11, &[256, 64], 3)
    }

    fn accept(r: &mut CommonRegisters, features: u64) -> bool {
        r.write(at::STATUS, &[1]);
        r.write(at::STATUS, &[3]);
        for (select, half) in [(0u32, features & 0xffff_ffff), (1, features >> 32)] {
            r.write(at::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            r.write(at::DRIVER_FEATURE, &half.to_le_bytes()[..4]);
        }
        r.write(at::STATUS, &[3 | FEATURES_OK]);
        r.status() & FEATURES_OK != 0
    }

    fn read<const N: usize>(r: &CommonRegisters, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        r.read(offset, &mut data);
        data
    }

    #[test]
    fn a_driver_of_virtio_1_gets_through() {
        let mut r = registers();
        assert!(accept(&mut r, VERSION_1 | 1));
        r.write(at::QUEUE_SELECT, &1u16.to_le_bytes());
        r.write(at::QUEUE_SIZE, &32u16.to_le_bytes());
        r.write(at::QUEUE_DESC, &0x1_2345_6000u64.to_le_bytes());
        r.write(at::QUEUE_DRIVER, &0x7000u32.to_le_bytes());
        r.write(at::QUEUE_DRIVER + 4, &2u32.to_le_bytes());
        r.write(at::QUEUE_ENABLE, &1u16.to_le_bytes());
        assert_eq!(r.write(at::STATUS, &[7 | FEATURES_OK]), Action::Activate);
        assert_eq!(r.features(), VERSION_1 | 1);
        let queue = r.queues[1];
        assert_eq!(
            (queue.size, queue.descriptors, queue.available),
            (32, 0x1_2345_6000, 0x2_0000_7000)
        );
        // Once only.
        assert_eq!(r.write(at::STATUS, &[7 | FEATURES_OK]), Action::None);
        // Set in stone while live.
        r.write(at::QUEUE_DESC, &[0xff; 8]);
        r.write(at::QUEUE_SIZE, &2u16.to_le_bytes());
        assert_eq!(r.queues[1], queue);
        assert_eq!(r.write(at::STATUS, &[0]), Action::Reset);
        r.reset();
        assert_eq!(read(&r, at::STATUS), [0]);
        assert_eq!(r.queues[1].size, 64);
    }

    #[test]
    fn features_that_were_not_offered_are_not_taken() {
        assert!(!accept(&mut registers(), VERSION_1 | 0b100));
        // A legacy driver.
        assert!(!accept(&mut registers(), 1));
        let mut r = registers();
        accept(&mut r, 1);
        assert_eq!(r.write(at::STATUS, &[7 | FEATURES_OK]), Action::None);
        assert_eq!(r.status() & DRIVER_OK, 0);
    }

    #[test]
    fn sizes_and_vectors_out_of_range_do_not_stick() {
        let mut r = registers();
        for size in [0u16, 3, 512, 0xffff] {
            r.write(at::QUEUE_SIZE, &size.to_le_bytes());
            assert_eq!(r.queues[0].size, 256, "{size}");
        }
        r.write(at::QUEUE_VECTOR, &3u16.to_le_bytes());
        assert_eq!(read(&r, at::QUEUE_VECTOR), NO_VECTOR.to_le_bytes());
        r.write(at::QUEUE_VECTOR, &2u16.to_le_bytes());
        assert_eq!(read(&r, at::QUEUE_VECTOR), [2, 0]);
        // A queue that is not there.
        r.write(at::QUEUE_SELECT, &2u16.to_le_bytes());
        assert_eq!(read(&r, at::QUEUE_SIZE), [0, 0]);
        r.write(at::QUEUE_ENABLE, &1u16.to_le_bytes());
    }

    proptest! {
        /// Whatever is written, an activation has features and queues that were offered.
        #[test]
        fn whatever_the_driver_does(
            steps in prop::collection::vec((0u64..70, prop::collection::vec(any::<u8>(), 1..9)), 0..60)
        ) {
            let mut r = registers();
            for (offset, data) in steps {
                match r.write(offset, &data) {
                    Action::Reset => r.reset(),
                    Action::Activate => {
                        prop_assert_eq!(r.features() & !r.offered, 0);
                        prop_assert!(r.features() & VERSION_1 != 0);
                    }
                    Action::None => {}
                }
                for queue in &r.queues {
                    prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max_size);
                    prop_assert!(queue.vector == NO_VECTOR || queue.vector < 3);
                }
                let mut out = vec![0; data.len()];
                r.read(offset, &mut out);
            }
        }
    }
}
