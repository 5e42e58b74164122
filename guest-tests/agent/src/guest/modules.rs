//! Loads kernel modules by name, from the lists that the initramfs brings: one for each name, the files to load in order.
//!
//! The kernel resolves no names by itself here, since there is no modprobe for it to call. As modprobe does, a module is given the
//! parameters that the kernel's command line has for it (`NAME.PARAMETER=VALUE`); what is built in has read them itself.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::Path;

use rustix::io::Errno;
use rustix::system::finit_module;

const INDEX: &str = "/etc/lab/modprobe";

/// Loads a module and what it depends on; nothing is done for what is built in or loaded already.
pub(crate) fn load(name: &str) -> Result<(), String> {
    let list = fs::read_to_string(Path::new(INDEX).join(name)).map_err(|error| {
        format!(
            "this initramfs has no module {name}: {error}; it has {}",
            names()
        )
    })?;
    let cmdline = fs::read_to_string("/proc/cmdline")
        .map_err(|error| format!("cannot read /proc/cmdline: {error}"))?;
    for path in list.lines() {
        let stem = Path::new(path).file_stem().unwrap_or_default();
        let parameters = parameters_of(&stem.to_string_lossy(), &cmdline);
        let parameters = CString::new(parameters).map_err(|error| error.to_string())?;
        let file = File::open(path).map_err(|error| format!("cannot open {path}: {error}"))?;
        match finit_module(&file, &parameters, 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(format!("cannot load {path}: {error}")),
        }
    }
    Ok(())
}

/// A module's name may be written with either kind of dash.
fn parameters_of(module: &str, cmdline: &str) -> String {
    let own = |word: &str| {
        let (name, parameter) = word.split_once('.')?;
        (name.replace('-', "_") == module.replace('-', "_")).then(|| parameter.to_owned())
    };
    let found: Vec<String> = cmdline.split_whitespace().filter_map(own).collect();
    found.join(" ")
}

fn names() -> String {
    let entries = fs::read_dir(INDEX).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_has_parameters_for_modules() {
        let cmdline = "console=ttyS0 e1000e.IntMode=1 kvm-amd.npt=0 e1000e.debug=4\n";
        assert_eq!(parameters_of("e1000e", cmdline), "IntMode=1 debug=4");
        assert_eq!(parameters_of("kvm_amd", cmdline), "npt=0");
        assert_eq!(parameters_of("nvme", cmdline), "");
    }
}
