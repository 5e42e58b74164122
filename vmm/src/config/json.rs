//! From a client's JSON to a configuration type.
//!
//! [`from_json`] is the one way in. The types' own `Deserialize` is strict: it knows what is built and nothing else.
//! Clients of the contract send more than that, since their libraries fill in defaults of the whole schema. So each
//! type has a [`Shape`]: the fields of the contract's schema that are not built, each with the value that asks for
//! nothing.
//!
//! Invariants:
//! - A field that is not built is taken while it is null, empty or at its default, and refused by its full name
//!   otherwise. A field of no schema is refused by name. Nothing is ignored.
//! - `null` is the same as absent, for every field.
//! - A field given twice is refused.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use thiserror::Error;

/// A type that clients send as a JSON object.
pub trait JsonObject: DeserializeOwned {
    /// What the contract's schema has beyond the type's own fields.
    const SHAPE: Shape;
}

/// Why a text is not the JSON of a configuration type.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum JsonError {
    /// Not JSON at all, or a field given twice.
    #[error("not usable as JSON: {message}")]
    Malformed {
        /// What is wrong and where.
        message: String,
    },
    /// A field of the contract's schema asks for what this version does not build.
    #[error("not supported by daxhund: {field}")]
    NotSupported {
        /// The field with the way to it, such as `disks[0].vhost_user`.
        field: String,
    },
    /// A field that is missing, unknown or of the wrong kind.
    #[error("{}{message}", Prefix(field))]
    Field {
        /// The way to the field or to the object that lacks it; empty for the outermost object.
        field: String,
        /// What is wrong.
        message: String,
    },
}

struct Prefix<'a>(&'a str);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, "{}: ", self.0)
    }
}

/// What the contract's schema of one object has that the type of it has not.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Fields that are not built.
    pub(super) not_built: &'static [NotBuilt],
    /// Fields that are built, but not for these values.
    pub(super) values: &'static [(&'static str, &'static [&'static str])],
    /// Fields that are objects, or lists of objects, with a shape of their own.
    pub(super) nested: &'static [(&'static str, Shape)],
}

impl Shape {
    /// An object that is built as the contract has it.
    pub(crate) const WHOLE: Self = Self {
        not_built: &[],
        values: &[],
        nested: &[],
    };
}

/// A field of the contract's schema that is not built.
#[derive(Clone, Copy, Debug)]
pub(super) struct NotBuilt {
    pub(super) name: &'static str,
    pub(super) default: Default,
}

/// What a field may say, besides `null`, and still ask for nothing.
#[derive(Clone, Copy, Debug)]
pub(super) enum Default {
    /// Nothing: even an empty object switches something on.
    Null,
    /// An empty text, list or object.
    Empty,
    Switch(bool),
    Number(u64),
    Text(&'static str),
    /// An object of such fields.
    Object(&'static [NotBuilt]),
}

impl NotBuilt {
    /// A field whose presence asks for something.
    pub(super) const fn presence(name: &'static str) -> Self {
        Self {
            name,
            default: Default::Null,
        }
    }

    /// A text, a list or an object without a default of its own.
    pub(super) const fn empty(name: &'static str) -> Self {
        Self {
            name,
            default: Default::Empty,
        }
    }

    /// A switch that is `default` unless set.
    pub(super) const fn switch(name: &'static str, default: bool) -> Self {
        Self {
            name,
            default: Default::Switch(default),
        }
    }

    /// A number that is `default` unless set.
    pub(super) const fn number(name: &'static str, default: u64) -> Self {
        Self {
            name,
            default: Default::Number(default),
        }
    }

    /// A text that is `default` unless set.
    pub(super) const fn text(name: &'static str, default: &'static str) -> Self {
        Self {
            name,
            default: Default::Text(default),
        }
    }

    /// An object none of whose fields is built.
    pub(super) const fn object(name: &'static str, fields: &'static [Self]) -> Self {
        Self {
            name,
            default: Default::Object(fields),
        }
    }

    /// Refuses a value that asks for something; `field` is the way to it.
    fn check(self, value: &Value, field: String) -> Result<(), JsonError> {
        let nothing = match (self.default, value) {
            (Default::Null, _) => value.is_null(),
            (Default::Object(known), Value::Object(members)) => {
                for (name, value) in members {
                    let field = format!("{field}.{name}");
                    match known.iter().find(|known| known.name == name) {
                        Some(known) => known.check(value, field)?,
                        None => return Err(JsonError::NotSupported { field }),
                    }
                }
                true
            }
            (_, Value::Null) => true,
            (_, Value::Array(items)) => items.is_empty(),
            (_, Value::Object(members)) => members.is_empty(),
            (Default::Switch(default), Value::Bool(value)) => *value == default,
            (Default::Number(default), Value::Number(value)) => value.as_u64() == Some(default),
            (Default::Text(default), Value::String(value)) => {
                value.is_empty() || *value == *default
            }
            (_, Value::String(value)) => value.is_empty(),
            _ => false,
        };
        if nothing {
            Ok(())
        } else {
            Err(JsonError::NotSupported { field })
        }
    }
}

impl Shape {
    /// Takes the fields that are not built out of `object`; `path` is the way to it.
    fn strip(&self, object: &mut Map<String, Value>, path: &str) -> Result<(), JsonError> {
        let way = |name: &str| match path {
            "" => name.to_owned(),
            _ => format!("{path}.{name}"),
        };
        for field in self.not_built {
            if let Some(value) = object.remove(field.name) {
                field.check(&value, way(field.name))?;
            }
        }
        for (name, refused) in self.values {
            if let Some(Value::String(value)) = object.get(*name)
                && refused.contains(&value.as_str())
            {
                let field = format!("{}={value}", way(name));
                return Err(JsonError::NotSupported { field });
            }
        }
        for (name, shape) in self.nested {
            match object.get_mut(*name) {
                Some(Value::Object(inner)) => shape.strip(inner, &way(name))?,
                Some(Value::Array(items)) => {
                    for (at, item) in items.iter_mut().enumerate() {
                        let way = format!("{}[{at}]", way(name));
                        shape.strip(object_in(item, &way)?, &way)?;
                    }
                }
                // Of the wrong kind, which the type itself tells.
                _ => {}
            }
        }
        Ok(())
    }
}

/// The object that `value` has to be. Serde would also take a list of an object's values, in their order.
fn object_in<'a>(
    value: &'a mut Value,
    path: &str,
) -> Result<&'a mut Map<String, Value>, JsonError> {
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(JsonError::Field {
            field: path.to_owned(),
            message: "this is not an object, {..}".to_owned(),
        }),
    }
}

/// Reads a client's JSON object.
pub fn from_json<T: JsonObject>(text: &[u8]) -> Result<T, JsonError> {
    let Strict(mut value) = serde_json::from_slice(text).map_err(|error| JsonError::Malformed {
        message: error.to_string(),
    })?;
    T::SHAPE.strip(object_in(&mut value, "")?, "")?;
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        JsonError::Field {
            field: if path == "." { String::new() } else { path },
            message: error.into_inner().to_string(),
        }
    })
}

/// A JSON value without `null` members; a member given twice is an error.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if object.contains_key(&name) {
                let twice = format_args!("field `{name}` is given twice");
                return Err(serde::de::Error::custom(twice));
            }
            let Strict(value) = members.next_value()?;
            object.insert(name, value);
        }
        object.retain(|_, value| !value.is_null());
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[serde(default)]
        size: u32,
        #[serde(default)]
        kind: Option<String>,
        #[serde(default)]
        parts: Vec<Self>,
    }

    const FIELDS: &[NotBuilt] = &[
        NotBuilt::switch("off", false),
        NotBuilt::switch("on", true),
        NotBuilt::number("width", 64),
        NotBuilt::text("mode", "Client"),
        NotBuilt::empty("socket"),
        NotBuilt::presence("clock"),
        NotBuilt::object("limits", &[NotBuilt::empty("bandwidth")]),
    ];

    impl JsonObject for Sample {
        const SHAPE: Shape = Shape {
            not_built: FIELDS,
            values: &[("kind", &["Odd"])],
            nested: &[(
                "parts",
                Shape {
                    not_built: FIELDS,
                    ..Shape::WHOLE
                },
            )],
        };
    }

    fn read(text: &str) -> Result<Sample, JsonError> {
        from_json(text.as_bytes())
    }

    #[test]
    fn what_asks_for_nothing_is_taken() {
        let sample = read(
            r#"{"size":3,"off":false,"on":true,"width":64,"mode":"Client","socket":"","clock":null,
                "limits":{"bandwidth":null},"kind":null,
                "parts":[{"off":null,"on":null,"width":null,"mode":"","socket":[],"limits":{}}]}"#,
        )
        .unwrap();
        let part = Sample {
            size: 0,
            kind: None,
            parts: Vec::new(),
        };
        let expected = Sample {
            size: 3,
            kind: None,
            parts: vec![part],
        };
        assert_eq!(sample, expected);
    }

    #[test]
    fn what_asks_for_something_is_refused_by_name() {
        for (member, name) in [
            (r#""off":true"#, "off"),
            (r#""off":"no""#, "off"),
            (r#""on":false"#, "on"),
            (r#""width":48"#, "width"),
            (r#""width":-1"#, "width"),
            (r#""mode":"Server""#, "mode"),
            (r#""mode":1"#, "mode"),
            (r#""socket":"/s""#, "socket"),
            (r#""socket":[0]"#, "socket"),
            (r#""socket":false"#, "socket"),
            (r#""clock":{}"#, "clock"),
            (r#""clock":false"#, "clock"),
            (r#""limits":{"bandwidth":{"size":1}}"#, "limits.bandwidth"),
            (r#""limits":{"colour":1}"#, "limits.colour"),
            (r#""limits":7"#, "limits"),
        ] {
            let error = read(&format!("{{{member}}}")).unwrap_err();
            let words = format!("not supported by daxhund: {name}");
            assert_eq!(error.to_string(), words, "{member}");
            let error = read(&format!(r#"{{"parts":[{{}},{{{member}}}]}}"#)).unwrap_err();
            let words = format!("not supported by daxhund: parts[1].{name}");
            assert_eq!(error.to_string(), words, "{member}");
        }
        let error = read(r#"{"kind":"Odd"}"#).unwrap_err();
        assert_eq!(error.to_string(), "not supported by daxhund: kind=Odd");
        assert!(read(r#"{"kind":"Even"}"#).is_ok());
    }

    #[test]
    fn what_is_wrong_is_named_with_the_way_to_it() {
        for (text, words) in [
            (
                r#"{"sise":1}"#,
                "sise: unknown field `sise`, expected one of",
            ),
            (
                r#"{"parts":[{"sise":1}]}"#,
                "parts[0].sise: unknown field `sise`",
            ),
            (
                r#"{"parts":[{},{"size":"x"}]}"#,
                "parts[1].size: invalid type: string \"x\", expected u32",
            ),
            (r#"{"parts":[null]}"#, "parts[0]: this is not an object"),
            (r#"{"parts":[[1]]}"#, "parts[0]: this is not an object"),
            (r#"{"parts":{}}"#, "parts: invalid type: map"),
            (r#"{"size":4294967296}"#, "size: invalid value"),
            ("[1]", "this is not an object"),
            ("7", "this is not an object"),
            ("", "not usable as JSON: EOF"),
            ("{\"size\":1}x", "not usable as JSON: trailing characters"),
            (
                r#"{"size":1,"size":2}"#,
                "not usable as JSON: field `size` is given twice",
            ),
            (r#"{"off":null,"off":true}"#, "field `off` is given twice"),
            (
                r#"{"parts":[{"off":false,"off":false}]}"#,
                "field `off` is given twice",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.to_string().contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_crash() {
        let text = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let error = read(&text).unwrap_err();
        assert!(error.to_string().contains("recursion limit"), "{error}");
    }
}
