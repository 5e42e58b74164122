//! The JSON schema of a configuration type: derived from the type itself, then completed by its [`super::Shape`].
//!
//! A derived schema knows the type's fields, their defaults and that nothing else is taken. What [`super::from_json`] does
//! before the type is read is added here: `null` is the same as absent, and fields that are not built are taken while they
//! ask for nothing. Such fields are marked `x-not-built`.
//!
//! Whoever keeps to the schema is understood. The reverse has three gaps, all there for clients of old: a field that is not
//! built is also taken when it is empty in a way that is not its own (`"iommu": ""`), one that no schema has any more when it is
//! `null`, and `virtio_id`, the older name of `device_type`, is not mentioned.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::json::{Default, JsonObject, NotBuilt};

/// Marks what the contract has and daxhund does not build.
pub(crate) const NOT_BUILT: &str = "x-not-built";

/// For derived schemas: what clients can send, where the type itself is what is read of it.
pub(crate) fn as_sent<T: JsonObject>(schema: &mut Schema) {
    let required: Vec<Value> = match schema.get("required") {
        Some(Value::Array(names)) => names.clone(),
        _ => Vec::new(),
    };
    let Some(Value::Object(properties)) = schema.get_mut("properties") else {
        return;
    };
    for (name, property) in properties.iter_mut() {
        if !required.iter().any(|required| required == name) {
            or_null(property);
        }
    }
    for field in T::SHAPE.not_built {
        properties.insert(field.name.to_owned(), field.schema());
    }
}

/// Lets `null` pass as well.
fn or_null(schema: &mut Value) {
    let Value::Object(members) = schema else {
        return;
    };
    match members.get_mut("type") {
        Some(Value::String(kind)) => {
            let kinds = json!([kind, "null"]);
            members.insert("type".to_owned(), kinds);
        }
        Some(_) => {}
        None => {
            if let Some(reference) = members.remove("$ref") {
                let either = json!([{"$ref": reference}, {"type": "null"}]);
                members.insert("anyOf".to_owned(), either);
            }
        }
    }
}

impl NotBuilt {
    /// What the field takes.
    fn schema(&self) -> Value {
        let mut schema = match self.default {
            Default::Null => json!({"type": "null"}),
            Default::Empty => json!({
                "type": ["array", "null", "object", "string"],
                "maxItems": 0,
                "maxLength": 0,
                "maxProperties": 0,
            }),
            Default::Switch(default) => json!({
                "type": ["boolean", "null"],
                "not": {"const": !default},
                "default": default,
            }),
            Default::Number(default) => json!({
                "type": ["integer", "null"],
                "minimum": default,
                "maximum": default,
                "default": default,
            }),
            Default::Text(default) => json!({
                "type": ["null", "string"],
                "pattern": format!("^({default})?$"),
                "default": default,
            }),
            Default::Object(fields) => {
                let mut properties = serde_json::Map::new();
                for field in fields {
                    properties.insert(field.name.to_owned(), field.schema());
                }
                json!({
                    "type": ["null", "object"],
                    "properties": properties,
                    "additionalProperties": false,
                })
            }
        };
        schema["description"] = "Not built: taken while it asks for nothing.".into();
        schema[NOT_BUILT] = true.into();
        schema
    }
}

/// An IPv4 or IPv6 address.
pub(super) fn ip_address(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]})
}

/// For derived schemas: a default is shown there although answers leave the field out.
pub(super) fn never<T>(_: &T) -> bool {
    false
}

#[cfg(test)]
pub(super) mod tests {
    use std::any::type_name;
    use std::collections::HashMap;
    use std::sync::{Arc, LazyLock, Mutex, PoisonError};

    use jsonschema::Validator;
    use schemars::{JsonSchema, schema_for};

    use super::*;
    use crate::config::{
        BalloonConfig, ConsoleConfig, CpusConfig, DeviceConfig, DiskConfig, FsConfig,
        GenericVhostUserConfig, JsonError, LONGEST_REMOVAL_TIMEOUT, MacAddr, MemoryConfig,
        MemoryZoneConfig, NetConfig, NumaConfig, PayloadConfig, PlatformConfig, PmemConfig,
        RngConfig, VirtioConsoleConfig, VmConfig, VsockConfig, from_json,
    };

    /// Making one takes longer than using it.
    static VALIDATORS: LazyLock<Mutex<HashMap<&'static str, Arc<Validator>>>> =
        LazyLock::new(Mutex::default);

    /// Whether `value` is as the schema of `T` says.
    pub(in crate::config) fn is_valid<T: JsonSchema>(value: &Value) -> bool {
        let mut validators = VALIDATORS.lock().unwrap_or_else(PoisonError::into_inner);
        let validator = validators.entry(type_name::<T>()).or_insert_with(|| {
            let options = jsonschema::options().should_validate_formats(true);
            Arc::new(options.build(schema_for!(T).as_value()).unwrap())
        });
        let validator = Arc::clone(validator);
        drop(validators);
        validator.is_valid(value)
    }

    /// Reads `value` and checks that its schema says the same of it.
    fn read<T: JsonObject + JsonSchema>(value: &Value) -> Result<T, JsonError> {
        let read = from_json::<T>(value.to_string().as_bytes());
        let error = read.as_ref().err();
        let name = type_name::<T>();
        assert_eq!(
            is_valid::<T>(value),
            read.is_ok(),
            "{name} {value}: {error:?}"
        );
        read
    }

    /// What a device is at least, for each type.
    fn with_least(mut visit: impl Visit) {
        visit.visit::<VmConfig>(json!({"payload": {}}));
        visit.visit::<CpusConfig>(json!({"boot_vcpus": 1, "max_vcpus": 1}));
        visit.visit::<MemoryConfig>(json!({"size": 0}));
        visit.visit::<MemoryZoneConfig>(json!({"id": "z"}));
        visit.visit::<PayloadConfig>(json!({}));
        visit.visit::<ConsoleConfig>(json!({"mode": "Null"}));
        visit.visit::<VirtioConsoleConfig>(json!({"mode": "Null"}));
        visit.visit::<DiskConfig>(json!({}));
        visit.visit::<NetConfig>(json!({}));
        visit.visit::<RngConfig>(json!({"src": "/dev/urandom"}));
        let device = json!({"socket": "/s", "queue_sizes": [], "device_type": 2});
        visit.visit::<GenericVhostUserConfig>(device);
        visit.visit::<FsConfig>(json!({"tag": "t", "socket": "/s"}));
        visit.visit::<PmemConfig>(json!({}));
        visit.visit::<VsockConfig>(json!({"cid": 3, "socket": "/s"}));
        visit.visit::<BalloonConfig>(json!({"size": 0}));
        visit.visit::<DeviceConfig>(json!({}));
        visit.visit::<PlatformConfig>(json!({}));
        visit.visit::<NumaConfig>(json!({"guest_numa_id": 0}));
    }

    /// A check that is made of every type.
    trait Visit {
        fn visit<T: JsonObject + JsonSchema + PartialEq + std::fmt::Debug>(&mut self, least: Value);
    }

    /// The members of a type's schema.
    fn properties<T: JsonSchema>() -> serde_json::Map<String, Value> {
        match schema_for!(T).get("properties") {
            Some(Value::Object(properties)) => properties.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_default_is_what_an_absent_field_is() {
        struct Defaults;
        impl Visit for Defaults {
            fn visit<T: JsonObject + JsonSchema + PartialEq + std::fmt::Debug>(
                &mut self,
                least: Value,
            ) {
                let absent = read::<T>(&least).unwrap();
                for (name, property) in properties::<T>() {
                    if let Some(default) = property.get("default") {
                        let mut said = least.clone();
                        said[&name] = default.clone();
                        assert_eq!(read::<T>(&said).unwrap(), absent, "{said}");
                    }
                }
            }
        }
        with_least(Defaults);
    }

    #[test]
    fn null_and_strangers_are_as_the_schema_says() {
        struct Members;
        impl Visit for Members {
            fn visit<T: JsonObject + JsonSchema + PartialEq + std::fmt::Debug>(
                &mut self,
                least: Value,
            ) {
                for name in properties::<T>().keys() {
                    let mut said = least.clone();
                    said[name] = Value::Null;
                    // Good for all but those that have to be there.
                    assert_eq!(
                        read::<T>(&said).is_ok(),
                        least.get(name).is_none(),
                        "{said}"
                    );
                    // Of no kind that any field has.
                    said[name] = json!(1.5);
                    read::<T>(&said).unwrap_err();
                    let mut without = least.clone();
                    if let Value::Object(members) = &mut without {
                        members.remove(name);
                    }
                    let _ = read::<T>(&without);
                }
                let mut said = least;
                said["colour"] = json!("red");
                read::<T>(&said).unwrap_err();
            }
        }
        with_least(Members);
    }

    #[test]
    fn what_is_not_built_is_taken_as_the_schema_says() {
        struct Defaults;
        impl Visit for Defaults {
            fn visit<T: JsonObject + JsonSchema + PartialEq + std::fmt::Debug>(
                &mut self,
                least: Value,
            ) {
                let built_alone = read::<T>(&least).unwrap();
                for field in T::SHAPE.not_built {
                    let mut said = least.clone();
                    let values: &[Value] = match field.default {
                        Default::Null => &[json!({}), json!(false), json!("x")],
                        Default::Empty => {
                            &[json!(""), json!([]), json!({}), json!("x"), json!([0])]
                        }
                        Default::Switch(_) => &[json!(true), json!(false), json!("x"), json!([0])],
                        Default::Number(_) => {
                            &[json!(0), json!(46), json!(47), json!(-1), json!("x")]
                        }
                        Default::Text(_) => &[json!(""), json!("Vm"), json!("Off"), json!(1)],
                        Default::Object(_) => &[json!({}), json!({"colour": 1}), json!([0])],
                    };
                    for value in values {
                        said[field.name] = value.clone();
                        if let Ok(read) = read::<T>(&said) {
                            assert_eq!(read, built_alone, "{said}");
                        }
                    }
                }
            }
        }
        with_least(Defaults);
    }

    #[test]
    fn what_types_check_by_themselves_is_in_their_schemas() {
        for (value, good) in [
            (json!("52:54:00:12:34:56"), true),
            (json!("AA:bb:00:12:34:56"), true),
            (json!("52:54:00:12:34"), false),
            (json!("52:54:00:12:34:56:78"), false),
            (json!("52:54:00:12:34:5g"), false),
            (json!("+2:54:00:12:34:56"), false),
            (json!("52-54-00-12-34-56"), false),
            (json!(1), false),
        ] {
            let read = serde_json::from_value::<MacAddr>(value.clone());
            assert_eq!((read.is_ok(), is_valid::<MacAddr>(&value)), (good, good));
            let net = read_net(&json!({"mac": value, "host_mac": value}));
            assert_eq!(net, good, "{value}");
        }
        for (value, good) in [
            ("10.0.0.1", true),
            ("fd00::1", true),
            ("::ffff:10.0.0.1", true),
            ("10.0.0", false),
            ("10.0.0.256", false),
            ("fd00::1%eth0", false),
            ("", false),
        ] {
            assert_eq!(
                read_net(&json!({"ip": value, "mask": value})),
                good,
                "{value}"
            );
        }
        let longest = LONGEST_REMOVAL_TIMEOUT.as_secs();
        for (seconds, good) in [(0, true), (longest, true), (longest + 1, false)] {
            let pmem = json!({"file": "/p", "removal_timeout": seconds});
            assert_eq!(read::<PmemConfig>(&pmem).is_ok(), good, "{seconds}");
        }
        for mode in ["Off", "Null", "Tty", "Pty", "File", "Socket", "off"] {
            for paths in [
                json!({}),
                json!({"file": "/f"}),
                json!({"socket": "/s"}),
                json!({"file": "/f", "socket": "/s"}),
                json!({"file": "", "socket": null}),
                json!({"file": "/f", "socket": ""}),
                json!({"file": "", "socket": "/s"}),
            ] {
                let mut console = paths;
                console["mode"] = mode.into();
                let serial = read::<ConsoleConfig>(&console);
                let console = read::<VirtioConsoleConfig>(&console);
                assert_eq!(serial.is_ok(), console.is_ok());
            }
        }
    }

    fn read_net(value: &Value) -> bool {
        read::<NetConfig>(value).is_ok()
    }
}
