//! What an event is, and how one is written.

use std::time::Duration;

use serde::ser::{Serialize, SerializeMap, Serializer};

/// Something that happened.
pub trait Event {
    /// What it happened to.
    fn source(&self) -> &'static str;

    /// What happened.
    fn name(&self) -> &'static str;

    /// More of it.
    fn properties(&self) -> Vec<(&'static str, &str)>;
}

/// The object as it is written, with what follows it.
pub(super) fn text(event: &impl Event, since_start: Duration) -> String {
    let object = Object { event, since_start };
    // A map of texts and numbers always has a JSON form.
    let mut text = serde_json::to_string_pretty(&object).unwrap_or_default();
    text.push_str("\n\n");
    text
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
