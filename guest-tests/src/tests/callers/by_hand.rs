//! README's "REST by hand", as it stands there: its commands are run on the emulated host, one after the other on one VM, by curl,
//! and have to be answered as the text behind each says.

use std::fs;
use std::path::Path;
use std::time::Duration;

use lab_agent::guest_protocol::READY_MARK;
use lab_agent::host_protocol::ExitStatus;
use serde_json::Value;

use super::super::remote::{Remote, waiting_vmm};
use super::super::support::{initramfs, scratch};
use super::super::vhost_fs::FsDaemon;
use super::super::vhost_user::StorageDaemon;
use super::super::{Lab, TestError, claim};
use crate::guest::READY_DEADLINE;
use crate::host::cards::Card;
use crate::share::{ImageForm, kernel_path};
use crate::suite::SCRATCH;
use crate::wait::{self, PATIENCE};

const HEADING: &str = "## REST by hand";
/// How a command begins.
const CALL: &str = "call ";
/// Where curl and its libraries are on the host.
const CURL: &str = "/lab/peers/curl";
/// The longest is a drain, for which the guest has ten seconds.
const COMMAND: Duration = PATIENCE;

/// What README says.
#[derive(Debug)]
struct Transcript {
    /// The line that says what `call` is.
    definition: String,
    calls: Vec<Call>,
}

#[derive(Debug)]
struct Call {
    command: String,
    status: u16,
    /// The body: nothing, or what is in one.
    shape: Option<Shape>,
}

#[derive(Debug, Eq, PartialEq)]
enum Shape {
    /// An object with these fields, and others.
    Object(Vec<String>),
    /// The reasons of an error, outermost first.
    Reasons,
    /// Text of another kind.
    Text,
}

/// Reads the first block of code of the section: `call NAME ARGUMENT...  # STATUS SHAPE`, over several lines where a body has
/// several.
fn transcript(readme: &str) -> Result<Transcript, String> {
    let (_, section) = readme.split_once(HEADING).ok_or("no such section")?;
    let (_, block) = section.split_once("```\n").ok_or("no block of code")?;
    let (block, _) = block.split_once("```").ok_or("a block without an end")?;
    let definition = block.lines().find(|line| line.starts_with("call()"));
    let definition = definition.ok_or("`call` is not defined")?.to_owned();
    let mut calls = Vec::new();
    let mut command = String::new();
    for line in block.lines() {
        if command.is_empty() && !line.starts_with(CALL) {
            continue;
        }
        command.push_str(line);
        let Some((words, told)) = command.rsplit_once(" # ") else {
            command.push('\n');
            continue;
        };
        let call = answer(told).map(|(status, shape)| Call {
            command: words.trim_end().to_owned(),
            status,
            shape,
        });
        calls.push(call.map_err(|wrong| format!("{wrong}: {command}"))?);
        command.clear();
    }
    if command.is_empty() {
        Ok(Transcript { definition, calls })
    } else {
        Err(format!("no answer is told: {command}"))
    }
}

/// `204`, `200 {field, field}`, `200 text` or `500 [reasons]`; a remark may follow after a colon.
fn answer(told: &str) -> Result<(u16, Option<Shape>), &'static str> {
    let told = told.split_once(": ").map_or(told, |(told, _)| told).trim();
    let (status, shape) = told.split_once(' ').unwrap_or((told, ""));
    let status = status.parse().map_err(|_| "no status")?;
    let inside = |open, close| shape.strip_prefix(open)?.strip_suffix(close);
    let shape = if let Some(fields) = inside('{', '}') {
        let fields = fields.split(", ").filter(|field| !field.is_empty());
        Some(Shape::Object(fields.map(str::to_owned).collect()))
    } else if inside('[', ']').is_some() {
        Some(Shape::Reasons)
    } else if shape == "text" {
        Some(Shape::Text)
    } else if shape.is_empty() {
        None
    } else {
        return Err("no shape of a body");
    };
    Ok((status, shape))
}

impl Call {
    /// Compares what was printed: the body and, on a line of its own, the status.
    fn check(&self, printed: &str) -> Result<(), TestError> {
        let wrong = || {
            format!(
                "`{}` should be answered with {} {:?}: {printed}",
                self.command, self.status, self.shape
            )
        };
        let (body, status) = printed
            .trim_end()
            .rsplit_once('\n')
            .unwrap_or(("", printed));
        let body = body.trim();
        let json = || serde_json::from_str::<Value>(body).unwrap_or_default();
        let shaped = match &self.shape {
            None => body.is_empty(),
            Some(Shape::Text) => !body.is_empty() && json().is_null(),
            Some(Shape::Object(fields)) => json()
                .as_object()
                .is_some_and(|object| fields.iter().all(|field| object.contains_key(field))),
            Some(Shape::Reasons) => json()
                .as_array()
                .is_some_and(|list| !list.is_empty() && list.iter().all(Value::is_string)),
        };
        claim(status.trim() == self.status.to_string() && shaped, wrong)
    }
}

fn readme() -> Result<Transcript, TestError> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let wrong =
        |why: &dyn std::fmt::Display| TestError::Claim(format!("{}: {why}", path.display()));
    let text = fs::read_to_string(&path).map_err(|error| wrong(&error))?;
    transcript(&text).map_err(|why| wrong(&why))
}

pub(super) fn requests_are_answered_as_the_readme_says(lab: &mut Lab) -> Result<(), TestError> {
    scratch(lab)?;
    let Transcript { definition, calls } = readme()?;
    let card = lab.host.bind_vfio(Card::Disk)?;
    let shared = FsDaemon::serve(lab, "share", "shared")?;
    let disk = StorageDaemon::start(lab, "disk", 1)?;
    lab.host
        .sh(&format!("cd {SCRATCH} && truncate -s 16M data.img"))?;
    // What is somewhere else here.
    let places = [
        ("/run/", format!("{SCRATCH}/")),
        ("/srv/", format!("{SCRATCH}/")),
        (
            "/boot/vmlinuz",
            kernel_path(&lab.kernel.release, ImageForm::Elf),
        ),
        ("/boot/initrd.img", initramfs(lab)),
        ("/dev/dax1.0", lab.host.dax()[1].path.clone()),
        ("0000:01:00.0", card.device().address.clone()),
    ];
    let here = |text: &str| {
        places.iter().fold(text.to_owned(), |text, (there, here)| {
            text.replace(there, here)
        })
    };
    let remote = Remote::at("vm.sock");
    let vmm = lab.host.spawn(waiting_vmm(&remote, &[], None))?;
    remote.ready(lab)?;
    let curl = format!("curl() {{ LD_LIBRARY_PATH={CURL}/lib {CURL}/curl \"$@\"; }}");
    let definition = here(&definition);
    for call in &calls {
        let script = format!("{curl}\n{definition}\n{}", here(&call.command));
        let output = lab.host.run_within(&["sh", "-c", &script], COMMAND)?;
        claim(output.status.success(), || {
            format!(
                "`{}` ended with {}: {}",
                call.command, output.status, output.stderr
            )
        })?;
        call.check(&output.stdout)?;
        if call.command.starts_with("call vm.boot") {
            is_up(lab)?;
        }
    }
    let status = vmm.wait(PATIENCE)?;
    claim(status == ExitStatus::Code(0), || {
        format!(
            "the last call ended the VMM with {status}: {}",
            vmm.stderr()
        )
    })?;
    shared.has_served()?;
    disk.end()?;
    Ok(card.release()?)
}

/// A person types slowly enough: what follows is for a guest that is up.
fn is_up(lab: &Lab) -> Result<(), TestError> {
    wait::until(
        READY_DEADLINE,
        || {
            Ok(lab
                .host
                .read_text(&format!("{SCRATCH}/vm.log"))?
                .contains(READY_MARK))
        },
        || TestError::Claim("the guest does not come up".to_owned()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# x\n## REST by hand\n\nWords.\n\n```\ndaxhund &\ncall() { curl \"$@\"; }\n\n\
                        call vmm.ping   # 200 {version, pid}\ncall vm.create -d '{\"a\":\n 1}' # 204\n\
                        call vm.coredump # 500 [why]: not built\n```\n";

    #[test]
    fn a_command_ends_where_its_answer_is_told() {
        let Transcript { definition, calls } = transcript(TEXT).unwrap();
        assert_eq!(definition, "call() { curl \"$@\"; }");
        let commands: Vec<&str> = calls.iter().map(|call| call.command.as_str()).collect();
        assert_eq!(
            commands,
            [
                "call vmm.ping",
                "call vm.create -d '{\"a\":\n 1}'",
                "call vm.coredump"
            ]
        );
        assert_eq!(
            calls.iter().map(|call| call.status).collect::<Vec<_>>(),
            [200, 204, 500]
        );
        let fields = ["version", "pid"].map(str::to_owned).to_vec();
        assert_eq!(calls[0].shape, Some(Shape::Object(fields)));
        assert_eq!(calls[2].shape, Some(Shape::Reasons));
    }

    #[test]
    fn what_tells_no_answer_is_refused() {
        for (text, why) in [
            ("", "no such section"),
            (
                "## REST by hand\n```\ncall()\ncall a\n```",
                "no answer is told",
            ),
            (
                "## REST by hand\n```\ncall()\ncall a # fine\n```",
                "no status",
            ),
            (
                "## REST by hand\n```\ncall()\ncall a # 200 fine\n```",
                "no shape",
            ),
            ("## REST by hand\n```\n```", "not defined"),
        ] {
            let wrong = transcript(text).unwrap_err();
            assert!(wrong.contains(why), "{text}: {wrong}");
        }
    }

    #[test]
    fn answers_are_compared_with_what_is_told() {
        let calls = transcript(TEXT).unwrap().calls;
        let fits = |call: usize, printed: &str| calls[call].check(printed).is_ok();
        assert!(fits(0, "{\"version\":\"53\",\"pid\":1,\"more\":2}\n200\n"));
        assert!(!fits(0, "{\"version\":\"53\"}\n200\n") && !fits(0, "\n200\n"));
        assert!(fits(1, "\n204\n") && !fits(1, "\n200\n") && !fits(1, "{}\n204\n"));
        assert!(fits(2, "[\"why\"]\n500\n") && !fits(2, "[]\n500\n"));
        assert_eq!(answer("200 text"), Ok((200, Some(Shape::Text))));
    }

    #[test]
    fn the_readme_can_be_read() {
        assert!(readme().unwrap().calls.len() > 20);
    }
}
