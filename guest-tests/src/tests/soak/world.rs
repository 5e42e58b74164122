//! The guest of a soak, its stores, and what they have promised.

use std::collections::BTreeMap;
use std::time::Duration;

use lab_agent::host_protocol::SpawnSpec;

use super::super::passthrough::word;
use super::super::remote::Remote;
use super::super::removal::{DRIVER, REMOVAL_DEADLINE};
use super::super::support::{
    self, MIB, comes_back_to, dax_zone, eventually, holds, is_of_others, power_off, scratch,
    spec_on,
};
use super::super::{Lab, TestError, claim};
use super::loads::Loads;
use super::plan::{Step, Store};
use crate::bench::removal::scene::NO_LATE_ZEROS;
use crate::guest::Guest;
use crate::host::account::{Memlock, descriptors, kernel_says, mappings, memlock, threads};
use crate::host::cards::Card;
use crate::host::figures::rss_anon_of_small_pages;
use crate::host::passthrough::Binding;
use crate::host::process::Process;
use crate::share::Initramfs;
use crate::suite::SCRATCH;

const DISK_BYTES: u64 = 64 * MIB;
const PMEM_BYTES: u64 = 256 * MIB;
const CARD: Card = Card::Disk;
const MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_pmem",
    "nd_pmem",
    "nvme",
    "crc32c_generic",
    "ext4",
];
/// What a kernel says that is in trouble. A guest's file systems and drives complain in other words when their store goes away
/// under them, and are right to.
const TROUBLE: [&str; 7] = [
    "WARNING:",
    "BUG:",
    "Bad page state",
    "Call Trace",
    "general protection",
    "blocked for more than",
    "detected stall",
];
/// The allocator's own affair: it makes an arena for a thread that finds all others in use, up to eight for each processor
/// (glibc, malloc/arena.c), each of what is in use and what is reserved. Threads come with devices and reboots.
const ARENAS: u64 = 8;
const ARENA_MAPPINGS: u64 = 2;
const RSS_ROOM_BYTES: u64 = MIB;

/// Of the VMM, with nothing attached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Account {
    memlock: Memlock,
    descriptors: u64,
    threads: u64,
}

impl support::Account for Account {
    fn is_back_to(&self, before: &Self) -> bool {
        self.memlock == before.memlock
            && self.descriptors <= before.descriptors
            && self.threads <= before.threads
    }
}

/// What may grow, but not for ever.
#[derive(Clone, Copy, Debug)]
struct Room {
    mappings: u64,
    rss_bytes: u64,
}

/// Records that were called durable.
#[derive(Clone, Debug)]
struct Promise {
    file: String,
    seed: u64,
    records: u64,
}

/// What the lab knows of a store, there or not.
#[derive(Clone, Debug, Default)]
struct State {
    /// Where the guest has it, while it has it.
    address: Option<String>,
    has_file_system: bool,
    promises: Vec<Promise>,
    /// The file that is being written, and its seed.
    writing: Option<(String, u64)>,
    written: u64,
}

pub(super) struct World<'a> {
    lab: &'a Lab,
    seed: u64,
    remote: Remote,
    guest: Guest,
    /// Has `unbind` open since before anybody could hold it.
    early: Process,
    drive: Binding,
    loads: Loads,
    downloads: u64,
    states: BTreeMap<Store, State>,
    first: Option<(Account, Room)>,
    complaints: usize,
    promised: u64,
}

impl<'a> World<'a> {
    pub(super) fn begin(lab: &'a Lab, seed: u64) -> Result<Self, TestError> {
        scratch(lab)?;
        let complaints = kernel_says(&lab.host, &TROUBLE)?.len();
        lab.host
            .sh(&format!("truncate -s {DISK_BYTES} {SCRATCH}/soak.raw"))?;
        let drive = lab.host.bind_vfio(CARD)?;
        let script =
            format!("exec 3> {DRIVER}/unbind; echo open; while read n; do echo $n >&3; done");
        let mut early = lab.host.spawn(SpawnSpec {
            argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
            stdin: true,
            ..SpawnSpec::default()
        })?;
        early.wait_for("open", REMOVAL_DEADLINE)?;
        let remote = Remote::new();
        let mut spec = spec_on(lab, &[&dax_zone(lab, "z0", 0, 512 * MIB, 0)]);
        spec.initramfs = Initramfs::Tools;
        let words = ["--api-socket", remote.socket()].map(str::to_owned);
        spec.arguments.extend(words);
        spec.arguments.extend(Loads::prepare(lab)?);
        let mut guest = Guest::boot(&lab.host, &spec)?;
        guest.modprobe(&MODULES)?;
        let loads = Loads::serve(lab)?;
        loads.start(&mut guest)?;
        let states = Store::ALL.map(|store| (store, State::default()));
        Ok(Self {
            lab,
            seed,
            remote,
            guest,
            early,
            drive,
            loads,
            downloads: 0,
            states: states.into(),
            first: None,
            complaints,
            promised: 0,
        })
    }

    pub(super) fn present(&self) -> Vec<Store> {
        let present = self
            .states
            .iter()
            .filter(|(_, state)| state.address.is_some());
        present.map(|(store, _)| *store).collect()
    }

    /// Records that were promised and found.
    pub(super) fn promised(&self) -> u64 {
        self.promised
    }

    pub(super) fn act(&mut self, step: Step) -> Result<(), TestError> {
        match step {
            Step::Add(store) => self.add(store)?,
            Step::Remove(store) => {
                self.remote.ok(self.lab, &["remove-device", id(store)])?;
                self.is_gone(store)?;
            }
            Step::Take(store) => self.take(store)?,
            Step::Snatch(store) => self.snatch(store)?,
            Step::Pause { millis } => {
                self.remote.ok(self.lab, &["pause"])?;
                // How long it is held is the step's own length.
                std::thread::sleep(Duration::from_millis(millis));
                self.remote.ok(self.lab, &["resume"])?;
            }
            Step::Reboot => self.reboot()?,
            Step::Check => {
                for store in self.present() {
                    self.stop_writing(store)?;
                    self.check(store)?;
                    self.start_writing(store)?;
                }
                let report = self.guest.pattern(Some(16 * MIB))?;
                claim(report.wrong_words == 0, || {
                    format!("the guest's RAM is damaged: {report:?}")
                })?;
            }
        }
        self.is_quiet()
    }

    /// Removes everything; then all is as it was the first time.
    pub(super) fn settle(&mut self) -> Result<(), TestError> {
        for store in self.present() {
            self.act(Step::Remove(store))?;
        }
        let (host, pid) = (&self.lab.host, self.guest.vmm().pid());
        let account = || -> Result<Account, TestError> {
            Ok(Account {
                memlock: memlock(host, pid)?,
                descriptors: descriptors(host, pid)?,
                threads: threads(host, pid)?,
            })
        };
        let room = || -> Result<Room, TestError> {
            Ok(Room {
                mappings: mappings(host, pid)?,
                rss_bytes: rss_anon_of_small_pages(host, pid)?,
            })
        };
        let Some((first, least)) = self.first else {
            self.first = Some((account()?, room()?));
            return Ok(());
        };
        comes_back_to("the VMM is as it was", &first, account)?;
        let now = room()?;
        claim(
            now.mappings <= least.mappings + ARENAS * ARENA_MAPPINGS
                && now.rss_bytes <= least.rss_bytes + RSS_ROOM_BYTES,
            || format!("the VMM had {least:?}, it has {now:?}"),
        )
    }

    /// All that was promised is there in the end.
    pub(super) fn end(mut self) -> Result<(), TestError> {
        for store in Store::ALL {
            if self.states[&store].address.is_none() {
                self.add(store)?;
            }
        }
        self.settle()?;
        self.is_quiet()?;
        self.downloads += Loads::downloads(&mut self.guest)?;
        claim(self.downloads > 0, || "no download was finished".to_owned())?;
        power_off(self.guest)?;
        self.early.close_stdin()?;
        self.early.wait(REMOVAL_DEADLINE)?;
        Ok(self.drive.release()?)
    }

    fn state(&mut self, store: Store) -> &mut State {
        self.states.entry(store).or_default()
    }

    fn add(&mut self, store: Store) -> Result<(), TestError> {
        let dax = &self.lab.host.dax()[1].path;
        let (command, word) = match store {
            Store::Disk => (
                "add-disk",
                format!("path={SCRATCH}/soak.raw,id={},image_type=raw", id(store)),
            ),
            Store::Pmem => (
                "add-pmem",
                format!("file={dax},size={PMEM_BYTES},id={}", id(store)),
            ),
            Store::Drive => ("add-device", word(&self.drive)),
        };
        let address = self.remote.add(self.lab, command, &word)?;
        self.state(store).address = Some(address);
        if !self.states[&store].has_file_system {
            let node = self.node(store)?;
            self.guest.sh(&format!(
                "mkfs.ext4 -q -F -b 4096 -E {NO_LATE_ZEROS} /dev/{node}"
            ))?;
            self.state(store).has_file_system = true;
        }
        self.mount(store)?;
        self.check(store)?;
        self.start_writing(store)
    }

    fn mount(&mut self, store: Store) -> Result<(), TestError> {
        let (node, place) = (self.node(store)?, place(store));
        let options = if store == Store::Pmem { "-o dax" } else { "" };
        self.guest.sh(&format!(
            "mkdir -p {place} && mount -t ext4 {options} /dev/{node} {place}"
        ))?;
        Ok(())
    }

    /// The block device that the guest has made of it: numbers go on while an old one is still mounted.
    fn node(&mut self, store: Store) -> Result<String, TestError> {
        let address = self.states[&store].address.clone().unwrap_or_default();
        let script = format!(
            "for b in /sys/block/*; do case $(readlink -f $b) in */{address}/*) echo ${{b##*/}};; esac; done"
        );
        let mut node = String::new();
        eventually(
            &format!("the guest has made a block device of {store:?}"),
            || {
                self.guest.sh(&script)?.trim().clone_into(&mut node);
                Ok(!node.is_empty())
            },
        )?;
        self.guest.await_path(&format!("/dev/{node}"))?;
        Ok(node)
    }

    fn start_writing(&mut self, store: Store) -> Result<(), TestError> {
        let seed = self.seed;
        let state = self.state(store);
        state.written += 1;
        let (file, seed) = (
            format!("{}/{}", place(store), state.written),
            seed ^ state.written,
        );
        state.writing = Some((file.clone(), seed));
        let name = id(store);
        self.guest.sh(&format!(
            "rm -f /tmp/{name}.*; (/init soak-write {file} {seed} /tmp/{name}.durable /tmp/{name}.stop \
             > /tmp/{name}.said 2>&1; echo > /tmp/{name}.ended) < /dev/null > /dev/null 2>&1 &"
        ))?;
        Ok(())
    }

    /// The writer ends, by itself if its store is gone; what was durable by then is a promise.
    fn stop_writing(&mut self, store: Store) -> Result<(), TestError> {
        let Some((file, seed)) = self.state(store).writing.take() else {
            return Ok(());
        };
        let name = id(store);
        self.guest.sh(&format!("touch /tmp/{name}.stop"))?;
        self.guest.await_path(&format!("/tmp/{name}.ended"))?;
        let durable = self
            .guest
            .sh(&format!("cat /tmp/{name}.durable 2>/dev/null || echo 0"))?;
        let records = durable.trim().parse().unwrap_or_default();
        self.state(store).promises.push(Promise {
            file,
            seed,
            records,
        });
        Ok(())
    }

    /// Everything promised is there; it is removed then, so that the store does not fill up.
    fn check(&mut self, store: Store) -> Result<(), TestError> {
        for promise in std::mem::take(&mut self.state(store).promises) {
            let Promise {
                file,
                seed,
                records,
            } = &promise;
            if *records == 0 {
                continue;
            }
            let found = self.guest.check_records(file, *seed)?;
            claim(found.records >= *records, || {
                format!("{store:?} has lost durable records: {promise:?}, found {found:?}")
            })?;
            self.promised += records;
            self.guest.sh(&format!("rm {file}"))?;
        }
        Ok(())
    }

    /// The guest and the VMM have let go of it.
    fn is_gone(&mut self, store: Store) -> Result<(), TestError> {
        let address = self.state(store).address.take().unwrap_or_default();
        self.guest
            .await_gone(&format!("/sys/bus/pci/devices/{address}"))?;
        let (lab, remote) = (self.lab, &self.remote);
        eventually(&format!("{store:?} is no part of the VM any more"), || {
            Ok(!remote.knows(lab, id(store))?)
        })?;
        self.stop_writing(store)?;
        // It fails for good by now; lazily, since a file system without its store is busy for a moment.
        self.guest.sh(&format!("umount -l {}", place(store)))?;
        Ok(())
    }

    fn take(&mut self, store: Store) -> Result<(), TestError> {
        let lab = self.lab;
        let (name, driver) = match store {
            Store::Drive => (
                self.drive.device().address.clone(),
                "/sys/bus/pci/drivers/vfio-pci".to_owned(),
            ),
            Store::Pmem | Store::Disk => (lab.host.dax()[1].name.clone(), DRIVER.to_owned()),
        };
        let script = format!("echo {name} > {driver}/unbind");
        let gone = lab
            .host
            .run_within(&["sh", "-c", &script], REMOVAL_DEADLINE)?;
        claim(gone.status.success(), || {
            format!("{name} does not go: {gone:?}")
        })?;
        let path = &lab.host.dax()[1].path;
        claim(
            store == Store::Drive || !holds(lab, &mut self.guest, path)?,
            || format!("{path} was let go of and is still in use"),
        )?;
        self.is_gone(store)?;
        lab.host.sh(&format!("echo {name} > {driver}/bind"))?;
        Ok(())
    }

    fn snatch(&mut self, store: Store) -> Result<(), TestError> {
        let lab = self.lab;
        let dax = lab.host.dax()[1].clone();
        self.early.send(format!("{}\n", dax.name).as_bytes())?;
        let driver = format!("/sys/bus/dax/devices/{}/driver", dax.name);
        eventually("the device is gone", || Ok(!lab.host.exists(&driver)?))?;
        eventually("nothing of it is left in the VMM", || {
            Ok(!holds(lab, &mut self.guest, &dax.path)?)
        })?;
        self.is_gone(store)?;
        // A device that is on its way out cannot be bound: the write says so, and nobody else says when it is over.
        eventually("the device comes back", || {
            let script = format!("echo {} > {DRIVER}/bind", dax.name);
            Ok(lab.host.run(&["sh", "-c", &script])?.status.success())
        })
    }

    fn reboot(&mut self) -> Result<(), TestError> {
        let present = self.present();
        for store in &present {
            self.stop_writing(*store)?;
            self.guest.sh(&format!("umount {}", place(*store)))?;
        }
        self.downloads += Loads::downloads(&mut self.guest)?;
        self.guest.leave("reboot")?;
        self.guest.wait_ready()?;
        self.guest.modprobe(&MODULES)?;
        self.loads.start(&mut self.guest)?;
        for store in present {
            self.mount(store)?;
            self.check(store)?;
            self.start_writing(store)?;
        }
        Ok(())
    }

    /// Neither kernel is in trouble, and the loads go on.
    fn is_quiet(&mut self) -> Result<(), TestError> {
        Loads::go_on(&mut self.guest)?;
        let guest: Vec<String> = self
            .guest
            .problems()?
            .into_iter()
            .map(|record| record.text)
            .filter(|text| !is_of_others(text) && TROUBLE.iter().any(|word| text.contains(word)))
            .collect();
        claim(guest.is_empty(), || {
            format!("the guest's kernel is in trouble:\n{}", guest.join("\n"))
        })?;
        let host = kernel_says(&self.lab.host, &TROUBLE)?;
        claim(host.len() == self.complaints, || {
            format!("the host's kernel is in trouble: {host:?}")
        })
    }
}

/// Its name in the VM.
fn id(store: Store) -> &'static str {
    match store {
        Store::Disk => "soakdisk",
        Store::Pmem => "soakpmem",
        Store::Drive => CARD.id(),
    }
}

/// Where the guest has it mounted.
fn place(store: Store) -> String {
    format!("/mnt/{}", id(store))
}
