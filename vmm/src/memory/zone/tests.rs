use std::path::PathBuf;

use super::*;

const RAM: &str = "[ram]\npool = \"ram\"\n";

/// A host with a pool of one device of 64M by 2M on node 1.
struct Pooled {
    _root: tempfile::TempDir,
    host: Host,
    node: PathBuf,
}

impl Pooled {
    fn new() -> Self {
        let (root, host, node) = crate::memory::testing::dax_host("/dev/full");
        Self {
            _root: root,
            host,
            node,
        }
    }

    fn open(&self, config: &str, spec: &ZoneSpec) -> Result<Zone, ZoneOpenError> {
        let text = format!("[pool.ram]\ndevices = [{:?}]\n{config}", self.node);
        let config = HostConfig::parse(Path::new("/c"), &text).unwrap();
        Zone::open(&self.host, &config, spec)
    }

    fn refused(&self, config: &str, spec: &ZoneSpec) -> String {
        crate::chain(&self.open(config, spec).unwrap_err())
    }
}

fn zone(backing: Backing) -> ZoneSpec {
    ZoneSpec {
        id: "mem0".to_owned(),
        backing,
        prefault: false,
        host_numa_node: None,
        dma: None,
    }
}

fn plain(mib: u32) -> ZoneSpec {
    zone(Backing::Anonymous {
        size: ByteSize::from_mib(mib),
        shared: false,
        thp: true,
    })
}

fn of_pool(pool: &str, mib: u32) -> ZoneSpec {
    zone(Backing::Pool {
        pool: pool.to_owned(),
        size: ByteSize::from_mib(mib),
    })
}

fn is_dax(zone: &Zone) -> bool {
    matches!(zone.memory, Memory::Dax { .. })
}

/// One test for all, as they share the device's locks.
#[test]
fn ram_of_which_nothing_is_said_comes_from_the_pool_for_it() {
    let pooled = Pooled::new();
    // Without `[ram]` a pool is for those who name it.
    assert!(!is_dax(&pooled.open("", &plain(32)).unwrap()));
    let first = pooled.open(RAM, &plain(32)).unwrap();
    let second = pooled.open("", &of_pool("ram", 16)).unwrap();
    let place = |zone: &Zone| (zone.request.file_offset.0 / MIB, zone.request.size / MIB);
    assert_eq!((place(&first), place(&second)), ((0, 32), (32, 16)));
    assert_eq!(first.request.align, 2 * MIB);
    for zone in [&first, &second] {
        let Memory::Dax { held, zero, .. } = &zone.memory else {
            panic!("{zone:?}")
        };
        assert_eq!(*zero, Zero::Before);
        assert_eq!(held.as_ref().unwrap().pool(), Some("ram"));
    }
    // Huge pages are large pages, which device-dax has.
    let huge = zone(Backing::HugeTlb {
        size: ByteSize::from_mib(16),
        shared: true,
        page: HugePageSize::HostDefault,
    });
    assert_eq!(place(&pooled.open(RAM, &huge).unwrap()), (48, 16));

    let text = pooled.refused(RAM, &plain(32));
    assert!(
        text.starts_with("memory zone mem0: pool ram has no 32M free"),
        "{text}"
    );
    assert!(text.contains("has 16M free, 16M in one piece"), "{text}");
    let loose = format!("{RAM}required = false\n");
    assert!(!is_dax(&pooled.open(&loose, &plain(32)).unwrap()));
    // Who names the pool wants the pool.
    let text = pooled.refused(&loose, &of_pool("ram", 32));
    assert!(text.contains("no 32M free"), "{text}");

    let text = pooled.refused(RAM, &plain(3));
    assert!(text.contains("size 3M is not a multiple of 2M"), "{text}");
    assert!(text.ends_with("use size=2M or 4M"), "{text}");
    let on = |node| ZoneSpec {
        host_numa_node: Some(node),
        ..plain(2)
    };
    assert_eq!(place(&pooled.open(RAM, &on(1)).unwrap()), (48, 2));
    let text = pooled.refused(RAM, &on(0));
    assert!(text.contains("no memory of host node 0"), "{text}");
    let text = pooled.refused(RAM, &of_pool("cxl", 2));
    assert_eq!(text, "memory zone mem0: there is no pool cxl: /c names ram");
    let never = "zero = \"never\"\n";
    let zone = pooled.open(never, &of_pool("ram", 2)).unwrap();
    assert!(matches!(
        zone.memory,
        Memory::Dax {
            zero: Zero::Never,
            ..
        }
    ));
    // What is let go of is there again.
    drop(first);
    assert_eq!(place(&pooled.open(RAM, &plain(32)).unwrap()), (0, 32));
}
