//! The commands that a guest answers. Each takes words and gives JSON, or a message that says what is wrong.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use lab_agent::guest_protocol::{ExecReport, MemInfo, NumaNode};
use rustix::system::{RebootCommand, reboot};
use serde_json::{Value, json};

use super::{
    bandwidth, block, edu, hostile, interrupts, kernel_log, modules, pattern, pci, persist,
    reads::Reads, vsock,
};
use crate::sockets::{self, Sender};
use crate::{memory, wait};

const HELP: &str = "ping | help | meminfo | cpus | cat PATH | dmesg | pattern BYTES|all | physwrite ADDRESS BYTES SEED | \
                    physread ADDRESS BYTES SEED | rtc | numa | iomem | exec WORD... | sh SCRIPT | \
                    modprobe NAME... | interrupts BDF | edu-dma BDF HOME TARGET... | edu-interrupts BDF COUNT | \
                    await PATH SECONDS | await-gone PATH SECONDS | pci | persist PATH SEED append|map COUNT | \
                    persist-check PATH SEED | blkwrite PATH OFFSET BYTES SEED | blkread PATH OFFSET BYTES SEED | \
                    blkzero PATH OFFSET BYTES | blkmap PATH BYTES FILE SEED | pci-move BDF ADDRESS | \
                    iops PATH SECONDS DEPTH | stream PATH SECONDS DEPTH BYTES | bandwidth WHAT PATH BYTES SECONDS | tcp-echo PORT | tcp-send ADDRESS BYTES | \
                    tcp-receive ADDRESS BYTES | tcp-return ADDRESS BYTES SEED | vsock-echo PORT | vsock-ask PORT TEXT | hostile CASE BDF MEMORY | shell | \
                    poweroff | reboot | halt | triple-fault | panic";

/// Left free by `pattern all`, so that the kernel itself can go on.
const PATTERN_MARGIN_BYTES: u64 = 32 * 1024 * 1024;

pub(crate) fn run(words: &[&str]) -> Result<Value, String> {
    match *words {
        ["ping"] => Ok(json!({})),
        ["help"] => Ok(json!(HELP)),
        ["meminfo"] => to_json(&meminfo()?),
        ["cpus"] => Ok(json!({ "online": count_cpus(&read("/sys/devices/system/cpu/online")?)? })),
        ["cat", path] => Ok(json!(read(path)?)),
        ["iomem"] => Ok(json!(read("/proc/iomem")?)),
        ["dmesg"] => to_json(
            &kernel_log::problems().map_err(|error| format!("cannot read /dev/kmsg: {error}"))?,
        ),
        ["pattern", "all"] => to_json(&pattern::check(
            meminfo()?
                .available_bytes
                .saturating_sub(PATTERN_MARGIN_BYTES),
        )?),
        ["pattern", bytes] => to_json(&pattern::check(number(bytes)?)?),
        ["physwrite", address, bytes, seed] => {
            memory::Physical::map(number(address)?, number(bytes)?, true)?.fill(number(seed)?);
            Ok(json!({}))
        }
        ["physread", address, bytes, seed] => to_json(
            &memory::Physical::map(number(address)?, number(bytes)?, false)?.compare(number(seed)?),
        ),
        ["rtc"] => Ok(json!({
            "since_epoch": read("/sys/class/rtc/rtc0/since_epoch")?.trim().parse::<u64>().map_err(|e| e.to_string())?,
        })),
        ["numa"] => to_json(&numa_nodes()?),
        ["exec", program, ref arguments @ ..] => exec(program, arguments),
        ["sh", ref script @ ..] => exec("sh", &["-c", &script.join(" ")]),
        ["modprobe", ref names @ ..] => {
            names.iter().try_for_each(|name| modules::load(name))?;
            Ok(json!({}))
        }
        ["pci"] => to_json(&pci::list()?),
        ["interrupts", address] => to_json(&interrupts::count(address)?),
        ["edu-dma", address, home, ref targets @ ..] => {
            to_json(&edu::dma(address, number(home)?, targets)?)
        }
        ["edu-interrupts", address, count] => to_json(&edu::interrupts(address, narrow(count)?)?),
        ["persist", path, seed, how, count] => {
            let how = persist::How::parse(how)?;
            let (seed, count) = (number(seed)?, number(count)?);
            persist::write(path, seed, how, count, persist::acknowledge)?;
            Ok(json!({}))
        }
        ["persist-check", path, seed] => to_json(&persist::check(path, number(seed)?)?),
        ["blkwrite", path, offset, bytes, seed] => {
            block::fill(path, number(offset)?, number(bytes)?, number(seed)?)?;
            Ok(json!({}))
        }
        ["blkread", path, offset, bytes, seed] => to_json(&block::compare(
            path,
            number(offset)?,
            number(bytes)?,
            number(seed)?,
        )?),
        ["blkzero", path, offset, bytes] => {
            block::zero(path, number(offset)?, number(bytes)?)?;
            Ok(json!({}))
        }
        ["blkmap", path, bytes, file, seed] => to_json(&block::read_into(
            path,
            number(bytes)?,
            file,
            number(seed)?,
        )?),
        ["pci-move", address, to] => {
            hostile::move_bar(address, number(to)?)?;
            Ok(json!({}))
        }
        ["iops", path, seconds, depth] => {
            to_json(&Reads::random(narrow(depth)?).measure(path, number(seconds)?)?)
        }
        ["stream", path, seconds, depth, bytes] => {
            let reads = Reads::sequential(narrow(depth)?, narrow(bytes)?);
            to_json(&reads.measure(path, number(seconds)?)?)
        }
        ["bandwidth", what, path, bytes, seconds] => to_json(&bandwidth::measure(
            what,
            path,
            number(bytes)?,
            number(seconds)?,
        )?),
        ["tcp-echo", port] => {
            sockets::serve_tcp_echo(narrow(port)?)?;
            Ok(json!({}))
        }
        ["tcp-send", address, bytes] => {
            to_json(&sockets::transfer(address, Sender::Client, number(bytes)?)?)
        }
        ["tcp-receive", address, bytes] => {
            to_json(&sockets::transfer(address, Sender::Server, number(bytes)?)?)
        }
        ["tcp-return", address, bytes, seed] => to_json(&sockets::there_and_back(
            address,
            number(bytes)?,
            number(seed)?,
        )?),
        ["vsock-echo", port] => {
            vsock::serve_echo(narrow(port)?)?;
            Ok(json!({}))
        }
        ["vsock-ask", port, text] => Ok(json!(vsock::ask(narrow(port)?, text)?)),
        ["hostile", case, address, memory] => {
            to_json(&hostile::run(case, address, number(memory)?)?)
        }
        ["await", path, seconds] => await_path(path, seconds, true),
        ["await-gone", path, seconds] => await_path(path, seconds, false),
        ["shell"] => shell(),
        ["poweroff"] => leave(RebootCommand::PowerOff),
        ["reboot"] => leave(RebootCommand::Restart),
        ["halt"] => leave(RebootCommand::Halt),
        ["triple-fault"] => {
            // The kernel's own way to shut a processor down when nothing else resets it.
            write("/sys/kernel/reboot/type", "triple")?;
            leave(RebootCommand::Restart)
        }
        ["panic"] => {
            write("/proc/sysrq-trigger", "c")?;
            Err("the kernel did not panic".to_owned())
        }
        _ => Err(format!(
            "unknown command or wrong arguments: {words:?}; commands: {HELP}"
        )),
    }
}

fn to_json<T: serde::Serialize>(value: &T) -> Result<Value, String> {
    serde_json::to_value(value).map_err(|error| error.to_string())
}

fn read(path: &str) -> Result<String, String> {
    let bytes = fs::read(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn write(path: &str, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("cannot write {path}: {error}"))
}

/// A number that has to fit a type.
fn narrow<T: TryFrom<u64>>(word: &str) -> Result<T, String> {
    T::try_from(number(word)?).map_err(|_| format!("too large: {word}"))
}

/// Decimal, or hexadecimal after `0x`.
pub(super) fn number(word: &str) -> Result<u64, String> {
    let parsed = match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => word.parse(),
    };
    parsed.map_err(|_| format!("not a number: {word}"))
}

pub(crate) fn meminfo() -> Result<MemInfo, String> {
    let text = read("/proc/meminfo")?;
    let bytes =
        |name: &str| field_kib(&text, name).ok_or_else(|| format!("/proc/meminfo has no {name}"));
    Ok(MemInfo {
        total_bytes: bytes("MemTotal:")?,
        free_bytes: bytes("MemFree:")?,
        available_bytes: bytes("MemAvailable:")?,
    })
}

/// The value behind `name`, which the kernel gives in KiB, in bytes.
fn field_kib(text: &str, name: &str) -> Option<u64> {
    let mut words = text
        .lines()
        .find(|line| line.contains(name))?
        .split_whitespace();
    words.find(|word| *word == name)?;
    Some(words.next()?.parse::<u64>().ok()? * 1024)
}

/// Counts the processors of a list such as `0-2,5`.
fn count_cpus(list: &str) -> Result<u32, String> {
    let mut count = 0;
    for part in list.trim().split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let parse = |word: &str| {
            word.parse::<u32>()
                .map_err(|_| format!("not a list of processors: {list}"))
        };
        count += parse(to)?
            .checked_sub(parse(from)?)
            .ok_or("a range runs backwards")?
            + 1;
    }
    Ok(count)
}

fn numa_nodes() -> Result<Vec<NumaNode>, String> {
    let root = "/sys/devices/system/node";
    let entries = fs::read_dir(root).map_err(|error| format!("cannot list {root}: {error}"))?;
    let mut nodes = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(node) = name
            .strip_prefix("node")
            .and_then(|digits| digits.parse().ok())
        else {
            continue;
        };
        let distances = read(&format!("{root}/{name}/distance"))?;
        let memory = read(&format!("{root}/{name}/meminfo"))?;
        nodes.push(NumaNode {
            node,
            cpus: read(&format!("{root}/{name}/cpulist"))?.trim().to_owned(),
            distances: distances
                .split_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect(),
            total_bytes: field_kib(&memory, "MemTotal:")
                .ok_or_else(|| format!("{name} has no MemTotal"))?,
        });
    }
    nodes.sort_by_key(|node| node.node);
    Ok(nodes)
}

fn exec(program: &str, arguments: &[&str]) -> Result<Value, String> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", "/bin")
        .stdin(Stdio::null());
    let output = command
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    to_json(&ExecReport {
        status: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn await_path(path: &str, seconds: &str, wanted: bool) -> Result<Value, String> {
    wait::for_path(path, Duration::from_secs(number(seconds)?), wanted)?;
    Ok(json!({}))
}

/// For a person at the console; `exit` comes back here.
fn shell() -> Result<Value, String> {
    let status = Command::new("/bin/busybox")
        .arg("sh")
        .env("PATH", "/bin")
        .status();
    status
        .map(|status| json!(status.to_string()))
        .map_err(|error| format!("cannot run a shell: {error}"))
}

fn leave(how: RebootCommand) -> Result<Value, String> {
    rustix::fs::sync();
    reboot(how).map_err(|error| format!("cannot leave: {error}"))?;
    Ok(json!({}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_counted() {
        assert_eq!(count_cpus("0\n"), Ok(1));
        assert_eq!(count_cpus("0-3,6,8-9"), Ok(7));
        assert!(count_cpus("3-1").is_err());
        assert!(count_cpus("none").is_err());
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("4096"), Ok(4096));
        assert_eq!(number("0x10"), Ok(16));
        assert!(number("ten").is_err());
    }

    #[test]
    fn memory_fields_are_found_in_both_forms() {
        assert_eq!(
            field_kib("MemTotal:  8 kB\nMemFree: 4 kB\n", "MemFree:"),
            Some(4096)
        );
        assert_eq!(
            field_kib("Node 0 MemTotal:  8 kB\n", "MemTotal:"),
            Some(8192)
        );
        assert_eq!(field_kib("Node 0 MemTotal:  8 kB\n", "MemFree:"), None);
    }

    #[test]
    fn an_unknown_command_names_the_known_ones() {
        let message = run(&["format"]).unwrap_err();
        assert!(
            message.contains("format") && message.contains("meminfo"),
            "{message}"
        );
    }
}
