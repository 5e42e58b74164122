//! What a test could have changed on the host, so that the lab can compare before and after.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lab_agent::host_protocol::Inventory;

/// Directories in which programs leave temporary things.
const TEMPORARY: [&str; 4] = ["/tmp", "/run", "/dev/shm", "/dev/hugepages"];

pub(crate) fn take() -> io::Result<Inventory> {
    let mut inventory = Inventory {
        processes: processes()?,
        dax_devices: dax_devices(),
        pci_devices: pci_devices(),
        mounts: lines("/proc/mounts")?,
        locks: lines("/proc/locks")?
            .iter()
            .map(|line| without_index(line))
            .collect(),
        files: TEMPORARY
            .iter()
            .flat_map(|directory| children(directory))
            .collect(),
        huge_pages: huge_pages(),
    };
    for list in [
        &mut inventory.processes,
        &mut inventory.dax_devices,
        &mut inventory.pci_devices,
        &mut inventory.mounts,
        &mut inventory.locks,
        &mut inventory.files,
        &mut inventory.huge_pages,
    ] {
        list.sort();
    }
    Ok(inventory)
}

/// The kernel's threads have no command line; the agent and its parent run this program.
fn processes() -> io::Result<Vec<String>> {
    let own = fs::read_link("/proc/self/exe")?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // A process that ends meanwhile is none to report.
        let Ok(command) = fs::read(path.join("cmdline")) else {
            continue;
        };
        let agent = fs::read_link(path.join("exe")).is_ok_and(|exe| exe == own);
        if !command.is_empty() && !agent {
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            found.push(format!("{pid} {}", command.trim_end()));
        }
    }
    Ok(found)
}

fn dax_devices() -> Vec<String> {
    let entries = fs::read_dir("/sys/bus/dax/devices")
        .into_iter()
        .flatten()
        .flatten();
    let describe = |entry: fs::DirEntry| {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let driver = driver_of(&path);
        let node = fs::metadata(Path::new("/dev").join(&name));
        let mode = node.map_or("no node".to_owned(), |node| {
            format!("mode {:o} uid {}", node.mode() & 0o7777, node.uid())
        });
        format!(
            "{name} driver {driver} size {} align {} {mode}",
            word(&path, "size"),
            word(&path, "align")
        )
    };
    entries.map(describe).collect()
}

fn pci_devices() -> Vec<String> {
    let entries = fs::read_dir("/sys/bus/pci/devices")
        .into_iter()
        .flatten()
        .flatten();
    let describe = |entry: fs::DirEntry| {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let kept_for = word(&path, "driver_override");
        format!("{name} driver {} override {kept_for}", driver_of(&path))
    };
    entries.map(describe).collect()
}

fn driver_of(device: &Path) -> String {
    let driver = fs::read_link(device.join("driver")).ok();
    let name = driver.as_deref().and_then(Path::file_name);
    name.map_or("none".to_owned(), |name| {
        name.to_string_lossy().into_owned()
    })
}

fn huge_pages() -> Vec<String> {
    let sizes = fs::read_dir("/sys/kernel/mm/hugepages")
        .into_iter()
        .flatten()
        .flatten();
    let describe = |entry: fs::DirEntry| {
        let (name, path) = (
            entry.file_name().to_string_lossy().into_owned(),
            entry.path(),
        );
        format!(
            "{name} reserved {} free {}",
            word(&path, "nr_hugepages"),
            word(&path, "free_hugepages")
        )
    };
    sizes.map(describe).collect()
}

fn children(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path().display().to_string())
        .collect()
}

fn word(directory: &Path, name: &str) -> String {
    fs::read_to_string(directory.join(name))
        .map_or_else(|error| error.to_string(), |text| text.trim().to_owned())
}

fn lines(path: &str) -> io::Result<Vec<String>> {
    Ok(fs::read_to_string(path)?
        .lines()
        .map(str::to_owned)
        .collect())
}

/// A line of `/proc/locks` starts with its place in the list.
fn without_index(line: &str) -> String {
    line.split_once(": ")
        .map_or(line, |(_, lock)| lock)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_process_is_seen() {
        use std::io::{Read, Write};
        use std::process::Stdio;
        let mut child = std::process::Command::new("cat")
            .arg("-")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Its command line is not there yet when `spawn` returns; once it has answered, it is.
        let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        to.write_all(b"x").unwrap();
        from.read_exact(&mut [0]).unwrap();
        let wanted = format!("{} cat -", child.id());
        let seen = take().unwrap().processes.contains(&wanted);
        drop(to);
        child.wait().unwrap();
        assert!(seen, "{wanted}");
    }

    #[test]
    fn locks_are_compared_without_their_place() {
        assert_eq!(
            without_index("3: OFDLCK ADVISORY WRITE -1 00:06:9 0 EOF"),
            "OFDLCK ADVISORY WRITE -1 00:06:9 0 EOF"
        );
    }
}
