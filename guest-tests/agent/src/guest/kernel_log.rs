//! What the kernel has complained about since it started.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use lab_agent::guest_protocol::LogRecord;
use rustix::fs::OFlags;

/// Levels up to this one are complaints: warnings and worse.
const WARNING: u8 = 4;

/// The records of warnings and worse, oldest first.
pub(crate) fn problems() -> io::Result<Vec<LogRecord>> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open("/dev/kmsg")?;
    let mut records = Vec::new();
    // The kernel hands out one whole record for each read.
    let mut record = vec![0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(0) => return Ok(records),
            Ok(length) => {
                let text = String::from_utf8_lossy(&record[..length]);
                records.extend(parse(&text).filter(|record| record.level <= WARNING));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(records),
            // Records were overwritten before they were read: the next read goes on after the gap.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Parses `PRIORITY,SEQUENCE,TIME,FLAGS;TEXT`; lines after the first describe the device.
fn parse(record: &str) -> Option<LogRecord> {
    let (head, text) = record.lines().next()?.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    Some(LogRecord {
        level: u8::try_from(priority & 7).ok()?,
        text: text.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_and_text_are_read() {
        let record = parse("12,339,5140900,-;NOTE: it; broke\n SUBSYSTEM=acpi\n").unwrap();
        assert_eq!(
            record,
            LogRecord {
                level: 4,
                text: "NOTE: it; broke".into()
            }
        );
        assert_eq!(parse("garbage"), None);
    }
}
