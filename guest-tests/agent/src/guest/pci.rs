//! What the guest's kernel knows of its PCI functions.

use std::fs;
use std::path::Path;

use lab_agent::guest_protocol::{PciBar, PciFunction};

pub(crate) const DEVICES: &str = "/sys/bus/pci/devices";

/// Every function, by address.
pub(crate) fn list() -> Result<Vec<PciFunction>, String> {
    // A kernel without any has no such directory, or an empty one.
    let entries = fs::read_dir(DEVICES).into_iter().flatten().flatten();
    let mut functions = entries
        .map(|entry| describe(&entry.path()))
        .collect::<Result<Vec<_>, _>>()?;
    functions.sort_by(|one, other| one.address.cmp(&other.address));
    Ok(functions)
}

fn describe(path: &Path) -> Result<PciFunction, String> {
    let text = |name: &str| {
        let path = path.join(name);
        fs::read_to_string(&path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let number = |name: &str| parse_hex(&text(name)?).ok_or(format!("{name} is no number"));
    let narrow = |number: u64| u16::try_from(number).map_err(|error| error.to_string());
    let driver = fs::read_link(path.join("driver")).ok();
    let name = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    Ok(PciFunction {
        address: name(path).unwrap_or_default(),
        id: (narrow(number("vendor")?)?, narrow(number("device")?)?),
        class: u32::try_from(number("class")?).map_err(|error| error.to_string())?,
        driver: driver.as_deref().and_then(name),
        bars: parse_resources(&text("resource")?),
        vectors: fs::read_dir(path.join("msi_irqs")).map_or(0, Iterator::count),
    })
}

/// Lines of `START END FLAGS`, one for each BAR in order; the first six are BARs, the seventh the ROM.
pub(crate) fn parse_resources(text: &str) -> Vec<PciBar> {
    let parse = |(index, line): (usize, &str)| {
        let mut words = line.split_whitespace().map(parse_hex);
        let (start, end, flags) = (words.next()??, words.next()??, words.next()??);
        (end > 0).then_some(PciBar {
            index,
            start,
            end,
            flags,
        })
    };
    text.lines().take(7).enumerate().filter_map(parse).collect()
}

fn parse_hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.trim().strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_keep_their_numbers() {
        let text = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x00000000c0000000 0x00000000c007ffff 0x0000000000140204\n";
        let expected = PciBar {
            index: 1,
            start: 0xc000_0000,
            end: 0xc007_ffff,
            flags: 0x14_0204,
        };
        assert_eq!(parse_resources(text), [expected]);
    }
}
