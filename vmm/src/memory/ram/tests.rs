//! Who reaches a region, when, and who lets go first.

use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend};

use super::*;
use crate::memory::mapping::{HostMapping, Source};
use crate::memory::region::Mapping;

const SIZE: u64 = 0x1000;

fn region(gpa: u64) -> Region {
    let source = Source::Anonymous {
        huge_bytes: None,
        thp: false,
    };
    let mapping = Mapping::Host(HostMapping::new(source, SIZE, 4096).unwrap());
    Region::new("z0", Gpa(gpa), mapping)
        .map_err(|(_, e)| e)
        .unwrap()
}

/// What happened, in order: (consumer, attached?, address).
type Log = Arc<Mutex<Vec<(&'static str, bool, u64)>>>;

struct Fake {
    name: &'static str,
    log: Log,
    refuse_attach: bool,
    refuse_detach: Arc<Mutex<bool>>,
}

impl Consumer for Fake {
    fn name(&self) -> &'static str {
        self.name
    }
    fn rank(&self) -> Rank {
        match self.name {
            "slots" => Rank::Guest,
            "dma" => Rank::Dma,
            _ => Rank::Tables,
        }
    }
    fn attach(&mut self, region: &Region) -> Result<Lease, Reason> {
        if self.refuse_attach {
            return Err("no room".into());
        }
        self.log
            .lock()
            .unwrap()
            .push((self.name, true, region.gpa().0));
        Ok(Lease(Box::new(region.gpa().0)))
    }
    fn holding(&self, lease: &Lease) -> Option<Holder> {
        let gpa: u64 = *lease.0.downcast_ref()?;
        (self.name != "vhost").then_some(Holder::Kvm {
            slots: self.name.len(),
            bytes: gpa,
        })
    }
    fn renew(&mut self, _region: &Region, lease: Lease) -> Result<Lease, (Lease, Reason)> {
        if *self.refuse_detach.lock().unwrap() {
            return Err((lease, "busy".into()));
        }
        Ok(lease)
    }
    fn detach(&mut self, region: &Region, lease: Lease) -> Result<(), (Lease, Reason)> {
        if *self.refuse_detach.lock().unwrap() {
            return Err((lease, "busy".into()));
        }
        assert_eq!(
            lease.0.downcast_ref(),
            Some(&region.gpa().0),
            "somebody else's lease"
        );
        self.log
            .lock()
            .unwrap()
            .push((self.name, false, region.gpa().0));
        Ok(())
    }
}

struct Bench {
    ram: Ram,
    log: Log,
    /// By consumer.
    stuck: Vec<Arc<Mutex<bool>>>,
}

fn bench(names: &[&'static str], refusing: Option<&str>) -> Bench {
    let log = Log::default();
    let stuck: Vec<_> = names.iter().map(|_| Arc::new(Mutex::new(false))).collect();
    let consumers = names.iter().zip(&stuck).map(|(&name, refuse_detach)| {
        Box::new(Fake {
            name,
            log: Arc::clone(&log),
            refuse_attach: refusing == Some(name),
            refuse_detach: Arc::clone(refuse_detach),
        }) as Box<dyn Consumer>
    });
    Bench {
        ram: Ram::new(consumers.collect()),
        log,
        stuck,
    }
}

#[test]
fn consumers_come_in_order_and_go_in_reverse() {
    let mut b = bench(&["slots", "vhost", "dma"], None);
    b.ram.attach(region(0)).unwrap();
    let back = b.ram.detach(Gpa(0)).unwrap();
    assert_eq!(back.holders(), 1);
    let expected = [
        ("slots", true, 0),
        ("vhost", true, 0),
        ("dma", true, 0),
        ("dma", false, 0),
        ("vhost", false, 0),
        ("slots", false, 0),
    ];
    assert_eq!(*b.log.lock().unwrap(), expected);
}

#[test]
fn who_has_a_region_says_what_it_has_until_it_lets_go() {
    let mut b = bench(&["slots", "vhost", "dma"], None);
    b.ram.attach(region(SIZE)).unwrap();
    let has = |name: &str| Holder::Kvm {
        slots: name.len(),
        bytes: SIZE,
    };
    let holders = |ram: &Ram| ram.holders_of(Gpa(SIZE));
    assert_eq!(holders(&b.ram), [has("slots"), has("dma")]);
    assert_eq!(b.ram.holders_of(Gpa(0)), []);
    b.ram.cut_dma(Gpa(SIZE)).unwrap();
    assert_eq!(holders(&b.ram), [has("slots")]);
    b.ram.detach(Gpa(SIZE)).unwrap();
    assert_eq!(holders(&b.ram), []);
}

#[test]
fn who_does_not_follow_a_change_keeps_its_lease() {
    let mut b = bench(&["slots", "dma"], None);
    b.ram.attach(region(0)).unwrap();
    b.ram.renew(Gpa(0)).unwrap();
    let unknown = b.ram.renew(Gpa(SIZE)).unwrap_err();
    assert!(matches!(unknown, RenewError::Unknown { .. }));
    *b.stuck[0].lock().unwrap() = true;
    let refused = b.ram.renew(Gpa(0)).unwrap_err();
    assert!(refused.to_string().contains("slots"), "{refused}");
    *b.stuck[0].lock().unwrap() = false;
    b.log.lock().unwrap().clear();
    b.ram.detach(Gpa(0)).unwrap();
    let expected = [("dma", false, 0), ("slots", false, 0)];
    assert_eq!(*b.log.lock().unwrap(), expected, "both had leases");
}

#[test]
fn a_refusal_gives_the_region_back_and_leaves_nothing() {
    let mut b = bench(&["slots", "vhost", "dma"], Some("dma"));
    let failure = b.ram.attach(region(0)).unwrap_err();
    assert!(failure.region.is_some());
    assert!(matches!(
        failure.error,
        AttachError::Refused {
            consumer: "dma",
            ..
        }
    ));
    let log = b.log.lock().unwrap();
    assert_eq!(log[2..], [("vhost", false, 0), ("slots", false, 0)]);
    assert_eq!(b.ram.regions().count(), 0);
    assert_eq!(b.ram.view().memory().num_regions(), 0);
}

#[test]
fn what_is_not_let_go_is_stuck_visible_and_can_be_tried_again() {
    let mut b = bench(&["slots", "dma"], None);
    b.ram.attach(region(0)).unwrap();
    *b.stuck[0].lock().unwrap() = true;
    let error = b.ram.detach(Gpa(0)).unwrap_err();
    assert!(
        matches!(
            error,
            DetachError::Refused {
                consumer: "slots",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(b.ram.stuck().count(), 1);
    assert_eq!(
        b.ram.view().memory().num_regions(),
        0,
        "devices don't see it any more"
    );
    *b.stuck[0].lock().unwrap() = false;
    b.ram.detach(Gpa(0)).unwrap();
    // The DMA lease was given back once, not twice.
    let released = b
        .log
        .lock()
        .unwrap()
        .iter()
        .filter(|e| **e == ("dma", false, 0))
        .count();
    assert_eq!(released, 1);
}

#[test]
fn a_snapshot_in_use_keeps_the_region() {
    let mut b = bench(&["slots"], None);
    b.ram.attach(region(0)).unwrap();
    let held = b.ram.view().memory();
    assert!(matches!(
        b.ram.detach(Gpa(0)),
        Err(DetachError::Held { holders: 1, .. })
    ));
    held.write_obj(7u8, GuestAddress(0)).unwrap();
    drop(held);
    b.ram.detach(Gpa(0)).unwrap();
}

#[test]
fn overlapping_regions_are_refused() {
    let mut b = bench(&[], None);
    b.ram.attach(region(0x1000)).unwrap();
    let failure = b.ram.attach(region(0x1000)).unwrap_err();
    assert!(matches!(failure.error, AttachError::Overlap { .. }));
    b.ram.attach(region(0)).unwrap();
    b.ram.attach(region(0x2000)).unwrap();
    assert_eq!(b.ram.view().memory().num_regions(), 3);
}

fn fake(name: &'static str, b: &Bench, refuse_attach: bool, stuck: &Arc<Mutex<bool>>) -> Fake {
    Fake {
        name,
        log: Arc::clone(&b.log),
        refuse_attach,
        refuse_detach: Arc::clone(stuck),
    }
}

#[test]
fn one_that_comes_later_is_replayed_what_exists_and_lets_go_in_its_turn() {
    let mut b = bench(&["slots"], None);
    for page in 0..3 {
        b.ram.attach(region(page * SIZE)).unwrap();
    }
    let free = Arc::default();
    let dma = fake("dma", &b, false, &free);
    b.ram.join(Box::new(dma)).unwrap();
    // Comes after DMA, and still lets go after it.
    let tables = fake("vhost", &b, false, &free);
    b.ram.join(Box::new(tables)).unwrap();
    b.ram.attach(region(3 * SIZE)).unwrap();
    b.log.lock().unwrap().clear();
    for page in [0, 3] {
        b.ram.detach(Gpa(page * SIZE)).unwrap();
        let order: Vec<_> = b
            .log
            .lock()
            .unwrap()
            .drain(..)
            .map(|(name, ..)| name)
            .collect();
        assert_eq!(order, ["dma", "vhost", "slots"]);
    }
}

#[test]
fn one_that_leaves_lets_go_of_everything_and_can_be_tried_again() {
    let mut b = bench(&["slots"], None);
    b.ram.attach(region(0)).unwrap();
    b.ram.attach(region(SIZE)).unwrap();
    let stuck = Arc::new(Mutex::new(false));
    let dma = fake("dma", &b, false, &stuck);
    let id = b.ram.join(Box::new(dma)).unwrap();
    *stuck.lock().unwrap() = true;
    assert!(matches!(
        b.ram.leave(id),
        Err(DetachError::Refused {
            consumer: "dma",
            ..
        })
    ));
    *stuck.lock().unwrap() = false;
    b.ram.leave(id).unwrap();
    let log = b.log.lock().unwrap();
    let gone: Vec<_> = log
        .iter()
        .filter(|e| e.0 == "dma" && !e.1)
        .map(|e| e.2)
        .collect();
    assert_eq!(gone, [SIZE, 0]);
    drop(log);
    b.log.lock().unwrap().clear();
    b.ram.detach(Gpa(0)).unwrap();
    assert_eq!(*b.log.lock().unwrap(), [("slots", false, 0)]);
}

#[test]
fn one_that_comes_later_does_not_get_what_devices_were_cut_off_from() {
    let mut b = bench(&["slots", "dma"], None);
    b.ram.attach(region(0)).unwrap();
    b.ram.attach(region(SIZE)).unwrap();
    b.ram.cut_dma(Gpa(0)).unwrap();
    let regions = b.ram.view().memory().num_regions();
    assert_eq!(regions, 2, "all others still have it");
    b.log.lock().unwrap().clear();
    let free = Arc::default();
    let dma = fake("dma", &b, false, &free);
    b.ram.join(Box::new(dma)).unwrap();
    assert_eq!(*b.log.lock().unwrap(), [("dma", true, SIZE)]);
    b.log.lock().unwrap().clear();
    b.ram.detach(Gpa(0)).unwrap();
    assert_eq!(*b.log.lock().unwrap(), [("slots", false, 0)]);
}

/// Takes all but one region.
struct Choosy {
    inner: Fake,
    refuses: u64,
}

impl Consumer for Choosy {
    fn name(&self) -> &'static str {
        "dma"
    }
    fn rank(&self) -> Rank {
        Rank::Dma
    }
    fn attach(&mut self, region: &Region) -> Result<Lease, Reason> {
        if region.gpa().0 == self.refuses {
            return Err("not this one".into());
        }
        self.inner.attach(region)
    }
    fn detach(&mut self, region: &Region, lease: Lease) -> Result<(), (Lease, Reason)> {
        self.inner.detach(region, lease)
    }
}

#[test]
fn one_that_does_not_take_everything_takes_nothing() {
    let mut b = bench(&["slots"], None);
    for page in 0..3 {
        b.ram.attach(region(page * SIZE)).unwrap();
    }
    let stuck = Arc::new(Mutex::new(false));
    let choosy = |b: &Bench| Choosy {
        inner: fake("dma", b, false, &stuck),
        refuses: 2 * SIZE,
    };
    let consumer = choosy(&b);
    b.log.lock().unwrap().clear();
    let failure = b.ram.join(Box::new(consumer)).unwrap_err();
    assert!(failure.stays.is_none());
    assert!(failure.to_string().contains("0x2000"), "{failure}");
    let expected = [
        ("dma", true, 0),
        ("dma", true, SIZE),
        ("dma", false, SIZE),
        ("dma", false, 0),
    ];
    assert_eq!(*b.log.lock().unwrap(), expected);
    // What it does not let go of again keeps it in, and is known.
    *stuck.lock().unwrap() = true;
    let consumer = choosy(&b);
    let failure = b.ram.join(Box::new(consumer)).unwrap_err();
    let id = failure.stays.unwrap();
    assert!(b.ram.leave(id).is_err());
    *stuck.lock().unwrap() = false;
    b.ram.leave(id).unwrap();
    let (regions, stuck) = b.ram.detach_all();
    assert_eq!((regions.len(), stuck.len()), (3, 0));
}

proptest! {
    /// Whatever the order of attaches, detaches and refusals: no consumer sees a region twice, none keeps one
    /// that was let go, and devices see exactly the regions that are present.
    #[test]
    fn leases_balance(steps in prop::collection::vec((0u64..6, any::<bool>(), 0usize..3, any::<bool>()), 1..60)) {
        let mut b = bench(&["slots", "vhost", "dma"], None);
        for (page, attach, consumer, refuse) in steps {
            *b.stuck[consumer].lock().unwrap() = refuse;
            let gpa = page * SIZE;
            let known = b.ram.regions().any(|r| r.gpa().0 == gpa);
            if attach {
                prop_assert_eq!(b.ram.attach(region(gpa)).is_ok(), !known);
            } else {
                let result = b.ram.detach(Gpa(gpa));
                prop_assert!(known || result.is_err());
            }
            let present = b.ram.regions().count() - b.ram.stuck().count();
            prop_assert_eq!(b.ram.view().memory().num_regions(), present);
        }
        for stuck in &b.stuck {
            *stuck.lock().unwrap() = false;
        }
        let (_, stuck) = b.ram.detach_all();
        prop_assert!(stuck.is_empty());
        let mut balance = std::collections::BTreeMap::new();
        for (name, attached, gpa) in b.log.lock().unwrap().iter() {
            let count = balance.entry((*name, *gpa)).or_insert(0i32);
            *count += if *attached { 1 } else { -1 };
            prop_assert!((0..=1).contains(count), "{} {:#x} {}", name, gpa, count);
        }
        prop_assert!(balance.values().all(|count| *count == 0));
    }
}
