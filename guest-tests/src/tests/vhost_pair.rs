//! A disk on device-dax that our own daemon serves to our own VMM, while daemons are killed under fio.

use lab_agent::host_protocol::SpawnSpec;
use serde_json::Value;

use super::remote::Remote;
use super::removal::REMOVAL_DEADLINE;
use super::support::{MIB, dax_zone, eventually, no_complaints, power_off, scratch, spec_on};
use super::{GuestTest, Lab, TestError, claim};
use crate::guest::{Guest, load_disk};
use crate::host::process::Process;
use crate::share::Initramfs;
use crate::suite::SCRATCH;

pub(super) const TESTS: &[GuestTest] = &[GuestTest {
    name: "a_disk_on_dax_outlives_daemons_that_are_killed_under_fio",
    run: a_disk_on_dax_outlives_daemons_that_are_killed_under_fio,
}];

const SIGKILL: i32 = 9;
const USUAL_KILLS: u32 = 4;
const FULL_KILLS: u32 = 100;
const ID: &str = "d0";
/// Small and larger blocks in the same places again and again, several at once, each verified soon after it was written.
const FIO: &str = "--name=kill --filename=/dev/vdb --size=16M --bsrange=4k-64k --rw=randwrite --direct=1 --ioengine=libaio \
                   --iodepth=8 --verify=crc32c --verify_backlog=32 --verify_fatal=1 --time_based --runtime=7d";

struct Daemon<'a> {
    lab: &'a Lab,
    process: Process,
}

impl<'a> Daemon<'a> {
    fn start(lab: &'a Lab) -> Result<Self, TestError> {
        let disk = format!("{},size=64M", lab.host.dax()[1].path);
        let argv = [
            "daxhund-vhost-user-blk",
            "--socket-path",
            &socket(),
            "--dax",
            &disk,
        ];
        let process = lab.host.spawn(SpawnSpec {
            argv: argv.map(str::to_owned).to_vec(),
            ..SpawnSpec::default()
        })?;
        process.wait_for_error("listening", REMOVAL_DEADLINE)?;
        Ok(Self { lab, process })
    }

    /// At once, whatever it is at; then the next one.
    fn replace(self) -> Result<Self, TestError> {
        self.process.signal(SIGKILL)?;
        self.process.wait(REMOVAL_DEADLINE)?;
        Self::start(self.lab)
    }
}

fn socket() -> String {
    format!("{SCRATCH}/pair.sock")
}

/// How often a backend has connected.
fn connections(remote: &Remote, lab: &Lab) -> Result<u64, TestError> {
    let text = remote.ok(lab, &["counters"])?;
    let counters: Value = serde_json::from_str(&text).unwrap_or_default();
    Ok(counters[ID]["backend_connections"].as_u64().unwrap_or(0))
}

/// Sectors that the guest's disk has written.
fn written(guest: &mut Guest) -> Result<u64, TestError> {
    let stat = guest.cat("/sys/block/vdb/stat")?;
    let field = stat.split_whitespace().nth(6).unwrap_or_default();
    Ok(field.parse().unwrap_or_default())
}

fn a_disk_on_dax_outlives_daemons_that_are_killed_under_fio(
    lab: &mut Lab,
) -> Result<(), TestError> {
    scratch(lab)?;
    let lab = &*lab;
    let mut daemon = Daemon::start(lab)?;
    let remote = Remote::new();
    let mut spec = spec_on(lab, &[&dax_zone(lab, "z0", 0, 512 * MIB, 0)]);
    spec.initramfs = Initramfs::Tools;
    spec.arguments.extend(load_disk());
    spec.arguments.extend([
        format!("vhost_user=on,socket={},id={ID}", socket()),
        "--api-socket".to_owned(),
        remote.socket().to_owned(),
    ]);
    let mut guest = Guest::boot(&lab.host, &spec)?;
    guest.mount_load()?;
    guest.await_path("/dev/vdb")?;
    guest.begin_fio(FIO)?;
    let kills = if lab.full { FULL_KILLS } else { USUAL_KILLS };
    for kill in 0..=kills {
        let (before, connected) = (written(&mut guest)?, connections(&remote, lab)?);
        eventually("fio goes on", || Ok(written(&mut guest)? > before))?;
        let ended = guest.fio_has_ended()?;
        claim(ended.is_none(), || format!("fio has ended: {ended:?}"))?;
        if kill == kills {
            break;
        }
        daemon = daemon.replace()?;
        eventually("the next daemon is found", || {
            Ok(connections(&remote, lab)? > connected)
        })?;
    }
    let ended = guest.end_fio()?;
    claim(ended.contains("err= 0"), || ended.clone())?;
    no_complaints(&mut guest)?;
    power_off(guest)?;
    drop(daemon);
    Ok(())
}
