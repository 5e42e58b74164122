//! Manual pages and shell completions in `resources/` are those of this version: made from the same tables as `--help`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli;
use crate::remote;

const BLESS: &str = "DAXHUND_BLESS=1 cargo test -p daxhund of_this_version";
const SHELLS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash"),
    (Shell::Zsh, "zsh"),
    (Shell::Fish, "fish"),
];

/// Files below `resources/`, with what is in them.
type Documents = BTreeMap<String, String>;

fn generated() -> Documents {
    let mut documents = Documents::new();
    for command in [cli::command(), remote::command()] {
        let mut command = command.version(env!("CARGO_PKG_VERSION"));
        let name = command.get_name().to_owned();
        for (shell, extension) in SHELLS {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command, &name, &mut text);
            let path = format!("completions/{name}.{extension}");
            documents.insert(path, String::from_utf8(text).unwrap());
        }
        // Names subcommands after all that leads to them.
        command.build();
        pages(&command, &mut documents);
    }
    documents
}

/// A page for a command and for each of its subcommands that are not hidden.
fn pages(command: &Command, documents: &mut Documents) {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        // `help` is what clap adds when it builds a command.
        if sub.get_name() != "help" {
            pages(sub, documents);
        }
    }
    let name = command.get_display_name().unwrap_or(command.get_name());
    let mut text = Vec::new();
    Man::new(command.clone())
        .manual("daxhund")
        .source(concat!("daxhund ", env!("CARGO_PKG_VERSION")))
        .render(&mut text)
        .unwrap();
    documents.insert(format!("man/{name}.1"), String::from_utf8(text).unwrap());
}

/// Which are there now.
fn found() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for folder in ["completions", "man"] {
        let Ok(files) = fs::read_dir(root().join(folder)) else {
            continue;
        };
        for file in files {
            let name = file.unwrap().file_name().into_string().unwrap();
            found.insert(format!("{folder}/{name}"));
        }
    }
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources")
}

/// Whether files are made anew before they are compared.
fn is_blessing() -> bool {
    std::env::var_os("DAXHUND_BLESS").is_some()
}

/// The file at `path` below `resources/` is `text`.
pub(crate) fn assert_is(path: &str, text: &str) {
    let file = root().join(path);
    if is_blessing() {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == text,
        "resources/{path} is not of this version; `{BLESS}` makes it anew"
    );
}

#[test]
fn they_are_of_this_version() {
    let generated = generated();
    if is_blessing() {
        for stale in found().difference(&generated.keys().cloned().collect()) {
            fs::remove_file(root().join(stale)).unwrap();
        }
    }
    for (path, text) in &generated {
        assert_is(path, text);
    }
    let names = generated.into_keys().collect();
    assert_eq!(found(), names, "`{BLESS}` makes them anew");
}

/// A few things that somebody would look for, so that an empty document is noticed.
#[test]
fn they_tell_words_and_keys() {
    let documents = generated();
    for (path, words) in [
        (
            "man/daxhund.1",
            vec!["memory\\-zone", "on_removal", "removal_timeout", "143"],
        ),
        ("man/daxhund-pool-list.1", vec!["json"]),
        ("man/daxhund-remote-add-disk.1", vec!["readonly"]),
        ("completions/daxhund.bash", vec!["--memory-zone", "doctor"]),
        ("completions/daxhund-remote.zsh", vec!["resize-disk"]),
        ("completions/daxhund.fish", vec!["removal-guard"]),
    ] {
        let text = &documents[path];
        for word in words {
            assert!(text.contains(word), "{path} has no {word}");
        }
    }
}
