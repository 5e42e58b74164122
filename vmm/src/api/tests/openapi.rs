//! The document against its copy, against what is served, and against the contract.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Map;

use super::*;
use crate::api::openapi::document;

/// Facts of the contract, and of what is daxhund's own.
const CONTRACT: &str = include_str!("../../../tests/contract.json");

fn generated() -> Value {
    serde_json::to_value(document()).unwrap()
}

fn contract() -> Value {
    serde_json::from_str(CONTRACT).unwrap()
}

fn members(value: &Value) -> &Map<String, Value> {
    value
        .as_object()
        .unwrap_or_else(|| panic!("no object: {value}"))
}

/// Whether `value` is what the component `name` of the document says.
fn is_a(name: &str, value: &Value) -> bool {
    let schema = json!({
        "$ref": format!("#/components/schemas/{name}"),
        "components": generated()["components"],
    });
    let options = jsonschema::options().should_validate_formats(true);
    options.build(&schema).unwrap().is_valid(value)
}

#[test]
fn the_copy_is_of_this_version() {
    let text = serde_json::to_string_pretty(&generated()).unwrap() + "\n";
    crate::documents::assert_is("openapi.json", &text);
}

#[test]
fn it_is_served() {
    let api = Api::start(Limits::default());
    let response = get(&api.client(), "openapi.json").unwrap();
    assert_eq!(response.status, 200);
    let served: Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!(served, generated());
    assert_eq!(served["servers"], json!([{"url": "/api/v1"}]));
}

#[test]
fn every_reference_leads_somewhere_and_every_component_is_referred_to() {
    fn collect(value: &Value, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(members) => {
                let reference = members.get("$ref").and_then(Value::as_str);
                into.extend(reference.map(str::to_owned));
                members.values().for_each(|value| collect(value, into));
            }
            Value::Array(items) => items.iter().for_each(|value| collect(value, into)),
            _ => {}
        }
    }
    let document = generated();
    let mut references = BTreeSet::new();
    collect(&document, &mut references);
    let mut components = BTreeSet::new();
    for (kind, named) in members(&document["components"]) {
        let path = |name| format!("#/components/{kind}/{name}");
        components.extend(members(named).keys().map(path));
    }
    assert_eq!(references, components);
}

#[test]
fn what_is_answered_is_as_the_document_says() {
    let api = Api::start(Limits::default());
    let pong = get(&api.client(), "vmm.ping").unwrap().body;
    let pong = serde_json::from_slice(&pong).unwrap();
    assert!(is_a("VmmPingResponse", &pong), "{pong}");
    let http = api.exchange("GET /api/v1/vm.boot HTTP/1.1\r\n\r\n");
    let chain = serde_json::from_str(&http.body).unwrap();
    assert!(is_a("ErrorChain", &chain), "{chain}");
    assert!(!is_a("ErrorChain", &json!([])));

    let config = crate::config::VmConfig::default();
    let mut info = VmInfo {
        config: &config,
        state: VmState::Created,
        memory_actual_size: 0,
        device_tree: None,
        dax_memory: None,
        memory_leaving: None,
        poison: None,
        devices_kept: Vec::new(),
        paused_because: None,
    };
    let created = serde_json::to_value(&info).unwrap();
    assert!(is_a("VmInfo", &created), "{created}");
    let names: Vec<&String> = members(&created).keys().collect();
    let expected = ["config", "device_tree", "memory_actual_size", "state"];
    assert_eq!(names, expected);
    let node = DeviceNode {
        id: "d",
        pci_bdf: "0000:00:01.0".into(),
        children: &[],
        state: "present",
        backend: Some(BackendNode {
            socket: Path::new("/run/b"),
            state: BackendState::Lost,
            because: Some("it closed the socket".into()),
        }),
    };
    info.device_tree = Some([("d".to_owned(), node)].into());
    info.dax_memory = Some(vec![DaxMemory {
        id: "mem0",
        gpa: "0x0".into(),
        size: 4096,
        file: Path::new("/dev/dax0.0"),
        offset: 4096,
        pool: Some("ram"),
    }]);
    info.memory_leaving = Some(vec![MemoryLeaving {
        id: "d",
        gpa: "0x1000".into(),
        size: 4096,
        state: "stuck",
        held_by: Some("the IOMMU"),
    }]);
    info.poison = Some(Vec::new());
    info.devices_kept = vec!["n"];
    info.paused_because = Some("its RAM is gone".into());
    let mut running = serde_json::to_value(&info).unwrap();
    assert!(is_a("VmInfo", &running), "{running}");
    running["device_tree"]["d"]["backend"]["state"] = "asleep".into();
    assert!(!is_a("VmInfo", &running));

    let counters = [("d".to_owned(), [("reads".to_owned(), 3)].into())];
    let counters = VmCounters(counters.into());
    let counters = serde_json::to_value(counters).unwrap();
    assert!(is_a("VmCounters", &counters), "{counters}");
    let added = DeviceAdded {
        id: "d".into(),
        bdf: "0000:00:01.0".into(),
    };
    assert!(is_a("PciDeviceInfo", &serde_json::to_value(added).unwrap()));
}

#[test]
fn bodies_are_taken_as_the_document_says() {
    for (name, body, good) in [
        ("VmResize", json!({}), true),
        ("VmResize", json!({"desired_balloon": null}), true),
        ("VmResize", json!({"desired_balloon": "1G"}), false),
        ("VmResize", json!({"desired_vcpus": -1}), false),
        ("VmResize", json!({"desired_size": 1}), false),
        ("VmResizeDisk", json!({"id": "d", "desired_size": 1}), true),
        ("VmResizeDisk", json!({"id": "d"}), false),
        ("VmRemoveDevice", json!({"id": "d"}), true),
        ("VmRemoveDevice", json!({"id": "d", "x": 1}), false),
        ("VmDrain", json!({"id": "d"}), true),
        ("VmDrain", json!({"id": null}), false),
    ] {
        assert_eq!(is_a(name, &body), good, "{name} {body}");
        let path = match name {
            "VmResize" => "vm.resize",
            "VmResizeDisk" => "vm.resize-disk",
            "VmRemoveDevice" => "vm.remove-device",
            _ => "vm.drain",
        };
        let api = Api::answering(|_| Ok(Reply::Empty));
        let taken = put_json(&api.client(), path, &body).is_ok();
        assert_eq!(taken, good, "{path} {body}");
    }
}

/// Paths with their methods, those that are not built marked.
#[test]
fn the_paths_are_the_contracts_and_daxhunds_own() {
    let (document, contract) = (generated(), contract());
    let mut expected = members(&contract["paths"]).clone();
    expected.extend(members(&contract["own_paths"]).clone());
    let mut ours = Map::new();
    for (path, methods) in members(&document["paths"]) {
        let name = path.strip_prefix('/').unwrap();
        for (method, operation) in members(methods) {
            ours.insert(name.to_owned(), method.as_str().into());
            let schema = |content: &Value| {
                let schema = &content["content"]["application/json"]["schema"]["$ref"];
                let name = schema.as_str().and_then(|path| path.rsplit('/').next());
                name.map_or(Value::Null, Value::from)
            };
            let is_ours = contract["own_paths"].get(name).is_some();
            let is_built = operation.get("x-not-built").is_none();
            assert!(operation["responses"].get("500").is_some(), "{name}");
            if is_built && !is_ours {
                let (asked, told) = (&contract["bodies"][name], &contract["answers"][name]);
                assert_eq!(schema(&operation["requestBody"]), *asked, "{name}");
                assert_eq!(schema(&operation["responses"]["200"]), *told, "{name}");
            }
            if !is_built {
                assert!(operation["responses"].get("204").is_none(), "{name}");
            }
        }
    }
    assert_eq!(ours, expected);
}

/// What one field is like.
#[derive(Debug, PartialEq)]
struct Field {
    required: bool,
    default: Option<Value>,
}

/// Every difference between the contract and the document, as `Type.field: what`.
fn differences() -> BTreeMap<String, String> {
    let (document, contract) = (generated(), contract());
    let schemas = members(&document["components"]["schemas"]);
    let listed = |list: &str, name: &str, field: &str| {
        let fields = contract[list][name].as_array();
        fields.is_some_and(|fields| fields.iter().any(|known| known == field))
    };
    let is_answered = |name: &str| {
        let answered = contract["answered"].as_array();
        answered.is_some_and(|names| names.iter().any(|known| known == name))
    };
    let mut found = BTreeMap::new();
    for (name, facts) in members(&contract["types"]) {
        let Some(schema) = schemas.get(name) else {
            found.insert(name.clone(), "no such type".to_owned());
            continue;
        };
        let ours = members(&schema["properties"]);
        for (field, fact) in members(facts) {
            let way = format!("{name}.{field}");
            let Some(property) = ours.get(field) else {
                found.insert(way, "no such field".to_owned());
                continue;
            };
            let theirs = Field {
                required: fact["required"] == true,
                default: fact.get("default").cloned(),
            };
            let required = schema["required"].as_array();
            let field = Field {
                required: required.is_some_and(|names| names.iter().any(|name| name == field)),
                default: property.get("default").cloned(),
            };
            // What is always told need not be promised.
            let told_more = field.required && is_answered(name);
            if theirs.required != field.required && !told_more {
                let what = if field.required {
                    "required"
                } else {
                    "optional"
                };
                found.insert(way.clone(), what.to_owned());
            }
            // A default that the contract does not tell may be told here.
            if theirs.default.is_some() && theirs.default != field.default {
                let what = field.default.unwrap_or_default();
                found.insert(way.clone(), format!("default {what}"));
            }
            let not_built = property.get("properties");
            if let (Some(theirs), Some(known)) = (fact["members"].as_array(), not_built) {
                let theirs = theirs.iter().filter_map(Value::as_str);
                for member in theirs.filter(|member| known.get(member).is_none()) {
                    found.insert(format!("{way}.{member}"), "no such field".to_owned());
                }
            }
        }
        for (field, property) in ours {
            let way = format!("{name}.{field}");
            let not_built = property.get("x-not-built").is_some();
            let what = if facts.get(field).is_some() || listed("own_fields", name, field) {
                continue;
            } else if !listed("beside_the_document", name, field) {
                "of nobody's schema"
            } else if !not_built {
                "built, and not in the contract's document"
            } else {
                continue;
            };
            found.insert(way, what.to_owned());
        }
    }
    for (name, words) in members(&contract["words"]) {
        let ours = schemas
            .get(name)
            .and_then(|schema| schema["enum"].as_array());
        let ours = ours.into_iter().flatten().filter_map(Value::as_str);
        let ours: BTreeSet<&str> = ours.collect();
        let theirs = words.as_array().into_iter().flatten();
        let theirs: BTreeSet<&str> = theirs.filter_map(Value::as_str).collect();
        for word in theirs.symmetric_difference(&ours) {
            let who = if ours.contains(word) {
                "ours"
            } else {
                "theirs"
            };
            found.insert(format!("{name}.{word}"), format!("only {who}"));
        }
    }
    found
}

#[test]
fn the_fields_and_defaults_are_the_contracts() {
    let contract = contract();
    let explained: BTreeMap<String, String> = members(&contract["differences"])
        .iter()
        .map(|(way, told)| (way.clone(), told["is"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(differences(), explained);
}

#[test]
fn no_type_is_of_nobody() {
    let (document, contract) = (generated(), contract());
    let ours = members(&document["components"]["schemas"]).keys();
    let mut known: BTreeSet<&str> = BTreeSet::from(["PciDeviceInfo", "VmCounters"]);
    for list in ["types", "words", "own_types"] {
        known.extend(members(&contract[list]).keys().map(String::as_str));
    }
    assert_eq!(ours.map(String::as_str).collect::<BTreeSet<_>>(), known);
    let not_built = contract["types_not_built"].as_array().unwrap();
    let not_built = not_built.iter().filter_map(Value::as_str);
    let both: Vec<_> = not_built.filter(|name| known.contains(name)).collect();
    assert!(both.is_empty(), "built by now: {both:?}");
}
