//! Memory for those who don't name any: it comes from a pool of the host's device-dax devices.

use std::time::Duration;

use lab_agent::guest_protocol::pattern_word;
use lab_agent::host_protocol::SpawnSpec;
use serde_json::{Value, json};

use super::remote::{Remote, waiting_vmm};
use super::support::{
    GIB, MIB, eventually, has_memory, initramfs, kill, no_complaints, refused_as, scratch,
};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::{Guest, GuestSpec};
use crate::host::process::Process;
use crate::share::{ImageForm, kernel_path};
use crate::suite::SCRATCH;
use crate::wait::PATIENCE;

pub(super) const TESTS: &[GuestTest] = &[GuestTest {
    name: "ram_without_a_file_comes_from_a_pool",
    run: ram_without_a_file_comes_from_a_pool,
}];

const DEADLINE: Duration = PATIENCE;
const RAM: u64 = 512 * MIB;
/// Kept from the guests' kernels, so that what is there is what we put there.
const MARK_AT: u64 = 256 * MIB;
const MARK_SIZE: u64 = 4 * MIB;
const SEED: u64 = 815;
const SIGTERM: i32 = 15;
/// The device's alignment.
const UNIT: u64 = 2 * MIB;

/// The second device is the host's pool for RAM.
struct Pooled<'a> {
    lab: &'a Lab,
    device: String,
    env: (String, String),
}

impl<'a> Pooled<'a> {
    fn new(lab: &'a Lab) -> Result<Self, TestError> {
        scratch(lab)?;
        let device = lab.host.dax()[1].path.clone();
        let file = format!("{SCRATCH}/config.toml");
        let text = format!("[pool.ram]\ndevices = [\"{device}\"]\n[ram]\npool = \"ram\"\n");
        lab.host.write_file(&file, text.as_bytes())?;
        let env = ("DAXHUND_CONFIG".to_owned(), file);
        Ok(Self { lab, device, env })
    }

    /// Of a caller that has never heard of device-dax.
    fn spec(&self) -> GuestSpec {
        let mut spec = GuestSpec::new(&self.lab.kernel.release, &["--memory", "size=512M"]);
        spec.env.push(self.env.clone());
        spec.cmdline = format!("memmap={MARK_SIZE}${MARK_AT:#x}");
        spec
    }

    fn start(&self, argv: &[&str]) -> Result<Process, TestError> {
        let spec = SpawnSpec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            env: vec![self.env.clone()],
            stdin: true,
            ..SpawnSpec::default()
        };
        Ok(self.lab.host.spawn(spec)?)
    }

    /// What a subcommand of `daxhund pool` prints.
    fn ask(&self, words: &[&str]) -> Result<Value, TestError> {
        let argv = [&["daxhund", "pool"], words, &["--json"]].concat();
        let output = self.start(&argv)?.finish(DEADLINE)?;
        claim(output.status.success(), || format!("{argv:?}: {output:?}"))?;
        serde_json::from_str(&output.stdout)
            .map_err(|error| TestError::Claim(format!("{argv:?}: {error}: {}", output.stdout)))
    }

    /// Offset and size of all that is free.
    fn free(&self) -> Result<Vec<(u64, u64)>, TestError> {
        let free = self.ask(&["free"])?;
        let number = |piece: &Value, field: &str| piece[field].as_u64().unwrap_or(u64::MAX);
        let pieces = free.as_array().into_iter().flatten();
        Ok(pieces
            .map(|piece| (number(piece, "offset"), number(piece, "size")))
            .collect())
    }

    /// Whether the process has the device mapped from this offset on, and from no other.
    fn is_mapped_from(&self, pid: u32, offset: u64) -> Result<bool, TestError> {
        let maps = self.lab.host.read_text(&format!("/proc/{pid}/maps"))?;
        let lines = maps.lines().filter(|line| line.ends_with(&self.device));
        let offsets: Vec<Option<u64>> = lines
            .map(|line| u64::from_str_radix(line.split_whitespace().nth(2)?, 16).ok())
            .collect();
        Ok(!offsets.is_empty() && offsets.iter().all(|at| *at == Some(offset)))
    }

    /// Looks at the device behind everybody's back: whether the mark of a guest whose RAM began at `offset` is there.
    fn has_mark(&self, offset: u64) -> Result<bool, TestError> {
        // The last page of a unit of the device, as what is mapped has to end with one.
        let within = UNIT - 4096;
        let word = pattern_word(within / 8, SEED).to_string();
        let at = (offset + MARK_AT + within).to_string();
        let mut look = self.start(&["lab-agent", "loads", &self.device, &word, &at])?;
        let found = look.wait_for("loading", DEADLINE).is_ok();
        claim(found || look.stderr().contains("loaded"), || look.stderr())?;
        Ok(found)
    }
}

fn ram_without_a_file_comes_from_a_pool(lab: &mut Lab) -> Result<(), TestError> {
    let lab = &*lab;
    let pooled = Pooled::new(lab)?;
    // Room for two guests is left.
    let size = lab.host.dax()[1].size_bytes;
    let rest = size - GIB;
    let reserve = ["daxhund", "pool", "reserve", "ram", "--size"];
    let mut reserved = pooled.start(&[&reserve[..], &[&rest.to_string()]].concat())?;
    reserved.wait_for(&format!("{} 0 {rest}", pooled.device), DEADLINE)?;

    let mut first = Guest::boot(&lab.host, &pooled.spec())?;
    has_memory(&mut first, RAM)?;
    no_complaints(&mut first)?;
    let first_pid = first.vmm().pid();
    claim(pooled.is_mapped_from(first_pid, rest)?, || {
        "the first guest is not on the first free range".to_owned()
    })?;
    first.write_physical(MARK_AT, MARK_SIZE, SEED)?;

    let mut second = Guest::launch(&lab.host, &pooled.spec())?;
    let second_pid = second.vmm().pid();
    eventually("the second guest is on the next range", || {
        pooled.is_mapped_from(second_pid, rest + RAM)
    })?;
    let list = pooled.ask(&["list"])?;
    let device = &list[0]["devices"][0];
    let pids: Vec<&Value> = device["taken"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|taken| &taken["pid"])
        .collect();
    claim(
        pids == [reserved.pid(), first_pid, second_pid] && device["free"] == 0,
        || format!("expected these and nothing free: {list}"),
    )?;
    full_pool_says_who_has_it(&pooled, [first_pid, second_pid])?;

    second.vmm().signal(SIGTERM)?;
    second.wait_end()?;
    let orphan = kill(lab, &mut first)?;
    claim(pooled.free()? == [(rest, GIB)], || {
        "what guests had that were ended and killed is not free".to_owned()
    })?;
    claim(pooled.has_mark(rest)?, || {
        "the first guest's data is gone already, so that nothing is seen by it".to_owned()
    })?;
    next_guest_finds_nothing(&pooled, rest)?;

    claim(pooled.free()? == [(rest, GIB)], || {
        "what the last guest had is not free".to_owned()
    })?;
    reserved.close_stdin()?;
    let status = reserved.wait(DEADLINE)?;
    claim(status.success() && pooled.free()? == [(0, size)], || {
        format!("the reservation ended with {status}, and not all is free")
    })?;
    // It stays while anybody has the device.
    orphan.ends(lab)
}

fn full_pool_says_who_has_it(pooled: &Pooled<'_>, pids: [u32; 2]) -> Result<(), TestError> {
    let (name, file) = &pooled.env;
    let env = format!("{name}={file}");
    let argv = pooled.spec().argv();
    let words: Vec<&str> = ["env", &env]
        .into_iter()
        .chain(argv.iter().map(String::as_str))
        .collect();
    let [first, second] = pids.map(|pid| format!("process {pid} (daxhund)"));
    let says = [
        "memory zone mem0",
        "pool ram has no 512M free",
        &first,
        &second,
    ];
    refused_as(pooled.lab, &words, None, 1, &says)
}

/// One that is made over REST, and has the range of the guest that was killed.
fn next_guest_finds_nothing(pooled: &Pooled<'_>, rest: u64) -> Result<(), TestError> {
    let lab = pooled.lab;
    let remote = Remote::new();
    let mut vmm = waiting_vmm(&remote, &[], None);
    vmm.env.push(pooled.env.clone());
    let mut guest = Guest::start(&lab.host, vmm)?;
    remote.ready(lab)?;
    let config = json!({
        "memory": {"size": RAM},
        "payload": {
            "kernel": kernel_path(&lab.kernel.release, ImageForm::Elf),
            "initramfs": initramfs(lab),
            "cmdline": pooled.spec().whole_cmdline(),
        },
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    });
    let create = ("PUT", "/api/v1/vm.create", &*config.to_string());
    remote.answers(lab, create, "204", &[])?;
    remote.ok(lab, &["boot"])?;
    guest.wait_ready()?;
    let report = guest.read_physical(MARK_AT, MARK_SIZE, SEED)?;
    claim(
        report.words > 0 && report.wrong_words == report.words,
        || format!("the guest before it is seen: {report:?}"),
    )?;
    claim(!pooled.has_mark(rest)?, || {
        "the guest before it has left its data".to_owned()
    })?;

    remote.add(lab, "add-pmem", "pool=ram,size=256M,id=p0")?;
    let range = |id: &str, size: u64, offset: u64| json!({"id": id, "size": size, "file": pooled.device, "offset": offset, "pool": "ram"});
    let mut memory = remote.info(lab)?["dax_memory"].clone();
    for range in memory.as_array_mut().into_iter().flatten() {
        if let Some(fields) = range.as_object_mut() {
            fields.remove("gpa");
        }
    }
    let expected = [range("mem0", RAM, rest), range("p0", 256 * MIB, rest + RAM)];
    claim(memory == json!(expected), || {
        format!("vm.info says of its memory: {memory}")
    })?;
    remote.ok(lab, &["delete"])?;
    remote.ok(lab, &["shutdown-vmm"])?;
    let status = guest.vmm().wait(DEADLINE)?;
    claim(status.success(), || format!("the VMM ended with {status}"))
}
