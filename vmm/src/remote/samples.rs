//! `OpenMetrics` text, read again.

use std::collections::BTreeMap;

use thiserror::Error;

/// What ends a text; one without it was cut off.
const END: &str = "# EOF";

/// One number.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

/// All of a text, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Samples(Vec<Sample>);

/// A text that is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum ParseError {
    /// It is not whole.
    #[error("the metrics are cut off: they do not end with `{END}`")]
    CutOff,
    /// A line of it.
    #[error("the metrics have a line that is no sample: {line:?}")]
    Line {
        /// The line.
        line: String,
    },
}

impl Samples {
    pub(super) fn parse(text: &str) -> Result<Self, ParseError> {
        if text.trim_end().lines().last() != Some(END) {
            return Err(ParseError::CutOff);
        }
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let samples = lines.map(|line| {
            sample(line).ok_or_else(|| ParseError::Line {
                line: line.to_owned(),
            })
        });
        samples.collect::<Result<_, _>>().map(Self)
    }

    /// Those of one name.
    pub(super) fn of(&self, name: &str) -> impl Iterator<Item = &Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// Those whose name is `prefix`, something, `suffix`; with that something.
    pub(super) fn between(
        &self,
        prefix: &str,
        suffix: &str,
    ) -> impl Iterator<Item = (&str, &Sample)> {
        self.0.iter().filter_map(move |sample| {
            let middle = sample.name.strip_prefix(prefix)?.strip_suffix(suffix)?;
            Some((middle, sample))
        })
    }

    /// The sum of those of one name; 0 of none.
    pub(super) fn sum(&self, name: &str) -> f64 {
        // Not `sum()`: that of none is -0.
        self.of(name).fold(0.0, |sum, sample| sum + sample.value)
    }

    /// The same number at another time.
    pub(super) fn same(&self, as_in: &Sample) -> Option<f64> {
        let is = |sample: &&Sample| sample.name == as_in.name && sample.labels == as_in.labels;
        self.0.iter().find(is).map(|sample| sample.value)
    }
}

impl Sample {
    pub(super) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// `name value`, or `name{label="text",...} value`; a time after it is not looked at.
fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    (!name.is_empty()).then(|| Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// Labels up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, after) = rest.split_once("=\"")?;
        let (text, after) = quoted(after)?;
        labels.insert(name.to_owned(), text);
        rest = after.strip_prefix(',').unwrap_or(after);
    }
}

/// A text up to its closing quote, and what follows it.
fn quoted(rest: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut chars = rest.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((text, &rest[at + 1..])),
            '\\' => text.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => text.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_labels_and_values_are_told_apart() {
        let text = "# HELP a_total An a\n# TYPE a counter\na_total 3\n\
                    b{id=\"x\\\"},{\\\\\",n=\"two\\nlines\"} 1.5 1700000000\nc{} -2\n# EOF\n";
        let samples = Samples::parse(text).unwrap();
        assert_eq!(samples.0.len(), 3);
        assert_eq!((samples.sum("a_total"), samples.sum("c")), (3.0, -2.0));
        let b = samples.of("b").next().unwrap();
        assert_eq!((b.label("id"), b.label("n")), ("x\"},{\\", "two\nlines"));
        assert_eq!(samples.same(b), Some(1.5));
        let between: Vec<_> = samples
            .between("", "_total")
            .map(|(name, _)| name)
            .collect();
        assert_eq!(between, ["a"]);
    }

    #[test]
    fn what_is_no_text_of_metrics_is_said() {
        for text in ["", "a 1\n", "# EOF\na 1\n"] {
            assert_eq!(Samples::parse(text), Err(ParseError::CutOff), "{text:?}");
        }
        for line in ["a", "a{ 1", "a{b=\"c} 1", "a one", " 1"] {
            let expected = ParseError::Line { line: line.into() };
            assert_eq!(Samples::parse(&format!("{line}\n# EOF\n")), Err(expected));
        }
    }

    #[test]
    fn what_daxhund_writes_can_be_read() {
        let text = crate::metrics::Metrics::default().text();
        let samples = Samples::parse(&text).unwrap();
        let states = samples.of("daxhund_vm_state");
        let on: Vec<_> = states.filter(|state| state.value > 0.0).collect();
        assert_eq!(on.len(), 1);
        assert_eq!(on[0].label("state"), "NoVm");
    }
}
