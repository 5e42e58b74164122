//! Rows, the verdict over them, and the two forms they are printed in.

use std::fmt;
use std::io::{self, Write};

use serde::Serialize;

/// How a check came out; ordered from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Off, but a guest on device-dax can start.
    Warn,
    /// No guest can start on device-dax.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        })
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What was looked at: a word, or a device's name.
    pub check: String,
    /// How it came out.
    pub status: Status,
    /// What is so.
    pub found: String,
    /// The command or setting that mends it; none when there is nothing to mend.
    pub mend: Option<String>,
}

impl Row {
    pub(super) fn ok(check: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            check: check.into(),
            status: Status::Ok,
            found: found.into(),
            mend: None,
        }
    }

    pub(super) fn warn(
        check: impl Into<String>,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            status: Status::Warn,
            mend: Some(mend.into()),
            ..Self::ok(check, found)
        }
    }

    pub(super) fn fail(
        check: impl Into<String>,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(check, found, mend)
        }
    }
}

/// The worst status of all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Verdict(Status);

impl Verdict {
    pub(super) fn of(rows: &[Row]) -> Self {
        Self(
            rows.iter()
                .map(|row| row.status)
                .max()
                .unwrap_or(Status::Ok),
        )
    }

    /// The worst status.
    pub fn status(self) -> Status {
        self.0
    }

    /// The process's exit status: 0 without a `FAIL`, else 1.
    pub fn exit_status(self) -> u8 {
        u8::from(self.0 == Status::Fail)
    }
}

/// `{"verdict": "WARN", "checks": [{"check", "status", "found", "mend"}]}`.
pub(super) fn write_json(rows: &[Row], out: &mut impl Write) -> io::Result<()> {
    #[derive(Serialize)]
    struct Report<'a> {
        verdict: Verdict,
        checks: &'a [Row],
    }
    let report = Report {
        verdict: Verdict::of(rows),
        checks: rows,
    };
    serde_json::to_writer_pretty(&mut *out, &report)?;
    writeln!(out)
}

/// Status, check, finding; a mend stands below its finding.
pub(super) fn write_table(rows: &[Row], out: &mut impl Write) -> io::Result<()> {
    let width = rows.iter().map(|row| row.check.len()).max().unwrap_or(0);
    for row in rows {
        let Row { check, found, .. } = row;
        writeln!(out, "{:<4}  {check:<width$}  {found}", row.status)?;
        if let Some(mend) = &row.mend {
            writeln!(out, "{:4}  {:width$}  -> {mend}", "", "")?;
        }
    }
    let count = |status| rows.iter().filter(|row| row.status == status).count();
    let (warnings, failures) = (count(Status::Warn), count(Status::Fail));
    let summary = match (failures, warnings) {
        (0, 0) => "everything is as it should be".to_owned(),
        (0, _) => format!("guests can run on device-dax; {warnings} to look at"),
        (_, _) => {
            format!("no guest can run on device-dax yet; {failures} to mend, {warnings} to look at")
        }
    };
    writeln!(out, "\n{}: {summary}", Verdict::of(rows).status())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        vec![
            Row::ok("kvm", "fine"),
            Row::warn("interrupt-remapping", "off", "intremap=on"),
        ]
    }

    #[test]
    fn the_verdict_is_the_worst_row() {
        let mut rows = rows();
        assert_eq!(Verdict::of(&[]).status(), Status::Ok);
        assert_eq!(Verdict::of(&rows).status(), Status::Warn);
        assert_eq!(Verdict::of(&rows).exit_status(), 0);
        rows.insert(0, Row::fail("dax", "none", "make one"));
        assert_eq!(Verdict::of(&rows).status(), Status::Fail);
        assert_eq!(Verdict::of(&rows).exit_status(), 1);
    }

    #[test]
    fn the_table_is_aligned() {
        let mut out = Vec::new();
        write_table(&rows(), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let expected = [
            "OK    kvm                  fine",
            "WARN  interrupt-remapping  off",
            "                           -> intremap=on",
            "",
            "WARN: guests can run on device-dax; 1 to look at",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn json_has_the_fields_of_a_row() {
        let mut out = Vec::new();
        write_json(&rows(), &mut out).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["verdict"], "WARN");
        assert_eq!(value["checks"][0]["status"], "OK");
        assert!(value["checks"][0]["mend"].is_null());
        assert_eq!(value["checks"][1]["check"], "interrupt-remapping");
        assert_eq!(value["checks"][1]["found"], "off");
        assert_eq!(value["checks"][1]["mend"], "intremap=on");
    }
}
