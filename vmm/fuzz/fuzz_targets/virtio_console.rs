//! A hostile driver of the console, and a client that comes, types and goes: the device lives, and the host's side is
//! back when the driver has ended.

#![no_main]

mod moves;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use daxhund::config::ConsoleConfig;
use daxhund::devices::console::Console;
use daxhund::virtio::console::ConsoleDevice;
use libfuzzer_sys::fuzz_target;
use moves::Moves;

fn path() -> PathBuf {
    std::env::temp_dir().join(format!("daxhund-fuzz-console-{}", std::process::id()))
}

/// One console for all runs; it goes from device to device as it does from machine to machine.
fn console() -> &'static Mutex<Option<Console>> {
    static CONSOLE: OnceLock<Mutex<Option<Console>>> = OnceLock::new();
    CONSOLE.get_or_init(|| {
        let console = Console::open(&ConsoleConfig::Socket(path())).expect("a socket");
        Mutex::new(Some(console))
    })
}

fuzz_target!(|data: &[u8]| {
    let mut kept = console().lock().expect("one thread");
    let device = ConsoleDevice::new("fuzz", kept.take().expect("it came back"));
    let mut client: Option<UnixStream> = None;
    Moves::new(data).play(&device, |moves| {
        let len = usize::from(moves.u8());
        match &mut client {
            // What does not fit is not typed.
            Some(client) if len < 224 => {
                let _ = client.write(moves.bytes(len));
            }
            Some(_) => client = None,
            None => {
                client = UnixStream::connect(path()).ok();
                if let Some(client) = &client {
                    client.set_nonblocking(true).expect("a socket");
                }
            }
        }
    });
    *kept = device.take();
    assert!(kept.is_some(), "a worker kept the console");
});
