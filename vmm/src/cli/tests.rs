//! Whole command lines, as a shell would hand them over.

use std::path::Path;

use super::*;
use crate::config::{Backing, ByteSize, CpusError, MemoryError, PayloadError};

fn parse_line(line: &[&str]) -> Result<Command, CliError> {
    parse(line.iter().map(OsString::from))
}

/// A command line that boots, with `words` added.
fn with_kernel(words: &[&str]) -> Result<Command, CliError> {
    parse_line(&[&["daxhund", "--kernel", "/k"], words].concat())
}

fn running(words: &[&str]) -> (ValidConfig, Logging) {
    match with_kernel(words) {
        Ok(Command::Run { config, logging }) => (*config, logging),
        other => panic!("{words:?}: {other:?}"),
    }
}

#[test]
fn a_kernel_alone_gets_the_defaults() {
    let (config, logging) = running(&[]);
    assert_eq!(config.kernel(), Path::new("/k"));
    assert_eq!((config.cpus().boot_vcpus, config.cpus().max_vcpus), (1, 1));
    assert_eq!(config.zones().len(), 1);
    assert_eq!(config.serial(), &ConsoleConfig::Tty);
    assert_eq!(config.config().console, ConsoleConfig::Off);
    assert_eq!(logging, Logging::default());
}

#[test]
fn every_word_reaches_the_configuration() {
    let (config, logging) = running(&[
        "--initramfs",
        "/i",
        "--cmdline",
        "console=ttyS0 quiet",
        "--cpus",
        "boot=2,max=4",
        "--memory",
        "size=0",
        "--memory-zone",
        "id=a,size=1G,file=/dev/dax0.0,offset=512M",
        "id=b,size=2G",
        "--memory-zone",
        "id=c,size=4G",
        "--numa",
        "guest_numa_id=0,cpus=[0-1],memory_zones=[a,b]",
        "guest_numa_id=1,memory_zones=[c]",
        "--serial",
        "file=/tmp/log",
        "--console",
        "null",
        "--seccomp",
        "false",
        "--log-file",
        "/tmp/vmm.log",
        "-vv",
    ]);
    assert_eq!(config.initramfs(), Some(Path::new("/i")));
    assert_eq!(config.cmdline(), "console=ttyS0 quiet");
    assert_eq!((config.cpus().boot_vcpus, config.cpus().max_vcpus), (2, 4));
    let ids: Vec<&str> = config.zones().iter().map(|zone| zone.id.as_str()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    assert!(matches!(
        &config.zones()[0].backing,
        Backing::File { path, offset, .. }
            if path == Path::new("/dev/dax0.0") && *offset == ByteSize::from_mib(512)
    ));
    assert_eq!(config.numa().len(), 2);
    assert_eq!(config.serial(), &ConsoleConfig::File("/tmp/log".into()));
    assert_eq!(config.config().console, ConsoleConfig::Null);
    assert_eq!(logging.level, LogLevel::Debug);
    assert_eq!(logging.file.as_deref(), Some(Path::new("/tmp/vmm.log")));
}

#[test]
fn each_v_logs_more() {
    for (flags, level) in [
        (&[][..], LogLevel::Warn),
        (&["-v"], LogLevel::Info),
        (&["-v", "-v"], LogLevel::Debug),
        (&["-vvv"], LogLevel::Trace),
        (&["-vvvvv"], LogLevel::Trace),
    ] {
        assert_eq!(running(flags).1.level, level, "{flags:?}");
    }
}

#[test]
fn words_not_built_are_refused_with_the_exact_text() {
    for flag in unsupported::FLAGS {
        let words = format!("not supported by daxhund: --{flag}");
        for line in [
            &[&format!("--{flag}")[..]][..],
            &[&format!("--{flag}"), "value"],
            &[&format!("--{flag}=value")],
            &[&format!("--{flag}"), "a=b", "c=d", "-v"],
        ] {
            let error = with_kernel(line).unwrap_err();
            assert_eq!(error.to_string(), words, "{line:?}");
        }
    }
    for name in unsupported::SUBCOMMANDS {
        for line in [&["daxhund", name][..], &["daxhund", name, "list", "--json"]] {
            let error = parse_line(line).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("not supported by daxhund: {name}")
            );
        }
    }
    for (line, words) in [
        (&["--seccomp", "true"][..], "--seccomp true"),
        (&["--seccomp", "log"], "--seccomp log"),
        (&["--console", "tty"], "--console tty"),
        (&["--console", "file=/tmp/x"], "--console file"),
        (
            &["--memory-zone", "id=a,size=1G,dma=off"],
            "--memory-zone dma",
        ),
        (&["--memory", "mergeable=on"], "--memory mergeable=on"),
        (&["--vsock", "cid=3", "--disk", "path=d"], "--vsock"),
    ] {
        let error = with_kernel(line).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("not supported by daxhund: {words}")
        );
    }
}

#[test]
fn mistakes_are_named() {
    for (line, words) in [
        (&["--kernle", "/k"][..], "'--kernle'"),
        (&["--cpus"], "a value is required for '--cpus"),
        (
            &["--cpus", "boot=1", "--cpus", "boot=2"],
            "cannot be used multiple times",
        ),
        (&["--seccomp", "maybe"], "invalid value 'maybe'"),
        (&["stray"], "'stray'"),
        (&["doctor"], "doctor"),
    ] {
        let error = with_kernel(line).unwrap_err();
        assert!(
            matches!(error, CliError::Syntax { .. }),
            "{line:?}: {error:?}"
        );
        let message = error.to_string();
        assert!(message.contains(words), "{line:?}: {message}");
        assert!(!message.starts_with("error:"), "{message}");
    }
    let error = with_kernel(&["--memory", "sise=1G"]).unwrap_err();
    assert!(matches!(&error, CliError::Word(WordError::UnknownKey { key, .. }) if key == "sise"));
    assert!(
        error.to_string().contains("the keys are size, shared"),
        "{error}"
    );
    let error = with_kernel(&["--serial", "stdio"]).unwrap_err();
    assert!(matches!(
        error,
        CliError::Word(WordError::Mode {
            flag: "--serial",
            ..
        })
    ));
    let error = with_kernel(&["--cpus", "boot=0"]).unwrap_err();
    assert_eq!(error, CliError::Config(CpusError::NoVcpus.into()));
    let error = with_kernel(&["--memory", "size=0"]).unwrap_err();
    assert_eq!(error, CliError::Config(MemoryError::NoMemory.into()));
    let error = parse_line(&["daxhund", "--cpus", "boot=1"]).unwrap_err();
    assert_eq!(error, CliError::Config(PayloadError::NoKernel.into()));
}

#[test]
fn no_arguments_are_a_usage_error_that_shows_the_usage() {
    let error = parse_line(&["daxhund"]).unwrap_err();
    assert!(matches!(error, CliError::NothingToDo { .. }), "{error:?}");
    let message = error.to_string();
    assert!(
        message.starts_with("nothing to do: give --kernel PATH"),
        "{message}"
    );
    assert!(message.contains("Usage: daxhund"), "{message}");
}

#[test]
fn doctor_is_a_subcommand() {
    assert_eq!(
        parse_line(&["daxhund", "doctor"]),
        Ok(Command::Doctor { json: false })
    );
    assert_eq!(
        parse_line(&["daxhund", "doctor", "--json"]),
        Ok(Command::Doctor { json: true })
    );
    let error = parse_line(&["daxhund", "doctor", "--yaml"]).unwrap_err();
    assert!(error.to_string().contains("--yaml"), "{error}");
}

#[test]
fn the_version_answers_to_the_name_it_is_called_by() {
    let own = concat!("daxhund ", env!("CARGO_PKG_VERSION"));
    for flag in ["-V", "--version"] {
        let version = |program| parse_line(&[program, flag]);
        assert_eq!(
            version("/usr/bin/daxhund"),
            Ok(Command::Version(own.to_owned()))
        );
        let contract = Ok(Command::Version(format!(
            "cloud-hypervisor v53.0.0 ({own})"
        )));
        assert_eq!(version("cloud-hypervisor"), contract);
        assert_eq!(version("/usr/local/bin/cloud-hypervisor"), contract);
    }
}

fn help(line: &[&str]) -> String {
    match parse_line(line) {
        Ok(Command::Help(text)) => text,
        other => panic!("{line:?}: {other:?}"),
    }
}

#[test]
fn help_tells_keys_defaults_examples_and_statuses() {
    let text = help(&["daxhund", "--help"]);
    for words in [
        "Memory:",
        "Payload:",
        "--memory-zone",
        "offset=SIZE",
        "where in file it begins [default: 0]",
        "[default: tty]",
        "file=/dev/dax0.0",
        "130  ended by SIGINT",
        "--vsock",
        "doctor",
    ] {
        assert!(text.contains(words), "{words} is not in:\n{text}");
    }
    let short = help(&["daxhund", "-h"]);
    assert!(short.len() < text.len() / 2, "{short}");
    assert!(help(&["daxhund", "doctor", "--help"]).contains("--json"));
}
