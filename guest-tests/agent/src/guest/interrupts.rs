//! How a PCI function interrupts the guest, and how often it has.

use std::fs;

use lab_agent::guest_protocol::{InterruptKind, InterruptReport};

use super::pci::DEVICES;

/// What the function's driver has been told so far. Of a wire that is shared, all that has come on it.
pub(crate) fn count(address: &str) -> Result<InterruptReport, String> {
    let read = |path: &str| {
        fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
    };
    let root = format!("{DEVICES}/{address}");
    let mut kind = InterruptKind::IntX;
    let mut numbers = Vec::new();
    for entry in fs::read_dir(format!("{root}/msi_irqs"))
        .into_iter()
        .flatten()
        .flatten()
    {
        numbers.push(entry.file_name().to_string_lossy().into_owned());
        kind = match read(&entry.path().to_string_lossy())?.trim() {
            "msix" => InterruptKind::MsiX,
            _ => InterruptKind::Msi,
        };
    }
    if numbers.is_empty() {
        numbers.push(read(&format!("{root}/irq"))?.trim().to_owned());
    }
    let table = read("/proc/interrupts")?;
    let count = numbers
        .iter()
        .filter_map(|number| sum(&table, number))
        .sum();
    Ok(InterruptReport { kind, count })
}

/// The sum of an interrupt's numbers for all processors; nothing when nobody handles it.
fn sum(table: &str, number: &str) -> Option<u64> {
    let label = format!("{number}:");
    let line = table
        .lines()
        .find(|line| line.split_whitespace().next() == Some(&label))?;
    let counts = line
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse::<u64>().ok());
    Some(counts.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_added() {
        let table = "           CPU0       CPU1       \n  4:         10          0  IO-APIC   4-edge      ttyS0\n\
                     \x2024:          3          4  PCI-MSI 65536-edge      nvme0q0\n";
        assert_eq!(sum(table, "24"), Some(7));
        assert_eq!(sum(table, "4"), Some(10));
        assert_eq!(sum(table, "5"), None);
    }
}
