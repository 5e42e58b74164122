//! Whole command lines, as a shell would hand them over.

use std::path::Path;

use super::*;
use crate::config::{Backing, ByteSize, CpusError, MemoryError, PayloadError, PmemSource};
use crate::monitor::Form;

fn parse_line(line: &[&str]) -> Result<Command, CliError> {
    parse(line.iter().map(OsString::from))
}

/// A command line that boots, with `words` added.
fn with_kernel(words: &[&str]) -> Result<Command, CliError> {
    parse_line(&[&["daxhund", "--kernel", "/k"], words].concat())
}

fn running(words: &[&str]) -> (ValidConfig, Logging) {
    match with_kernel(words) {
        Ok(Command::Run {
            config: Some(config),
            logging,
            api: None,
            events: None,
            guard: RemovalGuard::Auto,
        }) => (*config, logging),
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
    assert_eq!(config.console(), None);
    assert_eq!(config.segments(), 1);
    assert_eq!(config.rng().src, Path::new("/dev/urandom"));
    assert!(config.disks().is_empty() && config.net().is_empty() && config.pmem().is_empty());
    assert!(config.vsock().is_none() && config.balloon().is_none());
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
        "--disk",
        "path=/d,id=root",
        "path=/e,readonly=on",
        "--disk",
        "path=/f",
        "--net",
        "tap=t0,id=n",
        "--pmem",
        "file=/dev/dax1.0,id=p",
        "--pmem",
        "file=/p",
        "--fs",
        "tag=share,socket=/f",
        "tag=more,socket=/g,num_queues=2",
        "--vsock",
        "cid=3,socket=/v,id=v",
        "--balloon",
        "size=1G",
        "--rng",
        "src=/dev/hwrng",
        "--platform",
        "num_pci_segments=2",
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
    let console = config.console().map(|console| &console.output);
    assert_eq!(console, Some(&ConsoleConfig::Null));
    let ids: Vec<&str> = config.disks().iter().map(|disk| disk.id.as_str()).collect();
    assert_eq!(ids, ["root", "_disk0", "_disk1"]);
    let PmemSource::File { file, .. } = &config.pmem()[0].source else {
        panic!("{:?}", config.pmem())
    };
    assert_eq!(file, Path::new("/dev/dax1.0"));
    let ids: Vec<&str> = config.fs().iter().map(|fs| fs.id.as_str()).collect();
    assert_eq!(ids, ["_fs2", "_fs3"]);
    assert_eq!(config.fs()[1].num_queues, 2);
    assert_eq!(config.pmem()[1].id, "_pmem4");
    assert_eq!(config.net().len(), 1);
    assert_eq!(config.vsock().map(|vsock| vsock.cid), Some(3));
    assert_eq!(
        config.balloon().map(|balloon| balloon.size),
        Some(ByteSize::from_mib(1024))
    );
    assert_eq!(config.rng().src, Path::new("/dev/hwrng"));
    assert_eq!(config.segments(), 2);
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
        (&["--net", "bw_size=1"], "--net bw_size"),
        (&["--platform", "iommufd_fd=5"], "--platform iommufd_fd"),
        (
            &["--memory-zone", "id=a,size=1G,align=2M"],
            "--memory-zone align",
        ),
        (&["--memory", "mergeable=on"], "--memory mergeable=on"),
        (&["--vdpa", "path=v", "--device", "path=d"], "--vdpa"),
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

/// A command line without a guest of its own.
fn serving(words: &[&str]) -> (ApiSocket, Option<EventMonitor>) {
    match parse_line(&[&["daxhund"], words].concat()) {
        Ok(Command::Run {
            config: None,
            api: Some(api),
            events,
            ..
        }) => (api, events),
        other => panic!("{words:?}: {other:?}"),
    }
}

#[test]
fn with_an_api_socket_the_guest_may_come_later() {
    let socket = || ApiSocket::Path("/run/s".into());
    assert_eq!(serving(&["--api-socket", "/run/s"]), (socket(), None));
    let line = ["--api-socket=path=/run/s", "-v", "--seccomp", "false"];
    assert_eq!(serving(&line), (socket(), None));
    let line = ["--api-socket", "fd=7", "--event-monitor", "path=/run/e"];
    let events = EventMonitor {
        place: EventPlace::Path("/run/e".into()),
        form: Form::Ch,
    };
    assert_eq!(serving(&line), (ApiSocket::Descriptor(7), Some(events)));
    match with_kernel(&["--api-socket", "/run/s", "--event-monitor", "fd=8"]) {
        Ok(Command::Run {
            config: Some(config),
            api,
            events,
            ..
        }) => {
            assert_eq!(config.kernel(), Path::new("/k"));
            assert_eq!(api, Some(socket()));
            let place = events.map(|events| events.place);
            assert_eq!(place, Some(EventPlace::Descriptor(8)));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_without_a_kernel_is_no_guest() {
    for (word, value) in [
        ("--cpus", "boot=2"),
        ("--memory-zone", "id=a,size=1G"),
        ("--disk", "path=/d"),
        ("--pmem", "file=/p"),
        ("--initramfs", "/i"),
        ("--cmdline", "quiet"),
        ("--serial", "tty"),
        ("--console", "pty"),
        ("--platform", "num_pci_segments=1"),
    ] {
        let line = ["daxhund", "--api-socket", "/run/s", word, value];
        let error = parse_line(&line).unwrap_err();
        let word = word.to_owned();
        assert_eq!(error, CliError::NoGuest { word });
        let error = parse_line(&["daxhund", line[3], value]).unwrap_err();
        assert_eq!(error, CliError::Config(PayloadError::NoKernel.into()));
    }
    let error = parse_line(&["daxhund", "--event-monitor", "fd=8"]).unwrap_err();
    assert_eq!(error, CliError::Config(PayloadError::NoKernel.into()));
}

#[test]
fn the_console_takes_the_terminal_from_the_serial_port() {
    let outputs = |words: &[&str]| {
        let config = running(words).0;
        let console = config.console().map(|console| console.output.clone());
        (config.serial().clone(), console)
    };
    for (words, serial, console) in [
        (&[][..], ConsoleConfig::Tty, None),
        (
            &["--console", "tty"],
            ConsoleConfig::Null,
            Some(ConsoleConfig::Tty),
        ),
        (
            &["--console", "pty"],
            ConsoleConfig::Tty,
            Some(ConsoleConfig::Pty),
        ),
        (
            &["--console", "file=/tmp/x", "--serial", "null"],
            ConsoleConfig::Null,
            Some(ConsoleConfig::File("/tmp/x".into())),
        ),
        (&["--serial", "pty"], ConsoleConfig::Pty, None),
    ] {
        assert_eq!(outputs(words), (serial, console), "{words:?}");
    }
    let error = with_kernel(&["--console", "tty", "--serial", "tty"]).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("both want the VMM's one terminal")
    );
}

#[test]
fn bad_devices_are_named() {
    for (line, words) in [
        (
            &["--disk", "readonly=on"][..],
            "--disk: key \"path\" is missing",
        ),
        (
            &["--disk", "path=/d,queue_size=7"],
            "queue size out of range",
        ),
        (
            &["--disk", "path=/d,image_type=qcow2"],
            "image_type=qcow2 is not raw",
        ),
        (&["--disk", "path=/d", "path=/d"], "both use /d"),
        (&["--net", "num_queues=3"], "an even number"),
        (
            &["--net", "mac=x"],
            "--net: mac=x is not an Ethernet address",
        ),
        (&["--pmem", "size=1G"], "--pmem: key \"file\" is missing"),
        (
            &["--pmem", "file=/p,dma=maybe"],
            "--pmem: dma=maybe is not on or off",
        ),
        (
            &["--vsock", "cid=2,socket=/v"],
            "--vsock cid=2 is not a guest's",
        ),
        (
            &["--balloon", "size=512M"],
            "leaves nothing of the guest's 512M",
        ),
        (&["--rng", "source=/r"], "--rng: unknown key \"source\""),
        (&["--platform", "num_pci_segments=0"], "give 1 to 16"),
        (&["--api-socket", "fd=1"], "--api-socket: fd=1 is not"),
        (
            &["--event-monitor", "/e"],
            "--event-monitor: \"/e\" is not key=value",
        ),
        (
            &["--disk", "path=/d,id=x", "--pmem", "file=/p,id=x"],
            "id=x is used by",
        ),
        (
            &["--disk", "path=/d,pci_device_id=0"],
            "is the host bridge's",
        ),
    ] {
        let error = with_kernel(line).unwrap_err().to_string();
        assert!(error.contains(words), "{line:?}: {error}");
    }
    for word in [
        "--vsock",
        "--balloon",
        "--rng",
        "--platform",
        "--api-socket",
    ] {
        let error = with_kernel(&[word, "a=b", word, "a=b"]).unwrap_err();
        assert!(error.to_string().contains("multiple times"), "{error}");
    }
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
fn pools_are_listed_and_reserved_of() {
    let pool = |words: &[&str]| match parse_line(&[&["daxhund", "pool"], words].concat()) {
        Ok(Command::Pool(pool)) => pool,
        other => panic!("{words:?}: {other:?}"),
    };
    let (none, json) = (None, false);
    assert_eq!(pool(&["list"]), Pool::List { pool: none, json });
    let (ram, json) = (Some("ram".to_owned()), true);
    assert_eq!(
        pool(&["free", "ram", "--json"]),
        Pool::Free { pool: ram, json }
    );
    assert_eq!(
        pool(&["reserve", "ram", "--size", "512M", "--node", "1"]),
        Pool::Reserve {
            pool: "ram".to_owned(),
            size: ByteSize::from_mib(512),
            node: Some(1),
            json: false,
        }
    );
    for (words, says) in [
        (&["reserve", "ram"][..], "--size <SIZE>"),
        (&["reserve", "--size", "1G"], "<POOL>"),
        (&["reserve", "ram", "--size", "big"], "such as 512M or 4G"),
    ] {
        let error = parse_line(&[&["daxhund", "pool"], words].concat()).unwrap_err();
        assert!(error.to_string().contains(says), "{words:?}: {error}");
    }
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
        "Devices:",
        "discard_writes=on|off",
        "The default is tty, or null with --console tty",
        "an inherited one that listens already",
        "file=/dev/dax0.0",
        "130  ended by SIGINT",
        "--watchdog",
        "doctor",
    ] {
        assert!(text.contains(words), "{words} is not in:\n{text}");
    }
    let short = help(&["daxhund", "-h"]);
    assert!(short.len() < text.len() / 2, "{short}");
    assert!(help(&["daxhund", "doctor", "--help"]).contains("--json"));
}
