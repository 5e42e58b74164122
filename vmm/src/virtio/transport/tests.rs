//! The transport as a driver sees it: registers in a BAR, without a guest.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddress;

use super::*;
use crate::memory::snapshot::Snapshot;
use crate::pci::MsiMessage;
use crate::virtio::device::{ActivateError, Activation, Kind};
use crate::virtio::queue::Queue;
use crate::virtio::worker::Worker;

const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_VECTOR: u64 = 0x1a;
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Routes {
    signalled: Mutex<Vec<u16>>,
    set: Mutex<Vec<(u16, Option<MsiMessage>)>>,
}

impl MsiRoutes for Routes {
    fn set(&self, vector: u16, message: Option<MsiMessage>) {
        self.set.lock().unwrap().push((vector, message));
    }
    fn signal(&self, vector: u16) {
        self.signalled.lock().unwrap().push(vector);
    }
    fn is_pending(&self, _vector: u16) -> bool {
        false
    }
}

#[derive(Default)]
struct Bells(Mutex<Vec<u64>>);

impl Doorbells for Bells {
    fn connect(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().push(address);
        Ok(())
    }
    fn disconnect(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.0.lock().unwrap().retain(|at| *at != address);
        Ok(())
    }
}

/// Two queues. Its worker tells of each doorbell, and does not leave before it is let go.
struct Probe {
    rung: Mutex<Sender<u16>>,
    leave: Arc<AtomicBool>,
    activations: AtomicUsize,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
}

struct ProbeWorker {
    queues: Vec<Queue>,
    rung: Sender<u16>,
    leave: Arc<AtomicBool>,
}

impl Device for Probe {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }
    fn features(&self) -> u64 {
        1
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 64]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        super::super::device::read_space(b"hello", offset, data);
    }
    fn config_write(&self, offset: u64, data: &[u8]) {
        self.written.lock().unwrap().push((offset, data.to_vec()));
    }
    fn activate(&self, activation: Activation) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        self.activations.fetch_add(1, Ordering::SeqCst);
        let queues: Vec<Queue> = activation.queues.into_iter().flatten().collect();
        if queues.is_empty() {
            return Err(ActivateError::MissingQueue { index: 0 });
        }
        Ok(vec![Box::new(ProbeWorker {
            queues,
            rung: self.rung.lock().unwrap().clone(),
            leave: Arc::clone(&self.leave),
        })])
    }
}

impl MutEventSubscriber for ProbeWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for queue in &self.queues {
            let data = u32::from(queue.index());
            ops.add(Events::with_data_raw(queue.kick_fd(), data, EventSet::IN))
                .unwrap();
        }
    }
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let index = events.data() as usize;
        self.queues[index].acknowledge_kick();
        self.rung.send(u16::try_from(index).unwrap()).unwrap();
    }
}

impl Worker for ProbeWorker {
    fn name(&self) -> String {
        "_probe".to_owned()
    }
    fn drain(&mut self) {
        while !self.leave.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }
}

struct Bench {
    pci: VirtioPci,
    device: Arc<Probe>,
    routes: Arc<Routes>,
    bells: Arc<Bells>,
    rung: Receiver<u16>,
}

impl Bench {
    fn new() -> Self {
        let (sender, rung) = channel();
        let device = Arc::new(Probe {
            rung: Mutex::new(sender),
            leave: Arc::new(AtomicBool::new(true)),
            activations: AtomicUsize::new(0),
            written: Mutex::default(),
        });
        let (routes, bells) = (Arc::new(Routes::default()), Arc::new(Bells::default()));
        let memory = Snapshot::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let pci = VirtioPci::new(Parts {
            id: "probe0".to_owned(),
            device: Arc::clone(&device) as Arc<_>,
            routes: Arc::clone(&routes) as Arc<_>,
            doorbells: Arc::clone(&bells) as Arc<_>,
            memory: GuestView::new(memory),
        })
        .unwrap();
        Self {
            pci,
            device,
            routes,
            bells,
            rung,
        }
    }

    fn status(&self) -> u8 {
        let mut data = [0];
        self.pci.bar_read(BAR, STATUS, &mut data);
        data[0]
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.pci.bar_write(BAR, offset, data);
    }

    /// All a driver does up to `DRIVER_OK`, with both queues' rings at `rings`.
    fn drive(&self, rings: u64) {
        self.write(STATUS, &[1]);
        self.write(STATUS, &[3]);
        self.write(0x08, &1u32.to_le_bytes());
        self.write(0x0c, &1u32.to_le_bytes());
        self.write(STATUS, &[11]);
        assert_eq!(self.status(), 11, "the features are taken");
        for queue in 0u16..2 {
            self.write(QUEUE_SELECT, &queue.to_le_bytes());
            self.write(QUEUE_VECTOR, &(queue + 1).to_le_bytes());
            for (register, offset) in [(0u64, 0u64), (8, 0x800), (16, 0x900)] {
                let at = rings + u64::from(queue) * 0x1000 + offset;
                self.write(QUEUE_DESC + register, &at.to_le_bytes());
            }
            self.write(QUEUE_ENABLE, &1u16.to_le_bytes());
        }
        self.write(STATUS, &[15]);
    }

    fn wait_status(&self, wanted: u8) {
        let end = Instant::now() + DEADLINE;
        while self.status() != wanted {
            assert!(Instant::now() < end, "status stays {}", self.status());
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_driver_gets_its_doorbells_heard_and_its_reset_answered() {
    let bench = Bench::new();
    bench.drive(0x1_0000);
    assert_eq!(bench.status(), 15);
    // A doorbell that came as an exit.
    bench.write(NOTIFY + 4, &1u16.to_le_bytes());
    assert_eq!(bench.rung.recv_timeout(DEADLINE).unwrap(), 1);
    bench.write(STATUS, &[0]);
    bench.wait_status(0);
    bench.drive(0x2_0000);
    assert_eq!(bench.device.activations.load(Ordering::SeqCst), 2);
}

#[test]
fn a_reset_reads_zero_only_when_the_workers_are_gone() {
    let bench = Bench::new();
    bench.device.leave.store(false, Ordering::SeqCst);
    bench.drive(0x1_0000);
    bench.write(STATUS, &[0]);
    for _ in 0..100 {
        assert_ne!(bench.status(), 0, "a worker may still touch guest memory");
    }
    // What the driver writes meanwhile is not taken.
    bench.write(STATUS, &[1]);
    bench.device.leave.store(true, Ordering::SeqCst);
    bench.wait_status(0);
}

#[test]
fn rings_outside_memory_are_the_drivers_problem() {
    let bench = Bench::new();
    bench.write(0x10, &0u16.to_le_bytes());
    bench.drive(0x4000_0000);
    assert_eq!(bench.status() & 0x40, 0x40, "DEVICE_NEEDS_RESET");
    assert_eq!(bench.device.activations.load(Ordering::SeqCst), 0);
    assert_eq!(
        *bench.routes.signalled.lock().unwrap(),
        [0],
        "and it is told"
    );
    bench.write(STATUS, &[0]);
    bench.wait_status(0);
    bench.drive(0x1_0000);
    assert_eq!(bench.status(), 15);
}

#[test]
fn doorbells_follow_the_bar() {
    let bench = Bench::new();
    let change = |old, new| BarChange {
        bar: BAR,
        size: 0x8000,
        old,
        new,
    };
    bench.pci.bar_moved(change(None, Some(0x1_0000_0000)));
    let at = |base: u64| vec![base + NOTIFY, base + NOTIFY + 4];
    assert_eq!(*bench.bells.0.lock().unwrap(), at(0x1_0000_0000));
    bench
        .pci
        .bar_moved(change(Some(0x1_0000_0000), Some(0x2_0000_0000)));
    assert_eq!(*bench.bells.0.lock().unwrap(), at(0x2_0000_0000));
    bench.pci.bar_moved(change(Some(0x2_0000_0000), None));
    assert!(bench.bells.0.lock().unwrap().is_empty());
}

#[test]
fn configuration_space_alone_reaches_the_device() {
    let bench = Bench::new();
    let mut at = [0];
    bench.pci.config_read(0x34, &mut at);
    let mut found = std::collections::BTreeMap::new();
    while at[0] != 0 {
        let register = u16::from(at[0]);
        let mut head = [0; 4];
        bench.pci.config_read(register, &mut head);
        if head[0] == 0x09 {
            found.insert(head[3], register);
        }
        at = [head[1]];
    }
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    // Through the window: 4 bytes of the device's own configuration.
    let window = found[&5];
    let offset = u32::try_from(DEVICE).unwrap();
    bench.pci.config_write(window + 4, &[0]);
    bench.pci.config_write(window + 8, &offset.to_le_bytes());
    bench.pci.config_write(window + 12, &4u32.to_le_bytes());
    let mut data = [0; 4];
    bench.pci.config_read(window + 16, &mut data);
    assert_eq!(&data, b"hell");
    bench.pci.config_write(window + 16, b"HELL");
    assert_eq!(
        *bench.device.written.lock().unwrap(),
        [(0, b"HELL".to_vec())]
    );
    // An access of another width is none.
    let mut data = [0; 2];
    bench.pci.config_read(window + 16, &mut data);
    assert_eq!(data, [0; 2]);
}

#[test]
fn a_pause_holds_the_workers() {
    let bench = Bench::new();
    bench.drive(0x1_0000);
    bench.pci.pause();
    assert!(bench.pci.wait_paused(Instant::now() + DEADLINE));
    bench.write(NOTIFY, &0u16.to_le_bytes());
    assert!(bench.rung.recv_timeout(Duration::from_millis(50)).is_err());
    bench.pci.resume();
    assert_eq!(bench.rung.recv_timeout(DEADLINE).unwrap(), 0);
}
