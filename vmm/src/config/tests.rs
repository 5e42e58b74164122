//! Whole configurations: JSON and back, command line against JSON, and what is between devices.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::schema::tests::is_valid;
use super::*;

/// What is read is also valid by the schema.
pub(super) fn read(json: &str) -> VmConfig {
    let config = from_json(json.as_bytes()).unwrap_or_else(|error| panic!("{error}: {json}"));
    let value = serde_json::from_str(json).unwrap();
    assert!(is_valid::<VmConfig>(&value), "{json}");
    config
}

/// What is refused is not.
fn refusal(json: &str) -> String {
    let value = serde_json::from_str(json).unwrap();
    assert!(!is_valid::<VmConfig>(&value), "{json}");
    from_json::<VmConfig>(json.as_bytes())
        .unwrap_err()
        .to_string()
}

/// A guest that can be, with `devices` besides.
fn with(devices: impl FnOnce(&mut VmConfig)) -> Result<ValidConfig, ConfigError> {
    let mut config = VmConfig::default();
    config.payload.kernel = Some("/k".into());
    devices(&mut config);
    config.validate()
}

fn disk(text: &str) -> DiskConfig {
    DiskConfig::parse(text).unwrap()
}

fn pmem(text: &str) -> PmemConfig {
    PmemConfig::parse(text).unwrap()
}

fn fs(text: &str) -> FsConfig {
    FsConfig::parse(text).unwrap()
}

#[test]
fn json_has_the_defaults_of_the_contract() {
    let config = read(r#"{"payload":{"kernel":"/k"}}"#);
    assert_eq!(config.cpus, CpusConfig::default());
    assert_eq!(config.memory, MemoryConfig::default());
    assert_eq!(config.rng, RngConfig::default());
    assert_eq!(config.platform.num_pci_segments, 1);
    assert_eq!(
        (config.serial.clone(), &config.console),
        (ConsoleConfig::Null, &None)
    );
    let valid = config.validate().unwrap();
    let console = valid.console().unwrap();
    assert_eq!(
        (&console.output, console.id.as_str()),
        (&ConsoleConfig::Tty, "_console")
    );

    let config = read(r#"{"payload":{"kernel":"/k"},"serial":{"mode":"Tty"}}"#);
    let valid = config.validate().unwrap();
    assert_eq!(valid.console(), None);
    let off = Some(VirtioConsoleConfig::from(ConsoleConfig::Off));
    assert_eq!(valid.config().console, off);
    assert_eq!(VmConfig::default().console, off);
    assert_eq!(VmConfig::default().serial, ConsoleConfig::Tty);
}

/// All of the contract's schema, as a client library sends it that knows the defaults.
const WHOLE_SCHEMA: &str = r#"{
    "cpus": {"boot_vcpus": 2, "max_vcpus": 4, "topology": {}, "kvm_hyperv": false,
        "max_phys_bits": 46, "nested": true, "affinity": [], "features": {"amx": false},
        "core_scheduling": "Vm", "profile": "Host"},
    "memory": {"size": 1073741824, "hotplug_size": 4294967296, "hotplugged_size": null,
        "mergeable": false, "hotplug_method": "Acpi", "shared": true, "hugepages": false,
        "hugepage_size": null, "prefault": false, "reserve": false, "thp": true, "zones": null},
    "payload": {"kernel": "/k", "cmdline": "console=hvc0", "firmware": null, "initramfs": null,
        "igvm": null, "host_data": null},
    "rate_limit_groups": [],
    "disks": [{"path": "/d", "iommu": false, "vhost_user": false, "num_queues": 1}],
    "net": [{"tap": null, "ip": null, "mask": null, "mac": "52:54:00:12:34:56", "iommu": false,
        "vhost_user": false, "vhost_socket": null, "vhost_mode": "Client", "fds": null,
        "rate_limiter_config": null, "pci_segment": 0}],
    "rng": {"src": "/dev/urandom", "iommu": false},
    "balloon": {"size": 0, "deflate_on_oom": false, "free_page_reporting": true, "iommu": false},
    "fs": [{"tag": "t", "socket": "/f", "num_queues": 1, "queue_size": 1024}], "generic_vhost_user": null,
    "pmem": [{"file": "/p", "iommu": false, "discard_writes": true}],
    "serial": {"mode": "Null", "file": null, "socket": null, "iommu": false},
    "console": {"mode": "Pty", "iommu": false, "pci_segment": 1, "pci_device_id": 5},
    "debug_console": {"mode": "Off", "file": null, "iobase": 233},
    "devices": [], "user_devices": null, "vdpa": [],
    "vsock": {"cid": 3, "socket": "/v", "iommu": false},
    "pvmemcontrol": null, "pvpanic": false, "iommu": false, "numa": null, "watchdog": false,
    "rtc": null, "gdb": false, "pci_segments": null,
    "platform": {"num_pci_segments": 2, "iommu_segments": null, "iommu_address_width_bits": 64,
        "serial_number": null, "uuid": null, "oem_strings": null, "tdx": false, "sev_snp": false,
        "iommufd": false, "vfio_p2p_dma": true},
    "tpm": null, "landlock_enable": false, "landlock_rules": null
}"#;

#[test]
fn a_client_that_sends_the_whole_schema_is_understood() {
    let config = read(WHOLE_SCHEMA);
    assert_eq!(config.memory.hotplug_size, Some(ByteSize::from_mib(4096)));
    let valid = config.validate().unwrap();
    assert_eq!(
        [
            valid.disks().len(),
            valid.net().len(),
            valid.fs().len(),
            valid.pmem().len(),
        ],
        [1; 4]
    );
    assert_eq!(valid.segments(), 2);
    assert_eq!(valid.console().unwrap().place.segment, 1);
    assert!(valid.balloon().unwrap().free_page_reporting);
    assert_eq!(valid.vsock().unwrap().cid, 3);
}

#[test]
fn fields_that_ask_for_more_are_refused_with_the_way_to_them() {
    for (members, field) in [
        (
            r#""disks":[{"path":"/d"},{"path":"/e","image_type":"Qcow2"}]"#,
            "disks[1].image_type=Qcow2",
        ),
        (r#""net":[{"fds":[3]}]"#, "net[0].fds"),
        (r#""pmem":[{"file":"/p","iommu":true}]"#, "pmem[0].iommu"),
        (
            r#""pmem":[{"file":"/p","on_loss":"pause"}]"#,
            "pmem[0].on_loss",
        ),
        (
            r#""cpus":{"boot_vcpus":1,"max_vcpus":1,"nested":false}"#,
            "cpus.nested",
        ),
        (
            r#""cpus":{"boot_vcpus":1,"max_vcpus":1,"features":{"amx":true}}"#,
            "cpus.features.amx",
        ),
        (
            r#""memory":{"size":0,"zones":[{"id":"a","hotplug_size":1}]}"#,
            "memory.zones[0].hotplug_size",
        ),
        (r#""platform":{"uuid":"u"}"#, "platform.uuid"),
        (r#""console":{"mode":"Off","iommu":true}"#, "console.iommu"),
        (
            r#""numa":[{"guest_numa_id":0,"device_id":"d"}]"#,
            "numa[0].device_id",
        ),
        (r#""debug_console":{"mode":"Tty"}"#, "debug_console.mode"),
        (r#""rtc":{}"#, "rtc"),
        (r#""watchdog":true"#, "watchdog"),
        (r#""landlock_enable":true"#, "landlock_enable"),
    ] {
        let error = refusal(&format!(r#"{{"payload":{{"kernel":"/k"}},{members}}}"#));
        assert_eq!(error, format!("not supported by daxhund: {field}"));
    }
    let error = refusal(r#"{"payload":{"kernel":"/k","firmware":"/f"}}"#);
    assert_eq!(error, "not supported by daxhund: payload.firmware");
}

#[test]
fn fields_of_no_schema_and_of_the_wrong_kind_are_named() {
    for (json, words) in [
        ("{}", "missing field `payload`"),
        (r#"{"payload":{},"x":1}"#, "x: unknown field `x`"),
        (
            r#"{"payload":{},"disks":[{"path":"/d"},{"path":"/e","redonly":true}]}"#,
            "disks[1].redonly: unknown field `redonly`",
        ),
        (
            r#"{"payload":{},"net":[{"mac":"52"}]}"#,
            "net[0].mac: \"52\" is not an Ethernet address",
        ),
        (
            r#"{"payload":{},"net":[{"ip":"x"}]}"#,
            "net[0].ip: invalid IP address",
        ),
        (
            r#"{"payload":{},"serial":{"mode":"File"}}"#,
            "serial: console mode file needs",
        ),
        (
            r#"{"payload":{},"memory":{"size":"1G"}}"#,
            "memory.size: invalid type: string",
        ),
        (
            r#"{"payload":{},"pmem":[{"file":"/p","pci_device_id":256}]}"#,
            "pmem[0].pci_device_id: invalid value",
        ),
        (
            r#"{"payload":{},"balloon":{"size":-1}}"#,
            "balloon.size: invalid value",
        ),
    ] {
        let error = refusal(json);
        assert!(error.contains(words), "{json}: {error}");
    }
}

#[test]
fn ids_are_unique_over_zones_and_all_kinds_of_devices() {
    let zone = "id=a,size=1G";
    let valid = with(|config| {
        config.memory = MemoryConfig::parse(None, &[zone]).unwrap();
        config.disks = vec![disk("path=/d"), disk("path=/e,id=_net1")];
        config.net = vec![NetConfig::default(), NetConfig::default()];
        config.fs = vec![fs("tag=s,socket=/s"), fs("tag=t,socket=/t,id=f")];
        config.pmem = vec![pmem("file=/p,id=b"), pmem("file=/q")];
        config.vsock = Some(VsockConfig::parse("cid=3,socket=/v").unwrap());
        config.balloon = Some(BalloonConfig::parse("size=0").unwrap());
        config.console = Some(ConsoleConfig::Pty.into());
    })
    .unwrap();
    let config = valid.config();
    let disks: Vec<_> = config.disks.iter().map(|disk| disk.id.as_deref()).collect();
    assert_eq!(disks, [Some("_disk0"), Some("_net1")]);
    let net: Vec<_> = valid.net().iter().map(|net| net.id.as_str()).collect();
    assert_eq!(net, ["_net2", "_net3"]);
    let pmem_ids: Vec<_> = valid.pmem().iter().map(|pmem| pmem.id.as_str()).collect();
    assert_eq!(pmem_ids, ["b", "_pmem5"]);
    let fs_ids: Vec<_> = config.fs.iter().map(|fs| fs.id.as_deref()).collect();
    assert_eq!(fs_ids, [Some("_fs4"), Some("f")]);
    assert_eq!(valid.vsock().unwrap().id, "_vsock6");
    assert_eq!(
        config.balloon.as_ref().unwrap().id.as_deref(),
        Some("_balloon")
    );
    assert_eq!(config.rng.id.as_deref(), Some("_rng"));
    assert_eq!(valid.console().unwrap().id, "_console");
    for id in ["a", "b", "_disk0", "_net1", "_rng"] {
        assert!(valid.ids().is_taken(id), "{id}");
    }
    // A device that is added later.
    let mut ids = valid.ids().clone();
    let added = disk("path=/f").validate(1, &mut ids).unwrap();
    assert_eq!(added.id, "_disk7");
    let error = disk("path=/g,id=a").validate(1, &mut ids).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("id=a is used by --memory-zone id=a and by --disk id=a")
    );

    let error = with(|config| {
        config.memory = MemoryConfig::parse(None, &[zone]).unwrap();
        config.pmem = vec![pmem("file=/p,id=a")];
    })
    .unwrap_err();
    assert!(matches!(
        error,
        ConfigError::Pmem(PmemError::Id(IdError::Duplicate { .. }))
    ));
    let error = with(|config| {
        config.disks = vec![disk("path=/d,id=a")];
        config.rng.id = Some("a".into());
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "id=a is used by --disk id=a and by --rng; give each an id of its own"
    );
    let error = with(|config| {
        config.memory = MemoryConfig::parse(None, &["id=__a,size=1G"]).unwrap();
    })
    .unwrap_err();
    assert!(matches!(error, ConfigError::Id(IdError::Kept { .. })));
}

#[test]
fn places_are_ones_the_guest_has_and_nobody_elses() {
    let valid = with(|config| {
        config.platform.num_pci_segments = 2;
        config.disks = vec![
            disk("path=/d,pci_device_id=4"),
            disk("path=/e,pci_segment=1,pci_device_id=4"),
        ];
    });
    assert!(valid.is_ok());
    let error = with(|config| {
        config.disks = vec![disk("path=/d,pci_device_id=4")];
        config.net = vec![NetConfig::parse("pci_device_id=4").unwrap()];
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "--net id=_net1: pci_segment=0,pci_device_id=4 is where --disk id=_disk0 is; give it \
         another number, or leave it out"
    );
    let error = with(|config| config.disks = vec![disk("path=/d,pci_segment=1")]).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("give a lower one, or --platform num_pci_segments=2")
    );
    let error = with(|config| config.platform.num_pci_segments = 17).unwrap_err();
    assert!(error.to_string().contains("give 1 to 16"));
}

#[test]
fn no_byte_of_a_file_has_two_users_that_write() {
    let zone = |config: &mut VmConfig, text: &str| {
        config.memory = MemoryConfig::parse(None, &[text]).unwrap();
    };
    let error = with(|config| {
        zone(config, "id=m,file=/dev/dax0.0,size=1G");
        config.pmem = vec![pmem("file=/dev/dax0.0,id=p,offset=512M")];
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "--pmem id=p and --memory-zone id=m both use /dev/dax0.0, --pmem id=p all from offset 512M, \
         --memory-zone id=m 1G from offset 0, and not both only read; give each a file or a range \
         of its own"
    );
    for (disks, pmems, good) in [
        (&["path=/d", "path=/d"][..], &[][..], false),
        (&["path=/d,readonly=on", "path=/d"], &[], false),
        (&["path=/d,readonly=on", "path=/d,readonly=on"], &[], true),
        (&["path=/d", "path=/e"], &[], true),
        (&[], &["file=/p,size=1G", "file=/p,offset=1G"], true),
        (
            &[],
            &["file=/p,size=1G", "file=/p,offset=4K,size=4K"],
            false,
        ),
        (
            &[],
            &["file=/p,discard_writes=on", "file=/p,discard_writes=on"],
            true,
        ),
        (
            &["path=/p,readonly=on"],
            &["file=/p,discard_writes=on"],
            true,
        ),
        (&["path=/p"], &["file=/p,discard_writes=on"], false),
    ] {
        let outcome = with(|config| {
            config.disks = disks.iter().copied().map(disk).collect();
            config.pmem = pmems.iter().copied().map(pmem).collect();
        });
        assert_eq!(outcome.is_ok(), good, "{disks:?} {pmems:?}: {outcome:?}");
    }
    let outcome = with(|config| {
        zone(config, "id=m,file=/dev/dax0.0,size=1G");
        config.pmem = vec![pmem("file=/dev/dax0.0,offset=1G")];
    });
    assert!(outcome.is_ok(), "{outcome:?}");
}

#[test]
fn a_balloon_leaves_something_of_the_ram() {
    let lend = |size: &str, memory: Option<&str>, zones: &[&str]| {
        with(|config| {
            config.memory = MemoryConfig::parse(memory, zones).unwrap();
            config.balloon = Some(BalloonConfig::parse(size).unwrap());
        })
    };
    assert!(lend("size=511M", None, &[]).is_ok());
    let error = lend("size=512M", None, &[]).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("leaves nothing of the guest's 512M"),
        "{error}"
    );
    let zones = ["id=a,size=1G", "id=b,size=1G"];
    assert!(lend("size=1536M", None, &zones).is_ok());
    assert!(lend("size=2G", None, &zones).is_err());
    // How big the file is, nobody knows yet.
    assert!(lend("size=2G", None, &["id=a,file=/dev/dax0.0"]).is_ok());
}

#[test]
fn one_terminal_has_one_console() {
    let consoles = |serial: &str, console: &str| {
        with(|config| {
            config.serial = ConsoleConfig::parse(serial).unwrap();
            config.console = Some(VirtioConsoleConfig::parse(console).unwrap());
        })
    };
    for (serial, console) in [
        ("tty", "off"),
        ("tty", "null"),
        ("null", "tty"),
        ("pty", "pty"),
        ("file=/a", "file=/b"),
        ("socket=/a", "pty,id=c,pci_device_id=3"),
    ] {
        let valid = consoles(serial, console).unwrap();
        assert_eq!(valid.console().is_none(), console == "off");
    }
    for (serial, console, words) in [
        ("tty", "tty", "both want the VMM's one terminal"),
        ("file=/a", "file=/a", "--serial and --console both go to /a"),
        ("socket=/a", "file=/a", "both go to /a"),
        ("tty", "off,id=c", "--console off has no use for id="),
        ("tty", "off,pci_segment=1", "has no use for pci_segment="),
        (
            "tty",
            "pty,pci_device_id=0",
            "--console: pci_device_id=0 is the host bridge's",
        ),
    ] {
        let error = consoles(serial, console).unwrap_err();
        assert!(
            error.to_string().contains(words),
            "{serial} {console}: {error}"
        );
    }
}

fn path() -> impl Strategy<Value = PathBuf> {
    // Everything but quotes, which the command line takes away.
    "[^\"]{1,20}".prop_map(PathBuf::from)
}

fn id() -> impl Strategy<Value = Option<String>> {
    option::of("[a-c_]{1,2}")
}

fn size() -> impl Strategy<Value = ByteSize> {
    prop_oneof![any::<u64>(), (0_u64..64).prop_map(|pages| pages << 12)]
        .prop_map(ByteSize::from_bytes)
}

type At = (Option<String>, u16, Option<u8>);

fn at() -> impl Strategy<Value = At> {
    (id(), 0_u16..3, option::of(0_u8..40))
}

prop_compose! {
    fn any_pmem()(
        file in path(), (socket, pool) in (option::of(path()), option::of("[a-c]{1,2}")), size in option::of(size()), offset in option::of(size()),
        discard_writes: bool, dma: Option<bool>, timeout in option::of(0_u32..=3600), refuse: Option<bool>,
        (id, pci_segment, pci_device_id) in at(),
    ) -> PmemConfig {
        let removal_timeout = timeout.map(|seconds| RemovalTimeout::try_from(seconds).unwrap());
        let on_removal = refuse.map(|refuse| if refuse { OnRemoval::Refuse } else { OnRemoval::Eject });
        PmemConfig {
            file, socket, pool, size, offset, discard_writes, dma, on_removal, removal_timeout, id, pci_segment, pci_device_id,
        }
    }
}

prop_compose! {
    fn any_disk()(
        path in path(), readonly: bool, direct: bool, num_queues in 0_u32..300,
        queue_size in prop_oneof![Just(128_u32), any::<u32>()],
        serial in option::of("[a-z,]{1,24}"), raw: bool,
        (id, pci_segment, pci_device_id) in at(),
    ) -> DiskConfig {
        let image_type = if raw { ImageType::Raw } else { ImageType::Unknown };
        DiskConfig {
            path, vhost_user: false, vhost_socket: None, readonly, direct, num_queues, queue_size, serial, image_type, id, pci_segment,
            pci_device_id,
        }
    }
}

fn any_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
        any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
    ]
}

fn any_mac() -> impl Strategy<Value = MacAddr> {
    any::<[u8; 6]>().prop_map(MacAddr)
}

prop_compose! {
    fn any_net()(
        tap in option::of("[a-z/]{1,17}"), ip in option::of(any_ip()),
        mask in option::of(any_ip()), mac in option::of(any_mac()),
        host_mac in option::of(any_mac()), mtu: Option<u16>, num_queues in 0_u32..300,
        queue_size in prop_oneof![Just(256_u32), any::<u32>()], offloads: [bool; 3],
        (id, pci_segment, pci_device_id) in at(),
    ) -> NetConfig {
        let [offload_tso, offload_ufo, offload_csum] = offloads;
        NetConfig {
            tap, ip, mask, mac, host_mac, mtu, vhost_user: false, vhost_socket: None, vhost_mode: VhostMode::Client, fds: Vec::new(), num_queues, queue_size, offload_tso,
            offload_ufo, offload_csum, id, pci_segment, pci_device_id,
        }
    }
}

prop_compose! {
    fn any_vsock()(
        cid in prop_oneof![0_u64..9, any::<u64>()], socket in path(),
        (id, pci_segment, pci_device_id) in at(),
    ) -> VsockConfig {
        VsockConfig { cid, socket, id, pci_segment, pci_device_id }
    }
}

prop_compose! {
    fn any_fs()(
        tag in "[^\"]{1,40}", socket in path(), num_queues in 0_u32..300,
        queue_size in prop_oneof![Just(1024_u32), any::<u32>()],
        (id, pci_segment, pci_device_id) in at(),
    ) -> FsConfig {
        FsConfig { tag, socket, num_queues, queue_size, id, pci_segment, pci_device_id }
    }
}

prop_compose! {
    fn any_balloon()(
        size in size(), deflate_on_oom: bool, free_page_reporting: bool,
        (id, pci_segment, pci_device_id) in at(),
    ) -> BalloonConfig {
        BalloonConfig { size, deflate_on_oom, free_page_reporting, id, pci_segment, pci_device_id }
    }
}

prop_compose! {
    fn any_device()(
        path in option::of(path()), x_exclude_mmap_bars in vec(0_u32..8, 0..3),
        (id, pci_segment, pci_device_id) in at(),
    ) -> DeviceConfig {
        DeviceConfig { path, fd: None, x_exclude_mmap_bars, id, pci_segment, pci_device_id }
    }
}

prop_compose! {
    fn any_rng()(src in path(), (id, pci_segment, pci_device_id) in at()) -> RngConfig {
        RngConfig { src, id, pci_segment, pci_device_id }
    }
}

fn any_serial() -> impl Strategy<Value = ConsoleConfig> {
    prop_oneof![
        Just(ConsoleConfig::Off),
        Just(ConsoleConfig::Null),
        Just(ConsoleConfig::Tty),
        Just(ConsoleConfig::Pty),
        path().prop_map(ConsoleConfig::File),
        path().prop_map(ConsoleConfig::Socket),
    ]
}

prop_compose! {
    fn any_console()(
        output in any_serial(), (id, pci_segment, pci_device_id) in at(),
    ) -> VirtioConsoleConfig {
        VirtioConsoleConfig { output, id, pci_segment, pci_device_id }
    }
}

prop_compose! {
    fn any_zone()(
        id in "[a-c]{1,2}", size in option::of(size()), file in option::of(path()),
        offset in option::of(size()), shared: Option<bool>, host_numa_node: Option<u32>,
        prefault: bool, dma: Option<bool>, pool in option::of("[a-c]{1,2}"),
    ) -> MemoryZoneConfig {
        MemoryZoneConfig { id, size, file, offset, pool, shared, host_numa_node, prefault, dma, ..Default::default() }
    }
}

prop_compose! {
    fn any_memory()(
        size in size(), hotplug_size in option::of(size()), shared: bool, hugepages: bool, thp: bool,
        zones in vec(any_zone(), 0..3),
    ) -> MemoryConfig {
        MemoryConfig { size, hotplug_size, shared, hugepages, thp, zones, ..Default::default() }
    }
}

prop_compose! {
    fn any_guest()(
        (boot_vcpus, max_vcpus) in (0_u32..4, 0_u32..300), memory in any_memory(),
        kernel in option::of(path()), serial in any_serial(), console in option::of(any_console()),
        disks in vec(any_disk(), 0..3), net in vec(any_net(), 0..3), rng in any_rng(),
        fs in vec(any_fs(), 0..3), pmem in vec(any_pmem(), 0..3), vsock in option::of(any_vsock()),
        balloon in option::of(any_balloon()), devices in vec(any_device(), 0..3),
        num_pci_segments in 0_u16..20, iommufd: Option<bool>, vfio_p2p_dma: bool, arranged: bool,
    ) -> VmConfig {
        VmConfig {
            cpus: CpusConfig {
                boot_vcpus, max_vcpus,
                topology: arranged.then(|| format!("1:{max_vcpus}:1:1").parse().unwrap()), ..CpusConfig::default()
            },
            memory,
            payload: PayloadConfig { kernel, ..Default::default() },
            serial, console, disks, net, rng, generic_vhost_user: Vec::new(), fs, pmem, vsock, balloon, devices,
            platform: PlatformConfig { num_pci_segments, iommufd, vfio_p2p_dma },
            numa: Vec::new(),
        }
    }
}

/// Guests most of which can be: devices that differ in what may not be equal.
fn likely_guest() -> impl Strategy<Value = VmConfig> {
    let at = || (id(), option::of(1_u8..32));
    (vec(at(), 0..4), vec(at(), 0..4), vec(at(), 0..4), at()).prop_map(
        |(disks, net, pmem, (id, place))| {
            let mut config = VmConfig::default();
            config.payload.kernel = Some("/k".into());
            for (at, (id, place)) in disks.into_iter().enumerate() {
                let mut disk = DiskConfig::new(format!("/disk{at}"));
                (disk.id, disk.pci_device_id) = (id, place);
                config.disks.push(disk);
            }
            for (id, place) in net {
                let net = NetConfig::default();
                config.net.push(NetConfig {
                    id,
                    pci_device_id: place,
                    ..net
                });
            }
            for (at, (id, place)) in pmem.into_iter().enumerate() {
                let mut pmem = PmemConfig::new(format!("/pmem{at}"));
                (pmem.id, pmem.pci_device_id) = (id, place);
                config.pmem.push(pmem);
            }
            (config.rng.id, config.rng.pci_device_id) = (id, place);
            config
        },
    )
}

/// A command-line word of the keys that have a value.
struct Text(Vec<String>);

impl Text {
    fn new((id, segment, number): (&Option<String>, u16, Option<u8>)) -> Self {
        Self(Vec::new())
            .maybe("id", id.as_ref())
            .key("pci_segment", segment)
            .maybe("pci_device_id", number)
    }

    fn key(mut self, name: &str, value: impl Display) -> Self {
        self.0.push(format!("{name}=\"{value}\""));
        self
    }

    fn switch(self, name: &str, value: bool) -> Self {
        self.key(name, if value { "on" } else { "off" })
    }

    fn maybe(self, name: &str, value: Option<impl Display>) -> Self {
        match value {
            Some(value) => self.key(name, value),
            None => self,
        }
    }

    fn end(self) -> String {
        self.0.join(",")
    }
}

fn json<T: Serialize + JsonObject + JsonSchema>(config: &T) -> T {
    let value = serde_json::to_value(config).unwrap();
    assert!(is_valid::<T>(&value), "{value}");
    from_json(value.to_string().as_bytes()).unwrap()
}

proptest! {
    #[test]
    fn a_guest_survives_json(config in any_guest()) {
        prop_assert_eq!(json(&config), config);
    }

    #[test]
    fn what_validates_validates_again_and_shares_nothing(config in prop_oneof![any_guest(), likely_guest()]) {
        let asked = config.clone();
        let Ok(valid) = config.validate() else { return Ok(()) };
        let again = valid.config().clone().validate().unwrap();
        prop_assert_eq!(again.config(), valid.config());
        prop_assert_eq!(again.disks(), valid.disks());
        prop_assert_eq!(again.net(), valid.net());
        prop_assert_eq!(again.pmem(), valid.pmem());
        prop_assert_eq!(json(valid.config()), valid.config().clone());
        let mut names: Vec<&str> = asked.memory.zones.iter().map(|zone| zone.id.as_str()).collect();
        names.extend(valid.disks().iter().map(|disk| disk.id.as_str()));
        names.extend(valid.net().iter().map(|net| net.id.as_str()));
        names.extend(valid.fs().iter().map(|fs| fs.id.as_str()));
        names.extend(valid.pmem().iter().map(|pmem| pmem.id.as_str()));
        names.extend(valid.passthrough().iter().map(|device| device.id.as_str()));
        names.extend(valid.vsock().map(|vsock| vsock.id.as_str()));
        names.extend(valid.balloon().map(|balloon| balloon.id.as_str()));
        names.extend(valid.console().map(|console| console.id.as_str()));
        names.push(&valid.rng().id);
        let distinct: BTreeSet<&str> = names.iter().copied().collect();
        prop_assert_eq!(distinct.len(), names.len());
        prop_assert!(names.iter().all(|name| valid.ids().is_taken(name)));
        for (disk, asked) in valid.disks().iter().zip(&asked.disks) {
            prop_assert!(asked.id.as_ref().is_none_or(|id| *id == disk.id));
        }
    }

    #[test]
    fn a_pmem_is_the_same_in_words_and_in_json(config in any_pmem()) {
        let text = Text::new((&config.id, config.pci_segment, config.pci_device_id))
            .key("file", config.file.display())
            .maybe("socket", config.socket.as_ref().map(|path| path.display()))
            .maybe("pool", config.pool.as_ref())
            .maybe("size", config.size)
            .maybe("offset", config.offset)
            .switch("discard_writes", config.discard_writes)
            .maybe("dma", config.dma.map(|dma| if dma { "on" } else { "off" }))
            .maybe("on_removal", config.on_removal.map(|what| if what == OnRemoval::Eject { "eject" } else { "refuse" }))
            .maybe("removal_timeout", config.removal_timeout.map(u32::from));
        prop_assert_eq!(PmemConfig::parse(&text.end()).unwrap(), json(&config));
    }

    #[test]
    fn a_disk_is_the_same_in_words_and_in_json(config in any_disk()) {
        let raw = config.image_type == ImageType::Raw;
        let text = Text::new((&config.id, config.pci_segment, config.pci_device_id))
            .key("path", config.path.display())
            .switch("readonly", config.readonly)
            .switch("direct", config.direct)
            .key("num_queues", config.num_queues)
            .key("queue_size", config.queue_size)
            .maybe("serial", config.serial.as_ref())
            .maybe("image_type", raw.then_some("raw"));
        prop_assert_eq!(DiskConfig::parse(&text.end()).unwrap(), json(&config));
    }

    #[test]
    fn a_net_is_the_same_in_words_and_in_json(config in any_net()) {
        let text = Text::new((&config.id, config.pci_segment, config.pci_device_id))
            .maybe("tap", config.tap.as_ref())
            .maybe("ip", config.ip)
            .maybe("mask", config.mask)
            .maybe("mac", config.mac)
            .maybe("host_mac", config.host_mac)
            .maybe("mtu", config.mtu)
            .key("num_queues", config.num_queues)
            .key("queue_size", config.queue_size)
            .switch("offload_tso", config.offload_tso)
            .switch("offload_ufo", config.offload_ufo)
            .switch("offload_csum", config.offload_csum);
        prop_assert_eq!(NetConfig::parse(&text.end()).unwrap(), json(&config));
    }

    #[test]
    fn the_other_devices_are_the_same_in_words_and_in_json(
        vsock in any_vsock(), balloon in any_balloon(), rng in any_rng(), console in any_console(),
        fs in any_fs(),
    ) {
        let text = Text::new((&fs.id, fs.pci_segment, fs.pci_device_id))
            .key("tag", &fs.tag)
            .key("socket", fs.socket.display())
            .key("num_queues", fs.num_queues)
            .key("queue_size", fs.queue_size);
        prop_assert_eq!(FsConfig::parse(&text.end()).unwrap(), json(&fs));
        let text = Text::new((&vsock.id, vsock.pci_segment, vsock.pci_device_id))
            .key("cid", vsock.cid)
            .key("socket", vsock.socket.display());
        prop_assert_eq!(VsockConfig::parse(&text.end()).unwrap(), json(&vsock));
        let text = Text::new((&balloon.id, balloon.pci_segment, balloon.pci_device_id))
            .key("size", balloon.size)
            .switch("deflate_on_oom", balloon.deflate_on_oom)
            .switch("free_page_reporting", balloon.free_page_reporting);
        prop_assert_eq!(BalloonConfig::parse(&text.end()).unwrap(), json(&balloon));
        let text = Text::new((&rng.id, rng.pci_segment, rng.pci_device_id))
            .key("src", rng.src.display());
        prop_assert_eq!(RngConfig::parse(&text.end()).unwrap(), json(&rng));
        let keys = Text::new((&console.id, console.pci_segment, console.pci_device_id)).end();
        let mode = console.output.mode_name();
        let text = match console.output.path() {
            Some(path) => format!("{mode}=\"{}\",{keys}", path.display()),
            None => format!("{mode},{keys}"),
        };
        prop_assert_eq!(VirtioConsoleConfig::parse(&text).unwrap(), json(&console));
    }

    #[test]
    fn no_text_panics_the_reader(text in "[\\[\\]{}:,\"a-z0-9 ]{0,60}") {
        let _ = from_json::<VmConfig>(text.as_bytes());
        let _ = from_json::<DiskConfig>(format!("{{\"path\":\"/d\",{text}}}").as_bytes());
        let _ = VirtioConsoleConfig::parse(&text);
    }

    #[test]
    fn a_body_cut_short_is_an_error(length in 0..WHOLE_SCHEMA.len()) {
        let cut: String = WHOLE_SCHEMA.chars().take(length).collect();
        prop_assert!(from_json::<VmConfig>(cut.as_bytes()).is_err());
    }
}
