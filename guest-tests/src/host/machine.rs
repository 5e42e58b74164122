//! What the emulated host is made of, and how QEMU is told.
//!
//! One processor and an IOMMU, as passthrough wants it; nested virtualisation as AMD does it, which the emulator
//! implements; persistent memory modules, sparse, so that their size costs nothing until it is touched; and cards to pass
//! through (see [`super::cards`]).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use lab_agent::host_protocol::PORT_NAME;

use super::cards::Card;

/// AMD, for nested virtualisation. Without XSAVE: the emulator does not tell KVM when a guest sets XCR0, so KVM runs the guest
/// with another one after the next exit, and the guest loses vector registers. (With XSAVE and no AVX the guest's kernel
/// does not warn, but a guest was seen to end in a triple fault.)
/// Without the fast string instructions: the emulator executes them byte by byte, and every copy of the host's kernel with them.
const CPU: &str = "EPYC-Milan,+svm,+npt,-xsave,-erms,-fsrm";
/// The IOMMU is there for who asks for it: the host's own devices go past it, as fast as without one.
/// A kernel with KVM built in takes its guests' clock rate from the first calibration of the TSC, which is off by parts of a
/// percent here; KVM would then hold the guests' TSC to that rate entry by entry, and their timers would come seconds late.
/// On a machine that has other work, the kernel's check at boot that timer interrupts come can end in a panic.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 intel_iommu=on iommu=pt kvm.tsc_tolerance_ppm=50000 no_timer_check";
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Where the kernel keeps the page structures of a namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PageArray {
    /// In the host's ordinary memory.
    Memory,
    /// On the device itself.
    Device,
}

/// A persistent memory module that becomes one device-dax device.
#[derive(Clone, Debug)]
pub struct Dimm {
    /// Its size; the device is smaller by what its header and alignment take.
    pub size_bytes: u64,
    /// Alignment of the namespace.
    pub align_bytes: u64,
    /// Where its page structures live.
    pub page_array: PageArray,
    /// What its contents are.
    pub contents: Contents,
}

/// What is in a persistent memory module when the host is powered on, and what becomes of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Contents {
    /// Nothing; it goes with the host.
    Fresh,
    /// Nothing; what the host writes stays in this file, which QEMU makes.
    New(PathBuf),
    /// What an earlier host with [`Contents::New`] has left in this file, its namespace included.
    Kept(PathBuf),
}

/// An IOMMU.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Iommu {
    /// Whether it keeps devices' interrupts apart, which VFIO wants.
    pub remaps_interrupts: bool,
    /// How wide the addresses are that devices can use: 39 or 48.
    pub address_bits: u8,
}

impl Default for Iommu {
    /// Addresses as wide as most servers' IOMMUs have them; QEMU's default is narrower.
    fn default() -> Self {
        Self {
            remaps_interrupts: true,
            address_bits: 48,
        }
    }
}

/// Processors, memory and devices.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Processors.
    pub cpus: u32,
    /// Ordinary memory.
    pub memory_bytes: u64,
    /// Persistent memory modules, at increasing addresses.
    pub dimms: Vec<Dimm>,
    /// What keeps devices from memory that is not theirs.
    pub iommu: Option<Iommu>,
    /// Devices to pass through.
    pub cards: Vec<Card>,
    /// More arguments for QEMU.
    pub qemu_arguments: Vec<String>,
    /// More words for the kernel's command line.
    pub cmdline: Vec<String>,
}

impl Default for Machine {
    /// One processor: with two, each on a thread of the emulator, guests ended in triple faults and hosts panicked now and then,
    /// which look like races of the emulator's nested virtualisation. Three modules: one that a guest of more than 4 GiB fits on, a second one, and one aligned to 1 GiB with 2 GiB usable.
    fn default() -> Self {
        let dimm = |size, align_bytes| Dimm {
            size_bytes: size * GIB,
            align_bytes,
            page_array: PageArray::Memory,
            contents: Contents::Fresh,
        };
        Self {
            cpus: 1,
            memory_bytes: 3 * GIB,
            dimms: vec![dimm(6, 2 * MIB), dimm(2, 2 * MIB), dimm(3, GIB)],
            iommu: Some(Iommu::default()),
            cards: Card::ALL.to_vec(),
            qemu_arguments: Vec::new(),
            cmdline: Vec::new(),
        }
    }
}

/// Files and descriptors that QEMU is started with.
#[derive(Debug)]
pub(super) struct Wiring<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    pub(super) share: &'a Path,
    pub(super) console_log: &'a Path,
    /// Directory of the cards' disks.
    pub(super) disks: &'a Path,
    /// Connected sockets that QEMU inherits.
    pub(super) agent_fd: i32,
    pub(super) qmp_fd: i32,
}

impl Machine {
    /// QEMU's arguments.
    pub(super) fn arguments(&self, wiring: &Wiring<'_>) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |flag: &str, value: OsString| arguments.extend([flag.into(), value]);
        // The IOMMU remaps interrupts only when the kernel's part of the interrupt controller is split.
        add("-machine", "q35,nvdimm=on,kernel-irqchip=split".into());
        add("-cpu", CPU.into());
        add("-accel", "tcg,thread=multi".into());
        add("-smp", self.cpus.to_string().into());
        let dimm_bytes: u64 = self.dimms.iter().map(|dimm| dimm.size_bytes).sum();
        // Room for aligning each module to 1 GiB.
        let limit = self.memory_bytes + dimm_bytes + (self.dimms.len() as u64 + 1) * GIB;
        let slots = self.dimms.len() + 4;
        add(
            "-m",
            format!(
                "{}M,maxmem={}M,slots={slots}",
                self.memory_bytes / MIB,
                limit / MIB
            )
            .into(),
        );
        if let Some(iommu) = self.iommu {
            let remap = if iommu.remaps_interrupts { "on" } else { "off" };
            let bits = iommu.address_bits;
            let word = format!("intel-iommu,intremap={remap},eim=off,aw-bits={bits}");
            add("-device", word.into());
        }
        add("-display", "none".into());
        for (index, dimm) in self.dimms.iter().enumerate() {
            let size = dimm.size_bytes;
            add(
                "-object",
                match &dimm.contents {
                    Contents::Fresh => {
                        format!("memory-backend-ram,id=nv{index},size={size},share=on").into()
                    }
                    Contents::New(path) | Contents::Kept(path) => with_path(
                        &format!("memory-backend-file,id=nv{index},size={size},share=on,mem-path="),
                        path,
                    ),
                },
            );
            add(
                "-device",
                format!("nvdimm,id={},memdev=nv{index}", dimm_id(index)).into(),
            );
        }
        add(
            "-chardev",
            with_path("file,id=console,path=", wiring.console_log),
        );
        add("-serial", "chardev:console".into());
        add(
            "-chardev",
            format!("socket,id=agent,fd={}", wiring.agent_fd).into(),
        );
        add("-device", "virtio-serial-pci".into());
        add(
            "-device",
            format!("virtserialport,chardev=agent,name={PORT_NAME}").into(),
        );
        add(
            "-chardev",
            format!("socket,id=qmp,fd={}", wiring.qmp_fd).into(),
        );
        add("-mon", "chardev=qmp,mode=control".into());
        add(
            "-fsdev",
            with_path(
                "local,id=share,security_model=none,readonly=on,multidevs=remap,path=",
                wiring.share,
            ),
        );
        add(
            "-device",
            "virtio-9p-pci,fsdev=share,mount_tag=share".into(),
        );
        add("-kernel", wiring.kernel.into());
        add("-initrd", wiring.initramfs.into());
        for card in &self.cards {
            for (flag, value) in card.arguments(wiring.disks) {
                add(flag, value);
            }
        }
        let mut cmdline = vec![CMDLINE.to_owned()];
        cmdline.extend(self.cmdline.iter().cloned());
        add("-append", cmdline.join(" ").into());
        arguments.extend([
            "-nodefaults".into(),
            "-no-user-config".into(),
            "-no-reboot".into(),
        ]);
        arguments.extend(self.qemu_arguments.iter().map(OsString::from));
        arguments
    }
}

/// QEMU lists modules in the firmware's table in the order of a hash of their ids. With these ids the first three come in
/// order, so that the devices get the names one expects; nothing depends on it.
fn dimm_id(index: usize) -> String {
    match index {
        0 => "d1".to_owned(),
        1 => "d0".to_owned(),
        _ => format!("d{index}"),
    }
}

/// QEMU's option parser takes a comma as the end of a value unless it is doubled.
pub(super) fn with_path(prefix: &str, path: &Path) -> OsString {
    format!("{prefix}{}", path.display().to_string().replace(',', ",,")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(share: &str) -> String {
        arguments_of(&Machine::default(), share)
    }

    fn arguments_of(machine: &Machine, share: &str) -> String {
        let wiring = Wiring {
            kernel: Path::new("/k/vmlinux"),
            initramfs: Path::new("/k/initramfs"),
            share: Path::new(share),
            console_log: Path::new("/log"),
            disks: Path::new("/disks"),
            agent_fd: 7,
            qmp_fd: 8,
        };
        let words = machine.arguments(&wiring);
        words
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn the_address_space_has_room_for_the_modules_and_their_alignment() {
        assert!(
            arguments("/s").contains("-m 3072M,maxmem=18432M,slots=7"),
            "{}",
            arguments("/s")
        );
    }

    #[test]
    fn a_comma_in_a_path_is_kept() {
        assert!(arguments("/a,b").contains("path=/a,,b"));
    }

    #[test]
    fn a_module_can_outlive_its_host() {
        let mut machine = Machine::default();
        machine.dimms[1].contents = Contents::New("/c,d/file".into());
        let text = arguments_of(&machine, "/s");
        assert!(
            text.contains("id=nv1,size=2147483648,share=on,mem-path=/c,,d/file"),
            "{text}"
        );
    }

    #[test]
    fn the_iommu_is_as_wanted() {
        let with = |iommu| {
            let machine = Machine {
                iommu,
                ..Machine::default()
            };
            arguments_of(&machine, "/s")
        };
        assert!(arguments("/s").contains("intel-iommu,intremap=on,eim=off,aw-bits=48"));
        let poor = with(Some(Iommu {
            remaps_interrupts: false,
            address_bits: 39,
        }));
        assert!(poor.contains("intel-iommu,intremap=off,eim=off,aw-bits=39"));
        assert!(!with(None).contains("intel-iommu,"));
    }

    #[test]
    fn nothing_listens() {
        let text = arguments("/s");
        assert!(
            !text.contains("server") && !text.contains("hostfwd") && text.contains("-nodefaults")
        );
        let networks = text.matches("-netdev").count();
        assert_eq!(networks, text.matches("-netdev user,restrict=on,").count());
    }
}
