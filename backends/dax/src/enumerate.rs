//! All dax devices and regions of a host.
//!
//! A device that is removed while the list is made is left out: the list is what was there throughout.

#![forbid(unsafe_code)]

use crate::device::{DeviceFacts, RegionFacts};
use crate::host::Host;
use crate::sysfs::SysfsError;

impl Host {
    /// True when the kernel has a dax bus at all (built in, or its module loaded).
    pub fn has_dax_bus(&self) -> bool {
        self.sys().join("bus/dax").exists()
    }

    /// Every dax device in every mode, ordered by name; empty without a dax bus.
    pub fn devices(&self) -> Result<Vec<DeviceFacts>, SysfsError> {
        let bus = self.sys().join("bus/dax/devices");
        let names = match bus.entries() {
            Ok(names) => names,
            Err(error) if error.is_missing() => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut devices = Vec::with_capacity(names.len());
        for name in names {
            match DeviceFacts::read(&bus.join(&name)) {
                Ok(facts) => devices.push(facts),
                // The kernel takes a device's attributes away before its bus entry, so a missing one means removal.
                Err(error) if error.is_missing() => {}
                Err(error) => return Err(error),
            }
        }
        devices.sort_by_key(|facts| facts.name);
        Ok(devices)
    }

    /// Every dax region, ordered by id. The kernel keeps at least one device in each, so none is missed.
    pub fn regions(&self) -> Result<Vec<RegionFacts>, SysfsError> {
        let mut regions: Vec<_> = self.devices()?.into_iter().map(|d| d.region).collect();
        // Two devices of one region can be read either side of a change; one entry per region is the contract.
        regions.dedup_by(|a, b| a.path == b.path);
        regions.sort_by_key(|region| region.id);
        Ok(regions)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{FakeDevice, FakeHost};
    use crate::{Driver, MapLocation, Mode, PhysRange, RegionKind};
    use serde_json::json;

    #[test]
    fn no_dax_bus_is_an_empty_list() {
        let fake = FakeHost::new();
        assert!(!fake.host().has_dax_bus());
        assert_eq!(fake.host().devices().unwrap(), []);
        assert_eq!(fake.host().regions().unwrap(), []);
    }

    #[test]
    fn every_fact_of_a_persistent_memory_device() {
        let fake = FakeHost::new();
        let device = fake.add(&FakeDevice::pmem("dax0.0"));
        let facts = &fake.host().devices().unwrap()[0];
        assert_eq!(facts.name.to_string(), "dax0.0");
        assert_eq!(facts.number.to_string(), "1:5");
        assert_eq!(facts.size_bytes, 2046 << 20);
        assert_eq!(facts.align_bytes, 2 << 20);
        assert_eq!(facts.target_node, Some(1));
        assert_eq!(facts.numa_node, Some(0));
        assert_eq!(facts.resource, Some(0x1_4020_0000));
        assert_eq!(
            facts.mappings.as_deref().unwrap(),
            [PhysRange {
                page_offset: 0,
                start: 0x1_4020_0000,
                end: 0x1_bfff_ffff
            }]
        );
        assert_eq!(facts.driver, Driver::DeviceDax);
        assert_eq!(facts.mode(), Mode::Devdax);
        assert_eq!(facts.memmap_on_memory, None);
        assert_eq!(facts.map, Some(MapLocation::Mem));
        assert_eq!(facts.namespace.as_deref(), Some("namespace0.0"));
        assert_eq!(facts.path, device.canonicalize().unwrap());
        assert_eq!(facts.region.id, 0);
        assert_eq!(facts.region.kind, RegionKind::Static);
        assert_eq!(facts.region.provider.as_deref(), Some("nd"));
        assert_eq!(facts.region.size_bytes, 2046 << 20);
        assert_eq!(facts.region.align_bytes, Some(2 << 20));
    }

    #[test]
    fn devices_of_one_dynamic_region_share_it() {
        let fake = FakeHost::new();
        fake.add(&FakeDevice::hmem("dax1.10"));
        fake.add(&FakeDevice {
            driver: Some("kmem"),
            ..FakeDevice::hmem("dax1.2")
        });
        fake.add(&FakeDevice::pmem("dax0.0"));
        let names: Vec<_> = fake.host().devices().unwrap();
        let names: Vec<_> = names.iter().map(|d| d.name.to_string()).collect();
        assert_eq!(names, ["dax0.0", "dax1.2", "dax1.10"]);
        let regions = fake.host().regions().unwrap();
        assert_eq!(regions.iter().map(|r| r.id).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(
            regions[1].kind,
            RegionKind::Dynamic {
                available_size: 768 << 20
            }
        );
        assert_eq!(regions[1].provider.as_deref(), Some("platform"));
    }

    #[test]
    fn json_has_daxctl_names() {
        let fake = FakeHost::new();
        fake.add(&FakeDevice::pmem("dax0.0"));
        fake.add(&FakeDevice {
            driver: Some("kmem"),
            ..FakeDevice::hmem("dax1.0")
        });
        fake.add(&FakeDevice {
            driver: None,
            ..FakeDevice::hmem("dax1.1")
        });
        let list = serde_json::to_value(fake.host().devices().unwrap()).unwrap();
        assert_eq!(list[0]["chardev"], json!("dax0.0"));
        assert_eq!(list[0]["size"], json!(2046 << 20));
        assert_eq!(list[0]["target_node"], json!(1));
        assert_eq!(list[0]["align"], json!(2 << 20));
        assert_eq!(list[0]["mode"], json!("devdax"));
        assert_eq!(list[0].get("state"), None);
        assert_eq!(
            list[0]["mappings"],
            json!([{"page_offset": 0, "start": 0x1_4020_0000_u64, "end": 0x1_bfff_ffff_u64, "size": 2046 << 20}])
        );
        assert_eq!(list[0]["map"], json!("mem"));
        assert_eq!(list[1]["mode"], json!("system-ram"));
        assert_eq!(list[1]["region"]["available_size"], json!(768 << 20));
        assert_eq!(list[2]["mode"], json!("devdax"));
        assert_eq!(list[2]["state"], json!("disabled"));
    }

    #[test]
    fn nodes_may_be_absent() {
        let fake = FakeHost::new();
        let device = fake.add(&FakeDevice::pmem("dax0.0"));
        std::fs::remove_file(device.join("target_node")).unwrap();
        std::fs::write(device.join("numa_node"), "-1\n").unwrap();
        std::fs::remove_file(device.join("resource")).unwrap();
        let facts = &fake.host().devices().unwrap()[0];
        assert_eq!(facts.target_node, None);
        assert_eq!(facts.numa_node, None);
        assert_eq!(facts.resource, None);
        let value = serde_json::to_value(facts).unwrap();
        assert_eq!(value.get("target_node"), None);
    }

    #[test]
    fn page_array_on_the_device_and_memmap_on_memory() {
        let fake = FakeHost::new();
        let device = fake.add(&FakeDevice::pmem("dax0.0"));
        std::fs::write(device.join("../mode"), "pmem\n").unwrap();
        std::fs::write(device.join("memmap_on_memory"), "1\n").unwrap();
        let facts = &fake.host().devices().unwrap()[0];
        assert_eq!(facts.map, Some(MapLocation::Dev));
        assert_eq!(facts.memmap_on_memory, Some(true));
    }

    #[test]
    fn a_device_that_left_is_left_out_and_a_broken_one_is_an_error() {
        let fake = FakeHost::new();
        let device = fake.add(&FakeDevice::pmem("dax0.0"));
        fake.add(&FakeDevice::hmem("dax1.0"));
        std::fs::remove_dir_all(&device).unwrap();
        let names: Vec<_> = fake.host().devices().unwrap();
        assert_eq!(names.len(), 1);
        assert_eq!(names[0].name.to_string(), "dax1.0");

        let broken = fake.add(&FakeDevice::pmem("dax2.0"));
        std::fs::write(broken.join("align"), "3000000\n").unwrap();
        let error = fake.host().devices().unwrap_err();
        assert!(error.to_string().contains("power of two"), "{error}");
    }

    #[test]
    fn names_parse_strictly() {
        for bad in [
            "dax", "dax0", "dax0.", "dax.0", "dax+1.0", "dax01.0", "DAX0.0", "dax0.0.0", "null",
        ] {
            bad.parse::<crate::DeviceName>().unwrap_err();
        }
        let name: crate::DeviceName = "dax12.34".parse().unwrap();
        assert_eq!((name.region, name.instance), (12, 34));
    }
}
