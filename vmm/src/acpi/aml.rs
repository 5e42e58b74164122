//! Shapes of AML that several tables need, over the crate's terms.

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Method, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::serialise;

/// Encoded AML, so that terms can be kept without what they were made from.
pub(super) struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(super) fn encoded(term: &dyn Aml) -> Encoded {
    Encoded(serialise(term))
}

pub(super) fn refs(terms: &[Encoded]) -> Vec<&dyn Aml> {
    terms.iter().map(|term| term as &dyn Aml).collect()
}

/// `Name (NAME, value)`
pub(super) fn name(name: &str, value: &dyn Aml) -> Encoded {
    encoded(&Name::new(name.into(), value))
}

/// `Name (_HID, EisaId (id))`
pub(super) fn hid(id: &str) -> Encoded {
    name("_HID", &EISAName::new(id))
}

/// `Name (_CRS, ResourceTemplate () { resources })`
pub(super) fn crs(resources: Vec<&dyn Aml>) -> Encoded {
    name("_CRS", &ResourceTemplate::new(resources))
}

/// `Device (NAME) { children }`
pub(super) fn device(name: &str, children: &[Encoded]) -> Encoded {
    encoded(&Device::new(name.into(), refs(children)))
}

/// `Method (NAME, arguments, Serialized) { body }`
pub(super) fn serialized_method(name: &str, arguments: u8, body: Vec<&dyn Aml>) -> Encoded {
    encoded(&Method::new(name.into(), arguments, true, body))
}

/// `If (value & bits) { then }`
pub(super) fn if_any(value: &dyn Aml, bits: u32, then: &dyn Aml) -> Encoded {
    encoded(&If::new(&And::new(&ZERO, value, &bits), vec![then]))
}

/// `Notify (object, value)`
pub(super) fn notify(object: &str, value: &dyn Aml) -> Encoded {
    encoded(&Notify::new(&Path::new(object), value))
}

/// An operation region of memory-mapped 32-bit registers, with fields at their offsets. `fields` are in order.
pub(super) fn registers(region: &str, base: u64, size: u64, fields: &[([u8; 4], u64)]) -> Encoded {
    let mut entries = Vec::new();
    let mut end = 0;
    for (name, offset) in fields {
        if *offset > end {
            entries.push(FieldEntry::Reserved(bits(offset - end)));
        }
        entries.push(FieldEntry::Named(*name, bits(REGISTER)));
        end = offset + REGISTER;
    }
    let space = OpRegionSpace::SystemMemory;
    let mut both = serialise(&OpRegion::new(region.into(), space, &base, &size));
    both.extend(serialise(&Field::new(
        region.into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        // A register has one field, so there is nothing to preserve.
        FieldUpdateRule::WriteAsZeroes,
        entries,
    )));
    Encoded(both)
}

const REGISTER: u64 = 4;

fn bits(bytes: u64) -> usize {
    usize::try_from(bytes * 8).expect("a window of a few registers")
}
