//! Programs that keep a guest busy: fio and stress-ng, from a disk that they are on with their libraries.

use std::time::Duration;

use lab_agent::guest_protocol::ExecReport;

use super::{Guest, GuestError};
use crate::share::LOAD_PATH;

/// Its serial number, by which it is found.
const SERIAL: &str = "load";
/// Where it is mounted. Only fio, stress-ng and their libraries are there, and what the guest has in these directories.
const ROOT: &str = "/load";
const SHARED: [&str; 4] = ["dev", "mnt", "proc", "sys"];
const FIO_SAID: &str = "/tmp/fio.said";
const FIO_STATUS: &str = "/tmp/fio.status";
/// Tens of libraries are loaded before anything else, with both levels emulated.
const LOAD_DEADLINE: Duration = Duration::from_mins(5);

/// The disk's words on the VMM's command line.
pub fn load_disk() -> [String; 2] {
    let word = format!("path={LOAD_PATH},readonly=on,serial={SERIAL},id={SERIAL}");
    ["--disk".to_owned(), word]
}

impl Guest {
    /// Mounts the disk. The guest needs [`Initramfs::Tools`](crate::share::Initramfs), and what is to be under test belongs
    /// below `/mnt`, mounted before this.
    pub fn mount_load(&mut self) -> Result<(), GuestError> {
        self.modprobe(&["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"])?;
        self.await_path("/dev/vda")?;
        let shared =
            SHARED.map(|name| format!("mkdir -p /{name}; mount -o rbind /{name} {ROOT}/{name}"));
        let shared = shared.join(" && ");
        self.sh(&format!(
            "mkdir -p {ROOT}; for d in /sys/block/vd*; do if [ \"$(cat $d/serial)\" = {SERIAL} ]; then \
             mount -t ext4 -o ro /dev/${{d##*/}} {ROOT}; fi; done; {shared} && \
             mount -t tmpfs none {ROOT}/tmp && mount -t tmpfs none {ROOT}/run"
        ))?;
        Ok(())
    }

    /// Runs fio with these words; a failure, of a check as well, is an error.
    pub fn fio(&mut self, words: &str) -> Result<String, GuestError> {
        let script = fio_script(words);
        let report: ExecReport = self.ask_for(&format!("sh {script}"), LOAD_DEADLINE)?;
        if report.status == Some(0) {
            return Ok(report.stdout);
        }
        Err(GuestError::Script {
            script,
            status: report.status,
            said: report.stderr + &report.stdout,
        })
    }

    /// Has fio go on with these words until [`Guest::end_fio`].
    pub fn begin_fio(&mut self, words: &str) -> Result<(), GuestError> {
        let script = fio_script(words);
        self.sh(&format!(
            "rm -f {FIO_SAID} {FIO_STATUS}; (({script}) > {FIO_SAID}; echo $? > {FIO_STATUS}) < /dev/null > /dev/null 2>&1 &"
        ))?;
        Ok(())
    }

    /// What fio has said if it has ended, which it does by itself for nothing but an error.
    pub fn fio_has_ended(&mut self) -> Result<Option<String>, GuestError> {
        let said = self.sh(&format!(
            "if [ -e {FIO_STATUS} ]; then echo status $(cat {FIO_STATUS}); cat {FIO_SAID}; fi"
        ))?;
        Ok((!said.is_empty()).then_some(said))
    }

    /// Has fio end; gives its status.
    pub fn end_fio(&mut self) -> Result<String, GuestError> {
        self.sh("killall -INT fio")?;
        self.await_path(FIO_STATUS)?;
        Ok(self.fio_has_ended()?.unwrap_or_default())
    }
}

fn fio_script(words: &str) -> String {
    format!("chroot {ROOT} fio --verify_state_save=0 {words} 2>&1")
}
