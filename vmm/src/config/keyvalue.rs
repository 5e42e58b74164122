//! The grammar that command-line words share: `key=value[,key=value]`.
//!
//! A word is a table: each key has a name, a placeholder, a line of help and the function that
//! stores its value. Parser, error messages and `--help` all read that table. A value may be a list
//! `[a,b]`; double quotes keep commas and brackets from being read as syntax and are then dropped.
//!
//! Invariant: every key of the text ends in exactly one call of its setter or in an error naming it.
//! Not done here: what values mean together; that is validation.

use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use super::ByteSize;

/// Why a command-line word could not be read. `flag` is the word with its dashes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WordError {
    /// The word has no keys at all.
    #[error("{flag} has an empty value: give key=value[,key=value] with the keys {allowed}")]
    Empty {
        /// The word.
        flag: &'static str,
        /// The keys there are.
        allowed: String,
    },
    /// A part between commas is not `key=value`.
    #[error("{flag}: \"{part}\" is not key=value; the keys are {allowed}")]
    NotKeyValue {
        /// The word.
        flag: &'static str,
        /// The part as written.
        part: String,
        /// The keys there are.
        allowed: String,
    },
    /// A bracket or a quote is not closed, or closed without being opened.
    #[error(
        "{flag}: unbalanced brackets or quotes in \"{text}\"; \
         put a value that contains brackets in double quotes"
    )]
    Unbalanced {
        /// The word.
        flag: &'static str,
        /// The whole value as written.
        text: String,
    },
    /// No such key.
    #[error("{flag}: unknown key \"{key}\"; the keys are {allowed}")]
    UnknownKey {
        /// The word.
        flag: &'static str,
        /// The key as written.
        key: String,
        /// The keys there are.
        allowed: String,
    },
    /// The key is given more than once.
    #[error("{flag}: key \"{key}\" is given twice; give it once")]
    DuplicateKey {
        /// The word.
        flag: &'static str,
        /// The key.
        key: &'static str,
    },
    /// The key is part of the contract but does nothing in this version.
    #[error("not supported by daxhund: {flag} {key}")]
    NotSupported {
        /// The word.
        flag: &'static str,
        /// The key.
        key: &'static str,
    },
    /// The value is not of the key's kind.
    #[error("{flag}: {key}={value} is not {expected}")]
    Value {
        /// The word.
        flag: &'static str,
        /// The key.
        key: &'static str,
        /// The value as written.
        value: String,
        /// What would have been right.
        expected: &'static str,
    },
    /// A key that cannot be left out is missing.
    #[error("{flag}: key \"{key}\" is missing; add {key}=VALUE")]
    MissingKey {
        /// The word.
        flag: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A word that is one of a few modes names none of them.
    #[error("{flag} {value}: expected {expected}")]
    Mode {
        /// The word.
        flag: &'static str,
        /// The value as written.
        value: String,
        /// The modes there are.
        expected: &'static str,
    },
}

/// What a value should have been; the parser adds the word, the key and the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expected(pub(crate) &'static str);

type Setter<D> = fn(&mut D, Value<'_>) -> Result<(), Expected>;

/// One key of a word that fills a draft `D`.
pub(crate) struct Key<D: 'static> {
    name: &'static str,
    kind: Kind<D>,
}

enum Kind<D: 'static> {
    Built {
        placeholder: &'static str,
        help: &'static str,
        set: Setter<D>,
    },
    NotBuilt,
}

impl<D> Key<D> {
    /// A key that works.
    pub(crate) const fn new(
        name: &'static str,
        placeholder: &'static str,
        help: &'static str,
        set: Setter<D>,
    ) -> Self {
        Self {
            name,
            kind: Kind::Built {
                placeholder,
                help,
                set,
            },
        }
    }

    /// A key of the contract that this version refuses.
    pub(crate) const fn not_built(name: &'static str) -> Self {
        Self {
            name,
            kind: Kind::NotBuilt,
        }
    }
}

/// One command-line word: its flag, what it is for and its keys.
pub(crate) struct Word<D: 'static> {
    /// The flag with its dashes.
    pub(crate) flag: &'static str,
    /// One sentence for `--help`.
    pub(crate) about: &'static str,
    /// The keys, in the order `--help` prints them.
    pub(crate) keys: &'static [Key<D>],
}

impl<D> Word<D> {
    /// Stores every key of `text` in `draft`.
    pub(crate) fn fill(&self, text: &str, draft: &mut D) -> Result<(), WordError> {
        let flag = self.flag;
        if text.is_empty() {
            return Err(WordError::Empty {
                flag,
                allowed: self.allowed(),
            });
        }
        let parts = split(text).ok_or_else(|| WordError::Unbalanced {
            flag,
            text: text.to_owned(),
        })?;
        let mut seen: Vec<&'static str> = Vec::new();
        for part in parts {
            let Some((name, value)) = part.split_once('=') else {
                return Err(WordError::NotKeyValue {
                    flag,
                    part: part.to_owned(),
                    allowed: self.allowed(),
                });
            };
            let Some(key) = self.keys.iter().find(|key| key.name == name) else {
                return Err(WordError::UnknownKey {
                    flag,
                    key: name.to_owned(),
                    allowed: self.allowed(),
                });
            };
            let Kind::Built { set, .. } = key.kind else {
                return Err(WordError::NotSupported {
                    flag,
                    key: key.name,
                });
            };
            if seen.contains(&key.name) {
                return Err(WordError::DuplicateKey {
                    flag,
                    key: key.name,
                });
            }
            seen.push(key.name);
            set(draft, Value(value)).map_err(|Expected(expected)| WordError::Value {
                flag,
                key: key.name,
                value: value.to_owned(),
                expected,
            })?;
        }
        Ok(())
    }

    /// The word's text for `--help`: what it is for, then one line per key.
    pub(crate) fn help(&self) -> String {
        let rows: Vec<(String, &str)> = self
            .keys
            .iter()
            .filter_map(|key| match key.kind {
                Kind::Built {
                    placeholder, help, ..
                } => Some((format!("{}={placeholder}", key.name), help)),
                Kind::NotBuilt => None,
            })
            .collect();
        let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
        let lines: Vec<String> = rows
            .iter()
            .map(|(key, help)| format!("\n  {key:width$}  {help}"))
            .collect();
        format!("{}{}", self.about, lines.concat())
    }

    fn allowed(&self) -> String {
        let built: Vec<&str> = self
            .keys
            .iter()
            .filter(|key| matches!(key.kind, Kind::Built { .. }))
            .map(|key| key.name)
            .collect();
        built.join(", ")
    }
}

/// The right-hand side of `key=value`, as written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Value<'a>(&'a str);

impl<'a> Value<'a> {
    /// A size such as `512M`.
    pub(crate) fn size(self) -> Result<ByteSize, Expected> {
        ByteSize::parse(&self.unquoted()).ok_or(Expected(
            "a size such as 4096, 512M or 4G (units K, M, G, T)",
        ))
    }

    /// `on`, `off`, `true` or `false`.
    pub(crate) fn switch(self) -> Result<bool, Expected> {
        match self.unquoted().as_str() {
            "on" | "true" => Ok(true),
            "off" | "false" => Ok(false),
            _ => Err(Expected("on or off")),
        }
    }

    /// A whole number that fits `T`.
    pub(crate) fn integer<T: FromStr>(self) -> Result<T, Expected> {
        integer(&self.unquoted()).ok_or(Expected("a whole number in range"))
    }

    /// A text that is not empty.
    pub(crate) fn text(self) -> Result<String, Expected> {
        let text = self.unquoted();
        if text.is_empty() {
            return Err(Expected("a text that is not empty"));
        }
        Ok(text)
    }

    /// A path that is not empty.
    pub(crate) fn path(self) -> Result<PathBuf, Expected> {
        let text = self.unquoted();
        if text.is_empty() {
            return Err(Expected("a path"));
        }
        Ok(PathBuf::from(text))
    }

    /// What `T` reads from text; `expected` says what that is.
    pub(crate) fn parsed<T: FromStr>(self, expected: &'static str) -> Result<T, Expected> {
        self.unquoted().parse().map_err(|_| Expected(expected))
    }

    /// The number of an open file descriptor other than the standard streams.
    pub(crate) fn descriptor(self) -> Result<i32, Expected> {
        self.integer()
            .ok()
            .filter(|fd| *fd > 2)
            .ok_or(Expected("the number of an open file descriptor, 3 or more"))
    }

    /// The items of `[a,b]`; a single item may come without brackets.
    pub(crate) fn list(self) -> Result<Vec<Value<'a>>, Expected> {
        const EXPECTED: Expected = Expected("a list such as [a,b]");
        let inner = match self.0.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').ok_or(EXPECTED)?,
            None => self.0,
        };
        if inner.is_empty() {
            return Ok(Vec::new());
        }
        let items = split(inner).ok_or(EXPECTED)?;
        if items.contains(&"") {
            return Err(EXPECTED);
        }
        Ok(items.into_iter().map(Value).collect())
    }

    /// The numbers of `[0,2-4]`, none above `max`.
    pub(crate) fn integers_up_to(self, max: u32) -> Result<Vec<u32>, Expected> {
        const EXPECTED: Expected = Expected("a list of numbers in range such as [0,2-4]");
        let mut numbers = Vec::new();
        for item in self.list()? {
            let text = item.unquoted();
            let (first, last) = text.split_once('-').unwrap_or((&text, &text));
            let first: u32 = integer(first).ok_or(EXPECTED)?;
            let last: u32 = integer(last).ok_or(EXPECTED)?;
            // The bound keeps a range such as 0-4294967295 from being expanded.
            if first > last || last > max {
                return Err(EXPECTED);
            }
            numbers.extend(first..=last);
        }
        Ok(numbers)
    }

    /// The two sides of `left@right`.
    pub(crate) fn pair(self) -> Option<(Value<'a>, Value<'a>)> {
        let (left, right) = self.0.split_once('@')?;
        Some((Value(left), Value(right)))
    }

    fn unquoted(self) -> String {
        self.0.replace('"', "")
    }
}

/// Digits only: `FromStr` would take a leading plus sign.
fn integer<T: FromStr>(text: &str) -> Option<T> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// Splits at the commas outside brackets and quotes; `None` when those are unbalanced.
fn split(text: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let (mut start, mut depth, mut quoted) = (0, 0_usize, false);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            _ if quoted => {}
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1)?,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (depth == 0 && !quoted).then_some(parts)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Draft {
        name: Option<String>,
        on: bool,
        cpus: Vec<u32>,
    }

    const WORD: Word<Draft> = Word {
        flag: "--sample",
        about: "A sample.",
        keys: &[
            Key::new("name", "TEXT", "what it is called", |draft, value| {
                draft.name = Some(value.text()?);
                Ok(())
            }),
            Key::new("on", "on|off", "whether it is on", |draft, value| {
                draft.on = value.switch()?;
                Ok(())
            }),
            Key::new("cpus", "[N,N-N]", "which vCPUs", |draft, value| {
                draft.cpus = value.integers_up_to(9)?;
                Ok(())
            }),
            Key::not_built("later"),
        ],
    };

    fn fill(text: &str) -> Result<Draft, WordError> {
        let mut draft = Draft::default();
        WORD.fill(text, &mut draft).map(|()| draft)
    }

    #[test]
    fn keys_lists_and_quotes_are_read() {
        assert_eq!(
            fill("name=\"a,[b=c\",on=true,cpus=[0,2-4]"),
            Ok(Draft {
                name: Some("a,[b=c".to_owned()),
                on: true,
                cpus: vec![0, 2, 3, 4],
            })
        );
        assert_eq!(fill("cpus=3").unwrap().cpus, [3]);
        assert_eq!(fill("cpus=[]").unwrap().cpus, [0_u32; 0]);
    }

    #[test]
    fn an_unknown_key_names_the_keys_there_are() {
        let error = fill("nmae=a").unwrap_err();
        assert!(
            matches!(&error, WordError::UnknownKey { flag: "--sample", key, .. } if key == "nmae")
        );
        assert!(
            error.to_string().contains("the keys are name, on, cpus"),
            "{error}"
        );
        assert!(!error.to_string().contains("later"), "{error}");
    }

    #[test]
    fn each_malformed_word_has_its_own_error() {
        let error = fill("on=on,on=off").unwrap_err();
        assert!(matches!(error, WordError::DuplicateKey { key: "on", .. }));
        assert!(error.to_string().contains("given twice"));

        let error = fill("later=1").unwrap_err();
        assert_eq!(
            error.to_string(),
            "not supported by daxhund: --sample later"
        );

        let error = fill("").unwrap_err();
        assert!(matches!(error, WordError::Empty { .. }));
        assert!(error.to_string().contains("name, on, cpus"));

        for text in ["name", "name=a,", "name=a,,on=on"] {
            let error = fill(text).unwrap_err();
            assert!(
                matches!(error, WordError::NotKeyValue { .. }),
                "{text}: {error}"
            );
            assert!(error.to_string().contains("is not key=value"));
        }

        for text in ["cpus=[1", "cpus=1]", "name=\"a", "cpus=[1,[2]"] {
            let error = fill(text).unwrap_err();
            assert!(
                matches!(error, WordError::Unbalanced { .. }),
                "{text}: {error}"
            );
            assert!(error.to_string().contains("double quotes"));
        }
    }

    #[test]
    fn a_wrong_value_says_what_would_be_right() {
        for (text, expected) in [
            ("on=yes", "on or off"),
            ("name=", "not empty"),
            ("cpus=[4-2]", "numbers in range"),
            ("cpus=[10]", "numbers in range"),
            ("cpus=[0-4294967295]", "numbers in range"),
            ("cpus=[+1]", "numbers in range"),
            ("cpus=[]]", "unbalanced"),
            ("cpus=[1,]", "a list such as"),
            ("cpus=[1]2", "a list such as"),
        ] {
            let message = fill(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{text}: {message}");
            assert!(message.contains("--sample"), "{text}: {message}");
        }
    }

    #[test]
    fn help_has_one_line_for_each_key_that_works() {
        assert_eq!(
            WORD.help(),
            "A sample.\n  name=TEXT     what it is called\n  on=on|off     whether it is on\n  \
             cpus=[N,N-N]  which vCPUs"
        );
    }

    proptest! {
        #[test]
        fn no_text_panics_the_parser(text in "[\\[\\],=\"@a-z0-9-]{0,40}") {
            let _ = fill(&text);
            let _ = fill(&format!("cpus={text}"));
        }

        #[test]
        fn a_quoted_name_comes_back_as_written(name in "[^\"]{1,20}") {
            prop_assert_eq!(fill(&format!("name=\"{name}\"")).unwrap().name, Some(name));
        }
    }
}
