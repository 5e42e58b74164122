//! The host's own configuration, and the pools of memory that it names.
//!
//! A host without it is as it should be. One that can't be used keeps every guest from starting. Who has what of a pool is for
//! `daxhund pool list` to say, which opens the devices.

use std::path::Path;

use daxhund_dax::{ByteSize, DeviceFacts, Driver, Host};

use super::report::Row;
use super::roots::{Live, Roots};
use crate::config::{HostConfig, PoolConfig};
use crate::host_config::DEFAULT_FILE;

const CHECK: &str = "config";

pub(super) fn check(roots: &Roots, live: &dyn Live) -> Vec<Row> {
    let config = match live.host_config() {
        Ok(config) => config,
        Err(error) => {
            return vec![Row::fail(
                CHECK,
                crate::chain(&error),
                "mend the file, or take it away: no VMM starts with it as it is",
            )];
        }
    };
    let Some(file) = config.file() else {
        return vec![Row::ok(
            CHECK,
            format!("no {DEFAULT_FILE}: no pools, and RAM without file= is the host's own"),
        )];
    };
    let host = Host::at(&roots.sys, &roots.dev, &roots.proc);
    // What can't be listed is the row of another check.
    let devices = host.devices().unwrap_or_default();
    let mut rows = vec![Row::ok(CHECK, describe(file, &config))];
    rows.extend(
        config
            .pools()
            .map(|(name, pool)| pool_row(live, file, &devices, name, pool)),
    );
    rows
}

fn describe(file: &Path, config: &HostConfig) -> String {
    let names: Vec<&str> = config.pools().map(|(name, _)| name).collect();
    let pools = match names[..] {
        [] => "no pools".to_owned(),
        [name] => format!("pool {name}"),
        _ => format!("pools {}", names.join(", ")),
    };
    let ram = match config.ram() {
        None => "is the host's own".to_owned(),
        Some(ram) if ram.required => format!("comes from {}", ram.pool),
        Some(ram) => format!("comes from {}, or is the host's own", ram.pool),
    };
    format!("{}: {pools}; RAM without file= {ram}", file.display())
}

fn pool_row(
    live: &dyn Live,
    file: &Path,
    devices: &[DeviceFacts],
    name: &str,
    pool: &PoolConfig,
) -> Row {
    let check = format!("pool {name}");
    let mut bytes = 0;
    let mut unusable: Vec<String> = Vec::new();
    for path in &pool.devices {
        match usable(live, devices, path) {
            Some(facts) => bytes += facts.size_bytes - facts.size_bytes % facts.align_bytes,
            None => unusable.push(path.display().to_string()),
        }
    }
    let count = pool.devices.len();
    let plural = if count == 1 { "device" } else { "devices" };
    let found = format!("{} on {count} {plural}", ByteSize(bytes));
    if unusable.is_empty() {
        return Row::ok(check, found);
    }
    let which = unusable.join(", ");
    Row::warn(
        check,
        format!("{found}, without {which}: can't be used"),
        format!(
            "`daxhund pool list {name}` says why; mend it, or take it out of {}",
            file.display()
        ),
    )
}

/// A device that a VMM could take ranges of. It goes by its name, whatever links lead to it.
fn usable<'a>(live: &dyn Live, devices: &'a [DeviceFacts], path: &Path) -> Option<&'a DeviceFacts> {
    let node = path.canonicalize().ok()?;
    let name = node.file_name()?.to_str()?.parse().ok()?;
    let facts = devices.iter().find(|facts| facts.name == name)?;
    let is_usable = facts.driver == Driver::DeviceDax && facts.size_bytes != 0;
    (is_usable && live.may_open(path)).then_some(facts)
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::super::testing::{FakeHost, FakeLive, row};
    use super::*;

    fn examine(host: &FakeHost, config: &str) -> Vec<Row> {
        let dev = host.roots().dev.display().to_string();
        let config = config.replace("/dev/", &format!("{dev}/"));
        check(host.roots(), &FakeLive::with_config(&config))
    }

    #[test]
    fn a_host_without_pools_is_as_it_should_be() {
        let rows = check(FakeHost::healthy().roots(), &FakeLive::allowing());
        let [row] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!(row.status, Status::Ok);
        assert!(row.found.contains("RAM without file= is the host's own"));
    }

    #[test]
    fn pools_and_what_they_are_for_are_told() {
        let host = FakeHost::healthy();
        let pool = "[pool.ram]\ndevices = [\"/dev/dax0.0\"]\n";
        let rows = examine(&host, pool);
        assert!(
            row(&rows, "config")
                .found
                .contains("pool ram; RAM without file= is the host's")
        );
        let rows = examine(
            &host,
            &format!("{pool}[ram]\npool = \"ram\"\nrequired = false\n"),
        );
        let found = &row(&rows, "config").found;
        assert!(
            found.ends_with("comes from ram, or is the host's own"),
            "{found}"
        );
        assert_eq!(row(&rows, "pool ram").found, "2046M on 1 device");
        assert!(rows.iter().all(|row| row.status == Status::Ok));
    }

    #[test]
    fn a_device_of_a_pool_that_can_not_be_used_is_a_warning() {
        let host = FakeHost::healthy();
        host.add_hmem("dax1.0");
        host.set_driver("dax1.0", Some("kmem"));
        let config = "[pool.ram]\ndevices = [\"/dev/dax0.0\", \"/dev/dax1.0\", \"/dev/dax7.0\"]\n";
        let rows = examine(&host, config);
        let row = row(&rows, "pool ram");
        assert_eq!(row.status, Status::Warn);
        assert!(
            row.found.starts_with("2046M on 3 devices, without "),
            "{row:?}"
        );
        assert!(
            row.found.contains("dax1.0, ") && row.found.contains("dax7.0:"),
            "{row:?}"
        );
        assert!(
            row.mend
                .as_ref()
                .unwrap()
                .contains("`daxhund pool list ram`")
        );
    }

    #[test]
    fn a_configuration_that_can_not_be_used_is_a_failure() {
        let rows = examine(&FakeHost::healthy(), "[pool.ram]\n");
        let row = row(&rows, "config");
        assert_eq!(row.status, Status::Fail);
        assert!(row.found.contains("missing field `devices`"), "{row:?}");
    }
}
