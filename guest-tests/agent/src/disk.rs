//! A frontend of a vhost-user disk, without a guest: `lab-agent disk SOCKET`.
//!
//! Takes a line at a time: `write SECTOR BYTE`, `read SECTOR`, `zero SECTOR`, `discard SECTOR`, `flush`; what is moved is 64K, of
//! one byte. Answers with the line and the status that the disk gave, and after `read` with the byte, or `mixed`. `reads SECTOR
//! BYTE` and `writes SECTOR BYTE` go on until one fails; a read that is said to be well and is not of this byte ends the program.

use std::io;
use std::path::Path;

use virtio_bindings::virtio_blk as spec;

use driver::Driver;

#[path = "../../../backends/vhost-user-blk/tests/driver/frontend.rs"]
#[allow(dead_code, reason = "the daemon's own tests need more of it")]
mod driver;

const LEN: u32 = 64 << 10;

/// Until the input ends. A daemon that does not answer as it should is a panic.
pub(crate) fn run(socket: &str) -> Result<(), String> {
    let mut driver = Driver::connect(Path::new(socket), 1);
    println!("connected");
    for line in io::stdin().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |word: &str| {
            word.parse::<u64>()
                .map_err(|_| format!("`{word}` in `{line}`"))
        };
        let answer = match words[..] {
            ["write", sector, byte] => {
                let byte = u8::try_from(number(byte)?).map_err(|_| line.clone())?;
                let bytes = vec![byte; LEN as usize];
                driver.write(0, number(sector)?, &bytes).to_string()
            }
            ["read", sector] => {
                let (status, bytes) = driver.read(0, number(sector)?, LEN);
                let all = bytes.iter().all(|byte| *byte == bytes[0]);
                let byte = if all {
                    bytes[0].to_string()
                } else {
                    "mixed".into()
                };
                format!("{status} {byte}")
            }
            ["reads", sector, byte] => {
                let (sector, byte) = (number(sector)?, number(byte)?);
                loop {
                    let (status, bytes) = driver.read(0, sector, LEN);
                    if status != 0 {
                        break status.to_string();
                    }
                    if let Some(other) = bytes.iter().find(|it| u64::from(**it) != byte) {
                        return Err(format!("{line}: a byte is {other}"));
                    }
                }
            }
            ["writes", sector, byte] => {
                let byte = u8::try_from(number(byte)?).map_err(|_| line.clone())?;
                let (sector, bytes) = (number(sector)?, vec![byte; LEN as usize]);
                loop {
                    let status = driver.write(0, sector, &bytes);
                    if status != 0 {
                        break status.to_string();
                    }
                }
            }
            ["zero", sector] => {
                let kind = spec::VIRTIO_BLK_T_WRITE_ZEROES;
                driver
                    .range(0, kind, number(sector)?, LEN / 512)
                    .to_string()
            }
            ["discard", sector] => {
                let kind = spec::VIRTIO_BLK_T_DISCARD;
                driver
                    .range(0, kind, number(sector)?, LEN / 512)
                    .to_string()
            }
            ["flush"] => driver.flush(0).to_string(),
            _ => return Err(format!("no such request: `{line}`")),
        };
        println!("{line}: {answer}");
    }
    Ok(())
}
