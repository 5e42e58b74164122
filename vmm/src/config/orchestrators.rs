//! What orchestrators send to have a guest, field by field: they are not asked to change.

use super::tests::read;
use super::*;

/// As the generated client of Kata Containers' runtime writes it for a guest with an initramfs, an extra disk, a shared
/// directory and a balloon; as its runtime in Rust writes it, and as libvirt's driver does.
#[test]
fn what_orchestrators_send_makes_a_guest() {
    let kata = read(
        r#"{
        "balloon": {"deflate_on_oom": false, "free_page_reporting": true, "size": 0},
        "console": {"iommu": false, "mode": "Off"},
        "cpus": {"boot_vcpus": 1, "kvm_hyperv": false, "max_vcpus": 8, "nested": true, "topology":
            {"cores_per_die": 8, "dies_per_package": 1, "packages": 1, "threads_per_core": 1}},
        "disks": [{"backing_files": false, "direct": false, "image_type": "Raw", "iommu": false, "num_queues": 1,
            "path": "/d", "queue_size": 1024, "readonly": true, "sparse": true, "vhost_user": false}],
        "fs": [{"num_queues": 1, "pci_segment": 1, "queue_size": 1024, "socket": "/f", "tag": "kataShared"}],
        "iommu": false, "landlock_enable": false,
        "memory": {"hotplug_method": "Acpi", "hotplug_size": 8589934592, "hugepages": false, "mergeable": false,
            "prefault": false, "shared": true, "size": 2147483648, "thp": true},
        "payload": {"cmdline": "panic=1", "initramfs": "/i", "kernel": "/k"},
        "platform": {"num_pci_segments": 2, "sev_snp": false, "tdx": false},
        "pvpanic": false, "rng": {"iommu": false, "src": "/dev/urandom"},
        "serial": {"iommu": false, "mode": "Tty"},
        "vsock": {"cid": 3, "iommu": false, "socket": "/v"}, "watchdog": false
    }"#,
    );
    let valid = kata.validate().unwrap();
    assert_eq!(valid.fs()[0].place.segment, 1);
    assert_eq!(valid.cpus().topology, Some("1:8:1:1".parse().unwrap()));
    // With `null` for what it does not say, also where no schema has such a field.
    let rust: VmConfig = from_json(
        br#"{
        "cpus": {"boot_vcpus": 1, "max_vcpus": 4, "topology": {"threads_per_core": 1, "cores_per_die": 4,
            "dies_per_package": 1, "packages": 1}, "kvm_hyperv": false, "nested": true, "max_phys_bits": 46,
            "features": {"amx": false}},
        "memory": {"size": 2147483648, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": 6442450944,
            "shared": true, "hugepages": false, "prefault": false},
        "payload": {"firmware": null, "kernel": "/k", "cmdline": "panic=1", "initramfs": null, "mrconfigid": null,
            "host_data": null},
        "disks": [{"path": "/d", "readonly": true, "direct": false, "iommu": false, "num_queues": 1, "queue_size": 128,
            "vhost_user": false, "vhost_socket": null, "rate_limiter_config": null, "id": null, "disable_io_uring": false,
            "pci_segment": 0, "sparse": true, "image_type": "Unknown"}],
        "rng": {"src": "/dev/urandom", "iommu": false},
        "fs": [{"tag": "kataShared", "socket": "/f", "num_queues": 1, "queue_size": 1024, "id": null, "pci_segment": 0}],
        "serial": {"file": null, "mode": "Tty", "iommu": false}, "console": {"file": null, "mode": "Off", "iommu": false},
        "vsock": {"cid": 3, "socket": "/v", "iommu": false, "id": null, "pci_segment": 0},
        "iommu": false, "watchdog": false,
        "platform": {"num_pci_segments": 1, "iommu_segments": null, "serial_number": null, "uuid": null,
            "oem_strings": null, "tdx": false}
    }"#,
    )
    .unwrap();
    // Which it reads back by types that have no default for these.
    let told = serde_json::to_value(rust.validate().unwrap().config()).unwrap();
    for field in [
        "/cpus/max_phys_bits",
        "/serial/mode",
        "/console/mode",
        "/disks/0/num_queues",
        "/disks/0/queue_size",
        "/fs/0/num_queues",
        "/fs/0/queue_size",
        "/platform/num_pci_segments",
        "/rng/src",
        "/vsock/cid",
        "/memory/size",
    ] {
        assert!(told.pointer(field).is_some(), "{field}: {told}");
    }
    let libvirt = read(
        r#"{
        "console": {"mode": "Pty"}, "serial": {"mode": "Socket", "socket": "/s"},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2}, "memory": {"size": 1073741824},
        "payload": {"kernel": "/k", "cmdline": "quiet", "initramfs": "/i"},
        "disks": [{"path": "/d"}, {"path": "/e", "readonly": true}]
    }"#,
    );
    libvirt.validate().unwrap();
}
