//! Keeps ARCHITECTURE.md true: its paths exist and its rules hold in the sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Files that wrap system calls or raw mappings; `unsafe` is a review topic in each. Sorted.
const MAY_BE_UNSAFE: &[&str] = &[
    "backends/dax/src/ofd.rs",
    "backends/dax/src/pages.rs",
    "backends/dax/src/sigbus.rs",
    "backends/pin/src/pages.rs",
    "backends/pin/src/sys.rs",
    "backends/vhost-user-blk/src/disk/mapped.rs",
    "backends/vhost-user/src/guest.rs",
    "backends/vhost-user/src/seccomp/trap.rs",
    "vmm/src/inherited.rs",
    "vmm/src/kvm/interrupts.rs",
    "vmm/src/kvm/kick.rs",
    "vmm/src/kvm/machine_check.rs",
    "vmm/src/kvm/slots.rs",
    "vmm/src/kvm/vcpu.rs",
    "vmm/src/memory/discard.rs",
    "vmm/src/memory/mapping.rs",
    "vmm/src/memory/region.rs",
    "vmm/src/vfio/descriptor.rs",
    "vmm/src/virtio/blk/syscalls.rs",
    "vmm/src/virtio/blk/uring.rs",
    "vmm/src/virtio/net/tap.rs",
    "vmm/src/virtio/net/vectors.rs",
];

const LONGEST_FILE: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Rust sources below a folder, with their path from the root.
fn sources(folder: &str) -> Vec<(String, String)> {
    fn visit(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // What fuzzing builds is not ours.
                if path.file_name().is_some_and(|name| name != "target") {
                    visit(&path, into);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                into.push(path);
            }
        }
    }
    let root = root();
    let mut paths = Vec::new();
    visit(&root.join(folder), &mut paths);
    assert!(!paths.is_empty(), "no sources below {folder}");
    let name = |path: &PathBuf| {
        path.strip_prefix(&root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    paths
        .iter()
        .map(|path| (name(path), fs::read_to_string(path).unwrap()))
        .collect()
}

/// Code without comments and without what follows `#[cfg(test)]` at the start of a line.
fn code(text: &str) -> String {
    let shipped = text.split("\n#[cfg(test)]\nmod tests").next().unwrap();
    shipped
        .lines()
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

/// Names of the sibling modules a file imports: `crate::NAME`.
fn siblings(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for after in code.split("crate::").skip(1) {
        assert!(
            !after.starts_with('{'),
            "`use crate::{{...}}` hides arrows from this test; write one `use` for each module"
        );
        names.insert(
            after
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect(),
        );
    }
    names
}

fn module_of(path: &str) -> &str {
    path.strip_prefix("vmm/src/")
        .unwrap()
        .split(['/', '.'])
        .next()
        .unwrap()
}

#[test]
fn every_path_that_is_documented_exists() {
    let root = root();
    let mut checked = 0;
    for document in ["ARCHITECTURE.md", "README.md"] {
        let text = fs::read_to_string(root.join(document)).unwrap();
        let quoted = text.split('`').skip(1).step_by(2);
        let mapped = text
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        for word in quoted.chain(mapped) {
            let word = word.trim_end_matches(['.', ',', ':']);
            let ours = ["backends/", "vmm/", "guest-tests/", "resources/", ".ci/"];
            if ours.iter().any(|prefix| word.starts_with(prefix)) {
                assert!(
                    root.join(word).exists(),
                    "{document} names {word}, which does not exist"
                );
                checked += 1;
            }
        }
    }
    assert!(
        checked > 20,
        "only {checked} paths found: is the check still reading the page?"
    );
}

#[test]
fn the_documented_exit_statuses_are_the_real_ones() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for (status, meaning) in daxhund::cli::ExitStatus::TABLE {
        let row = format!("| {} | {meaning} |", status.code());
        assert!(readme.contains(&row), "README.md lacks the row: {row}");
    }
}

#[test]
fn the_arrows_between_modules_hold() {
    let apart = ["kvm", "vfio", "virtio"];
    let alone = ["config", "bus", "lifecycle"];
    for (path, text) in sources("vmm/src") {
        let module = module_of(&path);
        for other in siblings(&code(&text)) {
            if other == module {
                continue;
            }
            assert!(
                !alone.contains(&module),
                "{path}: {module} imports {other}, it may import no sibling"
            );
            assert!(
                !(apart.contains(&module) && apart.contains(&other.as_str())),
                "{path}: {module} and {other} must not know each other; machine introduces them"
            );
            assert!(
                other != "machine" || module == "main",
                "{path}: only main may import machine"
            );
        }
    }
}

#[test]
fn backends_know_nothing_of_the_vmm() {
    let root = root();
    for backend in fs::read_dir(root.join("backends")).unwrap() {
        let manifest = backend.unwrap().path().join("Cargo.toml");
        let text = fs::read_to_string(&manifest).unwrap();
        let depends = text
            .lines()
            .any(|line| line.starts_with("daxhund.") || line.starts_with("daxhund "));
        assert!(!depends, "{} depends on the vmm", manifest.display());
    }
}

#[test]
fn unsafe_is_where_system_calls_are_wrapped() {
    let mut found = Vec::new();
    for (path, text) in sources("vmm/src").into_iter().chain(sources("backends")) {
        // A crate's test support is compiled for its tests only.
        if path.ends_with("/testing.rs") {
            continue;
        }
        if code(&text)
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(|word| word == "unsafe")
        {
            found.push(path);
        }
    }
    found.sort();
    let strangers: Vec<_> = found
        .iter()
        .filter(|path| !MAY_BE_UNSAFE.contains(&path.as_str()))
        .collect();
    assert!(
        strangers.is_empty(),
        "`unsafe` outside of the files that may have it: {strangers:?}"
    );
    let gone: Vec<_> = MAY_BE_UNSAFE
        .iter()
        .filter(|path| !found.iter().any(|f| f == *path))
        .collect();
    assert!(
        gone.is_empty(),
        "these need no `unsafe` any more; take them off the list: {gone:?}"
    );
}

#[test]
fn no_file_has_grown_beyond_one_noun() {
    for folder in ["vmm", "backends", "guest-tests"] {
        for (path, text) in sources(folder) {
            let lines = text.lines().count();
            assert!(
                lines <= LONGEST_FILE,
                "{path} has {lines} lines: a noun is missing"
            );
        }
    }
}
