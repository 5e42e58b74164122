//! What an event is, and how one is written.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::ser::{Serialize, SerializeMap, Serializer};
use thiserror::Error;

/// Something that happened.
pub trait Event {
    /// What it happened to.
    fn source(&self) -> &'static str;

    /// What happened.
    fn name(&self) -> &'static str;

    /// More of it.
    fn properties(&self) -> Vec<(&'static str, &str)>;
}

/// How an object is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// As Cloud Hypervisor does: over several lines, with an empty one after it.
    #[default]
    Ch,
    /// JSON Lines: each object on a line of its own.
    JsonLines,
}

/// No form has this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("ch or jsonl")]
pub struct UnknownForm;

impl Form {
    fn name(self) -> &'static str {
        match self {
            Self::Ch => "ch",
            Self::JsonLines => "jsonl",
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Form {
    type Err = UnknownForm;

    fn from_str(text: &str) -> Result<Self, UnknownForm> {
        let all = [Self::Ch, Self::JsonLines];
        let found = all.into_iter().find(|form| form.name() == text);
        found.ok_or(UnknownForm)
    }
}

/// The object as it is written, with what follows it.
pub(super) fn text(event: &impl Event, since_start: Duration, form: Form) -> String {
    let object = Object { event, since_start };
    let (text, end) = match form {
        Form::Ch => (serde_json::to_string_pretty(&object), "\n\n"),
        Form::JsonLines => (serde_json::to_string(&object), "\n"),
    };
    // A map of texts and numbers always has a JSON form.
    text.unwrap_or_default() + end
}

struct Object<'a, E> {
    event: &'a E,
    since_start: Duration,
}

impl<E: Event> Serialize for Object<'_, E> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let properties = self.event.properties();
        let properties = (!properties.is_empty()).then_some(Properties(properties));
        let mut object = serializer.serialize_map(Some(4))?;
        // A `Duration` is an object of `secs` and `nanos`.
        object.serialize_entry("timestamp", &self.since_start)?;
        object.serialize_entry("source", self.event.source())?;
        object.serialize_entry("event", self.event.name())?;
        object.serialize_entry("properties", &properties)?;
        object.end()
    }
}

struct Properties<'a>(Vec<(&'static str, &'a str)>);

impl Serialize for Properties<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let unbraced = |text: &str| text.replace('{', "(").replace('}', ")");
        serializer.collect_map(self.0.iter().map(|(key, text)| (key, unbraced(text))))
    }
}
