//! The `OpenAPI` document: [`ENDPOINTS`] and the schemas of the types that bodies are read as and answers are written from.
//!
//! Nothing is told twice: a path, a field or a default that changes, changes here too. `resources/openapi.json` is a copy for
//! those who have no daxhund at hand; a test compares the two. The document is made when it is first asked for.

use std::borrow::Cow;
use std::sync::LazyLock;

use axum::http::StatusCode;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::PREFIX;
use super::request::{ApiError, DeviceAdded, ErrorKind};
use super::routes::{Does, ENDPOINTS, Endpoint, Says, status};
use crate::config::NOT_BUILT;

/// An `OpenAPI` document.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct Document(Value);

impl JsonSchema for Document {
    fn schema_name() -> Cow<'static, str> {
        "Document".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object"})
    }
}

static DOCUMENT: LazyLock<Document> = LazyLock::new(|| Document(generate()));

/// The document of this version.
pub(super) fn document() -> &'static Document {
    &DOCUMENT
}

const ABOUT: &str = "The REST API of daxhund, on the unix socket that --api-socket names. Paths, fields and statuses are \
Cloud Hypervisor's. Nothing is ignored: a field that no schema has is refused, and so is a body where none belongs. A member \
that is null is as one that is absent. What is marked x-not-built is not built: a path is always refused, a field is \
taken while it asks for nothing. An error is a list of messages, outermost first.";

fn generate() -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    for endpoint in ENDPOINTS {
        let method = endpoint.method.as_str().to_ascii_lowercase();
        let operation = operation(endpoint, &mut schemas);
        paths.insert(format!("/{}", endpoint.name), json!({method: operation}));
    }
    let refusals = ErrorKind::ALL.map(|kind| (name_of(kind), refusal(kind, &mut schemas)));
    let refusals: Map<String, Value> = refusals.into_iter().collect();
    let license = env!("CARGO_PKG_LICENSE");
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "daxhund",
            "description": ABOUT,
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": license, "identifier": license},
        },
        "servers": [{"url": PREFIX.trim_end_matches('/')}],
        "paths": paths,
        "components": {"schemas": schemas.definitions(), "responses": refusals},
    })
}

/// What types look like from the side that matters: as they are read, or as they are written.
struct Schemas {
    bodies: SchemaGenerator,
    answers: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let settings = SchemaSettings::draft2020_12()
            .with(|settings| settings.definitions_path = "/components/schemas".into())
            .with_transform(RecursiveTransform(plain_enum));
        let answers = settings.clone().for_serialize();
        Self {
            bodies: settings.for_deserialize().into_generator(),
            answers: answers
                .with_transform(RecursiveTransform(left_out_not_null))
                .into_generator(),
        }
    }

    /// By name. What is both read and written is told as it is read: that is never less.
    fn definitions(mut self) -> Map<String, Value> {
        let mut definitions = self.answers.take_definitions(true);
        definitions.extend(self.bodies.take_definitions(true));
        definitions
    }
}

/// What one path is asked and what it answers.
fn operation(endpoint: &Endpoint, schemas: &mut Schemas) -> Value {
    let mut responses = Map::new();
    let mut done = |status: StatusCode, description: &str, content: Option<Value>| {
        let mut response = json!({"description": description});
        if let Some(content) = content {
            response["content"] = content;
        }
        responses.insert(status.as_str().to_owned(), response);
    };
    let is_built = !matches!(endpoint.does, Does::NotBuilt);
    match endpoint.says {
        _ if !is_built => {}
        Says::Nothing => done(StatusCode::NO_CONTENT, "It is done.", None),
        Says::Json(schema) => done(
            StatusCode::OK,
            "The answer.",
            Some(content(&schema(&mut schemas.answers))),
        ),
        Says::Text(kind) => {
            let text = json!({kind: {"schema": {"type": "string"}}});
            done(StatusCode::OK, "The answer.", Some(text));
        }
        Says::Added => {
            let place = schemas.answers.subschema_for::<DeviceAdded>();
            let place = content(&place);
            done(StatusCode::OK, "The running guest has it.", Some(place));
            let later = "The guest has it when it boots.";
            done(StatusCode::NO_CONTENT, later, None);
        }
    }
    let always = [ErrorKind::BadRequest, ErrorKind::Internal];
    for kind in always.iter().chain(endpoint.refuses) {
        let reference = format!("#/components/responses/{}", name_of(*kind));
        let status = status(*kind).as_str().to_owned();
        responses.insert(status, json!({"$ref": reference}));
    }
    let mut operation = json!({"summary": endpoint.about, "responses": responses});
    if let Does::WithBody(reader) = &endpoint.does {
        let schema = (reader.schema)(&mut schemas.bodies);
        operation["requestBody"] = json!({"required": true, "content": content(&schema)});
    }
    if !is_built {
        operation[NOT_BUILT] = true.into();
    }
    operation
}

fn content(schema: &Schema) -> Value {
    json!({"application/json": {"schema": schema}})
}

fn refusal(kind: ErrorKind, schemas: &mut Schemas) -> Value {
    let description = match kind {
        ErrorKind::NotFound => "There is no machine, or no such device.",
        ErrorKind::WrongState => {
            "The machine is in another state, or what is to be added is there already."
        }
        ErrorKind::BadRequest => "What was asked for makes no sense; nothing was changed.",
        ErrorKind::Busy => "Another change is under way.",
        ErrorKind::NotSupported | ErrorKind::Internal => {
            "The host refused it, it took too long, or daxhund does not build it."
        }
    };
    let schema = schemas.answers.subschema_for::<ApiError>();
    json!({"description": description, "content": content(&schema)})
}

/// One for each status.
fn name_of(kind: ErrorKind) -> String {
    match kind {
        ErrorKind::NotFound => "NotFound",
        ErrorKind::WrongState => "WrongState",
        ErrorKind::BadRequest => "BadRequest",
        ErrorKind::Busy => "Busy",
        ErrorKind::NotSupported | ErrorKind::Internal => "Failed",
    }
    .to_owned()
}

/// Words that each have a description become one list of words, which client generators understand, and one description.
fn plain_enum(schema: &mut Schema) {
    let Some(Value::Array(variants)) = schema.get("oneOf") else {
        return;
    };
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let words: Option<Vec<(String, String)>> = variants
        .iter()
        .map(|variant| {
            let meaning = text(variant.get("description")).unwrap_or_default();
            Some((text(variant.get("const"))?, meaning))
        })
        .collect();
    let Some(words) = words else {
        return;
    };
    let about = text(schema.get("description")).unwrap_or_default();
    let lines = words
        .iter()
        .map(|(word, meaning)| format!("- `{word}`: {meaning}"));
    let lines: Vec<String> = [about, String::new()].into_iter().chain(lines).collect();
    let words: Vec<String> = words.into_iter().map(|(word, _)| word).collect();
    schema.remove("oneOf");
    schema.insert("type".to_owned(), "string".into());
    schema.insert("enum".to_owned(), words.into());
    schema.insert("description".to_owned(), lines.join("\n").into());
}

/// A member that an answer can leave out is not `null` when it is there.
fn left_out_not_null(schema: &mut Schema) {
    let required = schema.get("required").cloned().unwrap_or_default();
    let Some(Value::Object(properties)) = schema.get_mut("properties") else {
        return;
    };
    for (name, property) in properties {
        let is_required = |names: &Vec<Value>| names.iter().any(|required| required == name);
        if required.as_array().is_some_and(is_required) {
            continue;
        }
        if let Some(Value::Array(kinds)) = property.get_mut("type") {
            kinds.retain(|kind| kind != "null");
            if let [kind] = kinds.as_slice() {
                property["type"] = kind.clone();
            }
        }
        let something = match property.get("anyOf").and_then(Value::as_array) {
            Some(either) => match either.as_slice() {
                [Value::Object(something), null] if *null == json!({"type": "null"}) => {
                    something.clone()
                }
                _ => continue,
            },
            None => continue,
        };
        if let Value::Object(members) = property {
            members.remove("anyOf");
            members.extend(something);
        }
    }
}
