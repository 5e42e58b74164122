//! Which held devices an opener means.
//!
//! A file that is one device's says it. A driver's `unbind` does not: the name comes with a write that the guard never
//! sees. Then the opener's arguments have to tell, and they do for the tools by which people take memory away: daxctl,
//! ndctl and cxl, and a shell with `-c`. What can't be told is [`Target::Unknown`], never a guess: a script file, an
//! interactive shell, `tee`, a program that uses the tools' libraries, a script that computes names.
//!
//! The answer may name more than will be taken (`all`, several names in one script), never less, unless the opener's
//! arguments lie.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use crate::lineage::{DeviceName, Lineage};
use crate::watched::{ToldBy, WatchedFile};

/// What an opener means, of what is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// These devices.
    Devices(BTreeSet<DeviceName>),
    /// Something that nobody holds.
    Others,
    /// Any of these, or nothing of it.
    Unknown(BTreeSet<DeviceName>),
}

/// Resolves the target of an opener with these arguments. `is_device` says whether a name is some device's.
pub(crate) fn resolve(
    file: &WatchedFile,
    held: &[&Lineage],
    arguments: &[String],
    is_device: &dyn Fn(&str) -> bool,
) -> Target {
    let threatened: Vec<&Lineage> = held
        .iter()
        .copied()
        .filter(|lineage| file.threatens.contains(&lineage.device))
        .collect();
    let names = |lineages: &[&Lineage]| -> BTreeSet<DeviceName> {
        lineages.iter().map(|it| it.device.clone()).collect()
    };
    if threatened.is_empty() {
        return Target::Others;
    }
    if file.told_by == ToldBy::Path {
        return Target::Devices(names(&threatened));
    }
    let meant = match Words::of(arguments) {
        Words::Tool(words) => words.meant(&threatened, is_device),
        Words::Script(text) => meant_by_script(text, &threatened, is_device),
        Words::Opaque => None,
    };
    match meant {
        Some(meant) if meant.is_empty() => Target::Others,
        Some(meant) => Target::Devices(names(&meant)),
        None => Target::Unknown(names(&threatened)),
    }
}

/// The arguments of a process, as far as they are understood.
enum Words<'a> {
    Tool(ToolWords<'a>),
    Script(&'a str),
    Opaque,
}

impl<'a> Words<'a> {
    fn of(arguments: &'a [String]) -> Self {
        let base = |word: &'a str| word.rsplit('/').next().unwrap_or(word);
        let mut words = arguments.iter().map(String::as_str);
        let Some(mut program) = words.next().map(base) else {
            return Self::Opaque;
        };
        if program == "busybox" {
            match words.next() {
                Some(applet) => program = applet,
                None => return Self::Opaque,
            }
        }
        // A login shell's name begins with a dash.
        match program.trim_start_matches('-') {
            "daxctl" | "ndctl" | "cxl" => ToolWords::parse(words).map_or(Self::Opaque, Self::Tool),
            "sh" | "ash" | "dash" | "bash" | "ksh" | "mksh" | "zsh" => {
                script(words).map_or(Self::Opaque, Self::Script)
            }
            _ => Self::Opaque,
        }
    }
}

/// The script after a shell's `-c`.
fn script<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut takes_script = false;
    loop {
        let word = words.next()?;
        match word.strip_prefix(['-', '+']) {
            // `-o OPTION`, `-O OPTION`
            Some("o" | "O" | "-rcfile" | "-init-file") => drop(words.next()?),
            Some(flags) => takes_script |= !flags.starts_with('-') && flags.contains('c'),
            None if takes_script => return Some(word),
            None => return None,
        }
    }
}

/// What a tool was told: which objects, and within what.
#[derive(Default)]
struct ToolWords<'a> {
    objects: Vec<&'a str>,
    regions: Vec<&'a str>,
    buses: Vec<&'a str>,
}

/// Options that narrow `all` down to what belongs to something.
const REGIONS: [&str; 6] = ["-r", "--region", "-d", "--decoder", "--dimm", "--port"];
const BUSES: [&str; 2] = ["-b", "--bus"];
/// Options whose value is the object.
const OBJECTS: [&str; 2] = ["-e", "--reconfig"];
/// Options whose value is something else.
const VALUES: [&str; 24] = [
    "-m",
    "--mode",
    "-s",
    "--size",
    "-a",
    "--align",
    "-t",
    "--type",
    "-u",
    "--uuid",
    "-n",
    "--name",
    "-M",
    "--map",
    "-l",
    "--sector-size",
    "-i",
    "--input",
    "-w",
    "--ways",
    "-g",
    "--granularity",
    "-c",
    "--cpu",
];

impl<'a> ToolWords<'a> {
    /// `None` when an option has no value.
    fn parse(mut words: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut parsed = Self::default();
        // The command: disable-device, destroy-namespace and the like. Whatever it is, it is about to write.
        words.next()?;
        while let Some(word) = words.next() {
            if !word.starts_with('-') {
                parsed.objects.push(word);
                continue;
            }
            let (option, value) = match word.split_once('=') {
                Some((option, value)) => (option, Some(value)),
                // `-r0`
                None if !word.starts_with("--") && word.len() > 2 && word.is_char_boundary(2) => {
                    (&word[..2], Some(&word[2..]))
                }
                None => (word, None),
            };
            let into = if REGIONS.contains(&option) {
                &mut parsed.regions
            } else if BUSES.contains(&option) {
                &mut parsed.buses
            } else if OBJECTS.contains(&option) {
                &mut parsed.objects
            } else {
                if VALUES.contains(&option) && value.is_none() {
                    words.next()?;
                }
                continue;
            };
            match value {
                Some(value) => into.push(value),
                None => into.push(words.next()?),
            }
        }
        Some(parsed)
    }

    fn meant<'h>(
        &self,
        held: &[&'h Lineage],
        is_device: &dyn Fn(&str) -> bool,
    ) -> Option<Vec<&'h Lineage>> {
        let is_all = |word: &str| word == "all" || word == "any";
        let is_known = |word: &str| {
            let word = word.strip_prefix("/dev/").unwrap_or(word);
            is_all(word)
                || held.iter().any(|lineage| lineage.answers_to_tool(word))
                || is_device(word)
        };
        if !self.objects.iter().all(|word| is_known(word)) {
            return None;
        }
        let is_object = |lineage: &Lineage| {
            self.objects.is_empty()
                || self
                    .objects
                    .iter()
                    .any(|word| is_all(word) || lineage.answers_to_tool(word))
        };
        // A filter that is not understood must not narrow anything down.
        let narrows = |word: &str| !is_all(word) && is_known(word);
        let is_bus = |word: &str| held.iter().any(|lineage| lineage.is_on_bus(word));
        let passes = |lineage: &Lineage| {
            let mut regions = self.regions.iter().filter(|word| narrows(word));
            let mut buses = self.buses.iter();
            regions.all(|word| lineage.answers_to_tool(word))
                && buses.all(|word| lineage.is_on_bus(word) || !(is_bus(word) || narrows(word)))
        };
        let meant = held.iter().copied();
        Some(meant.filter(|it| is_object(it) && passes(it)).collect())
    }
}

/// What makes a script's words depend on something else than the script.
const COMPUTED: [char; 8] = ['$', '`', '*', '?', '[', '{', '<', '\\'];

fn meant_by_script<'h>(
    text: &str,
    held: &[&'h Lineage],
    is_device: &dyn Fn(&str) -> bool,
) -> Option<Vec<&'h Lineage>> {
    let is_separator = |c: char| !(c.is_ascii_alphanumeric() || "._:-/".contains(c));
    // Paths say where to write, not what.
    let words: Vec<&str> = text
        .split(is_separator)
        .map(|word| word.strip_prefix("/dev/").unwrap_or(word))
        .filter(|word| !word.is_empty() && !word.contains('/'))
        .collect();
    let is_meant = |lineage: &&&Lineage| words.iter().any(|word| lineage.answers_to(word));
    let meant: Vec<&Lineage> = held.iter().filter(is_meant).copied().collect();
    let computes = text.contains(COMPUTED);
    if computes && meant.len() < held.len() {
        return None;
    }
    let names_something = !meant.is_empty() || words.iter().any(|word| is_device(word));
    names_something.then_some(meant)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeHost;

    /// dax0.0, dax1.0 and dax2.0 exist; the first two are held.
    fn target(arguments: &[&str]) -> Target {
        let host = FakeHost::new();
        for n in 0..3 {
            host.add_pmem(n);
        }
        let lineages = [host.lineage("dax0.0"), host.lineage("dax1.0")];
        let file = WatchedFile {
            told_by: ToldBy::Writer,
            threatens: lineages.iter().map(|it| it.device.clone()).collect(),
        };
        let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        let held: Vec<&Lineage> = lineages.iter().collect();
        resolve(&file, &held, &arguments, &|name| {
            host.host().has_device(name)
        })
    }

    fn names(names: &[&str]) -> BTreeSet<DeviceName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn devices(of: &[&str]) -> Target {
        Target::Devices(names(of))
    }

    fn line(text: &str) -> Target {
        target(&text.split(' ').collect::<Vec<_>>())
    }

    fn sh(script: &str) -> Target {
        target(&["sh", "-c", script])
    }

    fn unknown() -> Target {
        Target::Unknown(names(&["dax0.0", "dax1.0"]))
    }

    #[test]
    fn the_tools_say_what_they_mean() {
        for (text, meant) in [
            ("daxctl disable-device dax1.0", "dax1.0"),
            (
                "/usr/bin/daxctl reconfigure-device -m system-ram dax1.0",
                "dax1.0",
            ),
            (
                "daxctl reconfigure-device --mode=system-ram --no-online /dev/dax1.0",
                "dax1.0",
            ),
            ("daxctl disable-device -r 0 all", "dax0.0"),
            ("ndctl disable-region -b 0 1", "dax1.0"),
            ("ndctl disable-namespace namespace1.0", "dax1.0"),
            ("ndctl destroy-namespace -f 1.0", "dax1.0"),
            ("ndctl destroy-namespace -f -r region1 all", "dax1.0"),
            ("ndctl disable-namespace --region=1 all", "dax1.0"),
            ("ndctl disable-region region1", "dax1.0"),
            ("ndctl disable-region 1", "dax1.0"),
            (
                "ndctl create-namespace -f -e namespace1.0 -m fsdax -M mem",
                "dax1.0",
            ),
            (
                "ndctl create-namespace -f --reconfig=namespace1.0 --mode fsdax",
                "dax1.0",
            ),
        ] {
            assert_eq!(line(text), devices(&[meant]), "{text}");
        }
        for text in [
            "daxctl disable-device all",
            "daxctl reconfigure-device -m system-ram dax0.0 dax1.0",
            "ndctl disable-region all",
            "ndctl disable-region -b ndbus0 all",
            "ndctl disable-namespace -b ACPI.NFIT all",
            "ndctl destroy-namespace",
            // A filter that nothing is known of narrows nothing.
            "ndctl disable-namespace -r region9 all",
        ] {
            assert_eq!(line(text), devices(&["dax0.0", "dax1.0"]), "{text}");
        }
        for text in [
            "daxctl disable-device dax2.0",
            "ndctl destroy-namespace namespace2.0 -f",
            "ndctl disable-region region2",
            "ndctl disable-namespace -r region2 all",
        ] {
            assert_eq!(line(text), Target::Others, "{text}");
        }
        for text in [
            "daxctl disable-device dax9.9",
            "ndctl disable-region region2 nonsense",
            "daxctl",
            "ndctl x -r",
        ] {
            assert_eq!(line(text), unknown(), "{text}");
        }
    }

    #[test]
    fn a_shell_s_script_says_what_it_means() {
        for text in [
            "echo dax1.0 > /sys/bus/dax/drivers/device_dax/unbind",
            "echo 'dax1.0'>/sys/bus/dax/drivers/device_dax/unbind",
            "printf dax1.0 > unbind; echo dax2.0 > unbind",
            "echo region1 > /sys/bus/nd/drivers/nd_region/unbind",
        ] {
            assert_eq!(sh(text), devices(&["dax1.0"]), "{text}");
        }
        assert_eq!(
            sh("echo dax2.0 > /sys/bus/nd/devices/dax1.0/driver/unbind"),
            Target::Others
        );
        assert_eq!(
            sh("for d in dax0.0 dax1.0; do echo $d > unbind; done"),
            devices(&["dax0.0", "dax1.0"]),
        );
        for text in [
            "echo $1 > unbind",
            "echo dax1.0; echo $1 > unbind",
            "cat /tmp/name > unbind",
            "echo dax1*0 > unbind",
            "cat <names >unbind; echo dax2.0",
            "echo dax9.9 > unbind",
            ". /tmp/script",
        ] {
            assert_eq!(sh(text), unknown(), "{text}");
        }
        assert_eq!(
            target(&["/bin/busybox", "sh", "-ec", "echo dax1.0 >u"]),
            devices(&["dax1.0"])
        );
        assert_eq!(
            target(&["bash", "-o", "pipefail", "-c", "echo dax1.0 >u", "x"]),
            devices(&["dax1.0"])
        );
    }

    #[test]
    fn what_does_not_say_it_is_unknown() {
        for arguments in [
            &["bash"][..],
            &["-bash"],
            &["sh", "script.sh", "dax2.0"],
            &["bash", "--norc", "script-c", "dax2.0"],
            &["tee", "/sys/bus/dax/drivers/device_dax/unbind"],
            &["python3", "-c", "dax2.0"],
            &["busybox"],
            &[""],
            &[],
        ] {
            assert_eq!(target(arguments), unknown(), "{arguments:?}");
        }
    }

    #[test]
    fn a_file_of_one_device_needs_no_words() {
        let host = FakeHost::new();
        host.add_pmem(0);
        let lineage = host.lineage("dax0.0");
        let file = WatchedFile {
            told_by: ToldBy::Path,
            threatens: vec![lineage.device.clone()],
        };
        let none = |_: &str| false;
        assert_eq!(
            resolve(&file, &[&lineage], &[], &none),
            devices(&["dax0.0"])
        );
        assert_eq!(resolve(&file, &[], &[], &none), Target::Others);
    }
}
