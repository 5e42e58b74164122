//! What keeps the guest of a soak busy beside its writers: fio on a disk of its own, stress-ng in its RAM, and downloads. Each
//! checks what it reads, and none of them ends.

use lab_agent::host_protocol::SpawnSpec;

use super::super::support::MIB;
use super::super::{Lab, TestError, claim};
use crate::guest::network::{HOST_ADDRESS, tap_word};
use crate::guest::{Guest, load_disk};
use crate::host::process::Process;
use crate::suite::SCRATCH;

const TAP: &str = "soak0";
const PORT: u16 = 8077;
const DISK_BYTES: u64 = 48 * MIB;
const FILE_BYTES: u64 = 4 * MIB;
/// At most a part of the guest's only processor, so that its stores are written as well. Addresses, numbers and pipes besides.
const STRESS: &str = "stress-ng --verify --vm 1 --vm-bytes 16M --cpu 1 --cpu-load 10 --timer 1 --timer-freq 100 --pipe 1 \
                      --pipe-data-size 512 --sched batch --temp-path /tmp --timeout 0";
/// Small and larger blocks in the same places again and again, each verified soon after it was written.
const FIO: &str = "--name=soak --filename=/dev/vdb --size=32M --bsrange=4k-64k --rw=randwrite --direct=1 --ioengine=libaio \
                   --iodepth=4 --rate_iops=100 --verify=crc32c --verify_backlog=64 --verify_fatal=1 \
                   --time_based --runtime=7d";

/// What the host does for it.
pub(super) struct Loads {
    /// Ends when it is dropped.
    _server: Process,
    sum: String,
}

impl Loads {
    /// Prepares the host; gives the VMM's words as well.
    pub(super) fn prepare(lab: &Lab) -> Result<Vec<String>, TestError> {
        let disk = format!("{SCRATCH}/load.raw");
        lab.host.sh(&format!(
            "truncate -s {DISK_BYTES} {disk} && mkdir -p {SCRATCH}/www && \
             head -c {FILE_BYTES} /dev/urandom > {SCRATCH}/www/file"
        ))?;
        let mut words = load_disk().to_vec();
        words.extend([
            format!("path={disk},id=loaddisk,image_type=raw"),
            "--net".to_owned(),
            tap_word(TAP, ",id=loadnet"),
        ]);
        Ok(words)
    }

    /// Once the VMM has made the tap.
    pub(super) fn serve(lab: &Lab) -> Result<Self, TestError> {
        let address = format!("{HOST_ADDRESS}:{PORT}");
        let www = format!("{SCRATCH}/www");
        let argv = ["busybox", "httpd", "-f", "-p", &address, "-h", &www];
        let server = lab.host.spawn(SpawnSpec {
            argv: argv.map(str::to_owned).to_vec(),
            ..SpawnSpec::default()
        })?;
        let sum = lab.host.check(&["md5sum", &format!("{www}/file")])?;
        let sum = sum.split_whitespace().next().unwrap_or_default().to_owned();
        Ok(Self {
            _server: server,
            sum,
        })
    }

    /// In a guest that has just started.
    pub(super) fn start(&self, guest: &mut Guest) -> Result<(), TestError> {
        guest.modprobe(&["virtio_net"])?;
        guest.bring_up("eth0")?;
        guest.mount_load()?;
        let download = format!(
            "while s=$(wget -q -O - http://{HOST_ADDRESS}:{PORT}/file | md5sum); [ \"${{s%% *}}\" = {} ]; do echo >> /tmp/downloads; done; \
             echo \"the file's sum is $s\"",
            self.sum
        );
        guest.begin_fio(FIO)?;
        for (name, command) in [
            ("stress", format!("chroot /load {STRESS}")),
            ("download", download),
        ] {
            guest.sh(&format!(
                "(({command}) > /tmp/load-{name}.said 2>&1; echo $? > /tmp/load-{name}.ended) < /dev/null > /dev/null 2>&1 &"
            ))?;
        }
        Ok(())
    }

    /// None has ended.
    pub(super) fn go_on(guest: &mut Guest) -> Result<(), TestError> {
        let said = guest.sh(
            "for e in /tmp/load-*.ended; do if [ -e $e ]; then echo $e $(cat $e); tail -n 20 ${e%.ended}.said; fi; done",
        )?;
        let fio = guest.fio_has_ended()?;
        claim(said.trim().is_empty() && fio.is_none(), || {
            format!("a load has ended: {said}{}", fio.unwrap_or_default())
        })
    }

    /// How many files came whole.
    pub(super) fn downloads(guest: &mut Guest) -> Result<u64, TestError> {
        let lines = guest.sh("wc -l < /tmp/downloads 2>/dev/null || echo 0")?;
        Ok(lines.trim().parse().unwrap_or_default())
    }
}
