//! How a VMM is told to boot the same guest: one kernel, one initramfs, one device-dax device, one processor.

use std::path::{Path, PathBuf};

use lab_agent::host_protocol::{SpawnSpec, TerminalSize};

use crate::cli::Peer;
use crate::share::{self, ShareError};

/// Files that QEMU reads beside its binary, and where this machine keeps them.
const QEMU_DATA: [&str; 5] = [
    "bios-256k.bin",
    "pvh.bin",
    "linuxboot_dma.bin",
    "kvmvapic.bin",
    "multiboot_dma.bin",
];
const QEMU_DATA_PLACES: [&str; 3] = [
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/lib/ipxe/qemu",
];

/// Whose command line a VMM understands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Syntax {
    /// daxhund's and Cloud Hypervisor's.
    CloudHypervisor,
    /// QEMU's.
    Qemu,
}

/// A VMM on the share.
#[derive(Clone, Debug)]
pub struct Vmm {
    /// What it is called in the results.
    pub name: String,
    syntax: Syntax,
    /// Its binary on the host.
    program: String,
    /// Directory of its libraries on the host, unless it needs none.
    libraries: Option<String>,
    /// Directory of its firmware on the host.
    data: Option<String>,
}

/// What every VMM boots.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Kernel on the host.
    pub kernel: String,
    /// Its initramfs on the host.
    pub initramfs: String,
    /// Its command line.
    pub cmdline: String,
    /// The device-dax device.
    pub dax: String,
    /// How much of it.
    pub memory_mib: u64,
    /// Directories in sysfs of functions that are passed through.
    pub devices: Vec<String>,
}

impl Workload {
    pub(super) fn memory_bytes(&self) -> u64 {
        self.memory_mib << 20
    }
}

/// A peer that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// An unknown kind.
    #[error(
        "a peer is called after the syntax it understands: `ch` or `qemu`, or with a suffix as in `ch-v53`; not `{name}`"
    )]
    UnknownSyntax {
        /// Its name.
        name: String,
    },
    /// It can only be booted.
    #[error(
        "`{name}` is not told of devices here: disks and networks are measured with peers of the kind `ch`"
    )]
    NoDevices {
        /// Its name.
        name: String,
    },
    /// Its place on the share.
    #[error(transparent)]
    Place(#[from] share::PeerError),
    /// The share.
    #[error(transparent)]
    Share(#[from] ShareError),
}

impl Vmm {
    /// daxhund, which is on the share already.
    pub fn daxhund() -> Self {
        Self {
            name: "daxhund".to_owned(),
            syntax: Syntax::CloudHypervisor,
            program: "/lab/bin/daxhund".to_owned(),
            libraries: None,
            data: None,
        }
    }

    /// Puts a peer on the share, with the libraries and firmware that it needs.
    pub fn peer(peer: &Peer, share: &Path) -> Result<Self, PeerError> {
        let syntax = syntax_of(&peer.name).ok_or_else(|| PeerError::UnknownSyntax {
            name: peer.name.clone(),
        })?;
        let place = PathBuf::from("peers").join(&peer.name);
        let file = peer.path.file_name().unwrap_or_default();
        let on_host = |part: &str| format!("/lab/{}", place.join(part).display());
        let needs_libraries = share::add_peer(share, &peer.name, &peer.path, &[])?;
        if syntax == Syntax::Qemu {
            for name in QEMU_DATA {
                let found = QEMU_DATA_PLACES
                    .iter()
                    .map(|directory| Path::new(directory).join(name));
                if let Some(path) = found.into_iter().find(|path| path.is_file()) {
                    share::add(&path, &share.join(&place).join("data").join(name))?;
                }
            }
        }
        Ok(Self {
            name: peer.name.clone(),
            syntax,
            program: on_host(&file.to_string_lossy()),
            libraries: needs_libraries.then(|| on_host("lib")),
            data: (syntax == Syntax::Qemu).then(|| on_host("data")),
        })
    }

    /// How it is started.
    pub fn spawn_spec(&self, work: &Workload) -> SpawnSpec {
        let mut argv = vec![self.program.clone()];
        argv.extend(match self.syntax {
            Syntax::CloudHypervisor => cloud_hypervisor_arguments(work),
            Syntax::Qemu => qemu_arguments(work, self.data.as_deref()),
        });
        let env = self
            .libraries
            .iter()
            .map(|path| ("LD_LIBRARY_PATH".to_owned(), path.clone()))
            .collect();
        SpawnSpec {
            argv,
            env,
            stdin: true,
            ..SpawnSpec::default()
        }
    }
}

/// A terminal for those that take the console's input from nothing else.
const TERMINAL: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};

impl Vmm {
    /// Whether it understands what it is told of devices.
    pub fn takes_devices(&self) -> Result<(), PeerError> {
        match self.syntax {
            Syntax::CloudHypervisor => Ok(()),
            Syntax::Qemu => Err(PeerError::NoDevices {
                name: self.name.clone(),
            }),
        }
    }

    /// How it is started with devices besides, in words that daxhund and Cloud Hypervisor share, on a terminal of its own.
    pub fn spawn_spec_with(&self, work: &Workload, devices: &[&str]) -> SpawnSpec {
        let mut spec = self.spawn_spec(work);
        spec.argv
            .extend(devices.iter().map(|word| (*word).to_owned()));
        spec.pty = Some(TERMINAL);
        spec
    }
}

/// A disk, as every kind of VMM is told of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum DiskWord {
    /// The VMM serves this file itself.
    File(String),
    /// A backend at this socket serves it.
    Served(String),
}

impl Vmm {
    /// Whether its guest may reset itself. QEMU is told to end then: its resets take minutes in the emulated host.
    pub fn resets(&self) -> bool {
        self.syntax != Syntax::Qemu
    }

    /// How it is started with disks, on a terminal of its own.
    pub fn spawn_spec_with_disks(&self, work: &Workload, disks: &[DiskWord]) -> SpawnSpec {
        let mut spec = self.spawn_spec(work);
        match self.syntax {
            Syntax::CloudHypervisor => {
                let words = disks.iter().map(|disk| match disk {
                    DiskWord::File(path) => format!("path={path},image_type=raw"),
                    DiskWord::Served(socket) => format!("vhost_user=on,socket={socket}"),
                });
                spec.argv
                    .extend(std::iter::once("--disk".to_owned()).chain(words));
            }
            Syntax::Qemu => {
                for (n, disk) in disks.iter().enumerate() {
                    let words = match disk {
                        DiskWord::File(path) => [
                            "-drive".to_owned(),
                            format!("if=none,id=d{n},format=raw,file={path}"),
                            "-device".to_owned(),
                            format!("virtio-blk-pci,drive=d{n},num-queues=1"),
                        ],
                        DiskWord::Served(socket) => [
                            "-chardev".to_owned(),
                            format!("socket,id=d{n},path={socket}"),
                            "-device".to_owned(),
                            format!("vhost-user-blk-pci,chardev=d{n},num-queues=1"),
                        ],
                    };
                    spec.argv.extend(words);
                }
            }
        }
        spec.pty = Some(TERMINAL);
        spec
    }
}

fn syntax_of(name: &str) -> Option<Syntax> {
    match name.split('-').next() {
        Some("ch" | "daxhund") => Some(Syntax::CloudHypervisor),
        Some("qemu") => Some(Syntax::Qemu),
        _ => None,
    }
}

fn cloud_hypervisor_arguments(work: &Workload) -> Vec<String> {
    let zone = format!(
        "id=z0,size={}M,file={},shared=on",
        work.memory_mib, work.dax
    );
    let words = [
        "--kernel",
        &work.kernel,
        "--initramfs",
        &work.initramfs,
        "--cmdline",
        &work.cmdline,
        "--cpus",
        "boot=1",
        "--memory",
        "size=0",
        "--memory-zone",
        &zone,
        "--serial",
        "tty",
        "--console",
        "off",
    ];
    let devices = work.devices.iter().map(|path| format!("path={path}"));
    let devices = devices.flat_map(|word| ["--device".to_owned(), word]);
    let words = words.iter().map(|word| (*word).to_owned());
    words.chain(devices).collect()
}

fn qemu_arguments(work: &Workload, data: Option<&str>) -> Vec<String> {
    let size = format!("{}M", work.memory_mib);
    let backend = format!(
        "memory-backend-file,id=m,size={size},mem-path={},share=on,align=2M",
        work.dax
    );
    let mut words = vec![
        "-machine",
        "q35,accel=kvm,memory-backend=m",
        "-cpu",
        "host",
        "-smp",
        "1",
        "-m",
        &size,
        "-object",
        &backend,
        "-kernel",
        &work.kernel,
        "-initrd",
        &work.initramfs,
        "-append",
        &work.cmdline,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
    ];
    if let Some(data) = data {
        words.extend(["-L", data]);
    }
    let devices = work
        .devices
        .iter()
        .map(|path| format!("vfio-pci,sysfsdev={path}"));
    let devices = devices.flat_map(|word| ["-device".to_owned(), word]);
    let words = words.iter().map(|word| (*word).to_owned());
    words.chain(devices).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_gives_the_syntax() {
        assert_eq!(syntax_of("ch-v53"), Some(Syntax::CloudHypervisor));
        assert_eq!(syntax_of("qemu"), Some(Syntax::Qemu));
        assert_eq!(syntax_of("firecracker"), None);
    }

    #[test]
    fn disks_are_named_in_the_words_of_each_vmm() {
        let work = Workload {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: "a".into(),
            dax: "/dev/dax0.0".into(),
            memory_mib: 512,
            devices: Vec::new(),
        };
        let disks = [
            DiskWord::Served("/s".to_owned()),
            DiskWord::File("/f".to_owned()),
        ];
        let own = Vmm::daxhund();
        let argv = own.spawn_spec_with_disks(&work, &disks).argv;
        assert_eq!(
            argv[argv.len() - 3..],
            [
                "--disk",
                "vhost_user=on,socket=/s",
                "path=/f,image_type=raw"
            ]
        );
        let qemu = Vmm {
            syntax: Syntax::Qemu,
            ..own
        };
        let argv = qemu.spawn_spec_with_disks(&work, &disks).argv;
        let has = |word: &str| argv.iter().any(|found| found == word);
        assert!(has("socket,id=d0,path=/s") && has("if=none,id=d1,format=raw,file=/f"));
        assert!(has("-no-reboot") && !qemu.resets());
    }

    #[test]
    fn all_boot_the_same_guest() {
        let work = Workload {
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: "a b".into(),
            dax: "/dev/dax0.0".into(),
            memory_mib: 512,
            devices: vec!["/sys/d".into()],
        };
        for argv in [
            cloud_hypervisor_arguments(&work),
            qemu_arguments(&work, None),
        ] {
            for word in ["/k", "a b", "/i"] {
                assert!(argv.iter().any(|found| found == word), "{word} in {argv:?}");
            }
            assert!(
                argv.iter()
                    .any(|found| found.contains("/dev/dax0.0") && found.contains("512M")),
                "{argv:?}"
            );
            assert!(
                argv.last().is_some_and(|found| found.ends_with("=/sys/d")),
                "{argv:?}"
            );
        }
    }
}
