//! What is served, as it is typed: `--dax DEVICE[,offset=BYTES][,size=BYTES]`, or `--file PATH`.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use thiserror::Error;

/// What the bytes are on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A part of a device-dax device.
    Dax {
        /// The device.
        path: PathBuf,
        /// Where the part begins; `None`: at the beginning.
        offset: Option<u64>,
        /// Its length; `None`: to the end.
        size: Option<u64>,
    },
    /// A file or a block device.
    File(PathBuf),
}

/// What is typed makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SourceError {
    /// Not one of the two.
    #[error("give what is served by either --dax DEVICE or --file PATH")]
    NotOne,
    /// `--dax` without a device.
    #[error("--dax {text}: name the device first, as in --dax /dev/dax0.0,offset=0,size=1G")]
    NoDevice {
        /// What was given.
        text: String,
    },
    /// A part of `--dax` that is not known, or is there twice.
    #[error("--dax: `{part}` is not offset=BYTES or size=BYTES, or is given twice")]
    Part {
        /// The part.
        part: String,
    },
    /// A number that is none.
    #[error("--dax: `{part}` is not a number of bytes: write 4096, 512M, 4G or 1T")]
    Bytes {
        /// The part.
        part: String,
    },
}

impl Source {
    /// From the values of `--dax` and `--file`, of which there is one.
    pub fn new(dax: Option<&str>, file: Option<PathBuf>) -> Result<Self, SourceError> {
        match Self::with_more(dax, file)? {
            (source, more) if more.is_empty() => Ok(source),
            (_, more) => Err(SourceError::Part {
                part: more[0].to_owned(),
            }),
        }
    }

    /// The same for a daemon whose devices have more to say: what is neither the first `offset=` nor the first `size=`.
    pub fn with_more(
        dax: Option<&str>,
        file: Option<PathBuf>,
    ) -> Result<(Self, Vec<&str>), SourceError> {
        match (dax, file) {
            (Some(dax), None) => part_of_device(dax),
            (None, Some(path)) => Ok((Self::File(path), Vec::new())),
            _ => Err(SourceError::NotOne),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Dax { path, .. } | Self::File(path) => path,
        }
    }
}

fn part_of_device(text: &str) -> Result<(Source, Vec<&str>), SourceError> {
    let mut parts = text.split(',');
    let path = parts.next().unwrap_or_default();
    if path.is_empty() || path.contains('=') {
        return Err(SourceError::NoDevice { text: text.into() });
    }
    let (mut offset, mut size, mut more) = (None, None, Vec::new());
    for part in parts {
        let (place, value) = match part.split_once('=') {
            Some(("offset", value)) if offset.is_none() => (&mut offset, value),
            Some(("size", value)) if size.is_none() => (&mut size, value),
            _ => {
                more.push(part);
                continue;
            }
        };
        *place = Some(bytes(value).ok_or_else(|| SourceError::Bytes { part: part.into() })?);
    }
    let source = Source::Dax {
        path: path.into(),
        offset,
        size,
    };
    Ok((source, more))
}

/// `4096`, `4K`, `512M`, `4G`, `1T`.
fn bytes(text: &str) -> Option<u64> {
    const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
    let unit = UNITS
        .iter()
        .find(|(letter, _)| text.ends_with(*letter) || text.ends_with(letter.to_ascii_lowercase()));
    let (digits, shift) = unit.map_or((text, 0), |(_, shift)| (&text[..text.len() - 1], *shift));
    number(digits)?.checked_mul(1 << shift)
}

/// A number without a sign: `u64::from_str` would take a plus.
pub fn number(digits: &str) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_device_is_read_once() {
        let source = Source::new(Some("/dev/dax1.0,size=2G,offset=4m"), None).unwrap();
        let expected = Source::Dax {
            path: "/dev/dax1.0".into(),
            offset: Some(4 << 20),
            size: Some(2 << 30),
        };
        assert_eq!(source, expected);
        let file = Source::new(None, Some("/a,b=c".into())).unwrap();
        assert_eq!(file.path(), Path::new("/a,b=c"));
    }

    #[test]
    fn nonsense_is_named() {
        for (dax, expected) in [
            ("", "name the device first"),
            ("size=1G", "name the device first"),
            ("/dev/dax0.0,length=1G", "`length=1G` is not offset="),
            (
                "/dev/dax0.0,size=1G,size=2G",
                "`size=2G` is not offset=BYTES or size=BYTES, or is given twice",
            ),
            ("/dev/dax0.0,size=", "`size=` is not a number"),
            ("/dev/dax0.0,size=+1", "`size=+1` is not a number"),
            ("/dev/dax0.0,size=99999999T", "is not a number"),
            ("/dev/dax0.0,size=1é", "is not a number"),
        ] {
            let error = Source::new(Some(dax), None).unwrap_err().to_string();
            assert!(error.contains(expected), "{dax}: {error}");
        }
        assert_eq!(Source::new(None, None), Err(SourceError::NotOne));
    }

    #[test]
    fn what_a_daemon_has_to_say_besides_is_its_own() {
        let (source, more) = Source::with_more(Some("/d,a=1,size=4K,size=8K,b"), None).unwrap();
        assert!(matches!(
            source,
            Source::Dax {
                size: Some(4096),
                ..
            }
        ));
        assert_eq!(more, ["a=1", "size=8K", "b"]);
    }
}
